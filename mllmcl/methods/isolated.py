"""What methods with an expert for each task share: growing it at the task's start and training it alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .base import LoraMethod

__all__ = ["ExpertPerTask"]


@dataclass(kw_only=True)
class ExpertPerTask(LoraMethod):
    """An expert for each task; during a task only its own expert trains, and acts.

    Attributes: `known`, how many tasks have ended; `acting`, the expert that trains.
    """

    known: int = field(default=0, init=False, repr=False)
    acting: int = field(default=0, init=False, repr=False)

    @property
    def first(self) -> int:
        """Index of the first task's expert, where experts with another use come before it."""
        return 0

    def _num_experts(self) -> int:
        return 1 + self.first

    def task_of(self, expert: int) -> int:
        return expert if expert < 0 else expert - self.first

    def expert_for(self, task) -> int:
        """The expert that a task trains."""
        return self.index_of(task) + self.first

    def on_task_start(self, task) -> None:
        expert = self.expert_for(task)
        while self.mllm.experts.num_experts <= expert:
            self.mllm.grow_experts(1, self.rank, self.alpha)
        self.act(expert)

    def act(self, expert: int) -> None:
        """Let `expert` train and act in training, no other."""
        self.acting = expert
        trainable = [place == expert for place in range(self.mllm.experts.num_experts)]
        self.mllm.set_trainable(trainable, projector=self.train_projector)

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        return self.mllm.use_experts(torch.full((len(samples),), self.acting))

    def on_task_end(self, task) -> None:
        # a router's phase may have come last; what is exported is the expert that acts
        self.act(self.expert_for(task))
        self.known = self.index_of(task) + 1

    def state_values(self) -> dict:
        return {"known": self.known}

    def load_state(self, tensors, values) -> None:
        self.known = values["known"]
