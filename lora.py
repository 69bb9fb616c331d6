"""LoRA: a frozen linear layer learns through two thin matrices beside it.

    y = x W^T + b + (alpha / r) * dropout(x) A^T B^T         A (r, in), B (out, r), only A and B are trained

    python lora.py merge --adapter runs/finetune/adapter.pt --out merged.pt   # base + adapter -> one plain ViT
    python lora.py export-peft --adapter runs/finetune/adapter.pt --out DIR   # for Hugging Face's peft

Paper: Hu et al., "LoRA", ICLR 2022, eq. 3; for radiography: "Less Could Be Better: Parameter-efficient Fine-tuning
Advances Medical Vision Foundation Models", 2024 (MED-PEFT): q and v of every block, alpha 32, dropout 0.1.

Where this file departs from MED-PEFT's code, and why:
 1. Merging is the explicit call `merge_lora`, in float64, with an inverse; there it happens inside train() / eval(),
    a flag is left unset so that the delta counts twice, and the frozen weights drift.
 2. B A is two thin products on the adapted columns alone; there it is a zero-padded grouped convolution.
 3. An adapter file holds LoRA + fc_norm + head + what rebuilds the model; there a checkpoint holds everything.

Shapes: G adapted parts of P equal output parts (q and v of a fused qkv: G = 2, P = 3), r rank.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

import data
import kernels
from data import InputError, option


class LoRALinear(nn.Linear):
    """`nn.Linear` with a low-rank addition on some of its output parts.

    parts: one bool per equal output part, True where LoRA adds to it: (True, False, True) is q and v of a fused qkv.
    Parameters: `weight` (out, in) and `bias` frozen by `add_lora`; `lora_A` (G*r, in) Kaiming-uniform(a = sqrt 5),
    `lora_B` (G*out/P, r) zero, so that the layer starts as the plain one. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, in_features, out_features, rank, alpha=32, dropout=0.1, parts=(True,), bias=True, **kwargs):
        if rank < 1 or not any(parts) or out_features % len(parts):
            raise ValueError(f"LoRA needs rank >= 1, an adapted part and {out_features} outputs divisible by the "
                             f"{len(parts)} parts, found rank {rank}, parts {tuple(parts)}")
        super().__init__(in_features, out_features, bias, **kwargs)
        groups = sum(parts)
        self.rank, self.parts, self.scale, self.dropout = rank, tuple(map(bool, parts)), alpha / rank, dropout
        self.merged = False
        self.lora_A = nn.Parameter(self.weight.new_empty(groups * rank, in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(groups * out_features // len(parts), rank))
        for A in self.lora_A.data.split(rank):  # a part at a time: the bound depends on `in` alone
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if self.merged:
            return super().forward(x)
        dropout = self.dropout if self.training else 0.0
        return kernels.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, self.parts, dropout)

    @torch.no_grad()
    def delta(self):
        """What merging adds to `weight`: scale * B_g A_g on adapted parts, 0 elsewhere, (out, in) in float64."""
        delta = torch.zeros_like(self.weight, dtype=torch.float64)
        adapted = [part for part, on in zip(delta.chunk(len(self.parts)), self.parts) if on]  # views of (out/P, in)
        A, B = self.lora_A.double().chunk(len(adapted)), self.lora_B.double().chunk(len(adapted))
        for part, A_g, B_g in zip(adapted, A, B):
            part.copy_(self.scale * B_g @ A_g)
        return delta

    @torch.no_grad()
    def _add(self, sign):
        self.weight.copy_(self.weight.double() + sign * self.delta())
        self.merged = sign > 0

    def extra_repr(self):
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, parts={self.parts}"


def add_lora(model, rank=4, alpha=32, dropout=0.1, targets={"qkv": (True, False, True)}, train=("fc_norm", "head")):
    """Replaces the linear layers whose last name is in `targets` (name -> parts) and freezes all but LoRA and `train`.

    The layers keep their weights and their state-dict keys. Returns the model, changed in place; raises ValueError if
    no layer has such a name or the model holds LoRA already.
    """
    found = [(name, layer) for name, layer in model.named_modules()
             if name.rpartition(".")[2] in targets and isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}")
    for name, layer in found:
        if isinstance(layer, LoRALinear):
            raise ValueError(f"{name} is a LoRA layer already")
        parent, _, child = name.rpartition(".")
        new = LoRALinear(layer.in_features, layer.out_features, rank, alpha, dropout, targets[child],
                         layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype)
        new.weight, new.bias = layer.weight, layer.bias
        new.train(layer.training)
        setattr(model.get_submodule(parent), child, new)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.split(".")[0] in train)
    return model


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def merge_lora(model):
    """Adds every delta to its frozen weight (in float64, rounded once), so that inference costs nothing extra."""
    for layer in lora_layers(model):
        if not layer.merged:
            layer._add(+1)
    return model


def unmerge_lora(model):
    """The inverse of `merge_lora`, exact to one rounding of the weights."""
    for layer in lora_layers(model):
        if layer.merged:
            layer._add(-1)
    return model


def count_parameters(model):
    """{"lora", "head" (fc_norm + head), "trainable", "total"}: `total` is the deployed model, without LoRA's own."""
    count = dict.fromkeys(("lora", "head", "trainable", "total"), 0)
    for name, parameter in model.named_parameters():
        part = "lora" if "lora_" in name else "head" if name.split(".")[0] in ("fc_norm", "head") else None
        if part:
            count[part] += parameter.numel()
        count["trainable"] += parameter.numel() * parameter.requires_grad
        count["total"] += parameter.numel() * (part != "lora")
    return count


def lora_state_dict(model):
    """What an adapter file must hold: every tensor of LoRA, fc_norm and head."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if "lora_" in name or name.split(".")[0] in ("fc_norm", "head")}


def frozen_state_dict(model):
    """The rest: the backbone an adapter was trained on, under plain ViT keys."""
    adapter = lora_state_dict(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in adapter}


def save_adapter(path, model, **extra):
    """Writes LoRA + fc_norm + head + what rebuilds them (rank, alpha, dropout, targets) + `extra` plain values."""
    layers = {name.rpartition(".")[2]: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    layer = next(iter(layers.values()))
    settings = {"rank": layer.rank, "alpha": layer.scale * layer.rank, "dropout": layer.dropout,
                "targets": {name: layer.parts for name, layer in layers.items()}}
    adapter = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_state_dict(model).items()}
    data.save_checkpoint(path, {"adapter": adapter, "lora": settings, **extra})


def read_adapter_file(path):
    """The dict of an adapter file; InputError where it is none."""
    state = data.load_checkpoint(path)
    if not {"adapter", "lora"} <= state.keys():
        raise InputError(f"{path}: expected an adapter (entries 'adapter' and 'lora'), found {sorted(state)[:5]}")
    if not isinstance(state["adapter"], dict) or not any(name.endswith(".lora_A") for name in state["adapter"]):
        raise InputError(f"{path}: expected tensors of LoRA in 'adapter', found none")
    if not isinstance(state["lora"], dict) or not {"rank", "alpha", "dropout", "targets"} <= state["lora"].keys():
        raise InputError(f"{path}: expected rank, alpha, dropout and targets in 'lora', found {state['lora']}")
    return state


def load_adapter(model, path):
    """Adds LoRA as the file says and loads it, fc_norm and head into `model`; returns the file's dict.

    Raises InputError where the file is no adapter or was trained on a model of another size.
    """
    state = read_adapter_file(path)
    if not lora_layers(model):
        add_lora(model, **state["lora"])
    own = lora_state_dict(model)
    for name, tensor in state["adapter"].items():
        if name not in own or own[name].shape != tensor.shape:
            found = tuple(own[name].shape) if name in own else "no such tensor"
            raise InputError(f"{path}: {name} {tuple(tensor.shape)} does not fit the model ({found}): the adapter was "
                             "trained on other weights")
    if missing := sorted(own.keys() - state["adapter"].keys()):
        raise InputError(f"{path}: {len(missing)} tensors of the adapter are missing, {missing[0]} first")
    model.load_state_dict(state["adapter"], strict=False)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    adapter: str = option("runs/finetune/adapter.pt", "adapter file of a fine-tuning run")
    weights: str = option("", "base checkpoint (default: the one the adapter names)")
    out: str = option("", "file (merge) or folder (export-peft) to write (default: merged.pt or peft beside the adapter)")


def read_adapter(config):
    """(base state dict, adapter's dict) of a command line; InputError where either cannot be used."""
    saved = read_adapter_file(config.adapter)
    if not config.weights and "weights" not in saved:
        raise InputError(f"{config.adapter}: names no base weights; give them with --weights")
    source = data.checkpoint_file(config.weights or saved["weights"], "best.pt", "last.pt")
    base = data.load_checkpoint(source)
    base = base.get("model", base)
    for name, A in saved["adapter"].items():
        if name.endswith(".lora_A"):
            weight, B = base.get(name[:-6] + "weight"), saved["adapter"].get(name[:-1] + "B")
            if weight is None or weight.shape[1] != A.shape[1]:
                raise InputError(f"{source}: {name[:-6]}weight does not fit {config.adapter}: other weights than it was "
                                 "trained on")
            parts, rank = saved["lora"]["targets"][name.split(".")[-2]], saved["lora"]["rank"]
            if B is None or B.shape != (sum(parts) * len(weight) // len(parts), rank) or len(A) != sum(parts) * rank:
                found = "no such tensor" if B is None else tuple(B.shape)
                raise InputError(f"{config.adapter}: {name[:-1]}B does not fit {name} and the weights ({found})")
    return base, saved


def merge(config):
    """Writes one plain ViT checkpoint: the base encoder with every delta added, fc_norm and head of the adapter."""
    base, saved = read_adapter(config)
    settings, adapter = saved["lora"], saved["adapter"]
    merged = {name: tensor for name, tensor in base.items()
              if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "blocks")}
    for name in [name[:-len(".lora_A")] for name in adapter if name.endswith(".lora_A")]:
        weight = base[name + ".weight"]
        parts = settings["targets"][name.rpartition(".")[2]]
        layer = LoRALinear(weight.shape[1], weight.shape[0], settings["rank"], settings["alpha"], parts=parts, bias=False)
        layer.load_state_dict({"weight": weight, "lora_A": adapter[name + ".lora_A"], "lora_B": adapter[name + ".lora_B"]})
        merged[name + ".weight"] = merge_lora(layer).weight.detach()
    merged |= {name: tensor for name, tensor in adapter.items() if "lora_" not in name}
    out = Path(config.out or Path(config.adapter).with_name("merged.pt"))
    about = {name: saved[name] for name in ("sizes", "classes", "mean", "std") if name in saved}
    data.save_checkpoint(out, {"model": merged, **about})
    print(f"{out}: {len(merged)} tensors, a plain ViT")


def export_peft(config):
    """Writes the adapter in the format of Hugging Face's peft (LoRA on a whole fused qkv, B block-diagonal).

    G adapted parts of rank r become one adapter of rank G*r: A stays (G*r, in), B_g fills the rows of its part and the
    columns of its rank; peft scales by lora_alpha / (G*r), so lora_alpha = scale * G*r. `modules_to_save` are left out:
    fc_norm and head stay in the adapter file.
    """
    base, saved = read_adapter(config)
    settings, state = saved["lora"], {}
    out = Path(config.out or Path(config.adapter).with_name("peft"))
    for name, A in saved["adapter"].items():
        if name.endswith(".lora_A"):
            name = name[:-len(".lora_A")]
            parts, rows = settings["targets"][name.rpartition(".")[2]], base[name + ".weight"].shape[0]
            groups = iter(saved["adapter"][name + ".lora_B"].chunk(sum(parts)))
            B, column = torch.zeros(rows, len(A)), 0
            for block, on in zip(B.chunk(len(parts)), parts):  # (out/P, G*r) views
                if on:
                    block[:, column : column + settings["rank"]] = next(groups)
                    column += settings["rank"]
            state[f"base_model.model.{name}.lora_A.weight"] = A
            state[f"base_model.model.{name}.lora_B.weight"] = B
            rank = len(A)
    description = {"peft_type": "LORA", "r": rank, "lora_alpha": settings["alpha"] / settings["rank"] * rank,
                   "lora_dropout": settings["dropout"], "target_modules": list(settings["targets"]), "bias": "none"}
    data.save_checkpoint(out / "adapter_model.bin", state)
    data.atomic_write(out / "adapter_config.json", lambda file: file.write(json.dumps(description, indent=1).encode()))
    print(f"{out}: {len(state)} tensors of rank {rank} for peft")


def main():
    commands = {"merge": merge, "export-peft": export_peft}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise InputError(f"usage: python lora.py {' | '.join(commands)} [--help]")
    commands[sys.argv[1]](data.parse_config(LoRAConfig, sys.argv[2:], commands[sys.argv[1]].__doc__))


if __name__ == "__main__":
    data.run_script(main)
