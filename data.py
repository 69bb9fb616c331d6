"""Real data: images, lists, tables, reports, masks, A/B pairs and their batches, the tokenizer.

    python data.py audit --root DIR      # split leakage, class counts, unreadable files
    python data.py audit --root DIR --pretraining LIST    # test images that were pretrained on

Nothing here knows a model or a loss. What cannot be used is refused by an InputError, in one line
that says what was expected and found, in which file and line.

The sections: reading images; text files; data sets as lists; as tables; their images, reports and
masks; patients; the tokenizer; crops and batches; A/B pairs; the audit. What a run itself keeps,
such as options and checkpoints, is in common.py.

Shapes: B batch, C channels, H x W pixels, L report tokens. Images are float32 (C, H, W).
"""

import base64
import copy
import csv
import dataclasses
import functools
import gzip
import hashlib
import heapq
import io
import itertools
import math
import multiprocessing
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common import (
    InputError, atomic_write, checkpoint_file, cores, load_checkpoint, note, option, parse_config,
    read_text, run_script, say_once, seeded, warn)
from kernels import warp

# --------------------------------------------------------------------------------------------------
# Reading images

IMAGE_SUFFIXES = [
    ".png", ".jpg", ".jpeg", ".npy", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".nii", ".nii.gz",
]
KINDS = {".npy": "npy", ".dcm": "dicom", ".dicom": "dicom", ".nii": "nifti", ".nii.gz": "nifti"}
FIRST_BYTES = {"npy": rb"\x93NUMPY", "dicom": rb".{128}DICM", "nifti": rb".{344}n.1\0|.{4}n.2\0",
               "picture": rb"\x89PNG|\xff\xd8\xff|II\*\0|MM\0\*|BM.{4}\0{4}"}


def file_kind(file):
    """npy, dicom, nifti, picture, or "": told by an open file's first bytes, else by its ending."""
    head = file.read(352)
    file.seek(0)
    for kind, pattern in FIRST_BYTES.items():
        if re.match(pattern, head, re.DOTALL):
            return kind
    ending = split_ending(str(file.name))[1].lower()
    return KINDS.get(ending, "picture" if ending else "")


def split_ending(name):
    """("chest.1", ".PNG") of "chest.1.PNG"; the second is "" without one of IMAGE_SUFFIXES."""
    ending = next((end for end in IMAGE_SUFFIXES if name[-7:].lower().endswith(end)), "")
    return name[: len(name) - len(ending)], name[len(name) - len(ending) :]


def read_pixels(path, short_side=None, grey=False, raw_dicom=False):
    """The numbers of an image file as they are stored: (array (H, W) or (H, W, 3), full scale).

    The content tells the kind of a file. Full scale is the number that stands for white: 255 or
    65535 in a PNG, JPEG, TIFF or BMP; 1 in DICOM, which its own rules scale (255 with `raw_dicom`:
    see `read_dicom`); None in .npy and NIfTI, whose numbers may mean anything. A JPEG is decoded at
    the smallest of 1/8, 1/4, 1/2 of its size whose shorter side is not below `short_side`, and as
    grey where `grey`."""
    try:
        with open(path, "rb") as file:
            kind, white = file_kind(file), None
            if not os.fstat(file.fileno()).st_size:
                raise InputError(path, "an image", "an empty file; copy it again")
            if kind == "npy":
                pixels = np.load(file, allow_pickle=False)
            elif kind == "dicom":
                pixels, white = read_dicom(file, raw_dicom), 255 if raw_dicom else 1
            elif kind == "nifti":
                pixels = np.asanyarray(read_nifti(file).dataobj)
            else:
                pixels, white = read_picture(file, short_side, grey)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except InputError:
        raise
    except Exception as error:  # a damaged file raises one of a dozen types, by its decoder
        first, *hints = str(error).strip().splitlines() or [type(error).__name__]
        reason = "; ".join([*map(str.strip, hints), first])  # a decoder to install is named last
        if isinstance(error, UnidentifiedImageError):
            reason = "another kind of file"
        expected = "a complete PNG, JPEG, TIFF, .npy, NIfTI or DICOM image"
        raise InputError(path, expected, reason) from None
    while pixels.ndim > 2 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    flat = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not flat or not pixels.size or pixels.dtype.kind not in "buif":
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise InputError(path, "numbers of shape (H, W), (H, W, 1) or (H, W, 3)", found)
    wrong = np.count_nonzero(~np.isfinite(pixels))
    if wrong:
        raise InputError(path, "finite numbers", f"{wrong} of {pixels.size} NaN or infinite")
    return pixels, white


def read_picture(file, short_side, grey):
    """The pixels and full scale of a file that PIL reads, turned as its EXIF orientation says."""
    with Image.open(file) as picture:
        if picture.format == "TIFF" and picture.n_frames > 1:
            raise InputError(file.name, "one page", picture.n_frames)
        if picture.format == "JPEG" and short_side:
            picture.draft("L" if grey else None, (short_side, short_side))
        if picture.format == "TIFF" and picture.mode[0] == "I" and picture.tag_v2.get(262) == 0:
            raise InputError(file.name, "0 for black", "0 for white (MinIsWhite), of 16 bits")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        return np.array(picture), None
    if picture.mode.startswith("I"):  # PIL's own conversion to 8 bits would clip 16 to white
        pixels = np.array(picture)
        if pixels.min() < 0 or pixels.max() > 65535:
            return pixels, None
        return pixels.astype(np.uint16), 65535
    mode = "L" if grey or picture.mode in ("1", "L", "LA") else "RGB"
    return np.array(picture.convert(mode)), 255


def read_dicom(file, raw_dicom=False):
    """The pixels of a DICOM file as they are meant to be seen, from 0 (black) to 1 (white).
    They pass through the palette, or the modality LUT and then the VOI LUT or window. The minimum
    becomes 0 and the maximum 1, but padding, which becomes black; MONOCHROME1 is inverted.
    raw_dicom: as MED-PEFT reads RSNA's films instead. The stored numbers x 255 / their maximum are
    rounded to 8 bits, without LUT, window and padding; MONOCHROME1 is inverted all the same."""
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
    except ImportError:
        raise InputError(f"{file.name}: DICOM needs pydicom: pip install 'pydicom>=3'") from None
    record = pydicom.dcmread(file, force=True)
    if int(record.get("NumberOfFrames") or 1) > 1:
        raise InputError(file.name, "one frame", record.NumberOfFrames)
    mend_dicom(record)
    raw, kind = record.pixel_array, record.PhotometricInterpretation
    if raw_dicom and raw.min() < 0:
        raise InputError(file.name, "no number below 0 for --raw-dicom", raw.min())
    if raw_dicom:
        pixels = (raw * (255 / (raw.max() or 1))).round().astype(np.uint8)
        return 255 - pixels if kind == "MONOCHROME1" else pixels
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(raw, record).astype(np.float64)
    else:
        pixels = apply_voi_lut(apply_modality_lut(raw, record), record).astype(np.float64)
    inside = np.ones(raw.shape, bool)
    if record.get("PixelPaddingValue") is not None:
        value, limit = record.PixelPaddingValue, record.get("PixelPaddingRangeLimit")
        low, high = sorted([value, value if limit is None else limit])
        inside = (raw < low) | (raw > high)
    if inside.any():
        pixels = stretch(pixels, pixels[inside])
    if kind == "MONOCHROME1":  # a large number is dark
        pixels = 1 - pixels
    pixels[~inside] = 0
    return pixels


def mend_dicom(record):
    """Takes the default for what some devices leave blank in a DICOM record, and says so once."""
    for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        if name in record and record[name].is_empty:
            say_once(f"DICOM with a blank {name}: taken as {default}")
            setattr(record, name, default)
    width, centre = np.ravel(record.get("WindowWidth") or 0)[0], record.get("WindowCenter")
    if ("WindowWidth" in record or "WindowCenter" in record) and (width < 1 or centre is None):
        say_once("DICOM with a window of no width or centre: read without a window")
        record.pop("WindowWidth", None)
        record.pop("WindowCenter", None)
    if "PixelData" in record and not record.file_meta.get("TransferSyntaxUID"):
        say_once("DICOM without a transfer syntax: read as little endian")
        record.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"


def read_nifti(file):
    """The NIfTI image in an open file, compressed or not."""
    try:
        import nibabel
    except ImportError:
        raise InputError(f"{file.name}: NIfTI needs nibabel: pip install nibabel") from None
    content = file.read()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    kind = nibabel.Nifti2Image if content[4:8] == b"n+2\0" else nibabel.Nifti1Image
    return kind.from_bytes(content)


def stretch(pixels, among):
    """`pixels`, scaled so that the minimum of `among` is at 0 and its maximum at 1."""
    low, high = among.min(), among.max()
    return (pixels - low) / (high - low or 1)


def full_scale(highest):
    """White in 16-bit files with values up to `highest`; many of them hold only 8 to 14 bits."""
    return next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if highest < 2**bits)


def read_image(path, short_side=None, deep=None, enlarge=True, raw_dicom=False, mode="bicubic"):
    """Reads an image file as grey: float32 (1, H, W) in [0, 1].

    short_side: pixels of the shorter side after a `resize` in the mode `mode` (None: full size),
    which leaves smaller images as they are where not `enlarge`. Pictures, and unsigned .npy of 8 or
    16 bits, are divided by their full scale, which for 16 bits is `deep` (None or 0: `full_scale`
    of this file's largest value). Other numbers are stretched from minimum to maximum where they
    leave [0, 1]. Colour becomes grey by ITU-R 601. raw_dicom: see `read_dicom`."""
    pixels, white = read_pixels(path, short_side, grey=True, raw_dicom=raw_dicom)
    if white is None and pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        white = np.iinfo(pixels.dtype).max
    if white == 65535:
        if deep == 0:
            say_once("images of 16 bits, unlike those looked at: each has a white of its own")
        white, highest = deep or full_scale(pixels.max()), pixels.max()
        if highest > white:
            raise InputError(path, f"values up to {white}, as in the other 16-bit images", highest)
    if white is None:
        pixels = pixels.astype(np.float64)
        if pixels.min() < 0 or pixels.max() > 1:
            pixels = stretch(pixels, pixels)
    if pixels.dtype != np.uint8:  # 8 bits stay as they are until they are resized
        pixels = (pixels / np.float32(white or 1)).astype(np.float32)
    image = torch.from_numpy(pixels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    shorter = min(image.shape[1:])
    if short_side and short_side != shorter and (enlarge or short_side < shorter):
        image = resize(image, short_side, mode)
    if image.dtype == torch.uint8:
        image = image.float() / 255
    if len(image) == 3:
        image = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return image


def common_scale(*lists):
    """White of the 16-bit files in some lists of paths: `full_scale` of the largest value in 32
    files of each list, 0 where none of them has 16 bits. It is said where it is below 65535."""
    highest = 0
    for path in itertools.chain(*(paths[:: math.ceil(max(1, len(paths)) / 32)] for paths in lists)):
        try:
            pixels, white = read_pixels(path, short_side=1)
        except InputError:
            continue  # the error is raised when the image is read for use
        if white == 65535 or (white is None and pixels.dtype.str[1:] == "u2"):
            highest = max(highest, int(pixels.max()))
    scale = full_scale(highest) if highest else 0
    if scale and scale < 65535:
        say_once(f"no value above {highest} in the 16-bit images looked at: {scale} is white")
    return scale


def over_images(function, paths, verb="reading images"):
    """[function(path) for path in paths] with a progress bar, many paths in a process per core.
    `function` can be pickled. (Threads fight for Python's lock and take twice the time of none.)"""
    bar = functools.partial(tqdm, desc=verb, total=len(paths), leave=False, delay=1)
    processes = cores()
    if processes == 1 or len(paths) < 200:
        return list(bar(map(function, paths)))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
            return list(bar(pool.map(function, paths, chunksize=16)))
    except BrokenProcessPool:
        reason = "too little memory, or a script without `if __name__ == '__main__':`"
        raise InputError(f"the processes that are {verb} ended: {reason}") from None


def pixel_hash(path):
    """(hash of the decoded pixels, "") of an image, ("", what is wrong) where it is unreadable."""
    try:
        pixels = read_image(path).numpy()
        return hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest(), ""
    except InputError as error:
        return "", str(error)


def readable(paths):
    """The indices of the images that can be read, for --skip-bad: each is decoded once here.
    Says how many are left out, and refuses paths of which none is left."""
    wrong = [reason for _, reason in over_images(pixel_hash, paths)]
    keep = [i for i, reason in enumerate(wrong) if not reason]
    first = next(filter(None, wrong), "")
    if not keep:
        raise InputError(f"{first}; no other image is left")
    if first:
        count = f"{len(wrong) - len(keep)} of {len(wrong)}"
        warn(f"{count} images cannot be read and are left out, the first: {first}")
    return keep


def list_images(folder):
    """Every image below a folder, sorted paths. Linked folders are followed, each folder once.
    A file without a known ending is an image where its first bytes say so; the number of other
    files is said."""

    def stop(error):
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    paths, others, seen = [], [], set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders.sort(key=lambda name: os.path.islink(os.path.join(place, name)))  # links come last
        for path in (os.path.join(place, name) for name in files if name[0] != "."):
            known = split_ending(path)[1]
            if not known and os.path.isfile(path) and os.access(path, os.R_OK):
                with open(path, "rb") as file:
                    known = file_kind(file)
            (paths if known else others).append(path)
    if others:
        first = min(others)
        note(f"{folder}: {len(others)} files are no images and left out, such as {first}")
    if not paths:
        raise InputError(folder, f"a folder with images ({', '.join(IMAGE_SUFFIXES)})", "none")
    return sorted(paths)


# --------------------------------------------------------------------------------------------------
# Text files: lines, JSON, CSV, the names of images


def read_lines(path):
    """The lines of a text file that are not blank, as (line number, text)."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_header(path):
    """The names of the columns of a CSV; none of an empty file."""
    lines = read_lines(path)
    return [name.strip() for name in next(csv.reader([lines[0][1]]))] if lines else []


def read_csv(path, columns):
    """The rows of a CSV as (line at which it begins, value of each of `columns`). A field that
    holds further rows is refused: a quote that is not closed takes in everything up to the next."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if not set(columns) <= set(header):
            found = ", ".join(header) or "an empty file"
            raise InputError(f"{path}: line 1", f"the columns {', '.join(columns)}", found)
        places = [header.index(name) for name in columns]
        line = reader.line_num + 1
        for row in reader:
            if row and (len(row) <= max(places) or any(row[len(header) :])):
                found = f"{len(row)}; text with commas stands in double quotes"
                raise InputError(f"{path}: line {line}", f"{len(header)} fields", found)
            for field in row:
                for piece in re.split(r"[,\n]", field)[1:]:
                    if "\n" in field and split_ending(piece.strip())[1]:
                        found = f"{piece.strip()!r} in a field of it; a double quote is not closed"
                        raise InputError(f"{path}: line {line}", "one row", found)
            if row:
                yield line, *(row[place].strip() for place in places)
            line = reader.line_num + 1
    except csv.Error as error:
        reason = f"not readable as CSV ({error}); is a double quote not closed?"
        raise InputError(f"{path}: line {line}: {reason}") from None


def plain_name(name):
    """A name as every list writes it: `a/b.png`, whatever its slashes, `./`, quotes and spaces."""
    name = name.strip().strip('"').replace("\\", "/")
    return os.path.normpath(name) if "//" in name or "./" in name else name


def image_keys(root, names):
    """What identifies the image of each name or path: its path below the root, without a leading
    images/ and without the ending."""
    root = os.path.join(str(root or "."), "")
    whole = os.path.join(os.path.abspath(root), "")  # names may be absolute where the root is not
    names = (plain_name(str(name).removeprefix(root).removeprefix(whole)) for name in names)
    return [split_ending(name.removeprefix("images/"))[0] for name in names]


# --------------------------------------------------------------------------------------------------
# Data sets as lists, in the published layouts

# The folder of the images below the root, the list of each part (training lists by the percentage
# of labels), and the classes in the order of the labels, which a classes.txt at the root, one name
# a line, replaces.
NIH_CLASSES = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
]
CHEXPERT_CLASSES = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
LISTS = {"train": {1: "train_1.txt", 10: "train_10.txt", 100: "train_list.txt"},
         "val": "val_list.txt", "test": "test_list.txt"}
DATASETS = {
    "demo": {"images": "images", "classes": None, **LISTS},
    "csv": {"images": "images", "classes": None, **LISTS},
    "nih": {"images": "images", "or": "all_classes", "classes": NIH_CLASSES, **LISTS},
    "rsna": {"images": "", "classes": ["Pneumonia"], **LISTS},
    "chexpert": {"images": "", "classes": CHEXPERT_CLASSES, **LISTS},
    "covid": {"images": "images", "classes": ["COVID-19"],
              "train": {100: "splits/{split}/train.txt"},
              "val": "splits/{split}/val.txt", "test": "splits/{split}/test.txt"},
}
NUMBER = re.compile(r"-?\d+(\.\d*)?(e-?\d+)?")


def demo_root(root="", pairs=False):
    """The folder of the demo records (default: demo), or of the demo pairs in it, drawn on first
    use. Under torchrun one process draws the records."""
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


def split_files(data, root, split="", ratio=100):
    """The list files of a layout: {"train": path, "val": path, "test": path}. Where --data, --root,
    --split and --ratio do not fit, the error says what there is."""
    layout, root = DATASETS[data], Path(root or ".")
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder")
    if "{split}" in layout["val"]:
        lists = [*root.glob("splits/*/train.txt"), *root.glob("*/is*_train.txt")]
        splits = sorted(path.parent.name for path in lists)
        if split not in splits:
            there = " or ".join(splits) or "(none there: no splits/*/train.txt)"
            raise InputError(f"--data {data} --root {root}", f"--split {there}", split or "none")
    elif split:
        raise InputError(f"--data {data}", "no --split", f"{split}; the data with splits: covid")
    if ratio not in layout["train"]:
        ratios = " or ".join(map(str, layout["train"]))
        raise InputError(f"--data {data}", f"--ratio {ratios}", ratio)
    names = {"train": layout["train"][ratio], "val": layout["val"], "test": layout["test"]}
    files = {part: root / name.format(split=split) for part, name in names.items()}
    if split and not (root / "splits").is_dir():  # the official code's names
        for part, path in files.items():
            files[part] = next(root.glob(f"{split}/is*_{part}.txt"), path)
    for path in files.values():
        if not path.is_file():
            there = ", ".join(sorted(os.listdir(root))[:12]) or "nothing"
            needs = f"which --data {data} --ratio {ratio} needs"
            raise InputError(f"{path}: no such list, {needs}; {root} holds {there}")
    return files


def class_names(data, root, split, count):
    """The names of the `count` classes: ROOT/classes.txt, else the layout's, else numbers."""
    numbered = [f"class {i + 1}" for i in range(count)]
    where, classes = f"--data {data}", DATASETS[data]["classes"] or numbered
    path = Path(root or ".") / "classes.txt"
    if path.exists():
        where, classes = path, [line for _, line in read_lines(path)]
    elif data == "covid" and split.startswith("viral"):
        classes = ["Viral"]
    if len(classes) != count:
        found = f"{len(classes)}: {', '.join(classes)}"
        raise InputError(where, f"{count} classes, as the lists have labels", found)
    return classes


def split_line(line):
    """`name l1 ... lk` or `name,l1,...,lk` as (name, labels): numbers at the end are labels, and a
    name may hold spaces."""
    name, *labels = [field.strip() for field in line.split(",")]
    if labels and (split_ending(name.strip('"'))[1] or all(map(NUMBER.fullmatch, labels))):
        return plain_name(name), labels
    words = reversed(line.split()[1:])
    labels = list(itertools.takewhile(NUMBER.fullmatch, words))[::-1]
    return plain_name(line.rstrip().rsplit(None, len(labels))[0]), labels


def read_list(path, num_labels=None, skip_bad=False):
    """Reads a list file, `name l1 ... lk` a line: (names, labels float32 (n, k)).
    k is `num_labels`, or what most of the first lines have: 0 in a list of names only. Another
    number of labels, a label that is not 0 or 1 and a name listed twice are refused with their
    line; `skip_bad` leaves such lines out and says so."""
    lines = [(number, *split_line(line)) for number, line in read_lines(path)]
    if not lines:
        raise InputError(path, "a line `name label ...` an image", "an empty list")
    k = num_labels
    if k is None:
        k = Counter(len(labels) for _, _, labels in lines[:1000]).most_common(1)[0][0]
    first_line, rows, bad = {}, [], []
    for number, name, labels in lines:
        if len(labels) != k or not set(labels) <= {"0", "1"}:
            expected = "1 label" if k == 1 else f"{k} labels"
            expected += f", each 0 or 1, after {name!r}"
            found = " ".join(labels) or "none"
            bad.append(f"line {number}: expected {expected}, found {found}")
        elif name in first_line:
            bad.append(f"line {number}: {name!r} is listed before, in line {first_line[name]}")
        else:
            first_line[name] = number
            rows.append(labels)
    if bad and not (skip_bad and rows):
        advice = f"correct the list, or leave out such lines ({len(bad)}) with --skip-bad-lines"
        raise InputError(f"{path}: {bad[0]}; {advice}")
    if bad:
        warn(f"{path}: {len(bad)} of {len(lines)} lines left out, the first: {bad[0]}")
    return list(first_line), torch.from_numpy(np.array(rows, np.float32).reshape(len(rows), k))


# --------------------------------------------------------------------------------------------------
# Data sets as tables of labels, as they are published or as people write them
#
# Lists go before a table. A table is divided into parts by patient.

TABLES = {  # the file at the root, its column of images, those that it may have, the findings
    "csv": ("labels.csv", "image", ["patient", "split"], None),
    "nih": ("Data_Entry_2017.csv", "Image Index", ["Patient ID"], ["Finding Labels"]),
    "chexpert": ("train.csv", "Path", [], CHEXPERT_CLASSES),
    "rsna": ("stage_2_train_labels.csv", "patientId", [], ["Target"]),
}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def find_table(data, root):
    """The table of a data set at `root` that has no lists, else None."""
    root = Path(root or ".")
    if data not in TABLES or (root / "val_list.txt").exists():
        return None
    path = root / TABLES[data][0]
    return path if path.is_file() else None


def table_columns(data, path):
    """The column of the images of a table, and its classes."""
    if data != "csv":
        return TABLES[data][1], DATASETS[data]["classes"]
    header = read_header(path)
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(f"{path}: line 1", "names that differ", f"{twice[0]!r} twice")
    classes = [name for name in header[1:] if name not in ("patient", "split")]
    for name in classes:
        if re.sub(r"\W|_|id$", "", name.lower()) in ("", "patient", "split"):
            expected = "names of findings, `patient` and `split`"
            raise InputError(f"{path}: line 1", expected, f"a column {name!r}")
    if header[:1] != ["image"] or not classes:
        expected = "a header `image,finding,...`, perhaps with patient and split"
        raise InputError(f"{path}: line 1", expected, ",".join(header) or "an empty file")
    return "image", classes


def table_rows(data, path, uncertain):
    """The rows of a table: (line, name, labels, patient or "", part or ""). A label is 0, 1, blank
    (0), or CheXpert's -1, which is `uncertain`."""
    values = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}
    if data == "chexpert":
        unsure = {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}[uncertain]
        values |= {"-1": unsure, "-1.0": unsure}
    column, classes = table_columns(data, path)
    _, _, others, findings = TABLES[data]
    findings, header = findings or classes, read_header(path)
    others = [name for name in others if name in header]
    for line, name, *cells in read_csv(path, [column, *findings, *others]):
        cells, other = cells[: len(findings)], dict(zip(others, cells[len(findings) :]))
        if data == "nih":
            found = set(cells[0].split("|")) - {"No Finding"}
            cells = [str(int(name in found)) for name in classes] + sorted(found - set(classes))
        if not name or not set(cells) <= values.keys():
            wrong = next((cell for cell in cells if cell not in values), "no image")
            allowed = "0, 1 or blank" + " (or -1)" * (data == "chexpert")
            expected = f"an image and labels that are {allowed}"
            raise InputError(f"{path}: line {line}", expected, repr(wrong))
        part = other.get("split", "").lower()
        if part not in ("", *SPLITS):
            raise InputError(f"{path}: line {line}: split", "train, val or test", repr(part))
        if data == "rsna":
            name = f"stage_2_train_images/{name}.dcm"
        name = plain_name(name).removeprefix("CheXpert-v1.0-small/")
        patient = other.get("patient", other.get("Patient ID", ""))
        yield line, name, [values[cell] for cell in cells], patient, SPLITS.get(part, "")


def read_rows(data, root, uncertain="ones"):
    """The rows of a table, {name: (labels, patient or None, part or "")}, with the parts that NIH
    and CheXpert publish beside it; and whether these name the whole test part."""
    path, rows, first = find_table(data, root), {}, {}
    for line, name, labels, patient, part in table_rows(data, path, uncertain):
        if name in rows and data != "rsna":
            before = f"is listed before, in line {first[name]}"
            raise InputError(f"{path}: line {line}: {name!r} {before}")
        if name in rows:  # RSNA has a row for each box
            labels = list(map(max, labels, rows[name][0]))
        first.setdefault(name, line)
        rows[name] = labels, patient, part
    if data == "chexpert" and (root / "valid.csv").is_file():
        for _, name, labels, patient, _ in table_rows(data, root / "valid.csv", uncertain):
            rows[name] = labels, patient, "test"
    given = nih_parts(root) if data == "nih" else {}
    if "" in given.values():  # train_val_list.txt is there, and its images alone are trained on
        lost = [name for name in rows if name not in given]
        if lost:
            lists = "neither train_val_list.txt nor test_list.txt and are left out"
            count = f"{len(lost)} of {len(rows)}"
            print(f"WARNING: {path}: {count} images are in {lists}, the first: {lost[0]}")
        rows = {name: row for name, row in rows.items() if name in given}
    for known, (name, (labels, patient, part)) in zip(patient_ids(root, rows), rows.items()):
        rows[name] = labels, patient or known, part or given.get(name, "")
    return rows, bool(given) or data == "chexpert"


def nih_parts(root):
    """What NIH's own lists say of its images: {name: "test", or "" for train or val}."""
    given = {}
    for part, list_name in (("", "train_val_list.txt"), ("test", "test_list.txt")):
        path = root / list_name
        for line, text in read_lines(path) if path.is_file() else []:
            name = plain_name(text)
            if given.setdefault(name, part) != part:
                raise InputError(f"{path}: line {line}: {name!r} is in train_val_list.txt as well")
    return given


def read_table(data, root, ratio=100, uncertain="ones"):
    """The table of a data set as {part: (names, labels float32 (n, k), NaN where unknown)}.

    The parts are those that the set publishes or the column `split` names. What they leave open
    follows its patient, so that no patient is trained and tested on, or is split by a hash of the
    patient alone: 70 % train, 10 % val, 20 % test, the same in every run. `ratio`: the percent of
    the training patients that are taken, by another hash."""
    path, root = find_table(data, root), Path(root or ".")
    rows, test_is_given = read_rows(data, root, uncertain)
    part_of, several = {}, set()
    for _, patient, part in rows.values():
        if patient and part and part_of.setdefault(patient, part) != part:
            several.add(patient)
    if several:
        those = f"{len(several)} patients have images in several parts, one is {min(several)}"
        print(f"WARNING: {path}: {those}: their test scores are too good")
    parts = {"train": ([], []), "val": ([], []), "test": ([], [])}
    for name, (labels, patient, part) in rows.items():
        digest = hashlib.sha256((patient or name).encode()).digest()
        chance, other = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
        if test_is_given:
            chance *= 0.8
        part = part or part_of.get(patient)
        if not part:
            part = "train" if chance < 0.7 else "val" if chance < 0.8 else "test"
        if part != "train" or other < ratio / 100:
            parts[part][0].append(name)
            parts[part][1].append(labels)
    for part, (names, _) in parts.items():
        if not names:
            advice = "; a column `split` names the parts" * (data == "csv")
            found = f"none among {len(rows)}{advice}"
            raise InputError(path, f"images of the part {part}", found)
    return {part: (names, torch.tensor(labels)) for part, (names, labels) in parts.items()}


def name_chexpert_test(count):
    """Says in one line which of CheXpert's published lists a test part of `count` images is."""
    return {234: "CheXpert's 234 validation images, on which MRM tests",
            668: "CheXpert's own 668 test images, on which MED-PEFT tests"}.get(
                count, f"{count} images, neither the 234 on which MRM tests nor MED-PEFT's 668")


# --------------------------------------------------------------------------------------------------
# The images of a list, with their reports and masks


def locate(data, root, names, allow_outside=False):
    """The path of each image, named relative to the layout's image folder or to the root, with its
    ending in any case or without it. None stands for a name that is not there, "" for one that
    leads out of the root, unless `allow_outside`."""
    root, layout = str(root or "."), DATASETS[data]
    folders = (layout["images"], layout.get("or", ""), "")
    folders = list(dict.fromkeys(os.path.join(root, folder) for folder in folders))
    inside = os.path.join(os.path.abspath(root), "")

    @functools.cache
    def listing(folder):
        """The files of a folder by their names with the ending in lower case, and without it."""
        there = {}
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            stem, ending = split_ending(file)
            there[stem + ending.lower()] = os.path.join(folder, file)
            there.setdefault(stem, os.path.join(folder, file))
        return there

    def find(name):
        name = plain_name(name)
        places = [os.path.join(folder, name) for folder in folders]
        if not allow_outside and (".." in name or os.path.isabs(name)):
            places = [place for place in places if os.path.abspath(place).startswith(inside)]
        stem, ending = split_ending(os.path.basename(name))
        similar = (listing(os.path.dirname(place)).get(stem + ending.lower()) for place in places)
        for place in itertools.chain(places, filter(None, similar)):
            if os.path.isfile(place):
                return place
        return None if len(places) == len(folders) else ""

    return list(map(find, names))


def find_images(data, root, names, source, allow_outside=False):
    """The path of every name in the list or CSV `source`, as `locate` finds it. A name that is
    missing or leads out of the root is refused with its line."""
    paths = locate(data, root, names, allow_outside)
    wrong = [i for i, path in enumerate(paths) if not path]
    if wrong:
        name, path, line = names[wrong[0]], paths[wrong[0]], "?"
        whole = re.compile(rf"(?<![\w./-])(\./)*{re.escape(name)}(?![\w.-])")  # and no part of one
        for number, text in read_lines(source):
            if whole.search(text.replace("\\", "/")) or split_line(text)[0] == name:
                line = number
                break
        folder = os.path.join(root or ".", DATASETS[data]["images"])
        where = f"{folder} or {root or '.'}"
        reason = f"no image {name!r} in {where} ({len(wrong)} of {len(names)} are missing)"
        if path == "":
            reason = f"{name!r} leads out of {root or '.'}; --allow-outside reads such images"
        raise InputError(f"{source}: line {line}: {reason}")
    return paths


def read_reports(path, root, allow_outside=False):
    """The records of a training.csv (image_path, report_content): (image paths, reports).
    A report may be empty."""
    rows = list(read_csv(path, ("image_path", "report_content")))
    for line, name, _ in rows:
        if not name:
            raise InputError(f"{path}: line {line}", "an image and its report", "no image_path")
    if not rows:
        raise InputError(path, "records below the header", "none")
    names, reports = [plain_name(name) for _, name, _ in rows], [report for *_, report in rows]
    return find_images("csv", root, names, path, allow_outside), reports


class Runs(NamedTuple):
    """The mask of an image in a CSV of run lengths: where it stands, whether its starts are
    absolute, and the text of each of its rows."""

    where: str
    absolute: bool
    rows: list


def find_masks(masks, keys, paths, empty=()):
    """The mask of each image, as `read_mask` takes it: a file, `Runs`, or None for an empty one.

    masks: a folder with files KEY.png (`image_keys`), or SIIM's CSV of run lengths. empty: the
    indices of the images that may have no file."""
    masks = Path(masks)
    if masks.is_file():
        return find_runs(masks, [os.path.basename(key) for key in keys])
    if not masks.is_dir():
        raise InputError(f"--masks {masks}: no such folder or CSV")
    found = [masks / f"{key}.png" for key in keys]
    lost = [i for i, path in enumerate(found) if not path.is_file() and i not in empty]
    if lost:
        image = f"{paths[lost[0]]} ({len(lost)} of {len(paths)} are missing)"
        raise InputError(f"{found[lost[0]]}: no such mask, of the image {image}")
    return [str(path) if path.is_file() else None for path in found]


def find_runs(path, keys):
    """The `Runs` of each image in SIIM's CSV (ImageId, EncodedPixels). An image may have several
    rows, of pairs `start length` or of -1, which stands for no mask. Starts are counted from the
    end of the last run or, where they rise in every row, from the first pixel, which is 1."""
    runs, absolute = {}, None
    for line, name, text in read_csv(path, ("ImageId", "EncodedPixels")):
        where = f"{path}: line {line}: {name}"
        if not re.fullmatch(r"-1|\d+ [1-9]\d*( \d+ [1-9]\d*)*", text):
            raise InputError(where, "-1 or pairs `start length`", text[:40] or "nothing")
        first = runs.setdefault(split_ending(os.path.basename(name))[0], Runs(where, False, []))
        first.rows.append(text)
        if "-1" in first.rows and set(first.rows) != {"-1"}:
            raise InputError(where, "either -1 or runs in the rows of an image", "both")
        numbers = list(map(int, text.split()))
        if len(numbers) > 2:
            ends = map(sum, zip(numbers[::2], numbers[1::2]))
            rises = all(start >= end for start, end in zip(numbers[2::2], ends))
            absolute = rises and absolute is not False
    lost = [key for key in keys if key not in runs]
    if lost:
        count = f"{len(lost)} of {len(keys)}"
        raise InputError(f"{path}: no row of the image {lost[0]} ({count} are missing)")
    say_once(f"{path}: the starts of runs are {'absolute' if absolute else 'relative'}")
    return [runs[key]._replace(absolute=bool(absolute)) for key in keys]


def is_empty(source):
    """Whether a mask, as `find_masks` gives it, is known to be empty before its file is read."""
    return source is None or (isinstance(source, Runs) and "-1" in source.rows)


def read_mask(source, shape, path):
    """The mask of the image `path`, which is `shape` (H, W) large: bool (H, W). See `find_masks`.
    A file holds 0 and one other value."""
    if is_empty(source):
        return np.zeros(shape, bool)
    if isinstance(source, Runs):
        return decode_runs(source, shape, path)
    pixels, _ = read_pixels(source, grey=True)
    if pixels.shape != tuple(shape):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}" if pixels.ndim == 2 else "colour"
        expected = f"a mask of {shape[1]} x {shape[0]} pixels, as {path}"
        raise InputError(source, expected, found)
    values = np.unique(pixels)
    if values[0] != 0 or len(values) > 2:
        found = f"{len(values)} values from {values[0]} to {values[-1]}"
        found += "; save it as PNG, without smoothing"
        raise InputError(source, "a mask of the values 0 and one other", found)
    return pixels > 0


def decode_runs(source, shape, path):
    """The mask of `Runs`, which go down the columns."""
    flat = np.zeros(shape[0] * shape[1], bool)
    for row in source.rows:
        numbers, end = list(map(int, row.split())), 0
        for start, length in zip(numbers[::2], numbers[1::2]):
            start = start - 1 if source.absolute else end + start
            end = start + length
            if start < 0 or end > flat.size:
                expected = f"runs within the {flat.size} pixels of {path}"
                raise InputError(source.where, expected, f"pixels {start} to {end}")
            flat[start:end] = True
    return flat.reshape(shape[::-1]).T


# --------------------------------------------------------------------------------------------------
# Patients, and the films that a model was trained on

# The patient in a name of NIH's or CheXpert's
WRITTEN_PATIENT = re.compile(r"patient\d+|(?:^|/)\d{8}(?=_\d{3}$)")


def patient_table(root):
    """{key of an image: its patient} by patients.csv or records.csv (columns image_path,
    patient_id) at the root; empty without them."""
    tables = [Path(root or ".") / name for name in ("patients.csv", "records.csv")]
    table = next((path for path in tables if path.exists()), None)
    rows = list(read_csv(table, ("image_path", "patient_id"))) if table else []
    keys = image_keys(root, [name for _, name, _ in rows])
    return dict(zip(keys, [patient for *_, patient in rows]))


def patient_ids(root, names):
    """The patient of each name, None where unknown: by `patient_table`, else by the name as NIH
    (`00000013_005.png`) and CheXpert (`.../patient00007/...`) write it."""
    table, keys = patient_table(root), image_keys(root, names)
    written = [WRITTEN_PATIENT.search(key) for key in keys]
    return [table.get(key) or (found and found[0].strip("/")) for key, found in zip(keys, written)]


def not_excluded(paths, exclude, root):
    """The indices of the paths that are neither in the list file `exclude` nor of a patient in it.
    Warns of its names that are of no image and no patient among the paths."""
    listed = [split_line(line)[0] for _, line in read_lines(exclude)]
    theirs = list(zip(image_keys(root, listed), patient_ids(root, listed)))
    ours = list(zip(image_keys(root, paths), patient_ids(root, paths)))

    def alone(films, others):
        """The indices of the films whose image and patient are not among the others'."""
        keys, patients = {key for key, _ in others}, {patient for _, patient in others} - {None}
        return [i for i, film in enumerate(films) if film[0] not in keys
                and film[1] not in patients]

    lost = alone(theirs, ours)
    if lost:
        count, first = f"{len(lost)} of {len(theirs)}", theirs[lost[0]][0]
        here = "of no image here and of no patient of one"
        warn(f"{exclude}: {count} names are {here}, the first: {first!r}")
    return alone(ours, theirs)


def film_hashes(root, names):
    """Hashes of the image of each name and of its patient, where the name tells one, else None:
    two lists of the first 8 bytes of a sha256 as signed integers.

    Folders before the patient's part of a name do not count, so that copies of a data set that lie
    otherwise on disk agree. Drawn films are called like NIH's, and have hashes of their own."""
    drawn = "demo " if (Path(root or ".") / "demo.json").is_file() else ""

    def number(text):
        digest = hashlib.sha256((drawn + text).encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    films, patients = [], []
    for key in image_keys(root, names):
        written = WRITTEN_PATIENT.search(key)
        films.append(number("film " + (key[written.start() :].strip("/") if written else key)))
        patients.append(number("patient " + written[0].strip("/")) if written else None)
    return films, patients


def hash_films(root, names, *others):
    """What a checkpoint keeps of the films that it was trained on: their hashes and those of their
    patients, sorted, as one int64 tensor. `others`: such tensors of earlier training, or None."""
    films, patients = film_hashes(root, names)
    hashes = {*films, *patients} - {None}
    hashes.update(*(tensor.tolist() for tensor in others if tensor is not None))
    return torch.tensor(sorted(hashes), dtype=torch.int64)


def trained_on(root, names, hashes):
    """Which films were trained on, by `hashes` of `hash_films`: (those films, those of a patient
    with a film that was), two lists of bools. Patients are found by their name's part, and by
    `patient_table` where a trained film stands in it."""
    hashes = set(hashes.tolist())
    films, written = film_hashes(root, names)
    table = patient_table(root)
    known = {table[key] for key, film in zip(table, film_hashes(root, table)[0]) if film in hashes}
    both = zip(written, patient_ids(root, names))
    patients = [mark in hashes or patient in known for mark, patient in both]
    return [film in hashes for film in films], patients


def read_pretraining(path, root):
    """The hashes (`hash_films`) of the films in a list file or a CSV with a column image_path,
    image, Path or Image Index, or those that a checkpoint holds."""
    path = Path(path)
    if path.is_dir() or path.suffix in (".pt", ".pth"):
        path = checkpoint_file(path, "adapter.pt", "best.pt", "last.pt")
        hashes = load_checkpoint(path).get("trained_on")
        if not torch.is_tensor(hashes) or hashes.dtype != torch.int64:
            found = "one that does not; give the list that it was trained on"
            raise InputError(path, "a checkpoint that names its training films", found)
        return hashes
    lines = read_lines(path)
    if not lines:
        raise InputError(path, "a list of images", "an empty file")
    if path.suffix.lower() != ".csv":
        return hash_films(root, [split_line(line)[0] for _, line in lines])
    header, columns = read_header(path), ("image_path", "image", "Path", "Image Index")
    column = next((name for name in columns if name in header), None)
    if column is None:
        raise InputError(f"{path}: line 1", f"a column {' or '.join(columns)}", ", ".join(header))
    names = [name for _, name in read_csv(path, (column,))]
    return hash_films(root, [name.removeprefix("CheXpert-v1.0-small/") for name in names])


# --------------------------------------------------------------------------------------------------
# The report tokenizer

# A byte-level byte-pair encoding, trained on the reports at hand and run by tiktoken. Reports are
# put in lower case, since case says little in them, and runs of white space become one space. A
# word is a run of letters (any character beyond ASCII is a letter), of digits, or of punctuation,
# with the space before it; no token crosses words. In scripts without spaces (Chinese, Japanese,
# Thai, Lao, Burmese, Khmer) each character is a word. The vocabulary is the 256 bytes, the merges,
# then the special tokens.
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
            "\U00020000-\U0003ffff")
WORD = (rf" ?[{UNSPACED}]| ?[^\x00-@\[-`{{-\x7f{UNSPACED}]+| ?[0-9]+"
        r"| ?[\x00-\x1f!-/:-@\[-`{-\x7f]+")
SPECIAL = ("<pad>", "<mask>", "<eot>")


def split_words(report):
    """The words of a report in lower case, each with the space before it."""
    return re.findall(WORD, " " + " ".join(report.lower().split()))


def make_encoding(merges):
    """The tiktoken encoding of a list of byte strings, whose places are their ids."""
    return tiktoken.Encoding(
        "reports", pat_str=WORD, mergeable_ranks={token: i for i, token in enumerate(merges)},
        special_tokens={name: len(merges) + i for i, name in enumerate(SPECIAL)})


def train_tokenizer(reports, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016) of at most `vocab_size` tokens.
    Merges the most frequent pair of neighbours within words, ties to the smaller ids, until the
    vocabulary, special tokens included, is full or no pair occurs twice. Returns a
    tiktoken.Encoding."""
    if vocab_size < 256 + len(SPECIAL):
        expected = f"at least {256 + len(SPECIAL)}, the bytes and {', '.join(SPECIAL)}"
        raise InputError("vocabulary size", expected, vocab_size)
    counted = Counter(word for report in reports for word in split_words(report))
    words, counts = [list(word.encode()) for word in counted], list(counted.values())
    tokens = [bytes([i]) for i in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs; the words that held it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]  # most frequent, smallest ids first
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - len(SPECIAL):
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair] or count > -2:
            continue  # the count changed since, and the heap holds the new one; or it is below 2
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ids.setdefault(token, len(tokens))  # another pair may have made the same bytes
        if new == len(tokens):
            tokens.append(token)
        changed = Counter()
        for w in where.pop(pair):
            for old in zip(words[w], words[w][1:]):
                changed[old] -= counts[w]
            words[w] = merge(words[w], pair, new)
            for fresh in zip(words[w], words[w][1:]):
                changed[fresh] += counts[w]
                where[fresh].add(w)
        for other, change in changed.items():
            pairs[other] += change
            if change and pairs[other] > 1:
                heapq.heappush(heap, (-pairs[other], other))
    return make_encoding(tokens)


def merge(word, pair, new):
    """The token ids `word` with each neighbouring `pair` replaced by `new`."""
    merged = []
    for token in word:
        merged.append(token)
        if tuple(merged[-2:]) == pair:
            merged[-2:] = [new]
    return merged


def save_tokenizer(enc, path):
    """Writes tiktoken's format: a line per token, its bytes in base64 and its id."""
    tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - len(SPECIAL))]
    text = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    atomic_write(path, lambda file: file.write(text))


def load_tokenizer(path):
    """Reads what `save_tokenizer` wrote."""
    tokens = []  # tiktoken's own loader keeps a copy by path and would miss that the file changed
    for i, line in enumerate(read_text(path).splitlines()):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            if int(rank) != i:
                raise ValueError
        except ValueError:
            expected, found = f"a token in base64 and its rank {i}", repr(line[:60])
            raise InputError(f"{path}: line {i + 1}", expected, found) from None
    if len(set(tokens)) < len(tokens) or not set(tokens) >= {bytes([i]) for i in range(256)}:
        raise InputError(path, "different tokens, all 256 bytes among them", "a damaged file")
    return make_encoding(tokens)


def encode_reports(enc, reports, length):
    """Encodes reports, cut to `length` tokens: (tokens (n, L), words (n, L)), both int64.
    words[i, j] is the number, from 0, of the word of report i that holds token j. Behind the end of
    a report tokens are <pad> and words -1."""
    tokens = torch.full((len(reports), length), enc.encode_single_token("<pad>"))
    words = torch.full((len(reports), length), -1)
    pieces = functools.cache(enc.encode_ordinary)
    for i, report in enumerate(reports):
        coded = [(token, w) for w, word in enumerate(split_words(report)) for token in pieces(word)]
        coded = torch.tensor(coded[:length]).reshape(-1, 2)
        tokens[i, : len(coded)], words[i, : len(coded)] = coded.T
    return tokens, words


def hide_words(enc, tokens, words, ratio, generator=None):
    """Hides round(ratio * words) of each report's words, at least one, with all their tokens.
    tokens, words: (B, L) from `encode_reports`. Returns (inputs, hidden): inputs carry <mask> where
    hidden (B, L) is True."""
    count = words.max(1).values + 1  # (B,)
    share = (ratio * count.double()).round().long().clamp(min=1).minimum(count)
    order = torch.rand(len(words), max(1, int(count.max())), generator=generator).to(words.device)
    beyond = torch.arange(order.shape[1], device=words.device) >= count[:, None]
    order[beyond] = 2.0  # ranks them behind all words that the report has
    chosen = order.argsort(1).argsort(1) < share[:, None]  # (B, words): by each word's rank
    hidden = chosen.gather(1, words.clamp(min=0)) & (words >= 0)
    return tokens.masked_fill(hidden, enc.encode_single_token("<mask>")), hidden


# --------------------------------------------------------------------------------------------------
# Crops, sets of images and their batches


def statistics(images, mean=None, std=None):
    """The (mean, std) that normalise images (B, C, H, W): those given, of a data set, or for None
    each image's own (B, 1, 1, 1)."""
    if mean is None:
        mean = images.mean((1, 2, 3), keepdim=True)
        std = (images - mean).square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3  # never 0
    return mean, std


def normalize(images, mean=None, std=None):
    """(images - mean) / std of images (B, C, H, W); `statistics` says which mean and std."""
    mean, std = statistics(images, mean, std)
    return (images - mean) / std


def resize(images, size, mode="bicubic"):
    """Resizes images (B, C, H, W) or (C, H, W), uint8 or in [0, 1], to (h, w), or to an int for
    the shorter side. Antialiased "bicubic" (Keys, a = -1/2, widened where it reduces) or
    "bilinear", as PIL's."""
    if isinstance(size, int):
        size = [round(side * size / min(images.shape[-2:])) for side in images.shape[-2:]]
    batch = images if images.ndim == 4 else images[None]
    batch = F.interpolate(batch, size, mode=mode, antialias=True)
    batch = batch if batch.dtype == torch.uint8 else batch.clamp_(0, 1)
    return batch if images.ndim == 4 else batch[0]


def resize_pair(pair, size, mode="bicubic"):
    """`resize` of an image and its mask (2, H, W) to `size` (h, w): the mask takes the value of the
    nearest pixel, so that it keeps two values."""
    mask = F.interpolate(pair[None, 1:].float(), size, mode="nearest-exact")[0]
    return torch.cat([resize(pair[:1], size, mode), mask.to(pair.dtype)])


def random_resized_crop(images, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None,
                        pair=False, mode="bicubic"):
    """A crop of random area (`scale`, of the image's) and aspect, resized to (size, size).
    images: (B, C, H, W), or a list of (C, H, W) of different sizes; returns (B, C, size, size), a
    crop of its own for each image. `pair`: the channels are an image and its mask; `mode`: see
    `resize`. Sampled as torchvision's RandomResizedCrop does: of ten tries the first that fits,
    else the central crop of the nearest aspect."""
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
    scaled = resize_pair if pair else resize
    crops = []
    for image, (y, x, height, width) in zip(images, boxes):
        crops.append(scaled(image[:, y : y + height, x : x + width], (size, size), mode))
    return torch.stack(crops)


def random_flip(images, generator=None):
    """Mirrors each of (B, C, H, W) left-right with probability 1/2. Not for images whose labels or
    reports tell left from right."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


def read_bytes(path, short_side, deep=None, **reading):
    """`read_image`, rounded to 8 bits: uint8 array (1, H, W)."""
    return (read_image(path, short_side, deep, **reading) * 255).round_().byte().numpy()


def read_pair(item, side, deep=None, raw_dicom=False, mode="bicubic"):
    """An image and its mask, both squeezed into a square: uint8 (2, side, side), the mask 0 or 255.
    item: (path, the mask as `find_masks` gives it)."""
    image = read_image(item[0], deep=deep, raw_dicom=raw_dicom)
    mask = torch.from_numpy(np.ascontiguousarray(read_mask(item[1], image.shape[1:], item[0])))
    pair = resize_pair(torch.cat([image, mask[None].float()]), (side, side), mode)
    return (pair * 255).round_().byte().numpy()


# What decodes an image: this file and two libraries. Pixels of other versions are not taken
VERSIONS = f"{torch.__version__} {PIL.__version__}".encode()
DECODER = hashlib.sha256(Path(__file__).read_bytes() + VERSIONS).hexdigest()


def read_cached(reader, folder, item, fill=False):
    """`reader(item)` (see `ImageSet.reader`) as a uint8 array (C, H, W), by way of a file below
    `folder`, which is mapped into memory: all processes share its pages. `fill` only makes it.

    Its name stands for the item and the reader's options. It holds a stamp (32 bytes) of `DECODER`
    and of the sizes, times and inodes of the image and its mask, the crc32 of what follows (4),
    the shape (12) and the pixels. Where stamp or crc32 do not fit, the image is read again and the
    file replaced. Raises InputError where it cannot be written."""
    path, *mask = [item] if isinstance(item, str) else item
    try:
        states = [os.stat(file) for file in (path, *mask) if isinstance(file, str)]
    except OSError:
        return reader(item)  # which says what is wrong
    states = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in states]
    name = repr((reader.func.__name__, reader.keywords, os.path.abspath(path), mask))
    name = hashlib.sha256(name.encode()).hexdigest()
    stamp = hashlib.sha256(repr((DECODER, name, states)).encode()).digest()
    file = Path(folder, name[:2], name[2:])
    try:
        entry = np.memmap(file, np.uint8, "c")
        good = entry[:32].tobytes() == stamp
        if good and fill:
            return None
        if good and zlib.crc32(entry[36:]) == entry[32:36].view(np.uint32)[0]:
            pixels = entry[48:].reshape(entry[36:48].view(np.uint32))
            # Small ones are copied, because a process may map 65,530 files and no more
            return pixels if pixels.size > 2**16 else np.array(pixels)
    except (OSError, ValueError, IndexError):  # there is none, or one cut short
        pass
    pixels = reader(item)
    rest = np.array(pixels.shape, np.uint32).tobytes() + pixels.tobytes()
    entry = stamp + np.uint32(zlib.crc32(rest)).tobytes() + rest
    try:
        atomic_write(file, lambda file: file.write(entry), sync=False)
    except InputError as error:
        raise InputError(f"{error}; make room or give another --cache") from None
    return None if fill else pixels


class ImageSet(torch.utils.data.Dataset):
    """Grey images whose shorter side is `size`, as 8 bits, read when they are asked for.

    set[indices, draw] is a batch (images (B, 1, size, size) float32, indices) that passed through
    `augment(images, generator=)`, which gets (B, 1, H, W), or a list of (1, H, W) where shapes
    differ, and can be pickled. (seed, draw) seed the generator, so that neither workers nor
    resuming change it. Without `augment` it holds the centre crops of `crop` pixels a side
    (default: `size`). set[indices, draw, "later"] is (pixels of all films in a row, uint8, shapes,
    indices, draw), of which `finish` makes the same batch elsewhere. set[i] is (image, i). `deep`
    is white in 16-bit files (default: `common_scale`). `masks`, as `find_masks` gives them, make
    each item a whole image and its mask as two channels (2, size, size). `reading`: more of what
    `read_image` takes, such as enlarge. `folder` keeps the decoded images for the next run
    (`read_cached`)."""

    def __init__(self, paths, size, augment=None, seed=0, deep=None, masks=None, crop=None,
                 folder="", **reading):
        # One array: counting references to a list of strings would copy it into every worker.
        self.names = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.size, self.augment, self.seed, self.cache = size, augment, seed, None
        self.crop, self.reading = crop or size, reading
        self.deep, self.masks = common_scale(paths) if deep is None else deep, masks
        self.folder = folder

    @property
    def paths(self):
        return [self.path(i) for i in range(len(self))]

    def path(self, index):
        return os.fsdecode(self.names[index])

    def __len__(self):
        return len(self.names)

    def reader(self):
        """What reads one item, a path or a (path, mask), as a uint8 array."""
        size, deep = self.size, self.deep
        read = functools.partial(read_bytes, short_side=size, deep=deep, **self.reading)
        if self.masks is not None:
            read = functools.partial(read_pair, side=size, deep=deep, **self.reading)
        return functools.partial(read_cached, read, self.folder) if self.folder else read

    def read(self, index):
        """Image `index` as uint8 (1, H, W) with min(H, W) = size."""
        if self.cache is not None:
            return self.cache[index]
        path = self.path(index)
        item = path if self.masks is None else (path, self.masks[index])
        return torch.from_numpy(self.reader()(item))

    def preload(self, limit=2 * 2**30):
        """Decodes all images into `folder`, where there is one (each of torchrun's processes on
        this machine a share), and into memory, if they take less than `limit` bytes there. Returns
        self."""
        channels = 1 if self.masks is None else 2
        items = self.paths if self.masks is None else list(zip(self.paths, self.masks))
        if self.cache is None and self.folder:
            rank = int(os.environ.get("LOCAL_RANK", 0))
            share = items[rank :: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
            over_images(functools.partial(self.reader(), fill=True), share, "filling the cache")
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        if self.cache is None and channels * len(self) * self.size**2 * 1.25 < limit:
            images = [torch.from_numpy(image) for image in over_images(self.reader(), items)]
            same = len({image.shape for image in images}) == 1
            self.cache = torch.stack(images) if same else images
        return self

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            if not 0 <= key < len(self):
                raise IndexError(key)
            return self[[key], 0][0][0], key
        indices, draw, *later = torch.as_tensor(key[0]), *key[1:]
        if torch.is_tensor(self.cache):
            images = self.cache[indices]
        else:
            images = [self.read(i) for i in indices.tolist()]
        if later:  # one tensor, because each that a worker sends takes an open file
            shapes = [image.shape for image in images]
            return torch.cat([image.flatten() for image in images]), shapes, indices, draw
        if torch.is_tensor(images):
            images = images.float() / 255
        else:
            images = [image.float() / 255 for image in images]
        return self.finish(images, draw), indices

    def finish(self, images, draw):
        """The batch (B, C, side, side) of images in [0, 1] as they were read."""
        if self.augment is not None:
            return self.augment(images, generator=seeded(self.seed, draw))
        return torch.stack([self.centre(image) for image in images])

    def centre(self, image):
        """The (1, crop, crop) in the middle of an image (1, H, W)."""
        top, left = ((side - self.crop) // 2 for side in image.shape[1:])
        return image[:, top : top + self.crop, left : left + self.crop]


def load_batches(dataset, keys, workers):
    """dataset[key] for each key, in this process or prepared ahead by `workers` others."""
    if not workers:
        yield from map(dataset.__getitem__, keys)
        return
    try:
        context = "fork" if sys.platform == "linux" else None
        options = {"pin_memory": torch.cuda.is_available(), "multiprocessing_context": context}
        loader = torch.utils.data.DataLoader
        yield from loader(dataset, None, sampler=keys, num_workers=workers, **options)
    except InputError as error:  # a worker's error arrives with its traceback, the message last
        message = str(error).strip().split("\n")[-1]
        raise InputError(message.partition("InputError: ")[2]) from None


def train_batches(dataset, batch_size, start_step, steps, seed, rank=0, world=1, workers=0,
                  taken=None, crop_on=None):
    """Batches of the steps start_step ... steps - 1: (images, indices (B,)), B in each process.
    All steps together walk along one endless row of epochs, each a permutation seeded by (seed,
    epoch), or its first `taken` images; a step takes the next world * batch_size. So its number
    alone fixes what it holds. `crop_on`: a device that makes the crops, the same ones, of whole films
    that go there as 8 bits: at the paper's sizes a crop takes 4 ms of a core, too long for a GPU to
    wait. None: they are made where films are read."""
    taken = taken or len(dataset)

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return torch.randperm(len(dataset), generator=seeded(seed, epoch)).tolist()

    def keys():
        for step in range(start_step, steps):
            draw = step * world + rank
            places = range(draw * batch_size, (draw + 1) * batch_size)
            rows = [permutation(place // taken)[place % taken] for place in places]
            yield (rows, draw) if crop_on is None else (rows, draw, "later")

    if crop_on is None:
        yield from load_batches(dataset, keys(), workers)
        return
    for pixels, shapes, indices, draw in load_batches(dataset, keys(), workers):
        films = pixels.to(crop_on, non_blocking=True).float().div_(255)
        films = films.split([math.prod(shape) for shape in shapes])
        films = [film.view(shape) for film, shape in zip(films, shapes)]
        batch = dataset.finish(films, draw)
        del pixels, films  # whole films are large, and a step follows
        yield batch, indices


def eval_batches(dataset, batch_size, rank=0, world=1, workers=0):
    """Each image of this process's share once, in order: (images, indices (B,)); the last batch may
    be smaller."""
    share = range(rank, len(dataset), world)
    keys = [(list(share[i : i + batch_size]), 0) for i in range(0, len(share), batch_size)]
    return load_batches(dataset, keys, workers)


# --------------------------------------------------------------------------------------------------
# A/B pairs


def read_slice(path, rescale=None, blank=False):
    """A 2-D image as float32 (C, H, W) in [-1, 1], C = 1 or 3; background is exactly -1.

    .npy and NIfTI keep their numbers, which must lie in [-1, 1]; pictures run from -1 (black) to 1
    (full scale). `rescale` = (lo, hi) maps lo..hi to -1..1 instead and clips. Refused are sides
    below 32, constant images unless `blank`, and DICOM, whose numbers are stretched by file."""
    pixels, white = read_pixels(path)
    pixels = pixels.astype(np.float32)
    if white == 1:
        raise InputError(path, "a .npy, NIfTI, PNG, JPEG or TIFF slice", "DICOM; convert it")
    if min(pixels.shape[:2]) < 32:
        raise InputError(path, "at least 32 x 32 pixels", " x ".join(map(str, pixels.shape[:2])))
    low, high = float(pixels.min()), float(pixels.max())
    if low == high and not blank:
        reason = f"every value is {low:g}: nothing to learn or measure, remove the pair"
        raise InputError(f"{path}: a constant image, {reason}")
    span = rescale or (white and (0, white))
    if span:
        pixels = np.clip((pixels - span[0]) * (2 / (span[1] - span[0])) - 1, -1, 1)
    elif low < -1 or high > 1:
        found = f"{low:g} to {high:g}: --rescale LO,HI maps LO..HI to -1..1"
        raise InputError(path, "values from -1 to 1", found)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def write_slice(path, image, source, rescale=None):
    """Writes `image` (C, H, W) in [-1, 1] in the format of the file `source`.
    `rescale` = (lo, hi) are the numbers that stand for -1 and 1. .npy and NIfTI keep the type of
    `source` where it `holds` these, else become float32; a picture is then refused. A NIfTI keeps
    its header."""
    array = image.clamp(-1, 1).double().cpu().numpy().transpose(1, 2, 0)
    array = array[..., 0] if array.shape[2] == 1 else array
    low, high = rescale or (-1, 1)
    with open(source, "rb") as file:
        kind = file_kind(file)
        if kind == "npy":
            dtype = np.load(file).dtype
        elif kind == "nifti":
            like = read_nifti(file)
            dtype = like.get_data_dtype()
        else:
            with Image.open(file) as picture:
                form, mode = picture.format, picture.mode
            dtype = np.dtype({"I": np.uint16, "F": np.float32}.get(mode[0], np.uint8))
            if dtype.kind == "u" and not rescale:
                low, high = 0, np.iinfo(dtype).max
    if not holds(dtype, low, high):
        if kind == "picture":
            expected = f"a format that holds B's values, {low:g} to {high:g}"
            raise InputError(source, expected, f"{dtype} {form}; keep A as .npy or NIfTI")
        dtype = np.dtype(np.float32)
    values = (array + 1) * ((high - low) / 2) + low
    values = (values if dtype.kind == "f" else values.round()).astype(dtype)
    if kind == "npy":
        atomic_write(path, lambda file: np.save(file, values))
    elif kind == "nifti":
        header = like.header.copy()
        header.set_data_dtype(dtype)
        header["cal_min"] = header["cal_max"] = 0  # they describe A's values
        shape = like.shape if array.ndim == 2 else like.shape[:2] + (-1,)
        content = type(like)(values.reshape(shape), like.affine, header).to_bytes()
        content = gzip.compress(content) if str(path).lower().endswith(".gz") else content
        atomic_write(path, lambda file: file.write(content))
    else:
        quality = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
        atomic_write(path, lambda file: Image.fromarray(values).save(file, form, **quality))


def holds(dtype, low, high):
    """Whether a type holds the numbers from `low` to `high`, integers in 64 steps or more."""
    if dtype.kind == "f":
        limits = np.finfo(dtype)
    elif dtype.kind in "iu" and high - low >= 64:
        limits = np.iinfo(dtype)
    else:
        return False
    return float(limits.min) <= low and high <= float(limits.max)


def list_slices(folder):
    """The names of the images in a folder, sorted."""
    return [os.path.relpath(path, folder) for path in list_images(folder)]


def list_pairs(folder):
    """The names that `folder`/A and `folder`/B share; none may be on one side alone."""
    a, b = (set(list_slices(Path(folder) / side)) for side in "AB")
    lone = ""
    for side, names in (("A", sorted(a - b)), ("B", sorted(b - a))):
        if names:
            lone += f"; only in {side}: {', '.join(names[:5])} ({len(names)})"
    if lone:
        raise InputError(f"{folder}: A and B must hold the same file names{lone}")
    return sorted(a)


def pixel_grid(size):
    """The positions (2, H, W) of the pixels of an image of `size` (H, W), y first."""
    axes = (torch.arange(side, dtype=torch.float32) for side in size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


class RandomTransform:
    """A random map T from output to input positions, T(p) = M (p - c) + c + t + e(p), in pixels.
    M rotates by up to `degrees` and zooms within `percent` %, t shifts by up to `percent` % of the
    sides, and e is a bicubic surface through 5 x 5 control points whose displacements have a
    standard deviation of `elastic` % of the sides."""

    def __init__(self, rng, size, degrees, percent, elastic=0.0):
        sides = np.array(size, dtype=np.float32)
        angle = np.deg2rad(rng.uniform(-degrees, degrees))
        zoom = 1 + rng.uniform(-percent, percent) / 100
        M = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
        c, shift = (sides - 1) / 2, rng.uniform(-percent, percent, 2) / 100 * sides
        self.M, self.back = torch.from_numpy(M).float(), torch.from_numpy(np.linalg.inv(M)).float()
        self.offset = torch.from_numpy(c + shift - M @ c).float()[:, None]
        self.e = None
        if elastic:
            knots = rng.normal(0, elastic / 100, (1, 2, 5, 5)) * sides[:, None, None]
            knots = torch.from_numpy(knots).float()
            self.e = F.interpolate(knots, size, mode="bicubic", align_corners=True)  # (1, 2, H, W)

    def bend(self, p):
        """e at the positions p (2, H, W)."""
        return 0 if self.e is None else warp(self.e, (p - pixel_grid(p.shape[1:]))[None])[0]

    def __call__(self, p):
        return torch.addmm(self.offset, self.M, p.flatten(1)).view_as(p) + self.bend(p)

    def inverse(self, q):
        """The p with T(p) = q, to 0.001 pixels: by iterating p <- M^-1 (q - e(p) - offset)."""
        p = q
        for _ in range(1 if self.e is None else 30):
            last, p = p, (self.back @ ((q - self.bend(p)).flatten(1) - self.offset)).view_as(q)
            if (p - last).abs().max() < 1e-3:
                break
        return p


def move(image, p):
    """image (C, H, W) read at the positions p (2, H, W); background (-1) comes in from outside."""
    # `warp` repeats the border outside the image, so a border of background (0 after + 1) is added.
    flow = F.pad((p - pixel_grid(p.shape[1:]))[None], (1, 1, 1, 1))
    return warp(F.pad(image + 1, (1, 1, 1, 1))[None], flow)[0, :, 1:-1, 1:-1] - 1


def misalign(a, b, rng, noise, elastic=0.0, with_flow=True):
    """The paper's misalignment of level `noise`: a and b (C, H, W) each move by a random transform.

    Rotation up to `noise` degrees, shift up to 2 noise %, zoom within 2 noise %; at level 0 one
    small transform (1 degree, 2 %) moves both. `elastic` adds a bending field to each.
    Returns (a', b', flow), or (a', b') without `with_flow`. The flow (2, H, W), in pixels,
    registers them: f(a')[p + flow(p)] = b'[p] for a perfect translation f. Since a'[p] = a[Ta(p)]
    and b'[p] = b[Tb(p)], flow(p) = Ta^-1(Tb(p)) - p."""
    size = tuple(a.shape[-2:])
    p = pixel_grid(size)
    if noise == 0:
        ta = RandomTransform(rng, size, 1, 2)
        tb = copy.copy(ta)
        ta.e, tb.e = (RandomTransform(rng, size, 0, 0, elastic).e for _ in range(2))
    else:
        ta, tb = (RandomTransform(rng, size, noise, 2 * noise, elastic) for _ in range(2))
    pa, pb = ta(p), tb(p)
    moved = move(a, pa), move(b, pb)
    return (*moved, ta.inverse(pb) - p) if with_flow else moved


class Pairs(torch.utils.data.Dataset):
    """`folder`/A and `folder`/B as pairs (a, b), float32 (C, H, W), or (a, b, flow) with `noise`.

    An item is asked for by (epoch, index): `misalign` moves it anew every epoch, as in the official
    code, by a generator that (seed, epoch, index) fixes. All files are read once here, so that a
    bad one is found before anything is written, and kept where they fit in KEPT_BYTES. `noise` None
    leaves the pairs as they are. `size` > 0 scales the longer side to it and pads to a square.
    `with_flow` False leaves out the flow, which takes longer to compute than the pair."""

    KEPT_BYTES = 2**30

    def __init__(self, folder, noise=None, elastic=0.0, seed=0, size=0, rescale="", with_flow=True):
        self.folder, self.noise, self.elastic, self.seed = Path(folder), noise, elastic, seed
        self.size, self.with_flow, self.rescale = size, with_flow, parse_rescale(rescale)
        self.names, self.kept, first, highest = list_pairs(folder), {}, None, [-1.0, -1.0]
        for name in self.names:
            a, b = self.read(name)
            highest = [max(value, float(image.max())) for value, image in zip(highest, (a, b))]
            if (a.nbytes + b.nbytes) * len(self.names) <= self.KEPT_BYTES:
                self.kept[name] = a, b
            if a.shape[1:] != b.shape[1:]:
                expected = f"{tuple(a.shape[1:])} pixels, as its A"
                raise InputError(self.folder / "B" / name, expected, tuple(b.shape[1:]))
            first = first or (a.shape, b.shape)
            if (a.shape, b.shape) != first:
                shapes = f"{tuple(first[0])} and {tuple(first[1])} (--size N makes all N x N)"
                expected = f"the shapes of the files before it, {shapes}"
                found = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise InputError(self.folder / "A" / name, expected, found)
        for side, span, value in zip("AB", self.rescale, highest):
            if span is None and value < -0.87:  # 4095 of 65535 is -0.875
                advice = "does it hold 12 bits in 16? --rescale LO,HI maps LO..HI to -1..1"
                found = f"{value:.3f} at most; {advice}"
                raise InputError(self.folder / side, "values up to 1", found)
        self.in_chans, self.out_chans, self.shape = first[0][0], first[1][0], tuple(first[0][1:])

    def __len__(self):
        return len(self.names)

    def read(self, name):
        places = ((self.folder / side / name, span) for side, span in zip("AB", self.rescale))
        return [fit_square(read_slice(path, span), self.size) for path, span in places]

    def __getitem__(self, keys):
        """The batch of a list of (epoch, index): each part of the items stacked to (B, C, H, W)."""
        return [torch.stack(parts) for parts in zip(*(self.item(*key) for key in keys))]

    def item(self, epoch, index):
        a, b = self.kept.get(self.names[index]) or self.read(self.names[index])
        if self.noise is None:
            return a, b
        rng = np.random.default_rng([self.seed, epoch, index])
        return misalign(a, b, rng, self.noise, self.elastic, self.with_flow)

    def batches(self, batch, epochs=1, shuffle=False, seed=0, start=0, rank=0, world=1, workers=0):
        """Batches from the `start`-th on, the same ones whatever `start` and `workers`.
        In training (`shuffle`) every process gets equally many: the first items come again at the
        end. Otherwise each item comes once. The last batch of an epoch may be smaller."""
        keys = []
        for epoch in range(epochs):
            order = np.arange(len(self))
            if shuffle:
                order = np.random.default_rng([seed, epoch]).permutation(len(self))
                order = np.resize(order, math.ceil(len(order) / world) * world)
            own = [(epoch, int(index)) for index in order[rank::world]]
            keys += [own[i : i + batch] for i in range(0, len(own), batch)]
        return load_batches(self, keys[start:], workers)


def parse_rescale(text):
    """The (lo, hi) of A and of B, or None each, from "LO,HI" for both, "LO,HI,LO,HI" or ""."""
    if not text:
        return None, None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    a, b = tuple(numbers[:2]), tuple(numbers[-2:])
    if len(numbers) not in (2, 4) or not (a[0] < a[1] and b[0] < b[1]):
        raise InputError("--rescale", "LO,HI or LO,HI,LO,HI (A, then B) with LO < HI", text)
    return a, b


def fit_square(image, size):
    """Scales the longer side of (C, H, W) to `size`, antialiased, and pads to a square with
    background; 0 leaves the image as it is. A pixel that saw nothing but background (-1) is exactly
    -1, so `image != -1` is the foreground at every size."""
    if not size or tuple(image.shape[1:]) == (size, size):
        return image
    H, W = (max(1, round(n * size / max(image.shape[1:]))) for n in image.shape[1:])
    image = F.interpolate(image[None] + 1, (H, W), mode="bilinear", antialias=True)[0] - 1
    top, left = (size - H) // 2, (size - W) // 2
    return F.pad(image.clamp(-1, 1), (left, size - W - left, top, size - H - top), value=-1.0)


# --------------------------------------------------------------------------------------------------
# Audit


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    root: str = option("", "folder of the data set")
    data: str = option("", "default: covid with ROOT/splits, else by its table, else demo",
                       choices=["", *DATASETS])
    split: str = option("", "of a layout with several splits, this one only")
    allow_outside: bool = option(False, "also images that the lists name outside ROOT")
    pretraining: str = option("", "list, CSV or checkpoint of ours with the images that a model was"
                              " trained on before: which test images and patients are in it")


def audit(config):
    """Prints images, patients and positives of every list, then what is wrong: a patient or the
    same pixels in two parts, test images that were pretrained on, files that are missing or
    unreadable, bad lines. Returns 1 where anything is wrong, else 0."""
    if not config.root:
        raise InputError("audit", "--root DIR", "none")
    root = Path(config.root)
    tables = [name for name in TABLES if find_table(name, root)]
    data = config.data or ("covid" if (root / "splits").is_dir() else [*tables, "demo"][0])
    lists, problems = read_every_list(data, root, config.split)
    names = sorted({name for listed, _, _ in lists.values() for name in listed})
    patients = dict(zip(names, patient_ids(root, names)))
    if find_table(data, root):
        patients |= {name: row[1] for name, row in read_rows(data, root)[0].items()}
    found = locate(data, root, names, config.allow_outside)
    paths = [path or name for path, name in zip(found, names)]
    digests, wrong = zip(*over_images(pixel_hash, paths))
    problems += filter(None, wrong)
    folder = root / DATASETS[data]["images"]
    there = list_images(folder if folder.is_dir() else root)
    unlisted = set(image_keys(root, there)) - set(image_keys(root, paths))
    if unlisted:
        print(f"{len(unlisted)} images are in no list, such as {min(unlisted)}")
    people = {key: {patients[name] for name in lists[key][0]} - {None} for key in lists}
    print(f"{'list':24s}{'images':>8s}{'patients':>10s}  positives")
    for key, (listed, labels, classes) in lists.items():
        counts = ", ".join(f"{name} {int(count)}" for name, count in zip(classes, labels.sum(0)))
        title, count = " ".join(key).strip(), len(people[key]) or "?"
        print(f"{title:24s}{len(listed):8d}{count:>10}  {counts}")
    problems += leaks(lists, people, dict(zip(names, digests)))
    if config.pretraining:
        problems += audit_pretraining(config.pretraining, root, lists)
    sound = "nothing wrong: no patient and no image in two parts, every file readable"
    print("\n".join(problems) or sound)
    return int(bool(problems))


def read_every_list(data, root, split):
    """The lists of a layout that are there, or the parts of its table, as {(split, part): (names,
    labels, classes)}, and what is wrong with them."""
    table = find_table(data, root)
    if table:
        classes, parts = table_columns(data, table)[1], read_table(data, root)
        return {("", part): (*listed, classes) for part, listed in parts.items()}, []
    layout, splits = DATASETS[data], [split]
    if "{split}" in layout["val"] and not split:
        splits = sorted(path.name for path in root.glob("splits/*") if path.is_dir()) or [""]
    lists, problems = {}, []
    for split in splits:
        split_files(data, root, split, max(layout["train"]))  # explains what does not fit
        for name in [*layout["train"].values(), layout["val"], layout["test"]]:
            path = root / name.format(split=split)
            if not path.exists():
                continue
            try:
                names, labels = read_list(path)
            except InputError as error:
                problems.append(str(error))
                names, labels = read_list(path, skip_bad=True)
            classes = class_names(data, root, split, labels.shape[1])
            lists[split, path.stem] = names, labels, classes
    return lists, problems


def leaks(lists, people, digest_of):
    """The patients and the pixels that two parts share. people: the patients of each list;
    digest_of: the hash of each image by name."""
    problems = []
    for a, b in itertools.combinations(lists, 2):
        if a[0] != b[0] or (a[1].startswith("train") and b[1].startswith("train")):
            continue  # lists of other splits, or training lists, may share images
        both, twice = f"{a[0]} {a[1]} and {b[1]}".strip(), sorted(people[a] & people[b])
        first = {digest_of[name]: name for name in lists[a][0] if digest_of[name]}
        same = [(first[digest_of[name]], name) for name in lists[b][0] if digest_of[name] in first]
        if twice:
            problems.append(f"{both}: {len(twice)} patients in both: {', '.join(twice[:5])}")
        if same:
            shown = ", ".join(f"{one} = {other}" for one, other in same[:5])
            problems.append(f"{both}: {len(same)} images with the same pixels in both: {shown}")
    return problems


def audit_pretraining(path, root, lists):
    """What is wrong with the test lists for a model that was trained on the films of `path`."""
    hashes, problems = read_pretraining(path, root), []
    for (split, part), (names, _, _) in lists.items():
        films, patients = trained_on(root, names, hashes)
        more = sum(patient and not film for film, patient in zip(films, patients))
        where = f"{split} {part}".strip()
        count = f"{sum(films)} of {len(names)} images are in {path}"
        said = f"{where}: {count}, and {more} more are of a patient in it"
        if part.startswith("test") and (sum(films) or more):
            name = next(name for name, *found in zip(names, films, patients) if any(found))
            problems.append(f"{said}, the first: {name}")
        else:
            print(said)
    return problems


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["audit"]:
        print(f"{__doc__}\nusage: python data.py audit [-h] [options]")
        sys.exit(0 if argv[:1] in (["-h"], ["--help"]) else 2)
    sys.exit(audit(parse_config(AuditConfig, argv[1:], "python data.py audit")))


if __name__ == "__main__":
    run_script(main)
