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

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from support import weights as weights_module
from support import script as common
import data
import finetune
import lora
import mrm
from support import recipes
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
        finetune.mean_auroc(scores, 0 * labels))


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


def filled(**options):
    """The configuration that a run of a random start with these options works by."""
    config = finetune.fill_cell(FinetuneConfig(weights="scratch", **options))
    return finetune.take_recipe(config, *finetune.starting_weights(config), 500)[0]


def test_mean_and_std_zero_included():
    assert filled().mean is filled().std is None  # of the tiny preset: each image's own
    assert (filled(mean=0.0, std=0.5).mean, filled(mean=0.0, std=0.5).std) == (0.0, 0.5)
    for one in (dict(mean=0.0), dict(std=0.5)):
        with pytest.raises(common.InputError, match="--mean and --std: expected both, or none"):
            filled(**one)
    with pytest.raises(common.InputError, match=r"--std: expected a number in \(0, inf\), found 0"):
        filled(mean=0.0, std=0.0)


def test_typed_options_win_over_the_recipe():
    typed = dict(lr=0.7, rank=6, batch_size=3, optimizer="sgd", layer_decay=0.3, weight_decay=0.0,
                 warmup=0.0, min_crop=0.9, drop_path=0.5, epochs=2.5)
    ran = filled(data="nih", method="lora", ratio=10, **typed)
    assert {name: getattr(ran, name) for name in typed} == typed and ran.steps is None
    assert (ran.recipe, ran.img_size, ran.num_heads) == ("small", 48, 4)
    assert (filled(lora=True).method, filled().ratio, filled(data="nih").ratio) == ("lora", 10, 100)
    with pytest.raises(common.InputError, match="--lora and --method: .* found --method full"):
        filled(lora=True, method="full")


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
    with pytest.raises(common.InputError, match="MRM.pth: expected --recipe mrm.* more.cxrmae"):
        recipe("MRM", data="nih")
    assert recipe("MRM", data="nih", recipe="medpeft").optimizer == "sgd"
    assert recipe("MRM", data="csv").recipe == "small"


def optimizer_of(model, **options):
    return finetune.optimizer_by_layer(model, FinetuneConfig(**dict(optimizer="adamw",
        weight_decay=0.1, layer_decay=0.5, lr=1.0) | options))


def test_layer_decay_and_no_decay_on_biases():
    model = vit.ViT(16, 4, 1, 24, 2, 3, num_classes=2)
    optimizer = optimizer_of(model)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p
             in g["params"]}
    assert scale[id(model.head.weight)] == (1, 0.1) and scale[id(model.head.bias)] == (1, 0)
    assert scale[id(model.blocks[1].mlp.fc1.weight)] == (0.5, 0.1) and scale[id(
        model.blocks[0].norm1.bias)] == (0.25, 0)
    assert scale[id(model.patch_embed.proj.bias)] == (0.125, 0) and scale[id(
        model.fc_norm.weight)] == (1, 0)
    assert scale[id(model.cls_token)] == scale[id(model.pos_embed)] == (0.125, 0)
    assert set(scale) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if scale[id(p)][1]} == {name for name,
        p in model.named_parameters() if mrm.decays(name, p)}  # pretraining's rule
    for p in model.blocks.parameters():
        p.requires_grad_(False)
    optimizer = optimizer_of(model, optimizer="sgd", weight_decay=0.0, layer_decay=1.0)
    assert {id(p) for g in optimizer.param_groups
            for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(g["momentum"] == 0.9 and g["lr_scale"] == 1 for g in optimizer.param_groups)


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
    (root / "patients.csv").write_text("image_path,patient_id\n" + "".join(f"{i:04d}.png,{i}\n"
                                                                           for i in range(count)))
    return root


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def predictions(folder):
    return list(csv.DictReader((folder / "predictions.csv").open()))


def predict(images, run, out):
    finetune.predict_folder(
        FinetuneConfig(predict=str(images), weights=str(run), out=str(out), device="cpu"))
    return {row["image"]: row for row in predictions(out)}


def config(root, out, **kwargs):
    options = dict(steps=4, evaluations=2, device="cpu", batch_size=16, probe=0.0) | kwargs
    return FinetuneConfig(**dict(root=str(root), out=str(out), weights="scratch") | options)


def test_few_validation_images_are_warned_of(easy, tmp_path, capsys):
    shutil.copytree(easy, tmp_path / "few")
    path = tmp_path / "few" / "val_list.txt"
    finetune.read_lists(FinetuneConfig(root=str(tmp_path / "few"), ratio=100))
    assert "validation images" not in capsys.readouterr().err
    path.write_text("".join(path.read_text().splitlines(True)[:19]))
    finetune.read_lists(FinetuneConfig(root=str(tmp_path / "few"), ratio=100))
    assert "WARNING: 19 validation images choose the model" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_a_run_leaves_what_the_design_promises(easy, tmp_path, method, capsys):
    result = finetune.finetune(config(easy, tmp_path, method=method))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["auroc"] == result["auroc"]
    assert {"auroc", "auroc_ci", "auroc_per_class", "split", "method", "trainable_parameters",
            "total_parameters", "seconds", "images_per_second",
            "share_waiting_for_data"} <= saved.keys()
    assert saved["auroc_per_class"]["Third"] is None
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
    recipe = recipes.SMALL[method] | recipes.FEW[method]
    recipe |= dict(steps=4, batch_size=16, probe=0.0, evaluations=2)
    assert ({name: ran[name] for name in recipe} == recipe and ran["method"] == method and
            ran["ratio"] == 10)
    assert ran == common.load_checkpoint(tmp_path / "last.pt")["config"]
    assert (saved["steps"], saved["batch_size"], saved["lr"]) == (4, 16, recipe["lr"])
    lora, head = saved["lora_parameters"], saved["head_parameters"]
    assert head == 2 * 128 + 2 * 128 + 2 and lora == (
        2 * 2 * (128 * 4 + 4 * 128) if method == "lora" else 0  # q and v of two blocks
    )
    trainable = {"full": saved["total_parameters"], "lora": lora + head, "linear": head}
    assert saved["trainable_parameters"] == trainable[method]
    assert not list(tmp_path.rglob("*.tmp"))


def test_overfits_one_batch():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = (torch.from_numpy(np.stack([square(rng, i % 2)
                                         for i in range(16)])).float()[:, None] / 128 - 1)
    labels = torch.stack([torch.arange(16) % 2, torch.randint(2, (16,))],
                         1).float()  # the second: to be learned by heart
    sizes = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=4)
    for method, lr in (("full", 3e-3), ("lora", 3e-2)):
        options = FinetuneConfig(method=method, dropout=0.0, lr=lr, layer_decay=1.0, rank=4)
        options = common.fill(options, recipes.SMALL[method])
        model = finetune.build_model(options, sizes, 2)
        optimizer = finetune.optimizer_by_layer(model, options)
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


@pytest.mark.parametrize("options", [dict(method="lora"), dict(method="full", optimizer="sgd",
    lr=0.01), dict(method="linear"), dict(method="lora", batch_size=24, accumulate=2)],
                         ids=["lora", "full", "linear", "passes"])
def test_resume_is_bit_identical(easy, tmp_path, monkeypatch, options):
    whole = finetune.finetune(config(easy, tmp_path / "whole", **options))
    interrupted(monkeypatch, config(easy, tmp_path / "part", **options))
    assert (common.load_checkpoint(tmp_path / "part/last.pt")["step"] == 2 and
            not (tmp_path / "part/result.json").exists())
    part = finetune.finetune(config(easy, tmp_path / "part", resume=True, **options))
    timed = {"images_per_second", "share_waiting_for_data", "seconds", "weights"}
    assert {n: v for n, v in part.items()
            if n not in timed} == {n: v for n, v in whole.items() if n not in timed}
    a, b = (common.load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "part"))
    assert a["step"] == b["step"] == 4 and all(
        torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert (tmp_path /
            "whole/predictions.csv").read_bytes() == (tmp_path /
                                                      "part/predictions.csv").read_bytes()
    assert [line["step"] for line in log_of(tmp_path / "part")] == [2, 4]
    # Of a finished run: it is tested again
    again = finetune.finetune(config(easy, tmp_path / "part", resume=True, **options))
    assert again["auroc"] == whole["auroc"]


@pytest.mark.parametrize("other", [dict(method="linear"), dict(rank=2), dict(seed=3),
                                   dict(min_crop=0.5), dict(lr=0.1), dict(mean=0.0, std=0.5),
                                   dict(flip=True)], ids=lambda other: next(iter(other)))
def test_resume_refuses_another_runs_state(easy, tmp_path, other):
    finetune.finetune(config(easy, tmp_path, method="lora"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flag = ("--lr" if "method" in other else "--" + next(iter(other)).replace("_", "-")
            )  # a method has its own rate
    with pytest.raises(
            common.InputError,
            match=rf"last\.pt: expected {flag} .*, as asked for now, found a run with {flag}"):
        finetune.finetune(config(easy, tmp_path, **dict(method="lora", resume=True) | other))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    finetune.load_run(tmp_path)  # the weights of the finished run are still there


def test_resume_refuses_weights_that_have_changed(easy, tmp_path):
    weights = rgb_weights(tmp_path / "rgb.pt")
    options = dict(method="lora", weights=weights, num_heads=4)
    finetune.finetune(config(easy, tmp_path / "run", **options))
    state = common.load_checkpoint(weights)["model"]
    common.save_checkpoint(weights,
                           {"model": {name: tensor + 0.1 for name, tensor in state.items()}})
    with pytest.raises(common.InputError,
                       match=r"last\.pt: expected a run with the same weights as now"):
        finetune.finetune(config(easy, tmp_path / "run", resume=True, **options))


def test_two_processes_predict_every_test_image_once(easy, tmp_path):
    """Under torchrun: one run folder, and what the processes gathered is what one process predicts
    with the saved model."""
    sizes = "--steps 4 --evaluations 2 --batch-size 4 --device cpu --weights scratch --lora".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(REPOSITORY / "finetune.py"), "--root", str(easy), "--out", str(tmp_path / "run"),
               *sizes]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2, 4]
    rows = list(csv.reader((tmp_path / "run" / "predictions.csv").open()))
    names, _ = data.read_list(easy / "test_list.txt")
    assert [row[0] for row in rows[1:]] == names
    model, saved = finetune.load_run(tmp_path / "run")
    test_set = data.ImageSet([str(easy / "images" / name) for name in names], model.img_size)
    with torch.no_grad():
        images = torch.stack([image for image, _ in test_set])
        expected = model(data.normalize(images, saved["mean"], saved["std"])).sigmoid()
    np.testing.assert_allclose(np.array([row[1:3] for row in rows[1:]], dtype=float),
                               expected.numpy(), atol=1e-4)


def test_bfloat16_follows_float32(easy, tmp_path):
    runs = [finetune.finetune(config(easy, tmp_path / dtype, method="lora", steps=10, evaluations=1,
                                     dtype=dtype)) for dtype in ("fp32", "bf16")]
    losses = [log_of(tmp_path / dtype)[-1]["val_loss"] for dtype in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    assert runs[0]["trainable_parameters"] == runs[1]["trainable_parameters"]


def rgb_weights(path):
    torch.manual_seed(7)
    state = vit.ViT(64, 16, 3, 64, 2, 4).state_dict()
    common.save_checkpoint(path, {"model": {name: tensor for name, tensor in state.items()
                                            if name.split(".")[0] != "fc_norm"}})
    return str(path)


def test_a_merged_adapter_predicts_as_its_run_does(easy, tmp_path):
    """Published weights have three channels and no sizes beside them; the run is at another
    size."""
    weights = rgb_weights(tmp_path / "rgb.pt")
    finetune.finetune(config(easy, tmp_path / "run", method="lora", weights=weights, img_size=32,
                             num_heads=4, lr=0.02))
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt")))
    images = torch.randn(3, 1, 32, 32)
    run, merged = (finetune.load_run(tmp_path / "run")[0],
                   finetune.load_run(tmp_path / "run/merged.pt")[0])
    torch.testing.assert_close(run(images), merged(images), atol=1e-6, rtol=1e-5)
    saved = common.load_checkpoint(tmp_path / "run/adapter.pt")["adapter"]
    assert any(tensor.any() for name, tensor in saved.items() if name.endswith("lora_B"))
    finetune.finetune(
        config(easy, tmp_path / "next", method="linear", weights=str(tmp_path / "run/merged.pt")))


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
    monkeypatch.setattr(finetune, "build_model",
                        lambda *args: before.setdefault("model", build(*args)))
    monkeypatch.setattr(finetune, "check_finite", look)
    finetune.finetune(config(easy, tmp_path, method=method, steps=10, probe=0.5, warmup=0))
    assert min(step for step, part in moved if part == "head") == 2
    assert (min(step for step, part in moved
                if part == "blocks") == 7)  # updates 1 to 5 were the head's


def test_rates_with_and_without_a_probe(monkeypatch):
    """Two cosines with a warm-up each, by the formula written out."""
    monkeypatch.setattr(finetune, "PROBE_LR", 0.1)
    settings = FinetuneConfig(lr=0.2, probe=0.5, steps=40, warmup=0.1, layer_decay=0.5)
    model = vit.ViT(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    optimizer = finetune.optimizer_by_layer(
        model, dataclasses.replace(settings, optimizer="adamw", weight_decay=0.0))

    def rates(step):
        finetune.set_rates(optimizer, settings, step, 40)
        return {name: next(group["lr"] for group in optimizer.param_groups if any(parameter is own
            for own in group["params"])) for name, parameter in model.named_parameters()}

    def cosine(place, peak):
        return 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * place)) / 2

    for step, (head, block) in {0: (0.05, 0.0), 1: (0.1, 0.0), 11: (cosine(9 / 18, 0.1), 0.0),
                                20: (0.1, 0.05), 31: (cosine(9 / 18, 0.2), 0.5 * cosine(9 / 18,
        0.2))}.items():
        found = rates(step)
        assert found["head.weight"] == pytest.approx(head, rel=1e-6), step
        assert found["blocks.0.mlp.fc1.weight"] == pytest.approx(block, rel=1e-6), step


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pooled_run_predicts_what_it_scored(easy, tmp_path, method):
    finetune.finetune(config(easy, tmp_path / "run", method=method, pool=3))
    scored = predictions(tmp_path / "run")
    if method == "lora":
        lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt")))
    for run in ["run", "run/merged.pt"][:2 if method == "lora" else 1]:
        found = predict(easy / "images", tmp_path / run, tmp_path / "p")
        for row in scored:
            assert float(found[row["image"]]["Square"]) == pytest.approx(
                float(row["Square"]), abs=1e-4)


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


def test_a_full_runs_folder_serves_as_weights(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "full"))
    state = common.load_checkpoint(tmp_path / "full/best.pt")["model"]
    finetune.finetune(config(easy, tmp_path / "lora", method="lora",
                             weights=str(tmp_path / "full")))
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
        mrm.MRMConfig(root=str(root), out=str(tmp_path / "m"), steps=1, device="cpu", holdout=8))
    for weights, warned in (("m", True), ("lora", True), ("scratch", False)):
        capsys.readouterr()
        out, options = tmp_path / "lora", dict(method="lora", steps=1, evaluations=1)
        if weights == "lora":  # what was learned before is named by the merged file too
            lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "lora/adapter.pt")))
            out, weights = tmp_path / "on", "lora/merged.pt"
        weights = weights if weights == "scratch" else str(tmp_path / weights)
        finetune.finetune(config(root, out, weights=weights, **options))
        assert ("4 of 24 test images are of a patient" in capsys.readouterr().err) == warned


def table(folder, out, **options):
    defaults = dict(weights=None, compare=True, methods="full,linear", ratios="10", seeds=2)
    return dataclasses.replace(config(folder, out, **defaults, inits="scratch"), **options)


def test_compare_writes_a_table_and_keeps_finished_cells(easy, tmp_path, monkeypatch):
    finetune.compare(table(easy, tmp_path))
    first = (tmp_path / "compare.md").read_text()
    assert first.count("| scratch | full | 10 |") == 1
    assert "| 10 | scratch linear | scratch full |" in first  # the later row less the earlier one
    ran = json.loads((tmp_path / "scratch-full-10-1/config.json").read_text())
    typed = dict(steps=4, batch_size=16, seed=1, method="full")
    assert typed.items() <= ran.items()
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "finetune", None)  # nothing runs again
        finetune.compare(table(easy, tmp_path))
        finetune.compare(table(easy, tmp_path, methods="linear", seeds=1, workers=1))
    finetune.compare(table(easy, tmp_path))
    assert (tmp_path / "compare.md").read_text() == first


def test_compare_keeps_finished_cells_of_the_demos_weights(easy, tmp_path, monkeypatch):
    """config.json names the folder of the weights, --inits what makes them."""
    made = {"mrm": "scratch", "scratch": "scratch"}
    monkeypatch.setattr(finetune, "fill_weights", lambda config: dataclasses.replace(
        config, weights=made[config.weights]))
    cells = table(easy, tmp_path, inits="mrm", methods="linear", seeds=1)
    finetune.compare(cells)
    monkeypatch.setattr(finetune, "finetune", None)  # nothing runs again
    finetune.compare(cells)


@pytest.mark.parametrize("other", [dict(steps=5), dict(lr=0.5), dict(min_crop=0.5),
                                   dict(flip=True)], ids=lambda other: next(iter(other)))
def test_compare_refuses_a_cell_of_other_options(easy, tmp_path, other):
    options = dict(methods="linear", seeds=1)
    finetune.compare(table(easy, tmp_path, **options))
    before = (tmp_path / "compare.md").read_text()
    flag = "--" + next(iter(other)).replace("_", "-")
    with pytest.raises(common.InputError,
                       match=rf"scratch-linear-10-0.*: expected {flag} .*found a run with {flag}"):
        finetune.compare(table(easy, tmp_path, **options | other))
    assert (tmp_path / "compare.md").read_text() == before


def spoil_list(root, text, part="train_10"):
    (root / f"{part}.txt").write_text(text)


BAD = {"missing image": (lambda r: (r / "images/0003.png").unlink(), {},
                         r"train_10\.txt.*4.*0003\.png"), "truncated image":
       (lambda r: (r / "images/0003.png").write_bytes((r / "images/0003.png").read_bytes()[:100]),
        {}, r"0003\.png"), "number of labels": (lambda r: spoil_list(r,
    "0000.png 0 1\n0001.png 1 1\n0002.png 1\n"), {}, r"train_10\.txt.*3"), "label 2":
       (lambda r: spoil_list(r, "0000.png 0 1\n0001.png 2 1\n"), {}, r"train_10\.txt.*2"),
       "empty list": (lambda r: spoil_list(r, ""), {}, r"train_10\.txt"), "no positive":
       (lambda r: spoil_list(r, "0000.png 0 0\n0001.png 0 0\n", "val_list"), {},
        r"the val list: expected both labels"), "unreadable checkpoint":
       (lambda r: (r / "bad.pt").write_bytes(b"no"), {"weights": "bad.pt"},
        r"bad\.pt: not a readable checkpoint"), "no ViT":
       (lambda r: common.save_checkpoint(r / "bad.pt", {"model": {"x": torch.ones(1)}}),
        {"weights": "bad.pt"}, r"bad\.pt: expected a ViT"), "missing checkpoint": (lambda r: None,
    {"weights": "none.pt"}, r"none\.pt: no such checkpoint"), "only an adapter":
       (lambda r: common.save_checkpoint(r / "bad.pt", {"adapter": {}, "lora": {},
                                                        "sizes": dict(img_size=16, patch_size=4,
    embed_dim=24, depth= 1, num_heads=2)}), {"weights": "bad.pt"}, r"bad\.pt: expected a ViT"),
       "no class has both labels": (lambda r: spoil_list(r, "0000.png 1 1\n0001.png 1 1\n"), {},
                                    r"the train list: expected both labels"), "listed twice":
       (lambda r: spoil_list(r, "0000.png 1 1\n0001.png 0 1\n0000.png 1 1\n"), {},
        r"train_10\.txt: line 3"), "missing list": (lambda r: (r / "test_list.txt").unlink(), {},
                                                    r"test_list\.txt: no such list"),
       "other classes": (lambda r: (r / "classes.txt").write_text("Square\n"), {},
                         r"expected 1 labels a line"), "unwritable folder":
       (lambda r: (r / "file").write_text(""), {"out": "file/run"}, r"file")}


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
    [(dict(ratio=5), "train_5.txt: no such list"),
     (dict(evaluations=0), r"--evaluations: expected a number in \[1, inf\), found 0"),
     (dict(steps=-1), r"--steps: expected a number in \[1, inf\), found -1"),
     (dict(epochs=1.0), "--steps and --epochs: expected one"),
     (dict(img_size=33), "img_size 33 must be a multiple"),
     (dict(method="lora", rank=-1), r"--rank: expected a number in \[1, inf\), found -1"),
     (dict(split="covid1"), "expected no --split"),
     (dict(lr=1e30, steps=6, evaluations=6), "expected finite scores"),
     (dict(resume=True), r"last\.pt: no such checkpoint")], ids=lambda value: "-".join(value)
    if isinstance(value, dict) else "")
def test_options_that_cannot_be_used_are_one_line(easy, tmp_path, options, message):
    with pytest.raises(common.InputError, match=message) as error:
        finetune.finetune(config(easy, tmp_path, **options))
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("options, message", [
    (dict(inits="imagenet"), "--inits: expected names that differ, of mrm,.* found imagenet"),
    (dict(methods="full,lorra"), "found full,lorra"), (dict(ratios="1,5"), "found 1,5"),
    (dict(inits="scratch,scratch"), "--inits: expected names that differ")
], ids=["inits", "methods", "ratios", "twice"])
def test_compare_refuses_what_it_does_not_know_before_any_run(easy, tmp_path, options, message):
    with pytest.raises(common.InputError, match=message):
        finetune.compare(table(easy, tmp_path / "table", **options))
    assert not (tmp_path / "table").exists()


def test_prediction_needs_a_finished_run_and_images(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path / "run", method="linear", steps=1))
    saved, images = common.load_checkpoint(tmp_path / "run/best.pt"), str(easy / "images")
    common.save_checkpoint(tmp_path / "headless.pt", saved | {"model": {n: t for n,
        t in saved["model"].items() if n != "head.bias"}})
    common.save_checkpoint(tmp_path / "sizeless.pt",
                           {n: v for n, v in saved.items() if n != "sizes"})
    common.save_checkpoint(tmp_path / "bare.pt", {"model": saved["model"]})
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    for options, message in [
        (dict(weights=None, predict=images), "--predict needs --weights RUN"),
        (dict(weights=str(tmp_path), predict=images), r"best\.pt: no such checkpoint"),
        (dict(weights=str(tmp_path / "bare.pt"),
              predict=images), r"bare\.pt: expected the adapter\.pt or best\.pt"),
        (dict(weights=str(tmp_path / "sizeless.pt"),
              predict=images), r"sizeless\.pt: expected the adapter\.pt or best\.pt"),
        (dict(weights=str(tmp_path / "headless.pt"),
              predict=images), r"headless\.pt: expected head\.bias"),
        (dict(weights=run, predict=str(tmp_path / "none")), "none: .*[Nn]o such"),
        (dict(weights=run, predict=images,
              out=run + "/best.pt/out"), r"predictions\.csv: cannot be written")
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


def test_a_script_prints_one_line_and_exits_with_2(tmp_path):
    run = subprocess.run([sys.executable, REPOSITORY / "finetune.py", "--data", "covid", "--root",
                          "nowhere", "--split", "covid1"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert (run.returncode == 2 and run.stderr.startswith("error: ") and
            run.stderr.count("\n") == 1), run.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_have_no_auroc(bad):
    scores, labels = scored(n=20)
    scores[3, 1] = bad
    for function in (finetune.auroc, finetune.mean_auroc):
        with pytest.raises(common.InputError,
                           match="AUROC: expected finite scores, found 1 that are not"):
            function(scores, labels)
    with pytest.raises(common.InputError, match="found 20 that are not"):
        finetune.mean_auroc(np.full((20, 1), bad), labels[:, :1])


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_the_loss_reaches_what_is_trained_and_nothing_else(method, fresh):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    model = finetune.build_model(common.fill(FinetuneConfig(method=method), recipes.SMALL[method]),
                                 sizes, 3)
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
    runs = [finetune.finetune(config(easy, tmp_path / str(size), method="full", steps=3,
                                     evaluations=3, batch_size=16, accumulate=16 // size,
                                     min_crop=1.0, dtype="fp32", optimizer="sgd", lr=0.02)) for size
            in (16, 4)]
    lines = [log_of(tmp_path / str(size)) for size in (16, 4)]
    for name in ("loss", "val_loss"):
        assert [line[name] for line in lines[0]] == pytest.approx([line[name] for line in lines[1]],
                                                                  rel=1e-4)
    assert runs[0]["steps"] == runs[1]["steps"] == 3


@pytest.mark.parametrize("spoil", [
    lambda root: (root / "classes.txt").write_text("Third\nSquare\n"),
    lambda root: spoil_list(root, "".join(f"{i:04d}.png {1 - i % 2} {i // 2 % 2}\n"
                                          for i in range(64))),
    lambda root: spoil_list(root,
                            (root / "val_list.txt").read_text().replace("0065", "0001"), "val_list")
], ids=["class order", "labels", "names"])
def test_resume_refuses_other_lists_and_classes(easy, tmp_path, spoil):
    root = shutil.copytree(easy, tmp_path / "root")
    finetune.finetune(config(root, tmp_path / "run"))
    spoil(root)
    with pytest.raises(common.InputError,
                       match=r"last\.pt: expected a run with the same lists and classes as now"):
        finetune.finetune(config(root, tmp_path / "run", resume=True))


def test_training_goes_on_for_more_steps(easy, tmp_path, capsys):
    finetune.finetune(config(easy, tmp_path, method="lora"))
    with pytest.raises(common.InputError, match="expected at least the 4 steps"):
        finetune.finetune(config(easy, tmp_path, method="lora", resume=True, steps=3))
    result = finetune.finetune(
        config(easy, tmp_path, method="lora", resume=True, steps=None, epochs=2.0))
    assert result["steps"] == 8
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 8]


def test_a_head_is_reused_for_the_same_classes_in_the_same_order_alone(easy, tmp_path, capsys):
    finetune.finetune(config(easy, tmp_path / "full", steps=1))
    weights, options = (str(tmp_path / "full"),
                        common.fill(FinetuneConfig(method="linear", data="csv", ratio=100), {}))
    saved = common.load_checkpoint(tmp_path / "full/best.pt")["model"]["head.weight"]
    for classes, kept in ((["Square", "Third"], True), (["Third",
                                                         "Square"], False), (["a", "b"], False)):
        start = dataclasses.replace(options, weights=weights)
        tensors, held = finetune.starting_weights(start, classes)
        filled_, sizes = finetune.take_recipe(start, tensors, held, 64)
        model = finetune.build_model(filled_, sizes, 2, tensors)
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
    with pytest.raises(common.InputError, match="base weights .* are not there; .* lora.py merge"):
        finetune.load_run(tmp_path / "there/runs/adapter")
    adapter = str(tmp_path / "there/runs/adapter/adapter.pt")
    lora.merge(lora.LoRAConfig(adapter=adapter, weights=str(tmp_path / "elsewhere")))
    merged = finetune.load_run(tmp_path / "there/runs/adapter/merged.pt")[0].state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("command", [lora.merge, lora.export_peft])
def test_commands_know_the_base_of_an_adapter(easy, tmp_path, command):
    finetune.finetune(config(easy, tmp_path / "run", method="lora", steps=1))
    saved = common.load_checkpoint(tmp_path / "run/base.pt")
    for name, change in (("other", 0.1), ("nearly", 1e-6)):
        changed = {n: t + change if n == "blocks.0.norm1.weight" else t for n,
                   t in saved["model"].items()}
        common.save_checkpoint(tmp_path / f"{name}.pt", saved | {"model": changed})
        with pytest.raises(common.InputError,
                           match=f"{name}.pt are not the weights this adapter was trained on"):
            command(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt"),
                                    weights=str(tmp_path / f"{name}.pt")))
    common.save_checkpoint(tmp_path / "wrapped.pt",
                           {"state_dict": {"module." + n: t for n, t in saved["model"].items()}})
    command(lora.LoRAConfig(adapter=str(tmp_path / "run/adapter.pt"),
                            weights=str(tmp_path / "wrapped.pt")))


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
    again = predict(root / "images", tmp_path / "run", tmp_path / "p")
    for row in rows:
        assert float(again[row["image"]]["class 1"]) == pytest.approx(float(row["class 1"]),
                                                                      abs=2e-5)


def test_parts_that_share_patients_are_warned_of(easy, tmp_path, capsys):
    root = tmp_path / "nih"
    shutil.copytree(easy, root)
    for part, first, seen in (("train_list", 0, 0), ("val_list", 60, 4), ("test_list", 90, 0)):
        lines = (root / f"{part}.txt").read_text().splitlines()
        names = [f"{first + i:08d}_{part[0]}00.png".replace("_t", "_1").replace("_v", "_2") for i
                 in range(len(lines))]
        for name, line in zip(names, lines):
            (root / "images" / line.split()[0]).rename(root / "images" / name)
        (root / f"{part}.txt").write_text("".join(f"{name} {line.split(' ', 1)[1]}\n"
                                                  for name, line in zip(names, lines)))
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
    with pytest.raises(common.InputError,
                       match=r"step 4: the loss is not finite.*images/00\d\d\.png") as error:
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
    fresh = finetune.build_model(filled(), weights_module.encoder_sizes({},
        {"sizes": mrm.MODELS["tiny"]}, ""), 2).state_dict()
    clipped, free = (sum((model[name].double() - x.double()).square().sum()
                         for name, x in fresh.items()).sqrt() for model in ran.values())
    assert clipped.item() == pytest.approx(1e-3, rel=0.01) and free > 0.01


def test_a_run_uses_the_rates_of_its_layers(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path, steps=1, evaluations=1, layer_decay=1e-6, lr=0.1,
                             weight_decay=0.0, warmup=1.0))
    common.seed(0)
    fresh = finetune.build_model(filled(), weights_module.encoder_sizes({},
        {"sizes": mrm.MODELS["tiny"]}, ""), 2).state_dict()
    ran = common.load_checkpoint(tmp_path / "best.pt")["model"]
    moved = {name: (ran[name] - tensor).abs().max().item() for name, tensor in fresh.items()}
    assert moved["head.weight"] > 1e-3 and moved["blocks.0.mlp.fc1.weight"] < 1e-5


def test_a_method_is_a_function_and_an_entry(easy, tmp_path, monkeypatch):
    """BitFit: biases alone learn. Without the entry the run is refused, and trains nothing else."""

    def train_biases(model, config):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    with pytest.raises(common.InputError, match="--method: expected one of full, .* found bitfit"):
        finetune.finetune(config(easy, tmp_path, method="bitfit"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(finetune.METHODS, "bitfit", train_biases)
    assert common.parse_config(FinetuneConfig, ["--method", "bitfit"]).method == "bitfit"
    result = finetune.finetune(config(easy, tmp_path, method="bitfit", lr=0.01))
    common.seed(0)
    sizes = weights_module.encoder_sizes({}, {"sizes": mrm.MODELS["tiny"]}, "")
    fresh = finetune.build_model(filled(), sizes, 2).state_dict()
    ran = common.load_checkpoint(tmp_path / "best.pt")["model"]
    moved = {name for name, tensor in fresh.items() if not torch.equal(tensor, ran[name])}
    assert moved and all(name.endswith("bias") for name in moved)
    biases = [tensor for name, tensor in fresh.items() if name.endswith("bias")]
    assert result["trainable_parameters"] == sum(map(torch.numel, biases))


def test_lora_beside_other_layers(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path, method="lora-all", rank=2))
    saved = common.load_checkpoint(tmp_path / "adapter.pt")
    assert {name.split(".")[-2] for name in saved["adapter"]
            if "lora_A" in name} == {"qkv", "proj", "fc1", "fc2"}
    assert saved["adapter"]["blocks.0.attn.qkv.lora_A"].shape[0] == 3 * 2
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
    assert mean == pytest.approx(np.mean(expected)) == finetune.mean_auroc(scores, marked)
    assert np.isnan(finetune.mean_auroc(scores, np.full_like(labels, np.nan)))
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
    rows = {("mrm", name, "10"): [({"auroc": finetune.mean_auroc(s, labels)}, d.mean(0))]
            for name, s in (("lora", better), ("full", scores))
            for d in [finetune.bootstrap_auroc(s, labels, resamples=4000)[2]]}
    line = finetune.compare_rows(*rows, *rows.values())
    assert line[:3] == ["10", "mrm lora", "mrm full"] and line[-1] == "1 of 1"
    rng, differences = np.random.default_rng(1), []
    for _ in range(1000):
        take = rng.integers(len(scores), size=len(scores))
        differences.append(roc_auc_score(labels[take, 0], better[take, 0])
                           - roc_auc_score(labels[take, 0], scores[take, 0]))
    low, high = (float(number) for number in line[4].strip("[]").split(","))
    assert (low, high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.006)
    assert float(line[3]) == pytest.approx(roc_auc_score(labels[:, 0], better[:, 0])
                                           - roc_auc_score(labels[:, 0], scores[:, 0]), abs=6e-4)
    spread = np.std(
        [roc_auc_score(labels[t, 0], scores[t, 0]) for t in rng.integers(300, size=(300, 300))])
    assert high - low < 2 * spread  # unpaired, it would be more than 5 times the spread
