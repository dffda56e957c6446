"""What methods with soft prompts or prefixes on a frozen model share."""

# B samples, k prompts of a sample

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllmcl_kernels import Mask

from .base import Method

__all__ = ["BANK", "PromptMethod"]

#: name of the bank's tensor in the model
BANK = "soft_prompts.weight"


@dataclass(kw_only=True)
class PromptMethod(Method):
    """Soft prompts, or prefixes, of a frozen model; each sample has its own, chosen by `route`.

    Args:
        length: tokens of a prompt.

    Attributes: `known`, how many tasks have ended; `acting`, the task that trains.
    """

    length: int = 10

    known: int = field(default=0, init=False, repr=False)
    acting: int = field(default=0, init=False, repr=False)

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        self.add_prompts()
        mllm.prompt_router = self.route

    def add_prompts(self) -> None:
        """Put the bank into the model."""
        self.mllm.add_prompts(self._num_prompts(), self.length)

    def _num_prompts(self) -> int:
        return len(self.stream.tasks)

    def route(self, samples: Sequence) -> Tensor | None:
        """The prompts of each sample at test, int64 `[B, k]`; None while nothing was learned."""
        raise NotImplementedError

    def on_task_start(self, task) -> None:
        self.acting = self.index_of(task)
        self.mllm.set_trainable(projector=False)
        for module in self.mllm.attached.values():
            module.requires_grad_(True)

    def task_rows(self, num_rows: int) -> Mask:
        """Of rows of which each task has one, that of the task that trains."""
        return Mask.rows(torch.arange(num_rows, device=self.mllm.device) == self.acting)

    def on_task_end(self, task) -> None:
        self.known = self.index_of(task) + 1

    def state_values(self) -> dict:
        return {"known": self.known}

    def load_state(self, tensors, values) -> None:
        self.known = values["known"]
