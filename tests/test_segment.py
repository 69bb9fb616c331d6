"""segment.py: UPerNet, its loss and metrics against plain formulas; runs, resuming, prediction."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from support import demo
from support import script as common
from support.script import InputError
import data
import finetune
import mrm
from more import segment
from more.segment import SegmentConfig
from test_script import in_processes


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


NET = dict(img_size=24, patch_size=4, embed_dim=24, depth=6, num_heads=3, channels=8)


def upernet(**options):
    """A UPerNet in eval mode, away from its initialisation, norms included."""
    torch.manual_seed(0)
    model = segment.UPerNet(**NET | options).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor)
    return model


def test_upernet_taps_the_blocks_of_the_paper():
    vit = dict(img_size=16, patch_size=8, embed_dim=8, num_heads=2)
    chosen = {depth: segment.UPerNet(4, depth=depth, **vit).chosen for depth in (12, 6, 4, 1)}
    assert chosen == {12: [4, 6, 8, 12], 6: [2, 3, 4, 6], 4: [2, 2, 3, 4], 1: [1, 1, 1, 1]}
    model, images, after, maps = upernet(), torch.randn(2, 1, 24, 24), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: after.append(output))
    model.head.register_forward_pre_hook(lambda _, arguments: maps.extend(arguments[0]))
    model(images)
    for found, number in zip(maps, (2, 3, 4, 6), strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), after[number - 1][:, 1:])
    assert torch.equal(model.tokens(images), after[5])


def test_upernet_against_its_equations():
    """Every path written out: a head in which one is left out or crossed gives another result."""
    head, maps = upernet().head, torch.randn(4, 2, 24, 6, 6)
    a, b, c, d = maps

    def normed(x, layer):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def block(x, layer):
        kernel = layer[0].weight
        return F.relu(normed(F.conv2d(x, kernel, padding=kernel.shape[2] // 2), layer[1]))

    def up(x, side):
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)

    def twice(x, layer):
        return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

    a = twice(F.gelu(normed(twice(a, head.up4[0]), head.up4[1])), head.up4[3])
    b, d = twice(b, head.up2), F.max_pool2d(d, 2)
    cells = {n: F.adaptive_avg_pool2d(d, n) for n in (1, 2, 3, 6)}
    pooled = [up(block(cells[n], layer), 3) for n, layer in zip((1, 2, 3, 6), head.pooled)]
    top = block(torch.cat([d, *pooled], 1), head.top)
    c = block(c, head.lateral[0]) + up(top, 6)
    b = block(b, head.lateral[1]) + up(c, 12)
    a = block(a, head.lateral[2]) + up(b, 24)
    levels = [up(top, 24), up(block(c, head.smooth[0]), 24), up(block(b, head.smooth[1]), 24)]
    fused = block(torch.cat([*levels, block(a, head.smooth[2])], 1), head.fuse)
    expected = F.conv2d(fused, head.classify[1].weight, head.classify[1].bias)
    [logits] = head(list(maps))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_all_of_upernet_is_trained():
    model = upernet().train()
    logits = model(torch.randn(2, 1, 24, 24))
    assert logits.shape == (2, 2, 24, 24)  # the second channel is the auxiliary head's
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_upernet_of_any_size_that_the_patches_divide():
    for side in (4, 12, 28):
        images = torch.randn(1, 1, side, side)
        assert upernet(img_size=side, channels=6)(images).shape == images.shape


def blobs(n=40, side=12, seed=0):
    """Logits and masks of which some are empty, and which agree more or less."""
    rng = np.random.default_rng(seed)
    masks = np.kron(rng.random((n, 3, 3)) < 0.3, np.ones((side // 3, side // 3))) > 0
    masks[::4] = False
    logits = rng.normal(size=masks.shape) - 2 + 3 * masks * rng.random((n, 1, 1))
    logits[::8] -= 4
    return torch.tensor(logits).float(), torch.tensor(masks)


def test_segmentation_loss_against_its_equations():
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(3, 2, 5, 4)) * 2, (rng.random((3, 1, 5, 4)) < 0.3) * 1.0
    masks[2] = 0
    expected = 0
    for weight, channel in ((1, 0), (0.4, 1)):
        focal, dice = [], []
        for x, y in zip(logits[:, channel], masks[:, 0]):
            p = 1 / (1 + np.exp(-x))
            q = np.where(y, p, 1 - p)
            focal.append(np.mean(-0.5 * (1 - q) ** 2 * np.log(q)))
            dice.append(1 - (2 * (p * y).sum() + 1) / ((p * p).sum() + y.sum() + 1))
        expected += weight * (2 * np.mean(focal) + np.mean(dice))
    logits, masks = torch.tensor(logits), torch.tensor(masks)
    assert segment.segmentation_loss(logits, masks).item() == pytest.approx(expected)
    head = torch.tensor([1, 0])[:, None, None]
    one, both, none = (segment.segmentation_loss(x, masks).item()
                       for x in (logits[:, :1], logits * head, 0 * logits[:, :1]))
    assert one == pytest.approx(both - 0.4 * none)


def plain_dices(found, truth):
    """`dice`, `dice_all` and `dice_official` of bool masks (n, H, W)."""
    each = [2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0
            for a, b in zip(found, truth)]
    some = [dice for dice, b in zip(each, truth) if b.any()]
    halves = [(a & b).sum() / (a.sum() + b.sum()) for a, b in ((found, truth), (~found, ~truth))]
    return np.mean(some), np.mean(each), sum(halves)


def test_each_dice_against_a_plain_formula():
    logits, masks = blobs()
    counts = segment.count_pixels(segment.find_pixels(logits, 0.4, 5), masks)
    found, truth = torch.sigmoid(logits).numpy() > 0.4, masks.numpy()
    found[found.sum((1, 2)) < 5] = False
    scores = segment.dice_scores(counts, 144, 2000)
    assert list(scores) == ["dice", "dice_all", "dice_official"]
    points = [values[0] for values in scores.values()]
    assert points == pytest.approx(plain_dices(found, truth)) and len(set(points)) == 3
    rows = np.random.default_rng(5).integers(len(found), size=(1000, len(found)))
    draws = [plain_dices(found[row], truth[row]) for row in rows]
    for values, expected in zip(scores.values(), np.array(draws).T, strict=True):
        ours, theirs = (np.percentile(x, [2.5, 97.5]) for x in (values[1:], expected))
        assert ours == pytest.approx(theirs, abs=0.02)
    empty = segment.dice_scores(np.zeros((3, 4), int), 9)
    assert np.isnan(empty["dice"][0]) and empty["dice_all"][0] == 1


def test_threshold_and_smallest_area_are_the_best_of_all():
    logits, masks = blobs(seed=3)

    def dice(threshold, area):
        counts = segment.count_pixels(segment.find_pixels(logits, threshold, area), masks)
        return segment.dice_scores(counts, 144)["dice_all"][0]

    chosen = segment.choose_threshold(logits, masks)
    areas = (0, 1, 2, 3, 5, 6, 8, 9, 12, 15)
    best = max(dice(t / 10, area) for t in range(1, 10) for area in areas)
    assert chosen["dice"] == pytest.approx(best)
    assert dice(chosen["threshold"], chosen["smallest"]) == pytest.approx(best)
    assert chosen["smallest"] > 0  # the noise in empty images makes it worth something


def run(root, out, **options):
    options = dict(weights="scratch", steps=4, evaluations=2, device="cpu", batch_size=16,
                   img_size=48, channels=8, min_crop=0.6) | options
    return SegmentConfig(data="csv", root=str(root), out=str(out), **options)


@pytest.mark.parametrize("options", [{}, dict(lora=True), dict(method="linear")])
def test_a_run_leaves_its_files_and_resumes_bit_for_bit(holes, tmp_path, stopped, options):
    whole = segment.segment(run(holes, tmp_path / "whole", **options))
    assert {"dice", "dice_ci", "dice_all", "threshold", "smallest", "area_error"} <= whole.keys()
    left = {path.name for path in (tmp_path / "whole").iterdir()}
    best = "adapter.pt" if "lora" in options else "best.pt"
    assert {"config.json", "log.jsonl", "result.json", "overlays.png", best} <= left
    weights, out = str(tmp_path / "whole"), str(tmp_path / "masks")
    segment.predict_folder(SegmentConfig(predict=str(holes / "images"), weights=weights, out=out,
                                         device="cpu"))
    same = shutil.copytree(holes / "images", tmp_path / "same")
    shutil.copy(same / "0001.bmp", same / "0001.BMP")
    with pytest.raises(common.InputError, match="names that differ before"):
        segment.predict_folder(SegmentConfig(predict=str(same), weights=weights, out=out + "2"))
    mask = np.asarray(Image.open(tmp_path / "masks/0001.png"))  # of the size of its image
    assert mask.shape == (40, 60) and set(np.unique(mask)) <= {0, 255}
    part = run(holes, tmp_path / "part", **options)
    stopped(segment.segment, part)
    segment.segment(dataclasses.replace(part, resume=True))
    a, b = (common.load_checkpoint(tmp_path / name / "last.pt")["model"]
            for name in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    blank = shutil.copytree(holes, tmp_path / "blank")
    for name in [path.name for path in sorted((holes / "masks").iterdir())][5:24]:
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(blank / "masks" / name)
    train = segment.read_lists(run(blank, tmp_path / "none", ratio=100))[0]["train"]
    assert [name[:4] for name in train.names] == ["0000", "0001", "0002", "0004", "0010", "0017"]
    for method, lr in (("full", 1.5e-3), ("lora", 5e-3)):
        config = SegmentConfig(weights="scratch", device="cpu", method=method)
        filled, _ = segment.take_preset(config, None, {"sizes": mrm.MODELS["tiny"]}, 9)
        assert filled.lr == lr and filled.mean == mrm.MEAN


def predicted(folder, settings, holes):
    """The logits of the test list by the saved model of a run, and its masks."""
    model, saved = finetune.load_run(folder, "more.segment", segment.make_network)
    names, _ = data.read_list(holes / "test_list.txt")
    masks = data.find_masks(holes / "masks", [name[:4] for name in names])
    films = data.ImageSet([str(holes / "images" / name) for name in names], 48, masks=masks)
    truth = films[range(len(films)), 0][0][:, 1] > 0.5
    films.augment = segment.image_alone
    settings = dataclasses.replace(settings, mean=saved["mean"], std=saved["std"], dtype="fp32")
    logits = finetune.predict(model, films, settings, torch.device("cpu"))[:, 0]
    return logits, truth, names, saved["segment"]


def test_masks_of_any_batch_size_and_of_workers_are_equal(holes, tmp_path, monkeypatch):
    segment.segment(run(holes, tmp_path, steps=20, lr=5e-3))
    batches, found = data.eval_batches, {}
    for size, workers in ((16, 0), (1, 0), (5, 1)):
        monkeypatch.setattr(
            data, "eval_batches", lambda images, _, *rest, size=size: batches(images, size, *rest))
        found[size] = predicted(tmp_path, run(holes, tmp_path, workers=workers), holes)[0]
    assert found[16].shape == (12, 48, 48) and found[16].std() > 0.1
    for size in (1, 5):
        torch.testing.assert_close(found[size], found[16], atol=1e-4, rtol=1e-4)


def test_two_processes_segment_with_the_statistics_that_are_saved(holes, tmp_path):
    """A batch norm sees other images in each process; what both predict is what the saved model
    says."""
    options = "--data csv --img-size 48 --channels 8 --steps 6 --lr 5e-3 --evaluations 2"
    options += " --batch-size 4 --device cpu --dtype fp32 --weights scratch"
    in_processes(2, "-m", "more.segment", "--root", holes, "--out", tmp_path, *options.split())
    logits, truth, names, chosen = predicted(tmp_path, run(holes, tmp_path), holes)
    found = segment.find_pixels(logits, chosen["threshold"], chosen["smallest"])
    rows = list(csv.reader((tmp_path / "predictions.csv").open()))[1:]
    assert [row[0] for row in rows] == names
    counts = segment.count_pixels(found, truth)
    np.testing.assert_allclose(np.array([row[1:] for row in rows], int).T, counts, atol=3)


def test_the_demo_has_no_files_where_there_is_no_pneumothorax(tmp_path):
    root = demo.write_demo_records(tmp_path / "demo", patients=60, size=32)
    options = SegmentConfig(root=str(root), ratio=100)
    parts, _ = segment.read_lists(options)
    part, train = parts["test"], parts["train"].masks
    column = [name for _, name in data.read_lines(root / "classes.txt")].index("Pneumothorax")
    # Of the images without a mask about as many as with one
    shown = sum(mask is not None for mask in train)
    assert shown and len(train) <= 3 * shown
    assert [mask is not None for mask in part.masks] == (part.labels[:, column] == 1).tolist()
    name = next(name for name, mask in zip(part.names, part.masks) if mask)
    (root / "masks" / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no such mask"):
        segment.read_lists(options)


@pytest.mark.parametrize("options, message", [
    (dict(masks="none"), "none/0000.png: no such mask .24 of 24"),
    (dict(batch_size=1), "--batch-size: expected two images or more"),
    (dict(img_size=33), "scratch: img_size 33 must be a multiple of patch_size")])
def test_what_cannot_be_used_is_one_line(holes, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        segment.segment(run(holes, tmp_path / "run", **options))
    assert not list(tmp_path.iterdir())


def test_upernet_overfits_one_image(holes):
    """To a Dice of 0.99, by the loss, the optimiser and the rate of a run. The image is mirrored,
    since batch norm needs images that differ."""
    torch.manual_seed(0)
    masks = data.find_masks(holes / "masks", ["0001"])
    films = data.ImageSet([str(holes / "images/0001.bmp")], 48, masks=masks)
    pair, _ = films[[0], 0]
    pair = torch.cat([pair, pair.flip(2), pair.flip(3), pair.flip(2, 3)])
    settings = run(holes, "", optimizer="adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.65,
                   method="full", drop_path=0.0)
    sizes = dict(img_size=48, patch_size=4, embed_dim=32, depth=3, num_heads=2)
    model = segment.build_model(settings, sizes).train()
    optimizer = finetune.optimizer_by_layer(model, settings)
    images = data.normalize(pair[:, :1])
    for _ in range(150):
        optimizer.zero_grad()
        segment.segmentation_loss(model(images), pair[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(images)[:, 0]
    counts = segment.count_pixels(segment.find_pixels(logits, 0.5), pair[:, 1] > 0.5)
    assert segment.dice_scores(counts, 48**2)["dice"][0] > 0.99
