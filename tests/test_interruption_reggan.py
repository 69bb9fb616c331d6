"""Runs of reggan.py that are killed at random moments and go on with --resume.

    python tests/test_interruption_reggan.py FOLDER KILLS SEED     # as many kills by hand

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

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import data
import reggan


def write_pairs(root):
    """5 training, 2 val and 2 test pairs of 32 x 32 pixels; B is the negative of A."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2), ("test", 2)):
        for side in "AB":
            (root / part / side).mkdir(parents=True)
        for i in range(count):
            image = rng.normal(0, 0.4, (8, 8)).clip(-0.9, 0.9).repeat(4, 0).repeat(4, 1)
            image[:2] = -1
            np.save(root / part / "A" / f"s{i}.npy", image.astype(np.float32))
            np.save(
                root / part / "B" / f"s{i}.npy",
                np.where(image == -1, -1, -image).astype(np.float32),
            )


def run(root, out, **options):
    """One call of the script: it goes on where there is a checkpoint."""
    reggan.train(
        reggan.Config(
            root=str(root),
            out=str(out),
            device="cpu",
            dtype="fp32",
            improved=True,
            noise=2.0,
            width=4,
            blocks=1,
            batch_size=2,
            steps=9,
            pool=3,
            resume=(Path(out) / "last.pt").exists(),
            **options,
        )
    )


def attempt(root, out, seconds=-1, **options):
    """Runs in a child process that shares this one's imports, saving after every step. Returns its
    process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(Path(root).parent / "output.txt", "a")
        os.dup2(sys.stderr.fileno(), 2)
        data.Saving.__init__.__defaults__ = (1, seconds)
        run(root, out, **options)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(out):
    """What a finished run must have in common with any other: weights, pools, log, scores,
    files."""
    tensors = {}
    for file in ("last.pt", "best.pt"):
        saved = data.load_checkpoint(out / file)
        tensors |= {f"{file} {name}": tensor for name, tensor in saved["model"].items()}
        for i, own in enumerate(saved.get("ranks", ())):
            tensors[f"random {i}"] = own["random"]["torch"]
            tensors |= {
                f"pool {i} {side}": torch.stack(images)
                for side, images in own["pools"].items()
                if images
            }
    timed = ("images_per_second", "share_waiting_for_data", "peak_memory_mib", "seconds")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines.append(json.loads((out / "result.json").read_text()))
    lines = [{name: value for name, value in line.items() if name not in timed} for line in lines]
    return tensors, lines, sorted(path.name for path in out.iterdir())


def equal(ours, theirs):
    same = ours[0].keys() == theirs[0].keys() and ours[1:] == theirs[1:]
    return same and all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])


def kill_many(folder, kills, seed):
    """Returns {"kills", "runs", "lost", "corrupt", "stray", "different"} after `kills` kills."""
    root, rng = folder / "pairs", random.Random(seed)
    write_pairs(root)
    began = time.time()
    assert outcome(attempt(root, folder / "whole")) == 0, (folder / "output.txt").read_text()[
        -3000:
    ]
    whole, took = state(folder / "whole"), time.time() - began
    count = dict(kills=0, runs=0, lost=0, corrupt=0, stray=0, different=0)
    out, step, tries = folder / "run0", 0, 0
    while count["kills"] < kills or tries:
        child = attempt(root, out)
        # Early and late moments alike; after ten tries a run may end, so that its end is seen
        if count["kills"] < kills and tries < 10:
            time.sleep(rng.uniform(0, took))
            os.kill(child, signal.SIGKILL)
        code, tries = outcome(child), tries + 1
        count["kills"] += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            raise AssertionError((code, (folder / "output.txt").read_text()[-3000:]))
        if (out / "last.pt").exists():
            try:
                now = data.load_checkpoint(out / "last.pt")["step"]
                count["lost"] += now < step
                step = now
            except data.InputError:
                count["corrupt"] += 1
        if code == 0:
            ours = state(out)
            count["different"] += not equal((*ours[:2], []), (*whole[:2], []))
            count["stray"] += ours[2] != whole[2]
            count["runs"] += 1
            out, step, tries = folder / f"run{count['runs']}", 0, 0
    return count


def signals(folder):
    """Stops a run by SIGINT, goes on, stops it by SIGTERM, goes on to the end."""
    root, out = folder / "pairs", folder / "run"
    write_pairs(root)
    assert outcome(attempt(root, folder / "whole")) == 0
    codes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before = data.load_checkpoint(out / "last.pt")["step"] if out.exists() else 0
        saved = (out / "last.pt").stat().st_mtime_ns if out.exists() else 0
        child = attempt(root, out, seconds=1e9)
        while not (out / "last.pt").exists() or (out / "last.pt").stat().st_mtime_ns == saved:
            time.sleep(0.002)  # the first evaluation has been saved
        os.kill(child, number)
        codes[number.name] = outcome(child)
        assert data.load_checkpoint(out / "last.pt")["step"] > before
        text = (folder / "output.txt").read_text()
        assert (
            "stopping after this step" in text and "the same command with --resume goes on" in text
        )
    assert outcome(attempt(root, out)) == 0
    return codes | {"same": equal(state(out), state(folder / "whole"))}


def in_a_process_of_its_own(*arguments):
    """A fork of a process that runs pytest and other threads may hang: this one has no others."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    count = in_a_process_of_its_own(tmp_path, 10, 0)
    assert count["kills"] >= 9 and count["runs"] >= 1
    assert not count["lost"] + count["corrupt"] + count["stray"] + count["different"], count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_signals_end_the_step_save_and_go_on(tmp_path):
    assert in_a_process_of_its_own(tmp_path, "signals", 0) == {
        "SIGINT": 130,
        "SIGTERM": 143,
        "same": True,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    print(
        json.dumps(signals(folder) if kills == "signals" else kill_many(folder, int(kills), seed))
    )
