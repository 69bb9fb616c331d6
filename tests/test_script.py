"""support/script.py: options, start-up, checkpoints, logs, speed, signals, pictures; every kind of
bad input has its one line."""

import argparse
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from support import script as common
from support.script import InputError

REPOSITORY, CPU = Path(common.__file__).parents[1], torch.device("cpu")


def fails(call, *parts):
    """`call()` raises an InputError of one line in which all the parts stand."""
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value), str(error.value)


def run_python(code, *arguments, check=True, **options):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True,
                          text=True, cwd=REPOSITORY, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


def in_processes(count, *command):
    """Runs a script with its options, in several processes under torchrun; each has one thread."""
    head = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone",
                                  f"--nproc_per_node={count}"]
    done = subprocess.run([sys.executable, *head, *map(str, command)], capture_output=True,
                          text=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.RunConfig):
    rank: int = common.option(4, "rank")
    share: float = common.option(0.5, "a share, 100 % is all")
    flip: bool = common.option(False, "mirror")
    kind: str = common.option("a", "which", choices=["a", "b"])
    table: bool = common.option(False, "a mode", takes=("rank", *common.RUNNING))
    rows: int = common.option(1, "its rows", needs="table")


def test_parse_config(capsys):
    assert common.parse_config(Config, []) == Config()
    typed = "--rank 8 --flip --no-kernels --out runs/x --share .1 --kind b"
    config = common.parse_config(Config, typed.split())
    assert config == Config(rank=8, flip=True, kernels=False, out="runs/x", share=0.1, kind="b")
    with pytest.raises(SystemExit):
        common.parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "rank (default: 4)" in text and "a share, 100 % is all (default: 0.5)" in text
    for wrong in (["--kind", "c"], ["--rank", "x"], ["--rnk"]):
        with pytest.raises(SystemExit) as stop:
            common.parse_config(Config, wrong)
        assert stop.value.code == 2
    assert common.parse_config(Config, "--table --rank 8 --out x".split()).table
    fails(lambda: common.parse_config(Config, ["--rows", "2"]), "--rows: expected --table beside")
    fails(lambda: common.parse_config(Config, ["--table", "--share", "1", "--flip"]),
          "--table: expected no options but", "found --share, --flip")


@pytest.mark.parametrize("size, parts, even", [(32, 4, 32), (8, 3, 6), (32, 12, 24), (2, 4, 4)])
def test_a_batch_is_shared_evenly(capsys, monkeypatch, size, parts, even):
    assert common.even_batch(Config(batch_size=size), parts).batch_size == even
    warned = f"WARNING: --batch-size {size}: steps take {even} images" in capsys.readouterr().err
    assert warned == (size != even)
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    common.even_batch(Config(batch_size=size), parts)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("driver, torch_sees_it, lines", [
    (None, False, 0), ("/usr/bin/nvidia-smi", False, 1), ("/usr/bin/nvidia-smi", True, 0)])
def test_a_driver_without_cuda_is_said_once(monkeypatch, capsys, driver, torch_sees_it, lines):
    monkeypatch.setattr(common.shutil, "which", {"nvidia-smi": driver}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees_it)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    common.warn_once.cache_clear()
    for _ in range(2):
        common.join(Config())
    common.join(Config(device="cpu"))
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("an NVIDIA driver is here, but torch") == lines


@pytest.mark.parametrize("script, given", [("mrm", {}), ("finetune", {}), ("reggan", {}), (
    "more.segment", {}), ("more.improved", {}), ("mrm", {"GOMP_SPINCOUNT": "7"})])
def test_waiting_threads_give_way_before_torch_is_imported(script, given):
    """torch's OpenMP reads the number once, when it is loaded."""
    code = """if True:
        import importlib, os, sys
        class Finder:
            def find_spec(self, name, *rest):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"))
        sys.meta_path.insert(0, Finder())
        importlib.import_module(sys.argv[1])"""
    free = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    assert run_python(code, script, env=free | given).stdout == ("7\n" if given else "3000\n")


KILLED = """
import os, signal, sys, torch
from support.script import over_images, run_script
from data import load_batches
def die(path):
    if path == 150:
        os.kill(os.getpid(), signal.SIGKILL)
    return path
class Images:
    __getitem__ = staticmethod(die)
if sys.argv[1] == "over_images":
    run_script(lambda: over_images(die, range(300)))
else:
    run_script(lambda: list(load_batches(Images(), list(range(300)), workers=2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are forks")
@pytest.mark.parametrize("way", ["over_images", "load_batches"])
def test_a_killed_worker_ends_the_run_in_one_line(way):
    done = run_python(KILLED, way, check=False)
    assert done.returncode == 2 and done.stdout == "", done
    line = "error: a process that reads images was killed, as the system does when memory runs out"
    assert done.stderr.strip().split("\r")[-1].split("\n")[-1] == line + "; use fewer --workers"
    assert "Traceback" not in done.stderr


def raising(error):
    raise error


@pytest.mark.parametrize("error, line", [
    (InputError("a.txt: line 3: wrong"), "error: a.txt: line 3: wrong\n"),
    (ConnectionResetError(), "use fewer --workers\n"), (EOFError(), "use fewer --workers\n")])
def test_an_error_of_the_user_or_of_a_worker_is_one_line(error, line, capsys):
    """A worker that is gone while it hands over a batch leaves one of the last two errors."""
    with pytest.raises(SystemExit) as stop:
        common.run_script(lambda: raising(error))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.endswith(line) and said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        common.run_script(lambda: raising(error))


@pytest.mark.parametrize("code", [0, 143])
def test_the_process_group_is_left_at_the_end_and_after_a_signal(monkeypatch, code):
    """Its threads would otherwise live longer than what they use, and abort the process."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("left"))
    try:
        common.run_script(lambda: code and sys.exit(code))
    except SystemExit as stop:
        calls.append(stop.code)
    assert calls == ["left", code][: 1 + bool(code)]


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    common.atomic_write(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        common.atomic_write(path, crash)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    fails(lambda: common.write_text(path / "below", ""), path / "below", "cannot be written")


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path):
    pytest.importorskip("resource")
    code = """if True:
        import resource, signal, sys, torch
        from support.script import run_script, save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        run_script(lambda: save_checkpoint(sys.argv[1], {"model": torch.ones(10**6)}))"""
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, {"model": torch.ones(2)})
    done = run_python(code, path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written" in done.stderr and list(tmp_path.iterdir()) == [path]
    assert common.load_checkpoint(path)["model"].shape == (2,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints(tmp_path):
    path, model = tmp_path / "a.pt", {"w": torch.randn(3, 4)}
    state = {"model": model, "step": 7, "random": torch.get_rng_state()}
    expected = torch.rand(3)
    common.save_checkpoint(path, state | {"args": argparse.Namespace(lr=0.1)})
    loaded = common.load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], model["w"])
    assert loaded["step"] == 7 and loaded["args"].lr == 0.1
    torch.set_rng_state(loaded["random"])
    assert torch.equal(torch.rand(3), expected)
    whole = path.read_bytes()
    for wrong in (b"", whole[: len(whole) // 2], b"not a checkpoint", pickle.dumps([1, 2])):
        path.write_bytes(wrong)
        fails(lambda: common.load_checkpoint(path), path, "tensors and plain values", "another")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no checkpoint")
    fails(lambda: common.load_checkpoint(path), path, "tensors and plain values", "another file")
    fails(lambda: common.load_checkpoint(tmp_path / "none.pt"), "none.pt: no such checkpoint")
    fails(lambda: common.load_checkpoint(tmp_path), tmp_path)
    torch.save([1, 2], path)
    fails(lambda: common.load_checkpoint(path), path, "expected a dict", "list")


class Evil:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_runs_no_code_and_nobody_is_told_how_to_make_it(tmp_path):
    evil, path = {"model": Evil(tmp_path / "owned")}, tmp_path / "a.pt"
    for state in (evil, torch.nn.Linear(2, 2)):
        torch.save(state, path)
        with pytest.raises(InputError, match="a.pt: expected .* found code to run") as error:
            common.load_checkpoint(path)
        advice = ("weights_only", "trust", "safe_globals", "likely succeed")
        assert not any(word in str(error.value) for word in advice)
    path.write_bytes(pickle.dumps(evil))
    fails(lambda: common.load_checkpoint(path), path)
    assert not (tmp_path / "owned").exists()


def test_run_log(tmp_path):
    log = common.RunLog(tmp_path / "run", Config(rank=2))
    log.line(step=1, loss=torch.tensor(0.5))
    common.RunLog(tmp_path / "run", Config(), history=log.history).line(step=2)
    log.json("result.json", {"auroc": np.float32(0.5)})
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] == 0.5
    assert common.read_json(tmp_path / "run/result.json") == {"auroc": 0.5}
    common.RunLog(tmp_path / "other", Config(), rank=1).line(step=1)
    assert not (tmp_path / "other").exists()
    path = tmp_path / "file"
    for wrong, *parts in (("{", "not readable as JSON", "line 1"), ("[" * 100_000, "as JSON")):
        path.write_text(wrong)
        fails(lambda: common.read_json(path), path, *parts)
    fails(lambda: common.read_json(tmp_path / "none"), "none: no such file")
    fails(lambda: common.read_json(tmp_path), tmp_path, "a text file in UTF-8")
    fails(lambda: common.RunLog(path, Config()), path, "cannot be written")
    (tmp_path / "run/log.jsonl").unlink()
    (tmp_path / "run/log.jsonl").mkdir()
    fails(lambda: log.line(step=1), "log.jsonl: cannot be written")


def product_type(config):
    with common.autocast_for(config, CPU)():
        return torch.nn.functional.linear(torch.ones(1, 4), torch.ones(2, 4)).dtype


@pytest.mark.parametrize("dtype", common.TYPES)
def test_a_typed_dtype_is_what_products_take(dtype):
    config = common.with_dtype(Config(dtype=dtype), CPU)
    assert config.dtype == dtype and product_type(config) == common.TYPES[dtype]


def slow_down(monkeypatch, slow, factor):
    """Lets products of the type `slow` take `factor` times the time of the others."""
    clock, product = [0.0], torch.Tensor.__matmul__

    def timed(a, b):
        clock[0] += 1e-3 * (factor if a.dtype == common.TYPES[slow] else 1.0)
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(common.time, "process_time", lambda: clock[0])
    common.fastest_type.cache_clear()


@pytest.mark.parametrize("slow, factor, chosen", [
    ("fp32", 1.19, "fp32"), ("fp32", 1.21, "bf16"), ("fp32", 4.0, "bf16"), ("bf16", 1.8, "fp32")])
def test_auto_takes_bfloat16_where_it_is_faster(monkeypatch, capsys, slow, factor, chosen):
    slow_down(monkeypatch, slow, factor)
    config = common.with_dtype(Config(), CPU)
    out = capsys.readouterr().out
    assert config.dtype == chosen and product_type(config) == common.TYPES[chosen]
    assert out.count("\n") == 1 and f"--dtype auto: {chosen} " in out and "fp32" in out
    assert common.with_dtype(Config(), CPU).dtype == chosen and not capsys.readouterr().out
    assert common.with_dtype(Config(), CPU, width=common.NARROW - 1).dtype == "fp32"
    common.fastest_type.cache_clear()


def test_a_resumed_run_and_a_cell_take_over_the_recorded_type(tmp_path, monkeypatch):
    """A measurement that comes out otherwise must not part a run from its first half, or two cells
    of one comparison."""
    slow_down(monkeypatch, "fp32", 4.0)
    saved = {"config": common.options_of(Config(dtype="fp32"))}
    assert common.with_dtype(Config(), CPU, saved=saved).dtype == "fp32"
    common.check_same(saved["config"], Config(), "last.pt")
    bf16 = Config(dtype="bf16")
    fails(lambda: common.check_same(saved["config"], bf16, "last.pt"), "--dtype bf16")
    ran = []

    def run(config):
        config = common.with_dtype(config, CPU)
        ran.append(config.dtype)
        common.RunLog(config.out, config).json("result.json", {})

    cells = {"a": Config(), "b": Config(rank=5)}
    run_cells = functools.partial(common.run_cells, tmp_path, cells, run, lambda cell: "")
    assert len(list(run_cells())) == 2 and ran == ["bf16", "bf16"]
    (tmp_path / "b" / "result.json").unlink()
    slow_down(monkeypatch, "bf16", 4.0)
    assert len(list(run_cells())) == 2 and ran[2:] == ["bf16"]
    fails(lambda: list(common.run_cells(tmp_path, cells, run, str)), "expected a run of the same")
    common.fastest_type.cache_clear()


def test_the_progress_line_shows_the_speed(capsys):
    batches = iter(lambda: time.sleep(0.01) or [torch.zeros(8, 1)], None)  # 800 images/s at most
    timed = common.Timed(batches)
    for step in timed.steps(2, 22, "train", 0):
        next(timed)
        assert step == 1 + timed.images // 8
    line = capsys.readouterr().err.split("\r")[-1]
    pattern = r"train: 100%.* 22/22 .* (\d+\.\d) images/s, (\d+) % waiting for data"
    speed, waiting = re.search(pattern, line).groups()
    assert 0 < float(speed) <= 800 and int(waiting) > 30
    assert list(timed.steps(0, 3, "train", 1)) == [0, 1, 2] and capsys.readouterr().err == ""


def test_save_grid(tmp_path):
    red, grey = torch.zeros(3, 20, 30), torch.full((20, 30), 0.5)
    red[0] = 1
    common.save_grid(tmp_path / "g.png", [[red, grey], [grey[None]]], ["red", "grey"],
                     ["a report " * 20, ""], scale=2)
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    assert (picture == [255, 0, 0]).all(-1).sum() == 40 * 60
    assert (picture == [128] * 3).all(-1).sum() >= 2 * 40 * 60
    assert (picture[0] == 255).all() and (picture[-1] == 255).all() and (picture[:, 0] == 255).all()
    assert (picture.sum(-1) < 200).sum() > 100  # text
    common.save_grid(tmp_path / "h.png", [[grey]])
    assert Image.open(tmp_path / "h.png").size == (46, 52)
    for shade in (0.0, 0.5, 1.0):
        common.save_grid(tmp_path / "g.gif", [[torch.full((20, 30), shade)]])
    with Image.open(tmp_path / "g.gif") as film:
        frames = [frame.convert("L").getpixel((20, 30)) for frame in ImageSequence.Iterator(film)]
    assert frames == [0, 128, 255]
    fails(lambda: common.save_grid(tmp_path / "g.png/x.png", [[grey]]), "cannot be written")


def pixels_of(path, colour):
    """(n, 2): the places (y, x) of the pixels that are nearly of this colour."""
    return np.argwhere(np.abs(np.asarray(Image.open(path)).astype(int) - colour).sum(-1) < 60)


def test_draw_curves(tmp_path):
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([4, 3, None, math.nan, 1])]
    lines[0] |= {"val": 0.5, "flat": 1}
    lines[4] |= {"val": 0.8, "flat": 1}
    lines[2]["point"] = 2.0
    log, path = common.RunLog(tmp_path, Config(), history=lines), tmp_path / "curves.png"
    for panels in ({"nothing": []}, {"empty": ["empty"]}, {"y": ["flat"]}):
        common.draw_curves(log, "title", panels)
    panels = {"loss": ["loss", "empty", "point"], "AUROC": ["val"]}
    common.draw_curves(log, "title", panels, (2, "LoRA joins"))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json", "curves.png"}
    blue = pixels_of(path, [31, 119, 180])
    blue = blue[blue[:, 1] < 530]  # without the legends
    above, below = blue[blue[:, 0] < 290], blue[blue[:, 0] > 310]  # two panels below each other
    for panel, rises in ((above, False), (below, True)):
        left, right = panel[panel[:, 1].argmin()], panel[panel[:, 1].argmax()]
        assert abs(left[1] - 75) <= 2 and abs(right[1] - 525) <= 2  # steps 0 and 4 of 0 to 4
        assert (right[0] < left[0]) == rises and len(panel) > 300
    marked = pixels_of(path, [0x55] * 3)
    assert np.bincount(marked[:, 1], minlength=310)[299:303].max() > 400  # in the middle, twice


def test_ticks_are_round_and_around_any_values():
    assert common.ticks([0.71, 0.79]) == pytest.approx([0.7, 0.72, 0.74, 0.76, 0.78, 0.8])
    rng = np.random.default_rng(0)
    for _ in range(1000):
        values = rng.normal(size=2) * 10.0 ** rng.integers(-9, 9) + rng.choice([0, 1, 1e3])
        found, span = common.ticks(values), np.ptp(values)
        assert found[0] <= min(values) + 1e-5 * span and found[-1] >= max(values) - 1e-5 * span
        step = found[1] - found[0]
        assert 3 <= len(found) <= 8 and span <= 5.01 * step
        mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - k) for k in (1, 2, 5)) < 1e-4 or span < 1e-7


def test_errors_are_one_line_and_short():
    assert str(InputError("a\nb", "c\r\nd", "e\x85f")) == "a b: expected c d, found e f"
    assert len(str(InputError("x" * 10**6))) < 1000


def test_a_loop_is_saved_every_few_minutes_and_handlers_come_back(monkeypatch):
    saved, before, clock = [], signal.getsignal(signal.SIGTERM), [0.0]
    monkeypatch.setattr(common.time, "time", lambda: clock[0])
    with common.Saving(saved.append, seconds=180) as saving:
        assert signal.getsignal(signal.SIGTERM) == saving.note
        for step in range(20):
            clock[0] += 50
            saving.after(step + 1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert saved == [4, 8, 12, 16, 20]  # every 200 seconds, the first step that is beyond 180


def test_a_second_signal_leaves_at_once(monkeypatch):
    """What the first one does: tests/test_interruption.py."""
    left = []
    monkeypatch.setattr(common.os, "_exit", left.append)
    with common.Saving(None):
        for expected in ([], [130]):
            signal.raise_signal(signal.SIGINT)
            assert left == expected


def test_a_new_run_leaves_no_file_of_the_one_before_it(tmp_path):
    for name in ("adapter.pt", "best.pt", "last.pt", "notes.txt"):
        (tmp_path / name).write_text("old")
    common.RunLog(tmp_path, common.RunConfig(), history=[])
    assert (tmp_path / "adapter.pt").exists()
    common.RunLog(tmp_path, common.RunConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json", "notes.txt"]


OWNED = """
import sys, time
from support.script import RunConfig, RunLog, run_script
def main():
    log = RunLog(sys.argv[1], RunConfig(seed=int(sys.argv[2])))
    log.line(step=1)
    print("writing", flush=True)
    time.sleep(60 if sys.argv[2] == "1" else 0)
run_script(main)
"""


def test_one_run_at_a_time_owns_a_folder(tmp_path):
    """The second is refused in one line and touches nothing; once the first was killed, however
    hard, nothing of it is in the way."""
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", OWNED, str(out), "1"], text=True,
                             stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert first.stdout.readline() == "writing\n"
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    second = run_python(OWNED, out, 2, check=False)
    assert second.returncode == 2 and second.stdout == "" and second.stderr.count("\n") == 1
    assert f"error: {out}: expected a folder that no other run is using" in second.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    first.kill()
    first.wait()
    assert run_python(OWNED, out, 3).stdout == "writing\n"
    assert common.read_json(out / "config.json")["seed"] == 3
    for _ in range(2):  # one process takes its own folder as often as it likes
        common.RunLog(out, Config(), history=[])


def test_a_run_is_not_written_over_what_it_needs_or_another_script_made(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Tuning(Config):
        script = "finetune"
        weights: str = common.option("", "start")

    ran = tmp_path / "run"
    common.RunLog(ran, Tuning())
    (ran / "last.pt").write_bytes(b"weights")
    for weights in (ran, ran / "last.pt", tmp_path / "x" / ".." / "run"):
        fails(lambda: common.RunLog(ran, Tuning(weights=str(weights))), "another folder than that")
    other = dataclasses.make_dataclass("Other", [], bases=(Config,), frozen=True,
                                       namespace={"script": "more.segment"})
    fails(lambda: common.RunLog(ran, other()), ran / "config.json",
          "expected a run of python -m more.segment, found one of python finetune.py")
    assert (ran / "last.pt").exists()
    common.RunLog(ran, Tuning(weights="scratch"))
    assert not (ran / "last.pt").exists()


def test_results_are_not_written_into_a_run_or_what_is_read(tmp_path):
    common.RunLog(tmp_path / "run", Config())
    (tmp_path / "images/new").mkdir(parents=True)
    common.check_apart(tmp_path / "out", tmp_path / "images", tmp_path / "run")
    common.check_apart(tmp_path / "run/merged.pt", tmp_path / "run/adapter.pt")
    common.check_apart(tmp_path, tmp_path / "images")
    for out in ("run", "run/best.pt"):
        fails(lambda: common.check_apart(tmp_path / out), "which belongs to a run")
    for out in ("images", "images/new", "out/../images"):
        fails(lambda: common.check_apart(tmp_path / out, tmp_path / "images"), "--out: expected")


def test_a_checkpoint_of_another_version_is_one_line(tmp_path):
    model = torch.nn.Linear(2, 2)
    config = Config(out=str(tmp_path), resume=True)
    log, path = common.RunLog(tmp_path, config), tmp_path / "last.pt"
    state = {"model": model.state_dict(), "step": 3, "lists": "abc"}
    common.save_state(log, config, 1, state, own={"pool": 4})
    whole = common.load_checkpoint(path)
    saved = common.last_state(config, 5, lists="abc")
    assert common.restore(saved, 0, model=model) == {"pool": 4} and saved["step"] == 3
    fails(lambda: common.restore(saved, 0, optimizer=model), path, "without 'optimizer'")
    fails(lambda: common.restore(saved, 0, model=torch.nn.Linear(3, 2)), path, "size mismatch")
    fails(lambda: common.restore(saved, 1, model=model), path, "this version")
    fails(lambda: saved["best"], path, "without 'best'")
    fails(lambda: common.last_state(config, 5, lists="abd"), "same lists")
    fails(lambda: common.last_state(config, 2, lists="abc"), "at least the 3 steps")
    for name in ("config", "step", "lists", "ranks", "model"):
        common.save_checkpoint(path, {key: whole[key] for key in whole if key != name})
        fails(lambda: common.restore(common.last_state(config, 5, lists="abc"), 0, model=model),
              path, f"without '{name}'")


def test_mean_and_deviation_of_one_seed_is_its_value():
    assert common.mean_and_deviation([0.5], 3) == "0.500" and common.mean_and_deviation([], 3) == ""
    assert common.mean_and_deviation([0.5, 0.7], 3) == "0.600 ± 0.141"


@pytest.mark.parametrize("dtype, scale, refused", [
    ("fp16", 2.0, False), ("fp16", 1.0, True), ("fp32", 2.0, True)])
def test_a_gradient_may_overflow_while_its_scale_can_be_halved(dtype, scale, refused):
    scaler, one, bad = common.scaler_for(Config(dtype=dtype), CPU), torch.ones(1), torch.ones(1) / 0
    scaler.scale(one)
    scaler.update(scale)

    def check(loss, gradient):
        common.check_finite(3, ["a.png", "c.png", "b.png"], [0, 2], scaler, loss, gradient)

    for loss in (bad, torch.tensor([1, math.nan])):
        fails(lambda: check(loss, one), "step 3: the loss is not finite", "batch: a.png, b.png")
    if refused:
        fails(lambda: check(one, bad), "step 3: the gradient is not", "batch: a.png, b.png")
    else:
        check(one, bad)


def test_names_that_are_no_text_can_be_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    common.write_csv(tmp_path / "a.csv", ["image"], [[name]])
    assert (tmp_path / "a.csv").read_bytes() == b"image\ncaf\xe9.png\n"
