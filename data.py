"""Everything that touches the disk: images, lists, reports, pairs, demo records, checkpoints, logs, pictures.

    python data.py demo --out demo            # draw the demo records (the scripts do it on first use)
    python data.py audit --root DIR           # split leakage, class counts, unreadable files

The sections, in order: errors and command lines, start-up, checkpoints, run logs and pictures, reading images, lists
and reports, the report tokenizer, augmentations and batches, A/B pairs, demo chest radiographs, demo brain pairs,
audit. Nothing here knows a model or a loss.

Shapes: B batch, C channels, H x W pixels, L report tokens. Images are float32 (C, H, W); grey is C = 1.
"""
import argparse
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------------
# Errors and command lines


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: file and line, what was expected, what was found."""


def option(default, help, **kwargs):
    """A dataclass field that carries its own help text (and argparse `choices`, `nargs`): the one home of a default."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every script."""

    out: str = option("", "folder of this run (default: runs/<script>)")
    resume: bool = option(False, "go on from OUT/last.pt")
    seed: int = option(0, "seed of every random choice of the run")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "auto takes bf16 autocast where the hardware multiplies in it", choices=["auto", "fp32", "bf16"])
    workers: int = option(0, "processes that read images (0: this one)")
    kernels: bool = option(True, "Triton kernels on CUDA; --no-kernels runs the torch references")


def parse_config(config_class, argv=None, description=None):
    """The command line of a dataclass: `--name value` a field, `--flag` / `--no-flag` a bool. Returns an instance."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        kwargs = dict(field.metadata)
        shown = field.default if field.default not in ("", None) else "none"
        kwargs["help"] += "" if "default" in kwargs["help"] else f" (default: {shown})"
        kwargs["help"] = kwargs["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs.setdefault("type", type(field.default))
            kwargs.setdefault("metavar", None if "choices" in kwargs else field.name.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kwargs)
    return config_class(**vars(parser.parse_args(argv)))


def run_script(main):
    """Runs `main()`; an InputError ends the script with its one line and status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Start-up: seeds, device, precision, processes, learning rate


def start_run(config):
    """Seeds the generators, joins the process group under torchrun and picks the hardware.

    Returns (device, autocast, rank, world): `autocast()` is the context of a forward pass.
    """
    if not config.kernels:
        os.environ["MEDVISION_NO_KERNELS"] = "1"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cuda", "mps", "cpu") or (name == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {config.device}: expected auto, cuda, mps or cpu with that hardware present")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(name))

    def autocast():
        return torch.autocast(name, torch.bfloat16, enabled=bf16)

    return device, autocast, rank, world


def multiplies_bf16(device_type):
    """Whether bfloat16 is faster than float32 there. On a CPU without AVX512-BF16 or AMX it is hundreds of times slower."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def cosine_lr(step, steps, warmup, peak, floor=0.0):
    """Learning rate of `step` (from 0): linear warm-up over `warmup` steps to `peak`, then half a cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def atomic_write(path, write):
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk and renames it over `path`.

    A reader sees the old file or the new one, never half of one. Raises InputError where the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values atomically."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """Reads a checkpoint onto the CPU, tensors and plain values only (no pickled code is run).

    Old checkpoints hold an argparse.Namespace of their options: that class is allowed, nothing else.
    Raises InputError for a missing or unreadable file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises a dozen types on damaged files: all mean the same to the user
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a dict with a 'model' entry or a state dict, found {type(state).__name__}")
    return state


def random_state():
    """The state of the generators a loop uses, for a checkpoint; `set_random_state` puts it back."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# Run logs and pictures


class RunLog:
    """The `--out` folder of a run: config.json at the start, a line of log.jsonl a call, result.json at the end.

    Only rank 0 writes. Raises InputError at once where the folder cannot be written, before any time is spent.
    """

    def __init__(self, out, config, rank=0, resume=False):
        self.out, self.rank, self.start = Path(out), rank, time.time()
        if rank == 0:
            self.json("config.json", dataclasses.asdict(config))
            if not resume:
                (self.out / "log.jsonl").write_text("")

    def json(self, name, value):
        if self.rank == 0:
            text = json.dumps(value, indent=1, default=float) + "\n"
            atomic_write(self.out / name, lambda file: file.write(text.encode()))

    def line(self, **values):
        if self.rank == 0:
            values["seconds"] = round(time.time() - self.start, 2)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(values, default=float) + "\n")


def peak_memory_mib(device):
    """Peak memory in MiB: of the GPU on cuda, resident of this process elsewhere (0 where it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


# ---------------------------------------------------------------------------------------------------------------------
# Lists and reports


# ---------------------------------------------------------------------------------------------------------------------
# The report tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations and batches


# ---------------------------------------------------------------------------------------------------------------------
# A/B pairs


# ---------------------------------------------------------------------------------------------------------------------
# Demo chest radiographs
#
# Chest films are drawn as a sum of X-ray attenuations along each ray (soft tissue, minus air, plus bone and metal), put
# through a film's S-shaped response: overlaps then look as they do on film.
#
# Legend. x runs across the patient, 0 on the spine and positive to the patient's LEFT (the picture's right); y runs down
# from the top edge; X = |x| serves both sides at once. Lengths are fractions of the picture's side (0.01 is 1.28 pixels
# of 128), attenuations are in units of a chest wall plus mediastinum. Maps are float32 (H, W).

DEMO_CLASSES = ("Atelectasis", "Cardiomegaly", "Effusion", "Nodule", "Pneumothorax", "Consolidation", "Edema")
DEMO_RATES = dict(zip(DEMO_CLASSES, (0.13, 0.12, 0.13, 0.13, 0.15, 0.14, 0.10)))  # at a first visit, without heart failure
ANATOMY = {  # what a patient keeps from visit to visit, drawn uniformly between the two numbers
    "chest": (0.345, 0.415),  # half width of the rib cage, inside
    "apex": (0.070, 0.150), "height": (0.540, 0.670),  # top of the lungs; from there to the right dome
    "dome": (0.070, 0.120), "left_lower": (-0.010, 0.040),  # depth of the costophrenic angle; left dome below the right
    "ctr": (0.370, 0.465), "droop": (0.200, 0.500), "pedicle": (0.055, 0.080),  # cardiothoracic ratio, slant, mediastinum
    "knob": (0.035, 0.060), "neck": (0.110, 0.160), "shoulder": (0.020, 0.110), "trunk": (0.420, 0.560),
    "fat": (-0.120, 0.180), "breast": (-0.200, 0.200), "rib_gap": (0.068, 0.086), "rib": (0.110, 0.230),
    "rib_phase": (0.000, 1.000), "clavicle": (0.120, 0.200), "markings": (0.700, 1.250),
}


def smooth_noise(rng, size, cells):
    """Random field (size, size) of about unit variance whose bumps are size / cells wide: drawn small, scaled up."""
    return np.asarray(Image.fromarray(rng.standard_normal((cells, cells), np.float32)).resize((size, size), Image.BICUBIC))


def ramp(distance, width):
    """0 outside, 1 inside, linear over `width` around distance 0."""
    return np.clip(distance / width + 0.5, 0, 1)


def ball(q):
    """Chord through an ellipsoid whose quadratic form is q (1 on its outline): 1 at the centre, 0 outside."""
    return np.sqrt(np.maximum(1 - q, 0))


def tube(distance, radius):
    """Attenuation across a bone: a hollow cylinder, so its edges (cortex) are brighter than its middle (marrow)."""
    q = (distance / radius) ** 2
    return ball(q) - 0.7 * ball(1.7 * q)


def lines(size, segments, place):
    """Rasterises (n, 5) segments x0 y0 x1 y1 width, the thick ones on top, at twice the size. (H, W) in 0..1."""
    picture = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(picture)
    ends = 2 * size * place(segments[:, :4].reshape(-1, 2)).reshape(-1, 4)
    widths = 2 * size * segments[:, 4]
    for i in np.argsort(widths, kind="stable"):
        draw.line(ends[i].tolist(), fill=int(min(255, 90 * widths[i])), width=max(1, round(widths[i])))
    return np.asarray(picture.resize((size, size), Image.BOX), np.float32) / 255


def vessel_tree(rng):
    """Both lungs' vessels: from each hilum six trunks that fork three times, thinner and more crooked. (n, 5)."""
    side = np.repeat([-1.0, 1.0], 6)
    angle = np.tile(np.linspace(-1.35, 1.45, 6), 2) + rng.normal(0, 0.15, 12)  # 0 points outward, positive down
    x, y, width, found = side * 0.07, np.where(side > 0, 0.40, 0.43) + 0.03 * np.tanh(angle), 0.017, []
    for level in range(5):
        length = rng.uniform(0.05, 0.11, len(x))
        x1, y1 = x + side * length * np.cos(angle), y + length * np.sin(angle)
        found.append(np.stack([x, y, x1, y1, np.full_like(x, width)], 1))
        fork = rng.uniform(0.15, 0.5, len(x))
        x, y, side = np.tile(x1, 2), np.tile(y1, 2), np.tile(side, 2)
        angle, width = np.concatenate([angle - fork, angle + fork]), width * 0.68
    return np.concatenate(found)


@dataclasses.dataclass
class Finding:
    """What is drawn and reported: side -1 right, 1 left, 0 both; zone 0 upper, 1 mid, 2 lower; severity 0 to 1."""

    side: int
    zone: int
    severity: float
    at: tuple  # where in the zone: fractions outward and down

    @property
    def grade(self):
        return min(2, int(3 * self.severity))


def draw_findings(rng, before):
    """One visit's {class: Finding}; findings of the visit before tend to stay and to get better or worse."""
    failing = rng.random() < 0.08  # heart failure: a large heart, oedema and effusions together
    now = {}
    for name, rate in DEMO_RATES.items():
        side, zone, severity, at = rng.choice([-1, 1]), rng.integers(3), rng.random(), tuple(rng.random(2))
        stays, both, drift, chance = rng.random() < 0.7, rng.random() < 0.25, rng.normal(0, 0.25), rng.random()
        if name in before:
            if stays:
                now[name] = dataclasses.replace(before[name], severity=float(np.clip(before[name].severity + drift, 0, 0.999)))
            continue
        if failing and name in ("Cardiomegaly", "Effusion", "Edema"):
            rate = 0.7
        if chance < rate:
            side = 0 if name in ("Cardiomegaly", "Edema") or (name == "Effusion" and both) else int(side)
            zone = 1 + int(zone) % 2 if name == "Atelectasis" else int(zone)
            now[name] = Finding(side, zone, severity, at)
    return now


def chest_film(rng, p, vessels, findings, ap, devices, size):
    """Draws one film of a patient with anatomy p (ANATOMY's names). Returns pixels and pneumothorax mask, uint8 (H, W)."""
    def between(low, high):
        return rng.uniform(low, high)

    # The pose of this exposure: a shift, a turn and a scale; the slow displacement makes every outline a little irregular.
    turn, scale = np.radians(rng.normal(0, 3.5)), between(0.98, 1.26)
    shift = np.array([0.5, 0.5]) + rng.normal(0, 0.035, 2)
    matrix = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])  # picture = [x, y - 1/2] @ matrix + shift
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = pixel[None, :] - np.float32(shift[0]), pixel[:, None] - np.float32(shift[1])
    inverse = np.linalg.inv(matrix).astype(np.float32)
    x = u * inverse[0, 0] + v * inverse[1, 0] + 0.006 * smooth_noise(rng, size, 5)
    y = u * inverse[0, 1] + v * inverse[1, 1] + 0.5 + 0.006 * smooth_noise(rng, size, 5)
    X, left, leftward = np.abs(x), x > 0, ramp(x, 0.08)
    p = SimpleNamespace(**p)

    def on(side):
        return 1.0 if side == 0 else left if side > 0 else ~left

    def place(points):
        return (points - [0, 0.5]) @ matrix + shift

    # Rib cage, domes, heart: the outlines that everything else hangs on. A poor breath lifts the domes.
    f = findings
    breath = between(-0.02, 0.03) - 0.03 * ap
    floor_y = p.apex + p.height + breath + p.left_lower * leftward
    if "Atelectasis" in f:  # volume loss pulls the dome up
        floor_y = floor_y - (leftward if f["Atelectasis"].side > 0 else 1 - leftward) * (0.02 + 0.05 * f["Atelectasis"].severity)
    middle, base = 0.45 * p.chest, p.apex + 0.72 * p.height
    rise = np.maximum(base - y, 0) / (base - p.apex)
    out = np.where(X > middle, (X - middle) / (p.chest - middle), (middle - X) / (1.1 * middle))
    wall = (1 - np.sqrt(rise**2 + out**2)) * (p.chest - middle)  # depth below the inner chest wall, > 0 inside
    t2 = ((X - middle) / (p.chest - middle)) ** 2
    above = floor_y + p.dome * t2 * (0.6 + 0.4 * t2) - y  # height above the hemidiaphragm
    air = np.maximum(wall, 0) / (np.maximum(wall, 0) + 0.03) * ramp(above, 0.015)

    ctr = 0.54 + 0.15 * f["Cardiomegaly"].severity if "Cardiomegaly" in f else p.ctr
    half, tall = ctr * p.chest, 0.155 + 0.15 * (ctr - 0.4)
    heart_x, heart_y = 0.34 * half, p.apex + p.height + breath - 0.06
    slanted = x - heart_x - p.droop * (y - heart_y)
    heart = ball((slanted / math.sqrt(half**2 - (p.droop * tall) ** 2)) ** 2 + ((y - heart_y) / tall) ** 2)
    knob_y = p.apex + 0.36 * p.height
    aorta = ball(((x - p.pedicle + 0.35 * p.knob) / p.knob) ** 2 + ((y - knob_y) / (1.3 * p.knob)) ** 2)
    vessels_x = x - 0.10 * np.maximum(y - knob_y, 0) * (y < heart_y)
    pedicle = ramp(p.pedicle + 0.10 * np.maximum(y - knob_y, 0) - np.abs(vessels_x), 0.03) * ramp(heart_y - y, 0.1)
    solid = np.clip(np.maximum(1.6 * np.maximum(heart, 0.7 * aorta), 0.8 * pedicle), 0, 1)
    air = air * (1 - 0.85 * solid)

    def spot(finding):
        """A point in the visible lung: down from the apex by zone, then out from the heart's border to the ribs."""
        down = p.apex + p.height * (0.18 + 0.26 * (finding.zone + 0.8 * finding.at[1]))
        width = middle + (p.chest - middle) * math.sqrt(1 - (max(base - down, 0) / (base - p.apex)) ** 2)
        border = finding.side * (heart_x + p.droop * (down - heart_y)) + half * math.sqrt(max(0, 1 - ((down - heart_y) / tall) ** 2))
        inner = max(0.10, border + 0.03 if abs(down - heart_y) < tall else 0)
        return finding.side * (inner + (max(width - 0.05, inner + 0.02) - inner) * finding.at[0]), down

    # Findings of the lung: each changes the air, the vessels drawn in it, or adds water.
    marks = lines(size, vessels, place) * p.markings
    texture = smooth_noise(rng, size, size // 3)
    water, mask = np.zeros_like(air), np.zeros(air.shape, bool)
    if "Edema" in f:  # bat's wings: haze around both hila, thick blurred vessels, a coarse interstitium
        s = f["Edema"].severity
        wings = np.exp(-(((X - 0.15) / 0.11) ** 2 + ((y - p.apex - 0.58 * p.height) / 0.20) ** 2))
        water += wings * (0.16 + 0.24 * s) * (1 + 0.25 * smooth_noise(rng, size, size // 5))
        texture = texture * (1 + (1.5 + 1.5 * s) * wings)
    if "Consolidation" in f:  # fluffy, patchy, ends at the pleura
        c = f["Consolidation"]
        cx, cy = spot(c)
        radius = 0.075 + 0.06 * c.severity
        r2 = ((x - cx) ** 2 + ((y - cy) / between(0.8, 1.1)) ** 2) / radius**2
        patchy = 1 + 0.5 * smooth_noise(rng, size, size // 8)
        water += np.clip(1.4 * np.exp(-r2) * patchy, 0, 1) * on(c.side) * (0.20 + 0.16 * c.severity)
    if "Nodule" in f:
        n = f["Nodule"]
        cx, cy = spot(n)
        radius = 0.031 + 0.022 * n.severity
        water += ball(((x - cx) ** 2 + (y - cy) ** 2) / radius**2) * (0.20 + 0.08 * n.severity)
    if "Atelectasis" in f:  # one to three plates, nearly horizontal
        a = f["Atelectasis"]
        cx, cy = spot(a)
        for k in range(1 + a.grade):
            slope = between(-0.45, 0.45)
            off = (y - cy - 0.05 * k) - slope * (x - cx)
            water += np.exp(-(off / 0.012) ** 2) * ramp(0.07 + 0.05 * a.severity - np.abs(x - cx), 0.03) * on(a.side) * (0.18 + 0.08 * a.severity)
    if "Pneumothorax" in f:  # air between chest wall and a collapsed lung: no vessels out there, a thin pleural line
        s = f["Pneumothorax"].severity
        gap = (0.042 + 0.10 * s) * (1.25 - 0.8 * np.clip((y - p.apex) / p.height, 0, 1))
        outside = ramp(gap - wall, 0.008) * on(f["Pneumothorax"].side)
        mask = (outside > 0.5) & (wall > 0) & (above > 0) & (solid < 0.5)
        marks, texture, water = marks * (1 - outside), texture * (1 - outside), water * (1 - outside)
        water += 0.10 * np.exp(-(((wall - gap) / 0.008) ** 2)) * on(f["Pneumothorax"].side)
        water += 0.10 * s * (1 - outside) * on(f["Pneumothorax"].side)
        air = air * (1 + 0.15 * outside)
    opaque = np.clip(water, 0, 0.5) * air
    air_left, below = air, ramp(-above, 0.02)
    if "Effusion" in f:  # fluid fills the lowest part and climbs the wall: a meniscus
        e = f["Effusion"]
        height = 0.055 + 0.30 * e.severity**1.3
        bottom = floor_y + p.dome
        level = bottom - height * (0.75 + 0.35 * np.clip(t2, 0, 1.2) * (X > middle)) - 0.05 * np.exp(-np.maximum(wall, 0) / 0.02)
        fluid = ramp(y - level, 0.025) * on(e.side) * ramp(X - 0.06, 0.06)
        air_left, below = air * (1 - 0.95 * fluid), np.maximum(below, fluid * ramp(wall, 0.02))  # hides the dome: same density
        opaque, marks, texture = opaque * (1 - fluid), marks * (1 - fluid), texture * (1 - fluid)

    # Body, bones.
    shoulders = ramp(y - p.shoulder - 0.03, 0.16)
    outline = p.neck + shoulders * (0.62 - p.neck) - ramp(y - 0.55, 0.35) * (0.62 - p.trunk)
    body = np.sqrt(np.maximum(1 - (x / outline) ** 2, 0)) * (0.95 + p.fat) + 0.20 * below
    cage = ramp(wall + 0.02, 0.02) * ramp(0.86 - y, 0.2)
    r = X / p.chest
    phase = (y - 0.10 * r**2 * (0.4 + r**2) + 0.02 * r) / p.rib_gap + p.rib_phase
    posterior = tube(phase - np.floor(phase) - 0.5, 0.24)
    front = (y + 0.28 * (r - 1)) / (1.25 * p.rib_gap) + p.rib_phase
    anterior = tube(front - np.floor(front) - 0.5, 0.22) * ramp(r - 0.5, 0.3)
    bone = p.rib * cage * (posterior * ramp(X - 0.03, 0.03) + 0.55 * anterior)
    bone += 0.07 * ramp(0.034 - X, 0.02) * (0.85 + 0.15 * np.cos(y * (2 * math.pi / 0.055)))
    collar = y - p.clavicle + 0.10 * X * (1 + X) - 0.016 * np.sin(11 * X)
    bone += 0.20 * tube(collar, 0.017) * ramp(X - 0.035, 0.02)
    blade = ramp(X - (0.40 - 0.08 * ap) + 0.25 * (y - 0.3), 0.015) * ramp(y - p.clavicle - 0.02, 0.06) * ramp(0.50 - y, 0.10) * ramp(0.56 - X, 0.1)
    bone += 0.07 * blade

    total = body + (bone + 0.16 * solid) * ramp(body - 0.3, 0.4) + opaque - 0.55 * air_left * (body > 0.2)
    total += air_left * (0.17 * marks + 0.022 * texture)
    fork = np.abs(np.abs(x - 0.008) - 0.9 * np.maximum(y - knob_y - 0.03, 0))  # trachea, then both main bronchi
    total -= 0.10 * ball((fork / 0.018) ** 2) * ramp(knob_y + 0.09 - y, 0.06)
    if p.breast > 0:
        total += 1.0 * p.breast * ball(((X - 0.20) / 0.16) ** 2 + ((y - p.apex - 0.88 * p.height) / 0.14) ** 2)
    if rng.random() < 0.5:  # gastric bubble
        total -= 0.25 * ball(((x - 0.17) / 0.06) ** 2 + ((y - heart_y - 0.15 - between(0, 0.03)) / 0.035) ** 2) * ramp(-above - 0.01, 0.02)
    total = np.maximum(total, 0)
    for device in devices:
        total += DEVICES[device](rng, size, place, p, heart_x, heart_y)

    # Quanta: N ~ exp(-attenuation) per pixel, so the noise of log N grows as exp(attenuation / 2). Then the film's response.
    total += between(0.008, 0.02) * np.exp(0.5 * total) * rng.standard_normal((size, size), np.float32)
    total += 0.05 * smooth_noise(rng, size, 2)
    film = 1 / (1 + np.exp(-(total - between(0.50, 0.85)) * between(3.5, 6.0)))
    film = film ** between(0.75, 1.3) * between(0.85, 1.0)
    return np.clip(255 * film, 0, 255).astype(np.uint8), mask.astype(np.uint8) * 255


def curve(points, width):
    points = np.asarray(points, np.float64)
    return np.concatenate([points[:-1], points[1:], np.full((len(points) - 1, 1), width)], 1)


def ecg(rng, size, place, p, heart_x, heart_y):
    found = []
    for _ in range(3):
        x, y = rng.uniform(-0.32, 0.32), rng.uniform(0.2, 0.8)
        t = np.linspace(0, 1, 9)
        end = rng.uniform(-0.6, 0.6), rng.choice([-0.1, 1.1])
        bow = rng.uniform(-0.2, 0.2)
        found.append(curve(np.stack([x + (end[0] - x) * t + bow * t * (1 - t), y + (end[1] - y) * t], 1), 0.008))
        found.append(curve([(x - 0.012, y), (x + 0.012, y)], 0.024))
    return 0.6 * lines(size, np.concatenate(found), place)


def pacemaker(rng, size, place, p, heart_x, heart_y):
    box = curve([(0.24, p.clavicle + 0.09), (0.31, p.clavicle + 0.10)], 0.075)
    lead = curve([(0.24, p.clavicle + 0.07), (0.12, p.clavicle + 0.03), (-0.02, p.clavicle + 0.08), (-0.05, heart_y - 0.08),
                  (-0.02, heart_y + 0.03), (0.08, heart_y + 0.06)], 0.009)
    return 1.2 * lines(size, np.concatenate([box, lead]), place)


def central_line(rng, size, place, p, heart_x, heart_y):
    return 0.6 * lines(size, curve([(-0.09, -0.05), (-0.07, 0.1), (-0.045, 0.2), (-0.05, 0.3), (-0.045, heart_y - 0.15)], 0.010), place)


DEVICES = {"ecg": ecg, "pacemaker": pacemaker, "central line": central_line}


# Reports. A phrase's slots: {grade} and {gradely} the severity, {side}, {place} side and zone, {s} {there} {a} the number.

DEGREE, SIZE = (("mild", "slight"), ("moderate",), ("severe", "marked")), (("small", "minor"), ("moderate",), ("large", "sizeable"))
ZONES = (("upper lobe", "upper zone", "upper lung"), ("mid zone", "mid lung", "midlung field"), ("lower lobe", "base", "lower zone"))
PHRASES = {  # class: grades, noun, then sentences that state it, conclude it and deny it
    "Atelectasis": (DEGREE, "atelectasis", (
        "{grade} plate-like atelectasis in the {place}.", "There is {grade} discoid atelectasis with volume loss in the {place}.",
        "Linear opacities in the {place} are consistent with {grade} subsegmental atelectasis.",
        "Band-like opacity at the {place}, likely {grade} atelectasis with elevation of the hemidiaphragm."),
        ("{grade} {place} atelectasis.", "{place} opacity, favor {grade} atelectasis."),
        ("No atelectasis is seen.", "No volume loss or atelectasis.")),
    "Cardiomegaly": (DEGREE, "cardiomegaly", (
        "There is {grade} cardiomegaly.", "The heart is {gradely} enlarged.", "The cardiac silhouette is {gradely} enlarged.",
        "{grade} enlargement of the cardiac silhouette."),
        ("{grade} cardiomegaly.", "{gradely} enlarged heart."),
        ("The heart size is normal.", "The cardiac silhouette is within normal limits.", "Heart normal in size.", "No cardiomegaly.")),
    "Effusion": (SIZE, "pleural effusion", (
        "{there} {grade} {side} pleural effusion{s}.", "{a}{grade} {side} pleural effusion{s} blunting the costophrenic angle{s}.",
        "Blunting of the {side} costophrenic angle{s} is compatible with {a}{grade} pleural effusion{s}.",
        "Layering fluid with a meniscus, consistent with {a}{grade} {side} pleural effusion{s}."),
        ("{grade} {side} pleural effusion{s}.", "{side} pleural effusion{s}, {grade}."),
        ("No pleural effusion.", "The costophrenic angles are sharp.", "There is no evidence of pleural fluid.")),
    "Nodule": (SIZE, "nodule", (
        "There is a {grade} nodule in the {place}.", "A {grade} rounded nodule projects over the {place}.",
        "{grade} well-circumscribed nodular opacity in the {place}.", "Rounded opacity in the {place}, suspicious for a {grade} nodule."),
        ("{grade} {place} nodule, recommend CT.", "{grade} nodule of the {place}."),
        ("No pulmonary nodule.", "No suspicious nodules are identified.")),
    "Pneumothorax": (SIZE, "pneumothorax", (
        "There is a {grade} {side} pneumothorax.", "{grade} {side} pneumothorax with a visible pleural line.",
        "A {side} pleural line without peripheral lung markings indicates a {grade} pneumothorax.",
        "{grade} pneumothorax on the {side}, largest at the apex."),
        ("{grade} {side} pneumothorax.", "{side} pneumothorax, {grade}."),
        ("No pneumothorax.", "There is no evidence of pneumothorax.", "No pneumothorax is identified.")),
    "Consolidation": (DEGREE, "consolidation", (
        "{grade} patchy consolidation in the {place}.", "There is {grade} airspace consolidation in the {place}, suspicious for infection.",
        "{grade} airspace opacity at the {place}, likely consolidation.", "Ill-defined opacities in the {place} represent {grade} consolidation."),
        ("{grade} {place} consolidation.", "{grade} consolidation of the {place}, possibly infectious."),
        ("No focal consolidation.", "There is no focal airspace consolidation.", "No consolidation is present.")),
    "Edema": (DEGREE, "pulmonary edema", (
        "There is {grade} pulmonary edema.", "Bilateral perihilar haze and indistinct vessels suggest {grade} edema.",
        "{grade} interstitial edema with a bat-wing distribution.", "Perihilar opacities in both lungs are in keeping with {grade} pulmonary edema."),
        ("{grade} pulmonary edema.", "Findings of {grade} edema."),
        ("No pulmonary edema.", "The pulmonary vasculature is normal without edema.", "No evidence of edema.")),
}
DEVICE_PHRASES = {
    "ecg": ("ECG leads overlie the chest.", "Monitoring leads project over the thorax."),
    "pacemaker": ("Left chest pacemaker with lead in the right ventricle.", "A left-sided pacemaker is in place."),
    "central line": ("Right central venous catheter with tip in the superior vena cava.", "A right jugular line ends over the SVC."),
}
CHANGES = {  # against the visit before
    "new": "The {what} is new since the prior study.", "worse": "Compared with the prior, the {what} has increased.",
    "better": "Compared with the prior, the {what} has decreased.", "same": "The {what} is unchanged from the prior study.",
    "gone": "The previously seen {what} has resolved.",
}
INDICATIONS = ("Chest pain.", "Shortness of breath.", "Cough and fever.", "Preoperative evaluation.", "Dyspnea.", "Fall.", "Follow-up.")
ASIDES = (
    "The mediastinal contours are unremarkable.", "The osseous structures are intact.", "The trachea is midline.",
    "Visualized upper abdomen is unremarkable.", "No acute bony abnormality.", "Degenerative changes of the spine.",
)
CLEAR = ("The lungs are clear.", "Both lungs are clear and well expanded.", "Clear lungs bilaterally.")
NORMAL = ("No acute cardiopulmonary abnormality.", "No acute disease.", "Normal chest radiograph.", "Unremarkable examination of the chest.")


def write_report(rng, findings, before, ap, devices):
    """The report of one film: every finding with side, place and grade; some of the absent ones denied."""
    def pick(options):
        return options[rng.integers(len(options))]

    def say(name, options):
        f = findings[name]
        grade, side = pick(PHRASES[name][0][f.grade]), ("right", "bilateral", "left")[f.side + 1]
        several = f.side == 0
        return pick(options).format(
            grade=grade, gradely=grade + "ly", side=side, place=f"{side} {pick(ZONES[f.zone])}", s="s" * several,
            there="There are" if several else "There is a", a="" if several else "a ")

    absent = [name for name in PHRASES if name not in findings]
    positive = [say(name, PHRASES[name][2]) for name in findings]
    denied = [name for name in absent if rng.random() < 0.55]
    rng.shuffle(denied)
    other = []
    if len(denied) > 2 and rng.random() < 0.6:  # "No pneumothorax, consolidation or pleural effusion."
        nouns = [PHRASES[name][1] for name in denied[:3]]
        other, denied = [f"No {', '.join(nouns[:-1])} or {nouns[-1]}."], denied[3:]
    other += [pick(PHRASES[name][4]) for name in denied] + [pick(DEVICE_PHRASES[device]) for device in devices]
    if not {"Atelectasis", "Nodule", "Consolidation", "Edema"} & set(findings) and rng.random() < 0.5:
        other.append(pick(CLEAR))
    known = [name for name in PHRASES if before is not None and (name in findings or name in before)]
    if known and rng.random() < 0.3:
        name = pick(known)
        was, now = before.get(name), findings.get(name)
        step = 0 if None in (was, now) else now.severity - was.severity
        change = "new" if was is None else "gone" if now is None else "worse" if step > 0.1 else "better" if step < -0.1 else "same"
        positive.append(CHANGES[change].format(what=("right ", "", "left ")[(now or was).side + 1] + PHRASES[name][1]))
    rng.shuffle(positive)
    rng.shuffle(other)
    body = positive + other if rng.random() < 0.7 else other + positive
    conclusion = [say(name, PHRASES[name][3]) for name in findings] or [pick(NORMAL)]
    if len(conclusion) > 3:
        conclusion = ["Multiple abnormalities as described above."]
    sections = [("FINDINGS:", body), ("IMPRESSION:", conclusion)]
    if before is not None and rng.random() < 0.4:
        sections.insert(0, ("COMPARISON:", ["Prior chest radiograph."]))
    if rng.random() < 0.3:
        sections.insert(0, ("INDICATION:", [pick(INDICATIONS)]))
    asides = list(rng.permutation(ASIDES)) + ["Portable AP view." if ap else "PA view of the chest."]
    while len(" ".join(sum((lines for _, lines in sections), [])).split()) < 20 or rng.random() < 0.25:
        body.append(asides.pop())
    return " ".join(f"{head} {' '.join(text[0].upper() + text[1:] for text in lines)}" for head, lines in sections)


# ---- The folder


def draw_patient(folder, seed, size, patient):
    """Draws all films of one patient into folder/images and folder/masks. Returns [(file name, findings, report)]."""
    rng = np.random.default_rng([seed, patient])
    anatomy = {name: rng.uniform(*limits) for name, limits in ANATOMY.items()}
    vessels, before, rows = vessel_tree(rng), None, []
    for visit in range(rng.integers(1, 5)):
        findings = draw_findings(rng, before or {})
        ap = bool(rng.random() < 0.35)
        devices = [device for device in DEVICES if rng.random() < (0.15 if ap else 0.05)]
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
    Raises InputError for a folder that cannot be written or is not a demo, and for fewer than 50 patients.
    """
    out = Path(out)
    if patients < 50:
        raise InputError(f"patients: expected at least 50, so that no part is empty, found {patients}")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.exists() and not (out / "demo.json").exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: expected demo records (demo.json) or nothing, found something else: not overwritten")
        for name in ("images", "masks"):
            (temporary / name).mkdir(parents=True)
        draw = partial(draw_patient, temporary, seed, size)
        processes = min(processes or os.cpu_count() or 1, patients)
        bar = partial(tqdm, total=patients, desc="drawing demo records", unit="patient", leave=False)
        if processes == 1:
            records = list(bar(map(draw, range(1, patients + 1))))
        else:
            with multiprocessing.get_context("spawn").Pool(processes) as pool:  # spawn: the same on Linux, macOS, Windows
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
            shutil.rmtree(out)
        os.rename(temporary, out)
    except OSError as error:
        raise InputError(f"{out}: demo records cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


# ---------------------------------------------------------------------------------------------------------------------
# Demo brain pairs


# ---------------------------------------------------------------------------------------------------------------------
# Audit and command line
