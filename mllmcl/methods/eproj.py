"""EProj: a projector for each task, or for tasks that are alike, found again by the task's key."""

# n samples, T tasks, E experts, d feature width

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method
from .keys import cosines, query


@dataclass(kw_only=True)
class EProj(Method):
    """Everything is frozen but the projector, of which a new task gets a copy of its own unless it is like an old task.

        key_t = the unit vector nearest to all q of the task, their mean scaled to length 1
        task t trains the projector of argmax_{i < t} cos(key_t, key_i) if that is above `reuse_above`, else a new one

    with q the frozen features of image and question. At test a sample has the projector of the task whose key is
    nearest.

    Args:
        reuse_above: cosine of two keys from which on their tasks share a projector; 1 gives each task its own.
    """

    name: ClassVar[str] = "eproj"
    summary: ClassVar[str] = "a projector for each task or group of like tasks, retrieved by key for each sample"
    source: ClassVar[str] = "EProj (arXiv:2311.16206)"
    stores: ClassVar[str] = "a projector for each task that is like no other, a key for each task"
    at_test: ClassVar[str] = "nothing: a projector by key, sample by sample"
    deviations: ClassVar[str] = (
        "no code is public: a key is what training it by cosine alone would end at; likeness of tasks is that of their "
        "keys; a shared projector trains on without a penalty"
    )

    reuse_above: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.reuse_above <= 1:
            raise ValueError(f"reuse_above must be a cosine, got {self.reuse_above}")
        self.known = 0
        #: the expert of each task that has started
        self.owners: list[int] = []
        self.keys = torch.zeros(0, 0)

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        mllm.add_experts(1, 1, 1.0, targets=None, projector_experts=True)
        mllm.router = self.route

    def route(self, samples: Sequence) -> Tensor:
        """The expert of each sample, int64 `[n]`; -1, the base model, while nothing was learned."""
        if not self.known:
            return torch.full((len(samples),), -1)
        cosine_nT = cosines(query(self.mllm, samples).cpu(), self.keys[: self.known])
        return torch.tensor(self.owners)[cosine_nT.argmax(1)]

    def task_of(self, expert: int) -> int:
        """The first task that the expert learned."""
        return self.owners.index(expert) if expert in self.owners else -1

    def on_task_start(self, task) -> None:
        place = self.index_of(task)
        mean_1d = query(self.mllm, task.train).cpu().mean(0, keepdim=True)
        old_Td = self.keys[:place] if place else mean_1d[:0]
        self.keys = torch.cat([old_Td, F.normalize(mean_1d, dim=-1)])
        self.owners = [*self.owners[:place], self._owner(place)]
        while self.mllm.experts.num_experts <= self.acting:
            self.mllm.grow_experts(1)
        trainable = [expert == self.acting for expert in range(self.mllm.experts.num_experts)]
        self.mllm.set_trainable(trainable, projector=True)

    def _owner(self, place: int) -> int:
        """The expert of the most alike old task, or a new one."""
        if place:
            cosine_T = cosines(self.keys[place][None], self.keys[:place])[0]
            if cosine_T.max() > self.reuse_above:
                return self.owners[int(cosine_T.argmax())]
        return max(self.owners[:place], default=-1) + 1

    @property
    def acting(self) -> int:
        """The expert that trains."""
        return self.owners[-1]

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        return self.mllm.use_experts(torch.full((len(samples),), self.acting))

    def on_task_end(self, task) -> None:
        self.known = self.index_of(task) + 1

    def state_tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys}

    def state_values(self) -> dict:
        return {"known": self.known, "owners": self.owners}

    def load_state(self, tensors, values) -> None:
        self.keys = tensors["keys"]
        self.known, self.owners = values["known"], list(values["owners"])
