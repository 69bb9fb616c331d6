"""What a change of form must not change: keys, options, demo bytes, merges, losses of short runs.

    OMP_NUM_THREADS=1 python tests/frozen.py write FILE     # before
    OMP_NUM_THREADS=1 python tests/frozen.py check FILE     # after: prints what differs, old and new

Everything goes through the command line, so that the names inside a script may change.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch

import data


def run(folder, script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    command = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-3000:])
    return done.stdout


def digest(folder):
    """One hash of every file below a folder, names included."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()


def log(folder, names):
    """The values of the given names in every line of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line | line.get("val", {}) for line in lines]
    return [{name: line[name] for name in names if name in line} for line in lines]


def keys(path):
    state = torch.load(path, weights_only=True)
    state = state.get("adapter", state.get("model"))
    return {name: list(tensor.shape) for name, tensor in state.items()}


def options(text):
    return sorted({word.strip("[],") for word in text.split() if word.strip("[],").startswith("--")})


def measure(folder):
    facts = {}
    for script in ("mrm.py", "finetune.py", "reggan.py"):
        facts[f"options {script}"] = options(run(folder, script, "--help"))
    demo = ["demo.py"] if (REPOSITORY / "demo.py").exists() else ["data.py", "demo"]
    run(folder, *demo, "--patients", 120, "--out", "demo")
    facts["demo pairs"] = digest(folder / "demo" / "pairs")
    for name in ("images", "masks"):
        facts[f"demo {name}"] = digest(folder / "demo" / name)
    for name in ("training.csv", "train_1.txt", "train_10.txt", "test_list.txt", "patients.csv"):
        facts[f"demo {name}"] = hashlib.sha256((folder / "demo" / name).read_bytes()).hexdigest()
    common = ["--dtype", "fp32", "--seed", 1]
    run(folder, "mrm.py", "--steps", 5, "--out", "m", *common)
    facts["merges"] = hashlib.sha256((folder / "m" / "tokenizer.tiktoken").read_bytes()).hexdigest()
    losses = ("loss", "image_loss", "report_loss", "heldout_image_loss", "heldout_report_loss", "val_auroc")
    facts["losses mrm"], facts["keys mrm"] = log(folder / "m", losses), keys(folder / "m" / "last.pt")
    for method in ("full", "lora", "linear"):
        run(folder, "finetune.py", "--weights", "m", "--method", method, "--steps", 5, "--evaluations", 5,
            "--out", method, *common)
        facts[f"losses {method}"] = log(folder / method, losses)
        file = "adapter.pt" if method == "lora" else "best.pt"
        facts[f"keys {method}"] = keys(folder / method / file)
    losses = ("adversarial", "l1", "cycle", "identity", "correction", "smooth", "drift", "synthetic",
              "equivariance", "d", "mae", "psnr", "ssim")
    improved = ["--improved"] * ("--improved" in facts["options reggan.py"])
    for host in ("nc", "pix2pix", "cycle", "nice"):
        for reg in ("--reg", "--no-reg"):
            name = host + "+r" * (reg == "--reg")
            run(folder, "reggan.py", "--host", host, reg, "--epochs", 1, "--size", 32, "--out", name, *common, *improved)
            facts[f"losses {name}"] = log(folder / name, losses)
            facts[f"keys {name}"] = keys(folder / name / "last.pt")
    return facts


def main(command, file):
    with tempfile.TemporaryDirectory() as folder:
        facts = measure(Path(folder))
    if command == "write":
        Path(file).write_text(json.dumps(facts, indent=1))
        return
    before = json.loads(Path(file).read_text())
    for name in before:
        same = before[name] == facts.get(name)
        print("same   " if same else "DIFFERS", name)
        if not same and isinstance(before[name], list) and name.startswith("options"):
            print("   gone", sorted(set(before[name]) - set(facts[name])), "\n   new ",
                  sorted(set(facts[name]) - set(before[name])))
        elif not same:
            print("   old", str(before[name])[:400], "\n   new", str(facts.get(name))[:400])


if __name__ == "__main__":
    main(*sys.argv[1:])
