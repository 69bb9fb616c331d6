"""reggan.py and the pairs of data.py: losses and metrics against formulas and scikit-image, learning, resuming, bad input."""
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import reggan
from kernels import warp

CASES = [(host, reg) for host in reggan.HOSTS for reg in (False, True)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return data.demo_pairs(tmp_path_factory.mktemp("demo"), size=32, slices=2, subjects=(("train", 3), ("val", 1), ("test", 2)))


def config(root="", **options):
    return reggan.Config(**({"root": str(root), "width": 8, "blocks": 1, "batch": 4, "device": "cpu", "dtype": "fp32"} | options))


def blob(size, seed=0):
    """A smooth image (1, 1, size, size) that is not constant anywhere."""
    knots = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.5, (1, 1, 7, 7))).float()
    return F.interpolate(knots, (size, size), mode="bicubic", align_corners=True).clamp(-0.99, 1)


def optimizers(model, lr=1e-3):
    return (torch.optim.Adam(reggan.trainable(model, "netG", "registration"), lr, betas=(0.5, 0.999)),
            torch.optim.Adam(reggan.trainable(model, "netD"), lr, betas=(0.5, 0.999)))


def step(model, c, a, b, opt_g, opt_d, pools=None):
    return reggan.training_step(model, c, a, b, opt_g, opt_d, pools or {}, lambda: torch.autocast("cpu", enabled=False))


# Losses and metrics


def test_losses_follow_their_formulas():
    rng = np.random.default_rng(0)
    flow, verdict = rng.normal(size=(2, 2, 5, 7)), rng.normal(size=(3, 1))
    expected = np.mean((flow[:, :, 1:] - flow[:, :, :-1]) ** 2) + np.mean((flow[..., 1:] - flow[..., :-1]) ** 2)
    assert np.isclose(float(reggan.smoothness(torch.from_numpy(flow))), expected, rtol=1e-12)
    assert np.isclose(float(reggan.lsgan(torch.from_numpy(verdict), True)), np.mean((verdict - 1) ** 2), rtol=1e-12)
    assert np.isclose(float(reggan.lsgan([torch.from_numpy(verdict)] * 2, False)), 2 * np.mean(verdict**2), rtol=1e-12)


@pytest.mark.parametrize("host", reggan.HOSTS)
def test_host_losses_follow_their_formulas(host):
    torch.manual_seed(0)
    model = reggan.build(config(host=host, reg=False), 1, 1, (32, 32)).eval()
    a, b = blob(32), blob(32, 1)
    with torch.no_grad():
        fakes, losses = model.generator_losses(a, b)
        assert torch.equal(fakes["B"], model.translate(a))
        if host == "pix2pix":
            assert torch.isclose(losses["l1"], 100 * (fakes["B"] - b).abs().mean())
            assert torch.isclose(losses["adversarial"], (model.netD_B(torch.cat((a, fakes["B"]), 1)) - 1).square().mean())
        if host == "nc":
            assert torch.isclose(losses["adversarial"], (model.netD_B(fakes["B"]) - 1).square().mean())
        if host == "cycle":
            there = (model.netG_B2A(fakes["B"]) - a).abs().mean() + (model.netG_A2B(fakes["A"]) - b).abs().mean()
            assert torch.isclose(losses["cycle"], 10 * there)
        d = model.discriminator_losses(a, b, fakes)["d"]
        if host == "nc":
            assert torch.isclose(d, (model.netD_B(b) - 1).square().mean() + model.netD_B(fakes["B"]).square().mean())


def test_metrics_equal_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    rng = np.random.default_rng(0)
    real = np.clip(rng.normal(0, 0.5, (3, 1, 40, 37)), -1, 1)
    real[..., :9] = -1
    fake = np.clip(real + rng.normal(0, 0.2, real.shape), -1, 1)
    got = reggan.metrics(torch.from_numpy(fake), torch.from_numpy(real))
    for i in range(3):
        f, r = (fake[i, 0] + 1) / 2, (real[i, 0] + 1) / 2
        inside = real[i, 0] != -1
        ssim, windows = structural_similarity(r, f, data_range=1, full=True)
        assert np.isclose(got["ssim"][i], ssim, atol=1e-9)
        assert np.isclose(got["ssim_foreground"][i], windows[3:-3, 3:-3][inside[3:-3, 3:-3]].mean(), atol=1e-9)
        assert np.isclose(got["psnr_whole"][i], peak_signal_noise_ratio(r, f, data_range=1))
        assert np.isclose(got["psnr"][i], peak_signal_noise_ratio(r[inside], f[inside], data_range=1))
        assert np.isclose(got["mae"][i], np.abs(f - r)[inside].mean())
    assert (reggan.metrics(torch.from_numpy(real), torch.from_numpy(real))["psnr"] == 100).all()


def test_folding_counts_reversed_pixels():
    flow = torch.zeros(1, 2, 8, 8)
    scores = reggan.registration_metrics(flow, flow + 3, torch.zeros(1, 1, 8, 8))
    assert scores["folding"] == 0 and torch.isclose(scores["registration_error"], torch.tensor([18.0**0.5]))
    flow[:, 1] = -2 * torch.arange(8.0)  # x runs backwards
    assert reggan.registration_metrics(flow, flow, torch.zeros(1, 1, 8, 8))["folding"] == 1


# Misalignment


@pytest.mark.parametrize("noise, elastic", [(0, 0), (3, 0), (5, 0), (3, 3), (0, 4)])
def test_true_displacement_registers_the_pair(noise, elastic):
    image = blob(96)[0]
    before = torch.get_rng_state()
    a, b, flow = data.misalign(image, image, np.random.default_rng(5), noise, elastic)
    assert torch.equal(torch.get_rng_state(), before)
    moved = warp(a[None], flow[None])[0]
    inside = (b > -0.999) & (moved > -0.999)
    inside[:, :14], inside[:, -14:], inside[..., :14], inside[..., -14:] = False, False, False, False
    error, unregistered = (moved - b).abs()[inside].mean(), (a - b).abs()[inside].mean()
    assert inside.sum() > 1000 and error < 5e-3
    assert (flow.norm(dim=0).mean() < 1e-3 and unregistered == 0) if not (noise or elastic) else error < unregistered / 20


def test_misalignment_is_redrawn_by_epoch_and_the_same_every_time(root):
    pairs = data.Pairs(root / "train", noise=3, seed=1)
    first, again, later = pairs.item(0, 1), pairs.item(0, 1), pairs.item(1, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, again)) and not torch.equal(first[0], later[0])


def test_batches_resume_and_divide(root):
    pairs = data.Pairs(root / "train", noise=2)
    everything = list(pairs.batches(4, epochs=2, shuffle=True))
    assert [len(batch[0]) for batch in everything] == [4, 2, 4, 2]
    assert torch.equal(everything[3][0], next(iter(pairs.batches(4, epochs=2, shuffle=True, start=3)))[0])
    assert sum(len(batch[0]) for rank in (0, 1) for batch in pairs.batches(4, rank=rank, world=2)) == len(pairs)


# Networks


def test_generator_and_discriminator_have_the_published_keys():
    g = {"model_head.1.weight": (64, 1, 7, 7), "model_head.4.weight": (128, 64, 3, 3), "model_head.7.weight": (256, 128, 3, 3),
         "model_tail.0.weight": (256, 128, 3, 3), "model_tail.3.weight": (128, 64, 3, 3), "model_tail.7.weight": (1, 64, 7, 7)}
    g |= {f"model_body.{i}.conv_block.{j}.weight": (256, 256, 3, 3) for i in range(9) for j in (1, 5)}
    d = {"model.0.weight": (64, 1, 4, 4), "model.2.weight": (128, 64, 4, 4), "model.5.weight": (256, 128, 4, 4),
         "model.8.weight": (512, 256, 4, 4), "model.11.weight": (1, 512, 4, 4)}
    for network, expected in ((reggan.Generator(), g), (reggan.Discriminator(), d)):
        state = network.state_dict()
        assert {k: tuple(v.shape) for k, v in state.items() if k.endswith("weight")} == expected
        assert set(state) == set(expected) | {k.replace("weight", "bias") for k in expected}


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (64, 33)])
def test_any_size_and_zero_registration_is_the_identity(size):
    image = torch.rand(2, 1, *size)
    assert reggan.Generator(1, 3, 8, 1, 2)(image).shape == (2, 3, *size)
    assert reggan.Discriminator(1, 8)(image).shape == (2, 1)
    flow = reggan.Registration(1, size, 16)(image, image.flip(0))
    assert flow.shape == (2, 2, *size) and (flow == 0).all() and torch.equal(warp(image, flow), image)


@pytest.mark.parametrize("host, reg", CASES)
def test_a_step_changes_every_trainable_parameter(host, reg):
    torch.manual_seed(0)
    c = config(host=host, reg=reg)
    model = reggan.build(c, 1, 1, (32, 32))
    for p in model.parameters():  # zero-initialised parts would hide what lies behind them
        if (p == 0).all() and p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    frozen = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    before = {k: v.clone() for k, v in model.named_parameters() if v.requires_grad}
    step(model, c, torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1, *optimizers(model))
    after = dict(model.named_parameters())
    assert [k for k, v in before.items() if torch.equal(v, after[k])] == []
    assert all(torch.equal(v, after[k]) for k, v in frozen.items())


# Learning


def test_registration_alone_recovers_a_translation():
    torch.manual_seed(0)
    real, size = blob(32, 3), 32
    rows, cols = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    fake = warp(real, torch.stack((torch.full_like(rows, -2), torch.full_like(cols, 3))).float()[None])
    r = reggan.Registration(1, (32, 32), 16)
    optimizer = torch.optim.Adam(r.parameters(), 2e-3)
    for _ in range(120):
        flow = r(fake, real)
        loss = 20 * F.l1_loss(warp(fake, flow), real) + 0.1 * reggan.smoothness(flow)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inside = r(fake, real)[0, :, 6:-6, 6:-6]
    assert (inside - torch.tensor([2.0, -3.0])[:, None, None]).norm(dim=0).mean() < 0.5


def test_overfits_one_pair(root):
    torch.manual_seed(0)
    c = config(width=16)
    model = reggan.build(c, 1, 1, (32, 32))
    opts = optimizers(model, 2e-3)
    a, b = data.Pairs(root / "train")[[(0, 0)]]
    for _ in range(150):
        step(model, c, a, b, *opts)
    with torch.no_grad():
        score = reggan.metrics(model.translate(a), b)["psnr"]
    assert score > 20 and score > reggan.metrics(a, b)["psnr"] + 6


def test_resume_is_bit_exact(root, tmp_path):
    whole = config(root, epochs=4, out=str(tmp_path / "whole"))
    reggan.train(whole)
    part = dataclasses.replace(whole, out=str(tmp_path / "part"))
    with pytest.MonkeyPatch.context() as patch:  # the machine stops after the second epoch's checkpoint
        saves, save = [], reggan.save_checkpoint

        def stop(path, state):
            save(path, state)
            saves.append(path.name)
            if saves.count("last.pt") == 2:
                raise KeyboardInterrupt
        patch.setattr(reggan, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            reggan.train(part)
    reggan.train(dataclasses.replace(part, resume=True))
    a, b = (data.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    assert a["step"] == b["step"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    result = json.loads((tmp_path / "part" / "result.json").read_text())
    assert {"mae", "psnr", "ssim", "host", "registration", "noise", "registration_error"} <= set(result)
    with pytest.raises(data.InputError, match="--width"):
        reggan.train(dataclasses.replace(part, resume=True, width=16))


def test_compare_goes_on_and_writes_tables(root, tmp_path):
    c = config(root, epochs=1, compare=True, hosts="nc,nc+r", levels="0,elastic", seeds=1, out=str(tmp_path / "t"))
    reggan.compare(c)
    stamp = (tmp_path / "t/cells/nc+r_0_0/result.json").stat().st_mtime_ns
    reggan.compare(c)
    assert (tmp_path / "t/cells/nc+r_0_0/result.json").stat().st_mtime_ns == stamp
    assert "| nc+r |" in (tmp_path / "t/table.md").read_text()
    assert len((tmp_path / "t/table.csv").read_text().splitlines()) == 5
    with pytest.raises(data.InputError, match="munit"):
        reggan.compare(dataclasses.replace(c, hosts="munit"))


# Reading, translating, bad input


def test_translate_keeps_format_and_depth(root, tmp_path):
    reggan.train(config(root, epochs=1, out=str(tmp_path / "run")))
    source = tmp_path / "in"
    source.mkdir()
    picture = ((blob(40)[0, 0].numpy() + 1) / 2)
    Image.fromarray((picture * 255).astype(np.uint8)).save(source / "a.png")
    Image.fromarray((picture * 65535).astype(np.uint16)).save(source / "b.png")
    np.save(source / "c.npy", (picture * 2 - 1).astype(np.float16))
    reggan.translate_folder(config(translate=str(source), weights=str(tmp_path / "run"), out=str(tmp_path / "out")))
    with Image.open(tmp_path / "out/a.png") as a, Image.open(tmp_path / "out/b.png") as b:
        assert (a.mode, b.mode[:1], a.size) == ("L", "I", (40, 40))
    assert np.load(tmp_path / "out/c.npy").dtype == np.float16


def good(seed=0):
    return blob(32, seed)[0, 0].numpy()


@pytest.mark.parametrize("message, spoil", [
    ("only in A: extra.npy", lambda d: np.save(d / "train/A/extra.npy", good())),
    ("--size", lambda d: [np.save(d / f"train/{s}/zz.npy", blob(40)[0, 0].numpy()) for s in "AB"]),
    ("its A has", lambda d: np.save(d / "train/B/x.npy", blob(40)[0, 0].numpy())),
    ("2-D array", lambda d: np.save(d / "train/A/x.npy", np.zeros((32, 32, 5)))),
    ("NaN", lambda d: np.save(d / "train/A/x.npy", np.where(good() > 0.1, np.nan, good()))),
    ("constant", lambda d: np.save(d / "train/B/x.npy", np.full((32, 32), -1.0))),
    ("--rescale", lambda d: np.save(d / "train/A/x.npy", good() * 900)),
    ("at least 32", lambda d: np.save(d / "train/A/x.npy", good()[:20])),
    ("not a readable", lambda d: (d / "train/A/x.npy").write_bytes((d / "train/A/x.npy").read_bytes()[:200])),
    ("no image", lambda d: [p.unlink() for p in (d / "val/A").iterdir()]),
    ("no such folder", lambda d: [p.rename(p.with_name("C")) for p in [d / "train/A"]]),
])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, message, spoil):
    root = tmp_path / "pairs"
    for part in ("train", "val"):
        for k, side in enumerate("AB"):
            (root / part / side).mkdir(parents=True)
            np.save(root / part / side / "x.npy", good(k))
    spoil(root)
    with pytest.raises(data.InputError, match=message) as caught:
        reggan.train(config(root, out=str(tmp_path / "run")))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_unknown_host_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        data.parse_config(reggan.Config, ["--host", "munit"])
    assert caught.value.code == 2 and "munit" in capsys.readouterr().err
