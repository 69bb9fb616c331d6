"""recipes.py: the papers' cells as FACTS has them, and ours by the number of images."""

import pytest

from support import script as common
from support.recipes import recipe_for

# FACTS of "Less Could Be Better": learning rate and rank; epochs, base rate and rank
ON_MRM = {
    "nih": [(0.05, 4), (0.05, 8), (0.2, 32)],
    "chexpert": [(0.02, 4), (0.05, 16), (0.01, 32)],
    "rsna": [(0.01, 4), (0.01, 32), (0.01, 32)],
}
ON_CXR_MAE = {
    "nih": [(400, 3e-3, 4), (200, 1e-3, 8), (100, 3e-3, 32)],
    "chexpert": [(400, 3e-3, 4), (100, 5e-3, 8), (100, 3e-3, 32)],
    "rsna": [(100, 3e-3, 4), (100, 5e-3, 8), (100, 5e-3, 32)],
}


def has(recipe, **values):
    for name, value in values.items():
        assert recipe[name] == pytest.approx(value), name


@pytest.mark.parametrize("name", ON_MRM)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_lora_runs_of_the_lora_paper(name, place):
    percent = (1, 10, 100)[place]
    lr, rank = ON_MRM[name][place]
    common_ = dict(batch_size=64, clip=0, flip=True, drop_path=0.1, min_crop=0.08, alpha=32)
    for family in ("mrm", "medpeft"):
        has(recipe_for(family, "lora", name, percent, 99), lr=lr, rank=rank, epochs=100,
            warmup=0.05, evaluations=100, optimizer="sgd", weight_decay=0, layer_decay=1, **common_)
    epochs, base, rank = ON_CXR_MAE[name][place]
    has(recipe_for("cxr-mae", "lora", name, percent, 99), lr=base * 64 / 256, rank=rank,
        epochs=epochs, warmup=5 / epochs, evaluations=epochs, optimizer="adamw", layer_decay=0.65,
        randaugment=True, erasing=0.25, mean=0.4785, std=0.2834, test_side=256, **common_)


def test_full_fine_tuning_of_both_papers_and_what_is_not_published():
    has(recipe_for("medpeft", "full", "nih", 1, 99), lr=1e-2, epochs=200, batch_size=64)
    has(recipe_for("cxr-mae", "full", "nih", 1, 99), lr=5e-4 / 4, epochs=400)
    has(recipe_for("mrm", "full", "nih", 100, 99), lr=3e-3, steps=200000, warmup=0.025, clip=1)
    has(recipe_for("mrm", "full", "covid", 100, 99), lr=3e-2, steps=1000, batch_size=96)
    with pytest.raises(common.InputError, match="published cell .*full nih 1.*found full rsna 1"):
        recipe_for("medpeft", "full", "rsna", 1, 99)


def test_ours_follow_the_number_of_images():
    has(recipe_for("small", "lora", "csv", 100, 500), lr=3e-3, steps=800, probe=0.5, flip=False)
    has(recipe_for("small", "lora", "csv", 100, 99), lr=3e-4, steps=400, probe=0.5)
    has(recipe_for("small", "lora", "csv", 100, 1000), lr=1e-2, steps=1600, probe=0, batch_size=64)
    has(recipe_for("mrm", "linear", "nih", 1, 500), lr=3e-2, optimizer="adamw", clip=1)
