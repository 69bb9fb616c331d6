"""Times both operations against what they replace, on this machine: two minutes on a GPU.

    python -m kernels.bench             # a LoRA layer, twelve of them as in a step, and a warp
    python -m kernels.bench --all       # more ranks, flows and sizes

Each row is a forward or a forward and a backward pass (`both`), under autocast, as in training:

    GPU ms    median by the GPU's clock, its cache overwritten before each run (do_bench)
    wall ms   median by the processor's clock, which sees what it takes to start the kernels, too
    MiB       the peak of the memory that the pass allocates
    times     wall ms by that of the first contender

A contender runs three times before it is timed, which compiles and tunes it. None is timed whose
result or gradients, without dropout, err more than twice as much as the reference's, beyond
rounding. Without a CUDA GPU nothing is claimed about the kernels: the references are timed at a
small size. With TRITON_INTERPRET=1 the kernels run at a tiny one, to try this file.
"""
import argparse
import os
import statistics
import time

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


def frozen(x, W, b, A, B, p):
    return F.linear(x, W, b)


def peft_form(x, W, b, A, B, p):
    """A frozen product and two small ones for each of q and v, which are added to its columns."""
    R, parts = B.shape[1], list(F.linear(x, W, b).chunk(3, dim=-1))
    dropped = F.dropout(x, p)
    for part, A_g, B_g in zip((0, 2), A.split(R), B.chunk(2)):
        parts[part] = parts[part] + SCALE * F.linear(F.linear(dropped, A_g), B_g)
    return torch.cat(parts, dim=-1)


def lora_by(function):
    return lambda x, W, b, A, B, p: function(x, W, b, A, B, SCALE, QV, p)


def grid_sample(image, flow):
    """The usual spatial transformer: an identity grid, a normalisation, F.grid_sample."""
    H, W = image.shape[-2:]
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device).unsqueeze(1)
    cols = torch.arange(W, dtype=flow.dtype, device=flow.device)
    grid = torch.stack(((cols + flow[:, 1]) * (2 / (W - 1)) - 1,
                        (rows + flow[:, 0]) * (2 / (H - 1)) - 1), dim=-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def contenders_of():
    """{name: function} of each operation. The kernels are left out where they do not run: a first
    call of each public function has found that out, and said why."""
    x, image = torch.randn(64, 64, device=DEVICE), torch.randn(1, 1, 16, 16, device=DEVICE)
    lora_linear(x, x.repeat(3, 1), None, x[:8], x.repeat(2, 1)[:, :4], SCALE, QV)
    warp(image, image.expand(1, 2, 16, 16))
    lora = {"frozen": frozen, "PEFT's form": peft_form, "reference": lora_by(lora_linear_reference)}
    warps = {"grid_sample": grid_sample, "reference": warp_reference,
             "exact grid_sample": warp_by_grid_sample}
    if CUDA:
        lora["compiled reference"] = torch.compile(lora["reference"])
    if (CUDA and not FAILED) or INTERPRETED:
        lora["kernels"], warps["kernels"] = lora_by(lora_linear_triton), warp_triton
    return lora, warps


def measure(run, repeats):
    """The medians (GPU ms or None, wall ms, MiB or None) of `run`."""
    wait, gpu, mib, times = torch.cuda.synchronize if CUDA else lambda: None, None, None, []
    for _ in range(3):
        run()
    wait()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        gpu = triton.testing.do_bench(run, return_mode="median") if triton else None
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return gpu, statistics.median(times), mib


def run_both(function, inputs, dy):
    """The result, and the gradients of all inputs that want one."""
    with torch.autocast(DEVICE, DTYPE, enabled=CUDA and dy.dtype != torch.float64):
        y = function(*inputs)
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)]


def check(contenders, inputs, dy, rounding):
    """Raises AssertionError where one errs more than twice as much as the reference, and more than
    `rounding` of the whole, both against the reference in float64."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
            for x in inputs]
    truth = run_both(contenders["reference"], wide, dy.double())
    reference = run_both(contenders["reference"], inputs, dy)
    for name, function in contenders.items():
        found = run_both(function, inputs, dy) if name != "frozen" else []
        for i, (a, b, c) in enumerate(zip(found, reference, truth)):
            error, allowed = ((tensor.double() - c).norm() / c.norm() for tensor in (a, b))
            if not error <= 2 * allowed + rounding:
                raise AssertionError(f"{name}: error {error:.3g} of the {'gradient' if i else ''} "
                                     f"{i or 'result'}, the reference's is {allowed:.3g}")


def table(title, contenders, inputs, dy, repeats):
    """Prints the rows, and a sentence that says which is fastest."""
    print(f"\n{title}\n\n| contender | pass | GPU ms | wall ms | MiB | times |\n{'|---' * 6}|")
    for kind in ("forward", "both"):
        took = {}
        for name, function in contenders.items():
            def run(function=function):
                with torch.set_grad_enabled(kind == "both"):
                    if kind == "both":
                        return run_both(function, inputs, dy)
                    with torch.autocast(DEVICE, DTYPE, enabled=CUDA):
                        return function(*inputs)

            gpu, took[name], mib = measure(run, repeats)
            times = took[name] / next(iter(took.values()))
            cells = ["-" if value is None else f"{value:.4g}" for value in (gpu, took[name], mib)]
            print(f"| {name} | {kind} | {' | '.join(cells)} | {times:.2f} |", flush=True)
    (best, ms), (second, more) = sorted(took.items(), key=lambda item: item[1] * (
        item[0] != "frozen") or torch.inf)[:2]
    print(f"\nFastest in both directions: {best}, {ms:.4g} ms; then {second}, {more:.4g} ms.")


def bench_lora(contenders, rows, width, R, layers, repeats):
    """q and v of a ViT's qkv; W frozen, gradients to x, A and B. layers: how many, one after the
    other with attention between them, as in a step."""
    sizes = ((rows, width), 1), ((3 * width, width), width**-0.5), ((3 * width,), 1), (
        (2 * R, width), width**-0.5), ((2 * width, R), 0.1)
    x, W, b, A, B = (torch.randn(size, device=DEVICE).mul_(std) for size, std in sizes)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    dy = torch.randn(rows, 3 * width, device=DEVICE)
    check(contenders, (x, W, b, A, B, 0.0), dy, 2 * torch.finfo(DTYPE).eps)

    def step(layer, x, *rest):
        for _ in range(layers):
            qkv = layer(x, *rest).view(-1, 197 if CUDA else rows, 3, width).unbind(2)
            x = x + F.scaled_dot_product_attention(*qkv).reshape(rows, width)
        return x

    if layers > 1:
        dy = dy[:, :width]
        contenders = {name: lambda *inputs, layer=layer: step(layer, *inputs)
                      for name, layer in contenders.items()}
    for p in (0.0, 0.1):
        table(f"LoRA, q and v of {layers} layer(s): {rows} x {width}, rank {R}, dropout {p}",
              contenders, (x, W, b, A, B, p), dy, repeats)


def bench_warp(contenders, B, C, H, W, reach, repeats):
    smooth = F.interpolate(torch.randn(B, 2, 8, 8, device=DEVICE), (H, W), mode="bicubic")
    inputs = [torch.randn(B, C, H, W, device=DEVICE), reach * smooth.contiguous()]
    image, flow = (tensor.requires_grad_() for tensor in inputs)
    dy = torch.randn_like(image)
    check(contenders, (image, flow), dy, (H + W) * torch.finfo(torch.float32).eps)  # of a position
    table(f"warp: {B} x {C} x {H} x {W}, flow of {reach} pixels", contenders, (image, flow), dy,
          repeats)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="more ranks, flows and sizes")
    everything = parser.parse_args(argv).all
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, no CUDA"
    print(f"{name}; torch {torch.__version__}, triton {getattr(triton, '__version__', 'absent')}, "
          f"{str(DTYPE)[6:]}")
    lora, warps = contenders_of()
    rows, width, side, layers, repeats = (
        (64 * 197, 768, 256, 12, 20) if CUDA else (40, 32, 16, 2, 1) if INTERPRETED else
        (2 * 197, 384, 128, 2, 5))
    for n in (1, layers):
        bench_lora(lora, rows, width, 4, n, repeats)
    bench_warp(warps, 8, 1, side, side, 3, repeats)
    if everything:
        for R in (8, 32, 64):
            bench_lora(lora, rows, width, R, 1, repeats)
        bench_warp(warps, 8, 1, side, side, 30, repeats)  # a flow that folds the image
        bench_warp(warps, 4, 3, 2 * side, 2 * side, 3, repeats)


if __name__ == "__main__":
    main()
