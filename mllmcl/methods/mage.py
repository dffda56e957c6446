"""MAGE of Continual-NExT: general and expert LoRA, expert-level gradient masks, a parameter-wise moving average."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import ema_update_, importance_update_

from .averages import hold_average_
from .base import LoraMethod, named_under, under

#: what trains for each kind of task: general text, general image, expert text, expert image
TRAINS = {
    "text+image to text": (True, True, True, False),
    "text to text": (True, False, True, False),
    "text to image": (True, False, False, True),
    "text+image to image": (True, True, False, True),
}


@dataclass(kw_only=True)
class Mage(LoraMethod):
    """Four LoRA experts added with equal weight; the modality of a task says which of them train.

        y = x W^T + s sum_e B_e A_e drop(x)

    The first task is trained plainly. From the second one on, after each step, a moving average follows every parameter
    that trains, with a weight of its own,

        average <- beta average + (1 - beta) parameter
        beta = clip((1 - base_weight) mean|d| mean F / (|d| F), (1 - base_weight) / 10, 1),    d = parameter - average

    where F is a running mean of the squared gradient and the means are over the tensor: what has moved far along
    directions of high curvature is taken over, the rest is held. At the end of the task the average becomes the
    parameter.

    Args:
        base_weight: 1 - beta of an entry with average displacement and curvature.
        fisher_decay: of the running mean of the squared gradient.
        modality: kind of every task of the stream. modalities: kind of single tasks, by name.
        legacy: beta is 0.99 for every entry, which is what the public code falls back to, and the projector stays as
            the first task left it, since its average never moves there.
    """

    name: ClassVar[str] = "mage"
    summary: ClassVar[str] = "general and expert LoRA added up, trained by modality, with a parameter-wise average"
    source: ClassVar[str] = "MAGE, Continual-NExT (arXiv:2602.18055)"
    stores: ClassVar[str] = (
        "four experts and the projector; during a task but the first their averages and squared gradients"
    )
    at_test: ClassVar[str] = "nothing (all experts, equal weight)"
    deviations: ClassVar[str] = (
        "the averaging weight is dimensionless and clipped: the paper's (g + 1) / (d F) is far above 1 at the size of "
        "real gradients, and the public code inverts a matrix for each tensor and is unstable; F is a running mean; "
        "the projector is averaged along; legacy: the fixed 0.99 it falls back to, taken after the step"
    )
    num_experts: ClassVar[int] = 4

    rank: int = 4
    alpha: float = 8.0
    base_weight: float = 0.1
    fisher_decay: float = 0.9
    modality: str = "text+image to text"
    modalities: dict[str, str] = field(default_factory=dict)
    legacy: bool = False

    def __post_init__(self) -> None:
        for kind in (self.modality, *self.modalities.values()):
            if kind not in TRAINS:
                raise ValueError(f"modality must be one of {', '.join(TRAINS)}, got {kind!r}")
        if not 0 < self.base_weight < 1:
            raise ValueError(f"base_weight must be in (0, 1), got {self.base_weight}")
        self.averages: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}

    def on_task_start(self, task) -> None:
        kind, place = self.modalities.get(task.name, self.modality), self.index_of(task)
        self.mllm.set_trainable(list(TRAINS[kind]), projector=self.train_projector and not (self.legacy and place))
        trained = self.mllm.trained_parameters() if place else {}
        self.averages = {name: value.detach().clone() for name, value in trained.items()}
        self.fisher = {name: torch.zeros_like(value) for name, value in self.averages.items()}

    @torch.no_grad()
    def before_step(self, optimizer) -> None:
        if not self.averages or self.legacy:
            return
        trained = self.mllm.trained_parameters()
        grads = [value.grad for value in trained.values()]
        # a constant count c is a running mean with weight 1 / c
        importance_update_(_of(self.fisher, trained), grads, count=1.0 / (1.0 - self.fisher_decay))

    @torch.no_grad()
    def after_step(self, optimizer) -> None:
        if not self.averages:
            return
        trained = self.mllm.trained_parameters()
        averages, values = _of(self.averages, trained), list(trained.values())
        if self.legacy:
            ema_update_(averages, values, decay=0.99)
        else:
            squares = _of(self.fisher, trained)
            hold_average_(averages, values, mode="pema", squared_grads=squares, base_weight=self.base_weight)

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        if not self.averages:
            return
        trained = self.mllm.trained_parameters()
        torch._foreach_copy_(list(trained.values()), _of(self.averages, trained))

    def state_tensors(self) -> dict[str, Tensor]:
        return {**named_under("average", self.averages), **named_under("fisher", self.fisher)}

    def load_state(self, tensors, values) -> None:
        self.averages, self.fisher = under("average", tensors, self.mllm), under("fisher", tensors, self.mllm)


def _of(store: dict[str, Tensor], trained: dict[str, Tensor]) -> list[Tensor]:
    """The stored tensors in the order of the trained ones."""
    return [store[name] for name in trained]
