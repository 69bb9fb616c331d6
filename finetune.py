"""Fine-tuning of a pretrained ViT to classify or segment radiographs, on 1, 10 or 100 % of them.

    python finetune.py --lora        # from nothing: demo records, demo MRM, LoRA, test AUROC
    python finetune.py --data nih --root DIR --ratio 1 --weights MRM.pth --lora  # the paper's cell
    python finetune.py --data nih --ratio 1 --lora --recipe cxr-mae --dry-run    # its recipe
    python finetune.py --data covid --root DIR --split covid1 --weights runs/mrm --lora --rank 4
    python finetune.py --compare     # methods x label ratios x seeds, as a table
    python finetune.py --compare --inits mrm,image-only,scratch --methods lora --ratios 10
    python finetune.py --task segment  # the area of a pneumothorax (or any mask), by UPerNet
    python finetune.py --predict DIR --weights runs/finetune

Papers: Zhou et al., "Masked Record Modeling", ICLR 2023 (full fine-tuning); "Less Could Be Better",
2024 (LoRA).

One batch of the demo: random crops of films (32, 1, 96, 96) are resized to (32, 1, 48, 48), the ViT
makes 16 patches and a class token of each, (32, 17, 128), and fc_norm and the head turn the mean
over the patches, (32, 128), into logits (32, 7). The loss is the binary cross-entropy of each
finding, -y log p - (1 - y) log(1 - p) with p = sigmoid(logit), since a film may show several.
`--method` decides what learns: "full" everything, "lora" two thin matrices beside q and v of each
block (lora.py), fc_norm and the head, "linear" fc_norm and the head alone.

A run says which recipe it takes. The papers' are keyed by weights, method, data set and ratio; a
ViT that is no ViT-B, and data of one's own, take ours, by the number of training images. On the
demo's 10 %, full and LoRA train the head alone for the first half of their steps (`set_rates`).

Read down to "Segmentation" for the methods: model, optimiser, AUROC, the loop. What follows stands
around a run: recipes, lists, weights, files, tables. Before this file comes mrm.py, after it
kernels/warp.py.

Where this file departs from their official code, and why:
 1. The model is chosen on the validation list and tested once, at the end. The official MRM code
    tests every few hundred steps. Its validation lists for NIH, CheXpert, RSNA and COVID-19 share
    no image with the test lists; SIIM's share 124.
 2. AUROC is computed over all samples of all processes, with a bootstrap interval. A class with one
    label present is undefined, is reported as such and is left out of the mean.
 3. Parameters are counted after freezing, LoRA apart from the head.
 4. An adapter file holds LoRA + fc_norm + head and names its base weights. An official checkpoint
    holds everything.
 5. Gradients are clipped for LoRA and linear probes too, as MRM's full fine-tuning clips them.
    Training images are not flipped, since labels may know sides. The validation list is evaluated
    10 times; the LoRA paper does it after each epoch. The last batch of an epoch takes the first
    images of the next one; the LoRA paper drops it. Images are resized bicubically; MRM's full
    fine-tuning does it bilinearly. RSNA's DICOM passes through its LUTs and window; the official
    code divides the stored numbers by their maximum. `--official` has the papers' form of these.
 6. Autocast is bfloat16 instead of float16. Crops are cut out of films whose shorter side is twice
    the input's. MRM's full fine-tuning is evaluated every few hundred steps, and the last batch of
    an epoch is smaller there; ours is evaluated 10 times, and fills that batch.
 7. Segmentation squeezes whole films into squares, trains on few of the films that have no mask,
    and chooses the threshold and the smallest area on the validation list.

Shapes: B batch, n samples, k classes, H and W pixels.
"""
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import common
import data
import lora
import mrm
from common import InputError, RunConfig, option

# --------------------------------------------------------------------------------------------------
# Model, loss, optimiser, learning rate


def build_model(config, sizes, classes, tensors=None, known={}):
    """A ViT of the given weights with `classes` outputs, frozen as `config.method` says.
    tensors, known: what a file of weights holds, by `fill_recipe`; of a random start nothing.
    Raises InputError for weights or sizes that do not fit."""
    try:
        if config.task == "segment":
            model = mrm.UPerNet(config.channels, config.norm, **sizes, drop_path=config.drop_path)
        else:
            model = mrm.ViT(**sizes, num_classes=classes, drop_path=config.drop_path,
                            pool=config.pool)
            nn.init.normal_(model.head.weight, std=2e-5)
    except ValueError as error:
        raise InputError(f"{config.weights}: {error}") from None
    if tensors is not None:  # before LoRA, because DoRA starts from the lengths of these weights
        mrm.load_encoder(model, tensors, known.get("base", config.weights))
    if config.method == "lora" and "adapter" in known:
        settings = {"rank": config.rank, "dropout": config.dropout}
        lora.add_lora(model, **known["lora"] | settings)  # `load_adapter` refuses another rank
    elif config.method == "lora":
        alpha = config.alpha * (math.sqrt(config.rank) if config.rslora else 1)
        lora.add_lora(model, config.rank, alpha, config.dropout, lora.TARGETS[config.targets],
                      dora=config.dora)
    elif config.method == "linear":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(lora.part_of(name) == "head")
    if "adapter" in known:
        lora.load_adapter(model, known["path"])
    return model


def label_loss(logits, labels):
    """Binary cross-entropy, the mean over the labels (B, k) that are known (not NaN)."""
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def make_optimizer(model, config):
    """SGD or AdamW. Layer i learns at layer_decay^(d + 1 - i) of the rate (BEiT): the embeddings
    are layer 0, the d blocks layers 1 to d, fc_norm and the head layer d + 1.
    """
    groups, depth = {}, len(model.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = 0
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif lora.part_of(name) == "head":
            layer = depth + 1
        decay = config.weight_decay if mrm.decays(name, parameter) else 0.0
        scale = config.layer_decay ** (depth + 1 - layer)
        group = {"params": [], "weight_decay": decay, "lr_scale": scale,
                 "is_head": layer == depth + 1}
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    if config.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr)


def set_rates(optimizer, config, step, steps):
    """Gives each group its learning rate of `step`.

    A rate rises slowly at first: large steps for a head that knows nothing yet would spoil the
    pretrained blocks. With `probe` the head learns alone first, for the same reason: on a few
    dozen labels the blocks would otherwise follow the noise of a random head (Kumar et al., 2022,
    linear probing, then fine-tuning). Then the rate falls along a cosine, or along a line for a
    segmentation (a polynomial of power 1).
    """
    alone = round(config.probe * steps)
    if step < alone:
        lr = mrm.cosine_lr(step, alone, round(config.warmup * alone), config.probe_lr, floor=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr if group["is_head"] else 0.0
        return
    step, steps = step - alone, steps - alone
    warmup = round(config.warmup * steps)
    lr = mrm.cosine_lr(step, steps, warmup, config.lr, floor=1e-6)
    if config.task == "segment" and step >= warmup:
        lr = config.lr * (steps - step) / (steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * lr


# --------------------------------------------------------------------------------------------------
# AUROC


def weighted_auroc(scores, labels, weights):
    """Area under the ROC curve of one class for R weightings of the samples.

    AUROC = P(score of a positive > score of a negative) + P(equal) / 2, the Mann-Whitney statistic.
    scores, labels (n,), weights (R, n) -> (R,), NaN where a weighting leaves one label only. A
    sample whose label is NaN, which is unknown, does not count. Raises
    InputError for scores that are not finite, which have no order.
    """
    if not np.isfinite(scores).all():
        raise InputError("AUROC", "finite scores", f"{np.sum(~np.isfinite(scores))} that are not")
    order = np.argsort(scores, kind="stable")
    order = order[~np.isnan(labels[order])]
    scores, labels, weights = scores[order], labels[order], weights[:, order]
    groups = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # where a new score begins
    positive = np.add.reduceat(weights * labels, groups, axis=1)  # (R, groups): ties count together
    negative = np.add.reduceat(weights * (1 - labels), groups, axis=1)
    below = np.cumsum(negative, axis=1) - negative  # negatives with a lower score
    with np.errstate(invalid="ignore"):
        won = (positive * (below + negative / 2)).sum(1)
        return won / (positive.sum(1) * negative.sum(1))


def bootstrap_auroc(scores, labels, resamples=1000, seed=0):
    """AUROC of each class, and of each class in each of `resamples` draws of n from the n samples.
    Films are drawn, although a patient may have several: on the demo, drawing its patients moves
    the ends of the interval by 0.001.

    scores, labels (n, k). Returns (classes that have both labels, AUROC of each, array (classes,
    resamples)). The draws depend on n, `resamples` and `seed` alone: two models that scored the
    same list see the same draws, and the differences between them are paired.
    """
    n, k = scores.shape
    defined = [c for c in range(k) if {0.0, 1.0} <= set(labels[:, c].tolist())]
    generator, draws = np.random.default_rng(seed), [np.zeros((len(defined), 0))]
    parts = max(1, resamples * n // 4_000_000)  # bounds the memory
    for rows in np.array_split(np.arange(resamples), parts):
        # Drawing n samples with replacement is the same as weighting each by how often it comes
        counts = generator.multinomial(n, np.full(n, 1 / n), size=len(rows)).astype(np.float32)
        draws.append(np.array([weighted_auroc(scores[:, c], labels[:, c], counts)
                               for c in defined]).reshape(len(defined), len(rows)))
    points = [weighted_auroc(scores[:, c], labels[:, c], np.ones((1, n)))[0] for c in defined]
    return defined, np.array(points), np.concatenate(draws, axis=1)


def auroc(scores, labels, resamples=1000, seed=0):
    """Mean and per-class AUROC with 95 % percentile bootstrap intervals over samples.

    scores, labels (n, k). Returns (mean, (low, high), k entries (auroc, low, high)). A class with
    one label present has the entry None and no part in the mean. The mean of no class is NaN.
    """
    defined, points, draws = bootstrap_auroc(scores, labels, resamples, seed)
    per_class = [None] * scores.shape[1]
    if not defined:
        return float("nan"), (float("nan"), float("nan")), per_class
    draws = np.vstack([draws, draws.mean(0)])
    intervals = np.nanpercentile(draws, [2.5, 97.5], axis=1).T.tolist()
    for c, point, interval in zip(defined, points, intervals):
        per_class[c] = (float(point), *interval)
    return float(np.mean(points)), tuple(intervals[-1]), per_class


def mean_auroc(scores, labels):
    """Mean AUROC over the classes that have both labels, without intervals; NaN where none has."""
    one = np.ones((1, len(scores)))
    values = [weighted_auroc(s, y, one)[0] for s, y in zip(scores.T, labels.T)]
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def roc_curve(scores, labels):
    """False and true positive rates of one class at every threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isnan(labels[order])]
    last = np.r_[np.flatnonzero(np.diff(scores[order])), len(order) - 1]  # ties move together
    true, false = np.cumsum(labels[order])[last], np.cumsum(1 - labels[order])[last]
    return np.r_[0, false / max(1, false[-1])], np.r_[0, true / max(1, true[-1])]


# --------------------------------------------------------------------------------------------------
# The loop


@torch.no_grad()
def predict(model, images, config, device, rank=0, world=1):
    """Logits of an ImageSet in its order: (n, k), or (n, H, W) of a segmentation. Every process
    computes a share of them."""
    autocast, segment = mrm.autocast_for(config, model, device), images.masks is not None
    # They start with empty ones for a process that has no image
    shape = (1, images.size, images.size) if segment else (model.head.out_features,)
    logits, rows = [torch.zeros(0, *shape)], [torch.zeros(0, dtype=torch.long)]
    if world > 1:  # a batch norm has seen other images in each process
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    model.eval()
    for batch, index in data.eval_batches(images, 16 if segment else 64, rank, world,
                                          config.workers):
        with autocast():
            batch = data.normalize(batch[:, :1].to(device), config.mean, config.std)
            logits.append(model(batch).float().cpu())
        rows.append(index)
    model.train()
    logits, rows = torch.cat(logits), torch.cat(rows)
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, (logits, rows))
        logits, rows = (torch.cat(part) for part in zip(*shares))
    logits = logits[rows.argsort()]
    return logits[:, 0] if segment else logits


@torch.no_grad()
def evaluate(model, part, config, step, device, rank, world):
    """Score and loss on the validation list after `step` steps. The score is the mean AUROC, or the
    best `dice_all` of a segmentation, with the threshold and the smallest area that give it."""
    scores = predict(model, part.images, config, device, rank, world)
    wrong = (~scores.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    common.check_finite(step, part.paths, wrong, validation_score=scores)
    if config.task == "segment":
        chosen = choose_threshold(scores, part.truth)
        loss = segmentation_loss(scores[:, None], part.truth[:, None].float()).item()
        return {"val_dice": chosen.pop("dice"), "val_loss": loss, **chosen}
    return {"val_auroc": mean_auroc(scores.numpy(), part.labels.numpy()),
            "val_loss": label_loss(scores, part.labels).item()}


def trained_tensors(model):
    """Copies on the CPU of what training changes, by name: the parameters that are trained, and
    the statistics of batch norms."""
    trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    return {name: tensor.detach().cpu().clone()
            for name, tensor in [*trained, *model.named_buffers()]}


def split_batch(images, rows, labels):
    """A batch as (images (B, 1, H, W), targets): the labels (B, k), or the masks (B, 1, H, W) that
    come as the second channel."""
    if images.shape[1] == 2:
        return images[:, :1], images[:, 1:]
    return images, labels[rows.to(labels.device)]


def timed_batches(images, config, step, steps, device, rank, world):
    """The batches (images, rows) of this process from step `step` on, timed."""
    share, passes = common.share_of_batch(config, world), config.accumulate
    with_pil = config.randaugment or config.erasing  # which needs a CPU
    crop_on = device if device.type == "cuda" and not with_pil else None
    batches = data.train_batches(images, share, step * passes, steps * passes, config.seed, rank,
                                 world, config.workers, images_of_epoch(config, len(images)),
                                 crop_on)
    return common.Timed(batches, device, world)


def train(config, model, parts, steps, saved, facts, log, device, world):
    """The training loop. Returns the scores, step and trained tensors of the state that was best on
    the validation list."""
    score, loss_function = f"val_{SCORES[config.task]}", LOSSES[config.task]
    labels, autocast = parts["train"].labels.to(device), mrm.autocast_for(config, model, device)
    paths, optimizer = parts["train"].paths, make_optimizer(model, config)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    step, losses, best = 0, [], {score: -1.0, "step": 0, "trained": None}
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    common.seed_rank(config.seed, log.rank)
    if saved:
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        common.restore_rank(saved, log.rank)
        step, best, losses = saved["step"], saved["best"], saved["losses"]
    images = parts["train"].images
    batches = timed_batches(images, config, step, steps, device, log.rank, world)
    every = max(1, steps // config.evaluations)

    def save(step):
        state = facts | {"model": trained_tensors(model), "best": best, "losses": losses,
                         "step": step, "optimizer": optimizer.state_dict()}
        common.save_state(log, config, world, state)

    model.train()
    with common.Saving(save, world) as saving:
        for step in batches.steps(step, steps, config.method, log.rank):
            set_rates(optimizer, config, step, steps)
            loss_of_step, seen = torch.zeros((), device=device), []
            for _ in range(config.accumulate):
                images, rows = next(batches)
                images, targets = split_batch(images.to(device, non_blocking=True), rows, labels)
                with autocast():
                    logits = parallel(data.normalize(images, config.mean, config.std))
                # The loss is float32: its gradient, probability - label, is near 0 for most
                # labels, and bfloat16 would round it to two or three digits
                loss = loss_function(logits.float(), targets)
                (loss / config.accumulate).backward()
                loss_of_step += loss.detach() / config.accumulate
                seen += rows.tolist()
            # Clipping bounds what one batch with a rare finding can undo (MRM's recipe)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip or float("inf"))
            common.check_finite(step + 1, paths, seen, loss=loss_of_step, gradient=norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(common.average(loss_of_step, world).item())
            if (step + 1) % every == 0 or step + 1 == steps:
                # The choice is made on the validation list. The best of many scores on the test
                # list would be the luckiest one, and higher than on any new list
                scores = evaluate(model, parts["val"], config, step + 1, device, log.rank, world)
                log.line(step=step + 1, loss=sum(losses) / len(losses), **scores,
                         **batches.speed())
                log.curves("fine-tuning", "loss", "val_loss", score)
                losses.clear()
                if scores[score] > best[score]:
                    best = scores | {"step": step + 1, "trained": trained_tensors(model)}
                save(step + 1)
            saving.after(step + 1)
    return best


# --------------------------------------------------------------------------------------------------
# Segmentation: loss and metrics


def segmentation_loss(logits, masks):
    """2 focal + 1 Dice of the head, and 0.4 times the same of the auxiliary head (MRM's recipe).

    With p = sigmoid(logit) of a pixel, y its mask and q = p where y is 1, else 1 - p:
    focal = mean over pixels of 1/2 (1 - q)^2 (-log q) (Lin et al., 2017, gamma 2, alpha 1/2);
    Dice = mean over images of 1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1).
    logits (B, 1 or 2, H, W), the second channel the auxiliary head's; masks (B, 1, H, W) of 0, 1.
    """
    loss = 0
    for weight, x in zip((1.0, 0.4), logits.split(1, dim=1)):
        p, minus_log_q = x.sigmoid(), F.binary_cross_entropy_with_logits(x, masks, reduction="none")
        focal = 0.5 * ((p - masks).square() * minus_log_q).mean()  # |p - y| is 1 - q
        both, of_p, of_y = ((a * b).sum((1, 2, 3)) for a, b in ((p, masks), (p, p), (masks, masks)))
        dice = (1 - (2 * both + 1) / (of_p + of_y + 1)).mean()
        loss = loss + weight * (2 * focal + dice)
    return loss


def find_pixels(logits, threshold, smallest=0):
    """Bool masks (n, H, W): where the probability is above `threshold`. An image with fewer than
    `smallest` such pixels gets an empty mask."""
    found = logits > math.log(threshold / (1 - threshold))
    return found & (found.sum((1, 2), keepdim=True) >= smallest)


def count_pixels(found, masks):
    """Pixels of each image that are (in both, predicted, true): (3, n) of bool masks (n, H, W)."""
    return torch.stack([x.sum((1, 2)) for x in (found & masks, found, masks)]).numpy()


def dice_scores(counts, pixels, resamples=0, seed=0):
    """Three Dice coefficients of a list of images, {name: array (1 + resamples,)}.

    An image's Dice is 2 |predicted and true| / (|predicted| + |true|).
    dice: the mean over the images that have a mask. dice_all: the mean over all images, where an
    empty mask predicted empty counts 1. dice_official: mmsegmentation's, 2 |both| / (|predicted| +
    |true|) of the pixels of all images together, the mean of the background's and the mask's.
    counts (3, n) by `count_pixels` of images of `pixels` pixels. The first number is that of the
    list itself, the others those of bootstrap draws of n images. NaN: no image has a mask.
    """
    both, predicted, true = counts.astype(np.float64)
    n = len(both)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    weights = np.concatenate([np.ones((1, n)), draws])  # (1 + resamples, n)
    empty = predicted + true == 0
    each = np.where(empty, 1.0, 2 * both / np.where(empty, 1, predicted + true))
    background = np.stack([pixels - predicted - true + both, 2 * pixels - predicted - true])
    with np.errstate(invalid="ignore"):
        classes = [2 * (weights @ a) / (weights @ b)
                   for a, b in ((both, predicted + true), background)]
        return {"dice": weights @ (each * (true > 0)) / (weights @ (true > 0)),
                "dice_all": weights @ each / n, "dice_official": np.mean(classes, axis=0)}


def choose_threshold(logits, masks):
    """The threshold and the smallest area, in pixels, with the best `dice_all` of a list, as
    {"dice", "threshold", "smallest"}. Among equals the first is taken, from 0.5 outwards."""
    pixels, best = masks[0].numel(), {"dice": -1.0}
    for threshold in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9):
        both, predicted, true = count_pixels(find_pixels(logits, threshold), masks)
        for share in (0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1):
            kept = predicted >= share * pixels
            counts = np.stack([both * kept, predicted * kept, true])
            dice = float(dice_scores(counts, pixels)["dice_all"][0])
            if dice > best["dice"]:
                best = {"dice": dice, "threshold": threshold, "smallest": math.ceil(share * pixels)}
    return best


# What the task decides
SCORES = {"classify": "auroc", "segment": "dice"}
LOSSES = {"classify": label_loss, "segment": segmentation_loss}


# --------------------------------------------------------------------------------------------------
# Recipes: the papers', by family of weights, method, data set and percent of labels, and ours

CROP = dict(min_crop=0.08, drop_path=0.1)
SGD = CROP | dict(optimizer="sgd", weight_decay=0.0, layer_decay=1.0)
# "Less Could Be Better" on MRM's weights and on CXR-MAE's
MEDPEFT = SGD | dict(batch_size=64, epochs=100, warmup=5 / 100)  # five epochs
CXR_MAE = CROP | dict(optimizer="adamw", weight_decay=0.05, layer_decay=0.65, batch_size=64,
                      mean=0.4785, std=0.2834, randaugment=True, erasing=0.25, test_side=256)
MRM_FULL = SGD | dict(batch_size=96)  # MRM's appendix, in steps
LORA_ON_MRM = {  # data set: learning rate and rank with 1, 10 and 100 % of the labels
    "nih": [(0.05, 4), (0.05, 8), (0.2, 32)],
    "chexpert": [(0.02, 4), (0.05, 16), (0.01, 32)],
    "rsna": [(0.01, 4), (0.01, 32), (0.01, 32)]}
LORA_ON_CXR_MAE = {  # epochs, learning rate at a batch of 256, rank
    "nih": [(400, 3e-3, 4), (200, 1e-3, 8), (100, 3e-3, 32)],
    "chexpert": [(400, 3e-3, 4), (100, 5e-3, 8), (100, 3e-3, 32)],
    "rsna": [(100, 3e-3, 4), (100, 5e-3, 8), (100, 5e-3, 32)]}
FULL_ON_MRM = {  # steps, steps of warm-up, learning rate
    "nih": [(3000, 50, 3e-2), (30000, 500, 3e-3), (200000, 5000, 3e-3)],
    "chexpert": [(2000, 150, 3e-3), (60000, 1500, 5e-4), (200000, 15000, 5e-4)],
    "rsna": [(2000, 50, 3e-3), (10000, 200, 5e-4), (50000, 2000, 5e-4)]}
RECIPES = {
    ("mrm", "full", "covid", 100): MRM_FULL | dict(steps=1000, warmup=50 / 1000, lr=3e-2),
    # Of the LoRA paper's full fine-tuning this cell alone is published
    ("medpeft", "full", "nih", 1): MEDPEFT | dict(epochs=200, warmup=5 / 200, lr=1e-2),
    ("cxr-mae", "full", "nih", 1): CXR_MAE | dict(epochs=400, warmup=5 / 400, base_lr=5e-4)}
for name in LORA_ON_MRM:
    for place, percent in enumerate((1, 10, 100)):
        lr, rank = LORA_ON_MRM[name][place]
        for family in ("mrm", "medpeft"):
            RECIPES[family, "lora", name, percent] = MEDPEFT | dict(lr=lr, rank=rank)
        epochs, lr, rank = LORA_ON_CXR_MAE[name][place]
        RECIPES["cxr-mae", "lora", name, percent] = CXR_MAE | dict(
            epochs=epochs, warmup=5 / epochs, base_lr=lr, rank=rank)
        steps, warmup, lr = FULL_ON_MRM[name][place]
        RECIPES["mrm", "full", name, percent] = MRM_FULL | dict(
            steps=steps, warmup=warmup / steps, lr=lr)
# What every recipe leaves as it is unless it says otherwise
PLAIN = dict(alpha=32.0, probe=0.0, randaugment=False, erasing=0.0)
# What we do otherwise on purpose (point 5 above says why), in place of `official_form`
OURS = dict(flip=False, clip=1.0, evaluations=10, drop_last=False, interpolation="bicubic",
            raw_dicom=False)
PAPER_SETS = ("nih", "chexpert", "rsna", "covid")
FAMILIES = ("mrm", "medpeft", "cxr-mae", "small")
TARGETS = tuple(lora.TARGETS)  # of LoRA
ADAMW = dict(optimizer="adamw", weight_decay=0.05, layer_decay=1.0, min_crop=0.6, drop_path=0.0,
             batch_size=32, steps=800, warmup=0.1)
SMALL = {
    "full": ADAMW | dict(lr=3e-3, layer_decay=0.75, probe=0.5),
    "lora": ADAMW | dict(lr=3e-3, rank=4, probe=0.5),
    "linear": ADAMW | dict(lr=3e-2),
}
# ... and what changes below 100 and from 1,000 training images on. Each rate, and whether the head
# learns alone first, is what was best on the demo's validation list, by one grid for all methods
FEW = {"full": dict(steps=400, lr=1e-4), "lora": dict(steps=400, lr=3e-4),
       "linear": dict(steps=400, lr=1e-2)}
LONG = dict(steps=1600, batch_size=64, probe=0.0)
MANY = {"full": LONG, "lora": LONG | dict(lr=1e-2), "linear": LONG}
SEGMENT = ADAMW | dict(layer_decay=0.65, min_crop=0.5)
SMALL_SEGMENT = SEGMENT | dict(batch_size=16, steps=600, lr=5e-3, channels=32, rank=4)
# MRM's for SIIM; the batch and the steps, which it does not say, are ours
PAPER_SEGMENT = SEGMENT | dict(batch_size=16, steps=20000, lr=2e-5, channels=768, img_size=512,
                               drop_path=0.1, warmup=0.05, rank=16)


def recipe_for(family, method, name, percent, images=None):
    """(recipe, note): the cell's own, or the nearest that is published, and in words which it is.
    The family "small" has ours, for some number of training images, or for some hundreds where that
    is not known yet. Raises InputError for a family that knows no such data."""
    if family == "small" or method == "linear":
        size, changed = "100 to 999 images", {}
        if images is None:
            size = "as for some hundred images, whose number is not known yet"
        elif images < 100:
            size, changed = "fewer than 100 images", FEW[method]
        elif images >= 1000:
            size, changed = "1,000 images or more", MANY[method]
        return SMALL[method] | changed, f"{method}, small models, {size}"
    cell = (family, method, name, percent)
    if cell in RECIPES:
        return RECIPES[cell], " ".join(map(str, cell)) + " %"
    if name not in PAPER_SETS:
        raise InputError(f"--recipe {family}", f"--data {' or '.join(PAPER_SETS)}, or --recipe "
                         "small", f"--data {name}")
    near = (family, method, "nih", 1)  # the neighbour: the same weights and method on few labels
    return RECIPES[near], f"{' '.join(map(str, near))} %, since {name} {percent} % is not published"


def official_form(config, recipe):
    """The papers' values of `OURS`. The LoRA paper's recipes count epochs, and MRM's steps."""
    lora_paper = "epochs" in recipe
    epochs = 10 if config.steps else config.epochs or recipe.get("epochs", 10)
    mrm_full = MRM_FULL.items() <= recipe.items()
    return dict(flip=True, clip=0.0 if lora_paper else 1.0, evaluations=max(1, round(epochs)),
                drop_last=lora_paper, interpolation="bilinear" if mrm_full else "bicubic",
                raw_dicom=config.data == "rsna")


def images_of_epoch(config, images):
    """How many of the training images an epoch takes: with `drop_last` those of whole batches.
    Raises InputError where there is no whole batch."""
    taken = images - images % config.batch_size if config.drop_last else images
    if not taken:
        raise InputError("--drop-last" + " (of --official)" * config.official,
                         f"at least {config.batch_size} training images, one batch",
                         f"{images}; type a smaller --batch-size, or --no-drop-last")
    return taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    task: str = option("classify", "classify: labels; segment: the pixels of a mask",
                       choices=["classify", "segment"])
    masks: str = option("", "segment: folder of masks NAME.png, or SIIM's CSV of run lengths "
                        "(default: ROOT/masks)")
    norm: str = option(None, "segment: norm of the head (default: batch, as published; group where "
                       "a process takes fewer than 16 images)", choices=["batch", "group"])
    empties: float = option(1.0, "segment: training images known to have no mask for each that has "
                            "one", within="[0, inf)")
    channels: int = option(None, "segment: width of the head", within="[4, inf)")
    data: str = option("demo", "layout of the data set", choices=list(data.DATASETS))
    root: str = option("", "data folder (demo: where the demo records are, or are drawn)")
    split: str = option("", "named split, for data sets that have several (covid: covid1 ...)")
    ratio: int = option(None, "percent of labels (default: 100, and 10 to classify the demo)",
                        within="[1, 100]")
    weights: str = option(None, "checkpoint, run folder (of --lora: its adapter is trained further)"
                          ", scratch or scratch-PRESET (default: the demo MRM, made on first use)")
    base: str = option("", "base weights of an adapter, where they moved", free=True)
    recipe: str = option(None, "whose values the options take: mrm (its own full fine-tuning, and "
                         "the LoRA paper's LoRA), medpeft or cxr-mae (the LoRA paper's on MRM's or "
                         "CXR-MAE's weights), small (default: by the weights)", choices=FAMILIES)
    official: bool = option(False, "the papers' form where we depart: flips; RSNA's DICOM as stored"
                            "; MRM's full fine-tuning with bilinear resizing; the LoRA paper's runs"
                            " without clipping and last batches, validated after each epoch")
    dry_run: bool = option(False, "print the recipe and stop", free=True)
    method: str = option(None, "what is trained: everything; LoRA + fc_norm + head; fc_norm + head "
                         "(default: full)", choices=["full", "lora", "linear"])
    lora: bool = option(False, "short for --method lora", free=True)
    rank: int = option(None, "rank of LoRA", within="[1, inf)")
    alpha: float = option(None, "LoRA is scaled by alpha / rank (default: 32, or what an adapter "
                          "that trains further has)", within="(0, inf)")
    targets: str = option("qv", "what LoRA adapts: q and v, as the paper; q, k and v; or every "
                          "linear layer of the blocks", choices=TARGETS)
    rslora: bool = option(False, "LoRA is scaled by alpha / sqrt(rank)")
    dora: bool = option(False, "LoRA turns the rows of a weight, whose lengths are learned apart")
    dropout: float = option(0.1, "dropout on the input of LoRA's A", within="[0, 1)")
    optimizer: str = option(None, "sgd (momentum 0.9) or adamw", choices=["sgd", "adamw"])
    weight_decay: float = option(None, "weight decay of the optimiser", within="[0, inf)")
    layer_decay: float = option(None, "learning rate of a block / of the next", within="(0, 1]")
    warmup: float = option(None, "share of the steps in which the rate rises", within="[0, 1]")
    probe: float = option(None, "share of the steps, at the start, in which fc_norm and head alone "
                          "learn (Kumar et al., 2022); the papers' is 0", within="[0, 1)")
    probe_lr: float = option(1e-2, "peak learning rate of that share", within="(0, inf)")
    pool: int = option(1, "the head sees the mean of each of pool x pool regions, instead of one "
                       "mean of all patches, which knows no places (the papers' is 1)",
                       within="[1, inf)")
    drop_path: float = option(None, "chance to skip a branch of the last block (a ViT of one "
                              "block skips none)", within="[0, 1)")
    min_crop: float = option(None, "smallest share of an image in a crop", within="(0, 1]")
    accumulate: int = option(1, "forward and backward passes a step", within="[1, inf)")
    checkpoint_activations: bool = option(False, "blocks run again in the backward pass instead of "
                                          "keeping what they computed: less memory", free=True)
    flip: bool = option(None, "flip training images left-right at random (default: no, since "
                        "labels and reports may name sides)")
    drop_last: bool = option(None, "leave out the last, incomplete batch of an epoch (default: no, "
                             "the next epoch's first images fill it)")
    interpolation: str = option(None, "of crops and test images (default: bicubic)",
                                choices=["bicubic", "bilinear"])
    raw_dicom: bool = option(None, "read DICOM as stored numbers x 255 / their maximum, in 8 bits, "
                             "without LUT and window (default: no)")
    randaugment: bool = option(None, "RandAugment on training images (CXR-MAE's recipe)")
    erasing: float = option(None, "chance to fill a box of a training image with noise "
                            "(CXR-MAE's recipe)", within="[0, 1]")
    test_side: int = option(None, "pixels of the shorter side before the central crop of a test "
                            "image (default: img_size)", within="[1, inf)")
    base_lr: float = option(None, "peak learning rate at a batch of 256, where --lr is "
                            "not given", within="(0, inf)")
    clip: float = option(None, "largest norm of the gradients; 0: any (default: 1)",
                         within="[0, inf)")
    mean: float = option(None, "mean of the pixels in [0, 1] (default: the weights', else 0.4978)",
                         within="(-inf, inf)")
    std: float = option(None, "deviation of the pixels (default: the weights', else 0.2449; for "
                        "CXR-MAE type mean 0.4785 and std 0.2834)", within="(0, inf)")
    img_size: int = option(None, "pixels a side (default: the weights')", within="[1, inf)")
    num_heads: int = option(None, "attention heads, for weights that do not say (default: that of "
                            "a well-known width)", within="[1, inf)")
    evaluations: int = option(None, "times the validation list is evaluated; the best state is "
                              "kept (default: 10)", within="[1, inf)")
    uncertain: str = option("ones", "what a CheXpert label of -1 is; ignore: no part in loss and "
                            "AUROC", choices=["ones", "zeros", "ignore"])
    skip_bad_lines: bool = option(False, "leave out lines of a list that cannot be read, instead "
                                  "of stopping")
    cache: str = option("", "folder that keeps the decoded images (8 bits) for the next run",
                        free=True)
    skip_bad: bool = option(False, "leave out images that cannot be read, with a count")
    allow_outside: bool = option(False, "read images that a list names outside of --root")
    predict: str = option("", "folder of images, or one image: predict by --weights, and stop",
                          free=True)
    compare: bool = option(False, "run methods x inits x ratios x seeds, and stop", free=True)
    methods: str = option("full,lora,linear", "for --compare", free=True)
    ratios: str = option("1,10,100", "for --compare", free=True)
    inits: str = option("mrm", "for --compare: of mrm, image-only, report-only (the demo's), "
                        "scratch, checkpoints and run folders", free=True)
    sets: str = option("", "for --compare: NAME=DIR or NAME/SPLIT=DIR, ... in place of --data, "
                       "--root and --split", free=True)
    ranks: str = option("", "for --compare: ranks of LoRA, each a row (default: the recipe's)",
                        free=True)
    lrs: str = option("", "for --compare: learning rates; each row takes the one that is best on "
                      "the validation list with the first seed (default: the recipe's)", free=True)
    seeds: int = option(3, "for --compare: seeds, from --seed on, of fine-tuning and, on the demo, "
                        "of pretraining", within="[1, inf)", free=True)


# --------------------------------------------------------------------------------------------------
# Lists and images


@dataclasses.dataclass
class Part:
    """A training, validation or test list: image names, their paths, labels (n, k), images. Of
    segmentation the sources of the masks, and of val and test bool `truth` (n, H, W)."""

    names: list
    paths: list
    labels: torch.Tensor
    images: data.ImageSet = None
    masks: list = None
    truth: torch.Tensor = None


def masks_of(part, config, root):
    """The masks of a part as `data.find_masks` gives them. The demo has no file where its labels
    say that there is no pneumothorax."""
    free = set()
    if config.data == "demo":
        known = data.class_names("demo", root, "", part.labels.shape[1])
        for name, column in zip(known, part.labels.T):
            if name == "Pneumothorax":
                free = set((column == 0).nonzero().flatten().tolist())
    return data.find_masks(config.masks or Path(root, "masks"),
                           data.image_keys(root, part.names), part.paths, free)


def read_lists(config):
    """Returns ({"train", "val", "test": Part without images}, class names).

    Raises InputError for lists or image files that cannot be used, and for a part in which no class
    has both labels.
    """
    root = str(data.demo_root(config.root)) if config.data == "demo" else config.root
    parts, classes, table = {}, None, data.find_table(config.data, root)
    if table:
        classes = data.table_columns(config.data, table)[1]
        listed = {name: (table, *part) for name, part in data.read_table(
            config.data, root, config.ratio, config.uncertain).items()}
    else:
        files = data.split_files(config.data, root, config.split, config.ratio)
        listed = {name: (path, *data.read_list(path, skip_bad=config.skip_bad_lines))
                  for name, path in files.items()}
    for part_name, (path, names, labels) in listed.items():
        paths = data.find_images(config.data, root, names, path, config.allow_outside)
        if config.skip_bad:
            keep = data.readable(paths)
            names, paths = [names[i] for i in keep], [paths[i] for i in keep]
            labels = labels[keep]
        if config.task == "segment":
            part, classes = Part(names, paths, labels), ["mask"]
            parts[part_name] = dataclasses.replace(part, masks=masks_of(part, config, root))
            if part_name == "train":
                parts["train"] = leave_out_empty(parts["train"], config.empties)
            continue
        classes = classes or data.class_names(config.data, root, config.split, labels.shape[1])
        both = ((labels == 0).any(0) & (labels == 1).any(0)).tolist()
        undefined = [name for name, defined in zip(classes, both) if not defined]
        if len(undefined) == len(classes):
            raise InputError(path, "both labels of at least one class", "one label only in each")
        if undefined and part_name != "train":
            print(f"WARNING: {path}: one label only of {', '.join(undefined)}: AUROC undefined, "
                  "left out of the mean")
        parts[part_name] = Part(names, paths, labels)
    places = {name: set(map(os.path.normpath, part.paths)) for name, part in parts.items()}
    twice = len(places["train"] & (places["val"] | places["test"]) | places["val"] & places["test"])
    if twice:
        print(f"WARNING: {twice} image files stand in several parts, under other names perhaps; "
              "python data.py audit lists them")
    if len(parts["val"].names) < 20:
        print(f"WARNING: {len(parts['val'].names)} validation images choose the model, which is "
              "little more than chance")
    if config.data == "chexpert":
        print(f"the test part is {data.name_chexpert_test(len(parts['test'].names))}")
    return parts, classes


def leave_out_empty(part, share):
    """A training list with at most `share` images that are known to have no mask for each other
    one, taken evenly. Most films have no pneumothorax, and a net learns nothing new from them."""
    empty = [i for i, mask in enumerate(part.masks) if data.is_empty(mask)]
    if len(empty) == len(part.masks):
        raise InputError("the train list", "a mask that is not empty", "none")
    few = round(share * (len(part.masks) - len(empty)))
    if len(empty) <= few:
        return part
    left_out = set(empty) - {empty[k * len(empty) // few] for k in range(few)}
    print(f"{len(left_out)} of {len(empty)} training images without a mask are left out; "
          "--empties takes more")
    rows = [i for i in range(len(part.masks)) if i not in left_out]
    names, paths, masks = ([values[i] for i in rows]
                           for values in (part.names, part.paths, part.masks))
    return Part(names, paths, part.labels[rows], masks=masks)


def load_images(parts, config, kept):
    """Gives each part its images, decoded into memory where they fit. Returns the number that is
    white in the 16-bit images of all parts (see `data.common_scale`).

    `kept` holds the validation and test images of the last run, and then those of this one: the
    runs of a comparison share images that are the same.
    """
    side, segment = config.img_size, config.task == "segment"
    augment = functools.partial(mrm.augment, side=side, min_crop=config.min_crop, flip=config.flip,
                                pair=segment, mode=config.interpolation)
    if config.randaugment or config.erasing:
        augment = functools.partial(strong_augment, augment, config.randaugment, config.erasing,
                                    config.mean, config.std)
    reading = {"raw_dicom": config.raw_dicom, "mode": config.interpolation}  # of val and test
    white = data.common_scale(*(part.paths for part in parts.values()))
    parts["train"].images = data.ImageSet(parts["train"].paths, 2 * side, augment, config.seed,
                                          white, parts["train"].masks, folder=config.cache,
                                          raw_dicom=config.raw_dicom)
    cache = parts["train"].images.preload().cache
    if segment and torch.is_tensor(cache) and not cache[:, 1].any():
        raise InputError("the train list", "a mask that is not empty", "none")
    for name in ("val", "test"):
        part = parts[name]
        size = side if segment else config.test_side
        same = name in kept and (
            kept[name].paths, kept[name].size, kept[name].crop, kept[name].masks, kept[name].deep,
            kept[name].reading) == (part.paths, size, side, part.masks, white, reading)
        if not same:
            kept[name] = data.ImageSet(part.paths, size, deep=white, masks=part.masks, crop=side,
                                       folder=config.cache, **reading)
            kept[name].preload()
        part.images = kept[name]
        if segment:
            part.truth = torch.cat([pairs[:, 1] > 0.5
                                    for pairs, _ in data.eval_batches(part.images, 64)])
            if not part.truth.any():
                raise InputError(f"the {name} list", "a mask that is not empty", "none")
    return white


def rand_augment(image, rng, magnitude=9, deviation=0.5):
    """Two random operations on a PIL image in grey, each done with a chance of 1/2: RandAugment
    (Cubuk et al., 2020) as CXR-MAE's recipe names it, m9-mstd0.5-inc1, whose strengths all rise
    with the magnitude. The last of its fifteen operations, colour, does nothing to grey."""
    side, grey = image.width, 128
    for _ in range(2):
        operation, skip = rng.integers(15), rng.random() < 0.5
        strength = np.clip(rng.normal(magnitude, deviation), 0, 10) / 10
        signed = strength * rng.choice([-1, 1])
        if skip or operation == 14:
            continue
        if operation < 4:  # without a strength, or with a whole number of grey levels
            image = [ImageOps.autocontrast, ImageOps.equalize, ImageOps.invert,
                     functools.partial(ImageOps.posterize, bits=4 - int(strength * 4) or 1)][
                         operation](image)
        elif operation == 4:
            image = ImageOps.solarize(image, 256 - int(strength * 256))
        elif operation == 5:
            image = image.point([min(255, v + int(strength * 110)) if v < 128 else v
                                 for v in range(256)])
        elif operation < 9:
            enhance = (ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
            image = enhance[operation - 6](image).enhance(max(0.1, 1 + 0.9 * signed))
        elif operation == 9:
            image = image.rotate(30 * signed, Image.BICUBIC, fillcolor=grey)
        else:
            place = operation - 10  # shear along x or y, then shift along x or y
            matrix = [1, 0, 0, 0, 1, 0]
            matrix[(1, 3, 2, 5)[place]] = (0.3 if place < 2 else 0.45 * side) * signed
            image = image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=grey)
    return image


def strong_augment(augment, randaugment, erasing, mean, std, images, generator):
    """`augment`, then RandAugment and random erasing (Zhong et al., 2020) as CXR-MAE's recipe has
    them: with a chance of `erasing`, a box of 2 to 33 % of an image becomes noise of the pixels'
    mean and deviation. Returns (B, 1, side, side)."""
    images = augment(images, generator=generator)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    side = images.shape[-1]
    for i in range(len(images)):
        if randaugment:
            pixels = (images[i, 0] * 255).round().byte().numpy()
            changed = rand_augment(Image.fromarray(pixels), rng)
            images[i, 0] = torch.from_numpy(np.array(changed)).float() / 255
        if rng.random() < erasing:
            area, aspect = rng.uniform(0.02, 1 / 3) * side**2, np.exp(rng.uniform(-1, 1) * 1.2)
            h, w = (min(side - 1, round(math.sqrt(x))) for x in (area * aspect, area / aspect))
            top, left = rng.integers(side - h), rng.integers(side - w)
            noise = rng.normal(0.5 if mean is None else mean, std or 0.25, (h, w))
            images[i, 0, top:top + h, left:left + w] = torch.from_numpy(noise).float()
    return images


# --------------------------------------------------------------------------------------------------
# Weights, and the options that follow from them

DEMO_INITS = ("mrm", "image-only", "report-only")  # what `pretrain_demo` makes
SCRATCH = ("scratch", *(f"scratch-{preset}" for preset in mrm.MODELS))  # random starts


def demo_folder(init="mrm", seed=0):
    """The folder of the MRM that `pretrain_demo` makes with this seed."""
    return str(Path("runs") / (f"{init}-demo" + (f"-{seed}" if seed else "")))


def pretrain_demo(config, init="mrm", seed=0):
    """Pretrains the tiny MRM on the demo records, if `demo_folder` does not hold it yet.

    init: mrm, or image-only or report-only, which train with one of the two losses. Prints whether
    an earlier MRM is used, and warns where mrm.py or the options have changed since. Returns the
    folder.
    """
    folder = demo_folder(init, seed)
    settings = mrm.MRMConfig(
        out=folder, root=config.root if config.data == "demo" else "", seed=seed,
        image_only=init == "image-only", report_only=init == "report-only",
        mask_ratio=0.75 if init == "image-only" else None,  # the best of 0.25, 0.5 and 0.75
        device=config.device, dtype=config.dtype, workers=config.workers, cache=config.cache)
    if not (Path(folder) / "result.json").exists():
        print(f"no --weights given: pretraining the tiny {init} on the demo records, in {folder}")
        mrm.pretrain(settings)
        return folder
    result, ran = (common.read_json(Path(folder) / name) for name in ("result.json", "config.json"))
    print(f"no --weights given: {folder} is used again, the tiny {init} after "
          f"{result['steps']} steps on the records of {ran['root'] or 'demo'}")
    changed = ["mrm.py"] if result.get("mrm.py") != mrm.SOURCE else []
    changed += [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(settings)
                if not field.metadata.get("free") and field.name != "lr"  # follows from base_lr
                and ran.get(field.name) != getattr(mrm.fill_options(settings, 1), field.name)]
    if changed:
        print(f"WARNING: {', '.join(changed)} changed since {folder} was made; delete the folder "
              "to pretrain anew")
    return folder


def fill_cell(config):
    """`config` with the method, the percent of the labels and the folder of this run."""
    if config.lora and config.method not in (None, "lora"):
        raise InputError("--lora and --method", "one of them", f"--method {config.method}")
    ratio = 10 if config.data == "demo" and config.task == "classify" else 100
    method = "lora" if config.lora else "full"
    if config.task == "classify" and config.masks:
        raise InputError("--masks", "--task segment", "--task classify")
    out = "runs/finetune" if config.task == "classify" else "runs/segment"
    return common.fill(config, {"out": out, "method": method, "ratio": ratio})


def read_start(config, classes):
    """What `config.weights` holds: (config, tensors by name or None for a random start, all that
    the file says, options that follow from it). fc_norm and head are left out of the tensors where
    the file does not name `classes` in the same order."""
    if config.weights in SCRATCH:
        preset = config.weights.removeprefix("scratch").removeprefix("-") or "tiny"
        return config, None, mrm.PRESETS[preset] | {"sizes": mrm.MODELS[preset]}, {}
    path = common.checkpoint_file(config.weights, "adapter.pt", "best.pt", "last.pt")
    tensors, known = mrm.read_weights(path)
    if "adapter" not in known:
        if known.get("classes") != classes:
            tensors = {name: tensors[name] for name in tensors if lora.part_of(name) != "head"}
        return config, tensors, known, {}
    if config.method != "lora":
        raise InputError(path, "--lora, which trains this adapter further (python lora.py merge "
                         "makes a plain ViT of it)", f"--method {config.method}")
    known = lora.read_adapter_file(path) | {"path": path}
    known["base"], tensors = lora.read_base(path, known, config.base)
    if known.get("classes") != classes:
        raise InputError(path, f"the classes of the data, {classes}", known.get("classes"))
    config = adapters_options(config, known["lora"], path)
    return config, tensors, known, {"rank": known["lora"]["rank"]}  # another one does not load


def fill_recipe(config, classes=None, images=None):
    """Reads the weights that a run starts from, and fills `config` from them and from its recipe,
    for a training list of `images`.

    Returns (config, sizes of the ViT, tensors by name or None for a random start, all that the file
    holds). Raises InputError for weights that are no ViT's.
    """
    if config.weights is None:
        config = dataclasses.replace(config, weights=pretrain_demo(config))
    config, tensors, known, found = read_start(config, classes)
    sizes = mrm.encoder_sizes(tensors, known, config.weights, config.num_heads)
    family = config.recipe or family_of(tensors, known, config, sizes["embed_dim"])
    recipe, note = recipe_for(family, config.method, config.data, config.ratio, images)
    stated = {"mean": mrm.MEAN, "std": mrm.STD} | recipe  # what the weights' own record overrides
    stated = stated if config.weights in SCRATCH and "mean" in recipe else stated | known
    pixels = mrm.pixel_statistics(config, stated["mean"], stated["std"])
    named = {name: sizes[name] for name in ("img_size", "num_heads")}
    if config.task == "segment":
        recipe, note = PAPER_SEGMENT if sizes["embed_dim"] == 768 else SMALL_SEGMENT, "segmentation"
        if "segment" in known:  # these weights have a head, and the size that it needs, already
            found |= {name: known["segment"][name] for name in ("channels", "norm")}
            found["img_size"] = sizes["img_size"]
        named["img_size"] *= 2  # an outline needs more pixels than a finding
    departures = official_form(config, recipe) if config.official else OURS
    typed, preset = config, PLAIN | departures | named | recipe | pixels | found
    preset["test_side"] = recipe.get("test_side", config.img_size or preset["img_size"])
    world = int(os.environ.get("WORLD_SIZE", 1))
    config = scale_rate(common.fill(config, {"recipe": family} | preset))
    first = not int(os.environ.get("RANK", 0))  # of torchrun's processes one prints
    if first and (config.dry_run or family != "small"):
        print_recipe(typed, config, note, recipe, pixels | named | found)
    elif first:
        print(f"recipe: {note}; config.json has its values")
    share = common.share_of_batch(config, world)
    if config.task == "segment":
        config = common.fill(config, {"norm": "batch" if share >= 16 else "group"})
        if config.norm == "batch" and share < 2:
            raise InputError("--norm batch", "--batch-size 2 or more for each process and pass",
                             share)
    if config.num_heads != sizes["num_heads"]:
        raise InputError(f"--num-heads of {config.weights}", sizes["num_heads"], config.num_heads)
    return config, sizes | {"img_size": config.img_size}, tensors, known


def adapters_options(config, settings, path):
    """`config` with what the adapter `path` says of its LoRA, which trains further as it is.
    Raises InputError for layers or DoRA that are asked for and that it has not."""
    names = {name for name, parts in lora.TARGETS.items()
             if {last: tuple(on) for last, on in settings["targets"].items()} == parts}
    dora = bool(settings.get("dora"))
    if config.dora and not dora or config.targets != "qv" and config.targets not in names:
        raise InputError(path, f"an adapter for --targets {config.targets}"
                         f"{' --dora' if config.dora else ''}", f"one with {settings}")
    if config.rslora or config.alpha not in (None, settings["alpha"]):
        raise InputError(path, f"no --rslora and no --alpha but its own, {settings['alpha']:g}, "
                         "since an adapter that trains further keeps its scale", "one of them")
    return dataclasses.replace(config, alpha=settings["alpha"], rslora=False, dora=dora,
                               targets=next(iter(names), config.targets))


def family_of(tensors, known, config, width):
    """The family of recipes that weights belong to, by what the file holds and never by its name:
    "mrm" where it has a report decoder, "small" below a ViT-B's width and on data of one's own.
    Raises InputError for other weights of a ViT-B on a set of the papers."""
    if width != 768 or config.data not in PAPER_SETS or config.task == "segment":
        return "small"
    if "arguments" in known or re.search("bert|report_decoder", " ".join(tensors or {})):
        return "mrm"
    raise InputError(config.weights, f"--recipe {', '.join(FAMILIES)}: the file does not say which "
                     "weights it holds, and each has other values", "none")


def scale_rate(config):
    """`config` with the learning rate that follows from `base_lr`, by the linear scaling rule
    (Goyal et al., 2017), where --lr is not typed."""
    if config.lr is None:
        return dataclasses.replace(config, lr=config.base_lr * config.batch_size / 256)
    return dataclasses.replace(config, base_lr=None)


def print_recipe(typed, config, note, recipe, weights):
    """Prints what a run takes from where: each option of a recipe, its value and its source."""
    print(f"recipe: {note}{', in the official form' if config.official else ''}")
    for name in sorted({*recipe, *OURS, "img_size", "mean", "std", "lr"}):
        source = "the recipe" if name in recipe else "ours" if name in OURS else "the weights"
        if name == "lr" and config.base_lr is not None:
            source = "base_lr x batch_size / 256"
        if name in OURS and config.official:
            source = "the official form"
        if name in ("mean", "std") and weights[name] == recipe.get(name):
            source = "the recipe"
        if getattr(typed, name) is not None:
            source = "typed"
        value = getattr(config, name)
        print(f"  {name:14s} {'' if value is None else value!s:22s} {source}")


# --------------------------------------------------------------------------------------------------
# One run


def finetune(config, kept=None):
    """Trains, chooses on the validation list, tests once. Returns the content of result.json, or
    with `dry_run` the filled configuration.

    Leaves config.json, log.jsonl, last.pt, adapter.pt (LoRA) or best.pt, result.json,
    predictions.csv, roc.png (or overlays.png of a segmentation) and curves.png in `config.out`.
    `kept`: see `load_images`. Raises InputError for anything the user gave that cannot be used.
    """
    start = time.time()
    device, rank, world = common.join(config)
    config = fill_cell(config)
    if config.dry_run:
        return dry_run(config)
    parts, classes = read_lists(config)
    images = len(parts["train"].names)
    config, sizes, tensors, known = fill_recipe(config, classes, images)
    steps = common.number_of_steps(config, images_of_epoch(config, images), config.batch_size)
    common.seed(config.seed)  # here, because pretraining the demo MRM must not change this run
    model = build_model(config, sizes, len(classes), tensors, known).to(device)
    if config.checkpoint_activations:
        mrm.checkpoint_blocks(model)
    facts = {"lists_and_classes": hash_lists(parts, classes), "number_of_processes": world,
             "weights": lora.fingerprint(model.state_dict())}
    saved = common.last_state(config, steps, **facts)
    deep = load_images(parts, config, {} if kept is None else kept)
    log = common.RunLog(config.out, config, rank, saved and saved["history"], start)
    about = {"sizes": sizes, "classes": classes, "mean": config.mean, "std": config.std,
             "pool": config.pool, "test_side": config.test_side, "deep": deep or None,
             "reading": parts["test"].images.reading, "method": config.method}
    about["trained_on"], seen = known_films(config, parts, known)
    if config.method == "lora":
        about |= name_base(config, model, sizes, tensors, known, log)
    else:
        about["weights"] = config.weights
    if rank == 0 and data.find_table(config.data, config.root):
        common.write_csv(log.out / "split.csv", ["image", "split"], [
            [name, part] for part, listed in parts.items() for name in listed.names])
    if rank == 0:
        print_plan(config, model, images, steps, device)
    best = train(config, model, parts, steps, saved, facts, log, device, world)
    model.load_state_dict(best["trained"], strict=False)
    if config.task == "segment":
        about["segment"] = {"channels": config.channels, "norm": config.norm,
                            "threshold": best["threshold"], "smallest": best["smallest"]}
    if rank == 0 and config.method == "lora":
        lora.save_adapter(log.out / "adapter.pt", model, **about)
    elif rank == 0:
        common.save_checkpoint(log.out / "best.pt", {"model": model.state_dict(), **about})
    scores = predict(model, parts["test"].images, config, device, rank, world)
    outcome = run_facts(config, model, parts, best, log)
    outcome |= {} if seen is None else {"test_trained_on": seen}
    if config.task == "segment":
        return write_segmentation(config, parts["test"], scores, outcome, log)
    return write_results(parts["test"], classes, scores.numpy(), outcome, log)


def dry_run(config):
    """Prints the recipe of a run and returns the filled configuration. No file is needed."""
    if config.weights is None:
        paper = config.recipe not in (None, "small")
        config = dataclasses.replace(config, weights="scratch-base" if paper else "scratch")
    return fill_recipe(config)[0]


def known_films(config, parts, known):
    """(hashes of the films that a run's file has learned from, what `warn_of_trained` says of the
    test list). An adapter names its own films alone, since its base weights name theirs."""
    root = data.demo_root(config.root) if config.data == "demo" else config.root
    before = [known.get("trained_on")]
    if "adapter" in known:
        before.append(mrm.read_weights(known["base"])[1].get("trained_on"))
    seen = warn_of_trained(root, parts["test"], before, config.weights)
    if config.method == "lora":
        before = before[:1] if "adapter" in known else []
    return data.hash_films(root, parts["train"].names, *before), seen


def warn_of_trained(root, part, before, source):
    """How many test films the weights `source` were trained on before, as {"images", "patients"},
    with a warning where there are any. None where the weights do not say what they were trained on.
    before: tensors of `data.hash_films`, or None; patients: the other films of patients with such a
    film."""
    before = [hashes for hashes in before if torch.is_tensor(hashes)]
    if not before:
        return None
    try:
        films, patients = data.trained_on(root, part.names, torch.cat(before))
    except InputError as error:  # the table of patients, which a run does not need otherwise
        print(f"WARNING: test images are not compared with those of {source}: {error}")
        return None
    more = sum(patient and not film for film, patient in zip(films, patients))
    if sum(films) or more:
        print(f"WARNING: {source}: {sum(films)} of {len(films)} test images were trained on before,"
              f" and {more} more are of a patient who was; test scores of other films may be lower")
    return {"images": sum(films), "patients": more}


def name_base(config, model, sizes, tensors, known, log):
    """What an adapter file says of its base weights. Those of a random start are written beside
    it, because it is worth nothing without them."""
    base = known.get("base", config.weights)
    if tensors is None:
        base, state = log.out / "base.pt", model.state_dict()
        tensors = {name: state[name] for name in state if lora.part_of(name) == "backbone"}
        if log.rank == 0:
            common.save_checkpoint(base, {"model": tensors, "arguments": sizes})
    return {"weights": os.path.abspath(base), "base_fingerprint": lora.fingerprint(tensors),
            "weights_from_here": os.path.relpath(base, log.out)}


def hash_lists(parts, classes):
    """A hash of every list and of the classes in their order. A resumed run must have the same."""
    digest = hashlib.sha256(repr(classes).encode())
    for part in parts.values():
        digest.update(repr(part.names).encode() + part.labels.numpy().tobytes())
        if part.masks:
            digest.update(repr(part.masks).encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# What a run leaves


def print_plan(config, model, images, steps, device):
    """Prints in one line what is about to be trained, and how much of the model that is."""
    count = lora.count_parameters(model)
    share = 100 * count["lora"] / (count["total"] - count["head"])
    print(f"{config.method} on {images} images of {config.data} ({config.ratio} %): trainable "
          f"{count['trainable']:,} of {count['total']:,} (LoRA {count['lora']:,} = {share:.2f} % "
          f"of the backbone, fc_norm + head {count['head']:,}); {steps} steps of "
          f"{config.batch_size}, {device}")
    if config.task == "segment":
        print(f"UPerNet of {config.channels} channels with {config.norm} norm, {config.img_size} x "
              f"{config.img_size} pixels; masks: {config.masks or 'those below the root'}")


def run_facts(config, model, parts, best, log):
    """What result.json holds of a run of either task, beside its test scores."""
    last, count = log.history[-1], lora.count_parameters(model)
    chosen = {name: best[name] for name in ("val_auroc", "val_dice", "threshold", "smallest")
              if name in best}
    return chosen | {
        "best_step": best["step"], "task": config.task,
        "split": config.split or config.data, "ratio": config.ratio, "method": config.method,
        "weights": config.weights,
        "images": {name: len(listed.names) for name, listed in parts.items()},
        "trainable_parameters": count["trainable"], "lora_parameters": count["lora"],
        "head_parameters": count["head"], "total_parameters": count["total"],
        "steps": last["step"], "batch_size": config.batch_size, "lr": config.lr,
        "images_per_second": last["images_per_second"],
        "share_waiting_for_data": last["share_waiting_for_data"],
        "seconds": time.time() - log.start}


def write_results(part, classes, scores, facts, log):
    """Writes result.json, predictions.csv and roc.png, and prints the AUROCs, from the logits
    (n, k) of the test list. Returns the content of result.json."""
    labels = part.labels.numpy()
    mean, (low, high), per_class = auroc(scores, labels)
    result = {
        "auroc": mean, "auroc_ci": (low, high),
        "auroc_per_class": {name: value and value[0] for name, value in zip(classes, per_class)},
        "auroc_per_class_ci": {name: value and value[1:]
                               for name, value in zip(classes, per_class)}, **facts}
    if log.rank > 0:
        return result
    write_predictions(log.out, part.names, classes, 1 / (1 + np.exp(-scores)), labels)
    curves = {f"{name} {value[0]:.3f}": roc_curve(scores[:, c], labels[:, c])
              for c, (name, value) in enumerate(zip(classes, per_class)) if value}
    common.save_plot(log.out / "roc.png", curves, f"ROC on the test list, mean AUROC {mean:.3f}",
                     "false positive rate", "true positive rate", diagonal=True)
    for name, value in zip(classes, per_class):
        text = "%.3f  [%.3f, %.3f]" % value if value else "undefined: one label only"
        print(f"  {name:20s} {text}")
    print(f"test AUROC {mean:.3f} [{low:.3f}, {high:.3f}], {result['images_per_second']:.0f} "
          f"images/s, {result['seconds']:.0f} s in all; {log.out}")
    log.json("result.json", result)
    return result


def write_segmentation(config, part, logits, facts, log):
    """Writes result.json, predictions.csv (pixels of each image) and overlays.png, and prints the
    Dices, from the logits (n, H, W) of the test list, at `config.img_size` pixels a side. Returns
    the content of result.json, whose areas count pixels of all images."""
    found = find_pixels(logits, facts["threshold"], facts["smallest"])
    counts = both, predicted, true = count_pixels(found, part.truth)
    result, summary = {}, []
    for name, values in dice_scores(counts, config.img_size**2, 1000).items():
        interval = np.nanpercentile(values[1:], [2.5, 97.5]).tolist()
        result |= {name: float(values[0]), f"{name}_ci": interval}
        summary.append("%s %.3f [%.3f, %.3f]" % (name, values[0], *interval))
    varied = predicted.std() > 0 and true.std() > 0
    result |= {"area_error": float(np.abs(predicted - true).mean()),
               "area_correlation": float(np.corrcoef(predicted, true)[0, 1]) if varied else None,
               "images_with_mask": int((true > 0).sum()), "pixels": config.img_size**2, **facts}
    if log.rank > 0:
        return result
    common.write_csv(log.out / "predictions.csv", ["image", *COUNTS],
                     [[name, *row] for name, row in zip(part.names, counts.T.tolist())])
    dice, rows, captions = 2 * both / np.maximum(predicted + true, 1), [], []
    order = [i for i in dice.argsort() if true[i] > 0]
    for name, i in {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}.items():
        film = part.images[i][0][:1].expand(3, -1, -1)
        rows.append([film, overlay(film, part.truth[i]), overlay(film, found[i])])
        captions.append(f"{name}: Dice {dice[i]:.3f}")
    common.save_grid(log.out / "overlays.png", rows, ("film", "truth", "prediction"), captions,
                     max(1, 256 // config.img_size))
    print("test " + ", ".join(summary) + f"; threshold {facts['threshold']} and an area of at "
          f"least {facts['smallest']} pixels, chosen on val; {facts['seconds']:.0f} s; {log.out}")
    log.json("result.json", result)
    return result


COUNTS = ["both", "predicted", "true"]  # the columns of a segmentation's predictions.csv


def overlay(film, mask):
    """A film (3, H, W) in [0, 1] with the pixels of a bool mask (H, W) tinted red."""
    red = torch.tensor([1.0, 0.15, 0.1])[:, None, None]
    return torch.where(mask, 0.55 * film + 0.45 * red, film)


def write_predictions(out, names, classes, probabilities, labels=None):
    """Writes OUT/predictions.csv: on each line an image, the probability of each class, and the
    labels where they are known."""
    header = ["image", *classes]
    rows = [[name, *(f"{p:.9g}" for p in row)] for name, row in zip(names, probabilities)]
    if labels is not None:
        header += [f"label {name}" for name in classes]
        rows = [row + ["" if np.isnan(label) else int(label) for label in known]
                for row, known in zip(rows, labels)]
    common.write_csv(Path(out) / "predictions.csv", header, rows)


# --------------------------------------------------------------------------------------------------
# Prediction


def load_run(run, base=""):
    """The model of a finished run (its folder, adapter.pt or best.pt), merged.

    base: the base weights of an adapter, where they have moved. Returns (ViT in eval mode, all that
    the file holds). Raises InputError for any other file, and for base weights that have changed.
    """
    path = common.checkpoint_file(run, "adapter.pt", "best.pt")
    saved = common.load_checkpoint(path)
    needed = {"weights"} if "adapter" in saved else {"model"}
    if not needed | {"sizes", "classes", "mean", "std"} <= saved.keys():
        raise InputError(path, "the adapter.pt or best.pt of a fine-tuning run",
                         f"entries {sorted(saved)[:6]}")
    sizes = mrm.encoder_sizes({}, saved, path)
    if "segment" in saved:
        model = mrm.UPerNet(saved["segment"]["channels"], saved["segment"]["norm"], **sizes)
    else:
        model = mrm.ViT(**sizes, num_classes=len(saved["classes"]), pool=saved.get("pool", 1))
    if "adapter" in saved:
        base, tensors = lora.read_base(path, saved, base)
        mrm.load_encoder(model, tensors, base)
        # Adapters of older versions hold the fingerprint of the weights as the model has them
        lora.check_base(path, base, saved.get("fingerprint"), model.state_dict())
        lora.load_adapter(model, path)
        lora.merge_lora(model)
        return model.eval(), saved
    # `lora.py merge` keeps the base's tensors, which may have three channels and another grid
    mrm.load_encoder(model, saved["model"], path)
    for name, tensor in lora.lora_state_dict(model).items():  # fc_norm and head
        if name not in saved["model"] or saved["model"][name].shape != tensor.shape:
            raise InputError(path, f"{name} of shape {tuple(tensor.shape)} for "
                             f"{len(saved['classes'])} classes", "none that fits")
    return model.eval(), saved


def predict_folder(config):
    """Writes OUT/predictions.csv, or OUT/masks, for every image below the folder `config.predict`,
    or for that one image."""
    if config.weights is None:
        raise InputError("--predict needs --weights RUN, the folder of a fine-tuning run")
    for name in ("img_size", "test_side", "interpolation", "raw_dicom"):
        if getattr(config, name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--predict reads images as its run did, without --{flag}")
    model, saved = load_run(config.weights, config.base)
    pixels = mrm.pixel_statistics(config, saved["mean"], saved["std"])
    config = common.fill(config, {"out": "runs/predict"} | pixels)
    device, _, _ = common.join(config)
    folder = Path(config.predict)
    if folder.is_file():
        paths, folder = [str(folder)], folder.parent
    else:
        paths = data.list_images(folder)
    if config.skip_bad:
        paths = [paths[i] for i in data.readable(paths)]
    masks = [None] * len(paths) if "segment" in saved else None
    images = data.ImageSet(paths, saved.get("test_side", model.img_size), deep=saved.get("deep"),
                           masks=masks, crop=model.img_size, folder=config.cache,
                           **saved.get("reading", {}))
    scores = predict(model.to(device), images, config, device)
    names = [Path(path).relative_to(folder).as_posix() for path in paths]
    if masks:
        return write_masks(Path(config.out) / "masks", names, paths, scores, saved["segment"])
    write_predictions(config.out, names, saved["classes"], scores.sigmoid().tolist())
    print(f"{len(paths)} images: {Path(config.out) / 'predictions.csv'}")


def write_masks(out, names, paths, logits, settings):
    """Writes OUT/NAME.png, 0 or 255 in an image of the size of its film, from logits (n, H, W).
    settings: the run's threshold and smallest area. Raises InputError for names that differ in the
    ending alone."""
    files = [out / (data.split_ending(name)[0] + ".png") for name in names]
    if len(set(files)) < len(files):
        twice = Counter(files).most_common(1)[0][0]
        raise InputError(out, "names that differ without their endings", f"two {twice.stem}")
    for path, file, logit in zip(paths, files, logits):
        threshold, smallest = settings["threshold"], settings["smallest"]
        size = data.read_image(path).shape[1:]
        full = F.interpolate(logit[None, None], size, mode="bilinear")[0]
        kept = find_pixels(logit[None], threshold, smallest).any()  # `smallest` is of its size
        picture = Image.fromarray((find_pixels(full, threshold) & kept)[0].byte().numpy() * 255)
        common.atomic_write(file, lambda stream: picture.save(stream, "PNG"))
    print(f"{len(files)} masks: {out}")


# --------------------------------------------------------------------------------------------------
# Comparison


def parse_sets(config):
    """The data sets of --sets as {name in the table: options}: "nih=DIR,covid/covid1=DIR"."""
    if not config.sets:
        return {config.split or config.data: {}}
    if config.root or config.split:
        raise InputError("--sets", "no --root and no --split beside it", "one of them")
    sets = {}
    for text in config.sets.split(","):
        name, _, root = text.partition("=")
        layout, _, split = name.partition("/")
        if layout not in data.DATASETS or not root:
            raise InputError("--sets", "NAME=DIR or NAME/SPLIT=DIR, NAME of "
                             + ", ".join(data.DATASETS), repr(text))
        sets[split or layout] = {"data": layout, "root": root, "split": split}
    return sets


def list_rows(config):
    """The rows of a comparison: {(set, init, method, percent of labels): configuration}, the method
    with its rank where --ranks names some. Raises InputError for a name that is not known, and for
    an option that the table decides."""
    for name, values in {"methods": list(SMALL), "ratios": ["1", "10", "100"]}.items():
        for value in getattr(config, name).split(","):
            if value not in values:
                raise InputError(f"--{name}", f"some of {','.join(values)}", repr(value))
    for name, table in {"lora": "methods", "method": "methods", "ratio": "ratios",
                        "weights": "inits", "rank": "ranks", "lr": "lrs"}.items():
        if getattr(config, name) and getattr(config, table):
            raise InputError("--compare", f"--{table} instead of --{name}", f"--{name}")
    inits = config.inits.split(",")
    for init in inits:
        if init not in DEMO_INITS + SCRATCH and not Path(init).exists():
            known = ",".join(DEMO_INITS + SCRATCH)
            raise InputError("--inits", f"some of {known} or files that are there", repr(init))
    if len({Path(init).name for init in inits}) < len(inits):
        raise InputError("--inits", "names that differ, since they name the rows", config.inits)
    rows = {}
    tables = (getattr(config, name).split(",") for name in ("inits", "methods", "ratios"))
    for (name, options), init, method, ratio in itertools.product(
            parse_sets(config).items(), *tables):
        if int(ratio) not in data.DATASETS[options.get("data", config.data)]["train"]:
            continue  # such as COVID-19's splits, which are not divided by labels
        for rank in config.ranks.split(",") if method == "lora" else [""]:
            rows[name, Path(init).name, f"{method} {rank}".strip(), ratio] = dataclasses.replace(
                config, **options, weights=init, method=method, ratio=int(ratio), compare=False,
                rank=int(rank) if rank else config.rank)
    if not rows:
        raise InputError("--ratios", "a training list of the data set", config.ratios)
    return rows


def run_cell(kept, cell):
    """One run of a comparison. First comes the demo's pretraining that it starts from."""
    if cell.weights in DEMO_INITS:
        cell = dataclasses.replace(cell, weights=pretrain_demo(cell, cell.weights, cell.seed))
    finetune(cell, kept)


def run_row(config, name, row, kept):
    """Runs one row of a comparison over its seeds. Returns ([result of each seed], draws (R,)): the
    bootstrap of the mean over seeds and classes of the AUROC on the test list.

    With --lrs the first seed runs with each rate, and its best validation AUROC decides.
    """
    run, rates = functools.partial(run_cell, kept), config.lrs.split(",") if config.lrs else [None]

    def cells(seeds, rate):
        options = {"lr": float(rate)} if rate else {}
        return {"-".join([*name, *([rate] if rate else []), str(seed)]).replace(" ", ""):
                dataclasses.replace(row, seed=seed, **options) for seed in seeds}

    first = {rate: next(common.run_cells(config.out, cells([config.seed], rate), run))[1]
             for rate in rates}
    score = SCORES[config.task]
    best = max(rates, key=lambda rate: first[rate][f"val_{score}"])
    every = cells(range(config.seed, config.seed + config.seeds), best)
    results, draws = [], []
    for cell, result in common.run_cells(config.out, every, run):
        results.append(result)
        path = Path(config.out) / cell / "predictions.csv"
        if config.task == "segment":
            counts = np.array([row for _, *row in data.read_csv(path, COUNTS)], np.float64).T
            draws.append(dice_scores(counts, result["pixels"], 1000)["dice"][1:])
            continue
        scores, labels = read_predictions(path, list(result["auroc_per_class"]))
        draws.append(bootstrap_auroc(scores, labels)[2].mean(0))
    return results, np.mean(draws, axis=0)


def read_predictions(path, classes):
    """Scores and labels (n, k) of a run's predictions.csv. Raises InputError."""
    rows = data.read_csv(path, classes + [f"label {name}" for name in classes])
    values = np.array([[value or "nan" for value in values] for _, *values in rows], np.float64)
    return values[:, :len(classes)], values[:, len(classes):]


def compare_rows(rows):
    """Lines of a table of paired differences, from {row: (results, draws)} as `run_row` has them.

    Two rows are compared where they differ in the method alone or in the weights alone: the mean
    difference of their test AUROCs, its 95 % interval over the same draws of test images, and the
    number of seeds in which the first is ahead.
    """
    lines = []
    for (a, (first, draws)), (b, (second, others)) in itertools.combinations(rows.items(), 2):
        if (a[0], a[3]) != (b[0], b[3]) or sum(x != y for x, y in zip(a, b)) != 1:
            continue
        score = "auroc" if "auroc" in first[0] else "dice"
        gains = [x[score] - y[score] for x, y in zip(first, second)]
        low, high = np.nanpercentile(draws - others, [2.5, 97.5])
        same = a[1] if a[1] == b[1] else a[2]
        pair = (a[2], b[2]) if a[1] == b[1] else (a[1], b[1])
        lines.append([a[0], a[3], same, *pair, f"{np.mean(gains):+.3f}",
                      f"[{low:+.3f}, {high:+.3f}]", f"{sum(np.array(gains) > 0)} of {len(gains)}"])
    return lines


def compare(config):
    """Runs every set x weights x method x ratio over the seeds; writes OUT/compare.md and .csv.

    A finished run is kept in its folder and not repeated. The demo's weights are pretrained once
    for each seed, on first use. Test images shared by two rows pair their bootstrap draws.
    """
    config = common.fill(config, {"out": "runs/compare"})
    kept, rows, table = {}, {}, []
    for name, row in list_rows(config).items():
        results, draws = rows[name] = run_row(config, name, row, kept)
        scores = np.array([result[SCORES[config.task]] for result in results])
        deviation = scores.std(ddof=1) if len(scores) > 1 else 0
        trained = 100 * results[0]["trainable_parameters"] / results[0]["total_parameters"]
        seconds = np.mean([result["seconds"] for result in results])
        table.append([*name, f"{scores.mean():.3f}", f"{deviation:.3f}",
                      " ".join(f"{score:.3f}" for score in scores), f"{results[0]['lr']:g}",
                      f"{trained:.2f}", results[0]["images"]["train"], f"{seconds:.0f}"])
    score = "test AUROC" if config.task == "classify" else "test Dice"
    header = ["data", "pretraining", "method", "labels %", score, "sd over seeds", "each seed",
              "lr", "trained %", "training images", "seconds"]
    pairs = compare_rows(rows)
    paired = ["data", "labels %", "with", "a", "b", "a - b", "95 % interval", "a ahead, seeds"]
    wins = Counter((a, b) for _, _, _, a, b, gain, *_ in pairs if float(gain) > 0)
    of = Counter((a, b) for _, _, _, a, b, *_ in pairs)
    text = common.markdown_table(header, table) + "\n" + common.markdown_table(paired, pairs) + "\n"
    text += "".join(f"{a} is ahead of {b} in {wins[a, b]} of {of[a, b]} cells\n" for a, b in of)
    common.write_csv(Path(config.out) / "compare.csv", header, table)
    common.write_csv(Path(config.out) / "paired.csv", paired, pairs)
    common.atomic_write(Path(config.out) / "compare.md", lambda file: file.write(text.encode()))
    print(text)


def main():
    config = common.parse_config(FinetuneConfig, description=__doc__)
    if config.compare:
        compare(config)
    elif config.predict:
        predict_folder(config)
    else:
        finetune(config)


if __name__ == "__main__":
    common.run_script(main)
