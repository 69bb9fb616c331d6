"""Weights of a ViT: reading a checkpoint, and loading what fits, under timm's names.

Weights that MRM, MAE, MED-PEFT and timm have published load as they are: `read_weights` and
`load_encoder` say what fits.
"""

import math

import torch
import torch.nn.functional as F

from support.script import InputError, checkpoint_file, load_checkpoint

ENCODER_SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks")  # how its tensors' names begin
HEADS = {128: 4, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width: tiny here, timm, MAE


def read_weights(path):
    """Reads a checkpoint (a file or a run's folder): (its tensors by name, all that it holds).
    An entry such as `state_dict` is opened, and a prefix such as `module.` comes off the names."""
    saved = tensors = load_checkpoint(checkpoint_file(path, "best.pt", "last.pt"))
    for name in ("model", "state_dict"):
        if isinstance(tensors.get(name), dict):
            tensors = tensors[name]
    tensors = {str(name): tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}
    first = "patch_embed.proj.weight"
    prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, saved


def encoder_sizes(tensors, saved, source, num_heads=None):
    """The arguments of a ViT for a checkpoint: those it names, else what its tensors' shapes say.
    The number of heads is in no shape: it is `num_heads`, or that of a well-known width."""
    known = saved.get("sizes", saved.get("arguments"))
    if isinstance(known, dict):
        return {name: known[name] for name in known if name in ENCODER_SIZES}
    if "patch_embed.proj.weight" not in tensors or "pos_embed" not in tensors:
        expected = "a ViT's tensors (patch_embed.proj.weight, pos_embed, blocks.*)"
        raise InputError(source, expected, ", ".join(sorted(tensors)[:4]) or "none")
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    heads = num_heads or HEADS.get(dim)
    if heads is None:
        raise InputError(source, f"--num-heads, which weights of width {dim} do not tell", "none")
    side = patch * math.isqrt(tensors["pos_embed"].shape[1] - 1)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return dict(img_size=side, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads)


def resize_positions(positions, length, source):
    """(1, 1 + n*n, D) -> (1, length = 1 + m*m, D), bicubic; the class token's stays as it is."""
    n, m = math.isqrt(positions.shape[1] - 1), math.isqrt(length - 1)
    if positions.shape[1] != 1 + n * n:
        expected = "positions (1, 1 + n*n, width), the class token's (or zeros) and a square grid's"
        raise InputError(f"{source}: pos_embed", expected, tuple(positions.shape))
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
    of other sizes, is refused by name, and so are numbers that are not finite.
    """
    own, tensors = model.state_dict(), dict(tensors)
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3 and model.in_chans == 1:
        tensors["patch_embed.proj.weight"] = kernel.sum(1, keepdim=True)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors and name in own and tensors[name].shape[-1] == own[name].shape[2]:
            tensors[name] = resize_positions(tensors[name], own[name].shape[1], source)
    for name in sorted(own.keys() | tensors.keys()):
        mine, given = (tuple(held[name].shape) if name in held else "no such tensor"
                       for held in (own, tensors))
        encoder = name.split(".")[0] in ENCODER_PARTS and not (name not in tensors
                                                               and "lora_" in name)
        if encoder and mine != given:
            raise InputError(f"{source}: the encoder does not fit: {name}",
                             f"{mine}, as the model has", given)
        if name in own and name in tensors and not tensors[name].float().isfinite().all():
            raise InputError(f"{source}: {name}", "finite numbers", "NaN or infinity")
    fits = {name: t for name, t in tensors.items() if name in own and t.shape == own[name].shape}
    model.load_state_dict(fits, strict=False)
    counts = [f"{len(fits)} tensors loaded"]
    for word, names in (("new", own.keys() - fits.keys()), ("left", tensors.keys() - fits.keys())):
        parts = ", ".join(sorted({name.split(".")[0] for name in names}))
        counts.append(f"{len(names)} {word}" + (f" ({parts})" if parts else ""))
    print(f"{source}: {', '.join(counts)}")
