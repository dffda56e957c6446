"""`python -m mllmcl_kernels.info`: what runs here, what does not, and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import ops as _ops  # noqa: F401 (declares every op)
from .library import BACKENDS, backends, build_info, default_backend
from .op import REGISTRY
from .tuning import current_device, describe

__all__ = ["main", "report"]

#: what would bring a missing backend
REMEDIES = {
    "cpp": "pip install --no-build-isolation . where a C++ compiler is",
    "triton": "pip install triton, on a machine with a CUDA device",
    "cuda": "MLLMCL_CUDA=1 pip install --no-build-isolation . where nvcc and a CUDA device are",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _default() -> str:
    try:
        return default_backend() or "by device, dtype and size (MLLMCL_BACKEND names one)"
    except ValueError as error:
        return str(error)


def report() -> str:
    """Versions, devices, backends with reasons, build facts, and a table of ops by backend."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
        f"CUDA devices: {', '.join(names) or 'none'}; CPU threads: {torch.get_num_threads()}",
        "",
    ]
    for backend, state in backends().items():
        remedy = "" if state == "available" else f"  [{REMEDIES[backend]}]"
        lines.append(f"{backend:<10} {state}{remedy}")
    lines.append(f"{'default':<10} {_default()}")
    lines.append(f"{'tuning':<10} {describe(current_device())}")
    lines.append("")
    lines += [f"{name:<24} {value}" for name, value in build_info().items()]
    width = max(map(len, REGISTRY))
    lines += ["", " " * width + "".join(f"  {backend:<10}" for backend in BACKENDS)]
    for name, op in REGISTRY.items():
        cells = ["-" if isinstance(op.find(backend), str) else "yes" for backend in BACKENDS]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:<10}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
