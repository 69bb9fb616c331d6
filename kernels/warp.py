"""Resampling an image along a deformation field: the spatial transformer of RegGAN.

Kong et al., "Breaking the Dilemma of Medical Image-to-image Translation", NeurIPS 2021, the
resampling layer of eq. 4; Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015, eq. 5
(bilinear sampling) and 6, 7 (its gradients).

    warp(image, flow)[y, x] = image[Y, X]
    Y = clamp(y + dy, 0, H - 1)        X = clamp(x + dx, 0, W - 1)

read bilinearly from four pixels: with y0 = floor(Y), x0 = floor(X), fy = Y - y0, fx = X - x0

    out = (1 - fy) ((1 - fx) v00 + fx v01) + fy ((1 - fx) v10 + fx v11)
    d out / d dy = (1 - fx) (v10 - v00) + fx (v11 - v01)        where 0 < y + dy < H - 1, else 0
    d out / d dx = (1 - fy) (v01 - v00) + fy (v11 - v10)        where 0 < x + dx < W - 1, else 0;
    at a whole position it is the derivative to the right, or downwards

On paper, one pixel of a 3 x 3 image with flow[1, 1] = (dy, dx) = (-0.5, 0.5), up and to the right:

    1   2   3     It reads at (1 - 0.5, 1 + 0.5) = (0.5, 1.5), the *. y0 = 0, x0 = 1, fy = fx = 0.5.
          *       out[1, 1] = 0.5 (0.5 * 2 + 0.5 * 3) + 0.5 (0.5 * 5 + 0.5 * 6) = 4
    4   5   6     d out / d dy = 0.5 (5 - 2) + 0.5 (6 - 3) = 3, as rows are 3 apart, and
    7   8   9     d out / d dx = 0.5 (3 - 2) + 0.5 (6 - 5) = 1, as columns are 1 apart

    2   3   3     With flow (0, 1) everywhere each pixel reads its right neighbour: the picture
    5   6   6     moves to the left, against the arrows of the flow, since these point from the
    8   9   9     result to the image. The last column reads the border.

On every path a zero flow is the identity and a whole flow a shift, both exactly. A displacement
that leaves the image, up to infinity, reads the border; its gradient is 0 there and on the border
itself, as in F.grid_sample. A displacement that is NaN gives NaN at that pixel of every channel and
passes no gradient: a registration network that diverges is seen at once.

As separate operations the grid, the sum, its scaling and the clamp are some 10 passes over B H W
numbers. Here a position lives in registers: with one channel of float32 the forward pass moves 16
bytes a pixel (flow 8, image 4, result 4), the backward pass 64, of which int64 sums take 32.

Exercise 3 of tests/exercises.md writes the reference; tests/debug_kernel.md has a fault to find.
Shapes: B batch, C channels, H x W pixels; flow (B, 2, H, W), channel 0 = dy, channel 1 = dx.
"""
import torch
import torch.nn.functional as F

from . import jit, kernels_run, refuse_double_backward, tl, triton, uncompiled, wants_triton

# A kernel runs as a grid of programs, each on BLOCK pixels at once: pointer + offsets are addresses
# of which `mask` says which to use; None and constexpr are decided when it compiles. A program has
# 128 threads. With 1024 pixels the backward pass runs out of registers; each trial of autotuning
# would add its sums once more.
FORWARD_BLOCK, BACKWARD_BLOCK, FINISH_BLOCK = 512, 128, 1024

# --------------------------------------------------------------------------------------------------
# Reference


def places(flow):
    """Y and X of the formula, (B, 1, H, W) each. `hardtanh` is a clamp that keeps NaN, and whose
    gradient is 0 on the bounds, too."""
    H, W = flow.shape[-2:]
    rows, cols = (torch.arange(n, dtype=flow.dtype, device=flow.device) for n in (H, W))
    return (F.hardtanh(flow[:, :1] + rows[:, None], 0, H - 1),
            F.hardtanh(flow[:, 1:] + cols, 0, W - 1))


def warp_reference(image, flow):
    """`warp` by the formula above. image (B, C, H, W), flow (B, 2, H, W) of at least float32.

    Its gradient, by autograd: with g = d loss / d out, g w is added to each of the four pixels that
    were read, w being its weight (`gather` becomes a scatter); the flow's comes through fy and fx.
    """
    (H, W), nan = image.shape[-2:], flow.isnan().any(1, keepdim=True)
    y, x = places(flow.masked_fill(nan, 0))                                        # (B, 1, H, W)
    y0, x0 = y.long(), x.long()
    y1, x1, fy, fx = (y0 + 1).clamp_max(H - 1), (x0 + 1).clamp_max(W - 1), y - y0, x - x0

    def read(y, x):                                                                # (B, C, H, W)
        at = (y * W + x).expand_as(image).flatten(2)
        return image.flatten(2).gather(2, at).view_as(image)

    above = (1 - fx) * read(y0, x0) + fx * read(y0, x1)
    below = (1 - fx) * read(y1, x0) + fx * read(y1, x1)
    return ((1 - fy) * above + fy * below).masked_fill(nan, torch.nan).to(image.dtype)


def warp_by_grid_sample(image, flow):
    """The same, faster on a CPU (kernels.bench): what runs where the kernels do not.

    F.grid_sample wants positions scaled to [-1, 1], and that scaling rounds: at most sizes a zero
    flow is no longer the identity. On a canvas whose sides are powers of two, (2 x + 1) / w - 1 and
    back is exact for every whole x, so the image is put on one. Its zeros get no weight, by the
    clamp. Zero padding checks the bounds of each read, at NaN too, where "border" crashes.
    """
    (H, W), nan = image.shape[-2:], flow.isnan().any(1, keepdim=True)
    y, x = places(flow.masked_fill(nan, 0))
    h, w = 1 << (H - 1).bit_length(), 1 << (W - 1).bit_length()
    grid = torch.stack((x * (2 / w) + (1 / w - 1), y * (2 / h) + (1 / h - 1)), -1)
    canvas = image.to(flow.dtype)
    if (h, w) != (H, W):
        canvas = F.pad(canvas, (0, w - W, 0, h - H))                               # (B, C, h, w)
    with torch.autocast(flow.device.type, enabled=False):  # it would round float64
        out = F.grid_sample(canvas, grid.squeeze(1), padding_mode="zeros", align_corners=False)
    return out.masked_fill(nan, torch.nan).to(image.dtype)


# --------------------------------------------------------------------------------------------------
# Forward kernel


@jit()
def position(flow_ptr, sample, pixel, valid, H, W):
    """Where output pixels read: the top-left neighbour's index, the steps to the right and to the
    lower one, the fractions, whether each gradient flows, and whether the position is NaN."""
    flow_ptr += sample * 2 * H * W
    y = (pixel // W).to(tl.float32) + tl.load(flow_ptr + pixel, mask=valid, other=0.0)
    x = (pixel % W).to(tl.float32) + tl.load(flow_ptr + H * W + pixel, mask=valid, other=0.0)
    nan = (y != y) | (x != x)  # NaN alone differs from itself
    inside_y, inside_x = (y > 0) & (y < H - 1), (x > 0) & (x < W - 1)
    # y.clamp(0, H - 1) comes before the conversion to int, which is undefined for NaN and for
    # numbers that do not fit
    y = tl.minimum(tl.maximum(tl.where(nan, 0.0, y), 0.0), H - 1)
    x = tl.minimum(tl.maximum(tl.where(nan, 0.0, x), 0.0), W - 1)
    y0, x0 = y.to(tl.int32), x.to(tl.int32)
    # a pixel on the border is its own neighbour
    right, down = tl.where(x0 < W - 1, 1, 0), tl.where(y0 < H - 1, W, 0)
    return y0 * W + x0, right, down, y - y0, x - x0, inside_y, inside_x, nan


@jit()
def forward_kernel(
    image_ptr,  # (B, C, H, W)
    flow_ptr,  # (B, 2, H, W)
    out_ptr,  # (B, C, H, W), written
    C, H, W,
    BLOCK: tl.constexpr,
):
    """A program resamples BLOCK pixels of one sample, in every channel."""
    tiles = tl.cdiv(H * W, BLOCK)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    at, right, down, fy, fx, _, _, nan = position(flow_ptr, sample, pixel, valid, H, W)
    for c in range(C):
        plane = (sample * C + c) * H * W
        corner_ptr = image_ptr + plane + at
        v00 = tl.load(corner_ptr, mask=valid).to(tl.float32)
        v01 = tl.load(corner_ptr + right, mask=valid).to(tl.float32)
        v10 = tl.load(corner_ptr + down, mask=valid).to(tl.float32)
        v11 = tl.load(corner_ptr + down + right, mask=valid).to(tl.float32)
        value = (1 - fy) * ((1 - fx) * v00 + fx * v01) + fy * ((1 - fx) * v10 + fx * v11)
        tl.store(out_ptr + plane + pixel, tl.where(nan, float("nan"), value), mask=valid)


# --------------------------------------------------------------------------------------------------
# Backward kernels
#
# The gradient of the image is a scatter: every output pixel adds g w to the four pixels that it
# read, and any number of pixels may have read the same one. Float atomics add in the order of
# arrival, so that F.grid_sample's CUDA backward differs from run to run. The sum of integers does
# not depend on the order: each addend is multiplied by 2^k, truncated to int64 and added; one last
# pass divides.
#
# Range. Let amax = max |g| over a plane, e its exponent, amax < 2^e <= 2 amax, h = ceil(log2(H W)).
# An output pixel adds at most amax to one place (its four weights sum to 1), so that at most
# 2^(h+e) 2^k may gather anywhere. k = 62 - h - e keeps that at 2^62: no flow, however it folds the
# image, overflows. k is at most 126, where 2^-k is still a normal float32 (amax near 0).
# On paper: 256 x 256 pixels, amax 0.75. Then h = 16, e = 0 (0.75 < 2^0) and k = 62 - 16 - 0 = 46.
# An addend g w = 0.3 is 10066330 / 2^25 in float32, and 10066330 * 2^21 as an integer: nothing is
# lost. If all 2^16 pixels read one place with amax, its sum is 2^16 * 0.75 * 2^46 < 2^62.
# Error. Truncation loses less than 2^-k an addend, which below k = 126 is at most 2^(h-61) amax:
# 2^-45 amax at 256 x 256. The sum is exact, and rounded once to float32. A float sum loses up to
# 2^-24 S an addend, S its largest partial sum: more than ours, unless S < 2^(h-37) amax.
# Infinity and NaN in g (a loss scaler looks for them) have no integer: they make the image gradient
# of that plane NaN.


@jit()
def fixed_point(amax, h, SIGN: tl.constexpr):
    """2^(SIGN k), whose exponent bits are 127 + SIGN k, and whether amax is finite."""
    biased = (amax.to(tl.int32, bitcast=True) >> 23) & 255                       # e = biased - 126
    k = tl.minimum(62 - h - (biased - 126), 126)
    return ((127 + SIGN * k) << 23).to(tl.float32, bitcast=True), biased < 255


@jit()
def backward_kernel(
    dout_ptr,  # (B, C, H, W)
    image_ptr,  # (B, C, H, W)
    flow_ptr,  # (B, 2, H, W)
    amax_ptr,  # (B, C) or None
    total_ptr,  # (B, C, H, W) int64 or None, added to: the image's gradient times 2^k
    dflow_ptr,  # (B, 2, H, W) or None, written
    C, H, W, h,
    BLOCK: tl.constexpr,
):
    """A program finds the gradients that are wanted, of BLOCK output pixels in every channel."""
    tiles = tl.cdiv(H * W, BLOCK)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    at, right, down, fy, fx, inside_y, inside_x, nan = position(
        flow_ptr, sample, pixel, valid, H, W)
    gy, gx = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)  # gradients of dy, dx
    for c in range(C):
        plane = (sample * C + c) * H * W
        g = tl.load(dout_ptr + plane + pixel, mask=valid, other=0.0).to(tl.float32)
        g = tl.where(nan, 0.0, g)
        if dflow_ptr is not None:
            corner_ptr = image_ptr + plane + at
            v00 = tl.load(corner_ptr, mask=valid).to(tl.float32)
            v01 = tl.load(corner_ptr + right, mask=valid).to(tl.float32)
            v10 = tl.load(corner_ptr + down, mask=valid).to(tl.float32)
            v11 = tl.load(corner_ptr + down + right, mask=valid).to(tl.float32)
            gy += g * ((1 - fx) * (v10 - v00) + fx * (v11 - v01))
            gx += g * ((1 - fy) * (v01 - v00) + fy * (v11 - v10))
        if total_ptr is not None:
            scale, finite = fixed_point(tl.load(amax_ptr + sample * C + c), h, 1)
            g = tl.where(finite, g * scale, 0.0)
            # total.index_add_(at + ..., g * weight), without adding zeros
            adds = valid & (g != 0)
            adds_right, adds_down = adds & (g * fx != 0), adds & (g * fy != 0)
            here = total_ptr + plane + at
            add(here, g * (1 - fy) * (1 - fx), adds)
            add(here + right, g * (1 - fy) * fx, adds_right)
            add(here + down, g * fy * (1 - fx), adds_down)
            add(here + down + right, g * fy * fx, adds_right & adds_down)
    if dflow_ptr is not None:
        dflow_ptr += sample * 2 * H * W + pixel
        tl.store(dflow_ptr, tl.where(inside_y & (nan == 0), gy, 0.0), mask=valid)
        tl.store(dflow_ptr + H * W, tl.where(inside_x & (nan == 0), gx, 0.0), mask=valid)


@jit()
def add(total_ptr, value, mask):
    tl.atomic_add(total_ptr, value.to(tl.int64), mask=mask, sem="relaxed")  # in any order


@jit()
def finish_kernel(
    total_ptr,  # (B, C, H, W) int64
    amax_ptr,  # (B, C)
    dimage_ptr,  # (B, C, H, W), written
    HW, h,
    BLOCK: tl.constexpr,
):
    """dimage = total / 2^k, in the image's dtype."""
    tiles = tl.cdiv(HW, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    scale, finite = fixed_point(tl.load(amax_ptr + plane), h, -1)
    value = tl.load(total_ptr + plane * HW + pixel, mask=pixel < HW, other=0).to(tl.float32) * scale
    value = tl.where(finite, value, float("nan"))
    tl.store(dimage_ptr + plane * HW + pixel, value, mask=pixel < HW)


# --------------------------------------------------------------------------------------------------
# Launches and autograd


def triton_forward(image, flow):
    """The warped image. image float32, float16 or bfloat16; flow float32; both contiguous."""
    (B, C, H, W), out = image.shape, torch.empty_like(image)
    with torch.cuda.device_of(image):
        forward_kernel[(B * triton.cdiv(H * W, FORWARD_BLOCK),)](
            image_ptr=image, flow_ptr=flow, out_ptr=out, C=C, H=H, W=W, BLOCK=FORWARD_BLOCK)
    return out


def triton_backward(dout, image, flow, needs_image, needs_flow):
    """The gradients of image and flow, None where they are not needed."""
    (B, C, H, W), h = image.shape, (image[0, 0].numel() - 1).bit_length()
    dimage = torch.empty_like(image) if needs_image else None
    dflow = torch.empty_like(flow) if needs_flow else None
    amax = total = None
    if needs_image:
        amax = torch.linalg.vector_norm(dout, torch.inf, dim=(2, 3), dtype=torch.float32)  # (B, C)
        total = torch.zeros(image.shape, dtype=torch.int64, device=image.device)
    with torch.cuda.device_of(image):
        backward_kernel[(B * triton.cdiv(H * W, BACKWARD_BLOCK),)](
            dout_ptr=dout, image_ptr=image, flow_ptr=flow, amax_ptr=amax, total_ptr=total,
            dflow_ptr=dflow, C=C, H=H, W=W, h=h, BLOCK=BACKWARD_BLOCK)
        if needs_image:
            finish_kernel[(B * C * triton.cdiv(H * W, FINISH_BLOCK),)](
                total_ptr=total, amax_ptr=amax, dimage_ptr=dimage, HW=H * W, h=h,
                BLOCK=FINISH_BLOCK)
    return dimage, dflow


class TritonFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, flow):
        ctx.save_for_backward(image, flow)
        return triton_forward(image, flow)

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("warp")
        return triton_backward(dout.contiguous(), *ctx.saved_tensors, *ctx.needs_input_grad)


@uncompiled
def warp_triton(image, flow):
    """`warp` by the kernels, on a CPU with TRITON_INTERPRET=1. flow float32, image at most that."""
    return TritonFunction.apply(image.contiguous(), flow.contiguous())


# --------------------------------------------------------------------------------------------------
# Public function


def warp(image, flow):
    """Resamples `image` along `flow`, bilinearly, with positions clamped to the border:
    out[b, c, y, x] = image[b, c, y + dy, x + dx]. Gradients reach both.

    image: (B, C, H, W), any floating dtype; the result has its shape and dtype.
    flow: (B, 2, H, W) in pixels, channel 0 = dy (down), channel 1 = dx (right), from output to
    input. 16-bit flows are read as float32: bfloat16 positions have no fractions from 128 on.
    Raises ValueError for shapes, dtypes or devices that do not fit, and RuntimeError where the
    kernels are to be differentiated twice or in forward mode.
    """
    check(image, flow)
    flow = flow.to(torch.promote_types(torch.promote_types(flow.dtype, image.dtype), torch.float32))
    if (wants_triton(image) and flow.dtype == torch.float32 and image[0, 0].numel() <= 2**30
            and kernels_run("warp", warp_triton, (image, flow))):
        return warp_triton(image, flow)
    return warp_by_grid_sample(image, flow)


def check(image, flow):
    """Raises ValueError with what was expected and what was found."""
    shape = (image.shape[0], 2, *image.shape[2:]) if image.dim() == 4 else None
    if (flow.shape != shape or 0 in image.shape or image.device != flow.device
            or not image.is_floating_point() or not flow.is_floating_point()):
        raise ValueError(
            "warp: expected image (B, C, H, W), not empty, and flow (B, 2, H, W), both "
            f"floating-point and on one device, found {tuple(image.shape)}, {image.dtype}, on "
            f"{image.device}, and {tuple(flow.shape)}, {flow.dtype}, on {flow.device}")
