"""A linear layer with a low-rank update, in one pass over its input.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. 3, with the groups of a fused projection
(loralib's MergedLinear: q and v of a ViT's qkv are adapted, k is not). For each adapted part g of the output's columns

    y_g = x W_g^T + b_g + s D(x) A_g^T B_g^T        D(x) = keep * x / (1 - p): one mask for all groups, P[keep] = 1 - p

and for the parts that are not adapted y = x W^T + b. Backward, with t_g = D(x) A_g^T and u_g = s dy_g B_g, both of width R:

    dx = dy W + sum_g keep / (1 - p) * (u_g A_g)        dA_g = u_g^T D(x)        dB_g = s dy_g^T t_g

Nothing is computed for the frozen W and b, and nothing of the size of x or y is kept but x itself. The low-rank part adds
R (G K + G N / P) to M rows' N K multiplications each, 0.7 % at ViT-B's qkv and R = 4, yet written with separate operations
it reads x twice more, writes D(x) and a mask, and writes, reads and adds a delta as large as the adapted part of y. Here x
is read once (with dropout once more) and y is written once; backward likewise, with dy and dx.

Shapes: M rows of x (images x tokens), K inputs, N outputs in P equal parts of which G are adapted, R rank.
"""
import functools

import torch
import torch.nn.functional as F

from . import jit, tl, triton, wants_triton
from .dropout import keep_mask, keep_tile, padded, times_dropped, times_dropped_transposed


def adapted_parts(parts, N, R):
    """For each adapted part: its columns of y, its rows of lora_A, its rows of lora_B."""
    width = N // len(parts)
    for g, part in enumerate(i for i, adapted in enumerate(parts) if adapted):
        yield slice(part * width, (part + 1) * width), slice(g * R, (g + 1) * R), slice(g * width, (g + 1) * width)


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def reference_forward(x, weight, bias, lora_A, lora_B, scale, parts, keep):
    """y (M, N) and t (G*R, M). `keep` (M, K) uint8 or None; 1 / (1 - p) is part of `scale`.

    The products of width R are formed rank first, (R, K) x (K, M): 2 to 10 times faster on a CPU than (M, K) x (K, R).
    """
    y = F.linear(x, weight, bias)                                                           # (M, N)
    t = lora_A @ (x if keep is None else x * keep).t()                                      # (G*R, M)
    for columns, rank, rows in adapted_parts(parts, len(weight), lora_B.shape[1]):
        y[:, columns].addmm_(t[rank].t(), lora_B[rows].t(), alpha=scale)                    # no delta of y's size
    return y, t


def reference_backward(dy, x, weight, lora_A, lora_B, t, scale, parts, keep, needs_dx=True):
    """dx (M, K) or None, dA (G*R, K), dB (G*N/P, R) of the forward above."""
    u, dB = torch.empty_like(t), torch.empty_like(lora_B)
    for columns, rank, rows in adapted_parts(parts, len(weight), lora_B.shape[1]):
        u[rank] = lora_B[rows].t() @ dy[:, columns].t()                                     # (R, M)
        dB[rows] = (t[rank] @ dy[:, columns]).t()                                           # (R, N/P) transposed
    u.mul_(scale)
    dA = u @ (x if keep is None else x * keep)                                              # (G*R, K)
    dx = None
    if needs_dx:
        dx = dy @ weight                                                                    # (M, K)
        dx = dx.addmm_(u.t(), lora_A) if keep is None else dx.add_((u.t() @ lora_A).mul_(keep))
    return dx, dA, dB.mul_(scale)


# ---------------------------------------------------------------------------------------------------------------------
# Forward kernels
#
# N, K, R and the parts are compile-time constants (a model has few), M is not. PARTS has a bit for each part. Column tiles
# are laid out part by part, so none straddles a boundary, and k's tiles take the branch without LoRA.
# Rows of x and W beyond the end are clamped to the last one, which costs nothing in the loop; they are masked on storing.


@jit()
def products(x, w, a, row, col, K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WITH_A: tl.constexpr):
    """x W^T and, WITH_A, x A^T in one pass over a tile of x rows: (BLOCK_M, BLOCK_N) and (BLOCK_M, BLOCK_R) float32."""
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    x_at, w_at, a_at = row[:, None] * K + k[None, :], col[None, :] * K + k[:, None], r[None, :] * K + k[:, None]
    acc, t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x_tile, w_tile = tl.load(x + x_at), tl.load(w + w_at)
        else:
            x_tile = tl.load(x + x_at, mask=k[None, :] < K - start, other=0.0)
            w_tile = tl.load(w + w_at, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        if WITH_A:
            a_tile = tl.load(a + a_at, mask=(r[None, :] < R) & (k[:, None] < K - start), other=0.0)
            t = tl.dot(x_tile, a_tile, t, input_precision="ieee")
        x += BLOCK_K
        w += BLOCK_K
        a += BLOCK_K
    return acc, t


@jit(do_not_specialize=["M"])
def forward_kernel(x, w, bias, a, b, t, y, scale, M, M_LOG2: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                   R: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, MAKE_T: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program makes one tile of y, and writes it once. t (G*R, M) float32 is made here (MAKE_T) or read."""
    WIDTH: tl.constexpr = N // P
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tiles_m, pid = tl.cdiv(M, BLOCK_M), tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // (P * TILES), pid % (P * TILES), tiles_m, P * TILES, 8)
    part, tile = pid_n // TILES, pid_n % TILES
    adapted, group = (PARTS >> part) & 1, part * 0
    for i in tl.static_range(P):
        group += tl.where(i < part, (PARTS >> i) & 1, 0)
    first_row, first_col = (pid_m * BLOCK_M).to(tl.int64), (part * WIDTH + tile * BLOCK_N).to(tl.int64)
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows_left, cols_left = M - pid_m * BLOCK_M, WIDTH - tile * BLOCK_N
    x += first_row * K
    w += first_col * K
    a += group * R * K
    x_row, w_row = tl.minimum(row, rows_left - 1), tl.minimum(col, cols_left - 1)
    # y[:, columns] = F.linear(x, weight, bias) + scale * t[rank].t() @ lora_B[rows].t()
    if adapted:
        acc, t_tile = products(x, w, a, x_row, w_row, K, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, MAKE_T)
        r = tl.arange(0, BLOCK_R)
        t_at = t + first_row + (group * R + r).to(tl.int64)[None, :] * M + row[:, None]
        t_mask = (r[None, :] < R) & (row[:, None] < rows_left)
        if not MAKE_T:
            t_tile = tl.load(t_at, mask=t_mask, other=0.0)
        elif tile == 0:
            tl.store(t_at, t_tile, mask=t_mask)
        b_at = b + (group * WIDTH + tile * BLOCK_N + col)[None, :] * R + r[:, None]
        b_tile = tl.load(b_at, mask=(r[:, None] < R) & (col[None, :] < cols_left), other=0.0)
        acc = tl.dot((scale * t_tile).to(b_tile.dtype), b_tile, acc, input_precision="ieee")
    else:
        acc, t_tile = products(x, w, a, x_row, w_row, K, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, False)
    if HAS_BIAS:
        acc += tl.load(bias + first_col + col, mask=col < cols_left, other=0.0).to(tl.float32)[None, :]
    y += first_row * N + first_col
    tl.store(y + row[:, None] * N + col[None, :], acc, mask=(row[:, None] < rows_left) & (col[None, :] < cols_left))


# ---------------------------------------------------------------------------------------------------------------------
# Backward kernels


@jit(do_not_specialize=["M", "seed", "threshold"])
def dx_kernel(dy, w, a, b, dx, u, seed, threshold, scale, M, M_LOG2: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
              R: tl.constexpr, G: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, DROPOUT: tl.constexpr,
              MAKE_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              BLOCK_R: tl.constexpr):
    """A program makes one tile of dx. u (G*R, M) float32, the groups' ranks side by side: made here (MAKE_U) or read."""
    WIDTH: tl.constexpr = N // P
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid_m, pid_k = tl.swizzle2d(tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.cdiv(M, BLOCK_M), TILES, 8)
    first_row, rows_left = (pid_m * BLOCK_M).to(tl.int64), M - pid_m * BLOCK_M
    row, k, n, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    dy += first_row * N
    w += pid_k * BLOCK_K
    a += pid_k * BLOCK_K
    k_mask = k[None, :] < K - pid_k * BLOCK_K
    dy_at, w_at = tl.minimum(row, rows_left - 1)[:, None] * N + n[None, :], n[:, None] * K + k[None, :]
    acc, u_tile, group = tl.zeros((BLOCK_M, BLOCK_K), tl.float32), tl.zeros((BLOCK_M, BLOCK_R), tl.float32), 0
    for part in tl.static_range(P):
        for start in range(0, WIDTH, BLOCK_N):
            if WIDTH % BLOCK_N == 0 and K % BLOCK_K == 0:
                dy_tile, w_tile = tl.load(dy + start + dy_at), tl.load(w + start * K + w_at)
            else:
                dy_tile = tl.load(dy + start + dy_at, mask=n[None, :] < WIDTH - start, other=0.0)
                w_tile = tl.load(w + start * K + w_at, mask=(n[:, None] < WIDTH - start) & k_mask, other=0.0)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")
            if MAKE_U and (PARTS >> part) & 1:
                own = (r[None, :] // R == group) & (n[:, None] < WIDTH - start)
                b_tile = tl.load(b + (start + n)[:, None] * R + (r - group * R)[None, :], mask=own, other=0.0)
                u_tile = tl.dot(dy_tile, b_tile, u_tile, input_precision="ieee")
        dy += WIDTH
        w += WIDTH * K
        if (PARTS >> part) & 1:
            b += WIDTH * R
            group += 1
    # dx += keep * (u.t() @ lora_A)
    for start in tl.static_range(0, G * R, BLOCK_R):
        u_at = u + first_row + (start + r).to(tl.int64)[None, :] * M + row[:, None]
        u_mask = (start + r[None, :] < G * R) & (row[:, None] < rows_left)
        if not MAKE_U:
            u_tile = tl.load(u_at, mask=u_mask, other=0.0)
        else:
            u_tile *= scale
            if pid_k == 0:
                tl.store(u_at, u_tile, mask=u_mask)
        a_tile = tl.load(a + (start + r)[:, None] * K + k[None, :], mask=(start + r[:, None] < G * R) & k_mask, other=0.0)
        if DROPOUT:
            keep = keep_tile(seed, threshold, first_row + row, pid_k * BLOCK_K, K, BLOCK_K)
            acc += tl.where(keep, tl.dot(u_tile.to(a_tile.dtype), a_tile, input_precision="ieee"), 0.0)
        else:
            acc = tl.dot(u_tile.to(a_tile.dtype), a_tile, acc, input_precision="ieee")
    dx += first_row * K + pid_k * BLOCK_K
    tl.store(dx + row[:, None] * K + k[None, :], acc, mask=(row[:, None] < rows_left) & k_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


@functools.cache
def autotuned(kernel):
    """The kernel with its block shapes chosen by trial, once for each shape. Made on first use: it needs a GPU."""
    shapes = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4), (64, 64, 32, 4, 4)]
    names, flags = ("BLOCK_M", "BLOCK_N", "BLOCK_K"), ["MAKE_T"]
    if kernel is dx_kernel:  # tiles of M x K, a loop over N
        names, flags = ("BLOCK_M", "BLOCK_K", "BLOCK_N"), ["MAKE_U", "DROPOUT"]
    configs = [triton.Config(dict(zip(names, blocks)), num_warps=w, num_stages=s) for *blocks, w, s in shapes]
    return triton.autotune(configs, key=["M_LOG2", "N", "K", "R", "PARTS", *flags])(kernel)


def launch(kernel, tiles, *args, **constants):
    """Runs forward_kernel or dx_kernel on `tiles(blocks)` programs."""
    if args[0].is_cuda:
        autotuned(kernel)[lambda blocks: (tiles(blocks),)](*args, **constants)
    else:  # interpreter
        blocks = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
        kernel[(tiles(blocks),)](*args, **constants, **blocks)


def constants_of(x, weight, lora_B, parts):
    """M_LOG2 has the blocks tuned again where M doubles."""
    return dict(M_LOG2=(len(x) - 1).bit_length(), N=len(weight), K=x.shape[1], R=lora_B.shape[1], P=len(parts),
                PARTS=sum(adapted << i for i, adapted in enumerate(parts)))


def triton_forward(x, weight, bias, lora_A, lora_B, scale, parts, threshold, seed):
    """As reference_forward, with the mask made inside: an element is kept if its 31 random bits reach `threshold`.

    With dropout, t has a kernel of its own. In the main kernel every column tile would draw the mask of its rows anew, 12
    times over for ViT-B's q and v, and drawing costs several times what the tensor cores take for the tile. Drawn once,
    it is one more reading of x, which leaves x in the L2 cache for the main kernel.
    """
    M, N, y = len(x), len(weight), x.new_empty(len(x), len(weight))
    with torch.cuda.device_of(x):
        if threshold:
            t = times_dropped_transposed(lora_A, x, threshold, seed)
        else:
            t = x.new_empty(len(lora_A), M, dtype=torch.float32)
        launch(forward_kernel, lambda blocks: (triton.cdiv(M, blocks["BLOCK_M"]) * len(parts)
                                               * triton.cdiv(N // len(parts), blocks["BLOCK_N"])),
               x, weight, weight if bias is None else bias, lora_A, lora_B, t, y, scale, M, HAS_BIAS=bias is not None,
               MAKE_T=not threshold, BLOCK_R=padded(lora_B.shape[1]), **constants_of(x, weight, lora_B, parts))
    return y, t


def triton_backward(dy, x, weight, lora_A, lora_B, t, scale, parts, threshold, seed, needs_dx):
    """As reference_backward, with the mask made again from the seed. Without dropout dA is one plain matmul."""
    (M, K), GR, R = x.shape, len(lora_A), lora_B.shape[1]
    dx, dB, u = torch.empty_like(x) if needs_dx else None, torch.empty_like(lora_B), torch.empty_like(t)
    make_u = needs_dx and padded(GR) <= 32  # a wider u costs the main loop more than a matmul that reads dy again
    for columns, rank, rows in adapted_parts(parts, len(weight), R):
        dB[rows] = (scale * (t[rank].to(dy.dtype) @ dy[:, columns])).t()
        if not make_u:
            u[rank] = scale * (lora_B[rows].t() @ dy[:, columns].t())
    with torch.cuda.device_of(x):
        if needs_dx:
            launch(dx_kernel, lambda blocks: triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(K, blocks["BLOCK_K"]),
                   dy, weight, lora_A, lora_B, dx, u, seed, threshold, scale, M, G=GR // R, DROPOUT=threshold > 0,
                   MAKE_U=make_u, BLOCK_R=min(32, padded(GR)), **constants_of(x, weight, lora_B, parts))
        dA = times_dropped(u, x, threshold, seed) if threshold else u.to(x.dtype) @ x
    return dx, dA, dB


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class LoRALinearFunction(torch.autograd.Function):
    """x (M, K), contiguous, and everything else in its dtype. `kernels`: run the kernels or the reference."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale, parts, dropout, seed, kernels):
        scale = scale / (1 - dropout)
        if kernels:
            keep, rest = None, (scale, parts, min(round(dropout * 2**31), 2**31 - 1), seed)
            y, t = triton_forward(x, weight, bias, lora_A, lora_B, *rest)
        else:
            keep, rest = keep_mask(*x.shape, dropout, seed, x.device) if dropout else None, (scale, parts)
            y, t = reference_forward(x, weight, bias, lora_A, lora_B, *rest, keep)
        ctx.save_for_backward(x, weight, lora_A, lora_B, t, keep)
        ctx.kernels, ctx.rest = kernels, rest
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, keep = ctx.saved_tensors
        needs_dx, needs_dW, needs_db = ctx.needs_input_grad[:3]
        if ctx.kernels:
            dx, dA, dB = triton_backward(dy.contiguous(), *tensors, *ctx.rest, needs_dx)
        else:
            dx, dA, dB = reference_backward(dy, *tensors, *ctx.rest, keep, needs_dx)
        dW, db = dy.t() @ tensors[0] if needs_dW else None, dy.sum(0) if needs_db else None
        return dx, dW, db, dA, dB, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Public function


def lora_linear(x, weight, bias, lora_A, lora_B, scale, parts=(True,), dropout=0.0, seed=None):
    """y = x weight^T + bias, plus scale * D(x) A_g^T B_g^T on the columns of each adapted part g.

    x: (..., K). weight: (N, K) and bias: (N,) or None, frozen (they get a gradient only if they ask for one).
    lora_A: (G*R, K), lora_B: (G*N/P, R): the groups' factors one below the other.
    scale: alpha / R. parts: P truth values, G of them true; part i is columns i*N/P to (i+1)*N/P of y.
    dropout: probability in [0, 1) of dropping an element of x on its way to A, now: pass 0 in evaluation.
    seed: fixes the mask (taken modulo 2^31); None draws one from torch's CPU generator when dropout > 0.
    Returns (..., N). As F.linear: in x's dtype, or in autocast's; lora_A and lora_B may be of any dtype.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    fits = x.dtype != torch.float64 and x.numel() > 0 and lora_B.dim() == 2 and lora_B.shape[1] <= 64
    return run(x, weight, bias, lora_A, lora_B, scale, parts, dropout, seed, kernels=wants_triton(x) and fits)


def run(x, weight, bias, lora_A, lora_B, scale, parts=(True,), dropout=0.0, seed=None, *, kernels):
    """lora_linear by the kernels or by the reference: checks, brings everything to one dtype and x to two dimensions."""
    check(x, weight, bias, lora_A, lora_B, parts, dropout)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif weight.dtype != dtype:
        raise ValueError(f"lora_linear: expected weight of x's dtype {dtype}, found {weight.dtype}")
    if seed is None:
        seed = int(torch.randint(2**31, ())) if dropout else 0
    tensors = x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B                      # x (M, K)
    tensors = [tensor if tensor is None else tensor.to(dtype).contiguous() for tensor in tensors]
    y = LoRALinearFunction.apply(*tensors, float(scale), tuple(map(bool, parts)), float(dropout), seed % 2**31, kernels)
    return y.view(*x.shape[:-1], len(weight))


lora_linear_reference = functools.partial(run, kernels=False)
lora_linear_triton = functools.partial(run, kernels=True)  # CUDA tensors, or CPU tensors under TRITON_INTERPRET=1


def check(x, weight, bias, lora_A, lora_B, parts, dropout):
    """Raises ValueError with what was expected and what was found."""
    P, G, R = len(parts), sum(map(bool, parts)), lora_B.shape[-1] if lora_B.dim() else 0
    if G == 0:
        raise ValueError(f"lora_linear: expected at least one adapted part, found parts={tuple(parts)}")
    if weight.dim() != 2 or len(weight) % P or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"lora_linear: expected x (..., K) and weight (N, K) with N a multiple of {P}, "
                         f"found {tuple(x.shape)} and {tuple(weight.shape)}")
    N, K = weight.shape
    for name, tensor, shape in (("x", x, x.shape), ("weight", weight, (N, K)), ("bias", bias, (N,)),
                                ("lora_B", lora_B, (G * N // P, R)), ("lora_A", lora_A, (G * R, K))):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point() or tensor.device != x.device):
            raise ValueError(f"lora_linear: expected {name} {tuple(shape)}, floating-point, on {x.device} (weight {(N, K)}, "
                             f"rank {R}, {G} of {P} parts), found {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: expected dropout in [0, 1), found {dropout}")
