"""The two operations that deserve a GPU kernel, each beside the torch reference that it must equal.

    from kernels import lora_linear, warp

CUDA tensors run the Triton kernels and all others run the references: one signature, the same
gradients. `use_kernels(False)` or MEDVISION_NO_KERNELS=1 (the scripts' --no-kernels) sends every
tensor to the references, which helps to explain the operations and to find the cause of an error.
With TRITON_INTERPRET=1, set before the first import, the kernels run on CPU tensors when they are
called by name (`lora_linear_triton`, `warp_triton`): slowly, but a debugger can step through them.

`kernels.lora_linear` is the function; `from kernels.lora_linear import ...` reaches the other names
of its file.
"""
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the kernels stay functions nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(**options):
    """`triton.jit` where there is Triton."""
    return triton.jit(**options) if triton else lambda kernel: kernel


def use_kernels(wanted):
    """Turns the Triton kernels on (the default) or off, for this process and those it starts.

    A function that torch.compile has compiled already stays as it is.
    """
    os.environ["MEDVISION_NO_KERNELS"] = "0" if wanted else "1"


def wants_triton(tensor):
    """Whether Triton runs an operation on `tensor`: on CUDA, Ampere or newer, not turned off."""
    return (triton is not None and tensor.is_cuda
            and os.environ.get("MEDVISION_NO_KERNELS", "0") in ("", "0")
            and torch.cuda.get_device_capability(tensor.device) >= (8, 0))


LIBRARY = torch.library.Library("medvision", "DEF")


def operator(schema, run, fake, backward=None, setup_context=None):
    """Registers `run` with torch and returns it as an operator that torch.compile does not open.

    fake: makes empty tensors of the shapes that `run` returns. The last two are its autograd.
    `torch.library.custom_op` does the same, and takes a tenth of a millisecond more for a call.
    """
    name = "medvision::" + schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if backward:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.medvision, name.partition("::")[2]).default


def refuse_double_backward(name):
    """Raises RuntimeError where a backward pass by the kernels is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: expected one backward pass, found create_graph=True, and the "
                           "kernels have no second derivative: call kernels.use_kernels(False)")


from .lora_linear import lora_linear  # noqa: E402  (the files import the names above)
from .warp import warp  # noqa: E402

__all__ = ["lora_linear", "warp", "use_kernels"]
