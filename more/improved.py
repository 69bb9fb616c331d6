"""RegGAN beyond the paper: three losses and another R, worth 3.1 dB at level 5.

    python -m more.improved             # and all other options of reggan.py, such as --compare

The paper's losses leave G free to move an image as long as R moves it back, and G is used without
R. Three more losses take that freedom away, and another R finds larger motion in fewer steps.

A loss of your own is a file like this one. It derives a Config from reggan.Config, with an option
for the weight and a method `added_losses`, which returns weighted losses by name; where a run has
R, G and R minimise them too. `registration` makes R, `changes` are new defaults of the options.

Shapes: B batch, C channels, H x W pixels; flow (B, 2, H, W) in pixels, dy then dx.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

import reggan
from data import pixel_grid
from kernels import warp
from more import nicegan  # another host
from reggan import Residual, halvings, leaky_conv, start_at_zero
from support.script import mean_over_processes, option, run_script


class CoarseToFine(nn.Module):
    """R from coarse to fine: (fake, real) -> flow (B, 2, H, W), zero at the start.
    It has up to 7 levels, from 2 x 2 pixels to half the resolution. A level warps fake with the
    flow so far and shifts it by half of its own pixel in 8 directions. The 9 mean differences to
    real within each of its pixels tell which way is better, and it adds a flow that goes there."""

    def __init__(self, size, width=32):
        super().__init__()
        w, self.blocks, self.heads = width, nn.ModuleList(), nn.ModuleList()
        for level in range(halvings(size)):
            first = leaky_conv(9 + w if level else 9, w)
            self.blocks.append(nn.Sequential(*first, Residual(w), nn.LeakyReLU(0.2, True)))
            self.heads.append(nn.Conv2d(w, 2, 3, padding=1))
        start_at_zero(self, *self.heads)

    def forward(self, fake, real):
        B, _, H, W = real.shape
        x, flow = None, real.new_zeros(B, 2, H, W, dtype=torch.float32)
        for level, (block, head) in enumerate(zip(self.blocks, self.heads)):
            step = 2 ** (len(self.heads) - level - 1)  # half a pixel of this level
            moved = F.pad(warp(fake, flow), (step,) * 4, mode="replicate").float()
            moved = F.unfold(moved, 3, dilation=step).view(B, -1, 9, H, W)  # (B, C, 9, H, W)
            costs = (moved - real.unsqueeze(2)).abs().mean(1)  # (B, 9, H, W)
            costs = F.avg_pool2d(costs, 2 * step)  # (B, 9, h, w)
            # Only which of the 9 is better matters. The factor 10 makes them of the order of 1.
            costs = 10 * (costs - costs.mean(1, keepdim=True))
            if x is not None:
                x = F.interpolate(x, costs.shape[2:], mode="bilinear").float()
                costs = torch.cat((costs, x), 1)  # (B, 9 + w, h, w)
            x = block(costs)
            # The bound matters: a flow that has left the image has no gradient and never returns.
            more = step * torch.tanh(head(x).float() / step)
            # With aligned corners an affine flow stays affine.
            flow = flow + F.interpolate(more, (H, W), mode="bilinear", align_corners=True)
        return flow


def percent(flow):
    """A flow (B, 2, H, W) in pixels as % of the sides H and W."""
    return 100 * flow / flow.new_tensor(flow.shape[2:]).view(2, 1, 1)


def random_motion(images, spread=0.1, mirrored=True):
    """A random affine flow for each image: (B, 2, H, W) in pixels. The entries of its matrix have
    the standard deviation `spread`, its shift half of `spread` times the sides. `mirrored` turns y
    over half of the time, and x half of the time."""
    (B, _, H, W), at = images.shape, {"device": images.device}
    sides, one = torch.tensor((H, W), **at).view(2, 1, 1), torch.eye(2, **at)
    position = pixel_grid((H, W)).to(images.device) - (sides - 1) / 2  # (2, H, W) from the middle
    mirror = torch.randint(2, (B, 2, 1), **at) * 2 - 1 if mirrored else torch.ones(B, 2, 1, **at)
    matrix = mirror * (one + spread * torch.randn(B, 2, 2, **at)) - one  # (B, 2, 2)
    shift = spread / 2 * torch.randn(B, 2, 1, 1, **at) * sides
    return torch.einsum("bij,jhw->bihw", matrix, position) + shift


def running_mean(mean, flow, rate=0.01):
    """m = 0.99 mean + 0.01 (mean of the batch's flows, in % of the sides): (2, H, W). The drift
    loss is mean m^2. Misalignment is zero in the mean, but the paper's losses do not know that: if
    G shifts every image alike, R undoes it, and G, which is used without R, stays wrong."""
    return torch.lerp(mean, percent(flow).mean(0), rate)


def synthetic_loss(registration, real):
    """mean |R(real, warp(real, u)) - u|, in % of the sides, for a random affine flow u.
    From the likeness of two heads alone R soon learns shifts and zooms, and rotations only in part,
    because heads are round. Here the motion is known."""
    motion = random_motion(real, mirrored=False)
    return percent(registration(real, warp(real, motion)) - motion).norm(dim=1).mean()


def equivariance_loss(model, a, fake):
    """mean |G(warp(a, u)) - warp(G(a), u)| for a random affine flow u, which may mirror the image.
    G must do the same wherever the image lies, so it cannot see how far an image was zoomed and
    undo a part of it."""
    motion = random_motion(a)
    return F.l1_loss(model.translate(warp(a, motion)), warp(fake, motion))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(nicegan.Config):
    script = "more.improved"
    changes = {"reg_net": "coarse", "reg_lr": 8e-3, "correction": 100.0, "drift": 100.0,
               "synthetic": 3.0, "equivariance": 30.0}
    host: str = option("nc", "the translation method", choices=reggan.HOSTS)
    paper: bool = option(False, "", typed=False)  # that is reggan.py
    reg_net: str = option(None, "R: the paper's or coarse to fine", choices=["unet", "coarse"])
    drift: float = option(None, "weight of the squared mean flow, % of sides", within="[0, inf)")
    synthetic: float = option(None, "weight of R's error on known motion, %", within="[0, inf)")
    equivariance: float = option(None, "weight of |G(moved a) - moved G(a)|", within="[0, inf)")

    def registration(self, out_chans, size):
        unet, width = self.reg_net == "unet", max(16, self.width // 2)
        R = super().registration(out_chans, size) if unet else CoarseToFine(size, width)
        if self.drift:
            R.register_buffer("mean", torch.zeros(2, *size))  # see running_mean
        return R

    def added_losses(self, model, a, b, fake, flow):
        """The weighted losses whose weight is not 0, by name."""
        losses, R = {}, model.registration
        if self.drift:
            mean = running_mean(R.mean, flow)
            losses["drift"] = self.drift * mean.square().mean()
            R.mean.copy_(mean.detach())
            mean_over_processes([R.mean])
        if self.synthetic:  # every other image of the batch teaches as much
            losses["synthetic"] = self.synthetic * synthetic_loss(R, b[::2])
        if self.equivariance:
            losses["equivariance"] = self.equivariance * equivariance_loss(model, a, fake)
        return losses


if __name__ == "__main__":
    run_script(lambda: reggan.main(Config, __doc__))
