"""The pages keep their word: commands run and their options exist, links lead somewhere, tables and
differences are those of the measured files, and the two long pages stay short."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lora
import measure
import vit
from support.script import mean_and_deviation

REPOSITORY = Path(__file__).parents[1]
MEASURED = REPOSITORY / "tests" / "readme"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "tests").glob("*.md")),
         *(MEASURED / name for name in ("results.md", "claims.md", "speedrun.md"))]
README, RESULTS, CLAIMS = (path.read_text() for path in
                           (PAGES[0], MEASURED / "results.md", MEASURED / "claims.md"))
TABLES = [path for path in sorted(MEASURED.glob("*.md")) if path not in PAGES]
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.startswith("python ")]
SHORTER = {"mrm.py": "--steps 3", "finetune.py": "--steps 3 --evaluations 1",
           "reggan.py": "--epochs 1 --width 4", "more.improved": "--epochs 1 --width 4",
           "more.segment": "--steps 3 --evaluations 1"}
COMPARISONS = {"reggan.py": "--seeds 1 --hosts nc,nc+r --levels 3",
               "finetune.py": "--seeds 1 --ratios 10"}


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
    script = [script] if script == "-m" else [str(REPOSITORY / script)]
    done = subprocess.run([sys.executable, *script, *arguments], cwd=folder, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def shortened(command):
    command = command.removeprefix("python ")
    script = command.removeprefix("-m ").split()[0]
    if "--predict" in command or "--reconstruct" in command:
        return command
    steering = COMPARISONS[script] if "--compare" in command else ""
    return f"{command} {SHORTER.get(script, '')} {steering}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "kernels.bench" not in c])
def test_command(folder, command):
    run(folder, shortened(command))


def test_commands_were_found():
    assert len(COMMANDS) >= 10
    assert "pip install -r requirements.txt && python finetune.py --lora" in README
    assert "pip install -r tests/requirements.txt && pytest" in README


def test_the_forms_that_are_timed_as_the_papers_compute_what_ours_do():
    torch.manual_seed(0)
    x, attention = torch.randn(2, 5, 16), vit.Attention(16, 4)
    layer = lora.LoRALinear(16, 48, 3, parts=(True, False, True)).eval()
    torch.nn.init.normal_(layer.lora_B)
    for ours, theirs in ((layer, measure.official_lora), (attention, measure.official_attention)):
        assert torch.allclose(ours(x), theirs(ours, x), rtol=1e-5, atol=1e-4)


def options_of(module):
    """The flags of a script: those of its Config classes; a truth also has its contrary."""
    flags = {"--help"}
    for name, value in vars(importlib.import_module(module)).items():
        if name.endswith("Config") and dataclasses.is_dataclass(value):
            flags |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(value)}
            flags |= {"--no-" + field.name.replace("_", "-") for field in dataclasses.fields(value)
                      if isinstance(field.default, bool)}
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_of_every_command_exist(page):
    """In code, every `SCRIPT ... --flag`: a command ends at the end of its code, at && and at #."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    pieces = re.findall(r"^ {4,}(.*)$|`([^`\n]+(?:\n[^`\n]+)?)`", text, re.M)
    pieces += [(line,) for block in re.findall(r"```bash\n(.*?)```", text, re.S)
               for line in block.splitlines()]
    for code in (" ".join(" ".join(piece).split()) for piece in pieces):
        for command in re.split(r"&&|  #| # ", code):
            named = re.search(r"(?:^|python (?:-m )?|-m )([\w/]+\.py|(?:more|support)\.\w+)\b(.*)",
                              command)
            if not named or named[1].startswith("tests/") or not re.search(r" --\w", named[2]):
                continue
            module = named[1].removesuffix(".py").replace("/", ".")
            module = "reggan" if module == "more.gdl" else module  # which a reader writes
            unknown = set(re.findall(r"(?<=[\s\[])--[a-z][\w-]*", named[2])) - options_of(module)
            assert not unknown, f"{page.name}: {command}: {unknown}"


def anchors(text):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|png|txt))`", text):
        places = (REPOSITORY, page.parent, REPOSITORY / "tests")
        made = name in MADE or "NAME" in name or name.endswith(("_list.txt", "train_10.txt"))
        assert made or any((place / name).exists() for place in places), name


MADE = {"try.py", "mine.py", "more/gdl.py", "translation.png", "progress.gif", "curves.png",
        "reconstruction.png", "train_1.txt", "DIR/classes.txt"}  # by a run, or by the reader


def test_the_long_pages_stay_short():
    assert len(README.splitlines()) <= 120 and len(RESULTS.splitlines()) <= 200


def test_the_path_is_of_whole_files_with_true_times():
    """13 lines a minute, 9 of a kernel's, to a quarter."""
    stops = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M)
    assert len(stops) >= 6
    for name, minutes in stops:
        lines = len((REPOSITORY / name).read_text().splitlines())
        expected = lines / (9 if name.startswith("kernels/") else 13)
        assert int(minutes) == pytest.approx(expected, rel=0.25), (name, lines)


@pytest.mark.parametrize("path", sorted(MEASURED.glob("*.json")), ids=lambda path: path.name)
def test_numbers_come_from_measured_files(path):
    result = json.loads(path.read_text())
    quoted = [f"{result[name]:.3f}" for name in ("auroc", "psnr", "ssim") if name in result]
    assert quoted and all(number in README for number in quoted), (path.name, quoted)
    assert all(number in RESULTS for number in quoted), (path.name, quoted)


def rows_of(text):
    return {line for line in text.splitlines() if line.startswith("|") and "±" in line}


def test_every_row_is_measured_and_every_measured_file_is_linked_or_quoted():
    measured = {path.name: rows_of(path.read_text()) for path in TABLES}
    quoted = rows_of(README + RESULTS)
    assert quoted <= set().union(*measured.values()) and len(quoted) > 20
    for path in sorted(MEASURED.iterdir()):
        linked = f"]({path.name})" in RESULTS or f"readme/{path.name})" in README
        assert linked or path in PAGES or measured.get(path.name, {0}) <= quoted, path.name


def test_the_headlines_stand_in_the_results():
    """Every number with two or more decimals of the README's table is one of the results page, or
    one of the files that it links, there perhaps with one more decimal."""
    table = README.split("| what | result |")[1].split("\n\n")[0]
    known = RESULTS + "".join(path.read_text() for path in TABLES)
    for number in re.findall(r"\d+\.\d{2,}", table):
        assert re.search(rf"(?<![\d.]){re.escape(number)}", known), number


def test_differences_are_those_of_the_measured_files():
    """`a - b [low, high]` with its sign, or that of b - a, is a row of a table of differences."""
    number = r"[+-]?\d\.\d{3}"
    measured = set()
    for path in TABLES:
        for row in re.findall(rf"\| ({number}) \| \[({number}), ({number})\]", path.read_text()):
            d, low, high = map(float, row)
            measured |= {(d, low, high), (-d, -high, -low)}
    quoted = re.findall(rf"([+-]\d\.\d{{3}}) \[({number}), ({number})\]", CLAIMS + RESULTS)
    assert len(quoted) > 8
    for row in quoted:
        assert tuple(map(float, row)) in measured, row


def runs_of(name):
    with open(MEASURED / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def by_seed(runs, row, level, score="psnr"):
    """The score of each seed, an array; of the level `mean` its mean over the levels."""
    values = {}
    for run in runs:
        if run["row"] == row and level in (run["level"], "mean"):
            values.setdefault(run["seed"], []).append(float(run[score]))
    return np.array([statistics.fmean(each) for each in values.values()])


SCORES = {"PSNR": "psnr", "MAE": "mae", "SSIM": "ssim", "registration": "registration_error",
          "share": "folding", "Test AUROC": "auroc"}


@pytest.mark.parametrize("name", sorted(path.stem for path in MEASURED.glob("*.csv")))
def test_tables_are_the_means_of_every_run(name):
    """Of each table, below a line that begins with a score, whose columns are levels."""
    checked, score, runs = 0, None, runs_of(name)
    for line in (MEASURED / f"{name}.md").read_text().splitlines():
        row, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        if not line.startswith("|"):
            score = next((SCORES[start] for start in SCORES if line.startswith(start)), score)
        elif row == "method":
            levels = [cell.removeprefix("level ") for cell in cells]
        elif row != "---":
            for level, cell in zip(levels, cells):
                digits = len(cell.split()[0].partition(".")[2])
                values = list(by_seed(runs, row, level, score))
                assert cell == mean_and_deviation(values, digits), (row, level, score)
                checked += 1
    assert checked > 20


def test_the_claims_follow_from_every_run():
    runs, moved = runs_of("reggan_compare"), ("3", "5", "elastic")

    def gains(a, b, levels=("0", *moved)):
        """By level: PSNR of a - PSNR of b, seed by seed."""
        return np.array([by_seed(runs, a, level) - by_seed(runs, b, level) for level in levels])

    least = min(gains("nc+r", b, moved).min() for b in ("pix2pix", "nc"))
    assert f"by {least:.1f} dB and more, in every seed" in CLAIMS
    lost = [(by_seed(runs, row, "0") - by_seed(runs, row, "5")).mean() for row in
            ("nc+r", "pix2pix")]
    assert f"from level 0 to 5 it loses {lost[0]:.1f} dB, Pix2Pix {lost[1]:.1f}" in CLAIMS
    assert (gains("nc+r", "pix2pix")[0] < 0).sum() == 2  # behind in two seeds of three
    assert (gains("nc+r", "cycle") > 0).sum(1).tolist() == [3, 2, 2, 1]
    assert gains("nc+r improved", "cycle").min() > 0
    for host, name in (("cycle", "CycleGAN"), ("nice", "NICE-GAN")):
        better = gains(host + "+r", host)
        assert better.min() > 0
        low, high = better.mean(1).min(), better.mean(1).max()
        assert f"{name} by {low:.1f} to {high:.1f} dB" in CLAIMS
    assert gains("cycle+r", "nice").min() > 0
    mni, films = runs_of("reggan_mni"), runs_of("real_films")
    assert sum(float(run["psnr"]) < 10 for run in mni if run["row"] == "cycle") == 1  # inverted
    ours, scratch = (by_seed(films, f"mini {start}, full", "mean", "auroc")
                     for start in ("pretrained on real films", "from scratch"))
    assert len(ours) == 3 and (ours > scratch).all()
