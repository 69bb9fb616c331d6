"""RegGAN: image-to-image translation learnt from misaligned pairs. Training, testing, translating, comparing.

Kong et al., "Breaking the Dilemma of Medical Image-to-image Translation", NeurIPS 2021 (arXiv:2110.06465). Supervised
translation wants pixel-aligned pairs, unsupervised translation wants none and has no unique solution. RegGAN takes pairs as
they are and calls the misalignment label noise: a registration network R predicts the flow that carries G(a) onto b, and G
is corrected through it. R explains the noise away during training; only G is used afterwards.

    python reggan.py                                    # NC + registration on the demo pairs, drawn on first use
    python reggan.py --host cycle --no-reg --noise 3 --root DIR --paper
    python reggan.py --compare --levels 0,3,5,elastic --seeds 3
    python reggan.py --translate DIR --weights RUN

Where this departs from the paper's official code (Kid-Liet/Reg-GAN), and why:
 1. The generator runs once a step: the discriminator's step uses the same fake, detached. (Officially a second forward.)
 2. The discriminators are frozen in the generator's step, and biases before an instance norm, which subtracts them, always.
 3. Learning rate: constant, then linear to 0 over the second half, and a pool of 50 old fakes for unconditional
    discriminators, as in CycleGAN. (Official yamls name a decay that no trainer runs; the pool is missing from NC + R.)
 4. R searches from coarse to fine: it sees how well the images agree, moved along the flow so far and a step further, up to
    half the resolution. (Officially a U-Net of the two images side by side, at full resolution, of a fixed depth that small
    images do not survive.) Its last layers are zero.
 5. Misalignment is resampled bilinearly. (Officially to the nearest pixel, with the global generator reseeded.)
 6. MAE and PSNR exclude the background of every pixel. (Officially PSNR indexes `fake[x][y]`, whole rows.)
 7. NICE-GAN: G's step comes first, as in the other hosts; adaptive norm from pooled features; shallower discriminators;
    its encoder halves the image as often as --downs says.
 8. Nothing is selected on the images that are reported: best.pt is chosen on val/ and reported on test/ where there is
    one; otherwise val/ is reported with the last weights.
 9. By default small networks and their rates, and correction weighs 100, as Pix2Pix's L1 does. --paper is the paper's
    networks, schedule and weights.
10. Registration brings three losses more. Nothing in the paper's keeps G from moving an image while R moves it back, and G is
    used without R. `drift`: the flow is zero in the mean. `equivariance`: G of a moved image is the moved G of the image,
    so that G cannot tell how far an image was zoomed and undo a part of it. `synthetic`: R also finds motion that is known,
    of b against a moved copy; the likeness of two round heads teaches it too little about rotation.

Shapes: B batch, C channels, H x W pixels; a, b images (B, C, H, W) in [-1, 1], background -1; flow (B, 2, H, W) in pixels.
"""
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached

import data
from data import InputError, Pairs, RunConfig, RunLog, load_checkpoint, option, parse_config, save_checkpoint, start_run
from kernels import warp

# ---------------------------------------------------------------------------------------------------------------------
# Networks of the paper


class InstanceNorm(nn.Module):
    """Zero mean and unit variance of each channel of each image; on a CPU as the group norm that it is, 2 to 4 times faster,
    or, of a single image, as batch norm, whose backward pass is fast in channels_last too."""

    def forward(self, x):
        if x.is_cuda:
            return F.instance_norm(x)
        return F.batch_norm(x, None, None, training=True) if len(x) == 1 else F.group_norm(x, x.shape[1])


class Reflect(nn.ReflectionPad2d):
    """Reflection padding in the type of its input: autocast on a CPU would make float32 of it, and of all that follows."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class LastConv(nn.Conv2d):
    """A k x k convolution to few channels. On a CPU as one 1 x k convolution to k times as many, whose rows are then added: with
    one output channel the library's kernels idle, and at 7 x 7 this is 3 times as fast."""

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        k, H = self.kernel_size[0], x.shape[2] - self.kernel_size[0] + 1
        rows = F.conv2d(x, self.weight.permute(2, 0, 1, 3).reshape(-1, self.in_channels, 1, k)).float().chunk(k, 1)
        return sum(row[:, :, i:i + H] for i, row in enumerate(rows)) + self.bias.view(-1, 1, 1)


def normed(conv):
    """A convolution that an instance norm follows: the norm subtracts the bias, so it is kept for the keys, untrained."""
    if conv.bias is not None:
        conv.bias.requires_grad_(False)
    return [conv, InstanceNorm()]


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv_block = nn.Sequential(Reflect(1), *normed(nn.Conv2d(width, width, 3)), nn.ReLU(True),
                                        Reflect(1), *normed(nn.Conv2d(width, width, 3)))

    def forward(self, x):
        return x + self.conv_block(x)


class Generator(nn.Module):
    """7 x 7 stem, stride-2 convolutions (two in the paper), residual blocks, as many transposed convolutions, tanh.
    State-dict keys are Reg-GAN's, so its published netG_A2B.pth loads. Any H, W: padded inside, cropped back."""

    def __init__(self, in_chans=1, out_chans=1, width=64, blocks=9, downs=2, kernel=7):
        super().__init__()
        self.multiple, widths = 2**downs, [width * 2**k for k in range(downs + 1)]
        head = [Reflect(kernel // 2), *normed(nn.Conv2d(in_chans, width, kernel)), nn.ReLU(True)]
        tail = [Reflect(kernel // 2), LastConv(width, out_chans, kernel), nn.Tanh()]
        for i, o in zip(widths, widths[1:]):
            head += [*normed(nn.Conv2d(i, o, 3, stride=2, padding=1)), nn.ReLU(True)]
            tail = [*normed(nn.ConvTranspose2d(o, i, 3, stride=2, padding=1, output_padding=1)), nn.ReLU(True)] + tail
        self.model_head = nn.Sequential(*head)
        self.model_body = nn.Sequential(*(Residual(widths[-1]) for _ in range(blocks)))
        self.model_tail = nn.Sequential(*tail)

    def forward(self, x):
        H, W = x.shape[-2:]
        if H % self.multiple or W % self.multiple:
            x = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        x = self.model_head[:2](x)
        if len(x) == 1 and not x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)  # a CPU convolves it a sixth faster
        x = self.model_head[2:](x)                                                          # (B, 4w, H/4, W/4)
        return self.model_tail(self.model_body(x))[..., :H, :W].float()                     # (B, C, H, W)


class Discriminator(nn.Module):
    """4 x 4 PatchGAN whose verdicts are averaged to one number an image: (B, 1). Keys are Reg-GAN's."""

    def __init__(self, in_chans=1, width=64):
        super().__init__()
        w = width
        self.model = nn.Sequential(
            nn.Conv2d(in_chans, w, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True),
            *normed(nn.Conv2d(w, 2 * w, 4, stride=2, padding=1)), nn.LeakyReLU(0.2, True),
            *normed(nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1)), nn.LeakyReLU(0.2, True),
            *normed(nn.Conv2d(4 * w, 8 * w, 4, padding=1)), nn.LeakyReLU(0.2, True),
            nn.Conv2d(8 * w, 1, 4, padding=1))

    def forward(self, x):
        return self.model(x).float().mean((2, 3))


def percent(flow):
    """(B, 2, H, W) in pixels as % of the sides, H and W."""
    return 100 * flow / flow.new_tensor(flow.shape[2:]).view(2, 1, 1)


class Registration(nn.Module):
    """Residual network (fake, real) -> flow (B, 2, H, W) with warp(fake, flow) ~ real. Zero at the start. H, W >= 32.

    Up to 7 levels, from 2 x 2 pixels to half the resolution. Each moves fake along the flow so far and a further half of its own
    pixel in 8 directions: the 9 mean differences to real within each of its pixels say where to go, and it adds that."""

    def __init__(self, size, width=32):
        super().__init__()
        w, levels = width, min(7, min(size).bit_length() - 2)

        def block(i):
            return nn.Sequential(nn.Conv2d(i, w, 3, padding=1), nn.LeakyReLU(0.2, True), Residual(w), nn.LeakyReLU(0.2, True))

        self.blocks = nn.ModuleList(block(i) for i in [9] + [9 + w] * (levels - 1))
        self.heads = nn.ModuleList(nn.Conv2d(w, 2, 3, padding=1) for _ in range(levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.2)
                nn.init.zeros_(module.bias)
        for head in self.heads:
            nn.init.zeros_(head.weight)
        self.register_buffer("mean", torch.zeros(2, *size))

    def drift(self, flow, rate=0.01):
        """Mean square of the running mean of the flows, in % of the sides. Misalignment is zero in the mean, but no other loss says
        so: if every G(a) is shifted or zoomed alike, R undoes it, and G, which is used without R, stays off by that much."""
        mean = torch.lerp(self.mean, percent(flow).mean(0), rate)
        self.mean.copy_(mean.detach())
        return mean.square().mean()

    def synthetic_error(self, real):
        """Mean error, in % of the sides, on real and a copy of it that a random affine motion moved. Where likeness alone is the
        teacher, R soon finds the shifts and zooms of heads, which are round, but less than half of a rotation."""
        motion = random_motion(real, mirrored=False)
        return percent(self(real, warp(real, motion)) - motion).norm(dim=1).mean()

    def forward(self, fake, real):
        H, W = real.shape[-2:]
        x, flow = None, real.new_zeros(len(real), 2, H, W, dtype=torch.float32)
        for level, (block, head) in enumerate(zip(self.blocks, self.heads)):
            step = 2 ** (len(self.heads) - level - 1)  # half a pixel of this level
            moved = F.pad(warp(fake, flow), (step,) * 4, mode="replicate").float()
            moved = F.unfold(moved, 3, dilation=step).view(len(real), -1, 9, H, W)          # (B, C, 9, H, W)
            costs = F.avg_pool2d((moved - real.unsqueeze(2)).abs().mean(1), 2 * step)       # (B, 9, h, w)
            costs = 10 * (costs - costs.mean(1, keepdim=True))  # which way is better, not how good; of the order of 1
            if x is not None:
                costs = torch.cat((costs, F.interpolate(x, costs.shape[2:], mode="bilinear").float()), 1)
            x = block(costs)
            # a level moves by half of its own pixel at most: a flow that left the image would never return
            more = step * torch.tanh(head(x).float() / step)
            flow = flow + F.interpolate(more, (H, W), mode="bilinear", align_corners=True)  # keeps an affine flow affine
        return flow


# ---------------------------------------------------------------------------------------------------------------------
# Networks of NICE-GAN (Chen et al., "Reusing Discriminators for Encoding", CVPR 2020)


class LayerInstanceNorm(nn.Module):
    """rho * instance norm + (1 - rho) * layer norm, rho a learnt share a channel; then gamma, beta: learnt, or given."""

    def __init__(self, width, rho, adaptive):
        super().__init__()
        self.rho, self.instance = nn.Parameter(torch.full((1, width, 1, 1), rho)), InstanceNorm()
        if not adaptive:
            self.gamma, self.beta = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x, gamma=None, beta=None):
        rho = self.rho.clamp(0, 1)
        x = rho * self.instance(x) + (1 - rho) * F.group_norm(x, 1)  # one group: the layer norm of (C, H, W)
        return x * self.gamma + self.beta if gamma is None else x * gamma + beta


class NiceResidual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Sequential(Reflect(1), nn.Conv2d(width, width, 3, bias=False)) for _ in "12")
        self.norm1, self.norm2 = (LayerInstanceNorm(width, 0.9, True) for _ in "12")

    def forward(self, x, gamma, beta):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x), gamma, beta))), gamma, beta)


class NiceGenerator(nn.Module):
    """Decodes an encoding (B, 2 width, h, w), halved `downs` times, that a discriminator made: it has no encoder of its own."""

    def __init__(self, out_chans=1, width=64, blocks=6, downs=2, kernel=7):
        super().__init__()
        w = width << downs
        self.enter = nn.Sequential(Reflect(1), nn.Conv2d(2 * width, w, 3))
        self.norm = LayerInstanceNorm(w, 0.1, False)
        self.style = nn.Sequential(nn.Linear(w, w), nn.ReLU(True), nn.Linear(w, 2 * w))
        self.blocks = nn.ModuleList(NiceResidual(w) for _ in range(blocks))
        up = []
        for i in (w >> k for k in range(downs)):
            up += [Reflect(1), nn.Conv2d(i, 2 * i, 3), nn.PixelShuffle(2), LayerInstanceNorm(i // 2, 0.1, False), nn.ReLU(True)]
        self.up = nn.Sequential(*up, Reflect(kernel // 2), LastConv(width, out_chans, kernel), nn.Tanh())

    def forward(self, z, size):
        x = F.relu(self.norm(self.enter(z)))
        gamma, beta = self.style(x.mean((2, 3)))[..., None, None].chunk(2, 1)               # (B, w, 1, 1) each
        for block in self.blocks:
            x = block(x, 1 + gamma, beta)
        return self.up(x)[..., :size[0], :size[1]].float()


class NiceDiscriminator(nn.Module):
    """Encoder, class-activation attention, two classifiers 2 and 8 times coarser. The encoding, halved once or twice, feeds a
    generator too."""

    def __init__(self, in_chans=1, width=64, downs=2):
        super().__init__()
        self.multiple, w = 2**downs, width

        def conv(i, o, k=4, stride=2):
            return [spectral_norm(nn.Conv2d(i, o, k, stride, 1)), nn.LeakyReLU(0.2)]

        self.encoder = nn.Sequential(*conv(in_chans, w), *(conv(w, 2 * w) if downs == 2 else conv(w, 2 * w, 3, 1)))
        self.cam = spectral_norm(nn.Linear(4 * w, 1, bias=False))
        self.merge = nn.Conv2d(4 * w, 2 * w, 1)
        self.share = nn.Parameter(torch.zeros(()))
        self.shared = nn.Sequential(*conv(2 * w, 4 * w))
        self.local = nn.Sequential(*conv(4 * w, 8 * w, 3, 1), *conv(8 * w, 1, 3, 1)[:1])
        self.overall = nn.Sequential(*conv(4 * w, 8 * w), *conv(8 * w, 16 * w), *conv(16 * w, 1, 3, 1)[:1])

    def encode(self, x):
        """(encoding (B, 2w, h, w), class activation (B, 1)): channels that tell real from fake count more."""
        H, W = x.shape[-2:]
        x = self.encoder(F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate"))
        pooled = torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)                             # (B, 4w)
        weight = self.cam.weight                                                            # (1, 4w)
        attended = self.merge(torch.cat((x, x), 1) * weight[:, :, None, None])
        return F.leaky_relu(x + self.share * attended, 0.2), F.linear(pooled, weight)

    def forward(self, x):
        z, activation = self.encode(x)
        h = self.shared(z)
        return [self.local(h).float(), self.overall(h).float(), activation.float()], z


# ---------------------------------------------------------------------------------------------------------------------
# Losses and hosts


def lsgan(verdict, real):
    """Least-squares GAN: mean (verdict - target)^2, target 1 for real and 0 for fake; summed over several verdicts."""
    if isinstance(verdict, list):
        return sum(lsgan(v, real) for v in verdict)
    return (verdict - float(real)).square().mean()


def contrast(discriminator, real, fake):
    """D's loss lsgan(D(real), real) + lsgan(D(fake), fake), in one pass over both; no norm here mixes images."""
    verdicts = discriminator(torch.cat((real, fake)))
    halves = [v.chunk(2) for v in (verdicts if isinstance(verdicts, list) else [verdicts])]
    return sum(lsgan(of_real, True) + lsgan(of_fake, False) for of_real, of_fake in halves)


def smoothness(flow):
    """mean (flow[y + 1, x] - flow[y, x])^2 + mean (flow[y, x + 1] - flow[y, x])^2 over both components (paper, eq. 5)."""
    return flow.diff(dim=2).square().mean() + flow.diff(dim=3).square().mean()


class NC(nn.Module):
    """One direction, adversarial loss only ("noise correction" when registration joins it: RegGAN).

    A host is an nn.Module whose parts are named netG... and netD... (that prefix decides which optimiser trains them), with
    three methods: `translate(a)`; `generator_losses(a, b)` -> (fakes, losses), fakes["B"] the translation of a, the losses
    weighted and ready to sum; `discriminator_losses(a, b, fakes)` -> losses, fakes detached, those named in `pooled` mixed
    with old ones. Add a class to HOSTS and it has the training loop, registration, resuming, metrics and the comparison.
    """

    pooled = ("B",)

    def __init__(self, config, in_chans, out_chans):
        super().__init__()
        self.netG_A2B = Generator(in_chans, out_chans, config.width, config.blocks, config.downs, config.kernel)
        self.netD_B = Discriminator(out_chans, config.width)

    def translate(self, a):
        return self.netG_A2B(a)

    def generator_losses(self, a, b):
        fake = self.netG_A2B(a)
        return {"B": fake}, {"adversarial": lsgan(self.netD_B(fake), True)}

    def discriminator_losses(self, a, b, fakes):
        return {"d": contrast(self.netD_B, b, fakes["B"])}


class Pix2Pix(NC):
    """Isola et al. 2017: the discriminator sees (a, b), and an L1 loss of weight 100 takes the pairs at their word."""

    pooled = ()

    def __init__(self, config, in_chans, out_chans):
        super().__init__(config, in_chans, out_chans)
        self.netD_B = Discriminator(in_chans + out_chans, config.width)

    def generator_losses(self, a, b):
        fake = self.netG_A2B(a)
        return {"B": fake}, {"adversarial": lsgan(self.netD_B(torch.cat((a, fake), 1)), True),
                             "l1": 100 * F.l1_loss(fake, b)}

    def discriminator_losses(self, a, b, fakes):
        return {"d": contrast(self.netD_B, torch.cat((a, b), 1), torch.cat((a, fakes["B"]), 1))}


class Cycle(NC):
    """CycleGAN (Zhu et al. 2017): both directions, and there and back again must be the identity (L1, weight 10)."""

    pooled = ("A", "B")

    def __init__(self, config, in_chans, out_chans):
        super().__init__(config, in_chans, out_chans)
        self.netG_B2A = Generator(out_chans, in_chans, config.width, config.blocks, config.downs, config.kernel)
        self.netD_A = Discriminator(in_chans, config.width)

    def generator_losses(self, a, b):
        fake_b, fake_a = self.netG_A2B(a), self.netG_B2A(b)
        return {"A": fake_a, "B": fake_b}, {
            "adversarial": lsgan(self.netD_B(fake_b), True) + lsgan(self.netD_A(fake_a), True),
            "cycle": 10 * (F.l1_loss(self.netG_B2A(fake_b), a) + F.l1_loss(self.netG_A2B(fake_a), b))}

    def discriminator_losses(self, a, b, fakes):
        return {"d": contrast(self.netD_A, a, fakes["A"]) + contrast(self.netD_B, b, fakes["B"])}


class Nice(nn.Module):
    """NICE-GAN: the discriminators' encoders serve the generators, and only the discriminators' losses train them. Both
    directions, cycle and identity (L1, weight 10)."""

    pooled = ()

    def __init__(self, config, in_chans, out_chans):
        super().__init__()
        blocks = max(1, config.blocks * 2 // 3)  # 6 where the paper's generator has 9
        self.netG_A2B, self.netG_B2A = (NiceGenerator(c, config.width, blocks, config.downs, config.kernel)
                                        for c in (out_chans, in_chans))
        self.netD_A, self.netD_B = (NiceDiscriminator(c, config.width, config.downs) for c in (in_chans, out_chans))

    def translate(self, a):
        return self.netG_A2B(self.netD_A.encode(a)[0], a.shape[-2:])

    def generator_losses(self, a, b):
        size = a.shape[-2:]
        with cached():  # one spectral norm for both images that a discriminator sees
            with torch.no_grad():
                z = torch.cat((self.netD_A.encode(a)[0], self.netD_B.encode(b)[0]))
            (same_a, fake_a), (fake_b, same_b) = (netG(z, size).chunk(2) for netG in (self.netG_B2A, self.netG_A2B))
            (verdict_b, z_b), (verdict_a, z_a) = self.netD_B(fake_b), self.netD_A(fake_a)
        return {"A": fake_a, "B": fake_b}, {
            "adversarial": lsgan(verdict_b, True) + lsgan(verdict_a, True),
            "cycle": 10 * (F.l1_loss(self.netG_B2A(z_b, size), a) + F.l1_loss(self.netG_A2B(z_a, size), b)),
            "identity": 10 * (F.l1_loss(same_a, a) + F.l1_loss(same_b, b))}

    def discriminator_losses(self, a, b, fakes):
        with cached():
            return {"d": contrast(lambda x: self.netD_A(x)[0], a, fakes["A"]) + contrast(lambda x: self.netD_B(x)[0], b, fakes["B"])}


HOSTS = {"nc": NC, "pix2pix": Pix2Pix, "cycle": Cycle, "nice": Nice}


class Pool:
    """The last `size` fakes: half of the time an old one goes to the discriminator instead (Shrivastava et al. 2017)."""

    def __init__(self, size=50):
        self.size, self.images = size, []

    def __call__(self, fakes):
        out = []
        for fake in fakes:
            swap = len(self.images) == self.size and torch.rand(()) < 0.5
            k = int(torch.randint(self.size, ())) if swap else len(self.images)
            out.append(self.images[k] if swap else fake)
            self.images[k:k + 1] = [fake] if swap or k < self.size else []
        return torch.stack(out)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def metrics(fake, real):
    """MAE, PSNR and SSIM of fake and real (B, C, H, W) in [-1, 1]: a dict of (B,) tensors, one number an image.

    On [0, 1], that is halved: mae = mean |f - r| / 2 and psnr = -10 log10 mean ((f - r) / 2)^2, at most 100, over the
    foreground real != -1 as the paper defines them; ssim over the whole image (7 x 7 uniform window, sample covariance,
    K 0.01 and 0.03, mean where the window fits, as in scikit-image). mae_whole and psnr_whole take every pixel,
    ssim_foreground the foreground's windows. Foreground metrics of an empty foreground are NaN.
    """
    f, r = (fake.double() + 1) / 2, (real.double() + 1) / 2
    inside = (real != -1).double()

    def mean(x, mask):
        return (x * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))

    def pool(x):
        return F.avg_pool2d(x, 7, stride=1)

    n, whole = 49 / 48, torch.ones_like(inside)
    mf, mr = pool(f), pool(r)
    vf, vr, vfr = (n * (pool(x * y) - mx * my) for x, y, mx, my in ((f, f, mf, mf), (r, r, mr, mr), (f, r, mf, mr)))
    ssim = (2 * mf * mr + 1e-4) * (2 * vfr + 9e-4) / ((mf**2 + mr**2 + 1e-4) * (vf + vr + 9e-4))
    out = {"ssim": ssim.mean((1, 2, 3)), "ssim_foreground": mean(ssim, inside[..., 3:-3, 3:-3])}
    for name, mask in (("", inside), ("_whole", whole)):
        out["mae" + name] = mean((f - r).abs(), mask)
        out["psnr" + name] = -10 * mean((f - r).square(), mask).clamp(min=1e-10).log10()
    return out


def registration_metrics(flow, true_flow, real):
    """Of a flow (B, 2, H, W) in pixels, (B,) each: registration_error, the mean length of flow - true_flow over the
    foreground of real; misalignment, the same of a zero flow; folding, the share of pixels whose map p + flow(p) has a
    Jacobian determinant <= 0 (forward differences)."""
    inside = (real != -1).any(1)

    def mean(x):
        return (x.norm(dim=1) * inside).sum((1, 2)) / inside.sum((1, 2))

    dy, dx = flow.diff(dim=2)[..., :-1], flow.diff(dim=3)[..., :-1, :]                      # (B, 2, H-1, W-1)
    determinant = (1 + dy[:, 0]) * (1 + dx[:, 1]) - dy[:, 1] * dx[:, 0]
    return {"registration_error": mean(flow - true_flow), "misalignment": mean(true_flow),
            "folding": (determinant <= 0).double().mean((1, 2))}


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    root: str = option("", "folder with train/A, train/B, val/A, val/B and perhaps test/A, test/B (default: the demo pairs)")
    host: str = option("nc", "the translation method", choices=list(HOSTS))
    reg: bool = option(True, "registration, which makes any host RegGAN; --no-reg leaves the host alone")
    noise: float = option(3.0, "misalignment level n of the training pairs: rotation n degrees, shift and zoom 2n %")
    elastic: float = option(0.0, "bending misalignment on top: standard deviation in % of the image side")
    size: int = option(0, "scale every image to this many pixels a side (0: as they are)")
    rescale: str = option("", "LO,HI (or LO,HI,LO,HI for A and B): these values become -1 and 1")
    paper: bool = option(False, "the paper's networks, schedule and weights instead of small ones: the numbers that each option names")
    width: int = option(8, "channels of the first layer; 64 in the paper")
    kernel: int = option(3, "side of the generator's first and last kernels; 7 in the paper")
    downs: int = option(1, "times the generator halves the image; 2 in the paper")
    blocks: int = option(3, "residual blocks of the generator; 9 in the paper")
    batch: int = option(8, "pairs a step; 1 in the paper")
    lr: float = option(4e-3, "learning rate of Adam, constant, then linear to 0 over the second half; 1e-4 in the paper")
    reg_lr: float = option(8e-3, "the same of the registration network; 1e-4 in the paper")
    epochs: int = option(100, "passes over the training pairs; 80 in the paper")
    correction: float = option(100.0, "weight of |warp(G(a), R(G(a), b)) - b|; 20 in the paper")
    smooth: float = option(10.0, "weight of the flow's squared gradient")
    drift: float = option(100.0, "weight of the squared running mean of the flows, in % of the sides; 0 in the paper")
    synthetic: float = option(3.0, "weight of R's error, in % of the sides, on b and a randomly moved copy; 0 in the paper")
    equivariance: float = option(30.0, "weight of |G(moved a) - moved G(a)| under random motion, with registration; 0 in the paper")
    compare: bool = option(False, "train every host at every level with every seed and write the table; goes on where it stopped")
    hosts: str = option("pix2pix,nc,nc+r,cycle,cycle+r,nice,nice+r", "rows of the table, +r with registration")
    levels: str = option("0,3,5,elastic", "columns of the table: misalignment levels, or elastic (level 0 and 3 % bending)")
    seeds: int = option(3, "runs a cell")
    translate: str = option("", "translate the images of this folder with --weights into --out")
    weights: str = option("", "a run's folder or checkpoint, or a Reg-GAN netG_A2B.pth")


PAPER = {"width": 64, "kernel": 7, "downs": 2, "blocks": 9, "epochs": 80, "batch": 1, "lr": 1e-4, "reg_lr": 1e-4,
         "correction": 20.0, "drift": 0.0, "synthetic": 0.0, "equivariance": 0.0}


def trainable(module, *prefixes):
    return [p for name, p in module.named_parameters() if p.requires_grad and name.startswith(prefixes)]


def descend(losses, optimizer, world):
    """One step down the sum of the losses; under torchrun along the mean gradient of all processes."""
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    if world > 1:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
        for g, mean in zip(grads, (flat / world).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))
    optimizer.step()


def random_motion(images, spread=0.1, mirrored=True):
    """A random affine flow for each image: (B, 2, H, W) in pixels. Every entry of its matrix strays by `spread`, its shift by half
    of `spread` of the sides (standard deviations); `mirrored` in y and in x half of the time each."""
    (B, _, H, W), at = images.shape, {"device": images.device}
    y, x = torch.meshgrid(torch.arange(H, **at) - (H - 1) / 2, torch.arange(W, **at) - (W - 1) / 2, indexing="ij")
    mirror = torch.randint(2, (B, 2, 1), **at) * 2 - 1 if mirrored else torch.ones(B, 2, 1, **at)
    matrix = mirror * (torch.eye(2, **at) + spread * torch.randn(B, 2, 2, **at)) - torch.eye(2, **at)
    shift = spread / 2 * torch.randn(B, 2, 1, 1, **at) * torch.tensor((H, W), **at).view(2, 1, 1)
    return torch.einsum("bij,jhw->bihw", matrix, torch.stack((y, x))) + shift


def build(config, in_chans, out_chans, size):
    """The networks of a run: an nn.Module with the host's netG..., netD... and, with --reg, `registration`."""
    model = HOSTS[config.host](config, in_chans, out_chans)
    if config.reg:
        model.registration = Registration(size, max(16, config.width // 2))
    return model


def training_step(model, config, a, b, opt_g, opt_d, pools, autocast=contextlib.nullcontext, world=1):
    """One step of any host with or without registration: first G (and R), then D on the same fakes. Returns the losses."""
    d_parameters = opt_d.param_groups[0]["params"]
    for p in d_parameters:
        p.requires_grad_(False)  # G's step needs D's gradient to its input only
    with autocast():
        fakes, losses = model.generator_losses(a, b)
        if config.reg:
            flow = model.registration(fakes["B"], b)
            losses["correction"] = config.correction * F.l1_loss(warp(fakes["B"], flow), b)
            losses["smooth"] = config.smooth * smoothness(flow)
            if config.drift:
                losses["drift"] = config.drift * model.registration.drift(flow)
            if config.synthetic:
                losses["synthetic"] = config.synthetic * model.registration.synthetic_error(b[::2])  # half of them teach as much
            if config.equivariance:
                motion = random_motion(a)
                difference = F.l1_loss(model.translate(warp(a, motion)), warp(fakes["B"], motion))
                losses["equivariance"] = config.equivariance * difference
    descend(losses, opt_g, world)
    for p in d_parameters:
        p.requires_grad_(True)
    fakes = {side: pools[side](fake.detach()) if side in pools else fake.detach() for side, fake in fakes.items()}
    with autocast():
        d_losses = model.discriminator_losses(a, b, fakes)
    descend(d_losses, opt_d, world)
    return {name: loss.detach() for name, loss in (losses | d_losses).items()}


def make_pairs(config, part, misaligned=False, with_flow=True):
    """The pairs of a part; `misaligned` as in training, the same for every host."""
    noise = {"noise": config.noise, "elastic": config.elastic, "seed": config.seed, "with_flow": with_flow} if misaligned else {}
    return Pairs(Path(config.root or data.demo_root(pairs=True)) / part, size=config.size, rescale=config.rescale, **noise)


@torch.no_grad()
def evaluate(model, config, aligned, misaligned, device, autocast, rank=0, world=1):
    """Metrics of G on aligned pairs and of R on misaligned ones, averaged over images: a dict of floats."""
    model.eval()
    rows = []
    for pairs in [aligned] + [misaligned] * config.reg:
        for a, b, *true_flow in pairs.batches(config.batch, rank=rank, world=world):
            a, b = a.to(device), b.to(device)
            with autocast():
                fake = model.translate(a)
                flow = model.registration(fake, b) if true_flow else None
            scores = registration_metrics(flow, true_flow[0].to(device), b) if true_flow else metrics(fake, b)
            rows += [(name, float(v)) for name, values in scores.items() for v in values]
    model.train()
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, rows)
        rows = sum(parts, [])
    return {name: statistics.fmean(v for other, v in rows if other == name) for name, _ in rows}


def train(config):
    """Trains one host on one misalignment level and tests it. Returns what result.json holds."""
    if config.paper:
        default = {field.name: field.default for field in dataclasses.fields(Config)}
        config = dataclasses.replace(config, **{k: v for k, v in PAPER.items() if getattr(config, k) == default[k]})
    for name in ("epochs", "batch", "width", "lr", "reg_lr"):
        if getattr(config, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected a positive number")
    for name in ("correction", "smooth", "drift", "synthetic", "equivariance"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name} {getattr(config, name)}: expected 0 or more")
    if config.host == "nice" and config.downs not in (1, 2):
        raise InputError(f"--downs {config.downs}: nice takes 1 or 2")
    if config.noise < 0 or config.elastic < 0 or config.noise > 25:
        raise InputError(f"--noise {config.noise} --elastic {config.elastic}: expected 0 to 25 and 0 or more")
    device, autocast, rank, world = start_run(config)
    out = Path(config.out or "runs/reggan")
    if rank == 0:
        data.check_writable(out)
    pairs = make_pairs(config, "train", misaligned=True, with_flow=False)
    part = "test" if (pairs.folder.parent / "test").is_dir() else "val"
    val, test = ([make_pairs(config, p), make_pairs(config, p, misaligned=True)] for p in ("val", part))
    for other in val + test:
        if (other.in_chans, other.out_chans) != (pairs.in_chans, pairs.out_chans):
            raise InputError(f"{other.folder}: {other.in_chans} and {other.out_chans} channels, "
                             f"{pairs.folder} has {pairs.in_chans} and {pairs.out_chans}")
    model = build(config, pairs.in_chans, pairs.out_chans, pairs.shape).to(device)
    peaks = {"netG": config.lr, "registration": config.reg_lr, "netD": config.lr}

    def adam(*parts):
        groups = [{"params": trainable(model, part), "peak": peaks[part]} for part in parts]
        return torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)

    opt_g, opt_d = adam("netG", *["registration"] * config.reg), adam("netD")
    pools = {side: Pool() for side in model.pooled}
    step, best, seconds = 0, float("inf"), 0.0
    meta = {"in_chans": pairs.in_chans, "out_chans": pairs.out_chans, "shape": list(pairs.shape)}
    if config.resume:
        state = load_checkpoint(out / "last.pt")
        check_same(state["config"], config, out / "last.pt")
        model.load_state_dict(state["model"])
        opt_g.load_state_dict(state["opt_g"])
        opt_d.load_state_dict(state["opt_d"])
        for side, pool in pools.items():
            pool.images = [image.to(device) for image in state["pools"][side]]
        step, best, seconds = state["step"], state["best"], state["seconds"]
        data.set_random_state(state["random"])
    log = RunLog(out, config, rank, config.resume)
    per_epoch = -(-(-(-len(pairs) // world)) // config.batch)
    steps, every = config.epochs * per_epoch, max(1, config.epochs // 10) * per_epoch
    batches = iter(pairs.batches(config.batch, config.epochs, True, config.seed, step, rank, world, config.workers))
    began, waited, images = time.time(), 0.0, 0
    while step < steps:
        clock = time.time()
        a, b = next(batches)
        waited += time.time() - clock
        for group in opt_g.param_groups + opt_d.param_groups:
            group["lr"] = group["peak"] * min(1.0, 2 * (1 - step / steps))
        losses = training_step(model, config, a.to(device), b.to(device), opt_g, opt_d, pools, autocast, world)
        step, images = step + 1, images + len(a) * world
        if step % max(1, per_epoch // 3) == 0 or step == steps:
            values = {name: float(loss) for name, loss in losses.items()}
            if not all(map(math.isfinite, values.values())):
                raise InputError(f"{out}: the losses left the numbers at step {step} ({values}): lower --lr")
            log.line(step=step, epoch=step / per_epoch, lr=opt_g.param_groups[0]["lr"], **values)
        if step % every == 0 or step == steps:
            scores = evaluate(model, config, *val, device, autocast, rank, world)
            log.line(step=step, epoch=step / per_epoch, val=scores)
            if rank == 0:
                print(f"epoch {step / per_epoch:g} of {config.epochs}: val mae {scores['mae']:.4f} psnr {scores['psnr']:.2f} "
                      f"ssim {scores['ssim']:.4f}" + (f" registration error {scores['registration_error']:.2f} px of "
                      f"{scores['misalignment']:.2f}" if config.reg else ""), flush=True)
                saved = {"model": model.state_dict(), "config": dataclasses.asdict(config), **meta}
                if scores["mae"] < best:
                    save_checkpoint(out / "best.pt", saved)
                best = min(best, scores["mae"])
                save_checkpoint(out / "last.pt", saved | {
                    "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict(), "step": step, "best": best,
                    "pools": {side: pool.images for side, pool in pools.items()}, "random": data.random_state(),
                    "seconds": seconds + time.time() - began})
    if world > 1:
        torch.distributed.barrier()  # best.pt is being written
    if part == "test":
        model.load_state_dict(load_checkpoint(out / "best.pt")["model"])
    clock = time.time() - began
    result = evaluate(model, config, *test, device, autocast, rank, world)
    result |= {"host": config.host, "registration": config.reg, "noise": config.noise, "elastic": config.elastic, "part": part,
               "weights": "best.pt (chosen on val)" if part == "test" else "last.pt (nothing chosen)", "images": len(test[0]),
               "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "seconds": seconds + clock,
               "images_per_second": images / max(clock, 1e-9), "waiting_for_data": waited / max(clock, 1e-9),
               "peak_memory_mib": data.peak_memory_mib(device)}
    log.json("result.json", result)
    if rank == 0:
        draw_run(out, model, config, *test, device)
    return result


def check_same(saved, config, path):
    """Raises InputError where a run cannot go on because an option that shapes it has changed."""
    for name, now in dataclasses.asdict(config).items():
        if name not in ("out", "resume", "device", "workers", "kernels") and saved.get(name) != now:
            raise InputError(f"{path}: that run has --{name} {saved.get(name)}, not {now}: --resume goes on with the same options")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, translating, comparing


@torch.no_grad()
def draw_run(out, model, config, aligned, misaligned, device, rows=4):
    """OUT/translation.png: pairs of the test part, their translations and what registration made of a misaligned one;
    OUT/curves.png: losses and validation."""
    model.eval()
    pictures = []
    for i in range(0, len(aligned), max(1, len(aligned) // rows))[:rows]:
        a, b = (x.to(device)[None] for x in aligned.item(0, i))
        fake = model.translate(a)
        row = [a, b, fake, (fake - b).abs() - 1]
        if config.reg:
            a, b, _ = (x.to(device)[None] for x in misaligned.item(0, i))
            fake = model.translate(a)
            flow = model.registration(fake, b)
            moved = warp(fake, flow)
            lines = torch.full_like(b[:, :1], -0.8)
            lines[:, :, ::6], lines[:, :, :, ::6] = 1.0, 1.0
            row += [a, b, moved, (moved - b).abs() - 1, warp(lines, flow)]
        pictures.append([(x[0].cpu() + 1) / 2 for x in row])
    titles = ["A", "B", "G(A)", "|G(A) - B|"] + ["A moved", "B moved", "G(A) warped", "|warped - B|", "flow"] * config.reg
    data.save_grid(out / "translation.png", pictures, titles=titles[:len(pictures[0])], scale=max(1, 128 // aligned.shape[1]))
    curves = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        for name, value in (line if "val" not in line else {"val mae x 100": 100 * line["val"]["mae"]}).items():
            if name not in ("step", "epoch", "lr", "seconds"):
                xs, ys = curves.setdefault(name, ([], []))
                xs.append(line["epoch"])
                ys.append(value)
    data.save_plot(out / "curves.png", curves, f"{config.host}{' + R' * config.reg}", "epoch", "loss")


def load_generator(path):
    """(translate, config, in_chans) of a run's folder or checkpoint, or of a bare Reg-GAN generator (netG_A2B.pth)."""
    path = Path(path)
    state = load_checkpoint(path / "best.pt" if path.is_dir() else path)
    if "model_head.1.weight" in state:
        width, in_chans = state["model_head.1.weight"].shape[:2]
        blocks = len({key.split(".")[1] for key in state if key.startswith("model_body.")})
        config = Config(width=width, blocks=blocks, kernel=7)
        model = Generator(in_chans, state["model_tail.7.weight"].shape[0], width, blocks)
        translate = model
    elif "model" in state and "config" in state:
        unknown = set(state["config"]) - {field.name for field in dataclasses.fields(Config)}
        if unknown:
            raise InputError(f"{path}: trained with options that this reggan.py has not ({', '.join(sorted(unknown))}): train again")
        config, in_chans = Config(**state["config"]), state["in_chans"]
        model = build(config, in_chans, state["out_chans"], state["shape"])
        translate, state = model.translate, state["model"]
    else:
        raise InputError(f"{path}: neither a checkpoint of reggan.py nor a Reg-GAN generator (keys model_head.*)")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit: {' '.join(str(error).split())[:200]}") from None
    return model, translate, config, in_chans


@torch.no_grad()
def translate_folder(config):
    """Writes the translation of every image of --translate under the same name, format and bit depth into --out."""
    if not config.weights:
        raise InputError("--translate needs --weights RUN: a run's folder, its best.pt, or a Reg-GAN netG_A2B.pth")
    model, translate, trained, in_chans = load_generator(config.weights)
    device, autocast, rank, world = start_run(config)
    model.to(device).eval()
    spans = data.parse_rescale(config.rescale or trained.rescale)
    folder, out = Path(config.translate), Path(config.out or "runs/translate")
    images = {name: data.read_slice(folder / name, spans[0]) for name in data.list_slices(folder)}
    for name, image in images.items():
        if len(image) != in_chans:
            raise InputError(f"{folder / name}: {len(image)} channels, the generator takes {in_chans}")
    for name, image in images.items():
        H, W = image.shape[1:]
        scale = (trained.size or max(H, W)) / max(H, W)  # the size that the generator was trained on
        a = F.interpolate(image[None].to(device), (round(H * scale), round(W * scale)), mode="bilinear", antialias=scale < 1)
        with autocast():
            fake = translate(a)
        data.write_slice(out / name, F.interpolate(fake, (H, W), mode="bilinear")[0], folder / name, spans[1])
    print(f"{len(images)} images translated into {out}")


def compare(config):
    """The paper's table: every row of --hosts at every level of --levels with every seed, each cell a run of its own in
    OUT/cells that is kept, so the command goes on where it was stopped. Writes OUT/table.csv and OUT/table.md."""
    out, table = Path(config.out or "runs/reggan-compare"), []
    hosts, levels = config.hosts.split(","), config.levels.split(",")
    for row in hosts:
        if row.removesuffix("+r") not in HOSTS:
            raise InputError(f"--hosts {row}: expected {', '.join(HOSTS)}, with +r for registration")
    try:
        noises = {level: (0.0, config.elastic or 3.0) if level == "elastic" else (float(level), config.elastic) for level in levels}
    except ValueError:
        raise InputError(f"--levels {config.levels}: expected numbers or elastic") from None
    for seed in range(config.seed, config.seed + config.seeds):
        for level in levels:
            for row in hosts:
                cell = out / "cells" / f"{row}_{level}_{seed}"
                run = dataclasses.replace(
                    config, compare=False, out=str(cell), host=row.removesuffix("+r"), reg=row.endswith("+r"), seed=seed,
                    noise=noises[level][0], elastic=noises[level][1], hosts="", levels="", seeds=0, resume=(cell / "last.pt").exists())
                if (cell / "result.json").exists():
                    check_same(data.read_json(cell / "config.json"), run, cell / "config.json")
                    result = data.read_json(cell / "result.json")
                else:
                    print(f"{row}, level {level}, seed {seed}", flush=True)
                    result = train(run)
                table.append({"row": row, "level": level, "seed": seed} | result)
                write_tables(out, table, hosts, levels)
    print((out / "table.md").read_text())
    return table


def write_tables(out, table, hosts, levels):
    """table.csv: a line a run; table.md: mean and standard deviation over the seeds."""
    names = {"psnr": "PSNR over the foreground, dB", "mae": "MAE over the foreground", "ssim": "SSIM",
             "registration_error": "registration error, pixels", "folding": "share of pixels where the flow folds"}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(k for r in table for k in r)), restval="")
    writer.writeheader()
    writer.writerows(table)

    def cell(row, level, name):
        values = [r[name] for r in table if (r["row"], r["level"]) == (row, level) and name in r]
        if not values:
            return ""
        digits = 2 if name in ("psnr", "registration_error") else 4
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    lines = []
    for name, title in names.items():
        lines += [title, "", "| method | " + " | ".join(f"level {level}" for level in levels) + " |", "|---" * (len(levels) + 1) + "|"]
        lines += [f"| {row} | " + " | ".join(cell(row, level, name) for level in levels) + " |"
                  for row in hosts if any(cell(row, level, name) for level in levels)] + [""]
    data.atomic_write(out / "table.csv", lambda file: file.write(text.getvalue().encode()))
    data.atomic_write(out / "table.md", lambda file: file.write("\n".join(lines).encode()))


def main():
    config = parse_config(Config, description=__doc__)
    if config.translate:
        translate_folder(config)
    elif config.compare:
        compare(config)
    else:
        result = train(config)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result, indent=1))


if __name__ == "__main__":
    data.run_script(main)
