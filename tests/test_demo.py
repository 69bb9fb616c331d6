"""The demo chest radiographs: the folder is complete, reproducible and honest (lists, masks and
reports agree)."""

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import script as common
from support import demo as demo_drawing

PATIENTS = 120
LISTS = ("train_1", "train_10", "train_list", "val_list", "test_list")
def digest(folder):
    """{relative path: hash of the bytes} of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_list(folder, name):
    rows = [line.split() for line in (folder / f"{name}.txt").read_text().splitlines()]
    return {row[0]: tuple(int(label) for label in row[1:]) for row in rows}


def clauses(report):
    """[(definite or no, where, class)] of a report."""
    said = [clause.split(" ") for clause in report.split(", ")]
    return [(sure, where, name.capitalize()) for sure, where, name in said]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_drawing.write_demo_records(
        tmp_path_factory.mktemp("demo") / "records", patients=PATIENTS, seed=3
    )


def test_layout(demo):
    assert {path.name for path in demo.iterdir()} == {
        "images",
        "masks",
        "training.csv",
        "classes.txt",
        "patients.csv",
        "demo.json",
        *(f"{name}.txt" for name in LISTS),
    }
    assert (demo / "classes.txt").read_text().split() == list(demo_drawing.DEMO_CLASSES)
    lists = {name: read_list(demo, name) for name in LISTS}
    with open(demo / "patients.csv", newline="") as file:
        patient = {row["image_path"]: row["patient_id"] for row in csv.DictReader(file)}
    images = {path.name for path in (demo / "images").iterdir()}
    assert images == set(patient) == set().union(*lists.values())
    assert all(
        len(labels) == 7 and set(labels) <= {0, 1}
        for part in lists.values()
        for labels in part.values()
    )
    parts = [
        {patient[name] for name in lists[part]} for part in ("train_list", "val_list", "test_list")
    ]
    assert (
        not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        and sum(map(len, parts)) == PATIENTS
    )
    assert set(lists["train_1"]) < set(lists["train_10"]) < set(lists["train_list"])
    train = len(lists["train_list"])
    assert (
        abs(train / len(images) - 0.7) < 0.02
        and abs(len(lists["test_list"]) / len(images) - 0.2) < 0.03
    )
    assert (
        0.01 * train <= len(lists["train_1"]) <= 0.01 * train + 4
        and 0.1 * train - 1 <= len(lists["train_10"]) <= 0.1 * train + 4
    )
    with open(demo / "training.csv", newline="", encoding="utf-8") as file:
        assert [row["image_path"] for row in csv.DictReader(file)] == list(
            lists["train_list"]
        )  # no val or test report


def test_images_and_masks(demo):
    labels = {
        name: row
        for part in ("train_list", "val_list", "test_list")
        for name, row in read_list(demo, part).items()
    }
    has = demo_drawing.DEMO_CLASSES.index("Pneumothorax")
    assert {path.name for path in (demo / "masks").iterdir()} == {
        name for name, row in labels.items() if row[has]
    }
    means = []
    for name in labels:
        image = Image.open(demo / "images" / name)
        pixels = np.asarray(image)
        assert image.mode == "L" and pixels.shape == (128, 128)
        assert (
            pixels.std() > 10 and np.percentile(pixels, 95) - np.percentile(pixels, 5) > 30
        )  # of a film of low contrast
        means.append(pixels.mean())
        if labels[name][has]:
            mask = np.asarray(Image.open(demo / "masks" / name))
            assert (
                mask.shape == (128, 128)
                and set(np.unique(mask)) == {0, 255}
                and 0.003 < (mask > 0).mean() < 0.25
            )
    assert np.std(means) > 10  # exposure varies
    prevalence = np.mean(list(labels.values()), 0)
    assert (prevalence > 0.08).all() and (prevalence < 0.35).all(), prevalence


def test_same_seed_same_bytes_and_another_seed_replaces_them(tmp_path):
    out = tmp_path / "records"
    first, again, other = (
        digest(demo_drawing.write_demo_records(out, patients=50, size=32, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert not {first[name] for name in first if "images" in name} & set(other.values())
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize("from_file", (True, False), ids=("script", "standard input"))
def test_a_script_without_a_main_guard_draws_the_same_and_ends(tmp_path, from_file):
    code = (
        "from support import demo; demo.write_demo_records('records', patients=50, size=32, seed=1); "
        "print('once')"
    )
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "script.py" if from_file else "-"]
    environment = os.environ | {"PYTHONPATH": str(Path(demo_drawing.__file__).parents[1])}
    done = subprocess.run(
        command,
        input=code,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.split() == ["once"], done.stderr
    here = demo_drawing.write_demo_records(tmp_path / "here", patients=50, size=32, seed=1)
    assert digest(tmp_path / "records") == digest(here)


def test_records_drawn_again_keep_the_pairs(tmp_path):
    pairs = demo_drawing.demo_pairs(
        tmp_path / "records", size=32, slices=1, subjects=(("train", 1),)
    )
    drawn = digest(pairs)
    for seed in (1, 2):
        demo_drawing.write_demo_records(tmp_path / "records", patients=50, size=32, seed=seed)
        assert drawn and digest(pairs) == drawn
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


def test_labels_follow_from_the_reports(demo):
    labels = read_list(demo, "train_list")
    with open(demo / "training.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            said = clauses(row["report_content"])
            stated = [name for sure, _, name in said if sure == "definite"]
            assert {sure for sure, _, _ in said} == ({"definite"} if stated else {"no"})
            found = tuple(int(name in stated) for name in demo_drawing.DEMO_CLASSES)
            assert found == labels[row["image_path"]], row


def test_reports_say_what_is_drawn_and_share_their_words():
    """The side is that of the drawing. No word before a name says which class it is, whether it is
    there or not, so that a hidden word does not follow from those beside it."""
    before = {}
    for patient in range(900):
        rng = np.random.default_rng([5, patient])
        findings = demo_drawing.draw_findings(rng)
        said = clauses(demo_drawing.write_report(rng, findings))
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
            assert before.pop((sure, where)) == set(demo_drawing.DEMO_CLASSES) - whole
    assert not before


def test_findings_change_the_film_where_they_should():
    """The same patient and the same random numbers with and without a finding: it shows, on its
    side only, and grows."""
    anatomy = {name: sum(limits) / 2 for name, limits in demo_drawing.ANATOMY.items()}

    def film(findings):
        rng = np.random.default_rng(2)
        return demo_drawing.chest_film(rng, anatomy, findings, 128)

    normal, empty = film({})
    assert not empty.any()
    contrast = np.ptp(normal)  # a film's window is drawn, so changes are measured against it
    for side in (-1, 1):
        half = slice(0, 50) if side < 0 else slice(78, 128)
        other = slice(78, 128) if side < 0 else slice(0, 50)
        for name in ("Effusion", "Mass", "Pneumothorax"):
            for severity in (0.0, 1.0):
                pixels, mask = film({name: demo_drawing.Finding(side, 1, severity, 0.5)})
                change = pixels.astype(int) - normal
                assert np.abs(change[:, half]).max() > 0.12 * contrast
                assert np.abs(change[:, other]).max() < 0.05 * contrast
                assert mask[:, half].any() == (name == "Pneumothorax") and not mask[:, other].any()
    ratio = [
        film({"Cardiomegaly": demo_drawing.Finding(0, 0, s, 0.5)})[0].astype(int) - normal
        for s in (0.0, 1.0)
    ]
    grown = [(change > 0.12 * contrast).sum() for change in ratio]
    assert grown[1] > 2 * grown[0] > 0


def test_a_finding_lies_in_the_visible_lung_on_its_side_and_in_its_zone():
    for seed in range(150):
        rng = np.random.default_rng(seed)
        anatomy = {name: rng.uniform(*limits) for name, limits in demo_drawing.ANATOMY.items()}
        large_heart = {"Cardiomegaly": demo_drawing.Finding(0, 0, rng.random(), 0.5)}
        c = demo_drawing.lay_out(rng, anatomy, large_heart if seed % 2 else {}, 128)
        for side in (-1, 1):
            for zone in range(3):
                for at in (0.0, rng.random(), 0.999):
                    x, y = demo_drawing.spot(c, demo_drawing.Finding(side, zone, 0.5, at))
                    assert np.sign(x) == side
                    assert zone / 3 - 0.1 < (y - c.apex) / c.height < (zone + 1) / 3 + 0.12
                    row, column = np.argwhere((c.x == x) & (c.y == y))[0]
                    assert (
                        c.air[row, column] > 0.5
                        and c.wall[row, column] > 0
                        and c.above[row, column] > 0
                    )


def test_pixels_alone_do_not_solve_it(demo):
    """A linear probe of a few hundred films, 32 x 32: better than chance in places, far from the
    task's ceiling."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    def load(part):
        rows = read_list(demo, part)
        films = [
            np.asarray(Image.open(demo / "images" / name).resize((32, 32), Image.BOX)).ravel() / 255
            for name in rows
        ]
        return np.array(films), np.array(list(rows.values()))

    train, val, test = (load(part) for part in ("train_list", "val_list", "test_list"))
    images, labels = np.concatenate([val[0], test[0]]), np.concatenate([val[1], test[1]])
    mean, scale = train[0].mean(0), train[0].std(0) + 1e-6
    aurocs = []
    for k in range(labels.shape[1]):
        probe = LogisticRegression(C=1e-3, max_iter=200).fit(
            (train[0] - mean) / scale, train[1][:, k]
        )
        aurocs.append(roc_auc_score(labels[:, k], probe.decision_function((images - mean) / scale)))
    assert np.mean(aurocs) < 0.78, dict(zip(demo_drawing.DEMO_CLASSES, aurocs))


def test_bad_arguments_and_folders(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for out in ("file", "file/records", "other"):
        with pytest.raises(common.InputError) as error:
            demo_drawing.write_demo_records(tmp_path / out, patients=50, size=32)
        assert str(tmp_path / out) in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    with pytest.raises(common.InputError, match="50 patients"):
        demo_drawing.write_demo_records(tmp_path / "few", patients=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_interrupted_draw_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def film(*args):
        drawn.append(1)
        if len(drawn) > 20:
            raise KeyboardInterrupt
        return np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)

    monkeypatch.setattr(demo_drawing, "chest_film", film)
    with pytest.raises(KeyboardInterrupt):
        demo_drawing.write_demo_records(tmp_path / "records", patients=50, size=32)
    assert len(drawn) > 20 and not list(tmp_path.iterdir())
    monkeypatch.setattr(demo_drawing, "draw_brain", film)
    with pytest.raises(KeyboardInterrupt):
        demo_drawing.demo_pairs(tmp_path / "records")
    assert not list((tmp_path / "records").iterdir())
