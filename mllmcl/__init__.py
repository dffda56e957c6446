"""Continual learning of multimodal LLMs.

mllm = mllmcl.MLLM.compose(vision="efficientnet-lite0", language="smollm2-135m-instruct")
method = mllmcl.methods.create("mr_lora", rank=8)
stream = mllmcl.streams.load("pocket-domain")
report = mllmcl.train(mllm, method, stream, mllmcl.TrainConfig(output_dir="runs/mr_lora"))
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["MLLM", "Report", "TrainConfig", "evaluation", "methods", "models", "streams", "train", "training"]

# heavy imports happen when a name is first used, so that the command line answers at once
_HOMES = {
    "MLLM": ("mllmcl.models", "MLLM"),
    "Report": ("mllmcl.evaluation", "Report"),
    "TrainConfig": ("mllmcl.training", "TrainConfig"),
    "train": ("mllmcl.training", "train"),
}


def __getattr__(name: str):
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(module), attribute)
    if name in ("assets", "evaluation", "methods", "models", "streams", "training"):
        return importlib.import_module(f"mllmcl.{name}")
    raise AttributeError(f"module 'mllmcl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
