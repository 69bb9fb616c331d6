"""Resampling an image along a deformation field: the spatial transformer of RegGAN.

Kong et al., "Breaking the Dilemma of Medical Image-to-image Translation", NeurIPS 2021, the resampling layer of eq. 4;
Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015, eq. 5 (bilinear sampling) and 6, 7 (its gradients).

    warp(image, flow)[y, x] = image[Y, X],   Y = clamp(y + dy, 0, H - 1),   X = clamp(x + dx, 0, W - 1)

read bilinearly from the four pixels around (Y, X): with y0 = floor(Y), x0 = floor(X), fy = Y - y0, fx = X - x0

    out = (1 - fy) ((1 - fx) v00 + fx v01) + fy ((1 - fx) v10 + fx v11)
    d out / d dy = (1 - fx) (v10 - v00) + fx (v11 - v01)        where 0 < y + dy < H - 1, else 0
    d out / d dx = (1 - fy) (v01 - v00) + fy (v11 - v10)        where 0 < x + dx < W - 1, else 0

The conventions, the same on every path. Positions are in pixels, so a zero flow is the identity and an integer flow a
shift, both exactly. A displacement that leaves the image, up to infinity, reads the border; its gradient is 0 there and on
the border itself, as in F.grid_sample. A displacement that is NaN gives NaN at that pixel of every channel and passes no
gradient: a registration network that diverges is seen at once, and no address is ever made from it.

Shapes: B batch, C channels, H x W pixels; flow (B, 2, H, W), channel 0 = dy, channel 1 = dx.
"""
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def warp_reference(image, flow):
    """`warp` in torch. image (B, C, H, W), flow (B, 2, H, W) of at least float32.

    F.grid_sample does the reading, 1.5 to 3 times faster on a CPU than gathers written out. It wants positions scaled to
    [-1, 1], and that scaling rounds: at most sizes a zero flow is no longer the identity. On a canvas whose sides are
    powers of two, (2 x + 1) / w - 1 and back is exact for every whole x, so the image is put on one if it is not
    already; the clamp keeps every position inside the image proper. `hardtanh` is a clamp whose gradient is 0 on the
    bounds too.
    """
    H, W = image.shape[-2:]
    h, w = 1 << (H - 1).bit_length(), 1 << (W - 1).bit_length()
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device).unsqueeze(1)
    cols = torch.arange(W, dtype=flow.dtype, device=flow.device)
    y = F.hardtanh(flow[:, 0] + rows, 0, H - 1)                                             # (B, H, W) pixels
    x = F.hardtanh(flow[:, 1] + cols, 0, W - 1)
    grid = torch.stack((x * (2 / w) + (1 / w - 1), y * (2 / h) + (1 / h - 1)), dim=-1)      # (B, H, W, 2)
    canvas = image.to(flow.dtype)
    if (h, w) != (H, W):
        canvas = F.pad(canvas, (0, w - W, 0, h - H))                                        # (B, C, h, w)
    with torch.autocast(flow.device.type, enabled=False):
        out = F.grid_sample(canvas, grid, padding_mode="zeros", align_corners=False)        # (B, C, H, W)
    return torch.where(torch.isnan(x + y).unsqueeze(1), torch.nan, out).to(image.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Public function


def warp(image, flow):
    """Resamples `image` along `flow`: out[b, c, y, x] = image[b, c, y + dy, x + dx], bilinear, clamped to the border.

    image: (B, C, H, W), any floating dtype; the result has its shape and dtype.
    flow: (B, 2, H, W) in pixels, channel 0 = dy (down), channel 1 = dx (right), from output to input. 16-bit flows are
    read as float32; positions and weights are never rounded to 16 bits.
    Gradients reach both. Zero flow is the identity exactly; infinite and NaN displacements: see the head of this file.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check(image, flow)
    flow = flow if flow.dtype == torch.float64 else flow.float()
    if image.dtype == torch.float64:
        flow = flow.double()
    return warp_reference(image, flow)


def check(image, flow):
    """Raises ValueError with what was expected and what was found."""
    if image.dim() != 4 or 0 in image.shape:
        raise ValueError(f"warp: expected image (B, C, H, W) without empty dimensions, found {tuple(image.shape)}")
    B, _, H, W = image.shape
    if flow.shape != (B, 2, H, W):
        raise ValueError(f"warp: expected flow {(B, 2, H, W)} for image {tuple(image.shape)}, found {tuple(flow.shape)}")
    if not image.is_floating_point() or not flow.is_floating_point():
        raise ValueError(f"warp: expected floating-point image and flow, found {image.dtype} and {flow.dtype}")
    if image.device != flow.device:
        raise ValueError(f"warp: expected image and flow on one device, found {image.device} and {flow.device}")
