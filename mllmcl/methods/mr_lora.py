"""MR-LoRA: one isolated expert for each task, chosen for each sample by a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Phase
from .isolated import ExpertPerTask
from .routers import RouterOptions, find_router


@dataclass(kw_only=True)
class MrLora(ExpertPerTask):
    """An expert for each task: a LoRA and a copy of the projector, trained alone from the same base.

    At test a router names the expert of each sample; one batch mixes experts, and the projector is swapped with them.

    Args:
        router: name of a router of `routers`: "prototype" (nearest prototype on frozen features), "mllm" (the model
            with an expert of its own names a letter), "oracle" (the task is given), and the others there.
        prototypes: prototypes of a task.
        router_samples: samples of each task the letter router trains on.
        router_epochs: passes over them after each task.
        seed: of the draw of router samples.
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

    router: str = "prototype"
    prototypes: int = 4
    router_samples: int = 20
    router_epochs: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        find_router(self.router)

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        options = RouterOptions(
            prototypes=self.prototypes, samples=self.router_samples, epochs=self.router_epochs, seed=self.seed
        )
        self.chooser = find_router(self.router)(mllm, stream.tasks, options)
        mllm.router = self.route

    def _projector_experts(self) -> bool:
        return self.train_projector

    @property
    def first(self) -> int:
        return find_router(self.router).num_experts

    def route(self, samples: Sequence) -> Tensor:
        """The expert of each sample, int64 `[n]`; -1, the base model, while nothing was learned."""
        tasks = self.chooser(samples)
        return torch.where(tasks < 0, tasks, tasks + self.first)

    def phases(self, task) -> list[Phase]:
        return [*super().phases(task), *self.chooser.phases(self.index_of(task))]

    def on_phase_start(self, task, phase: Phase) -> None:
        self.act(self.index_of(task) + self.first if phase.name == "train" else 0)

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.chooser.learn(self.index_of(task))

    def state_tensors(self) -> dict[str, Tensor]:
        return self.chooser.state_tensors()

    def state_values(self) -> dict:
        return {**super().state_values(), "router": self.chooser.state_values()}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.chooser.load_state(tensors, values["router"])
