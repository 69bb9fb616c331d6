"""The kernels and their torch references against float64 formulas written another way.

Without a GPU, Triton's interpreter runs the kernels (conftest.py); with one, the same tests run
them compiled. The error that a kernel may make is not a number that happens to pass: it is at most
twice the error of the torch reference in the same dtype, plus what rounding may add to sums of this
size (rounding.py), because the reference is right by luck in tiny cases.
"""

import functools
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import bench, jit, lora_linear, tl, triton, use_kernels, wants_triton, warp
from kernels.dropout import keep_mask, keep_tile
from kernels.lora_linear import (
    constants_of, down_kernel, lora_linear_reference, lora_linear_triton, plain_down_kernel,
    reference_backward, reference_forward, up_kernel)
from kernels.warp import warp_by_grid_sample, warp_reference, warp_triton
from rounding import assert_rounded, rounding

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="no Triton here")
needs_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA GPU here")
names = ("result", "first gradient", "second gradient", "third gradient")


def assert_as_good(got, reference, truth, terms):
    """Each of `got` errs at most twice as much as its `reference`, both against float64, plus one
    rounding of the largest value to its dtype and the rounding of float32 sums. The reference errs
    by no more than a few roundings of the sums in its dtype. terms: their sums of absolute values.
    """
    for name, a, b, c, sums in zip(names, got, reference, truth, terms):
        assert_rounded(b, c, sums, name="reference's " + name)
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max()
        allowed += rounding(a.dtype, c, 1) + rounding(torch.float32, sums)
        assert a.shape == c.shape
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# --------------------------------------------------------------------------------------------------
# LoRA

QV = (True, False, True)
# rows, inputs, width of a part, rank, parts: tiles that end inside and outside of the matrix, ranks
# 1, 4, 5, 32, 64 and 80, one to three groups, one row
CASES = [
    (5, 20, 12, 80, (True,)),  # a rank of two tiles
    (37, 41, 19, 5, QV), (1, 5, 3, 1, (True,)), (70, 64, 32, 4, QV),
    (33, 100, 40, 32, (True, True, True)), (40, 70, 50, 64, (False, True)),
    (140, 20, 6, 33, QV),  # two programs whose sums are added
]
SCALE = 1.7


def lora_inputs(M, K, width, R, parts, dtype=torch.float32, device=DEVICE):
    """x, weight, bias, A, B, dy. B is random too: with 0, half of the paths could be missing."""
    generator = torch.Generator().manual_seed(M + R)
    N, G = width * len(parts), sum(parts)
    shapes = [(M, K), (N, K), (N,), (G * R, K), (G * width, R), (M, N)]
    return [torch.randn(shape, generator=generator).mul_(0.5).to(device, dtype) for shape in shapes]


def dense_lora(x, weight, bias, A, B, scale, parts, keep=None, p=0.0):
    """The definition, with the low-rank product as an (N, K) matrix, 0 in the other parts."""
    width, R, blocks, g = len(weight) // len(parts), B.shape[1], [], 0
    for adapted in parts:
        delta = weight.new_zeros(width, x.shape[-1])
        if adapted:
            delta = B[g * width : (g + 1) * width] @ A[g * R : (g + 1) * R]
        blocks.append(delta)
        g += adapted
    dropped = x if keep is None else x * keep / (1 - p)
    return x @ weight.T + bias + scale * dropped @ torch.cat(blocks).T


def gradients(function, tensors, dy, wanted):
    """(result, gradients of `wanted`) with fresh leaves."""
    tensors = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = function(*tensors)
    return (y.detach(), *torch.autograd.grad(y, [tensors[i] for i in wanted], dy))


def lora_truth(tensors, dy, parts, keep, p, wanted=(0, 3, 4)):
    """Result and gradients of the definition in float64, and of the same with absolute values,
    which are the sums of absolute terms of each."""
    return [gradients(lambda *a: dense_lora(*a, SCALE, parts, keep, p),
                      [of(t.double()) for t in tensors], of(dy.double()), wanted)
            for of in (lambda t: t, torch.abs)]


def philox_keep(M, K, p, seed, first_row=0):
    """The kernels' mask in numpy, from Philox4x32 with 7 rounds as its paper has it (Salmon et al.
    2011)."""
    mask32 = np.uint64(0xFFFFFFFF)
    octets = math.ceil(K / 8)
    rows, columns = np.arange(first_row, first_row + M, dtype=np.uint64), np.arange(octets)
    counter = rows[:, None] * np.uint64(octets) + columns.astype(np.uint64)
    c = [counter & mask32, counter >> np.uint64(32), counter * np.uint64(0), counter * np.uint64(0)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), b & mask32,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), a & mask32]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    halves = [half for word in c for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    bits = np.stack(halves, axis=-1).reshape(M, 8 * octets)[:, :K]
    return torch.from_numpy(bits >= round(p * 2**16))


@pytest.mark.numeric
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_kernels(case, p, dtype):
    """The result and the gradients of x, A and B; with dropout all three have Philox's mask."""
    parts, seed = case[-1], 12345
    *tensors, dy = lora_inputs(*case, dtype=dtype)
    keep = philox_keep(*tensors[0].shape, p, seed).to(DEVICE) if p else None
    got = gradients(lambda *a: lora_linear_triton(*a, SCALE, parts, p, seed), tensors, dy,
                    (0, 3, 4))
    truth, terms = lora_truth(tensors, dy, parts, keep, p)
    x, weight, bias, A, B = tensors
    keep = keep if keep is None else keep.byte()
    y, t, _ = reference_forward(x, weight, bias, A, B, keep, SCALE, parts, p)
    reference = reference_backward(dy, x, weight, A, B, t, keep, SCALE, parts, p)
    assert_as_good(got, (y, *reference), truth, terms)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_reference(case, p, dtype):
    """The reference equals the definition in float64, with the gradient of every input."""
    parts = case[-1]
    *tensors, dy = lora_inputs(*case, dtype=dtype)
    keep = keep_mask(tensors[0], p, 5) if p else None
    got = gradients(lambda *a: lora_linear_reference(*a, SCALE, parts, p, 5), tensors, dy, range(5))
    for a, b, sums in zip(got, *lora_truth(tensors, dy, parts, keep, p, range(5))):
        assert_rounded(a, b, sums)


@pytest.mark.numeric
@needs_triton
def test_plain_kernel():
    """t = x A^T of the ten lines that stand before the kernels."""
    x, A = torch.randn(64, 128, device=DEVICE), torch.randn(16, 128, device=DEVICE)
    t = torch.empty(64, 16, device=DEVICE)
    plain_down_kernel[(2,)](x_ptr=x, A_ptr=A, t_ptr=t, K=128, R=16, BLOCK_M=32, BLOCK_K=64)
    assert_rounded(t, x.double() @ A.double().T, x.abs() @ A.abs().T)


def reference_keep(M, K, p, seed):
    return keep_mask(torch.empty(M, K), p, seed)


@pytest.mark.parametrize("make", [reference_keep, philox_keep], ids=["reference", "philox"])
def test_dropout_statistics(make):
    """P[keep] = 1 - p overall, in each row and in each column; neighbours are independent; the seed
    alone decides."""
    M, K, p = 512, 1022, 0.1
    keep = make(M, K, p, 3).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 4 * sigma / (M * K) ** 0.5
    assert (keep.mean(0) - (1 - p)).abs().max() < 5 * sigma / M**0.5
    assert (keep.mean(1) - (1 - p)).abs().max() < 5 * sigma / K**0.5
    z = (keep - (1 - p)) / sigma
    for pair in (z[:, 1:] * z[:, :-1], z[1:] * z[:-1], z[:, 4:] * z[:, :-4]):
        assert abs(pair.mean()) < 4 / pair.numel() ** 0.5
    assert torch.equal(keep, make(M, K, p, 3).double())
    assert 0.7 < (keep == make(M, K, p, 4)).double().mean() < 0.9


@jit()
def keep_kernel(out_ptr, seed_ptr, threshold, first_row, K: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_K: tl.constexpr):
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    keep = keep_tile(seed_ptr, threshold, first_row + row, 0, K, BLOCK_K)
    tl.store(out_ptr + row[:, None] * BLOCK_K + k[None, :], keep.to(tl.int8))


@needs_triton
def test_mask_beyond_32_bits():
    """Rows whose elements lie beyond 2^31 and 2^33 get counters of their own."""
    for first_row in (2**31 // 30, 2**35):
        out = torch.empty(16, 32, dtype=torch.int8, device=DEVICE)
        seed = torch.tensor(9, device=DEVICE)
        keep_kernel[(1,)](out, seed, 2**15, first_row, K=30, BLOCK_M=16, BLOCK_K=32)
        assert torch.equal(out[:, :30].bool().cpu(), philox_keep(16, 30, 0.5, 9, first_row))


def test_seeds():
    """torch.manual_seed repeats a run, two calls differ, a given seed leaves torch's as it is."""
    *tensors, _ = lora_inputs(20, 16, 4, 2, QV)
    torch.manual_seed(0)
    first, second = (lora_linear(*tensors, SCALE, QV, 0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(lora_linear(*tensors, SCALE, QV, 0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    y = lora_linear(*tensors, SCALE, QV, 0.5, seed=3)
    for seed in (3 + 2**31, torch.tensor(3, device=DEVICE)):
        assert torch.equal(lora_linear(*tensors, SCALE, QV, 0.5, seed=seed), y)
    lora_linear(*tensors, SCALE, QV)
    assert torch.equal(torch.get_rng_state(), state)


by_kernels = functools.partial(pytest.param, id="kernels", marks=needs_triton)
both_loras = pytest.mark.parametrize("f", [
    pytest.param(lora_linear_reference, id="reference"), by_kernels(lora_linear_triton)])
all_warps = pytest.mark.parametrize("f", [
    pytest.param(warp_reference, id="reference"),
    pytest.param(warp_by_grid_sample, id="grid_sample"), by_kernels(warp_triton)])


@pytest.mark.numeric
@both_loras
def test_lora_inputs_of_other_forms(f):
    """Leading dimensions, a transposed x, no bias, no gradient to x, factors of another dtype,
    float32 under autocast."""
    x, weight, bias, A, B, _ = lora_inputs(24, 16, 4, 2, QV)
    y = f(x, weight, bias, A, B, SCALE, QV)
    deep = f(x.view(2, 3, 4, 16), weight, bias, A, B, SCALE, QV)
    _, terms = lora_truth((x, weight, bias, A, B), y, QV, None, 0)
    assert_rounded(deep.view(24, 12), y, terms[0])
    assert_rounded(f(x.T.contiguous().T, weight, bias, A, B, SCALE, QV), y, terms[0])
    assert_rounded(f(x, weight, None, A, B, SCALE, QV) + bias, y, terms[0])
    strided = bias.repeat_interleave(2)[::2]
    assert_rounded(f(x, weight, strided, A, B, SCALE, QV), y, terms[0])
    A.requires_grad_()
    B.requires_grad_()
    half = f(x.half(), weight.half(), bias.half(), A, B, SCALE, QV)
    assert half.dtype == torch.float16
    for p in (0.0, 0.3):
        y = f(x, weight, bias, A, B, SCALE, QV, p, 1)
        f(x.clone().requires_grad_(), weight, bias, A, B, SCALE, QV, p, 1).sum().backward()
        dA, dB = torch.autograd.grad(y.sum(), (A, B))
        _, (_, terms_A, terms_B) = lora_truth((x, weight, bias, A, B), torch.ones_like(y), QV, None,
                                              p, (3, 4))
        assert_rounded(dA, A.grad, terms_A)
        assert_rounded(dB, B.grad, terms_B)
        A.grad = B.grad = None
    with torch.autocast(DEVICE, torch.float16):
        assert F.linear(x, weight, bias).dtype == torch.float16
        assert f(x, weight, bias, A, B, SCALE, QV).dtype == torch.float16
    assert weight.grad is None


def test_lora_frozen_weight_costs_nothing():
    """What is kept for the backward pass: x, the weight itself, A, B and t."""
    x, weight, bias, A, B, _ = lora_inputs(30, 16, 4, 2, QV, device="cpu")
    for tensor in (x, A, B):
        tensor.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear_reference(x, weight, bias, A, B, SCALE, QV)
    assert weight.data_ptr() in [t.data_ptr() for t in kept]
    sizes = [t.numel() for t in (x, weight, A, B)]
    assert sum(t.numel() for t in kept) == sum(sizes) + 4 * 30


def test_lora_errors():
    x, weight, bias, A, B, _ = lora_inputs(6, 8, 4, 2, QV)
    for args, message in [
        ((x[:, :7], weight, bias, A, B, 1, QV), "expected x"),
        ((x, weight, bias[:3], A, B, 1, QV), "expected bias"),
        ((x, weight, bias, A[:2], B, 1, QV), "expected lora_A"),
        ((x, weight, bias, A, B, 1, (True, True, True)), "expected lora_B"),
        ((x, weight, bias, A, B, 1, (False, False, False)), "at least one"),
        ((x, weight, bias, A, B, 1, QV, 1.0), "dropout"),
        ((x, weight.half(), bias, A, B, 1, QV), "expected weight"),
        ((x, weight, bias, A.int(), B, 1, QV), "expected lora_A"),
        ((x, weight, bias, A, B.to("meta"), 1, QV), "expected lora_B .* on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            lora_linear(*args)


# --------------------------------------------------------------------------------------------------
# Warp

WARPS = [(2, 3, 5, 7), (1, 1, 37, 41), (1, 2, 1, 9), (2, 1, 16, 32)]


def warp_inputs(shape, reach=3.0, device=DEVICE):
    """image, flow, dy. A reach of 3 pixels has many displacements leave a small image."""
    generator = torch.Generator().manual_seed(sum(shape))
    B, _, H, W = shape
    sizes = (shape, 1), ((B, 2, H, W), reach), (shape, 1)
    return [scale * torch.randn(size, generator=generator).to(device) for size, scale in sizes]


def grid_sample_warp(image, flow):
    """The usual form: an identity grid, a normalisation, F.grid_sample."""
    H, W = image.shape[-2:]
    rows, cols = (torch.arange(n, dtype=flow.dtype, device=flow.device) for n in (H, W))
    y, x = rows[:, None] + flow[:, 0], cols + flow[:, 1]
    grid = torch.stack((2 * x / max(W - 1, 1) - 1, 2 * y / max(H - 1, 1) - 1), -1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def warp_terms(image, flow, dy):
    """Sums of absolute terms of the result and of the gradients of image and flow. A position is
    rounded too, at up to H or W pixels: that moves a value by as much as its neighbours differ."""
    image, flow, dy = image.double().abs(), flow.double(), dy.double().abs()
    slope = image.max() * max(image.shape[-2:])
    dimage = gradients(grid_sample_warp, (image, flow), dy, (0,))[1]
    g = dy.sum(1).max()
    return image.max() + slope, dimage.max() + slope * g, g * slope


@pytest.mark.numeric
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", WARPS, ids=str)
def test_warp_kernels(shape, dtype):
    """Against F.grid_sample in float64: the image, its gradient and the flow's. In an image of one
    row no position moves along y."""
    image, flow, dy = warp_inputs(shape)
    image, dy = image.to(dtype), dy.to(dtype)
    got = gradients(warp_triton, (image, flow), dy, (0, 1))
    reference = gradients(warp_reference, (image, flow), dy, (0, 1))
    truth = gradients(grid_sample_warp, (image.double(), flow.double()), dy.double(), (0, 1))
    assert_as_good(got, reference, truth, warp_terms(image, flow, dy))


@pytest.mark.numeric
@pytest.mark.parametrize("shape", WARPS, ids=str)
def test_warp_reference(shape):
    """Both forms in torch."""
    image, flow, dy = (t.double() for t in warp_inputs(shape))
    truth = gradients(grid_sample_warp, (image, flow), dy, (0, 1))
    for f in (warp_reference, warp_by_grid_sample):
        found = gradients(f, (image, flow), dy, (0, 1))
        for a, b, terms in zip(found, truth, warp_terms(image, flow, dy)):
            assert_rounded(a, b, terms)
        half, single = image.half(), flow.float()  # positions and weights stay in float32
        assert torch.equal(f(half, single), f(half.float(), single).half())


@pytest.mark.numeric
@all_warps
def test_warp_golden(f):
    """3 x 3, worked on paper.

    image 1 2 3     pixel (0, 0) moves by (1, 1) to (1, 1): 5
          4 5 6     pixel (1, 1) by (-0.5, 0.5) to (0.5, 1.5): (2 + 3 + 5 + 6) / 4 = 4
          7 8 9     pixel (2, 0) by (0, 0.25) to (2, 0.25): 7.25
                    pixel (0, 2) by (-4, 9) out of the image, to its corner (0, 2): 3
                    the others stay
    """
    image = torch.arange(1.0, 10.0, device=DEVICE).view(1, 1, 3, 3).requires_grad_()
    flow = torch.zeros(1, 2, 3, 3, device=DEVICE)
    moves = {(0, 0): (1, 1), (1, 1): (-0.5, 0.5), (2, 0): (0, 0.25), (0, 2): (-4, 9)}
    for (y, x), move in moves.items():
        flow[0, :, y, x] = torch.tensor(move)
    out = f(image, flow.requires_grad_())
    assert out[0, 0].tolist() == [[5, 2, 3], [4, 4, 6], [7.25, 8, 9]]
    out.sum().backward()
    assert image.grad[0, 0].tolist() == [[0, 1.25, 1.25], [1, 1.25, 1.25], [0.75, 1.25, 1]]
    # rows are 3 apart, columns 1; 0 on the border itself and beyond it
    assert flow.grad[0, 0].tolist() == [[3, 0, 0], [3, 3, 3], [0, 0, 0]]
    assert flow.grad[0, 1].tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0]]
    # at a whole position the derivative to the right and downwards: 32 - 16, 128 - 16
    image = (2.0 ** torch.arange(9, device=DEVICE)).view(1, 1, 3, 3)
    flow = torch.zeros(1, 2, 3, 3, device=DEVICE, requires_grad=True)
    f(image, flow).sum().backward()
    assert flow.grad[0, :, 1, 1].tolist() == [112, 16]


@pytest.mark.numeric
@all_warps
def test_whole_pixel_flows_are_exact(f):
    """Zero flow is the identity and a constant whole flow a shift, to the last bit, at sizes that
    are no power of two."""
    for H, W in ((1, 1), (7, 300), (37, 41), (64, 100)):
        image = torch.randn(1, 2, H, W, device=DEVICE)
        for dy, dx in ((0, 0), (2, -3), (-H, W)):
            flow = torch.tensor([dy, dx], dtype=torch.float32, device=DEVICE)
            flow = flow.view(1, 2, 1, 1).expand(1, 2, H, W)
            rows = (torch.arange(H) + dy).clamp(0, H - 1)
            cols = (torch.arange(W) + dx).clamp(0, W - 1)
            assert torch.equal(f(image, flow), image[:, :, rows[:, None], cols])


@pytest.mark.numeric
@all_warps
def test_displacements_that_are_not_finite(f):
    """Infinite and huge ones read the border; NaN gives NaN there, in every channel, and passes no
    gradient. The image is wide enough for vector code."""
    image, flow, dy = warp_inputs((1, 2, 12, 70))
    trouble = torch.tensor([0, math.nan, math.inf, -math.inf, 3e38, -3e38, 2.0**31, -(2.0**63)])
    flow = trouble.to(DEVICE)[(flow * 1000).long() % len(trouble)]
    nan = flow.isnan().any(1, keepdim=True)
    rows, cols = (torch.arange(n, device=DEVICE) for n in (12, 70))
    rows = (rows[:, None] + flow[0, 0]).nan_to_num().clamp(0, 11).long()
    cols = (cols + flow[0, 1]).nan_to_num().clamp(0, 69).long()
    out, dimage, dflow = gradients(f, (image, flow), dy, (0, 1))
    truth = gradients(lambda image: image[:, :, rows, cols], [image], dy * ~nan, (0,))
    assert torch.equal(out.nan_to_num(99), truth[0].masked_fill(nan, 99))
    assert_rounded(dimage, truth[1], dy.abs().sum())
    assert dflow.isfinite().all() and not dflow[(flow != 0) | nan].any()


@pytest.mark.numeric
@needs_triton
def test_no_read_beyond_the_image():
    """The image and the flow lie in buffers of NaN: a read past an end would show, even of weight
    0."""
    image, flow, dy = warp_inputs((1, 1, 6, 7))
    inside = []
    for tensor in (image, flow):
        buffer = torch.full((tensor.numel() + 64,), float("nan"), device=DEVICE)
        buffer[32:-32] = tensor.flatten()
        inside.append(buffer[32:-32].view(tensor.shape))
    for moves in (flow, torch.zeros_like(flow)):
        inside[1].copy_(moves)
        out = warp_triton(*inside)
        assert torch.equal(out, warp_triton(image, moves)) and out.isfinite().all()


@pytest.mark.numeric
@needs_triton
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 3e38])
def test_image_gradient_cannot_overflow(size):
    """Every pixel reads the same place, with gradients of any magnitude; that of one plane leaves
    the others alone."""
    image = torch.randn(1, 2, 16, 20, device=DEVICE, requires_grad=True)
    to_row = 7.5 - torch.arange(16.0)[:, None].expand(16, 20)
    to_column = 12 - torch.arange(20.0).expand(16, 20)
    flow = torch.stack((to_row, to_column))[None].to(DEVICE)
    dy = torch.rand(1, 2, 16, 20, device=DEVICE)
    dy[:, 1] *= size / 1000
    got = torch.autograd.grad(warp_triton(image, flow), image, dy)[0].double()
    exact = image.detach().double(), flow.double()
    truth = gradients(grid_sample_warp, exact, dy.double(), (0,))[1]
    quantum = torch.tensor([2.0**-50, max(2.0**-50 * size, 2.0**-126)], device=DEVICE).double()
    allowed = 320 * quantum[None, :, None, None] + truth.abs() * 2**-23
    assert ((got - truth).abs() <= allowed).all() and got[:, 0].any()


@needs_triton
def test_gradients_that_are_not_finite():
    """A loss scaler has to see them: the image gradient of their plane is NaN, and no other."""
    image, flow, dy = warp_inputs((2, 2, 5, 6))
    clean = gradients(warp_triton, (image, flow), dy, (0,))[1]
    dy[1, 0, 2, 3] = float("inf")
    got = gradients(warp_triton, (image, flow), dy, (0,))[1]
    assert got[1, 0].isnan().all()
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1, 1], clean[1, 1])


@pytest.mark.numeric
def test_warp_dtypes_and_forms():
    """16-bit images and flows, float64, one gradient at a time, images that are not contiguous."""
    image, flow, dy = warp_inputs((1, 2, 6, 8))
    out = warp(image, flow)
    for dtype in (torch.float16, torch.bfloat16):
        assert warp(image.to(dtype), flow).dtype == dtype
        torch.testing.assert_close(warp(image.to(dtype), flow).float(), out, rtol=0.02, atol=0.02)
    assert warp(image.double(), flow).dtype == torch.float64
    assert torch.equal(warp(image.transpose(2, 3).contiguous().transpose(2, 3), flow), out)
    for f in (warp_reference, warp_by_grid_sample, *([warp_triton] if triton else [])):
        all_at_once = gradients(f, (image, flow), dy, (0, 1))
        for inputs, together in (((0,), all_at_once[1]), ((1,), all_at_once[2])):
            alone = gradients(f, (image, flow), dy, inputs)[1]
            if f is not warp_triton and DEVICE == "cuda":  # there it adds up in any order
                assert_rounded(alone, together, 20 * dy.abs().max())
            else:
                assert torch.equal(alone, together)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(warp(image, flow), out)


def test_warp_errors():
    image, flow, _ = warp_inputs((2, 1, 4, 5))
    for args, message in [((image[0], flow), r"\(1, 4, 5\)"),
                          ((image[:0], flow[:0]), r"not empty.* \(0, 1, 4, 5\)"),
                          ((image, flow[:1]), r"\(1, 2, 4, 5\)"),
                          ((image, flow[:, :1]), r"\(2, 1, 4, 5\), torch.float32"),
                          ((image.int(), flow), "int32"), ((image, flow.to("meta")), "on meta")]:
        with pytest.raises(ValueError, match=message):
            warp(*args)


# --------------------------------------------------------------------------------------------------
# What torch may do with both operations: compile, checkpoint, differentiate twice or forward


def small_lora():
    return [tensor.requires_grad_() for tensor in lora_inputs(20, 16, 4, 2, QV)[:-1]]


def small_warp():
    return [tensor.requires_grad_() for tensor in warp_inputs((1, 2, 5, 6))[:2]]


def result_and_gradients(function, tensors):
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), tensors)]


def with_dropout(f):
    return lambda *tensors: f(*tensors, SCALE, QV, 0.4)


lora = pytest.param(with_dropout(lora_linear_reference), small_lora, id="lora")
kernel_forms = [
    pytest.param(f, tensors, id=name, marks=needs_triton) for name, f, tensors in (
        ("lora kernels", with_dropout(lora_linear_triton), small_lora),
        ("warp kernels", warp_triton, small_warp))]


@pytest.mark.parametrize("f, tensors", [
    lora, pytest.param(warp_by_grid_sample, small_warp, id="warp"), *kernel_forms])
def test_a_compiled_model_computes_the_same(f, tensors):
    """Its graph breaks at the kernels and at the mask, which a call draws anew."""
    torch._dynamo.reset()
    tensors = tensors()

    def model(*inputs):
        return 2 * f(*[tensor * 1.5 for tensor in inputs])

    compiled = torch.compile(model, backend="aot_eager")
    torch.manual_seed(0)
    eager = result_and_gradients(model, tensors)
    torch.manual_seed(0)
    first, second = (result_and_gradients(compiled, tensors) for _ in range(2))
    for a, b in zip(first, eager):
        assert_rounded(a, b, factor=64)  # sums of some 64 terms of its size
    assert torch.equal(first[0], second[0]) == (len(tensors) == 2)


@pytest.mark.numeric
@both_loras
def test_lora_checkpointing(f):
    """Activation checkpointing makes the mask of the forward pass again."""
    tensors, function = small_lora(), with_dropout(f)
    torch.manual_seed(0)
    plain = result_and_gradients(function, tensors)
    torch.manual_seed(0)
    again = result_and_gradients(lambda *t: checkpoint(function, *t, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.numeric
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_lora_gradcheck(p):
    """First and second derivatives of the reference, in float64."""
    inputs = [t.requires_grad_() for t in lora_inputs(3, 4, 2, 2, QV, torch.float64)[:-1]]
    f = functools.partial(lora_linear_reference, scale=SCALE, parts=QV, dropout=p, seed=3)
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.numeric
def test_warp_gradcheck():
    inputs = [t.double().requires_grad_() for t in warp_inputs((1, 2, 3, 4))[:2]]
    assert torch.autograd.gradcheck(warp_reference, inputs)
    assert torch.autograd.gradgradcheck(warp_reference, inputs)


@pytest.mark.parametrize("f, tensors", kernel_forms)
def test_kernels_have_no_second_derivative(f, tensors):
    """They say so, instead of dropping terms."""
    tensors = tensors()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(f(*tensors).sum(), tensors, create_graph=True)


@pytest.mark.parametrize("f, tensors", [lora, *kernel_forms])
def test_forward_mode_is_refused(f, tensors):
    """torch.func.jvp and dual numbers raise; they do not give a derivative of 0."""
    inputs = [tensor.detach() for tensor in tensors()]
    with pytest.raises(RuntimeError):
        torch.func.jvp(f, tuple(inputs), tuple(map(torch.ones_like, inputs)))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        f(*(forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in inputs))


def test_both_switches_of_float32_products_are_read():
    """torch has an old and a new one; the new one makes the old one's getter raise."""
    A, B, cuda = torch.zeros(4, 8), torch.zeros(4, 2), torch.backends.cuda.matmul
    old = cuda.fp32_precision
    try:
        for word in ("ieee", "tf32"):
            cuda.fp32_precision = word
            assert constants_of(A, B, QV, 0.0)[-1]["PRECISION"] == word
        for word, found in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(word)
            assert constants_of(A, B, QV, 0.0)[-1]["PRECISION"] == found
    finally:
        cuda.fp32_precision = old


@jit()
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@pytest.mark.numeric
@needs_triton
def test_float32_is_rounded_to_bfloat16():
    """To the nearest, ties to even, as torch does: the interpreter alone would cut it off."""
    special = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, math.inf, -math.inf, 3.4e38, 1e-40, math.nan]
    x = torch.randn(504) * 10.0 ** torch.randint(-38, 38, (504,))
    x = torch.cat((x, torch.tensor(special)))
    out = torch.empty(512, dtype=torch.bfloat16, device=DEVICE)
    cast_kernel[(1,)](x.to(DEVICE), out, N=512)
    torch.testing.assert_close(out.cpu(), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.numeric
@needs_triton
def test_lora_gradients_are_not_rounded():
    """Under autocast the kernels read a float32 x, A and B and return float32 gradients."""
    x, weight, bias, A, B, dy = lora_inputs(70, 64, 32, 4, QV)
    narrow = [tensor.half() for tensor in (x, weight, bias, A, B)]

    def f(x, A, B):
        with torch.autocast(DEVICE, torch.float16):
            return lora_linear_triton(x, weight, bias, A, B, SCALE, QV, 0.3, 7)

    keep = philox_keep(70, 64, 0.3, 7).to(DEVICE)
    got = gradients(f, (x, A, B), dy.half(), (0, 1, 2))
    tensors = x.half(), narrow[1], bias, A.half(), B.half()
    truth, terms = lora_truth(tensors, dy.half(), QV, keep, 0.3)
    y, t, _ = reference_forward(*narrow, keep.byte(), SCALE, QV, 0.3)
    reference = reference_backward(dy.half(), *narrow[:2], *narrow[3:], t, keep.byte(), SCALE, QV,
                                   0.3)
    got_half = [got[0], *(gradient.half() for gradient in got[1:])]
    assert_as_good(got_half, (y, *reference), truth, terms)
    for gradient in got[1:]:
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.half().float())


# --------------------------------------------------------------------------------------------------
# The package


def test_dispatch(monkeypatch):
    """Triton is to run CUDA tensors, until it is turned off, and no CPU tensors."""
    monkeypatch.setenv("MEDVISION_NO_KERNELS", "0")
    on_gpu = SimpleNamespace(is_cuda=True)
    assert wants_triton(on_gpu) and not wants_triton(torch.zeros(1))
    use_kernels(False)
    assert os.environ["MEDVISION_NO_KERNELS"] == "1" and not wants_triton(on_gpu)
    use_kernels(True)
    assert wants_triton(on_gpu)


def stand_in(monkeypatch, capability=(8, 6), direction=None, error=None):
    """CPU tensors count as those of a GPU, on which the interpreter runs the kernels, or which
    raises error() in the forward or backward direction."""

    def fail(*args, **kwargs):
        raise error()

    for name in ("kernels.lora_linear", "kernels.warp"):
        monkeypatch.setattr(sys.modules[name], "wants_triton", lambda tensor: True)
        if error:
            monkeypatch.setattr(sys.modules[name], f"triton_{direction}", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "ABSENT", "no Triton" if direction == "absent" else "")
    monkeypatch.setattr(kernels, "TRIED", set())
    monkeypatch.setattr(kernels, "FAILED", set())


def both_operations():
    """Results and gradients by the public functions."""
    tensors, warped = small_lora(), small_warp()
    found = result_and_gradients(lambda *t: lora_linear(*t, SCALE, QV), tensors)
    return found + result_and_gradients(warp, warped)


@needs_triton
@pytest.mark.skipif(CUDA, reason="a stand-in for a GPU")
def test_kernels_that_run_are_tried_once(monkeypatch, capsys):
    stand_in(monkeypatch)
    both_operations()
    tried = set(kernels.TRIED)
    assert {case[0] for case in tried} == {"lora_linear", "warp"} and not kernels.FAILED
    both_operations()
    assert kernels.TRIED == tried and capsys.readouterr().err == ""


def out_of_resources():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(98304, 65536, "shared memory")


FAILURES = {  # what fails: what the line on stderr says, and how stand_in makes it
    "sm_75": ("compute capability 8.0 (Ampere) or newer, found 7.5", (7, 5)),
    "compiler": ("C compiler", (8, 6), "forward", lambda: RuntimeError("Found no C compiler")),
    "forward": ("out of resource: shared memory", (8, 6), "forward", out_of_resources),
    "backward": ("out of resource: shared memory", (8, 6), "backward", out_of_resources),
    "absent": ("no Triton", (8, 6), "absent"),
}


@needs_triton
@pytest.mark.skipif(CUDA, reason="a stand-in for a GPU")
@pytest.mark.parametrize("failure", FAILURES)
def test_kernels_that_cannot_run_give_way(monkeypatch, capsys, failure):
    """The references run, in both directions, and one line for each operation says why."""
    expected = both_operations()
    why, *device = FAILURES[failure]
    stand_in(monkeypatch, *device)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(both_operations(), expected))
    lines = list(filter(None, capsys.readouterr().err.splitlines()))
    for line, operation in zip(lines, ("lora_linear", "warp")):
        assert line.startswith(f"{operation}: no Triton kernels on cpu, the torch reference runs")
        assert why in line
    assert len(lines) == 2


@needs_triton
@pytest.mark.skipif(CUDA, reason="a stand-in for a GPU")
def test_memory_that_runs_out_does_not_turn_the_kernels_off(monkeypatch):
    stand_in(monkeypatch, (8, 6), "forward", lambda: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        warp(*small_warp())
    assert not kernels.FAILED


def run_python(*lines, timeout=300, **environment):
    """In a process of its own, where the interpreter is off."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment,
                          capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(CUDA or triton is None, reason="a stand-in for a GPU without a driver")
def test_the_references_run_where_triton_finds_no_driver():
    """Triton's own error, of a machine whose driver does not fit."""
    done = run_python("import sys, torch, test_kernels",
                      "torch.cuda.get_device_capability = lambda device: (8, 6)",
                      "for name in ('kernels.lora_linear', 'kernels.warp'):",
                      "    sys.modules[name].wants_triton = lambda tensor: True",
                      "for _ in range(2): test_kernels.both_operations()")
    lines = [line for line in done.stderr.splitlines() if "no Triton kernels" in line]
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert all("0 active drivers" in line for line in lines)


@pytest.mark.parametrize("first, absent", [
    ("sys.modules['triton'] = None", "Triton is not installed"),
    ("import triton; triton.__version__ = '3.3.1'", "expected Triton 3.4 or newer, found 3.3.1"),
    pytest.param("", "", marks=needs_triton)])
def test_import_without_triton_and_again_in_a_notebook(first, absent):
    """macOS and Windows have no Triton: the package imports, and the references answer. A file may
    be read again."""
    done = run_python(
        "import importlib, sys", first, "import torch, kernels",
        "for name in ('kernels.dropout', 'kernels.warp', 'kernels.lora_linear', 'kernels'):",
        "    importlib.reload(sys.modules[name])",
        "x = torch.ones(1, 1, 3, 3)",
        "assert torch.equal(kernels.warp(x, torch.zeros(1, 2, 3, 3)), x)",
        "assert kernels.warp is sys.modules['kernels.warp'].warp",
        "assert bool(kernels.ABSENT) == (kernels.triton is None); print(kernels.ABSENT)")
    assert done.returncode == 0 and done.stdout == absent + "\n", done.stderr


@pytest.mark.skipif(CUDA, reason="takes minutes there")
def test_the_bench_runs(capsys):
    """At a tiny size, in the interpreter where there is no GPU."""
    bench.main()
    out = capsys.readouterr().out
    names = {"frozen", "PEFT's form", "reference", "grid_sample", "exact grid_sample"}
    names |= {"kernels"} if triton else set()
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert {row[0][2:] for row in rows if row[1] != "pass"} >= names
    assert out.count("Fastest in both directions") == 5


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64"}


class Compiles:
    """Stands for a kernel: compiles what it is launched with for `capability`, and checks it.

    tiles: rows of TILES to launch it with instead, one after the other.
    """

    def __init__(self, kernel, capability, tiles=((),)):
        self.kernel, self.capability, self.tiles = kernel, capability, tiles

    def __getitem__(self, grid):
        return self.launch

    def launch(self, num_warps=4, **values):
        for tile in self.tiles:
            *blocks, warps, stages = tile or (num_warps, 3)
            blocks = dict(zip(("BLOCK_M", "BLOCK_OUT", "BLOCK_IN"), blocks))
            self.build(values | blocks, dict(num_warps=warps, num_stages=stages))

    def build(self, values, options):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.kernel, signature, constants, aligned)
        target = GPUTarget("cuda", self.capability, 32)
        built = triton.compile(source, target=target, options=options)
        sizes = {name: value for name, value in values.items() if isinstance(value, int)}
        check_machine_code(built, self.capability, f"{self.kernel.__name__} {sizes} {options}")


def check_machine_code(built, capability, name):
    """No register spilled, no wgmma serialised, no load of 16 bits, at most 5 s of ptxas."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, out = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(built.asm["ptx"])
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        words = subprocess.run([tools / "ptxas", "-v", f"-arch={arch}", ptx, "-o", out],
                               capture_output=True, text=True, check=True).stderr
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", words)))
    assert not spilled, f"{name}: {spilled} bytes spilled"
    assert "C7512" not in words, f"{name}: wgmma is serialised"
    assert not re.search(r"ld\.global\S*\.[bu]16 ", built.asm["ptx"]), f"{name}: loads of 16 bits"
    assert seconds < 5, f"{name}: {seconds:.1f} s of ptxas"


def compile_lora(capability, dtype, x_dtype, R, dropout, tiles):
    """Compiles all that a training step of ViT-B's qkv launches, up_kernel with `tiles`."""
    file = sys.modules["kernels.lora_linear"]
    file.down_kernel = Compiles(down_kernel, capability)
    file.up_kernel = Compiles(up_kernel, capability, tiles)
    M, K, N = 8 * 197, 768, 2304
    shapes = (M, K), (N, K), (N,), (2 * R, K), (2 * K, R), (M, N)
    x, weight, bias, A, B, dy = (torch.empty(shape, device="meta") for shape in shapes)
    x, weight, dy = x.to(x_dtype), weight.to(dtype), dy.to(dtype)
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    rest = seed, 8.0, list(QV), dropout
    y, t, x = file.triton_forward(x, weight, bias, A, B, *rest)
    file.triton_backward(dy, x, weight, A, B, t, *rest, x_dtype, True)


def compile_all():
    """Some of a GPU's launches: both architectures, all dtypes, dropout on and off, three ranks."""
    lora, file = sys.modules["kernels.lora_linear"], sys.modules["kernels.warp"]
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    compile_lora(90, bf16, fp32, 32, 0.1, lora.TILES[:1])
    compile_lora(80, fp16, fp16, 4, 0.1, lora.TILES[:1])
    compile_lora(90, fp32, fp32, 16, 0.0, lora.FLOAT32_TILES[:1])
    for name in ("forward_kernel", "backward_kernel", "finish_kernel"):
        setattr(file, name, Compiles(getattr(file, name), 90))
    image, flow = (torch.empty(2, channels, 64, 64, device="meta") for channels in (1, 2))
    file.triton_forward(image, flow)
    file.triton_backward(image, image, flow, True, True)


@needs_triton
@pytest.mark.skipif(CUDA, reason="the other tests compile the kernels here")
def test_kernels_compile(tmp_path):
    """Triton's compiler and ptxas need no GPU, and refuse much that the interpreter lets pass."""
    done = run_python("import test_kernels; test_kernels.compile_all()", timeout=900,
                      TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------
# On a GPU: bfloat16, autotuned tiles, repeatability, more than 2^31 elements


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("case", [
    (1576, 768, 768, 4, QV), (1576, 768, 768, 32, QV), (333, 200, 72, 16, (True,))], ids=str)
def test_gpu_lora(case, p, dtype):
    test_lora_kernels(case, p, dtype)  # at sizes that make many tiles


@pytest.mark.gpu
@needs_gpu
def test_gpu_dispatch_and_repeatability():
    """The public functions take the kernels, and give the same bits run after run, also in the
    gradients of the image and of A."""
    image, flow, dy = warp_inputs((4, 3, 256, 256), reach=20)
    *tensors, dl = lora_inputs(8 * 197, 768, 768, 8, QV, torch.bfloat16)
    both_runs = [
        lambda: gradients(warp, (image, flow), dy, (0, 1)),
        lambda: gradients(lambda *a: lora_linear(*a, 2, QV, 0.1, 5), tensors, dl, (0, 3, 4))]
    first = [run() for run in both_runs]
    for _ in range(5):
        for results, run in zip(first, both_runs):
            assert all(torch.equal(a, b) for a, b in zip(results, run()))
    truth = gradients(grid_sample_warp, (image.double(), flow.double()), dy.double(), (0, 1))
    reference = gradients(warp_reference, (image, flow), dy, (0, 1))
    assert_as_good(first[0], reference, truth, warp_terms(image, flow, dy))
    assert kernels.TRIED and not kernels.FAILED


@pytest.mark.gpu
@needs_gpu
def test_gpu_graph_draws_masks():
    """Each replay of a CUDA graph has a mask of its own."""
    *tensors, _ = lora_inputs(8 * 197, 768, 768, 8, QV, torch.bfloat16)
    with torch.no_grad():
        lora_linear(*tensors, 2, QV, 0.5)  # compiles and tunes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_linear(*tensors, 2, QV, 0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)


@pytest.mark.gpu
@needs_gpu
def test_gpu_beyond_32_bits():
    """The last rows of a tensor of more than 2^31 elements come out as they do alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    M, K = 2**31 // 1024 + 4096, 1024
    x = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(256, K, device="cuda").bfloat16()
    x[-256:] = tail
    weight, A, B = (torch.randn(shape, device="cuda").bfloat16() * 0.05
                    for shape in ((96, K), (8, K), (64, 4)))
    y = lora_linear(x, weight, None, A, B, 2.0, QV)
    assert torch.equal(y[-256:], lora_linear(tail, weight, None, A, B, 2.0, QV))
    image = torch.randn(1, 3, 2**15, 2**15 - 8, device="cuda", dtype=torch.float16)
    flow = torch.zeros(1, 2, *image.shape[2:], device="cuda")
    assert torch.equal(warp(image, flow), image)
