"""Dropout's mask: which elements of x are kept, P[keep] = 1 - p.

The reference makes the mask once. The kernels keep the seed alone and make a tile where they need
it: stored, the mask would be half of a 16-bit x. They spend 16 random bits on an element, as the
reference does on a CPU, whose mask of the same seed is another: it comes from one long stream.
"""
import math

import numpy as np
import torch

from . import jit, tl, uncompiled


@uncompiled  # it cannot trace numpy's generator
def keep_mask(x, p, seed):
    """The reference's mask: (M, K) uint8 of the shape of x, 1 where x is kept; a generator of its
    own draws it from the seed, below 2^31. On a CPU it is faster than bernoulli_."""
    seed = int(seed)
    if x.device.type != "cpu":
        generator = torch.Generator(x.device).manual_seed(seed)
        return (torch.rand(x.shape, generator=generator, device=x.device) >= p).byte()
    words = np.random.SFC64(seed).random_raw(math.ceil(x.numel() / 4)).view(np.int16)[:x.numel()]
    return torch.from_numpy(words).view(x.shape).ge(round(p * 2**16) - 2**15).view(torch.uint8)


@jit()
def keep_tile(seed_ptr, threshold, rows, col, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The kernels' mask of x[rows, col : col + BLOCK_K]: 16 bits of `threshold` or more are kept.
    They are Philox4x32's (7 rounds, Salmon et al. 2011), keyed by the seed. A draw serves 8
    columns, by the low and the high half of r0, r1, r2 and r3; its counter is row * ceil(K / 8) +
    column // 8, which does not depend on the tile."""
    octets = col // 8 + tl.arange(0, BLOCK_K // 8)
    counter = rows.to(tl.int64)[:, None] * ((K + 7) // 8) + octets[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed_ptr), counter, n_rounds=7)
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    bits = tl.interleave(words & 0xFFFF, words >> 16)
    return bits.to(tl.int32) >= threshold
