"""reggan.py and its hosts: losses against formulas, metrics against scikit-image, bad input."""

import dataclasses
import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import map_coordinates
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import reggan
from kernels import warp
from more import improved, nicegan
from support import demo as demo_drawing
from support import script as common
from support.script import InputError
from test_script import in_processes

SMALL = dict(width=4, blocks=1, batch_size=2, epochs=1, device="cpu")
EVERY_LOSS = ("correction", "smooth", "drift", "synthetic", "equivariance")


def filled(**options):
    """A configuration as training sees it: what is not named comes from the preset."""
    return reggan.complete(config_of(**{**SMALL, **options}))


def config_of(form="paper's", **options):
    """The class of options of the script that knows them; more.improved in the paper's form too."""
    if form == "improved":
        return improved.Config(**options)
    if {"reg_net", "drift", "synthetic", "equivariance"} & set(options):
        paper = dict(reg_net="unet", reg_lr=2e-3, correction=20.0, drift=0.0, synthetic=0.0,
                     equivariance=0.0)
        return improved.Config(**paper | options)
    return (nicegan if options.get("host") == "nice" else reggan).Config(**options)


def small(root, name="run", **options):
    """A short run of small networks on the pairs in `root`, in the folder `root`/`name`."""
    return config_of(**SMALL | {"root": str(root), "out": str(root / name)} | options)


def refused(match):
    return pytest.raises(InputError, match=match)


def translate(folder, run, out):
    reggan.translate_folder(config_of(translate=str(folder), weights=str(run), out=str(out),
                                      device="cpu"))


def lines_of(out, *names, val=False):
    """The lines of log.jsonl, of steps or of evaluations; of `names` the values alone."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    lines = [line for line in lines if ("val" in line) == val]
    return [[line[name] for name in names] for line in lines] if names else lines


def optimizers_of(model, **rates):
    parts = ("netG", "registration"), ("netD", )
    return [torch.optim.Adam(reggan.trainable(model, *names), **rates) for names in parts]


def make_pools(size=50):
    return {side: reggan.Pool(size) for side in "AB"}


def shaken(model):
    """`model` with other weights: R's last layer is zero, which stops the gradient to all before
    it."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def left_over(model):
    """Gives every weight a gradient, as an earlier step leaves one: no step may count it."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)


def smooth_image(n, seed, size=32):
    """n smooth random images (n, 1, size, size) in (-1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 1, 6, 6, generator=generator)
    return torch.tanh(F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True))


@pytest.fixture
def root(tmp_path):
    """3 training and 2 val pairs of A and its negative B, both with background -1 at the rim."""
    for part, n, seed in (("train", 3, 0), ("val", 2, 1)):
        for side, sign in (("A", 1), ("B", -1)):
            (tmp_path / part / side).mkdir(parents=True)
            for i, image in enumerate(smooth_image(n, seed)):
                image = F.pad(sign * image[0, 2:-2, 2:-2], (2, ) * 4, value=-1.0)
                np.save(tmp_path / part / side / f"s{i}.npy", image.numpy().astype(np.float16))
    return tmp_path


@pytest.mark.numeric
def test_smoothness_and_lsgan_in_float64():
    flow = np.random.default_rng(0).normal(size=(2, 2, 5, 7))
    expected = np.diff(flow, axis=2) ** 2, np.diff(flow, axis=3) ** 2
    found = reggan.smoothness(torch.from_numpy(flow)).item()
    assert found == pytest.approx(sum(map(np.mean, expected)), rel=1e-12)
    verdict = torch.tensor([[0.3], [-0.5]], dtype=torch.float64)
    assert reggan.lsgan(verdict, True).item() == pytest.approx((0.7**2 + 1.5**2) / 2)
    assert reggan.lsgan(verdict, False).item() == pytest.approx((0.3**2 + 0.5**2) / 2)


@pytest.mark.numeric
def test_metrics_against_scikit_image():
    real, fake = smooth_image(2, 0), smooth_image(2, 1)
    real[:, :, :6] = -1
    scores = reggan.metrics(fake, real)
    for i in range(2):
        r, f = ((x[i, 0].double().numpy() + 1) / 2 for x in (real, fake))
        inside = r > 0
        psnr = peak_signal_noise_ratio(r[inside], f[inside], data_range=1)
        expected = {"mae": np.abs(r - f)[inside].mean(), "psnr": psnr, "foreground": 26 / 32,
                    "ssim": structural_similarity(r, f, data_range=1)}
        assert {name: x[i].item() for name, x in scores.items()} == pytest.approx(expected)
    red, white = -torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    red[:, 0, 2:6] = 1  # in two of three channels of the foreground white is wrong
    scores = {name: x.item() for name, x in reggan.metrics(white, red).items()}
    assert scores["mae"] == pytest.approx(2 / 3) and scores["foreground"] == 0.5


def test_registration_metrics_of_known_flows():
    real, shift = torch.zeros(1, 1, 8, 8), torch.full((1, 2, 8, 8), 3.0)
    scores = reggan.registration_metrics(torch.zeros_like(shift), real, shift)
    expected = {"registration_error": 3 * 2**0.5, "misalignment": 3 * 2**0.5, "folding": 0}
    assert {name: x.item() for name, x in scores.items()} == pytest.approx(expected)
    flow = torch.ones(1, 2, 8, 8)
    flow[..., :2, :] = 50.0
    real[..., :2, :] = -1  # the background does not count
    scores = reggan.registration_metrics(flow, real, shift)
    assert scores["registration_error"].item() == pytest.approx(2 * 2**0.5)
    assert reggan.registration_metrics(flow, real).keys() == {"folding"}
    y = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    x = y.transpose(2, 3)
    for along_y, along_x, folds in ((-2 * y, 0 * x, 1), (-1.5 * y, 0 * x, 1), (2 * x, 2 * y, 1),
                                    (2 * x, -2 * y, 0)):  # determinants -1, -0.5, -3, 5
        flow = torch.cat([along_y, along_x], 1)
        assert reggan.registration_metrics(flow, real)["folding"].item() == folds


def reggan_keys(blocks=9):
    """Kid-Liet/Reg-GAN's Generator: convolutions at 1, 4, 7 of the head, 1 and 5 of a block, 0, 3,
    7 of the tail."""
    layers = [f"model_head.{i}" for i in (1, 4, 7)] + [f"model_tail.{i}" for i in (0, 3, 7)]
    layers += [f"model_body.{b}.conv_block.{i}" for b in range(blocks) for i in (1, 5)]
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_state_dict_keys_are_reg_gans():
    assert set(reggan.Generator(1, 1).state_dict()) == reggan_keys()
    keys = {f"model.{i}.{kind}" for i in (0, 2, 5, 8, 11) for kind in ("weight", "bias")}
    assert set(reggan.Discriminator(1).state_dict()) == keys


@pytest.mark.numeric
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 48)])
def test_networks_take_any_size_and_registration_starts_as_the_identity(size):
    a, b = torch.randn(3, 1, *size), torch.randn(3, 1, *size)
    for R in (reggan.Registration(2, size, 8), improved.CoarseToFine(size, 8)):
        flow = R(a, b)
        assert flow.shape == (3, 2, *size) and not flow.any()
        assert torch.equal(warp(a, flow), a)
    generator = reggan.Generator(1, 2, 4, 1)
    fake = generator(a)
    assert fake.shape == (3, 2, *size) and fake.abs().max() <= 1
    assert torch.allclose(generator(a[1:2]), fake[1:2], atol=1e-5)  # in channels_last
    assert reggan.Discriminator(1, 4)(a).shape == (3, 1)


def test_nice_gan_reads_as_finely_as_the_other_generators(root):
    """Its encoding is halved as often as their inner images, so the decoder is handed as many
    pixels."""
    a = smooth_image(2, 0, 44)
    for downs in (1, 2):
        host = nicegan.Nice(filled(host="nice", downs=downs), 1, 2)
        assert host.netD_A.encode(a)[0].shape == (2, 8, 44 // 2**downs, 44 // 2**downs)
        assert host.translate(a).shape == (2, 2, 44, 44)
        assert host.translate(a[..., :43, :33]).shape == (2, 2, 43, 33)
    with refused("--downs: expected 1 or 2 with nice, found 3"):
        reggan.train(small(root, host="nice", downs=3))
    assert not (root / "run").exists()


@pytest.mark.numeric
def test_drift_is_the_mean_square_of_the_running_mean_flow():
    """m <- 0.99 m + 0.01 mean over the batch, from zero, in % of the sides; its gradient is the
    same for every image of the batch."""
    mean, m = torch.zeros(2, 32, 48, dtype=torch.float64), np.zeros((2, 32, 48))
    percent = 100 / np.array([32, 48])[:, None, None]
    for seed in range(3):
        flow = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 2, 32, 48)))
        m = 0.99 * m + 0.01 * flow.numpy().mean(0) * percent
        loss = improved.running_mean(mean, flow.requires_grad_()).square().mean()
        assert loss.item() == pytest.approx((m**2).mean(), rel=1e-12)
        mean = improved.running_mean(mean, flow.detach())
        assert np.allclose(mean.numpy(), m, rtol=1e-12)
    (slope,) = torch.autograd.grad(loss, flow)
    expected = np.broadcast_to(2 * m / m.size * 0.01 / 4 * percent, flow.shape)
    assert np.allclose(slope, expected, rtol=1e-9)


def test_synthetic_error_is_the_mean_error_in_percent_of_the_sides():
    """Of an R that finds no motion it is the mean length of the motion; of one that finds all of
    it, 0."""
    R, b = improved.CoarseToFine((32, 48), 8), smooth_image(3, 0, 48)[:, :, :32]
    torch.manual_seed(0)
    error = improved.synthetic_loss(R, b).item()
    torch.manual_seed(0)
    motion = improved.random_motion(b, mirrored=False)
    dy, dx = motion.double().numpy().swapaxes(0, 1)
    assert error == pytest.approx(np.hypot(100 * dy / 32, 100 * dx / 48).mean(), rel=1e-5)
    R.forward = lambda fake, real: motion if torch.equal(real, warp(fake, motion)) else 0 * motion
    torch.manual_seed(0)
    assert improved.synthetic_loss(R, b).item() == 0


def test_synthetic_motion_teaches_rotation():
    """R on nothing but synthetic motion: a rotation of other images is found to a tenth, its sense
    included."""
    torch.manual_seed(0)
    R = improved.CoarseToFine((32, 32), 16)
    optimizer = torch.optim.Adam(R.parameters(), 8e-3, betas=(0.5, 0.999))
    for step in range(80):
        loss = improved.synthetic_loss(R, smooth_image(8, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    rotation = torch.stack((-0.1 * x, 0.1 * y)).expand(16, 2, 32, 32)
    images = smooth_image(16, 999)
    with torch.no_grad():
        found = R(images, warp(images, rotation))
    assert (found * rotation).sum() / rotation.square().sum() == pytest.approx(1, abs=0.1)
    assert (found - rotation).norm(dim=1).mean() < 0.4 < 1.2 < rotation.norm(dim=1).mean()


def test_random_motion_is_affine_mirrors_half_of_the_time_and_keeps_the_middle_near():
    torch.manual_seed(0)
    motion = improved.random_motion(torch.empty(4000, 1, 9, 17))
    grid = torch.meshgrid(torch.arange(9.0), torch.arange(17.0), indexing="ij")
    position = motion + torch.stack(grid)
    assert motion.diff(n=2, dim=2).abs().max() < 1e-4 and motion.diff(n=2, dim=3).abs().max() < 1e-4
    dy, dx = position.diff(dim=2)[:, 0, 0, 0], position.diff(dim=3)[:, 1, 0, 0]
    for slope in (dy, dx):  # 1 +- 0.1 or -1 +- 0.1
        assert (slope < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert slope.abs().mean().item() == pytest.approx(1, abs=0.01)
        assert slope.abs().std().item() == pytest.approx(0.1, abs=0.01)
    assert (dy * dx < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    shift = motion[:, :, 4, 8]  # the middle
    assert torch.allclose(shift.mean(0), torch.zeros(2), atol=0.05)
    assert torch.allclose(shift.std(0), torch.tensor([0.45, 0.85]), rtol=0.05)
    upright = improved.random_motion(torch.empty(400, 1, 9, 17), mirrored=False)
    assert (upright.diff(dim=2)[:, 0] > -1).all() and (upright.diff(dim=3)[:, 1] > -1).all()


@pytest.mark.numeric
def test_equivariance_is_zero_for_a_generator_that_does_not_move_and_sees_one_that_does():
    """mean |G(moved a) - moved G(a)|: a point-wise G commutes with every motion, a G that shifts
    with few."""
    a, model = smooth_image(4, 0), reggan.build(filled(), 1, 1, (32, 32))

    def equivariance(G):
        model.netG_A2B.forward = G
        torch.manual_seed(1)
        return improved.equivariance_loss(model, a, G(a))

    assert equivariance(lambda x: 1 - 2 * x) < 1e-5 / 30
    shifted = equivariance(lambda x: x.roll(3, 2))
    torch.manual_seed(1)
    motion = improved.random_motion(a)
    expected = (warp(a, motion).roll(3, 2) - warp(a.roll(3, 2), motion)).abs().mean()
    assert shifted > 0.5 / 30 and torch.allclose(shifted, expected, rtol=1e-5)


def test_no_flow_leaves_the_image_by_more_than_half_of_it():
    """A flow that points out of the image everywhere has no gradient and would never come back."""
    R = improved.CoarseToFine((32, 48), 8)
    with torch.no_grad():
        for head in R.heads:
            head.bias.fill_(1e4)
        flow = R(torch.randn(1, 1, 32, 48), torch.randn(1, 1, 32, 48))
    assert 12 < flow.max() < 16


@pytest.mark.parametrize("network", ["unet", "coarse"])
def test_registration_alone_recovers_a_translation(network):
    torch.manual_seed(0)
    b = smooth_image(4, 5)
    true = torch.tensor([2.0, -1.5]).view(1, 2, 1, 1).expand(4, 2, 32, 32)
    a, size = warp(b, -true), (32, 32)
    unet = network == "unet"
    R = reggan.Registration(2, size, 16) if unet else improved.CoarseToFine(size, 16)
    optimizer = torch.optim.Adam(R.parameters(), 2e-3)
    for _ in range(100):
        flow = R(a, b)
        loss = 20 * reggan.correction(a, flow, b) + 10 * reggan.smoothness(flow)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (flow - true)[..., 6:-6, 6:-6].norm(dim=1).mean().item()
    assert error < 0.5, error


@pytest.mark.parametrize("form", ["no-reg", "paper's", "improved"])
@pytest.mark.parametrize("host", list(reggan.HOSTS))
def test_every_host_takes_a_step_that_changes_every_trainable_parameter(host, form):
    torch.manual_seed(0)
    config = filled(host=host, reg=form != "no-reg", form=form)
    model = shaken(reggan.build(config, 1, 1, (32, 32)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = reggan.training_step(model, config, smooth_image(2, 0), smooth_image(2, 1),
                                  *optimizers_of(model, lr=1e-2), make_pools())
    assert all(torch.isfinite(loss) for loss in losses.values())
    expected = {"no-reg": (), "paper's": EVERY_LOSS[:2], "improved": EVERY_LOSS}[form]
    assert [name for name in losses if name in EVERY_LOSS] == list(expected)
    for name, p in model.named_parameters():
        assert not (p.requires_grad and torch.equal(p, before[name])), name


@pytest.mark.numeric
@pytest.mark.parametrize("network", ["unet", "coarse"])
def test_registration_losses_follow_their_formulas(network):
    """20 mean |warp(G(a), R(G(a), b)) - b| and 10 times the smoothness, of the networks before the
    step, in float64."""
    torch.manual_seed(0)
    config = filled(reg_net=network)
    model = reggan.build(config, 1, 1, (32, 32))
    with torch.no_grad():
        for name, weight in model.registration.named_parameters():
            if name.startswith(("heads", "output")) and name.endswith("weight"):
                weight.normal_(0, 0.1)
    a, b = smooth_image(2, 0), smooth_image(2, 1)
    with torch.no_grad():
        fake = model.translate(a)
        flow = model.registration(fake, b).double().numpy()
    losses = reggan.training_step(model, config, a, b, *optimizers_of(model), make_pools())
    y, x = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    moved = [map_coordinates(f[0], [(y + dy).clip(0, 31), (x + dx).clip(0, 31)], order=1)
             for f, (dy, dx) in zip(fake.double().numpy(), flow)]
    correction = np.abs(np.stack(moved) - b[:, 0].double().numpy()).mean()
    smooth = (np.diff(flow, axis=2) ** 2).mean() + (np.diff(flow, axis=3) ** 2).mean()
    assert np.abs(flow).max() > 0.3
    assert losses["correction"].item() == pytest.approx(20 * correction, rel=1e-5)
    assert losses["smooth"].item() == pytest.approx(10 * smooth, rel=1e-5)


@pytest.mark.numeric
def test_a_step_trains_g_and_r_on_the_papers_sum_and_d_on_its_own():
    """The gradients of the step are those of the written-out equations, whatever gradients were
    left over, and D is judged on what the pool hands out."""
    torch.manual_seed(0)
    config = filled()
    model = shaken(reggan.build(config, 1, 1, (32, 32)))
    a, b, old = (smooth_image(2, seed) for seed in (0, 1, 2))
    parts = [reggan.trainable(model, "netG", "registration"), reggan.trainable(model, "netD")]
    fake = model.netG_A2B(a)
    flow = model.registration(fake, b)
    total = ((model.netD_B(fake) - 1).square().mean() + 20 * (warp(fake, flow) - b).abs().mean()
             + 10 * (flow.diff(dim=2).square().mean() + flow.diff(dim=3).square().mean()))
    d = (model.netD_B(b) - 1).square().mean() + model.netD_B(old).square().mean()
    expected = torch.autograd.grad(total, parts[0]), torch.autograd.grad(d, parts[1])
    optimizers = [torch.optim.SGD(part, lr=1.0) for part in parts]
    before = [[p.detach().clone() for p in part] for part in parts]
    shown = []
    left_over(model)
    losses = reggan.training_step(model, config, a, b, *optimizers,
                                  {"B": lambda fakes: shown.append(fakes) or old})
    assert torch.equal(shown[0], fake) and not shown[0].requires_grad
    assert list(losses) == ["adversarial", "correction", "smooth", "d"]
    assert torch.isclose(losses["d"], d) and torch.isclose(sum(losses.values()), total + d)
    for part, old_part, grads in zip(parts, before, expected):
        for p, q, grad in zip(part, old_part, grads):
            error = (q - p - grad).abs().max()
            assert error < 1e-4, f"a gradient is wrong by {error}: left over, detached or frozen?"


def test_a_step_trains_with_a_pool_a_side_autocast_and_scaled_losses():
    model, shown = reggan.build(filled(host="cycle"), 1, 1, (32, 32)), {}
    a, b, optimizers = smooth_image(2, 0), smooth_image(2, 1), optimizers_of(model)
    fakes, _ = model.generator_losses(a, b)
    autocast, scaler = mock.MagicMock(), mock.MagicMock()
    scaler.scale.side_effect = lambda loss: loss
    pools = {side: lambda new, side=side: shown.setdefault(side, new) for side in "AB"}
    losses = reggan.training_step(model, filled(host="cycle"), a, b, *optimizers, pools, autocast,
                                  scaler)
    assert all(torch.equal(shown[side], fakes[side]) for side in "AB")
    assert [call.args[0] for call in scaler.step.mock_calls] == list(optimizers)
    assert scaler.scale.call_count == autocast.call_count == 2 and scaler.update.call_count == 1
    assert not any(loss.requires_grad for loss in losses.values())


def test_a_pool_hands_out_each_fake_or_one_it_kept():
    torch.manual_seed(0)
    fakes = torch.arange(400.0).view(200, 2, 1, 1, 1)
    assert all(torch.equal(reggan.Pool(0)(pair), pair) for pair in fakes)
    pool = reggan.Pool(10)
    given = torch.cat([pool(pair) for pair in fakes]).flatten()
    assert torch.equal(given[:10], torch.arange(10.0)) and len(pool.images) == 10
    new = given[10:] == torch.arange(10.0, 400)
    assert new.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (given[10:][~new] < torch.arange(10.0, 400)[~new]).all()
    assert len(given[10:].unique()) == 390  # one that left the pool does not come back


def test_overfits_one_pair(root):
    for side in "AB":
        for name in ("train/{}/s1.npy", "train/{}/s2.npy", "val/{}/s1.npy"):
            (root / name.format(side)).unlink()
        shutil.copy(root / "train" / side / "s0.npy", root / "val" / side)
    result = reggan.train(small(root, host="pix2pix", reg=False, noise=0, width=8, batch_size=1,
                                epochs=150, lr=4e-3))
    negative = np.load(root / "val" / "B" / "s0.npy").astype(np.float64)
    inside = negative[negative != -1]
    constant = np.abs(inside - np.median(inside)).mean() / 2  # of the best constant image
    assert result["mae"] < 0.5 * constant


def test_a_run_leaves_its_files(root):
    """That a run which is stopped goes on bit for bit: test_interruption.py."""
    result = reggan.train(small(root, epochs=4, pool=2))
    files = {"config.json", "log.jsonl", "last.pt", "best.pt", "result.json", "curves.png",
             "progress.gif", "translation.png"}
    assert files <= {path.name for path in (root / "run").iterdir()}
    assert json.loads((root / "run" / "result.json").read_text()) == result
    assert {"mae", "psnr", "ssim", "host", "registration", "noise", "foreground"} <= result.keys()
    saved = common.load_checkpoint(root / "run" / "last.pt")
    assert len(saved["ranks"][0]["own"]["B"]) == 2  # the pool is full


def test_colour_is_translated_to_grey_and_other_channels_are_refused(tmp_path):
    for part in ("train", "val"):
        for side, channels in (("A", 3), ("B", 1)):
            (tmp_path / part / side).mkdir(parents=True)
            image = smooth_image(channels, 1)[:, 0].numpy().transpose(1, 2, 0).squeeze()
            image = Image.fromarray(((image + 1) * 127.5).astype(np.uint8))
            image.save(tmp_path / part / side / "s.jpg")
    assert np.isfinite(reggan.train(small(tmp_path))["psnr"])
    translate(tmp_path / "val/A", tmp_path / "run", tmp_path / "out")
    with Image.open(tmp_path / "out" / "s.jpg") as image:
        assert image.size == (32, 32) and image.format == "JPEG" and image.mode == "L"
    with refused(r"1 channels, the generator takes 3"):
        translate(tmp_path / "val/B", tmp_path / "run", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_translate_keeps_names_formats_and_depth(root):
    """Upper-case endings, blank slices and 16-bit PNG among them."""
    for path in (root / "train").rglob("*.npy"):
        path.rename(path.with_suffix(".NPY"))
    reggan.train(small(root))
    folder, out = root / "val" / "A", root / "out"
    deep = np.linspace(0, 65535, 40 * 32).reshape(40, 32).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    np.save(folder / "blank.npy", np.full((40, 36), -1, np.float32))
    shutil.copy(folder / "s1.npy", folder / "up.NPY")
    translate(folder, root / "run", out)
    assert sorted(os.listdir(out)) == ["blank.npy", "deep.png", "s0.npy", "s1.npy", "up.NPY"]
    for name in ("s0.npy", "s1.npy", "blank.npy"):
        source, made = np.load(folder / name), np.load(out / name)
        assert made.shape == source.shape and made.dtype == np.float32 and np.abs(made).max() <= 1
    made = np.asarray(Image.open(out / "deep.png"))
    assert made.shape == (40, 32) and made.dtype == np.uint16 and len(np.unique(made)) > 256
    with refused("--out: expected another place than"):
        translate(folder, root / "run", folder)


def test_an_image_is_translated_as_it_was_trained_on(root):
    """In the middle of a square, and at the size that the pairs had, in the type."""
    reggan.train(small(root, dtype="fp32"))
    model, trained, _ = reggan.load_generator(root / "run")
    assert trained.size == 32
    a = smooth_image(1, 3)[0].repeat(1, 2, 2)[:, :, :40]  # (1, 64, 40)
    (root / "in").mkdir()
    np.save(root / "in/wide.npy", a[0].numpy())
    translate(root / "in", root / "run", root / "out")
    small_a = F.interpolate(a[None] + 1, (32, 20), mode="bilinear", antialias=True) - 1
    fake = model.eval().translate(F.pad(small_a.clamp(-1, 1), (6, 6), value=-1.0))[..., 6:26]
    expected = F.interpolate(fake, (64, 40), mode="bilinear")[0, 0].detach().numpy()
    assert np.load(root / "out/wide.npy") == pytest.approx(expected, abs=1e-5)


def test_published_generators_load_and_must_be_finite(tmp_path):
    """A bare netG_A2B.pth: width, blocks and channels are those of its tensors."""
    torch.manual_seed(0)
    G, path, x = reggan.Generator(1, 1, 4, 2).eval(), tmp_path / "netG_A2B.pth", smooth_image(1, 0)
    torch.save(G.state_dict(), path)
    host, _, in_chans = reggan.load_generator(path)
    assert in_chans == 1 and torch.equal(host.translate(x), G(x))
    G.model_tail[7].bias.data[:] = float("nan")
    torch.save(G.state_dict(), path)
    with refused("expected finite weights, found NaN or infinity"):
        reggan.load_generator(path)


@pytest.mark.parametrize("script, message", [
    ("more.improved", "expected a run of python reggan.py, found one of python -m more.improved"),
    ("reggan", r"expected a checkpoint of this reggan\.py .*unexpected keyword .* 'bending'")])
def test_a_checkpoint_of_another_script_or_with_options_that_are_gone_is_refused(
        tmp_path, script, message):
    options = {"host": "nc", "bending": 1.0, "script": script}
    torch.save({"model": {}, "config": options, "in_chans": 1}, tmp_path / "best.pt")
    with refused(message):
        reggan.load_generator(tmp_path)


def test_a_bfloat16_run_ends_near_a_float32_run(root):
    scores = [reggan.train(small(root, dtype, dtype=dtype, epochs=8))["psnr"]
              for dtype in ("fp32", "bf16")]
    assert abs(scores[0] - scores[1]) < 1 and scores[0] != scores[1], scores


def save(root, name, image):
    np.save(root / "train" / name, np.asarray(image, np.float32))


BAD = {  # what is done to the folder, and what is said
    "unmatched names": (lambda r: (r / "train/B/s0.npy").rename(r / "train/B/other.npy"),
                        r"same file names.*s0\.npy.*other\.npy"),
    "mixed sizes": (lambda r: [save(r, f"{side}/s1.npy", smooth_image(1, 0, 40)[0, 0])
                               for side in "AB"], r"s1\.npy.*--size"),
    "a truncated file": (lambda r: os.truncate(r / "train/A/s0.npy", 200),
                         r"s0\.npy: expected a complete .* image, found"),
    "values out of range": (lambda r: save(r, "A/s0.npy", 300 * smooth_image(1, 0)[0, 0]),
                            r"s0\.npy: expected values from -1 to 1, found -\d.* to .*: --rescale"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(root, case):
    damage, message = BAD[case]
    damage(root)
    with refused(message) as error:
        reggan.train(small(root))
    assert "\n" not in str(error.value) and not (root / "run").exists()


@pytest.mark.parametrize("options, message", [
    ({"noise": 26}, r"--noise: expected a number in \[0, 25\], found 26"),
    ({"size": 20}, r"--size: expected 0, or 32 pixels or more, found 20"),
    ({"lr": float("nan")}, r"--lr: expected a number in \(0, inf\), found nan"),
    ({"steps": 3}, "--steps and --epochs: expected one of them, found both")])
def test_options_out_of_range_are_refused(root, options, message):
    with refused(message):
        reggan.train(small(root, **options))
    assert not (root / "run").exists()


def test_a_refused_run_leaves_the_one_before_it_alone(root):
    config = small(root)
    reggan.train(config)
    before = {path: path.read_bytes() for path in sorted((root / "run").iterdir())}
    with refused(r"last\.pt: expected --width 6, as asked for now, found a run with --width 4;"):
        reggan.train(dataclasses.replace(config, resume=True, width=6))
    np.save(root / "train/A/s0.npy", np.full((32, 32), np.nan, np.float32))
    with refused("NaN"):
        reggan.train(config)
    assert before == {path: path.read_bytes() for path in sorted((root / "run").iterdir())}


PRESETS = {
    (): dict(width=8, batch_size=8, epochs=100, correction=20, smooth=10, decay=True, pool=50),
    ("improved",): dict(width=8, batch_size=8, epochs=100, reg_net="coarse", lr=4e-3, reg_lr=8e-3,
                        correction=100, smooth=10, drift=100, synthetic=3, equivariance=30),
    ("paper",): dict(width=64, kernel=7, downs=2, blocks=9, batch_size=1, epochs=80, lr=1e-4,
                     reg_lr=1e-4, correction=20, smooth=10, decay=False, pool=0)}


@pytest.mark.parametrize("switch", PRESETS)
def test_presets_fill_what_was_not_typed_and_nothing_else(switch):
    script = improved if "improved" in switch else reggan
    flags = [f"--{name}" for name in switch if name != "improved"]
    config = reggan.complete(common.parse_config(script.Config, flags))
    assert {name: getattr(config, name) for name in PRESETS[switch]} == PRESETS[switch]
    assert config.steps is None and None not in [getattr(config, name) for name in reggan.SMALL]
    typed = dict(width=8, batch_size=8, epochs=100.0, lr=4e-3, correction=0.0, pool=7)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in typed.items()]
    config = reggan.complete(common.parse_config(script.Config, [*flags, *words]))
    assert {name: getattr(config, name) for name in typed} == typed
    steps = reggan.complete(common.parse_config(script.Config, [*flags, "--steps", "7"]))
    assert (steps.steps, steps.epochs) == (7, None)
    assert reggan.complete(config) == config  # what is filled stays


def test_the_papers_hosts_but_nc_with_registration_keep_a_pool():
    pools = {(host, reg): reggan.complete(config_of(paper=True, host=host, reg=reg)).pool
             for host in ("nc", "cycle") for reg in (True, False)}
    assert pools == {("nc", True): 0, ("nc", False): 50, ("cycle", True): 50, ("cycle", False): 50}


def test_the_papers_registration_network_is_the_official_one():
    """At 256 x 256: 7 levels of 32, 64, ..., 64 channels, 128 at the bottom; at other sizes as many
    as fit."""
    paper = reggan.complete(config_of(paper=True, blocks=1))
    R = reggan.build(paper, 1, 1, (256, 256)).registration
    shapes = {name: tuple(p.shape) for name, p in R.state_dict().items()}
    for level in range(7):
        widths = (64 if level else 32, (2, 32, *[64] * 5)[level])
        assert shapes[f"down.{level}.0.0.weight"] == (*widths, 3, 3)
        assert shapes[f"up.{level}.0.weight"] == ((64, 128, 3, 3) if level < 6 else (32, 96, 3, 3))
    assert shapes["bottom.0.0.weight"] == (128, 64, 1, 1)
    assert shapes["output.weight"] == (2, 32, 3, 3)
    assert {name.split(".")[0] for name in shapes} == {"down", "bottom", "up", "refine", "output"}
    for name, kind in (("unet", reggan.Registration), ("coarse", improved.CoarseToFine)):
        assert type(reggan.build(filled(reg_net=name), 1, 1, (32, 32)).registration) is kind
    sizes = {(256, 256): 7, (512, 300): 7, (128, 128): 6, (64, 200): 5, (33, 32): 4}
    for size, levels in sizes.items():
        assert len(reggan.Registration(2, size, 4).down) == levels
        assert len(improved.CoarseToFine(size, 4).heads) == levels


@pytest.mark.parametrize("options, expected", [({}, [1, 1, 1, 0.8, 0.4]),
                                               ({"decay": False}, [1] * 5)], ids=str)
def test_the_learning_rates_are_constant_or_fall_over_the_second_half(
        drawn, tmp_path, monkeypatch, options, expected):
    step, rates = reggan.training_step, []

    def watched(model, config, a, b, opt_g, opt_d, *args):
        rates.append([group["lr"] for group in opt_g.param_groups + opt_d.param_groups])
        return step(model, config, a, b, opt_g, opt_d, *args)

    monkeypatch.setattr(reggan, "training_step", watched)
    reggan.train(config(drawn, steps=5, epochs=None, lr=0.01, reg_lr=0.02, out=str(tmp_path),
                        **options))
    assert np.allclose(rates, [[0.01 * x, 0.02 * x, 0.01 * x] for x in expected])


def test_steps_instead_of_epochs_and_the_result_says_how_fast_it_was(drawn, tmp_path):
    c = config_of(**SMALL | dict(root=str(drawn), epochs=None, steps=4, out=str(tmp_path)))
    result = reggan.train(c)  # 6 pairs, 2 each: an epoch and a third
    lines = lines_of(tmp_path, val=True)
    assert [line["step"] for line in lines] == [3, 4]
    assert [line["epoch"] for line in lines] == pytest.approx([1, 4 / 3])
    for line in [*lines, result]:
        assert 0 < line["share_waiting_for_data"] < 1 and line["images_per_second"] > 0
    assert result["seconds"] > 8 / result["images_per_second"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["steps"] == 4 and saved["epochs"] is None and saved["lr"] == reggan.SMALL["lr"]


# --------------------------------------------------------------------------------------------------
# Losses of the hosts, batches, the comparison


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    subjects = ("train", 3), ("val", 1), ("test", 2)
    return demo_drawing.demo_pairs(tmp_path_factory.mktemp("drawn"), size=32, slices=2,
                                   subjects=subjects)


def config(root="", **options):
    base = dict(root=str(root), width=8, blocks=1, batch_size=4, device="cpu", dtype="fp32")
    return reggan.complete(config_of(**base | options))


@pytest.mark.numeric
@pytest.mark.parametrize("host", reggan.HOSTS)
def test_host_losses_follow_their_formulas(host):
    torch.manual_seed(0)
    model = reggan.build(config(host=host, reg=False), 1, 1, (32, 32)).eval()
    a, b = smooth_image(1, 0), smooth_image(1, 1)
    sides = "AB" if host in ("cycle", "nice") else "B"

    def l1(x, y):
        return (x.double() - y.double()).abs().mean().float()

    def judged(images, target):
        """The sum over all verdicts of the mean of (verdict - target)^2."""
        verdicts = []
        for side in sides:
            D, image = getattr(model, f"netD_{side}"), images[side]
            of_d = D(torch.cat((a, image), 1) if host == "pix2pix" else image)
            verdicts += of_d[0] if host == "nice" else [of_d]
        return sum((v.double() - target).square().mean() for v in verdicts).float()

    def moved(x, start, end):
        """The translation of x; NICE-GAN's G takes what the discriminator of its side encodes."""
        G = getattr(model, f"netG_{start}2{end}")
        return G(getattr(model, f"netD_{start}").encode(x)[0], (32, 32)) if host == "nice" else G(x)

    with torch.no_grad():
        fakes, losses = model.generator_losses(a, b)
        assert torch.allclose(fakes["B"], model.translate(a), atol=1e-5)
        losses |= model.discriminator_losses(a, b, fakes)
        expected = {"adversarial": judged(fakes, 1),
                    "d": judged({"A": a, "B": b}, 1) + judged(fakes, 0)}
        if host == "pix2pix":
            expected["l1"] = 100 * l1(fakes["B"], b)
        if sides == "AB":
            assert torch.allclose(fakes["A"], moved(b, "B", "A"), atol=1e-5)
            back = moved(fakes["B"], "B", "A"), moved(fakes["A"], "A", "B")
            expected["cycle"] = 10 * (l1(back[0], a) + l1(back[1], b))
        if host == "nice":  # each G decodes what the discriminator of its own target encodes
            same = (G(D.encode(x)[0], (32, 32)) for G, D, x in
                    ((model.netG_B2A, model.netD_A, a), (model.netG_A2B, model.netD_B, b)))
            expected["identity"] = 10 * sum(map(l1, same, (a, b)))
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert torch.isclose(losses[name], loss, rtol=1e-4), name


def test_compare_goes_on_and_writes_tables(drawn, tmp_path, monkeypatch):
    """In the paper's form; the first run is stopped between its last step and its test."""
    drawn = shutil.copytree(drawn, tmp_path / "pairs")
    c = config_of(**SMALL | dict(root=str(drawn), paper=True, compare=True, hosts="nc,nc+r",
                                 levels="0,elastic", seeds=1, out=str(tmp_path / "t")))

    def stop(job, path, *rest, **named):
        if path.name == "translation.png":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reggan, "draw", stop)
        reggan.compare(c)
    reggan.compare(c)
    saved = json.loads((tmp_path / "t/cells/nc_0_0/config.json").read_text())
    assert saved["resume"] and saved["lr"] == 1e-4
    stamp = (tmp_path / "t/cells/nc+r_0_0/result.json").stat().st_mtime_ns
    table = reggan.compare(c)
    assert (tmp_path / "t/cells/nc+r_0_0/result.json").stat().st_mtime_ns == stamp
    assert [(line["row"], line["level"], line["seed"]) for line in table] == [
        ("nc", "0", 0), ("nc+r", "0", 0), ("nc", "elastic", 0), ("nc+r", "elastic", 0)]
    for line in table:  # a table of one seed shows no deviation
        scores = [line["psnr"], line["mae"], line["ssim"]]
        shown = [f"{value:.{digits}f}" for value, digits in zip(scores, (2, 4, 4))]
        shown = f"| {' | '.join([line['level'], line['row'], *shown])} |"
        assert shown in (tmp_path / "t/table.md").read_text()
    assert len((tmp_path / "t/table.csv").read_text().splitlines()) == 5
    for options, message in (
            ({"hosts": "munit"}, "--hosts: expected nc, .*, with .r for registration, found munit"),
            ({"levels": "much"}, "--levels: expected numbers, elastic, or .* none, found much"),
            ({"noise": 5.0}, "--compare: expected --levels and --hosts, found --noise"),
            ({"width": 9}, "config.json: expected --width 9, as asked for now, found .*width 4")):
        with refused(message):
            reggan.compare(dataclasses.replace(c, **options))
    more = reggan.compare(dataclasses.replace(c, seeds=2, hosts="nc"))  # what steers it is free
    assert [line["seed"] for line in more] == [0, 0, 1, 1]
    assert " ± " in (tmp_path / "t/table.md").read_text()
    image = next((drawn / "train/A").iterdir())
    np.save(image, np.load(image)[::-1])
    with refused("nc_0_0: expected a run of the same data as now"):
        reggan.compare(c)


# --------------------------------------------------------------------------------------------------
# Which loss trains which network


def moves(loss, *tensors):
    """Whether `loss` sends a gradient that is not zero to any of the tensors."""
    if not loss.requires_grad or not tensors:
        return False
    grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return any(grad is not None and bool(grad.any()) for grad in grads)


def moved_by(loss, model):
    """The networks among G, R and D that learn from `loss`."""
    parts = {"G": "netG", "R": "registration", "D": "netD"}
    return {name for name, prefix in parts.items() if moves(loss, *reggan.trainable(model, prefix))}


FRESH = {"correction": "GR", "smooth": "", "drift": "R", "synthetic": "R", "equivariance": "G"}
RANDOM = {"correction": "GR", "smooth": "GR", "drift": "GR", "synthetic": "R", "equivariance": "G"}
OF_HOST = {"nc": {"adversarial"}, "pix2pix": {"adversarial", "l1"},
           "cycle": {"adversarial", "cycle"}, "nice": {"adversarial", "cycle", "identity"}}


def randomized(host, heads, **options):
    torch.manual_seed(0)
    c = filled(host=host, form="improved", pool=0, **options)
    model = reggan.build(c, 1, 1, (32, 32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("registration") or heads == "random":
                p.add_(0.02 * torch.randn_like(p))
        model.registration.mean.normal_()
    return c, model


@pytest.mark.parametrize("network", ["coarse", "unet"])
@pytest.mark.parametrize("heads", ["fresh", "random"])
@pytest.mark.parametrize("host", reggan.HOSTS)
def test_which_loss_sends_a_gradient_to_which_network(host, heads, network):
    """R's heads are zero at first, so that G learns from the correction through the image alone."""
    c, model = randomized(host, heads, reg_net=network)
    a, b = smooth_image(4, 0), smooth_image(4, 1)
    for p in reggan.trainable(model, "netD"):  # the step does this with D's optimiser
        p.requires_grad_(False)
    fakes, losses = model.generator_losses(a, b)
    assert set(losses) == OF_HOST[host]
    for name, loss in losses.items():
        assert moved_by(loss, model) == {"G"}, name
        for part, generator in model.named_children():  # where there are two, it teaches both
            assert not part.startswith("netG") or moves(loss, next(generator.parameters())), name
        for side, fake in fakes.items():
            assert moves(loss, fake) == (name != "identity"), (name, side)
    added = reggan.registration_losses(model, c, a, b, fakes["B"])
    expected = FRESH if heads == "fresh" else RANDOM
    assert added.keys() == expected.keys()
    for name, loss in added.items():
        assert moved_by(loss, model) == set(expected[name]), name
        # Through the fake itself, not only through other calls of G
        assert moves(loss, fakes["B"]) == ("G" in expected[name]), name
    alone = improved.equivariance_loss(model, a, fakes["B"].detach())
    assert moved_by(alone, model) == {"G"}
    for p in model.parameters():
        p.requires_grad_(True)
    judged = model.discriminator_losses(a, b, {side: fake.detach() for side, fake in fakes.items()})
    assert {name: moved_by(loss, model) for name, loss in judged.items()} == {"d": {"D"}}


@pytest.mark.numeric
def test_each_weight_multiplies_its_own_loss():
    weights = dict(zip(EVERY_LOSS, (7.0, 6.0, 5.0, 4.0, 3.0)))
    c, model = randomized("nc", "random", **weights)
    a, b, R = smooth_image(4, 0), smooth_image(4, 1), model.registration
    fake, mean = model.translate(a), R.mean.clone()
    torch.manual_seed(2)
    found = reggan.registration_losses(model, c, a, b, fake)
    flow = R(fake, b)
    mean = improved.running_mean(mean, flow)
    torch.manual_seed(2)
    losses = [reggan.correction(fake, flow, b), reggan.smoothness(flow), mean.square().mean(),
              improved.synthetic_loss(R, b[::2]), improved.equivariance_loss(model, a, fake)]
    for name, loss in zip(EVERY_LOSS, losses, strict=True):
        assert torch.isclose(found[name], weights[name] * loss, rtol=1e-5), name
    assert torch.allclose(R.mean, mean, atol=1e-5)


def test_every_network_has_its_optimiser_and_its_rate_and_every_host_its_pools(drawn):
    c = config(drawn, host="cycle", lr=0.01, reg_lr=0.02, form="improved")
    job, owner = reggan.Job(c, torch.device("cpu")), {}
    for name in ("opt_g", "opt_d"):  # Adam as the official trainers have it
        for group in getattr(job, name).param_groups:
            assert group["betas"] == (0.5, 0.999)
            owner |= {id(p): (name, group["peak"]) for p in group["params"]}
    rates = {"netG_": ("opt_g", 0.01), "regis": ("opt_g", 0.02), "netD_": ("opt_d", 0.01)}
    for name, p in job.model.named_parameters():
        if p.requires_grad:
            assert owner.pop(id(p)) == rates[name[:5]], name
    assert not owner
    sizes = {"nc": 7, "cycle": 7, "pix2pix": 0, "nice": 0}  # whose D judges pairs, or encodes
    for host, size in sizes.items():
        pools = reggan.Job(config(drawn, host=host, pool=7), torch.device("cpu")).pools
        assert {side: pool.size for side, pool in pools.items()} == {"A": size, "B": size}


def test_the_weights_that_are_best_on_val_are_kept_and_tested(root, monkeypatch):
    """The second of three looks at val is the best one; the test sees its weights."""
    shutil.copytree(root / "val", root / "test")
    scores, seen = iter((0.3, 0.1, 0.2, 0.5)), []

    def scripted(run, aligned, moved):
        seen.append({name: x.clone() for name, x in run.model.state_dict().items()})
        return {"mae": next(scores), "foreground": 0.5}

    monkeypatch.setattr(reggan, "score", scripted)
    result = reggan.train(small(root, epochs=3))
    assert result["mae"] == 0.5 and result["weights"].startswith("best.pt") and len(seen) == 4
    best, last = (common.load_checkpoint(root / "run" / f"{n}.pt") for n in ("best", "last"))
    assert last["best"] == 0.1
    for name, tensor in best["model"].items():
        assert torch.equal(tensor, seen[1][name]) and torch.equal(tensor, seen[3][name]), name
        assert torch.equal(last["model"][name], seen[2][name]), name
    assert any(not torch.equal(tensor, seen[2][name]) for name, tensor in best["model"].items())


# --------------------------------------------------------------------------------------------------
# Own pairs, resuming, numbers that are not finite, several processes


def test_own_pairs_stay_as_they_are_unless_asked(root, capsys):
    c = small(root)
    plain = reggan.train(c)
    assert "none, the pairs are used as they are" in capsys.readouterr().out
    assert "folding" in plain and not {"registration_error", "misalignment"} & plain.keys()
    pairs, val, *_ = reggan.all_pairs(reggan.complete(c))
    for part in (pairs, *val):
        for i, name in enumerate(part.names):
            for side, image in zip("AB", part.item(3, i)):
                stored = np.load(part.folder / side / name).astype(np.float32)
                assert np.array_equal(image[0], stored)
    moved = reggan.train(dataclasses.replace(c, noise=3.0, elastic=2.0))
    text = capsys.readouterr().out
    assert "training pairs: level 3 and bending of 2 %" in text
    assert moved["misalignment"] > 0.3
    assert reggan.complete(dataclasses.replace(c, elastic=2.0)).noise == 0
    demo = reggan.complete(config_of())
    assert (demo.noise, demo.elastic) == (3.0, 0.0)
    (cell,) = reggan.compare(dataclasses.replace(c, compare=True, hosts="nc", levels="none",
                                                 seeds=1, out=str(root / "t")))
    assert cell["noise"] is None and cell["level"] == "none"


def test_g_is_judged_on_aligned_pairs_and_r_on_moved_ones(drawn):
    job = reggan.Job(config(drawn, noise=3.0), torch.device("cpu"))
    scores = reggan.score(job, *job.val)
    (a, b), (moved_a, moved_b, true) = (pairs[[(0, i) for i in range(len(pairs))]]
                                        for pairs in job.val)
    with torch.no_grad():
        expected = reggan.metrics(job.model.translate(a), b)
        flow = job.model.registration(job.model.translate(moved_a), moved_b)
        expected |= reggan.registration_metrics(flow, moved_b, true)
    expected = {name: values.mean().item() for name, values in expected.items()}
    assert scores == pytest.approx(expected, rel=1e-4) and job.model.training


def test_a_foreground_of_everything_is_warned_of_and_an_empty_one_refused(root, capsys):
    reggan.train(small(root, epochs=2))
    assert "background" not in capsys.readouterr().err
    shifted = reggan.train(small(root, "shifted", epochs=2, rescale="-1.1,1"))
    text = capsys.readouterr().err
    assert text.count("no pixel is background, which is exactly -1") == 1 == shifted["foreground"]
    with refused("val/B: expected values above -1, the background, found an image without any"):
        reggan.train(small(root, "empty", rescale="-1,1,2,3"))
    assert not (root / "empty" / "best.pt").exists()


def test_the_picture_shows_what_r_does(root, monkeypatch, tmp_path):
    """G and R that know the truth: B is the negative of A, and the flow is that of the motion."""
    job, drawn = reggan.Job(reggan.complete(small(root, noise=4.0)), torch.device("cpu")), []
    a, b, true = job.val[1].item(0, 1)
    monkeypatch.setattr(reggan, "save_grid", lambda *args, scale: drawn.append(args))
    job.model.netG_A2B.forward = lambda x: torch.where(x == -1, x, -x)
    job.model.registration.forward = lambda fake, real: true[None]
    reggan.draw(job, tmp_path / "p.png", job.val[1], 2, "epoch 1: ")
    ((_, rows, titles, captions),) = drawn
    assert len(rows) == len(captions) == 2 and len(titles) == len(rows[1]) == 6
    fake = torch.where(a == -1, a, -a)
    moved = warp(fake[None], true[None])[0]
    expected = (a + 1) / 2, (b + 1) / 2, (fake - b).abs(), (moved - b).abs()
    for i, meant in zip((0, 1, 3, 5), expected):
        assert np.allclose(rows[1][i], meant), titles[i]
    before, after = ((x - b).abs().mean() / 2 for x in (fake, moved))
    assert after < before / 2
    shown = f"{before:.3f}, after the motion {after:.3f}"
    assert captions[1] == f"epoch 1: mean difference to B {shown}"
    job.config = dataclasses.replace(job.config, reg=False)
    reggan.draw(job, tmp_path / "p.png", job.val[0])
    assert len(drawn[1][1][0]) == len(drawn[1][2]) == 4 and job.model.training


def test_the_grid_moves_with_the_flow():
    shift = torch.zeros(1, 2, 32, 32)
    grid = reggan.moved_with_grid(torch.zeros(1, 1, 32, 32), shift)[0, 0]
    assert grid.sum(0).argmax() == 2 and grid.any(0).all() and 0 < grid.mean() < 0.6
    shift[:, 1] = 1  # each pixel reads its right neighbour: the grid moves to the left
    left = reggan.moved_with_grid(torch.zeros(1, 1, 32, 32), shift)[0, 0]
    assert torch.equal(left[:, :-1], grid[:, 1:])


def test_resuming_a_finished_run_and_one_with_more_steps(root):
    c = small(root, epochs=None, steps=4)
    first = reggan.train(c)
    log = (root / "run" / "log.jsonl").read_text()
    again = reggan.train(dataclasses.replace(c, resume=True))
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert (root / "run" / "log.jsonl").read_text() == log
    more = dataclasses.replace(c, resume=True, steps=6)
    path = root / "run" / "last.pt"
    torch.save(common.load_checkpoint(path) | {"best": 0.0}, path)
    reggan.train(more)
    saved = common.load_checkpoint(path)
    assert saved["step"] == 6 and saved["best"] == 0.0  # the best so far is known
    with refused("--steps or --epochs: expected at least the 6 steps that .* found 5 steps"):
        reggan.train(dataclasses.replace(more, steps=5))
    for side in "AB":
        (root / f"train/{side}/s2.npy").rename(root / f"train/{side}/other.npy")
    with refused("last.pt: expected a run with the same data as now"):
        reggan.train(more)


@pytest.mark.parametrize("loss", ["correction", "smoothness", "lsgan"])
def test_a_loss_that_is_not_finite_is_noticed_at_its_step_and_the_last_checkpoint_stays(
        root, monkeypatch, loss):
    step, good, seen = reggan.training_step, getattr(reggan, loss), []

    def watched(*args):
        seen.append(args)
        return step(*args)

    monkeypatch.setattr(reggan, "training_step", watched)
    monkeypatch.setattr(reggan, loss,
                        lambda *args: good(*args) * (float("nan") if len(seen) == 5 else 1))
    with refused(r"^step 5: losses are not finite .*lower --lr"):
        reggan.train(small(root, epochs=None, steps=9, batch_size=1))
    saved = common.load_checkpoint(root / "run" / "last.pt")
    assert saved["step"] == 3
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_weights_that_are_not_finite_are_not_saved(drawn, tmp_path):
    job = reggan.Job(config(drawn, out=str(tmp_path)), torch.device("cpu"))
    log = common.RunLog(tmp_path, job.config)
    reggan.save(job, log, best=True)
    before = [(tmp_path / name).read_bytes() for name in ("last.pt", "best.pt")]
    job.model.netG_A2B.model_head[1].weight.data[0] = float("inf")
    with refused(r"netG_A2B.model_head.1.weight is not finite"):
        reggan.save(job, log, best=True)
    assert before == [(tmp_path / name).read_bytes() for name in ("last.pt", "best.pt")]


# At small rates: Adam makes large steps of the last bits of small gradients.
EQUAL = dict(root="", lr=2e-4, reg_lr=2e-4, epochs=None, steps=4, batch_size=4, pool=0, noise=3.0,
             dtype="fp32", device="cpu", width=4, blocks=1)


def test_two_processes_that_share_a_batch_are_one_with_the_whole(drawn, tmp_path):
    """Losses, scores, one log and one result; each process has random numbers of its own, and goes
    on with them."""
    options = EQUAL | dict(root=str(drawn))
    single = reggan.train(config_of(**options | dict(out=str(tmp_path / "one"))))
    command = ["reggan.py", "--out", tmp_path / "two"]
    for name, value in options.items():
        if value is not None:
            command += ["--" + name.replace("_", "-"), value]
    in_processes(2, *command)
    names = "step", "adversarial", "correction", "smooth", "d"
    one, two = (lines_of(tmp_path / run, *names) for run in ("one", "two"))
    assert np.allclose(one, two, rtol=1e-3)
    one, two = (lines_of(tmp_path / run, "step", val=True) for run in ("one", "two"))
    assert one == two == [[2], [4]]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result.keys() == single.keys() and result["images"] == single["images"]
    for name in ("mae", "psnr", "ssim", "registration_error", "misalignment"):
        assert result[name] == pytest.approx(single[name], rel=1e-2), name
    first, second = common.load_checkpoint(tmp_path / "two" / "last.pt")["ranks"]
    assert not torch.equal(first["torch"], second["torch"])
    with refused("expected a run with the same number of processes as now"):
        reggan.train(config_of(**options | dict(out=str(tmp_path / "two"), resume=True)))


def test_an_epoch_of_two_processes_takes_every_pair(root):
    """3 pairs, 2 in each process: one step an epoch."""
    c = reggan.complete(small(root, batch_size=4, dtype="fp32"))
    for rank in (0, 1):
        assert reggan.Job(c, torch.device("cpu"), rank, 2).per_epoch == 1
