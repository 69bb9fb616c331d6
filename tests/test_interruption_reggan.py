"""Runs of reggan.py that are killed at random moments and go on with --resume.

    python tests/test_interruption_reggan.py FOLDER KILLS SEED     # as many kills by hand

A run that was killed any number of times must end with the weights of one that was not, bit for
bit, must never leave a checkpoint that cannot be read, and must leave no file of its own behind.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from support import script as common
import interruption
import reggan
from more import improved


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
    options = dict(dtype="fp32", steps=9) | options
    reggan.train(
        improved.Config(
            root=str(root),
            out=str(out),
            device="cpu",
            noise=2.0,
            width=4,
            blocks=1,
            batch_size=2,
            pool=3,
            resume=(Path(out) / "last.pt").exists(),
            **options,
        )
    )


def state(out):
    """What a finished run must have in common with any other: weights, pools, log, scores,
    files."""
    tensors = {}
    for file in ("last.pt", "best.pt"):
        saved = common.load_checkpoint(out / file)
        tensors |= {f"{file} {name}": tensor for name, tensor in saved["model"].items()}
        for i, own in enumerate(saved.get("ranks", ())):
            tensors[f"random {i}"] = own["torch"]
            tensors |= {
                f"pool {i} {side}": torch.stack(images)
                for side, images in own["own"].items()
                if images
            }
    timed = ("images_per_second", "share_waiting_for_data", "peak_memory_mib", "seconds")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines.append(json.loads((out / "result.json").read_text()))
    lines = [{name: value for name, value in line.items() if name not in timed} for line in lines]
    return tensors, lines, sorted(path.name for path in out.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    count = interruption.in_a_process_of_its_own(__file__, tmp_path, 10, 0)
    assert count["kills"] >= 9 and count["runs"] >= 1
    assert not count["lost"] + count["corrupt"] + count["stray"] + count["different"], count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_signals_end_the_step_save_and_go_on(tmp_path):
    codes = interruption.in_a_process_of_its_own(__file__, tmp_path, "signals", 0)
    assert codes == {"SIGINT": 130, "SIGTERM": 143, "same": True}


if __name__ == "__main__":
    root = Path(sys.argv[1]) / "pairs"
    write_pairs(root)
    interruption.by_hand(run, state, root, *sys.argv[2:])
