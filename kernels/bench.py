"""Times both operations against what they replace, on this machine.

    python -m kernels.bench             # a LoRA layer, twelve of them as in a step, and a warp

A row is a forward or a forward and a backward pass (`both`), under autocast, as in training:

    GPU ms    median by the GPU's clock, its cache overwritten before each run (do_bench)
    wall ms   median by the processor's clock, with what it takes to start the kernels
    MiB       the peak of the memory that the pass allocates
    times     wall ms by that of the first contender

Three runs before it compile and tune. tests/test_kernels.py says whether the kernels are right.
Without a GPU the references are timed at a small size; with TRITON_INTERPRET=1 the kernels run too,
at a tiny one, to try this file.
"""
import functools
import os
import statistics
import sys
import timeit

import torch
import torch.nn.functional as F

from . import FAILED, lora_linear, triton, warp
from .lora_linear import lora_linear_reference, lora_linear_triton
from .warp import warp_by_grid_sample, warp_reference, warp_triton

CUDA, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
AMPERE = CUDA and torch.cuda.get_device_capability() >= (8, 0)
DTYPE = torch.bfloat16 if AMPERE else torch.float16 if CUDA else torch.float32
QV, SCALE = (True, False, True), 8.0  # q and v of a fused qkv


def peft_form(x, W, b, A, B, p):
    """A frozen product and two small ones for each of q and v, which are added to its columns."""
    q, k, v = F.linear(x, W, b).chunk(3, dim=-1)
    dropped, (A_q, A_v), (B_q, B_v) = F.dropout(x, p), A.chunk(2), B.chunk(2)
    q = q + SCALE * F.linear(F.linear(dropped, A_q), B_q)
    v = v + SCALE * F.linear(F.linear(dropped, A_v), B_v)
    return torch.cat((q, k, v), dim=-1)


def lora_by(function):
    return lambda x, W, b, A, B, p: function(x, W, b, A, B, SCALE, QV, p)


def grid_sample(image, flow):
    """The usual spatial transformer: an identity grid, a normalisation, F.grid_sample."""
    B, _, H, W = image.shape
    identity = torch.eye(2, 3, device=DEVICE).expand(B, 2, 3)
    grid = F.affine_grid(identity, image.shape, align_corners=True)                # (B, H, W, 2)
    moves = torch.stack((flow[:, 1] * (2 / (W - 1)), flow[:, 0] * (2 / (H - 1))), dim=-1)
    return F.grid_sample(image, grid + moves, padding_mode="border", align_corners=True)


def contenders_of():
    """{name: function} of each operation. The kernels are left out where they do not run: a first
    call of each public function has found that out, and said why."""
    x, image = torch.randn(64, 64, device=DEVICE), torch.randn(1, 1, 16, 16, device=DEVICE)
    lora_linear(x, x.repeat(3, 1), None, x[:8], x.repeat(2, 1)[:, :4], SCALE, QV)
    warp(image, image.expand(1, 2, 16, 16))
    lora = {"frozen": lambda x, W, b, A, B, p: F.linear(x, W, b), "PEFT's form": peft_form,
            "reference": lora_by(lora_linear_reference)}
    warps = {"grid_sample": grid_sample, "reference": warp_reference,
             "exact grid_sample": warp_by_grid_sample}
    if CUDA:
        lora["compiled reference"] = torch.compile(lora["reference"])
    if (CUDA and not FAILED) or INTERPRETED:
        lora["kernels"], warps["kernels"] = lora_by(lora_linear_triton), warp_triton
    return lora, warps


def passes(function, inputs, dy=None):
    """The result and, with its gradient dy, those of all inputs that want one."""
    with torch.autocast(DEVICE, DTYPE, enabled=CUDA):
        y = function(*inputs)
    if dy is None:
        return [y]
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)]


def measure(run, repeats):
    """The medians [GPU ms or None, wall ms, MiB or None] of `run`."""
    gpu, mib, wait = None, None, torch.cuda.synchronize if CUDA else lambda: None
    for _ in range(3):
        run()
    wait()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        gpu = triton.testing.do_bench(run, return_mode="median") if triton else None
    seconds = timeit.repeat(lambda: (run(), wait()), number=1, repeat=repeats)
    return gpu, 1e3 * statistics.median(seconds), mib


def table(title, contenders, inputs, dy, repeats):
    """Prints the rows, and a sentence that says which is fastest."""
    print(f"\n{title}\n\n| contender | pass | GPU ms | wall ms | MiB | times |\n{'|---' * 6}|")
    for kind, gradient in (("forward", None), ("both", dy)):
        took = {}
        for name, function in contenders.items():
            with torch.set_grad_enabled(kind == "both"):
                gpu, took[name], mib = measure(lambda: passes(function, inputs, gradient), repeats)
            cells = ["-" if value is None else f"{value:.4g}" for value in (gpu, took[name], mib)]
            times = took[name] / next(iter(took.values()))
            print(f"| {name} | {kind} | {' | '.join(cells)} | {times:.2f} |", flush=True)
    took.pop("frozen", None)  # it does less
    (best, ms), (second, more) = sorted(took.items(), key=lambda item: item[1])[:2]
    print(f"\nFastest in both directions: {best}, {ms:.4g} ms; then {second}, {more:.4g} ms.")


def bench_lora(contenders, rows, width, layers, repeats):
    """q and v of a ViT's qkv, at rank 4; W frozen, gradients to x, A and B. layers: how many, one
    after the other with attention between them, as in a step."""
    sizes = ((rows, width), 1), ((3 * width, width), width**-0.5), ((3 * width,), 1), (
        (8, width), width**-0.5), ((2 * width, 4), 0.1)
    x, W, b, A, B = (torch.randn(size, device=DEVICE).mul_(std) for size, std in sizes)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    dy = torch.randn(rows, 3 * width, device=DEVICE)

    def step(layer, x, *rest):
        for _ in range(layers):
            qkv = layer(x, *rest).view(-1, 197 if CUDA else rows, 3, width).unbind(2)
            x = x + F.scaled_dot_product_attention(*qkv).reshape(rows, width)
        return x

    if layers > 1:
        dy = dy[:, :width]
        contenders = {name: functools.partial(step, layer) for name, layer in contenders.items()}
    for p in (0.0, 0.1):
        table(f"LoRA, q and v of {layers} layer(s): {rows} x {width}, rank 4, dropout {p}",
              contenders, (x, W, b, A, B, p), dy, repeats)


def bench_warp(contenders, side, repeats):
    smooth = F.interpolate(torch.randn(8, 2, 8, 8, device=DEVICE), (side, side), mode="bicubic")
    image, dy = torch.randn(2, 8, 1, side, side, device=DEVICE)
    inputs = image.requires_grad_(), (3 * smooth.contiguous()).requires_grad_()
    table(f"warp: 8 x 1 x {side} x {side}, flow of 3 pixels", contenders, inputs, dy, repeats)


def main():
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, no CUDA"
    print(f"{name}; torch {torch.__version__}, triton {triton and triton.__version__}, {DTYPE}")
    lora, warps = contenders_of()
    rows, width, side, layers, repeats = (
        (64 * 197, 768, 256, 12, 20) if CUDA else (40, 32, 16, 2, 1) if INTERPRETED else
        (2 * 197, 384, 128, 2, 5))
    for n in (1, layers):
        bench_lora(lora, rows, width, n, repeats)
    bench_warp(warps, side, repeats)


if __name__ == "__main__":
    if sys.argv[1:]:  # it has no options
        sys.exit(__doc__)
    main()
