"""Kills, stops and continues runs of a script: what the tests of interruption have in common.

Each of them has two functions of its own. `run(root, out)` is one call of the script, which goes on
where there is a checkpoint. `state(out)` is what a finished run must have in common with any other:
({name: tensor}, log, names of the files).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from support import script as common


def attempt(run, root, out, seconds=-1):
    """Runs in a child process that shares this one's imports, saving after every step. Returns its
    process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(Path(root).parent / "output.txt", "a")
        os.dup2(sys.stderr.fileno(), 2)
        common.Saving.__init__.__defaults__ = (1, seconds)
        run(root, out)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def equal(ours, theirs):
    same = ours[0].keys() == theirs[0].keys() and ours[1:] == theirs[1:]
    return same and all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])


def kill_many(run, state, root, kills, seed):
    """Returns {"kills", "runs", "lost", "corrupt", "stray", "different"} after `kills` kills."""
    folder, rng = root.parent, random.Random(seed)
    began = time.time()
    code = outcome(attempt(run, root, folder / "whole"))
    assert code == 0, (folder / "output.txt").read_text()[-3000:]
    whole, took = state(folder / "whole"), time.time() - began
    count = dict(kills=0, runs=0, lost=0, corrupt=0, stray=0, different=0)
    out, step, tries = folder / "run0", 0, 0
    while count["kills"] < kills or tries:
        child = attempt(run, root, out)
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


def signals(run, state, root):
    """Stops a run by SIGINT, goes on, stops it by SIGTERM, goes on to the end. Returns the exit
    codes, and whether the run is the `same` as one that was not stopped."""
    folder, out, codes = root.parent, root.parent / "run", {}
    assert outcome(attempt(run, root, folder / "whole")) == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        before = common.load_checkpoint(out / "last.pt")["step"] if out.exists() else 0
        saved = (out / "last.pt").stat().st_mtime_ns if out.exists() else 0
        child = attempt(run, root, out, seconds=1e9)
        while not (out / "last.pt").exists() or (out / "last.pt").stat().st_mtime_ns == saved:
            time.sleep(0.002)  # the first evaluation has been saved
        os.kill(child, number)
        codes[number.name] = outcome(child)
        assert common.load_checkpoint(out / "last.pt")["step"] > before
        text = (folder / "output.txt").read_text()
        assert "stopping after this step" in text
        assert "the same command with --resume goes on" in text
    assert outcome(attempt(run, root, out)) == 0
    return codes | {"same": equal(state(out), state(folder / "whole"))}


def in_a_process_of_its_own(file, *arguments):
    """A fork of a process that runs pytest and other threads may hang: this one has no others."""
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def by_hand(run, state, root, kills, seed):
    """Prints the outcome of `kills` kills, or of the signals where it is that word."""
    torch.set_num_threads(1)
    if kills == "signals":
        print(json.dumps(signals(run, state, root)))
    else:
        print(json.dumps(kill_many(run, state, root, int(kills), int(seed))))
