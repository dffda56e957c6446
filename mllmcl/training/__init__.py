"""The training loop, its configuration, checkpoints and random numbers."""

from __future__ import annotations

from .config import TrainConfig

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str):
    # the loop imports torch and transformers; the configuration alone must not
    if name == "train":
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
