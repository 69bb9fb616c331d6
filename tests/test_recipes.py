"""support/recipes.py: the papers' cells as FACTS has them, and ours by the number of images."""

import re
import sys

import pytest

import finetune
from support import recipes
from support.recipes import RECIPES, recipe_for
from support.script import InputError

# FACTS of "Less Could Be Better": learning rate and rank with 1, 10 and 100 % of the labels
ON_MRM = {"nih": [(0.05, 4), (0.05, 8), (0.2, 32)],
          "chexpert": [(0.02, 4), (0.05, 16), (0.01, 32)],
          "rsna": [(0.01, 4), (0.01, 32), (0.01, 32)]}
# FACTS of MRM: steps, warm-up and rate
STEPS = {"nih": [(3000, 50, 3e-2), (30000, 500, 3e-3), (200000, 5000, 3e-3)],
         "rsna": [(2000, 50, 3e-3), (10000, 200, 5e-4), (50000, 2000, 5e-4)],
         "chexpert": [(2000, 150, 3e-3), (60000, 1500, 5e-4), (200000, 15000, 5e-4)]}


def has(recipe, **values):
    for name, value in values.items():
        assert recipe[name] == pytest.approx(value), name


@pytest.mark.parametrize("name", ON_MRM)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_papers_runs_on_mrms_weights(name, place):
    percent, sgd = (1, 10, 100)[place], dict(optimizer="sgd", weight_decay=0, layer_decay=1)
    shared = sgd | dict(flip=True, drop_path=0.1, min_crop=0.08, alpha=32, dropout=0.1, probe=0)
    lr, rank = ON_MRM[name][place]
    for family in ("mrm", "medpeft"):
        has(recipe_for(RECIPES, family, "lora", name, percent, 99), lr=lr, rank=rank, epochs=100,
            batch_size=64, clip=0, warmup=0.05, evaluations=100, **shared)
    steps, warmup, lr = STEPS[name][place]
    has(recipe_for(RECIPES, "mrm", "full", name, percent, 99), steps=steps, warmup=warmup / steps,
        lr=lr, batch_size=96, clip=1, evaluations=10, **shared)


def test_the_other_cells_and_what_is_not_published():
    has(recipe_for(RECIPES, "medpeft", "full", "nih", 1, 99), lr=1e-2, epochs=200, batch_size=64)
    has(recipe_for(RECIPES, "mrm", "full", "covid", 100, 99), lr=3e-2, steps=1000, batch_size=96)
    for cell in (("medpeft", "full", "rsna", 1), ("mrm", "linear", "nih", 1)):
        with pytest.raises(InputError, match=f"published cell .*found {cell[1]} {cell[2]} 1"):
            recipe_for(RECIPES, *cell, 99)


def test_ours_follow_the_number_of_images():
    def ours(method, images):
        return recipe_for(RECIPES, "small", method, "csv", 100, images)

    has(ours("lora", 500), lr=3e-3, steps=800, probe=0.5, flip=False, rank=4)
    has(ours("lora", 99), lr=1e-3, steps=400, probe=0.5)
    has(ours("lora", 1000), lr=3e-3, steps=1600, probe=0, batch_size=64)
    has(ours("lora-all", 500), rank=16)
    has(ours("linear", 500), lr=3e-2, optimizer="adamw", clip=1)
    assert ours("bitfit", 500) == ours("lora", 500)  # a method without a row


def test_the_command_prints_a_recipe(monkeypatch, capsys):
    def printed(*cell):
        monkeypatch.setattr(sys, "argv", ["recipes", *cell])
        recipes.main()
        return dict(line.split() for line in capsys.readouterr().out.splitlines())

    published = recipes.RECIPES["mrm", "lora", "nih", 1]
    assert printed("mrm", "lora", "nih", "1") == {key: str(x) for key, x in published.items()}
    assert printed("small", "lora", "424")["rank"] == "4"
    for cell in (("mrm", "lora", "nih"), ("small", "lora"), ("mrm", "lora", "nih", "ten"), ()):
        with pytest.raises(InputError, match="usage: python -m support.recipes"):
            printed(*cell)


def test_the_table_in_finetunes_head_is_ours():
    rates = re.findall(r"^    (linear|LoRA|lora-all|full),? .*?(\de-\d) +(\de-\d) +(\de-\d)",
                       finetune.__doc__, re.M)
    assert len(rates) == 4
    for method, *row in rates:
        for images, lr in zip((99, 999, 1000), row):
            found = recipe_for(RECIPES, "small", method.lower(), "csv", 100, images)
            assert found["lr"] == float(lr), (method, images)
            has(found, weight_decay=0.05, warmup=0.1, min_crop=0.6, flip=False, drop_path=0, clip=1)
