"""The two operations here that deserve a GPU kernel, each beside the torch reference it has to equal.

    from kernels import lora_linear, warp

CUDA tensors run the Triton kernels; all others run the references: one signature, the same gradients. `use_kernels(False)`
or MEDVISION_NO_KERNELS=1 (the scripts' --no-kernels) sends everything to the references, for teaching and for blame.
TRITON_INTERPRET=1, set before the first import, runs the kernels on CPU tensors when they are called by name
(`lora_linear_triton`, `warp_triton`): slow, but a debugger can step through them.

`kernels.lora_linear` is the function. Its file's other names come from `from kernels.lora_linear import ...`.
"""
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for macOS and Windows: the kernels stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(**options):
    """`triton.jit` where there is Triton."""
    return triton.jit(**options) if triton else lambda kernel: kernel


def use_kernels(wanted):
    """Turns the Triton kernels on (the default) or off, for this process and those it starts."""
    os.environ["MEDVISION_NO_KERNELS"] = "0" if wanted else "1"


def wants_triton(tensor):
    """Whether an operation on `tensor` should run in Triton: a CUDA tensor, Ampere or newer, kernels not turned off."""
    return (triton is not None and tensor.is_cuda and os.environ.get("MEDVISION_NO_KERNELS", "0") in ("", "0")
            and torch.cuda.get_device_capability(tensor.device) >= (8, 0))


from .lora_linear import lora_linear  # noqa: E402  (the files import the names above)
from .warp import warp  # noqa: E402

__all__ = ["lora_linear", "warp", "use_kernels"]
