"""Which backends this machine has, and why the rest is missing.

The compiled parts are two plain shared libraries beside this file: `libmllmcl_cpu.so` (C++) and `libmllmcl_cuda.so`
(CUDA C++). They register implementations only; every schema is declared in Python, so both load orders work and the
package is whole without them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
import types
from pathlib import Path

import torch

__all__ = ["BACKENDS", "backends", "build_info", "debug_checks", "default_backend", "machine_reason"]

log = logging.getLogger("mllmcl_kernels")
FOLDER = Path(__file__).parent

#: torch's compiler asks for every operator that is registered for all devices, declared or not: before C++ is loaded
DECLARATIONS = torch.library.Library("mllmcl_cpu", "FRAGMENT")
DECLARATIONS.define("look(Tensor[] a, Tensor[] b, Tensor[] c, Tensor[] d, int lists, Tensor(a!) table) -> bool")

#: every backend, the fastest first where several can run; "chunked" is plain torch that never holds the whole
BACKENDS = ("cuda", "triton", "cpp", "chunked", "reference")


def default_backend() -> str | None:
    """What `MLLMCL_BACKEND` says now; it goes before the order of the device.

    A call that this backend does not take is left to the others; a backend that the machine lacks is an error.
    """
    name = os.environ.get("MLLMCL_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"MLLMCL_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def debug_checks() -> bool:
    """Whether device-side findings (an expert id out of range) are raised at once, at the price of a host wait."""
    return os.environ.get("MLLMCL_DEBUG", "0") not in ("", "0")


@functools.cache
def _load_shared(stem: str) -> str | None:
    """Load `lib<stem>.so`; returns None when loaded, else the reason."""
    path = FOLDER / f"lib{stem}.so"
    if not path.exists():
        return (
            f"{path.name} was not built (needs a C++ compiler{' and nvcc' if 'cuda' in stem else ''} at install time)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


@functools.cache
def machine_reason(backend: str) -> str | None:
    """None where `backend` can run on this machine, else the reason in words."""
    if backend in ("chunked", "reference"):
        return None
    if backend == "cpp":
        return _load_shared("mllmcl_cpu")
    if backend == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return _load_shared("mllmcl_cuda")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install 'mllmcl[triton]')"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in the interpreter)"
        return None
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def backends() -> dict[str, str]:
    """Every backend of this machine: `{"cpp": "available", "cuda": "torch sees no CUDA device", ...}`."""
    return {name: machine_reason(name) or "available" for name in BACKENDS}


@functools.cache
def _c_module() -> types.ModuleType | None:
    name = f"{__package__}._C"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def build_info() -> dict[str, object]:
    """What was built and with what: compiler, ABI target, CUDA architectures, instruction sets found and used."""
    module = _c_module()
    info: dict[str, object] = {"compiled": module is not None}
    if module is not None:
        info.update(module.build_info())
    record = FOLDER / "build.json"
    if record.exists():
        info.update(json.loads(record.read_text()))
    return info
