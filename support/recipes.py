"""The recipes of fine-tuning: the papers', by family, method, data set and percent of labels, and
ours, by the number of training images. A recipe is a dict of options of finetune.py.

    python -m support.recipes mrm lora nih 1         # prints a published one
    python -m support.recipes small lora 424         # and ours for 424 images

mrm: MRM's own full fine-tuning, and the LoRA paper's LoRA on MRM's weights. medpeft: the LoRA
paper's runs on MRM's weights, full fine-tuning too. small: ours.
"""

import sys

from support.script import InputError, run_script

PAPER_SETS = ("nih", "chexpert", "rsna", "covid")
# What a recipe leaves as it is unless it says otherwise
PLAIN = dict(alpha=32.0, dropout=0.1, probe=0.0, clip=1.0, flip=True, evaluations=10, min_crop=0.08,
             drop_path=0.1)

# --------------------------------------------------------------------------------------------------
# The papers'

SGD = dict(optimizer="sgd", weight_decay=0.0, layer_decay=1.0)
MRM_FULL = PLAIN | SGD | dict(batch_size=96)  # MRM's appendix, in steps
# "Less Could Be Better": five epochs of warm-up, no clipping, validated after each epoch
MEDPEFT = PLAIN | SGD | dict(batch_size=64, clip=0.0)
LORA_ON_MRM = {  # data set: learning rate and rank with 1, 10 and 100 % of the labels
    "nih": [(0.05, 4), (0.05, 8), (0.2, 32)],
    "chexpert": [(0.02, 4), (0.05, 16), (0.01, 32)],
    "rsna": [(0.01, 4), (0.01, 32), (0.01, 32)]}
FULL_ON_MRM = {  # steps, steps of warm-up, learning rate
    "nih": [(3000, 50, 3e-2), (30000, 500, 3e-3), (200000, 5000, 3e-3)],
    "chexpert": [(2000, 150, 3e-3), (60000, 1500, 5e-4), (200000, 15000, 5e-4)],
    "rsna": [(2000, 50, 3e-3), (10000, 200, 5e-4), (50000, 2000, 5e-4)]}


def of_epochs(epochs, lr, **options):
    return dict(epochs=epochs, warmup=5 / epochs, evaluations=epochs, lr=lr, **options)


RECIPES = {  # (family, method, data set, percent of labels): options
    ("mrm", "full", "covid", 100): MRM_FULL | dict(steps=1000, warmup=50 / 1000, lr=3e-2),
    # Of the LoRA paper's full fine-tuning this cell alone is published
    ("medpeft", "full", "nih", 1): MEDPEFT | of_epochs(200, 1e-2)}
for name in LORA_ON_MRM:
    for place, percent in enumerate((1, 10, 100)):
        lr, rank = LORA_ON_MRM[name][place]
        for family in ("mrm", "medpeft"):
            RECIPES[family, "lora", name, percent] = MEDPEFT | of_epochs(100, lr, rank=rank)
        steps, warmup, lr = FULL_ON_MRM[name][place]
        RECIPES["mrm", "full", name, percent] = MRM_FULL | dict(
            steps=steps, warmup=warmup / steps, lr=lr)

# --------------------------------------------------------------------------------------------------
# Ours

# Each rate, and whether the head learns alone first, is what was best on the demo's validation
# list, by one grid for all methods. Images are not flipped, since labels may know sides
ADAMW = PLAIN | dict(optimizer="adamw", weight_decay=0.05, layer_decay=1.0, min_crop=0.6,
                     drop_path=0.0, batch_size=32, steps=800, warmup=0.1, flip=False)
LORA = ADAMW | dict(lr=3e-3, rank=4, probe=0.5)
SMALL = {
    "full": ADAMW | dict(lr=3e-3, layer_decay=0.75, probe=0.5),
    "lora": LORA,
    "lora-all": LORA | dict(lr=2e-3, rank=16),
    "linear": ADAMW | dict(lr=3e-2)}
FEW = {"full": dict(steps=400, lr=3e-4), "lora": dict(steps=400, lr=1e-3),
       "lora-all": dict(steps=400, lr=3e-4), "linear": dict(steps=400)}  # below 100 images
LONG = dict(steps=1600, batch_size=64, probe=0.0)  # from 1,000 on
MANY = {"full": LONG, "lora": LONG, "lora-all": LONG | dict(lr=5e-3), "linear": LONG}


def recipe_for(recipes, family, method, name, percent, images):
    """The options of one run: those of its published cell in `recipes`, or ours for `images`
    training images, where a method without a row of its own takes LoRA's. Raises InputError for
    what is not published."""
    if family == "small":
        row = method if method in SMALL else "lora"
        return SMALL[row] | (FEW[row] if images < 100 else MANY[row] if images >= 1000 else {})
    cell = (family, method, name, percent)
    if cell not in recipes:
        there = "; ".join(" ".join(map(str, known[1:])) for known in recipes if known[0] == family)
        raise InputError(f"--recipe {family}", f"a published cell ({there}), or --recipe small",
                         " ".join(map(str, cell[1:])))
    return recipes[cell]


def main():
    cell = sys.argv[1:]
    if len(cell) != (3 if cell[:1] == ["small"] else 4) or not cell[-1].isdecimal():
        raise InputError("usage: python -m support.recipes mrm|medpeft METHOD DATA PERCENT, or "
                         "small METHOD IMAGES")
    family, method, name, number = cell[0], cell[1], cell[-2], int(cell[-1])
    for option, value in recipe_for(RECIPES, family, method, name, number, number).items():
        print(f"{option:14s} {value}")


if __name__ == "__main__":
    run_script(main)
