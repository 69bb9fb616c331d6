"""Without a GPU, Triton's interpreter runs the kernels on CPU tensors. It has to be asked for before `import triton`."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
