"""The demo chest X-rays: the folder is complete, reproducible and honest (lists, masks and reports
agree)."""

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.demo import (
    ANATOMY, DEMO_CLASSES, Finding, chest_film, demo_pairs, draw_findings, lay_out, spot,
    write_demo_records, write_report)
from support import demo as demo_drawing
from support.script import parse_config
from test_script import fails

PATIENTS = 120
PARTS = ("train_list", "val_list", "test_list")
HAS_MASK = DEMO_CLASSES.index("Pneumothorax")


def digest(folder):
    """{relative path: hash of the bytes} of every file below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_list(folder, name):
    rows = [line.split() for line in (folder / f"{name}.txt").read_text().splitlines()]
    return {row[0]: tuple(int(label) for label in row[1:]) for row in rows}


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def clauses(report):
    """[(definite or no, where, class)] of a report."""
    said = [clause.split(" ") for clause in report.split(", ")]
    return [(sure, where, name.capitalize()) for sure, where, name in said]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo_records(tmp_path_factory.mktemp("demo") / "records", PATIENTS, seed=3)


def test_layout(demo):
    lists = {name: read_list(demo, name) for name in (*PARTS, "train_1", "train_10")}
    assert {path.name for path in demo.iterdir()} == {
        "images", "masks", "training.csv", "classes.txt", "patients.csv", "demo.json",
        *(f"{name}.txt" for name in lists)}
    assert (demo / "classes.txt").read_text().split() == list(DEMO_CLASSES)
    patient = {row["image_path"]: row["patient_id"] for row in read_csv(demo / "patients.csv")}
    images = {path.name for path in (demo / "images").iterdir()}
    assert images == set(patient) == set().union(*lists.values())
    assert all(len(row) == 7 and set(row) <= {0, 1} for part in lists.values()
               for row in part.values())
    train, val, test = ({patient[name] for name in lists[part]} for part in PARTS)
    assert not (train & val or train & test or val & test)
    assert len(train | val | test) == PATIENTS
    one, ten, whole = (list(lists[name]) for name in ("train_1", "train_10", "train_list"))
    assert set(one) < set(ten) < set(whole)
    assert abs(len(whole) / len(images) - 0.7) < 0.02
    assert abs(len(lists["test_list"]) / len(images) - 0.2) < 0.03
    assert 0.01 * len(whole) <= len(one) <= 0.01 * len(whole) + 4
    assert 0.1 * len(whole) - 1 <= len(ten) <= 0.1 * len(whole) + 4
    # No report of val or test
    assert [row["image_path"] for row in read_csv(demo / "training.csv")] == whole


def test_images_and_masks(demo):
    labels = {name: row for part in PARTS for name, row in read_list(demo, part).items()}
    assert {path.name for path in (demo / "masks").iterdir()} == {
        name for name, row in labels.items() if row[HAS_MASK]}
    means = []
    for name, row in labels.items():
        image = Image.open(demo / "images" / name)
        pixels = np.asarray(image)
        assert image.mode == "L" and pixels.shape == (128, 128)
        assert pixels.std() > 10 and np.ptp(np.percentile(pixels, [5, 95])) > 30  # low contrast
        means.append(pixels.mean())
        if row[HAS_MASK]:
            mask = np.asarray(Image.open(demo / "masks" / name))
            assert mask.shape == (128, 128) and set(np.unique(mask)) == {0, 255}
            assert 0.003 < (mask > 0).mean() < 0.25
    assert np.std(means) > 10  # exposure varies
    prevalence = np.mean(list(labels.values()), 0)
    assert (prevalence > 0.08).all() and (prevalence < 0.35).all(), prevalence


def test_a_seed_gives_the_same_bytes_in_any_process(tmp_path):
    """A script needs no main guard, although 200 patients and more are drawn by processes."""
    code = "from support.demo import *; write_demo_records('records', 200, 32, 1); print('once')"
    (tmp_path / "script.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(demo_drawing.__file__).parents[1])}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["once"], done.stderr
    drawn = digest(tmp_path / "records")
    assert drawn == digest(write_demo_records(tmp_path / "here", 200, 32, seed=1))
    other = digest(write_demo_records(tmp_path / "other", 50, 32, seed=2))
    assert not {drawn[name] for name in drawn if "images" in name} & set(other.values())


def test_records_join_the_pairs(tmp_path):
    pairs = demo_pairs(tmp_path / "records", size=32, slices=1, subjects=(("train", 1),))
    drawn = digest(pairs)
    write_demo_records(tmp_path / "records", patients=50, size=32)
    assert drawn and digest(pairs) == drawn and (tmp_path / "records/demo.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


def test_pairs_of_the_parts_share_no_subject_and_are_always_the_same(tmp_path):
    parts = ("train", 2), ("val", 1), ("test", 1)
    one, two = (demo_pairs(tmp_path / name, size=64, subjects=parts) for name in "xy")
    subjects = [{path.name.split("_")[0] for path in (one / part / "A").iterdir()}
                for part, _ in parts]
    assert len(set.union(*subjects)) == sum(map(len, subjects)) == 4 and digest(one) == digest(two)
    for image in map(np.load, one.rglob("*.npy")):
        assert image.min() == -1 and image.max() <= 1


def test_labels_follow_from_the_reports(demo):
    labels = read_list(demo, "train_list")
    for row in read_csv(demo / "training.csv"):
        said = clauses(row["report_content"])
        stated = [name for sure, _, name in said if sure == "definite"]
        assert {sure for sure, _, _ in said} == ({"definite"} if stated else {"no"})
        assert tuple(int(name in stated) for name in DEMO_CLASSES) == labels[row["image_path"]]


def test_reports_say_what_is_drawn_and_share_their_words():
    """The side is that of the drawing. No word before a name says which class it is, whether it is
    there or not, so that a hidden word does not follow from those beside it."""
    before = {}
    for patient in range(900):
        rng = np.random.default_rng([5, patient])
        findings = draw_findings(rng)
        said = clauses(write_report(rng, findings))
        for sure, where, name in said:
            side = findings[name].side if findings else 0
            assert sure == ("definite" if findings else "no")
            assert ("right", where, "left")[side + 1] == where
            before.setdefault((sure, where), set()).add(name)
        assert [name for _, _, name in said] == list(findings) or not findings and len(said) == 1
    whole = {"Cardiomegaly", "Edema"}
    for sure in ("definite", "no"):
        assert before.pop((sure, "generalized")) == whole
        assert before.pop((sure, "bilateral")) == {"Effusion"}
        for where in ("right", "left"):
            assert before.pop((sure, where)) == set(DEMO_CLASSES) - whole
    assert not before


def test_findings_change_the_film_where_they_should():
    """The same patient and the same random numbers with and without a finding: it shows, on its
    side only, and grows."""
    anatomy = {name: sum(limits) / 2 for name, limits in ANATOMY.items()}

    def film(findings):
        return chest_film(np.random.default_rng(2), anatomy, findings, 128)

    normal, empty = film({})
    assert not empty.any()
    contrast = np.ptp(normal)  # a film's window is drawn, so changes are measured against it
    right, left = slice(0, 50), slice(78, 128)
    for side, half, other in ((-1, right, left), (1, left, right)):
        for name in ("Effusion", "Mass", "Pneumothorax"):
            for severity in (0.0, 1.0):
                pixels, mask = film({name: Finding(side, 1, severity, 0.5)})
                change = pixels.astype(int) - normal
                assert np.abs(change[:, half]).max() > 0.12 * contrast
                assert np.abs(change[:, other]).max() < 0.05 * contrast
                assert mask[:, half].any() == (name == "Pneumothorax") and not mask[:, other].any()
    hearts = [film({"Cardiomegaly": Finding(0, 0, severity, 0.5)})[0] for severity in (0.0, 1.0)]
    grown = [(heart.astype(int) - normal > 0.12 * contrast).sum() for heart in hearts]
    assert grown[1] > 2 * grown[0] > 0


def test_a_finding_lies_in_the_visible_lung_on_its_side_and_in_its_zone():
    for seed in range(150):
        rng = np.random.default_rng(seed)
        anatomy = {name: rng.uniform(*limits) for name, limits in ANATOMY.items()}
        large_heart = {"Cardiomegaly": Finding(0, 0, rng.random(), 0.5)}
        c = lay_out(rng, anatomy, large_heart if seed % 2 else {}, 128)
        for side in (-1, 1):
            for zone in range(3):
                for at in (0.0, rng.random(), 0.999):
                    x, y = spot(c, Finding(side, zone, 0.5, at))
                    assert np.sign(x) == side
                    assert zone / 3 - 0.1 < (y - c.apex) / c.height < (zone + 1) / 3 + 0.12
                    here = tuple(np.argwhere((c.x == x) & (c.y == y))[0])
                    assert c.air[here] > 0.5 and c.wall[here] > 0 and c.above[here] > 0


def test_bad_arguments_and_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("thesis.txt", "demo.json"):  # another demo is not drawn over, either
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_text("mine")
    for out in ("file", "file/records", "thes", "demo"):
        fails(lambda: write_demo_records(tmp_path / out, patients=50, size=32), tmp_path / out)
    few = ["--patients", "5", "--out", str(tmp_path / "few")]
    fails(lambda: parse_config(demo_drawing.DemoConfig, few), "--patients: expected", "in [50")
    assert (tmp_path / "thes/thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "file", "thes"]


def test_interrupted_draw_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def film(*args):
        drawn.append(1)
        if len(drawn) > 20:
            raise KeyboardInterrupt
        return np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)

    monkeypatch.setattr(demo_drawing, "chest_film", film)
    with pytest.raises(KeyboardInterrupt):
        write_demo_records(tmp_path / "records", patients=50, size=32)
    assert len(drawn) > 20 and not list(tmp_path.iterdir())
    monkeypatch.setattr(demo_drawing, "draw_brain", film)
    with pytest.raises(KeyboardInterrupt):
        demo_pairs(tmp_path / "records")
    assert not list((tmp_path / "records").iterdir())
