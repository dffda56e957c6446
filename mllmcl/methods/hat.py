"""HAT: each task learns which units of the adapters it needs; what it needs stays for later tasks to read."""

# B samples, T tasks, L expert layers, E units (rank rows) of a layer

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mllmcl_kernels import Mask

from .base import LoraMethod
from .routed import RoutedMethod
from .routers import find_router

MASKS = "hat_masks"
#: embeddings stay within this, as in the published code
MOST = 6.0


class TaskMasks(nn.Module):
    """`.embedding` `[T, L, E]`; e = gain * embedding is normal at first."""

    def __init__(self, num_tasks: int, num_layers: int, num_units: int, gain: float):
        super().__init__()
        self.gain = gain
        self.embedding = nn.Parameter(torch.randn(num_tasks, num_layers, num_units) / gain)

    def attention(self, task: int, s: float, s_max: float) -> Tensor:
        """a = sigmoid(s e) `[L, E]`, with the gradient s_max sigmoid'(e) over e."""
        e_LE = self.gain * self.embedding[task]
        slope_LE = s_max * torch.sigmoid(e_LE)
        return slope_LE + (torch.sigmoid(s * e_LE) - slope_LE).detach()

    @torch.no_grad()
    def used(self) -> Tensor:
        """Which units each task uses, a > 1/2: bool `[T, L, E]`."""
        return self.embedding > 0


@dataclass(kw_only=True)
class Hat(RoutedMethod, LoraMethod):
    """A unit is a rank row of an adapter; task t weighs unit e of layer l by a = sigmoid(s e_tle).

        y = W x + scaling B (a * A x),     s from 1 / s_max up to s_max within the task
        L = answer loss + strength * sum a (1 - a_old) / sum (1 - a_old),   a_old the maximum over earlier tasks

    The gradient of e is that of a times s_max sigmoid'(e): the paper's sigmoid'(s e) s and its compensation
    s_max (cosh(s e) + 1) / (s (cosh(e) + 1)) multiplied out. Rows of A and columns of B that an earlier task uses stay.
    At test a sample has the units of its task.

    Args:
        rank: units of a layer.
        s_max: the steepest sigmoid.
        strength: lambda, how much new units cost.
        gain: e moves so many times as fast as the other parameters; few steps of Adam have to be enough.
    """

    name: ClassVar[str] = "hat"
    summary: ClassVar[str] = "each task learns a hard mask over adapter units; units in use stay for later tasks"
    source: ClassVar[str] = "HAT (arXiv:1801.01423)"
    stores: ClassVar[str] = "a bit for each task and unit, one LoRA and the projector, and what the router keeps"
    at_test: ClassVar[str] = "a router chooses the task; task id with router=oracle"
    deviations: ClassVar[str] = (
        "units are rank rows of LoRA; s grows once over a task, not in every epoch; a unit with a > 1/2 is used and "
        "frozen as a whole, since Adam undoes a factor on a gradient; a learning rate of its own for e; the projector "
        "trains in the first task only"
    )
    exports: ClassVar[bool] = False
    shuts_off: ClassVar[bool] = True

    rank: int = 16
    alpha: float = 32.0
    s_max: float = 400.0
    strength: float = 0.75
    gain: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_router(self.router).num_experts:
            raise ValueError(f"router must be one without an expert of its own, got {self.router!r}")
        for option, least in (("s_max", 1.0), ("strength", 0.0), ("gain", 0.0)):
            value = getattr(self, option)
            if value < least or (option == "gain" and value == 0):
                raise ValueError(f"{option} must be {'above' if option == 'gain' else 'at least'} {least}, got {value}")
        self.acting = self.known = 0

    def _num_experts(self) -> int:
        return self.rank

    def _rank(self) -> int:
        return 1

    def _alpha(self) -> float:
        return self.alpha / self.rank

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        layers = list(mllm.expert_layers)
        mllm.experts.groups = {path: place for place, path in enumerate(layers)}
        self.masks = mllm.attach(MASKS, TaskMasks(len(stream.tasks), len(layers), self.rank, self.gain))

    @torch.no_grad()
    def route(self, samples: Sequence) -> Tensor:
        """The units of each sample's task, float `[B, L, E]`; ids -1, the base model, while nothing was learned."""
        tasks_B = self.chooser(samples)
        if not self.known:
            return tasks_B
        used_TLE = self.masks.used().to(self.mllm.dtype)
        # the base model has no units
        return torch.where((tasks_B < 0).to(used_TLE.device)[:, None, None], 0.0, used_TLE[tasks_B.clamp(min=0)])

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.acting = self.index_of(task)
        self.mllm.set_trainable([True] * self.rank, projector=self.train_projector and not self.acting)
        self.masks.requires_grad_(True)
        self.taken_LE = self.masks.used()[: self.acting].any(0)
        for layer, is_full in zip(self.mllm.expert_layers.values(), self.taken_LE.all(1).tolist(), strict=True):
            layer.lora_a.requires_grad_(not is_full)
            layer.lora_b.requires_grad_(not is_full)

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        s = 1 / self.s_max + (self.s_max - 1 / self.s_max) * self.progress
        self.a_LE = self.masks.attention(self.acting, s, self.s_max)
        return self.mllm.use_experts(self.a_LE.expand(len(samples), -1, -1))

    def loss(self, batch, loss: Tensor) -> Tensor:
        free_LE = (~self.taken_LE).to(self.a_LE.dtype)
        return loss + self.strength * (self.a_LE * free_LE).sum() / free_LE.sum().clamp(min=1)

    @torch.no_grad()
    def after_step(self, optimizer) -> None:
        self.masks.embedding.clamp_(-MOST / self.gain, MOST / self.gain)

    def parameter_masks(self) -> dict:
        masks = super().parameter_masks()
        for (path, _), taken_E in zip(self.mllm.expert_layers.items(), self.taken_LE, strict=True):
            masks[f"{path}.lora_a"] = Mask.rows(~taken_E, dim=0)
            masks[f"{path}.lora_b"] = Mask.rows(~taken_E, dim=1)
        own_T = torch.arange(len(self.stream.tasks), device=self.mllm.device) == self.acting
        return {**masks, f"{MASKS}.embedding": Mask.rows(own_T)}

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.known = self.index_of(task) + 1

    def state_values(self) -> dict:
        return {**super().state_values(), "known": self.known}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.known = values["known"]
