"""Dropout without a stored mask, and the two products of LoRA that read x through it.

    D(x) = keep * x,   P[keep] = 1 - p        t = a D(x)^T        dA = u D(x)

(1 / (1 - p) belongs to LoRA's scale.) The kernels make the mask from a seed and the place of an element, wherever and as
often as they meet it, and never write it down: a stored mask of a ViT-B's projection is a quarter to a half of x, D(x) is
another x. Both products are skinny, a and u having G*R rows: their time is the time of reading x once.

Shapes: M rows of x, K inputs, G*R rows of a and u.
"""
import numpy as np
import torch

from . import jit, tl, triton

# ---------------------------------------------------------------------------------------------------------------------
# Reference


def keep_mask(M, K, p, seed, device):
    """(M, K) uint8, 1 where x is kept. Its own generator: the result depends on the arguments only.

    On a CPU from 16 random bits an element (p is met to 2^-17): torch's bernoulli_ takes 20 times as long, an eighth of
    the projection of a ViT-B.
    """
    if device.type != "cpu":
        return (torch.rand(M, K, generator=torch.Generator(device).manual_seed(seed), device=device) >= p).byte()
    words = np.random.SFC64(seed).random_raw(-(-M * K // 4)).view(np.int16)[:M * K]
    return torch.from_numpy(words).view(M, K).ge(round(p * 2**16) - 2**15).view(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@jit()
def keep_tile(seed, threshold, rows, col, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Dropout's mask of x[rows, col : col + BLOCK_K]: Philox4x32 with 7 rounds (Salmon et al. 2011), keyed by the seed.

    The counter of a draw is row * ceil(K / 4) + column // 4 in 64 bits, its four words are four neighbouring columns: the
    mask depends on the element alone, not on the tile it is made in, and a draw serves four elements.
    """
    quads = col // 4 + tl.arange(0, BLOCK_K // 4)
    counter = rows.to(tl.int64)[:, None] * ((K + 3) // 4) + quads[None, :]
    r0, r1, r2, r3 = tl.randint4x(seed, counter, n_rounds=7)
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    return (words >> 1).to(tl.int32) >= threshold                                # 31 bits, compared as signed


@jit(do_not_specialize=["M", "seed", "threshold"])
def transposed_kernel(x, a, t, seed, threshold, M, GR: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """t = a (keep * x)^T: a program makes BLOCK_M columns of BLOCK_R rows of t."""
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = (tl.program_id(0) * BLOCK_M).to(tl.int64)
    rows_left = M - tl.program_id(0) * BLOCK_M
    x += first_row * K + tl.minimum(row, rows_left - 1)[:, None] * K + k[None, :]
    a += r[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        keep = keep_tile(seed, threshold, first_row + row, start, K, BLOCK_K) & (k[None, :] < K - start)
        x_tile = tl.load(x + start, mask=keep, other=0.0)                        # (keep * x)
        a_tile = tl.load(a + start, mask=(r[None, :] < GR) & (k[:, None] < K - start), other=0.0)
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    t += first_row + r.to(tl.int64)[None, :] * M + row[:, None]
    tl.store(t, acc, mask=(r[None, :] < GR) & (row[:, None] < rows_left))


@jit(do_not_specialize=["M", "seed", "threshold"])
def split_kernel(u, x, partial, seed, threshold, M, ROWS, GR: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """partial[split] = u (keep * x) over ROWS rows: (splits, G*R, K) float32, summed by the caller in a fixed order."""
    row, k = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = tl.program_id(2).to(tl.int64) * ROWS
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        rows = first_row + start + row
        keep = keep_tile(seed, threshold, rows, tl.program_id(0) * BLOCK_K, K, BLOCK_K)
        x_tile = tl.load(x + rows[:, None] * K + k[None, :], mask=keep & (rows[:, None] < M) & (k[None, :] < K), other=0.0)
        u_mask = (r[:, None] < GR) & (rows[None, :] < M)
        u_tile = tl.load(u + r.to(tl.int64)[:, None] * M + rows[None, :], mask=u_mask, other=0.0)
        acc = tl.dot(u_tile.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
    partial += tl.program_id(2).to(tl.int64) * GR * K
    tl.store(partial + r[:, None] * K + k[None, :], acc, mask=(r[:, None] < GR) & (k[None, :] < K))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def padded(rank):
    """tl.dot wants at least 16."""
    return max(16, triton.next_power_of_2(rank))


def blocks_of(a):
    """Programs and blocks along the G*R rows of `a`."""
    block_r = min(64, padded(len(a)))
    return triton.cdiv(len(a), block_r), dict(GR=len(a), BLOCK_M=64, BLOCK_K=64, BLOCK_R=block_r)


def times_dropped_transposed(a, x, threshold, seed):
    """a D(x)^T: (G*R, K) and (M, K) to (G*R, M) float32. An element is kept if its 31 random bits reach `threshold`."""
    (M, K), (tiles, blocks) = x.shape, blocks_of(a)
    out = torch.empty(len(a), M, dtype=torch.float32, device=x.device)
    transposed_kernel[(triton.cdiv(M, 64), tiles)](x, a, out, seed, threshold, M, K=K, **blocks)
    return out


def times_dropped(u, x, threshold, seed):
    """u D(x): (G*R, M) float32 and (M, K) to (G*R, K). Sums over at most 64 splits of the rows, in a fixed order."""
    (M, K), (tiles, blocks) = x.shape, blocks_of(u)
    rows = max(256, triton.cdiv(triton.cdiv(M, 64), 64) * 64)
    partial = torch.empty(triton.cdiv(M, rows), len(u), K, dtype=torch.float32, device=x.device)
    split_kernel[(triton.cdiv(K, 64), tiles, len(partial))](u, x, partial, seed, threshold, M, rows, K=K, **blocks)
    return partial.sum(0).to(x.dtype)
