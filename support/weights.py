"""Weights of a ViT: reading a checkpoint, and loading what fits, under timm's names.

Checkpoints of MRM, MAE, MED-PEFT and timm load as they are. `python -m more.convert weights` makes
such a file of Hugging Face's ViT, DINOv2, CLIP and .safetensors.
"""

import math
import re

import torch
import torch.nn.functional as F

from support.script import InputError, checkpoint_file, load_checkpoint

ENCODER_SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks")  # how its tensors' names begin
# What other ViTs compute with beside these: leaving it out would change the result without a word
FOREIGN = re.compile("reg_tok|register|storage_tok|dist_tok|distil|norm_pre|ln_pre|rel_pos|rope")
HEADS = {128: 4, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width: tiny here, timm, MAE


def read_weights(path):
    """Reads a checkpoint (a file or a run's folder): (its tensors by name, all that it holds)."""
    path = checkpoint_file(path, "best.pt", "last.pt")
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: python -m more.convert weights makes a checkpoint of it")
    saved = load_checkpoint(path)
    return encoder_alone(unwrap(saved), path), saved


def unwrap(saved):
    """The tensors by name in what a file holds, from the entries in which others wrap them."""
    for entry in ("model", "state_dict", "model_ema", "teacher", "module"):
        if isinstance(saved.get(entry), dict):
            saved = saved[entry]
    return {str(name): tensor for name, tensor in saved.items() if torch.is_tensor(tensor)}


def is_plain(value):
    """Whether this is a tensor of floating-point numbers, neither sparse nor quantised."""
    return torch.is_tensor(value) and value.layout == torch.strided and value.is_floating_point()


def encoder_alone(tensors, source):
    """The tensors whose names begin as that of the patch embedding does (with `module.`, say), by
    their names without this prefix. Raises InputError where a file holds two encoders."""
    first = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(first) for name in tensors if ("." + name).endswith("." + first)]
    if len(prefixes) > 1:
        raise InputError(source, "one encoder", f"several: {sorted(prefixes)}")
    prefix = "".join(prefixes)
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def encoder_sizes(tensors, saved, source, num_heads=None):
    """The arguments of a ViT for a checkpoint: those it names, else what its tensors' shapes say.
    The number of heads is in no shape: it is `num_heads`, or that of a well-known width."""
    known = saved.get("sizes", saved.get("arguments"))
    if isinstance(known, dict):
        sizes = {name: known[name] for name in ENCODER_SIZES if name in known}
        if len(sizes) < 5 or not all(type(n) is int and n > 0 for n in sizes.values()):
            raise InputError(source, f"whole numbers above 0 as {', '.join(ENCODER_SIZES)}", sizes)
        return sizes
    kernel, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if kernel is None or kernel.ndim != 4 or positions is None:
        expected = "a ViT's tensors (patch_embed.proj.weight, pos_embed, blocks.*); of others " \
                   "python -m more.convert weights makes such"
        raise InputError(source, expected, ", ".join(sorted(tensors)[:4]) or "none")
    dim, _, patch, _ = kernel.shape
    heads = num_heads or HEADS.get(dim)
    if heads is None:
        raise InputError(source, f"--num-heads, which weights of width {dim} do not tell", "none")
    if num_heads is None:
        print(f"{source}: {heads} heads, as is usual at width {dim}; --num-heads takes others")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return dict(img_size=patch * grid_side(positions, source), patch_size=patch, embed_dim=dim,
                depth=depth, num_heads=heads)


def grid_side(positions, source):
    """The side n of the patch grid of positions (1, 1 + n*n, D), the class token's first."""
    n = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    if n < 1 or positions.shape[1] != 1 + n * n:
        expected = "positions (1, 1 + n*n, width), the class token's (or zeros) and a square grid's"
        raise InputError(f"{source}: pos_embed", expected, tuple(positions.shape))
    return n


def resize_positions(positions, length, source):
    """(1, 1 + n*n, D) -> (1, length = 1 + m*m, D), bicubic; the class token's stays as it is."""
    n, m = grid_side(positions, source), math.isqrt(length - 1)
    if n == m:
        return positions
    grid = positions[:, 1:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(m, m), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_encoder(model, tensors, source):
    """Loads the tensors that fit into `model` (ViT or MRM), and prints how many did.

    A patch embedding of three channels is summed to one, which is exact for grey repeated three
    times. `pos_embed` is resized where the grid differs. A ViT leaves `norm`, because it has a new
    `fc_norm`. Decoders and old heads may be left out; an encoder that has other tensors, or tensors
    of other sizes, is refused by name, and so are numbers that are not finite."""
    own, tensors = model.state_dict(), dict(tensors)
    for name in sorted(own.keys() & tensors.keys()):
        plain = is_plain(tensors[name])
        wrong = not plain or not tensors[name].float().isfinite().all()
        if own[name].is_floating_point() and wrong:
            found = "NaN or infinity" if plain else f"{tensors[name].dtype}"
            raise InputError(f"{source}: {name}", "finite floating-point numbers", found)
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3 and model.in_chans == 1:
        tensors["patch_embed.proj.weight"] = kernel.sum(1, keepdim=True)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors and name in own and tensors[name].shape[-1] == own[name].shape[2]:
            tensors[name] = resize_positions(tensors[name], own[name].shape[1], source)
    for name in sorted(own.keys() | tensors.keys()):
        mine, given = (tuple(held[name].shape) if name in held else "no such tensor"
                       for held in (own, tensors))
        encoder = name.split(".")[0] in ENCODER_PARTS or FOREIGN.match(name)
        fresh = "lora_" in name and name not in tensors  # LoRA starts from its own numbers
        if encoder and mine != given and not fresh:
            where = f"{source}: the encoder does not fit: {name}"
            raise InputError(where, f"{mine}, as the model has", given)
    fits = {name: t for name, t in tensors.items() if name in own and t.shape == own[name].shape}
    model.load_state_dict(fits, strict=False)
    counts = [f"{len(fits)} tensors loaded"]
    for word, names in (("new", own.keys() - fits.keys()), ("left", tensors.keys() - fits.keys())):
        parts = ", ".join(sorted({name.split(".")[0] for name in names}))
        counts.append(f"{len(names)} {word}" + (f" ({parts})" if parts else ""))
    print(f"{source}: {', '.join(counts)}")
