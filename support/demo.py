"""Draws X-rays (films), reports and brains for a newcomer without data. Nobody needs to read this.

    python -m support.demo      # draws the records and the pairs; the scripts do it on first use
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support.script import (
    InputError, option, over_images, parse_config, run_script, write_csv, write_json)

# --------------------------------------------------------------------------------------------------
# Chest films and their reports
#
# A film is a sum of attenuations along each ray (soft tissue, minus air, plus bone; 1 is a thick
# chest wall) that goes through a film's S-shaped response. Lengths are fractions of the picture's
# side. x is 0 on the spine and positive on the patient's LEFT, which is the right of the picture; X
# is |x|; y runs down from 0 to 1. A side is -1 (right), 1 (left) or 0 (both).

SIDES = {-1: "right", 0: "bilateral", 1: "left"}
FINDINGS = {  # class: chance, sides
    "Atelectasis": (0.17, (-1, 1)), "Cardiomegaly": (0.18, (0,)), "Effusion": (0.18, (-1, 1, 0)),
    "Mass": (0.19, (-1, 1)), "Pneumothorax": (0.17, (-1, 1)), "Consolidation": (0.17, (-1, 1)),
    "Edema": (0.16, (0,))}
DEMO_CLASSES = tuple(FINDINGS)
ANATOMY = {  # what all films of a patient share, drawn uniformly between two numbers
    "chest": (0.33, 0.42), "apex": (0.07, 0.15), "height": (0.54, 0.67), "dome": (0.07, 0.12),
    "left_lower": (-0.01, 0.04), "ctr": (0.39, 0.475), "droop": (0.20, 0.50),  # diaphragm, heart
    "pedicle": (0.055, 0.080), "marks": (0.7, 1.25),  # great vessels, strength of the small ones
    "neck": (0.11, 0.16), "shoulder": (0.02, 0.11), "trunk": (0.42, 0.56), "fat": (-0.12, 0.18),
    "rib": (0.05, 0.11), "rib_gap": (0.068, 0.086), "rib_phase": (0, 1), "clavicle": (0.12, 0.20)}


@dataclasses.dataclass
class Finding:
    """What is drawn and reported."""

    side: int
    zone: int  # 0 upper, 1 mid, 2 lower
    severity: float  # from 0, just visible, to 1
    at: float  # the place in the zone, from 0 to 1

    @property
    def grade(self):
        return min(2, int(3 * self.severity))


def draw_findings(rng):
    """The findings of one film, {class: Finding}."""
    found = {}
    for name, (chance, sides) in FINDINGS.items():
        if rng.random() < chance:
            zone = int(rng.integers(1 if name == "Atelectasis" else 0, 3))
            found[name] = Finding(int(rng.choice(sides)), zone, rng.random(), rng.random())
    return found


def smooth_noise(rng, size, cells):
    """A random field (size, size) of about unit variance whose bumps are size / cells wide."""
    small = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(small.resize((size, size), Image.BICUBIC))


def ramp(distance, width):
    """0 outside (a negative distance), 1 inside, linear over `width` around distance 0."""
    return np.clip(distance / width + 0.5, 0, 1)


def ball(q):
    """Thickness of an ellipsoid whose quadratic form is q (1 at its edge): 1 at its centre."""
    return np.sqrt(np.maximum(1 - q, 0))


def lay_out(rng, anatomy, findings, size):
    """The chest `c`, a namespace that the drawing functions change: the anatomy, the coordinates
    of each pixel, the depth inside the rib cage (`wall`), the height above the diaphragm (`above`),
    the heart with the great vessels (`solid`) and the air that is left."""
    c = SimpleNamespace(**anatomy, rng=rng, size=size)
    # At scale `fit` the ribs and the costophrenic angles just reach the edges of the film.
    fit = min(0.46 / c.chest, 0.48 / (c.apex + c.height + c.dome + c.left_lower - 0.5))
    scale, turn = fit * rng.uniform(0.78, 1.02), math.radians(rng.normal(0, 3.5))
    a, b = math.cos(turn) / scale, math.sin(turn) / scale
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    u, v = pixel[None, :] - rng.uniform(-0.08, 0.08), pixel[:, None] - rng.uniform(-0.08, 0.08)
    c.x = a * u + b * v + 0.006 * smooth_noise(rng, size, 5)  # the noise bends every outline a bit
    c.y = a * v - b * u + 0.006 * smooth_noise(rng, size, 5) + 0.5
    c.X = np.abs(c.x)
    c.on = {-1: ramp(-c.x, 0.06), 0: 1.0, 1: ramp(c.x, 0.06)}
    right_floor = c.apex + c.height + rng.uniform(-0.03, 0.02)  # how deep the patient inhaled
    c.floor = right_floor + c.left_lower * c.on[1]
    middle, base = 0.45 * c.chest, c.apex + 0.72 * c.height  # the dome's crest; the widest ribs
    c.across = (c.X - middle) / (c.chest - middle)  # 0 at the crest, 1 at the chest wall
    rise = np.maximum(base - c.y, 0) / (base - c.apex)
    radius = np.hypot(rise, np.where(c.X > middle, c.across, (middle - c.X) / (1.1 * middle)))
    c.wall = (1 - radius) * (c.chest - middle)
    c.above = c.floor + c.dome * c.across**2 * (0.6 + 0.4 * c.across**2) - c.y
    c.abdomen = ramp(-c.above, 0.02)
    ratio = c.ctr  # the cardiothoracic ratio is normal up to 0.5
    if "Cardiomegaly" in findings:
        ratio = 0.53 + 0.13 * findings["Cardiomegaly"].severity
    half, tall = ratio * c.chest, 0.155 + 0.15 * (ratio - 0.4)
    swing = rng.normal(0, 0.02)  # a patient who is turned shows the heart further to one side
    down = c.y - right_floor + 0.06
    out = (c.x - 0.34 * half - swing - c.droop * down) / math.sqrt(half**2 - (c.droop * tall) ** 2)
    heart = ball(out**2 + (down / tall) ** 2)
    great = ramp(c.pedicle - np.abs(c.x - swing), 0.03) * ramp(-down, 0.1)
    c.solid = np.minimum(np.maximum(1.6 * heart, 0.8 * great), 1)
    depth = np.maximum(c.wall, 0)
    c.air = depth / (depth + 0.03) * ramp(c.above, 0.015) * (1 - 0.85 * c.solid)
    return c


def vessels(c):
    """Vessels run outward from each hilum and bend; there are more and thinner ones further out."""
    dx, dy, total = c.X - 0.06, c.y - 0.42, 0
    distance = np.hypot(dx, dy)
    turn = np.arctan2(dy, dx) / (2 * math.pi) + 0.03 * smooth_noise(c.rng, c.size, 6)
    for count, width, start in ((9, 0.011, 0.0), (18, 0.008, 0.10), (36, 0.006, 0.2)):
        off = 2 * math.pi * distance * np.abs(turn - np.rint(count * turn) / count)
        total = total + width / 0.011 * ball((off / width) ** 2) * ramp(distance - start, 0.05)
    return total


def spot(c, f):
    """A point in the visible lung, on the finding's side and in its zone."""
    third = np.floor(((c.y - c.apex) / c.height - 0.18) / 0.26)
    visible = np.flatnonzero((c.air > 0.6) & (f.side * c.x > 0) & (third == f.zone))
    i = visible[int(f.at * len(visible))]
    return c.x.flat[i], c.y.flat[i]


def edema(c, f):  # patchy haze around both hila, the wings of a bat, with coarser vessels
    x, y = c.rng.uniform(0.13, 0.19), c.apex + c.rng.uniform(0.50, 0.66) * c.height
    wing = np.exp(-(((c.X - x) / 0.10) ** 2) - ((c.y - y) / 0.17) ** 2)
    patchy = np.maximum(1 + 0.25 * smooth_noise(c.rng, c.size, c.size // 4), 0.4)
    c.water += wing * patchy * (0.12 + 0.20 * f.severity)
    c.marks = c.marks * (1 + (0.5 + 0.5 * f.severity) * wing)


def consolidation(c, f):  # fluffy and patchy, within one zone; it ends at the pleura
    x, y = spot(c, f)
    distance = (c.x - x) ** 2 + ((c.y - y) / c.rng.uniform(0.8, 1.1)) ** 2
    near = np.exp(-distance / (0.10 + 0.07 * f.severity) ** 2)
    patchy = np.maximum(1 + 0.5 * smooth_noise(c.rng, c.size, c.size // 8), 0.4)
    c.water += np.minimum(1.4 * near * patchy, 1) * c.on[f.side] * (0.60 + 0.15 * f.severity)


def mass(c, f):
    x, y = spot(c, f)
    q = ((c.x - x) ** 2 + (c.y - y) ** 2) / (0.055 + 0.030 * f.severity) ** 2
    c.water += ball(q) * (0.95 + 0.15 * f.severity)


def atelectasis(c, f):  # one to three plates, nearly horizontal
    x, y = spot(c, f)
    for k in range(1 + f.grade):
        off = c.y - y - 0.05 * k - c.rng.uniform(-0.45, 0.45) * (c.x - x)
        wide = ramp(0.11 + 0.06 * f.severity - np.abs(c.x - x), 0.03) * c.on[f.side]
        c.water += np.exp(-((off / 0.026) ** 2)) * wide * (0.70 + 0.08 * f.severity)


def pneumothorax(c, f):  # air between ribs and lung, most at the apex; the pleura is a thin line
    gap = (0.10 + 0.10 * f.severity) * (1.25 - 0.8 * np.clip((c.y - c.apex) / c.height, 0, 1))
    outside = ramp(gap - c.wall, 0.008) * c.on[f.side]
    c.mask = (outside > 0.5) & (c.wall > 0) & (c.above > 0) & (c.solid < 0.5)
    pleura = 0.16 * np.exp(-(((c.wall - gap) / 0.008) ** 2))
    shrunk = c.water + (0.08 + 0.10 * f.severity) * c.on[f.side]  # a denser lung
    c.water, c.marks = shrunk * (1 - outside) + pleura * c.on[f.side], c.marks * (1 - outside)
    c.air = c.air * (1 + 0.15 * outside)


def effusion(c, f):  # fluid, as dense as the abdomen, fills the lowest part and climbs the wall
    height = (0.09 + 0.30 * f.severity**1.3) * (0.75 + 0.35 * np.clip(c.across, 0, 1.1) ** 2)
    level = c.floor + c.dome - height - 0.05 * np.exp(-np.maximum(c.wall, 0) / 0.02)
    fluid = ramp(c.y - level, 0.025) * c.on[f.side] * ramp(c.X - 0.02, 0.04)
    c.abdomen = np.maximum(c.abdomen, fluid * ramp(c.wall, 0.02))
    c.air, c.mask = c.air * (1 - 0.95 * fluid), c.mask & (fluid < 0.5)


def chest_film(rng, anatomy, findings, size):
    """One film: its pixels and its pneumothorax mask, both uint8 (size, size)."""
    c = lay_out(rng, anatomy, findings, size)
    c.water, c.mask = 0.0, np.zeros((size, size), bool)
    c.marks = 0.14 * c.marks * vessels(c) + 0.022 * smooth_noise(rng, size, size // 3)
    # What lies in the lung comes before what lies around it. `lay_out` draws cardiomegaly.
    drawings = {"Edema": edema, "Consolidation": consolidation, "Mass": mass,
                "Atelectasis": atelectasis, "Pneumothorax": pneumothorax, "Effusion": effusion}
    for name, draw in drawings.items():
        if name in findings:
            draw(c, findings[name])
    r = c.X / c.chest  # the ribs arch out and down from the spine
    back = (c.y - 0.10 * r**2 * (0.4 + r**2) + 0.02 * r) / c.rib_gap + c.rib_phase
    ribs = ball(((back - np.rint(back)) / 0.24) ** 2) * ramp(c.X - 0.03, 0.03)
    ribs = ribs * ramp(c.wall + 0.02, 0.02) * ramp(0.86 - c.y, 0.2)
    spine = ramp(0.034 - c.X, 0.02) * (0.85 + 0.15 * np.cos(c.y * (2 * math.pi / 0.055)))
    bow = c.clavicle - 0.10 * c.X * (1 + c.X) + 0.016 * np.sin(11 * c.X)
    clavicles = ball(((c.y - bow) / 0.017) ** 2) * ramp(c.X - 0.035, 0.02)
    bones = 0.7 * c.rib * ribs + 0.07 * spine + 0.12 * clavicles
    half_width = c.neck + ramp(c.y - c.shoulder - 0.03, 0.16) * (0.62 - c.neck)
    half_width = half_width - ramp(c.y - 0.55, 0.35) * (0.62 - c.trunk)
    body = ball((c.x / half_width) ** 2) * (0.95 + c.fat) + 0.20 * c.abdomen
    lung = np.minimum(c.water, 1.1) + c.marks + 0.06 * smooth_noise(rng, size, 4) - 0.55
    total = body + (bones + 0.16 * c.solid) * ramp(body - 0.3, 0.4) + lung * c.air * (body > 0.2)
    total -= 0.10 * ball((c.x / 0.018) ** 2) * ramp(0.40 - c.y, 0.06)  # the air of the trachea
    total += 0.05 * smooth_noise(rng, size, 2)  # the exposure is uneven
    # N ~ exp(-attenuation) quanta reach a pixel, so log N has noise of exp(attenuation / 2).
    grain = rng.standard_normal((size, size), np.float32)
    total += rng.uniform(0.004, 0.010) * np.exp(0.5 * total) * grain
    film = 1 / (1 + np.exp((rng.uniform(0.50, 0.85) - total) * rng.uniform(3.5, 6.0)))
    low, high = rng.uniform(0.0, 0.3), rng.uniform(0.6, 1.0)
    film = low + (high - low) * film ** math.exp(rng.uniform(-0.5, 0.5))
    return (255 * film).astype(np.uint8), c.mask.astype(np.uint8) * 255


def write_report(rng, findings):
    """The report of a film: three words for each finding, or for one that a normal film has not.
    The classes share the words before the name, so that hardly a word follows from those beside
    it: a model that guesses hidden words has to look at the film."""
    shown = findings or {rng.choice(DEMO_CLASSES): None}
    clauses = []
    for name, finding in shown.items():
        sides = FINDINGS[name][1]
        side = finding.side if finding else rng.choice(sides)
        where = "generalized" if sides == (0,) else SIDES[side]
        clauses.append(f"{'definite' if finding else 'no'} {where} {name.lower()}")
    return ", ".join(clauses)


# --------------------------------------------------------------------------------------------------
# The folder of the demo records


def draw_patient(folder, seed, size, patient):
    """Draws a patient's films and masks. Returns a row (file name, classes, report) a film."""
    rng = np.random.default_rng([seed, patient])
    anatomy, rows = {name: rng.uniform(*limits) for name, limits in ANATOMY.items()}, []
    for visit in range(rng.integers(1, 5)):
        findings = draw_findings(rng)
        film, mask = chest_film(rng, anatomy, findings, size)
        name = f"{patient:08d}_{visit:03d}.png"
        Image.fromarray(film).save(folder / "images" / name, compress_level=1)
        if "Pneumothorax" in findings:
            Image.fromarray(mask).save(folder / "masks" / name, compress_level=1)
        report = write_report(np.random.default_rng([seed, patient, 1 + visit]), findings)
        rows.append((name, list(findings), report))
        # Longer reports once took these numbers; without them the next visit would look otherwise
        absent = len(FINDINGS) - len(findings)
        words = sum(2 if finding.grade == 1 else 3 for finding in findings.values())
        rng.permutation(absent)
        rng.integers(2, size=words + absent - (absent + 1) // 4)
    return rows


def write_lists(folder, rng, patients):
    """Writes the lists, training.csv (reports of train_list alone), patients.csv and classes.txt.
    In a random order of `patients` (lists of rows) 70 % of the images go to train_list, 10 % to
    val_list, 20 % to test_list; train_1 and train_10 are train_list's first 1 % and 10 %."""
    order = [patients[i] for i in rng.permutation(len(patients))]
    images = np.cumsum([len(rows) for rows in order])
    ends = [images[-1] * share for share in (0.007, 0.07, 0.7, 0.8)]
    one, ten, train, val = np.searchsorted(images, ends) + 1
    parts = {"train_1": order[:one], "train_10": order[:ten], "train_list": order[:train],
             "val_list": order[train:val], "test_list": order[val:]}
    for part, members in parts.items():
        rows = sorted(row for rows in members for row in rows)
        with open(folder / f"{part}.txt", "w") as file:
            for name, classes, _ in rows:
                print(name, *(int(c in classes) for c in DEMO_CLASSES), file=file)
        if part == "train_list":
            reports = [(name, report) for name, _, report in rows]
            write_csv(folder / "training.csv", ("image_path", "report_content"), reports)
    names = [(name, name.split("_")[0]) for rows in patients for name, _, _ in rows]
    write_csv(folder / "patients.csv", ("image_path", "patient_id"), names)
    (folder / "classes.txt").write_text("\n".join(DEMO_CLASSES) + "\n")


@contextlib.contextmanager
def new_folder(path):
    """Gives an empty folder to fill, which becomes `path` only when all went well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            yield new
            os.rename(new, path)
    except OSError as error:
        if not path.exists():  # else another process has made it meanwhile
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_demo_records(out, patients=2400, size=128, seed=0):
    """Draws the demo records into the folder `out`, in the published formats. Returns the folder.

    There are about 2.5 films a patient: images/, masks/ (of pneumothoraces), the lists train_1.txt
    to test_list.txt, training.csv, classes.txt, patients.csv and demo.json (the arguments). `out`
    appears only when it is complete. Raises InputError for a folder that cannot be written or holds
    anything but the demo pairs."""
    out = Path(out).absolute()
    if out.is_file() or out.exists() and {path.name for path in out.iterdir()} - {"pairs"}:
        raise InputError(out, "no folder", "one with other files or another demo; data of your own "
                         "needs --data as well as --root")
    with new_folder(out) as new:
        for name in ("images", "masks"):
            (new / name).mkdir()
        draw = functools.partial(draw_patient, new, seed, size)
        drawn = over_images(draw, range(1, patients + 1), "drawing patients")
        write_lists(new, np.random.default_rng(seed), drawn)
        write_json(new / "demo.json", {"patients": patients, "size": size, "seed": seed})
        if (out / "pairs").exists():  # the demo pairs live there too
            os.rename(out / "pairs", new / "pairs")
    return out


# --------------------------------------------------------------------------------------------------
# Pairs of brain slices

BRAIN_TISSUES = {  # brightness in T1 and T2; no curve turns one into the other
    "air": (0, 0), "fat": (0.86, 0.42), "bone": (0.12, 0.10), "csf": (0.14, 0.95),
    "grey": (0.50, 0.58), "white": (0.80, 0.36), "nuclei": (0.60, 0.47), "lesion": (0.50, 0.85)}


def random_surface(rng, shape, size):
    """A bicubic surface of `size` pixels through `shape` random points of standard deviation 1."""
    knots = torch.from_numpy(rng.normal(0, 1, (1, 1, *shape)))
    return F.interpolate(knots, size, mode="bicubic", align_corners=True)[0, 0].numpy()


def draw_tissues(rng, level, n):
    """The names of the tissues (n, n) in one axial slice at the height `level`."""
    y, x = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n), indexing="ij")
    width, length = rng.uniform(0.60, 0.68), rng.uniform(0.70, 0.78)
    shrink = np.sqrt(1 - 0.35 * level**2)  # a slice near the crown or the base is smaller
    y, x = y + rng.uniform(-0.04, 0.04), x + rng.uniform(-0.04, 0.04)
    theta = np.arctan2(y, x)
    outline = 1 + sum(rng.normal(0, 0.014) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
                      for k in (1, 2, 3, 4))
    r = np.hypot(x / width, y / length) / (shrink * outline)  # 1 at the brain's surface
    x, y = x / (width * shrink), y / (length * shrink)
    # Gyri: the ridges of a surface in polar coordinates run inward. High ridges are sulci, which
    # are filled with CSF and lined with grey matter.
    folds = random_surface(rng, (6, 44), (64, 1024))
    mirrored = folds[:, 511::-1] * 0.8 + folds[:, 512:] * 0.2
    folds = np.concatenate([folds[:, :512], mirrored], 1)  # a closed ring, nearly symmetric
    turn = (theta / (2 * np.pi) + 0.75 + 0.25 * level * (1 - r)) % 1
    column = np.clip(turn * 1024, 0, 1023).astype(int)
    fold = folds[np.clip(r * 48, 0, 63).astype(int), column] * np.clip(r * 2.5 - 1, 0, 1)
    wobble = random_surface(rng, (9, 9), (n, n))

    def blob(cy, cx, ry, rx, tilt=0.0):
        u, v = y - cy, x - cx
        u, v = u * np.cos(tilt) - v * np.sin(tilt), u * np.sin(tilt) + v * np.cos(tilt)
        return np.hypot(u / ry, v / rx) < 1 + 0.12 * wobble

    tissue, depth = np.full((n, n), "air", dtype="<U6"), 1 - r
    tissue[r < 1 + rng.uniform(0.17, 0.23)] = "fat"
    tissue[r < 1 + rng.uniform(0.08, 0.11)] = "bone"
    tissue[r < 1.03] = "csf"
    tissue[(depth > 0.01 + 0.14 * np.clip(fold - 0.5, 0, 2)) & (r < 1)] = "grey"
    tissue[(depth > rng.uniform(0.13, 0.18) + 0.11 * np.clip(fold, -0.8, 2)) & (r < 1)] = "white"
    tissue[(np.abs(x + 0.01 * wobble) < 0.022) & (np.abs(y) > 0.38) & (r < 1)] = "csf"
    big, middle = rng.uniform(0.7, 1.25), max(0.0, 1 - 0.8 * level**2)  # size of the ventricles
    for side in (-1, 1):
        if level < 0.5:
            tissue[blob(-0.08, side * 0.24, 0.16, 0.10, side * 0.2)] = "nuclei"  # putamen
            tissue[blob(0.14, side * 0.13, 0.13, 0.10)] = "nuclei"  # thalamus
        wide = big * middle
        front = blob(-0.22, side * 0.11, 0.18 * wide + 0.02, 0.070 * wide + 0.01, side * 0.35)
        back = blob(0.32, side * 0.17, 0.22 * wide + 0.02, 0.075 * wide + 0.01, -side * 0.45)
        tissue[front | back] = "csf"  # the horns of the ventricle
    tissue[blob(0.08, 0, 0.16 * middle + 0.01, 0.030 * big)] = "csf"  # third ventricle
    for _ in range(rng.integers(0, 4)):
        cy, cx, radius = rng.uniform(-0.5, 0.5), rng.uniform(-0.45, 0.45), rng.uniform(0.05, 0.12)
        spread = blob(cy, cx, radius, radius * rng.uniform(0.7, 1.3))
        tissue[spread & np.isin(tissue, ("white", "grey"))] = "lesion"
    return tissue


def draw_brain(rng, level, size=64, detail=3):
    """One axial slice of the subject `rng` at the height `level` in [-1, 1]: aligned T1 and T2,
    (size, size) float32 in [-1, 1]. Tissues are drawn `detail` times finer and then averaged."""
    n, images = size * detail, []
    tissue = draw_tissues(rng, level, n)
    for contrast in (0, 1):
        image = np.zeros((n, n))
        for name, brightness in BRAIN_TISSUES.items():
            image[tissue == name] = brightness[contrast] * (1 + rng.normal(0, 0.02))
        image *= np.exp(0.06 * random_surface(rng, (3, 3), (n, n)))  # uneven coil sensitivity
        image = image.reshape(size, detail, size, detail).mean((1, 3))
        inside = image > 0.02
        image += rng.normal(0, 0.012, image.shape)
        images.append(np.where(inside, np.clip(image * 2 - 1, -0.999, 1), -1).astype(np.float32))
    return images


def demo_pairs(root, size=64, slices=4, subjects=(("train", 30), ("val", 5), ("test", 8)), seed=0):
    """Draws the demo pairs unless they are there: `root`/pairs/train|val|test/A|B/*.npy, A in T1
    and B in T2, no subject in two parts. Returns the folder `pairs`, which appears whole. Raises
    InputError where it cannot be written."""
    folder = Path(root) / "pairs"
    if folder.is_dir():
        return folder
    with new_folder(folder) as new:
        parts = [part for part, count in subjects for _ in range(count)]
        for subject, part in enumerate(parts):
            for side in "AB":
                (new / part / side).mkdir(parents=True, exist_ok=True)
            for k, level in enumerate(np.linspace(-0.8, 0.8, slices)):
                rng = np.random.default_rng([seed, 2, subject])  # apart from the films
                for side, image in zip("AB", draw_brain(rng, float(level), size)):
                    file = new / part / side / f"subject{subject:03d}_{k}.npy"
                    np.save(file, image.astype(np.float16))
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    out: str = option("demo", "folder to draw the demo records and pairs into")
    patients: int = option(2400, "patients, about 2.5 films each", within="[50, inf)")


def main():
    config = parse_config(DemoConfig, description=__doc__)
    root = write_demo_records(config.out, config.patients)
    print(f"drawn: {root} and {demo_pairs(root)}")


if __name__ == "__main__":
    run_script(main)
