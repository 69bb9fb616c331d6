"""Segmentation of radiographs: UPerNet on a pretrained ViT, as MRM's paper has it for SIIM.

    python -m more.segment --lora          # the demo's pneumothorax, from nothing
    python -m more.segment --data csv --root DIR --weights MRM.pth --lora     # masks in DIR/masks
    python -m more.segment --predict DIR --weights runs/segment

Papers: Xiao et al., "Unified Perceptual Parsing", ECCV 2018 (UPerNet); Zhou et al., "Masked Record
Modeling", ICLR 2023. A mask is a PNG of the X-ray's name and size, 0 and one other value.

One batch of the demo: whole X-rays with their masks, squeezed to (16, 2, 96, 96), of which random
crops are taken; the ViT makes tokens after a third, a half, two thirds and all of its blocks, each
a map (16, 128, 12, 12), and UPerNet a logit of each pixel (16, 1, 96, 96). The loop and what
`--method` trains are finetune.py's: this file brings it the targets, the loss and the score.
tests/departures.md lists where it differs from the official code.

Shapes: B batch, n samples, D width, H and W pixels.
"""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import finetune
import mrm
from finetune import TuneConfig
from support.recipes import PLAIN
from support.script import (
    InputError, atomic_write, fill, join, option, over_images, parse_config, run_script, save_grid)
from support.weights import encoder_sizes
from vit import ViT

# --------------------------------------------------------------------------------------------------
# UPerNet

POOLS = (1, 2, 3, 6)  # cells a side of the pyramid pooling


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size of the map, then batch norm and ReLU."""

    def __init__(self, inputs, outputs, kernel):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def resize_to(x, like):
    """A map x (B, C, h, w) at the size of the map `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear")


class UPerHead(nn.Module):
    """The decoder of UPerNet (Xiao et al., 2018), on four maps of one resolution.
    The maps are rescaled x4, x2, x1 and x0.5. The coarsest one is pooled to 1, 2, 3 and 6 cells a
    side, and from there the pyramid is added up to the finest map. All four are fused at last."""

    def __init__(self, dim, channels):
        super().__init__()
        twice = [nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(2)]
        self.up4 = nn.Sequential(twice[0], nn.BatchNorm2d(dim), nn.GELU(), twice[1])
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.pooled = nn.ModuleList(ConvNorm(dim, channels, 1) for _ in POOLS)
        self.top = ConvNorm(dim + len(POOLS) * channels, channels, 3)
        self.lateral = nn.ModuleList(ConvNorm(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(3))
        self.fuse = ConvNorm(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, 1, 1))
        few = math.ceil(channels / 3)  # 256 of 768, as published
        # A second head, on the third map, which acts in training alone
        conv = ConvNorm(dim, few, 3)
        self.auxiliary = nn.Sequential(conv, nn.Dropout2d(0.1), nn.Conv2d(few, 1, 1))

    def forward(self, maps):
        """Four maps (B, D, n, n), shallow to deep -> [logits (B, 1, 4n, 4n)] and, in training, the
        auxiliary ones (B, 1, n, n)."""
        one, two, three, four = maps
        one, two, four = self.up4(one), self.up2(two), F.max_pool2d(four, 2, ceil_mode=True)
        pools = [resize_to(conv(F.adaptive_avg_pool2d(four, cells)), four)
                 for conv, cells in zip(self.pooled, POOLS)]
        x = self.top(torch.cat([four, *pools], dim=1))
        levels = [x]
        for lateral, smooth, fine in zip(self.lateral, self.smooth, (three, two, one)):
            fine = lateral(fine)
            x = fine + resize_to(x, fine)  # what is known of the coarser map comes down to this one
            levels.append(smooth(x))
        x = self.fuse(torch.cat([resize_to(level, levels[-1]) for level in levels], dim=1))
        return [self.classify(x)] + ([self.auxiliary(three)] if self.training else [])


class UPerNet(ViT):
    """ViT with UPerNet on the tokens after a third, a half, two thirds and all of its blocks.
    `channels` is the width of the head (the paper: 768)."""

    def __init__(self, channels=768, **sizes):
        super().__init__(**sizes)
        del self.norm  # UPerNet takes the tokens as they leave the blocks
        depth = len(self.blocks)
        self.chosen = [math.ceil(depth * share) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.head = UPerHead(self.cls_token.shape[2], channels)

    def forward(self, images):
        """(B, C, H, W) -> logits (B, 1, H, W) of each pixel. In training a second channel holds
        those of the auxiliary head."""
        side = self.img_size // self.patch_size
        x, after = self.add_class_token(self.embed(images)), []
        for block in self.blocks:
            x = block(x)  # (B, 1 + N, D)
            after.append(x)
        chosen = [after[number - 1][:, 1:] for number in self.chosen]  # each (B, N, D)
        logits = self.head([x.transpose(1, 2).unflatten(2, (side, side)) for x in chosen])
        return torch.cat([resize_to(each, images) for each in logits], dim=1)


# --------------------------------------------------------------------------------------------------
# Loss and metrics


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


# --------------------------------------------------------------------------------------------------
# Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig(TuneConfig):
    script: ClassVar = "more.segment"
    masks: str = option("", "folder of masks NAME.png (default: ROOT/masks)")
    channels: int = option(None, "width of the head", within="[4, inf)")


# Options that the weights do not decide: ours for small ViTs, MRM's for SIIM (the batch and the
# steps, which it does not say, are ours)
SMALL = PLAIN | dict(optimizer="adamw", weight_decay=0.05, layer_decay=0.65, min_crop=0.5, rank=4,
                     drop_path=0.0, batch_size=16, steps=600, lr=5e-3, channels=32, warmup=0.1,
                     flip=False)
FULL = SMALL | dict(lr=1.5e-3)  # all of the ViT: better on val for both starts of the demo
PAPER = SMALL | dict(steps=20000, lr=2e-5, channels=768, img_size=512, drop_path=0.1, warmup=0.05,
                     rank=16)

# --------------------------------------------------------------------------------------------------
# One run


def read_lists(config):
    """`finetune.read_lists` with the files of the masks, the one class. The demo has no file where
    its labels say that there is no pneumothorax."""
    parts, classes = finetune.read_lists(config)
    root = data.demo_root(config.root) if config.data == "demo" else config.root
    for part in parts.values():
        empty = ()
        if config.data == "demo":
            [empty] = np.nonzero(part.labels[:, classes.index("Pneumothorax")].numpy() == 0)
        part.masks = data.find_masks(config.masks or Path(root, "masks"),
                                     data.image_keys(root, part.names), set(empty))
    train = parts["train"]  # most X-rays have no mask, and a net learns nothing new from them
    drawn = over_images(has_object, train.masks, "reading masks")
    shown, empty = ([i for i, one in enumerate(drawn) if one == want] for want in (True, False))
    few = empty[:: max(1, len(empty) // max(1, len(shown)))]  # about as many as there are masks
    train.keep(sorted(shown + few))
    return parts, ["mask"]


def has_object(mask):
    return mask is not None and bool(data.read_pixels(mask, mask=True)[0].any())


def image_alone(pairs, generator=None):
    """The images (B, 1, H, W) of pairs (B, 2, H, W) of an image and its mask."""
    return torch.stack(list(pairs))[:, :1]


def load_images(parts, config):
    """Gives each part its images, decoded into memory where they fit, and val and test their masks
    as the images have them, `truth`: bool (n, H, W)."""
    side = config.img_size
    for name, part in parts.items():
        how = (2 * side, config.augment, config.seed) if name == "train" else (side,)
        part.images = data.ImageSet(part.paths, *how, masks=part.masks, white=config.white)
        part.images.preload()
        if name == "train":
            continue
        batches = data.eval_batches(part.images, 64)
        part.truth = torch.cat([pairs[:, 1] > 0.5 for pairs, _ in batches])
        if not part.truth.any():
            raise InputError(f"the {name} list", "a mask that is not empty", "none")
        part.images.augment = image_alone  # a model that is tested sees no mask


def score_masks(logits, part):
    """What the validation list says of a model: first the best `dice_all`, which chooses, with the
    threshold and the smallest area that give it."""
    chosen = choose_threshold(logits[:, 0], part.truth)
    loss = segmentation_loss(logits, part.truth[:, None].float()).item()
    return {"val_dice": chosen.pop("dice"), "val_loss": loss, **chosen}


def take_preset(config, tensors, held, count):
    """`finetune.take_recipe` of a segmentation."""
    sizes = encoder_sizes(tensors, held, config.weights, config.num_heads)
    preset = {"img_size": 2 * sizes["img_size"],  # an outline needs more pixels than a finding
              "num_heads": sizes["num_heads"], "mean": held.get("mean", mrm.MEAN),
              "std": held.get("std", mrm.STD)}
    ours = FULL if config.method == "full" else SMALL
    config = fill(config, preset | (PAPER if sizes["embed_dim"] == 768 else ours))
    _, _, world = join(config)
    if config.batch_size < 2 * world:  # batch norm needs images that differ
        raise InputError("--batch-size", "two images or more a process", config.batch_size)
    return config, sizes | {"img_size": config.img_size}


def build_model(config, sizes, classes=None, tensors=None):
    """`finetune.build_model` of a segmentation."""
    model = UPerNet(config.channels, **sizes, drop_path=config.drop_path)
    return finetune.adapt(model, config, tensors)


def segment(config):
    """Trains, chooses on the validation list, tests once. Returns the content of result.json.
    Leaves in `config.out` what `finetune.finetune` does, and overlays.png."""
    run = finetune.prepare(fill(config, {"ratio": 100}), read_lists, take_preset, build_model,
                           load_images)
    best = finetune.train(run, lambda pairs, rows: (pairs[:, :1], pairs[:, 1:]), segmentation_loss,
                          score_masks)
    chosen = {name: best[name] for name in ("threshold", "smallest")}
    logits = finetune.test_best(run, best, segment=chosen | {"channels": run.config.channels})
    return write_dice(run, best, logits[:, 0])


def write_dice(run, best, logits):
    """Writes predictions.csv (pixels of each image), overlays.png and result.json, and prints the
    Dices, from the logits (n, H, W) of the test list, at --img-size pixels a side. Returns the
    content of result.json, whose areas count pixels of all images."""
    part, out, side = run.parts["test"], run.log.out, run.config.img_size
    found = find_pixels(logits, best["threshold"], best["smallest"])
    counts = both, predicted, true = count_pixels(found, part.truth)
    result, summary = {}, []
    for name, values in dice_scores(counts, side**2, 1000).items():
        interval = np.nanpercentile(values[1:], [2.5, 97.5]).tolist()
        result |= {name: float(values[0]), f"{name}_ci": interval}
        summary.append("%s %.3f [%.3f, %.3f]" % (name, values[0], *interval))
    result |= {"area_error": float(np.abs(predicted - true).mean()),
               "images_with_mask": int((true > 0).sum()), "pixels": side**2}
    if run.log.rank == 0:
        finetune.write_predictions(out, part.names, ["both", "predicted", "true"], counts.T)
        dice, rows, captions = 2 * both / np.maximum(predicted + true, 1), [], []
        order = [i for i in dice.argsort() if true[i] > 0]
        red, middle = torch.tensor([1.0, 0.15, 0.1])[:, None, None], order[len(order) // 2]
        for name, i in {"best": order[-1], "median": middle, "worst": order[0]}.items():
            image = part.images[[i], 0][0][0].expand(3, -1, -1)
            rows.append([image] + [torch.where(mask[i], 0.55 * image + 0.45 * red, image)
                                   for mask in (part.truth, found)])
            captions.append(f"{name}: Dice {dice[i]:.3f}")
        save_grid(out / "overlays.png", rows, ("X-ray", "truth", "prediction"), captions,
                  max(1, 256 // side))
    summary.append(f"threshold {best['threshold']}, smallest area {best['smallest']} (by val)")
    return finetune.write_result(run, best, ", ".join(summary), result)


# --------------------------------------------------------------------------------------------------
# Prediction


def make_network(held, sizes):
    """The untrained network of a finished run, of what its file holds."""
    return UPerNet(held["segment"]["channels"], **sizes)


def predict_folder(config):
    """Writes OUT/NAME.png for every image below the folder `config.predict`: 0 or 255 in an image
    of the size of its X-ray."""
    config, device, model, held, paths, names = finetune.open_run(config, make_network)
    threshold, smallest = (held["segment"][name] for name in ("threshold", "smallest"))
    if len({data.split_ending(name)[0] for name in names}) < len(names):
        raise InputError(config.predict, "names that differ before their endings", "two alike")
    images = data.ImageSet(paths, model.img_size, image_alone, masks=[None] * len(paths),
                           white=config.white)
    logits = finetune.predict(model, images, config, device)
    for path, name, logit in zip(paths, names, logits):
        full = F.interpolate(logit[None], data.read_image(path).shape[1:], mode="bilinear")[0]
        kept = find_pixels(logit, threshold, smallest).any()  # `smallest` is of its size
        picture = Image.fromarray((find_pixels(full, threshold) & kept)[0].byte().numpy() * 255)
        atomic_write(Path(config.out, data.split_ending(name)[0] + ".png"),
                     lambda file: picture.save(file, "PNG"))
    print(f"{len(paths)} masks: {config.out}")


def main():
    config = parse_config(SegmentConfig, description=__doc__)
    if config.predict:
        predict_folder(config)
    else:
        segment(config)


if __name__ == "__main__":
    run_script(main)
