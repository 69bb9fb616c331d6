"""RegGAN's networks, with Reg-GAN's state-dict keys: the generator G, the discriminator D and the
registration network R. reggan.py says what they are for, and shows their shapes.

Shapes: B batch, C channels, H x W pixels.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.cpu import InstanceNorm, LastConv, Reflect, quick_layout  # torch's, quick on a CPU


def normed(conv):
    """A convolution and an instance norm. The norm subtracts the bias, so the bias is not trained;
    it exists because Reg-GAN's state dict holds it."""
    conv.bias.requires_grad_(False)
    return [conv, InstanceNorm()]


class Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), both convolutions 3 x 3; `width` channels in and out."""

    def __init__(self, width):
        super().__init__()
        first = [Reflect(1), *normed(nn.Conv2d(width, width, 3)), nn.ReLU(True)]
        second = [Reflect(1), *normed(nn.Conv2d(width, width, 3))]
        self.conv_block = nn.Sequential(*first, *second)

    def forward(self, x):
        return x + self.conv_block(x)


class Generator(nn.Module):
    """G: a 7 x 7 convolution, two of stride 2, nine residual blocks, two transposed ones, tanh.
    It loads Reg-GAN's netG_A2B.pth. It takes any H and W: it pads the image to a multiple of
    2**downs and crops the result."""

    def __init__(self, in_chans=1, out_chans=1, width=64, blocks=9, downs=2, kernel=7):
        super().__init__()
        self.multiple = 2**downs
        widths = [width * 2**level for level in range(downs + 1)]
        head = [Reflect(kernel // 2), *normed(nn.Conv2d(in_chans, width, kernel)), nn.ReLU(True)]
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
        if H % self.multiple or W % self.multiple:
            x = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        x = quick_layout(self.model_head[:2](x))  # (B, w, H, W), w = width
        x = self.model_head[2:](x)  # (B, 4w, H/4, W/4) where downs is 2
        x = self.model_tail(self.model_body(x))  # (B, C, H, W) and the padding
        return x[..., :H, :W].float()


class Discriminator(nn.Module):
    """D: a PatchGAN of 4 x 4 convolutions with Reg-GAN's state-dict keys. Each of its verdicts sees
    70 x 70 pixels; it averages them to one an image, (B, 1)."""

    def __init__(self, in_chans=1, width=64):
        super().__init__()
        layers = [nn.Conv2d(in_chans, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for i, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(i, 2 * i, 4, stride, padding=1)
            layers += [*normed(conv), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, x):
        return self.model(x).float().mean((2, 3))  # (B, 1, H/8 - 2, W/8 - 2) -> (B, 1)


def levels_of(size):
    """How often R halves an image of `size` = (H, W): down to 2 or 3 pixels, 7 times at most."""
    return min(7, int(math.log2(min(size))) - 1)


def leaky_conv(i, o, kernel=3):
    conv = nn.Conv2d(i, o, kernel, padding=kernel // 2)
    return nn.Sequential(conv, nn.LeakyReLU(0.2, True))


def start_at_zero(network, *last):
    """Initialises R's convolutions; the weights of `last` are zero, and so is the first flow."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.2)
            nn.init.zeros_(module.bias)
    for conv in last:
        nn.init.zeros_(conv.weight)


class Registration(nn.Module):
    """R: a residual U-Net, (fake, real) -> flow (B, 2, H, W); warp(fake, flow) should equal real.
    `channels` counts those of fake and real together, `width` those of the first level (32 in the
    paper)."""

    def __init__(self, channels, size, width=32):
        super().__init__()
        w = 2 * width
        widths = [width] + [w] * (levels_of(size) - 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, o in zip([channels] + widths, widths):
            self.down.append(nn.Sequential(leaky_conv(i, o), Residual(o)))
        blocks = [Residual(2 * w) for _ in range(3)]
        self.bottom = nn.Sequential(leaky_conv(w, 2 * w, 1), *blocks, leaky_conv(2 * w, w, 1))
        upwards = widths[::-1]
        for i, o in zip([w] + upwards, upwards):
            self.up.append(leaky_conv(i + o, o))  # o also counts the channels of the skip
        self.refine = nn.Sequential(Residual(width), leaky_conv(width, width, 1))
        self.output = nn.Conv2d(width, 2, 3, padding=1)
        start_at_zero(self, self.output)

    def forward(self, fake, real):
        x, skips = torch.cat((fake, real), 1), []  # (B, 2C, H, W)
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)  # (B, w, h, w), 2 or 3 pixels high or wide
        for block, skip in zip(self.up, reversed(skips)):
            x = F.interpolate(x, skip.shape[2:], mode="bilinear")
            x = block(torch.cat((x, skip), 1))
        return self.output(self.refine(x)).float()  # (B, 2, H, W)


def lsgan(verdict, real):
    """mean (verdict - target)^2, target 1 for real and 0 for fake."""
    return (verdict - float(real)).square().mean()


def average(tensors):
    """Makes each tensor its mean over torchrun's processes, in one message for all of them."""
    if torch.distributed.is_initialized():
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))
