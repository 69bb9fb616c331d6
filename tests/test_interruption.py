"""Runs of mrm.py and finetune.py that are killed at random moments and go on with --resume.

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

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import data
import finetune
import mrm

STEPS = 12


def write_records(root):
    """60 films with reports and lists: enough for both scripts."""
    (root / "images").mkdir(parents=True)
    rng, rows, names = np.random.default_rng(0), ["image_path,report_content"], []
    for i in range(60):
        film = rng.integers(60, 120, (96, 96)).astype(np.uint8)
        film[:20] += np.uint8(100 * (i % 2))
        Image.fromarray(film).save(root / "images" / f"{i}.png")
        rows.append(f"{i}.png,The heart is normal in film {i} and the lungs are clear.")
        names.append(f"{i}.png {i % 2} {i // 2 % 2}")
    (root / "training.csv").write_text("\n".join(rows) + "\n")
    for part, lines in (("train", names[:32]), ("val", names[32:46]), ("test", names[46:])):
        (root / f"{part}_list.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("a\nb\n")


def run(script, root, out, **options):
    """One call of a script: it goes on where there is a checkpoint."""
    options |= dict(
        data="csv",
        root=str(root),
        out=str(out),
        device="cpu",
        dtype="fp32",
        steps=STEPS,
        batch_size=4,
        resume=(Path(out) / "last.pt").exists(),
    )
    if script == "mrm":
        mrm.pretrain(mrm.MRMConfig(holdout=8, **options))
    else:
        finetune.finetune(
            finetune.FinetuneConfig(weights="scratch", lora=True, evaluations=3, **options)
        )


def attempt(script, root, out, seconds=-1):
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
        run(script, root, out)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(out, script):
    """What a finished run must have in common with any other: weights, history, log, files."""
    saved = data.load_checkpoint(out / "last.pt")
    tensors = {
        f"last {name}": t for name, t in saved["model" if script == "mrm" else "trained"].items()
    }
    if script == "finetune":
        adapter = data.load_checkpoint(out / "adapter.pt")["adapter"]
        tensors |= {f"adapter {name}": tensor for name, tensor in adapter.items()}
    timed = ("images_per_second", "share_waiting_for_data", "peak_memory_mib", "seconds")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    history = [{k: v for k, v in line.items() if k not in timed} for line in saved["history"]]
    assert history == [{k: v for k, v in line.items() if k not in timed} for line in lines]
    return tensors, history, sorted(path.name for path in out.iterdir())


def kill_many(script, folder, kills, seed):
    """Returns {"kills", "runs", "lost", "corrupt", "stray", "different"} after `kills` kills."""
    root, rng = folder / "records", random.Random(seed)
    write_records(root)
    began = time.time()
    assert outcome(attempt(script, root, folder / "whole")) == 0, (
        folder / "output.txt"
    ).read_text()[-3000:]
    whole, history, files = state(folder / "whole", script)
    took, count = (
        time.time() - began,
        dict(kills=0, runs=0, lost=0, corrupt=0, stray=0, different=0),
    )
    out, step, tries = folder / "run0", 0, 0
    while count["kills"] < kills or tries:
        child = attempt(script, root, out)
        # Early and late moments alike; after ten tries a run may end, so that its end is seen
        if count["kills"] < kills and tries < 10:
            time.sleep(rng.uniform(0, took))
            os.kill(child, signal.SIGKILL)
        code, tries = outcome(child), tries + 1
        if code == -signal.SIGKILL:
            count["kills"] += 1
        elif code != 0:
            raise AssertionError((code, (folder / "output.txt").read_text()[-3000:]))
        if (out / "last.pt").exists():
            try:
                now = data.load_checkpoint(out / "last.pt")["step"]
                count["lost"] += now < step
                step = now
            except data.InputError:
                count["corrupt"] += 1
        if code == 0:
            tensors, past, names = state(out, script)
            same = tensors.keys() == whole.keys() and past == history
            same = same and all(torch.equal(tensors[name], whole[name]) for name in whole)
            count["different"] += not same
            count["stray"] += names != files
            count["runs"] += 1
            out, step, tries = folder / f"run{count['runs']}", 0, 0
    return count


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
@pytest.mark.parametrize("script", ["mrm", "finetune"])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, script):
    count = in_a_process_of_its_own(script, tmp_path, 8, 0)
    assert count["kills"] >= 8 and count["runs"] >= 1
    assert not count["lost"] + count["corrupt"] + count["stray"] + count["different"], count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", ["mrm", "finetune"])
def test_signals_end_the_step_save_and_go_on(tmp_path, script):
    codes = in_a_process_of_its_own(script, tmp_path, "signals", 0)
    assert codes == {"SIGINT": 130, "SIGTERM": 143, "same": True}


def signals(script, folder):
    """Stops a run by SIGINT, goes on, stops it by SIGTERM, goes on to the end."""
    root, out = folder / "records", folder / "run"
    write_records(root)
    assert outcome(attempt(script, root, folder / "whole")) == 0
    codes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before = data.load_checkpoint(out / "last.pt")["step"] if out.exists() else 0
        child = attempt(script, root, out, seconds=1e9)
        saved = (out / "last.pt").stat().st_mtime_ns if out.exists() else 0
        while not (out / "last.pt").exists() or (out / "last.pt").stat().st_mtime_ns == saved:
            time.sleep(0.002)  # the first evaluation has been saved
        os.kill(child, number)
        codes[number.name] = outcome(child)
        assert data.load_checkpoint(out / "last.pt")["step"] > before
        text = (folder / "output.txt").read_text()
        assert (
            "stopping after this step" in text and "the same command with --resume goes on" in text
        )
    assert outcome(attempt(script, root, out)) == 0
    ours, theirs = (state(path, script) for path in (out, folder / "whole"))
    same = ours[1:] == theirs[1:] and all(
        torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0]
    )
    return codes | {"same": same}


if __name__ == "__main__":
    torch.set_num_threads(1)
    script, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    result = (
        signals(script, folder)
        if kills == "signals"
        else kill_many(script, folder, int(kills), seed)
    )
    print(json.dumps(result))
