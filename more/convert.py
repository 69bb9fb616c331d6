"""One-off conversions of what others publish to what the scripts read.

    python -m more.convert weights --source model.safetensors --out vit.pt    # to timm's names
    python -m more.convert masks --source train-rle.csv --root DIR    # SIIM's, to DIR/masks/*.png
    python -m more.convert shrink --root DIR --size 512 --out NEW     # smaller copies of the images

`weights` reads Hugging Face's ViT and DINOv2 (RAD-DINO), OpenCLIP's with timm's ViT (BiomedCLIP)
and timm's with LayerScale, which goes into the layer before it: gamma (W x + b) = (gamma W) x +
gamma b. An encoder that computes otherwise is refused by a name where it is loaded. No file holds
the epsilon of LayerNorm, which is 1e-6 here and 1e-12 in Hugging Face's ViT.

`shrink` keeps names and formats, so that lists and tables stay valid. It makes pictures of 8 bits
smaller. Those that are small already, DICOM, .npy, NIfTI, pictures of 16 bits, whose white a run
finds in their finest detail, and files that are no images are copied as they are.
"""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import data
from support.script import (
    InputError, atomic_write, check_apart, load_checkpoint, option, over_images, parse_config,
    run_script, save_checkpoint)
from support.weights import encoder_alone, unwrap


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    source: str = option("", "weights: a checkpoint or .safetensors; masks: the CSV")
    root: str = option("", "masks, shrink: the folder of the data set")
    out: str = option("", "what to write (default: vit.pt, ROOT/masks); shrink: a new folder")
    size: int = option(512, "shrink: pixels of a copy's shorter side", within="[1, inf)")


# --------------------------------------------------------------------------------------------------
# Weights

RENAMED = (("embeddings.patch_embeddings.projection", "patch_embed.proj"),  # Hugging Face, timm
           ("embeddings.position_embeddings", "pos_embed"), ("embeddings.", ""),
           ("encoder.layer.", "blocks."), ("attention.attention.", "attn."),
           ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"),
           ("output.dense", "mlp.fc2"), ("layernorm_before", "norm1"),
           ("layernorm_after", "norm2"), ("layer_scale1.lambda1", "ls1.gamma"),
           ("layer_scale2.lambda1", "ls2.gamma"), ("layernorm", "norm"))


def read_tensors(path):
    """All tensors of a checkpoint or of a .safetensors file, by name."""
    if Path(path).suffix != ".safetensors":
        return unwrap(load_checkpoint(path))
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except Exception as error:  # it is not installed, or the file is damaged in one of many ways
        raise InputError(f"{path}: not readable by pip's safetensors ({error})") from None


def as_timm(theirs):
    """The tensors of a ViT under timm's names, with one qkv a block and without LayerScale. Raises
    ValueError, LookupError or RuntimeError where parts of a layer are missing or do not fit."""
    tensors = {}
    for name, tensor in theirs.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        if name in tensors:
            raise ValueError(f"two tensors {name}, of several layouts")
        tensors[name] = tensor
    for name in [name for name in tensors if ".attn.query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "qkv")] = torch.cat(parts)
    for name in [name for name in tensors if re.search(r"\.ls[12]\.gamma$", name)]:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        gamma = tensors.pop(name).float()  # (D,)
        tensors[layer + ".weight"] = gamma[:, None] * tensors[layer + ".weight"].float()
        tensors[layer + ".bias"] = gamma * tensors[layer + ".bias"].float()
    return tensors


def weights(config):
    """Writes the encoder in --source under timm's names, as every script reads it."""
    source, out = config.source, config.out or "vit.pt"
    try:
        tensors = encoder_alone(as_timm(read_tensors(source)), source)
    except (ValueError, LookupError, RuntimeError) as error:
        raise InputError(source, "a ViT with whole layers", error) from None
    check_apart(out, source)
    save_checkpoint(out, {"model": tensors})
    print(f"{out}: {len(tensors)} tensors for --weights, which refuses what its ViT would not "
          "compute; --num-heads says the heads")


# --------------------------------------------------------------------------------------------------
# Masks


def decode_runs(rows, shape, where):
    """The mask (H, W) of rows of pairs `start length`. Pixels are counted down the columns, and
    each start from the end of the run before it. The row -1 holds no pair."""
    columns = np.zeros(shape[0] * shape[1], bool)
    for row in rows:
        numbers, end = list(map(int, row.split())), 0
        for skipped, length in zip(numbers[::2], numbers[1::2]):
            start, end = end + skipped, end + skipped + length
            if end > columns.size:
                raise InputError(where, f"runs within {columns.size} pixels, each start counted "
                                 "from the last run", f"one to pixel {end}")
            columns[start:end] = True
    return columns.reshape(shape[::-1]).T


def masks(config):
    """Writes OUT/NAME.png (default: ROOT/masks) for each image in --source, a CSV of ImageId (its
    whole name) and EncodedPixels: one or more rows of runs, or one row of -1, for an empty mask."""
    root, rows = Path(config.root).absolute(), {}
    folder = Path(config.out or root / "masks")
    for line, name, text in data.read_csv(config.source, ("ImageId", "EncodedPixels")):
        if not re.fullmatch(r"-1|\d{1,9} \d{1,9}( \d{1,9} \d{1,9})*", text):
            raise InputError(f"{config.source}: line {line}", "-1, or pairs `start length`",
                             text[:40] or "nothing")
        rows.setdefault(name, []).append(text)
    paths = data.list_images(root / "images" if (root / "images").is_dir() else root)
    keys = data.image_keys(root, paths)
    images = {Path(key).name: (path, key) for path, key in zip(paths, keys)}
    if len(images) < len(keys):
        raise InputError(root, "a name of its own for each image", "one name in two folders")
    for name in sorted(rows.keys() & images.keys()):
        path, key = images[name]
        shape = data.read_pixels(path)[0].shape[:2]
        mask = decode_runs(rows[name], shape, f"{config.source}: {name}")
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        atomic_write(folder / f"{key}.png", functools.partial(picture.save, format="PNG"))
    if missing := rows.keys() - images.keys():
        raise InputError(f"{config.source}: no image below {root} has the name {min(missing)} "
                         f"({len(missing)} are missing; the others' masks are written)")
    print(f"{folder}: the masks of {config.source}")


# --------------------------------------------------------------------------------------------------
# Smaller copies


def smaller(pixels, size):
    """A picture of 8 bits (H, W) or (H, W, 3) with `size` pixels on the shorter side."""
    x = torch.from_numpy(np.atleast_3d(pixels) / 255).permute(2, 0, 1)  # (C, H, W) in [0, 1]
    x = (data.resize(x, size) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(x if pixels.ndim == 3 else x[..., 0])


def copy_file(path, root, out, size):
    """Copies a file. Returns whether the copy is smaller."""
    copy, (pixels, scale) = out / path.relative_to(root), (None, None)
    if data.kind_of(path) == "picture":
        pixels, scale = data.read_pixels(path)
    if scale != 255 or min(pixels.shape[:2]) <= size:
        atomic_write(copy, lambda file: file.write(path.read_bytes()))
        return False
    original, picture = Image.open(path), smaller(pixels, size)
    if np.isin(pixels, (pixels.min(), pixels.max())).all():  # two values: a mask stays one
        picture = ImageOps.exif_transpose(original).resize(picture.size, Image.Resampling.NEAREST)
    atomic_write(copy, functools.partial(picture.save, format=original.format, quality=95))
    return True


def shrink(config):
    """Copies --root to the new folder --out, images with --size pixels on the shorter side."""
    root, out = Path(config.root).absolute(), Path(config.out).absolute()
    if not config.root or not root.is_dir():
        raise InputError("--root", "a folder", config.root or "none")
    if not config.out or root in (out, *out.parents) or out.exists() and any(out.iterdir()):
        raise InputError("--out", "a new folder outside --root", config.out or "none")
    paths = sorted(path for path in map(Path, data.list_files(root)) if path.is_file())
    copy = functools.partial(copy_file, root=root, out=out, size=config.size)
    done = over_images(copy, paths)
    print(f"{out}: {sum(done)} images made smaller, {done.count(False)} files copied as they are")


def main():
    command = {"weights": weights, "masks": masks, "shrink": shrink}.get("".join(sys.argv[1:2]))
    if command is None:
        raise InputError("usage: python -m more.convert weights | masks | shrink [--help]")
    command(parse_config(ConvertConfig, sys.argv[2:], command.__doc__))


if __name__ == "__main__":
    run_script(main)
