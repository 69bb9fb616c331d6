"""The LoRA paper's second model, CXR-MAE: its recipes and augmentation for finetune.py.

    python -m more.cxrmae --data nih --root DIR --ratio 1 --weights CXR-MAE.pth --lora
    python -m more.cxrmae --predict DIR --weights runs/cxrmae --out OUT

Papers: Xiao et al., "Delving into Masked Autoencoders for Multi-Label Thorax Disease
Classification", WACV 2023 (CXR-MAE's weights, medical_mae); "Less Could Be Better", 2024. Of the
22,433 NIH test images of the published split, CXR-MAE was pretrained on 14,936, without labels.

It has all options of finetune.py. What differs hangs on the configuration class: recipes, pixel
statistics, RandAugment and random erasing of the training crops, and a test image that is resized
to 256 pixels before its central 224 are cut out.

Shapes: B batch.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

import finetune
from support.recipes import PLAIN, of_epochs
from support.script import option, run_script

# --------------------------------------------------------------------------------------------------
# Recipes

ADAMW = PLAIN | dict(optimizer="adamw", weight_decay=0.05, layer_decay=0.65, batch_size=64,
                     clip=0.0, mean=0.4785, std=0.2834)
LORA = {  # data set: epochs, learning rate at a batch of 256, rank with 1, 10 and 100 % of labels
    "nih": [(400, 3e-3, 4), (200, 1e-3, 8), (100, 3e-3, 32)],
    "chexpert": [(400, 3e-3, 4), (100, 5e-3, 8), (100, 3e-3, 32)],
    "rsna": [(100, 3e-3, 4), (100, 5e-3, 8), (100, 5e-3, 32)]}
# Of full fine-tuning this cell alone is published
RECIPES = {("cxr-mae", "full", "nih", 1): ADAMW | of_epochs(400, 5e-4 * 64 / 256)}
for name, cells in LORA.items():
    for percent, (epochs, lr, rank) in zip((1, 10, 100), cells):
        RECIPES["cxr-mae", "lora", name, percent] = ADAMW | of_epochs(
            epochs, lr * 64 / 256, rank=rank)

# --------------------------------------------------------------------------------------------------
# Augmentation


def rand_augment(image, rng, magnitude=9, deviation=0.5):
    """Two random operations on a PIL image in grey, each done with a chance of 1/2: RandAugment
    (Cubuk et al., 2020) as the recipe names it, m9-mstd0.5-inc1, whose strengths all rise with the
    magnitude. The last of its fifteen operations, colour, does nothing to grey."""
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


def erase(image, rng, mean, std):
    """Random erasing (Zhong et al., 2020) of an image (side, side), in place: a box of 2 to 33 % of
    its area becomes noise of the pixels' mean and deviation."""
    side = len(image)
    area, aspect = rng.uniform(0.02, 1 / 3) * side**2, np.exp(rng.uniform(-1, 1) * 1.2)
    h, w = (min(side - 1, round(math.sqrt(x))) for x in (area * aspect, area / aspect))
    top, left = rng.integers(side - h), rng.integers(side - w)
    image[top : top + h, left : left + w] = torch.from_numpy(rng.normal(mean, std, (h, w)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(finetune.FinetuneConfig):
    script: ClassVar = "more.cxrmae"
    recipes: ClassVar = RECIPES
    paper: ClassVar = "cxr-mae"
    test_share: ClassVar = 224 / 256
    recipe: str = option(None, "whose values the options take (default: cxr-mae for a ViT-B on the "
                         "papers' data, else small)", choices=["cxr-mae", "small"])

    def augment(self, images, generator):
        """The crops (B, 1, side, side) of finetune.py, then RandAugment, and erasing in a quarter
        of them."""
        images = super().augment(images, generator)
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        for image in images[:, 0]:
            pixels = Image.fromarray((image * 255).round().byte().numpy())
            image.copy_(torch.from_numpy(np.array(rand_augment(pixels, rng))) / 255)
            if rng.random() < 0.25:
                erase(image, rng, 0.5 if self.mean is None else self.mean, self.std or 0.25)
        return images


if __name__ == "__main__":
    run_script(lambda: finetune.main(Config, __doc__))
