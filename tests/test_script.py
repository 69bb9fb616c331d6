"""Tests of support/script.py: options, start-up, checkpoints, logs, speed, signals, pictures; every kind of
bad input has its one line."""

import argparse
import dataclasses
import importlib
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
from PIL import Image

from support import script as common
from support.script import InputError


def one_line(error):
    """The message, after checking that it is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def fails(call, *parts):
    with pytest.raises(InputError) as error:
        call()
    for part in parts:
        assert str(part) in one_line(error), str(error.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(self.__dict__["path"]),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.RunConfig):
    rank: int = common.option(4, "rank")
    share: float = common.option(0.5, "a share, 100 % is all")
    flip: bool = common.option(False, "mirror")
    kind: str = common.option("a", "which", choices=["a", "b"])


def test_parse_config(capsys):
    assert common.parse_config(Config, []) == Config()
    config = common.parse_config(
        Config, "--rank 8 --flip --no-kernels --out runs/x --share .1 --kind b".split()
    )
    assert config == Config(rank=8, flip=True, kernels=False, out="runs/x", share=0.1, kind="b")
    with pytest.raises(SystemExit):
        common.parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "rank (default: 4)" in text and "a share, 100 % is all (default: 0.5)" in text
    for wrong in (["--kind", "c"], ["--rank", "x"], ["--rnk"]):
        with pytest.raises(SystemExit) as stop:
            common.parse_config(Config, wrong)
        assert stop.value.code == 2


def test_run_script_prints_one_line_and_exits_with_2(capsys):
    def main():
        raise InputError("a.txt: line 3: wrong")

    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a.txt: line 3: wrong\n"


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    common.atomic_write(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        common.atomic_write(path, crash)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    fails(
        lambda: common.atomic_write(path / "below", lambda file: None),
        path / "below",
        "cannot be written",
    )


def test_atomic_write_keeps_the_old_checkpoint_on_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    code = f"""if True:
        import resource, signal, torch; from support import script as common
        common.save_checkpoint({str(tmp_path / "a.pt")!r}, {{"model": torch.ones(2)}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        state = {{"model": torch.ones(10**6)}}
        common.run_script(lambda: common.save_checkpoint({str(tmp_path / "a.pt")!r}, state))"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(common.__file__).parents[1],
    )
    assert (
        run.returncode == 2 and run.stderr.count("\n") == 1 and "cannot be written" in run.stderr
    ), run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and common.load_checkpoint(
        tmp_path / "a.pt"
    )["model"].shape == (2,)


def test_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    state = {
        "model": {"w": torch.randn(3, 4)},
        "step": 7,
        "random": torch.get_rng_state(),
        "args": argparse.Namespace(lr=0.1),
    }
    expected = torch.rand(3)
    common.save_checkpoint(path, state)
    loaded = common.load_checkpoint(path)
    assert (
        torch.equal(loaded["model"]["w"], state["model"]["w"])
        and loaded["step"] == 7
        and loaded["args"].lr == 0.1
    )
    torch.set_rng_state(loaded["random"])
    assert torch.equal(torch.rand(3), expected)

    whole = path.read_bytes()
    for wrong in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(wrong)
        fails(lambda: common.load_checkpoint(path), path, "not a readable checkpoint")
    fails(lambda: common.load_checkpoint(tmp_path / "none.pt"), "none.pt: no such checkpoint")
    fails(lambda: common.load_checkpoint(tmp_path), tmp_path)
    torch.save([1, 2], path)
    fails(lambda: common.load_checkpoint(path), path, "expected a dict", "list")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_runs_no_code(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "owned")
    torch.save({"model": evil}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"model": evil}))
    for name in ("a.pt", "b.pt"):
        fails(lambda: common.load_checkpoint(tmp_path / name), name)
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
    (tmp_path / "file").write_text("")
    fails(
        lambda: common.RunLog(tmp_path / "file", Config()), tmp_path / "file", "cannot be written"
    )
    (tmp_path / "broken.json").write_text('{"a": 1,\n')
    fails(lambda: common.read_json(tmp_path / "broken.json"), "broken.json", "line 2")
    fails(lambda: common.read_json(tmp_path / "none.json"), "none.json: no such file")


CPU = torch.device("cpu")


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
        clock[0] += factor if a.dtype == common.TYPES[slow] else 1.0
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
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
    fails(lambda: common.check_same(saved["config"], Config(dtype="bf16"), "last.pt"), "--dtype bf16")
    ran = []

    def run(config):
        config = common.with_dtype(config, CPU)
        ran.append(config.dtype)
        common.RunLog(config.out, config).json("result.json", {})

    cells = {"a": Config(), "b": Config(rank=5)}
    assert len(list(common.run_cells(tmp_path, cells, run))) == 2 and ran == ["bf16", "bf16"]
    (tmp_path / "b" / "result.json").unlink()
    slow_down(monkeypatch, "bf16", 4.0)
    assert len(list(common.run_cells(tmp_path, cells, run))) == 2 and ran[2:] == ["bf16"]
    common.fastest_type.cache_clear()


def test_the_progress_line_shows_the_speed(capsys):
    batches = iter(lambda: time.sleep(0.01) or [torch.zeros(8, 1)], None)  # 800 images/s at most
    timed = common.Timed(batches, torch.device("cpu"))
    for step in timed.steps(2, 22, "train", 0):
        next(timed)
        assert step == 1 + timed.images // 8
    line = capsys.readouterr().err.split("\r")[-1]
    speed, waiting = re.search(
        r"train: 100%.* 22/22 .* (\d+\.\d) images/s, (\d+) % waiting for data", line
    ).groups()
    assert 0 < float(speed) <= 800 and int(waiting) > 30
    assert list(timed.steps(0, 3, "train", 1)) == [0, 1, 2] and capsys.readouterr().err == ""


def test_save_grid(tmp_path):
    red, grey = torch.zeros(3, 20, 30), torch.full((20, 30), 0.5)
    red[0] = 1
    common.save_grid(
        tmp_path / "g.png",
        [[red, grey], [grey[None]]],
        ["red", "grey"],
        ["a report " * 20, ""],
        scale=2,
    )
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    assert (picture == [255, 0, 0]).all(-1).sum() == 40 * 60 and (picture == [128] * 3).all(
        -1
    ).sum() >= 2 * 40 * 60
    assert (picture[0] == 255).all() and (picture[-1] == 255).all() and (picture[:, 0] == 255).all()
    assert (picture.sum(-1) < 200).sum() > 100  # text
    common.save_grid(tmp_path / "h.png", [[grey]])
    assert Image.open(tmp_path / "h.png").size == (46, 52)
    fails(lambda: common.save_grid(tmp_path / "g.png/x.png", [[grey]]), "cannot be written")


def pixels_of(path, colour):
    """(n, 2): the places (y, x) of the pixels that are nearly of this colour."""
    return np.argwhere(np.abs(np.asarray(Image.open(path)).astype(int) - colour).sum(-1) < 60)


def test_save_plot(tmp_path):
    losses = {"loss": (range(5), [4, 3, None, math.nan, 1]), "empty": ([], []), "point": ([2], [2])}
    common.save_plot(tmp_path / "p.png", {"loss": losses, "AUROC": {"val": ([0, 4], [0.5, 0.8])}},
                     "title", "step", (2, "LoRA joins"))
    roc = {"true": {"Edema 0.5": ([0, 1], [0, 1])}}
    common.save_plot(tmp_path / "q.png", roc, "ROC", "false", diagonal=True)
    common.save_plot(tmp_path / "r.png", {"nothing": {}}, "nothing", "x")
    common.save_plot(tmp_path / "s.png", {"y": {"flat": ([1, 2], [0.5, 0.5])}}, "flat", "x")
    assert not list(tmp_path.glob(".*"))
    blue = pixels_of(tmp_path / "p.png", [31, 119, 180])
    blue = blue[blue[:, 1] < 530]  # without the legends
    above, below = blue[blue[:, 0] < 290], blue[blue[:, 0] > 310]  # two panels below each other
    for panel, rises in ((above, False), (below, True)):
        left, right = panel[panel[:, 1].argmin()], panel[panel[:, 1].argmax()]
        assert abs(left[1] - 75) <= 2 and abs(right[1] - 525) <= 2  # steps 0 and 4 of 0 to 4
        assert (right[0] < left[0]) == rises and len(panel) > 300
    marked = pixels_of(tmp_path / "p.png", [0x55] * 3)
    assert np.bincount(marked[:, 1], minlength=310)[299:303].max() > 400  # in the middle, twice


@pytest.mark.parametrize("values, expected", [
    ([0, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]), ([3, 97], [0, 20, 40, 60, 80, 100]),
    ([0, 4800], [0, 1000, 2000, 3000, 4000, 5000]), ([0.71, 0.79], [0.7, 0.72, 0.74, 0.76, 0.78, 0.8]),
    ([-1, 4], [-1, 0, 1, 2, 3, 4]), ([], [0, 0.2, 0.4, 0.6, 0.8, 1])])
def test_ticks_are_round(values, expected):
    assert common.ticks(values) == pytest.approx(expected, abs=1e-12)


def test_ticks_are_around_any_values():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        values = rng.normal(size=2) * 10.0 ** rng.integers(-9, 9) + rng.choice([0, 1, 1e3])
        found, span = common.ticks(values), np.ptp(values)
        assert found[0] <= min(values) + 1e-5 * span and found[-1] >= max(values) - 1e-5 * span
        step = found[1] - found[0]
        assert 3 <= len(found) <= 8 and span <= 5.01 * step
        mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - k) for k in (1, 2, 5)) < 1e-4 or span < 1e-7


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_that_would_run_code_is_refused_without_advice(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "owned")
    for state, code in (
        ({"model": evil}, "touch"),
        (torch.nn.Linear(2, 2), "torch.nn"),
    ):
        torch.save(state, tmp_path / "a.pt")
        fails(
            lambda: common.load_checkpoint(tmp_path / "a.pt"),
            "a.pt: refused: it holds code to run",
            "tensors",
        )
        with pytest.raises(InputError) as error:
            common.load_checkpoint(tmp_path / "a.pt")
        assert not any(
            word in str(error.value)
            for word in ("weights_only", "trust", "safe_globals", "likely succeed")
        )
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", "no checkpoint")
    fails(lambda: common.load_checkpoint(tmp_path / "a.pt"), "a.pt: not a readable checkpoint")
    (tmp_path / "a.pt").write_bytes(pickle.dumps([1, 2]))
    fails(lambda: common.load_checkpoint(tmp_path / "a.pt"), "a.pt")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    log = common.RunLog(tmp_path / "run", Config())
    (tmp_path / "run/log.jsonl").mkdir()
    fails(lambda: log.line(step=1), "log.jsonl: cannot be written")


def test_errors_are_one_line_and_short():
    assert str(InputError("a\nb", "c\r\nd", "e\x85f")) == "a b: expected c d, found e f"
    assert len(str(InputError("x" * 10**6))) < 1000


STOPPED = """
import sys, time
sys.path.insert(0, {repository!r})
from support import script as common
import mrm
def save(steps):
    print("saved", steps, flush=True)
with common.Saving(save, seconds=1e9) as saving:
    for step in range(10**6):
        time.sleep(0.01)
        if step == 3:
            print("running", flush=True)
        saving.after(step + 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(number):
    code = STOPPED.format(repository=str(Path(common.__file__).parents[1]))
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "running\n"
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in err and "once more" in err
    assert re.fullmatch(
        r"saved (\d+)\nstopped after step \1: the same command with --resume goes on\n", out
    )


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


def test_a_new_run_leaves_no_file_of_the_one_before_it(tmp_path):
    for name in ("adapter.pt", "best.pt", "last.pt", "notes.txt"):
        (tmp_path / name).write_text("old")
    common.RunLog(tmp_path, common.RunConfig(), history=[])
    assert (tmp_path / "adapter.pt").exists()
    common.RunLog(tmp_path, common.RunConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_names_that_are_no_text_can_be_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    common.write_csv(tmp_path / "a.csv", ["image"], [[name]])
    assert (tmp_path / "a.csv").read_bytes() == b"image\ncaf\xe9.png\n"
