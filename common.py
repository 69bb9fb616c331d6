"""What every script shares beside its method: options, start-up, the folder of a run, its speed.

Nothing here knows a data set, a model or a loss. What cannot be used is refused by an InputError,
in one line that says what was expected and found, in which file and line.

The sections: errors and options; start-up; files; the clock of a run; its soundness and its state;
stopping; pictures.
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Errors, warnings and options


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that a user can act on. Either
    InputError(message), or InputError(where, expected, found): "where: expected ..., found ..."."""

    def __init__(self, where, expected=None, found=None):
        if expected is not None:
            where = f"{where}: expected {expected}, found {found}"
        text = " ".join(str(where).splitlines())
        super().__init__(text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}")


def warn(text):
    print(f"WARNING: {text}", file=sys.stderr)


def note(text):
    print(f"note: {text}", file=sys.stderr)


say_once = functools.cache(note)


def option(default, help, **metadata):
    """A dataclass field with its help text. A default of None means the preset's (see `fill`).
    metadata: argparse's `choices`; `within`, the interval that the value lies in, as "[0, 1)";
    `parse`, what makes the value of its text where the type alone does not;
    `free=True` for an option that may change between a run and its resumption."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def cores():
    """The cores that this process may use: its share, where torchrun started several here."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def count_workers(text):
    """The number of --workers. On a CPU auto is none: the step itself takes every core."""
    if text == "auto":
        return min(8, cores()) if torch.cuda.is_available() else 0
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or auto, found {text!r}")
    return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every script."""

    out: str = option(None, "folder of this run (default: runs/<script>)", free=True)
    resume: bool = option(False, "go on from OUT/last.pt", free=True)
    seed: int = option(0, "seed of every random choice of the run", within="[0, 4294967295]")
    steps: int = option(None, "optimiser steps, instead of the preset's epochs", within="[1, inf)")
    epochs: float = option(None, "passes over the data, instead of the preset's steps",
                           within="(0, inf)")
    batch_size: int = option(None, "samples of a step, of all processes and passes together",
                             within="[1, inf)")
    lr: float = option(None, "peak learning rate", within="(0, inf)")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is", free=True)
    dtype: str = option("auto", "auto: bf16 where it is faster", choices=["auto", "fp32", "bf16"])
    workers: int = option(0, "processes that read images (0: this one; auto: one a core and 8 at "
                          "most with a GPU, else 0)", within="[0, 64]", parse=count_workers,
                          free=True)
    kernels: bool = option(True, "Triton kernels on CUDA; --no-kernels runs the torch references",
                           free=True)
    profile: bool = option(False, "run 25 steps in a folder that is deleted, print where the time "
                           "of the last 20 went, and stop", free=True)


def flag_of(field):
    return "--" + field.name.replace("_", "-")


def parse_config(config_class, argv=None, description=None):
    """An instance of a dataclass of options, read from the command line: `--name value` for a
    field, `--[no-]name` for a bool."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]; --help lists them",
                                     description=description, formatter_class=layout)
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    own = parser.add_argument_group("options of this command")
    every = parser.add_argument_group("options of every script")
    fields = dataclasses.fields(config_class)
    for field in fields:
        text = field.metadata["help"]
        if "default" not in text:
            shown = {None: "the preset's", "": "none"}.get(field.default, field.default)
            text += f" (default: {shown})"
        kwargs = {"default": field.default, "help": text.replace("%", "%%")}
        if field.type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif "choices" in field.metadata:
            kwargs["choices"] = field.metadata["choices"]
        else:
            parse = field.metadata.get("parse", field.type)
            kwargs |= {"type": parse, "metavar": field.name.upper()}
        (every if field.name in shared else own).add_argument(flag_of(field), **kwargs)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], map(flag_of, fields), 1)
        raise InputError(f"{unknown[0]}: no such option" + "".join(f"; {n} is one" for n in near))
    config = config_class(**vars(values))
    check_ranges(config)
    for name in ("compare", "predict", "translate", "reconstruct", "attention"):
        if getattr(config, "profile", False) and getattr(config, name, False):
            raise InputError(f"--profile and --{name}", "one of them", "both")
    return config


def check_ranges(config):
    """Refuses an option outside the interval that it names, and NaN."""
    for field in dataclasses.fields(config):
        within, value = field.metadata.get("within"), getattr(config, field.name)
        if within and value is not None:
            low, high = map(float, within[1:-1].split(","))
            at_end = (value == low and within[0] == "[") or (value == high and within[-1] == "]")
            if not (low < value < high or at_end):
                raise InputError(flag_of(field), f"a number in {within}", value)


def fill(config, preset):
    """`config` with every option that is None taken from the dict `preset`, and checked.
    Steps and epochs say the same thing: whoever types one of them gets neither from the preset."""
    if config.steps is not None and config.epochs is not None:
        raise InputError("--steps and --epochs", "one of them", "both")
    values = {name: value for name, value in preset.items() if getattr(config, name) is None}
    if config.steps is not None or config.epochs is not None:
        values = {name: value for name, value in values.items() if name not in ("steps", "epochs")}
    config = dataclasses.replace(config, **values)
    check_ranges(config)
    return config


def number_of_steps(config, samples, per_step):
    """The optimiser steps of a filled configuration: `steps`, or `epochs` over `samples`."""
    return config.steps or max(1, round(config.epochs * samples / per_step))


def divide_batch(config, world):
    """`config` with a batch that `world` processes and `accumulate` passes share evenly: the next
    one above that does, which is said where it is not the one that was asked for."""
    parts = world * config.accumulate
    batch = math.ceil(config.batch_size / parts) * parts
    if batch != config.batch_size and int(os.environ.get("RANK", 0)) == 0:
        parts = f"{world} processes x --accumulate {config.accumulate}"
        print(f"--batch-size {config.batch_size} becomes {batch}, which {parts} share evenly")
    return dataclasses.replace(config, batch_size=batch)


def share_of_batch(config, world):
    """What each of `world` processes takes in one of the `accumulate` passes of a step."""
    return config.batch_size // (world * config.accumulate)


def check_same(saved, config, path):
    """Refuses a `config` that differs from `saved`, the options of an earlier run in the file
    `path`, in an option that shapes a result."""
    for field in dataclasses.fields(config):
        before, now, flag = saved.get(field.name), getattr(config, field.name), flag_of(field)
        if not field.metadata.get("free") and before != now:
            found = f"a run with {flag} {before}; give the same options, or another --out"
            raise InputError(path, f"{flag} {now}, as asked for now", found)


def run_script(main):
    """Runs `main()`; an InputError ends the script with its one line and status 2."""
    for stream in (getattr(sys, name, None) for name in ("stdout", "stderr")):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if torch.distributed.is_initialized():  # else its threads may end after what they use
            torch.distributed.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # what reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# --------------------------------------------------------------------------------------------------
# Start-up: processes and device, seeds, precision


def join(config):
    """Picks the device and joins the process group under torchrun. Returns (device, rank, world).
    A device that is not there is refused."""
    if not config.kernels:
        os.environ["MEDVISION_NO_KERNELS"] = "1"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = [name for name, here in (("cuda", cuda), ("mps", mps), ("cpu", True)) if here]
    name = there[0] if config.device == "auto" else config.device
    if name not in there:
        raise InputError("--device", "auto, cuda, mps or cpu with that hardware present", name)
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            least = f"at most {torch.cuda.device_count()} processes, one a GPU"
            raise InputError("torchrun --nproc_per_node", least, os.environ.get("LOCAL_WORLD_SIZE"))
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    return device, rank, world


def autocast(config, device, narrow=False):
    """A function that makes the context of a forward pass: bfloat16 autocast, or none.
    `narrow`: the model's layers are so narrow that on a CPU the conversions to bfloat16 cost more
    than its faster products save; --dtype auto then stays in float32 there."""
    wanted = config.dtype == "bf16"
    if config.dtype == "auto":
        wanted = multiplies_bf16(device.type) and not (narrow and device.type == "cpu")
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=wanted)


def multiplies_bf16(device_type):
    """Whether bfloat16 is faster than float32 on cuda, cpu or mps.
    A CPU without AVX512-BF16 or AMX takes hundreds of times as long."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def seed(number):
    """Seeds the generators of Python, numpy and torch."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def seeded(*numbers):
    """A torch.Generator whose stream depends on all the given integers."""
    sequence = np.random.SeedSequence([number % 2**32 for number in numbers])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def random_state():
    """The state of torch's generators, for a checkpoint; `set_random_state` puts it back."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --------------------------------------------------------------------------------------------------
# Files: text, JSON, CSV, checkpoints, the log of a run


def read_text(path):
    """The text of a file in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(path, "a text file in UTF-8", f"otherwise ({error})") from None


def read_json(path):
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}: line {line}: not readable as JSON ({error})") from None


def atomic_write(path, write, sync=True):
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk and renames it:
    a reader sees the old file or the new one, never half of one. Without `sync`, which takes
    milliseconds, that does not hold where the power fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own while it handles the disk's error.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path}: cannot be written: {cause.strerror or cause}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def check_writable(out):
    """Refuses a folder `out` that cannot be written, and does not make it."""
    try:
        parents = (Path(out), *Path(out).absolute().parents)
        tempfile.TemporaryFile(dir=next(folder for folder in parents if folder.exists())).close()
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def write_json(path, value):
    text = json.dumps(value, indent=1, default=float) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    content = text.getvalue().encode(errors="surrogateescape")  # names of files may be no UTF-8
    atomic_write(path, lambda file: file.write(content))


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """Reads a checkpoint onto the CPU: a dict of tensors and plain values, no pickled code. A
    .safetensors file becomes {"model": its tensors}. The one class allowed is argparse.Namespace,
    which holds the options in old checkpoints."""
    safetensors = str(path).lower().endswith(".safetensors")
    try:
        if safetensors:
            return {"model": read_safetensors(Path(path).read_bytes())}
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        others = ", ".join(sorted(file.name for file in Path(path).parent.glob("*.pt")))
        others = f"; its folder holds {others}, of another kind of run" if others else ""
        raise InputError(f"{path}: no such checkpoint{others}") from None
    except Exception as error:  # a damaged file raises one of a dozen types
        text = f"{type(error).__name__}: {error}"
        if safetensors:
            raise InputError(f"{path}: not readable as safetensors ({text[:200]})") from None
        code = re.search(r"GLOBAL (\S+)", text)
        if code:  # torch's own text goes on to say how to load the file unprotected
            found = f"it holds code to run ({code[1]}), not tensors and plain values alone"
            raise InputError(f"{path}: refused: {found}") from None
        reason = "damaged, or of another kind" if "Weights only" in text else text[:200]
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise InputError(path, "a dict with a 'model' entry or a state dict", type(state).__name__)
    return state


SAFE_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(content):
    """The tensors by name in the bytes of a .safetensors file: 8 bytes with the length of a header
    in JSON, {name: {dtype, shape, data_offsets}}, then the numbers, one tensor after the other."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape = SAFE_TYPES[entry["dtype"]], entry["shape"]
        start, stop = entry["data_offsets"]
        size = math.prod(shape) * kind.itemsize
        inside = start == end and stop - start == size and stop <= len(body)
        if not inside or min(shape, default=0) < 0:
            raise ValueError(f"{name} does not lie where it says; is the file complete?")
        numbers = torch.frombuffer(body, dtype=torch.uint8)[start:stop].clone()
        tensors[name], end = numbers.view(kind).reshape(shape), stop
    if end != len(body):
        raise ValueError("its numbers do not end where the file does")
    return tensors


def checkpoint_file(path, *names):
    """`path`; of a run's folder, the first of the files `names` that it holds, else the last."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).exists()), path / names[-1])


RUN_FILES = [
    "last.pt", "best.pt", "adapter.pt", "base.pt", "tokenizer.tiktoken", "result.json",
    "predictions.csv", "curves.png", "roc.png", "overlays.png", "reconstruction.png",
    "attention.png", "translation.png", "progress.png",
]


class RunLog:
    """The folder `out` of a run: config.json at the start, log.jsonl, result.json, by rank 0 alone.
    Made once nothing can be refused any more, since it removes the files of an earlier run there,
    unless `resume`. `start` is the time that seconds count from (default: now)."""

    def __init__(self, out, config, rank=0, resume=False, start=None):
        self.out, self.rank, self.start = Path(out), rank, start or time.time()
        self.json("config.json", dataclasses.asdict(config))
        if rank == 0 and not resume:
            for name in RUN_FILES:  # nobody may take an older run's file for this run's
                (self.out / name).unlink(missing_ok=True)
            self.append("", "w")
        if rank == 0:
            for path in self.out.glob(".*.tmp"):  # left by a run that was killed while it wrote
                path.unlink()

    def json(self, name, value):
        if self.rank == 0:
            write_json(self.out / name, value)

    def line(self, **values):
        if self.rank == 0:
            values["seconds"] = round(time.time() - self.start, 2)
            self.append(json.dumps(values, default=float) + "\n")

    def append(self, text, mode="a"):
        try:
            with open(self.out / "log.jsonl", mode) as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"{self.out}/log.jsonl: cannot be written: {error.strerror}") from None


# --------------------------------------------------------------------------------------------------
# The clock of a run: speed, memory, threads, profile


class Timed:
    """Hands out `batches` and measures how fast a loop takes them and how long it waits; as a
    string, what a progress line shows of that."""

    def __init__(self, batches, device, world=1):
        self.batches, self.device, self.world = iter(batches), device, world
        forget_peak_memory(device)
        self.began, self.waited, self.images = time.time(), 0.0, 0
        self.cores = FreeCores(device)

    def __next__(self):
        self.cores.look()
        asked = time.time()
        batch = next(self.batches)
        self.waited += time.time() - asked
        self.images += len(batch[0]) * self.world
        return batch

    def speed(self):
        """The three numbers of log.jsonl and result.json."""
        seconds = max(time.time() - self.began, 1e-9)
        return {"images_per_second": self.images / seconds,
                "share_waiting_for_data": self.waited / seconds,
                "peak_memory_mib": peak_memory_mib(self.device)}

    def __str__(self):
        speed, waiting, memory = self.speed().values()
        return f"{speed:.1f} images/s, {100 * waiting:.0f} % waiting for data, {memory:.0f} MiB"

    def steps(self, first, last, name, rank):
        """The numbers first ... last - 1, with a progress line that shows the speed."""
        bar = tqdm(range(first, last), name, last, initial=first, disable=rank > 0)
        for step in bar:
            yield step
            bar.set_postfix_str(str(self), refresh=False)


class FreeCores:
    """Keeps a loop on a CPU to the cores that other programs leave it; each step calls `look`.

    OpenMP's threads spin while they wait for each other, so that all of them wait for one whose
    core was taken: two runs of two threads on two cores would take ten times as long as one run.
    So a run gives up as many threads as waited for a core through most of five seconds, and tries
    again after a minute. Where OMP_NUM_THREADS is set, or the system does not count that waiting as
    Linux does, the number of threads stays, and with it the last digits of the results."""

    ALL = torch.get_num_threads()

    def __init__(self, device, interval=5, pause=60):
        free = device.type == "cpu" and self.ALL > 1 and "OMP_NUM_THREADS" not in os.environ
        self.interval, self.pause = interval, pause
        self.then, self.waited = time.time(), self.waiting()
        self.next = self.then + interval if free else math.inf

    def look(self):
        now = time.time()
        if now < self.next:
            return
        then, waited = self.then, self.waited
        self.then, self.waited, self.next = now, self.waiting(), now + self.interval
        lost = (self.waited - waited) / (now - then)  # threads that had no core
        if torch.get_num_threads() < self.ALL:
            torch.set_num_threads(self.ALL)
        elif lost > 0.4:
            torch.set_num_threads(max(1, self.ALL - max(1, round(lost))))
            self.next = now + self.pause
            say_once("another program holds a core: this run takes fewer threads while it does")

    @staticmethod
    def waiting():
        """Seconds that the threads of this process were ready to run and had no core."""
        seconds = 0.0
        for file in Path("/proc/self/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # a thread that ended
                seconds += int(file.read_text().split()[1]) / 1e9
        return seconds


def forget_peak_memory(device):
    """Lets `peak_memory_mib` begin anew, so that a run does not show an earlier run's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device):
    """Peak memory in MiB: of the GPU on cuda, of this process elsewhere (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# What every loop does beside the parts of its method: (row, owner, name of the function)
OF_EVERY_LOOP = (
    ("data", Timed, "__next__"), ("backward", torch.Tensor, "backward"),
    ("norm of the gradients", torch.nn.utils, "clip_grad_norm_"),
    ("norm of the gradients", torch.nn.utils, "get_total_norm"),
    ("optimiser", torch.optim.Optimizer, "zero_grad"), ("optimiser", torch.optim.SGD, "step"),
    ("optimiser", torch.optim.Adam, "step"), ("optimiser", torch.optim.AdamW, "step"))


def profile(run, config, parts):
    """Prints where the time of a step of the training `run(config)` goes, in the mean of 20 steps
    after 5. The rows sum to the step, since what is in no part is a row too.

    parts: (row, owner, name) of functions; the owner is a class, a module or a dict. A timed one
    stands in for each while this runs, so that the loops have no line for it. A part within a part
    counts for its own row alone. On a GPU the clock waits for the device where a part begins and
    ends. What Python and the device otherwise do at the same time adds up, so that a step takes
    longer than it does unmeasured.
    """
    device, rank, _ = join(config)
    seconds, inside, since, fetched = Counter(), ["the rest"], 0.0, 0
    first, last = (steps * getattr(config, "accumulate", 1) + 1 for steps in (5, 25))

    def charge():
        """Adds the time since the last call to the row that it was spent in."""
        nonlocal since
        getattr(torch, device.type).synchronize()
        before, since = since, time.perf_counter()
        seconds[inside[-1]] += since - before

    def timed(row, function):
        @functools.wraps(function)
        def stand_in(*args, **kwargs):
            nonlocal fetched
            charge()
            if row == "data":  # its first batch begins a step
                fetched += 1
                if fetched == first:
                    seconds.clear()
                if fetched == last:
                    raise StopIteration  # which ends the loop, as if there were no more batches
            inside.append(row)
            try:
                return function(*args, **kwargs)
            finally:
                charge()
                inside.pop()
        return stand_in

    try:
        with contextlib.ExitStack() as stack:
            for row, owner, name in (*parts, *OF_EVERY_LOOP):
                if isinstance(owner, dict):
                    stand_in = mock.patch.dict(owner, {name: timed(row, owner[name])})
                else:
                    stand_in = mock.patch.object(owner, name, timed(row, getattr(owner, name)))
                stack.enter_context(stand_in)
            # Of 1000 steps none of the first 25 evaluates
            out = stack.enter_context(tempfile.TemporaryDirectory())
            once = {"evaluations": 1} if hasattr(config, "evaluations") else {}
            run(dataclasses.replace(config, out=out, steps=1000, epochs=None, resume=False, **once))
    except StopIteration:
        total, rest = sum(seconds.values()), seconds.pop("the rest")
        for row, value in [*seconds.items(), ("the rest", rest), ("a step", total)] * (rank == 0):
            print(f"{row:24s}{1000 * value / 20:10.2f} ms{100 * value / total:7.1f} %")
        note(f"peak memory {peak_memory_mib(device):.0f} MiB on {device}")


# --------------------------------------------------------------------------------------------------
# What keeps a run sound, and lets it go on


def seed_rank(number, rank):
    """Gives every process but the first its own random numbers, for masks and dropout."""
    if rank:
        seed(seeded(number, rank).initial_seed() % 2**32)


def check_finite(step, paths, rows, **values):
    """Raises InputError, with the step and the images of the batch (`rows` of `paths`), for a value
    that is not finite. It runs before the update, so that weights and checkpoint stay good."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            files = ", ".join([str(paths[row]) for row in rows[:8]] + ["..."] * (len(rows) > 8))
            raise InputError(
                f"step {step}: the {name.replace('_', ' ')} is not finite; lower --lr, use "
                f"--dtype fp32 or look at the images of the batch: {files}")


def average(values, world):
    """The mean over the processes of a tensor `values`."""
    if world > 1:
        torch.distributed.all_reduce(values)
        values /= world
    return values


def save_state(log, model, optimizer, config, world, state):
    """Writes OUT/last.pt: all that --resume, --reconstruct and fine-tuning need. Every process
    calls it, because each adds its own random state. Weights that are not finite are refused."""
    states = [random_state()] * world
    if world > 1:
        torch.distributed.all_gather_object(states, random_state())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise InputError(f"step {state['step']}: {name} is not finite; lower --lr or use "
                             f"--dtype fp32; {log.out / 'last.pt'} holds the state before it")
    if log.rank == 0:
        more = {"config": dataclasses.asdict(config), "optimizer": optimizer.state_dict()}
        save_checkpoint(log.out / "last.pt", state | more | {"random": states})


def last_state(config, steps, **facts):
    """What OUT/last.pt holds, to go on from with --resume; None for a new run. `facts` name what
    must be as it was beside the options. A run may go on to more steps than were planned."""
    if not config.resume:
        return None
    path = Path(config.out) / "last.pt"
    saved = load_checkpoint(path)
    length = {"steps": config.steps, "epochs": config.epochs}  # compared below
    check_same(saved.get("config", {}) | length, config, path)
    for name, value in facts.items():
        if saved.get(name) != value:
            same = f"a run with the same {name.replace('_', ' ')} as now"
            raise InputError(path, same, "one with another; give the same, or another --out")
    if steps < saved["steps"]:
        least = f"at least the {saved['steps']} steps of the run in {path}"
        raise InputError("--steps or --epochs", least, f"{steps} steps")
    if steps > saved["steps"]:
        first = saved["step"] + 1
        rate = f"from step {first} on the learning rate is that of a run of {steps} steps"
        print(f"{path}: going on to {steps} steps instead of {saved['steps']}; {rate}")
    return saved


def restore_state(saved, optimizer, log):
    """Puts back optimiser, random state and log of a resumed run. Returns (step, history)."""
    optimizer.load_state_dict(saved["optimizer"])
    set_random_state(saved["random"][log.rank])
    if log.rank == 0:  # drops the lines of steps after the checkpoint, which are run again
        steps = {line["step"] for line in saved["history"]}
        lines = read_text(log.out / "log.jsonl").splitlines(True)
        whole = [line for line in lines if line.endswith("}\n")]
        text = "".join(line for line in whole if json.loads(line)["step"] in steps)
        atomic_write(log.out / "log.jsonl", lambda file: file.write(text.encode()))
    return saved["step"], saved["history"]


# --------------------------------------------------------------------------------------------------
# Stopping, and running the cells of a comparison


class Saving:
    """Saves a loop every few minutes, and when Ctrl-C or SIGTERM asks the run to stop.

        with Saving(save, world) as saving:     # save(steps) writes the checkpoint
            for step in ...:
                saving.after(step + 1)

    The first signal lets the step end, saves, and leaves with the shell's code for that signal
    (130 or 143); a second one leaves at once. Under torchrun the processes agree on the step."""

    def __init__(self, save, world=1, seconds=180):
        self.save, self.world, self.seconds = save, world, seconds
        self.saved, self.signal, self.handlers = time.time(), 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other may catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        print("stopping after this step; once more leaves at once", file=sys.stderr, flush=True)

    def after(self, steps):
        late = time.time() - self.saved > self.seconds
        wanted = torch.tensor([self.signal, late], dtype=torch.long)
        if self.world > 1:
            wanted = wanted.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        if wanted.any():
            self.save(steps)
            self.saved = time.time()
        if wanted[0]:
            print(f"stopped after step {steps}: the same command with --resume goes on", flush=True)
            sys.exit(128 + int(wanted[0]))


def run_cells(folder, configs, run):
    """Runs each of {name: configuration} of a comparison in the folder `folder`/name. Yields (name,
    content of result.json). A finished run is read instead, and one that was stopped goes on, with
    a warning where the script has changed since; one with other options is refused."""
    for name, config in configs.items():
        cell = Path(folder) / name
        config = dataclasses.replace(config, out=str(cell), resume=(cell / "last.pt").exists())
        script = Path(sys.modules[type(config).__module__].__file__)
        source = hashlib.sha256(script.read_bytes()).hexdigest()
        if (cell / "options.json").exists():
            ran = read_json(cell / "options.json")
            check_same(ran, config, cell / "options.json")
            if ran.get("source", source) != source:
                advice = "delete the folder to run it anew"
                warn(f"{script.name} changed since {cell} was made; {advice}")
        else:
            write_json(cell / "options.json", dataclasses.asdict(config) | {"source": source})
        if not (cell / "result.json").exists():
            print(f"{name}: {cell}", flush=True)
            run(config)
        yield name, read_json(cell / "result.json")


# --------------------------------------------------------------------------------------------------
# Pictures


def save_grid(path, rows, titles=("",), captions=None, scale=1):
    """Writes a PNG of images in rows and columns.
    rows: lists of images, (H, W), (1, H, W) or (3, H, W) in [0, 1], drawn `scale` times as large;
    titles: one a column; captions: one a row, wrapped below it."""

    def picture(image):
        pixels = (torch.as_tensor(image).detach().cpu().float().clamp(0, 1) * 255).round().byte()
        pixels = pixels.expand(3, *pixels.shape[-2:]).permute(1, 2, 0).contiguous()  # (H, W, 3)
        drawn = Image.fromarray(pixels.numpy())
        return drawn.resize((drawn.width * scale, drawn.height * scale), Image.NEAREST)

    font, gap, line = ImageFont.load_default(12), 8, 16
    rows = [[picture(image) for image in row] for row in rows]
    widths = [math.ceil(font.getlength(title)) for title in titles]
    column = max(widths + [drawn.width for row in rows for drawn in row]) + gap
    width = column * len(titles)
    texts = [textwrap.wrap(text, width // 6) for text in captions or [""] * len(rows)]
    heights = [max(drawn.height for drawn in row) + line * len(text) + gap
               for row, text in zip(rows, texts)]
    canvas = Image.new("RGB", (gap + width, gap + line + sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), gap + line
    for i, title in enumerate(titles):
        draw.text((gap + i * column, gap // 2), title, "black", font)
    for row, text, height in zip(rows, texts, heights):
        for i, drawn in enumerate(row):
            canvas.paste(drawn, (gap + i * column, top))
        top += height
        below = top - gap - line * len(text)
        draw.text((gap, below), "\n".join(text), "black", font, spacing=4)
    atomic_write(path, lambda file: canvas.save(file, "PNG"))


COLOURS = [
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf", "#000080", "#800000", "#006400", "#ffc000", "#ff00ff", "#404040",
]


def save_plot(path, curves, title, xlabel, ylabel, diagonal=False):
    """Writes a PNG of line plots {name: (xs, ys)}. Points that are None or not finite are left out.
    diagonal: both axes run from 0 to 1 and the line of chance is drawn, as for an ROC."""
    curves = {name: np.array(points, dtype=float) for name, points in curves.items()}  # (2, n)
    curves = {name: points[:, np.isfinite(points).all(0)] for name, points in curves.items()}
    every = np.concatenate([*curves.values(), np.zeros((2, 0))], axis=1)
    low, high = np.zeros(2), np.ones(2)  # the ends of the axes, (x, y)
    if every.size and not diagonal:
        low, high = every.min(1), every.max(1)
        high = np.where(high > low, high, low + 1)
    font, left, top, width, height = ImageFont.load_default(24), 150, 70, 900, 680
    canvas = Image.new("RGB", (left + width + 420, top + height + 110), "white")
    draw = ImageDraw.Draw(canvas)

    def place(point):
        x, y = (point - low) / (high - low)
        return left + width * x, top + height * (1 - y)

    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        x, y = place(value)
        draw.line((x, top, x, top + height), "#dddddd", 2)
        draw.line((left, y, left + width, y), "#dddddd", 2)
        draw.text((x, top + height + 8), f"{value[0]:.4g}", "black", font, "ma")
        draw.text((left - 10, y), f"{value[1]:.4g}", "black", font, "rm")
    draw.rectangle((left, top, left + width, top + height), outline="black", width=2)
    if diagonal:
        draw.line((left, top + height, left + width, top), "#999999", 3)
    for i, (name, points) in enumerate(curves.items()):
        colour, y = COLOURS[i % len(COLOURS)], top + 34 * i + 20
        dots = [place(point) for point in points.T]
        draw.line(dots, colour, 4, "curve")
        if len(dots) < 30:
            for dot in dots:
                draw.circle(dot, 5, colour)
        draw.line((left + width + 20, y, left + width + 50, y), colour, 5)
        draw.text((left + width + 60, y), name, "black", font, "lm")
    draw.text((left + width / 2, 20), title, "black", font, "ma")
    draw.text((left + width / 2, top + height + 50), xlabel, "black", font, "ma")
    draw.text((left, top - 14), ylabel, "black", font, "ls")
    canvas = canvas.reduce(2)  # drawn at twice the size, so that lines come out smooth
    atomic_write(path, lambda file: canvas.save(file, "PNG"))
