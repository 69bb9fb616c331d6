"""Real data and the files of a run: images, lists, reports, pairs, batches, checkpoints, logs, pictures, options.

    python data.py audit --root DIR      # split leakage, class counts, unreadable files

The sections, in order: errors and options; start-up; checkpoints; the folder of a run; pictures; reading images; lists
and reports; the report tokenizer; augmentations and batches; A/B pairs; audit. Nothing here knows a model or a loss.

Shapes: B batch, C channels, H x W pixels, L report tokens. Images are float32 (C, H, W); grey is C = 1.
"""
import argparse
import base64
import copy
import csv
import dataclasses
import functools
import gzip
import heapq
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Errors and options


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that a user can act on.

    InputError(message), or InputError(where, expected, found) for "where: expected ..., found ...".
    """

    def __init__(self, where, expected=None, found=None):
        known = f"{where}: expected {expected}, found {found}"
        super().__init__(where if expected is None else known)


def option(default, help, **metadata):
    """A dataclass field that carries its own help text: the one home of an option.

    A default of None means the preset's (`fill`). metadata: argparse's `choices`; `within`, the interval that the
    value lies in, as "[0, 1)"; `free=True` for an option that may change between a run and its resumption.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every script."""

    out: str = option(None, "folder of this run (default: runs/<script>)", free=True)
    resume: bool = option(False, "go on from OUT/last.pt", free=True)
    seed: int = option(0, "seed of every random choice of the run")
    steps: int = option(None, "optimiser steps; typed alone, it replaces the preset's epochs", within="[1, inf)")
    epochs: float = option(None, "passes over the training data; typed alone, it replaces the "
                           "preset's steps", within="(0, inf)")
    batch_size: int = option(None, "samples that one process takes at once", within="[1, inf)")
    lr: float = option(None, "peak learning rate", within="(0, inf)")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is", free=True)
    dtype: str = option("auto", "auto takes bf16 autocast where it is faster",
                        choices=["auto", "fp32", "bf16"])
    workers: int = option(0, "processes that read images (0: this one)", within="[0, 64]",
                          free=True)
    kernels: bool = option(True, "Triton kernels on CUDA; --no-kernels runs the torch references",
                           free=True)


def parse_config(config_class, argv=None, description=None):
    """Reads the command line of a dataclass: `--name value` for a field, `--[no-]name` for a bool.

    In the help the script's own options stand before those of every script. Returns an instance.
    """
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    own = parser.add_argument_group("options of this command")
    every = parser.add_argument_group("options of every script")
    for field in dataclasses.fields(config_class):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if "default" not in text:
            shown = {None: "the preset's", "": "none"}.get(field.default, field.default)
            text += f" (default: {shown})"
        kwargs = {"default": field.default, "help": text.replace("%", "%%")}
        if field.type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif "choices" in field.metadata:
            kwargs["choices"] = field.metadata["choices"]
        else:
            kwargs |= {"type": field.type, "metavar": field.name.upper()}
        (every if field.name in shared else own).add_argument(flag, **kwargs)
    config = config_class(**vars(parser.parse_args(argv)))
    check_ranges(config)
    return config


def check_ranges(config):
    """Raises InputError for an option outside the interval that it names, NaN included."""
    for field in dataclasses.fields(config):
        within, value = field.metadata.get("within"), getattr(config, field.name)
        if within and value is not None:
            low, high = map(float, within[1:-1].split(","))
            above = low < value or (value == low and within[0] == "[")
            below = value < high or (value == high and within[-1] == "]")
            if not (above and below):
                flag = "--" + field.name.replace("_", "-")
                raise InputError(flag, f"a number in {within}", value)


def fill(config, preset):
    """`config` with every option that is None taken from the dict `preset`, and checked.

    Steps and epochs say the same thing: whoever types one of them gets neither from the preset.
    """
    values = {name: value for name, value in preset.items() if getattr(config, name) is None}
    if config.steps is not None or config.epochs is not None:
        values = {name: value for name, value in values.items() if name not in ("steps", "epochs")}
    config = dataclasses.replace(config, **values)
    check_ranges(config)
    return config


def number_of_steps(config, samples, per_step):
    """The optimiser steps of a filled configuration: its `steps`, or its `epochs` over `samples`."""
    if config.steps is not None and config.epochs is not None:
        raise InputError("--steps and --epochs", "one of them", f"{config.steps} and {config.epochs:g}")
    return config.steps or max(1, round(config.epochs * samples / per_step))


def check_same(saved, config, path):
    """Raises InputError where `saved`, the options of an earlier run, differ from `config` in one
    that shapes a result. `path` is the file that holds them."""
    for field in dataclasses.fields(config):
        now = getattr(config, field.name)
        if not field.metadata.get("free") and saved.get(field.name) != now:
            flag = "--" + field.name.replace("_", "-")
            raise InputError(path, f"{flag} {now}, as asked for now", f"a run with {flag} "
                             f"{saved.get(field.name)}; give the same options, or another --out")


def run_script(main):
    """Runs `main()`; an InputError ends the script with its one line and status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# --------------------------------------------------------------------------------------------------
# Start-up: processes and device, seeds, precision


def join(config):
    """Picks the device and joins the process group under torchrun. Returns (device, rank, world).

    Raises InputError for a device that is not there.
    """
    if not config.kernels:
        os.environ["MEDVISION_NO_KERNELS"] = "1"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.device
    if name == "auto":
        name = next(name for name, present in there.items() if present)
    if not there.get(name):
        raise InputError("--device", "auto, cuda, mps or cpu with that hardware present", name)
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    return device, rank, world


def seed(number):
    """Seeds the generators of Python, numpy and torch."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def autocast(config, device, narrow=False):
    """A function that makes the context of a forward pass: bfloat16 autocast, or none.

    `narrow` says that the model is too narrow to gain by bfloat16 on a CPU, where converting the
    numbers costs more than multiplying them faster saves; --dtype auto then stays in float32.
    """
    wanted = config.dtype == "bf16"
    if config.dtype == "auto":
        wanted = multiplies_bf16(device.type) and not (narrow and device.type == "cpu")
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=wanted)


def multiplies_bf16(device_type):
    """Whether bfloat16 is faster than float32 there. On a CPU without AVX512-BF16 or AMX it is
    hundreds of times slower."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def start_run(config, narrow=False):
    """Seeds the generators, joins the process group under torchrun and picks the hardware.

    narrow: of a model that bfloat16 slows down on a CPU, where converting numbers costs more than multiplying them faster
    saves; --dtype auto leaves it in float32 there.
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
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(name) and not (narrow and name == "cpu"))

    def autocast():
        return torch.autocast(name, torch.bfloat16, enabled=bf16)

    return device, autocast, rank, world


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
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's own error hides a full disk's
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path}: cannot be written: {cause.strerror or cause}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


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


def checkpoint_file(path, *names):
    """`path` itself; of a run's folder, the first of the files `names` that it holds (the last one where it holds none)."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).exists()), path / names[-1])


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


# --------------------------------------------------------------------------------------------------
# The folder of a run


def check_writable(out):
    """Raises InputError where the folder `out` cannot be written, before any time is spent.

    Makes nothing.
    """
    try:
        parents = (Path(out), *Path(out).absolute().parents)
        there = next(folder for folder in parents if folder.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def write_json(path, value):
    text = json.dumps(value, indent=1, default=float) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def markdown_table(header, rows):
    """A table in Markdown: a line for the header, a rule, a line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


class RunLog:
    """The `--out` folder of a run: config.json at the start, a line of log.jsonl a call, then
    result.json.

    To be made once nothing can be refused any more: it replaces the log of a run that was there.
    Only rank 0 writes. `start` is the time that seconds count from (default: now).
    """

    def __init__(self, out, config, rank=0, resume=False, start=None):
        self.out, self.rank, self.start = Path(out), rank, start or time.time()
        self.json("config.json", dataclasses.asdict(config))
        if rank == 0 and not resume:
            (self.out / "log.jsonl").write_text("")

    def json(self, name, value):
        if self.rank == 0:
            write_json(self.out / name, value)

    def line(self, **values):
        if self.rank == 0:
            values["seconds"] = round(time.time() - self.start, 2)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(values, default=float) + "\n")


class Timed:
    """Hands out `batches` and measures how fast a loop takes them and how long it waits for them."""

    def __init__(self, batches, device, world=1):
        self.batches, self.device, self.world = iter(batches), device, world
        self.began, self.waited, self.images = time.time(), 0.0, 0

    def __next__(self):
        asked = time.time()
        batch = next(self.batches)
        self.waited += time.time() - asked
        self.images += len(batch[0]) * self.world
        return batch

    def speed(self):
        """What log.jsonl and result.json say of a loop's speed."""
        seconds = max(time.time() - self.began, 1e-9)
        return {"images_per_second": self.images / seconds,
                "share_waiting_for_data": self.waited / seconds,
                "peak_memory_mib": peak_memory_mib(self.device)}


def peak_memory_mib(device):
    """Peak memory in MiB: of the GPU on cuda, of this process elsewhere (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def run_cells(folder, configs, run):
    """A comparison's runs, {name: configuration}, each in a folder of its own below `folder`.

    Yields (name, content of result.json). A finished cell is read and not run again, and one that
    was stopped goes on, so that a comparison can be stopped and started freely. Raises InputError
    where the folder holds a cell that was run with other options.
    """
    for name, config in configs.items():
        cell = Path(folder) / name
        config = dataclasses.replace(config, out=str(cell), resume=(cell / "last.pt").exists())
        if (cell / "options.json").exists():
            check_same(read_json(cell / "options.json"), config, cell / "options.json")
        else:
            write_json(cell / "options.json", dataclasses.asdict(config))
        if not (cell / "result.json").exists():
            print(f"{name}: {cell}", flush=True)
            run(config)
        yield name, read_json(cell / "result.json")


# --------------------------------------------------------------------------------------------------
# Pictures


def as_picture(image, scale=1):
    """A PIL picture of an (H, W), (1, H, W) or (3, H, W) image in [0, 1], each pixel `scale` pixels wide."""
    pixels = (torch.as_tensor(image).detach().cpu().float().clamp(0, 1) * 255).round().byte()
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def save_grid(path, rows, titles=None, captions=None, scale=1):
    """Writes a PNG of images in rows and columns.

    rows: lists of images, (H, W) or (C, H, W) in [0, 1]; titles: one a column; captions: one a row, wrapped under it.
    """
    font, gap, line = ImageFont.load_default(12), 8, 16
    rows = [[as_picture(image, scale) for image in row] for row in rows]
    titles = titles or [""] * max(map(len, rows))
    widths = [max([math.ceil(font.getlength(title))] + [row[i].width for row in rows if i < len(row)])
              for i, title in enumerate(titles)]
    total = sum(widths) + gap * (len(widths) + 1)
    texts = [wrap_text(text, font, total - 2 * gap) for text in captions or [""] * len(rows)]
    heights = [max(picture.height for picture in row) + line * len(text) + gap for row, text in zip(rows, texts)]
    canvas = Image.new("RGB", (total, sum(heights) + gap + line * any(titles)), "white")
    draw, top = ImageDraw.Draw(canvas), gap + line * any(titles)
    for i, title in enumerate(titles):
        draw.text((gap + sum(widths[:i]) + gap * i, gap // 2), title, "black", font)
    for row, text, height in zip(rows, texts, heights):
        for i, picture in enumerate(row):
            canvas.paste(picture, (gap + sum(widths[:i]) + gap * i, top))
        draw.text((gap, top + height - gap - line * len(text)), "\n".join(text), "black", font, spacing=4)
        top += height
    atomic_write(path, lambda file: canvas.save(file, "PNG"))


def wrap_text(text, font, width):
    """Lines of at most `width` pixels (a longer word has a line of its own)."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def nice_ticks(low, high, count=6):
    """At most `count` round numbers in [low, high], apart by 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * m for m in (1, 2, 5, 10, 20) if (high - low) / (power * m) <= count - 1)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
           "#000080", "#800000", "#006400", "#ffc000", "#ff00ff", "#404040"]


def save_plot(path, curves, title, xlabel, ylabel, diagonal=False):
    """Writes a PNG of line plots, drawn at twice the size and reduced. Points that are None or not finite are left out.

    curves: {name: (xs, ys)}; diagonal: both axes from 0 to 1 with the line of chance, as for an ROC.
    """
    curves = {name: np.array([xs, ys], dtype=float) for name, (xs, ys) in curves.items()}
    curves = {name: points[:, np.isfinite(points).all(0)] for name, points in curves.items()}
    points = np.concatenate([*curves.values(), np.zeros((2, 0))], axis=1)
    low, high = (points.min(1), points.max(1)) if points.size and not diagonal else (np.zeros(2), np.ones(2))
    high = np.where(high > low, high, low + 1)
    low, high = (low, high) if diagonal else (low - 0.03 * (high - low), high + 0.03 * (high - low))
    font, small = ImageFont.load_default(26), ImageFont.load_default(22)
    left, top, width, height = 120, 70, 900, 680
    names = max([math.ceil(small.getlength(name)) for name in curves] + [0])
    canvas = Image.new("RGB", (left + width + 100 + names, top + height + 110), "white")
    draw = ImageDraw.Draw(canvas)

    def place(x, y):
        return left + width * (x - low[0]) / (high[0] - low[0]), top + height * (high[1] - y) / (high[1] - low[1])

    for value in nice_ticks(low[0], high[0]):
        x = place(value, low[1])[0]
        draw.line((x, top, x, top + height), "#dddddd", 2)
        draw.text((x, top + height + 8), f"{value:.6g}", "black", small, "ma")
    for value in nice_ticks(low[1], high[1]):
        y = place(low[0], value)[1]
        draw.line((left, y, left + width, y), "#dddddd", 2)
        draw.text((left - 10, y), f"{value:.6g}", "black", small, "rm")
    draw.rectangle((left, top, left + width, top + height), outline="black", width=2)
    if diagonal:
        draw.line((*place(0, 0), *place(1, 1)), "#999999", 3)
    for i, (name, values) in enumerate(curves.items()):
        colour, dots = COLOURS[i % len(COLOURS)], [place(x, y) for x, y in values.T]
        draw.line(dots, colour, 4, "curve") if len(dots) > 1 else None
        for x, y in dots if len(dots) < 30 else []:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
        draw.line((left + width + 20, top + 20 + 34 * i, left + width + 50, top + 20 + 34 * i), colour, 5)
        draw.text((left + width + 60, top + 20 + 34 * i), name, "black", small, "lm")
    draw.text((left + width / 2, 20), title, "black", font, "ma")
    draw.text((left + width / 2, top + height + 50), xlabel, "black", font, "ma")
    draw.text((left, top - 14), ylabel, "black", small, "ls")
    canvas = canvas.resize((canvas.width // 2, canvas.height // 2), Image.LANCZOS)
    atomic_write(path, lambda file: canvas.save(file, "PNG"))


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".dcm", ".tif", ".tiff", ".bmp")


def read_image(path, short_side=None, channels=1):
    """Reads a PNG, JPEG, .npy or DICOM file (told by content, not by name): float32 (channels, H, W) in [0, 1].

    short_side: pixels of the shorter side after an antialiased bicubic resize (None: full size); a JPEG is decoded at the
    smallest of its 1/8, 1/4, 1/2 reductions that is not below it. 8 bits are divided by 255, 16 by 65535; the integers of
    a .npy likewise, any other .npy is kept where it lies within [0, 1], else stretched from its own minimum to maximum.
    DICOM: modality LUT, VOI LUT or window, MONOCHROME1 inverted, stretched likewise. Colour becomes grey (ITU-R 601) for
    channels=1, transparency is ignored, grey is repeated for channels=3.
    Raises InputError for a file that is missing, empty, truncated or of another kind.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(132)
            file.seek(0)
            if not head:
                raise InputError(f"{path}: expected an image, found an empty file; copy it again")
            if head.startswith(b"\x93NUMPY"):
                pixels = unit_range(np.load(file, allow_pickle=False))
            elif head[128:] == b"DICM" or str(path).lower().endswith(".dcm"):
                pixels = read_dicom(file)
            else:
                pixels = read_picture(file, short_side, channels)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except InputError:
        raise
    except Exception as error:  # a damaged file raises one of a dozen types, depending on the decoder
        reason = "another kind of file" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
        reason = reason or type(error).__name__
        raise InputError(f"{path}: expected a complete PNG, JPEG, .npy or DICOM image, found {reason}") from None
    image = torch.from_numpy(pixels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if short_side and short_side != min(image.shape[1:]):
        image = resize(image, short_side)
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    if len(image) > channels:
        image = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return image.expand(channels, -1, -1)


def read_picture(file, short_side, channels):
    """The pixels that PIL reads: uint8 (H, W), or (H, W, 3) for channels=3; float32 in [0, 1] where they have 16 bits."""
    with Image.open(file) as picture:
        if picture.format == "JPEG" and short_side:
            picture.draft("L" if channels == 1 else None, (short_side, short_side))
        picture.load()
        if picture.mode.startswith("I"):  # PIL's own conversion to 8 bits would clip them to white
            return unit_range(np.array(picture).clip(0, 65535).astype(np.uint16))
        if picture.mode == "F":
            return unit_range(np.array(picture))
        mode = "L" if channels == 1 or picture.mode in ("1", "L", "LA") else "RGB"
        return np.array(picture if picture.mode == mode else picture.convert(mode))


def read_dicom(file):
    """The pixels of a DICOM file as they are meant to be seen: float32 (H, W) or (H, W, 3) in [0, 1]."""
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise InputError(f"{file.name}: DICOM needs pydicom: pip install 'pydicom>=3'") from None
    record = pydicom.dcmread(file, force=True)
    pixels = apply_voi_lut(apply_modality_lut(record.pixel_array, record), record)
    pixels = unit_range(pixels.astype(np.float64), stretch=True)
    return 1 - pixels if record.PhotometricInterpretation == "MONOCHROME1" else pixels


def unit_range(pixels, stretch=False):
    """(H, W), (H, W, 1) or (H, W, 3) as float32 in [0, 1], by `read_image`'s rules. Raises ValueError for anything else."""
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    grey_or_colour = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not grey_or_colour or not pixels.size or pixels.dtype.kind not in "buif":
        raise ValueError(f"{pixels.dtype} of shape {pixels.shape} instead of numbers (H, W), (H, W, 1) or (H, W, 3)")
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return pixels.astype(np.float32) / (256**pixels.dtype.itemsize - 1)
    pixels = pixels.astype(np.float64)
    low, high = pixels.min(), pixels.max()
    if not np.isfinite(high - low):
        raise ValueError("pixels that are NaN or infinite")
    if stretch or low < 0 or high > 1:
        pixels = (pixels - low) / (high - low or 1)
    return pixels.astype(np.float32)


def over_images(function, paths):
    """[function(path) for path in paths], many of them by one process a core, with a progress bar; `function` is picklable.

    (Threads would take twice the time of none on small images: they fight for Python's lock.)
    """
    bar = functools.partial(tqdm, desc="reading images", total=len(paths), leave=False, delay=1)
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if processes == 1 or len(paths) < 200:
        return list(bar(map(function, paths)))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with context.Pool(processes, torch.set_num_threads, (1,)) as pool:
        return list(bar(pool.imap(function, paths, chunksize=16)))


def read_bytes(path, short_side):
    """`read_image`, rounded to 8 bits: uint8 array (1, H, W)."""
    return (read_image(path, short_side) * 255).round_().byte().numpy()


def pixel_hash(path):
    """(hash of the decoded pixels, "") of an image, ("", what is wrong) of one that cannot be read."""
    try:
        pixels = read_image(path).numpy()
        return hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest(), ""
    except InputError as error:
        return "", str(error)


def list_images(folder):
    """Every image below a folder, sorted paths. Raises InputError where there is none."""
    found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    paths = sorted(str(path) for path in found if path.name[0] != ".")
    if not paths:
        raise InputError(f"{folder}: expected a folder with images ({', '.join(IMAGE_SUFFIXES)}), found none")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Lists and reports


# The published layouts: the folder of the images below the root, the list of each part (training lists by the percentage
# of labels), and the classes in the order of the labels. A classes.txt at the root, one name a line, goes before these.
NIH_CLASSES = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
               "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]
CHEXPERT_CLASSES = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
LISTS = {"train": {1: "train_1.txt", 10: "train_10.txt", 100: "train_list.txt"}, "val": "val_list.txt",
         "test": "test_list.txt"}
DATASETS = {
    "demo": {"images": "images", "classes": None, **LISTS},
    "csv": {"images": "images", "classes": None, **LISTS},
    "nih": {"images": "images", "classes": NIH_CLASSES, **LISTS},
    "rsna": {"images": "", "classes": ["Pneumonia"], **LISTS},
    "chexpert": {"images": "", "classes": CHEXPERT_CLASSES, **LISTS},
    "covid": {"images": "images", "classes": ["COVID-19"], "train": {100: "splits/{split}/train.txt"},
              "val": "splits/{split}/val.txt", "test": "splits/{split}/test.txt"},
}
NUMBER = re.compile(r"-?\d+(\.\d*)?")


def read_text(path):
    """The text of a file. Raises InputError where it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file in UTF-8, found otherwise ({error})") from None


def read_json(path):
    """The content of a .json file. Raises InputError where it is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not readable as JSON ({error.msg})") from None


def split_line(line):
    """`name l1 ... lk` as (name, labels): every number at the end is a label; the name may hold spaces."""
    words = line.split()
    count = next((i for i, word in enumerate(reversed(words[1:])) if not NUMBER.fullmatch(word)), len(words) - 1)
    return line.strip().rsplit(None, count)[0], words[len(words) - count:]


def read_list(path, root=None, num_labels=None, skip_bad=False):
    """Reads a list file, `name l1 ... lk` a line: (names, labels float32 (n, k)); k = 0 where it lists names only.

    k is `num_labels`, or what most lines have. With a `root`, every image must exist below it (or below its images/).
    Raises InputError, with the line, for another number of labels, a label that is not 0 or 1 and a name listed twice;
    `skip_bad` leaves such lines out instead and says so on stderr. Raises it for an empty or missing list in any case.
    """
    lines = [(number, *split_line(line)) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: expected a line `name label ...` an image, found an empty list")
    k = Counter(len(labels) for _, _, labels in lines).most_common(1)[0][0] if num_labels is None else num_labels
    names, rows, bad = {}, [], []
    for number, name, labels in lines:
        if len(labels) != k or not set(labels) <= {"0", "1"}:
            found = " ".join(labels) or "none"
            bad.append(f"line {number}: expected {k} label{'s' * (k != 1)}, each 0 or 1, after {name!r}, found {found}")
        elif name in names:
            bad.append(f"line {number}: {name!r} is listed before, in line {names[name]}")
        else:
            names[name] = number
            rows.append([label == "1" for label in labels])
    if bad and not (skip_bad and names):
        raise InputError(f"{path}: {bad[0]}; correct the list, or leave out such lines ({len(bad)}) with --skip-bad-lines")
    if bad:
        print(f"WARNING: {path}: {len(bad)} of {len(lines)} lines left out, the first: {bad[0]}", file=sys.stderr)
    names = list(names)
    if root is not None:
        find_images("csv", root, names, path)
    return names, torch.tensor(rows, dtype=torch.float32).reshape(len(names), k)


def split_files(data, root, split="", ratio=100):
    """The list files of a layout: {"train": path, "val": path, "test": path}.

    Raises InputError, saying what there is, where --data, --root, --split and --ratio do not fit together.
    """
    layout, root = DATASETS[data], Path(root or ".")
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder")
    splits = sorted(path.parent.name for path in root.glob("splits/*/train.txt"))
    if "{split}" in layout["val"] and split not in splits:
        there = " or ".join(splits) or "(none there: no splits/*/train.txt)"
        raise InputError(f"--data {data} --root {root}: expected --split {there}, found {split or 'none'}")
    if split and "{split}" not in layout["val"]:
        raise InputError(f"--data {data}: expected no --split, found {split}; the data with splits: covid")
    if ratio not in layout["train"]:
        raise InputError(f"--data {data}: expected --ratio {' or '.join(map(str, layout['train']))}, found {ratio}")
    files = {"train": layout["train"][ratio], "val": layout["val"], "test": layout["test"]}
    files = {part: root / name.format(split=split) for part, name in files.items()}
    for path in files.values():
        if not path.is_file():
            there = ", ".join(sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())[:12]) or "nothing"
            raise InputError(f"{path}: no such list, which --data {data} --ratio {ratio} needs; {root} holds {there}")
    return files


def class_names(data, root, split, count):
    """The names of the `count` classes: ROOT/classes.txt, else the layout's, else numbers. Raises InputError for another
    count."""
    path = Path(root or ".") / "classes.txt"
    classes = DATASETS[data]["classes"] or [f"class {i + 1}" for i in range(count)]
    if path.exists():
        classes = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    elif data == "covid" and split.startswith("viral"):
        classes = ["Viral"]
    if len(classes) != count:
        source = path if path.exists() else f"--data {data}"
        raise InputError(f"{source}: expected {count} classes, as the lists have labels, found {len(classes)}: "
                         f"{', '.join(classes)}")
    return classes


def find_image(data, root, name):
    """The path of an image named relative to the layout's image folder or to the root, None where there is none.

    A name without an ending may be a .png, .dcm or .jpg.
    """
    folders = (os.path.join(root or ".", DATASETS[data]["images"]), str(root or "."))
    places = (os.path.join(folder, name + suffix) for suffix in ("", ".png", ".dcm", ".jpg") for folder in folders)
    return next((place for place in places if os.path.isfile(place)), None)


def find_images(data, root, names, source):
    """`find_image` of every name in a list or CSV (`source`). Raises InputError, with the line, where any is missing."""
    paths, missing = [], []
    for name in names:
        paths.append(find_image(data, root, name))
        missing += [name] if paths[-1] is None else []
    if missing:
        whole = re.compile(rf"(?<![\w./-]){re.escape(missing[0])}(?![\w.-])")
        number = next((i for i, line in enumerate(read_text(source).splitlines(), 1) if whole.search(line)), "?")
        folder = os.path.join(root or ".", DATASETS[data]["images"])
        raise InputError(f"{source}: line {number}: no image {missing[0]!r} in {folder} "
                         f"({len(missing)} of {len(names)} are missing)")
    return paths


def read_csv(path, columns):
    """Rows of a CSV as (line, value of each of `columns`), header names stripped. Raises InputError with the line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    csv.field_size_limit(2**31 - 1)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not set(columns) <= set(header):
            found = ", ".join(header) or "an empty file"
            raise InputError(f"{path}: line 1: expected the columns {', '.join(columns)}, found {found}")
        places = [header.index(name) for name in columns]
        for row in reader:
            if row and len(row) <= max(places):
                raise InputError(f"{path}: line {reader.line_num}: expected {len(header)} fields, found {len(row)}")
            if row:
                yield reader.line_num, *(row[place].strip() for place in places)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not readable as CSV ({error})") from None


def read_reports(path, root):
    """The records of a training.csv with columns image_path and report_content: (image paths, reports).

    Raises InputError, with the line, for missing columns, images or reports, and for no record at all.
    """
    names, reports = [], []
    for line, name, report in read_csv(path, ("image_path", "report_content")):
        if not name or not report:
            empty = "report_content" if name else "image_path"
            raise InputError(f"{path}: line {line}: expected an image and its report, found no {empty}")
        names.append(name)
        reports.append(report)
    if not reports:
        raise InputError(f"{path}: expected records below the header, found none")
    return find_images("csv", root, names, path), reports


def record_names(root, paths):
    """Paths or names as the lists write them: relative to the root, without the layout's images/."""
    root = os.path.join(str(root or "."), "")
    return [str(path).removeprefix(root).removeprefix("images/") for path in paths]


def patient_ids(root, names):
    """The patient of each name, None where unknown: from patients.csv or records.csv (columns image_path, patient_id) at
    the root, else from names as NIH (`00000013_005.png`) and CheXpert (`.../patient00007/...`) write them."""
    table = next((path for path in (Path(root) / "patients.csv", Path(root) / "records.csv") if path.exists()), None)
    rows = read_csv(table, ("image_path", "patient_id")) if table else ()
    known = {record_names(root, [name])[0]: patient for _, name, patient in rows}
    written = (re.search(r"patient\d+|(?:^|/)\d{8}(?=_\d{3}\.)", name) for name in names)
    return [known.get(name) or (match and match[0].strip("/")) for name, match in zip(names, written)]


def not_excluded(paths, exclude, root):
    """Indices of the paths that are neither in the list file `exclude` nor of a patient who has an image in it."""
    listed = record_names(root, [split_line(line)[0] for line in read_text(exclude).splitlines() if line.strip()])
    listed, names = set(listed), record_names(root, paths)
    patients = set(patient_ids(root, listed)) - {None}
    return [i for i, (name, patient) in enumerate(zip(names, patient_ids(root, names)))
            if name not in listed and patient not in patients]


# ---------------------------------------------------------------------------------------------------------------------
# The report tokenizer


# A byte-level byte-pair encoding trained on the reports at hand and run by tiktoken. Reports are lower-cased and runs of
# white space become one space: they are short, and case in them says little (Open-I's are in mixed case, others in
# capitals). A word is a run of letters (anything beyond ASCII counts as one), of digits, or of punctuation, with the
# space before it; no token crosses words. The vocabulary is the 256 bytes, the merges, then the special tokens.
# The pattern reads the same in Python's and in tiktoken's engine.
WORD = r" ?[^\x00-@\[-`{-\x7f]+| ?[0-9]+| ?[\x00-\x1f!-/:-@\[-`{-\x7f]+"
SPECIAL = ("<pad>", "<mask>", "<eot>")


def split_words(report):
    """The words of a report, lower-case, each with the space before it; joined, they are what decoding gives back."""
    return re.findall(WORD, " " + " ".join(report.lower().split()))


def make_encoding(merges):
    """The tiktoken encoding of a list of byte strings, the token's id its place; the special tokens follow."""
    return tiktoken.Encoding("reports", pat_str=WORD, mergeable_ranks={token: i for i, token in enumerate(merges)},
                             special_tokens={name: len(merges) + i for i, name in enumerate(SPECIAL)})


def train_tokenizer(reports, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016) of at most `vocab_size` tokens, special ones included.

    Merges the most frequent pair of neighbours within words, ties to the smaller ids, until the vocabulary is full or no
    pair is left twice. Returns a tiktoken.Encoding. Raises InputError for a vocabulary below the 256 bytes.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise InputError(f"vocabulary size: expected at least {256 + len(SPECIAL)} (the bytes and {', '.join(SPECIAL)}), "
                         f"found {vocab_size}")
    counted = Counter(word for report in reports for word in split_words(report))
    words, counts = [list(word.encode()) for word in counted], list(counted.values())
    tokens = [bytes([i]) for i in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and the words that hold (or held) it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - len(SPECIAL):
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:  # an entry from before the count fell: put back at today's
            heapq.heappush(heap, (-pairs[pair], pair)) if pairs[pair] > 0 else None
            continue
        if count > -2:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ids.setdefault(token, len(tokens))  # the same bytes may be known from another pair
        tokens += [token] if new == len(tokens) else []
        changed = set()
        for w in where.pop(pair):
            word, n, i = words[w], counts[w], 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = [new]
                    beside = [((left, pair[0]), (left, new)) for left in word[max(0, i - 1):i]]
                    beside += [((pair[1], right), (new, right)) for right in word[i + 1:i + 2]]
                    for old, fresh in beside:
                        pairs[old] -= n
                        pairs[fresh] += n
                        where[fresh].add(w)
                        changed.add(fresh)
                i += 1
        del pairs[pair]
        for fresh in changed:
            heapq.heappush(heap, (-pairs[fresh], fresh))
    return make_encoding(tokens)


def save_tokenizer(enc, path):
    """Writes a tokenizer in tiktoken's file format: a line a token, its bytes in base64, a space, its rank."""
    tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - len(SPECIAL))]
    text = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    atomic_write(path, lambda file: file.write(text))


def load_tokenizer(path):
    """Reads what `save_tokenizer` wrote (tiktoken's own loader would keep a copy by path and miss that the file changed).

    Raises InputError, with the line, where the file is missing or damaged.
    """
    tokens = []
    for number, line in enumerate(read_text(path).splitlines()):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            ranked = int(rank) == number
        except ValueError:
            ranked = False
        if not ranked:
            raise InputError(f"{path}: line {number + 1}: expected a token in base64 and its rank {number}, "
                             f"found {line[:60]!r}")
    if len(set(tokens)) < len(tokens) or not set(tokens) >= {bytes([i]) for i in range(256)}:
        raise InputError(f"{path}: expected different tokens, all 256 bytes among them; the file is damaged: write it again")
    return make_encoding(tokens)


def encode_reports(enc, reports, length):
    """Encodes reports, cut to `length` tokens: (tokens (n, L), words (n, L)), both int64.

    words[i, j] counts the words of report i from 0: that of token j. Behind the end tokens are <pad> and words -1.
    """
    tokens = torch.full((len(reports), length), enc.encode_single_token("<pad>"))
    words = torch.full((len(reports), length), -1)
    pieces = functools.cache(enc.encode_ordinary)
    for i, report in enumerate(reports):
        coded = [(token, w) for w, word in enumerate(split_words(report)) for token in pieces(word)][:length]
        tokens[i, :len(coded)], words[i, :len(coded)] = torch.tensor(coded).reshape(-1, 2).T
    return tokens, words


def hide_words(enc, tokens, words, ratio, generator=None):
    """Hides round(ratio * words) words of each report, at least one, all tokens of a word together.

    tokens, words: (B, L) from `encode_reports`. Returns (inputs, hidden): inputs carry <mask> where hidden (B, L) is True.
    """
    count = words.max(1).values + 1  # (B,)
    share = (ratio * count.double()).round().long().clamp(min=1).minimum(count)
    order = torch.rand(len(words), max(1, int(count.max())), generator=generator).to(words.device)
    order[torch.arange(order.shape[1], device=words.device) >= count[:, None]] = 2.0  # words there are not come last
    chosen = order.argsort(1).argsort(1) < share[:, None]  # (B, words)
    hidden = chosen.gather(1, words.clamp(min=0)) & (words >= 0)
    return tokens.masked_fill(hidden, enc.encode_single_token("<mask>")), hidden


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations and batches


def seeded(*numbers):
    """A torch.Generator whose stream depends on all the given integers."""
    state = np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def statistics(images, mean=None, std=None):
    """The (mean, std) to normalise images (B, C, H, W) by: a data set's, or, of None, each image's own (B, 1, 1, 1)."""
    if mean is None:
        mean = images.mean((1, 2, 3), keepdim=True)
        std = (images - mean).square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3  # an image of one grey has none
    return mean, std


def normalize(images, mean=None, std=None):
    """Images (B, C, H, W), centred and scaled as their model was trained: see `statistics`."""
    mean, std = statistics(images, mean, std)
    return (images - mean) / std


def resize(images, size):
    """(B, C, H, W) or (C, H, W), uint8 or in [0, 1], resized to (h, w), or so that the shorter side is an int `size`.

    Antialiased bicubic (Keys' with a = -1/2, widened where it reduces), as PIL's.
    """
    if isinstance(size, int):
        size = [round(side * size / min(images.shape[-2:])) for side in images.shape[-2:]]
    batch = images if images.ndim == 4 else images[None]
    batch = F.interpolate(batch, size, mode="bicubic", antialias=True)
    batch = batch if batch.dtype == torch.uint8 else batch.clamp_(0, 1)
    return batch if images.ndim == 4 else batch[0]


def random_resized_crop(images, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None):
    """A crop of random area (`scale`, of the image's) and aspect, resized to (size, size), another for each image.

    images: (B, C, H, W), or a list of (C, H, W) of different sizes; returns (B, C, size, size). Sampled as torchvision's
    RandomResizedCrop does: of ten tries the first that fits, else the central crop of the nearest aspect.
    """
    h, w = torch.tensor([image.shape[-2:] for image in images], dtype=torch.float64).T  # (B,)
    draw = torch.rand(4, len(images), 10, dtype=torch.float64, generator=generator)
    area = (h * w)[:, None] * (scale[0] + (scale[1] - scale[0]) * draw[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** draw[1]
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()  # (B, 10)
    fits = (heights <= h[:, None]) & (widths <= w[:, None]) & (heights > 0) & (widths > 0)
    first, fits = fits.int().argmax(1, keepdim=True), fits.any(1)
    height = torch.where(fits, heights.gather(1, first)[:, 0], h.minimum((w / ratio[0]).round()))
    width = torch.where(fits, widths.gather(1, first)[:, 0], w.minimum((h * ratio[1]).round()))
    top = torch.where(fits, draw[2, :, 0] * (h - height + 1), (h - height) / 2)
    left = torch.where(fits, draw[3, :, 0] * (w - width + 1), (w - width) / 2)
    boxes = torch.stack([top, left, height, width]).T.int().tolist()
    return torch.stack([resize(image[:, y:y + height, x:x + width], (size, size))
                        for image, (y, x, height, width) in zip(images, boxes)])


def random_flip(images, generator=None):
    """Mirrors each of (B, C, H, W) with probability 1/2. Never for images whose labels or reports know left from right."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


class ImageSet(torch.utils.data.Dataset):
    """Grey images of which the shorter side is `size`, as 8 bits (16-bit sources are rounded), read when asked for.

    set[indices, draw] is (images (B, 1, size, size), indices): a batch, passed through `augment(images, generator)` with a
    generator seeded by (seed, draw), so that neither workers nor resuming change it; without `augment`, the centre crops.
    set[i] is (image (1, size, size), i). `augment` gets (B, 1, H, W), or a list of (1, H, W) where shapes differ.
    """

    def __init__(self, paths, size, augment=None, seed=0):
        self.paths, self.size, self.augment, self.seed, self.cache = list(paths), size, augment, seed, None

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        """Image `index` as uint8 (1, H, W) with min(H, W) = size."""
        return torch.from_numpy(read_bytes(self.paths[index], self.size)) if self.cache is None else self.cache[index]

    def preload(self, limit=2 * 2**30):
        """Decodes every image into memory, if they take less than `limit` bytes; returns self."""
        if self.cache is None and len(self) * self.size**2 * 1.25 < limit:
            images = over_images(functools.partial(read_bytes, short_side=self.size), self.paths)
            same = len({image.shape for image in images}) == 1
            self.cache = torch.from_numpy(np.stack(images)) if same else [torch.from_numpy(image) for image in images]
        return self

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            if not 0 <= key < len(self):
                raise IndexError(key)
            return self[[key], 0][0][0], key
        indices, draw = torch.as_tensor(key[0]), key[1]
        images = self.cache[indices] if torch.is_tensor(self.cache) else [self.read(i) for i in indices.tolist()]
        if self.augment is None:
            s = self.size
            corners = [((image.shape[1] - s) // 2, (image.shape[2] - s) // 2) for image in images]
            crops = torch.stack([image[:, y:y + s, x:x + s] for image, (y, x) in zip(images, corners)])
            return crops.float() / 255, indices
        images = images.float() / 255 if torch.is_tensor(images) else [image.float() / 255 for image in images]
        return self.augment(images, seeded(self.seed, draw)), indices


def load_batches(dataset, keys, workers):
    """dataset[key] for each key, in this process or prepared ahead by `workers` others."""
    if not workers:
        yield from map(dataset.__getitem__, keys)
        return
    try:
        yield from torch.utils.data.DataLoader(
            dataset, None, sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if sys.platform == "linux" else None)
    except InputError as error:  # a worker's error arrives with its traceback: the last line is the message
        raise InputError(str(error).strip().split("\n")[-1].partition("InputError: ")[2]) from None


def train_batches(dataset, batch_size, start_step, steps, seed, rank=0, world=1, workers=0):
    """Batches of the steps start_step ... steps - 1: (images, indices (B,)), `batch_size` a process.

    The images of all steps are one endless row of epochs, each a permutation seeded by (seed, epoch), of which a step
    takes the next world * batch_size: what a step holds depends on its number alone.
    """
    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return torch.randperm(len(dataset), generator=seeded(seed, epoch)).tolist()

    def keys():
        for step in range(start_step, steps):
            draw = step * world + rank
            places = range(draw * batch_size, (draw + 1) * batch_size)
            yield [permutation(place // len(dataset))[place % len(dataset)] for place in places], draw

    return load_batches(dataset, keys(), workers)


def eval_batches(dataset, batch_size, rank=0, world=1, workers=0):
    """Every image of this process's share once, in order: (images, indices (B,)); the last batch may be smaller."""
    share = range(rank, len(dataset), world)
    keys = [(list(share[i:i + batch_size]), 0) for i in range(0, len(share), batch_size)]
    return load_batches(dataset, keys, workers)


# ---------------------------------------------------------------------------------------------------------------------
# A/B pairs

SLICE_SUFFIXES = (".npy", ".png", ".jpg", ".jpeg", ".nii", ".nii.gz")


def read_slice(path, rescale=None):
    """A 2-D image as float32 (C, H, W) in [-1, 1], C = 1 or 3.

    .npy and NIfTI values are taken as they are and must lie in [-1, 1]; 8 and 16-bit PNG and JPEG run from -1 (black) to 1
    (white) by their bit depth. `rescale` = (lo, hi) maps lo..hi to -1..1 instead and clips. Raises InputError for what
    cannot be read, volumes, non-finite and constant images, and values outside the range.
    """
    path = Path(path)
    span = rescale
    try:
        if path.name.endswith(".npy"):
            array = np.load(path, allow_pickle=False)
        elif path.name.endswith((".nii", ".nii.gz")):
            array = np.asanyarray(nifti().load(path).dataobj)
        else:
            with Image.open(path) as image:
                deep = image.mode.startswith("I")
                array = np.asarray(image if deep or image.mode in ("L", "RGB") else
                                   image.convert("L" if image.mode in ("1", "LA") else "RGB"))
            span = span or (0, 65535 if deep else 255)
    except InputError:
        raise
    except Exception as error:  # numpy, PIL and nibabel raise a dozen types on damaged files
        raise InputError(f"{path}: not a readable image ({str(error).splitlines()[0][:160] if str(error) else 'damaged'})") from None
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or array.dtype.kind not in "fiub":
        raise InputError(f"{path}: expected a 2-D array of numbers, (H, W) or (H, W, 3), found {array.shape} of {array.dtype}")
    if min(array.shape[:2]) < 32:
        raise InputError(f"{path}: expected at least 32 x 32 pixels, found {array.shape[0]} x {array.shape[1]}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite")
    lo, hi = float(array.min()), float(array.max())
    if lo == hi:
        raise InputError(f"{path}: a constant image, every value is {lo:g}: nothing to learn or measure, remove the pair")
    if span:
        array = np.clip((array - span[0]) * (2 / (span[1] - span[0])) - 1, -1, 1)
    elif lo < -1 or hi > 1:
        raise InputError(f"{path}: values from {lo:g} to {hi:g}, expected -1 to 1: --rescale LO,HI maps LO..HI to -1..1")
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def nifti():
    try:
        import nibabel
    except ImportError:
        raise InputError("reading NIfTI needs nibabel: pip install nibabel") from None
    return nibabel


def write_slice(path, image, source, rescale=None):
    """Writes `image` (C, H, W) in [-1, 1] in the format, bit depth and value range of the file `source` it came from."""
    path, source = Path(path), Path(source)
    array = image.clamp(-1, 1).double().cpu().numpy().transpose(1, 2, 0).squeeze()
    lo, hi = rescale or (-1, 1)
    if source.name.endswith(".npy"):
        dtype = np.load(source, mmap_mode="r").dtype
        array = (array + 1) * ((hi - lo) / 2) + lo
        array = (array if dtype.kind == "f" else array.round()).astype(dtype)
        atomic_write(path, lambda file: np.save(file, array))
    elif source.name.endswith((".nii", ".nii.gz")):
        like = nifti().load(source)
        dtype = like.get_data_dtype()
        array = (array + 1) * ((hi - lo) / 2) + lo
        array = (array if dtype.kind == "f" else array.round()).astype(dtype).reshape(like.shape[:2] + (-1,) * (array.ndim > 2))
        content = nifti().Nifti1Image(array, like.affine).to_bytes()
        content = gzip.compress(content) if source.name.endswith(".gz") else content
        atomic_write(path, lambda file: file.write(content))
    else:
        with Image.open(source) as like:
            depth, kind = (65535, np.uint16) if like.mode.startswith("I") else (255, np.uint8)
            form = like.format
        lo, hi = rescale or (0, depth)
        picture = Image.fromarray(((array + 1) * ((hi - lo) / 2) + lo).round().clip(0, depth).astype(kind))
        atomic_write(path, lambda file: picture.save(file, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {})))


def list_slices(folder):
    """The names of the images in a folder, sorted. Raises InputError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (expected ROOT/train/A, ROOT/train/B, ROOT/val/A and ROOT/val/B)")
    names = sorted(p.name for p in folder.iterdir() if p.name.lower().endswith(SLICE_SUFFIXES) and p.name[0] != ".")
    if not names:
        raise InputError(f"{folder}: no image in this folder (expected {', '.join(SLICE_SUFFIXES)})")
    return names


def list_pairs(folder):
    """The names that `folder`/A and `folder`/B share. Raises InputError with the names that only one of them has."""
    a, b = (set(list_slices(Path(folder) / side)) for side in "AB")
    if a != b:
        lone = [f"only in {side}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
                for side, names in (("A", a - b), ("B", b - a)) if names]
        raise InputError(f"{folder}: A and B must hold the same file names; {'; '.join(lone)}")
    return sorted(a)


class RandomTransform:
    """A random map T from output to input positions, T(p) = M (p - c) + c + t + e(p), in pixels (y, x).

    M rotates by up to `degrees` and zooms within `percent` %, t shifts by up to `percent` % of the sides; e is a bicubic
    surface through 5 x 5 control points whose displacements have a standard deviation of `elastic` % of the sides.
    """

    def __init__(self, rng, size, degrees, percent, elastic=0.0):
        sides = np.array(size, dtype=np.float32)
        angle, zoom = np.deg2rad(rng.uniform(-degrees, degrees)), 1 + rng.uniform(-percent, percent) / 100
        M = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
        c, shift = (sides - 1) / 2, rng.uniform(-percent, percent, 2) / 100 * sides
        self.M, self.offset = torch.from_numpy(M).float(), torch.from_numpy(c + shift - M @ c).float()[:, None]
        self.back = torch.from_numpy(np.linalg.inv(M)).float()
        knots = rng.normal(0, elastic / 100, (1, 2, 5, 5)) * sides[:, None, None] if elastic else None
        self.e = F.interpolate(torch.from_numpy(knots).float(), size, mode="bicubic", align_corners=True)[0] if elastic else None

    def bend(self, p):
        """e at positions p (2, H, W)."""
        return 0 if self.e is None else sample_at(self.e, p, "border")

    def __call__(self, p):
        return torch.addmm(self.offset, self.M, p.flatten(1)).view_as(p) + self.bend(p)

    def inverse(self, q):
        """The p with T(p) = q, to 0.001 pixels: by iteration p <- M^-1 (q - e(p) - offset), one round where there is no e."""
        p = q
        for _ in range(1 if self.e is None else 30):
            last, p = p, (self.back @ ((q - self.bend(p)).flatten(1) - self.offset)).view_as(q)
            if (p - last).abs().max() < 1e-3:
                break
        return p


def sample_at(image, p, padding="zeros"):
    """image (C, H, W) read bilinearly at the pixel positions p (2, H, W), y first."""
    H, W = image.shape[-2:]
    grid = torch.stack((p[1] * (2 / (W - 1)) - 1, p[0] * (2 / (H - 1)) - 1), -1)[None]
    return F.grid_sample(image[None], grid, padding_mode=padding, align_corners=True)[0]


def misalign(a, b, rng, noise, elastic=0.0, with_flow=True):
    """The paper's misalignment of level `noise`: a and b (C, H, W) each move by a random transform of their own.

    Rotation up to `noise` degrees, shift up to 2 noise %, zoom within 2 noise %; at level 0 one small transform (1 degree,
    2 %) moves both. `elastic` adds a bending field to each. Background (-1) comes in from outside.
    Returns (a', b', flow), or (a', b'): flow (2, H, W) in pixels is the displacement that registers them,
    f(a')[p + flow(p)] = b'[p] for a perfect translation f. From a'[p] = a[Ta(p)] and b'[p] = b[Tb(p)] follows flow(p) = Ta^-1(Tb(p)) - p.
    """
    size = tuple(a.shape[-2:])
    p = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij"))
    if noise == 0:
        ta = RandomTransform(rng, size, 1, 2)
        tb = copy.copy(ta)
        ta.e, tb.e = (RandomTransform(rng, size, 0, 0, elastic).e for _ in range(2))
    else:
        ta, tb = (RandomTransform(rng, size, noise, 2 * noise, elastic) for _ in range(2))
    pa, pb = ta(p), tb(p)
    moved = sample_at(a + 1, pa) - 1, sample_at(b + 1, pb) - 1
    return (*moved, ta.inverse(pb) - p) if with_flow else moved


class Pairs(torch.utils.data.Dataset):
    """`folder`/A and `folder`/B as pairs (a, b) or, misaligned, (a, b, flow): float32 (C, H, W), flow as in `misalign`;
    it takes longer to find than the pair, and `with_flow` False leaves it out.

    An item is asked for by (epoch, index): the misalignment is redrawn every epoch, as in the official code, by a generator
    that (seed, epoch, index) fixes. All files are read once here, so that a bad one is found before anything is written,
    and kept where they fit in KEPT_BYTES. `noise` None leaves the pairs as they are. `size` > 0 scales the longer side to it
    and pads to a square.
    """

    KEPT_BYTES = 2**30

    def __init__(self, folder, noise=None, elastic=0.0, seed=0, size=0, rescale="", with_flow=True):
        self.folder, self.noise, self.elastic, self.seed, self.size = Path(folder), noise, elastic, seed, size
        self.with_flow = with_flow
        self.names, self.rescale = list_pairs(folder), parse_rescale(rescale)
        self.kept, first = {}, None
        for name in self.names:
            a, b = self.read(name)
            if (a.nbytes + b.nbytes) * len(self.names) <= self.KEPT_BYTES:
                self.kept[name] = a, b
            if a.shape[1:] != b.shape[1:]:
                raise InputError(f"{self.folder / 'B' / name}: {tuple(b.shape[1:])} pixels, its A has {tuple(a.shape[1:])}")
            first = first or (a.shape, b.shape)
            if (a.shape, b.shape) != first:
                raise InputError(f"{self.folder / 'A' / name}: sizes (C, H, W) {tuple(a.shape)} and {tuple(b.shape)}, the files "
                                 f"before it have {tuple(first[0])} and {tuple(first[1])}: --size N brings all to N x N")
        self.in_chans, self.out_chans, self.shape = first[0][0], first[1][0], tuple(first[0][1:])

    def __len__(self):
        return len(self.names)

    def read(self, name):
        return [fit_square(read_slice(self.folder / side / name, span), self.size) for side, span in zip("AB", self.rescale)]

    def __getitem__(self, keys):
        """The batch of a list of (epoch, index): (a, b) or (a, b, flow), each stacked to (B, C, H, W)."""
        return [torch.stack(parts) for parts in zip(*(self.item(epoch, index) for epoch, index in keys))]

    def item(self, epoch, index):
        a, b = self.kept.get(self.names[index]) or self.read(self.names[index])
        if self.noise is None:
            return a, b
        return misalign(a, b, np.random.default_rng([self.seed, epoch, index]), self.noise, self.elastic, self.with_flow)

    def batches(self, batch, epochs=1, shuffle=False, seed=0, start=0, rank=0, world=1, workers=0):
        """Yields batches from the `start`-th on, the same ones whatever `start` and `workers`. The last may be smaller.

        In training (`shuffle`) every process gets equally many, the first items filling up; otherwise no item comes twice.
        """
        keys = []
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(self)) if shuffle else np.arange(len(self))
            order = np.resize(order, -(-len(order) // world) * world) if shuffle else order
            order = order[rank::world]
            keys += [[(epoch, int(i)) for i in order[k:k + batch]] for k in range(0, len(order), batch)]
        return load_batches(self, keys[start:], workers)


def parse_rescale(text):
    """'LO,HI' for both sides or 'LO,HI,LO,HI' for A and B; '' for none. Returns a range or None for each side."""
    try:
        v = [float(x) for x in text.split(",")] if text else []
        spans = {0: (None, None), 2: (tuple(v), tuple(v)), 4: (tuple(v[:2]), tuple(v[2:]))}[len(v)]
        if any(s and not s[0] < s[1] for s in spans):
            raise ValueError
    except (ValueError, KeyError):
        raise InputError(f"--rescale {text}: expected LO,HI or LO,HI,LO,HI (A, then B) with LO < HI") from None
    return spans


def fit_square(image, size):
    """Scales the longer side of (C, H, W) to `size` with anti-aliasing and pads to a square with background; 0 leaves it."""
    if not size or tuple(image.shape[1:]) == (size, size):
        return image
    H, W = (max(1, round(n * size / max(image.shape[1:]))) for n in image.shape[1:])
    image = F.interpolate(image[None], (H, W), mode="bilinear", antialias=True, align_corners=False)[0].clamp(-1, 1)
    top, left = (size - H) // 2, (size - W) // 2
    return F.pad(image, (left, size - W - left, top, size - H - top), value=-1.0)


def demo_root(root="", pairs=False):
    """The folder of the demo records (default: demo), or of the demo pairs in it, drawn on first use. Under torchrun one
    process draws the records."""
    import demo  # only here, so that real data needs nothing of the drawing

    root, rank = Path(root or "demo"), int(os.environ.get("RANK", 0))
    if pairs:
        return demo.demo_pairs(root)
    if rank == 0 and not (root / "demo.json").exists():
        print(f"drawing the demo records into {root}")
        demo.write_demo_records(root)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.barrier()
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Audit and command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    root: str = option("", "folder of the data set")
    data: str = option("", "layout of the data set (default: covid where there is ROOT/splits, else demo)",
                       choices=["", *DATASETS])
    split: str = option("", "of a layout with several splits, this one only")


def audit(config):
    """Prints images, patients and positives of every part, then what is wrong: a patient or the same pixels in two parts,
    files that are missing or unreadable, bad lines. Returns 1 where anything is, else 0. Raises InputError for no lists."""
    if not config.root:
        raise InputError("audit: expected --root DIR, found none")
    root = Path(config.root)
    data = config.data or ("covid" if (root / "splits").is_dir() else "demo")
    layout = DATASETS[data]
    splits = [config.split]
    if "{split}" in layout["val"] and not config.split:
        splits = sorted(path.name for path in root.glob("splits/*") if path.is_dir()) or [""]
    lists, problems = {}, []
    for split in splits:
        split_files(data, root, split, max(layout["train"]))  # explains what does not fit
        for name in [*layout["train"].values(), layout["val"], layout["test"]]:
            path = root / name.format(split=split)
            if path.exists():
                try:
                    lists[split, path.stem] = read_list(path)
                except InputError as error:
                    problems.append(str(error))
                    lists[split, path.stem] = read_list(path, skip_bad=True)
    names = sorted({name for listed, _ in lists.values() for name in listed})
    patients = dict(zip(names, patient_ids(root, names)))
    digests = dict(zip(names, over_images(pixel_hash, [find_image(data, root, name) or name for name in names])))
    problems += [wrong for _, wrong in digests.values() if wrong]
    known = {key: {patients[name] for name in listed} - {None} for key, (listed, _) in lists.items()}
    print(f"{'list':24s}{'images':>8s}{'patients':>10s}  positives")
    for (split, part), (listed, labels) in lists.items():
        classes = class_names(data, root, split, labels.shape[1])
        counts = ", ".join(f"{name} {int(count)}" for name, count in zip(classes, labels.sum(0)))
        print(f"{f'{split} {part}'.strip():24s}{len(listed):8d}{len(known[split, part]) or '?':>10}  {counts}")
    for a, b in itertools.combinations(lists, 2):
        if a[0] != b[0] or a[1].startswith("train") and b[1].startswith("train"):
            continue
        both = f"{a[0]} {a[1]} and {b[1]}".strip()
        twice = sorted(known[a] & known[b])
        first = {digests[name][0]: name for name in lists[a][0] if digests[name][0]}
        same = [f"{first[digests[name][0]]} = {name}" for name in lists[b][0] if digests[name][0] in first]
        problems += [f"{both}: {len(twice)} patients in both: {', '.join(twice[:5])}"] if twice else []
        problems += [f"{both}: {len(same)} images with the same pixels in both: {', '.join(same[:5])}"] if same else []
    print("\n".join(problems) or "nothing wrong: no patient and no image in two parts, every file readable")
    return int(bool(problems))


COMMANDS = {"audit": (AuditConfig, audit)}  # name: (options, function of them; what it returns is the exit status)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(f"{__doc__}\nusage: python data.py {{{','.join(COMMANDS)}}} [-h] [options]")
        sys.exit(0 if argv[:1] in (["-h"], ["--help"]) else 2)
    config_class, command = COMMANDS[argv[0]]
    sys.exit(command(parse_config(config_class, argv[1:], f"python data.py {argv[0]}")))


if __name__ == "__main__":
    run_script(main)
