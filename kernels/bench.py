"""Times the kernels against what they replace, on this machine.

    python -m kernels.bench                       # table on the screen, CSV in runs/bench/bench.csv
    python -m kernels.bench --only warp --repeats 50

Every contender gets the same inputs, and its result is compared with the reference's before it is timed. A time is the
median of `--repeats` runs with the 20 and 80 % percentiles; on CUDA it comes from events on the stream, with the L2 cache
overwritten before each run, as a layer finds it in the middle of a model. `backward` is autograd.grad on a graph that is
kept; `both` builds and uses one, as a training step does. Peak memory is what a run allocates on top of its inputs.

Efficiency is a share of two ceilings measured first on the same machine: a large matmul in the same dtype (LoRA: counting
the frozen products x W^T and dy W alone, so the low-rank work shows as a loss), and a large copy (warp: flow, image and
result once each forward; those, the incoming gradient and both outgoing ones backward).

Without a CUDA GPU nothing is claimed about the kernels: the references are timed on the CPU, at a few shapes.
"""
import argparse
import csv
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import triton
from .dropout import times_dropped
from .lora_linear import lora_linear_reference, lora_linear_triton
from .warp import warp_reference, warp_triton

QV = (True, False, True)  # q and v of a fused qkv
LORA_SHAPES = [(f"ViT-{size} qkv, 64 x 197, r {r}", 64 * 197, D, r)
               for size, D in (("B", 768), ("L", 1024)) for r in (4, 8, 16, 32)]
WARP_SHAPES = [(8, 1, 256, 256), (32, 1, 512, 512), (4, 3, 1024, 1024)]
CPU_LORA_SHAPES = [("ViT-B qkv, 2 x 197, r 4", 2 * 197, 768, 4), ("width 96 qkv, 8 x 65, r 4", 8 * 65, 96, 4)]
CPU_WARP_SHAPES = [(1, 1, 256, 256), (2, 3, 300, 300)]
DROPOUT, SCALE = 0.1, 8.0
COLUMNS = ["operation", "shape", "dtype", "contender", "pass", "median_ms", "p20_ms", "p80_ms", "peak_MiB",
           "percent_of_ceiling"]


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: LoRA on q and v. Each takes (x, W, b, A, B, dropout).


def frozen_linear(x, W, b, A, B, p):
    return F.linear(x, W, b)


def eager_lora(x, W, b, A, B, p):
    """As most implementations have it: a frozen product and two small ones for each group, added to slices of y."""
    y, width, R = F.linear(x, W, b).clone(), len(W) // 3, B.shape[1]
    dropped = F.dropout(x, p)
    for g, part in enumerate((0, 2)):
        delta = F.linear(F.linear(dropped, A[g * R:(g + 1) * R]), B[g * width:(g + 1) * width])
        y[:, part * width:(part + 1) * width] += SCALE * delta
    return y


def grouped_convolution(x, W, b, A, B, p):
    """loralib's and MED-PEFT's merged linear: a grouped 1-D convolution by B, padded with zeros to the width of y."""
    R, width = B.shape[1], len(W) // 3
    after_A = F.linear(F.dropout(x, p), A)                                                  # (M, G*R)
    after_B = F.conv1d(after_A.t().unsqueeze(0), B.unsqueeze(-1), groups=len(A) // R)[0].t()
    columns = torch.arange(3 * width, device=x.device).view(3, width)[[0, 2]].flatten()
    padded = x.new_zeros(len(x), 3 * width).index_copy(1, columns, after_B)
    return F.linear(x, W, b) + padded * SCALE


def addmm_lora(x, W, b, A, B, p):
    """The best that eager torch does: B spread over the full width once, then one addmm onto the frozen product."""
    R, width = B.shape[1], len(W) // 3
    spread = torch.cat((F.pad(B[:width], (0, R)), B.new_zeros(width, 2 * R), F.pad(B[width:], (R, 0))))     # (N, G*R)
    return torch.addmm(F.linear(x, W, b), F.linear(F.dropout(x, p), A), spread.t(), alpha=SCALE)


def reference_lora(x, W, b, A, B, p):
    return lora_linear_reference(x, W, b, A, B, SCALE, QV, p)


def triton_lora(x, W, b, A, B, p):
    return lora_linear_triton(x, W, b, A, B, SCALE, QV, p)


# Contenders: warp. Each takes (image, flow).


def grid_sample(image, flow):
    """The usual spatial transformer: an identity grid, a normalisation, F.grid_sample."""
    H, W = image.shape[-2:]
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device).unsqueeze(1)
    cols = torch.arange(W, dtype=flow.dtype, device=flow.device)
    grid = torch.stack(((cols + flow[:, 1]) * (2 / (W - 1)) - 1, (rows + flow[:, 0]) * (2 / (H - 1)) - 1), dim=-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def compiled(**functions):
    """torch.compile of each, compiled anew for the shape at hand: dynamic shapes would be slower than it can be."""
    torch._dynamo.reset()
    return {f"{name}, compiled": torch.compile(function, dynamic=False) for name, function in functions.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(runs, device, repeats):
    """{name: (median, 20 %, 80 % percentile)} in milliseconds. The runs take turns, so a busy moment hits them alike."""
    times = {name: [] for name in runs}
    flush = torch.empty(2**28 if device == "cuda" else 0, dtype=torch.int8, device=device)  # more than any L2
    for _ in range(3 + repeats):
        for name, run in runs.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                start.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    ordered = {name: sorted(each[3:]) for name, each in times.items()}  # the first three warm up
    return {name: tuple(each[round(q * (repeats - 1))] for q in (0.5, 0.2, 0.8)) for name, each in ordered.items()}


def peak_memory(run, device):
    """MiB that a run allocates on top of what is there, or None without CUDA."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device, dtype, repeats):
    """(matmul FLOP/s in `dtype`, copy bytes/s counting reading and writing) of this machine."""
    n, size = (8192, 2**29) if device == "cuda" else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    times = measure({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, repeats)
    return 2e3 * n**3 / times["matmul"][0], 2e3 * size / times["copy"][0]


def passes(function, inputs, wanted):
    """The three things to time: forward, backward on a kept graph, and a training step's both."""
    y = function(*inputs)
    dy, leaves = torch.randn_like(y), [inputs[i] for i in wanted]
    return {"forward": lambda: function(*inputs),
            "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True),
            "both": lambda: torch.autograd.grad(function(*inputs), leaves, dy, allow_unused=True)}


def rows_of(operation, shape, dtype, contenders, inputs, wanted, ideal_ms, device, repeats):
    """Times every contender in every pass; one row of COLUMNS each."""
    runs = {name: passes(function, inputs, wanted) for name, function in contenders.items()}
    for kind, ideal in ideal_ms.items():
        times = measure({name: run[kind] for name, run in runs.items()}, device, repeats)
        for name, run in runs.items():
            yield [operation, shape, str(dtype).removeprefix("torch."), name, kind, *times[name],
                   peak_memory(run[kind], device), 100 * ideal / times[name][0]]


def check(contenders, inputs, tolerance):
    """Nothing is timed that does not compute the reference's result."""
    with torch.no_grad():
        truth = contenders["reference"](*inputs).float()
        for name, function in contenders.items():
            error = (function(*inputs).float() - truth).abs().max() / truth.abs().max()
            if name != "frozen linear" and not error < tolerance:
                raise AssertionError(f"{name} differs from the reference by {error:.3g} of its largest value")


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks


def bench_lora(device, dtype, repeats, matmul):
    """q and v of a ViT's qkv, with dropout and without; W frozen, gradients to x, A and B."""
    contenders = {"frozen linear": frozen_linear, "three matmuls": eager_lora, "grouped convolution": grouped_convolution,
                  "addmm": addmm_lora, "reference": reference_lora}
    for label, M, K, R in LORA_SHAPES if device == "cuda" else CPU_LORA_SHAPES:
        N = 3 * K
        shapes = ((M, K), 1), ((N, K), K**-0.5), ((N,), 1), ((2 * R, K), K**-0.5), ((2 * K, R), 0.1)
        x, W, b, A, B = (torch.randn(shape, device=device).mul_(std).to(dtype) for shape, std in shapes)
        for tensor in (x, A, B):
            tensor.requires_grad_()
        if device == "cuda":
            contenders |= {**compiled(addmm=addmm_lora, reference=reference_lora), "triton": triton_lora}
        check(contenders, (x, W, b, A, B, 0.0), 0.03)
        frozen = 2e3 * M * N * K / matmul
        for p in (DROPOUT, 0.0):
            yield from rows_of("lora_linear", f"{label}, dropout {p}", dtype, contenders, (x, W, b, A, B, p), (0, 3, 4),
                               dict(forward=frozen, backward=frozen, both=2 * frozen), device, repeats)


def bench_dA(device, dtype, repeats, copy):
    """Why dA has a kernel with dropout: against one matmul on a D(x) that was kept from the forward pass, or made again."""
    for label, M, K, R in LORA_SHAPES if device == "cuda" else ():
        x, u = torch.randn(M, K, device=device).to(dtype), torch.randn(2 * R, M, device=device)
        kept = F.dropout(x, DROPOUT)
        runs = {"matmul, D(x) kept": lambda: u.to(dtype) @ kept,
                "matmul, D(x) made again": lambda: u.to(dtype) @ F.dropout(x, DROPOUT),
                "triton": lambda: times_dropped(u, x, round(DROPOUT * 2**31), 0)}
        times, ideal = measure(runs, device, repeats), 1e3 * x.numel() * x.element_size() / copy
        for name, run in runs.items():
            yield ["dA", f"{label}, dropout {DROPOUT}", str(dtype).removeprefix("torch."), name, "backward", *times[name],
                   peak_memory(run, device), 100 * ideal / times[name][0]]


def bench_warp(device, dtype, repeats, copy):
    """Displacements of about 3 pixels that vary smoothly, as a registration network's do."""
    contenders = {"grid_sample": grid_sample, "reference": warp_reference}
    for B, C, H, W in WARP_SHAPES if device == "cuda" else CPU_WARP_SHAPES:
        image = torch.randn(B, C, H, W, device=device).requires_grad_()
        flow = 3 * F.interpolate(torch.randn(B, 2, 8, 8, device=device), size=(H, W), mode="bicubic")
        inputs = image, flow.contiguous().requires_grad_()
        if device == "cuda":
            contenders |= {**compiled(grid_sample=grid_sample, reference=warp_reference), "triton": warp_triton}
        check(contenders, inputs, 0.01)
        forward, backward = (4e3 * B * H * W * numbers / copy for numbers in (2 + 2 * C, 4 + 3 * C))
        yield from rows_of("warp", f"{B} x {C} x {H} x {W}", dtype, contenders, inputs, (0, 1),
                           dict(forward=forward, backward=backward, both=forward + backward), device, repeats)


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def shown(values):
    return ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["lora", "dA", "warp"], help="one part (default: all)")
    parser.add_argument("--repeats", type=int, default=0, help="timed runs a number (default: 100 on CUDA, 11 on a CPU)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of LoRA (default: bf16 on CUDA, fp32 on a CPU)")
    parser.add_argument("--out", default="runs/bench/bench.csv", help="CSV file (default: %(default)s)")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = args.repeats or (100 if device == "cuda" else 11)
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[
        args.dtype or ("bf16" if device == "cuda" else "fp32")]
    torch.manual_seed(0)
    machine = hardware(device), f"torch {torch.__version__}, triton {triton.__version__ if triton else 'absent'}"
    print("; ".join(machine))
    if device == "cpu":
        print("No CUDA GPU here: the Triton kernels are not measured, only the torch references on the CPU.")
    matmul, copy = ceilings(device, dtype, repeats)
    print(f"Ceilings: matmul {matmul / 1e12:.4g} TFLOP/s ({dtype}), copy {copy / 1e9:.4g} GB/s\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["hardware", "versions", "matmul_TFLOPs", "copy_GBs", *COLUMNS])
        benches = {"lora": lambda: bench_lora(device, dtype, repeats, matmul),
                   "dA": lambda: bench_dA(device, dtype, repeats, copy),
                   "warp": lambda: bench_warp(device, torch.float32, repeats, copy)}
        for name, bench in benches.items():
            if args.only in (None, name):
                for row in bench():
                    print("| " + " | ".join(shown(row)) + " |", flush=True)
                    writer.writerow([*machine, *shown((matmul / 1e12, copy / 1e9)), *shown(row)])
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
