"""MR-LoRA: one isolated expert for each task, chosen for each sample by a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Phase
from .isolated import ExpertPerTask
from .routed import RoutedMethod
from .routers import find_router


@dataclass(kw_only=True)
class MrLora(RoutedMethod, ExpertPerTask):
    """An expert for each task: a LoRA and a copy of the projector, trained alone from the same base.

    At test a router names the expert of each sample; one batch mixes experts, and the projector is swapped with them.
    """

    name: ClassVar[str] = "mr_lora"
    summary: ClassVar[str] = "one isolated LoRA and projector for each task, routed sample by sample"
    source: ClassVar[str] = "MLLM-CL (arXiv:2506.05453); prototype router: RePro"
    stores: ClassVar[str] = (
        "a LoRA and a projector for each task, and what the router keeps of it: prototypes, means, counts of words or "
        "ids of 20 samples"
    )
    at_test: ClassVar[str] = "nothing: a router chooses; task id with router=oracle"
    deviations: ClassVar[str] = (
        "routes on line in mixed batches, where the public code joins stored answers; the letter router goes on from "
        "its last state, knows only tasks seen, and compares letters instead of decoding"
    )
    isolated: ClassVar[bool] = True

    def _projector_experts(self) -> bool:
        return self.train_projector

    @property
    def first(self) -> int:
        return find_router(self.router).num_experts

    def route(self, samples: Sequence) -> Tensor:
        """The expert of each sample, int64 `[n]`; -1, the base model, while nothing was learned."""
        tasks = self.chooser(samples)
        return torch.where(tasks < 0, tasks, tasks + self.first)

    def on_phase_start(self, task, phase: Phase) -> None:
        self.act(self.index_of(task) + self.first if phase.name == "train" else 0)
