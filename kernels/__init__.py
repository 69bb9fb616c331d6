"""The two operations that deserve a GPU kernel, each beside the torch reference that it must equal.

    from kernels import lora_linear, warp

CUDA tensors run the Triton kernels and all others run the references: one signature, the same
gradients. `use_kernels(False)` or MEDVISION_NO_KERNELS=1 (the scripts' --no-kernels) sends every
tensor to the references. So do an older GPU, no C compiler, a driver or a tile that does not fit,
and one line on stderr says why. With TRITON_INTERPRET=1, set before the first import, a debugger
can step through the kernels on CPU tensors, called by name (`lora_linear_triton`, `warp_triton`).

Both are plain autograd functions: torch.compile breaks its graph there, and the kernels have
neither fake tensors nor second or forward-mode derivatives (RuntimeError). `kernels.lora_linear` is
the function; a notebook reloads its file, sys.modules["kernels.lora_linear"], and then `kernels`.
"""
import os
import sys
from types import SimpleNamespace

import torch

ABSENT = ""  # why there is no Triton
try:
    import triton
    import triton.language as tl

    if [int(number) for number in triton.__version__.split(".")[:2]] < [3, 4]:
        ABSENT = f"expected Triton 3.4 or newer, found {triton.__version__}"  # its masks are wrong
except ImportError:  # macOS and Windows have no Triton
    ABSENT = "Triton is not installed"
if ABSENT:  # the kernels stay functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(**options):
    return triton.jit(**options) if triton else lambda kernel: kernel


# What torch.compile leaves alone: torch.compiler.disable, which is slow at the first call.
uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def use_kernels(wanted):
    """Turns the Triton kernels on (the default) or off, for this process and those it starts."""
    os.environ["MEDVISION_NO_KERNELS"] = "0" if wanted else "1"


def wants_triton(tensor):
    """Whether Triton is to run an operation on `tensor`: on CUDA, not turned off."""
    return tensor.is_cuda and os.environ.get("MEDVISION_NO_KERNELS", "0") in ("", "0")


TRIED, FAILED = set(), set()  # (operation, device, what varies), (operation, device)


@uncompiled
def kernels_run(operation, function, tensors, *rest):
    """Whether function(*tensors, *rest), an operation by its kernels, runs on this device. The
    first call with tensors of these sizes tries it in both directions: what fails then (a compiler,
    a driver, every tile) would fail within a training step. One line says why, once."""
    place = operation, tensors[0].device
    x = tensors[0]
    case = (*place, x.shape[1:], x.dtype, x.requires_grad, *rest[1:], torch.is_grad_enabled(),
            *((t.shape[-2:], t.dtype, t.requires_grad) for t in tensors[1:] if t is not None))
    if place in FAILED or case in TRIED:
        return place not in FAILED
    try:
        if ABSENT:
            raise RuntimeError(ABSENT)
        if (found := torch.cuda.get_device_capability(place[1])) < (8, 0):
            raise RuntimeError("expected a GPU of compute capability 8.0 (Ampere) or newer, found "
                               "%d.%d" % found)
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        result = function(*leaves, *rest)
        if result.requires_grad:
            result.backward(result.detach())
    except torch.OutOfMemoryError:  # the reference needs as much
        raise
    except Exception as error:  # whatever it is, the reference gives the same numbers
        FAILED.add(place)
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        print(f"\n{operation}: no Triton kernels on {place[1]}, the torch reference runs: {why}",
              file=sys.stderr, flush=True)  # below a progress bar
        return False
    TRIED.add(case)
    return True


def refuse_double_backward(operation):
    if torch.is_grad_enabled():
        raise RuntimeError(f"{operation}: expected one backward pass, found create_graph=True, and "
                           "the kernels have no second derivative: call kernels.use_kernels(False)")


from .lora_linear import lora_linear  # noqa: E402  (the files import the names above)
from .warp import warp  # noqa: E402

__all__ = ["lora_linear", "warp", "use_kernels"]
