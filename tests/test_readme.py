"""The README's commands run, on small data and for a few steps; its numbers, and those of
tests/readme/results.md, are those of the measured files beside it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MEASURED = REPOSITORY / "tests" / "readme"
README = (REPOSITORY / "README.md").read_text()
RESULTS = README + (MEASURED / "results.md").read_text()
TABLES = [path for path in sorted(MEASURED.glob("*.md")) if path.name != "results.md"]
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("python ")
]
SHORTER = {
    "mrm.py": "--steps 3",
    "finetune.py": "--steps 3 --evaluations 1",
    "reggan.py": "--epochs 1 --width 4 --seeds 1",
    "support.demo": "--patients 100",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small demo and a tiny demo MRM, so that each command finds what it would otherwise spend
    minutes on."""
    folder = tmp_path_factory.mktemp("readme")
    for command in ("-m support.demo --patients 100", "mrm.py --steps 3 --out runs/mrm-demo"):
        run(folder, command)
    return folder


def run(folder, command):
    script, *arguments = shlex.split(command)
    python = [sys.executable] + (
        ["-m", arguments.pop(0)] if script == "-m" else [str(REPOSITORY / script)]
    )
    done = subprocess.run(
        python + arguments,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def shortened(command):
    command = command.removeprefix("python ")
    script = command.split()[0]
    if script == "reggan.py" and "--compare" in command:
        return command + " --epochs 1 --width 4 --seeds 1 --hosts nc,nc+r --levels 3"
    if script == "finetune.py" and "--compare" in command:
        return command + " --steps 3 --evaluations 1 --seeds 1 --ratios 10"
    if (
        any(f"--{word}" in command for word in ("predict", "reconstruct", "attention"))
        or script not in SHORTER
    ):
        return command
    return command + " " + SHORTER[script]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "kernels.bench" not in c])
def test_command(folder, command):
    run(folder, shortened(command))


def test_commands_were_found():
    assert len(COMMANDS) >= 10
    assert "pip install -r requirements.txt && python finetune.py --lora" in README
    assert "pip install -r tests/requirements.txt && pytest" in README


@pytest.mark.parametrize("path", sorted(MEASURED.glob("*.json")), ids=lambda path: path.name)
def test_numbers_come_from_measured_files(path):
    result = json.loads(path.read_text())
    quoted = [f"{result[name]:.3f}" for name in ("auroc", "psnr", "ssim") if name in result]
    text = (MEASURED / "results.md").read_text()
    assert quoted and all(number in README for number in quoted), (path.name, quoted)
    assert all(number in text for number in quoted), (path.name, quoted)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_tables_come_from_measured_files(path):
    """The first table of a measured file stands in the results whole; the file holds the others."""
    parts = path.read_text().split("\n\n")
    tables = [
        "\n".join(line for line in part.splitlines() if line.startswith("|")) for part in parts
    ]
    assert next(filter(None, tables)) in RESULTS


def test_no_row_is_quoted_that_was_not_measured():
    measured = "\n".join(path.read_text() for path in TABLES).splitlines()
    quoted = [line for line in RESULTS.splitlines() if line.startswith("|") and "±" in line]
    assert quoted and set(quoted) <= set(measured)
