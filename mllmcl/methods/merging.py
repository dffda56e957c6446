"""Merging LoRA into the base at task boundaries, for every method that does so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import LoraMethod, named_under, under

__all__ = ["MergedLoraMethod"]


@dataclass(kw_only=True)
class MergedLoraMethod(LoraMethod):
    """A LoRA method that starts each task with a fresh LoRA on the base into which the earlier ones were merged.

        W <- W + s B A,   then A is drawn anew, B = 0;   s = alpha / sqrt(rank) with rslora, else alpha / rank

    The merge takes place when the next task starts, so that what is exported after a task is its LoRA. The merged
    weights are saved as state of the method, once in each checkpoint.

    Args:
        rslora: scaling alpha / sqrt(rank), which keeps the size of the update independent of the rank.
    """

    changes_base: ClassVar[bool] = True

    rank: int = 16
    alpha: float = 8.0
    rslora: bool = True

    def _alpha(self) -> float:
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def on_task_start(self, task) -> None:
        if self.index_of(task) > 0:
            self.mllm.merge_experts()
        super().on_task_start(task)

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), **named_under("merged", self.mllm.merged_weights())}

    def state_values(self) -> dict:
        return {**super().state_values(), "num_merged": self.mllm.experts.num_merged}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.mllm.load_merged_weights(under("merged", tensors, self.mllm), values["num_merged"])
