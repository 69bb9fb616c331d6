"""Layers of RegGAN, written so that a CPU is quick. Each equals the torch layer it stands for.

    InstanceNorm   nn.InstanceNorm2d    torch's is slower than a group norm, and in
                                        torch 2.13 its gradient is wrong where it receives one in
                                        channels_last
    Reflect        nn.ReflectionPad2d   under autocast torch's returns float32, and all that follows
    LastConv       nn.Conv2d            with few output channels the library's kernels stand idle
    FirstConv      nn.Conv2d            convolutions of a single image are faster in
                                        channels_last

Parameters and state-dict keys are torch's, and on a GPU each of them is torch's own layer.

Shapes: B batch, C channels, H x W pixels, k x k kernel, i channels in, o channels out.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class InstanceNorm(nn.Module):
    """Zero mean and unit variance in each channel of each image (B, C, H, W); no parameters."""

    def forward(self, x):
        if x.is_cuda:
            return F.instance_norm(x)
        if len(x) == 1:  # of a single image, batch norm is instance norm
            # The backward pass of batch norm is fast in channels_last too.
            return F.batch_norm(x, None, None, training=True)
        return F.group_norm(x, x.shape[1])  # one channel a group


class Reflect(nn.ReflectionPad2d):
    """Reflection padding that keeps the type of its input under autocast."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class LastConv(nn.Conv2d):
    """A k x k convolution, without padding or stride, to few channels.

    On a CPU it becomes a 1 x k convolution to k times as many channels, one group for each row of
    the kernel; the groups are then shifted by their rows and added.
    """

    def forward(self, x):
        if x.is_cuda:  # in float32, as what follows: bfloat16 would leave 8 bits of each pixel
            with torch.autocast("cuda", enabled=False):
                return super().forward(x.float())
        k = self.kernel_size[0]
        weight = self.weight.permute(2, 0, 1, 3)                                # (k, o, i, k)
        weight = weight.reshape(-1, self.in_channels, 1, k)                     # (k o, i, 1, k)
        rows = F.conv2d(x, weight).float().chunk(k, 1)                          # k of (B, o, H, W')
        height = x.shape[2] - k + 1
        total = sum(row[:, :, i:i + height] for i, row in enumerate(rows))      # (B, o, H', W')
        return total + self.bias.view(-1, 1, 1)


class FirstConv(nn.Conv2d):
    """A convolution whose result, of a single image on a CPU, comes in channels_last. All layers
    that follow keep that layout."""

    def forward(self, x):
        x = super().forward(x)
        single = len(x) == 1 and not x.is_cuda
        return x.contiguous(memory_format=torch.channels_last) if single else x
