"""Runs of mrm.py and finetune.py that are killed at random moments and go on with --resume.

    python tests/test_interruption.py SCRIPT FOLDER KILLS SEED     # as many kills by hand

A run that was killed any number of times must end with the weights of one that was not, bit for
bit, must never leave a checkpoint that cannot be read, and must leave no file of its own behind.
"""

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from support import script as common
import finetune
import interruption
import mrm
import reggan
import test_interruption_reggan

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
    options = dict(
        data="csv",
        root=str(root),
        out=str(out),
        device="cpu",
        dtype="fp32",
        steps=STEPS,
        batch_size=4,
        resume=(Path(out) / "last.pt").exists(),
    ) | options
    if script == "mrm":
        mrm.pretrain(mrm.MRMConfig(holdout=8, **options))
    else:
        finetune.finetune(
            finetune.FinetuneConfig(weights="scratch", lora=True, evaluations=3, **options)
        )


def state(script, out):
    """What a finished run must have in common with any other: weights, history, log, files."""
    saved = common.load_checkpoint(out / "last.pt")
    tensors = {
        f"last {name}": t for name, t in saved["model"].items()
    }
    if script == "finetune":
        adapter = common.load_checkpoint(out / "adapter.pt")["adapter"]
        tensors |= {f"adapter {name}": tensor for name, tensor in adapter.items()}
    timed = ("images_per_second", "share_waiting_for_data", "peak_memory_mib", "seconds")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    history = [{k: v for k, v in line.items() if k not in timed} for line in saved["history"]]
    assert history == [{k: v for k, v in line.items() if k not in timed} for line in lines]
    return tensors, history, sorted(path.name for path in out.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", ["mrm", "finetune"])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, script):
    count = interruption.in_a_process_of_its_own(__file__, script, tmp_path, 8, 0)
    assert count["kills"] >= 8 and count["runs"] >= 1
    assert not count["lost"] + count["corrupt"] + count["stray"] + count["different"], count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", ["mrm", "finetune"])
def test_signals_end_the_step_save_and_go_on(tmp_path, script):
    codes = interruption.in_a_process_of_its_own(__file__, script, tmp_path, "signals", 0)
    assert codes == {"SIGINT": 130, "SIGTERM": 143, "same": True}


@pytest.mark.parametrize("script", ["mrm", "finetune", "reggan"])
def test_a_float16_run_goes_on_with_its_scale(tmp_path, monkeypatch, script):
    """4 steps are 2, a checkpoint, and 2; the scale doubles after every second step."""
    root, module = tmp_path / "data", {"mrm": mrm, "finetune": finetune, "reggan": reggan}[script]
    (test_interruption_reggan.write_pairs if script == "reggan" else write_records)(root)
    monkeypatch.setattr(module, "scaler_for", lambda config, device: torch.amp.GradScaler(
        device.type, 2.0**8, growth_interval=2, enabled=config.dtype == "fp16"))

    def part(out, dtype="fp16"):
        options = dict(steps=4, dtype=dtype)
        options |= dict(optimizer="sgd", lr=0.1, clip=0.01) if script == "finetune" else {}
        if script == "reggan":
            test_interruption_reggan.run(root, tmp_path / out, **options)
            return test_interruption_reggan.state(tmp_path / out)
        run(script, root, tmp_path / out, **options)
        return state(script, tmp_path / out)

    def stop(saving, steps):
        if steps == 2:
            saving.save(steps)
            raise KeyboardInterrupt

    whole = part("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Saving, "after", stop)
        part("part")
    half = common.load_checkpoint(tmp_path / "part/last.pt")
    assert half["step"] == 2 and half["scaler"]["scale"] == 2.0**9
    assert interruption.equal(part("part"), whole)
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
        way = torch.stack([(whole[0][name] - exact[name]).norm() for name in exact if "last" in name])
        assert 0 < way.norm() < 0.1 * 4 * 0.1 * 0.01


if __name__ == "__main__":
    script, root = sys.argv[1], Path(sys.argv[2]) / "records"
    write_records(root)
    ours = functools.partial(run, script), functools.partial(state, script)
    interruption.by_hand(*ours, root, *sys.argv[3:])
