"""finetune.py: AUROC against scikit-learn, runs of every method, resuming, prediction, and one line for each bad input."""
import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

import data
import finetune
import mrm
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
    assert np.isnan(finetune.auroc(scores, 0 * labels)[0]) and np.isnan(finetune.mean_auroc(scores, 0 * labels))


def test_bootstrap_interval_against_resampling_by_hand():
    scores, labels = scored(k=1)
    _, (low, high), _ = finetune.auroc(scores, labels, resamples=4000)
    rng, draws = np.random.default_rng(1), []
    for _ in range(2000):
        rows = rng.integers(len(scores), size=len(scores))
        draws.append(roc_auc_score(labels[rows, 0], scores[rows, 0]))
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.006)


def test_roc_curve_against_scikit_learn():
    scores, labels = scored(k=1)
    ours = finetune.roc_curve(scores[:, 0], labels[:, 0])
    theirs = sklearn_roc_curve(labels[:, 0], scores[:, 0], drop_intermediate=False)
    np.testing.assert_allclose(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1])


def test_papers_recipes():
    cell = finetune.RECIPES
    lora = {("nih", 1): (0.05, 4), ("nih", 10): (0.05, 8), ("nih", 100): (0.2, 32), ("chexpert", 1): (0.02, 4),
            ("chexpert", 10): (0.05, 16), ("chexpert", 100): (0.01, 32), ("rsna", 1): (0.01, 4), ("rsna", 10): (0.01, 32),
            ("rsna", 100): (0.01, 32)}
    for (name, ratio), (lr, rank) in lora.items():
        recipe = cell["lora", name, ratio]
        assert (recipe["lr"], recipe["rank"], recipe["batch_size"], recipe["epochs"]) == (lr, rank, 64, 100)
    full = cell["full", "nih", 10]
    assert (full["steps"], round(full["warmup"] * full["steps"]), full["lr"], full["batch_size"]) == (30000, 500, 3e-3, 96)


def test_layer_decay_and_no_decay_on_biases():
    model = mrm.ViT(16, 4, 1, 24, 2, 3, num_classes=2)
    optimizer = finetune.make_optimizer(model, dict(optimizer="adamw", weight_decay=0.1, layer_decay=0.5, lr=1.0))
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert scale[id(model.head.weight)] == (1, 0.1) and scale[id(model.head.bias)] == (1, 0)
    assert scale[id(model.blocks[1].mlp.fc1.weight)] == (0.5, 0.1) and scale[id(model.blocks[0].norm1.bias)] == (0.25, 0)
    assert scale[id(model.patch_embed.proj.bias)] == (0.125, 0)


def square(rng, positive):
    image = rng.integers(60, 120, (32, 32)).astype(np.uint8)
    if positive:
        y, x = rng.integers(2, 18, 2)
        image[y : y + 12, x : x + 12] += 100
    return image


@pytest.fixture(scope="session")
def easy(tmp_path_factory):
    """Records in the demo's layout: is there a bright square? The second class is never there in test_list."""
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
    return root


def config(root, out, **kwargs):
    return FinetuneConfig(**dict(root=str(root), out=str(out), weights="scratch", steps=4, evaluations=2, device="cpu",
                                 batch_size=16) | kwargs)


@pytest.mark.parametrize("method", ["full", "lora", "linear"])
def test_a_run_leaves_what_the_design_promises(easy, tmp_path, method, capsys):
    result = finetune.finetune(config(easy, tmp_path, method=method))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["auroc"] == result["auroc"]
    assert {"auroc", "auroc_ci", "auroc_per_class", "split", "method", "trainable_parameters", "total_parameters", "seconds",
            "images_per_second", "share_waiting_for_data", "peak_memory_mib"} <= saved.keys()
    assert saved["auroc_per_class"]["Third"] is None
    output = capsys.readouterr().out
    assert "WARNING" in output and "Third" in output and "undefined" in output
    model = "adapter.pt" if method == "lora" else "best.pt"
    for name in ("config.json", "log.jsonl", "last.pt", model, "predictions.csv", "roc.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    labels, scores = [int(r["label Square"]) for r in rows], [float(r["Square"]) for r in rows]
    assert len(rows) == 24 and saved["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=0.02)

    finetune.predict_folder(FinetuneConfig(predict=str(easy / "images"), weights=str(tmp_path), out=str(tmp_path / "p"), device="cpu"))
    again = {r["image"]: float(r["Square"]) for r in csv.DictReader((tmp_path / "p" / "predictions.csv").open())}
    assert len(again) == 112
    assert [again[r["image"]] for r in rows] == pytest.approx(scores, abs=2e-5)


def test_full_fine_tuning_learns(easy, tmp_path):
    result = finetune.finetune(config(easy, tmp_path, steps=60, lr=2e-3, ratio=100))
    assert result["auroc_per_class"]["Square"] > 0.9


def test_resume_is_bit_identical(easy, tmp_path, monkeypatch):
    whole = finetune.finetune(config(easy, tmp_path / "whole", method="lora"))
    save, saves = data.save_checkpoint, []

    def save_and_stop(path, state):
        save(path, state)
        if Path(path).name == "last.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(config(easy, tmp_path / "part", method="lora"))
    monkeypatch.setattr(data, "save_checkpoint", save)
    part = finetune.finetune(config(easy, tmp_path / "part", method="lora", resume=True))
    assert part["auroc"] == whole["auroc"] and part["val_auroc"] == whole["val_auroc"]
    a, b = (data.load_checkpoint(tmp_path / run / "adapter.pt")["adapter"] for run in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_compare_writes_a_table_and_keeps_finished_cells(easy, tmp_path):
    table = FinetuneConfig(**dataclasses.asdict(config(easy, tmp_path, weights="")) | dict(
        compare=True, methods="full,linear", ratios="10", inits="scratch", seeds=2))
    finetune.compare(table)
    first = (tmp_path / "compare.md").read_text()
    assert first.count("\n") == 4 and "| scratch | full | 10 |" in first
    finetune.compare(table)
    assert (tmp_path / "compare.md").read_text() == first


def spoil_list(root, text, part="train_10"):
    (root / f"{part}.txt").write_text(text)


BAD = {
    "missing image": (lambda r: (r / "images/0003.png").unlink(), {}, r"train_10\.txt.*4.*0003\.png"),
    "truncated image": (lambda r: (r / "images/0003.png").write_bytes((r / "images/0003.png").read_bytes()[:100]), {}, r"0003\.png"),
    "number of labels": (lambda r: spoil_list(r, "0000.png 0 1\n0001.png 1 1\n0002.png 1\n"), {}, r"train_10\.txt.*3"),
    "label 2": (lambda r: spoil_list(r, "0000.png 0 1\n0001.png 2 1\n"), {}, r"train_10\.txt.*2.*--skip-bad-lines"),
    "empty list": (lambda r: spoil_list(r, ""), {}, r"train_10\.txt"),
    "no positive": (lambda r: spoil_list(r, "0000.png 0 0\n0001.png 0 0\n", "val_list"), {}, r"val_list\.txt: expected both labels"),
    "unreadable checkpoint": (lambda r: (r / "bad.pt").write_bytes(b"no"), {"weights": "bad.pt"}, r"bad\.pt: not a readable checkpoint"),
    "no ViT": (lambda r: data.save_checkpoint(r / "bad.pt", {"model": {"x": torch.ones(1)}}), {"weights": "bad.pt"}, r"bad\.pt: expected a ViT"),
    "missing checkpoint": (lambda r: None, {"weights": "none.pt"}, r"none\.pt: no such checkpoint"),
    "unwritable folder": (lambda r: (r / "file").write_text(""), {"out": "file/run"}, r"file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(easy, tmp_path, case):
    root = shutil.copytree(easy, tmp_path / "root")
    spoil, options, message = BAD[case]
    spoil(root)
    options = {"out": "run"} | options
    options = {name: str(root / value) for name, value in options.items()}
    with pytest.raises(data.InputError, match=message) as error:
        finetune.finetune(config(root, **options))
    assert "\n" not in str(error.value)
    assert not [path for path in root.rglob("*.tmp")] and not (root / "run" / "result.json").exists()


def test_weights_of_another_width_and_changed_weights_are_refused(easy, tmp_path):
    finetune.finetune(config(easy, tmp_path, method="lora"))
    other = mrm.ViT(64, 16, 1, 64, 3, 4)
    data.save_checkpoint(tmp_path / "base.pt", {"model": other.state_dict()})
    with pytest.raises(data.InputError, match=r"base\.pt: the encoder does not fit"):
        finetune.load_run(tmp_path)
    sizes = data.load_checkpoint(tmp_path / "adapter.pt")["sizes"]
    data.save_checkpoint(tmp_path / "base.pt", {"model": mrm.ViT(**sizes).state_dict()})
    with pytest.raises(data.InputError, match="not the weights this adapter was trained on"):
        finetune.load_run(tmp_path)


def test_pretraining_refuses_a_csv_without_the_columns(easy, tmp_path):
    root = shutil.copytree(easy, tmp_path / "root")
    (root / "training.csv").write_text("image,text\n0000.png,clear\n")
    with pytest.raises(data.InputError, match=r"training\.csv.*image_path"):
        mrm.pretrain(mrm.MRMConfig(data="csv", root=str(root), out=str(root / "run"), device="cpu"))


def test_a_script_prints_one_line_and_exits_with_2(tmp_path):
    run = subprocess.run([sys.executable, REPOSITORY / "finetune.py", "--data", "covid", "--root", "nowhere", "--split", "covid1"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
