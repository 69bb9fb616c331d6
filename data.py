"""Everything that touches the disk: images, lists, reports, pairs, demo records, checkpoints, logs, pictures.

    python data.py demo --out demo            # draw the demo records (the scripts do it on first use)
    python data.py audit --root DIR           # split leakage, class counts, unreadable files

The sections, in order: errors and command lines, start-up, checkpoints, run logs and pictures, reading images, lists
and reports, the report tokenizer, augmentations and batches, A/B pairs, demo chest radiographs, demo brain pairs,
audit. Nothing here knows a model or a loss.

Shapes: B batch, C channels, H x W pixels, L report tokens. Images are float32 (C, H, W); grey is C = 1.
"""
import argparse
import copy
import dataclasses
import gzip
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

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
        atomic_write(path, lambda file: picture.save(file, form, **({"quality": 95} if form == "JPEG" else {})))


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


class Transform:
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
        return 0 if self.e is None else sample(self.e, p, "border")

    def __call__(self, p):
        return torch.addmm(self.offset, self.M, p.flatten(1)).view_as(p) + self.bend(p)

    def inverse(self, q):
        """The p with T(p) = q: by iteration p <- M^-1 (q - e(p) - offset), one round where there is no e."""
        p = q
        for _ in range(1 if self.e is None else 30):
            p = (self.back @ ((q - self.bend(p)).flatten(1) - self.offset)).view_as(q)
        return p


def sample(image, p, padding="zeros"):
    """image (C, H, W) read bilinearly at the pixel positions p (2, H, W), y first."""
    H, W = image.shape[-2:]
    grid = torch.stack((p[1] * (2 / (W - 1)) - 1, p[0] * (2 / (H - 1)) - 1), -1)[None]
    return F.grid_sample(image[None], grid, padding_mode=padding, align_corners=True)[0]


def misalign(a, b, rng, noise, elastic=0.0):
    """The paper's misalignment of level `noise`: a and b (C, H, W) each move by a random transform of their own.

    Rotation up to `noise` degrees, shift up to 2 noise %, zoom within 2 noise %; at level 0 one small transform (1 degree,
    2 %) moves both. `elastic` adds a bending field to each. Background (-1) comes in from outside.
    Returns (a', b', flow): flow (2, H, W) in pixels is the displacement that registers them, f(a')[p + flow(p)] = b'[p]
    for a perfect translation f. From a'[p] = a[Ta(p)] and b'[p] = b[Tb(p)] follows flow(p) = Ta^-1(Tb(p)) - p.
    """
    size = tuple(a.shape[-2:])
    p = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij"))
    if noise == 0:
        ta = Transform(rng, size, 1, 2)
        tb = copy.copy(ta)
        ta.e, tb.e = (Transform(rng, size, 0, 0, elastic).e for _ in range(2))
    else:
        ta, tb = (Transform(rng, size, noise, 2 * noise, elastic) for _ in range(2))
    pa, pb = ta(p), tb(p)
    return sample(a + 1, pa) - 1, sample(b + 1, pb) - 1, ta.inverse(pb) - p


class Pairs(torch.utils.data.Dataset):
    """`folder`/A and `folder`/B as pairs (a, b) or, misaligned, (a, b, flow): float32 (C, H, W), flow as in `misalign`.

    An item is asked for by (epoch, index): the misalignment is redrawn every epoch, as in the official code, by a generator
    that (seed, epoch, index) fixes. All files are read once here, so that a bad one is found before anything is written.
    `noise` None leaves the pairs as they are. `size` > 0 scales the longer side to it and pads to a square.
    """

    def __init__(self, folder, noise=None, elastic=0.0, seed=0, size=0, rescale=""):
        self.folder, self.noise, self.elastic, self.seed, self.size = Path(folder), noise, elastic, seed, size
        self.names, self.rescale = list_pairs(folder), parse_rescale(rescale)
        first = None
        for name in self.names:
            a, b = self.read(name)
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
        return [fit(read_slice(self.folder / side / name, span), self.size) for side, span in zip("AB", self.rescale)]

    def __getitem__(self, key):
        epoch, index = key
        a, b = self.read(self.names[index])
        if self.noise is None:
            return a, b
        return misalign(a, b, np.random.default_rng([self.seed, epoch, index]), self.noise, self.elastic)

    def batches(self, batch, epochs=1, shuffle=False, seed=0, start=0, rank=0, world=1, workers=0, drop=False):
        """Yields batches from the `start`-th on, the same ones whatever `start` and `workers`. The last may be smaller.

        In training (`shuffle`) every process gets equally many, the first items filling up; otherwise no item comes twice.
        """
        keys = []
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(self)) if shuffle else np.arange(len(self))
            order = np.resize(order, -(-len(order) // world) * world) if shuffle else order
            order = order[rank::world]
            keys += [[(epoch, int(i)) for i in order[k:k + batch]] for k in range(0, len(order), batch)]
        return torch.utils.data.DataLoader(self, batch_sampler=keys[start:], num_workers=workers, generator=torch.Generator())


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


def fit(image, size):
    """Scales the longer side of (C, H, W) to `size` with anti-aliasing and pads to a square with background; 0 leaves it."""
    if not size or tuple(image.shape[1:]) == (size, size):
        return image
    H, W = (max(1, round(n * size / max(image.shape[1:]))) for n in image.shape[1:])
    image = F.interpolate(image[None], (H, W), mode="bilinear", antialias=True, align_corners=False)[0].clamp(-1, 1)
    top, left = (size - H) // 2, (size - W) // 2
    return F.pad(image, (left, size - W - left, top, size - H - top), value=-1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Demo chest radiographs


# ---------------------------------------------------------------------------------------------------------------------
# Demo brain pairs


# Relative brightness of a tissue in the two contrasts. No curve turns one into the other: CSF and bone are equally dark in
# T1 and opposite in T2, fat shines like white matter in T1 only, a lesion has the T1 of grey matter and the T2 of fluid.
BRAIN_TISSUES = {"air": (0, 0), "fat": (0.86, 0.42), "bone": (0.12, 0.10), "csf": (0.14, 0.95), "grey": (0.50, 0.58),
                 "white": (0.80, 0.36), "nuclei": (0.60, 0.47), "lesion": (0.50, 0.85)}


def smooth_noise(rng, shape, size):
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
    folds = smooth_noise(rng, (6, 44), (64, 1024))
    folds = np.concatenate([folds[:, :512], folds[:, 511::-1] * 0.8 + folds[:, 512:] * 0.2], 1)  # closed, nearly symmetric
    turn = (theta / (2 * np.pi) + 0.75 + 0.25 * level * (1 - r)) % 1
    fold = folds[np.clip(r * 48, 0, 63).astype(int), np.clip(turn * 1024, 0, 1023).astype(int)]
    depth, fold = 1 - r, fold * np.clip(r * 2.5 - 1, 0, 1)

    def blob(cy, cx, ry, rx, tilt=0.0):
        u, v = y - cy, x - cx
        u, v = u * np.cos(tilt) - v * np.sin(tilt), u * np.sin(tilt) + v * np.cos(tilt)
        return np.hypot(u / ry, v / rx) < 1 + 0.12 * wobble

    wobble = smooth_noise(rng, (9, 9), (n, n))
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
        image *= np.exp(0.06 * smooth_noise(rng, (3, 3), (n, n)))  # uneven coil sensitivity
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
                    rng = np.random.default_rng([seed, subject])
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
# Audit and command line
