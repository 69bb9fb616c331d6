"""Times the kernels against what they replace, on this machine.

    python -m kernels.bench                       # table on the screen, CSV in runs/bench/bench.csv
    python -m kernels.bench --only warp --repeats 50

All contenders get the same inputs, and none is timed whose result or gradients differ from the
reference's. `both` is a forward and a backward pass, as in a training step. Three times are given,
each the median of `--repeats` runs in which the contenders take turns:

    warm_ms   a replayed CUDA graph: the GPU's time alone, with the inputs in the L2 cache if
              there is room
    cold_ms   the same after the L2 cache is overwritten, as a layer finds it in a model
    wall_ms   a call from Python, as a run without CUDA graphs has it: launching counts

first_s is the first call of a contender with these options, with all that it compiles and tries,
and tile is what the kernel chose. peak_MiB is what a run allocates on top of its inputs.
percent_of_ceiling divides the least time that the machine could take by cold_ms (on a CPU by
wall_ms): for LoRA that of the frozen products x W^T and dy W at the speed of a large matmul in the
same dtype, so that the low-rank work shows as a loss; for warp that of the bytes that it has to
move at the speed of a large copy.

Without a CUDA GPU nothing is claimed about the kernels: the references are timed on the CPU, at a
few shapes.
"""
import argparse
import csv
import functools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import triton, use_kernels
from .lora_linear import autotuned, down_kernel, lora_linear_reference, lora_linear_triton, padded
from .warp import warp_reference, warp_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
QV = (True, False, True)  # q and v of a fused qkv
DROPOUT, SCALE = 0.1, 8.0
COLUMNS = ["operation", "shape", "dtype", "contender", "pass", "first_s", "warm_ms", "cold_ms",
           "cold_p20_ms", "cold_p80_ms", "wall_ms", "peak_MiB", "percent_of_ceiling", "tile"]
# label, rows, width, rank
LORA_SHAPES = [(f"ViT-{size} qkv, 64 x 197, r {r}", 64 * 197, D, r)
               for size, D in (("B", 768), ("L", 1024)) for r in (4, 8, 16, 32)]
WARP_SHAPES = [(8, 1, 256, 256), (32, 1, 512, 512), (4, 3, 1024, 1024)]
if not CUDA:
    LORA_SHAPES = [("ViT-B qkv, 2 x 197, r 4", 2 * 197, 768, 4),
                   ("width 96 qkv, 8 x 65, r 4", 8 * 65, 96, 4)]
    WARP_SHAPES = [(1, 1, 256, 256), (2, 3, 300, 300)]


# --------------------------------------------------------------------------------------------------
# Contenders. LoRA on q and v: (x, W, b, A, B, dropout) -> y.


def frozen_linear(x, W, b, A, B, p):
    return F.linear(x, W, b)


def three_matmuls(x, W, b, A, B, p):
    """As most implementations have it: a frozen product and two small ones for each group."""
    y, width, R = F.linear(x, W, b), len(W) // 3, B.shape[1]
    dropped, parts = F.dropout(x, p), list(y.chunk(3, dim=1))
    for g, part in enumerate((0, 2)):
        t = F.linear(dropped, A[g * R:(g + 1) * R])
        parts[part] = parts[part] + SCALE * F.linear(t, B[g * width:(g + 1) * width])
    return torch.cat(parts, dim=1)


def grouped_convolution(x, W, b, A, B, p):
    """loralib's and MED-PEFT's merged linear: a grouped 1-D convolution by B, padded with zeros."""
    R, width = B.shape[1], len(W) // 3
    after_A = F.linear(F.dropout(x, p), A)                                         # (M, GR)
    after_B = F.conv1d(after_A.t().unsqueeze(0), B.unsqueeze(-1), groups=len(A) // R)[0].t()
    columns = torch.arange(3 * width, device=x.device).view(3, width)[[0, 2]].flatten()
    padded_to_y = after_B.new_zeros(len(x), 3 * width).index_copy(1, columns, after_B)
    return F.linear(x, W, b) + padded_to_y * SCALE


def spread(B):
    """lora_B over the full width of y, (N, GR): zero where a part or a rank is not its own."""
    R, width = B.shape[1], len(B) // 2
    return torch.cat((F.pad(B[:width], (0, R)), B.new_zeros(width, 2 * R),
                      F.pad(B[width:], (R, 0))))


def addmm(x, W, b, A, B, p):
    """The best that eager torch does: B spread over the full width, then one addmm."""
    y, t = F.linear(x, W, b), F.linear(F.dropout(x, p), A)
    return torch.addmm(y, t, spread(B).t(), alpha=SCALE)


def augmented(x, W, b, A, B, p):
    """One larger product by cuBLAS, y = [x, t] [W, B]^T, with t by the kernel: forward alone."""
    seed = torch.randint(2**31, (), device=x.device) if p else None
    t = x.new_empty(len(x), len(A), dtype=torch.float32)
    down_kernel[triton.cdiv(len(x), 64), 1, 1](
        x, A, t, None, seed, None, None, round(p * 2**16), SCALE / (1 - p), len(x), WIDTH=len(A[0]),
        P=1, PARTS=1, GR=len(A), R=len(A), F_IN=1, F_LOW=len(A[0]), PRECISION="ieee", BLOCK_M=64,
        BLOCK_IN=64, BLOCK_R=padded(len(A)))
    return F.linear(torch.cat((x, t.to(x.dtype)), 1), torch.cat((W, spread(B)), 1), b)


def reference(x, W, b, A, B, p):
    return lora_linear_reference(x, W, b, A, B, SCALE, QV, p)


def kernels(x, W, b, A, B, p):
    return lora_linear_triton(x, W, b, A, B, SCALE, QV, p)


# Warp: (image, flow) -> image.


def sampling_grid(image, flow):
    H, W = image.shape[-2:]
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device).unsqueeze(1)
    cols = torch.arange(W, dtype=flow.dtype, device=flow.device)
    return torch.stack(((cols + flow[:, 1]) * (2 / (W - 1)) - 1,
                        (rows + flow[:, 0]) * (2 / (H - 1)) - 1), dim=-1)


def grid_sample(image, flow):
    """The usual spatial transformer: an identity grid, a normalisation, F.grid_sample."""
    return ready_grid(image, sampling_grid(image, flow))


def ready_grid(image, grid):
    """F.grid_sample alone: what a flow in its own coordinates would cost."""
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def autocast(function):
    def run(*inputs):
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(*inputs)
    return run


def compiled(functions):
    """Each with torch.compile, by default and with all trials, anew for the shape at hand."""
    torch._dynamo.reset()
    modes = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    return {f"{name}, {label}": torch.compile(function, dynamic=False, mode=mode)
            for label, mode in modes.items() for name, function in functions.items()}


# --------------------------------------------------------------------------------------------------
# Measuring


def finished(run, calls=1):
    """Calls `run` some times, waits for the end, and returns the seconds of all calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def graph_of(run):
    """`run` as a CUDA graph to replay."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled and allocated once must not be captured
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def on_stream(replay, flush):
    """Milliseconds of the GPU, after the L2 cache is overwritten with `flush` or is warm."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replay() if flush is None else flush.zero_()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(runs, repeats, replayed=CUDA):
    """{name: [warm_ms, cold_ms, cold_p20_ms, cold_p80_ms, wall_ms]}.

    The times of the GPU are None where a run is not replayed as a CUDA graph.
    """
    calls = 10 if CUDA else 1
    wall, warm, cold = ({name: [] for name in runs} for _ in range(3))
    replays = {}
    for name, run in runs.items() if replayed else ():
        try:
            replays[name] = graph_of(run)
        except RuntimeError as error:  # the reference's dropout has a generator of its own
            print(f"{name} cannot be replayed: {str(error).splitlines()[0]}", file=sys.stderr)
    flush = torch.empty(2**28, dtype=torch.int8, device=DEVICE) if CUDA else None  # beyond any L2
    for _ in range(repeats):
        for name, run in runs.items():
            wall[name].append(1e3 * finished(run, calls) / calls)
        for name, replay in replays.items():
            warm[name].append(on_stream(replay, None))
            cold[name].append(on_stream(replay, flush))
    found = {}
    for name in runs:
        times = [None] * 4
        if name in replays:
            ordered = sorted(cold[name])
            times = [statistics.median(warm[name]), statistics.median(ordered),
                     ordered[repeats // 5], ordered[repeats - 1 - repeats // 5]]
        found[name] = [*times, statistics.median(wall[name])]
    return found


def peak_memory(run):
    """MiB that a run allocates on top of what is there, or None without CUDA."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finished(run)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(dtype, repeats):
    """(matmul FLOP/s in `dtype`, copy bytes/s counting reading and writing) of this machine."""
    n, size = (8192, 2**29) if CUDA else (1024, 2**26)
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    times = measure({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats)
    matmul, copy = (times[name][1] or times[name][4] for name in ("matmul", "copy"))
    return 2e3 * n**3 / matmul, 2e3 * size / copy


def gradients(function, inputs, dy):
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(function(*inputs), leaves, dy, allow_unused=True)


def check(contenders, inputs, dy, tolerance):
    """Raises AssertionError unless all compute the results and the gradients of the reference.

    The flow's gradient jumps where a position crosses a pixel, so that a few of its numbers may
    differ by as much as they are large: errors are measured over whole tensors.
    """
    truth = None
    for name, function in contenders.items():
        found = [function(*inputs)]
        if name != "augmented":
            found += gradients(function, inputs, dy)
        truth = truth or found  # the reference is the first
        for a, b in zip(found, truth):
            error = (a.float() - b.float()).norm() / b.float().norm()
            if not error < tolerance:
                raise AssertionError(f"{name} differs from the reference by {error:.3g} of the "
                                     "norm")


def rows_of(operation, shape, dtype, contenders, inputs, dy, ideal, repeats, tolerance=None):
    """Times the contenders forward and in both directions: rows of COLUMNS.

    Their results are compared first if there is a tolerance.
    """
    forward, both, first = {}, {}, {}
    for name, function in contenders.items():
        forward[name] = functools.partial(function, *inputs)
        if name != "augmented":
            both[name] = functools.partial(gradients, function, inputs, dy)
        first[name] = finished(both.get(name, forward[name]))
    if tolerance:
        check(contenders, inputs, dy, tolerance)
    for kind, runs in (("forward", forward), ("both", both)):
        for name, times in measure(runs, repeats).items():
            yield [operation, shape, str(dtype).removeprefix("torch."), name, kind, first[name],
                   *times, peak_memory(runs[name]), 100 * ideal[kind] / (times[1] or times[4]),
                   chosen_tile(dtype) if name == "kernels" and "lora" in operation else None]


def chosen_tile(dtype):
    """What autotuning took last: BLOCK_M x BLOCK_OUT x BLOCK_IN, warps."""
    config = list(autotuned(dtype).cache.values())[-1]
    return f"{' x '.join(map(str, config.kwargs.values()))}, {config.num_warps} warps"


# --------------------------------------------------------------------------------------------------
# The benchmarks


def bench_autocast(dtype, repeats, matmul, copy):
    """x, A and B in float32 under bfloat16 autocast, as in finetune.py; W as a layer caches it."""
    yield from bench_lora(torch.bfloat16, repeats, matmul, copy, wide=True)


def bench_lora(dtype, repeats, matmul, copy, wide=False):
    """q and v of a ViT's qkv; W frozen, gradients to x, A and B."""
    for label, M, K, R in LORA_SHAPES:
        N = 3 * K
        shapes = ((M, K), 1), ((N, K), K**-0.5), ((N,), 1), ((2 * R, K), K**-0.5), ((2 * K, R), 0.1)
        x, W, b, A, B = (torch.randn(shape, device=DEVICE).mul_(std) for shape, std in shapes)
        if not wide:
            x, b, A, B = (tensor.to(dtype) for tensor in (x, b, A, B))
        for tensor in (x, A, B):
            tensor.requires_grad_()
        W, dy = W.to(dtype), torch.randn(M, N, device=DEVICE).to(dtype)
        eager = dict(reference=reference, addmm=addmm, three_matmuls=three_matmuls,
                     grouped_convolution=grouped_convolution)
        contenders = dict(eager)
        if CUDA:
            contenders |= compiled(dict(addmm=addmm, reference=reference, kernels=kernels))
            contenders |= dict(kernels=kernels)
            if not wide and 2 * R <= 64:
                contenders |= dict(augmented=augmented)
        if wide:
            contenders = {name: autocast(function) for name, function in contenders.items()}
        frozen = 2e3 * M * N * K / matmul
        ideal = dict(forward=frozen, both=2 * frozen)
        operation = "lora_linear, float32 x" if wide else "lora_linear"
        for p, tolerance in ((0.0, 0.05), (DROPOUT, None)):  # without dropout all are the same
            yield from rows_of(operation, f"{label}, dropout {p}", dtype, contenders,
                               (x, W, b, A, B, p), dy, ideal, repeats, tolerance)
        contenders = dict(frozen_linear=autocast(frozen_linear) if wide else frozen_linear)
        yield from rows_of(operation, label, dtype, contenders, (x, W, b, A, B, 0.0), dy, ideal,
                           repeats)


def flows(B, H, W):
    """Smooth as a registration network's; so large that it folds the image; random."""
    smooth = F.interpolate(torch.randn(B, 2, 8, 8, device=DEVICE), size=(H, W), mode="bicubic")
    return {"smooth": 3 * smooth, "folding": 30 * smooth,
            "random": 20 * torch.randn(B, 2, H, W, device=DEVICE)}


def bench_warp(dtype, repeats, matmul, copy):
    """Forward moves flow, image and result; backward what the head of warp.py counts."""
    for B, C, H, W in WARP_SHAPES:
        for name, flow in flows(B, H, W).items():
            inputs = [torch.randn(B, C, H, W, device=DEVICE), flow.contiguous()]
            image, flow = (tensor.requires_grad_() for tensor in inputs)
            dy, label = torch.randn_like(image), f"{B} x {C} x {H} x {W}, {name} flow"
            contenders = dict(reference=warp_reference, grid_sample=grid_sample)
            if CUDA:
                contenders |= compiled(contenders) | dict(kernels=warp_triton)
            forward, backward = (4e3 * B * H * W * words / copy
                                 for words in (2 + 2 * C, 4 + 12 * C))
            ideal = dict(forward=forward, both=forward + backward)
            yield from rows_of("warp", label, torch.float32, contenders, (image, flow), dy, ideal,
                               repeats, 0.05)
            grid = sampling_grid(image, flow).detach().requires_grad_()
            contenders = {"grid_sample, ready grid": ready_grid}
            yield from rows_of("warp", label, torch.float32, contenders, (image, grid), dy, ideal,
                               repeats)


def bench_step(dtype, repeats, matmul, copy):
    """A training step of a whole ViT with LoRA, by the clock: it launches hundreds of kernels."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import lora
    import mrm
    import vit
    side, batch, sizes = 224, 64, {}
    if not CUDA:
        side, batch, sizes = 64, 2, dict(embed_dim=96, depth=2, num_heads=3)
    images = torch.randn(batch, 1, side, side, device=DEVICE)
    runs = {}
    for name, wanted, compiles in (
            ("kernels", True, False), ("kernels, compiled", True, True),
            ("reference", False, False), ("reference, compiled", False, True)):
        if CUDA or name == "reference":
            model = lora.add_lora(vit.ViT(side, num_classes=14, **sizes), rank=4).to(DEVICE)
            runs[name] = step_of(model, images, wanted, compiles)
    first = {name: finished(run) for name, run in runs.items()}
    for name, times in measure(runs, repeats, replayed=False).items():
        yield ["LoRA step", f"ViT, {batch} x {side} x {side}", "bfloat16", name, "step",
               first[name], *times, peak_memory(runs[name]), None, None]


def step_of(model, images, wanted, compiles):
    """One step of `model`, with the kernels if `wanted`."""
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    forward = torch.compile(model, dynamic=False) if compiles else model

    def step():
        use_kernels(wanted)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = forward(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


# --------------------------------------------------------------------------------------------------
# Command line


def hardware():
    if CUDA:
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def shown(values):
    return ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(BENCHES), help="one part (default: all)")
    parser.add_argument("--repeats", type=int, default=50 if CUDA else 11,
                        help="timed runs a number (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"],
                        default="bf16" if CUDA else "fp32", help="of LoRA (default: %(default)s)")
    parser.add_argument("--out", default="runs/bench/bench.csv", help="CSV (default: %(default)s)")
    args = parser.parse_args(argv)

    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[args.dtype]
    torch.manual_seed(0)
    version = triton.__version__ if triton else "absent"
    machine = hardware(), f"torch {torch.__version__}, triton {version}"
    print("; ".join(machine))
    if not CUDA:
        print("No CUDA GPU here: the Triton kernels are not measured, only the torch references on "
              "the CPU.")
    matmul, copy = ceilings(dtype, args.repeats)
    print(f"Ceilings: matmul {matmul / 1e12:.4g} TFLOP/s ({dtype}), copy {copy / 1e9:.4g} GB/s\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["hardware", "versions", "matmul_TFLOPs", "copy_GBs", *COLUMNS])
        for name in [args.only] if args.only else BENCHES:
            for row in BENCHES[name](dtype, args.repeats, matmul, copy):
                print("| " + " | ".join(shown(row)) + " |", flush=True)
                writer.writerow([*machine, *shown((matmul / 1e12, copy / 1e9)), *shown(row)])
    print(f"\nwritten: {args.out}")


BENCHES = {"lora": bench_lora, "autocast": bench_autocast, "warp": bench_warp, "step": bench_step}

if __name__ == "__main__":
    main()
