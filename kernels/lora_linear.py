"""A linear layer with a low-rank update, in one pass over its input.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. 3, with the groups of a fused projection
(loralib's MergedLinear: q and v of a ViT's qkv are adapted, k is not). For each adapted part g of the output's columns

    y_g = x W_g^T + b_g + s D(x) A_g^T B_g^T        D(x) = keep * x / (1 - p): one mask for all groups, P[keep] = 1 - p

and for the parts that are not adapted y = x W^T + b. Backward, with t_g = D(x) A_g^T and u_g = s dy_g B_g, both of width R:

    dx = dy W + sum_g keep / (1 - p) * (u_g A_g)        dA_g = u_g^T D(x)        dB_g = s dy_g^T t_g

Nothing is computed for the frozen W and b, and nothing of the size of x or y is kept but x itself.

Shapes: M rows of x (images x tokens), K inputs, N outputs in P equal parts of which G are adapted, R rank.
"""
import numpy as np
import torch
import torch.nn.functional as F


def adapted_parts(parts, N, R):
    """For each adapted part: its columns of y, its rows of lora_A, its rows of lora_B."""
    width = N // len(parts)
    for g, part in enumerate(i for i, adapted in enumerate(parts) if adapted):
        yield slice(part * width, (part + 1) * width), slice(g * R, (g + 1) * R), slice(g * width, (g + 1) * width)


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


def reference_forward(x, weight, bias, lora_A, lora_B, scale, parts, keep):
    """y (M, N) and t (G*R, M). `keep` (M, K) uint8 or None; 1 / (1 - p) is part of `scale`.

    The products of width R are formed rank first, (R, K) x (K, M): 2 to 10 times faster on a CPU than (M, K) x (K, R).
    """
    y = F.linear(x, weight, bias)                                                           # (M, N)
    t = lora_A @ (x if keep is None else x * keep).t()                                      # (G*R, M)
    for columns, rank, rows in adapted_parts(parts, len(weight), lora_B.shape[1]):
        y[:, columns].addmm_(t[rank].t(), lora_B[rows].t(), alpha=scale)                    # added in place, no (M, N) delta
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
# Autograd


class LoRALinearFunction(torch.autograd.Function):
    """x (M, K) and everything else in one dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale, parts, dropout, seed):
        keep = keep_mask(*x.shape, dropout, seed, x.device) if dropout else None
        ctx.scale, ctx.parts, ctx.dropout, ctx.seed = scale / (1 - dropout), parts, dropout, seed
        y, t = reference_forward(x, weight, bias, lora_A, lora_B, ctx.scale, parts, keep)
        ctx.save_for_backward(x, weight, lora_A, lora_B, t, keep)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, t, keep = ctx.saved_tensors
        needs_dx, needs_dW, needs_db = ctx.needs_input_grad[:3]
        dx, dA, dB = reference_backward(dy, x, weight, lora_A, lora_B, t, ctx.scale, ctx.parts, keep, needs_dx)
        dW = dy.t() @ x if needs_dW else None
        db = dy.sum(0) if needs_db else None
        return dx, dW, db, dA, dB, None, None, None, None


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
    check(x, weight, bias, lora_A, lora_B, parts, dropout)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(f"lora_linear: expected weight of x's dtype {dtype}, found {weight.dtype}")
    if seed is None:
        seed = int(torch.randint(2**31, ())) if dropout else 0
    bias = bias if bias is None else bias.to(dtype)
    y = LoRALinearFunction.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype), bias, lora_A.to(dtype),
                                 lora_B.to(dtype), float(scale), tuple(map(bool, parts)), float(dropout), seed % 2**31)
    return y.view(*x.shape[:-1], len(weight))


def check(x, weight, bias, lora_A, lora_B, parts, dropout):
    """Raises ValueError with what was expected and what was found."""
    P, G = len(parts), sum(map(bool, parts))
    if G == 0:
        raise ValueError(f"lora_linear: expected at least one adapted part, found parts={tuple(parts)}")
    if weight.dim() != 2 or len(weight) % P or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"lora_linear: expected x (..., K) and weight (N, K) with N a multiple of {P}, "
                         f"found {tuple(x.shape)} and {tuple(weight.shape)}")
    (N, K), R = weight.shape, lora_B.shape[-1]
    for name, tensor, shape in (("bias", bias, (N,)), ("lora_B", lora_B, (G * N // P, R)), ("lora_A", lora_A, (G * R, K))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"lora_linear: expected {name} {shape} for weight {(N, K)}, rank {R} and {G} of {P} parts, "
                             f"found {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"lora_linear: expected floating-point {name}, found {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"lora_linear: expected {name} on {x.device} as x is, found {tensor.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: expected dropout in [0, 1), found {dropout}")
