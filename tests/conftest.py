"""Without a GPU, Triton's interpreter runs the kernels on CPU tensors. A fixture stops a run."""

import os

processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # pytest -n: they share the cores
threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())) // processes
os.environ["OMP_NUM_THREADS"] = str(max(1, threads))  # before `import torch`

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before `import triton`


def to_bfloat16(numbers):
    """The bits of float32 numbers, rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def mend_interpreter():
    """Three faults of Triton's interpreter. It keeps bfloat16 as raw bits: tl.dot multiplies those,
    and float32 is cut off instead of rounded. Triton 3.6 makes `range` of an array of one number,
    which NumPy 2.4 refuses."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def decoded(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return of_raw_bits(self, decoded(a), decoded(b), *rest)

    def convert_float(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(data)
        return cut_off(data, source, target, rounding_mode)

    def patch_tensor(tensor, scope):
        of_arrays(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    of_raw_bits, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, create_dot
    cut_off, interpreter._convert_float = interpreter._convert_float, convert_float
    of_arrays, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_tensor


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        mend_interpreter()
    except ImportError:  # no Triton here
        pass


@pytest.fixture
def stopped(monkeypatch):
    """stopped(run, config, saves=1): run(config), until it has saved its state so many times."""
    from support import script

    def run_until(run, config, saves=1):
        save, steps = script.save_checkpoint, []

        def save_and_stop(path, state):
            save(path, state)
            if path.name == "last.pt":
                steps.append(state["step"])
                if len(steps) == saves:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(script, "save_checkpoint", save_and_stop)
            run(config)

    return run_until
