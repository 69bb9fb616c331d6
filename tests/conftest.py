"""Without a GPU, Triton's interpreter runs the kernels on CPU tensors."""

import os

# A run gives threads up where another program holds their cores, and the last digits with them
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # before `import torch`

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before `import triton`


def mend_bfloat16():
    """The interpreter keeps bfloat16 as raw bits and multiplies those: tl.dot gets the numbers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def decoded(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return of_raw_bits(self, decoded(a), decoded(b), *rest)

    of_raw_bits = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        mend_bfloat16()
    except ImportError:  # no Triton here
        pass
