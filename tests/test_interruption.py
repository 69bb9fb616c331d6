"""Runs of mrm.py, finetune.py and reggan.py that are killed or stopped at random moments and go on
with --resume.

    python tests/test_interruption.py SCRIPT FOLDER KILLS SEED     # as many kills by hand

A run that was killed any number of times must end with the weights of one that was not, bit for
bit, must never leave a checkpoint that cannot be read, and must leave no file of its own behind.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import finetune
import mrm
import reggan
from more import improved
from support import script as common

SCRIPTS = {"mrm": mrm, "finetune": finetune, "reggan": reggan}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# --------------------------------------------------------------------------------------------------
# One run: what it reads, one call that goes on where there is a checkpoint, what it leaves


def write_records(root):
    """60 X-rays with reports and lists: enough for mrm.py and finetune.py."""
    (root / "images").mkdir(parents=True)
    rng, rows, names = np.random.default_rng(0), ["image_path,report_content"], []
    for i in range(60):
        image = rng.integers(60, 120, (96, 96)).astype(np.uint8)
        image[:20] += np.uint8(100 * (i % 2))
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        rows.append(f"{i}.png,The heart is normal in film {i} and the lungs are clear.")
        names.append(f"{i}.png {i % 2} {i // 2 % 2}")
    (root / "training.csv").write_text("\n".join(rows) + "\n")
    for part, lines in (("train", names[:32]), ("val", names[32:46]), ("test", names[46:])):
        (root / f"{part}_list.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("a\nb\n")


def write_pairs(root):
    """5 training, 2 val and 2 test pairs of 32 x 32 pixels; B is the negative of A."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2), ("test", 2)):
        for side in "AB":
            (root / part / side).mkdir(parents=True)
        for i in range(count):
            image = rng.normal(0, 0.4, (8, 8)).clip(-0.9, 0.9).repeat(4, 0).repeat(4, 1)
            image[:2] = -1
            other = np.where(image == -1, -1, -image)
            np.save(root / part / "A" / f"s{i}.npy", image.astype(np.float32))
            np.save(root / part / "B" / f"s{i}.npy", other.astype(np.float32))


def write_data(script, root):
    (write_pairs if script == "reggan" else write_records)(root)


def run(script, root, out, **options):
    """One call of a script: it goes on where there is a checkpoint."""
    options = dict(root=str(root), out=str(out), device="cpu", dtype="fp32",
                   resume=(Path(out) / "last.pt").exists()) | options
    if script == "reggan":
        small = dict(steps=9, batch_size=2, noise=2.0, width=4, blocks=1, pool=3)
        reggan.train(improved.Config(**small | options))
        return
    options = dict(data="csv", batch_size=4) | options
    if script == "mrm":
        mrm.pretrain(mrm.MRMConfig(**dict(holdout=8, steps=8) | options))
    else:
        tune = dict(weights="scratch", lora=True, evaluations=3, steps=12)
        finetune.finetune(finetune.FinetuneConfig(**tune | options))


def state(out):
    """What a finished run must have in common with any other: (weights, random states and pools by
    name; the lines of the log and the result without times; names of the files)."""
    tensors = {}
    for path in out.glob("*.pt"):
        saved = common.load_checkpoint(path)
        weights = saved.get("adapter", saved.get("model"))
        tensors |= {f"{path.name} {name}": tensor for name, tensor in weights.items()}
        for rank in saved.get("ranks", ()):
            tensors["random"] = rank["torch"]
            tensors |= {f"pool {side}": torch.stack(images)
                        for side, images in (rank["own"] or {}).items() if images}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == common.load_checkpoint(out / "last.pt")["history"]
    timed = ("images_per_second", "share_waiting_for_data", "seconds")
    lines = [{name: value for name, value in line.items() if name not in timed}
             for line in [*lines, common.read_json(out / "result.json")]]
    return tensors, lines, sorted(path.name for path in out.iterdir())


def equal(ours, theirs):
    same = ours[0].keys() == theirs[0].keys() and ours[1:] == theirs[1:]
    return same and all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])


# --------------------------------------------------------------------------------------------------
# Kills and signals


def attempt(script, root, out, seconds=-1):
    """Runs in a child process that shares this one's imports, saving after every step. Returns its
    process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(root.parent / "output.txt", "a")
        os.dup2(sys.stderr.fileno(), 2)
        common.Saving.__init__.__defaults__ = (1, seconds)
        run(script, root, out)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_many(script, root, kills, seed):
    """Returns {"kills", "runs", "lost", "corrupt", "stray", "different"} after `kills` kills."""
    folder, rng = root.parent, random.Random(seed)
    began = time.time()
    code = outcome(attempt(script, root, folder / "whole"))
    took = time.time() - began
    assert code == 0, (folder / "output.txt").read_text()[-3000:]
    whole = state(folder / "whole")
    count = dict(kills=0, runs=0, lost=0, corrupt=0, stray=0, different=0)
    out, step, tries = folder / "run0", 0, 0
    while count["kills"] < kills or tries:
        child = attempt(script, root, out)
        # Early and late moments alike; after ten tries a run may end, so that its end is seen
        if count["kills"] < kills and tries < 10:
            time.sleep(rng.uniform(0, took))
            os.kill(child, signal.SIGKILL)
        code, tries = outcome(child), tries + 1
        count["kills"] += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), (folder / "output.txt").read_text()[-3000:]
        if (out / "last.pt").exists():
            try:
                now = common.load_checkpoint(out / "last.pt")["step"]
                count["lost"] += now < step
                step = now
            except common.InputError:
                count["corrupt"] += 1
        if code == 0:
            ours = state(out)
            count["different"] += not equal(ours[:2], whole[:2])
            count["stray"] += ours[2] != whole[2]
            count["runs"] += 1
            out, step, tries = folder / f"run{count['runs']}", 0, 0
    return count


def stop_twice(script, root):
    """Stops a run by SIGINT, goes on, stops it by SIGTERM, goes on to the end. Returns the exit
    codes, and whether the run is the `same` as one that was not stopped."""
    folder, out, codes = root.parent, root.parent / "run", {}
    assert outcome(attempt(script, root, folder / "whole")) == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        before = common.load_checkpoint(out / "last.pt")["step"] if out.exists() else 0
        saved = (out / "last.pt").stat().st_mtime_ns if out.exists() else 0
        child = attempt(script, root, out, seconds=1e9)
        while not (out / "last.pt").exists() or (out / "last.pt").stat().st_mtime_ns == saved:
            time.sleep(0.002)  # the first evaluation has been saved
        os.kill(child, number)
        codes[number.name] = outcome(child)
        assert common.load_checkpoint(out / "last.pt")["step"] > before
        text = (folder / "output.txt").read_text()
        assert "stopping after this step" in text
        assert "the same command with --resume goes on" in text
    assert outcome(attempt(script, root, out)) == 0
    return codes | {"same": equal(state(out), state(folder / "whole"))}


def in_a_process_of_its_own(*arguments):
    """A fork of a process that runs pytest and other threads may hang: this one has no others."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, script):
    count = in_a_process_of_its_own(script, tmp_path, 8, 0)
    assert count["kills"] >= 8 and count["runs"] >= 1
    assert not count["lost"] + count["corrupt"] + count["stray"] + count["different"], count


@pytest.mark.parametrize("script", SCRIPTS)
def test_signals_end_the_step_save_and_go_on(tmp_path, script):
    codes = in_a_process_of_its_own(script, tmp_path, "signals")
    assert codes == {"SIGINT": 130, "SIGTERM": 143, "same": True}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_float16_run_goes_on_with_its_scale(tmp_path, monkeypatch, stopped, script):
    """4 steps are some, a checkpoint, and the rest; the scale doubles after every second step."""
    root = tmp_path / "data"
    write_data(script, root)
    monkeypatch.setattr(SCRIPTS[script], "scaler_for", lambda config, device: torch.amp.GradScaler(
        device.type, 2.0**8, growth_interval=2, enabled=config.dtype == "fp16"))

    def part(out, dtype="fp16"):
        options = dict(optimizer="sgd", lr=0.1, clip=0.01) if script == "finetune" else {}
        run(script, root, tmp_path / out, steps=4, dtype=dtype, **options)
        return state(tmp_path / out)

    whole = part("whole")
    stopped(part, "part", saves=1 if script == "reggan" else 2)  # steps 3 and 2
    half = common.load_checkpoint(tmp_path / "part/last.pt")
    assert half["step"] in (2, 3) and half["scaler"]["scale"] == 2.0**9
    assert equal(part("part"), whole)
    ended = [common.load_checkpoint(tmp_path / out / "last.pt") for out in ("whole", "part")]
    assert ended[0]["scaler"] == ended[1]["scaler"] and ended[0]["scaler"]["scale"] == 2.0**10
    # The digits alone differ: losses by some roundings to 11 bits; weights, where SGD with clipped
    # gradients takes 4 steps of length lr x clip, by a small share of that way
    exact, log, _ = part("exact", "fp32")
    losses = {name for line in log for name in line if "loss" in name or "mae" in name}
    for name in losses:
        ours, theirs = ([line[name] for line in lines if name in line] for lines in (whole[1], log))
        assert ours != theirs and ours == pytest.approx(theirs, rel=2e-2), name
    if script == "finetune":
        way = [(whole[0][name] - exact[name]).norm() for name in exact if "last.pt" in name]
        assert 0 < torch.stack(way).norm() < 0.1 * 4 * 0.1 * 0.01


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(tmp_path, monkeypatch, script):
    write_data(script, tmp_path / "data")
    monkeypatch.setattr(SCRIPTS[script], "scaler_for",
                        lambda *_: torch.amp.GradScaler("cpu", 2.0**60))
    for steps in (1, 3):
        run(script, tmp_path / "data", tmp_path / f"{steps}", steps=steps, dtype="fp16")
    one, three = (common.load_checkpoint(tmp_path / f"{steps}/last.pt") for steps in (1, 3))
    assert (one["scaler"]["scale"], three["scaler"]["scale"]) == (2.0**59, 2.0**57)
    assert all(torch.equal(three["model"][name], one["model"][name]) for name in one["model"])


if __name__ == "__main__":
    script, root, kills = sys.argv[1], Path(sys.argv[2]) / "data", sys.argv[3]
    write_data(script, root)
    torch.set_num_threads(1)
    outcomes = stop_twice(script, root) if kills == "signals" else kill_many(
        script, root, int(kills), int(sys.argv[4]))
    print(json.dumps(outcomes))
