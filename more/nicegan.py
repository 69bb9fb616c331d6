"""NICE-GAN as a host of RegGAN: the discriminators' encoders serve the generators.

    python -m more.nicegan             # and all other options of reggan.py, such as --compare

Chen et al., "Reusing Discriminators for Encoding", CVPR 2020: G needs an encoder and D has one, so
G decodes what D's encoder makes of an image. tests/departures.md says what is simpler here.

A host of your own is a file like this one. R, training, metrics and comparison come with it.
 1. A class has the networks and the three methods that `reggan.NC` describes; a subclass of NC,
    Pix2Pix or Cycle has most of them already. Its name is added: reggan.HOSTS["name"] = Class.
 2. A Config is derived from reggan.Config: `script` names the file, `host` is the new default.
 3. `reggan.main(Config, __doc__)` runs it.

Shapes: B batch, C channels, H x W pixels; an encoding has h x w pixels and 2n channels, where n is
the `width` of the first layer.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached

import reggan
from kernels.cpu import InstanceNorm, LastConv, Reflect
from reggan import lsgan
from support.script import InputError, option, run_script


class LayerInstanceNorm(nn.Module):
    """(rho instance norm + (1 - rho) layer norm) gamma + beta, with a learnt rho for each channel.
    gamma and beta are learnt too or, where the norm is `adaptive`, arguments."""

    def __init__(self, width, rho, adaptive=False):
        super().__init__()
        shape = 1, width, 1, 1
        self.rho, self.instance = nn.Parameter(torch.full(shape, rho)), InstanceNorm()
        if not adaptive:
            self.gamma = nn.Parameter(torch.ones(shape))
            self.beta = nn.Parameter(torch.zeros(shape))

    def forward(self, x, gamma=None, beta=None):
        if gamma is None:
            gamma, beta = self.gamma, self.beta
        rho = self.rho.clamp(0, 1)
        layer = F.group_norm(x, 1)  # with one group, group norm is the layer norm of (C, H, W)
        return (rho * self.instance(x) + (1 - rho) * layer) * gamma + beta


class NiceResidual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), where gamma and beta of both norms are arguments."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Sequential(Reflect(1), nn.Conv2d(width, width, 3, bias=False))
        self.conv2 = nn.Sequential(Reflect(1), nn.Conv2d(width, width, 3, bias=False))
        self.norm1 = LayerInstanceNorm(width, 0.9, adaptive=True)
        self.norm2 = LayerInstanceNorm(width, 0.9, adaptive=True)

    def forward(self, x, gamma, beta):
        y = F.relu(self.norm1(self.conv1(x), gamma, beta))
        return x + self.norm2(self.conv2(y), gamma, beta)


class NiceGenerator(nn.Module):
    """Decodes an encoding (B, 2n, h, w), halved `downs` times, that a discriminator made."""

    def __init__(self, out_chans=1, width=64, blocks=6, downs=2, kernel=7):
        super().__init__()
        wide = width * 2**downs
        self.enter = nn.Sequential(Reflect(1), nn.Conv2d(2 * width, wide, 3))
        self.norm = LayerInstanceNorm(wide, 0.1)
        self.style = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(True), nn.Linear(wide, 2 * wide))
        self.blocks = nn.ModuleList(NiceResidual(wide) for _ in range(blocks))
        up = []
        for i in [width * 2**level for level in range(downs, 0, -1)]:
            up += [Reflect(1), nn.Conv2d(i, 2 * i, 3), nn.PixelShuffle(2)]
            up += [LayerInstanceNorm(i // 2, 0.1), nn.ReLU(True)]
        up += [Reflect(kernel // 2), LastConv(width, out_chans, kernel), nn.Tanh()]
        self.up = nn.Sequential(*up)

    def forward(self, z, size):
        x = F.relu(self.norm(self.enter(z)))  # (B, wide, h, w)
        gamma, beta = self.style(x.mean((2, 3)))[..., None, None].chunk(2, 1)  # (B, wide, 1, 1)
        for block in self.blocks:
            x = block(x, 1 + gamma, beta)
        return self.up(x)[..., : size[0], : size[1]].float()  # (B, C, H, W)


class NiceDiscriminator(nn.Module):
    """An encoder that also serves a generator, class-activation attention, and two classifiers,
    whose verdicts are 2 and 8 times coarser than the encoding."""

    def __init__(self, in_chans=1, width=64, downs=2):
        super().__init__()
        self.multiple, n = 2**downs, width

        def conv(i, o, kernel=4, stride=2):
            return spectral_norm(nn.Conv2d(i, o, kernel, stride, 1))

        leaky = nn.LeakyReLU(0.2)
        second = (4, 2) if downs == 2 else (3, 1)
        self.encoder = nn.Sequential(conv(in_chans, n), leaky, conv(n, 2 * n, *second), leaky)
        self.cam = spectral_norm(nn.Linear(4 * n, 1, bias=False))
        self.merge = nn.Conv2d(4 * n, 2 * n, 1)
        self.share = nn.Parameter(torch.zeros(()))
        self.shared = nn.Sequential(conv(2 * n, 4 * n), leaky)
        self.local = nn.Sequential(conv(4 * n, 8 * n, 3, 1), leaky, conv(8 * n, 1, 3, 1))
        self.overall = nn.Sequential(conv(4 * n, 8 * n), leaky, conv(8 * n, 16 * n), leaky,
                                     conv(16 * n, 1, 3, 1))

    def encode(self, x):
        """(encoding (B, 2n, h, w), its channels weighed by attention, activation (B, 1))."""
        H, W = x.shape[-2:]
        x = self.encoder(F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate"))
        pooled = torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)  # (B, 4n)
        weight = self.cam.weight  # (1, 4n)
        attended = self.merge(torch.cat((x, x), 1) * weight[:, :, None, None])  # (B, 2n, h, w)
        return F.leaky_relu(x + self.share * attended, 0.2), F.linear(pooled, weight)

    def forward(self, x):
        """([verdict of each classifier and of the attention], encoding)."""
        z, activation = self.encode(x)
        h = self.shared(z)
        return [self.local(h).float(), self.overall(h).float(), activation.float()], z


class Nice(nn.Module):
    """Both directions as in CycleGAN, but the discriminators' encoders serve the generators. Only
    the discriminators' losses train the encoders. adversarial + 10 cycle + 10 identity"""

    pooled = False

    def __init__(self, config, in_chans, out_chans):
        super().__init__()
        blocks = max(1, config.blocks * 2 // 3)  # 6 where the paper's generator has 9
        sizes = config.width, blocks, config.downs, config.kernel
        self.netG_A2B = NiceGenerator(out_chans, *sizes)
        self.netG_B2A = NiceGenerator(in_chans, *sizes)
        self.netD_A = NiceDiscriminator(in_chans, config.width, config.downs)
        self.netD_B = NiceDiscriminator(out_chans, config.width, config.downs)

    def translate(self, a):
        return self.netG_A2B(self.netD_A.encode(a)[0], a.shape[-2:])

    def generator_losses(self, a, b):
        size = a.shape[-2:]
        with cached():  # one spectral norm for both images that a discriminator sees
            z = torch.cat((self.netD_A.encode(a)[0], self.netD_B.encode(b)[0]))  # (2B, 2n, h, w)
            same_a, fake_a = self.netG_B2A(z, size).chunk(2)  # (B, C, H, W) each
            fake_b, same_b = self.netG_A2B(z, size).chunk(2)
            (verdicts_b, z_b), (verdicts_a, z_a) = self.netD_B(fake_b), self.netD_A(fake_a)
        back_a, back_b = self.netG_B2A(z_b, size), self.netG_A2B(z_a, size)
        of_b, of_a = (sum(lsgan(v, True) for v in each) for each in (verdicts_b, verdicts_a))
        cycle = F.l1_loss(back_a, a) + F.l1_loss(back_b, b)
        identity = F.l1_loss(same_a, a) + F.l1_loss(same_b, b)
        losses = {"adversarial": of_b + of_a, "cycle": 10 * cycle, "identity": 10 * identity}
        return {"A": fake_a, "B": fake_b}, losses

    def discriminator_losses(self, a, b, fakes):
        total = 0
        for D, real, fake in ((self.netD_A, a, fakes["A"]), (self.netD_B, b, fakes["B"])):
            with cached():
                verdicts, _ = D(torch.cat((real, fake)))
            halves = [verdict.chunk(2) for verdict in verdicts]
            total = total + sum(lsgan(r, True) + lsgan(f, False) for r, f in halves)
        return {"d": total}


reggan.HOSTS["nice"] = Nice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(reggan.Config):
    script = "more.nicegan"
    host: str = option("nice", "the translation method", choices=reggan.HOSTS)
    hosts: str = option("pix2pix,nc,nc+r,cycle,cycle+r,nice,nice+r",
                        "rows of the comparison, +r: with R", free=True)

    def __post_init__(self):
        if self.host == "nice" and self.downs not in (None, 1, 2):
            raise InputError("--downs", "1 or 2 with nice", self.downs)


if __name__ == "__main__":
    run_script(lambda: reggan.main(Config, __doc__))
