"""LoRA: a frozen linear layer learns through two thin matrices beside it.

    y = x W^T + b + (alpha / r) * dropout(x) A^T B^T      only A (r, in) and B (out, r) are trained

In plain torch these are eight lines. `LoRALinear` computes the same for several parts of one layer:

    class PlainLoRA(nn.Module):
        def __init__(self, linear, r, alpha):
            super().__init__()
            self.lin, self.scale = linear.requires_grad_(False), alpha / r
            self.A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
            self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        def forward(self, x):
            return self.lin(x) + self.scale * F.dropout(x, 0.1, self.training) @ self.A.T @ self.B.T

Why q and v: attention's weights depend on q and k through their product alone, so that adapting q
suffices to change where a token looks; adapting v changes what it takes from there. Why alpha / r:
B A is a sum over r directions. Where they learn alike the sum grows as r; dividing by r keeps its
size, so that one alpha serves every rank. The papers' alpha is 32, which makes the factor 8 at
rank 4. Why B = 0: the layer starts as the plain one. A must not be 0 as well, because the gradient
of each has the other as a factor, and neither would ever learn.

One batch of the demo, rank 4: x (32, 17, 128) -> t = x A^T (32, 17, 8), four numbers for q and four
for v -> t B^T (32, 17, 256), added to the q and v columns of x W^T + b (32, 17, 384). A (8, 128)
and B (256, 4) are 2,048 numbers; W has 49,152.

    python lora.py merge --adapter runs/finetune/adapter.pt      # base + adapter -> one plain ViT
    python lora.py inspect --adapter runs/finetune/adapter.pt    # which layers it changed most
    python lora.py export-peft --adapter runs/finetune/adapter.pt --out DIR    # Hugging Face's peft
    python lora.py import-peft --peft DIR --weights BASE --out adapter.pt      # and back
    python lora.py export-medpeft --adapter runs/finetune/adapter.pt    # MED-PEFT's own checkpoint
    python lora.py import-medpeft --peft CHECKPOINT --out adapter.pt           # and back

Papers: Hu et al., "LoRA", ICLR 2022, eq. 3; for radiography "Less Could Be Better:
Parameter-efficient Fine-tuning Advances Medical Vision Foundation Models", 2024 (MED-PEFT): q and v
of every block, alpha 32, dropout 0.1. This file departs from MED-PEFT's code in three points:
 1. Merging is the explicit call `merge_lora`, in float64, with an inverse. There, train() and
    eval() merge, leave a flag unset so that the delta counts twice, and let frozen weights drift.
 2. B A is two thin products on the adapted columns alone, there a zero-padded grouped convolution.
 3. An adapter file holds LoRA + fc_norm + head + what rebuilds the model, there everything.

Beyond the paper: `finetune.py --targets qkv|all` adapts more layers, `--rslora` scales by
alpha / sqrt(r) (Kalajdzievski, 2023), since the sum of r directions that have little to do with
each other grows as sqrt(r), and `--dora` makes each layer a `DoRALinear`.

Next: the reference half of kernels/lora_linear.py, which is this layer forward and backward by
hand; then mrm.py. Exercises 1, 8 and 9 of tests/exercises.md change this file.

Shapes: G adapted parts of P equal output parts (q and v of a fused qkv: G = 2, P = 3), r rank.
"""
import dataclasses
import hashlib
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import kernels
import vit
from common import InputError, option

# --------------------------------------------------------------------------------------------------
# The layer


class LoRALinear(nn.Linear):
    """`nn.Linear` with a low-rank addition on some of its output parts.

    parts: one bool per equal output part, True where LoRA adds to it: (True, False, True) is q and
    v of a fused qkv. Parameters: `weight` (out, in) and `bias`, which `add_lora` freezes; `lora_A`
    (G*r, in), Kaiming-uniform(a = sqrt 5); `lora_B` (G*out/P, r), zero, so that the layer starts as
    the plain one. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, in_features, out_features, rank, alpha=32, dropout=0.1, parts=(True,),
                 bias=True, **kwargs):
        if rank < 1 or not any(parts) or out_features % len(parts):
            raise ValueError(f"LoRA needs rank >= 1, an adapted part and a number of parts that "
                             f"divides {out_features}, found rank {rank}, parts {tuple(parts)}")
        super().__init__(in_features, out_features, bias, **kwargs)
        groups = sum(parts)
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.parts = tuple(bool(part) for part in parts)
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
        return kernels.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale,
                                   self.parts, dropout)

    @torch.no_grad()
    def delta(self, dtype=torch.float64):
        """What merging adds to `weight`, (out, in): scale * B_g A_g, 0 on parts not adapted."""
        delta = torch.zeros_like(self.weight, dtype=dtype)
        views = delta.chunk(len(self.parts))  # each (out/P, in)
        for part, A_g, B_g in self.groups():
            views[part].copy_(self.scale * B_g.to(dtype) @ A_g.to(dtype))
        return delta

    def groups(self):
        """A triple for each adapted part: its number, its A_g (r, in) and its B_g (out/P, r)."""
        numbers = [number for number, on in enumerate(self.parts) if on]
        return list(zip(numbers, self.lora_A.detach().chunk(len(numbers)),
                        self.lora_B.detach().chunk(len(numbers))))

    def effective_weight(self):
        """The weight that the layer computes with, which merging writes: (out, in) in float64."""
        return self.weight.detach().double() + self.delta()

    def extra_repr(self):
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, parts={self.parts}"


# --------------------------------------------------------------------------------------------------
# Adding it to a model, and merging

# Which layers of a ViT are adapted: the paper's q and v, and beyond the paper q, k and v, or every
# linear layer of the blocks. A layer's own name stands before its parts.
TARGETS = {"qv": {"qkv": (True, False, True)}, "qkv": {"qkv": (True, True, True)},
           "all": {"qkv": (True, True, True), "proj": (True,), "fc1": (True,), "fc2": (True,)}}


def add_lora(model, rank=4, alpha=32, dropout=0.1, targets=TARGETS["qv"],
             train=("fc_norm", "head"), dora=False):
    """Puts LoRA on the linear layers whose last name is in `targets` (name -> parts) and freezes
    everything but LoRA and the modules `train`. DoRA takes the lengths of the weights that the
    model has now, so that they must be loaded before.

    The layers keep their weights and their state-dict keys. Returns the model, changed in place.
    Raises ValueError if no layer has such a name or the model holds LoRA already.
    """
    found = [(name, layer) for name, layer in model.named_modules()
             if name.rpartition(".")[2] in targets and isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}")
    for name, layer in found:
        if isinstance(layer, LoRALinear):
            raise ValueError(f"{name} is a LoRA layer already")
        parent, _, child = name.rpartition(".")
        kind = DoRALinear if dora else LoRALinear
        new = kind(layer.in_features, layer.out_features, rank, alpha, dropout, targets[child],
                   layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype)
        new.weight, new.bias = layer.weight, layer.bias
        if dora:
            new.start_magnitude()
        new.train(layer.training)
        setattr(model.get_submodule(parent), child, new)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.split(".")[0] in train)
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
            layer.weight.copy_(layer.effective_weight())
            layer.merged = True
    return model


@torch.no_grad()
def unmerge_lora(model):
    """The inverse of `merge_lora`, exact to one rounding of the weights. Raises ValueError for
    DoRA, where the length of W is lost in merging."""
    for layer in lora_layers(model):
        if layer.merged:
            if isinstance(layer, DoRALinear):
                raise ValueError("a merged DoRA cannot be taken out: load the base weights again")
            layer.weight.copy_(layer.weight.double() - layer.delta())
            layer.merged = False
    return model


# --------------------------------------------------------------------------------------------------
# Beyond the paper: DoRA


class DoRALinear(LoRALinear):
    """LoRA sets the directions of the adapted rows alone, and their lengths m are learned (Liu et
    al., "DoRA", ICML 2024, eq. 5): W' = m * (W + (alpha / r) B A) / ||W + (alpha / r) B A||_row.

    `lora_magnitude` (G*out/P,) holds m, which starts as the lengths of `weight`, so that the layer
    starts as the plain one.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start_magnitude()

    def start_magnitude(self):
        """Takes the lengths of `weight` as it is now."""
        rows = self.weight.detach()[self.adapted_rows()]
        self.lora_magnitude = nn.Parameter(rows.norm(dim=1))

    def adapted_rows(self):
        """The rows of `weight` that LoRA adds to, (out,) of bools."""
        parts = torch.tensor(self.parts, device=self.weight.device)
        return parts.repeat_interleave(self.out_features // len(self.parts))

    def row_factors(self):
        """What the rows of W + delta are multiplied by, (out,): m / ||W + delta||_row, and 1 where
        LoRA adds nothing. The norm counts as a constant in the gradient (DoRA, section 4.3)."""
        rows, dtype = self.adapted_rows(), self.weight.dtype
        with torch.autocast(self.weight.device.type, enabled=False):
            norms = (self.weight.detach() + self.delta(dtype))[rows].norm(dim=1)
        factors = self.lora_magnitude.new_ones(self.out_features)
        return factors.masked_scatter(rows, self.lora_magnitude / norms)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if self.merged:
            return super().forward(x)
        dropout = self.dropout if self.training else 0.0
        y = kernels.lora_linear(x, self.weight, None, self.lora_A, self.lora_B, self.scale,
                                self.parts, dropout)
        y = y * self.row_factors().to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def effective_weight(self):
        """See `LoRALinear`."""
        return super().effective_weight() * self.row_factors().detach().double()[:, None]


# --------------------------------------------------------------------------------------------------
# The parts of a model, and adapter files


def part_of(name):
    """The part of a model that a tensor's name belongs to: "lora", "head" (with fc_norm) or
    "backbone"."""
    if "lora_" in name:
        return "lora"
    return "head" if name.split(".")[0] in ("fc_norm", "head") else "backbone"


def count_parameters(model):
    """{"lora", "head", "trainable", "total"}: `total` is the deployed model, without LoRA's own."""
    count = dict.fromkeys(("lora", "head", "backbone", "trainable"), 0)
    for name, parameter in model.named_parameters():
        count[part_of(name)] += parameter.numel()
        if parameter.requires_grad:
            count["trainable"] += parameter.numel()
    count["total"] = count.pop("backbone") + count["head"]
    return count


def lora_state_dict(model):
    """What an adapter file must hold: every tensor of LoRA, fc_norm and head."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if part_of(name) != "backbone"}


def fingerprint(tensors):
    """A hash of the encoder's tensors in a dict: an adapter names its base weights by it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.split(".")[0] in vit.ENCODER_PARTS and "lora_" not in name:
            tensor = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_base(path, base, expected, tensors):
    """Raises InputError where `tensors`, read from `base`, have not the fingerprint `expected` that
    the adapter `path` names. None, from an adapter that names no fingerprint, fits everything."""
    if expected not in (None, fingerprint(tensors)):
        raise InputError(f"{path}: {base} are not the weights this adapter was trained on; they "
                         "are others, or have changed since")


def read_base(path, saved, given=""):
    """(path, tensors) of the base weights of the adapter file `path` that holds `saved`.

    Their path is `given`, or named by the adapter and looked for there, relative to the adapter and
    below each folder around it, because runs are moved. Raises InputError where the weights are not
    found or are not those that the adapter was trained on.
    """
    weights = str(given or saved.get("weights", ""))
    places = [Path(weights)]
    if not given:
        folder = Path(path).absolute().parent
        places.append(folder / saved.get("weights_from_here", weights))
        places += [parent / weights for parent in folder.parents]
    base = next((place for place in places if weights and place.exists()), None)
    if base is None:
        problem = (f"its base weights {weights} are not there: no such checkpoint" if weights
                   else "names no base weights")
        raise InputError(f"{path}: {problem}; give them with --weights (finetune.py: --base)")
    tensors, _ = vit.read_weights(base)
    check_base(path, base, saved.get("base_fingerprint"), tensors)
    if saved.get("base_fingerprint"):  # MED-PEFT's checkpoint is the base of the adapter in it
        tensors = {name: tensors[name] for name in tensors if "lora_" not in name}
    return base, tensors


def save_adapter(path, model, **extra):
    """Writes LoRA, fc_norm, head, what rebuilds them (rank, alpha, ...) and `extra` values."""
    targets = {name.rpartition(".")[2]: layer.parts for name, layer in model.named_modules()
               if isinstance(layer, LoRALinear)}
    first = lora_layers(model)[0]  # all of them have the same rank, scale and dropout
    settings = {"rank": first.rank, "alpha": first.scale * first.rank, "dropout": first.dropout,
                "targets": targets, "dora": isinstance(first, DoRALinear)}
    adapter = {name: tensor.cpu().contiguous() for name, tensor in lora_state_dict(model).items()}
    common.save_checkpoint(path, {"adapter": adapter, "lora": settings, **extra})


def read_adapter_file(path):
    """All that an adapter file holds, as a dict. Raises InputError where it is no adapter."""
    saved = common.load_checkpoint(common.checkpoint_file(path, "adapter.pt"))
    if not {"adapter", "lora"} <= saved.keys():
        raise InputError(path, "an adapter (entries 'adapter' and 'lora')", sorted(saved)[:5])
    adapter, settings = saved["adapter"], saved["lora"]
    if not isinstance(adapter, dict) or not any(name.endswith(".lora_A") for name in adapter):
        raise InputError(path, "tensors of LoRA in 'adapter'", "none")
    needed = {"rank", "alpha", "dropout", "targets"}
    if (not isinstance(settings, dict) or not needed <= settings.keys()
            or not isinstance(settings["targets"], dict)):
        raise InputError(path, "rank, alpha, dropout and targets in 'lora'", settings)
    return saved


def load_adapter(model, path):
    """Adds LoRA as the file says and loads it, fc_norm and head into `model`. Returns all that the
    file holds. Raises InputError where it was trained on a model of another size."""
    saved = read_adapter_file(path)
    if not lora_layers(model):
        add_lora(model, **saved["lora"])
    given, own = ({name: tuple(tensor.shape) for name, tensor in tensors.items()}
                  for tensors in (saved["adapter"], lora_state_dict(model)))
    for name in given | own:
        if given.get(name) != own.get(name):
            raise InputError(f"{path}: {name} {given.get(name, 'is missing and')} does not fit the "
                             f"model ({own.get(name, 'no such tensor')}): the adapter was trained "
                             "on other weights, or with another --rank or --targets")
    model.load_state_dict(saved["adapter"], strict=False)
    return saved


# --------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    adapter: str = option("runs/finetune/adapter.pt", "adapter file of a fine-tuning run")
    weights: str = option("", "base checkpoint (default: the one the adapter names)")
    out: str = option("", "what to write: a folder for export-peft, a file for merge and the rest "
                      "(default: a name that says what it is, beside what is read)")
    peft: str = option("", "what to import: the folder of an adapter that peft has saved, or a "
                       "checkpoint of MED-PEFT")


def read_adapter(config):
    """What a command works on: (base tensors by name, all that the adapter file holds, the adapted
    layers by name). Raises InputError where they do not fit each other."""
    saved = read_adapter_file(config.adapter)
    source, base = read_base(config.adapter, saved, config.weights)
    films = [held["trained_on"] for held in (saved, vit.read_weights(source)[1])
             if "trained_on" in held]
    if films:  # what is made of both has learned from the films of both
        saved["trained_on"] = sorted({film for held in films for film in held})
    return base, saved, adapted_layers(config.adapter, saved, source, base)


def adapted_layers(path, saved, source, base):
    """The LoRA layers by name that the adapter `path`, which holds `saved`, makes of the tensors
    `base` of the file `source`. Raises InputError where they do not fit each other."""
    adapter, settings, layers = saved["adapter"], saved["lora"], {}
    kind, placed = DoRALinear if settings.get("dora") else LoRALinear, set()
    for name in [key.removesuffix(".lora_A") for key in adapter if key.endswith(".lora_A")]:
        weight, A = base.get(name + ".weight"), adapter[name + ".lora_A"]
        if weight is None or weight.ndim != 2 or weight.shape[1:] != A.shape[1:]:
            raise InputError(f"{source}: {name}.weight does not fit {path}: other weights than it "
                             "was trained on")
        try:
            parts = settings["targets"][name.rpartition(".")[2]]
            layer = kind(weight.shape[1], len(weight), settings["rank"], settings["alpha"],
                         settings["dropout"], parts, bias=False)
        except (ValueError, KeyError) as error:
            raise InputError(f"{path}: {name} does not fit {source}: {error}") from None
        for end, own in layer.state_dict().items():
            tensor = weight if end == "weight" else adapter.get(f"{name}.{end}")
            if tensor is None or tensor.shape != own.shape:
                found = "no such tensor" if tensor is None else tuple(tensor.shape)
                raise InputError(f"{path}: {name}.{end} does not fit rank {layer.rank} and the "
                                 f"weights ({found})")
            own.copy_(tensor)
            placed.add(f"{name}.{end}")
        layers[name] = layer
    for key in adapter:
        if part_of(key) == "lora" and key not in placed:
            raise InputError(f"{path}: {key} has no place in the LoRA that the file describes")
    return layers


def encoder_and_head(base, adapter):
    """A plain ViT's tensors: the encoder's out of `base`, fc_norm and head out of `adapter`."""
    tensors = {name: base[name] for name in base if name.split(".")[0] in vit.ENCODER_PARTS}
    return tensors | {name: adapter[name] for name in adapter if part_of(name) == "head"}


def merge(config):
    """Writes a plain ViT: the base encoder with every delta added, and the adapter's head."""
    base, saved, layers = read_adapter(config)
    merged = encoder_and_head(base, saved["adapter"])
    for name, layer in layers.items():
        merged[name + ".weight"] = merge_lora(layer).weight.detach()
    out = Path(config.out or Path(config.adapter).with_name("merged.pt"))
    kept = "sizes classes mean std pool test_side deep reading segment trained_on".split()
    about = {name: saved[name] for name in kept if name in saved}
    common.save_checkpoint(out, {"model": merged, **about})
    print(f"{out}: {len(merged)} tensors, a plain ViT")


def inspect(config):
    """Prints what an adapter changes: the singular values of scale * B A of each adapted part, the
    largest first, and the length of the change as a share of the frozen weight's.

    B = Q_B R_B and A^T = Q_A R_A with orthonormal columns of Q, so that the singular values are
    those of the r x r product R_B R_A^T, and no (out, in) matrix is formed. A matrix's length is
    the root of the sum of its squares. The lengths m of DoRA are left out.
    """
    _, _, layers = read_adapter(config)
    rows, shares = [], {}
    for name, layer in layers.items():
        weights = layer.weight.detach().double().chunk(len(layer.parts))
        numbered = [f" {part}" for part in range(len(weights))]
        names = {1: [""], 3: [" q", " k", " v"]}.get(len(weights), numbered)
        for part, A, B in layer.groups():
            label = f"{name}{names[part]}"
            R_A, R_B = (torch.linalg.qr(thin.double()).R for thin in (A.T, B))
            values = layer.scale * torch.linalg.svdvals(R_B @ R_A.T)
            shares[label] = (values.norm() / weights[part].norm()).item()
            shown = " ".join(f"{value:.3g}" for value in values[:8])
            rows.append((label, f"{values.norm():.3g}", f"{shares[label]:.1%}", shown))
    print(common.markdown_table(("part", "length", "of the weight's", "singular values"), rows))
    most = sorted(shares, key=shares.get, reverse=True)[:3]
    print("changed most: " + ", ".join(f"{label} ({shares[label]:.1%})" for label in most))


def export_peft(config):
    """Writes the adapter in the format of Hugging Face's peft, which has one A and B a layer.

    The G adapted parts become one adapter of rank G*r, which differs between layers if G does.
    A stays (G*r, in). B (out, G*r) is block-diagonal: B_g fills the rows of its part and the
    columns of its rank. lora_alpha is scale * G*r, because peft divides by G*r. DoRA has a length
    for every row there: W's own on other parts. fc_norm and head stay in the adapter file.
    """
    _, saved, layers = read_adapter(config)
    out = Path(config.out or Path(config.adapter).with_name("peft"))
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        ranks[name] = len(layer.lora_A)
        alphas[name] = layer.scale * ranks[name]
        B = torch.zeros(layer.out_features, ranks[name])
        rows = B.chunk(len(layer.parts))  # views (out/P, G*r)
        for g, (part, _, B_g) in enumerate(layer.groups()):
            rows[part][:, g * layer.rank : (g + 1) * layer.rank] = B_g
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        if isinstance(layer, DoRALinear):
            lengths = layer.weight.detach().norm(dim=1)
            lengths[layer.adapted_rows()] = layer.lora_magnitude.detach()
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = lengths
    description = {"peft_type": "LORA", "r": max(ranks.values()), "rank_pattern": ranks,
                   "lora_alpha": max(alphas.values()), "alpha_pattern": alphas,
                   "lora_dropout": saved["lora"]["dropout"], "target_modules": list(layers),
                   "bias": "none", "use_dora": bool(saved["lora"].get("dora", False))}
    common.save_checkpoint(out / "adapter_model.bin", tensors)
    common.write_json(out / "adapter_config.json", description)
    shown = ", ".join(map(str, sorted(set(ranks.values()))))
    print(f"{out}: {len(tensors)} tensors of rank {shown} for peft")


def write_imported(config, adapter, rank, alpha, dropout, targets, dora=False):
    """Checks an adapter that comes from elsewhere against the base weights, and writes its file."""
    base = config.weights or config.peft
    tensors = vit.read_weights(base)[0]
    out = Path(config.out or Path(config.peft).absolute().with_name("imported.pt"))
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, "dora": dora}
    saved = {"adapter": adapter, "lora": settings, "weights": os.path.abspath(base),
             "weights_from_here": os.path.relpath(base, out.parent),
             "base_fingerprint": fingerprint(tensors)}
    adapted_layers(config.peft, saved, base, tensors)
    common.save_checkpoint(out, saved)
    print(f"{out}: {len(adapter)} tensors, LoRA of rank {rank} for {base}")


PEFT_PLAIN = {  # what import-peft takes: the first value is that of a setting which is not written
    "peft_type": ("LORA",), "bias": ("none",), "modules_to_save": (None, []),
    "fan_in_fan_out": (False,), "lora_bias": (False,), "layer_replication": (None,),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,), "use_qalora": (False,),
    # Other initialisations, such as PiSSA, change the base weights too
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}


def import_peft(config):
    """Writes an adapter file from an adapter that Hugging Face's peft has saved for a ViT.

    One A (r, in) and B (out, r) a layer, as peft has them, adapt the layer whole. The file has one
    rank and one scale: zeros widen the layers of a smaller rank (`rank_pattern`), and B takes what
    a layer's own scale differs by. The file holds no head, so that `merge` makes a plain encoder of
    it. Raises InputError for other methods than LoRA and DoRA and for trained biases or modules.
    """
    if not config.peft or not config.weights:
        raise InputError("import-peft", "--peft DIR and --weights BASE", "one of them at most")
    described = Path(config.peft) / "adapter_config.json"
    settings = common.read_json(described)
    if not isinstance(settings, dict):
        raise InputError(described, "the settings of an adapter", type(settings).__name__)
    for name, values in PEFT_PLAIN.items():
        if settings.get(name, values[0]) not in values:
            raise InputError(described, f"{name} {values[0]}", settings[name])
    path, adapter = read_peft_tensors(described.parent)
    layers = sorted({name.rpartition(".")[0] for name in adapter})
    ranks = {name: len(adapter.get(name + ".lora_A", ())) for name in layers}
    rank, scales = max(ranks.values()), peft_scales(described, settings, ranks)
    scale = max(scales.values())
    for name in layers:
        A, B = (adapter.get(f"{name}.lora_{side}") for side in "AB")
        if A is None or B is None or B.shape[1] != len(A):
            found = "none of one" if A is None or B is None else f"{len(A)} and {B.shape[1]}"
            raise InputError(f"{path}: {name}", "lora_A and lora_B of one rank", found)
        adapter[name + ".lora_A"] = F.pad(A, (0, 0, 0, rank - len(A)))
        adapter[name + ".lora_B"] = F.pad(B * (scales[name] / scale), (0, rank - len(A)))
    write_imported(config, adapter, rank, scale * rank, settings.get("lora_dropout", 0.0),
                   {name.rpartition(".")[2]: (True,) for name in layers},
                   bool(settings.get("use_dora")))


def peft_scales(path, settings, ranks):
    """{layer: its scale} by peft's settings, read from `path`, for layers of the given ranks. As in
    peft the first key of `alpha_pattern` counts that fits the end of a layer's name."""
    table, scales = settings.get("alpha_pattern") or {}, {}
    if not isinstance(table, dict):
        raise InputError(path, "alpha_pattern, a table by layer", table)
    try:
        keys = {key: re.compile(rf"(.*\.)?({key})") for key in table}
    except re.error as error:
        raise InputError(path, "regular expressions in alpha_pattern", error) from None
    for name, rank in ranks.items():
        own = [table[key] for key in table if keys[key].fullmatch(name)]
        alpha = own[0] if own else settings.get("lora_alpha")
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise InputError(path, "lora_alpha, a number above 0", alpha)
        scales[name] = alpha / max(1, math.sqrt(rank) if settings.get("use_rslora") else rank)
    return scales


def read_peft_tensors(folder):
    """(path, tensors under this file's names) of an adapter of peft. Raises InputError for others
    than LoRA's of a ViT's blocks."""
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    path = next((file for file in files if file.exists()), files[0])
    tensors, adapter = common.load_checkpoint(path), {}
    for name, tensor in (tensors.get("model", tensors) or {"no tensor": None}).items():
        short = name.removeprefix("base_model.model.").removesuffix(".weight")
        short = short.replace("lora_magnitude_vector", "lora_magnitude")
        layer, _, end = short.rpartition(".")
        dimensions = {"lora_A": 2, "lora_B": 2, "lora_magnitude": 1}.get(end)
        fits = torch.is_tensor(tensor) and tensor.ndim == dimensions
        if not fits or not layer.startswith("blocks."):
            raise InputError(path, "lora_A and lora_B of a ViT's blocks under timm's names", name)
        adapter[short] = tensor.float().contiguous()
    return path, adapter


MEDPEFT = {"alpha": 32.0, "dropout": 0.1, "targets": TARGETS["qv"]}  # they are fixed in its code


def export_medpeft(config):
    """Writes a checkpoint of MED-PEFT: base, LoRA and head under the same names, not merged.
    Its code scales by 32 / r, so that B takes what differs from that, and has three channels, over
    which a grey patch embedding is shared out. Raises InputError for more than LoRA on q and v."""
    base, saved, layers = read_adapter(config)
    targets = {name: tuple(parts) for name, parts in saved["lora"]["targets"].items()}
    if targets != TARGETS["qv"] or saved["lora"].get("dora") or saved.get("pool", 1) != 1:
        raise InputError(config.adapter, "what MED-PEFT's code computes: LoRA on q and v, no DoRA "
                         "and the mean of all tokens", f"{saved['lora']}, pool {saved.get('pool')}")
    tensors = encoder_and_head(base, saved["adapter"])
    kernel = tensors["patch_embed.proj.weight"]
    if kernel.shape[1] == 1:
        tensors["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1) / 3
    for name, layer in layers.items():
        tensors[name + ".lora_A"] = layer.lora_A.detach()
        tensors[name + ".lora_B"] = layer.lora_B.detach() * (layer.scale * layer.rank / 32)
    out = Path(config.out or Path(config.adapter).with_name("medpeft.pth"))
    common.save_checkpoint(out, {"model": tensors})
    print(f"{out}: {len(tensors)} tensors, a checkpoint of MED-PEFT")


def import_medpeft(config):
    """Writes an adapter file, with fc_norm and head, from a checkpoint of MED-PEFT.

    The checkpoint itself is the base, because its frozen weights have drifted a little; `--weights`
    names another, as MRM.pth, from which it may differ by rounding alone. Only this comparison can
    tell a checkpoint whose weights were saved merged. Raises InputError for other checkpoints.
    """
    if not config.peft:
        raise InputError("import-medpeft", "--peft CHECKPOINT", "none")
    tensors, _ = vit.read_weights(config.peft)
    adapter = {name: tensor.float() for name, tensor in tensors.items()
               if part_of(name) != "backbone"}
    ranks = {tensor.shape[-1] for name, tensor in adapter.items() if name.endswith("lora_B")}
    if len(ranks) != 1:
        raise InputError(config.peft, "a checkpoint of MED-PEFT: lora_A and lora_B of one rank "
                         "beside qkv", f"ranks {sorted(ranks)}")
    if config.weights:
        for name, frozen in encoder_and_head(vit.read_weights(config.weights)[0], {}).items():
            found = tensors.get(name)
            if name == "patch_embed.proj.weight" and found is not None:  # of one channel or three
                found, frozen = found.sum(1), frozen.sum(1)
            near = 1e-3 * frozen.float().abs().max()
            if found is None or found.shape != frozen.shape or (found - frozen).abs().max() > near:
                raise InputError(f"{config.peft}: {name}", f"that of {config.weights}, which was "
                                 "frozen", "another: other weights, or merged ones")
    write_imported(config, adapter, ranks.pop(), **MEDPEFT)


def main():
    functions = merge, inspect, export_peft, import_peft, export_medpeft, import_medpeft
    commands = {function.__name__.replace("_", "-"): function for function in functions}
    usage = f"usage: python lora.py {' | '.join(commands)} [--help]"
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"{__doc__}\n{usage}")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise InputError(usage)
    command = commands[sys.argv[1]]
    command(common.parse_config(LoRAConfig, sys.argv[2:], command.__doc__))


if __name__ == "__main__":
    common.run_script(main)
