"""kernels/cpu.py: each layer equals the layer of torch that it stands for."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.cpu import FirstConv, InstanceNorm, LastConv, Reflect
from rounding import assert_rounded

pytestmark = pytest.mark.numeric


def test_instance_norm_is_torchs_with_the_gradient_of_its_formula():
    """The gradient is compared with the formula's: torch's own is wrong for a channels_last one."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    single = x[:1].contiguous(memory_format=torch.channels_last)
    for images in (x, x[:1], single):  # a single image takes another way
        images = images.clone().requires_grad_()
        ours = InstanceNorm()(images)
        assert_rounded(ours, nn.InstanceNorm2d(3)(images), factor=16)
        centred = images - images.mean((2, 3), keepdim=True)
        formula = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        weights = torch.randn_like(ours)  # channels_last where the image is
        mine, other = (torch.autograd.grad((out * weights).sum(), images, retain_graph=True)[0]
                       for out in (ours, formula))
        assert_rounded(mine, other, weights.abs().max() * ours.abs().max() ** 2, factor=16)


@pytest.mark.parametrize("k", [3, 7])
def test_last_conv_is_torchs_with_its_gradients(k):
    torch.manual_seed(0)
    conv = LastConv(3, 2, k)
    x = torch.randn(2, 3, 9, 11, requires_grad=True)
    ours, theirs = conv(x), F.conv2d(x, conv.weight, conv.bias)
    weights, inputs = torch.randn_like(ours), (x, conv.weight, conv.bias)
    positive = [tensor.detach().abs().requires_grad_() for tensor in inputs]
    terms = F.conv2d(*positive)  # sums of absolute values
    found = [[out, *torch.autograd.grad((out * w).sum(), leaves)] for out, w, leaves in (
        (ours, weights, inputs), (theirs, weights, inputs), (terms, weights.abs(), positive))]
    for mine, other, sums in zip(*found):
        assert_rounded(mine, other, sums)


def test_reflect_pads_as_torch_does_and_keeps_bfloat16():
    x = torch.randn(2, 3, 9, 11).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        padded = Reflect(2)(x)
    assert padded.dtype == torch.bfloat16
    assert torch.equal(padded, nn.ReflectionPad2d(2)(x))


def test_first_conv_is_torchs_and_changes_the_layout_of_a_single_image_alone():
    batch, conv = torch.randn(2, 3, 9, 11), FirstConv(3, 2, 3)
    theirs = F.conv2d(batch, conv.weight, conv.bias)
    assert torch.equal(conv(batch), theirs) and conv(batch).is_contiguous()
    single = conv(batch[:1])
    positive = F.conv2d(batch.abs(), conv.weight.abs(), conv.bias.abs())
    assert_rounded(single, theirs[:1], positive)
    assert single.is_contiguous(memory_format=torch.channels_last)


def test_state_dict_keys_are_torchs():
    for ours, theirs in ((InstanceNorm(), nn.InstanceNorm2d(3)),
                         (Reflect(1), nn.ReflectionPad2d(1)),
                         (FirstConv(3, 2, 7), nn.Conv2d(3, 2, 7)),
                         (LastConv(3, 2, 7), nn.Conv2d(3, 2, 7))):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
