"""What every script shares beside its method: options, start-up, files, the folder of a run.

Nothing here knows a data set, a model or a loss. What cannot be used is refused by an InputError,
in one line that says what was expected and found, in which file and line.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Errors and options


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that a user can act on:
    InputError(message), or InputError(where, expected, found)."""

    def __init__(self, where, expected=None, found=None):
        if expected is not None:
            where = f"{where}: expected {expected}, found {found}"
        text = " ".join(str(where).splitlines())
        super().__init__(text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}")


def warn(text):
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        print(f"WARNING: {text}", file=sys.stderr)


warn_once = functools.cache(warn)


def option(default, help, **metadata):
    """A dataclass field with its help text. A default of None means the preset's (see `fill`).
    metadata: argparse's `choices`; `within`, the interval that the value lies in, as "[0, 1)";
    `free=True` for an option that may change between a run and its resumption; `typed=False` for
    one that a preset alone sets: the command line has no flag for it; `needs`, an option without
    which it does nothing (it is free); `takes`, of a mode, the options that do something in it."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every script."""

    script: ClassVar = ""  # as python -m knows it; config.json says which script made a run
    out: str = option(None, "folder of this run (default: runs/<script>)", free=True)
    resume: bool = option(False, "go on from OUT/last.pt", free=True)
    seed: int = option(0, "seed of every random choice of the run", within="[0, 4294967295]")
    steps: int = option(None, "optimiser steps, instead of the preset's epochs", within="[1, inf)")
    epochs: float = option(None, "passes over the data, instead of steps", within="(0, inf)")
    batch_size: int = option(None, "samples of a step, of all processes", within="[1, inf)")
    lr: float = option(None, "peak learning rate", within="(0, inf)")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is", free=True)
    dtype: str = option("auto", "type of the products; auto measures which one is faster",
                        choices=["auto", "fp32", "bf16", "fp16"])
    workers: int = option(0, "processes that read images; 0: none", within="[0, 64]", free=True)
    kernels: bool = option(True, "Triton kernels on CUDA, not torch's references", free=True)


RUNNING = ("out", "device", "dtype", "workers", "kernels")  # what a mode `takes` at least


def options_of(config):
    """What config.json and the checkpoints hold of a configuration."""
    return {"script": config.script} | dataclasses.asdict(config)


def command_of(script):
    return f"python -m {script}" if "." in script else f"python {script}.py"


def flag_of(field):
    return "--" + field.name.replace("_", "-")


def parse_config(config_class, argv=None, description=None):
    """An instance of a dataclass of options, read from the command line: `--name value` for a
    field, `--[no-]name` for a bool."""
    script = getattr(config_class, "script", None)
    parser = argparse.ArgumentParser(prog=script and command_of(script), description=description,
                                     usage="%(prog)s [options]; --help lists them",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        if not field.metadata.get("typed", True):
            continue
        text, choices = field.metadata["help"], field.metadata.get("choices")
        if "default" not in text:
            shown = {None: "the preset's", "": "none"}.get(field.default, field.default)
            text += f" (default: {shown})"
        kind = {"type": field.type, "choices": choices}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = text.replace("%", "%%")
        parser.add_argument(flag_of(field), default=field.default, help=text, **kind)
    config = config_class(**vars(parser.parse_args(argv)))
    check_ranges(config)
    check_used(config)
    return config


def check_used(config):
    """Refuses an option that would be ignored, by its `needs` or the `takes` of another."""
    given = {field.name: field for field in dataclasses.fields(config)
             if getattr(config, field.name) != field.default}
    for name, field in given.items():
        needs, takes = (field.metadata.get(key) for key in ("needs", "takes"))
        if needs and needs not in given:
            raise InputError(flag_of(field), f"--{needs} beside it", "none")
        used = {name, *(takes or given)}
        unused = [flag_of(other) for other in given.values() if other.name not in used]
        if unused:
            known = ", ".join(sorted(takes))
            raise InputError(flag_of(field), f"no options but {known}", ", ".join(unused))


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
    lengths = {"steps", "epochs"}
    typed = {n for n, value in vars(config).items() if value is not None}
    if lengths <= typed:
        raise InputError("--steps and --epochs", "one of them", "both")
    if lengths & typed:
        typed |= lengths
    config = dataclasses.replace(config, **{n: preset[n] for n in preset if n not in typed})
    check_ranges(config)
    return config


def number_of_steps(config, samples, per_step):
    """The optimiser steps of a filled configuration: `steps`, or `epochs` over `samples`."""
    return config.steps or max(1, round(config.epochs * samples / per_step))


def even_batch(config, parts):
    """`config` with a batch that `parts`, processes x passes of a step, share evenly: not a larger
    one, unless a part would have no image."""
    size = max(1, config.batch_size // parts) * parts
    if size != config.batch_size:
        warn(f"--batch-size {config.batch_size}: steps take {size} images, which {parts} parts "
             "(processes x passes) share evenly")
    return dataclasses.replace(config, batch_size=size)


def check_same(saved, config, path, unasked=("auto",)):
    """Refuses a `config` that asks for another value of an option that shapes a result than
    `saved`, the options of an earlier run in the file `path`. `unasked` values ask for nothing."""
    check_maker(saved, config, path)
    for field in dataclasses.fields(config):
        old, now, flag = saved.get(field.name), getattr(config, field.name), flag_of(field)
        free = {"free", "needs"} & field.metadata.keys()
        if not free and now not in unasked and old != now:
            found = f"a run with {flag} {old}; give the same options, or another --out"
            raise InputError(path, f"{flag} {now}, as asked for now", found)


def check_maker(saved, config, path):
    """Refuses what another script made: `saved` are the options of a run, in the file `path`."""
    maker = saved.get("script", config.script)
    if maker != config.script:
        expected = f"a run of {command_of(config.script)}"
        raise InputError(path, expected, f"one of {command_of(maker)}")


def run_script(main):
    """Runs `main()`; an InputError ends the script with its one line and status 2."""
    code = 0
    try:
        main()
    except SystemExit as stop:  # a signal; all processes stop after the same step
        code = stop.code
    except (InputError, RuntimeError, ConnectionError, EOFError) as error:
        lost = isinstance(error, (BrokenProcessPool, ConnectionError, EOFError))
        if lost or "DataLoader worker" in str(error):
            error = ("a process that reads images was killed, as the system does when memory runs "
                     "out; use fewer --workers")
        elif not isinstance(error, InputError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if torch.distributed.is_initialized():  # else its threads may end after what they use
        torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)


# --------------------------------------------------------------------------------------------------
# Start-up: processes and device, precision, seeds


def join(config):
    """Picks the device and joins the process group under torchrun. Returns (device, rank, world).
    A device that is not there is refused."""
    if not config.kernels:
        os.environ["MEDVISION_NO_KERNELS"] = "1"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    name = there[0] if config.device == "auto" else config.device
    if name not in there:
        raise InputError("--device", "auto, cuda, mps or cpu with that hardware present", name)
    if config.device == "auto" and not cuda and shutil.which("nvidia-smi"):
        warn_once(f"an NVIDIA driver is here, but torch {torch.__version__} cannot use the GPU: it "
                  "is built without CUDA or for a newer driver")
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # refuses more processes than there are GPUs
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    return device, rank, world


# On a CPU bfloat16 slows ViTs of less than this width down: the conversions cost more than the
# products save
NARROW = 384
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def with_dtype(config, device, world=1, saved=None, width=NARROW):
    """`config` with --dtype auto replaced by a type: that of the resumed run `saved`, else what is
    faster here for a ViT of this `width`. All processes take what the first one measures."""
    dtype = saved["config"]["dtype"] if saved and config.dtype == "auto" else config.dtype
    if dtype == "auto" and (device.type == "mps" or device.type == "cpu" and width < NARROW):
        dtype = "fp32"  # on MPS nothing was measured
    elif dtype == "auto":
        dtype = from_all(fastest_type(device), world)[0]
    return dataclasses.replace(config, dtype=dtype)


@functools.cache
def fastest_type(device):
    """Times a product of each type. The first that is 1.2 times as fast as float32 wins: bf16, and
    on CUDA fp16, which needs scaled gradients."""
    names, side, clock, times = ["fp32", "bf16", "fp16"], 4096, time.time, {}
    if device.type == "cpu":  # a processor's own time leaves out what other programs take
        names, side, clock = ["fp32", "bf16"], 512, time.process_time
    for name in 12 * names:
        if times.get(name, 0) < 0.1:  # a processor that emulates bfloat16 shows it the first time
            matrix, began = torch.ones(side, side, dtype=TYPES[name], device=device), clock()
            (matrix @ matrix)[0, 0].item()  # .item() waits for the GPU
            times[name] = min(times.get(name, math.inf), clock() - began)
    chosen = next((name for name in names[1:] if times[name] * 1.2 <= times["fp32"]), "fp32")
    if int(os.environ.get("RANK", 0)) == 0:
        shown = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
        print(f"--dtype auto: {chosen} (a product of {side} x {side}: {shown})", flush=True)
    return chosen


def autocast_for(config, device):
    """A function that makes the context of a forward pass in the type that `with_dtype` chose."""
    return functools.partial(torch.autocast, device.type, TYPES[config.dtype],
                             enabled=config.dtype != "fp32")


def scaler_for(config, device):
    """float16 knows no number below 6e-8: the loss, and all gradients with it, are multiplied by a
    scale while they are computed. In any other type this does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")


def seeded(*numbers):
    """A torch.Generator whose stream depends on all the given integers."""
    sequence = np.random.SeedSequence([number % 2**32 for number in numbers])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def seed_rank(number, rank):
    """Gives every process but the first its own random numbers, for masks and dropout."""
    if rank:
        torch.manual_seed(seeded(number, rank).initial_seed() % 2**32)


def mean_over_processes(tensors):
    """Makes each tensor its mean over torchrun's processes, in one message for all of them."""
    if torch.distributed.is_initialized():
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def from_all(value, world):
    """[`value` of each of the processes]"""
    values = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def over_images(function, paths, verb="reading images"):
    """[function(path) for path in paths] with a progress bar, many paths in a process per core.
    `function` can be pickled. (Threads would fight for Python's lock.)"""
    bar = functools.partial(tqdm, desc=verb, total=len(paths), leave=False, delay=1)
    if len(paths) < 200:
        return list(bar(map(function, paths)))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    cores = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ProcessPoolExecutor(cores, context, torch.set_num_threads, (1,)) as pool:
        return list(bar(pool.map(function, paths, chunksize=16)))


# --------------------------------------------------------------------------------------------------
# Files: text, JSON, CSV, checkpoints


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
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def atomic_write(path, write):
    """Calls `write(file)` on a temporary file beside `path` and renames it: a reader sees the old
    file or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path, text):
    content = text.encode(errors="surrogateescape")  # names of files may be no UTF-8
    atomic_write(path, lambda file: file.write(content))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, default=float) + "\n")


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values."""
    content = io.BytesIO()  # on a full disk torch.save itself ends in another error
    torch.save(state, content)
    atomic_write(path, lambda file: file.write(content.getbuffer()))


# What a checkpoint may hold beside tensors and plain values: the options of old ones, and numbers
# of numpy, whose function stands under two names
NUMBER = np.float64(0).__reduce__()[0]
KINDS = "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]
SAFE = [argparse.Namespace, NUMBER, (NUMBER, "numpy.core.multiarray.scalar"), np.dtype,
        *{type(np.dtype(kind)) for kind in KINDS}]


def load_checkpoint(path):
    """Reads a checkpoint onto the CPU: a dict of tensors, plain values and what SAFE allows, no
    pickled code."""
    try:
        with torch.serialization.safe_globals(SAFE):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a damaged file raises one of a dozen types
        # torch's own text goes on to say how to load the file unprotected
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"code to run ({code[1]})" if code else f"another file ({type(error).__name__})"
        raise InputError(path, "a checkpoint of tensors and plain values alone", found) from None
    if not isinstance(state, dict):
        raise InputError(path, "a dict with a 'model' entry or a state dict", type(state).__name__)
    return state


def checkpoint_file(path, *names):
    """`path`; of a run's folder, the first of the files `names` that it holds, else the last."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).exists()), path / names[-1])


def start_file(weights):
    """The checkpoint that a run starts from: a file, or in the folder of an earlier run."""
    return checkpoint_file(weights, "adapter.pt", "best.pt", "last.pt")


def weights_digest(weights):
    """Tells checkpoints at the same place apart, by what they hold; "" where there is none."""
    path = start_file(weights or "none")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# --------------------------------------------------------------------------------------------------
# A run: its folder, its speed, its resumption


def lock(folder):
    """Takes a folder for this process, until the returned file is closed or the process dies.
    Refuses a folder that another process has taken."""
    try:
        import fcntl

        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder, ".lock"), "w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise InputError(folder, "a folder that no other run is using", "one that is written to; "
                         "wait, or give another --out") from None
    except (ImportError, OSError):  # Windows; no locks there; or no place, as writing will say
        return None


RUN_FILES = ("last.pt", "best.pt", "adapter.pt", "result.json", "predictions.csv", "log.jsonl",
             "progress.gif")


def check_apart(out, *sources):
    """Refuses to write into the folder of a run or over its files, into one of the `sources` (files
    or folders that are read) or below it, where a next call would take the output for input."""
    out = Path(out).resolve()
    folder = out.parent if out.name in RUN_FILES else out
    if (folder / "config.json").exists():
        raise InputError("--out", "a place of its own", f"{out}, which belongs to a run")
    for source in sources:
        if Path(source).resolve() in (out, *out.parents):
            raise InputError("--out", f"another place than {source}, which is read", out)


class RunLog:
    """The folder `out` of a run, which one run at a time owns and rank 0 alone writes: config.json
    at the start, log.jsonl, result.json. Made once nothing can be refused any more, since a new run
    removes the files of an earlier one. history: the lines of the run that is resumed; start: the
    time that seconds count from."""

    def __init__(self, out, config, rank=0, history=None, start=None):
        self.out, self.rank, self.start = Path(out), rank, start or time.time()
        self.history = list(history or ())
        if rank > 0:
            return
        self.lock, earlier = lock(out), self.out / "config.json"
        if history is None and earlier.exists():
            check_maker(read_json(earlier), config, earlier)
            weights = Path(getattr(config, "weights", None) or "").resolve()
            if self.out.resolve() in (weights, weights.parent) and weights.exists():
                raise InputError("--out", "another folder than that of --weights", out)
        self.json("config.json", options_of(config))
        old = [*self.out.glob(".*.tmp")]  # left by a run that was killed while it wrote
        old += [self.out / name for name in RUN_FILES] if history is None else []
        for path in old:
            path.unlink(missing_ok=True)

    def json(self, name, value):
        if self.rank == 0:
            write_json(self.out / name, value)

    def line(self, **values):
        """Adds a line to the history and rewrites log.jsonl: the steps after a checkpoint, which a
        resumed run takes again, leave no second line."""
        self.history.append(values | {"seconds": round(time.time() - self.start, 2)})
        if self.rank == 0:
            write_text(self.out / "log.jsonl", "".join(
                json.dumps(line, default=float) + "\n" for line in self.history))


class Timed:
    """Hands out `batches` and measures how fast a loop takes them and how long it waits; as a
    string, what a progress line shows of that."""

    def __init__(self, batches, world=1):
        self.batches, self.world = iter(batches), world
        self.began, self.waited, self.images = time.time(), 0.0, 0

    def __next__(self):
        asked = time.time()
        batch = next(self.batches)
        self.waited += time.time() - asked
        self.images += len(batch[0]) * self.world
        return batch

    def speed(self):
        """The numbers of log.jsonl and result.json."""
        seconds = max(time.time() - self.began, 1e-9)
        return {"images_per_second": self.images / seconds,
                "share_waiting_for_data": self.waited / seconds}

    def __str__(self):
        speed, waiting = self.speed().values()
        return f"{speed:.1f} images/s, {100 * waiting:.0f} % waiting for data"

    def steps(self, first, last, name, rank):
        """The numbers first ... last - 1, with a progress line that shows the speed."""
        bar = tqdm(range(first, last), name, last, initial=first, disable=rank > 0)
        for step in bar:
            yield step
            bar.set_postfix_str(str(self), refresh=False)


def check_finite(step, paths, rows, scaler, loss, gradient):
    """Raises InputError, with the step and the images of the batch (`rows` of `paths`), for a loss
    or gradient that is not finite. It runs before the update, so that weights and checkpoint stay
    good. In float16 a gradient may overflow: `scaler` skips that step and halves its scale."""
    for name, value in (("loss", loss), ("gradient", gradient)):
        if not value.isfinite().all() and (name == "loss" or scaler.get_scale() <= 1):
            files = ", ".join([str(paths[row]) for row in rows[:8]] + ["..."] * (len(rows) > 8))
            raise InputError(f"step {step}: the {name} is not finite; lower --lr, use --dtype fp32 "
                             f"or look at the images of the batch: {files}")


def check_weights(log, step, weights):
    """Refuses weights that are not finite, before they take the place of good ones on the disk."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(f"step {step}: {name} is not finite; lower --lr or use --dtype fp32; "
                             f"{log.out / 'last.pt'} holds the state before it")


def save_state(log, config, world, state, own=None):
    """Writes OUT/last.pt: `state`, in which every script has `model` and `step`, and what --resume
    needs beside it. Every process calls this: each adds its random state and what it alone holds
    (`own`)."""
    check_weights(log, state["step"], state["model"])
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    ranks = from_all({"torch": torch.get_rng_state(), "cuda": cuda, "own": own}, world)
    if log.rank == 0:
        save_checkpoint(log.out / "last.pt", state | {
            "config": options_of(config), "history": log.history, "ranks": ranks})


class State(dict):
    """What a last.pt holds; an entry that it lacks is refused."""

    def __missing__(self, name):
        raise InputError(self.path, "a checkpoint of this version", f"one without '{name}'")


def last_state(config, steps, **facts):
    """What OUT/last.pt holds, to go on from with --resume; None for a new run. `facts` name what
    must be as it was beside the options. A run may go on to more steps than were planned."""
    if not config.resume:
        return None
    path = Path(config.out) / "last.pt"
    saved = State(load_checkpoint(path))
    saved.path = path
    check_same(saved["config"] | {"steps": config.steps, "epochs": config.epochs}, config, path)
    for name, value in facts.items():
        if saved[name] != value:
            same = f"a run with the same {name.replace('_', ' ')} as now"
            raise InputError(path, same, "one with another; give the same, or another --out")
    if steps < saved["step"]:
        least = f"at least the {saved['step']} steps that {path} has taken"
        raise InputError("--steps or --epochs", least, f"{steps} steps")
    return saved


def restore(saved, rank, **parts):
    """Puts back the state of the `parts` of a loop (model, optimizer, scaler) and the random state
    of this process. Returns what else the process alone held."""
    try:
        for name, part in parts.items():  # of a model the file may hold what is trained alone
            part.load_state_dict(part.state_dict() | saved[name])
        own = saved["ranks"][rank]
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        return own["own"]
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        found = f"another ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(saved.path, "a checkpoint of this version", found) from None


class Saving:
    """Saves a loop every few minutes, and when Ctrl-C or SIGTERM asks the run to stop: save(steps)
    writes the checkpoint, `after` ends each step. The first signal lets the step end, saves, and
    leaves with the shell's code for it (130 or 143); a second one leaves at once. Under torchrun
    the processes agree on the step."""

    def __init__(self, save, world=1, seconds=180):
        self.save, self.world, self.seconds = save, world, seconds
        self.last_time, self.signal = time.time(), 0

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.note)
                         for number in (signal.SIGINT, signal.SIGTERM)}
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
        late = time.time() - self.last_time > self.seconds
        number, late = map(max, zip(*from_all((self.signal, late), self.world)))
        if number or late:
            self.save(steps)
            self.last_time = time.time()
        if number:
            print(f"stopped after step {steps}: the same command with --resume goes on", flush=True)
            sys.exit(128 + number)


# --------------------------------------------------------------------------------------------------
# Comparisons: many runs of one script


def run_cells(folder, configs, run, data_of):
    """Runs each of {name: configuration} of a comparison in the folder `folder`/name. Yields (name,
    content of result.json). A finished run is read instead, and one that was stopped goes on; one
    of other options, weights or data (data_of(configuration) is their digest now) is refused."""
    for name, config in configs.items():
        cell = Path(folder) / name
        config = dataclasses.replace(config, out=str(cell), resume=(cell / "last.pt").exists())
        ran = sorted(Path(folder).glob("*/config.json"))
        if config.dtype == "auto" and ran:  # a measurement of its own might come out otherwise
            config = dataclasses.replace(config, dtype=read_json(ran[0])["dtype"])
        if (cell / "result.json").exists():
            path = cell / "config.json"
            check_same(read_json(path), config, path, (None, "auto"))  # a recipe filled the others
            held, start = read_json(cell / "result.json"), getattr(config, "weights", "")
            for what, now in (("weights", weights_digest(start)), ("data", data_of(config))):
                if now and held.get(f"{what}_digest") != now:
                    raise InputError(cell, f"a run of the same {what} as now", "another; delete it")
        else:
            print(f"{name}: {cell}", flush=True)
            run(config)
            if torch.distributed.is_initialized():  # the first process writes result.json
                torch.distributed.barrier()
        yield name, read_json(cell / "result.json")


def mean_and_deviation(values, digits):
    """The mean over seeds with its standard deviation, in words; "" of no value."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


# --------------------------------------------------------------------------------------------------
# Pictures


def place_words(caption, font, width, line):
    """[((x, y), word, colour)] of a caption, wrapped at `width` pixels, `line` pixels a line.
    A word brings the space before it along."""
    if isinstance(caption, str):
        caption = [(" " + word, "black") for word in caption.split()]
    placed, x, y = [], 0, 0
    for word, colour in caption:
        if x and x + font.getlength(word) > width:
            x, y = 0, y + line
        word = word if x else word.lstrip()
        placed.append(((x, y), word, colour))
        x += font.getlength(word)
    return placed


def save_grid(path, rows, titles=("",), captions=None, scale=1):
    """Writes a PNG of images of one size in rows and columns; a .gif gets them as one more frame.
    rows: lists of images, (H, W), (1, H, W) or (3, H, W) in [0, 1], drawn `scale` times as large;
    titles: one a column; captions: one a row, wrapped below it: a text, or words (text, colour)."""
    font, gap, line = ImageFont.load_default(12), 8, 16
    H, W = (scale * side for side in rows[0][0].shape[-2:])
    column = max([W] + [math.ceil(font.getlength(title)) for title in titles]) + gap
    width = column * len(titles)
    texts = [place_words(text, font, width - gap, line) for text in captions or [""] * len(rows)]
    heights = [H + (text[-1][0][1] + line if text else 0) + gap for text in texts]
    canvas = Image.new("RGB", (gap + width, gap + line + sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), gap + line
    for i, title in enumerate(titles):
        draw.text((gap + i * column, gap // 2), title, "black", font)
    for row, text, height in zip(rows, texts, heights):
        for i, image in enumerate(row):
            pixels = torch.as_tensor(image).detach().cpu().float().clamp(0, 1) * 255
            pixels = pixels.round().byte().expand(3, *pixels.shape[-2:]).permute(1, 2, 0)
            drawn = Image.fromarray(pixels.contiguous().numpy()).resize((W, H), Image.NEAREST)
            canvas.paste(drawn, (gap + i * column, top))
        for (x, y), word, colour in text:
            draw.text((gap + x, top + H + y), word, colour, font)
        top += height
    path, frames = Path(path), [canvas]
    if path.suffix == ".gif" and path.exists():
        with Image.open(path) as earlier:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(earlier)] + frames
    options = {"save_all": True, "append_images": frames[1:], "duration": 500, "loop": 0}
    atomic_write(path, lambda file: frames[0].save(file, path.suffix[1:], **options))


COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"]


def ticks(values):
    """Some six round numbers around all `values`: 1, 2 or 5 times a power of ten apart."""
    low, high = (min(values), max(values)) if len(values) else (0, 1)
    high = high if high > low else low + 1
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= (high - low) / 5.001)
    return step * np.arange(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)


def draw_curves(log, title, panels, mark=None):
    """Draws OUT/curves.png: numbers of the history of a RunLog over the steps, in panels {label:
    names} below each other. What is not finite is left out. mark: (step, what happens there)."""
    if log.rank > 0:
        return
    font, left, width, height = ImageFont.load_default(12), 75, 450, 220
    canvas = Image.new("RGB", (left + width + 210, 55 + len(panels) * (height + 50)), "white")
    draw, top, curves = ImageDraw.Draw(canvas), 45, {}
    draw.text((left + width / 2, 8), title, "black", font, "ma")
    for name in sum(map(list, panels.values()), []):
        points = [(line["step"], line[name]) for line in log.history if name in line]
        points = np.array(points, float).reshape(-1, 2)
        curves[name] = points[np.isfinite(points).all(1)]
    xs = ticks([x for points in curves.values() for x in points[:, 0]])
    for label, names in panels.items():
        ys = ticks([y for name in names for y in curves[name][:, 1]])

        def place(x, y):
            return (left + width * (x - xs[0]) / (xs[-1] - xs[0]),
                    top + height * (ys[-1] - y) / (ys[-1] - ys[0]))

        for value in xs:
            x, _ = place(value, ys[0])
            draw.line((x, top, x, top + height), "#dddddd")
            draw.text((x, top + height + 4), f"{value:.6g}", "black", font, "ma")
        for value in ys:
            _, y = place(xs[0], value)
            draw.line((left, y, left + width, y), "#dddddd")
            draw.text((left - 5, y), f"{value:.6g}", "black", font, "rm")
        draw.text((left, top - 6), label, "black", font, "ls")
        if mark:
            x, _ = place(mark[0], ys[0])
            draw.line((x, top, x, top + height), "#555555", 2)
            draw.text((x + 4, top + 2), mark[1], "#555555", font)
        for i, name in enumerate(names):
            colour, y = COLOURS[i % len(COLOURS)], top + 8 + 17 * i
            draw.line([place(*point) for point in curves[name]], colour, 2, "curve")
            draw.line((left + width + 10, y, left + width + 25, y), colour, 3)
            draw.text((left + width + 30, y), name, "black", font, "lm")
        top += height + 50
    draw.text((left + width / 2, top - 30), "step", "black", font, "ma")
    atomic_write(log.out / "curves.png", lambda file: canvas.save(file, "PNG"))
