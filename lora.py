"""LoRA: a frozen linear layer learns through two thin matrices beside it.

    y = x W^T + b + (alpha / r) * dropout(x) A^T B^T      only A (r, in) and B (out, r) are trained

The plain form, of which `kernels.lora_linear` needs fewer passes over memory:

    class PlainLoRA(nn.Module):
        def __init__(self, linear, r, alpha):
            super().__init__()
            self.linear, self.scale = linear.requires_grad_(False), alpha / r
            self.A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
            self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        def forward(self, x):
            x, y = F.dropout(x, 0.1, self.training), self.linear(x)
            return y + self.scale * (x @ self.A.T @ self.B.T)

Attention's weights depend on q and k through their product alone. Adapting q therefore suffices to
change where a token looks; adapting v changes what it takes from there. The product B A is a sum
over r directions. The factor alpha / r keeps its size, so that one alpha serves every rank.

    python lora.py merge --adapter runs/finetune/adapter.pt    # base + adapter -> one plain ViT
    python lora.py export-peft --adapter runs/finetune/adapter.pt --out DIR    # Hugging Face's peft
    python lora.py import-peft --peft DIR --weights BASE --out adapter.pt      # and back

Beyond the paper: `finetune.py --targets qkv|all` adapts more layers, and `--rslora` scales by
alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023), so that a larger rank learns faster.

Paper: Hu et al., "LoRA", ICLR 2022, eq. 3; for radiography: "Less Could Be Better:
Parameter-efficient Fine-tuning Advances Medical Vision Foundation Models", 2024 (MED-PEFT): q and v
of every block, alpha 32, dropout 0.1.

Where this file departs from MED-PEFT's code, and why:
 1. Merging is the explicit call `merge_lora`, in float64, with an inverse. There, train() and
    eval() merge, leave a flag unset so that the delta counts twice, and let frozen weights drift.
 2. B A is two thin products on the adapted columns alone. There it is a zero-padded grouped
    convolution.
 3. An adapter file holds LoRA + fc_norm + head + what rebuilds the model. There a checkpoint holds
    everything.

Shapes: G adapted parts of P equal output parts (q and v of a fused qkv: G = 2, P = 3), r rank.
"""
import dataclasses
import hashlib
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

import data
import kernels
import mrm
from data import InputError, option

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
    def delta(self):
        """What merging adds to `weight`, (out, in) in float64: scale * B_g A_g on the adapted
        parts, 0 on the others."""
        delta = torch.zeros_like(self.weight, dtype=torch.float64)
        views = delta.chunk(len(self.parts))  # each (out/P, in)
        adapted = [view for view, on in zip(views, self.parts) if on]
        A, B = (matrix.double().chunk(len(adapted)) for matrix in (self.lora_A, self.lora_B))
        for view, A_g, B_g in zip(adapted, A, B):
            view.copy_(self.scale * B_g @ A_g)
        return delta

    def extra_repr(self):
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, parts={self.parts}"


# Which layers of a ViT are adapted: the paper's q and v, and beyond the paper q, k and v, or every
# linear layer of the blocks. A layer's own name stands before its parts.
TARGETS = {"qv": {"qkv": (True, False, True)}, "qkv": {"qkv": (True, True, True)},
           "all": {"qkv": (True, True, True), "proj": (True,), "fc1": (True,), "fc2": (True,)}}


def add_lora(model, rank=4, alpha=32, dropout=0.1, targets=TARGETS["qv"],
             train=("fc_norm", "head")):
    """Puts LoRA on the linear layers whose last name is in `targets` (name -> parts) and freezes
    everything but LoRA and the modules `train`.

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
        new = LoRALinear(layer.in_features, layer.out_features, rank, alpha, dropout,
                         targets[child], layer.bias is not None,
                         device=layer.weight.device, dtype=layer.weight.dtype)
        new.weight, new.bias = layer.weight, layer.bias
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
            layer.weight.copy_(layer.weight.double() + layer.delta())
            layer.merged = True
    return model


@torch.no_grad()
def unmerge_lora(model):
    """The inverse of `merge_lora`, exact to one rounding of the weights."""
    for layer in lora_layers(model):
        if layer.merged:
            layer.weight.copy_(layer.weight.double() - layer.delta())
            layer.merged = False
    return model


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
        if name.split(".")[0] in mrm.ENCODER_PARTS and "lora_" not in name:
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
    """The base weights of the adapter file `path` that holds `saved`: (their path, tensors).

    The path is `given`, or the adapter names it. A named path is looked for as it is, then relative
    to the adapter, then below each folder around the adapter, because runs are moved. Raises
    InputError where the weights are not found or are not those that the adapter was trained on.
    """
    weights = str(given or saved.get("weights", ""))
    places = [Path(weights)]
    if not given:
        folder = Path(path).absolute().parent
        places.append(folder / saved.get("weights_from_here", weights))
        places += [parent / weights for parent in folder.parents]
    base = next((place for place in places if weights and place.exists()), None)
    if base is None:
        problem = f"its base weights {weights} are not there: no such checkpoint"
        raise InputError(f"{path}: {problem if weights else 'names no base weights'}; give them "
                         "with --weights (finetune.py: --base)")
    tensors, _ = mrm.read_weights(base)
    check_base(path, base, saved.get("base_fingerprint"), tensors)
    return base, tensors


def save_adapter(path, model, **extra):
    """Writes LoRA, fc_norm, head, what rebuilds them (rank, alpha, ...) and `extra` values."""
    targets = {name.rpartition(".")[2]: layer.parts for name, layer in model.named_modules()
               if isinstance(layer, LoRALinear)}
    first = lora_layers(model)[0]  # all of them have the same rank, scale and dropout
    settings = {"rank": first.rank, "alpha": first.scale * first.rank, "dropout": first.dropout,
                "targets": targets}
    adapter = {name: tensor.cpu().contiguous() for name, tensor in lora_state_dict(model).items()}
    data.save_checkpoint(path, {"adapter": adapter, "lora": settings, **extra})


def read_adapter_file(path):
    """All that an adapter file holds, as a dict. Raises InputError where it is no adapter."""
    saved = data.load_checkpoint(path)
    if not {"adapter", "lora"} <= saved.keys():
        raise InputError(path, "an adapter (entries 'adapter' and 'lora')", sorted(saved)[:5])
    adapter, settings = saved["adapter"], saved["lora"]
    if not isinstance(adapter, dict) or not any(name.endswith(".lora_A") for name in adapter):
        raise InputError(path, "tensors of LoRA in 'adapter'", "none")
    needed = {"rank", "alpha", "dropout", "targets"}
    if not isinstance(settings, dict) or not needed <= settings.keys():
        raise InputError(path, "rank, alpha, dropout and targets in 'lora'", settings)
    return saved


def load_adapter(model, path):
    """Adds LoRA as the file says and loads it, fc_norm and head into `model`.

    Returns all that the file holds. Raises InputError where it is no adapter or was trained on a
    model of another size.
    """
    saved = read_adapter_file(path)
    if not lora_layers(model):
        add_lora(model, **saved["lora"])
    own = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model).items()}
    for name, tensor in saved["adapter"].items():
        if own.get(name) != tuple(tensor.shape):
            raise InputError(f"{path}: {name} {tuple(tensor.shape)} does not fit the model "
                             f"({own.get(name, 'no such tensor')}): the adapter was trained on "
                             "other weights")
    missing = sorted(own.keys() - saved["adapter"].keys())
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors of the adapter are missing, {missing[0]} "
                         "first")
    model.load_state_dict(saved["adapter"], strict=False)
    return saved


# --------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    adapter: str = option("runs/finetune/adapter.pt", "adapter file of a fine-tuning run")
    weights: str = option("", "base checkpoint (default: the one the adapter names)")
    out: str = option("", "file (merge, import-peft) or folder (export-peft) to write (default: "
                      "merged.pt or peft beside the adapter; imported.pt in --peft)")
    peft: str = option("", "folder of an adapter that peft has saved, for import-peft")


def read_adapter(config):
    """Reads what a command works on: (base tensors by name, all that the adapter file holds, the
    adapted layers by name). Raises InputError where they do not fit each other."""
    saved = read_adapter_file(config.adapter)
    source, base = read_base(config.adapter, saved, config.weights)
    adapter, settings, layers = saved["adapter"], saved["lora"], {}
    for key in [key for key in adapter if key.endswith(".lora_A")]:
        name = key.removesuffix(".lora_A")
        weight, A, B = base.get(name + ".weight"), adapter[key], adapter.get(name + ".lora_B")
        if weight is None or weight.shape[1] != A.shape[1]:
            raise InputError(f"{source}: {name}.weight does not fit {config.adapter}: other "
                             "weights than it was trained on")
        parts = settings["targets"][name.rpartition(".")[2]]
        layer = LoRALinear(weight.shape[1], len(weight), settings["rank"], settings["alpha"],
                           parts=parts, bias=False)
        if B is None or A.shape != layer.lora_A.shape or B.shape != layer.lora_B.shape:
            found = "no such tensor" if B is None else tuple(B.shape)
            raise InputError(f"{config.adapter}: {name}.lora_B does not fit {name}.lora_A and the "
                             f"weights ({found})")
        layer.load_state_dict({"weight": weight, "lora_A": A, "lora_B": B})
        layers[name] = layer
    return base, saved, layers


def merge(config):
    """Writes a plain ViT: the base encoder with every delta added, and the adapter's head."""
    base, saved, layers = read_adapter(config)
    merged = {name: base[name] for name in base if name.split(".")[0] in mrm.ENCODER_PARTS}
    for name, layer in layers.items():
        merged[name + ".weight"] = merge_lora(layer).weight.detach()
    adapter = saved["adapter"]
    merged |= {name: adapter[name] for name in adapter if part_of(name) == "head"}
    out = Path(config.out or Path(config.adapter).with_name("merged.pt"))
    kept = ("sizes", "classes", "mean", "std", "pool", "test_side", "deep", "segment")
    about = {name: saved[name] for name in kept if name in saved}
    data.save_checkpoint(out, {"model": merged, **about})
    print(f"{out}: {len(merged)} tensors, a plain ViT")


def export_peft(config):
    """Writes the adapter in the format of Hugging Face's peft, which has one A and B a layer.

    The G adapted parts of rank r become one adapter of rank G*r. A stays (G*r, in). B (out, G*r) is
    block-diagonal: B_g fills the rows of its part and the columns of its rank. peft scales by
    lora_alpha / (G*r), so that lora_alpha = scale * G*r. Layers with different G have different
    ranks, which peft reads by name. fc_norm and head stay in the adapter file.
    """
    _, saved, layers = read_adapter(config)
    out = Path(config.out or Path(config.adapter).with_name("peft"))
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        ranks[name] = len(layer.lora_A)
        alphas[name] = layer.scale * ranks[name]
        adapted = [part for part, on in enumerate(layer.parts) if on]
        B = torch.zeros(layer.out_features, ranks[name])
        rows = B.chunk(len(layer.parts))  # views (out/P, G*r)
        for g, B_g in enumerate(layer.lora_B.detach().chunk(len(adapted))):
            rows[adapted[g]][:, g * layer.rank : (g + 1) * layer.rank] = B_g
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    description = {"peft_type": "LORA", "r": max(ranks.values()), "rank_pattern": ranks,
                   "lora_alpha": max(alphas.values()), "alpha_pattern": alphas,
                   "lora_dropout": saved["lora"]["dropout"], "target_modules": list(layers),
                   "bias": "none"}
    data.save_checkpoint(out / "adapter_model.bin", tensors)
    data.write_json(out / "adapter_config.json", description)
    shown = ", ".join(map(str, sorted(set(ranks.values()))))
    print(f"{out}: {len(tensors)} tensors of rank {shown} for peft")


def import_peft(config):
    """Writes an adapter file from an adapter that Hugging Face's peft has saved for a ViT.

    One A (r, in) and B (out, r) a layer, as peft has them, adapt the layer whole. The file holds no
    head, so that `merge` makes a plain encoder of it. Raises InputError for what such a file cannot
    hold: other methods than LoRA, DoRA, trained biases or modules, ranks that differ.
    """
    folder, base = Path(config.peft), Path(config.weights)
    if not config.peft or not config.weights:
        raise InputError("import-peft", "--peft DIR and --weights BASE", "one of them at most")
    settings = data.read_json(folder / "adapter_config.json")
    plain_lora = {"peft_type": "LORA", "use_dora": False, "bias": "none", "rank_pattern": {},
                  "alpha_pattern": {}, "modules_to_save": None, "fan_in_fan_out": False}
    for name, plain in plain_lora.items():
        same = isinstance(plain, dict) and len(set(settings.get(name, {}).values())) < 2
        if settings.get(name) not in (plain, None, []) and not same:
            raise InputError(folder / "adapter_config.json", f"{name} {plain}", settings[name])
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    path = next((file for file in files if file.exists()), files[0])
    tensors, adapter = data.load_checkpoint(path), {}
    tensors = tensors.get("model", tensors)
    for name, tensor in tensors.items():
        short = name.removeprefix("base_model.model.").removesuffix(".weight")
        if not short.endswith((".lora_A", ".lora_B")) or not short.startswith("blocks."):
            raise InputError(path, "lora_A and lora_B of a ViT's blocks under timm's names", name)
        adapter[short] = tensor.float().contiguous()
    ranks = {len(tensor) for name, tensor in adapter.items() if name.endswith("lora_A")}
    if len(ranks) != 1:
        raise InputError(path, "one rank", f"ranks {sorted(ranks)}")
    rank = ranks.pop()
    alpha = next(iter(settings.get("alpha_pattern", {}).values()), settings.get("lora_alpha", rank))
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)
    targets = {name.split(".")[-2]: (True,) for name in adapter}
    out = Path(config.out or folder / "imported.pt")
    data.save_checkpoint(out, {
        "adapter": adapter, "weights": str(base.absolute()),
        "base_fingerprint": fingerprint(mrm.read_weights(base)[0]),
        "lora": {"rank": rank, "alpha": alpha, "dropout": settings.get("lora_dropout", 0.0),
                 "targets": targets}})
    print(f"{out}: {len(adapter)} tensors of rank {rank}, without a head")


def main():
    commands = {"merge": merge, "export-peft": export_peft, "import-peft": import_peft}
    usage = f"usage: python lora.py {' | '.join(commands)} [--help]"
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"{__doc__}\n{usage}")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise InputError(usage)
    command = commands[sys.argv[1]]
    command(data.parse_config(LoRAConfig, sys.argv[2:], command.__doc__))


if __name__ == "__main__":
    data.run_script(main)
