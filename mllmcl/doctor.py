"""What works on this machine, what does not, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

__all__ = ["check_model_batching", "diagnose"]

PACKAGES = (
    "transformers",
    "safetensors",
    "peft",
    "gguf",
    "resvg-py",
    "matplotlib",
    "jsonargparse",
)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def diagnose() -> str:
    """A text: versions, devices, kernel backends and the reasons for those that are missing, caches."""
    from mllmcl_kernels.info import report

    from . import __version__
    from .assets import cache_dir

    lines = [f"mllmcl {__version__}, {platform.platform()}, {os.cpu_count()} CPU cores"]
    lines += [f"  {name:<14}{_version(name)}" for name in PACKAGES]
    lines.append(f"  {'npm':<14}{shutil.which('npm') or 'not installed'}")
    lines += ["", report(), ""]
    lines.append(f"cache: {cache_dir()}")
    return "\n".join(lines)


def check_model_batching(name: str) -> tuple[str, bool]:
    """Answers of a model in batches against one by one, on a few built-in items: a text, and whether all are equal."""
    from .evaluation import check_batching
    from .models import MLLM
    from .streams import load

    mllm = MLLM.from_pretrained(name)
    stream = load("pocket-domain", num_train=8, num_test=16)
    samples = [sample for task in stream.tasks for sample in task.test]
    differing = check_batching(mllm, samples, batch_size=8)
    if not differing:
        return f"{name}: {len(samples)} answers in batches of 8 equal those given one by one", True
    first = differing[0]
    return f"{name}: {len(differing)} of {len(samples)} answers differ in batches of 8, first {first}", False
