"""Times the two operations against what they replace, on this machine.

    python -m kernels.bench                # a table on the screen
    python -m kernels.bench --only warp --repeats 50

All contenders get the same inputs, and none is timed whose result or gradients differ from the
reference's. `both` is a forward and a backward pass, as in a training step. The time is the median
of `--repeats` runs: on a GPU by its own clock, the L2 cache overwritten before each run, as a layer
finds it in a model (triton.testing.do_bench). `of ceiling` divides by it the least time that the
machine could take: for LoRA that of the frozen products x W^T and dy W at the speed of a large
matmul in the same dtype, so that the low-rank work shows as a loss; for warp that of the bytes that
it has to move at the speed of a large copy.

Without a CUDA GPU nothing is claimed about the kernels: the references are timed on the CPU, at a
few shapes.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from . import triton
from .lora_linear import lora_linear_reference, lora_linear_triton
from .warp import warp_reference, warp_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
QV, SCALE = (True, False, True), 8.0  # q and v of a fused qkv
LORA_SHAPES = [(64 * 197, 768, 4), (64 * 197, 768, 32), (64 * 197, 1024, 8)]  # rows, width, rank
WARP_SHAPES = [(8, 1, 256, 256), (32, 1, 512, 512), (4, 3, 1024, 1024)]
if not CUDA:
    LORA_SHAPES, WARP_SHAPES = [(2 * 197, 768, 4), (8 * 65, 96, 4)], [(1, 1, 256, 256)]


def three_matmuls(x, W, b, A, B, p):
    """As most implementations have it: a frozen product and two small ones for each group."""
    y, R = F.linear(x, W, b), B.shape[1]
    dropped, parts = F.dropout(x, p), list(y.chunk(3, dim=1))
    for part, A_g, B_g in zip((0, 2), A.split(R), B.chunk(2)):
        parts[part] = parts[part] + SCALE * F.linear(F.linear(dropped, A_g), B_g)
    return torch.cat(parts, dim=1)


def grouped_convolution(x, W, b, A, B, p):
    """loralib's and MED-PEFT's merged linear: a grouped 1-D convolution by B, padded with zeros."""
    R, width = B.shape[1], len(W) // 3
    after_A = F.linear(F.dropout(x, p), A)                                         # (M, GR)
    after_B = F.conv1d(after_A.t().unsqueeze(0), B.unsqueeze(-1), groups=len(A) // R)[0].t()
    columns = torch.arange(3 * width, device=x.device).view(3, width)[[0, 2]].flatten()
    padded_to_y = after_B.new_zeros(len(x), 3 * width).index_copy(1, columns, after_B)
    return F.linear(x, W, b) + padded_to_y * SCALE


def grid_sample(image, flow):
    """The usual spatial transformer: an identity grid, a normalisation, F.grid_sample."""
    H, W = image.shape[-2:]
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device).unsqueeze(1)
    cols = torch.arange(W, dtype=flow.dtype, device=flow.device)
    grid = torch.stack(((cols + flow[:, 1]) * (2 / (W - 1)) - 1,
                        (rows + flow[:, 0]) * (2 / (H - 1)) - 1), dim=-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def milliseconds(run, repeats):
    """The median time of `run`."""
    if CUDA:
        return triton.testing.do_bench(run, rep=20 * repeats, return_mode="median")
    times = []
    for _ in range(repeats + 1):  # the first is not counted
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def ceilings(dtype, repeats):
    """(matmul FLOP, copied bytes, counting reading and writing) a millisecond of this machine."""
    n, size = (8192, 2**29) if CUDA else (1024, 2**26)
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    return (2 * n**3 / milliseconds(lambda: a @ b, repeats),
            2 * size / milliseconds(lambda: target.copy_(source), repeats))


def gradients(function, inputs, dy):
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(function(*inputs), leaves, dy)


def check(contenders, inputs, dy, tolerance=0.05):
    """Raises AssertionError unless all compute the results and gradients of the reference, the
    first. The flow's gradient jumps where a position crosses a pixel, so that a few of its numbers
    may differ by as much as they are large: errors are measured over whole tensors."""
    truth = None
    for name, function in contenders.items():
        found = [function(*inputs), *gradients(function, inputs, dy)]
        truth = truth or found
        for a, b in zip(found, truth):
            error = (a.float() - b.float()).norm() / b.float().norm()
            if not error < tolerance:
                raise AssertionError(f"{name} differs from the reference by {error:.3g}")


def rows_of(label, contenders, inputs, dy, ideal, repeats):
    """Prints the times of the contenders, forward and in both directions, as rows of a table.
    ideal: the least milliseconds of each."""
    for name, function in contenders.items():
        runs = {"forward": lambda: function(*inputs),
                "both": lambda: gradients(function, inputs, dy)}
        for kind, run in runs.items():
            took = milliseconds(run, repeats)
            print(f"| {label} | {name} | {kind} | {took:.4g} | {ideal[kind] / took:.0%} |")


def bench_lora(dtype, repeats, matmul, copy):
    """q and v of a ViT's qkv; W frozen, gradients to x, A and B."""
    contenders = dict(reference=lambda *x: lora_linear_reference(*x[:5], SCALE, QV, x[5]),
                      three_matmuls=three_matmuls, grouped_convolution=grouped_convolution)
    if CUDA:
        contenders["kernels"] = lambda *x: lora_linear_triton(*x[:5], SCALE, QV, x[5])
    for M, K, R in LORA_SHAPES:
        shapes = ((M, K), 1), ((3 * K, K), K**-0.5), ((3 * K,), 1), ((2 * R, K), K**-0.5), (
            (2 * K, R), 0.1)
        x, W, b, A, B = (torch.randn(shape, device=DEVICE).mul_(std).to(dtype)
                         for shape, std in shapes)
        for tensor in (x, A, B):
            tensor.requires_grad_()
        dy, frozen = torch.randn(M, 3 * K, device=DEVICE).to(dtype), 6 * M * K * K / matmul
        check(contenders, (x, W, b, A, B, 0.0), dy)  # without dropout all are the same
        for p in (0.0, 0.1):
            rows_of(f"lora {M} x {K}, rank {R}, dropout {p}", contenders, (x, W, b, A, B, p), dy,
                    dict(forward=frozen, both=2 * frozen), repeats)


def bench_warp(dtype, repeats, matmul, copy):
    """Forward moves flow, image and result; backward what the head of warp.py counts."""
    contenders = dict(reference=warp_reference, grid_sample=grid_sample)
    if CUDA:
        contenders["kernels"] = warp_triton
    for B, C, H, W in WARP_SHAPES:
        smooth = F.interpolate(torch.randn(B, 2, 8, 8, device=DEVICE), (H, W), mode="bicubic")
        flows = dict(smooth=3 * smooth, folding=30 * smooth, random=20 * torch.randn_like(smooth))
        for name, flow in flows.items():
            inputs = [torch.randn(B, C, H, W, device=DEVICE), flow.contiguous()]
            image, flow = (tensor.requires_grad_() for tensor in inputs)
            dy, pixels = torch.randn_like(image), 4 * B * H * W / copy
            check(contenders, (image, flow), dy)
            ideal = dict(forward=pixels * (2 + 2 * C), both=pixels * (6 + 14 * C))
            rows_of(f"warp {B} x {C} x {H} x {W}, {name} flow", contenders, (image, flow), dy,
                    ideal, repeats)


BENCHES = {"lora": bench_lora, "warp": bench_warp}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(BENCHES), help="one part (default: all)")
    parser.add_argument("--repeats", type=int, default=11, help="timed runs (default: 11)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"],
                        default="bf16" if CUDA else "fp32", help="of LoRA (default: %(default)s)")
    args = parser.parse_args()
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[args.dtype]
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, no CUDA"
    matmul, copy = ceilings(dtype, args.repeats)
    print(f"{name}; torch {torch.__version__}; matmul {matmul / 1e9:.4g} TFLOP/s ({dtype}), copy "
          f"{copy / 1e6:.4g} GB/s\n\n| shape | contender | pass | ms | of ceiling |\n"
          "|---|---|---|---|---|")
    for bench in [BENCHES[args.only]] if args.only else BENCHES.values():
        bench(dtype, args.repeats, matmul, copy)


if __name__ == "__main__":
    main()
