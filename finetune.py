"""Fine-tuning of a pretrained ViT to classify radiographs: full, LoRA or linear probe, on 1, 10 or 100 % of the labels.

    python finetune.py --lora                            # demo records, demo MRM, LoRA, test AUROC: from nothing
    python finetune.py --data covid --root DIR --split covid1 --weights runs/mrm --lora --rank 4
    python finetune.py --data nih --root DIR --ratio 1 --weights MRM.pth --lora        # the paper's recipe for that cell
    python finetune.py --compare                         # methods x label ratios x seeds, as a table
    python finetune.py --compare --inits mrm,image-only,scratch --methods lora --ratios 10     # what pretraining gives
    python finetune.py --predict DIR --weights runs/finetune

Papers: Zhou et al., "Masked Record Modeling", ICLR 2023 (full fine-tuning); "Less Could Be Better", 2024 (LoRA).

Where this file departs from their official code, and why:
 1. The model is chosen on the validation list and tested once; there the validation list is at times the test list.
 2. AUROC is computed over all samples of all processes, with a bootstrap interval; a class with one label present is
    undefined, reported as such and left out of the mean.
 3. Parameters are counted after freezing, LoRA apart from the head.
 4. An adapter file holds LoRA + fc_norm + head and names its base weights; there a checkpoint holds everything.

Shapes: B batch, n samples, k classes.
"""
import csv
import dataclasses
import functools
import hashlib
import io
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import lora
import mrm
from data import InputError, RunConfig, option

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def weighted_auroc(scores, labels, weights):
    """Area under the ROC curve of one class for R weightings of the samples.

    AUROC = P(score of a positive > score of a negative) + P(equal) / 2, the Mann-Whitney statistic.
    scores, labels (n,), weights (R, n) -> (R,), NaN where a weighting leaves no positive or no negative.
    """
    order = np.argsort(scores, kind="stable")
    scores, labels, weights = scores[order], labels[order], weights[:, order]
    positive, negative = weights * labels, weights * (1 - labels)
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # ties share a group
    positive, negative = np.add.reduceat(positive, starts, axis=1), np.add.reduceat(negative, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    with np.errstate(invalid="ignore"):
        return (positive * (below + negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))


def auroc(scores, labels, resamples=1000, seed=0):
    """Mean and per-class AUROC with 95 % percentile bootstrap intervals over samples.

    scores, labels (n, k). Returns (mean, (low, high), per class: list of None or (auroc, low, high)). A class with one
    label present is None and left out of the mean; the mean is NaN where every class is.
    """
    n, k = scores.shape
    defined = [c for c in range(k) if 0 < labels[:, c].sum() < n]
    generator, draws = np.random.default_rng(seed), []
    for rows in np.array_split(np.arange(resamples), max(1, resamples * n // 4_000_000)):  # bounds the memory
        counts = generator.multinomial(n, np.full(n, 1 / n), size=len(rows)).astype(np.float32)
        draws.append([weighted_auroc(scores[:, c], labels[:, c], counts) for c in defined])
    per_class = [None] * k
    if not defined:
        return float("nan"), (float("nan"), float("nan")), per_class
    draws = np.concatenate(draws, axis=1)  # (defined, resamples)
    points = [weighted_auroc(scores[:, c], labels[:, c], np.ones((1, n)))[0] for c in defined]
    intervals = np.nanpercentile(np.vstack([draws, draws.mean(0)]), [2.5, 97.5], axis=1).T.tolist()
    for c, point, interval in zip(defined, points, intervals):
        per_class[c] = (float(point), *interval)
    return float(np.mean(points)), tuple(intervals[-1]), per_class


def mean_auroc(scores, labels):
    """Mean AUROC over the classes that have both labels, without intervals; NaN where none has."""
    values = [weighted_auroc(scores[:, c], labels[:, c], np.ones((1, len(scores))))[0] for c in range(scores.shape[1])]
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def roc_curve(scores, labels):
    """False and true positive rates of one class at every threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]  # ties move together
    true, false = np.cumsum(labels[order])[last], np.cumsum(1 - labels[order])[last]
    return np.r_[0, false / max(1, false[-1])], np.r_[0, true / max(1, true[-1])]


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: the papers' choices by cell, and ours for the demo and tiny models

SGD = dict(optimizer="sgd", weight_decay=0.0, layer_decay=1.0, min_crop=0.08, drop_path=0.0)
LORA = SGD | dict(batch_size=64, epochs=100, warmup=0.05, rank=4)  # "Less Could Be Better", section 3
FULL = SGD | dict(batch_size=96, warmup=0.02, drop_path=0.1)  # MRM, appendix
RECIPES = {
    ("lora", "nih", 1): LORA | dict(lr=0.05, rank=4), ("lora", "nih", 10): LORA | dict(lr=0.05, rank=8),
    ("lora", "nih", 100): LORA | dict(lr=0.2, rank=32),
    ("lora", "chexpert", 1): LORA | dict(lr=0.02, rank=4), ("lora", "chexpert", 10): LORA | dict(lr=0.05, rank=16),
    ("lora", "chexpert", 100): LORA | dict(lr=0.01, rank=32),
    ("lora", "rsna", 1): LORA | dict(lr=0.01, rank=4), ("lora", "rsna", 10): LORA | dict(lr=0.01, rank=32),
    ("lora", "rsna", 100): LORA | dict(lr=0.01, rank=32),
    ("full", "nih", 1): FULL | dict(steps=3000, warmup=50 / 3000, lr=3e-2),
    ("full", "nih", 10): FULL | dict(steps=30000, warmup=500 / 30000, lr=3e-3),
    ("full", "nih", 100): FULL | dict(steps=200000, warmup=5000 / 200000, lr=3e-3),
    ("full", "rsna", 1): FULL | dict(steps=2000, warmup=50 / 2000, lr=3e-3),
    ("full", "rsna", 10): FULL | dict(steps=10000, warmup=200 / 10000, lr=5e-4),
    ("full", "rsna", 100): FULL | dict(steps=50000, warmup=2000 / 50000, lr=5e-4),
    ("full", "chexpert", 1): FULL | dict(steps=2000, warmup=150 / 2000, lr=3e-3),
    ("full", "chexpert", 10): FULL | dict(steps=60000, warmup=1500 / 60000, lr=5e-4),
    ("full", "chexpert", 100): FULL | dict(steps=200000, warmup=15000 / 200000, lr=5e-4),
    ("full", "covid", 100): FULL | dict(steps=1000, warmup=0.05, lr=3e-2),
}
ADAMW = dict(optimizer="adamw", weight_decay=0.05, layer_decay=1.0, batch_size=32, warmup=0.1, min_crop=0.6, drop_path=0.0, rank=4)
SMALL = {"full": ADAMW | dict(steps=800, lr=5e-4, layer_decay=0.75), "lora": ADAMW | dict(steps=800, lr=1e-2),
         "linear": ADAMW | dict(steps=800, lr=5e-3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    data: str = option("demo", "layout of the data set", choices=list(data.DATASETS))
    root: str = option("", "data folder (demo: where the demo records are, or are drawn)")
    split: str = option("", "named split, for data sets that have several (covid: covid1 ... viral3)")
    ratio: int = option(0, "percent of the training labels: 1, 10 or 100 (default: 10 for the demo, else 100)")
    weights: str = option("", "checkpoint, run folder or 'scratch' (default: the demo MRM, pretrained on first use)")
    method: str = option("full", "what is trained: everything; LoRA + fc_norm + head; fc_norm + head",
                         choices=["full", "lora", "linear"])
    lora: bool = option(False, "short for --method lora")
    rank: int = option(0, "rank of LoRA (0: the recipe's)")
    alpha: float = option(32.0, "LoRA is scaled by alpha / rank")
    dropout: float = option(0.1, "dropout on the input of LoRA's A")
    optimizer: str = option("", "sgd (momentum 0.9) or adamw (default: the recipe's)", choices=["", "sgd", "adamw"])
    lr: float = option(0.0, "peak learning rate (0: the recipe's)")
    layer_decay: float = option(0.0, "learning rate factor a block, from the last to the first (0: the recipe's)")
    batch_size: int = option(0, "images a step and process (0: the recipe's)")
    steps: int = option(0, "optimiser steps (0: the recipe's)")
    epochs: float = option(0.0, "passes over the training list, instead of --steps")
    flip: bool = option(False, "flip training images left-right at random (sides in the labels or reports forbid it)")
    mean: float = option(0.0, "mean of the normalisation in [0, 1] (0: the weights', else MIMIC-CXR's 0.4978; tiny: each "
                              "image's own)")
    std: float = option(0.0, "its standard deviation (0: the weights', else 0.2449; CXR-MAE: 0.4785, 0.2834)")
    img_size: int = option(0, "side of the input in pixels (0: the weights')")
    num_heads: int = option(0, "attention heads, for weights that do not say (0: width / 64)")
    evaluations: int = option(10, "times the validation list is evaluated; the best state is kept")
    skip_bad_lines: bool = option(False, "leave lines of a list that cannot be read out, instead of stopping there")
    predict: str = option("", "folder of images: write the probabilities of --weights for each, and stop")
    compare: bool = option(False, "run the table methods x inits x ratios x seeds, and stop")
    methods: str = option("full,lora,linear", "for --compare")
    ratios: str = option("1,10,100", "for --compare")
    inits: str = option("mrm", "for --compare: of mrm, image-only, report-only, scratch")
    seeds: int = option(3, "for --compare: seeds a cell (of the fine-tuning and, on the demo, of the pretraining)")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def read_split(name, root, split, ratio, skip_bad):
    """({part: (names, paths, labels (n, k))} of train, val, test; class names), checked before any time is spent.

    Raises InputError for lists or images that cannot be used, and for a part in which no class has both labels.
    """
    parts, classes = {}, None
    for part, path in data.split_files(name, root, split, ratio).items():
        names, labels = data.read_list(path, skip_bad=skip_bad)
        paths = data.find_images(name, root, names, path)
        classes = classes or data.class_names(name, root, split, labels.shape[1])
        both = [c for c, positive in zip(classes, labels.sum(0).tolist()) if 0 < positive < len(names)]
        if not both:
            raise InputError(f"{path}: expected both labels of at least one class, found one label only in each")
        if len(both) < len(classes) and part != "train":
            print(f"WARNING: {path}: one label only of {', '.join(c for c in classes if c not in both)}: AUROC undefined, "
                  "left out of the mean")
        parts[part] = (names, paths, labels)
    return parts, classes


def demo_weights(config, variant="mrm", seed=0):
    """The MRM of the demo records, pretrained on first use and found again afterwards: its run folder."""
    out = Path("runs") / (f"{variant}-demo" + (f"-{seed}" if seed else ""))
    if not (out / "result.json").exists():
        print(f"no --weights given: pretraining the tiny {variant} on the demo records first, into {out}")
        mrm.pretrain(mrm.MRMConfig(out=str(out), root=config.root if config.data == "demo" else "", seed=seed,
                                   image_only=variant == "image-only", report_only=variant == "report-only",
                                   mask_ratio=0.75 if variant == "image-only" else 0.0,  # the best of 0.25, 0.5, 0.75
                                   device=config.device, dtype=config.dtype, workers=config.workers))
    return str(out)


def recipe_for(config, method, ratio, embed_dim):
    """The paper's choices where the paper has this cell (ViT-B), else the small models'; options override them."""
    recipe = RECIPES.get((method, config.data, ratio)) if embed_dim == 768 else None
    recipe = dict(recipe or SMALL[method])
    for name in ("optimizer", "lr", "rank", "layer_decay", "batch_size"):
        if getattr(config, name):
            recipe[name] = getattr(config, name)
    if config.steps or config.epochs:
        recipe |= dict(steps=config.steps, epochs=config.epochs)
    return {"steps": 0, "epochs": 0} | recipe


def build_model(config, method, recipe, sizes, classes):
    """A ViT with a new head, frozen as the method says."""
    model = mrm.ViT(**sizes, num_classes=len(classes), drop_path=recipe["drop_path"])
    nn.init.normal_(model.head.weight, std=2e-5)
    if method == "lora":
        lora.add_lora(model, recipe["rank"], config.alpha, config.dropout)
    elif method == "linear":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in ("fc_norm", "head"))
    return model


def make_optimizer(model, recipe):
    """SGD or AdamW; no decay on biases and norms; block i of d learns at layer_decay^(d - i) of the rate (BEiT)."""
    groups, depth = {}, len(model.blocks)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            layer = int(name.split(".")[1]) + 1 if part == "blocks" else depth + 1 if part in ("fc_norm", "head") else 0
            decay = recipe["weight_decay"] * (parameter.ndim > 1)
            group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay,
                                                       "lr_scale": recipe["layer_decay"] ** (depth + 1 - layer)})
            group["params"].append(parameter)
    if recipe["optimizer"] == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=recipe["lr"], momentum=0.9)
    return torch.optim.AdamW(list(groups.values()), lr=recipe["lr"])


@torch.no_grad()
def predict(model, image_set, mean, std, device, autocast, rank=0, world=1, workers=0, batch_size=64):
    """Logits (n, k) of a whole image set in its order, every process contributing its share."""
    model.eval()
    logits, rows = [], []
    for images, index in data.eval_batches(image_set, batch_size, rank, world, workers):
        with autocast():
            logits.append(model(data.normalize(images.to(device), mean, std)).float().cpu())
        rows.append(index)
    model.train()
    logits, rows = torch.cat(logits), torch.cat(rows)
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, (logits, rows))
        logits, rows = (torch.cat(part) for part in zip(*shares))
    return logits[rows.argsort()]


def finetune(config):
    """One fine-tuning run: trains, chooses on the validation list, tests once. Returns the content of result.json.

    Leaves config.json, log.jsonl, last.pt, adapter.pt (LoRA) or best.pt, result.json, predictions.csv, roc.png and
    curves.png in `config.out`. Raises InputError for anything the user gave that cannot be used.
    """
    method = "lora" if config.lora else config.method
    ratio = config.ratio or (10 if config.data == "demo" else 100)
    out = Path(config.out or "runs/finetune")
    if config.evaluations < 1 or config.steps < 0 or config.epochs < 0:
        raise InputError(f"expected --evaluations from 1 and --steps and --epochs from 0, found {config.evaluations}, "
                         f"{config.steps} and {config.epochs:g}")
    start_time = time.time()
    _, _, rank, world = data.start_run(config)
    if rank == 0:
        data.check_writable(out)
    root = data.demo_root(config.root) if config.data == "demo" else config.root
    parts, classes = read_split(config.data, str(root), config.split, ratio, config.skip_bad_lines)
    names, paths, labels = zip(*(parts[part] for part in ("train", "val", "test")))

    # Model
    source = config.weights or demo_weights(config)
    if source == "scratch":
        state, (arguments, saved) = None, mrm.PRESETS["tiny"]  # the recipe knows the normalisation, as a checkpoint does
        sizes = {name: value for name, value in arguments.items() if name in mrm.ENCODER}
    else:
        state, saved = mrm.weights_of(source)
        sizes = mrm.encoder_sizes(state, saved, source, config.num_heads)
    sizes["img_size"] = config.img_size or sizes["img_size"]
    mean, std = saved.get("mean", mrm.MEAN), saved.get("std", mrm.STD)
    if config.mean or config.std:
        mean, std = config.mean or mean or mrm.MEAN, config.std or std or mrm.STD
    # seeds again: pretraining above must not change this run
    device, autocast, rank, world = data.start_run(config, sizes["embed_dim"] < mrm.NARROW)
    recipe = recipe_for(config, method, ratio, sizes["embed_dim"])
    try:
        model = build_model(config, method, recipe, sizes, classes)
    except ValueError as error:  # sizes or a rank that do not fit
        raise InputError(f"{source}: {error}") from None
    if state is not None:
        mrm.load_encoder(model, state, source)
    model = model.to(device)
    start = fingerprint(model)
    about = {"sizes": sizes, "classes": classes, "mean": mean, "std": std, "weights": source, "method": method}
    if method == "lora":
        if state is None:  # an adapter needs the random weights it was trained on
            source = about["weights"] = str(out / "base.pt")
        about["fingerprint"] = start
    count = lora.count_parameters(model)
    optimizer = make_optimizer(model, recipe)

    # Data
    side, crop = sizes["img_size"], (recipe["min_crop"], 1.0)

    def augment(images, generator):
        images = data.random_resized_crop(images, side, crop, generator=generator)
        return data.random_flip(images, generator) if config.flip else images

    train_set = cached_images(tuple(paths[0]), 2 * side, augment, config.seed)
    val_set, test_set = (cached_images(tuple(part), side) for part in paths[1:])
    per_step = recipe["batch_size"] * world
    steps = recipe["steps"] or max(1, round(recipe["epochs"] * len(names[0]) / per_step))
    step, best = 0, {"auroc": -1.0, "step": 0, "state": None}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if config.resume:
        last, own = data.load_checkpoint(out / "last.pt"), model.state_dict()
        same = {n: t.shape for n, t in last.get("trained", {}).items()} == {n: own[n].shape for n in trained}
        if not same or last.get("start", start) != start:
            raise InputError(f"{out / 'last.pt'}: expected the state of a run of --method {method} with the same rank, seed and "
                             "weights, found another")
        model.load_state_dict(last["trained"], strict=False)
        optimizer.load_state_dict(last["optimizer"])
        data.set_random_state(last["random"])
        step, best = last["step"], last["best"]
    if rank == 0:
        print(f"{method} on {len(names[0])} images of {config.data} ({ratio} %): trainable {count['trainable']:,} of "
              f"{count['total']:,} (LoRA {count['lora']:,} = {100 * count['lora'] / (count['total'] - count['head']):.2f} % "
              f"of the backbone, fc_norm + head {count['head']:,}); {steps} steps of {per_step}, {device}")
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    # Train
    log = data.RunLog(out, config, rank, config.resume, start_time)
    if rank == 0 and state is None and method == "lora" and not config.resume:
        data.save_checkpoint(source, {"model": lora.frozen_state_dict(model), "arguments": sizes})
    targets = labels[0].to(device)
    batches = iter(data.train_batches(train_set, recipe["batch_size"], step, steps, config.seed, rank, world, config.workers))
    every = max(1, steps // config.evaluations)
    history, waited, began, first, running = [], 0.0, time.time(), step, 0.0
    model.train()
    for step in tqdm(range(step, steps), initial=step, total=steps, desc=method, disable=rank > 0):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * data.cosine_lr(step, steps, round(recipe["warmup"] * steps), recipe["lr"], 1e-6)
        moment = time.time()
        images, index = next(batches)
        waited += time.time() - moment
        with autocast():
            logits = parallel(data.normalize(images.to(device, non_blocking=True), mean, std))
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets[index.to(device)])
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.detach()
        if (step + 1) % every == 0 or step + 1 == steps:
            running = float(running) / (every if (step + 1) % every == 0 else (step + 1) % every)
            if not np.isfinite(running):
                raise InputError(f"step {step + 1}: the loss is not finite; lower --lr or use --dtype fp32")
            scores = predict(model, val_set, mean, std, device, autocast, rank, world, config.workers)
            score = mean_auroc(scores.numpy(), labels[1].numpy())
            line = {"step": step + 1, "loss": running, "val_auroc": score,
                    "val_loss": F.binary_cross_entropy_with_logits(scores, labels[1]).item(),
                    "images_per_second": (step + 1 - first) * per_step / (time.time() - began)}
            history.append(line)
            log.line(**line)
            state = model.state_dict()
            now = {name: state[name].detach().cpu().clone() for name in trained}
            if score > best["auroc"]:
                best = {"auroc": score, "step": step + 1, "state": now}
            if rank == 0:
                data.save_checkpoint(out / "last.pt", {"trained": now, "optimizer": optimizer.state_dict(), "best": best,
                                                       "random": data.random_state(), "step": step + 1, "start": start})
            running = 0.0
    seconds = time.time() - began

    # Test, once, the state chosen on the validation list
    model.load_state_dict(best["state"], strict=False)
    if rank == 0 and method == "lora":
        lora.save_adapter(out / "adapter.pt", model, **about)
    elif rank == 0:
        data.save_checkpoint(out / "best.pt", {"model": model.state_dict(), **about})
    scores = predict(model, test_set, mean, std, device, autocast, rank, world, config.workers).numpy()
    test_auroc, interval, per_class = auroc(scores, labels[2].numpy())
    result = {"auroc": test_auroc, "auroc_ci": interval,
              "auroc_per_class": {c: v and v[0] for c, v in zip(classes, per_class)},
              "auroc_per_class_ci": {c: v and v[1:] for c, v in zip(classes, per_class)},
              "val_auroc": best["auroc"], "best_step": best["step"], "split": config.split or config.data, "ratio": ratio,
              "method": method, "weights": config.weights or source,
              "images": {part: len(listed) for part, listed in zip(("train", "val", "test"), names)},
              "trainable_parameters": count["trainable"], "lora_parameters": count["lora"], "head_parameters": count["head"],
              "total_parameters": count["total"], "recipe": recipe | {"steps": steps},
              "images_per_second": (steps - first) * per_step / seconds, "share_waiting_for_data": waited / seconds,
              "peak_memory_mib": data.peak_memory_mib(device), "seconds": time.time() - log.start}
    if rank == 0:
        report(out, result, history, names[2], classes, scores, labels[2].numpy(), per_class)
        log.json("result.json", result)
    return result


@functools.lru_cache(maxsize=8)
def cached_images(paths, side, augment=None, seed=0):
    """An ImageSet, decoded into memory where it fits; the cells of --compare share the validation and test images."""
    image_set = data.ImageSet(paths, side, augment, seed)
    image_set.preload()
    return image_set


def report(out, result, history, names, classes, scores, labels, per_class):
    """predictions.csv, roc.png, curves.png and the printed table of a run."""
    probabilities = 1 / (1 + np.exp(-scores))
    rows = [["image", *classes, *(f"label {c}" for c in classes)]]
    rows += [[n, *(f"{p:.6f}" for p in ps), *map(int, ls)] for n, ps, ls in zip(names, probabilities, labels)]
    write_csv(out / "predictions.csv", rows)
    curves = {f"{c} {v[0]:.3f}": roc_curve(scores[:, i], labels[:, i])
              for i, (c, v) in enumerate(zip(classes, per_class)) if v}
    data.save_plot(out / "roc.png", curves, f"ROC on the test list, mean AUROC {result['auroc']:.3f}", "false positive rate",
                   "true positive rate", diagonal=True)
    xs = [line["step"] for line in history]
    data.save_plot(out / "curves.png", {name: (xs, [line[name] for line in history]) for name in ("loss", "val_loss", "val_auroc")},
                   "fine-tuning", "step", "")
    for c, value in zip(classes, per_class):
        print(f"  {c:20s} " + ("%.3f  [%.3f, %.3f]" % value if value else "undefined: one label only, left out of the mean"))
    low, high = result["auroc_ci"]
    print(f"test AUROC {result['auroc']:.3f} [{low:.3f}, {high:.3f}], {result['images_per_second']:.0f} images/s, "
          f"{result['seconds']:.0f} s in all; {out}")


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    data.atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def fingerprint(model):
    """A hash of the frozen backbone, by which an adapter recognises the weights it was trained on."""
    digest = hashlib.sha256()
    for _, tensor in sorted(lora.frozen_state_dict(model).items()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and comparison


def load_run(run):
    """The model of a finished run (its folder, adapter.pt or best.pt), merged: (ViT in eval mode, the file's dict)."""
    path = data.checkpoint_file(run, "adapter.pt", "best.pt")
    saved = data.load_checkpoint(path)
    needed = {"weights", "fingerprint"} if "adapter" in saved else {"model"}
    if not needed | {"sizes", "classes", "mean", "std"} <= saved.keys():
        raise InputError(f"{path}: expected the adapter.pt or best.pt of a fine-tuning run, found entries {sorted(saved)[:6]}")
    model = mrm.ViT(**saved["sizes"], num_classes=len(saved["classes"]))
    if "adapter" in saved:
        mrm.load_encoder(model, mrm.weights_of(saved["weights"])[0], saved["weights"])
        if fingerprint(model) != saved["fingerprint"]:
            raise InputError(f"{path}: {saved['weights']} are not the weights this adapter was trained on; they have changed since")
        lora.load_adapter(model, path)
        lora.merge_lora(model)
    else:  # of three channels or another grid where `lora.py merge` kept the base's
        mrm.load_encoder(model, saved["model"], path)
        for name, tensor in lora.lora_state_dict(model).items():  # fc_norm and head
            if name not in saved["model"] or saved["model"][name].shape != tensor.shape:
                raise InputError(f"{path}: expected {name} of shape {tuple(tensor.shape)} for {len(saved['classes'])} classes, "
                                 "found none that fits")
    return model.eval(), saved


def predict_folder(config):
    """Writes OUT/predictions.csv: the probability of each class for every image below the folder `config.predict`."""
    if not config.weights:
        raise InputError("--predict needs --weights RUN, the folder of a fine-tuning run")
    model, saved = load_run(config.weights)
    device, autocast, _, _ = data.start_run(config, saved["sizes"]["embed_dim"] < mrm.NARROW)
    paths = data.list_images(config.predict)
    image_set = data.ImageSet(paths, model.img_size)
    scores = predict(model.to(device), image_set, saved["mean"], saved["std"], device, autocast, workers=config.workers)
    out = Path(config.out or "runs/predict") / "predictions.csv"
    names = [Path(path).relative_to(config.predict).as_posix() for path in paths]
    rows = [[name, *(f"{p:.6f}" for p in row)] for name, row in zip(names, scores.sigmoid().tolist())]
    write_csv(out, [["image", *saved["classes"]], *rows])
    print(f"{len(paths)} images: {out}")


def compare(config):
    """Every init x method x ratio over the seeds; writes OUT/compare.md and compare.csv and prints the table.

    A finished cell is kept in its folder and not run again. `mrm`, `image-only` and `report-only` are pretrained on the
    demo records, once a seed, unless --weights is given.
    """
    out = Path(config.out or "runs/compare")
    known = {"inits": ["mrm", "image-only", "report-only", "scratch"], "methods": list(SMALL), "ratios": ["1", "10", "100"]}
    for name, values in known.items():
        if other := [value for value in getattr(config, name).split(",") if value not in values]:
            raise InputError(f"--{name}: expected some of {','.join(values)}, found {other[0]!r}")
    if config.seeds < 1:
        raise InputError(f"--seeds: expected 1 or more, found {config.seeds}")
    rows = []
    for init in config.inits.split(","):
        for method in config.methods.split(","):
            for ratio in config.ratios.split(","):
                results = []
                for seed in range(config.seeds):
                    cell = out / f"{init}-{method}-{ratio}-{seed}"
                    if not (cell / "result.json").exists():
                        weights = "scratch" if init == "scratch" else config.weights or demo_weights(config, init, seed)
                        finetune(dataclasses.replace(config, out=str(cell), weights=weights, method=method, lora=False,
                                                     ratio=int(ratio), seed=seed, compare=False))
                    results.append(data.read_json(cell / "result.json"))
                scores = np.array([result["auroc"] for result in results])
                one = results[0]
                rows.append([init, method, ratio, f"{scores.mean():.3f}", f"{scores.std(ddof=1) if len(scores) > 1 else 0:.3f}",
                             " ".join(f"{score:.3f}" for score in scores), one["trainable_parameters"], one["images"]["train"]])
    header = ["pretraining", "method", "labels %", "test AUROC", "sd over seeds", "each seed", "trained parameters",
              "training images"]
    write_csv(out / "compare.csv", [header] + rows)
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header)] + rows) + "\n"
    data.atomic_write(out / "compare.md", lambda file: file.write(table.encode()))
    print(table)


def main():
    config = data.parse_config(FinetuneConfig, description=__doc__)
    if config.compare:
        compare(config)
    elif config.predict:
        predict_folder(config)
    else:
        finetune(config)


if __name__ == "__main__":
    data.run_script(main)
