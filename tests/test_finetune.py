"""finetune.py: AUROC against scikit-learn, runs of every method, resuming, prediction, and one line
for each bad input."""

import csv
import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from support import script as common
from support.script import InputError
from support.weights import encoder_sizes
import data
import finetune
import lora
import mrm
from support import recipes
import vit
from finetune import FinetuneConfig
from test_kernels import CUDA, FAILURES, needs_triton, stand_in
from test_script import in_processes

REPOSITORY = Path(__file__).parents[1]


def scored(n=200, k=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < 0.3).astype(np.float32)
    return np.round(rng.normal(size=(n, k)) + labels, 1), labels  # rounded: many ties


def chosen_by(scores, labels):
    """The number by which a run chooses on val."""
    scores, part = torch.tensor(scores), SimpleNamespace(labels=torch.tensor(labels).double())
    return finetune.score_labels(scores.double(), part)["val_auroc"]


def test_auroc_against_scikit_learn():
    scores, labels = scored()
    labels[:, 1] = 0  # undefined
    mean, (low, high), per_class = finetune.auroc(scores, labels)
    expected = [roc_auc_score(labels[:, c], scores[:, c]) for c in (0, 2)]
    assert per_class[1] is None
    assert [per_class[0][0], per_class[2][0]] == pytest.approx(expected, abs=1e-12)
    assert mean == pytest.approx(np.mean(expected)) == chosen_by(scores, labels)
    assert low < mean < high and per_class[0][1] < per_class[0][0] < per_class[0][2]
    assert np.isnan(finetune.auroc(scores, 0 * labels)[0])


def test_auroc_worked_on_paper():
    """Positives 3 and 1, negatives 2 and 1: of four pairs two are won, one lost and one
    tied: 2.5 / 4."""
    scores, labels = np.array([[3.0], [1.0], [2.0], [1.0]]), np.array([[1.0], [1.0], [0.0], [0.0]])
    assert finetune.auroc(scores, labels)[0] == chosen_by(scores, labels) == 0.625
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


def test_the_interval_of_the_mean_counts_every_draw():
    """Nearly every draw leaves one of these rare classes without a positive."""
    labels, scores = np.eye(180, 14), np.random.default_rng(0).normal(size=(180, 14))
    mean, (low, high), _ = finetune.auroc(scores, labels)
    assert low < mean - 0.05 and high > mean + 0.05
    with warnings.catch_warnings(action="error"):  # of one class such a draw says nothing
        _, _, draws, means = finetune.bootstrap_auroc(scores[:, :1], labels[:, :1])
    assert np.isnan(means).any() and np.array_equal(draws[0], means, equal_nan=True)


def filled(**options):
    """The configuration that a run of a random start with these options works by."""
    config = finetune.fill_cell(FinetuneConfig(weights="scratch", **options))
    return finetune.take_recipe(config, *finetune.starting_weights(config), 500)[0]


def test_mean_and_std_zero_included():
    assert filled().mean is filled().std is None  # of the tiny preset: each image's own
    assert (filled(mean=0.0, std=0.5).mean, filled(mean=0.0, std=0.5).std) == (0.0, 0.5)
    with pytest.raises(InputError, match=r"--std: expected a number in \(0, inf\), found 0"):
        filled(mean=0.0, std=0.0)


def test_typed_options_win_over_the_recipe():
    typed = dict(lr=0.7, rank=6, batch_size=3, optimizer="sgd", layer_decay=0.3, weight_decay=0.0,
                 warmup=0.0, min_crop=0.9, drop_path=0.5, epochs=2.5)
    ran = filled(data="nih", method="lora", ratio=10, **typed)
    assert {name: getattr(ran, name) for name in typed} == typed and ran.steps is None
    assert (ran.recipe, ran.img_size, ran.num_heads) == ("small", 48, 4)
    assert (filled(lora=True).method, filled().ratio, filled(data="nih").ratio) == ("lora", 10, 100)
    with pytest.raises(InputError, match="--lora and --method: .* found --method full"):
        filled(lora=True, method="full")
    with pytest.raises(InputError, match="--rank and --alpha: expected --lora"):
        filled(rank=8)


def test_which_weights_they_are_is_read_from_the_file_or_asked_for(tmp_path):
    """CXR-MAE's weights under MRM's recipe would see wrongly normalised pixels in silence."""
    encoder = vit.ViT(img_size=32, patch_size=16, depth=1).state_dict()
    mrms = encoder | {"bert_encoder.embeddings.weight": torch.zeros(2, 2)}
    for name, tensors in (("MRM", encoder), ("CXR-MAE", mrms)):  # names that mislead
        common.save_checkpoint(tmp_path / f"{name}.pth", {"model": tensors})

    def recipe(name, **options):
        asked = FinetuneConfig(weights=str(tmp_path / f"{name}.pth"), ratio=1, method="lora",
                               **options)
        return finetune.take_recipe(asked, *finetune.starting_weights(asked), 500)[0]

    ran = recipe("CXR-MAE", data="nih")
    assert (ran.recipe, ran.optimizer, ran.lr, ran.mean) == ("mrm", "sgd", 0.05, mrm.MEAN)
    with pytest.raises(InputError, match="MRM.pth: expected --recipe mrm.* more.cxrmae"):
        recipe("MRM", data="nih")
    assert recipe("MRM", data="nih", recipe="medpeft").optimizer == "sgd"
    assert recipe("MRM", data="csv").recipe == "small"


def optimizer_of(model, **options):
    given = dict(optimizer="adamw", weight_decay=0.1, layer_decay=0.5, lr=1.0)
    return finetune.optimizer_by_layer(model, FinetuneConfig(**given | options))


def test_layer_decay_and_no_decay_on_biases():
    model = vit.ViT(16, 4, 1, 24, 2, 3, num_classes=2)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: (g["lr_scale"], g["weight_decay"])
             for g in optimizer_of(model).param_groups for p in g["params"]}
    expected = {"head.weight": (1, 0.1), "head.bias": (1, 0), "blocks.1.mlp.fc1.weight": (0.5, 0.1),
                "blocks.0.norm1.bias": (0.25, 0), "patch_embed.proj.bias": (0.125, 0),
                "fc_norm.weight": (1, 0), "cls_token": (0.125, 0), "pos_embed": (0.125, 0)}
    assert expected.items() <= scale.items() and set(scale) == set(names.values())
    decayed = {name for name, p in model.named_parameters() if mrm.decays(name, p)}
    assert {name for name in scale if scale[name][1]} == decayed  # pretraining's rule
    model.blocks.requires_grad_(False)
    groups = optimizer_of(model, optimizer="sgd", weight_decay=0.0, layer_decay=1.0).param_groups
    assert all(g["momentum"] == 0.9 and g["lr_scale"] == 1 for g in groups)
    trained = {names[id(p)] for g in groups for p in g["params"]}
    assert trained == {name for name in names.values() if not name.startswith("blocks")}


def square(rng, positive):
    image = rng.integers(60, 120, (32, 32)).astype(np.uint8)
    if positive:
        y, x = rng.integers(2, 18, 2)
        image[y:y + 12, x:x + 12] += 100
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
    rows = "".join(f"{i:04d}.png,{i}\n" for i in range(count))
    (root / "patients.csv").write_text("image_path,patient_id\n" + rows)
    return root


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def predictions(folder):
    return list(csv.DictReader((folder / "predictions.csv").open()))


def predict(images, run, out, **options):
    given = dict(predict=str(images), weights=str(run), out=str(out), device="cpu")
    finetune.predict_folder(FinetuneConfig(**given | options))
    return {row["image"]: row for row in predictions(out)}


def config(root, out, **options):
    given = dict(root=str(root), out=str(out), weights="scratch", steps=4, evaluations=2,
                 device="cpu", batch_size=16, probe=0.0)
    return FinetuneConfig(**given | options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fresh_model():
    """The state of the model that a run of a random start begins with."""
    torch.manual_seed(0)
    sizes = encoder_sizes({}, {"sizes": mrm.MODELS["tiny"]}, "")
    return finetune.build_model(filled(), sizes, ["Square", "Third"]).state_dict()


@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_a_run_leaves_what_the_design_promises(easy, tmp_path, method, capsys):
    result = finetune.finetune(config(easy, tmp_path, method=method))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["auroc"] == result["auroc"] and saved["auroc_per_class"]["Third"] is None
    assert {"auroc_ci", "split", "seconds", "images_per_second",
            "share_waiting_for_data"} <= saved.keys()
    output = capsys.readouterr().out
    assert "Third" in output and "undefined: one label only" in output
    model = "adapter.pt" if method == "lora" else "best.pt"
    for name in ("config.json", "log.jsonl", "last.pt", model, "predictions.csv", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    rows = predictions(tmp_path)
    labels, scores = [int(r["label Square"]) for r in rows], [float(r["Square"]) for r in rows]
    assert len(rows) == 24
    assert saved["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=0.02)
    again = predict(easy / "images", tmp_path, tmp_path / "p")
    assert len(again) == 112
    assert [float(again[r["image"]]["Square"]) for r in rows] == pytest.approx(scores, abs=2e-5)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert max(line["val_auroc"] for line in lines) == saved["val_auroc"]
    assert saved["images"] == {"train": 64, "val": 24, "test": 24} and saved["method"] == method
    ran = json.loads((tmp_path / "config.json").read_text())
    recipe = recipes.SMALL[method] | recipes.FEW[method] | dict(method=method, ratio=10)
    recipe |= dict(steps=4, batch_size=16, probe=0.0, evaluations=2)
    assert recipe.items() <= ran.items()
    assert ran == common.load_checkpoint(tmp_path / "last.pt")["config"]
    assert (saved["steps"], saved["batch_size"], saved["lr"]) == (4, 16, recipe["lr"])
    lora, head = saved["lora_parameters"], saved["head_parameters"]
    assert head == 2 * 128 + 2 * 128 + 2
    assert lora == (2 * 2 * (128 * 4 + 4 * 128) if method == "lora" else 0)  # q, v of two blocks
    trainable = {"full": saved["total_parameters"], "lora": lora + head, "linear": head}
    assert saved["trainable_parameters"] == trainable[method]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("method, lr", [("full", 3e-3), ("lora", 3e-2)])
def test_overfits_one_batch(method, lr):
    """The second label, which nothing shows, has to be learned by heart."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    squares = np.stack([square(rng, i % 2) for i in range(16)])
    images = torch.from_numpy(squares).float()[:, None] / 128 - 1
    labels = torch.stack([torch.arange(16) % 2, torch.randint(2, (16,))], 1).float()
    sizes = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=4)
    options = FinetuneConfig(method=method, dropout=0.0, lr=lr, layer_decay=1.0, rank=4)
    options = common.fill(options, recipes.SMALL[method])
    model = finetune.build_model(options, sizes, ["a", "b"])
    optimizer = finetune.optimizer_by_layer(model, options)
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # chance is 0.69


def test_full_fine_tuning_learns(easy, tmp_path):
    result = finetune.finetune(config(easy, tmp_path, steps=None, epochs=15.0, lr=2e-3, ratio=100))
    assert result["steps"] == 60
    assert result["auroc_per_class"]["Square"] > 0.9


@pytest.mark.parametrize("options", [
    dict(method="lora"), dict(method="full", optimizer="sgd", lr=0.01), dict(method="linear")],
    ids=["lora", "full", "linear"])
def test_resume_is_bit_identical(easy, tmp_path, stopped, options):
    whole = finetune.finetune(config(easy, tmp_path / "whole", **options))
    stopped(finetune.finetune, config(easy, tmp_path / "part", **options))
    assert common.load_checkpoint(tmp_path / "part/last.pt")["step"] == 2
    assert not (tmp_path / "part/result.json").exists()
    part = finetune.finetune(config(easy, tmp_path / "part", resume=True, **options))
    for name in whole.keys() - {"images_per_second", "share_waiting_for_data", "seconds"}:
        assert part[name] == whole[name], name
    a, b = (common.load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "part"))
    assert a["step"] == b["step"] == 4
    assert {"sizes", "mean", "std", "trained_on"} <= a.keys()  # it may be the start of another run
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    a, b = (tmp_path / run / "predictions.csv" for run in ("whole", "part"))
    assert a.read_bytes() == b.read_bytes()
    assert [line["step"] for line in log_of(tmp_path / "part")] == [2, 4]
    # Of a finished run: it is tested again
    again = finetune.finetune(config(easy, tmp_path / "part", resume=True, **options))
    assert again["auroc"] == whole["auroc"]


@pytest.fixture(scope="module")
def finished(easy, tmp_path_factory):
    """The folder of a LoRA run that tests read and never change."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finetune.finetune(config(easy, folder, method="lora"))
    return folder


@pytest.mark.parametrize("other", [
    dict(method="linear"), dict(rank=2), dict(seed=3), dict(min_crop=0.5), dict(lr=0.1),
    dict(mean=0.0, std=0.5), dict(flip=True), dict(white=900)], ids=lambda other: next(iter(other)))
def test_resume_refuses_another_runs_state(easy, finished, other):
    before, name = contents(finished), next(iter(other)).replace("_", "-")
    flag = "--lr" if name == "method" else f"--{name}"  # a method has its own rate
    expected = rf"last\.pt: expected {flag} .*, as asked for now, found a run with {flag}"
    with pytest.raises(InputError, match=expected):
        finetune.finetune(config(easy, finished, **dict(method="lora", resume=True) | other))
    with pytest.raises(InputError):
        finetune.finetune(config(easy, finished, weights=str(finished / "none.pt")))
    assert before == contents(finished)
    finetune.load_run(finished)  # the weights of the finished run are still there


def test_resume_refuses_weights_that_have_changed(easy, tmp_path):
    weights = rgb_weights(tmp_path / "rgb.pt")
    options = dict(method="lora", weights=weights, num_heads=4)
    finetune.finetune(config(easy, tmp_path / "run", **options))
    state = common.load_checkpoint(weights)["model"]
    common.save_checkpoint(weights, {"model": {name: x + 0.1 for name, x in state.items()}})
    with pytest.raises(InputError, match=r"last\.pt: expected a run with the same weights as now"):
        finetune.finetune(config(easy, tmp_path / "run", resume=True, **options))


def test_two_processes_predict_every_test_image_once(easy, tmp_path):
    """Under torchrun: one run folder, and what the processes gathered is what one process predicts
    with the saved model."""
    options = "--steps 4 --evaluations 2 --batch-size 4 --device cpu --lora --weights scratch"
    where = ["--root", easy, "--out", tmp_path / "run"]
    in_processes(2, "finetune.py", *options.split(), *where)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2, 4]
    rows = list(csv.reader((tmp_path / "run" / "predictions.csv").open()))[1:]
    names, _ = data.read_list(easy / "test_list.txt")
    assert [row[0] for row in rows] == names
    model, saved = finetune.load_run(tmp_path / "run")
    test_set = data.ImageSet([str(easy / "images" / name) for name in names], model.img_size)
    with torch.no_grad():
        images, _ = test_set[range(len(test_set)), 0]
        expected = model(data.normalize(images, saved["mean"], saved["std"])).sigmoid()
    found = torch.tensor([[float(number) for number in row[1:3]] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_bfloat16_follows_float32(easy, tmp_path):
    losses = []
    for dtype in ("fp32", "bf16"):
        options = dict(method="lora", steps=10, evaluations=1, dtype=dtype)
        losses.append(finetune.finetune(config(easy, tmp_path / dtype, **options))["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]


def rgb_weights(path):
    """As published: three channels, and no sizes beside the tensors."""
    torch.manual_seed(7)
    common.save_checkpoint(path, {"model": vit.ViT(64, 16, 3, 64, 2, 4).state_dict()})
    return str(path)


def test_a_run_and_its_merged_adapter_predict_what_it_scored(easy, tmp_path):
    """The run is of another size than its weights, and pools regions."""
    options = dict(weights=rgb_weights(tmp_path / "rgb.pt"), img_size=32, num_heads=4, lr=0.02,
                   white=65535)
    finetune.finetune(config(easy, tmp_path / "run", method="lora", pool=2, **options))
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt")))
    adapter, merged = (common.load_checkpoint(tmp_path / f"run/{name}.pt")
                       for name in ("adapter", "merged"))
    assert merged["white"] == 65535 and merged["trained_on"] == adapter["trained_on"]
    for run in ("run", "run/merged.pt"):
        found = predict(easy / "images", tmp_path / run, tmp_path / "p")
        for row in predictions(tmp_path / "run"):
            again = float(found[row["image"]]["Square"])
            assert again == pytest.approx(float(row["Square"]), abs=2e-5)
    saved = common.load_checkpoint(tmp_path / "run/adapter.pt")["adapter"]
    assert any(tensor.any() for name, tensor in saved.items() if name.endswith("lora_B"))
    weights = str(tmp_path / "run/merged.pt")
    finetune.finetune(config(easy, tmp_path / "next", method="linear", weights=weights))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_probe_trains_the_head_alone_first(easy, tmp_path, method, monkeypatch):
    moved, before = [], {}
    check, build = common.check_finite, finetune.build_model

    def look(step, *args, **values):
        """Runs before the update of `step`: notes which parts the updates so far have changed."""
        for name, tensor in finetune.trained_tensors(before["model"]).items():
            if not torch.equal(tensor, before.setdefault(name, tensor)):
                moved.append((step, "head" if name.startswith(("head", "fc_norm")) else "blocks"))
        return check(step, *args, **values)

    monkeypatch.setattr(finetune, "build_model",
                        lambda *args: before.setdefault("model", build(*args)))
    monkeypatch.setattr(finetune, "check_finite", look)
    finetune.finetune(config(easy, tmp_path, method=method, steps=10, probe=0.5, warmup=0))
    first = {part: min(step for step, what in moved if what == part) for part in ("head", "blocks")}
    assert first == {"head": 2, "blocks": 7}  # updates 1 to 5 were the head's


def test_rates_with_and_without_a_probe(monkeypatch):
    """Two cosines with a warm-up each, by the formula written out."""
    monkeypatch.setattr(finetune, "PROBE_LR", 0.1)
    settings = FinetuneConfig(lr=0.2, probe=0.5, steps=40, warmup=0.1, layer_decay=0.5,
                              optimizer="adamw", weight_decay=0.0)
    model = vit.ViT(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    optimizer = finetune.optimizer_by_layer(model, settings)

    def rate(parameter):
        return next(group["lr"] for group in optimizer.param_groups
                    if any(parameter is own for own in group["params"]))

    def cosine(place, peak):
        return 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * place)) / 2

    late = cosine(9 / 18, 0.2)
    for step, head, block in ((0, 0.05, 0), (1, 0.1, 0), (11, cosine(9 / 18, 0.1), 0),
                              (20, 0.1, 0.05), (31, late, 0.5 * late)):
        finetune.set_rates(optimizer, settings, step, 40)
        found = rate(model.head.weight), rate(model.blocks[0].mlp.fc1.weight)
        assert found == pytest.approx((head, block), rel=1e-6), step


def test_a_table_trains_and_its_split_is_written_down(easy, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(easy / "images", root / "films")
    names, labels = data.read_list(easy / "train_list.txt")
    rows = [f"films/{n},{int(y[0])},{int(y[1])}" for n, y in zip(names, labels)]
    (root / "labels.csv").write_text("\n".join(["image,Square,Third", *rows]) + "\n")
    run = FinetuneConfig(data="csv", root=str(root), weights="scratch", lora=True, steps=4,
                         out=str(tmp_path / "o"))
    result = finetune.finetune(run)
    assert sum(result["images"].values()) == len(names) and "Square" in result["auroc_per_class"]
    written = list(csv.DictReader((tmp_path / "o/split.csv").open()))
    counts = {part: sum(row["split"] == part for row in written) for part in result["images"]}
    assert counts == result["images"]
    finetune.finetune(dataclasses.replace(run, resume=True, steps=6))


def test_a_run_warns_of_test_films_that_were_trained_on(easy, tmp_path, capsys):
    root = shutil.copytree(easy, tmp_path / "easy")  # test images: 88 to 111
    rows = "".join(f"{i:04d}.png,{i // 2}\n" for i in range(112))
    (root / "patients.csv").write_text("image_path,patient_id\n" + rows)
    rows = "".join(f"{i:04d}.png,no square\n" for i in [*range(60), 88, 90, 91, *range(64, 80)])
    (root / "training.csv").write_text("image_path,report_content\n" + rows)
    options = dict(root=str(root), steps=1, device="cpu", holdout=8)
    mrm.pretrain(mrm.MRMConfig(out=str(tmp_path / "m"), **options))

    def warned(out, weights):
        capsys.readouterr()
        options = dict(weights=weights, method="lora", steps=1, evaluations=1)
        finetune.finetune(config(root, tmp_path / out, **options))
        return "4 of 24 test images are of a patient" in capsys.readouterr().err

    assert warned("lora", str(tmp_path / "m")) and not warned("scratch", "scratch")
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "lora/adapter.pt")))
    assert warned("on", str(tmp_path / "lora/merged.pt"))  # it names what was learned before, too


def table(folder, out, **options):
    defaults = dict(weights=None, compare=True, methods="full,linear", ratios="10", seeds=2)
    return dataclasses.replace(config(folder, out, **defaults, inits="scratch"), **options)


def test_compare_writes_a_table_and_keeps_finished_cells(easy, tmp_path, monkeypatch):
    easy = shutil.copytree(easy, tmp_path / "root")
    finetune.compare(table(easy, tmp_path))
    first = (tmp_path / "compare.md").read_text()
    assert first.count("| scratch | full | 10 |") == 1
    assert "| 10 | scratch linear | scratch full |" in first  # the later row less the earlier one
    ran = json.loads((tmp_path / "scratch-full-10-1/config.json").read_text())
    assert dict(steps=4, batch_size=16, seed=1, method="full").items() <= ran.items()
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "finetune", None)  # nothing runs again
        finetune.compare(table(easy, tmp_path))
        finetune.compare(table(easy, tmp_path, methods="linear", seeds=1, workers=1))
    for other in (dict(steps=5), dict(steps=None), dict(lr=0.5), dict(flip=True)):
        flag = "--" + next(iter(other))
        expected = rf"config.json: expected {flag} .*found a run with {flag}"
        with pytest.raises(InputError, match=expected):
            finetune.compare(table(easy, tmp_path, **other))
    finetune.compare(table(easy, tmp_path))
    assert (tmp_path / "compare.md").read_text() == first
    spoil_list(easy, (easy / "train_10.txt").read_text().replace(" 1 ", " 0 ", 1))
    with pytest.raises(InputError, match="full-10-0: expected a run of the same data as now"):
        finetune.compare(table(easy, tmp_path))


def test_compare_keeps_finished_cells_of_the_demos_weights(easy, tmp_path, monkeypatch):
    """Each seed has its own pretraining, of records or of images alone, once."""
    made = []

    def pretrain(config):
        made.append((config.out, config.seed, config.image_only, config.root))
        model = vit.ViT(**encoder_sizes({}, {"sizes": mrm.MODELS["tiny"]}, "")).state_dict()
        common.save_checkpoint(Path(config.out, "best.pt"), {"model": model})
        common.write_json(Path(config.out, "result.json"), {})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mrm, "pretrain", pretrain)
    cells = table(easy, "c", inits="mrm,image-only", methods="linear")
    finetune.compare(cells)
    root = str(easy)
    assert made == [("runs/mrm-demo", 0, False, root), ("runs/mrm-demo-1", 1, False, root),
                    ("runs/image-only-demo", 0, True, root),
                    ("runs/image-only-demo-1", 1, True, root)]
    text = Path("c/compare.md").read_text()
    assert text.count("| image-only | linear | 10 |") == text.count("| mrm | linear | 10 |") == 1
    finetune.finetune(config(easy, "alone", weights=None, steps=1))  # it finds the first
    assert json.loads(Path("alone/config.json").read_text())["weights"] == "runs/mrm-demo"
    monkeypatch.setattr(finetune, "finetune", None)  # nothing runs again
    finetune.compare(cells)
    assert len(made) == 4
    common.save_checkpoint("runs/image-only-demo/best.pt", {"model": {}})
    with pytest.raises(InputError, match="only-linear-10-0: expected a run of the same weights"):
        finetune.compare(cells)


def spoil_list(root, text, part="train_10"):
    (root / f"{part}.txt").write_text(text)


def spoil_weights(root, state):
    common.save_checkpoint(root / "bad.pt", state)


ADAPTER = {"adapter": {}, "lora": {},
           "sizes": dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)}
BAD = {  # what spoils a folder, options, message
    "missing image": (lambda r: (r / "images/0003.png").unlink(), {},
                      r"train_10\.txt.*4.*0003\.png"),
    "truncated image": (lambda r: os.truncate(r / "images/0003.png", 100), {}, r"0003\.png"),
    "no positive": (lambda r: spoil_list(r, "0000.png 0 0\n0001.png 0 0\n", "val_list"), {},
                    "the val list: expected both labels"),
    "no class has both labels": (lambda r: spoil_list(r, "0000.png 1 1\n0001.png 1 1\n"), {},
                                 "the train list: expected both labels"),
    "other classes": (lambda r: (r / "classes.txt").write_text("Square\n"), {},
                      "expected 1 labels a line"),
    "no ViT": (lambda r: spoil_weights(r, {"model": {"x": torch.ones(1)}}), {"weights": "bad.pt"},
               r"bad\.pt: expected a ViT"),
    "only an adapter": (lambda r: spoil_weights(r, ADAPTER), {"weights": "bad.pt"},
                        r"bad\.pt: expected a ViT"),
    "missing checkpoint": (lambda r: None, {"weights": "none.pt"}, r"none\.pt: no such checkpoint"),
    "unwritable folder": (lambda r: (r / "file").write_text(""), {"out": "file/run"}, "file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(easy, tmp_path, case):
    root = shutil.copytree(easy, tmp_path / "root")
    spoil, options, message = BAD[case]
    spoil(root)
    paths = {name: str(root / value) for name, value in ({"out": "run"} | options).items()}
    with pytest.raises(InputError, match=message) as error:
        finetune.finetune(config(root, **paths))
    assert "\n" not in str(error.value)
    assert not list(root.rglob("*.tmp")) and not (root / "run").exists()


@pytest.mark.parametrize("options, message", [
    (dict(ratio=5), "train_5.txt: no such list"),
    (dict(evaluations=0), r"--evaluations: expected a number in \[1, inf\), found 0"),
    (dict(steps=-1), r"--steps: expected a number in \[1, inf\), found -1"),
    (dict(epochs=1.0), "--steps and --epochs: expected one"),
    (dict(img_size=33), "img_size 33 must be a multiple"),
    (dict(mean=0.0), "--mean and --std: expected both, or none"),
    (dict(std=0.5), "--mean and --std: expected both, or none"),
    (dict(method="lora", rank=-1), r"--rank: expected a number in \[1, inf\), found -1"),
    (dict(split="covid1"), "no such list, which --data demo --split covid1"),
    (dict(lr=1e30, steps=6, evaluations=6), "expected finite scores"),
    (dict(resume=True), r"last\.pt: no such checkpoint")])
def test_options_that_cannot_be_used_are_one_line(easy, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        finetune.finetune(config(easy, tmp_path, **options))
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("options, message", [
    (dict(inits="imagenet"), "--inits: expected names that differ, of mrm,.* found imagenet"),
    (dict(methods="full,lorra"), "found full,lorra"), (dict(ratios="1,5"), "found 1,5"),
    (dict(inits="scratch,scratch"), "--inits: expected names that differ")
], ids=["inits", "methods", "ratios", "twice"])
def test_compare_refuses_what_it_does_not_know_before_any_run(easy, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        finetune.compare(table(easy, tmp_path / "table", **options))
    assert not (tmp_path / "table").exists()


def test_prediction_needs_a_finished_run_and_images(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", method="linear", steps=1))
    saved, images = common.load_checkpoint(tmp_path / "run/best.pt"), str(easy / "images")
    headless = {name: x for name, x in saved["model"].items() if name != "head.bias"}
    common.save_checkpoint(tmp_path / "headless.pt", saved | {"model": headless})
    sizeless = {name: value for name, value in saved.items() if name != "sizes"}
    common.save_checkpoint(tmp_path / "sizeless.pt", sizeless)
    common.save_checkpoint(tmp_path / "bare.pt", {"model": saved["model"]})
    out = tmp_path / "out"
    for weights, images, out, message in [
            (None, images, out, "--predict needs --weights RUN"),
            (".", images, out, r"best\.pt: no such checkpoint"),
            ("bare.pt", images, out, r"bare\.pt: expected the adapter\.pt or best\.pt"),
            ("sizeless.pt", images, out, r"sizeless\.pt: expected the adapter\.pt or best\.pt"),
            ("headless.pt", images, out, r"headless\.pt: expected head\.bias"),
            ("run", str(tmp_path / "none"), out, "none: .*[Nn]o such"),
            ("run", images, tmp_path / "run/best.pt/out", r"predictions\.csv: cannot be written")]:
        options = FinetuneConfig(weights=weights and str(tmp_path / weights), predict=images,
                                 out=str(out), device="cpu")
        with pytest.raises(InputError, match=message) as error:
            finetune.predict_folder(options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_have_no_auroc(bad):
    scores, labels = scored(n=20)
    scores[3, 1] = bad
    for function in (finetune.auroc, chosen_by):
        with pytest.raises(InputError, match="AUROC: expected finite scores, found 1 that are not"):
            function(scores, labels)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_the_loss_reaches_what_is_trained_and_nothing_else(method, fresh):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    options = common.fill(FinetuneConfig(method=method), recipes.SMALL[method])
    model = finetune.build_model(options, sizes, ["a", "b", "c"])
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


@pytest.mark.parametrize("spoil", [
    lambda root: (root / "classes.txt").write_text("Third\nSquare\n"),
    lambda root: spoil_list(root, "".join(f"{i:04d}.png {1 - i % 2} {i // 2 % 2}\n"
                                          for i in range(64))),
    lambda root: spoil_list(root, (root / "val_list.txt").read_text().replace("0065", "0001"),
                            "val_list")], ids=["class order", "labels", "names"])
def test_resume_refuses_other_lists_and_classes(easy, tmp_path, spoil):
    root = shutil.copytree(easy, tmp_path / "root")
    run = config(root, tmp_path / "run", steps=1)
    finetune.finetune(run)
    spoil(root)
    with pytest.raises(InputError, match=r"last\.pt: expected a run with the same data as"):
        finetune.finetune(dataclasses.replace(run, resume=True))


def test_training_goes_on_for_more_steps(easy, finished, tmp_path):
    run = config(easy, shutil.copytree(finished, tmp_path / "run"), method="lora", resume=True)
    with pytest.raises(InputError, match="expected at least the 4 steps"):
        finetune.finetune(dataclasses.replace(run, steps=3))
    assert finetune.finetune(dataclasses.replace(run, steps=None, epochs=2.0))["steps"] == 8
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2, 4, 8]


def test_a_run_that_goes_on_from_another_has_a_new_head(easy, tmp_path):
    """The old one may be of other classes, or of these in another order."""
    finetune.finetune(config(easy, tmp_path, steps=1))
    saved = common.load_checkpoint(tmp_path / "best.pt")["model"]
    tensors, _ = finetune.starting_weights(FinetuneConfig(weights=str(tmp_path)))
    assert saved.keys() - tensors.keys() == {n for n in saved if n.startswith(("fc_norm", "head"))}


def test_a_base_is_found_where_it_went(easy, tmp_path, monkeypatch):
    here = tmp_path / "here"
    finetune.finetune(config(easy, here / "runs/base", method="full", steps=1))
    monkeypatch.chdir(here)
    finetune.finetune(config(easy, "runs/adapter", method="lora", steps=1, weights="runs/base"))
    expected = finetune.load_run("runs/adapter")[0].state_dict()
    state = common.load_checkpoint("runs/base/best.pt")["model"]  # a run's folder serves as weights
    assert torch.equal(expected["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    monkeypatch.chdir(tmp_path)  # from another directory
    finetune.load_run(here / "runs/adapter")
    here.rename(tmp_path / "there")  # the whole folder moved
    moved = finetune.load_run(tmp_path / "there/runs/adapter")[0].state_dict()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in expected.items())
    (tmp_path / "there/runs/base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="base weights .* are not there; .* lora.py merge"):
        finetune.load_run(tmp_path / "there/runs/adapter")
    adapter = str(tmp_path / "there/runs/adapter/adapter.pt")
    lora.merge(lora.LoRAConfig(adapter=adapter, weights=str(tmp_path / "elsewhere")))
    merged = finetune.load_run(tmp_path / "there/runs/adapter/merged.pt")[0].state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("command", [lora.merge, lora.export_peft])
def test_commands_know_the_base_of_an_adapter(finished, tmp_path, command):
    run = shutil.copytree(finished, tmp_path / "run")
    saved = common.load_checkpoint(run / "base.pt")

    def with_base(state):
        common.save_checkpoint(tmp_path / "it.pt", state)
        command(lora.LoRAConfig(adapter=str(run / "adapter.pt"), weights=str(tmp_path / "it.pt")))

    for change in (0.1, 1e-6):
        norm = saved["model"]["blocks.0.norm1.weight"] + change
        with pytest.raises(InputError, match="it.pt are not the weights this adapter was"):
            with_base(saved | {"model": saved["model"] | {"blocks.0.norm1.weight": norm}})
    with_base({"state_dict": {"module." + name: x for name, x in saved["model"].items()}})


def test_white_minus_1_and_missing_images_reach_the_whole_run(easy, tmp_path, capsys):
    """16-bit images of one white, of which one is missing, and a class that is partly unknown: what
    --predict says of the test images is what the run said."""
    root = tmp_path / "deep"
    (root / "images").mkdir(parents=True)
    for path in (easy / "images").iterdir():
        deep = np.asarray(Image.open(path)).astype(np.uint16) * 2
        Image.fromarray(deep).save(root / "images" / path.name)
    for part in ("train_list", "val_list", "test_list"):
        lines = (easy / f"{part}.txt").read_text().splitlines()
        lines[3:5] = [f"{line.rsplit(' ', 1)[0]} -1" for line in lines[3:5]]
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    lost = (root / "train_list.txt").read_text().split()[0]
    (root / "images" / lost).unlink()
    run = config(root, tmp_path / "run", data="csv", white=1023, uncertain="ignore", skip_bad=True)
    result = finetune.finetune(run)
    assert result["images"]["train"] == 63 and "1 of 64 images of train" in capsys.readouterr().err
    rows = predictions(tmp_path / "run")
    assert [row["label class 2"] for row in rows[2:6]] == ["0", "", "", "0"]
    found = predict(root / "images", tmp_path / "run", tmp_path / "p")
    with pytest.raises(InputError, match="--white None, .* found a run with --white 1023"):
        finetune.finetune(dataclasses.replace(run, white=None, resume=True, steps=9))
    assert predict(root / "images", tmp_path / "run", tmp_path / "q", white=65535) != found
    with pytest.raises(InputError, match="--mean and --std: expected both"):
        predict(root / "images", tmp_path / "run", tmp_path / "q", mean=0.5)
    again, scores = ([float(of[row["image"]]["class 1"]) for row in rows]
                     for of in (found, {row["image"]: row for row in rows}))
    assert again == pytest.approx(scores, abs=2e-5)


def test_parts_that_share_patients_are_warned_of(easy, tmp_path, capsys):
    root = shutil.copytree(easy, tmp_path / "nih")
    for part, first in (("train_list", 0), ("val_list", 60), ("test_list", 90)):
        lines, text = (root / f"{part}.txt").read_text().splitlines(), ""
        for i, (old, labels) in enumerate(line.split(" ", 1) for line in lines):
            name = f"{first + i:08d}_{len(part):03d}.png"  # NIH's: patient and image
            (root / "images" / old).rename(root / "images" / name)
            text += f"{name} {labels}\n"
        (root / f"{part}.txt").write_text(text)
    finetune.read_lists(config(root, tmp_path / "run", data="csv", ratio=100))
    said = capsys.readouterr().err
    assert "4 images of val are of patients in train" in said and "of test" not in said


def test_a_bad_label_or_rate_ends_a_run_at_its_step_and_keeps_the_checkpoint(
        easy, tmp_path, monkeypatch):
    finetune.finetune(config(easy, tmp_path, steps=2))
    before = (tmp_path / "last.pt").read_bytes()
    loss, calls = finetune.label_loss, []

    def second_is_nan(logits, labels, **how):
        calls.append(1)
        return loss(logits, labels, **how) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(finetune, "label_loss", second_is_nan)
    expected = r"step 4: the loss is not finite.*images/00\d\d\.png"
    with pytest.raises(InputError, match=expected) as error:
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
    fresh = fresh_model()
    clipped, free = (sum((model[name].double() - x.double()).square().sum()
                         for name, x in fresh.items()).sqrt() for model in ran.values())
    assert clipped.item() == pytest.approx(1e-3, rel=0.01) and free > 0.01


def test_a_run_uses_the_rates_of_its_layers(easy, tmp_path):
    options = dict(layer_decay=1e-6, lr=0.1, weight_decay=0.0, warmup=1.0)
    finetune.finetune(config(easy, tmp_path, steps=1, evaluations=1, **options))
    ran = common.load_checkpoint(tmp_path / "best.pt")["model"]
    moved = {name: (ran[name] - x).abs().max().item() for name, x in fresh_model().items()}
    assert moved["head.weight"] > 1e-3 and moved["blocks.0.mlp.fc1.weight"] < 1e-5


def test_a_method_is_a_function_and_an_entry(easy, tmp_path, monkeypatch):
    """BitFit: biases alone learn. Without the entry the run is refused, and trains nothing else."""

    def train_biases(model, config):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    with pytest.raises(InputError, match="--method: expected one of full, .* found bitfit"):
        finetune.finetune(config(easy, tmp_path, method="bitfit"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(finetune.METHODS, "bitfit", train_biases)
    assert common.parse_config(FinetuneConfig, ["--method", "bitfit"]).method == "bitfit"
    result = finetune.finetune(config(easy, tmp_path, method="bitfit", lr=0.01))
    fresh = fresh_model()
    ran = common.load_checkpoint(tmp_path / "best.pt")["model"]
    moved = {name for name, tensor in fresh.items() if not torch.equal(tensor, ran[name])}
    assert moved and all(name.endswith("bias") for name in moved)
    biases = [tensor for name, tensor in fresh.items() if name.endswith("bias")]
    assert result["trainable_parameters"] == sum(map(torch.numel, biases))


def test_lora_beside_other_layers(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path, method="lora-all", rank=2))
    adapter = common.load_checkpoint(tmp_path / "adapter.pt")["adapter"]
    layers = {name.split(".")[-2] for name in adapter if "lora_A" in name}
    assert layers == {"qkv", "proj", "fc1", "fc2"}
    assert adapter["blocks.0.attn.qkv.lora_A"].shape[0] == 3 * 2
    finetune.load_run(tmp_path)


def test_the_command_line_has_at_most_40_options():
    fields = dataclasses.fields(FinetuneConfig)
    assert sum(field.metadata.get("typed", True) for field in fields) <= 40
    with pytest.raises(SystemExit):  # a recipe alone sets it
        common.parse_config(FinetuneConfig, ["--layer-decay", "0.5"])


def test_unknown_labels_have_no_part_in_loss_and_auroc():
    scores, labels = scored(k=2)
    unknown = np.random.default_rng(3).random(labels.shape) < 0.3
    marked = np.where(unknown, np.nan, labels)
    known = [~unknown[:, c] for c in (0, 1)]
    expected = [roc_auc_score(labels[k, c], scores[k, c]) for c, k in enumerate(known)]
    mean, _, per_class = finetune.auroc(scores, marked)
    assert [value[0] for value in per_class] == pytest.approx(expected)
    assert mean == pytest.approx(np.mean(expected)) == chosen_by(scores, marked)
    logits, targets = torch.tensor(scores, requires_grad=True), torch.tensor(marked).double()
    loss = finetune.label_loss(logits, targets)
    p = 1 / (1 + np.exp(-scores))
    each = -np.log(np.where(labels == 1, p, 1 - p))
    assert loss.item() == pytest.approx(each[~unknown].mean())
    loss.backward()
    assert not logits.grad[torch.tensor(unknown)].any() and logits.grad.isfinite().all()
    assert finetune.label_loss(logits, torch.full_like(targets, np.nan)).item() == 0


def test_paired_differences_against_resampling_by_hand():
    """Two models that err alike: their difference is far more certain than either score."""
    scores, labels = scored(n=300, k=1)
    better = scores + 0.3 * labels
    rows = {("mrm", name, "10"): [({"auroc": chosen_by(s, labels)}, d.mean(0))]
            for name, s in (("lora", better), ("full", scores))
            for d in [finetune.bootstrap_auroc(s, labels, resamples=4000)[2]]}
    line = finetune.compare_rows(*rows, *rows.values())
    assert line[:3] == ["10", "mrm lora", "mrm full"] and line[-1] == "1 of 1"

    def theirs(scores, take):
        return roc_auc_score(labels[take, 0], scores[take, 0])

    draws = np.random.default_rng(1).integers(300, size=(1000, 300))
    differences = [theirs(better, take) - theirs(scores, take) for take in draws]
    low, high = (float(number) for number in line[4].strip("[]").split(","))
    assert (low, high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.006)
    gain = theirs(better, slice(None)) - theirs(scores, slice(None))
    assert float(line[3]) == pytest.approx(gain, abs=6e-4)
    spread = np.std([theirs(scores, take) for take in draws[:300]])
    assert high - low < 2 * spread  # unpaired, it would be more than 5 times the spread


@needs_triton
@pytest.mark.skipif(CUDA, reason="a stand-in for a GPU")
@pytest.mark.parametrize("failure", ["sm_75", "compiler", "forward"])
def test_the_main_job_ends_where_kernels_fail(
        easy, finished, tmp_path, monkeypatch, capsys, failure):
    """An old GPU, no compiler, too little shared memory: one line, and the same predictions."""
    why, *device = FAILURES[failure]
    stand_in(monkeypatch, *device)
    words = "finetune.py --lora --weights scratch --steps 4 --evaluations 2 --batch-size 16"
    more = ["--probe", "0", "--device", "cpu", "--root", str(easy), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words.split() + more)
    finetune.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "no Triton kernels" in line]
    assert len(lines) == 1 and lines[0].startswith("lora_linear: ") and why in lines[0]
    assert predictions(tmp_path) == predictions(finished)
