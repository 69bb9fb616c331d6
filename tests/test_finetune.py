"""finetune.py: AUROC against scikit-learn, runs of every method, resuming, prediction, and one line
for each bad input."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

import common
import data
import finetune
import lora
import mrm
import vit
from finetune import FinetuneConfig

REPOSITORY = Path(__file__).parents[1]


def scored(n=200, k=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < 0.3).astype(np.float32)
    return np.round(rng.normal(size=(n, k)) + labels, 1), labels  # rounded: many ties


def test_auroc_against_scikit_learn():
    scores, labels = scored()
    labels[:, 1] = 0  # undefined
    mean, (low, high), per_class = finetune.auroc(scores, labels)
    expected = [roc_auc_score(labels[:, c], scores[:, c]) for c in (0, 2)]
    assert per_class[1] is None
    assert [per_class[0][0], per_class[2][0]] == pytest.approx(expected, abs=1e-12)
    assert mean == pytest.approx(np.mean(expected)) == finetune.mean_auroc(scores, labels)
    assert low < mean < high and per_class[0][1] < per_class[0][0] < per_class[0][2]
    assert np.isnan(finetune.auroc(scores, 0 * labels)[0]) and np.isnan(
        finetune.mean_auroc(scores, 0 * labels)
    )


def test_auroc_worked_on_paper():
    """Positives 3 and 1, negatives 2 and 1: of four pairs two are won, one lost and one
    tied: 2.5 / 4."""
    scores, labels = np.array([[3.0], [1.0], [2.0], [1.0]]), np.array([[1.0], [1.0], [0.0], [0.0]])
    assert finetune.auroc(scores, labels)[0] == finetune.mean_auroc(scores, labels) == 0.625
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        mean, interval, _ = finetune.auroc(sign * labels, labels)
        assert mean == expected and interval == (expected, expected)


def test_weights_count_as_repetitions():
    scores, labels = scored(n=40, k=1)
    counts = np.random.default_rng(2).integers(0, 4, (5, 40))
    ours = finetune.weighted_auroc(scores[:, 0], labels[:, 0], counts.astype(np.float64))
    theirs = [roc_auc_score(labels[:, 0].repeat(c), scores[:, 0].repeat(c)) for c in counts]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_bootstrap_interval_against_resampling_by_hand():
    scores, labels = scored(k=1)
    _, (low, high), _ = finetune.auroc(scores, labels, resamples=4000)
    rng, draws = np.random.default_rng(1), []
    for _ in range(1000):
        rows = rng.integers(len(scores), size=len(scores))
        draws.append(roc_auc_score(labels[rows, 0], scores[rows, 0]))
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)


def test_roc_curve_against_scikit_learn():
    scores, labels = scored(k=1)
    ours = finetune.roc_curve(scores[:, 0], labels[:, 0])
    theirs = sklearn_roc_curve(labels[:, 0], scores[:, 0], drop_intermediate=False)
    np.testing.assert_allclose(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1])


PERCENTS = (1, 10, 100)
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
CELLS = [(name, percent) for name in ON_MRM for percent in PERCENTS]


def dry_run(family, name, percent, method, **options):
    return finetune.finetune(
        FinetuneConfig(
            data=name, ratio=percent, method=method, recipe=family, dry_run=True, **options
        )
    )


def has(config, **values):
    for name, value in values.items():
        assert getattr(config, name) == pytest.approx(value), name


SGD = dict(optimizer="sgd", weight_decay=0, layer_decay=1, mean=0.4978, std=0.2449, test_side=224)
ADAMW = dict(optimizer="adamw", weight_decay=0.05, layer_decay=0.65, mean=0.4785, std=0.2834)
COMMON = dict(drop_path=0.1, min_crop=0.08, img_size=224, probe=0, pool=1)
# FACTS of the departures: ours, those of the LoRA paper's common settings, and of MRM's own recipe
OURS = dict(
    flip=False, clip=1, evaluations=10, drop_last=False, interpolation="bicubic", raw_dicom=False
)
PAPERS = dict(flip=True, clip=0, drop_last=True, interpolation="bicubic")
MRMS = dict(flip=True, clip=1, drop_last=False, interpolation="bilinear")


@pytest.mark.parametrize("name, percent", CELLS)
def test_the_36_runs_of_the_lora_paper(name, percent, capsys):
    place = PERCENTS.index(percent)
    rate, rank = ON_MRM[name][place]
    lora_on_mrm = (
        SGD
        | COMMON
        | dict(lr=rate, rank=rank, alpha=32, dropout=0.1, epochs=100, warmup=5 / 100, batch_size=64)
    )
    for family in ("mrm", "medpeft"):
        extra = dict(randaugment=False, erasing=0)
        has(dry_run(family, name, percent, "lora"), **lora_on_mrm | extra | OURS)
        found = dry_run(family, name, percent, "lora", official=True)
        has(found, **lora_on_mrm | extra | PAPERS, evaluations=100, raw_dicom=name == "rsna")
    epochs, rate, rank = ON_CXR_MAE[name][place]
    extra = dict(randaugment=True, erasing=0.25, test_side=256, batch_size=64)
    on_cxr_mae = dict(lr=rate * 64 / 256, rank=rank, epochs=epochs, warmup=5 / epochs)
    on_cxr_mae |= ADAMW | COMMON | extra
    has(dry_run("cxr-mae", name, percent, "lora"), **on_cxr_mae | OURS)
    found = dry_run("cxr-mae", name, percent, "lora", official=True)
    has(found, **on_cxr_mae | PAPERS, evaluations=epochs, raw_dicom=name == "rsna")
    capsys.readouterr()
    # Of full fine-tuning NIH 1 % is published alone, and stands for the other cells
    full = dict(lr=1e-2, epochs=200, warmup=5 / 200, batch_size=64)
    has(dry_run("medpeft", name, percent, "full"), **SGD | COMMON | full | OURS)
    printed = capsys.readouterr().out
    assert ("is not published" in printed) == ((name, percent) != ("nih", 1))
    assert "recipe: medpeft full nih 1 %" in printed
    full = dict(lr=5e-4 * 64 / 256, epochs=400, warmup=5 / 400)
    has(dry_run("cxr-mae", name, percent, "full"), **ADAMW | COMMON | extra | full | OURS)
    for family, evaluations in (("medpeft", 200), ("cxr-mae", 400)):
        found = dry_run(family, name, percent, "full", official=True)
        has(found, **PAPERS, evaluations=evaluations, raw_dicom=name == "rsna")


MRM_STEPS = {
    "nih": [(3000, 50, 3e-2), (30000, 500, 3e-3), (200000, 5000, 3e-3)],
    "rsna": [(2000, 50, 3e-3), (10000, 200, 5e-4), (50000, 2000, 5e-4)],
    "chexpert": [(2000, 150, 3e-3), (60000, 1500, 5e-4), (200000, 15000, 5e-4)],
}


@pytest.mark.parametrize("name, percent", [*CELLS, ("covid", 100)])
def test_mrms_own_cells(name, percent):
    steps, warmup, lr = (
        (1000, 50, 3e-2) if name == "covid" else MRM_STEPS[name][PERCENTS.index(percent)]
    )
    found = dry_run("mrm", name, percent, "full")
    has(found, **SGD | COMMON | OURS, lr=lr, batch_size=96)
    official = dry_run("mrm", name, percent, "full", official=True)
    has(official, **SGD | COMMON | MRMS, lr=lr, evaluations=10, raw_dicom=name == "rsna")
    assert official.steps == steps
    assert found.epochs is None
    assert (found.steps, round(found.warmup * found.steps)) == (steps, warmup)


def test_the_official_form_and_what_each_value_comes_from(capsys):
    found = dry_run("cxr-mae", "nih", 1, "lora", official=True, rank=6)
    has(found, flip=True, clip=0, evaluations=400, rank=6)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "recipe: cxr-mae lora nih 1 %, in the official form" in lines
    for line in (
        "rank 6 typed",
        "flip True the official form",
        "drop_last True the official form",
        "interpolation bicubic the official form",
        "raw_dicom False the official form",
        "mean 0.4785 the recipe",
        "epochs 400 the recipe",
        "img_size 224 the weights",
    ):
        assert line in lines, line
    few = dry_run("medpeft", "nih", 1, "lora", official=True, epochs=20)
    has(few, epochs=20, evaluations=20)  # still after each epoch
    typed = dict(drop_last=False, interpolation="bilinear", raw_dicom=False)
    has(dry_run("medpeft", "rsna", 1, "lora", official=True, **typed), **typed, flip=True)
    small = dry_run("small", "rsna", 1, "lora", official=True)  # no paper says how
    has(small, drop_last=False, interpolation="bicubic", raw_dicom=True)


def test_which_weights_they_are_is_read_from_the_file_or_asked_for(tmp_path):
    encoder = vit.ViT(img_size=32, patch_size=16, depth=1).state_dict()
    mrms = encoder | {"bert_encoder.embeddings.weight": torch.zeros(2, 2)}
    for name, tensors in (("MRM", encoder), ("CXR-MAE", mrms)):  # names that mislead
        common.save_checkpoint(tmp_path / f"{name}.pth", {"model": tensors})
    options = dict(data="nih", ratio=1, method="lora", dry_run=True)
    found = finetune.finetune(FinetuneConfig(weights=str(tmp_path / "CXR-MAE.pth"), **options))
    has(found, optimizer="sgd", lr=0.05)
    assert found.recipe == "mrm"
    asked = FinetuneConfig(weights=str(tmp_path / "MRM.pth"), **options)
    with pytest.raises(common.InputError, match="MRM.pth: expected --recipe mrm, medpeft, cxr-mae"):
        finetune.finetune(asked)
    found = finetune.finetune(dataclasses.replace(asked, recipe="cxr-mae"))
    has(found, optimizer="adamw", mean=0.4785)
    with pytest.raises(common.InputError, match="--recipe mrm: expected --data nih or chexpert or"):
        finetune.finetune(dataclasses.replace(asked, recipe="mrm", data="csv"))


def test_randaugment_and_erasing(monkeypatch):
    images = torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def same(images, generator):
        return images.clone()

    def run(randaugment, erasing, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return finetune.strong_augment(
            same, randaugment, erasing, 0.5, 0.25, images, generator=generator
        )

    assert torch.equal(run(False, 0.0), images)
    erased = run(False, 1.0) != images
    share = erased.float().mean((1, 2, 3))
    assert (share > 0.01).all() and (share < 0.5).all()
    for mask in erased[:, 0]:  # what changed is a box
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert mask.sum() == box
    some = (run(False, 0.25, seed=3) != images).flatten(1).any(1).sum()
    assert 0 < some < 12
    strong = run(True, 0.0)
    assert strong.shape == images.shape and strong.min() >= 0 and strong.max() <= 1
    assert torch.equal(strong, run(True, 0.0)) and not torch.equal(strong, run(True, 0.0, seed=1))
    # Each operation by itself changes a gradient, and gives an image of its size
    film = Image.linear_gradient("L").resize((32, 32))
    film.putpixel((3, 5), 255)
    for operation in range(14):

        class Chosen:
            def integers(self, n):
                assert n == 15
                return operation

            def random(self):
                return 0.9

            def normal(self, mean, deviation):
                return 9.0

            def choice(self, signs):
                return 1

        changed = finetune.rand_augment(film, Chosen())
        assert changed.size == film.size and changed.mode == "L"
        assert operation in (0, 2, 14) or list(changed.getdata()) != list(film.getdata()), operation


def test_the_test_images_of_cxr_mae_are_resized_to_256_and_cropped(tmp_path):
    Image.linear_gradient("L").resize((512, 512)).save(tmp_path / "a.png")
    [(image, _)] = list(data.ImageSet([tmp_path / "a.png"], 256, crop=224))
    whole = data.read_image(tmp_path / "a.png", 256)
    torch.testing.assert_close(image, whole[:, 16:240, 16:240], atol=1 / 255, rtol=0)


def filled(**options):
    """The configuration that a run of a random start with these options works by."""
    return finetune.fill_recipe(finetune.fill_cell(FinetuneConfig(weights="scratch", **options)))[0]


def test_typed_options_win_over_the_recipe_and_small_models_have_their_own():
    typed = dict(
        lr=0.7,
        rank=6,
        batch_size=3,
        optimizer="sgd",
        layer_decay=0.3,
        weight_decay=0.0,
        warmup=0.0,
        min_crop=0.9,
        drop_path=0.5,
        epochs=2.5,
    )
    config = filled(data="nih", method="lora", ratio=10, **typed)
    assert {name: getattr(config, name) for name in typed} == typed and config.steps is None
    recipe, _ = finetune.recipe_for("mrm", "lora", "nih", 10)
    config = common.fill(FinetuneConfig(data="nih", **typed), recipe)
    assert {name: getattr(config, name) for name in typed} == typed and config.steps is None
    config = common.fill(FinetuneConfig(data="nih", steps=7), recipe)
    assert (config.steps, config.epochs, config.rank, config.lr) == (7, None, 8, 0.05)
    assert filled(data="nih", method="lora").recipe == "small"
    config = filled(lora=True)
    assert (config.method, config.ratio, config.img_size, config.num_heads) == ("lora", 10, 48, 4)
    assert {name: getattr(config, name) for name in finetune.SMALL["lora"]} == finetune.SMALL[
        "lora"
    ]
    assert filled(data="nih").ratio == 100 and filled(data="nih").method == "full"
    with pytest.raises(
        common.InputError, match="--lora and --method: expected one of them, found --method full"
    ):
        filled(lora=True, method="full")


@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_our_recipe_follows_the_number_of_training_images(method):
    cell = finetune.fill_cell(FinetuneConfig(weights="scratch", method=method))
    few, some, many, unknown = (
        finetune.fill_recipe(cell, images=images)[0] for images in (99, 100, 1000, None)
    )
    assert some == unknown and (some.steps, some.lr) == (800, finetune.SMALL[method]["lr"])
    assert (few.steps, few.lr) == (400, finetune.FEW[method]["lr"]) and few.lr < some.lr
    assert (many.steps, many.batch_size, many.probe) == (1600, 64, 0.0) and many.lr >= some.lr
    assert (few.probe, some.probe) == ((0.0, 0.0) if method == "linear" else (0.5, 0.5))
    typed = finetune.fill_recipe(dataclasses.replace(cell, lr=0.7), images=99)[0]
    assert (typed.lr, typed.steps) == (0.7, 400)
    assert finetune.recipe_for("mrm", "lora", "nih", 1, 99) == finetune.recipe_for(
        "mrm", "lora", "nih", 1
    )


def test_mean_and_std_zero_included():
    assert filled().mean is filled().std is None  # of the tiny preset: each image's own
    assert (filled(mean=0.0).mean, filled(mean=0.0).std) == (0.0, mrm.STD)
    assert (filled(std=0.5).mean, filled(std=0.5).std) == (mrm.MEAN, 0.5)
    with pytest.raises(common.InputError, match=r"--std: expected a number in \(0, inf\), found 0"):
        filled(std=0.0)


def optimizer_of(model, **options):
    return finetune.make_optimizer(
        model,
        FinetuneConfig(
            **dict(optimizer="adamw", weight_decay=0.1, layer_decay=0.5, lr=1.0) | options
        ),
    )


def test_layer_decay_and_no_decay_on_biases():
    model = vit.ViT(16, 4, 1, 24, 2, 3, num_classes=2)
    optimizer = optimizer_of(model)
    scale = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert scale[id(model.head.weight)] == (1, 0.1) and scale[id(model.head.bias)] == (1, 0)
    assert scale[id(model.blocks[1].mlp.fc1.weight)] == (0.5, 0.1) and scale[
        id(model.blocks[0].norm1.bias)
    ] == (0.25, 0)
    assert scale[id(model.patch_embed.proj.bias)] == (0.125, 0) and scale[
        id(model.fc_norm.weight)
    ] == (1, 0)
    assert scale[id(model.cls_token)] == scale[id(model.pos_embed)] == (0.125, 0)
    assert set(scale) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if scale[id(p)][1]} == {
        name for name, p in model.named_parameters() if mrm.decays(name, p)
    }  # pretraining's rule
    for p in model.blocks.parameters():
        p.requires_grad_(False)
    optimizer = optimizer_of(model, optimizer="sgd", weight_decay=0.0, layer_decay=1.0)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert all(g["momentum"] == 0.9 and g["lr_scale"] == 1 for g in optimizer.param_groups)


def square(rng, positive):
    image = rng.integers(60, 120, (32, 32)).astype(np.uint8)
    if positive:
        y, x = rng.integers(2, 18, 2)
        image[y : y + 12, x : x + 12] += 100
    return image


@pytest.fixture(scope="session")
def easy(tmp_path_factory):
    """Records in the demo's layout: is there a bright square? The second class is never there in
    test_list."""
    root = tmp_path_factory.mktemp("easy")
    (root / "images").mkdir()
    rng, count = np.random.default_rng(0), 0
    for part, n in (("train_list", 64), ("val_list", 24), ("test_list", 24)):
        lines = []
        for i in range(n):
            name, count = f"{count:04d}.png", count + 1
            Image.fromarray(square(rng, i % 2)).save(root / "images" / name)
            lines.append(f"{name} {i % 2} {int(part != 'test_list' and i % 3 == 0)}")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    for part in ("train_1", "train_10"):
        shutil.copy(root / "train_list.txt", root / f"{part}.txt")
    (root / "classes.txt").write_text("Square\nThird\n")
    (root / "demo.json").write_text("{}")
    rows = "".join(f"{i:04d}.png,no square\n" for i in range(64))
    (root / "training.csv").write_text("image_path,report_content\n" + rows)
    (root / "patients.csv").write_text(
        "image,patient\n" + "".join(f"{i:04d}.png,{i}\n" for i in range(count))
    )
    return root


def config(root, out, **kwargs):
    return FinetuneConfig(
        **dict(
            root=str(root),
            out=str(out),
            weights="scratch",
            steps=4,
            evaluations=2,
            device="cpu",
            batch_size=16,
            probe=0.0,
        )
        | kwargs
    )


def test_few_validation_images_are_warned_of(easy, tmp_path, capsys):
    shutil.copytree(easy, tmp_path / "few")
    path = tmp_path / "few" / "val_list.txt"
    finetune.read_lists(FinetuneConfig(root=str(tmp_path / "few"), ratio=100))
    assert "validation images" not in capsys.readouterr().out
    path.write_text("".join(path.read_text().splitlines(True)[:19]))
    finetune.read_lists(FinetuneConfig(root=str(tmp_path / "few"), ratio=100))
    assert "WARNING: 19 validation images choose the model" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_a_run_leaves_what_the_design_promises(easy, tmp_path, method, capsys):
    result = finetune.finetune(config(easy, tmp_path, method=method))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["auroc"] == result["auroc"]
    assert {
        "auroc",
        "auroc_ci",
        "auroc_per_class",
        "split",
        "method",
        "trainable_parameters",
        "total_parameters",
        "seconds",
        "images_per_second",
        "share_waiting_for_data",
        "peak_memory_mib",
    } <= saved.keys()
    assert saved["auroc_per_class"]["Third"] is None
    output = capsys.readouterr().out
    assert "WARNING" in output and "Third" in output and "undefined" in output
    model = "adapter.pt" if method == "lora" else "best.pt"
    for name in (
        "config.json",
        "log.jsonl",
        "last.pt",
        model,
        "predictions.csv",
        "roc.png",
        "curves.png",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    labels, scores = [int(r["label Square"]) for r in rows], [float(r["Square"]) for r in rows]
    assert len(rows) == 24 and saved["auroc"] == pytest.approx(
        roc_auc_score(labels, scores), abs=0.02
    )

    finetune.predict_folder(
        FinetuneConfig(
            predict=str(easy / "images"),
            weights=str(tmp_path),
            out=str(tmp_path / "p"),
            device="cpu",
        )
    )
    again = {
        r["image"]: float(r["Square"])
        for r in csv.DictReader((tmp_path / "p" / "predictions.csv").open())
    }
    assert len(again) == 112
    assert [again[r["image"]] for r in rows] == pytest.approx(scores, abs=2e-5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and max(
        line["val_auroc"] for line in lines
    ) == saved["val_auroc"]
    assert saved["images"] == {"train": 64, "val": 24, "test": 24} and saved["method"] == method
    ran = json.loads((tmp_path / "config.json").read_text())
    recipe = finetune.SMALL[method] | finetune.FEW[method] | dict(steps=4, batch_size=16, probe=0.0)
    assert (
        {name: ran[name] for name in recipe} == recipe
        and ran["method"] == method
        and ran["ratio"] == 10
    )
    assert ran == common.load_checkpoint(tmp_path / "last.pt")["config"]
    assert (saved["steps"], saved["batch_size"], saved["lr"]) == (4, 16, recipe["lr"])
    lora, head = saved["lora_parameters"], saved["head_parameters"]
    assert head == 2 * 128 + 2 * 128 + 2 and lora == (
        2 * (128 * 4 + 4 * 128) if method == "lora" else 0
    )
    trainable = {"full": saved["total_parameters"], "lora": lora + head, "linear": head}
    assert saved["trainable_parameters"] == trainable[method]
    assert not list(tmp_path.rglob("*.tmp"))


def test_overfits_one_batch():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = (
        torch.from_numpy(np.stack([square(rng, i % 2) for i in range(16)])).float()[:, None] / 128
        - 1
    )
    labels = torch.stack(
        [torch.arange(16) % 2, torch.randint(2, (16,))], 1
    ).float()  # the second: to be learned by heart
    sizes = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=4)
    for method, lr in (("full", 3e-3), ("lora", 3e-2)):
        options = FinetuneConfig(method=method, dropout=0.0, lr=lr, layer_decay=1.0, rank=4)
        options = common.fill(options, finetune.PLAIN | finetune.SMALL[method])
        model = finetune.build_model(options, sizes, 2)
        optimizer = finetune.make_optimizer(model, options)
        for _ in range(150):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.05, (method, loss)  # chance is 0.69


def test_full_fine_tuning_learns(easy, tmp_path):
    result = finetune.finetune(config(easy, tmp_path, steps=None, epochs=15.0, lr=2e-3, ratio=100))
    assert result["steps"] == 60
    assert result["auroc_per_class"]["Square"] > 0.9


def interrupted(monkeypatch, run):
    """A run that ends right after its first evaluation has been saved."""
    save = common.save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        if Path(path).name == "last.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_checkpoint", save_and_stop)
        finetune.finetune(run)


@pytest.mark.parametrize(
    "options",
    [
        dict(method="lora"),
        dict(method="full", optimizer="sgd", lr=0.01),
        dict(method="linear"),
        dict(method="lora", drop_last=True, batch_size=24, accumulate=2),
    ],
    ids=["lora", "full", "linear", "drop_last"],
)
def test_resume_is_bit_identical(easy, tmp_path, monkeypatch, options):
    whole = finetune.finetune(config(easy, tmp_path / "whole", **options))
    interrupted(monkeypatch, config(easy, tmp_path / "part", **options))
    assert (
        common.load_checkpoint(tmp_path / "part/last.pt")["step"] == 2
        and not (tmp_path / "part/result.json").exists()
    )
    part = finetune.finetune(config(easy, tmp_path / "part", resume=True, **options))
    timed = {"images_per_second", "share_waiting_for_data", "peak_memory_mib", "seconds", "weights"}
    assert {n: v for n, v in part.items() if n not in timed} == {
        n: v for n, v in whole.items() if n not in timed
    }
    a, b = (common.load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "part"))
    assert a["step"] == b["step"] == 4 and all(
        torch.equal(a["model"][name], b["model"][name]) for name in a["model"]
    )
    assert (tmp_path / "whole/predictions.csv").read_bytes() == (
        tmp_path / "part/predictions.csv"
    ).read_bytes()
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "part/log.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 4]
    again = finetune.finetune(
        config(easy, tmp_path / "part", resume=True, **options)
    )  # of a finished run: tests again
    assert again["auroc"] == whole["auroc"]


@pytest.mark.parametrize(
    "device, changes, there",
    [("cuda", {}, True), ("cpu", {}, False), ("cuda", {"randaugment": True}, False)],
)
def test_a_gpu_makes_the_crops_but_for_pils_operations(monkeypatch, device, changes, there):
    options = config("", "", randaugment=False, erasing=0.0, drop_last=False)
    options, seen = dataclasses.replace(options, **changes), []
    device = SimpleNamespace(type=device)
    monkeypatch.setattr(data, "train_batches", lambda *arguments: seen.extend(arguments))
    monkeypatch.setattr(common, "Timed", lambda *arguments: None)
    finetune.timed_batches([0] * 64, options, 0, 3, device, 0, 1)
    assert seen[-1] is (device if there else None)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_incomplete_batch_is_dropped(easy, tmp_path, monkeypatch, accumulate):
    """Of 64 images and batches of 24 an epoch has two, of 48 different images."""
    rows, batches = [], data.train_batches

    def spy(*arguments):
        for images, index in batches(*arguments):
            rows.append(index.tolist())
            yield images, index

    monkeypatch.setattr(data, "train_batches", spy)
    options = dict(method="linear", steps=None, epochs=3, batch_size=24, accumulate=accumulate)
    result = finetune.finetune(config(easy, tmp_path / "o", drop_last=True, **options))
    assert result["steps"] == 6 and len(rows) == 6 * accumulate
    epochs = np.array(rows).reshape(3, 48)
    assert [len(set(epoch)) for epoch in epochs.tolist()] == [48] * 3
    orders = [torch.randperm(64, generator=common.seeded(0, epoch)) for epoch in range(3)]
    assert epochs.tolist() == [order[:48].tolist() for order in orders]
    if accumulate == 1:
        rows.clear()
        assert finetune.finetune(config(easy, tmp_path / "o", **options))["steps"] == 8
        orders = torch.cat(orders).tolist()
        assert sum(rows, []) == orders[: 8 * 24]  # without it the next epoch fills the batch


def test_fewer_images_than_a_batch_are_one_line(easy, tmp_path):
    few = config(easy, tmp_path / "o", method="linear", batch_size=65)
    assert finetune.finetune(few)["steps"] == 4
    with pytest.raises(common.InputError) as error:
        finetune.finetune(dataclasses.replace(few, drop_last=True))
    assert str(error.value) == (
        "--drop-last: expected at least 65 training images, one batch, found 64; type a smaller "
        "--batch-size, or --no-drop-last"
    )


def test_rsna_in_the_official_form(tmp_path, monkeypatch):
    """Trained, tested and predicted on the stored numbers / their maximum, by whole batches."""
    pytest.importorskip("pydicom")
    from test_data import write_dicom

    rng, root, films = np.random.default_rng(0), tmp_path / "rsna", {}
    root.mkdir()
    for part, n in (("train_1", 70), ("val_list", 24), ("test_list", 24)):
        lines = []
        for i in range(n):
            name = f"{part}{i}.dcm"
            films[name] = square(rng, i % 2).astype(np.uint16) * 7 + 50
            kind = "MONOCHROME1" if i % 3 else "MONOCHROME2"
            tags = dict(WindowCenter=900, WindowWidth=200, PhotometricInterpretation=kind)
            write_dicom(root / name, films[name], **tags)
            films[name] = np.rint(films[name] * (255 / films[name].max())).astype(np.uint8)
            films[name] = 255 - films[name] if i % 3 else films[name]
            lines.append(f"{name} {i % 2}")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    options = dict(data="rsna", ratio=1, recipe="medpeft", rank=2, lr=0.01, official=True)
    options |= dict(steps=None, evaluations=None, probe=None, batch_size=None, epochs=2)
    run, sets = config(root, tmp_path / "run", method="lora", **options), []
    load = finetune.load_images

    def spy(parts, *rest):
        deep = load(parts, *rest)
        sets.extend(part.images for part in parts.values())
        return deep

    monkeypatch.setattr(finetune, "load_images", spy)
    result = finetune.finetune(run)
    assert (result["steps"], result["batch_size"]) == (2, 64)  # 70 images: one batch an epoch
    for images in sets:
        for i, path in enumerate(images.paths):
            film = Image.fromarray(films[Path(path).name])
            expected = film.resize((images.size, images.size), Image.BICUBIC)
            difference = images.cache[i][0].numpy().astype(int) - np.asarray(expected)
            assert np.abs(difference).max() <= 2  # both round twice, along x and along y
    tested = list(csv.reader((tmp_path / "run/predictions.csv").open()))[1:]
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt")))
    for weights in ("run", "run/merged.pt"):  # read as it was trained
        out = tmp_path / "predicted"
        finetune.predict_folder(
            FinetuneConfig(
                predict=str(root), weights=str(tmp_path / weights), out=str(out), device="cpu"
            )
        )
        found = {row[0]: row[1] for row in csv.reader((out / "predictions.csv").open())}
        for name, score, _ in tested:
            assert float(found[name]) == pytest.approx(float(score), abs=1e-6), (weights, name)
    saved = common.load_checkpoint(tmp_path / "run/adapter.pt")
    assert saved["reading"] == {"raw_dicom": True, "mode": "bicubic"}
    (root / "train_1.txt").write_text("".join(f"train_1{i}.dcm {i % 2}\n" for i in range(40)))
    with pytest.raises(
        common.InputError, match=r"--drop-last \(of --official\): .* 64 .* found 40"
    ):
        finetune.finetune(run)


def test_kept_images_are_those_of_the_same_reading(easy, tmp_path):
    kept, seen = {}, []
    for mode in ("bicubic", "bilinear", "bilinear"):
        parts, _ = finetune.read_lists(config(easy, tmp_path, ratio=100))
        options = dict(interpolation=mode, raw_dicom=False, img_size=24, min_crop=0.5)
        options |= dict(flip=False, randaugment=False, erasing=0.0, test_side=24)
        finetune.load_images(parts, config(easy, tmp_path, **options), kept)
        seen.append(parts["test"].images)
        films = parts["train"].images.cache[:2].float() / 255  # and its crops are of that mode
        crops, _ = parts["train"].images[[0, 1], 7]
        draw = common.seeded(0, 7)
        expected = data.random_resized_crop(films, 24, (0.5, 1.0), generator=draw, mode=mode)
        assert torch.equal(crops, expected)
    assert seen[1] is seen[2] and not torch.equal(seen[0].cache, seen[1].cache)


@pytest.mark.parametrize(
    "other",
    [
        dict(method="linear"),
        dict(rank=2),
        dict(seed=3),
        dict(min_crop=0.5),
        dict(lr=0.1),
        dict(mean=0.0),
        dict(flip=True),
        dict(drop_last=True),
        dict(interpolation="bilinear"),
        dict(raw_dicom=True),
    ],
    ids=lambda other: next(iter(other)),
)
def test_resume_refuses_another_runs_state(easy, tmp_path, other):
    finetune.finetune(config(easy, tmp_path, method="lora"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flag = (
        "--lr" if "method" in other else "--" + next(iter(other)).replace("_", "-")
    )  # a method has its own rate
    with pytest.raises(
        common.InputError,
        match=rf"last\.pt: expected {flag} .*, as asked for now, found a run with {flag}",
    ):
        finetune.finetune(config(easy, tmp_path, **dict(method="lora", resume=True) | other))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    finetune.load_run(tmp_path)  # the weights of the finished run are still there


def test_resume_refuses_weights_that_have_changed(easy, tmp_path):
    weights = rgb_weights(tmp_path / "rgb.pt")
    options = dict(method="lora", weights=weights, num_heads=4)
    finetune.finetune(config(easy, tmp_path / "run", **options))
    state = common.load_checkpoint(weights)["model"]
    common.save_checkpoint(
        weights, {"model": {name: tensor + 0.1 for name, tensor in state.items()}}
    )
    with pytest.raises(
        common.InputError, match=r"last\.pt: expected a run with the same weights as now"
    ):
        finetune.finetune(config(easy, tmp_path / "run", resume=True, **options))


def test_two_processes_predict_every_test_image_once(easy, tmp_path):
    """Under torchrun: one run folder, and what the processes gathered is what one process predicts
    with the saved model."""
    sizes = "--steps 4 --evaluations 2 --batch-size 4 --device cpu --weights scratch --lora".split()
    sizes += ["--cache", str(tmp_path / "cache")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(REPOSITORY / "finetune.py"),
        "--root",
        str(easy),
        "--out",
        str(tmp_path / "run"),
        *sizes,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    rows = list(csv.reader((tmp_path / "run" / "predictions.csv").open()))
    names, _ = data.read_list(easy / "test_list.txt")
    assert [row[0] for row in rows[1:]] == names
    model, saved = finetune.load_run(tmp_path / "run")
    assert len([file for file in (tmp_path / "cache").glob("*/*")]) == 64 + 24 + 24
    test_set = data.ImageSet([str(easy / "images" / name) for name in names], model.img_size)
    with torch.no_grad():
        images = torch.stack([image for image, _ in test_set])
        expected = model(data.normalize(images, saved["mean"], saved["std"])).sigmoid()
    np.testing.assert_allclose(
        np.array([row[1:3] for row in rows[1:]], dtype=float), expected.numpy(), atol=1e-4
    )


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_a_run_with_a_cache_gives_the_numbers_of_one_without(
    easy, holes, tmp_path, monkeypatch, task
):
    root, settings = (easy, config) if task == "classify" else (holes, segment)
    timed = {"images_per_second", "share_waiting_for_data", "peak_memory_mib", "seconds"}
    numbers, read, decoded = [], data.read_pixels, []
    for name, limit in (("without", 2**31), ("first", 2**31), ("second", 2**31), ("mapped", 0)):
        monkeypatch.setattr(data.ImageSet.preload, "__defaults__", (limit,))
        monkeypatch.setattr(
            data, "read_pixels", lambda *a, **k: decoded.append(name) or read(*a, **k)
        )
        cache = "" if name == "without" else str(tmp_path / "cache")
        result = finetune.finetune(settings(root, tmp_path / name, cache=cache, img_size=48))
        lines = [*map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()), result]
        numbers.append([{k: v for k, v in line.items() if k not in timed} for line in lines])
    assert json.dumps(numbers[0]) == json.dumps(numbers[1])
    assert json.dumps(numbers[0]) == json.dumps(numbers[2]) == json.dumps(numbers[3])
    assert decoded.count("second") == decoded.count("mapped") < decoded.count("first") / 2


@pytest.mark.skipif(not common.multiplies_bf16("cpu"), reason="bfloat16 is emulated here, and slow")
def test_bfloat16_follows_float32(easy, tmp_path):
    runs = [
        finetune.finetune(
            config(easy, tmp_path / dtype, method="lora", steps=10, evaluations=1, dtype=dtype)
        )
        for dtype in ("fp32", "bf16")
    ]
    losses = [
        json.loads((tmp_path / dtype / "log.jsonl").read_text().splitlines()[-1])["val_loss"]
        for dtype in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    assert runs[0]["trainable_parameters"] == runs[1]["trainable_parameters"]


def rgb_weights(path):
    torch.manual_seed(7)
    state = vit.ViT(64, 16, 3, 64, 2, 4).state_dict()
    common.save_checkpoint(
        path,
        {
            "model": {
                name: tensor for name, tensor in state.items() if name.split(".")[0] != "fc_norm"
            }
        },
    )
    return str(path)


def test_a_merged_adapter_predicts_as_its_run_does(easy, tmp_path):
    """Published weights have three channels and no sizes beside them; the run is at another
    size."""
    weights = rgb_weights(tmp_path / "rgb.pt")
    finetune.finetune(
        config(
            easy,
            tmp_path / "run",
            method="lora",
            weights=weights,
            img_size=32,
            num_heads=4,
            lr=0.02,
        )
    )
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt")))
    images = torch.randn(3, 1, 32, 32)
    run, merged = (
        finetune.load_run(tmp_path / "run")[0],
        finetune.load_run(tmp_path / "run/merged.pt")[0],
    )
    torch.testing.assert_close(run(images), merged(images), atol=1e-6, rtol=1e-5)
    saved = common.load_checkpoint(tmp_path / "run/adapter.pt")["adapter"]
    assert any(tensor.any() for name, tensor in saved.items() if name.endswith("lora_B"))
    finetune.finetune(
        config(easy, tmp_path / "next", method="linear", weights=str(tmp_path / "run/merged.pt"))
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_probe_trains_the_head_alone_first(easy, tmp_path, method, monkeypatch):
    moved, before = [], {}
    check = common.check_finite

    def look(step, *args, **values):
        """Runs before the update of `step`: notes which parts the updates so far have changed."""
        for name, tensor in finetune.trained_tensors(before["model"]).items():
            before.setdefault(name, tensor)
            if not torch.equal(tensor, before[name]):
                moved.append((step, "head" if name.startswith(("head", "fc_norm")) else "blocks"))
        return check(step, *args, **values)

    build = finetune.build_model
    monkeypatch.setattr(
        finetune, "build_model", lambda *args: before.setdefault("model", build(*args))
    )
    monkeypatch.setattr(
        common, "check_finite", lambda *a, **k: look(*a, **k) if k.get("loss") is not None else None
    )
    finetune.finetune(config(easy, tmp_path, method=method, steps=10, probe=0.5, warmup=0))
    assert min(step for step, part in moved if part == "head") == 2
    assert (
        min(step for step, part in moved if part == "blocks") == 7
    )  # updates 1 to 5 were the head's


def test_rates_with_and_without_a_probe():
    """Two cosines with a warm-up each, by the formula written out."""
    settings = common.fill(
        FinetuneConfig(lr=0.2, probe=0.5, probe_lr=0.1, steps=40, warmup=0.1, layer_decay=0.5),
        {},
    )
    model = vit.ViT(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    optimizer = finetune.make_optimizer(
        model, dataclasses.replace(settings, optimizer="adamw", weight_decay=0.0)
    )

    def rates(step):
        finetune.set_rates(optimizer, settings, step, 40)
        return {
            name: next(
                group["lr"]
                for group in optimizer.param_groups
                if any(parameter is own for own in group["params"])
            )
            for name, parameter in model.named_parameters()
        }

    def cosine(place, peak):
        return 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * place)) / 2

    for step, (head, block) in {
        0: (0.05, 0.0),
        1: (0.1, 0.0),
        11: (cosine(9 / 18, 0.1), 0.0),
        20: (0.1, 0.05),
        31: (cosine(9 / 18, 0.2), 0.5 * cosine(9 / 18, 0.2)),
    }.items():
        found = rates(step)
        assert found["head.weight"] == pytest.approx(head, rel=1e-6), step
        assert found["blocks.0.mlp.fc1.weight"] == pytest.approx(block, rel=1e-6), step


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pooled_run_predicts_what_it_scored(easy, tmp_path, method):
    finetune.finetune(config(easy, tmp_path / "run", method=method, pool=4))
    scored = list(csv.DictReader((tmp_path / "run/predictions.csv").open()))
    if method == "lora":
        lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt")))
    for run in ["run", "run/merged.pt"][: 2 if method == "lora" else 1]:
        finetune.predict_folder(
            FinetuneConfig(
                predict=str(easy / "images"),
                weights=str(tmp_path / run),
                out=str(tmp_path / "p"),
                device="cpu",
            )
        )
        found = {
            row["image"]: row for row in csv.DictReader((tmp_path / "p/predictions.csv").open())
        }
        for row in scored:
            assert float(found[row["image"]]["Square"]) == pytest.approx(
                float(row["Square"]), abs=1e-4
            )


def test_a_table_trains_and_its_split_is_written_down(easy, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(easy / "images", root / "films")
    names, labels = data.read_list(easy / "train_list.txt")
    rows = [f"films/{n},{int(y[0])},{int(y[1])}" for n, y in zip(names, labels)]
    (root / "labels.csv").write_text("\n".join(["image,Square,Third", *rows]) + "\n")
    run = FinetuneConfig(
        data="csv", root=str(root), weights="scratch", lora=True, steps=4, out=str(tmp_path / "o")
    )
    result = finetune.finetune(run)
    assert sum(result["images"].values()) == len(names) and "Square" in result["auroc_per_class"]
    written = list(csv.DictReader((tmp_path / "o/split.csv").open()))
    counts = {part: sum(row["split"] == part for row in written) for part in result["images"]}
    assert counts == result["images"]
    finetune.finetune(dataclasses.replace(run, resume=True, steps=6))


def test_unknown_labels_have_no_part_in_loss_and_auroc():
    scores, labels = scored(n=80, k=2)
    unknown = np.random.default_rng(5).random(labels.shape) < 0.3
    holes = np.where(unknown, np.nan, labels)
    mean, _, per_class = finetune.auroc(scores, holes)
    for c in range(2):
        keep = ~unknown[:, c]
        expected = roc_auc_score(labels[keep, c], scores[keep, c])
        assert per_class[c][0] == pytest.approx(expected, abs=1e-12)
        ours = finetune.roc_curve(scores[:, c], holes[:, c])
        theirs = sklearn_roc_curve(labels[keep, c], scores[keep, c], drop_intermediate=False)
        np.testing.assert_allclose(ours[0], theirs[0])
    assert mean == pytest.approx(finetune.mean_auroc(scores, holes))
    logits, y = torch.from_numpy(scores), torch.from_numpy(holes)
    known = torch.from_numpy(~unknown)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], y[known])
    torch.testing.assert_close(finetune.label_loss(logits, y), expected)
    assert not finetune.label_loss(logits, torch.full_like(y, float("nan"))).isnan()


def test_targets_and_rslora_reach_the_layers_and_the_adapter(easy, tmp_path):
    options = dict(method="lora", rank=4, alpha=8.0, targets="all", rslora=True)
    finetune.finetune(config(easy, tmp_path / "run", **options))
    saved = common.load_checkpoint(tmp_path / "run/adapter.pt")
    assert set(saved["lora"]["targets"]) == {"qkv", "proj", "fc1", "fc2"}
    assert saved["lora"]["alpha"] / saved["lora"]["rank"] == pytest.approx(8 / 4**0.5)
    # Trained further, the adapter keeps its scale and its layers
    finetune.finetune(config(easy, tmp_path / "on", method="lora", weights=str(tmp_path / "run")))
    assert common.load_checkpoint(tmp_path / "on/adapter.pt")["lora"] == saved["lora"]
    for other in (dict(rslora=True), dict(alpha=32.0)):
        with pytest.raises(common.InputError, match="no --rslora and no --alpha but its own, 16"):
            finetune.finetune(
                config(easy, tmp_path / "x", method="lora", weights=str(tmp_path / "run"), **other)
            )


def test_dora_starts_from_the_lengths_of_the_weights_it_is_given(easy, tmp_path):
    """The weights are loaded before DoRA takes their lengths: a start from the lengths of random
    weights would change the model without a word."""
    finetune.finetune(config(easy, tmp_path / "full", method="full", steps=6, lr=0.1))
    weights = str(tmp_path / "full")
    filled, sizes, tensors, known = finetune.fill_recipe(
        config(easy, tmp_path, method="lora", dora=True, weights=weights), ["Square", "Third"]
    )
    model = finetune.build_model(filled, sizes, 2, tensors, known).eval()
    plain, _ = finetune.load_run(weights)
    images = torch.randn(3, 1, sizes["img_size"], sizes["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=1e-4)
    rows = plain.state_dict()["blocks.0.attn.qkv.weight"].norm(dim=1)
    other = vit.ViT(**sizes).state_dict()["blocks.0.attn.qkv.weight"].norm(dim=1)
    assert not torch.allclose(rows, other, rtol=1e-3)  # so that the above can fail


def test_dora_is_trained_saved_predicted_and_trained_further(easy, tmp_path):
    options = dict(method="lora", rank=2, dora=True, lr=0.05)
    finetune.finetune(config(easy, tmp_path / "run", **options))
    saved = common.load_checkpoint(tmp_path / "run/adapter.pt")
    assert saved["lora"]["dora"] is True
    lengths = saved["adapter"]["blocks.0.attn.qkv.lora_magnitude"]
    base = common.load_checkpoint(tmp_path / "run/base.pt")["model"]["blocks.0.attn.qkv.weight"]
    q, _, v = base.chunk(3)
    assert lengths.shape == (len(q) + len(v),)
    assert not torch.equal(lengths, torch.cat([q, v]).norm(dim=1))  # they are trained
    model, _ = finetune.load_run(tmp_path / "run")
    merged = model.state_dict()["blocks.0.attn.qkv.weight"].chunk(3)
    torch.testing.assert_close(torch.cat([merged[0], merged[2]]).norm(dim=1), lengths.abs())
    on = dict(method="lora", weights=str(tmp_path / "run"))
    finetune.finetune(config(easy, tmp_path / "on", **on))
    assert common.load_checkpoint(tmp_path / "on/adapter.pt")["lora"] == saved["lora"]
    assert json.loads((tmp_path / "on/config.json").read_text())["dora"] is True
    with pytest.raises(common.InputError, match="expected an adapter for --targets all"):
        finetune.finetune(config(easy, tmp_path / "other", targets="all", **on))


def test_an_adapter_without_dora_is_not_trained_further_as_dora(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", method="lora"))
    with pytest.raises(common.InputError, match="adapter for --targets qv --dora"):
        finetune.finetune(
            config(easy, tmp_path / "on", method="lora", weights=str(tmp_path / "run"), dora=True)
        )


def test_a_full_runs_folder_serves_as_weights(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "full"))
    state = common.load_checkpoint(tmp_path / "full/best.pt")["model"]
    finetune.finetune(
        config(easy, tmp_path / "lora", method="lora", weights=str(tmp_path / "full"))
    )
    base = finetune.load_run(tmp_path / "lora")[0].state_dict()
    assert torch.equal(base["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "lora/adapter.pt")))


def test_a_run_warns_of_test_films_that_were_trained_on(easy, tmp_path, capsys):
    table = "image_path,patient_id\n" + "".join(f"{i:04d}.png,{i // 2}\n" for i in range(112))
    root = shutil.copytree(easy, tmp_path / "easy")  # test films: 88 to 111
    (root / "patients.csv").write_text(table)
    rows = "".join(f"{i:04d}.png,no square\n" for i in [*range(60), 88, 90, 91, *range(64, 80)])
    (root / "training.csv").write_text("image_path,report_content\n" + rows)
    mrm.pretrain(
        mrm.MRMConfig(root=str(root), out=str(tmp_path / "m"), steps=1, device="cpu", holdout=8)
    )
    said = "3 of 24 test images were trained on before, and 1 more are of a patient who was"

    def run(out, weights, **options):
        capsys.readouterr()
        weights = weights if weights == "scratch" else str(tmp_path / weights)
        options = dict(method="lora", weights=weights, steps=1, evaluations=1) | options
        result = finetune.finetune(config(root, tmp_path / out, **options))
        shown = capsys.readouterr().out
        assert (said in shown) == (result.get("test_trained_on") == {"images": 3, "patients": 1})
        return result.get("test_trained_on")

    for out, weights, method in (
        ("lora", "m", "lora"),
        ("again", "lora", "lora"),
        ("full", "m", "full"),
        ("on", "full", "lora"),
    ):
        assert run(out, weights, method=method) == {"images": 3, "patients": 1}, out
    assert run("s", "scratch") is None
    nothing = common.load_checkpoint(tmp_path / "m/last.pt")
    common.save_checkpoint(tmp_path / "plain/last.pt", {"model": nothing["model"]})
    assert run("p", "plain", num_heads=4) is None
    # A run's own training films count for what starts from it; an adapter names its own alone
    own = common.load_checkpoint(tmp_path / "s/adapter.pt")["trained_on"]
    train = [f"{i:04d}.png" for i in range(64)]
    assert torch.equal(own, data.hash_films(root, train)) and len(own) == 64
    swapped = shutil.copytree(root, tmp_path / "swapped")
    shutil.copy(root / "train_list.txt", swapped / "test_list.txt")
    result = finetune.finetune(
        config(swapped, tmp_path / "w", method="lora", weights=str(tmp_path / "s"))
    )
    assert result["test_trained_on"] == {"images": 64, "patients": 0}
    (root / "patients.csv").write_text("file\n")
    assert run("t", "m") is None


def table(folder, out, **options):
    defaults = dict(weights=None, compare=True, methods="full,linear", ratios="10", seeds=2)
    return dataclasses.replace(config(folder, out, **defaults, inits="scratch"), **options)


def test_compare_writes_a_table_and_keeps_finished_cells(easy, tmp_path, monkeypatch):
    finetune.compare(table(easy, tmp_path))
    first = (tmp_path / "compare.md").read_text()
    assert first.count("| demo | scratch | full | 10 |") == 1
    assert "| demo | 10 | scratch | full | linear |" in first and "of 1 cells" in first
    ran = json.loads((tmp_path / "demo-scratch-full-10-1/config.json").read_text())
    assert (ran["steps"], ran["batch_size"], ran["seed"], ran["method"]) == (
        4,
        16,
        1,
        "full",
    )  # the typed ones
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "finetune", None)  # nothing runs again
        finetune.compare(table(easy, tmp_path))
        finetune.compare(table(easy, tmp_path, methods="linear", seeds=1, workers=1))
    finetune.compare(table(easy, tmp_path))
    assert (tmp_path / "compare.md").read_text() == first


def test_paired_differences_against_resampling_by_hand():
    """Two models that err alike: their difference is far more certain than either score."""
    scores, labels = scored(n=300, k=1)
    better = scores + 0.3 * labels
    rows = {
        ("demo", "mrm", name, "10"): ([{"auroc": finetune.mean_auroc(s, labels)}], d.mean(0))
        for name, s in (("lora", better), ("full", scores))
        for d in [finetune.bootstrap_auroc(s, labels, resamples=4000)[2]]
    }
    [line] = finetune.compare_rows(rows)
    assert line[:5] == ["demo", "10", "mrm", "lora", "full"] and line[-1] == "1 of 1"
    rng, differences = np.random.default_rng(1), []
    for _ in range(1000):
        take = rng.integers(len(scores), size=len(scores))
        differences.append(
            roc_auc_score(labels[take, 0], better[take, 0])
            - roc_auc_score(labels[take, 0], scores[take, 0])
        )
    low, high = (float(number) for number in line[6].strip("[]").split(","))
    assert (low, high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.006)
    assert float(line[5]) == pytest.approx(
        roc_auc_score(labels[:, 0], better[:, 0]) - roc_auc_score(labels[:, 0], scores[:, 0]),
        abs=6e-4,
    )
    spread = np.std(
        [roc_auc_score(labels[t, 0], scores[t, 0]) for t in rng.integers(300, size=(300, 300))]
    )
    assert high - low < 2 * spread  # unpaired, it would be more than 5 times the spread


def test_compare_chooses_the_rate_on_val_and_runs_sets_and_ranks(easy, tmp_path):
    shutil.copytree(easy, tmp_path / "other")
    options = dict(root="", methods="lora", ranks="1,2", lrs="1e-9,1e-2", seeds=2, steps=40)
    sets = f"demo={easy},csv={tmp_path / 'other'}"
    finetune.compare(table(easy, tmp_path / "table", sets=sets, **options))
    rows = list(csv.DictReader((tmp_path / "table/compare.csv").open()))
    assert [(row["data"], row["method"]) for row in rows] == [
        (name, f"lora {rank}") for name in ("demo", "csv") for rank in (1, 2)
    ]
    for row in rows:
        name = f"{row['data']}-scratch-{row['method'].replace(' ', '')}-10"
        values = {
            rate: json.loads((tmp_path / f"table/{name}-{rate}-0/result.json").read_text())
            for rate in ("1e-9", "1e-2")
        }
        best = max(values, key=lambda rate: values[rate]["val_auroc"])
        assert float(row["lr"]) == float(best)
        ran = json.loads((tmp_path / f"table/{name}-{best}-1/config.json").read_text())
        assert ran["rank"] == int(row["method"][-1]) and ran["data"] == row["data"]
        assert row["each seed"].split()[0] == f"{values[best]['auroc']:.3f}"
    pairs = list(csv.DictReader((tmp_path / "table/paired.csv").open()))
    assert [(pair["data"], pair["a"], pair["b"]) for pair in pairs] == [
        ("demo", "lora 1", "lora 2"),
        ("csv", "lora 1", "lora 2"),
    ]


@pytest.mark.parametrize(
    "other",
    [dict(steps=5), dict(lr=0.5), dict(min_crop=0.5), dict(flip=True)],
    ids=lambda other: next(iter(other)),
)
def test_compare_refuses_a_cell_of_other_options(easy, tmp_path, other):
    options = dict(methods="linear", seeds=1)
    finetune.compare(table(easy, tmp_path, **options))
    before = (tmp_path / "compare.md").read_text()
    flag = "--" + next(iter(other)).replace("_", "-")
    with pytest.raises(
        common.InputError,
        match=rf"demo-scratch-linear-10-0.*: expected {flag} .*found a run with {flag}",
    ):
        finetune.compare(table(easy, tmp_path, **options | other))
    assert (tmp_path / "compare.md").read_text() == before


def test_the_cells_of_a_comparison_share_val_and_test_images(easy, tmp_path, monkeypatch):
    decoded = []

    class Counted(data.ImageSet):
        def preload(self):
            decoded.append(len(self))
            return super().preload()

    monkeypatch.setattr(data, "ImageSet", Counted)
    finetune.compare(table(easy, tmp_path, methods="linear", steps=1, evaluations=1))
    assert sorted(decoded) == [24, 24, 64, 64]
    kept = {}
    for size in (48, 24):  # images of another size take the place of the first ones
        finetune.finetune(config(easy, tmp_path / str(size), steps=1, img_size=size), kept)
        assert {name: images.size for name, images in kept.items()} == {"val": size, "test": size}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="full"), "expected --methods instead of --method"),
        (dict(lora=True), "--methods instead of --lora"),
        (dict(ratio=1), "--ratios instead of --ratio"),
        (dict(weights="runs/mrm"), "--inits instead of --weights"),
        (dict(lr=0.1, lrs="0.1"), "--lrs instead of --lr"),
        (dict(rank=2, ranks="1,2"), "--ranks instead of --rank"),
        (dict(sets="csv=x"), "no --root and no --split beside it"),
    ],
    ids=["method", "lora", "ratio", "weights", "lr", "rank", "root"],
)
def test_compare_does_not_override_what_was_typed(easy, tmp_path, options, message):
    with pytest.raises(common.InputError, match=message):
        finetune.compare(table(easy, tmp_path / "table", **options))
    assert not (tmp_path / "table").exists()


def spoil_list(root, text, part="train_10"):
    (root / f"{part}.txt").write_text(text)


BAD = {
    "missing image": (
        lambda r: (r / "images/0003.png").unlink(),
        {},
        r"train_10\.txt.*4.*0003\.png",
    ),
    "truncated image": (
        lambda r: (r / "images/0003.png").write_bytes((r / "images/0003.png").read_bytes()[:100]),
        {},
        r"0003\.png",
    ),
    "number of labels": (
        lambda r: spoil_list(r, "0000.png 0 1\n0001.png 1 1\n0002.png 1\n"),
        {},
        r"train_10\.txt.*3",
    ),
    "label 2": (
        lambda r: spoil_list(r, "0000.png 0 1\n0001.png 2 1\n"),
        {},
        r"train_10\.txt.*2.*--skip-bad-lines",
    ),
    "empty list": (lambda r: spoil_list(r, ""), {}, r"train_10\.txt"),
    "no positive": (
        lambda r: spoil_list(r, "0000.png 0 0\n0001.png 0 0\n", "val_list"),
        {},
        r"val_list\.txt: expected both labels",
    ),
    "unreadable checkpoint": (
        lambda r: (r / "bad.pt").write_bytes(b"no"),
        {"weights": "bad.pt"},
        r"bad\.pt: not a readable checkpoint",
    ),
    "no ViT": (
        lambda r: common.save_checkpoint(r / "bad.pt", {"model": {"x": torch.ones(1)}}),
        {"weights": "bad.pt"},
        r"bad\.pt: expected a ViT",
    ),
    "missing checkpoint": (lambda r: None, {"weights": "none.pt"}, r"none\.pt: no such checkpoint"),
    "only an adapter": (
        lambda r: common.save_checkpoint(
            r / "bad.pt",
            {
                "adapter": {},
                "lora": {},
                "sizes": dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2),
            },
        ),
        {"weights": "bad.pt"},
        r"bad\.pt: expected --lora, which trains this adapter",
    ),
    "no class has both labels": (
        lambda r: spoil_list(r, "0000.png 1 1\n0001.png 1 1\n"),
        {},
        r"train_10\.txt: expected both labels",
    ),
    "listed twice": (
        lambda r: spoil_list(r, "0000.png 1 1\n0001.png 0 1\n0000.png 1 1\n"),
        {},
        r"train_10\.txt: line 3",
    ),
    "missing list": (lambda r: (r / "test_list.txt").unlink(), {}, r"test_list\.txt: no such list"),
    "other classes": (
        lambda r: (r / "classes.txt").write_text("Square\n"),
        {},
        r"classes\.txt: expected 2 classes",
    ),
    "unwritable folder": (lambda r: (r / "file").write_text(""), {"out": "file/run"}, r"file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(easy, tmp_path, case):
    root = shutil.copytree(easy, tmp_path / "root")
    spoil, options, message = BAD[case]
    spoil(root)
    options = {"out": "run"} | options
    options = {name: str(root / value) for name, value in options.items()}
    with pytest.raises(common.InputError, match=message) as error:
        finetune.finetune(config(root, **options))
    assert "\n" not in str(error.value)
    assert not [path for path in root.rglob("*.tmp")] and not (root / "run").exists()


def test_a_refused_run_leaves_the_one_before_it_alone(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", steps=2, evaluations=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(common.InputError):
        finetune.finetune(config(easy, tmp_path / "run", weights=str(tmp_path / "none.pt")))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ratio=5), "expected --ratio 1 or 10 or 100, found 5"),
        (dict(evaluations=0), r"--evaluations: expected a number in \[1, inf\), found 0"),
        (dict(steps=-1), r"--steps: expected a number in \[1, inf\), found -1"),
        (dict(epochs=1.0), "--steps and --epochs: expected one"),
        (dict(img_size=33), "img_size 33 must be a multiple"),
        (dict(method="lora", rank=-1), r"--rank: expected a number in \[1, inf\), found -1"),
        (dict(split="covid1"), "expected no --split"),
        (
            dict(lr=1e30, steps=6, evaluations=6),
            "step 1: the validation score is not finite; lower --lr",
        ),
        (dict(resume=True), r"last\.pt: no such checkpoint"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_used_are_one_line(easy, tmp_path, options, message):
    with pytest.raises(common.InputError, match=message) as error:
        finetune.finetune(config(easy, tmp_path, **options))
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(inits="imagenet"), "--inits: expected some of mrm,.* found 'imagenet'"),
        (dict(methods="full,lorra"), "found 'lorra'"),
        (dict(ratios="1,5"), "found '5'"),
        (dict(sets="csv", root=""), "--sets: expected NAME=DIR .* found 'csv'"),
        (dict(sets="mri=x", root=""), "--sets: expected NAME=DIR .* found 'mri=x'"),
        (dict(inits="scratch,scratch"), "--inits: expected names that differ"),
        (dict(seeds=0), r"--seeds: expected a number in \[1, inf\), found 0"),
    ],
    ids=["inits", "methods", "ratios", "sets", "layout", "twice", "seeds"],
)
def test_compare_refuses_what_it_does_not_know_before_any_run(easy, tmp_path, options, message):
    with pytest.raises(common.InputError, match=message):
        finetune.compare(table(easy, tmp_path / "table", **options))
    assert not (tmp_path / "table").exists()


def test_prediction_needs_a_finished_run_and_images(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", method="linear", steps=1))
    saved, images = common.load_checkpoint(tmp_path / "run/best.pt"), str(easy / "images")
    common.save_checkpoint(
        tmp_path / "headless.pt",
        saved | {"model": {n: t for n, t in saved["model"].items() if n != "head.bias"}},
    )
    common.save_checkpoint(
        tmp_path / "sizeless.pt", {n: v for n, v in saved.items() if n != "sizes"}
    )
    common.save_checkpoint(tmp_path / "bare.pt", {"model": saved["model"]})
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    for options, message in [
        (dict(weights=None, predict=images), "--predict needs --weights RUN"),
        (dict(weights=str(tmp_path), predict=images), r"best\.pt: no such checkpoint"),
        (
            dict(weights=str(tmp_path / "bare.pt"), predict=images),
            r"bare\.pt: expected the adapter\.pt or best\.pt",
        ),
        (
            dict(weights=str(tmp_path / "sizeless.pt"), predict=images),
            r"sizeless\.pt: expected the adapter\.pt or best\.pt",
        ),
        (
            dict(weights=str(tmp_path / "headless.pt"), predict=images),
            r"headless\.pt: expected head\.bias of shape \(2,\)",
        ),
        (dict(weights=run, predict=str(tmp_path / "none")), "none: no such folder"),
        (
            dict(weights=run, predict=images, out=run + "/best.pt/out"),
            r"predictions\.csv: cannot be written",
        ),
    ]:
        with pytest.raises(common.InputError, match=message) as error:
            finetune.predict_folder(FinetuneConfig(**dict(out=out, device="cpu") | options))
        assert "\n" not in str(error.value)
    assert not Path(out).exists() and not list(tmp_path.rglob("*.tmp"))


def test_weights_of_another_width_and_changed_weights_are_refused(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path, method="lora"))
    other = vit.ViT(64, 16, 1, 64, 3, 4)
    common.save_checkpoint(tmp_path / "base.pt", {"model": other.state_dict()})
    with pytest.raises(common.InputError, match="not the weights this adapter was trained on"):
        finetune.load_run(tmp_path)
    sizes = common.load_checkpoint(tmp_path / "adapter.pt")["sizes"]
    common.save_checkpoint(tmp_path / "base.pt", {"model": vit.ViT(**sizes).state_dict()})
    with pytest.raises(common.InputError, match="not the weights this adapter was trained on"):
        finetune.load_run(tmp_path)


def test_pretraining_refuses_a_csv_without_the_columns(easy, tmp_path):
    root = shutil.copytree(easy, tmp_path / "root")
    (root / "training.csv").write_text("image,text\n0000.png,clear\n")
    with pytest.raises(common.InputError, match=r"training\.csv: line 1: .*image_path") as error:
        mrm.pretrain(mrm.MRMConfig(data="csv", root=str(root), out=str(root / "run"), device="cpu"))
    assert "\n" not in str(error.value) and not (root / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(word_ratio=2.0), r"--word-ratio: expected a number in \(0, 1\], found 2"),
        (dict(word_ratio=-1.0), r"--word-ratio: expected a number in \(0, 1\], found -1"),
        (dict(word_ratio=0.0), r"--word-ratio: expected a number in \(0, 1\], found 0"),
        (
            dict(mask_ratio=0.99),
            "--mask-ratio: expected .* leaves 1 to 15 of 16 patches visible, found 0.99",
        ),
        (dict(mask_ratio=0.0), r"--mask-ratio: expected a number in \(0, 1\), found 0"),
        (dict(mask_ratio=-0.5), r"--mask-ratio: expected a number in \(0, 1\), found -0.5"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_pretraining_refuses_ratios_that_hide_nothing_or_everything(tmp_path, options, message):
    with pytest.raises(common.InputError, match=message):
        mrm.pretrain(mrm.MRMConfig(out=str(tmp_path / "run"), device="cpu", **options))
    assert not list(tmp_path.iterdir())


def test_a_script_prints_one_line_and_exits_with_2(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            REPOSITORY / "finetune.py",
            "--data",
            "covid",
            "--root",
            "nowhere",
            "--split",
            "covid1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    ), run.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_have_no_auroc(bad):
    scores, labels = scored(n=20)
    scores[3, 1] = bad
    for function in (finetune.auroc, finetune.mean_auroc):
        with pytest.raises(
            common.InputError, match="AUROC: expected finite scores, found 1 that are not"
        ):
            function(scores, labels)
    with pytest.raises(common.InputError, match="found 20 that are not"):
        finetune.mean_auroc(np.full((20, 1), bad), labels[:, :1])


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_the_loss_reaches_what_is_trained_and_nothing_else(method, fresh):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    model = finetune.build_model(
        common.fill(FinetuneConfig(method=method), finetune.PLAIN | finetune.SMALL[method]),
        sizes,
        3,
    )
    if not fresh:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 1, 16, 16)).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    head = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    adapters = {f"blocks.{i}.attn.qkv.lora_{x}" for i in range(2) for x in ("B" if fresh else "AB")}
    assert reached == {"linear": head, "lora": head | adapters, "full": set(before)}[method]
    optimizer = optimizer_of(model, lr=0.1, weight_decay=0.0)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == reached


def test_accumulation_gives_the_gradient_of_the_whole_batch(easy, tmp_path):
    runs = [
        finetune.finetune(
            config(
                easy,
                tmp_path / str(size),
                method="full",
                steps=3,
                evaluations=3,
                batch_size=16,
                accumulate=16 // size,
                min_crop=1.0,
                dtype="fp32",
                optimizer="sgd",
                lr=0.02,
            )
        )
        for size in (16, 4)
    ]
    lines = [
        [json.loads(line) for line in (tmp_path / str(size) / "log.jsonl").read_text().splitlines()]
        for size in (16, 4)
    ]
    for name in ("loss", "val_loss"):
        assert [line[name] for line in lines[0]] == pytest.approx(
            [line[name] for line in lines[1]], rel=1e-4
        )
    assert runs[0]["steps"] == runs[1]["steps"] == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "classes.txt").write_text("Third\nSquare\n"),
        lambda root: spoil_list(
            root, "".join(f"{i:04d}.png {1 - i % 2} {i // 2 % 2}\n" for i in range(64))
        ),
        lambda root: spoil_list(
            root, (root / "val_list.txt").read_text().replace("0065", "0001"), "val_list"
        ),
    ],
    ids=["class order", "labels", "names"],
)
def test_resume_refuses_other_lists_and_classes(easy, tmp_path, spoil):
    root = shutil.copytree(easy, tmp_path / "root")
    finetune.finetune(config(root, tmp_path / "run"))
    spoil(root)
    with pytest.raises(
        common.InputError, match=r"last\.pt: expected a run with the same lists and classes as now"
    ):
        finetune.finetune(config(root, tmp_path / "run", resume=True))


def test_training_goes_on_for_more_steps(easy, tmp_path, capsys):
    finetune.finetune(config(easy, tmp_path, method="lora"))
    with pytest.raises(common.InputError, match="expected at least the 4 steps"):
        finetune.finetune(config(easy, tmp_path, method="lora", resume=True, steps=3))
    result = finetune.finetune(
        config(easy, tmp_path, method="lora", resume=True, steps=None, epochs=2.0)
    )
    assert result["steps"] == 8 and "going on to 8 steps instead of 4" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 8]


def test_an_adapter_is_trained_further(easy, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    finetune.finetune(config(easy, first, method="lora", rank=3, alpha=6.0))
    finetune.finetune(config(easy, again, method="lora", weights=str(first), lr=1e-9, steps=1))
    old, new = (common.load_checkpoint(path / "adapter.pt") for path in (first, again))
    assert new["lora"] == old["lora"] and new["weights"] == old["weights"] == str(first / "base.pt")
    for name, tensor in old["adapter"].items():
        torch.testing.assert_close(new["adapter"][name], tensor, atol=1e-5, rtol=0)
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(
        finetune.load_run(again)[0](images), finetune.load_run(first)[0](images), atol=1e-4, rtol=0
    )
    for options, message in (
        (dict(method="full"), "expected --lora, which trains this adapter further"),
        (dict(method="lora", rank=2), "does not fit the model"),
    ):
        with pytest.raises(common.InputError, match=message):
            finetune.finetune(config(easy, tmp_path / "other", weights=str(first), **options))
    root = shutil.copytree(easy, tmp_path / "root")
    (root / "classes.txt").write_text("Third\nSquare\n")
    with pytest.raises(
        common.InputError, match=r"expected the classes of the data, \['Third', 'Square'\]"
    ):
        finetune.finetune(config(root, tmp_path / "other", weights=str(first), method="lora"))


def test_a_head_is_reused_for_the_same_classes_in_the_same_order_alone(easy, tmp_path, capsys):
    finetune.finetune(config(easy, tmp_path / "full", steps=1))
    weights, options = (
        str(tmp_path / "full"),
        common.fill(FinetuneConfig(method="linear", data="csv", ratio=100), {}),
    )
    saved = common.load_checkpoint(tmp_path / "full/best.pt")["model"]["head.weight"]
    for classes, kept in (
        (["Square", "Third"], True),
        (["Third", "Square"], False),
        (["a", "b"], False),
    ):
        filled_, sizes, tensors, known = finetune.fill_recipe(
            dataclasses.replace(options, weights=weights), classes
        )
        model = finetune.build_model(filled_, sizes, 2, tensors, known)
        assert torch.equal(model.head.weight, saved) == kept


def test_a_base_is_found_where_it_went(easy, tmp_path, monkeypatch):
    here = tmp_path / "here"
    finetune.finetune(config(easy, here / "runs/base", method="full", steps=1))
    monkeypatch.chdir(here)
    finetune.finetune(config(easy, "runs/adapter", method="lora", steps=1, weights="runs/base"))
    expected = finetune.load_run("runs/adapter")[0].state_dict()
    monkeypatch.chdir(tmp_path)  # from another directory
    finetune.load_run(here / "runs/adapter")
    here.rename(tmp_path / "there")  # the whole folder moved
    moved = finetune.load_run(tmp_path / "there/runs/adapter")[0].state_dict()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in expected.items())
    (tmp_path / "there/runs/base").rename(tmp_path / "elsewhere")
    with pytest.raises(common.InputError, match="its base weights .* are not there.*--base"):
        finetune.load_run(tmp_path / "there/runs/adapter")
    finetune.predict_folder(
        FinetuneConfig(
            predict=str(easy / "images"),
            weights=str(tmp_path / "there/runs/adapter"),
            base=str(tmp_path / "elsewhere"),
            out=str(tmp_path / "p"),
            device="cpu",
        )
    )
    lora.merge(
        lora.LoRAConfig(
            adapter=str(tmp_path / "there/runs/adapter/adapter.pt"),
            weights=str(tmp_path / "elsewhere"),
        )
    )


@pytest.mark.parametrize("command", [lora.merge, lora.export_peft])
def test_commands_know_the_base_of_an_adapter(easy, tmp_path, command):
    finetune.finetune(config(easy, tmp_path / "run", method="lora", steps=1))
    saved = common.load_checkpoint(tmp_path / "run/base.pt")
    for name, change in (("other", 0.1), ("nearly", 1e-6)):
        changed = {
            n: t + change if n == "blocks.0.norm1.weight" else t for n, t in saved["model"].items()
        }
        common.save_checkpoint(tmp_path / f"{name}.pt", saved | {"model": changed})
        with pytest.raises(
            common.InputError, match=f"{name}.pt are not the weights this adapter was trained on"
        ):
            command(
                lora.LoRAConfig(
                    adapter=str(tmp_path / "run/adapter.pt"), weights=str(tmp_path / f"{name}.pt")
                )
            )
    common.save_checkpoint(
        tmp_path / "wrapped.pt",
        {"state_dict": {"module." + n: t for n, t in saved["model"].items()}},
    )
    command(
        lora.LoRAConfig(
            adapter=str(tmp_path / "run/adapter.pt"), weights=str(tmp_path / "wrapped.pt")
        )
    )


def test_the_demo_mrm_says_what_is_used_again(easy, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mrm-demo"
    monkeypatch.setattr(finetune, "demo_folder", lambda init="mrm", seed=0: str(folder))
    monkeypatch.setitem(mrm.PRESETS, "tiny", mrm.PRESETS["tiny"] | dict(steps=1))
    monkeypatch.setitem(mrm.RECORDS, "holdout", 8)
    options = config(easy, tmp_path / "run", weights=None, steps=1, evaluations=1, method="linear")
    finetune.finetune(options)
    capsys.readouterr()
    finetune.finetune(options)
    out = capsys.readouterr().out
    assert (
        f"{folder} is used again, the tiny mrm after 1 steps on the records of {easy}" in out
        and "delete the folder" not in out
    )
    monkeypatch.setattr(mrm, "SOURCE", "an edited file")
    monkeypatch.setitem(mrm.PRESETS, "tiny", mrm.PRESETS["tiny"] | dict(mask_ratio=0.5))
    finetune.finetune(options)
    assert "WARNING: mrm.py, --mask-ratio changed since" in capsys.readouterr().out


def test_a_bad_label_or_rate_ends_a_run_at_its_step_and_keeps_the_checkpoint(
    easy, tmp_path, monkeypatch
):
    finetune.finetune(config(easy, tmp_path, steps=2))
    before = (tmp_path / "last.pt").read_bytes()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    calls = []

    def second_is_nan(logits, labels):
        calls.append(1)
        return loss(logits, labels) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setitem(finetune.LOSSES, "classify", second_is_nan)
    with pytest.raises(
        common.InputError, match=r"step 4: the loss is not finite.*images/00\d\d\.png"
    ) as error:
        finetune.finetune(config(easy, tmp_path, steps=9, resume=True))
    assert "\n" not in str(error.value) and (tmp_path / "last.pt").read_bytes() == before


def test_clipping_bounds_what_a_step_does(easy, tmp_path):
    """One step of plain SGD at a rate of 1 moves the weights by as much as the gradients' norm:
    --clip, and without it far more."""
    ran = {}
    for clip in (1e-3, 0.0):
        options = dict(steps=1, evaluations=1, optimizer="sgd", lr=1.0, warmup=0.0, clip=clip)
        options |= dict(weight_decay=0.0, layer_decay=1.0, drop_path=0.0, dtype="fp32")
        finetune.finetune(config(easy, tmp_path / str(clip), **options))
        ran[clip] = common.load_checkpoint(tmp_path / str(clip) / "best.pt")["model"]
    common.seed(0)
    fresh = finetune.build_model(
        filled(), vit.encoder_sizes({}, {"sizes": mrm.MODELS["tiny"]}, ""), 2
    ).state_dict()
    clipped, free = (
        sum((model[name].double() - x.double()).square().sum() for name, x in fresh.items()).sqrt()
        for model in ran.values()
    )
    assert clipped.item() == pytest.approx(1e-3, rel=0.01) and free > 0.01


def test_a_run_uses_the_rates_of_its_layers(easy, tmp_path):
    finetune.finetune(
        config(
            easy,
            tmp_path,
            steps=1,
            evaluations=1,
            layer_decay=1e-6,
            lr=0.1,
            weight_decay=0.0,
            warmup=1.0,
        )
    )
    common.seed(0)
    fresh = finetune.build_model(
        filled(), vit.encoder_sizes({}, {"sizes": mrm.MODELS["tiny"]}, ""), 2
    ).state_dict()
    ran = common.load_checkpoint(tmp_path / "best.pt")["model"]
    moved = {name: (ran[name] - tensor).abs().max().item() for name, tensor in fresh.items()}
    assert moved["head.weight"] > 1e-3 and moved["blocks.0.mlp.fc1.weight"] < 1e-5


def test_bad_images_and_images_outside_are_refused_or_read_as_asked(easy, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(easy, root)
    (root / "images" / "0003.png").write_bytes(b"no image")
    with pytest.raises(common.InputError, match=r"0003\.png"):
        finetune.finetune(config(root, tmp_path / "run", method="linear", steps=1))
    result = finetune.finetune(
        config(root, tmp_path / "run", method="linear", steps=1, skip_bad=True)
    )
    assert result["images"] == {"train": 63, "val": 24, "test": 24}
    assert "1 of 64 images" in capsys.readouterr().err
    shutil.move(root / "images" / "0004.png", tmp_path / "0004.png")
    listed = (root / "train_list.txt").read_text().replace("0004.png", f"{tmp_path}/0004.png")
    for name in ("train_list.txt", "train_10.txt"):
        (root / name).write_text(listed)
    options = dict(method="linear", steps=1, skip_bad=True)
    with pytest.raises(common.InputError, match="--allow-outside"):
        finetune.finetune(config(root, tmp_path / "run", **options))
    result = finetune.finetune(config(root, tmp_path / "run", **options, allow_outside=True))
    assert result["images"]["train"] == 63
    images = tmp_path / "folder"
    shutil.copytree(root / "images", images)
    predict = finetune.FinetuneConfig(
        predict=str(images), weights=str(tmp_path / "run"), out=str(tmp_path / "p")
    )
    with pytest.raises(common.InputError, match=r"0003\.png"):
        finetune.predict_folder(predict)
    finetune.predict_folder(dataclasses.replace(predict, skip_bad=True))
    count = len(list(images.iterdir())) - 1
    assert len((tmp_path / "p" / "predictions.csv").read_text().splitlines()) == 1 + count


# Segmentation


def test_segmentation_loss_against_its_equations():
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(3, 2, 5, 4)) * 2, (rng.random((3, 1, 5, 4)) < 0.3) * 1.0
    masks[2] = 0
    expected = 0
    for weight, channel in ((1, 0), (0.4, 1)):
        focal, dice = [], []
        for x, y in zip(logits[:, channel], masks[:, 0]):
            p = 1 / (1 + np.exp(-x))
            for a, b in zip(p.ravel(), y.ravel()):
                q = a if b else 1 - a
                focal.append(-0.5 * (1 - q) ** 2 * np.log(q))
            dice.append(1 - (2 * (p * y).sum() + 1) / ((p * p).sum() + y.sum() + 1))
        expected += weight * (2 * np.mean(focal) + np.mean(dice))
    logits, masks = torch.tensor(logits), torch.tensor(masks)
    assert finetune.segmentation_loss(logits, masks).item() == pytest.approx(expected)
    one = finetune.segmentation_loss(logits[:, :1], masks).item()
    assert one == pytest.approx(
        finetune.segmentation_loss(logits * torch.tensor([1, 0])[:, None, None], masks).item()
        - 0.4 * finetune.segmentation_loss(0 * logits[:, :1], masks).item()
    )


def blobs(n=40, side=12, seed=0):
    """Logits and masks of which some are empty, and which agree more or less."""
    rng = np.random.default_rng(seed)
    masks = np.kron(rng.random((n, 3, 3)) < 0.3, np.ones((side // 3, side // 3))) > 0
    masks[::4] = False
    logits = rng.normal(size=masks.shape) - 2 + 3 * masks * rng.random((n, 1, 1))
    logits[::8] -= 4
    return torch.tensor(logits).float(), torch.tensor(masks)


def test_each_dice_against_a_plain_formula():
    logits, masks = blobs()
    counts = finetune.count_pixels(finetune.find_pixels(logits, 0.4, 5), masks)
    found = torch.sigmoid(logits).numpy() > 0.4
    found[found.sum((1, 2)) < 5] = False
    truth = masks.numpy()
    each = []
    for a, b in zip(found, truth):
        both = np.logical_and(a, b).sum()
        each.append(1.0 if not a.any() and not b.any() else 2 * both / (a.sum() + b.sum()))
    some = [dice for dice, b in zip(each, truth) if b.any()]
    both, either = (found & truth).sum(), found.sum() + truth.sum()
    off, either_off = (~found & ~truth).sum(), (~found).sum() + (~truth).sum()
    scores = finetune.dice_scores(counts, 144, 2000)
    assert len(some) < len(each) and any(dice == 1 for dice in each) and 0 in each
    assert scores["dice"][0] == pytest.approx(np.mean(some))
    assert scores["dice_all"][0] == pytest.approx(np.mean(each))
    assert scores["dice_official"][0] == pytest.approx(
        (2 * both / either + 2 * off / either_off) / 2
    )
    rng, draws = np.random.default_rng(5), []
    for _ in range(2000):
        rows = rng.integers(len(each), size=len(each))
        draws.append(
            [
                np.mean([each[i] for i in rows if truth[i].any()]),
                np.mean([each[i] for i in rows]),
                ((found & truth)[rows].sum() / (found[rows].sum() + truth[rows].sum()))
                + (~found & ~truth)[rows].sum() / ((~found[rows]).sum() + (~truth[rows]).sum()),
            ]
        )
    for values, expected in zip(scores.values(), np.array(draws).T, strict=True):
        ours, theirs = (np.percentile(x, [2.5, 97.5]) for x in (values[1:], expected))
        assert ours == pytest.approx(theirs, abs=0.02)
    empty = np.zeros((3, 4), int)
    assert np.isnan(finetune.dice_scores(empty, 9)["dice"][0])
    assert finetune.dice_scores(empty, 9)["dice_all"][0] == 1


def test_threshold_and_smallest_area_are_the_best_of_all():
    logits, masks = blobs(seed=3)
    chosen = finetune.choose_threshold(logits, masks)
    best = max(
        finetune.dice_scores(
            finetune.count_pixels(finetune.find_pixels(logits, t / 10, area), masks), 144
        )["dice_all"][0]
        for t in range(1, 10)
        for area in (0, 1, 2, 3, 5, 6, 8, 9, 12, 15)
    )
    assert chosen["dice"] == pytest.approx(best)
    counts = finetune.count_pixels(
        finetune.find_pixels(logits, chosen["threshold"], chosen["smallest"]), masks
    )
    assert finetune.dice_scores(counts, 144)["dice_all"][0] == pytest.approx(best)
    assert chosen["smallest"] > 0  # the noise in empty images makes it worth something


@pytest.fixture(scope="session")
def holes(tmp_path_factory):
    """Films of two shapes with a bright rectangle, or none, and its mask."""
    root = tmp_path_factory.mktemp("holes")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    rng, count = np.random.default_rng(0), 0
    for part, n in (("train_list", 24), ("val_list", 12), ("test_list", 12)):
        lines = []
        for i in range(n):
            name, count = f"{count:04d}", count + 1
            image = rng.integers(60, 110, (40, 40 + 20 * (i % 2))).astype(np.uint8)
            mask = np.zeros(image.shape, bool)
            if i % 3:
                y, x = rng.integers(2, 18, 2)
                mask[y : y + rng.integers(10, 20), x : x + rng.integers(10, 20)] = True
            image[mask] += 110
            Image.fromarray(image).save(root / "images" / f"{name}.bmp")
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
            lines.append(f"{name}.bmp")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def segment(root, out, **kwargs):
    options = dict(task="segment", data="csv", img_size=48, channels=8, min_crop=0.6)
    return config(root, out, **options | kwargs)


@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_a_segmentation_leaves_what_the_design_promises(holes, tmp_path, method, capsys):
    out = tmp_path / "run"
    result = finetune.finetune(segment(holes, out, method=method, lr=5e-3, steps=40))
    saved = json.loads((out / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["task"] == "segment" and saved["images_with_mask"] == 8
    assert "with batch norm, 48 x 48 pixels" in capsys.readouterr().out
    for name in ("dice", "dice_all", "dice_official"):
        low, high = saved[f"{name}_ci"]
        assert 0 <= low <= saved[name] <= high <= 1
    assert saved["dice"] > 0.5  # nothing but a bright rectangle is to be found
    model = "adapter.pt" if method == "lora" else "best.pt"
    for name in (model, "predictions.csv", "overlays.png", "curves.png", "last.pt"):
        assert (out / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["val_dice"])
    for name in ("val_dice", "threshold", "smallest"):
        assert saved[name] == best[name]
    rows = [
        [int(row[name]) for name in ("both", "predicted", "true")]
        for row in csv.DictReader((out / "predictions.csv").open())
    ]
    found, true = np.array(rows)[:, 1:].T
    assert saved["dice"] == pytest.approx(np.mean([2 * a / (b + c) for a, b, c in rows if c]))
    assert saved["area_error"] == pytest.approx(np.abs(found - true).mean())
    assert saved["area_correlation"] == pytest.approx(np.corrcoef(found, true)[0, 1])

    finetune.predict_folder(
        FinetuneConfig(
            predict=str(holes / "images"), weights=str(out), out=str(tmp_path / "p"), device="cpu"
        )
    )
    names, _ = data.read_list(holes / "test_list.txt")
    dices = []
    for name, (_, predicted, _) in zip(names, rows):
        mask = np.asarray(Image.open(tmp_path / "p/masks" / name.replace(".bmp", ".png")))
        truth = np.asarray(Image.open(holes / "masks" / name.replace(".bmp", ".png")))
        assert mask.shape == truth.shape and set(np.unique(mask)) <= {0, 255}
        assert bool(mask.any()) == (predicted > 0)
        assert (mask > 0).mean() == pytest.approx(predicted / 48**2, abs=0.01)
        if truth.any():
            dices.append(2 * (truth & (mask > 0)).sum() / (truth.sum() + (mask > 0).sum()))
    assert np.mean(dices) == pytest.approx(saved["dice"], abs=0.03)
    if method == "lora":  # the head is in the adapter, and merging keeps it
        lora.merge(lora.LoRAConfig(adapter=str(out / "adapter.pt")))
        films = torch.randn(2, 1, 48, 48)
        run, merged = (finetune.load_run(path)[0] for path in (out, out / "merged.pt"))
        torch.testing.assert_close(run(films), merged(films), atol=1e-5, rtol=1e-5)
        names = common.load_checkpoint(out / "adapter.pt")["adapter"]
        assert "head.fuse.1.running_var" in names and not any("fc1" in name for name in names)


@pytest.mark.parametrize("options", [{}, dict(lora=True, norm="group")], ids=["batch", "group"])
def test_a_segmentation_resumes_bit_for_bit(holes, tmp_path, monkeypatch, options):
    finetune.finetune(segment(holes, tmp_path / "whole", **options))
    interrupted(monkeypatch, segment(holes, tmp_path / "part", **options))
    assert common.load_checkpoint(tmp_path / "part/last.pt")["step"] == 2
    finetune.finetune(segment(holes, tmp_path / "part", resume=True, **options))
    a, b = (common.load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "part"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert ("head.fuse.1.running_mean" in a["model"]) == (not options)
    assert (tmp_path / "whole/predictions.csv").read_bytes() == (
        tmp_path / "part/predictions.csv"
    ).read_bytes()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_upernet_overfits_one_image(holes, norm):
    """To a Dice of 0.99, by the loss, the optimiser and the rate of a run. A batch norm needs
    images that differ: there it is mirrored too."""
    torch.manual_seed(0)
    masks = data.find_masks(holes / "masks", ["0001"], ["0001.bmp"])
    films = data.ImageSet([str(holes / "images/0001.bmp")], 48, masks=masks)
    pair = films[0][0][None]
    if norm == "batch":
        pair = torch.cat([pair, pair.flip(2), pair.flip(3), pair.flip(2, 3)])
    settings = segment(
        holes,
        "",
        optimizer="adamw",
        lr=5e-3,
        weight_decay=0.05,
        layer_decay=0.65,
        method="full",
        norm=norm,
        drop_path=0.0,
    )
    sizes = dict(img_size=48, patch_size=4, embed_dim=32, depth=3, num_heads=2)
    model = finetune.build_model(settings, sizes, 1).train()
    optimizer = finetune.make_optimizer(model, settings)
    images = data.normalize(pair[:, :1])
    for _ in range(150):
        optimizer.zero_grad()
        finetune.segmentation_loss(model(images), pair[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(images)[:, 0]
    counts = finetune.count_pixels(finetune.find_pixels(logits, 0.5), pair[:, 1] > 0.5)
    assert finetune.dice_scores(counts, 48**2)["dice"][0] > 0.99


def test_masks_of_any_batch_size_and_of_workers_are_equal(holes, tmp_path, monkeypatch):
    finetune.finetune(segment(holes, tmp_path, steps=20, lr=5e-3))
    model, saved = finetune.load_run(tmp_path)
    names, _ = data.read_list(holes / "test_list.txt")
    paths = [str(holes / "images" / name) for name in names]
    films, batches, found = data.ImageSet(paths, 48, masks=[None] * 12), data.eval_batches, {}
    for size, workers in ((16, 0), (1, 0), (5, 1)):
        monkeypatch.setattr(
            data, "eval_batches", lambda images, _, *rest, size=size: batches(images, size, *rest)
        )
        settings = segment(holes, tmp_path, workers=workers, mean=saved["mean"], std=saved["std"])
        found[size] = finetune.predict(model, films, settings, torch.device("cpu"))
    assert found[16].shape == (12, 48, 48) and found[16].std() > 0.1
    torch.testing.assert_close(found[1], found[16], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[5], found[16], atol=1e-4, rtol=1e-4)


def test_a_segmentation_is_trained_further_and_starts_from_a_classifier(holes, easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "labels", img_size=24))
    first = finetune.finetune(
        segment(holes, tmp_path / "a", weights=str(tmp_path / "labels"), img_size=None, lora=True)
    )
    ran = json.loads((tmp_path / "a/config.json").read_text())
    assert ran["img_size"] == 48 and first["lora_parameters"] > 0  # twice the classifier's
    finetune.finetune(
        segment(
            holes,
            tmp_path / "b",
            weights=str(tmp_path / "a"),
            img_size=None,
            channels=None,
            lora=True,
            lr=1e-9,
        )
    )
    a, b = (finetune.load_run(tmp_path / run)[0].state_dict() for run in "ab")
    assert torch.allclose(a["head.fuse.0.weight"], b["head.fuse.0.weight"], atol=1e-6)
    ran = json.loads((tmp_path / "b/config.json").read_text())
    assert (ran["img_size"], ran["channels"]) == (48, 8)


def test_compare_takes_segmentation(holes, tmp_path):
    rows = dict(weights=None, compare=True, methods="full,lora", ratios="100", seeds=2)
    finetune.compare(
        dataclasses.replace(segment(holes, tmp_path, steps=6), **rows, inits="scratch")
    )
    text = (tmp_path / "compare.md").read_text()
    results = [
        json.loads((tmp_path / f"csv-scratch-full-100-{seed}/result.json").read_text())
        for seed in (0, 1)
    ]
    assert "| test Dice |" in text and f"{np.mean([r['dice'] for r in results]):.3f}" in text
    assert "| csv | 100 | scratch | full | lora |" in text


def test_the_papers_segmentation_recipe_and_the_norm_of_small_batches(holes, tmp_path):
    base = {
        "model": {},
        "arguments": {name: mrm.BASE[name] for name in vit.ENCODER_SIZES if name != "in_chans"},
    }
    common.save_checkpoint(tmp_path / "base.pt", base)
    run = segment(
        holes,
        tmp_path,
        weights=str(tmp_path / "base.pt"),
        img_size=None,
        channels=None,
        batch_size=None,
        min_crop=None,
        steps=None,
        method="full",
        ratio=100,
    )
    filled = finetune.fill_recipe(run, ["mask"])[0]
    assert (filled.img_size, filled.lr, filled.layer_decay, filled.channels, filled.optimizer) == (
        512,
        2e-5,
        0.65,
        768,
        "adamw",
    )
    assert filled.norm == "batch"
    few = dataclasses.replace(run, batch_size=8)
    assert finetune.fill_recipe(few, ["mask"])[0].norm == "group"
    passes = dataclasses.replace(run, batch_size=16, accumulate=2)  # 8 images at once
    assert finetune.fill_recipe(passes, ["mask"])[0].norm == "group"
    with pytest.raises(common.InputError, match="--norm batch: expected --batch-size 2 or more"):
        finetune.fill_recipe(dataclasses.replace(run, batch_size=1, norm="batch"), ["mask"])
    optimizer = torch.optim.SGD([dict(params=[torch.zeros(1)], lr_scale=0.5)], lr=1)
    rates = []
    for step in range(10):
        finetune.set_rates(optimizer, segment(holes, "", lr=1.0, warmup=0.2, probe=0.0), step, 10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25, 0.5] + [0.5 * (10 - s) / 8 for s in range(2, 10)])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "masks/0026.png").unlink(), r"0026.png: no such mask, of the image"),
        (lambda root: Image.new("L", (41, 40)).save(root / "masks/0002.png"),
         r"0002.png: expected a mask of 40 x 40 pixels, as .*0002.bmp, found 41 x 40"),
        (lambda root: Image.linear_gradient("L").resize((60, 40)).save(root / "masks/0001.png"),
         r"0001.png: expected a mask of the values 0 and one other"),
        (lambda root: [Image.new("1", Image.open(path).size).save(path)
                       for path in sorted((root / "masks").iterdir())[36:]],
         "the test list: expected a mask that is not empty, found none"),
        (lambda root: [Image.new("1", Image.open(path).size).save(path)
                       for path in sorted((root / "masks").iterdir())[:24]],
         "the train list: expected a mask that is not empty, found none"),
    ],
)  # fmt: skip
def test_bad_masks_are_one_line_with_their_name(holes, tmp_path, spoil, message):
    shutil.copytree(holes, tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises(common.InputError, match=message):
        finetune.finetune(segment(tmp_path / "data", tmp_path / "out"))
    assert not (tmp_path / "out/result.json").exists()
    with pytest.raises(common.InputError, match="--masks: expected --task segment"):
        finetune.finetune(config(holes, tmp_path / "out", masks="masks"))


def test_the_demo_has_no_files_for_films_without_pneumothorax(tmp_path):
    import demo

    root = demo.write_demo_records(tmp_path / "demo", patients=60, size=32)
    parts, classes = finetune.read_lists(
        finetune.fill_cell(FinetuneConfig(task="segment", root=str(root), ratio=100))
    )
    part, where = parts["test"], data.read_lines(root / "classes.txt")
    column = [name for _, name in where].index("Pneumothorax")
    assert classes == ["mask"]
    assert len(parts["train"].names) <= 2 * sum(map(bool, parts["train"].masks))
    assert [mask is not None for mask in part.masks] == (part.labels[:, column] == 1).tolist()
    name = next(name for name, mask in zip(part.names, part.masks) if mask)
    (root / "masks" / name).unlink()
    with pytest.raises(common.InputError, match=f"{name}: no such mask"):
        finetune.read_lists(finetune.fill_cell(FinetuneConfig(task="segment", root=str(root))))


def test_training_leaves_out_what_is_known_to_be_empty_beyond_the_share(capsys):
    masks = [str(i) if i % 5 == 0 else None for i in range(20)]
    names = [f"n{i}" for i in range(20)]
    part = finetune.Part(names, names, torch.arange(20)[:, None], masks=masks)
    for share, expected in ((1.0, 8), (2.0, 12), (0.5, 6), (9.0, 20), (0.0, 4)):
        left = finetune.leave_out_empty(part, share)
        assert len(left.names) == expected and sum(map(bool, left.masks)) == 4
        assert left.names == left.paths == [f"n{i}" for i in left.labels[:, 0].tolist()]
        assert [masks[i] for i in left.labels[:, 0].tolist()] == left.masks
    assert "12 of 16 training images without a mask are left out" in capsys.readouterr().out
    with pytest.raises(
        common.InputError, match="the train list: expected a mask that is not empty"
    ):
        finetune.leave_out_empty(dataclasses.replace(part, masks=[None] * 20), 1.0)


def test_two_processes_segment_with_the_statistics_that_are_saved(holes, tmp_path):
    """A batch norm sees other images in each process; what both predict is what the saved model
    says."""
    options = (
        "--task segment --data csv --img-size 48 --channels 8 --norm batch --steps 6 --lr 5e-3"
    )
    options += " --evaluations 2 --batch-size 4 --device cpu --weights scratch"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(REPOSITORY / "finetune.py"), "--root", str(holes), "--out", str(tmp_path)]
    done = subprocess.run(
        command + options.split(),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model, saved = finetune.load_run(tmp_path)
    names, _ = data.read_list(holes / "test_list.txt")
    masks = data.find_masks(holes / "masks", [name[:4] for name in names], names)
    films = data.ImageSet([str(holes / "images" / name) for name in names], 48, masks=masks)
    settings = segment(holes, tmp_path, mean=saved["mean"], std=saved["std"])
    logits = finetune.predict(model, films, settings, torch.device("cpu"))
    truth = torch.stack([pair[1] > 0.5 for pair, _ in films])
    chosen = saved["segment"]["threshold"], saved["segment"]["smallest"]
    counts = finetune.count_pixels(finetune.find_pixels(logits, *chosen), truth)
    rows = list(csv.reader((tmp_path / "predictions.csv").open()))[1:]
    assert [row[0] for row in rows] == names
    np.testing.assert_allclose(np.array([row[1:] for row in rows], int).T, counts, atol=3)


def deep_records(root, tops):
    """Records of 16-bit images; `tops` are the largest values of the three lists."""
    rng, count = np.random.default_rng(0), 0
    (root / "images").mkdir(parents=True)
    for part, top in tops.items():
        lines = []
        for i in range(8):
            film = rng.integers(0, top, (32, 32)).astype(np.uint16)
            film[0, 0] = top
            Image.fromarray(film).save(root / "images" / f"{count}.png")
            lines.append(f"{count}.png {i % 2}")
            count += 1
        (root / f"{part}_list.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("A\n")
    return root


def test_a_run_has_one_scale_for_16_bits_and_prediction_takes_it(tmp_path, monkeypatch):
    """The scale of the list with the brightest image, 4095, serves all lists, though the others
    alone would have 255 and 1023. A dark folder is not brightened on its own."""
    root = deep_records(tmp_path / "deep", {"train": 200, "val": 3000, "test": 900})
    options = dict(data="csv", method="linear", steps=1, evaluations=1, mean=0.5, std=0.2)
    sets, made = [], data.ImageSet

    def kept(*args, **kwargs):
        sets.append(made(*args, **kwargs))
        return sets[-1]

    monkeypatch.setattr(data, "ImageSet", kept)
    finetune.finetune(config(root, tmp_path / "run", **options))
    assert [images.deep for images in sets] == [4095] * 3
    images = next(images for images in sets if images.path(0).endswith("/16.png"))
    with Image.open(root / "images/16.png") as film:
        assert abs(images[0][0].mean().item() - np.array(film).mean() / 4095) < 0.003
    assert common.load_checkpoint(tmp_path / "run/best.pt")["deep"] == 4095
    rows = {}
    for name in ("images", "images/20.png"):  # the folder, and one image of it alone
        out = tmp_path / name.replace("/", "-")
        finetune.predict_folder(
            FinetuneConfig(
                weights=str(tmp_path / "run"), predict=str(root / name), out=str(out), device="cpu"
            )
        )
        found = data.read_csv(out / "predictions.csv", ["image", "A"])
        rows[name] = {image: float(value) for _, image, value in found}
    tested = list(data.read_csv(tmp_path / "run/predictions.csv", ["image", "A"]))
    assert len(tested) == 8
    for _, name, value in tested:  # what the test list scored is what prediction gives
        assert rows["images"][name] == pytest.approx(float(value), abs=1e-6)
    assert rows["images/20.png"] == {"20.png": pytest.approx(rows["images"]["20.png"], abs=1e-6)}
    Image.fromarray(np.full((32, 32), 5000, np.uint16)).save(tmp_path / "bright.png")
    with pytest.raises(common.InputError, match=r"bright\.png: expected values up to 4095"):
        finetune.predict_folder(
            FinetuneConfig(
                weights=str(tmp_path / "run"),
                predict=str(tmp_path / "bright.png"),
                out=str(tmp_path / "out"),
                device="cpu",
            )
        )


def test_a_run_on_8_bits_leaves_the_scale_of_16_bits_open(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", method="linear", steps=1))
    assert common.load_checkpoint(tmp_path / "run/best.pt")["deep"] is None


def test_one_image_that_is_none_is_refused(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", method="linear", steps=1))
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(common.InputError, match=r"a\.png: expected a complete PNG"):
        finetune.predict_folder(
            FinetuneConfig(
                weights=str(tmp_path / "run"),
                predict=str(tmp_path / "a.png"),
                out=str(tmp_path / "out"),
                device="cpu",
            )
        )


@pytest.mark.parametrize("options", [{"method": "lora", "dora": True}, {"method": "full"}])
def test_a_run_with_checkpointed_blocks_is_the_run_without(easy, tmp_path, options, monkeypatch):
    """With LoRA's dropout and drop path, whose random numbers are drawn again."""
    options = dict(weights="scratch-mini", steps=3, drop_path=0.5, dropout=0.5) | options
    blocks, forward = [], vit.Attention.forward
    monkeypatch.setattr(
        vit.Attention, "forward", lambda self, x, mask: blocks.append(1) or forward(self, x, mask)
    )
    results, calls = [], []
    for name in ("plain", "again"):
        again = {"checkpoint_activations": name == "again"}
        finetune.finetune(config(easy, tmp_path / name, **options | again))
        results.append(common.load_checkpoint(tmp_path / name / "last.pt"))
        calls.append(len(blocks))
    assert calls[1] - calls[0] == calls[0] + 3 * 4  # four blocks, one more time in each of 3 steps
    first, second = (result["model"] for result in results)
    assert results[0]["history"][-1]["loss"] == results[1]["history"][-1]["loss"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_image_of_two_parts_is_warned_of(easy, tmp_path, capsys):
    """Under another name: with the folder, and without its ending."""
    root = tmp_path / "root"
    shutil.copytree(easy, root)
    name = (root / "train_list.txt").read_text().split()[0]
    lines = (root / "test_list.txt").read_text().splitlines()
    lines[0] = f"{name.removesuffix('.png')} {lines[0].split(maxsplit=1)[1]}"
    (root / "test_list.txt").write_text("\n".join(lines))
    finetune.read_lists(config(easy, tmp_path / "a", ratio=100))
    assert "several parts" not in capsys.readouterr().out
    finetune.read_lists(config(root, tmp_path / "a", ratio=100))
    assert "WARNING: 1 image files stand in several parts" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--img-size 96", "--test-side 96", "--raw-dicom"])
def test_predict_refuses_what_it_would_ignore(tmp_path, option):
    words = f"--predict {tmp_path} --weights {tmp_path} {option}".split()
    with pytest.raises(common.InputError, match=f"without {option.split()[0]}"):
        finetune.predict_folder(common.parse_config(FinetuneConfig, words))
