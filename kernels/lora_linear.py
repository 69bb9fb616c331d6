"""A linear layer with a low-rank update: LoRA's forward and backward passes in two kernels.

Hu et al., "LoRA", ICLR 2022, eq. 3, on parts of a fused projection, as q and v of a ViT's qkv. For
each adapted part g of the output's columns, with one mask for all, keep = 1 with probability 1 - p,

    t_g = (keep * x) A_g^T      y_g = x W_g^T + b_g + s' t_g B_g^T    s' = (alpha / R) / (1 - p)
    u_g = s' dy_g B_g           dx = dy W + keep * sum_g u_g A_g
                                dA_g = u_g^T (keep * x)       dB_g = s' dy_g^T t_g

and the other parts are y = x W^T + b. Nothing is computed for the frozen W and b; x and t are kept.
At ViT-B's qkv, 64 images and R = 4, x (12608, 768) -> t (12608, 8) -> y (12608, 2304), the low-rank
part adds 0.7 % to the multiplications. What costs time is memory: MB that a pass moves there, in 16
bits, with dropout:

                       forward    backward
    frozen layer            81          81     x, W, y; then dy, W, dx
    two kernels            101         150     x once more for t; then dy of q and v, x, 10 of sums

One kernel alone would have each tile of y make t again, and draw the mask of all of its rows again:
12 times for q and v, at 128 columns a tile. So both directions make the thin product (t, u) in a
kernel of its own and store it: two launches forward, three backward. dA takes the third: in the
first u is not finished, and the second does not load x and runs only where dx is wanted.

Shapes: M rows of x (images x tokens), K inputs, N outputs in P equal parts of which G are adapted,
R rank, GR = G R. t and u are (M, GR), the groups side by side.
"""
import functools

import torch
import torch.nn.functional as F

from . import jit, kernels_run, refuse_double_backward, tl, triton, uncompiled, wants_triton
from .dropout import keep_mask, keep_tile


def adapted_parts(parts, N, R):
    """For each adapted part: its columns of y, its rows of lora_A, its rows of lora_B."""
    width = N // len(parts)
    for g, part in enumerate(part for part, adapted in enumerate(parts) if adapted):
        yield (slice(part * width, (part + 1) * width), slice(g * R, (g + 1) * R),
               slice(g * width, (g + 1) * width))


# --------------------------------------------------------------------------------------------------
# Reference


def reference_forward(x, weight, bias, lora_A, lora_B, keep, scale, parts, dropout):
    """y (M, N), t (M, GR) and x. keep: (M, K) uint8 or None. Products of width R go rank first, as
    A x^T, which a CPU does faster."""
    y, scale = F.linear(x, weight, bias), scale / (1 - dropout)                    # (M, N)
    t = (lora_A @ (x if keep is None else x * keep).t()).t()                       # (M, GR)
    for columns, rank, rows in adapted_parts(parts, len(weight), lora_B.shape[1]):
        y[:, columns].addmm_(t[:, rank], lora_B[rows].t(), alpha=scale)            # in place
    return y, t, x


def reference_backward(dy, x, weight, lora_A, lora_B, t, keep, scale, parts, dropout, dtype=None,
                       needs_dx=True):
    """dx (M, K) or None, dA (GR, K), dB (G N/P, R). dtype: for the kernels' form alone."""
    u, dB, scale = torch.empty_like(t), torch.empty_like(lora_B), scale / (1 - dropout)
    for columns, rank, rows in adapted_parts(parts, len(weight), lora_B.shape[1]):
        u[:, rank] = (lora_B[rows].t() @ dy[:, columns].t()).t()                   # (M, R)
        dB[rows] = (t[:, rank].t() @ dy[:, columns]).t()                           # (N/P, R)
    u.mul_(scale)
    dA = u.t() @ (x if keep is None else x * keep)                                 # (GR, K)
    dx = dy @ weight if needs_dx else None                                         # (M, K)
    if needs_dx:
        dx = dx.addmm_(u, lora_A) if keep is None else dx.add_((u @ lora_A).mul_(keep))
    return dx, dA, dB.mul_(scale)


# --------------------------------------------------------------------------------------------------
# Kernels
#
# First the plain one: t = x A^T for a whole number of tiles, without masks, dropout and parts. Each
# program makes BLOCK_M rows of t. It walks along K and keeps the sum in registers.


@jit()
def plain_down_kernel(
    x_ptr,  # (M, K)
    A_ptr,  # (R, K)
    t_ptr,  # (M, R) float32, written
    K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, R)
    t = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row[:, None] * K + start + k[None, :])            # (BLOCK_M, BLOCK_K)
        A_T = tl.load(A_ptr + start + k[:, None] + r[None, :] * K)            # (BLOCK_K, R)
        t = tl.dot(x, A_T, t, input_precision="ieee")
    tl.store(t_ptr + row[:, None] * R + r[None, :], t)


# Sizes are seldom whole numbers of tiles. x with M = 5, K = 20 in tiles of 4 x 8, and t with R = 2:
#
#                 step 0            step 1            step 2
#     program 0   x[0:4, 0:8]       x[0:4, 8:16]      x[0:4, 16:20] ....      -> t[0:4, 0:2]
#     program 1   x[4:5, 0:8]       x[4:5, 8:16]      x[4:5, 16:20] ....      -> t[4:5, 0:2]
#                 3 rows too many   3 rows too many   and 4 columns too many
#
# Columns beyond the last count as 0. Rows beyond the last read the last one and are not stored (the
# copy of x gets the same row again); in dA and dB they meet a t or u of 0. A tile of t has 16
# columns, 14 of them 0 and not stored: up_kernel sums over them, for which tl.dot wants 16.
#
# Two kernels make both passes in five launches: down_kernel (1 and 3) multiplies `in` by something
# thin, up_kernel (2), the large product, starts from that. A program keeps its tile in registers:
#     launch       in   makes                           in registers            walks along
#     forward 1    x    t = (keep * x) A^T              64 rows of t            K
#     forward 2    x    y = s' t B^T + x W^T + b        a tile of y             R, then K
#     backward 1   dy   u = s' dy B,  dB = s' dy^T t    128 rows of u_g, t_g    N/P, of a part
#     backward 2   dy   dx = keep * (u A) + dy W        a tile of dx            GR, then N
#     backward 3   x    dA = u^T (keep * x)             128 rows of u           K
# dB and dA are sums over all rows, of which a program has 128. At each step of the walk it stores
# its sums of the columns there; torch adds those of all programs, in a fixed order, and multiplies
# dB by s', which u has already. Strides from rank to rank (F_LOW) and from column to column (F_IN,
# F_OUT): K and 1 in lora_A, 1 and R in lora_B. Of W (W_IN, W_OUT): 1 and K, backward K and 1.
#
# The tiles of y (BLOCK_OUT 256, 16 row tiles) with the program of up_kernel that makes each. PARTS
# has a bit for each part, the lowest for the first: 0b101 adapts the parts 0 and 2. Their group is
# their place in t, lora_A and lora_B. Tiles with a + start from the low-rank product. The programs
# go down 8 rows before they go right: those that run together share rows of x and W in the cache.
#     part             0 = q                 1 = k                 2 = v
#     bit of PARTS     1: group 0            0: no group           1: group 1
#     starts from      t_0 B_0^T             0                     t_1 B_1^T
#     row tile 0     |+  0 |+  8 |+ 16 |   |  24 |  32 |  40 |   |+ 48 |+ 56 |+ 64 |
#     row tile 1     |+  1 |+  9 |+ 17 |   |  25 |  33 |  41 |   |+ 49 |+ 57 |+ 65 |
#     ...            |           ...   |   |           ...   |   |           ...   |
#     row tile 8     |+ 72 |+ 80 |+ 88 |   |  96 | 104 | 112 |   |+120 |+128 |+136 |
#
# All groups read the same x, so that forward 1 takes them as one part of rank GR, as do backward 2
# and 3; in backward 1 each reads its own columns of dy. t, u, A and B are rounded to the type of x
# before tl.dot, which adds in float32. The sizes of a layer are compile-time constants, M is not. A
# pointer that is None leaves its step out. Dropout acts on loaded tiles of x.


@jit()
def group_of(part, P: tl.constexpr, PARTS: tl.constexpr):
    """How many adapted parts stand before `part`: its place in lora_A, lora_B, t and u."""
    group = part * 0  # a tensor, which the loop adds to
    for i in tl.static_range(P):
        group += tl.where(i < part, (PARTS >> i) & 1, 0)
    return group


@jit(do_not_specialize=["M", "threshold"])  # so that another M needs no other kernel
def down_kernel(
    in_ptr,  # (M, P WIDTH): x or dy
    factor_ptr,  # lora_A, lora_B, or None
    low_ptr,  # (M, GR) float32: t or u, written if there is a factor
    copy_ptr,  # (M, K) or None, written: x in the dtype of the large product
    seed_ptr,  # one number; with row and column it gives every pass the same mask. Or None
    other_ptr,  # (M, GR) float32 or None: u or t
    sums_ptr,  # (programs, *factor) float32, written if there is another: parts of dA or dB
    threshold, scale, M,
    WIDTH: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, GR: tl.constexpr, R: tl.constexpr,
    F_IN: tl.constexpr, F_LOW: tl.constexpr,  # strides of factor: to the next column of in, rank
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """The launches forward 1, backward 1 and backward 3, for BLOCK_M rows."""
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_IN)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    pid_m, part = tl.program_id(0), tl.program_id(1)  # grid: row tiles x parts x tiles of ranks
    if ((PARTS >> part) & 1) == 0:
        return
    group = group_of(part, P, PARTS)
    first_row, rows_left = pid_m.to(tl.int64) * BLOCK_M, M - pid_m * BLOCK_M
    in_ptr += first_row * (P * WIDTH) + part * WIDTH
    in_at = tl.minimum(row, rows_left - 1)[:, None] * (P * WIDTH) + k[None, :]
    factor_at = (group * WIDTH + k[:, None]) * F_IN + r[None, :] * F_LOW
    low_at = first_row * GR + group * R + row[:, None] * GR + r[None, :]
    low_mask = (row[:, None] < rows_left) & (r[None, :] < R)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if other_ptr is not None:
        sums_ptr += pid_m.to(tl.int64) * GR * WIDTH
        other = tl.load(other_ptr + low_at, mask=low_mask, other=0.0).to(in_ptr.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK_IN):
        x = tl.load(in_ptr + start + in_at, mask=k[None, :] < WIDTH - start, other=0.0)
        factor_mask = (k[:, None] < WIDTH - start) & (r[None, :] < R)
        if copy_ptr is not None:
            x = x.to(copy_ptr.dtype.element_ty)
            tl.store(copy_ptr + first_row * WIDTH + start + in_at, x,
                     mask=k[None, :] < WIDTH - start)
        if seed_ptr is not None:
            keep = keep_tile(seed_ptr, threshold, first_row + row, start, WIDTH, BLOCK_IN)
            x = tl.where(keep, x, 0.0)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + start * F_IN + factor_at, mask=factor_mask, other=0.0)
            low = tl.dot(x, factor.to(x.dtype), low, input_precision=PRECISION)
        if other_ptr is not None:
            sums = tl.dot(x.T, other, input_precision=PRECISION)
            tl.store(sums_ptr + start * F_IN + factor_at, sums, mask=factor_mask)
    if factor_ptr is not None:
        tl.store(low_ptr + low_at, scale * low, mask=low_mask)


@jit(do_not_specialize=["M", "threshold"])
def up_kernel(
    in_ptr,  # (M, DEPTH): x or dy
    w_ptr,  # (N, K)
    bias_ptr,  # (P WIDTH,) or None
    low_ptr,  # (M, GR) float32: t or u
    factor_ptr,  # lora_B or lora_A
    out_ptr,  # (M, P WIDTH), written: y or dx
    seed_ptr,  # a number, or None without dropout
    threshold, scale, M,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr,
    GR: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    W_IN: tl.constexpr, W_OUT: tl.constexpr,  # strides of w: to the next column of in, of out
    F_LOW: tl.constexpr, F_OUT: tl.constexpr,  # strides of factor: to the next rank, column of out
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """The launches forward 2 and backward 2, for one tile of y or dx."""
    ACROSS: tl.constexpr = P * ((WIDTH + BLOCK_OUT - 1) // BLOCK_OUT)
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_OUT)
    k, r = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_R)
    pid_m, pid_n = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    pid_m, pid_n = tl.swizzle2d(pid_m, pid_n, tl.cdiv(M, BLOCK_M), ACROSS, 8)
    part, first_col = pid_n // (ACROSS // P), pid_n % (ACROSS // P) * BLOCK_OUT
    first_row, rows_left = pid_m.to(tl.int64) * BLOCK_M, M - pid_m * BLOCK_M
    in_row, inside = tl.minimum(row, rows_left - 1)[:, None], col[None, :] < WIDTH - first_col
    # The low-rank product comes first: scale and mask act on it alone, in the one accumulator.
    out = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    if (PARTS >> part) & 1:
        group = group_of(part, P, PARTS)
        low_ptr += first_row * GR + group * R
        factor_ptr += (group * WIDTH + first_col) * F_OUT
        for start in tl.static_range(0, R, BLOCK_R):
            rank = start + r
            low = tl.load(low_ptr + in_row * GR + rank[None, :], mask=rank[None, :] < R, other=0.0)
            factor = tl.load(factor_ptr + rank[:, None] * F_LOW + col[None, :] * F_OUT,
                             mask=(rank[:, None] < R) & inside, other=0.0)
            dtype = in_ptr.dtype.element_ty
            out = tl.dot(low.to(dtype), factor.to(dtype), out, input_precision=PRECISION)
    out *= scale
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, threshold, first_row + row, first_col, WIDTH, BLOCK_OUT)
        out = tl.where(keep, out, 0.0)  # in backward 2 alone: P is 1, first_col a column of x
    first_col += part * WIDTH
    in_ptr += first_row * DEPTH
    w_ptr += first_col.to(tl.int64) * W_OUT
    w_at = k[:, None] * W_IN + col[None, :] * W_OUT
    for start in range(0, DEPTH, BLOCK_IN):
        x = tl.load(in_ptr + start + in_row * DEPTH + k[None, :], mask=k[None, :] < DEPTH - start,
                    other=0.0)
        w = tl.load(w_ptr + start * W_IN + w_at, mask=(k[:, None] < DEPTH - start) & inside,
                    other=0.0)
        out = tl.dot(x, w, out, input_precision=PRECISION)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + first_col + col[None, :], mask=inside, other=0.0).to(tl.float32)
    out_ptr += first_row * (P * WIDTH) + first_col
    tl.store(out_ptr + row[:, None] * (P * WIDTH) + col[None, :], out,
             mask=(row[:, None] < rows_left) & inside)


# --------------------------------------------------------------------------------------------------
# Launches and autograd


# BLOCK_M, BLOCK_OUT, BLOCK_IN, warps (32 threads each), stages of up_kernel. The fastest is taken.
# Stages: how many slices of x and w are loaded into a multiprocessor's shared memory ahead of their
# products; Ampere holds one less. 128 x 128 x 32 in 16 bits is 3 (128 x 32 + 32 x 128) 2 = 49,152
# bytes: in the forward pass two programs fit into the 100 KB of a multiprocessor (RTX 30 to 50).
TILES = (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 4)
FLOAT32_TILES = (128, 64, 32, 8, 3), (64, 64, 32, 4, 3)


@functools.cache
def autotuned(dtype):
    configs = [triton.Config(dict(BLOCK_M=rows, BLOCK_OUT=out, BLOCK_IN=depth), warps, stages)
               for rows, out, depth, warps, stages in
               (FLOAT32_TILES if dtype == torch.float32 else TILES)]
    return triton.autotune(configs, key=["DEPTH", "WIDTH", "P", "PARTS", "R"])(up_kernel)


def up(*, in_ptr, M, WIDTH, P, **rest):
    """Runs up_kernel on as many programs as there are tiles."""
    def programs(tile):
        return (triton.cdiv(M, tile["BLOCK_M"]) * P * triton.cdiv(WIDTH, tile["BLOCK_OUT"]),)

    kernel = autotuned(in_ptr.dtype) if in_ptr.is_cuda else up_kernel
    tile = {} if in_ptr.is_cuda else dict(BLOCK_M=32, BLOCK_OUT=32, BLOCK_IN=32)  # interpreter
    kernel[programs](in_ptr=in_ptr, M=M, WIDTH=WIDTH, P=P, **tile, **rest)


def constants_of(lora_A, lora_B, parts, dropout):
    """GR, R, the bits of the parts, dropout's threshold, and the constants of every launch."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    GR, bits = len(lora_A), sum(adapted << i for i, adapted in enumerate(parts))
    common = dict(GR=GR, PRECISION="tf32" if tf32 else "ieee")
    return GR, lora_B.shape[1], bits, round(dropout * 2**16), common


def padded(rank):
    """The columns of a tile for `rank` of them: tl.dot sums over 16 at least; 64 are enough."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def triton_forward(x, weight, bias, lora_A, lora_B, seed, scale, parts, dropout):
    """y (M, N), t (M, GR) float32, and x in the dtype of weight."""
    (M, K), N, P = x.shape, len(weight), len(parts)
    y, t = weight.new_empty(M, N), x.new_empty(M, len(lora_A), dtype=torch.float32)
    copy = None if x.dtype == weight.dtype else torch.empty_like(x, dtype=weight.dtype)
    GR, R, PARTS, threshold, common = constants_of(lora_A, lora_B, parts, dropout)
    with torch.cuda.device_of(x):
        down_kernel[triton.cdiv(M, 64), 1, triton.cdiv(GR, padded(GR))](
            in_ptr=x, factor_ptr=lora_A, low_ptr=t, copy_ptr=copy, seed_ptr=seed, other_ptr=None,
            sums_ptr=None, threshold=threshold, scale=1.0, M=M, WIDTH=K, P=1, PARTS=1, R=GR,
            F_IN=1, F_LOW=K, BLOCK_M=64, BLOCK_IN=128 // weight.element_size(),
            BLOCK_R=padded(GR), **common)
        x = x if copy is None else copy
        up(in_ptr=x, w_ptr=weight, bias_ptr=bias, low_ptr=t, factor_ptr=lora_B, out_ptr=y,
           seed_ptr=None, threshold=0, scale=scale / (1 - dropout), M=M, DEPTH=K, WIDTH=N // P, P=P,
           PARTS=PARTS, R=R, W_IN=1, W_OUT=K, F_LOW=1, F_OUT=R, BLOCK_R=padded(R), **common)
    return y, t, x


def triton_backward(dy, x, weight, lora_A, lora_B, t, seed, scale, parts, dropout, dtype, needs_dx):
    """dx (M, K) in `dtype` or None, dA and dB. Sums are float32, in a fixed order."""
    (M, K), N, P, u = x.shape, len(weight), len(parts), torch.empty_like(t)
    dx, scale = torch.empty_like(x, dtype=dtype) if needs_dx else None, scale / (1 - dropout)
    GR, R, PARTS, threshold, common = constants_of(lora_A, lora_B, parts, dropout)
    # A program's sums, over 128 rows. At the sizes above each of the two takes 2.4 MB, and 19.5 at
    # rank 32, written and read once; programs of several row tiles write less, in more registers.
    dA, dB = (t.new_empty(triton.cdiv(M, 128), *factor.shape) for factor in (lora_A, lora_B))
    blocks = dict(BLOCK_M=128, BLOCK_IN=128 // weight.element_size(), num_warps=8)
    with torch.cuda.device_of(x):
        down_kernel[len(dB), P, triton.cdiv(R, padded(R))](
            in_ptr=dy, factor_ptr=lora_B, low_ptr=u, copy_ptr=None, seed_ptr=None, other_ptr=t,
            sums_ptr=dB, threshold=0, scale=scale, M=M, WIDTH=N // P, P=P, PARTS=PARTS, R=R,
            F_IN=R, F_LOW=1, BLOCK_R=padded(R), **blocks, **common)
        if needs_dx:
            up(in_ptr=dy, w_ptr=weight, bias_ptr=None, low_ptr=u, factor_ptr=lora_A, out_ptr=dx,
               seed_ptr=seed, threshold=threshold, scale=1.0, M=M, DEPTH=N, WIDTH=K, P=1, PARTS=1,
               R=GR, W_IN=K, W_OUT=1, F_LOW=K, F_OUT=1, **common,
               BLOCK_R=padded(GR) if GR <= 64 else 16)  # of 64, too many registers at 128 x 128
        down_kernel[len(dA), 1, triton.cdiv(GR, padded(GR))](
            in_ptr=x, factor_ptr=None, low_ptr=None, copy_ptr=None, seed_ptr=seed, other_ptr=u,
            sums_ptr=dA, threshold=threshold, scale=1.0, M=M, WIDTH=K, P=1, PARTS=1, R=GR,
            F_IN=1, F_LOW=K, BLOCK_R=padded(GR), **blocks, **common)
    return dx, dA.sum(0).to(lora_A.dtype), dB.sum(0).mul_(scale).to(lora_B.dtype)


class LoRAFunction(torch.autograd.Function):
    """Both forms. x is (M, K), weight in the dtype of the result. mask: the kernels' seed, the
    reference's mask, or None without dropout."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias, lora_A, lora_B, mask, *rest):
        run = triton_forward if kernels else reference_forward
        y, t, narrow = run(x, weight, bias, lora_A, lora_B, mask, *rest)
        ctx.save_for_backward(narrow, weight, lora_A, lora_B, t, mask)
        ctx.kernels, ctx.rest, ctx.dtype = kernels, rest, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, t, mask = ctx.saved_tensors
        _, needs_dx, needs_dW, needs_db = ctx.needs_input_grad[:4]
        run = triton_backward if ctx.kernels else reference_backward
        if ctx.kernels:
            dy = dy.contiguous()
            refuse_double_backward("lora_linear")
        elif torch.is_grad_enabled():  # create_graph=True: t again, with its graph
            t = reference_forward(x, weight, None, lora_A, lora_B, mask, *ctx.rest)[1]
        dx, dA, dB = run(dy, x, weight, lora_A, lora_B, t, mask, *ctx.rest, ctx.dtype, needs_dx)
        dW, db = dy.t() @ x if needs_dW else None, dy.sum(0) if needs_db else None
        return None, dx, dW, db, dA, dB, None, None, None, None


# --------------------------------------------------------------------------------------------------
# Public function


def lora_linear(x, weight, bias, lora_A, lora_B, scale, parts=(True,), dropout=0.0, seed=None, *,
                kernels=None):
    """y = x weight^T + bias, plus scale * D(x) A_g^T B_g^T on the columns of each adapted part g.

    x: (..., K). weight: (N, K), bias: (N,) or None: frozen, with a gradient if they ask for one.
    lora_A: (GR, K), lora_B: (G N/P, R): the groups' factors one below the other. scale: alpha / R.
    parts: P truth values, G of them true; part i is columns i N/P to (i+1) N/P.
    dropout: probability in [0, 1) of dropping an element of x on its way to A; 0 in evaluation.
    seed: a number or a tensor of one, modulo 2^31, fixes the mask: one for the kernels and another
    for the reference. None: of the GPU's or the CPU's generator, which processes must seed apart.
    kernels: whether the kernels or the reference run; None: on CUDA, to rank 64, if they run.
    Returns (..., N) in x's dtype, or autocast's; lora_A, lora_B and under autocast the weight may
    have any. Raises ValueError for what does not fit, RuntimeError for forward-mode derivatives and
    for second ones of the kernels.
    """
    check(x, weight, bias, lora_A, lora_B, parts, dropout)
    shape, dtype, parts = x.shape, x.dtype, tuple(bool(part) for part in parts)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif weight.dtype != dtype:
        raise ValueError(f"lora_linear: expected weight of x's dtype {dtype}, found {weight.dtype}")
    tensors = [None if tensor is None else tensor.contiguous() for tensor in
               (x.reshape(-1, shape[-1]), weight.to(dtype), bias, lora_A, lora_B)]
    if kernels is None:
        kernels = (wants_triton(x) and x.dtype != torch.float64 and x.numel() > 0
                   and lora_B.shape[1] <= 64
                   and kernels_run("lora_linear", by_kernels, tensors, 0, scale, parts, dropout))
    if kernels:
        y = by_kernels(*tensors, seed, scale, parts, dropout)
    else:
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        keep = keep_mask(tensors[0].detach(), dropout, draw(seed, None)) if dropout else None
        y = LoRAFunction.apply(False, *tensors, keep, scale, parts, dropout)
    return y.view(*shape[:-1], len(weight))


def draw(seed, device):
    """`seed` as a tensor, modulo 2^31; a new one for None."""
    if seed is None:
        return torch.randint(2**31, (), device=device)
    return torch.as_tensor(seed % 2**31, dtype=torch.int64, device=device)


@uncompiled
def by_kernels(*inputs):
    *tensors, seed, scale, parts, dropout = inputs
    seed = draw(seed, tensors[0].device) if dropout else None
    return LoRAFunction.apply(True, *tensors, seed, scale, parts, dropout)


lora_linear_reference = functools.partial(lora_linear, kernels=False)
lora_linear_triton = functools.partial(lora_linear, kernels=True)  # CPU: with TRITON_INTERPRET=1


def check(x, weight, bias, lora_A, lora_B, parts, dropout):
    """Raises ValueError with what was expected and what was found."""
    P, G, R = len(parts), sum(map(bool, parts)), lora_B.shape[-1] if lora_B.dim() else 0
    if G == 0 or not 0 <= dropout < 1 or weight.dim() != 2 or len(weight) % P or x.dim() < 1:
        raise ValueError("lora_linear: expected at least one adapted part, dropout in [0, 1), "
                         f"x (..., K) and weight (N, K) with N a multiple of {P}, found "
                         f"{tuple(parts)}, {dropout}, {tuple(x.shape)} and {tuple(weight.shape)}")
    N, K = weight.shape
    shapes = (*x.shape[:-1], K), (N, K), (N,), (G * N // P, R), (G * R, K)
    for name, tensor, shape in zip(("x", "weight", "bias", "lora_B", "lora_A"),
                                   (x, weight, bias, lora_B, lora_A), shapes):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()
                                   or tensor.device != x.device):
            raise ValueError(f"lora_linear: expected {name} {tuple(shape)}, floating-point, on "
                             f"{x.device} (rank {R}, {G} of {P} parts), found "
                             f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}")
