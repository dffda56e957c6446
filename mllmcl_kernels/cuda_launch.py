"""What the launches of the CUDA C++ kernels over lists share."""

from __future__ import annotations

import torch

__all__ = ["CHUNK", "DTYPE_CODE"]

#: numbers of one block of threads; a multiple of four
CHUNK = 4096
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
