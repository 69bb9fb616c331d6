"""One-off conversions of what others publish to what the scripts read.

    python -m more.convert weights --source model.safetensors --out vit.pt    # to timm's names
    python -m more.convert masks --source train-rle.csv --root DIR    # SIIM's, to DIR/masks/*.png
    python -m more.convert shrink --root DIR --size 512 --out NEW     # smaller copies of X-rays

`weights` reads Hugging Face's ViT and DINOv2 (RAD-DINO), OpenCLIP's with timm's ViT (BiomedCLIP)
and timm's with LayerScale, which goes into the linear layer before it, exactly:
gamma * (W x + b) = (gamma W) x + gamma b. An encoder that computes otherwise is refused by a name.
No file has the epsilon of LayerNorm, which is 1e-6 here and 1e-12 in Hugging Face's ViT.

`shrink` keeps names, formats and bits, so that lists and tables stay valid. Films that are small
already, .npy, NIfTI and what is no image are copied as they are.
"""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from support.script import (
    InputError, atomic_write, check_apart, load_checkpoint, option, over_images, parse_config,
    run_script, save_checkpoint)
from support.weights import encoder_alone, encoder_sizes, load_encoder, unwrap
from vit import ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    source: str = option("", "weights: a checkpoint or .safetensors; masks: the CSV")
    root: str = option("", "masks, shrink: the folder of the data set")
    out: str = option("", "weights: the file to write; shrink: a new folder")
    size: int = option(512, "shrink: pixels of a copy's shorter side", within="[1, inf)")
    white: int = option(None, "shrink: --white of the runs that will read the copies")


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
    except ImportError:
        raise InputError(f"{path}: needs safetensors: pip install safetensors") from None
    except Exception as error:  # a damaged file raises one of several types
        raise InputError(f"{path}: not readable as safetensors ({error})") from None


def as_timm(theirs):
    """The tensors of a ViT under timm's names, with one qkv a block and without LayerScale. Raises
    ValueError, LookupError or RuntimeError where its layers are not whole."""
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
    source, tensors = config.source, read_tensors(config.source)
    try:
        tensors = encoder_alone(as_timm(tensors), source)
    except (ValueError, LookupError, RuntimeError) as error:
        raise InputError(source, "a ViT with whole layers", error) from None
    sizes = encoder_sizes(tensors, {}, source, num_heads=1)  # which no tensor depends on
    load_encoder(ViT(**sizes), tensors, source)  # refuses what a ViT would not compute
    out = config.out or "vit.pt"
    check_apart(out, source)
    save_checkpoint(out, {"model": tensors})
    print(f"{out}: {len(tensors)} tensors of a ViT for --weights; --num-heads says its heads")


# --------------------------------------------------------------------------------------------------
# Masks


def decode_runs(rows, shape, where):
    """The mask (H, W) of rows of pairs `start length`, which go down the columns. A start counts
    from the end of the last run. -1 is no pair."""
    columns = np.zeros(shape[0] * shape[1], bool)
    for row in rows:
        numbers, end = list(map(int, row.split())), 0
        for skipped, length in zip(numbers[::2], numbers[1::2]):
            start, end = end + skipped, end + skipped + length
            if end > columns.size:
                within = f"runs within {columns.size} pixels, each start counted from the last run"
                raise InputError(where, within, f"one to pixel {end}")
            columns[start:end] = True
    return columns.reshape(shape[::-1]).T


def masks(config):
    """Writes ROOT/masks/NAME.png for each film in --source, a CSV of ImageId and EncodedPixels. A
    film has rows of runs, or one of -1, for no mask. It is looked up by its whole name."""
    root, rows = Path(config.root), {}
    for line, name, text in data.read_csv(config.source, ("ImageId", "EncodedPixels")):
        rows.setdefault(name, []).append(text)
        both = len(rows[name]) > 1 and "-1" in rows[name]
        if both or not re.fullmatch(r"-1|\d{1,9} \d{1,9}( \d{1,9} \d{1,9})*", text):
            raise InputError(f"{config.source}: line {line}", "-1 alone, or pairs `start length`",
                             "both" if both else text[:40] or "nothing")
    paths = data.list_images(root / "images" if (root / "images").is_dir() else root)
    keys = data.image_keys(root, paths)
    if len({Path(key).name for key in keys}) < len(keys):
        raise InputError(root, "a name of its own for each film", "one name in two folders")
    for path, key in zip(paths, keys):
        if runs := rows.pop(Path(key).name, None):
            shape = data.read_pixels(path)[0].shape[:2]
            mask = decode_runs(runs, shape, f"{config.source}: {Path(key).name}")
            picture = Image.fromarray(mask.astype(np.uint8) * 255)
            write = functools.partial(picture.save, format="PNG")
            atomic_write(root / "masks" / f"{key}.png", write)
    if rows:
        raise InputError(f"{config.source}: no film below {root} has the name {min(rows)} "
                         f"({len(rows)} are missing; the others' masks are written)")
    print(f"{root / 'masks'}: the masks of {config.source}")


# --------------------------------------------------------------------------------------------------
# Smaller copies


def smaller(pixels, shape):
    """Numbers (H, W) or (H, W, 3) at the size `shape` (h, w), of the same type and range."""
    x = torch.from_numpy(np.atleast_3d(pixels).astype(np.float64)).permute(2, 0, 1)[None]
    x = F.interpolate(x, shape, mode="bicubic", antialias=True).clamp(x.min(), x.max())
    x = x[0].permute(1, 2, 0).numpy().reshape(*shape, *pixels.shape[2:])
    return (x.round() if pixels.dtype.kind in "ui" else x).astype(pixels.dtype)


def smaller_dicom(path, shape):
    import pydicom
    record = pydicom.dcmread(path, force=True)
    record.set_pixel_data(smaller(record.pixel_array, shape), record.PhotometricInterpretation,
                          record.BitsStored, generate_instance_uid=False)
    for name in ("PixelSpacing", "ImagerPixelSpacing"):  # which are the film's, not the copy's
        record.pop(name, None)
    return functools.partial(record.save_as, enforce_file_format=True)


def copy_file(path, root, out, size, white=None):
    """Copies a file, and returns whether the copy is smaller, or in a word what is wrong."""
    name, ending = path.relative_to(root), data.split_ending(path.name)[1].lower()
    kind = data.kind_of(path) if ending else ""
    try:
        pixels, scale = data.read_pixels(path) if kind in ("picture", "dicom") else (None, None)
        if pixels is None or min(pixels.shape[:2]) <= size:
            atomic_write(out / name, lambda file: file.write(path.read_bytes()))
            return False
        shape = [round(side * size / min(pixels.shape[:2])) for side in pixels.shape[:2]]
        picture = Image.fromarray(smaller(pixels, shape)) if kind == "picture" else None
        if picture and np.isin(pixels, (pixels.min(), pixels.max())).all():  # a mask stays one
            picture = Image.open(path).resize(shape[::-1], Image.Resampling.NEAREST)
        write = smaller_dicom(path, shape) if kind == "dicom" else functools.partial(
            picture.save, format=Image.registered_extensions()[ending], quality=95)
        atomic_write(out / name, write)
        if scale != 255:  # what is white depends on the numbers: a run must find the same one
            film = data.resize(data.read_image(path, white=white), shape)
            if (film - data.read_image(out / name, white=white)).abs().mean() > 0.02:
                return f"{path}: a run would scale its copy's numbers otherwise; --white settles it"
        return True
    except Exception as error:  # a decoder or an encoder raises one of a dozen types
        return str(error) if isinstance(error, InputError) else f"{path}: {error}"


def shrink(config):
    """Copies --root to the new folder --out, films with --size pixels on the shorter side."""
    root, out = Path(config.root).absolute(), Path(config.out).absolute()
    if not config.root or not root.is_dir():
        raise InputError("--root", "a folder", config.root or "none")
    if not config.out or root in (out, *out.parents) or out.exists() and any(out.iterdir()):
        raise InputError("--out", "a new folder outside --root", config.out or "none")
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    settings = dict(root=root, out=out, size=config.size, white=config.white)
    done = over_images(functools.partial(copy_file, **settings), paths)
    wrong = [reason for reason in done if isinstance(reason, str)]
    if wrong:
        raise InputError(f"{len(wrong)} of {len(paths)} files have no right copy: {wrong[0]}")
    print(f"{out}: {sum(done)} films made smaller, {done.count(False)} files copied as they are")


def main():
    command = {"weights": weights, "masks": masks, "shrink": shrink}.get("".join(sys.argv[1:2]))
    if command is None:
        raise InputError("usage: python -m more.convert weights | masks | shrink [--help]")
    command(parse_config(ConvertConfig, sys.argv[2:], command.__doc__))


if __name__ == "__main__":
    run_script(main)
