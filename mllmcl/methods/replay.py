"""Replay: sequential LoRA with a few stored samples of every old task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import LoraMethod
from .buffers import BufferMethod


@dataclass(kw_only=True)
class Replay(BufferMethod, LoraMethod):
    """Sequential LoRA on the current task plus `per_task` stored samples of each old one; the loss does not change.

    Args:
        per_task: samples kept of each task (20 in MLLM-CL), drawn once with `seed`.
        repeat: how often each stored sample appears in an epoch.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "sequential LoRA on the task plus stored samples of the old ones"
    source: ClassVar[str] = "MLLM-CL (arXiv:2506.05453), its Replay baseline"
    stores: ClassVar[str] = "ids of `per_task` samples of each task"
    at_test: ClassVar[str] = "nothing"

    per_task: int = 20
    repeat: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_task < 1 or self.repeat < 1:
            raise ValueError(f"per_task and repeat must be at least 1, got {self.per_task} and {self.repeat}")

    def _num_kept(self, task) -> int:
        return self.per_task

    def training_samples(self, task) -> Sequence:
        return [*task.train, *self.stored(self.earlier(task)) * self.repeat]
