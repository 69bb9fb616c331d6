"""Everything that touches the disk: images, lists, reports, pairs, demo records, checkpoints, logs, pictures.

    python data.py demo --out demo            # draw the demo records (the scripts do it on first use)
    python data.py audit --root DIR           # split leakage, class counts, unreadable files

The sections, in order: errors and command lines, start-up, checkpoints, run logs and pictures, reading images, lists
and reports, the report tokenizer, augmentations and batches, A/B pairs, demo chest radiographs, demo brain pairs,
audit. Nothing here knows a model or a loss.

Shapes: B batch, C channels, H x W pixels, L report tokens. Images are float32 (C, H, W); grey is C = 1.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------------
# Errors and command lines


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: file and line, what was expected, what was found."""


def option(default, help, **kwargs):
    """A dataclass field that carries its own help text (and argparse `choices`, `nargs`): the one home of a default."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every script."""

    out: str = option("", "folder of this run (default: runs/<script>)")
    resume: bool = option(False, "go on from OUT/last.pt")
    seed: int = option(0, "seed of every random choice of the run")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "auto takes bf16 autocast where the hardware multiplies in it", choices=["auto", "fp32", "bf16"])
    workers: int = option(0, "processes that read images (0: this one)")
    kernels: bool = option(True, "Triton kernels on CUDA; --no-kernels runs the torch references")


def parse_config(config_class, argv=None, description=None):
    """The command line of a dataclass: `--name value` a field, `--flag` / `--no-flag` a bool. Returns an instance."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        kwargs = dict(field.metadata)
        shown = field.default if field.default not in ("", None) else "none"
        kwargs["help"] += "" if "default" in kwargs["help"] else f" (default: {shown})"
        kwargs["help"] = kwargs["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs.setdefault("type", type(field.default))
            kwargs.setdefault("metavar", None if "choices" in kwargs else field.name.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kwargs)
    return config_class(**vars(parser.parse_args(argv)))


def run_script(main):
    """Runs `main()`; an InputError ends the script with its one line and status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Start-up: seeds, device, precision, processes, learning rate


def start_run(config):
    """Seeds the generators, joins the process group under torchrun and picks the hardware.

    Returns (device, autocast, rank, world): `autocast()` is the context of a forward pass.
    """
    if not config.kernels:
        os.environ["MEDVISION_NO_KERNELS"] = "1"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cuda", "mps", "cpu") or (name == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {config.device}: expected auto, cuda, mps or cpu with that hardware present")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(name))

    def autocast():
        return torch.autocast(name, torch.bfloat16, enabled=bf16)

    return device, autocast, rank, world


def multiplies_bf16(device_type):
    """Whether bfloat16 is faster than float32 there. On a CPU without AVX512-BF16 or AMX it is hundreds of times slower."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def cosine_lr(step, steps, warmup, peak, floor=0.0):
    """Learning rate of `step` (from 0): linear warm-up over `warmup` steps to `peak`, then half a cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def atomic_write(path, write):
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk and renames it over `path`.

    A reader sees the old file or the new one, never half of one. Raises InputError where the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values atomically."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """Reads a checkpoint onto the CPU, tensors and plain values only (no pickled code is run).

    Old checkpoints hold an argparse.Namespace of their options: that class is allowed, nothing else.
    Raises InputError for a missing or unreadable file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises a dozen types on damaged files: all mean the same to the user
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a dict with a 'model' entry or a state dict, found {type(state).__name__}")
    return state


def random_state():
    """The state of the generators a loop uses, for a checkpoint; `set_random_state` puts it back."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# Run logs and pictures


class RunLog:
    """The `--out` folder of a run: config.json at the start, a line of log.jsonl a call, result.json at the end.

    Only rank 0 writes. Raises InputError at once where the folder cannot be written, before any time is spent.
    """

    def __init__(self, out, config, rank=0, resume=False):
        self.out, self.rank, self.start = Path(out), rank, time.time()
        if rank == 0:
            self.json("config.json", dataclasses.asdict(config))
            if not resume:
                (self.out / "log.jsonl").write_text("")

    def json(self, name, value):
        if self.rank == 0:
            text = json.dumps(value, indent=1, default=float) + "\n"
            atomic_write(self.out / name, lambda file: file.write(text.encode()))

    def line(self, **values):
        if self.rank == 0:
            values["seconds"] = round(time.time() - self.start, 2)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(values, default=float) + "\n")


def peak_memory_mib(device):
    """Peak memory in MiB: of the GPU on cuda, resident of this process elsewhere (0 where it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


# ---------------------------------------------------------------------------------------------------------------------
# Lists and reports


# ---------------------------------------------------------------------------------------------------------------------
# The report tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations and batches


# ---------------------------------------------------------------------------------------------------------------------
# A/B pairs


# ---------------------------------------------------------------------------------------------------------------------
# Demo chest radiographs


# ---------------------------------------------------------------------------------------------------------------------
# Demo brain pairs


# ---------------------------------------------------------------------------------------------------------------------
# Audit and command line
