"""RegGAN: image-to-image translation that learns from misaligned pairs.

Kong et al., "Breaking the Dilemma of Medical Image-to-image Translation", NeurIPS 2021
(arXiv:2110.06465). A supervised translator needs pairs that agree pixel by pixel. An unsupervised
one needs no pairs, but its problem has many solutions. RegGAN takes pairs (a, b) as they are and
treats their misalignment as noise in the labels: G translates a, and a registration network R sees
G(a) and b, of one contrast, and predicts the flow that warps G(a) onto b. Later G is used alone.

    a --> G --> G(a) ------------------------------> D --> verdict: is this a real image of B?
                 |                                   ^
                 +--> R(G(a), b) --> flow            +---- b
                 |                    |
                 +-----------------> warp --> warped G(a), compared with b

    loss, its mean over pixels          the path of its gradient, from the loss to what learns
    adversarial     1 (D(G(a)) - 1)^2   verdict ==> D, frozen ==> G(a) ==> G
    correction    20 |warped G(a) - b|  warp ==> G(a) ==> G
                                        warp ==> flow ==> R ==> G(a) ==> G
    smoothness     10 |grad flow|^2     flow ==> R ==> G(a) ==> G
    D's own: (D(b) - 1)^2 + D(G(a))^2   verdict ==> D; G(a), or an older one, is detached

G learns to fool D and to equal b once R has warped it, R to warp G(a) onto b and to bend little. G
cannot learn how b was moved, as a does not show it; without R it would blur. But G may learn a
motion common to all pairs: no loss here objects, as R undoes it; one of more/improved.py does.

Level n (--noise n): aligned pairs are moved apart, so that the true motion is known. Each image is
read at T(p), a random map of its own, p = (y, x) a pixel, c the middle; outside is background.

    T(p) = c + t + M (p - c)        M turns by at most n degrees and zooms by at most 2n %,
                                    t shifts by at most 2n % of the sides; all of them uniform
    moved a[p] = a[Ta(p)] and moved b[p] = b[Tb(p)]. R should find flow(p) = Ta^-1(Tb(p)) - p, since
    moved a[p + flow(p)] = a[Ta(Ta^-1(Tb(p)))] = a[Tb(p)] lies as moved b[p] = b[Tb(p)] does

At level 3 and 64 x 64 pixels that is 4 pixels in the mean. At level 0 one small T (1 degree, 2 %)
moves both, as augmentation. --elastic s adds a bending of s % of the sides to T (data.misalign).

    python reggan.py              # NC (the paper's name of G and D alone) + R, demo pairs
    python reggan.py --host cycle --no-reg --noise 3 --root DIR --paper
    python reggan.py --compare --levels 0,3,5,elastic --seeds 3
    python reggan.py --translate DIR --weights RUN
    python -m more.nicegan              # another host; more.improved: other losses, another R

Small networks; --paper: the paper's. Ours: falling rates, flow 0 at first (tests/departures.md).

Shapes: B batch, C channels, H x W pixels; a, b images (B, C, H, W) in [-1, 1], background -1;
flow (B, 2, H, W) in pixels, channel 0 = dy, channel 1 = dx. A flow says where each pixel reads:
warp(image, flow)[p] = image[p + flow(p)]. One batch of the demo, a and b being (8, 1, 64, 64):
    G    (8, 8, 64, 64), (8, 16, 32, 32) in the residual blocks, (8, 8, 64, 64); G(a) as large as a
    D    (8, 8, 32, 32), (8, 16, 16, 16), (8, 32, 8, 8), (8, 64, 7, 7), (8, 1, 6, 6), mean (8, 1)
    R    G(a) and b (8, 2, 64, 64), (8, 16, 64, 64), (8, 32, 32, 32), ... (8, 32, 4, 4), bottom
         (8, 64, 2, 2), the same way up again; flow (8, 2, 64, 64)
"""

import dataclasses
import itertools
import json
import math
import os
import statistics
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

from support.script import (  # before torch: it sets how threads wait
    RUNNING, InputError, RunConfig, RunLog, Saving, Timed, autocast_for, check_apart, check_maker,
    check_weights, checkpoint_file, draw_curves, even_batch, fill, from_all, join, last_state,
    load_checkpoint, markdown_table, mean_and_deviation, mean_over_processes, number_of_steps,
    option, options_of, parse_config, restore, run_cells, run_script, save_checkpoint, save_grid,
    save_state, scaler_for, seed_rank, warn, with_dtype, write_csv, write_text,
)
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (
    Pairs, check_range, fit_square, list_images, parse_rescale, read_slice, square_box, write_slice)
from kernels import warp
from kernels.cpu import FirstConv, InstanceNorm, LastConv, Reflect  # torch's layers, quick on a CPU
from support.demo import demo_pairs

# --------------------------------------------------------------------------------------------------
# The networks, with Reg-GAN's state-dict keys: generator G, discriminator D, registration R


def normed(conv):
    """A convolution and an instance norm. The norm subtracts the bias, so the bias is not trained;
    it exists because Reg-GAN's state dict holds it."""
    conv.bias.requires_grad_(False)
    return [conv, InstanceNorm()]


class Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), both convolutions 3 x 3; `width` channels in and out."""

    def __init__(self, width):
        super().__init__()
        self.conv_block = nn.Sequential(
            Reflect(1), *normed(nn.Conv2d(width, width, 3)), nn.ReLU(True),
            Reflect(1), *normed(nn.Conv2d(width, width, 3)))

    def forward(self, x):
        return x + self.conv_block(x)


class Generator(nn.Module):
    """G: a 7 x 7 convolution, two of stride 2 that double the channels, nine residual blocks, two
    transposed, a 7 x 7, tanh; norm and ReLU behind all but the last. Reg-GAN's netG_A2B.pth fits.
    It takes any H and W: it pads the image to a multiple of 2**downs and crops the result."""

    def __init__(self, in_chans=1, out_chans=1, width=64, blocks=9, downs=2, kernel=7):
        super().__init__()
        self.multiple = 2**downs
        widths = [width * 2**level for level in range(downs + 1)]
        head = [Reflect(kernel // 2), *normed(FirstConv(in_chans, width, kernel)), nn.ReLU(True)]
        tail = [Reflect(kernel // 2), LastConv(width, out_chans, kernel), nn.Tanh()]
        for i, o in zip(widths, widths[1:]):
            head += [*normed(nn.Conv2d(i, o, 3, stride=2, padding=1)), nn.ReLU(True)]
            up = nn.ConvTranspose2d(o, i, 3, stride=2, padding=1, output_padding=1)
            tail = [*normed(up), nn.ReLU(True)] + tail
        self.model_head = nn.Sequential(*head)
        self.model_body = nn.Sequential(*(Residual(widths[-1]) for _ in range(blocks)))
        self.model_tail = nn.Sequential(*tail)

    def forward(self, x):
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        x = self.model_head(x)  # (B, 4w, H/4, W/4), w = width and downs = 2
        x = self.model_body(x)  # the same
        return self.model_tail(x)[..., :H, :W]  # (B, C, H, W)


class Discriminator(nn.Module):
    """D: a PatchGAN of 4 x 4 convolutions with Reg-GAN's keys. Each verdict sees 70 x 70 pixels. D
    gives their mean (B, 1), which the losses square, as in Reg-GAN's code (Isola et al.: each)."""

    def __init__(self, in_chans=1, width=64):
        super().__init__()
        layers = [nn.Conv2d(in_chans, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for i, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(i, 2 * i, 4, stride, padding=1)
            layers += [*normed(conv), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, x):
        return self.model(x).float().mean((2, 3))  # (B, 1, H/8 - 2, W/8 - 2) -> (B, 1)


def halvings(size):
    """How often R halves an image (H, W): to 2 or 3 pixels, which see it all; at most 7 times."""
    return min(7, int(math.log2(min(size))) - 1)


def leaky_conv(i, o, kernel=3):
    return nn.Sequential(nn.Conv2d(i, o, kernel, padding=kernel // 2), nn.LeakyReLU(0.2, True))


def start_at_zero(network, *last):
    """Kaiming weights, but 0 in `last`: so is the first flow, and `correction` starts as an L1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.2)
            nn.init.zeros_(module.bias)
    for conv in last:
        nn.init.zeros_(conv.weight)


class Registration(nn.Module):
    """R: a residual U-Net, (fake, real) -> flow (B, 2, H, W). `channels` counts both images' (2C),
    `width` the first level's (paper: 32); all others have 2 * width, the bottom 4 * width."""

    def __init__(self, channels, size, width=32):
        super().__init__()
        w = 2 * width
        widths = [width] + [w] * (halvings(size) - 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, o in zip([channels] + widths, widths):
            self.down.append(nn.Sequential(leaky_conv(i, o), Residual(o)))
        blocks = [Residual(2 * w) for _ in range(3)]
        self.bottom = nn.Sequential(leaky_conv(w, 2 * w, 1), *blocks, leaky_conv(2 * w, w, 1))
        upwards = widths[::-1]
        for i, o in zip([w] + upwards, upwards):
            self.up.append(leaky_conv(i + o, o))  # i from below, o from the skip
        self.refine = nn.Sequential(Residual(width), leaky_conv(width, width, 1))
        self.output = nn.Conv2d(width, 2, 3, padding=1)
        start_at_zero(self, self.output)

    def forward(self, fake, real):
        x, skips = torch.cat((fake, real), 1), []  # (B, 2C, H, W)
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)  # (B, 2 * width, ...), a few pixels high and wide
        for block, skip in zip(self.up, reversed(skips)):
            x = F.interpolate(x, skip.shape[2:], mode="bilinear")
            x = block(torch.cat((x, skip), 1))
        return self.output(self.refine(x)).float()  # (B, 2, H, W)


# --------------------------------------------------------------------------------------------------
# The paper's losses and its step


def lsgan(verdict, real):
    """mean (verdict - target)^2, target 1 for real and 0 for fake."""
    return (verdict - float(real)).square().mean()


def discriminator_loss(discriminator, real, fake):
    """mean (D(real) - 1)^2 + mean D(fake)^2."""
    # One pass judges both: an instance norm does not mix the images of a batch.
    of_real, of_fake = discriminator(torch.cat((real, fake))).chunk(2)
    return lsgan(of_real, True) + lsgan(of_fake, False)


def correction(fake, flow, real):
    """mean |warp(G(a), R(G(a), b)) - b|: G is compared with b only after R has moved it onto b."""
    return F.l1_loss(warp(fake, flow), real)


def smoothness(flow):
    """mean (flow[y + 1, x] - flow[y, x])^2 + mean (flow[y, x + 1] - flow[y, x])^2, the paper's
    ||grad R||^2: neighbours move alike. At weight 0 R may repaint, at a huge one it only shifts."""
    return flow.diff(dim=2).square().mean() + flow.diff(dim=3).square().mean()


def registration_losses(model, config, a, b, fake):
    """What R adds to G's losses: a dict, empty where the run has no registration."""
    if not config.reg:
        return {}
    flow = model.registration(fake, b)
    losses = {"correction": config.correction * correction(fake, flow, b),
              "smooth": config.smooth * smoothness(flow)}
    return losses | config.added_losses(model, a, b, fake, flow)  # none in the paper


class Pool:
    """Up to `size` old fakes: half of the time D gets one of them instead of a new one, so that it
    does not forget what G made before (Shrivastava et al. 2017). In NC + R it is ours. 0: none."""

    def __init__(self, size=50):
        self.size, self.images = size, []

    def __call__(self, fakes):
        if self.size == 0:
            return fakes
        shown = []
        for fake in fakes:
            if len(self.images) < self.size:
                self.images.append(fake)
            elif torch.rand(()) < 0.5:
                k = int(torch.randint(self.size, ()))
                fake, self.images[k] = self.images[k], fake
            shown.append(fake)
        return torch.stack(shown)


def parameters_of(optimizer):
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def descend(optimizer, losses, scaler):
    """One step of the optimiser down the sum of the losses; under torchrun by the mean gradient."""
    optimizer.zero_grad()
    scaler.scale(sum(losses.values())).backward()
    mean_over_processes(p.grad for p in parameters_of(optimizer) if p.grad is not None)
    scaler.step(optimizer)


def training_step(model, config, a, b, opt_g, opt_d, pools, autocast=nullcontext,
                  scaler=torch.amp.GradScaler(enabled=False)):
    """Updates G and R together, then D. Returns the losses, means over all processes.
    NC + R minimises (D(G(a)) - 1)^2 + 20 correction + 10 smoothness; another host has its own
    losses in place of the first. D minimises `discriminator_loss`."""
    for weight in parameters_of(opt_d):
        weight.requires_grad_(False)  # here D only judges, so its weights need no gradients
    with autocast():
        fakes, losses = model.generator_losses(a, b)  # fakes["B"] is G(a)
        losses |= registration_losses(model, config, a, b, fakes["B"])
    descend(opt_g, losses, scaler)
    for weight in parameters_of(opt_d):
        weight.requires_grad_(True)
    # D is shown the fakes detached: what it learns from them must not flow back into G.
    shown = {side: pools[side](fake.detach()) for side, fake in fakes.items()}
    with autocast():
        losses_of_d = model.discriminator_losses(a, b, shown)
    descend(opt_d, losses_of_d, scaler)
    scaler.update()
    values = {name: loss.detach() for name, loss in (losses | losses_of_d).items()}
    mean_over_processes(values.values())
    return values


# --------------------------------------------------------------------------------------------------
# Hosts: the translation methods that registration can join


class NC(nn.Module):
    """One direction and the adversarial loss alone; with registration this is RegGAN's "NC + R".
    A host has networks named netG... and netD..., which two optimisers train, and three methods:
    `translate(a)`; `generator_losses(a, b)` -> (fakes, weighted losses), where fakes["B"] is the
    translation of a; `discriminator_losses(a, b, fakes)` -> losses. Its fakes are detached and, if
    `pooled`, mixed with old ones."""

    pooled = True

    def __init__(self, config, in_chans, out_chans):
        super().__init__()
        sizes = config.width, config.blocks, config.downs, config.kernel
        self.netG_A2B = Generator(in_chans, out_chans, *sizes)
        self.netD_B = Discriminator(out_chans, config.width)

    def translate(self, a):
        return self.netG_A2B(a)

    def seen(self, a, image):
        """What D gets to see of an image that is b or the translation of a."""
        return image

    def generator_losses(self, a, b):
        fake = self.netG_A2B(a)
        return {"B": fake}, {"adversarial": lsgan(self.netD_B(self.seen(a, fake)), True)}

    def discriminator_losses(self, a, b, fakes):
        real, fake = self.seen(a, b), self.seen(a, fakes["B"])
        return {"d": discriminator_loss(self.netD_B, real, fake)}


class Pix2Pix(NC):
    """Isola et al. 2017: D sees (a, b) side by side, and an L1 loss trusts the pairs.
    adversarial + 100 mean |G(a) - b|"""

    pooled = False  # an old fake would stand beside another a

    def __init__(self, config, in_chans, out_chans):
        super().__init__(config, in_chans, out_chans)
        self.netD_B = Discriminator(in_chans + out_chans, config.width)

    def seen(self, a, image):
        return torch.cat((a, image), 1)  # (B, C of A + C of B, H, W)

    def generator_losses(self, a, b):
        fakes, losses = super().generator_losses(a, b)
        return fakes, losses | {"l1": 100 * F.l1_loss(fakes["B"], b)}


class Cycle(NC):
    """CycleGAN (Zhu et al. 2017): G from A to B, H from B to A, and there and back is the identity.
    adversarial + 10 (mean |H(G(a)) - a| + mean |G(H(b)) - b|)
    Some seeds learn to invert the image, and H inverts it back: no loss here forbids that."""

    def __init__(self, config, in_chans, out_chans):
        super().__init__(config, in_chans, out_chans)
        sizes = config.width, config.blocks, config.downs, config.kernel
        self.netG_B2A = Generator(out_chans, in_chans, *sizes)
        self.netD_A = Discriminator(in_chans, config.width)

    def generator_losses(self, a, b):
        fake_b, fake_a = self.netG_A2B(a), self.netG_B2A(b)
        adversarial = lsgan(self.netD_B(fake_b), True) + lsgan(self.netD_A(fake_a), True)
        back_a, back_b = self.netG_B2A(fake_b), self.netG_A2B(fake_a)
        cycle = F.l1_loss(back_a, a) + F.l1_loss(back_b, b)
        return {"A": fake_a, "B": fake_b}, {"adversarial": adversarial, "cycle": 10 * cycle}

    def discriminator_losses(self, a, b, fakes):
        of_a = discriminator_loss(self.netD_A, a, fakes["A"])
        return {"d": of_a + discriminator_loss(self.netD_B, b, fakes["B"])}


HOSTS = {"nc": NC, "pix2pix": Pix2Pix, "cycle": Cycle}  # a file of more/ adds its own

# --------------------------------------------------------------------------------------------------
# Metrics


def metrics(fake, real):
    """MAE, PSNR and SSIM of fake and real (B, C, H, W) in [-1, 1]: a dict of (B,) tensors.
    With f and r scaled to [0, 1], mae = mean |f - r| and psnr = -10 log10 mean (f - r)^2, at most
    100, both over the foreground, as in the paper: pixels with real != -1 in a channel; NaN without
    any. `foreground` is its share. ssim is scikit-image's: uniform windows of 7 x 7, sample
    covariance, K 0.01, 0.03."""
    if fake.device.type == "mps":  # it knows no float64
        fake, real = fake.cpu(), real.cpu()
    f, r = (fake.double() + 1) / 2, (real.double() + 1) / 2
    inside = (real != -1).any(1, keepdim=True).expand_as(real).double()

    def mean(x):
        return (x * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))

    windows = (F.avg_pool2d(x, 7, stride=1) for x in (f, r, f * f, r * r, f * r))
    mf, mr, ff, rr, fr = windows  # (B, C, H - 6, W - 6) each
    unbiased = 49 / 48  # of the covariance over the 49 pixels of a window
    vf, vr, vfr = (unbiased * x for x in (ff - mf * mf, rr - mr * mr, fr - mf * mr))
    ssim = (2 * mf * mr + 1e-4) * (2 * vfr + 9e-4) / ((mf**2 + mr**2 + 1e-4) * (vf + vr + 9e-4))
    psnr = -10 * mean((f - r).square()).clamp(min=1e-10).log10()
    return {"ssim": ssim.mean((1, 2, 3)), "mae": mean((f - r).abs()), "psnr": psnr,
            "foreground": inside.mean((1, 2, 3))}


def registration_metrics(flow, real, true_flow=None):
    """How good flows (B, 2, H, W) in pixels are: a dict of (B,) tensors. registration_error is the
    mean length of flow - true_flow over the foreground of real, and misalignment that of true_flow.
    folding is the share of pixels where p + flow(p) has a Jacobian determinant <= 0 (forward
    differences): there the flow turns the image over."""
    inside = (real != -1).any(1)  # (B, H, W)

    def mean_length(x):
        return (x.norm(dim=1) * inside).sum((1, 2)) / inside.sum((1, 2))

    scores = {}
    if true_flow is not None:  # of the motion that was added; the pairs may have more
        scores["registration_error"] = mean_length(flow - true_flow)
        scores["misalignment"] = mean_length(true_flow)
    down, right = flow.diff(dim=2)[..., :-1], flow.diff(dim=3)[..., :-1, :]  # (B, 2, H - 1, W - 1)
    determinant = (1 + down[:, 0]) * (1 + right[:, 1]) - down[:, 1] * right[:, 0]
    return scores | {"folding": (determinant <= 0).float().mean((1, 2))}


# --------------------------------------------------------------------------------------------------
# Options, presets, networks and pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A file of more/ with other options, another R or more losses derives its own from this."""

    script: ClassVar = "reggan"
    changes: ClassVar = {}  # what a class of more/ changes in the preset SMALL
    root: str = option("", "folder with A, B in train, val, perhaps test (default: demo pairs)")
    host: str = option("nc", "the translation method", choices=HOSTS)
    reg: bool = option(True, "a registration network, which makes any host RegGAN")
    noise: float = option(None, "level of motion (default: 3, own pairs none)", within="[0, 25]")
    elastic: float = option(None, "added bending, sd in % of side (default: 0)", within="[0, 4]")
    size: int = option(0, "scale to n x n pixels, 32 or more (0: as they are)", within="[0, 4096]")
    rescale: str = option("", "LO,HI (LO,HI,LO,HI for A, B) become -1, 1; below 0: --rescale=-9,9")
    paper: bool = option(False, "the paper's networks and schedule instead of small ones")
    width: int = option(None, "channels of the first layer", within="[1, 1024]")
    kernel: int = option(None, "side of G's first and last kernels", choices=[1, 3, 5, 7, 9])
    downs: int = option(None, "times the generator halves the image", within="[0, 4]")
    blocks: int = option(None, "residual blocks of the generator", within="[0, 100]")
    reg_lr: float = option(None, "learning rate of the registration network", within="(0, inf)")
    decay: bool = option(None, "learning rates fall linearly to 0 over the second half of the run")
    pool: int = option(None, "old fakes that are kept for the discriminators", within="[0, inf)")
    correction: float = option(None, "weight of |warp(G(a), R(G(a), b)) - b|", within="[0, inf)")
    smooth: float = option(None, "weight of the flow's squared gradient", within="[0, inf)")
    compare: bool = option(False, "all hosts at all levels; goes on where it stopped", free=True)
    hosts: str = option("pix2pix,nc,nc+r,cycle,cycle+r", "its rows, +r: with R", needs="compare")
    levels: str = option("0,3,5,elastic", "its levels: --noise, elastic, none", needs="compare")
    seeds: int = option(3, "runs in each of its cells", within="[1, inf)", needs="compare")
    translate: str = option("", "translate this folder with --weights into --out", free=True,
                           takes=("weights", "rescale", *RUNNING))
    weights: str = option("", "a run's folder or checkpoint, or a netG_A2B.pth", needs="translate")

    def registration(self, out_chans, size):
        """The network R for images of `size` = (H, W)."""
        return Registration(2 * out_chans, size, max(16, self.width // 2))

    def added_losses(self, model, a, b, fake, flow):
        """Weighted losses that go beyond the paper: {name: loss}."""
        return {}


SMALL = {"width": 8, "kernel": 3, "downs": 1, "blocks": 3, "batch_size": 8, "epochs": 100.0,
         "lr": 4e-3, "reg_lr": 2e-3, "decay": True, "pool": 50, "correction": 20.0, "smooth": 10.0}
PAPER = {"width": 64, "kernel": 7, "downs": 2, "blocks": 9, "batch_size": 1, "epochs": 80.0,
         "lr": 1e-4, "reg_lr": 1e-4, "decay": False}


def complete(config):
    """`config` with the preset's value for every option that was not typed, and checked."""
    preset = SMALL | config.changes | (PAPER if config.paper else {})
    if config.paper and config.host == "nc" and config.reg:
        preset["pool"] = 0  # the official NC + R keeps no old fakes
    preset |= {"noise": 3.0, "elastic": 0.0, "out": "runs/" + config.script.rpartition(".")[2]}
    if config.root:  # own pairs stay as they are, unless asked; None is no motion at all
        preset["noise"] = 0.0 if config.elastic else None
    config = fill(config, preset)
    if 0 < config.size < 32:
        raise InputError("--size", "0, or 32 pixels or more", config.size)
    return config


def build(config, in_chans, out_chans, size):
    """The networks for images of `size` = (H, W): the host, and with --reg its `registration`."""
    model = HOSTS[config.host](config, in_chans, out_chans)
    if config.reg:
        model.registration = config.registration(out_chans, size)
    return model


def trainable(module, *prefixes):
    """The parameters that are trained and whose names start with one of `prefixes`."""
    named = module.named_parameters()
    return [p for name, p in named if p.requires_grad and name.startswith(prefixes)]


def all_pairs(config):
    """(training pairs, val, test, their digest). val and test are (as they are, moved as in
    training): G is judged by the first, R by the second. Without test/, test is val."""
    root = Path(config.root or demo_pairs("demo"))

    def pairs(part, noise, with_flow=True):
        return Pairs(root / part, noise, config.elastic, config.seed, config.size, config.rescale,
                     with_flow)

    train = pairs("train", config.noise, with_flow=False)
    last = "test" if (root / "test").is_dir() else "val"
    val, test = ((pairs(part, None), pairs(part, config.noise)) for part in ("val", last))
    for other, _ in (val, test):
        if (other.in_chans, other.out_chans) != (train.in_chans, train.out_chans):
            raise InputError(other.folder, f"as many channels as in {train.folder}", "others")
    return train, val, test, " ".join(part.digest for part in (train, val[0], test[0]))


# --------------------------------------------------------------------------------------------------
# Training


class Job:
    """A run's pairs, networks, optimisers, pools and counters; with --resume as `save` wrote."""

    def __init__(self, config, device, rank=0, world=1):
        self.device, self.rank, self.world = device, rank, world
        self.pairs, self.val, self.test, digest = all_pairs(config)
        self.facts = {"data": digest, "number_of_processes": world,
                      "added_motion": [config.noise, config.elastic]}  # see `last_state`
        torch.manual_seed(config.seed)
        self.model = build(config, self.pairs.in_chans, self.pairs.out_chans, self.pairs.shape)
        self.model.to(device)
        seed_rank(config.seed, rank)  # the same weights, then numbers of their own
        groups = [{"params": trainable(self.model, "netG"), "peak": config.lr}]
        if config.reg:
            groups.append({"params": trainable(self.model, "registration"), "peak": config.reg_lr})
        self.opt_g = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)
        groups = [{"params": trainable(self.model, "netD"), "peak": config.lr}]
        self.opt_d = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)
        self.pools = {side: Pool(config.pool if self.model.pooled else 0) for side in "AB"}
        self.share = config.batch_size // world  # what each process takes of a batch
        self.per_epoch = math.ceil(math.ceil(len(self.pairs) / world) / self.share)  # steps
        self.steps = number_of_steps(config, self.per_epoch, 1)
        self.step, self.best = 0, math.inf
        saved = last_state(config, self.steps, **self.facts)
        self.history = saved and saved["history"]
        self.config = with_dtype(config, device, world, saved)
        self.autocast = autocast_for(self.config, device)
        self.scaler = scaler_for(self.config, device)
        if saved:
            pools = restore(saved, rank, model=self.model, opt_g=self.opt_g, opt_d=self.opt_d,
                            scaler=self.scaler)
            for side, images in pools.items():
                self.pools[side].images = [image.to(device) for image in images]
            self.step, self.best = saved["step"], saved["best"]


def save(job, log, best=False):
    """Writes last.pt, and before it best.pt for `load_generator` where these weights are the
    `best`. Every process calls this, because each has pools of its own."""
    weights = {"model": job.model.state_dict(), "config": options_of(job.config),
               "in_chans": job.pairs.in_chans, "out_chans": job.pairs.out_chans,
               "shape": list(job.pairs.shape)}
    check_weights(log, job.step, weights["model"])
    if best and job.rank == 0:
        save_checkpoint(log.out / "best.pt", weights)
    pools = {side: [image.to("cpu", copy=True) for image in pool.images]  # for all processes
             for side, pool in job.pools.items()}
    parts = {name: getattr(job, name).state_dict() for name in ("opt_g", "opt_d", "scaler")}
    state = weights | job.facts | parts | {"step": job.step, "best": job.best}
    save_state(log, job.config, job.world, state, pools)


@torch.no_grad()
def score(job, aligned, moved):
    """Means over the images of all processes: G's metrics on aligned pairs, since moved ones would
    blame it for their motion, R's on moved ones. An image without foreground is refused."""
    job.model.eval()
    scores = {}
    for pairs in [aligned, moved] if job.config.reg else [aligned]:
        for batch in pairs.batches(job.share, rank=job.rank, world=job.world):
            a, b, *flows = (x.to(job.device) for x in batch)  # a flow only where --noise moves
            with job.autocast():
                fake = job.model.translate(a)
                flow = job.model.registration(fake, b) if pairs is moved else None
            values = metrics(fake, b) if flow is None else registration_metrics(flow, b, *flows)
            for name, column in values.items():
                scores.setdefault(name, []).extend(column.tolist())
    job.model.train()
    parts, means = from_all(scores, job.world), {}
    for name in parts[0]:  # where images are few, another process may have got none
        means[name] = statistics.fmean(x for part in parts for x in part.get(name, ()))
    where, advice = aligned.folder / "B", "--rescale LO,HI says which values become -1 and 1"
    if math.isnan(means["mae"]):
        found = f"an image without any; {advice}"
        raise InputError(where, "values above -1, the background", found)
    if job.best == math.inf and means["foreground"] == 1 and job.rank == 0:  # once a run
        warn(f"{where}: no pixel is background, which is exactly -1: MAE and PSNR are over whole "
             f"images; {advice}")
    return means


def loop(job, log):
    """Trains from job.step to the end."""
    config, steps, per_epoch = job.config, job.steps, job.per_epoch
    every, epochs = max(per_epoch, steps // 10), math.ceil(steps / per_epoch)
    batches = job.pairs.batches(job.share, epochs, True, config.seed, job.step, job.rank,
                                job.world, config.workers)
    batches = Timed(batches, job.world)
    with Saving(lambda step: save(job, log), job.world) as saving:
        while job.step < steps:
            # Pairs move in another way every epoch, so that G cannot learn their motion by heart.
            a, b = (x.to(job.device) for x in next(batches))
            # Ours: falling rates let G settle; at a constant one it circles around what D wants.
            factor = min(1.0, 2 * (1 - job.step / steps)) if config.decay else 1.0
            for group in job.opt_g.param_groups + job.opt_d.param_groups:
                group["lr"] = group["peak"] * factor
            # G and R take one step together, because their losses judge both at once; then D.
            losses = training_step(job.model, config, a, b, job.opt_g, job.opt_d, job.pools,
                                   job.autocast, job.scaler)
            job.step += 1
            # A GAN that diverges does not recover, so every step's losses are looked at.
            losses = {name: loss.item() for name, loss in losses.items()}
            if not all(map(math.isfinite, losses.values())) or job.scaler.get_scale() < 1:
                advice = "lower --lr, or use --dtype fp32"
                raise InputError(f"step {job.step}: losses are not finite ({losses}); {advice}")
            ends, epoch = job.step == steps, job.step / per_epoch
            if job.step % max(1, per_epoch // 3) == 0 or ends:
                log.line(step=job.step, epoch=epoch, lr=job.opt_g.param_groups[0]["lr"], **losses)
            if job.step % every == 0 or ends:
                scores = score(job, *job.val)
                log.line(step=job.step, epoch=epoch, val=scores, val_mae=scores["mae"],
                         **batches.speed())
                draw_curves(log, config.host, {"losses": list(losses), "MAE on val": ["val_mae"]})
                if job.rank == 0:
                    draw(job, log.out / "progress.gif", job.val[-1], note=f"epoch {epoch:g}: ")
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                    print(f"epoch {epoch:g}: val {shown}; {batches}", flush=True)
                # Val chooses the weights (less well if its pairs are misaligned). A GAN's losses
                # cannot: G's rises when D gets better. The test must not: it would flatter.
                best = scores["mae"] < job.best
                job.best = min(job.best, scores["mae"])
                save(job, log, best)
            saving.after(job.step)  # every few minutes, and where Ctrl-C asks the run to stop


def train(config):
    """Trains one host at one misalignment level and tests it. Returns what result.json holds."""
    start = time.time()
    device, rank, world = join(config)
    job = Job(even_batch(complete(config), world), device, rank, world)
    config = job.config
    # Nothing can be refused any more: only now is the log of an earlier run replaced.
    log = RunLog(config.out, config, rank, job.history, start)
    if rank == 0:
        motion = "none, the pairs are used as they are; val and test pairs are taken to be aligned"
        if config.noise is not None:
            motion = f"level {config.noise:g} and bending of {config.elastic:g} %, new every epoch"
        print(f"misalignment that is added to the training pairs: {motion}")
    loop(job, log)
    part, chosen = job.test[0].folder.name, "last.pt (nothing chosen)"
    if part == "test":  # weights that val chose would score too well on val itself
        job.model.load_state_dict(load_checkpoint(log.out / "best.pt")["model"])
        chosen = "best.pt (chosen on val)"
    result = score(job, *job.test) | {
        "host": config.host, "registration": config.reg, "noise": config.noise,
        "elastic": config.elastic, "part": part, "weights": chosen, "images": len(job.test[0]),
        "parameters": sum(weight.numel() for weight in trainable(job.model, "")),
        "data_digest": job.facts["data"], "seconds": time.time() - start}
    for name in ("images_per_second", "share_waiting_for_data"):
        result[name] = log.history[-1][name]
    if rank == 0:
        draw(job, log.out / "translation.png", job.test[-1], rows=4)
    log.json("result.json", result)
    if world > 1:
        torch.distributed.barrier()  # no process leaves, or starts a next run, before the last
    return result


# --------------------------------------------------------------------------------------------------
# Pictures, translating, comparing


def moved_with_grid(image, flow):
    """`image` (1, C, H, W) in [0, 1] below an orange grid, both moved by `flow`: (1, 3, H, W)."""
    step = flow.shape[3] // 8
    lines = torch.zeros_like(flow[:, :1])
    lines[:, :, step // 2 :: step] = lines[..., step // 2 :: step] = 1
    orange = flow.new_tensor((1.0, 0.65, 0.0)).view(1, 3, 1, 1)
    return torch.lerp(warp(image.mean(1, keepdim=True), flow), orange, warp(lines, flow))


@torch.no_grad()
def draw(job, path, pairs, rows=1, note=""):
    """Draws some of the `pairs`, one a row: A, B, G(A), the difference of the last two and, with R,
    G(A) as R moves it and the difference that is left. Differences are drawn twice as bright as
    they are. The text below a row has their means, as shares of the range of B."""
    target = "B: target" if job.config.noise is None else "B: target, misaligned"
    titles = ["A: input", target, "G(A): translation", "|G(A) - B|"]
    pictures, captions = [], []
    if job.config.reg:
        titles += ["G(A) moved by R", "|moved G(A) - B|"]
    job.model.eval()
    for i in range(0, len(pairs), max(1, len(pairs) // rows))[:rows]:
        a, b = (x[None].to(job.device) for x in pairs.item(0, i)[:2])
        fake = job.model.translate(a)
        errors = [(fake - b).abs()]
        row = [(a + 1) / 2, (b + 1) / 2, (fake + 1) / 2, errors[0]]
        if job.config.reg:
            flow = job.model.registration(fake, b)
            errors.append((warp(fake, flow) - b).abs())
            row += [moved_with_grid(row[2], flow), errors[1]]
        pictures.append([x[0] for x in row])
        shown = ", after the motion ".join(f"{error.mean() / 2:.3f}" for error in errors)
        captions.append(f"{note}mean difference to B {shown}")
    job.model.train()
    save_grid(path, pictures, titles, captions, scale=max(1, 128 // pairs.shape[1]))


def load_generator(path, config_class=Config):
    """(host, its configuration, channels of A) of a run's folder or checkpoint, or of a bare
    Reg-GAN generator (netG_A2B.pth). Raises InputError for any other file."""
    state = load_checkpoint(checkpoint_file(path, "best.pt"))
    try:
        if "model_head.1.weight" in state:
            width, in_chans = state["model_head.1.weight"].shape[:2]
            blocks = len({key.split(".")[1] for key in state if key.startswith("model_body.")})
            config = complete(Config(paper=True, reg=False, width=width, blocks=blocks))
            model = build(config, in_chans, len(state["model_tail.7.bias"]), size=None)
            model.netG_A2B.load_state_dict(state)
        else:
            check_maker(state["config"], config_class, path)
            options = {name: x for name, x in state["config"].items() if name != "script"}
            config, in_chans = complete(config_class(**options)), state["in_chans"]
            H, W = state["shape"]  # of the square pairs of a run without --size
            config = dataclasses.replace(config, size=config.size or (H if H == W else 0))
            model = build(config, in_chans, state["out_chans"], state["shape"])
            model.load_state_dict(state["model"])
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(path, "a checkpoint of this reggan.py or a Reg-GAN generator",
                         f"another ({type(error).__name__}: {str(error)[:200]})") from None
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise InputError(path, "finite weights", "NaN or infinity")
    return model, config, in_chans


@torch.no_grad()
def translate_folder(config):
    """Translates the images of the folder --translate into --out, in their formats and depths."""
    if not config.weights:
        raise InputError("--translate needs --weights: a run's folder or a Reg-GAN netG_A2B.pth")
    model, trained, in_chans = load_generator(config.weights, type(config))
    device, _, _ = join(config)
    autocast = autocast_for(with_dtype(config, device, saved={"config": vars(trained)}), device)
    model.to(device).eval()
    span_a, span_b = parse_rescale(config.rescale or trained.rescale)
    folder, out = Path(config.translate), Path(config.out or "runs/translate")
    check_apart(out, folder)
    images = {}  # all of them are read first, so that a bad one is found before any is written
    for path in list_images(folder):
        images[path] = read_slice(path, span_a, blank=True)
        if (found := len(images[path])) != in_chans:
            raise InputError(f"{path}: {found} channels, the generator takes {in_chans}")
    check_range(folder, images.values(), span_a)
    for path, image in images.items():
        a = fit_square(image, trained.size)  # as in training
        with autocast():
            fake = model.translate(a[None].to(device))
        top, left, h, w = square_box(image.shape[1:], trained.size)
        fake = fake[..., top : top + h, left : left + w]
        fake = F.interpolate(fake, image.shape[1:], mode="bilinear")[0]  # (C, H, W)
        write_slice(out / Path(path).relative_to(folder), fake, path, span_b)
    print(f"{len(images)} images translated into {out}")


def compare(config):
    """The paper's table: a run in OUT/cells for every row of --hosts, level and seed. Writes the
    results of all runs to OUT/table.csv, and their means and standard deviations over the seeds to
    OUT/table.md. Returns the lines of table.csv as dicts."""
    out, cells = Path(config.out or complete(config).out + "-compare"), {}
    if config.noise is not None or not config.reg or config.host != type(config).host:
        raise InputError("--compare", "--levels and --hosts", "--noise, --no-reg or --host")
    seeds = range(config.seed, config.seed + config.seeds)
    levels, hosts = config.levels.split(","), config.hosts.split(",")
    for number, level, row in itertools.product(seeds, levels, hosts):
        cells[f"{row}_{level}_{number}"] = cell_config(config, row, level, number)
    _, rank, _ = join(config)
    table, methods, lines, now = [], {}, [], all_pairs(complete(config))[-1]
    for name, result in run_cells(out / "cells", cells, train, lambda cell: now):
        row, level, number = name.split("_")
        table.append({"row": row, "level": level, "seed": int(number)} | result)
        methods.setdefault((level, row), []).append(result)
    names = list(dict.fromkeys(name for line in table for name in line))
    digits = {"psnr": 2, "mae": 4, "ssim": 4, "registration_error": 2, "folding": 4}
    for key, runs in methods.items():
        values = [[result[name] for result in runs if name in result] for name in digits]
        lines.append([*key, *map(mean_and_deviation, values, digits.values())])
    header = ["level", "method", "PSNR, dB", "MAE", "SSIM", "registration error, px", "folding"]
    if rank == 0:
        write_csv(out / "table.csv", names, [[line.get(n, "") for n in names] for line in table])
        write_text(out / "table.md", markdown_table(header, lines))
        print((out / "table.md").read_text())
    return table


def cell_config(config, row, level, number):
    """The configuration of one run of a comparison. Refuses an unknown row or level."""
    host, reg = row.removesuffix("+r"), row.endswith("+r")
    if host not in HOSTS:
        raise InputError("--hosts", f"{', '.join(HOSTS)}, with +r for registration", row)
    noise, elastic = 0.0, config.elastic or 3.0
    if level == "none" and config.root:
        noise = elastic = None
    elif level != "elastic":
        try:
            noise, elastic = float(level), config.elastic
        except ValueError:
            raise InputError("--levels", "numbers, elastic, or with --root none", level) from None
    cell = {"host": host, "reg": reg, "noise": noise, "elastic": elastic, "seed": number}
    return complete(dataclasses.replace(config, **cell))


def main(config_class=Config, description=__doc__):
    """Does what the command line says. A file of more/ gives its own options and its own text."""
    presets = {"small": SMALL | config_class.changes, "paper changes": PAPER}
    lines = [textwrap.fill(f"preset {name}: {values}", 98) for name, values in presets.items()]
    config = parse_config(config_class, description="\n".join([description, *lines]))
    if config.translate:
        translate_folder(config)
    elif config.compare:
        compare(config)
    else:
        result = train(config)
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks
            print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(main)
