"""LoRA: a frozen linear layer learns through two thin matrices beside it.

    y = x W^T + b + (alpha / r) * dropout(x) A^T B^T      only A (r, in) and B (out, r) are trained

In plain torch these are eight lines. `LoRALinear` computes the same for several parts of one layer:

    class PlainLoRA(nn.Module):
        def __init__(self, linear, r, alpha):
            super().__init__()
            self.lin, self.scale, k = linear.requires_grad_(False), alpha / r, linear.in_features
            self.A = nn.Parameter(torch.empty(r, k).uniform_(-(k**-0.5), k**-0.5))
            self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        def forward(self, x):
            return self.lin(x) + self.scale * F.dropout(x, 0.1, self.training) @ self.A.T @ self.B.T

Why q and v: where a token looks depends on q and k through their product alone, so that adapting q
suffices to change it. Adapting v changes what the token takes from there. Why alpha / r: B A sums
r directions. If all learn the same, the sum is r times as large (sqrt(r) if each learns another).
Dividing by r bounds both, so that one alpha serves several ranks: 32, the papers', is 8 at rank 4.
Why B = 0: the layer starts as the plain one. A must not be 0 as well, because the gradient of each
has the other as a factor, and neither would ever learn.

Why it saves memory: a trained number needs a gradient and AdamW's two averages, a frozen one none
of them, and of a ViT-B 0.19 % is trained, with fc_norm and head. Most activations stay, because the
gradient still passes through every block. The peak falls by 29 % with 8 images a step and by 16 %
with 64 (tests/readme/results.md). An adapter's file is below 2 % of the model's.

One batch of the demo, rank 4: x (32, 37, 128) -> x A^T (32, 37, 8), which is t_q and t_v of four
numbers each -> t_q B_q^T and t_v B_v^T, (32, 37, 128) each, which are added to the q and the v
columns of x W^T + b (32, 37, 384). A (8, 128) and B (256, 4) are 2,048 numbers; W has 49,152.

    python lora.py merge --adapter runs/finetune/adapter.pt      # base + adapter -> one plain ViT
    python lora.py export-peft --adapter runs/finetune/adapter.pt --out DIR    # Hugging Face's peft
    python lora.py import-medpeft --weights CHECKPOINT --out adapter.pt        # from the paper's

Papers: Hu et al., "LoRA", ICLR 2022, eq. 3; for radiography "Less Could Be Better", 2024
(MED-PEFT): q and v of every block, alpha 32, dropout 0.1, A uniform (Hu et al.: Gaussian).
Before this file comes mrm.py, after it finetune.py; kernels/lora_linear.py has this layer forward
and backward by hand. Exercises 1, 8 and 9 of tests/exercises.md change this file.
Shapes: G adapted parts of P equal output parts (q and v of a fused qkv: G = 2, P = 3), r rank."""
import dataclasses
import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn

import kernels
from kernels.lora_linear import adapted_parts
from support.script import (
    InputError, check_apart, checkpoint_file, load_checkpoint, option, parse_config, run_script,
    save_checkpoint, write_json)
from support.weights import ENCODER_PARTS, is_plain, read_weights

# --------------------------------------------------------------------------------------------------
# The layer


class LoRALinear(nn.Linear):
    """`nn.Linear` with a low-rank addition on some of its output parts.
    parts: one bool per equal output part, True where LoRA adds to it: (True, False, True) is q and
    v of a fused qkv. Parameters: `weight` (out, in) and `bias`, which `add_lora` freezes; `lora_A`
    (G*r, in), r rows for q, then r for v, uniform within 1 / sqrt(in), as nn.Linear draws its
    weight; `lora_B` (G*out/P, r), zero. Raises ValueError for sizes that do not fit."""

    def __init__(self, in_features, out_features, rank, alpha=32, dropout=0.1, parts=(True,),
                 bias=True, **kwargs):
        if rank < 1 or not any(parts) or out_features % len(parts):
            raise ValueError("LoRA needs rank >= 1, an adapted part and parts that divide "
                             f"{out_features}, found rank {rank}, parts {tuple(parts)}")
        super().__init__(in_features, out_features, bias, **kwargs)
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.parts, self.merged = tuple(map(bool, parts)), False
        G, P = sum(self.parts), len(self.parts)
        self.lora_A = nn.Parameter(self.weight.new_empty(G * rank, in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(G * out_features // P, rank))
        nn.init.uniform_(self.lora_A, -(in_features**-0.5), in_features**-0.5)

    def forward(self, x):
        """x (..., in) -> (..., out): `reference_forward` in kernels/lora_linear.py, six lines."""
        if self.merged:
            return super().forward(x)
        dropout = self.dropout if self.training else 0.0
        return kernels.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale,
                                   self.parts, dropout)

    @torch.no_grad()
    def delta(self):
        """What merging adds to `weight`: (out, in) in float64, 0 where no part is adapted."""
        A, B = self.lora_A.double(), self.lora_B.double()
        delta = torch.zeros_like(self.weight, dtype=torch.float64)
        for rows, a, b in adapted_parts(self.parts, self.out_features, self.rank):  # of W, A, B
            delta[rows] = self.scale * B[b] @ A[a]  # (out/P, r) @ (r, in)
        return delta


# --------------------------------------------------------------------------------------------------
# Adding it to a model, and merging

# Which layers of a ViT are adapted: the paper's q and v, and beyond it (finetune.py --method
# lora-qkv, lora-all) q, k and v, or all linear layers. {last name of a layer: which parts of it}
TARGETS = {"qv": {"qkv": (True, False, True)}, "qkv": {"qkv": (True, True, True)},
           "all": {"qkv": (True, True, True), "proj": (True,), "fc1": (True,), "fc2": (True,)}}
SETTINGS = ("rank", "alpha", "dropout", "targets")  # add_lora's, which an adapter file holds


def part_of(name):
    """What a tensor of this name belongs to: lora, head (with fc_norm) or backbone."""
    if "lora_" in name:
        return "lora"
    return "head" if name.split(".")[0] in ("fc_norm", "head") else "backbone"


def add_lora(model, rank=4, alpha=32, dropout=0.1, targets=TARGETS["qv"]):
    """Puts LoRA on the linear layers whose last name is in `targets` (name -> parts) and freezes
    the backbone: LoRA, fc_norm and head are trained; tensors keep their names. Returns the model.
    Raises ValueError if no layer has such a name (the head would learn alone) or one has LoRA."""
    found = [(name, layer) for name, layer in model.named_modules()
             if name.rpartition(".")[2] in targets and isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}")
    for name, layer in found:
        if isinstance(layer, LoRALinear):  # replaced like the others, it would lose its A and B
            raise ValueError(f"{name} is a LoRA layer already")
        parent, _, child = name.rpartition(".")
        new = LoRALinear(layer.in_features, layer.out_features, rank, alpha, dropout,
                         targets[child], layer.bias is not None, device=layer.weight.device,
                         dtype=layer.weight.dtype)
        new.weight, new.bias = layer.weight, layer.bias  # the same tensors, not copies
        new.train(layer.training)
        setattr(model.get_submodule(parent), child, new)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) != "backbone")
    return model


def lora_layers(model):
    """Every LoRA layer of a model, in the model's order."""
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


@torch.no_grad()
def merge_lora(model):
    """Adds every delta to its frozen weight (in float64, rounded once), so that inference costs
    nothing extra. A merged layer is left as it is. Returns the model, changed in place."""
    for layer in lora_layers(model):
        if not layer.merged:
            layer.weight.copy_(layer.weight.double() + layer.delta())
            layer.merged = True
    return model


def count_parameters(model):
    """{"lora", "head", "trainable", "total"}: `total` is the deployed model, without LoRA's own."""
    count = dict.fromkeys(("lora", "head", "backbone", "trainable"), 0)
    for name, parameter in model.named_parameters():
        count[part_of(name)] += parameter.numel()
        count["trainable"] += parameter.numel() * parameter.requires_grad
    count["total"] = count.pop("backbone") + count["head"]
    return count


# --------------------------------------------------------------------------------------------------
# Adapter files


def lora_state_dict(model):
    """What an adapter file must hold: LoRA, fc_norm and head, not a batch norm's count."""
    return {n: t for n, t in model.state_dict().items() if part_of(n) != "backbone" and is_plain(t)}


def save_adapter(path, model, **extra):
    """Writes LoRA, fc_norm, head, SETTINGS and `extra` values."""
    targets = {name.rpartition(".")[2]: layer.parts for name, layer in model.named_modules()
               if isinstance(layer, LoRALinear)}
    first = lora_layers(model)[0]  # all of them have the same rank, scale and dropout
    settings = (first.rank, first.scale * first.rank, first.dropout, targets)
    adapter = {name: tensor.cpu().contiguous() for name, tensor in lora_state_dict(model).items()}
    save_checkpoint(path, {"adapter": adapter, "lora": dict(zip(SETTINGS, settings)), **extra})


def read_adapter_file(path):
    """All that an adapter file holds, as a dict. Raises InputError where it is no adapter."""
    saved = load_checkpoint(checkpoint_file(path, "adapter.pt"))
    tensors, settings = saved.get("adapter"), saved.get("lora")
    if not (isinstance(tensors, dict) and any(str(name).endswith(".lora_A") for name in tensors)
            and all(isinstance(name, str) and is_plain(tensors[name]) for name in tensors)
            and isinstance(settings, dict) and set(SETTINGS) <= settings.keys()):
        raise InputError(path, "an adapter (entries 'adapter' and 'lora')", [*map(str, saved)][:5])
    return saved | {"lora": {name: settings[name] for name in SETTINGS}}


def load_adapter(model, path):
    """Adds LoRA as the file says and loads it, fc_norm and head into `model`. Returns all that the
    file holds. Raises InputError where it was trained on a model of another size."""
    saved = read_adapter_file(path)
    try:
        if not lora_layers(model):
            add_lora(model, **saved["lora"])
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its LoRA does not fit: {error}") from None
    given, own = ({name: tuple(tensor.shape) for name, tensor in tensors.items()}
                  for tensors in (saved["adapter"], lora_state_dict(model)))
    for name in given | own:
        if given.get(name) != own.get(name):
            raise InputError(f"{path}: {name} {given.get(name, 'is missing and')} does not fit the "
                             f"model ({own.get(name, 'no such tensor')})")
    model.load_state_dict(saved["adapter"], strict=False)
    return saved


def fingerprint(tensors):
    """A hash of the encoder's tensors in a dict: an adapter names its base weights by it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.split(".")[0] in ENCODER_PARTS and "lora_" not in name and is_plain(tensor):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_base(path, saved, given=""):
    """(path, tensors) of the base weights of the adapter file `path`, which holds `saved`: at
    `given`, or where the adapter says, absolutely or relative to itself, because runs are moved.
    Raises InputError where they are not there or are not those that it was trained on."""
    weights = str(given or saved.get("weights", ""))
    places = [Path(weights), Path(path).parent / saved.get("weights_from_here", weights)]
    base = next((place for place in places if weights and place.exists()), None)
    if base is None:
        raise InputError(f"{path}: its base weights {weights} are not there; give them with "
                         "--weights to python lora.py merge, which makes one file of both")
    tensors, _ = read_weights(base)  # MED-PEFT's checkpoint is the base of the adapter in it
    tensors = {name: tensors[name] for name in tensors if "lora_" not in name}
    if saved.get("base_fingerprint") not in (None, fingerprint(tensors)):
        raise InputError(f"{path}: {base} are not the weights this adapter was trained on")
    return base, tensors


# --------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    adapter: str = option("runs/finetune/adapter.pt", "adapter file of a fine-tuning run")
    weights: str = option("", "base weights (default: the adapter's); MED-PEFT's to import")
    out: str = option("", "folder (export-peft) or file to write (default: beside what is read)")


def read_adapter(config, name_of_out):
    """What a command works on: (base tensors by name, all that the adapter file holds, the adapted
    layers by name, where to write). Raises InputError where they do not fit each other."""
    saved = read_adapter_file(config.adapter)
    source, base = read_base(config.adapter, saved, config.weights)
    adapter, layers = saved["adapter"], {}
    rank, alpha, dropout, targets = saved["lora"].values()
    try:
        for name in [key.removesuffix(".lora_A") for key in adapter if key.endswith(".lora_A")]:
            state = {"weight": base[name + ".weight"], "lora_A": adapter[name + ".lora_A"],
                     "lora_B": adapter[name + ".lora_B"]}
            layers[name] = LoRALinear(*state["weight"].shape[::-1], rank, alpha, dropout,
                                      targets[name.rpartition(".")[2]], bias=False)
            layers[name].load_state_dict(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{config.adapter}: {name} does not fit {source}: {error}") from None
    out = Path(config.out or Path(config.adapter).with_name(name_of_out))
    check_apart(out, config.adapter, source)
    return base, saved, layers, out


def merge(config):
    """Writes a plain ViT: the base encoder with every delta added, and the adapter's head."""
    base, saved, layers, out = read_adapter(config, "merged.pt")
    merged = {name: base[name] for name in base if name.split(".")[0] in ENCODER_PARTS}
    merged |= {name: tensor for name, tensor in saved["adapter"].items() if part_of(name) == "head"}
    for name, layer in layers.items():
        merged[name + ".weight"] = merge_lora(layer).weight.detach()
    of_adapter = ("adapter", "lora", "weights", "weights_from_here", "base_fingerprint")
    kept = {name: value for name, value in saved.items() if name not in of_adapter}
    save_checkpoint(out, kept | {"model": merged})
    print(f"{out}: {len(merged)} tensors, a plain ViT")


def export_peft(config):
    """Writes the adapter in the format of Hugging Face's peft, which has one A and B a layer.
    The G adapted parts become one adapter of rank G*r. A stays (G*r, in). B (out, G*r) is
    block-diagonal: B_g fills the rows of its part and the columns of its rank. lora_alpha is
    scale * G*r, because peft divides by G*r. fc_norm and head stay in the adapter file."""
    _, saved, layers, out = read_adapter(config, "peft")
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        ranks[name] = len(layer.lora_A)
        alphas[name] = layer.scale * ranks[name]
        B = torch.zeros(layer.out_features, ranks[name])
        for rows, a, b in adapted_parts(layer.parts, layer.out_features, layer.rank):
            B[rows, a] = layer.lora_B.detach()[b]
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    save_checkpoint(out / "adapter_model.bin", tensors)
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA", "r": max(ranks.values()), "rank_pattern": ranks,
        "lora_alpha": max(alphas.values()), "alpha_pattern": alphas, "bias": "none",
        "lora_dropout": saved["lora"]["dropout"], "target_modules": list(layers)})
    print(f"{out}: {len(tensors)} tensors of rank {sorted(set(ranks.values()))} for peft")


def import_medpeft(config):
    """Writes an adapter file, with fc_norm and head, from a checkpoint of MED-PEFT, which must
    be the base too: MED-PEFT's train() and eval() let frozen weights drift. It fixes alpha 32,
    dropout 0.1 and q and v. Raises InputError for other checkpoints."""
    tensors, _ = read_weights(config.weights)
    adapter = {n: t.float() for n, t in tensors.items() if part_of(n) != "backbone" and is_plain(t)}
    ranks = {n for name in adapter if name.endswith("lora_B") for n in adapter[name].shape[-1:]}
    if len(ranks) != 1:
        raise InputError(config.weights, "a checkpoint of MED-PEFT, LoRA of one rank beside qkv",
                         f"ranks {sorted(ranks)}")
    out = Path(config.out or Path(config.weights).absolute().with_name("imported.pt"))
    check_apart(out, config.weights)
    settings = {"rank": ranks.pop(), "alpha": 32.0, "dropout": 0.1, "targets": TARGETS["qv"]}
    save_checkpoint(out, {
        "adapter": adapter, "lora": settings, "weights": os.path.abspath(config.weights),
        "weights_from_here": os.path.relpath(config.weights, out.parent),
        "base_fingerprint": fingerprint(tensors)})
    print(f"{out}: {len(adapter)} tensors, LoRA of rank {settings['rank']} for {config.weights}")


def main():
    commands = {"merge": merge, "export-peft": export_peft, "import-medpeft": import_medpeft}
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(__doc__)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise InputError(f"usage: python lora.py {' | '.join(commands)} [--help]")
    command = commands[sys.argv[1]]
    command(parse_config(LoRAConfig, sys.argv[2:], command.__doc__))


if __name__ == "__main__":
    run_script(main)
