"""Fine-tuning of a pretrained ViT to classify X-rays, on 1, 10 or 100 % of their labels.

    python finetune.py --lora        # from nothing: demo records, demo MRM, LoRA, test AUROC
    python finetune.py --data nih --root DIR --ratio 1 --weights MRM.pth --lora  # as the paper
    python finetune.py --data covid --root DIR --split covid1 --weights runs/mrm --lora --rank 4
    python finetune.py --compare     # methods x label ratios x seeds, as a table
    python finetune.py --predict DIR --weights runs/finetune

Papers: "Masked Record Modeling", ICLR 2023 (full fine-tuning); "Less Could Be Better", 2024 (LoRA).

One batch of the demo: random crops of X-rays (32, 1, 96, 96) are resized to (32, 1, 48, 48), the
ViT makes 36 patches and a class token of each, (32, 37, 128), and fc_norm and the head turn the
mean over the patches, (32, 128), into logits (32, 7). The loss is the binary cross-entropy of each
finding, -y log p - (1 - y) log(1 - p) with p = sigmoid(logit), since an X-ray may show several.

`--method` says what learns: "full" everything, "lora" two thin matrices beside q and v of each
block, fc_norm and the head, "linear" fc_norm and the head alone. lora.py says what LoRA saves.

A recipe (support/recipes.py) sets the options that are not given. For a ViT-B on the papers' data
it is a published one: SGD (momentum 0.9), no weight decay, warm-up and cosine, crops from 8 % of an
image, flips (no label says left or right), drop path 0.1; with NIH's 1, 10 and 100 % of the labels

    full (MRM)   batch 96, clipped at 1: 3,000, 30,000, 200,000 steps at 3e-2, 3e-3, 3e-3
    LoRA         batch 64, dropout 0.1, not clipped: 100 epochs, 5 of warm-up, at rates of 0.05,
                 0.05, 0.2 and ranks of 4, 8, 32

Else it is ours, chosen on the demo's val list for small ViTs and few steps: AdamW, at a rate of

    training images        below 100  from 100  from 1,000
    steps x batch           400 x 32  800 x 32  1,600 x 64
    linear                      3e-2      3e-2        3e-2
    LoRA, rank 4                1e-3      3e-3        3e-3
    lora-all, rank 16           3e-4      2e-3        5e-3
    full, layer decay 0.75      3e-4      3e-3        3e-3

In all of ours: weight decay 0.05, 10 % of warm-up, crops from 60 %, no flips, no drop path, clip 1.
Below 1,000 images the head learns alone in the first half, at 1e-2 (not with linear). MRM's code
chooses by test, ours by val. Next: reggan.py. Shapes: B batch, n samples, k classes.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from support.script import (  # before torch: it sets how threads wait
    RUNNING, InputError, RunConfig, RunLog, Saving, Timed, autocast_for, check_apart, check_finite,
    check_same, checkpoint_file, command_of, draw_curves, even_batch, fill, from_all, join,
    last_state, load_checkpoint, markdown_table, mean_and_deviation, mean_over_processes,
    number_of_steps, option, options_of, parse_config, read_json, restore, run_cells, run_script,
    save_checkpoint, save_state, scaler_for, seed_rank, start_file, warn, warn_once, weights_digest,
    with_dtype, write_csv, write_json, write_text,
)
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import lora
import mrm
import vit
from support.recipes import PAPER_SETS, RECIPES, recipe_for
from support.weights import encoder_sizes, load_encoder, read_weights

# --------------------------------------------------------------------------------------------------
# Model, loss, optimiser, learning rate


def train_head(model, config):
    """fc_norm and the head alone learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora.part_of(name) == "head")


def train_lora(model, config, layers="qv"):
    """LoRA beside `layers`, a name in lora.TARGETS, fc_norm and the head learn."""
    lora.add_lora(model, config.rank, config.alpha, config.dropout, lora.TARGETS[layers])


# What --method may be: each function freezes what does not learn. lora-qkv and lora-all go beyond
# the paper, whose LoRA stands beside q and v
METHODS = {"full": lambda model, config: None, "linear": train_head, "lora": train_lora}
METHODS |= {f"lora-{name}": functools.partial(train_lora, layers=name)
            for name in lora.TARGETS if name != "qv"}


def adapt(model, config, tensors=None):
    """Loads the given weights (None: a random start) and freezes what `config.method` does not
    train. Returns the model."""
    if tensors is not None:
        load_encoder(model, tensors, config.weights)
    if config.method not in METHODS:  # else a forgotten entry would train everything
        raise InputError("--method", f"one of {', '.join(METHODS)}", config.method)
    METHODS[config.method](model, config)
    return model


def build_model(config, sizes, classes, tensors=None):
    """A ViT with an output for each of `classes`, of the given weights, ready to be trained."""
    model = vit.ViT(**sizes, num_classes=len(classes), drop_path=config.drop_path, pool=config.pool)
    # As in both papers. A head near 0 passes hardly any gradient down, so that under SGD it learns
    # first. AdamW undoes this, as it scales every gradient to one size: hence `probe`, below
    nn.init.normal_(model.head.weight, std=2e-5)
    return adapt(model, config, tensors)


def label_loss(logits, labels):
    """Binary cross-entropy, the mean over the labels (B, k) that are known (not NaN)."""
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def optimizer_by_layer(model, config):
    """SGD or AdamW. Layer i learns at layer_decay^(d + 1 - i) of the rate (BEiT): early layers need
    least change. Layer 0 embeds, 1 to d: blocks, d + 1: head. Our `full` decays by 0.75."""
    groups, last = {}, len(model.blocks) + 1
    for name, parameter in model.named_parameters():
        head = lora.part_of(name) == "head"
        layer = last if head else 0
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decay = config.weight_decay if mrm.decays(name, parameter) else 0.0
        group = {"params": [], "weight_decay": decay, "is_head": head,
                 "lr_scale": config.layer_decay ** (last - layer)}
        if parameter.requires_grad:
            groups.setdefault((layer, decay), group)["params"].append(parameter)
    if config.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr)


PROBE_LR = 1e-2  # peak learning rate of the head while it learns alone, a "linear probe"


def set_rates(optimizer, config, step, steps):
    """Gives each group its learning rate of `step`. It rises along a line, because large steps of a
    head that knows nothing yet would spoil the pretrained blocks, then falls along a cosine. With
    `probe` the head learns alone first, by a rise and fall of its own, for the same reason: on a
    few dozen labels the blocks would follow the noise of a random head (Kumar et al., 2022). The
    others have a rate of 0 and are not frozen: AdamW's averages are filled when they join."""
    alone = round(config.probe * steps)
    first = step < alone
    step, steps = (step, alone) if first else (step - alone, steps - alone)
    peak = PROBE_LR if first else config.lr
    lr = mrm.cosine_lr(step, steps, round(config.warmup * steps), peak, floor=1e-6)
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["is_head"] if first else group["lr_scale"])


# --------------------------------------------------------------------------------------------------
# AUROC


def weighted_auroc(scores, labels, weights):
    """Area under the ROC curve of one class for R weightings of the samples: a bootstrap draw, with
    replacement, weighs each sample by how often it was drawn.

    AUROC = P(score of a positive > score of a negative) + P(equal) / 2, the Mann-Whitney statistic:
    for positives 3, 1 and negatives 2, 1 two of four pairs are won and one is tied, 2.5 / 4.
    scores, labels (n,), weights (R, n) -> (R,), NaN where a weighting leaves one label only. A
    label of NaN does not count. Raises InputError for scores that are not finite."""
    if not np.isfinite(scores).all():
        raise InputError("AUROC", "finite scores", f"{np.sum(~np.isfinite(scores))} that are not")
    order = np.argsort(scores, kind="stable")
    weights = (weights * ~np.isnan(labels))[:, order]
    scores, labels = scores[order], np.nan_to_num(labels[order])
    groups = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # where a new score begins
    positive = np.add.reduceat(weights * labels, groups, axis=1)  # (R, groups): ties count together
    negative = np.add.reduceat(weights * (1 - labels), groups, axis=1)
    below = np.cumsum(negative, axis=1) - negative  # negatives with a lower score
    with np.errstate(invalid="ignore"):
        won = (positive * (below + negative / 2)).sum(1)
        return won / (positive.sum(1) * negative.sum(1))


def bootstrap_auroc(scores, labels, resamples=1000, seed=0):
    """AUROC of each class, of all n samples and of `resamples` draws of n samples from them.

    scores, labels (n, k). Returns (classes that have both labels, AUROC of each, array (classes,
    resamples), means (resamples,) over the classes that have both labels in a draw). The draws
    depend on n, `resamples` and `seed` alone: two models that scored the same list see the same
    draws, and the differences between them are paired. (Images are drawn, although a patient may
    have several; on the demo that hardly moves the ends.)"""
    n, k = scores.shape
    defined = [c for c in range(k) if {0.0, 1.0} <= set(labels[:, c].tolist())]

    def of_classes(weights):  # (R, n) -> (classes, R)
        each = [weighted_auroc(scores[:, c], labels[:, c], weights) for c in defined]
        return np.reshape(each, (len(defined), len(weights)))

    generator, draws = np.random.default_rng(seed), []
    parts = max(1, resamples * n // 4_000_000)  # bounds the memory
    for rows in np.array_split(np.arange(resamples), parts):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=len(rows))
        draws.append(of_classes(counts.astype(np.float32)))
    draws = np.concatenate(draws, axis=1)
    means = np.ma.masked_invalid(draws).mean(0).filled(np.nan)
    return defined, of_classes(np.ones((1, n)))[:, 0], draws, means


def auroc(scores, labels, resamples=1000, seed=0):
    """Mean and per-class AUROC with 95 % percentile bootstrap intervals over samples.

    scores, labels (n, k). Returns (mean, (low, high), k entries (auroc, low, high)). A class with
    one label present has the entry None and no part in the mean; a draw that leaves it one label
    does not count for its interval, nor this class in the draw's mean. Of no class it is NaN."""
    defined, points, draws, means = bootstrap_auroc(scores, labels, resamples, seed)
    per_class = [None] * scores.shape[1]
    if not defined:
        return float("nan"), (float("nan"), float("nan")), per_class
    intervals = np.nanpercentile([*draws, means], [2.5, 97.5], axis=1).T.tolist()
    for c, point, interval in zip(defined, points, intervals):
        per_class[c] = (float(point), *interval)
    return float(np.mean(points)), tuple(intervals[-1]), per_class


# --------------------------------------------------------------------------------------------------
# The loop


@torch.no_grad()
def predict(model, image_set, config, device, rank=0, world=1):
    """The model's output for each image of an ImageSet, in its order: (n, ...). Every process
    computes a share of it."""
    autocast, outputs, rows = autocast_for(config, device), [], []
    for buffer in model.buffers() if world > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # a batch norm has seen other images in each process
    model.eval()
    for images, index in data.eval_batches(image_set, 32, rank, world, config.workers):
        with autocast():
            images = data.normalize(images.to(device), config.mean, config.std)
            outputs.append(model(images).float().cpu())
        rows.append(index)
    model.train()
    shares = from_all((outputs, rows), world)
    outputs, rows = (torch.cat([x for share in shares for x in share[i]]) for i in (0, 1))
    return outputs[rows.argsort()]


def score_labels(logits, part):
    """What a validation list says of a model: first the score that chooses, then the loss."""
    _, points, *_ = bootstrap_auroc(logits.numpy(), part.labels.numpy(), resamples=0)
    return {"val_auroc": float(points.mean()), "val_loss": label_loss(logits, part.labels).item()}


def trained_tensors(model):
    """Copies on the CPU of what training changes, by name: the parameters that are trained, and
    the statistics of batch norms."""
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()
            if name not in frozen}


def train(run, split_batch, criterion, score):
    """The loop. Returns scores, step and trained tensors of the state that is best on val. run: of
    `prepare`. split_batch(images, rows of the train set) -> (inputs, targets); criterion(outputs,
    targets) is the loss. score(outputs, part) -> {name: number}, of which the first chooses."""
    config, model, parts, log, world = run.config, run.model, run.parts, run.log, run.world
    train_set, optimizer = parts["train"].images, optimizer_by_layer(model, config)
    autocast, scaler = autocast_for(config, run.device), scaler_for(config, run.device)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    step, losses, best = 0, [], None
    seed_rank(config.seed, log.rank)
    if run.saved:
        restore(run.saved, log.rank, model=model, optimizer=optimizer, scaler=scaler)
        step, losses, best = (run.saved[name] for name in ("step", "losses", "best"))
    batches = Timed(data.train_batches(
        train_set, config.batch_size // world, step, run.steps, config.seed, log.rank, world,
        config.workers), world)

    def save(step):
        save_state(log, config, world, run.facts | {
            "model": trained_tensors(model), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "step": step, "losses": losses, "best": best})

    model.train()
    with Saving(save, world) as saving:
        for step in batches.steps(step, run.steps, config.method, log.rank):
            set_rates(optimizer, config, step, run.steps)
            images, rows = next(batches)
            images, wanted = split_batch(images.to(run.device, non_blocking=True), rows)
            with autocast():
                logits = parallel(data.normalize(images, config.mean, config.std))
            # The loss is float32: bfloat16 would round its gradient, probability - label, to two or
            # three digits
            loss = criterion(logits.float(), wanted)
            scaler.scale(loss).backward()
            # Clipping bounds what one batch with a rare finding can undo (MRM's recipe)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
            check_finite(step + 1, train_set.paths, rows.tolist(), scaler, loss=loss, gradient=norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            mean_over_processes([loss.detach()])
            losses.append(loss.item())
            if (step + 1) % max(1, run.steps // config.evaluations) == 0 or step + 1 == run.steps:
                # Val chooses, 10 times a run (the papers' LoRA: after each epoch). The best of many
                # scores on the test list would be the luckiest one, and higher than on a new list
                outputs = predict(model, parts["val"].images, config, run.device, log.rank, world)
                scores = score(outputs, parts["val"])
                first = next(iter(scores))  # the name of what chooses
                log.line(step=step + 1, loss=np.mean(losses), **scores, **batches.speed())
                draw_curves(log, "fine-tuning", {"loss": ["loss", "val_loss"], "on val": [first]},
                            config.probe and (config.probe * run.steps, "the blocks join the head"))
                losses.clear()
                if best is None or scores[first] > best[first]:
                    best = scores | {"step": step + 1, "trained": trained_tensors(model)}
                save(step + 1)
            saving.after(step + 1)
    return best


# --------------------------------------------------------------------------------------------------
# Options

UNCERTAIN = data.UNCERTAIN  # (in the class below, `data` is an option)
recipe_value = functools.partial(option, None, typed=False)  # an option that a recipe alone sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(RunConfig):
    """What the loop needs, whatever it trains."""

    data: str = option("demo", "layout of the data set", choices=list(data.DATASETS))
    root: str = option("", "data folder (of the demo: where it is, or is drawn)")
    split: str = option("", "named split, for data sets that have several (covid: covid1 ...)")
    ratio: int = option(None, "percent of labels (default: 100; finetune's demo: 10)",
                        within="[1, 100]")
    weights: str = option(None, "checkpoint, run folder or scratch[-PRESET] (default: a demo MRM)")
    method: str = option(None, "what learns (default: full)", choices=METHODS)
    lora: bool = option(False, "short for --method lora", free=True)
    uncertain: str = option(None, "what a label of -1 becomes; ignore: unknown (default: refused; "
                            "CheXpert's: ones)", choices=UNCERTAIN)
    skip_bad: bool = option(False, "leave out listed images that are missing or cannot be read")
    white: int = option(None, "white of 16-bit images (default: by its bits)", within="[1, 65535]")
    rank: int = option(None, "rank of LoRA", within="[1, inf)")
    alpha: float = option(None, "LoRA is scaled by alpha / rank", within="(0, inf)")
    dropout: float = recipe_value("dropout on the input of LoRA's A", within="[0, 1)")
    optimizer: str = recipe_value("sgd (momentum 0.9) or adamw")
    weight_decay: float = recipe_value("weight decay of the optimiser", within="[0, inf)")
    layer_decay: float = recipe_value("learning rate of a block / the next one's", within="(0, 1]")
    warmup: float = recipe_value("share of the steps in which the rate rises", within="[0, 1]")
    probe: float = option(None, "share of the steps, first, for the head alone", within="[0, 1)")
    drop_path: float = recipe_value("chance to skip a branch of the last block", within="[0, 1)")
    min_crop: float = option(None, "smallest share of an image in a crop", within="(0, 1]")
    flip: bool = option(None, "flip training images left-right at random")
    clip: float = recipe_value("largest norm of the gradients; 0: any", within="[0, inf)")
    mean: float = option(None, "mean of the pixels in [0, 1] (default: the weights', else MRM's)")
    std: float = option(None, "deviation of the pixels", within="(0, inf)")
    img_size: int = option(None, "pixels a side (default: the weights')", within="[1, inf)")
    num_heads: int = option(None, "attention heads, for weights that do not say", within="[1, inf)")
    evaluations: int = option(None, "times val is evaluated; the best is kept", within="[1, inf)")
    predict: str = option("", "folder of images: predict by --weights, and stop", free=True,
                         takes=("weights", "mean", "std", "white", *RUNNING))

    def augment(self, images, generator):
        """Crops (B, C, img_size, img_size) of training images."""
        return data.crop_and_flip(images, generator, self.img_size, self.min_crop, self.flip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuneConfig):
    """What classification adds. A file of more/ for other weights derives its own class, with its
    recipes, and passes it to `main`."""

    script: ClassVar = "finetune"
    recipes: ClassVar = RECIPES  # the published ones
    paper: ClassVar = "mrm"  # the family of recipes that a ViT-B takes on the papers' data
    test_share: ClassVar = 1.0  # side of a test image's central crop / the image's shorter side
    recipe: str = option(None, "whose values the options take (default: mrm for a ViT-B on the "
                         "papers' data, else small)", choices=["mrm", "medpeft", "small"])
    pool: int = option(1, "the head sees the means of n x n regions, not one", within="[1, inf)")
    compare: bool = option(False, "run methods x inits x ratios x seeds, and stop", free=True)
    methods: str = option("linear,lora,lora-all,full", "its rows", needs="compare")
    ratios: str = option("1,10,100", "its percents of labels", needs="compare")
    inits: str = option("mrm", "its starts: mrm, image-only (pretrained on the demo with each "
                        "seed), scratch, checkpoints, run folders", needs="compare")
    seeds: int = option(3, "its seeds, from --seed on", within="[1, inf)", needs="compare")


# --------------------------------------------------------------------------------------------------
# What a run needs: lists, images, weights, recipe

DEMO_INITS = ("mrm", "image-only")  # what `fill_weights` makes, in runs/mrm-demo-SEED ...
# Random starts, and whose sizes they have
SCRATCH = {"scratch": "tiny"} | {f"scratch-{preset}": preset for preset in mrm.MODELS}


def read_lists(config):
    """Returns ({"train", "val", "test": data.Part without images}, class names). Raises InputError
    for lists or image files that cannot be used. --ratio thins the training list alone."""
    root = str(data.demo_root(config.root)) if config.data == "demo" else config.root
    parts, classes = data.read_parts(config.data, root, config.split, config.ratio,
                                     config.uncertain, config.skip_bad)
    for one, other in itertools.combinations(parts, 2):  # images of one patient look alike
        both = sum(data.seen(parts[other].owners, data.marks(parts[one].owners)))
        if both:
            warn_once(f"{both} images of {other} are of patients in {one}, which flatters the "
                      "scores; python data.py audit lists them")
    return parts, classes


def lists_digest(parts, classes):
    """Tells the lists of a run apart, by images, labels, masks and classes."""
    lists = [(part.names, part.labels.tolist(), part.masks) for part in parts.values()]
    return hashlib.sha256(repr((lists, classes)).encode()).hexdigest()


def load_images(parts, config):
    """Gives each part its images, decoded into memory where they fit."""
    for name, part in parts.items():
        if not any({0.0, 1.0} <= set(column) for column in part.labels.T.tolist()):
            raise InputError(f"the {name} list", "both labels of at least one class", "one in each")
    for name, part in parts.items():
        side, how = round(config.img_size / config.test_share), {"crop": config.img_size}
        if name == "train":
            side, how = 2 * config.img_size, {"augment": config.augment, "seed": config.seed}
        part.images = data.ImageSet(part.paths, side, white=config.white, **how).preload()


def fill_weights(config):
    """`config` with the weights of a run, runs/mrm-demo where none are given. A folder of such a
    name (a comparison has one for each seed) is made on first use: the tiny MRM, pretrained on the
    demo records, for image-only by the loss of the images alone."""
    folder = config.weights or "runs/mrm-demo"
    made = re.fullmatch(rf"runs/({'|'.join(DEMO_INITS)})-demo-?(\d*)", folder)
    if made and Path(folder, "result.json").exists():
        print(f"{folder}: pretrained before and used again; delete it to pretrain again")
    elif made:
        print(f"{folder}: pretraining the tiny {made[1]} on the demo records")
        mrm.pretrain(mrm.MRMConfig(
            out=folder, root=config.root if config.data == "demo" else "", seed=int(made[2] or 0),
            image_only=made[1] == "image-only", resume=Path(folder, "last.pt").exists(),
            device=config.device, dtype=config.dtype, workers=config.workers))
    return dataclasses.replace(config, weights=folder)


def starting_weights(config):
    """What a run starts from: (tensors by name, without fc_norm and head, which are new in every
    run, or None for a random start; all that the file holds)."""
    if config.weights in SCRATCH:
        preset = SCRATCH[config.weights]
        return None, mrm.PRESETS[preset] | {"sizes": mrm.MODELS[preset]}
    path = start_file(config.weights)
    tensors, held = read_weights(path)
    if "adapter" in held:
        raise InputError(path, "a ViT (python lora.py merge makes one of an adapter)", "an adapter")
    return {name: tensors[name] for name in tensors if lora.part_of(name) != "head"}, held


def check_pixels(config):
    """Refuses one of --mean and --std."""
    if (config.mean is None) != (config.std is None):
        raise InputError("--mean and --std", "both, or none for each image's own", "one of them")


def take_recipe(config, tensors, held, count):
    """Fills `config` from the weights that a run starts from and from its recipe for `count`
    training images. Returns (config, sizes of the ViT)."""
    sizes = encoder_sizes(tensors, held, config.weights, config.num_heads)
    published = config.data in PAPER_SETS and config.method in ("full", "lora")
    recipe = config.paper if published and sizes["embed_dim"] == 768 else "small"
    if config.recipe is None and recipe == "mrm" and not re.search(
            "bert|report_decoder", " ".join(tensors or ())):  # CXR-MAE's need other pixels
        raise InputError(config.weights, "--recipe mrm, medpeft or small, since the file does not "
                         "say whose it is (of CXR-MAE: python -m more.cxrmae)", "none")
    config = fill(config, {"recipe": recipe})
    stated = {"mean": held.get("mean", mrm.MEAN), "std": held.get("std", mrm.STD)}
    named = {name: sizes[name] for name in ("img_size", "num_heads")}
    config = fill(config, stated | named | recipe_for(
        config.recipes, config.recipe, config.method, config.data, config.ratio, count))
    print(f"recipe: {config.recipe} for {config.method}; config.json has its values")
    return config, sizes | {"img_size": config.img_size}


# --------------------------------------------------------------------------------------------------
# One run, and prediction by it


def fill_cell(config):
    """`config` with the method, the percent of the labels and the folder of a run."""
    if config.lora and config.method not in (None, "lora"):
        raise InputError("--lora and --method", "one of them", f"--method {config.method}")
    if (config.rank or config.alpha) and not (config.lora or config.method):
        raise InputError("--rank and --alpha", "--lora or a --method of LoRA", "none")
    out = f"runs/{config.script.rpartition('.')[2]}"
    return fill(config, {"out": out, "method": "lora" if config.lora else "full",
                         "ratio": 10 if config.data == "demo" else 100})


def prepare(config, read, recipe, build, load):
    """All that the loop and the results of a run need, by name; `config` has every option filled.
    What depends on the task: read(config) gives the lists and classes, recipe(config, tensors,
    held, count) the options and the sizes of the ViT, build(config, sizes, classes, tensors) the
    model; load(parts, config) reads the images. Nothing is written before all this is accepted."""
    began = time.time()
    device, rank, world = join(config)
    config = fill_cell(config)
    parts, classes = read(config)
    count = len(parts["train"].names)
    config = fill_weights(config)  # last, since it may pretrain for minutes
    tensors, held = starting_weights(config)
    config, sizes = recipe(config, tensors, held, count)
    check_pixels(config)
    config = even_batch(config, world)
    steps = number_of_steps(config, count, config.batch_size)
    torch.manual_seed(config.seed)  # here: pretraining the demo MRM must not change this run
    try:
        model = build(config, sizes, classes, tensors).to(device)
    except ValueError as error:  # sizes that do not divide
        raise InputError(f"{config.weights}: {error}") from None
    trained_on = data.marks(parts["train"].owners) | set(held.get("trained_on", ()))
    facts = {"data": lists_digest(parts, classes), "number_of_processes": world,
             "weights": lora.fingerprint(model.state_dict()), "script": config.script,
             "sizes": sizes, "classes": classes, "mean": config.mean, "std": config.std,
             "white": config.white, "trained_on": sorted(trained_on)}
    saved = last_state(config, steps, **facts)  # the run that is resumed must have these facts
    config = with_dtype(config, device, world, saved, sizes["embed_dim"])
    load(parts, config)
    log = RunLog(config.out, config, rank, saved and saved["history"], began)
    if rank == 0:
        number = lora.count_parameters(model)
        write_csv(log.out / "split.csv", ["image", "split"],
                  [[name, part] for part, listed in parts.items() for name in listed.names])
        share = 100 * number["lora"] / (number["total"] - number["head"])
        print(f"{config.method} on {count} images of {config.data} ({config.ratio} %): trainable "
              f"{number['trainable']:,} of {number['total']:,} (LoRA {number['lora']:,} = "
              f"{share:.2f} % of the backbone, head {number['head']:,}); {steps} steps of "
              f"{config.batch_size}, {device}")
    seen = data.seen(parts["test"].owners, set(held.get("trained_on", ())))
    if any(seen):
        warn(f"{config.weights}: {sum(seen)} of {len(seen)} test images are of a patient that "
             "was trained on before; test scores of other patients may be lower")
    return SimpleNamespace(config=config, parts=parts, classes=classes, model=model, sizes=sizes,
                           tensors=tensors, steps=steps, saved=saved, facts=facts, log=log,
                           device=device, world=world)


def finetune(config):
    """Trains, chooses on the validation list, tests once. Returns the content of result.json.
    Leaves config.json, log.jsonl, last.pt, adapter.pt (LoRA) or best.pt, result.json,
    predictions.csv and curves.png in `config.out`."""
    run = prepare(config, read_lists, take_recipe, build_model, load_images)
    labels = run.parts["train"].labels.to(run.device)
    best = train(run, lambda images, rows: (images, labels[rows.to(run.device)]),
                 label_loss, score_labels)
    scores = test_best(run, best, pool=run.config.pool, test_side=run.parts["test"].images.size)
    return write_auroc(run, best, scores.numpy())


def test_best(run, best, **about):
    """Puts the state that was best on val into the model, writes adapter.pt or best.pt, with all
    that `load_run` needs, and returns the model's output for the test list. An adapter whose base
    is a random start brings it along."""
    config, model, log, tensors = run.config, run.model, run.log, run.tensors
    model.load_state_dict(best["trained"], strict=False)
    named = ("script", "sizes", "classes", "mean", "std", "white", "trained_on")
    about |= {name: run.facts[name] for name in named}
    if log.rank == 0 and lora.lora_layers(model):
        base, state = config.weights, model.state_dict()
        if tensors is None:
            base = log.out / "base.pt"
            tensors = {name: state[name] for name in state if lora.part_of(name) == "backbone"}
            save_checkpoint(base, {"model": tensors, "sizes": run.sizes})
        lora.save_adapter(log.out / "adapter.pt", model, weights=os.path.abspath(base),
                          weights_from_here=os.path.relpath(base, log.out),
                          base_fingerprint=lora.fingerprint(tensors), **about)
    elif log.rank == 0:
        save_checkpoint(log.out / "best.pt", {"model": model.state_dict(), **about})
    return predict(model, run.parts["test"].images, config, run.device, log.rank, run.world)


def write_auroc(run, best, scores):
    """Writes predictions.csv and result.json, and prints the AUROCs, from the logits (n, k) of the
    test list. Returns the content of result.json."""
    part, classes, labels = run.parts["test"], run.classes, run.parts["test"].labels.numpy()
    mean, (low, high), per_class = auroc(scores, labels)
    named = dict(zip(classes, per_class))
    if run.log.rank == 0:
        write_predictions(run.log.out, part.names, [*classes, *(f"label {c}" for c in classes)],
                          np.hstack([1 / (1 + np.exp(-scores)), labels]))
        for name, value in named.items():
            text = "%.3f  [%.3f, %.3f]" % value if value else "undefined: one label only"
            print(f"  {name:20s} {text}")
    return write_result(run, best, f"AUROC {mean:.3f} [{low:.3f}, {high:.3f}]", {
        "auroc": mean, "auroc_ci": (low, high),
        "auroc_per_class": {name: value and value[0] for name, value in named.items()},
        "auroc_per_class_ci": {name: value and value[1:] for name, value in named.items()}})


def write_result(run, best, summary, scores):
    """Writes result.json, of the test `scores` by name, those on val and what a run took, and
    prints a `summary`. Returns its content."""
    config, log, count = run.config, run.log, lora.count_parameters(run.model)
    last, seconds = log.history[-1], time.time() - log.start
    given = ("ratio", "method", "weights", "batch_size", "lr")
    measured = ("images_per_second", "share_waiting_for_data")
    result = scores | {name: best[name] for name in best if name not in ("step", "trained")} | {
        "best_step": best["step"], "split": config.split or config.data, "steps": last["step"],
        **{name: getattr(config, name) for name in given},
        "images": {name: len(part.names) for name, part in run.parts.items()},
        **{f"{name}_parameters": count[name] for name in ("trainable", "lora", "head", "total")},
        **{name: last[name] for name in measured}, "seconds": seconds,
        "weights_digest": weights_digest(config.weights), "data_digest": run.facts["data"]}
    if log.rank == 0:
        print(f"test {summary}, {last['images_per_second']:.0f} images/s, {seconds:.0f} s in all; "
              f"{log.out}")
    log.json("result.json", result)
    return result


def write_predictions(out, names, columns, numbers):
    """Writes OUT/predictions.csv: on each line an image and its `numbers` (n, j), named by the
    `columns`; NaN, a label that is not known, is left empty."""
    rows = [[name, *("" if np.isnan(x) else f"{x:.9g}" for x in row)]
            for name, row in zip(names, numbers.tolist())]
    write_csv(Path(out) / "predictions.csv", ["image", *columns], rows)


def load_run(folder, script="finetune", make=None):
    """(The model of a finished run of `script`, merged and in eval mode; all that its file holds).
    make(all that it holds, sizes of the ViT) makes another network than a classifier. Raises
    InputError for any other file than adapter.pt or best.pt, and for base weights that changed."""
    path = checkpoint_file(folder, "adapter.pt", "best.pt")
    held = load_checkpoint(path)
    maker = held.get("script", script)
    if not {"sizes", "mean", "std"} <= held.keys() or maker != script:
        found = f"one of {command_of(maker)}" if maker != script else f"entries {sorted(held)[:6]}"
        raise InputError(path, f"the adapter.pt or best.pt of a run of {command_of(script)}", found)
    sizes = encoder_sizes({}, held, path)
    model = make(held, sizes) if make else vit.ViT(
        **sizes, num_classes=len(held["classes"]), pool=held["pool"])
    if "adapter" in held:
        base, tensors = lora.read_base(path, held)
        load_encoder(model, tensors, base)
        lora.load_adapter(model, path)
        lora.merge_lora(model)
    else:
        lost = [name for name in lora.lora_state_dict(model) if name not in held["model"]]
        if lost:  # a random head would predict without a warning
            raise InputError(path, f"{lost[0]} of a fine-tuning run", "none")
        load_encoder(model, held["model"], path)
    return model.eval(), held


def open_run(config, make=None):
    """What --predict works with: (filled configuration, device, model, all that its file holds,
    paths of the images, their names below the folder `config.predict`)."""
    if config.weights is None:
        raise InputError(f"--predict needs --weights RUN, a run of {command_of(config.script)}")
    model, held = load_run(config.weights, config.script, make)
    pixels = {name: held.get(name) for name in ("mean", "std", "white")}
    config = fill(config, {"out": "runs/predict"} | pixels)
    check_pixels(config)
    device, _, _ = join(config)
    config = with_dtype(config, device, width=held["sizes"]["embed_dim"])
    check_apart(config.out, config.predict)
    paths = data.list_images(config.predict)
    names = [Path(path).relative_to(config.predict).as_posix() for path in paths]
    return config, device, model.to(device), held, paths, names


def predict_folder(config):
    """Writes OUT/predictions.csv for every image below the folder `config.predict`."""
    config, device, model, held, paths, names = open_run(config)
    images = data.ImageSet(paths, held.get("test_side", model.img_size), crop=model.img_size,
                           white=config.white)
    scores = predict(model, images, config, device)
    write_predictions(config.out, names, held["classes"], scores.sigmoid())
    print(f"{len(paths)} images: {Path(config.out) / 'predictions.csv'}")


# --------------------------------------------------------------------------------------------------
# Comparison


def list_cells(config):
    """The cells of a comparison, {name: configuration}. Raises InputError for a name that is not
    known or comes twice, before any run."""
    for typed in ("lora", "method", "ratio", "weights"):
        if getattr(config, typed):
            raise InputError("--compare", "--methods, --ratios and --inits", f"--{typed}")
    lists = {name: getattr(config, name).split(",") for name in ("inits", "methods", "ratios")}
    starts = [*DEMO_INITS, *SCRATCH, *filter(os.path.exists, lists["inits"])]
    allowed = {"inits": starts, "methods": METHODS, "ratios": ["1", "10", "100"]}
    for name, given in lists.items():
        differ = len({Path(one).name for one in given}) == len(given)
        if not differ or not set(given) <= set(allowed[name]):
            expected = f"names that differ, of {', '.join(allowed[name])}"
            raise InputError(f"--{name}", expected, ",".join(given))
    cells, seeds = {}, range(config.seed, config.seed + config.seeds)
    for ratio, init, method, number in itertools.product(
            lists["ratios"], lists["inits"], lists["methods"], seeds):
        weights = f"runs/{init}-demo" + (f"-{number}" if number else "")
        cells[f"{Path(init).name}-{method}-{ratio}-{number}"] = dataclasses.replace(
            config, weights=weights if init in DEMO_INITS else init, method=method,
            ratio=int(ratio), seed=number)
    return cells


def read_draws(path, classes):
    """From the predictions.csv of a run: the bootstrap of its mean AUROC, (R,)."""
    rows = data.read_csv(path, [*classes, *(f"label {name}" for name in classes)])
    values = [[value or "nan" for value in values] for _, *values in rows]
    return bootstrap_auroc(*np.split(np.array(values, np.float64), 2, axis=1))[3]


def compare(config):
    """Runs every init x method x ratio over the seeds; writes two tables to OUT/compare.md: of the
    rows, and of the differences of rows with one ratio and the same init or method. A finished run
    is not repeated. The demo's weights are pretrained once for each seed, on first use."""
    out, rows = Path(config.out or "runs/compare"), {}
    cells, asked = list_cells(dataclasses.replace(config, compare=False)), out / "config.json"
    if asked.exists():  # None, too, asks for something: the recipe's value
        of_cells = {"seed": config.seed, "dtype": config.dtype}  # each cell knows its own
        check_same(read_json(asked) | of_cells, config, asked, ("auto",))
    now = {ratio: lists_digest(*read_lists(dataclasses.replace(config, ratio=ratio)))
           for ratio in {cell.ratio for cell in cells.values()}}
    for name, result in run_cells(out, cells, finetune, lambda cell: now[cell.ratio]):
        if not asked.exists():  # the options are good
            write_json(asked, options_of(config))
        draws = read_draws(out / name / "predictions.csv", list(result["auroc_per_class"]))
        method, ratio = result["method"], result["ratio"]
        init = name.removesuffix(f"-{method}-{ratio}-{cells[name].seed}")
        rows.setdefault((init, method, ratio), []).append((result, draws))
    table, header = [], ["pretraining", "method", "labels %", "test AUROC", "each seed", "lr",
                         "trained %", "training images"]
    for row, runs in rows.items():
        scores, first = [result["auroc"] for result, _ in runs], runs[0][0]
        table.append([*row, mean_and_deviation(scores, 3),
                      " ".join(f"{score:.3f}" for score in scores), f"{first['lr']:g}",
                      f"{100 * first['trainable_parameters'] / first['total_parameters']:.2f}",
                      first["images"]["train"]])
    paired = ["labels %", "a", "b", "a - b", "95 % interval", "a ahead, seeds"]
    pairs = [compare_rows(a, b, rows[a], rows[b]) for b, a in itertools.combinations(rows, 2)
             if a[2] == b[2] and (a[0] == b[0] or a[1] == b[1])]
    text = markdown_table(header, table) + "\n" + markdown_table(paired, pairs)
    write_text(out / "compare.md", text)
    print(text)


def compare_rows(a, b, first, second):
    """The paired difference of two rows: its mean over the seeds, its 95 % interval over draws that
    both share, so that their luck cancels, and the number of seeds in which the first is ahead."""
    gains = [x["auroc"] - y["auroc"] for (x, _), (y, _) in zip(first, second)]
    draws = np.mean([x - y for (_, x), (_, y) in zip(first, second)], axis=0)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return [a[2], " ".join(a[:2]), " ".join(b[:2]), f"{np.mean(gains):+.3f}",
            f"[{low:+.3f}, {high:+.3f}]", f"{sum(np.array(gains) > 0)} of {len(gains)}"]


def main(config_class=FinetuneConfig, description=__doc__):
    """Does what the command line says. A file of more/ gives its own options and its own text."""
    config = parse_config(config_class, description=description)
    if config.compare:
        compare(config)
    elif config.predict:
        predict_folder(config)
    else:
        finetune(config)


if __name__ == "__main__":
    run_script(main)
