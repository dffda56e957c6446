"""Joint training: the upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import LoraMethod, Phase


@dataclass(kw_only=True)
class Joint(LoraMethod):
    """One LoRA trained on the shuffled data of all tasks at once, where the stream starts; later tasks train nothing.

    The whole training budget, epochs times all samples, is spent in the first task. So every row of the accuracy matrix
    is that of the one joint model: the last row is the upper bound to compare with, and forgetting and backward
    transfer are 0 by construction.
    """

    name: ClassVar[str] = "joint"
    summary: ClassVar[str] = "one LoRA trained on all tasks at once (upper bound; all rows of the matrix are the same)"
    source: ClassVar[str] = "multitask training, the upper bound of continual learning"
    stores: ClassVar[str] = "one LoRA and the projector; needs the data of all tasks from the start"
    at_test: ClassVar[str] = "nothing"

    def training_samples(self, task) -> Sequence:
        return [sample for each in self.stream.tasks for sample in each.train]

    def phases(self, task) -> list[Phase]:
        return super().phases(task) if self.index_of(task) == 0 else []
