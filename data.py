"""Real data: images, lists, tables, reports, masks, A/B pairs and their batches.

    python data.py audit --data nih --root DIR    # split leakage, class counts, unreadable files
    python data.py audit --root DIR --pretraining LIST    # test images that were pretrained on

Shapes: B batch, C channels, H x W pixels, L report tokens. Images are float32 (C, H, W).
"""

import copy
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from kernels import warp
from support.script import (
    InputError, atomic_write, option, over_images, parse_config, read_text, run_script, seeded,
    warn)

# --------------------------------------------------------------------------------------------------
# Reading images

KINDS = {".npy": "npy", ".dcm": "dicom", ".dicom": "dicom", ".nii": "nifti", ".nii.gz": "nifti"}
IMAGE_SUFFIXES = [*KINDS, ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"]


def split_ending(name):
    """("chest.1", ".PNG") of "chest.1.PNG"; the second is "" without one of IMAGE_SUFFIXES."""
    ending = next((end for end in IMAGE_SUFFIXES[::-1] if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)], name[len(name) - len(ending) :]


def kind_of(path):
    """npy, dicom, nifti or picture, by a file's ending; DICOM where it has none."""
    ending = split_ending(str(path))[1].lower()
    return KINDS.get(ending, "picture" if ending else "dicom")


def read_pixels(path, short_side=None, grey=False, mask=False):
    """The numbers of an image file as they are stored: (array (H, W) or (H, W, 3), full scale).

    Full scale is the number of white: 255 or 65535 in a PNG, JPEG, TIFF or BMP; 1 in DICOM, which
    `read_dicom` scales; None in .npy and NIfTI, whose numbers may mean anything. A JPEG is decoded
    at the smallest of 1/8, 1/4, 1/2 of its size whose shorter side is not below `short_side`, and
    as grey where `grey`. Of a `mask` a palette's indices are read."""
    kind, white = kind_of(path), None
    try:
        if kind == "npy":
            pixels = np.load(path, allow_pickle=False)
        elif kind == "dicom":
            pixels, white = read_dicom(path), 1
        elif kind == "nifti":
            pixels = np.asanyarray(read_nifti(path).dataobj)
        else:
            pixels, white = read_picture(path, short_side, grey, mask)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except ImportError as error:
        raise InputError(f"{path}: {error}: pip install 'pydicom>=3' nibabel") from None
    except Exception as error:  # a damaged file raises one of a dozen types, by its decoder
        first, *hints = str(error).strip().splitlines() or [type(error).__name__]
        reason = "; ".join([*map(str.strip, hints), first])  # pydicom names a decoder to install
        expected = "a complete PNG, JPEG, TIFF, .npy, NIfTI or DICOM image"
        raise InputError(path, expected, reason) from None
    while pixels.ndim > 2 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    colour = pixels.ndim == 3 and pixels.shape[2] == 3 and kind != "nifti"  # there: three slices
    if not (pixels.ndim == 2 or colour) or not pixels.size or pixels.dtype.kind not in "buif":
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise InputError(path, "numbers of shape (H, W) or (H, W, 1), or colours", found)
    wrong = np.count_nonzero(~np.isfinite(pixels))
    if wrong:
        raise InputError(path, "finite numbers", f"{wrong} of {pixels.size} NaN or infinite")
    return pixels, white


def read_picture(path, short_side, grey, mask):
    """The pixels and full scale of a file that PIL reads, turned as its EXIF orientation says."""
    with open(path, "rb") as file, Image.open(file) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise InputError(path, "one page", picture.n_frames)
        if picture.format == "JPEG" and short_side:
            picture.draft("L" if grey else None, (short_side, short_side))
        if picture.format == "TIFF" and picture.mode[0] in "IF" and picture.tag_v2.get(262) == 0:
            raise InputError(path, "0 for black", "0 for white (MinIsWhite), of 16 bits or more")
        bits = picture.tag_v2.get(258) or () if picture.format == "TIFF" else ()
        if picture.mode[0] not in "IF" and (16 in bits or ";16B" in str(picture.tile)):
            raise InputError(path, "16 bits in grey alone", f"16 bits in {picture.mode}")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    if mask and picture.has_transparency_data:  # the object may be in it alone
        if picture.convert("RGBA").getextrema()[3][0] < 255:
            raise InputError(path, "a mask without transparency", f"mode {picture.mode}")
    if mask and picture.mode == "P":
        pixels, grey = np.array(picture), np.array(picture.convert("L"))
        if grey[pixels == 0].max(initial=0) > grey[pixels > 0].min(initial=255):
            raise InputError(path, "a palette whose 0, no object, is the darkest", "a brighter 0")
        return pixels, 255
    if picture.mode[0] in "FI":  # PIL's own conversion to 8 bits would clip 16 to white
        pixels = np.array(picture)
        if picture.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            return pixels, None
        return pixels.astype(np.uint16), 65535
    mode = "L" if grey or picture.mode in ("1", "L", "LA") else "RGB"
    return np.array(picture.convert(mode)), 255


def read_dicom(path):
    """The pixels of a DICOM file as they are meant to be seen, from 0 (black) to 1 (white).
    They pass through the modality LUT and the VOI LUT or window. The ends of the window, or without
    one those of `limits`, are black and white. Padding is black; MONOCHROME1 is inverted."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    record = pydicom.dcmread(path, force=True)
    kind, frames = record.get("PhotometricInterpretation"), int(record.get("NumberOfFrames") or 1)
    if frames > 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError(path, "one grey frame", f"{frames} of {kind or 'no image'}")
    raw, padding = record.pixel_array, record.get("PixelPaddingValue")
    pixels = apply_voi_lut(apply_modality_lut(raw, record), record).astype(np.float64)
    inside = np.ones(raw.shape, bool)
    if padding is not None:
        low, high = sorted([padding, record.get("PixelPaddingRangeLimit", padding)])
        inside = (raw < low) | (raw > high)
    window = record.get("WindowWidth"), record.get("WindowCenter")
    if None not in window and not record.get("VOILUTSequence"):
        with np.errstate(over="ignore"):  # the ends: what it makes of numbers far outside
            pixels = stretch(pixels, *apply_voi_lut(np.array([-1e9, 1e9]), record))
    elif inside.any():
        pixels = stretch(pixels, *limits(pixels[inside]))
    if kind == "MONOCHROME1":  # a large number is dark
        pixels = 1 - pixels
    pixels[~inside] = 0
    return pixels


def read_nifti(path):
    import nibabel

    return nibabel.load(path)


def limits(values):
    """What becomes black and white where no file says so: the 0.5 % darkest and brightest numbers
    lie outside, so that no dead pixel and no burned-in marker decides. They are 0 and 1 where both
    lie in [0, 1], give or take 0.01."""
    beyond = values.size // 200
    ordered = np.partition(values, [beyond, values.size - 1 - beyond], axis=None)
    low, high = float(ordered[beyond]), float(ordered[values.size - 1 - beyond])
    if low == high:  # a small object on a plain ground
        low, high = float(values.min()), float(values.max())
    return (0.0, 1.0) if -0.01 <= low and high <= 1.01 else (low, high)


def stretch(pixels, low, high):
    """`pixels`, scaled so that `low` becomes 0 and `high` 1, and clipped."""
    return np.clip((pixels.astype(np.float64) - low) / (high - low or 1), 0, 1)


def read_image(path, short_side=None, enlarge=True, white=None):
    """Reads an image file as grey: float32 (1, H, W) in [0, 1].

    short_side: pixels of the shorter side after a `resize` (None: full size), which leaves smaller
    images as they are where not `enlarge`. Pictures, and unsigned .npy of 8 or 16 bits, are divided
    by their full scale. For 16 bits that is `white`, or else the least of 2^8 - 1, 2^10 - 1 ...
    2^16 - 1 that holds all but the 0.5 % brightest pixels, since many files hold only 10 to 14
    bits. Other numbers are stretched between their `limits`. Colour becomes grey by ITU-R 601."""
    pixels, scale = read_pixels(path, short_side, grey=True)
    if scale is None and pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        scale = np.iinfo(pixels.dtype).max
    if scale == 65535:
        bits = (8, 10, 12, 14, 16)
        scale = white or next(2**n - 1 for n in bits if limits(pixels)[1] < 2**n)
        pixels = np.minimum(pixels, scale)
    if scale is None:
        pixels, scale = stretch(pixels, *limits(pixels)), 1
    if pixels.dtype != np.uint8:  # 8 bits stay as they are until they are resized
        pixels = (pixels / np.float32(scale)).astype(np.float32)
    image = torch.from_numpy(pixels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    shorter = min(image.shape[1:])
    if short_side and short_side != shorter and (enlarge or short_side < shorter):
        image = resize(image, short_side)
    if image.dtype == torch.uint8:
        image = image.float() / 255
    if len(image) == 3:
        image = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return image


def pixel_hash(path):
    """(hash of the decoded pixels, "") of an image, ("", what is wrong) where it is unreadable."""
    try:
        pixels = read_image(path).numpy()
        return hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest(), ""
    except InputError as error:
        return "", str(error)


def list_files(folder):
    """The paths of all files below a folder. Linked folders are followed, each folder once."""

    def stop(error):
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    files, met = [], set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(place) in met:
            folders.clear()
            continue
        met.add(os.path.realpath(place))
        folders.sort(key=lambda name: os.path.islink(os.path.join(place, name)))  # links come last
        files += [os.path.join(place, name) for name in names if name[0] != "."]
    return files


def list_images(folder):
    """The sorted paths of all images below a folder (`list_files`). Warns of other files."""
    files = list_files(folder)
    paths = sorted(path for path in files if split_ending(path)[1])
    if not paths:
        raise InputError(folder, f"a folder with images ({', '.join(IMAGE_SUFFIXES)})", "none")
    if len(paths) < len(files):
        warn(f"{folder}: {len(files) - len(paths)} files are no images and left out")
    return paths


# --------------------------------------------------------------------------------------------------
# Text files: lines, CSV, the names of images


def read_lines(path):
    """The lines of a text file that are not blank, as (line number, text)."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_header(path):
    """The names of the columns of a CSV; none of an empty file."""
    return [name.strip() for name in next(csv.reader(io.StringIO(read_text(path))), [])]


def read_csv(path, columns):
    """The rows of a CSV as (line at which it begins, value of each of `columns`)."""
    header, line = read_header(path), 1
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    if [header.count(name) for name in columns] != [1] * len(columns):
        found = ", ".join(header) or "an empty file"
        raise InputError(f"{path}: line 1", f"the columns {', '.join(columns)}, each once", found)
    places = [header.index(name) for name in columns]
    try:
        for row in reader:
            # A quote that is not closed takes in the rows up to the next one
            swallowed = any(split_ending(text.split(",")[0].strip())[1]
                            for field in row for text in field.splitlines()[1:])
            if row and (len(row) != len(header) or swallowed):
                found = "a row in a field of it" if swallowed else f"{len(row)} fields"
                expected = f"{len(header)} fields, text with commas in double quotes"
                raise InputError(f"{path}: line {line}", expected, found)
            if row and line > 1:
                yield line, *(row[place].strip() for place in places)
            line = reader.line_num + 1
    except csv.Error as error:
        reason = f"not readable as CSV ({error}); is a double quote not closed?"
        raise InputError(f"{path}: line {line}: {reason}") from None


def plain_name(name):
    """A name as every list writes it: `a/b.png`, whatever its slashes, `./`, quotes and spaces."""
    return os.path.normpath(name.strip().strip('"').replace("\\", "/"))


def image_keys(root, names):
    """What identifies the image of each name below the root, or absolute path: its path below the
    root, without a leading images/ and without the ending."""
    folder, keys = os.path.join(os.path.abspath(root or "."), ""), []
    for name in names:
        path = os.path.join(folder, plain_name(str(name))).removeprefix(folder)
        keys.append(split_ending(path.removeprefix("images" + os.sep))[0])
    return keys


# --------------------------------------------------------------------------------------------------
# Labelled data sets: the papers' lists, else a table, the publisher's or one of your own

NIH_CLASSES = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia"]
CHEXPERT_CLASSES = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
DATASETS = {  # the folders of the images, and the classes, which ROOT/classes.txt replaces
    "demo": (["images"], None), "csv": (["images", ""], None), "rsna": ([""], ["Pneumonia"]),
    "nih": (["images", "images_*/images", "all_classes", ""], NIH_CLASSES),
    "chexpert": ([""], CHEXPERT_CLASSES), "covid": (["images"], None)}
TABLES = {"csv": "labels.csv", "nih": "Data_Entry_2017*.csv", "chexpert": "train.csv",
          "rsna": "stage_2_train_labels.csv"}
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LABELS = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}
UNCERTAIN = {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}  # what a label of -1 becomes


@dataclasses.dataclass
class Part:
    """The training, validation or test part of a data set. A run adds images and masks."""

    names: list  # of its images
    paths: list
    labels: torch.Tensor  # float32 (n, k), NaN where unknown
    owners: list  # whose the images are, by `identify`
    images: object = None  # an ImageSet
    masks: list = None  # of a segmentation, by `find_masks`

    def keep(self, rows):
        """Leaves the images `rows` alone."""
        for name in ("names", "paths", "owners", "masks"):
            values = getattr(self, name)
            setattr(self, name, values and [values[i] for i in rows])
        self.labels = self.labels[rows]


def demo_root(root=""):
    """The folder of the demo records (default: demo), drawn on first use, by one process."""
    from support import demo  # only here, so that real data needs nothing of the drawing

    root, rank = Path(root or "demo"), int(os.environ.get("RANK", 0))
    if rank == 0 and not (root / "demo.json").exists():
        print(f"drawing the demo records into {root}")
        demo.write_demo_records(root)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return root


def read_parts(data, root, split="", ratio=100, uncertain=None, skip_bad=False):
    """A labelled data set: ({"train", "val", "test": Part}, classes), with `ratio` percent of the
    training labels. Lists go before a table. uncertain: what -1 means (UNCERTAIN); None refuses it,
    but CheXpert's are ones as in the papers. skip_bad: images that are missing or cannot be read
    are left out, with a warning."""
    root, parts, values = Path(root or "."), {}, LABELS
    if uncertain or data == "chexpert":
        values = LABELS | dict.fromkeys(("-1", "-1.0"), UNCERTAIN[uncertain or "ones"])
    table = max(root.glob(TABLES.get(data, "no table")), default=None)
    lists = ("train", "val", "test") if data == "csv" else ("val",)
    if table and not split and not any((root / f"{part}_list.txt").exists() for part in lists):
        listed, classes = read_table(data, table, ratio, values), table_classes(data, table)
    else:
        listed, classes = read_lists(data, root, split, ratio, values)
    for name, (names, labels, source) in listed.items():
        paths = find_images(data, root, names, source, not skip_bad)
        part = parts[name] = Part(names, paths, labels, identify(root, names))
        reasons = [reason for _, reason in over_images(pixel_hash, paths)] if skip_bad else []
        wrong = list(filter(None, reasons))
        if wrong:
            part.keep([i for i, reason in enumerate(reasons) if not reason])
            warn(f"{source}: {len(wrong)} of {len(paths)} images of {name} are left out, the first:"
                 f" {wrong[0]}")
        if not part.names:
            raise InputError(source, f"images of the part {name}", "none")
    return parts, classes


def read_lists(data, root, split, ratio, values):
    """The lists of a data set: ({part: (names, labels float32 (n, k), file)}, classes)."""
    names = {"train": "train_list.txt" if ratio == 100 else f"train_{ratio}.txt",
             "val": "val_list.txt", "test": "test_list.txt"}
    folder, listed = root / split, {}
    if data == "covid":  # splits/covid1/train.txt, or covid1/iscovid_train.txt as first published
        folder = root / "splits" / split if (root / "splits" / split).is_dir() else folder
        names = {part: name.replace("_list", "") for part, name in names.items()}
        names = {part: next((path.name for path in folder.glob(f"*{name}")), name)
                 for part, name in names.items()}
    for part, name in names.items():
        path = folder / name
        if not path.is_file():
            there = ", ".join(sorted(os.listdir(folder))[:12]) if folder.is_dir() else "nothing"
            needs = f"which --data {data} --split {split or 'none'} --ratio {ratio} needs"
            raise InputError(f"{path}: no such list, {needs}; {folder} holds {there}")
        listed[part] = *read_list(path, values), path
    classes, count = DATASETS[data][1], listed["train"][1].shape[1]
    if data == "covid":
        classes = [split.rstrip("0123456789")]
    if (root / "classes.txt").exists():
        classes = [line for _, line in read_lines(root / "classes.txt")]
    classes = classes or [f"class {i + 1}" for i in range(count)]
    for _, labels, path in listed.values():
        if not labels.shape[1] == len(classes) == len(set(classes)):
            expected = f"{len(classes)} labels a line, of different classes ({', '.join(classes)})"
            raise InputError(path, expected, labels.shape[1])
    return listed, classes


def split_line(line):
    """`name l1 ... lk` or `name,l1,...,lk` as (name, labels): numbers at the end are labels, and a
    name before labels may hold spaces."""
    found = re.fullmatch(r"(.+?)((?:[\s,]+(?:0|0\.0|-?1|-?1\.0))+),*", line)
    name, labels = found.groups() if found else (re.split(r"[\s,]", line)[0], "")
    return plain_name(name), labels.replace(",", " ").split()


def read_list(path, values=LABELS):
    """Reads a list file, `name l1 ... lk` a line: (names, labels float32 (n, k)). Refuses a line of
    fewer labels than others, a label that `values` lacks, and a name listed twice."""
    rows, lines = {}, [(number, line, *split_line(line)) for number, line in read_lines(path)]
    if not lines:
        raise InputError(path, "a line `name label ...` an image", "an empty list")
    count = max(len(labels) for *_, labels in lines)
    for number, line, name, labels in lines:
        if len(labels) != count or not set(labels) <= set(values):
            expected = f"a name and {count} labels, each 0 or 1 (--uncertain says what -1 is)"
            raise InputError(f"{path}: line {number}", expected, repr(line[:80]))
        if name in rows:
            raise InputError(f"{path}: line {number}: {name!r} is listed before")
        rows[name] = [values[label] for label in labels]
    return list(rows), torch.tensor(list(rows.values()))


def table_classes(data, path):
    """The classes of a table: ROOT/classes.txt's, the set's, or in a table of your own the columns
    that name findings."""
    if data != "rsna" and (chosen := path.parent / "classes.txt").exists():
        return [line for _, line in read_lines(chosen)]
    if data != "csv":
        return DATASETS[data][1]
    header = read_header(path)
    classes = [name for name in header if name not in ("image", "patient", "split")]
    if not classes:
        expected = "a header `image,finding,...`, perhaps with patient and split"
        raise InputError(f"{path}: line 1", expected, ",".join(header) or "an empty file")
    return classes


def table_rows(data, path):
    """The rows of a table as it is published: (place, name, cells of the classes, part or ""), with
    the parts that NIH and CheXpert publish beside it."""
    classes, tests = table_classes(data, path), path.parent / "test_list.txt"
    if data == "nih":
        tests = {split_line(text)[0] for _, text in read_lines(tests)} if tests.is_file() else ()
        for line, name, findings in read_csv(path, ("Image Index", "Finding Labels")):
            cells = [str(int(c in findings.split("|"))) for c in classes]
            yield f"{path}: line {line}", name, cells, "test" * (name in tests)
    elif data == "rsna":  # a row for each box, so that rows of one image are alike
        boxes = {tuple(row): line for line, *row in read_csv(path, ("patientId", "Target"))}
        for (name, target), line in boxes.items():
            yield f"{path}: line {line}", f"stage_2_train_images/{name}.dcm", [target], ""
    elif data == "chexpert":
        for file, part in ((path, ""), (path.with_name("valid.csv"), "test")):
            rows = read_csv(file, ("Path", *classes)) if file.is_file() else ()
            for line, name, *cells in rows:
                name = re.sub(r"^CheXpert-v1\.0[^/]*/", "", name)  # the small set or the large one
                yield f"{file}: line {line}", name, cells, part
    else:
        last = [name for name in read_header(path) if name == "split"]
        for line, name, *cells in read_csv(path, ("image", *classes, *last)):
            part = cells.pop() if last else ""
            yield f"{path}: line {line}", name, cells, part.lower()


def read_table(data, path, ratio=100, values=LABELS):
    """The table `path` at the root of a data set: {part: (names, labels float32 (n, k), path)}.
    An image without a part follows the others of its patient, so that no patient is in two parts.
    Where they have none, a hash of the patient decides: 70 % train, 10 % val, 20 % test, the same
    in every run. `ratio`: the percent of the training patients taken, by another hash."""
    rows, listed = {}, {"train": ([], []), "val": ([], []), "test": ([], [])}
    for where, name, cells, part in table_rows(data, path):
        name, wrong = plain_name(name), [cell for cell in cells if cell not in values]
        if wrong or part not in ("", *PARTS):
            expected = "labels 0, 1 or blank (-1: see --uncertain), a split train, val or test"
            raise InputError(where, expected, repr(wrong[0] if wrong else part))
        if name in rows:
            raise InputError(f"{where}: {name!r} is listed before")
        rows[name] = [values[cell] for cell in cells], PARTS.get(part, "")
    owners = identify(path.parent, rows)
    unknown = [image for image, patient in owners if not patient and data != "rsna"]
    if unknown and not all(part for _, part in rows.values()):
        warn(f"{path}: no patient is known of {len(unknown)} of {len(rows)} images, such as "
             f"{unknown[0]}: one who has several may be in train and in test. A column `patient`, "
             "or ROOT/patients.csv (image_path,patient_id), names them")
    part_of = {group: part for group, (_, part) in zip(units(owners), rows.values()) if part}
    share = 0.8 if "test" in part_of.values() else 1.0  # then the others are train and val alone
    for group, (name, (labels, part)) in zip(units(owners), rows.items()):
        digest = hashlib.sha256(group.encode()).digest()
        chance, other = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
        drawn = "train" if share * chance < 0.7 else "val" if share * chance < 0.8 else "test"
        part = part or part_of.get(group) or drawn
        if part != "train" or other < ratio / 100:
            listed[part][0].append(name)
            listed[part][1].append(labels)
    return {part: (names, torch.tensor(labels), path) for part, (names, labels) in listed.items()}


# --------------------------------------------------------------------------------------------------
# The images of a list, with their reports and masks


def find_images(data, root, names, source, check=True):
    """The absolute path of every name in the list or CSV `source`, below the folders of the data
    set. A missing one is refused with its line, or lies in the first folder where not `check`."""
    patterns, root = DATASETS[data][0], os.path.abspath(root or ".")
    folders = [str(folder) for pattern in patterns for folder in
               (sorted(Path(root).glob(pattern)) if pattern else [root])]
    places = [[os.path.join(folder, name) for folder in folders or patterns] for name in names]
    paths = [next(filter(os.path.isfile, each), None) for each in places]
    if check and None in paths:
        name = names[paths.index(None)]
        alone = re.compile(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])")  # and no part of a name
        line = next((number for number, text in read_lines(source) if alone.search(text)), "?")
        where = f"{' or '.join(folders or patterns)} ({paths.count(None)} of {len(names)} missing)"
        raise InputError(f"{source}: line {line}: no image {name!r} in {where}")
    return [path or each[0] for path, each in zip(paths, places)]


def read_reports(path, root):
    """The records of a training.csv: (image paths, reports). A report may be empty."""
    rows = list(read_csv(path, ("image_path", "report_content")))
    if not rows or not all(name for _, name, _ in rows):
        raise InputError(path, "an image and its report in each row", "none")
    names, reports = [plain_name(name) for _, name, _ in rows], [report for *_, report in rows]
    return find_images("csv", root, names, path), reports


def find_masks(folder, keys, empty=()):
    """The mask of each image, a file KEY.png (`image_keys`), or None. A file may be lacking for the
    indices `empty` alone, whose masks are empty."""
    paths = [Path(folder, f"{key}.png") for key in keys]
    lost = [path for i, path in enumerate(paths) if not path.is_file() and i not in empty]
    if lost:
        raise InputError(f"{lost[0]}: no such mask ({len(lost)} of {len(keys)} are missing)")
    return [str(path) if path.is_file() else None for path in paths]


def read_mask(source, shape, path):
    """The mask of the image `path`, which is `shape` (H, W) large: bool (H, W); empty for None. A
    file holds 0 and one other value."""
    if source is None:
        return np.zeros(shape, bool)
    pixels, _ = read_pixels(source, grey=True, mask=True)
    values = np.unique(pixels)
    if pixels.shape != tuple(shape) or values[0] != 0 or len(values) > 2:
        expected = f"a mask of {tuple(shape)} pixels, as {path}, of the values 0 and one other"
        raise InputError(source, expected, f"{pixels.shape} pixels of {len(values)} values")
    return pixels > 0


# --------------------------------------------------------------------------------------------------
# Patients, and what two lists share

# The patient in a name of NIH's, MIMIC-CXR's or CheXpert's
WRITTEN_PATIENT = re.compile(r"patient\d+|(?<![^/])(?:000\d{5}(?=_\d{3}$)|p\d{8}(?=/s\d{8}/))")
PATIENT_TABLES = {  # the later ones decide
    "records.csv": ("image_path", "patient_id"), "labels.csv": ("image", "patient"),
    "patients.csv": ("image_path", "patient_id")}


def identify(root, names):
    """Whose each image is: (the image, its patient or ""). The patient is named by a table at the
    root (PATIENT_TABLES) or by the name. The image is its `image_keys`, from the patient's part on,
    so that copies of a data set in other folders agree. "demo " tells drawn images from NIH's."""
    listed, owners = {}, []
    drawn = "demo " * Path(root or ".", "demo.json").is_file()
    for file, columns in PATIENT_TABLES.items():
        path = Path(root or ".", file)
        if path.is_file() and (file == "patients.csv" or set(columns) <= set(read_header(path))):
            rows = list(read_csv(path, columns))
            listed |= {key: row[2] for key, row in
                       zip(image_keys(root, [row[1] for row in rows]), rows) if row[2]}
    for key in image_keys(root, names):
        found = WRITTEN_PATIENT.search(key)
        patient = listed.get(key) or (found[0] if found else "")
        image = key[found.start() :] if found else key
        owners.append((drawn + image, drawn + patient if patient else ""))
    return owners


def units(owners):
    """The patient, else the image, of each (image, patient) of `identify`: what no two parts of a
    split may share."""
    return [patient or image for image, patient in owners]


def marks(owners):
    """What a checkpoint keeps of its training images, for `seen`: {images and patients}."""
    return {mark for image, patient in owners
            for mark in (image, patient and f"patient {patient}") if mark}


def seen(owners, before):
    """Whether each image or its patient is among `before`, the `marks` of other images."""
    return [image in before or f"patient {patient}" in before for image, patient in owners]


def listed_names(path):
    """The names of images in a list file, or in a CSV, a published table or one of your own."""
    columns = ("image_path", "image", "Image Index", "Path")
    column = next((name for name in read_header(path) if name in columns), None)
    if column:
        return [plain_name(name) for _, name in read_csv(path, (column,))]
    return [split_line(line)[0] for _, line in read_lines(path)]


def not_excluded(root, names, path):
    """The indices of the names that are neither in the list or CSV `path` nor of a patient in it.
    Warns of names in it that fit no image and no patient here."""
    listed = listed_names(path)
    theirs, ours = identify(root, listed), identify(root, names)
    here = seen(theirs, marks(ours))
    if not all(here):
        count = f"{here.count(False)} of {len(listed)} names are of no image and no patient here"
        warn(f"{path}: {count}, the first: {listed[here.index(False)]!r}")
    return [i for i, hit in enumerate(seen(ours, marks(theirs))) if not hit]


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


def resize(images, size):
    """Resizes images (B, C, H, W) or (C, H, W), uint8 or in [0, 1], to (h, w), or to an int for the
    shorter side: antialiased bicubic (Keys, a = -1/2, widened where it reduces), as PIL's. The
    second of two channels is a mask, which takes the nearest pixel and so keeps its two values."""
    if isinstance(size, int):
        size = [round(side * size / min(images.shape[-2:])) for side in images.shape[-2:]]
    batch = images if images.ndim == 4 else images[None]
    scaled = F.interpolate(batch, size, mode="bicubic", antialias=True)
    scaled = scaled if scaled.dtype == torch.uint8 else scaled.clamp_(0, 1)
    if batch.shape[1] == 2:
        scaled[:, 1:] = F.interpolate(batch[:, 1:].float(), size, mode="nearest-exact")
    return scaled if images.ndim == 4 else scaled[0]


def random_resized_crop(images, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None):
    """Crops of random area (`scale`, of the image's) and aspect, resized: (B, C, size, size), of
    images (B, C, H, W) or a list of (C, H, W). Each is drawn as by torchvision's RandomResizedCrop:
    of ten tries the first that fits, else the central crop of the nearest aspect."""
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
    return torch.stack([resize(image[:, y : y + height, x : x + width], (size, size))
                        for image, (y, x, height, width) in zip(images, boxes)])


def crop_and_flip(images, generator, side, min_crop, flip=False):
    """Random crops (B, C, side, side) of at least the share `min_crop` of each image. `flip`
    mirrors half of them left-right: not where labels or reports tell left from right."""
    images = random_resized_crop(images, side, (min_crop, 1.0), generator=generator)
    if flip:
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(-1), images)
    return images


def read_bytes(item, side, enlarge=True, white=None):
    """An image whose shorter side becomes `side`, rounded to 8 bits: uint8 (1, H, W). Of an item
    (path, mask) both are squeezed into a square: uint8 (2, side, side)."""
    if not isinstance(item, tuple):
        image = read_image(item, side, enlarge, white)
    else:
        image = read_image(item[0], white=white)
        mask = torch.from_numpy(read_mask(item[1], image.shape[1:], item[0]))
        image = resize(torch.cat([image, mask[None].float()]), (side, side))
    return (image * 255).round_().byte()


class ImageSet(torch.utils.data.Dataset):
    """Grey images whose shorter side is `size`, as 8 bits, read when they are asked for.

    set[indices, draw] is a batch (images (B, 1, size, size) float32, indices) that passed through
    `augment(images, generator=)`, which gets a list of (1, H, W). (seed, draw) seed the generator:
    neither workers nor resuming change it. Without `augment` they are centre crops of `crop` pixels
    a side (default: `size`). With `masks` (`find_masks`) each item is a whole image and its mask,
    (2, size, size)."""

    def __init__(self, paths, size, augment=None, seed=0, masks=None, crop=None, enlarge=True,
                 white=None):
        self.paths, self.size, self.augment, self.seed = list(paths), size, augment, seed
        self.masks, self.crop, self.cache = masks, crop or size, None
        self.items = self.paths if masks is None else list(zip(paths, masks))
        self.reader = functools.partial(read_bytes, side=size, enlarge=enlarge, white=white)

    def __len__(self):
        return len(self.paths)

    def preload(self, limit=2 * 2**30):
        """Decodes all images into memory, if they take less than `limit` bytes. Returns self."""
        channels = 1 if self.masks is None else 2
        if self.cache is None and channels * len(self) * self.size**2 * 1.25 < limit:
            images = over_images(self.reader, self.items)
            same = len({image.shape for image in images}) == 1
            self.cache = torch.stack(images) if same else images
        return self

    def __getitem__(self, key):
        indices, draw = torch.as_tensor(key[0]), key[1]
        images = [self.reader(self.items[i]) if self.cache is None else self.cache[i]
                  for i in indices.tolist()]
        images = [image.float() / 255 for image in images]
        if self.augment is not None:
            return self.augment(images, generator=seeded(self.seed, draw)), indices
        return torch.stack([self.centre(image) for image in images]), indices

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
        batches = iter(torch.utils.data.DataLoader(
            dataset, None, sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if sys.platform == "linux" else None))
        if sys.platform != "win32":
            # `batches` finds a killed worker; torch's handler would raise again, even in clean-up
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except InputError as error:  # a worker's error arrives with its traceback, the message last
        raise InputError(str(error).rpartition("InputError: ")[2]) from None


def train_batches(dataset, batch_size, start_step, steps, seed, rank=0, world=1, workers=0):
    """Batches of the steps start_step ... steps - 1: (images, indices (B,)), B in each process.
    All steps together walk along one endless row of epochs, each a permutation seeded by (seed,
    epoch); a step takes the next world * batch_size. So its number alone fixes what it holds."""

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return torch.randperm(len(dataset), generator=seeded(seed, epoch)).tolist()

    def keys():
        for step in range(start_step, steps):
            draw = step * world + rank
            places = range(draw * batch_size, (draw + 1) * batch_size)
            yield [permutation(place // len(dataset))[place % len(dataset)]
                   for place in places], draw

    return load_batches(dataset, keys(), workers)


def eval_batches(dataset, batch_size, rank=0, world=1, workers=0):
    """This process's share of the images, each once, in order: (images, indices (B,))."""
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
    low, high = float(pixels.min()), float(pixels.max())
    if white == 1 or min(pixels.shape[:2]) < 32 or (low == high and not blank):
        expected = "a .npy, NIfTI or picture of 32 x 32 pixels or more that is not constant"
        found = "DICOM" if white == 1 else f"{pixels.shape[:2]} pixels from {low:g} to {high:g}"
        raise InputError(path, expected, found)
    span = rescale or (white and (0, white))
    if rescale and np.mean(pixels > rescale[1]) > 0.5:  # it would be white and nothing else
        expected = f"numbers below {rescale[1]:g} (--rescale LO,HI,LO,HI: A, then B)"
        raise InputError(path, expected, "more than half above it")
    if span:
        pixels = (pixels - span[0]) * (2 / (span[1] - span[0])) - 1
    elif low < -1 - 1e-6 or high > 1 + 1e-6:
        found = f"{low:g} to {high:g}: --rescale LO,HI maps LO..HI to -1..1"
        raise InputError(path, "values from -1 to 1", found)
    pixels = pixels.clip(-1, 1)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def write_slice(path, image, source, rescale=None):
    """Writes `image` (C, H, W) in [-1, 1] as the file `source` is: .npy and NIfTI as float32, in
    the range `rescale` = (lo, hi) (default: -1 to 1) and with the affine of `source`; a picture in
    its own format and bits, 16 where `rescale` needs them, else from black to white; a TIFF of
    other numbers, such as CT's, holds float32."""
    array = image.clamp(-1, 1).cpu().double().numpy().transpose(1, 2, 0)
    array = array[..., 0] if array.shape[2] == 1 else array
    kind, (low, high) = kind_of(source), rescale or (-1, 1)
    values = ((array + 1) * ((high - low) / 2) + low).astype(np.float32)
    if kind == "picture":
        with Image.open(source) as picture:
            form, wide = picture.format, picture.mode[0] == "I" or low >= 0 and 255 < high < 2**16
            raw = picture.mode == "F" or picture.mode == "I" and rescale and low < 0
        top = 65535 if wide and array.ndim == 2 and form in ("PNG", "TIFF") else 255
        low, high = (low, high) if 0 <= low and 1 < high <= top else (0, top)
        if not raw or array.ndim == 3:
            values = (array + 1) / 2 * (high - low) + low
            values = values.round().astype(np.min_scalar_type(top))
        options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
        atomic_write(path, lambda file: Image.fromarray(values).save(file, form, **options))
    elif kind == "npy":
        atomic_write(path, lambda file: np.save(file, values))
    else:
        like = read_nifti(source)
        content = type(like)(values.reshape(like.shape), like.affine).to_bytes()
        content = gzip.compress(content, mtime=0) if str(path).lower().endswith(".gz") else content
        atomic_write(path, lambda file: file.write(content))


def check_range(where, images, span):
    """Refuses images (C, H, W) in [-1, 1] that no `span` was given for and whose numbers seem to
    mean something else: [0, 1], which has no background of -1, or 12 bits in a file of 16."""
    low, high = min(float(x.min()) for x in images), max(float(x.max()) for x in images)
    if span is None and (low >= 0 or high < -0.87):
        found = f"{low:g} to {high:g}; --rescale LO,HI maps LO..HI, such as 0,1, to -1..1"
        raise InputError(where, "values from -1, the background, to 1", found)


def list_pairs(folder):
    """The names that `folder`/A and `folder`/B share; none may be on one side alone."""
    sides = [Path(folder, side) for side in "AB"]
    a, b = ({os.path.relpath(path, side) for path in list_images(side)} for side in sides)
    if a != b:
        lone = f"only in A: {sorted(a - b)[:5]} ({len(a - b)}); only in B: {sorted(b - a)[:5]}"
        raise InputError(f"{folder}: A and B must hold the same file names; {lone} ({len(b - a)})")
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
        c, t = (sides - 1) / 2, rng.uniform(-percent, percent, 2) / 100 * sides
        self.M, self.M_inverse = (torch.from_numpy(m).float() for m in (M, np.linalg.inv(M)))
        self.offset = torch.from_numpy(c + t - M @ c).float()[:, None]  # T(p) = M p + offset + e(p)
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
            last, p = p, (self.M_inverse @ ((q - self.bend(p)).flatten(1) - self.offset)).view_as(q)
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

    Rotation up to `noise` degrees, shift and zoom up to 2 noise %; at level 0 one small transform
    (1 degree, 2 %) moves both. `elastic` adds a bending field to each. Returns (a', b', flow), or
    (a', b') without `with_flow`. The flow (2, H, W), in pixels, registers them: for a perfect
    translation f, f(a')[p + flow(p)] = b'[p]. Since a'[p] = a[Ta(p)] and b'[p] = b[Tb(p)],
    flow(p) = Ta^-1(Tb(p)) - p."""
    size = tuple(a.shape[-2:])
    p = pixel_grid(size)
    if noise == 0:
        ta = RandomTransform(rng, size, 1, 2)
        tb = copy.copy(ta)  # the same M and t; each image bends by an e of its own
        ta.e, tb.e = (RandomTransform(rng, size, 0, 0, elastic).e for _ in range(2))
    else:
        ta, tb = (RandomTransform(rng, size, noise, 2 * noise, elastic) for _ in range(2))
    pa, pb = ta(p), tb(p)
    moved = move(a, pa), move(b, pb)
    return (*moved, ta.inverse(pb) - p) if with_flow else moved


class Pairs(torch.utils.data.Dataset):
    """`folder`/A and `folder`/B as pairs (a, b), float32 (C, H, W), or (a, b, flow) with `noise`.

    An item is asked for by (epoch, index). `misalign` moves it in each epoch by another draw, which
    (seed, epoch, index) fixes; `noise` None leaves the pairs as they are. All files are read once
    here, so that a bad one is found at once, and kept where they fit in KEPT_BYTES. `size` > 0
    scales the longer side to it and pads to a square. Without `with_flow` no flow is computed."""

    KEPT_BYTES = 2**30

    def __init__(self, folder, noise=None, elastic=0.0, seed=0, size=0, rescale="", with_flow=True):
        self.folder, self.noise, self.elastic, self.seed = Path(folder), noise, elastic, seed
        self.size, self.with_flow, self.rescale = size, with_flow, parse_rescale(rescale)
        self.names, self.kept, first, ends = list_pairs(folder), {}, None, ([], [])
        digest = hashlib.sha256(repr(self.names).encode())
        for name in self.names:
            images = self.read(name)
            for of_side, image in zip(ends, images):  # the darkest and the brightest number of each
                of_side.append(torch.stack([image.min(), image.max()]))
                digest.update(image.contiguous().numpy())
            images = [fit_square(image, self.size) for image in images]
            if sum(image.nbytes for image in images) * len(self.names) <= self.KEPT_BYTES:
                self.kept[name] = images
            a, b = (image.shape for image in images)
            first = first or (a, b)
            if a[1:] != b[1:] or (a, b) != first:
                expected = f"{first[0]} and {first[1]} in A and B (--size N makes all N x N)"
                raise InputError(self.folder / "A" / name, expected, f"{a} and {b}")
            if kind_of(name) == "nifti":
                from nibabel import aff2axcodes

                affines = (read_nifti(self.folder / side / name).affine for side in "AB")
                axes, other = (aff2axcodes(affine)[:2] for affine in affines)
                if axes != other:  # one would be learnt as the mirror image of the other
                    raise InputError(self.folder / "B" / name, f"the axes {axes}, as its A", other)
        for side, of_side, span in zip("AB", ends, self.rescale):
            check_range(self.folder / side, of_side, span)
        self.digest = digest.hexdigest()  # of names and pixels
        self.in_chans, self.out_chans, self.shape = first[0][0], first[1][0], tuple(first[0][1:])

    def __len__(self):
        return len(self.names)

    def read(self, name):
        return [read_slice(self.folder / side / name, span)
                for side, span in zip("AB", self.rescale)]

    def __getitem__(self, keys):
        """The batch of a list of (epoch, index): [a, b] or [a, b, flow], each (B, C, H, W)."""
        items = [self.item(epoch, index) for epoch, index in keys]
        return [torch.stack(tensors) for tensors in zip(*items)]

    def item(self, epoch, index):
        name = self.names[index]
        a, b = self.kept.get(name) or (fit_square(image, self.size) for image in self.read(name))
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
    try:
        numbers = [float(number) for number in text.split(",") if text]
    except ValueError:
        numbers = [0.0]
    a, b = tuple(numbers[:2]), tuple(numbers[-2:])
    if len(numbers) not in (0, 2, 4) or not all(span[0] < span[1] for span in (a, b) if span):
        raise InputError("--rescale", "LO,HI or LO,HI,LO,HI (A, then B) with LO < HI", text)
    return a or None, b or None


def square_box(shape, size):
    """Where `fit_square` puts an image of `shape` (H, W): (top, left, height, width)."""
    if not size:
        return 0, 0, *shape
    h, w = (max(1, round(n * size / max(shape))) for n in shape)
    return (size - h) // 2, (size - w) // 2, h, w


def fit_square(image, size):
    """Scales the longer side of (C, H, W) to `size`, antialiased, and pads to a square with
    background; 0 leaves the image as it is. A pixel that saw nothing but background (-1) is exactly
    -1, so `image != -1` is the foreground at every size."""
    if not size or tuple(image.shape[1:]) == (size, size):
        return image
    top, left, h, w = square_box(image.shape[1:], size)
    image = F.interpolate(image[None] + 1, (h, w), mode="bilinear", antialias=True)[0] - 1
    return F.pad(image.clamp(-1, 1), (left, size - w - left, top, size - h - top), value=-1.0)


# --------------------------------------------------------------------------------------------------
# Audit


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    data: str = option("csv", "layout of the data set", choices=list(DATASETS))
    root: str = option(".", "folder of the data set")
    split: str = option("", "named split, for data sets that have several (covid: covid1 ...)")
    pretraining: str = option("", "list or CSV of the images that a model was trained on before")


def audit(config):
    """Prints images, patients and positives of every part, then what is wrong: a patient or the
    same pixels in two parts, files that are unreadable. Returns 1 where anything is wrong."""
    parts, classes = read_parts(config.data, config.root, config.split, uncertain="ignore")
    groups, digests, problems, unknown = {}, {}, [], 0
    print(f"{'part':12s}{'images':>8s}{'patients':>10s}  positives")
    for name, part in parts.items():
        groups[name], people = set(units(part.owners)), [patient for _, patient in part.owners]
        unknown += people.count("")
        counts = ", ".join(f"{c} {int(n)}" for c, n in zip(classes, part.labels.nansum(0)))
        print(f"{name:12s}{len(part.names):8d}{len({*people} - {''}) or '?':>10}  {counts}")
        found = over_images(pixel_hash, part.paths)
        digests[name] = {digest: image for (digest, _), image in zip(found, part.names) if digest}
        problems += [reason for _, reason in found if reason]
    if config.pretraining:
        names = listed_names(config.pretraining)
        groups["pretraining"] = set(units(identify(config.root, names)))
        if not groups["pretraining"] & set().union(*(groups[name] for name in parts)):
            warn(f"{config.pretraining}: none of its {len(names)} names, such as {names[0]!r}, is "
                 "of an image or a patient here")
    for a, b in itertools.combinations(groups, 2):
        both = sorted(groups[a] & groups[b])
        if both and {a, b} != {"train", "pretraining"}:
            problems.append(f"{a} and {b}: {len(both)} patients in both: {', '.join(both[:5])}")
        same = sorted(digests.get(a, {}).keys() & digests.get(b, {}))
        if same:
            shown = ", ".join(f"{digests[a][x]} = {digests[b][x]}" for x in same[:5])
            problems.append(f"{a} and {b}: {len(same)} images with the same pixels: {shown}")
    sound = "nothing wrong: no patient and no image in two parts, every file readable"
    if unknown:
        sound = f"no image in two parts, every file readable; of {unknown} no patient is known"
    print("\n".join(problems) or sound)
    return int(bool(problems))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["audit"]:
        raise InputError("usage: python data.py audit [options]; audit --help lists them")
    sys.exit(audit(parse_config(AuditConfig, argv[1:], __doc__)))


if __name__ == "__main__":
    run_script(main)
