"""The recipes of fine-tuning: the papers', by weights, method, data set and percent of labels, and
ours, by the number of training images. A recipe is a dict of options of finetune.py.

    python -m support.recipes mrm lora nih 1      # prints one

mrm: MRM's own full fine-tuning, and the LoRA paper's LoRA on MRM's weights. medpeft: the LoRA
paper's runs on MRM's weights. cxr-mae: its runs on CXR-MAE's. small: ours.
"""

import functools
import math
import sys

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from support.script import InputError

FAMILIES = ("mrm", "medpeft", "cxr-mae", "small")
PAPER_SETS = ("nih", "chexpert", "rsna", "covid")
# What a recipe leaves as it is unless it says otherwise
PLAIN = dict(alpha=32.0, probe=0.0, randaugment=False, erasing=0.0, clip=1.0, flip=True,
             evaluations=10, min_crop=0.08, drop_path=0.1)

# --------------------------------------------------------------------------------------------------
# The papers'

SGD = dict(optimizer="sgd", weight_decay=0.0, layer_decay=1.0)
MRM_FULL = SGD | dict(batch_size=96)  # MRM's appendix, in steps
# "Less Could Be Better": five epochs of warm-up, no clipping, validated after each epoch
MEDPEFT = SGD | dict(batch_size=64, clip=0.0)
CXR_MAE = dict(optimizer="adamw", weight_decay=0.05, layer_decay=0.65, batch_size=64, clip=0.0,
               mean=0.4785, std=0.2834, randaugment=True, erasing=0.25, test_side=256)
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


def of_epochs(epochs, lr, **options):
    return dict(epochs=epochs, warmup=5 / epochs, evaluations=epochs, lr=lr, **options)


RECIPES = {
    ("mrm", "full", "covid", 100): MRM_FULL | dict(steps=1000, warmup=50 / 1000, lr=3e-2),
    # Of the LoRA paper's full fine-tuning this cell alone is published
    ("medpeft", "full", "nih", 1): MEDPEFT | of_epochs(200, 1e-2),
    ("cxr-mae", "full", "nih", 1): CXR_MAE | of_epochs(400, 5e-4 * 64 / 256)}
for name in LORA_ON_MRM:
    for place, percent in enumerate((1, 10, 100)):
        lr, rank = LORA_ON_MRM[name][place]
        for family in ("mrm", "medpeft"):
            RECIPES[family, "lora", name, percent] = MEDPEFT | of_epochs(100, lr, rank=rank)
        epochs, lr, rank = LORA_ON_CXR_MAE[name][place]
        RECIPES["cxr-mae", "lora", name, percent] = CXR_MAE | of_epochs(
            epochs, lr * 64 / 256, rank=rank)
        steps, warmup, lr = FULL_ON_MRM[name][place]
        RECIPES["mrm", "full", name, percent] = MRM_FULL | dict(
            steps=steps, warmup=warmup / steps, lr=lr)

# --------------------------------------------------------------------------------------------------
# Ours

# Each rate, and whether the head learns alone first, is what was best on the demo's validation
# list, by one grid for all methods. Images are not flipped, since labels may know sides
ADAMW = dict(optimizer="adamw", weight_decay=0.05, layer_decay=1.0, min_crop=0.6, drop_path=0.0,
             batch_size=32, steps=800, warmup=0.1, flip=False)
SMALL = {
    "full": ADAMW | dict(lr=3e-3, layer_decay=0.75, probe=0.5),
    "lora": ADAMW | dict(lr=3e-3, rank=4, probe=0.5),
    "linear": ADAMW | dict(lr=3e-2)}
FEW = {"full": dict(steps=400, lr=1e-4), "lora": dict(steps=400, lr=3e-4),
       "linear": dict(steps=400, lr=1e-2)}  # below 100 training images
LONG = dict(steps=1600, batch_size=64, probe=0.0)  # from 1,000 on
MANY = {"full": LONG, "lora": LONG | dict(lr=1e-2), "linear": LONG}


def recipe_for(family, method, name, percent, images):
    """The options of one run: those of its published cell, or ours for `images` training images.
    The papers have no linear probe: it takes ours. Raises InputError for what is not published."""
    if family == "small" or method == "linear":
        changed = FEW[method] if images < 100 else MANY[method] if images >= 1000 else {}
        return PLAIN | SMALL[method] | changed
    cell = (family, method, name, percent)
    if cell not in RECIPES:
        there = "; ".join(" ".join(map(str, known[1:])) for known in RECIPES if known[0] == family)
        raise InputError(f"--recipe {family}", f"a published cell ({there}), or --recipe small",
                         " ".join(map(str, cell[1:])))
    return PLAIN | RECIPES[cell]


# --------------------------------------------------------------------------------------------------
# CXR-MAE's augmentation


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


if __name__ == "__main__":
    cell = sys.argv[1:]  # such as: mrm lora nih 1, or small lora csv 100 and the number of images
    recipe = recipe_for(*cell[:3], int(cell[3]), int(cell[4]) if cell[4:] else 500)
    print("\n".join(f"{option:14s} {value}" for option, value in recipe.items()))
