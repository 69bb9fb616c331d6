"""more/cxrmae.py: the LoRA paper's recipes for CXR-MAE as FACTS has them, its augmentation, and its
test images."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_interruption import write_records

import finetune
from more import cxrmae
from support.script import InputError, load_checkpoint
from support.recipes import RECIPES

# FACTS of "Less Could Be Better": epochs, base rate and rank with 1, 10 and 100 % of the labels
PUBLISHED = {
    "nih": [(400, 3e-3, 4), (200, 1e-3, 8), (100, 3e-3, 32)],
    "chexpert": [(400, 3e-3, 4), (100, 5e-3, 8), (100, 3e-3, 32)],
    "rsna": [(100, 3e-3, 4), (100, 5e-3, 8), (100, 5e-3, 32)],
}
BASE = dict(img_size=224, patch_size=16, embed_dim=768, depth=1, num_heads=12)


def filled(**options):
    config = cxrmae.Config(weights="", **options)
    return finetune.take_recipe(finetune.fill_cell(config), {}, {"sizes": BASE}, 99)[0]


def has(config, **values):
    for name, value in values.items():
        assert getattr(config, name) == pytest.approx(value), name


COMMON = dict(recipe="cxr-mae", optimizer="adamw", weight_decay=0.05, layer_decay=0.65, clip=0)
COMMON |= dict(mean=0.4785, std=0.2834, drop_path=0.1, min_crop=0.08, flip=True, batch_size=64)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_its_lora_runs(name, place):
    epochs, base, rank = PUBLISHED[name][place]
    config = filled(data=name, ratio=(1, 10, 100)[place], lora=True)
    has(config, epochs=epochs, lr=base * 64 / 256, rank=rank, alpha=32, dropout=0.1, **COMMON)
    has(config, warmup=5 / epochs, evaluations=epochs)


def test_its_full_fine_tuning_what_is_not_published_and_whom_it_leaves_alone():
    has(filled(data="nih", ratio=1), epochs=400, lr=5e-4 / 4, warmup=5 / 400, **COMMON)
    with pytest.raises(InputError, match="--recipe cxr-mae: expected a published cell .*nih 1"):
        filled(data="rsna", ratio=1)
    assert filled(data="nih", ratio=1, method="linear").recipe == "small"
    assert not [cell for cell in RECIPES if cell[0] == "cxr-mae"]
    assert finetune.FinetuneConfig.recipes is RECIPES


def test_a_run_resizes_test_images_to_256_of_224_and_is_predicted_by_its_command(tmp_path):
    write_records(tmp_path)
    run = dict(weights="scratch", root=str(tmp_path), data="csv", out=str(tmp_path / "run"))
    finetune.finetune(cxrmae.Config(steps=2, batch_size=8, evaluations=1, device="cpu", **run))
    saved = load_checkpoint(tmp_path / "run/best.pt")
    assert saved["test_side"] == round(saved["sizes"]["img_size"] * 256 / 224)
    options = dict(predict=str(tmp_path / "images"), weights=str(tmp_path / "run"), device="cpu")
    with pytest.raises(InputError, match="found one of python -m more.cxrmae"):
        finetune.predict_folder(finetune.FinetuneConfig(**options, out=str(tmp_path / "no")))
    finetune.predict_folder(cxrmae.Config(**options, out=str(tmp_path / "p")))
    scored, predicted = ((tmp_path / f"{place}/predictions.csv").read_text().splitlines()[1:]
                         for place in ("run", "p"))
    predicted = dict(line.split(",")[:2] for line in predicted)
    for line in scored:
        assert float(predicted[line.split(",")[0]]) == pytest.approx(float(line.split(",")[1]))


def test_augmentation_is_drawn_by_its_generator(monkeypatch):
    images = torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    config = cxrmae.Config(img_size=32, min_crop=1.0, flip=False, mean=0.5, std=0.25)

    def augment(seed):
        return config.augment(images, torch.Generator().manual_seed(seed))

    strong = augment(0)
    assert strong.shape == images.shape and torch.equal(strong, augment(0))
    assert not torch.equal(strong, augment(1))
    monkeypatch.setattr(cxrmae, "rand_augment", lambda image, rng: image)
    some = 0
    for seed in range(4):  # what is left is erasing, of a quarter
        plain = finetune.FinetuneConfig.augment(config, images, torch.Generator().manual_seed(seed))
        some += ((augment(seed) - plain).abs() > 1 / 255).flatten(1).any(1).sum().item()
    assert 4 < some < 32  # of 64; 16 are expected, with a deviation of 3.5


def test_erasing_makes_one_box_of_2_to_33_percent():
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        image = torch.full((32, 32), 9.0)
        cxrmae.erase(image, rng, 0.5, 0.25)
        erased = image != 9
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert erased.sum() == box
        shares.append(erased.float().mean().item())
    assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.36


@pytest.mark.parametrize("operation", range(15))
def test_each_operation_changes_a_gradient_and_keeps_its_size(operation):
    rng = mock.Mock(np.random.Generator)
    rng.integers.return_value, rng.random.return_value = operation, 0.9
    rng.normal.return_value, rng.choice.return_value = 9.0, 1
    film = Image.linear_gradient("L").resize((32, 32))
    film.putpixel((3, 5), 255)
    changed = cxrmae.rand_augment(film, rng)
    rng.integers.assert_called_with(15)
    assert changed.size == film.size and changed.mode == "L"
    # Inverting twice and colour leave it as it is, and autocontrast nearly
    same = changed.tobytes() == film.tobytes()
    assert operation == 0 or same == (operation in (2, 14))
