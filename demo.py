"""The drawn films, reports and brains that a newcomer trains on before having data. Nobody needs to read this file.

    python demo.py --out demo            # draw the demo records and pairs (the scripts do it on first use)
"""
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import InputError, option, parse_config, run_script, write_csv

# ---------------------------------------------------------------------------------------------------------------------
# Demo chest radiographs
#
# Chest films are drawn as a sum of X-ray attenuations along each ray (soft tissue, minus air, plus bone and metal), put
# through a film's S-shaped response: overlaps then look as they do on film.
#
# Legend. x runs across the patient, 0 on the spine and positive to the patient's LEFT (the picture's right); y runs down
# from 0, the film's top edge, to 1; X = |x| serves both sides at once. Lengths are fractions of the picture's side (0.01
# is 1.28 pixels of 128), attenuations fractions of a thick chest wall's. Maps are float32 (H, W). A side is -1 right,
# 1 left, 0 both. Everything that can vary is drawn from the patient's own generator.

DEMO_CLASSES = ("Atelectasis", "Cardiomegaly", "Effusion", "Mass", "Pneumothorax", "Consolidation", "Edema")
DEMO_RATES = (0.12, 0.10, 0.11, 0.14, 0.12, 0.12, 0.08)  # of turning up at a visit, heart failure aside
ANATOMY = {  # what a patient keeps from visit to visit, uniform between two numbers
    "chest": (0.33, 0.42), "apex": (0.07, 0.15), "height": (0.54, 0.67),  # half width, top of the lungs, length to the dome
    "dome": (0.07, 0.12), "left_lower": (-0.01, 0.04),  # depth of the costophrenic angle; left dome below the right one
    "ctr": (0.39, 0.475), "droop": (0.20, 0.50), "pedicle": (0.055, 0.080), "knob": (0.035, 0.060),  # heart, aorta
    "neck": (0.11, 0.16), "shoulder": (0.02, 0.11), "trunk": (0.42, 0.56), "fat": (-0.12, 0.18), "breast": (-0.2, 0.2),
    "rib": (0.05, 0.11), "rib_gap": (0.068, 0.086), "rib_phase": (0.0, 1.0), "clavicle": (0.12, 0.20),
    "marks": (0.7, 1.25),  # strength of the vessels
}
HARDWARE = {  # name: how it is reported, then strands (width, x0, y0, x1, y1, ...)
    "ecg": (("ECG leads overlie the chest.", "Monitoring leads project over the thorax."), (
        (0.024, -0.26, 0.25, -0.24, 0.25), (0.007, -0.25, 0.25, -0.29, 0.14, -0.36, 0.05, -0.38, -0.2),
        (0.024, 0.25, 0.29, 0.27, 0.29), (0.007, 0.26, 0.29, 0.21, 0.15, 0.22, 0.06, 0.27, -0.2),
        (0.024, 0.22, 0.71, 0.24, 0.71), (0.007, 0.23, 0.71, 0.13, 0.78, 0.10, 0.90, 0.13, 1.2))),
    "pacemaker": (("Left chest pacemaker with lead in the right ventricle.", "A left-sided pacemaker is in place."), (
        (0.07, 0.24, 0.25, 0.30, 0.26),
        (0.008, 0.25, 0.22, 0.18, 0.18, 0.10, 0.18, 0.02, 0.21, -0.04, 0.30, -0.05, 0.45, -0.04, 0.56, 0.01, 0.63, 0.08, 0.65))),
    "central line": (("Right central venous catheter with tip in the SVC.", "A right jugular line ends over the SVC."), (
        (0.009, -0.10, -0.1, -0.09, 0.05, -0.06, 0.16, -0.04, 0.26, -0.045, 0.36, -0.045, 0.44),)),
}
MARKERS = {1: ((0.02, -0.02, -0.03, -0.02, 0.03, 0.02, 0.03),),  # L and R, strands about the letter's middle
           -1: ((0.02, -0.02, 0.03, -0.02, -0.03, 0.01, -0.03, 0.02, -0.015, 0.01, 0.0, -0.02, 0.0, 0.02, 0.03),)}


@dataclasses.dataclass
class Finding:
    """What is drawn and reported. Zone 0 upper, 1 mid, 2 lower; severity 0 (just visible) to 1; `at`: place in the zone."""

    side: int
    zone: int
    severity: float
    at: tuple

    @property
    def grade(self):
        return min(2, int(3 * self.severity))


def draw_findings(rng, before):
    """One visit's {class: Finding}. Findings of the visit before mostly stay, and get better or worse."""
    failing = rng.random() < 0.08  # heart failure: a large heart, oedema and effusions together
    now = {}
    for name, rate in zip(DEMO_CLASSES, DEMO_RATES):
        side, zone, severity = int(rng.choice([-1, 1])), int(rng.integers(3)), rng.random()
        at, chance, drift, both = tuple(rng.random(2).tolist()), rng.random(), rng.normal(0, 0.25), rng.random() < 0.25
        if name in before:
            if chance < 0.65:
                severity = min(max(before[name].severity + drift, 0.0), 1.0)
                now[name] = dataclasses.replace(before[name], severity=severity)
        elif chance < (0.7 if failing and name in ("Cardiomegaly", "Effusion", "Edema") else rate):
            if name in ("Cardiomegaly", "Edema") or (name == "Effusion" and both):
                side = 0
            now[name] = Finding(side, max(zone, 1) if name == "Atelectasis" else zone, severity, at)
    return now


# ---- Drawing


def smooth_noise(rng, size, cells):
    """Random field (size, size) of about unit variance whose bumps are size / cells wide: drawn small, scaled up."""
    small = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(small.resize((size, size), Image.BICUBIC))


def ramp(distance, width):
    """0 outside, 1 inside, linear over `width` around distance 0."""
    return np.clip(distance / width + 0.5, 0, 1)


def ball(q):
    """Chord through an ellipsoid whose quadratic form is q (1 on its outline): 1 at the centre, 0 outside."""
    return np.sqrt(np.maximum(1 - q, 0))


def tube(distance, radius):
    """Across a bone: a hollow cylinder, so its edges (cortex) are brighter than its middle (marrow)."""
    q = (distance / radius) ** 2
    return ball(q) - 0.7 * ball(1.7 * q)


def strokes(size, segments, place):
    """Draws segments (n, 5) of x0 y0 x1 y1 width, thick over thin, at twice the size; `place` maps points to the picture."""
    picture = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(picture)
    segments = segments[np.argsort(segments[:, 4], kind="stable")]
    ends = 2 * size * place(segments[:, :4].reshape(-1, 2)).reshape(-1, 4)
    widths = np.maximum(1, np.rint(2 * size * segments[:, 4])).astype(int)
    shades = np.minimum(255, 23000 * segments[:, 4]).astype(int)  # a vessel is round: the thinner, the fainter
    for end, shade, width in zip(ends.tolist(), shades.tolist(), widths.tolist()):
        draw.line(end, shade, width)
    return np.asarray(picture.reduce(2), np.float32) / 255


def polylines(strands):
    """HARDWARE's strands as segments (n, 5)."""
    return np.array([(*strand[i : i + 4], strand[0]) for strand in strands for i in range(1, len(strand) - 3, 2)])


def vessel_tree(rng):
    """Segments (n, 5) of both lungs' vessels: from each hilum six trunks that fork three times."""
    side = np.repeat([-1.0, 1.0], 6)
    angle = np.tile(np.linspace(-1.35, 1.45, 6), 2) + rng.normal(0, 0.15, 12)  # 0 points outward, positive down
    x, y, width, tree = side * 0.07, np.where(side > 0, 0.40, 0.43) + 0.03 * np.tanh(angle), 0.017, []
    for _ in range(4):
        length, fork = rng.uniform(0.06, 0.13, len(x)), rng.uniform(0.15, 0.5, len(x))
        ends = x + side * length * np.cos(angle), y + length * np.sin(angle)
        tree.append(np.stack([x, y, *ends, np.full(len(x), width)], 1))
        x, y, side, width = np.tile(ends[0], 2), np.tile(ends[1], 2), np.tile(side, 2), 0.65 * width
        angle = np.concatenate([angle - fork, angle + fork])
    return np.concatenate(tree)


def outlines(rng, anatomy, findings, ap, size):
    """The chest `c` that everything hangs on: this exposure's coordinates, rib cage, diaphragm, heart and the air inside."""
    c = SimpleNamespace(**anatomy, rng=rng, size=size, findings=findings)
    fit = min(0.46 / c.chest, 0.48 / (c.apex + c.height + c.dome + c.left_lower - 0.5))  # ribs and sinuses just on the film
    turn, scale, shift = math.radians(rng.normal(0, 3.5)), fit * rng.uniform(0.78, 1.02), 0.5 + rng.uniform(-0.08, 0.08, 2)
    matrix = scale * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    c.place = lambda points: (points - [0, 0.5]) @ matrix + shift  # patient (n, 2) to picture
    (a, b), (d, e) = np.linalg.inv(matrix).tolist()
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = pixel[None, :] - float(shift[0]), pixel[:, None] - float(shift[1])
    c.x = u * a + v * d + 0.006 * smooth_noise(rng, size, 5)  # the noise bends every outline a little
    c.y = u * b + v * e + 0.006 * smooth_noise(rng, size, 5) + 0.5
    c.X = np.abs(c.x)
    left = ramp(c.x, 0.06)
    c.on = {-1: 1 - left, 0: 1.0, 1: left}

    breath = rng.uniform(-0.02, 0.03) - 0.03 * ap
    floor = c.apex + c.height + breath  # of the right lung
    c.floor = floor + c.left_lower * left
    if "Atelectasis" in findings:  # volume loss pulls the diaphragm up
        c.floor = c.floor - c.on[findings["Atelectasis"].side] * (0.03 + 0.05 * findings["Atelectasis"].severity)
    c.middle, c.base = 0.45 * c.chest, c.apex + 0.72 * c.height  # crest of the dome; where the cage is widest
    c.across = (c.X - c.middle) / (c.chest - c.middle)  # 0 at the crest, 1 at the chest wall
    rise = np.maximum(c.base - c.y, 0) / (c.base - c.apex)
    inward = (c.middle - c.X) / (1.1 * c.middle)
    radius = np.sqrt(rise**2 + np.where(c.X > c.middle, c.across, inward) ** 2)
    c.wall = (1 - radius) * (c.chest - c.middle)  # depth inside the ribs
    c.above = c.floor + c.dome * c.across**2 * (0.6 + 0.4 * c.across**2) - c.y  # height above the diaphragm

    large = findings.get("Cardiomegaly")
    ctr = 0.53 + 0.13 * large.severity if large else c.ctr  # cardiothoracic ratio: up to 0.5 is normal
    swing = rng.normal(0, 0.02)  # turned about the spine, the heart, in front, moves sideways on the film
    c.half, c.tall = ctr * c.chest, 0.155 + 0.15 * (ctr - 0.4)
    c.heart_x, c.heart_y = 0.34 * c.half + swing, floor - 0.06
    slanted = c.x - c.heart_x - c.droop * (c.y - c.heart_y)
    heart = ball((slanted / math.sqrt(c.half**2 - (c.droop * c.tall) ** 2)) ** 2 + ((c.y - c.heart_y) / c.tall) ** 2)
    c.knob_y = c.apex + 0.36 * c.height
    knob = ball(((c.x - swing - c.pedicle + 0.35 * c.knob) / c.knob) ** 2 + ((c.y - c.knob_y) / (1.3 * c.knob)) ** 2)
    below = np.maximum(c.y - c.knob_y, 0)
    pedicle = ramp(c.pedicle + 0.1 * below - np.abs(c.x - swing - 0.1 * below), 0.03) * ramp(c.heart_y - c.y, 0.1)
    c.solid = np.minimum(np.maximum(1.6 * np.maximum(heart, 0.7 * knob), 0.8 * pedicle), 1)
    depth = np.maximum(c.wall, 0)
    c.air = depth / (depth + 0.03) * ramp(c.above, 0.015) * (1 - 0.85 * c.solid)
    c.abdomen, c.water, c.mask = ramp(-c.above, 0.02), 0.0, np.zeros((size, size), bool)
    return c


def spot(c, finding):
    """A point in the visible lung: down from the apex by zone, then out from the heart's border towards the ribs."""
    y = c.apex + c.height * (0.18 + 0.26 * (finding.zone + 0.8 * finding.at[1]))
    ribs = c.middle + (c.chest - c.middle) * math.sqrt(1 - (max(c.base - y, 0) / (c.base - c.apex)) ** 2) - 0.05
    t = (y - c.heart_y) / c.tall
    border = finding.side * (c.heart_x + c.droop * (y - c.heart_y)) + c.half * math.sqrt(max(1 - t * t, 0))
    inner = max(0.10, border + 0.03 if abs(t) < 1 else 0)
    return finding.side * (inner + max(ribs - inner, 0.02) * finding.at[0]), y


def edema(c, f):  # bat's wings: patchy haze around both hila, a coarse interstitium
    x, y = c.rng.uniform(0.13, 0.19), c.apex + c.rng.uniform(0.50, 0.66) * c.height
    wing = np.exp(-(((c.X - x) / 0.10) ** 2) - ((c.y - y) / 0.17) ** 2)
    wing = wing * (1 + c.rng.uniform(-0.2, 0.2) * (2 * c.on[1] - 1))  # never quite symmetric
    c.water += wing * (0.18 + 0.22 * f.severity) * np.maximum(1 + 0.25 * smooth_noise(c.rng, c.size, c.size // 4), 0.4)
    c.texture = c.texture * (1 + (1.2 + 1.5 * f.severity) * wing)


def consolidation(c, f):  # fluffy, patchy, within one zone; ends at the pleura
    x, y = spot(c, f)
    near = np.exp(-((c.x - x) ** 2 + ((c.y - y) / c.rng.uniform(0.8, 1.1)) ** 2) / (0.10 + 0.07 * f.severity) ** 2)
    patchy = np.maximum(1 + 0.5 * smooth_noise(c.rng, c.size, c.size // 8), 0.4)
    c.water += np.minimum(1.4 * near * patchy, 1) * c.on[f.side] * (0.60 + 0.15 * f.severity)


def mass(c, f):
    x, y = spot(c, f)
    c.water += ball(((c.x - x) ** 2 + (c.y - y) ** 2) / (0.055 + 0.030 * f.severity) ** 2) * (0.95 + 0.15 * f.severity)


def atelectasis(c, f):  # one to three plates, nearly horizontal (the raised diaphragm is in `outlines`)
    x, y = spot(c, f)
    for k in range(1 + f.grade):
        off = c.y - y - 0.05 * k - c.rng.uniform(-0.45, 0.45) * (c.x - x)
        plate = np.exp(-((off / 0.026) ** 2)) * ramp(0.11 + 0.06 * f.severity - np.abs(c.x - x), 0.03)
        c.water += plate * c.on[f.side] * (0.70 + 0.08 * f.severity)


def pneumothorax(c, f):  # air between ribs and lung, most at the apex: no vessels out there; the pleura is a thin line
    gap = (0.10 + 0.10 * f.severity) * (1.25 - 0.8 * np.clip((c.y - c.apex) / c.height, 0, 1))
    outside = ramp(gap - c.wall, 0.008) * c.on[f.side]
    c.mask = (outside > 0.5) & (c.wall > 0) & (c.above > 0) & (c.solid < 0.5)
    c.marks, c.texture, c.water = c.marks * (1 - outside), c.texture * (1 - outside), c.water * (1 - outside)
    c.water += (0.16 * np.exp(-(((c.wall - gap) / 0.008) ** 2)) + (0.08 + 0.10 * f.severity) * (1 - outside)) * c.on[f.side]
    c.air = c.air * (1 + 0.15 * outside)


def effusion(c, f):  # fluid fills the lowest part and climbs the wall, a meniscus; dense as the abdomen, it hides the dome
    height = 0.09 + 0.30 * f.severity**1.3
    climb = 0.35 * np.clip(c.across, 0, 1.1) ** 2
    level = c.floor + c.dome - height * (0.75 + climb) - 0.05 * np.exp(-np.maximum(c.wall, 0) / 0.02)
    fluid = ramp(c.y - level, 0.025) * c.on[f.side] * ramp(c.X - 0.02, 0.04)
    c.abdomen = np.maximum(c.abdomen, fluid * ramp(c.wall, 0.02))
    c.air, c.mask = c.air * (1 - 0.95 * fluid), c.mask & (fluid < 0.5)


def bones(c):
    """Posterior ribs arch out and down from the spine, front ribs down and inward; then spine, clavicles, scapulae."""
    r = c.X / c.chest
    back = (c.y - 0.10 * r**2 * (0.4 + r**2) + 0.02 * r) / c.rib_gap + c.rib_phase
    front = (c.y + 0.28 * (r - 1)) / (1.25 * c.rib_gap) + c.rib_phase
    ribs = tube(back - np.floor(back) - 0.5, 0.24) * ramp(c.X - 0.03, 0.03)
    ribs = ribs + 0.55 * tube(front - np.floor(front) - 0.5, 0.22) * ramp(r - 0.5, 0.3)
    spine = ramp(0.034 - c.X, 0.02) * (0.85 + 0.15 * np.cos(c.y * (2 * math.pi / 0.055)))
    bow = c.clavicle - 0.10 * c.X * (1 + c.X) + 0.016 * np.sin(11 * c.X)
    clavicles = tube(c.y - bow, 0.017) * ramp(c.X - 0.035, 0.02)
    blades = ramp(c.X - 0.38 + 0.25 * (c.y - 0.3), 0.015) * ramp(0.56 - c.X, 0.1)
    blades = blades * ramp(c.y - c.clavicle - 0.02, 0.06) * ramp(0.50 - c.y, 0.10)
    ribs = ribs * ramp(c.wall + 0.02, 0.02) * ramp(0.86 - c.y, 0.2)
    return c.rib * ribs + 0.07 * spine + 0.20 * clavicles + 0.07 * blades


def soft_tissue(c):
    """Neck, shoulders and trunk, thickest in the middle; abdomen, breasts, stomach bubble, trachea and main bronchi."""
    outline = c.neck + ramp(c.y - c.shoulder - 0.03, 0.16) * (0.62 - c.neck) - ramp(c.y - 0.55, 0.35) * (0.62 - c.trunk)
    body = ball((c.x / outline) ** 2) * (0.95 + c.fat) + 0.20 * c.abdomen
    if c.breast > 0:
        body += c.breast * ball(((c.X - 0.20) / 0.16) ** 2 + ((c.y - c.apex - 0.88 * c.height) / 0.14) ** 2)
    if c.rng.random() < 0.5:
        bubble = ball(((c.x - 0.17) / 0.06) ** 2 + ((c.y - c.heart_y - c.rng.uniform(0.15, 0.18)) / 0.035) ** 2)
        body -= 0.25 * bubble * ramp(-c.above - 0.01, 0.02)
    fork = np.abs(np.abs(c.x - 0.008) - 0.9 * np.maximum(c.y - c.knob_y - 0.03, 0))
    return body - 0.10 * ball((fork / 0.018) ** 2) * ramp(c.knob_y + 0.09 - c.y, 0.06)


def chest_film(rng, anatomy, vessels, findings, ap, devices, size):
    """One film: pixels and pneumothorax mask, uint8 (H, W)."""
    c = outlines(rng, anatomy, findings, ap, size)
    c.marks, c.texture = c.marks * strokes(size, vessels, c.place), smooth_noise(rng, size, size // 3)
    for draw in (edema, consolidation, mass, atelectasis, pneumothorax, effusion):  # the pleural space over the lung
        if draw.__name__.capitalize() in findings:
            draw(c, findings[draw.__name__.capitalize()])
    body = soft_tissue(c)
    lung = np.minimum(c.water, 1.1) + 0.14 * c.marks + 0.022 * c.texture + 0.06 * smooth_noise(rng, size, 4) - 0.55
    total = body + (bones(c) + 0.16 * c.solid) * ramp(body - 0.3, 0.4) + lung * c.air * (body > 0.2)
    for device in devices:
        loose = c.place(rng.normal(0, 0.02, 2)) - c.place(np.zeros(2))
        total += 0.9 * strokes(size, polylines(HARDWARE[device][1]), lambda points: c.place(points) + loose)
    side = int(rng.choice([-1, 1]))
    corner = [0.5 + side * rng.uniform(0.38, 0.45), rng.uniform(0.05, 0.20)]
    total += (rng.random() < 0.7) * strokes(size, polylines(MARKERS[side]), lambda points: points + corner)
    total += 0.05 * smooth_noise(rng, size, 2)  # uneven exposure
    # N quanta ~ exp(-attenuation) reach a pixel, so log N has the noise exp(attenuation / 2). Then the film's response.
    total += rng.uniform(0.004, 0.010) * np.exp(0.5 * total) * rng.standard_normal((size, size), np.float32)
    film = 1 / (1 + np.exp((rng.uniform(0.50, 0.85) - total) * rng.uniform(3.5, 6.0)))
    low, high = rng.uniform(0.0, 0.3), rng.uniform(0.6, 1.0)
    film = low + (high - low) * film ** math.exp(rng.uniform(-0.5, 0.5))
    return (255 * film).astype(np.uint8), c.mask.astype(np.uint8) * 255


# ---- Reports. A phrase's slots: {grade} and {gradely} severity, {side}, {place} side and zone, {s} the plural of both sides.

DEGREE = (("mild", "slight"), ("moderate",), ("severe", "marked"))
SIZE = (("small", "minor"), ("moderate",), ("large", "sizeable"))
ZONES = (("upper lobe", "upper zone"), ("mid zone", "mid lung"), ("lower lobe", "base"))
PHRASES = {  # class, from the heart outwards: grades, noun, then sentences that state it, conclude it and deny it
    "Cardiomegaly": (DEGREE, "cardiomegaly", (
        "There is {grade} cardiomegaly.", "The heart is {gradely} enlarged."),
        "{grade} cardiomegaly.", ("The heart size is normal.", "No cardiomegaly.")),
    "Edema": (DEGREE, "edema", (
        "There is {grade} pulmonary edema.", "Bilateral perihilar haze suggests {grade} edema."),
        "{grade} pulmonary edema.", ("No pulmonary edema.", "No edema.")),
    "Consolidation": (DEGREE, "consolidation", (
        "{grade} patchy consolidation in the {place}.", "Airspace opacity in the {place}, likely {grade} consolidation."),
        "{grade} {place} consolidation.", ("No focal consolidation.", "No consolidation.")),
    "Atelectasis": (DEGREE, "atelectasis", (
        "{grade} plate-like atelectasis in the {place}.", "Linear opacities in the {place}, likely {grade} atelectasis."),
        "{grade} {place} atelectasis.", ("No atelectasis.", "No volume loss or atelectasis.")),
    "Mass": (SIZE, "mass", (
        "{grade} mass in the {place}.", "Rounded opacity in the {place}, suspicious for a {grade} mass."),
        "{grade} {place} mass.", ("No pulmonary mass.", "No suspicious mass.")),
    "Effusion": (SIZE, "pleural effusion", (
        "{grade} {side} pleural effusion{s}.", "Blunting of the {side} costophrenic angle{s} by {grade} effusion{s}."),
        "{grade} {side} pleural effusion{s}.", ("No pleural effusion.", "The costophrenic angles are sharp.")),
    "Pneumothorax": (SIZE, "pneumothorax", (
        "{grade} {side} pneumothorax.", "{grade} {side} pneumothorax with a visible pleural line."),
        "{grade} {side} pneumothorax.", ("No pneumothorax.", "No evidence of pneumothorax.")),
}
CHANGES = {  # against the visit before
    "new": "The {what} is new since the prior study.", "worse": "Compared with the prior, the {what} has increased.",
    "better": "Compared with the prior, the {what} has decreased.",
    "same": "The {what} is unchanged from the prior study.",
    "gone": "The previously seen {what} has resolved.",
}
NORMAL = ("No acute cardiopulmonary abnormality.", "No acute disease.", "Normal chest radiograph.", "Unremarkable chest.")


def write_report(rng, findings, before, ap, devices):
    """The report of one film, organ by organ: every finding with side, place and grade; most of the absent ones denied."""
    def pick(options):
        return options[rng.integers(len(options))]

    def say(name, sentence):
        f = findings[name]
        grade, side = pick(PHRASES[name][0][f.grade]), ("right", "bilateral", "left")[f.side + 1]
        text = sentence.format(grade=grade, gradely=grade + "ly", side=side, place=f"{side} {pick(ZONES[f.zone])}", s="s" * (f.side == 0))
        return text[0].upper() + text[1:]

    body = []
    for name, (_, _, stated, _, denied) in PHRASES.items():
        if name in findings:
            body.append(say(name, pick(stated)))
        elif rng.random() < 0.75:
            body.append(pick(denied))
    body += [pick(HARDWARE[device][0]) for device in devices]
    known = [name for name in PHRASES if before is not None and (name in findings or name in before)]
    if known and rng.random() < 0.2:
        name = pick(known)
        was, now = before.get(name), findings.get(name)
        step = 0 if None in (was, now) else now.severity - was.severity
        change = "worse" if step > 0.1 else "better" if step < -0.1 else "same"
        change = "new" if was is None else "gone" if now is None else change
        side = ("right ", "", "left ")[(now or was).side + 1]
        body.append(CHANGES[change].format(what=side + PHRASES[name][1]))
    body = body or [pick(NORMAL)]
    text = "FINDINGS: " + " ".join(body)
    if rng.random() < 0.3:
        text += " IMPRESSION: " + " ".join([say(name, PHRASES[name][3]) for name in findings] or [pick(NORMAL)])
    return text


# ---- The folder


def draw_patient(folder, seed, size, patient):
    """Draws all films of one patient into folder/images and folder/masks. Returns [(file name, findings, report)]."""
    rng = np.random.default_rng([seed, patient])
    anatomy = {name: rng.uniform(*limits) for name, limits in ANATOMY.items()}
    vessels, before, rows = vessel_tree(rng), None, []
    for visit in range(rng.integers(1, 5)):
        findings = draw_findings(rng, before or {})
        ap = bool(rng.random() < 0.35)
        devices = [device for device in HARDWARE if rng.random() < (0.15 if ap else 0.05)]
        film, mask = chest_film(rng, anatomy, vessels, findings, ap, devices, size)
        name = f"{patient:08d}_{visit:03d}.png"
        Image.fromarray(film).save(folder / "images" / name, compress_level=1)
        if "Pneumothorax" in findings:
            Image.fromarray(mask).save(folder / "masks" / name, compress_level=1)
        rows.append((name, list(findings), write_report(rng, findings, before, ap, devices)))
        before = findings
    return rows


def split_patients(rng, patients):
    """Cuts a random order of the patients (lists of rows) where 70 % and 80 % of the images are reached: {list: rows}.

    train_1 and train_10 begin the same order at 1 % and 10 % of the training images. So that train_1 has positives of
    every class, the order is the best of 200 in the count of train_1's rarest class.
    """
    images = np.array([len(rows) for rows in patients])
    counts = np.array([[sum(name in row[1] for row in rows) for name in DEMO_CLASSES] for rows in patients])

    def cut(order, share):
        return int(np.searchsorted(np.cumsum(images[order]), share * images.sum())) + 1

    orders = [rng.permutation(len(patients)) for _ in range(200)]
    order = max(orders, key=lambda order: counts[order[: cut(order, 0.007)]].sum(0).min())
    train, val = cut(order, 0.7), cut(order, 0.8)
    parts = {"train_1": order[: cut(order, 0.007)], "train_10": order[: cut(order, 0.07)], "train_list": order[:train],
             "val_list": order[train:val], "test_list": order[val:]}
    return {name: [row for i in sorted(part) for row in patients[i]] for name, part in parts.items()}


def write_demo_records(out, patients=2400, size=128, seed=0, processes=None):
    """Draws the demo records into the folder `out`: about 2.5 films a patient, in the published formats.

    images/, masks/ (pneumothorax), train_1.txt ... test_list.txt, training.csv (the training part's reports), classes.txt,
    patients.csv, demo.json (the arguments). The same seed gives the same files whatever the number of processes (default:
    one a core). A demo already at `out` is replaced, anything else there is not; `out` appears only when complete.
    Raises InputError for a folder that cannot be written or is not a demo, and for fewer than 50 patients or 32 pixels.
    """
    out = Path(out)
    if patients < 50 or size < 32:
        raise InputError(f"demo records: expected at least 50 patients (no part empty) and 32 pixels, found {patients} and {size}")
    temporary, old = (Path(f"{os.path.abspath(out)}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        if out.exists() and not (out / "demo.json").exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {"pairs"}):
            raise InputError(f"{out}: expected demo records (demo.json) or nothing, found something else: not overwritten; "
                             "data of your own needs --data as well as --root")
        for name in ("images", "masks"):
            (temporary / name).mkdir(parents=True)
        draw = partial(draw_patient, temporary, seed, size)
        processes = min(processes or os.cpu_count() or 1, patients)
        bar = partial(tqdm, total=patients, desc="drawing demo records", unit="patient", leave=False, disable=None)
        if processes == 1:
            records = list(bar(map(draw, range(1, patients + 1))))
        else:
            # spawn, the same on Linux, macOS and Windows; Ctrl-C is this process's business
            with multiprocessing.get_context("spawn").Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                records = list(bar(pool.imap(draw, range(1, patients + 1), chunksize=8)))
        for part, rows in split_patients(np.random.default_rng(seed), records).items():
            lines = [" ".join([name] + [str(int(c in findings)) for c in DEMO_CLASSES]) for name, findings, _ in rows]
            (temporary / f"{part}.txt").write_text("\n".join(lines) + "\n")
            if part == "train_list":
                write_csv(temporary / "training.csv", ("image_path", "report_content"), [(name, text) for name, _, text in rows])
        names = [(name, name.split("_")[0]) for rows in records for name, _, _ in rows]
        write_csv(temporary / "patients.csv", ("image_path", "patient_id"), names)
        (temporary / "classes.txt").write_text("\n".join(DEMO_CLASSES) + "\n")
        (temporary / "demo.json").write_text(json.dumps({"patients": patients, "size": size, "seed": seed}) + "\n")
        if out.exists():
            if (out / "pairs").exists():  # the demo pairs live there too
                os.rename(out / "pairs", temporary / "pairs")
            os.rename(out, old)
        os.rename(temporary, out)
    except OSError as error:
        raise InputError(f"{out}: demo records cannot be written: {error.strerror or error}") from None
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Demo brain pairs

# Relative brightness of a tissue in the two contrasts. No curve turns one into the other: CSF and bone are equally dark in
# T1 and opposite in T2, fat shines like white matter in T1 only, a lesion has the T1 of grey matter and the T2 of fluid.
BRAIN_TISSUES = {"air": (0, 0), "fat": (0.86, 0.42), "bone": (0.12, 0.10), "csf": (0.14, 0.95), "grey": (0.50, 0.58),
                 "white": (0.80, 0.36), "nuclei": (0.60, 0.47), "lesion": (0.50, 0.85)}


def random_surface(rng, shape, size):
    """A random surface through `shape` control points with standard deviation 1, bicubic, on `size` pixels."""
    knots = torch.from_numpy(rng.normal(0, 1, (1, 1, *shape)))
    return F.interpolate(knots, size, mode="bicubic", align_corners=True)[0, 0].numpy()


def draw_brain(rng, level, size=64, detail=3):
    """One axial slice of one subject: T1 and T2 (size, size) float32 in [-1, 1], aligned.

    `rng` is the subject (the same anatomy for every slice), `level` in [-1, 1] the height of the slice. Tissues are drawn
    `detail` times finer and averaged, which gives borders their partial volumes.
    """
    n = size * detail
    y, x = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n), indexing="ij")
    width, length = rng.uniform(0.60, 0.68), rng.uniform(0.70, 0.78)
    shrink = np.sqrt(1 - 0.35 * level**2)  # towards the crown and the base a slice is smaller
    y, x = y + rng.uniform(-0.04, 0.04), x + rng.uniform(-0.04, 0.04)
    theta = np.arctan2(y, x)
    outline = 1 + sum(rng.normal(0, 0.014) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3, 4))
    r = np.hypot(x / width, y / length) / (shrink * outline)  # 1 at the brain's surface
    x, y = x / (width * shrink), y / (length * shrink)

    # gyri: a surface in polar coordinates whose ridges run inwards; high ridges are sulci, filled with CSF and lined with grey
    folds = random_surface(rng, (6, 44), (64, 1024))
    folds = np.concatenate([folds[:, :512], folds[:, 511::-1] * 0.8 + folds[:, 512:] * 0.2], 1)  # closed, nearly symmetric
    turn = (theta / (2 * np.pi) + 0.75 + 0.25 * level * (1 - r)) % 1
    fold = folds[np.clip(r * 48, 0, 63).astype(int), np.clip(turn * 1024, 0, 1023).astype(int)]
    depth, fold = 1 - r, fold * np.clip(r * 2.5 - 1, 0, 1)

    def blob(cy, cx, ry, rx, tilt=0.0):
        u, v = y - cy, x - cx
        u, v = u * np.cos(tilt) - v * np.sin(tilt), u * np.sin(tilt) + v * np.cos(tilt)
        return np.hypot(u / ry, v / rx) < 1 + 0.12 * wobble

    wobble = random_surface(rng, (9, 9), (n, n))
    tissue = np.full((n, n), "air", dtype="<U6")
    scalp, skull = rng.uniform(0.17, 0.23), rng.uniform(0.08, 0.11)
    tissue[r < 1 + scalp] = "fat"
    tissue[r < 1 + skull] = "bone"
    tissue[r < 1.03] = "csf"
    tissue[(depth > 0.01 + 0.14 * np.clip(fold - 0.5, 0, 2)) & (r < 1)] = "grey"
    tissue[(depth > rng.uniform(0.13, 0.18) + 0.11 * np.clip(fold, -0.8, 2)) & (r < 1)] = "white"
    tissue[(np.abs(x + 0.01 * wobble) < 0.022) & (np.abs(y) > 0.38) & (r < 1)] = "csf"  # between the hemispheres
    big, open_ = rng.uniform(0.7, 1.25), max(0.0, 1 - 0.8 * level**2)
    for side in (-1, 1):
        if level < 0.5:
            tissue[blob(-0.08, side * 0.24, 0.16, 0.10, side * 0.2)] = "nuclei"  # putamen
            tissue[blob(0.14, side * 0.13, 0.13, 0.10)] = "nuclei"               # thalamus
        tissue[blob(-0.22, side * 0.11, 0.18 * big * open_ + 0.02, 0.070 * big * open_ + 0.01, side * 0.35)] = "csf"
        tissue[blob(0.32, side * 0.17, 0.22 * big * open_ + 0.02, 0.075 * big * open_ + 0.01, -side * 0.45)] = "csf"
    tissue[blob(0.08, 0, 0.16 * open_ + 0.01, 0.030 * big)] = "csf"  # third ventricle
    for _ in range(rng.integers(0, 4)):
        cy, cx, radius = rng.uniform(-0.5, 0.5), rng.uniform(-0.45, 0.45), rng.uniform(0.05, 0.12)
        tissue[blob(cy, cx, radius, radius * rng.uniform(0.7, 1.3)) & np.isin(tissue, ("white", "grey"))] = "lesion"

    images = []
    for contrast in (0, 1):
        image = np.zeros((n, n))
        for name, brightness in BRAIN_TISSUES.items():
            image[tissue == name] = brightness[contrast] * (1 + rng.normal(0, 0.02) * (brightness[contrast] > 0))
        image *= np.exp(0.06 * random_surface(rng, (3, 3), (n, n)))  # uneven coil sensitivity
        image = image.reshape(size, detail, size, detail).mean((1, 3))
        inside = image > 0.02
        image += rng.normal(0, 0.012, image.shape)
        images.append(np.where(inside, np.clip(image * 2 - 1, -0.999, 1), -1).astype(np.float32))
    return images


def demo_pairs(root, size=64, slices=4, subjects=(("train", 30), ("val", 5), ("test", 8)), seed=0):
    """Draws the demo pairs once: `root`/pairs/train|val|test/A|B/*.npy, T1 and T2, no subject in two parts. Returns the folder.

    The folder appears whole or not at all: it is written beside its place and renamed.
    """
    folder = Path(root) / "pairs"
    if folder.is_dir():
        return folder
    temporary = Path(root) / f".pairs.{os.getpid()}.tmp"
    try:
        subject = 0
        for part, count in subjects:
            for side in "AB":
                (temporary / part / side).mkdir(parents=True)
            for _ in range(count):
                for k, level in enumerate(np.linspace(-0.8, 0.8, slices)):
                    rng = np.random.default_rng([seed, 2, subject])  # a stream apart from the films
                    for side, image in zip("AB", draw_brain(rng, float(level), size)):
                        np.save(temporary / part / side / f"subject{subject:03d}_{k}.npy", image.astype(np.float16))
                subject += 1
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # another process may have drawn them meanwhile
                raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    out: str = option("demo", "folder to draw the demo records and pairs into")
    seed: int = option(0, "seed of the drawing")
    patients: int = option(2400, "patients, about 2.5 films each")


def draw_demo(config):
    """Draws the demo records, and the demo pairs beside them where there are none."""
    root = write_demo_records(config.out, config.patients, seed=config.seed)
    print(f"{root}: {len(list((root / 'images').iterdir()))} films; {demo_pairs(root, seed=config.seed)}: pairs")


if __name__ == "__main__":
    run_script(lambda: draw_demo(parse_config(DemoConfig, description=__doc__)))
