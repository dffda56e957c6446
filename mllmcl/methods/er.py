"""ER: experience replay with a batch of the buffer in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import LoraMethod
from .buffers import BatchReplayMethod


@dataclass(kw_only=True)
class Er(BatchReplayMethod, LoraMethod):
    """Sequential LoRA that sees a batch of stored samples beside every batch of the task.

        L = CE(task batch) + beta CE(buffer batch)

    Args:
        beta: weight of the buffer's loss.
    """

    name: ClassVar[str] = "er"
    summary: ClassVar[str] = "experience replay: a batch of stored samples beside every batch of the task"
    source: ClassVar[str] = "Chaudhry et al. 2019 (arXiv:1902.10486)"
    stores: ClassVar[str] = "ids of `per_task` samples of each task, or of `capacity` samples in all"
    at_test: ClassVar[str] = "nothing"
    extra_passes: ClassVar[str] = "forward and backward of a batch of stored samples"
    deviations: ClassVar[str] = "the buffer takes up a task's samples when the task ends, not while it is learned"

    beta: float = 1.0

    def loss(self, batch, loss: Tensor) -> Tensor:
        if not self.pools:
            return loss
        samples, _, fraction = self.replay(batch)
        stored = self.mllm.collate(samples, with_answers=True)
        return loss + self.beta * self.processes.part(self.answer_loss(stored), fraction * len(stored.answer_labels))
