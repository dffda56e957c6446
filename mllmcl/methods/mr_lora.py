"""MR-LoRA: one isolated expert for each task, chosen for each sample by a router."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..seeds import derive_seed
from .base import LoraMethod, Phase
from .routers import LetterRouter, PrototypeRouter

ROUTER = "router"


@dataclass(kw_only=True)
class MrLora(LoraMethod):
    """An expert for each task: a LoRA and a copy of the projector, trained alone from the same base.

    At test a router names the expert of each sample; one batch mixes experts, and the projector is swapped with them.

    Args:
        router: "prototype" (nearest prototype on frozen features, no training), "mllm" (the model with an expert of its
            own names a letter, trained on a few samples of every task seen), or "oracle" (the task is given).
        prototypes: prototypes of a task.
        router_samples: samples of each task the letter router trains on.
        router_epochs: passes over them after each task.
        seed: of the draw of router samples.
    """

    name: ClassVar[str] = "mr_lora"
    summary: ClassVar[str] = "one isolated LoRA and projector for each task, routed sample by sample"
    source: ClassVar[str] = "MLLM-CL (arXiv:2506.05453); prototype router: RePro"
    stores: ClassVar[str] = "a LoRA, a projector and prototypes (or ids of 20 samples) for each task"
    at_test: ClassVar[str] = "nothing: a router chooses; task id with router=oracle"
    deviations: ClassVar[str] = (
        "routes on line in mixed batches, where the public code joins stored answers; the letter router goes on from "
        "its last state, knows only tasks seen, and compares letters instead of decoding"
    )
    isolated: ClassVar[bool] = True

    router: Literal["prototype", "mllm", "oracle"] = "prototype"
    prototypes: int = 4
    router_samples: int = 20
    router_epochs: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.router not in ("prototype", "mllm", "oracle"):
            raise ValueError(f"router must be prototype, mllm or oracle, got {self.router!r}")
        self.known = 0
        self.acting = 0
        self.buffer: dict[str, list[str]] = {}

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        self.by_prototype = PrototypeRouter(mllm, self.prototypes)
        self.by_letter = LetterRouter(mllm, stream.tasks, expert=0)
        mllm.router = self.route

    def _num_experts(self) -> int:
        return 1 + self._first

    def _projector_experts(self) -> bool:
        return self.train_projector

    @property
    def _first(self) -> int:
        """Index of the first task's expert; the letter router's own comes before it."""
        return 1 if self.router == "mllm" else 0

    def route(self, samples: Sequence) -> Tensor:
        """The expert of each sample, int64 `[n]`; -1, the base model, while nothing was learned."""
        if self.router == "oracle":
            names = [task.name for task in self.stream.tasks[: self.known]]
            tasks = torch.tensor([names.index(sample.task) if sample.task in names else -1 for sample in samples])
        elif self.router == "prototype":
            tasks = self.by_prototype(samples)
        else:
            self.by_letter.known = self.known
            tasks = self.by_letter(samples)
        return torch.where(tasks < 0, tasks, tasks + self._first)

    def task_of(self, expert: int) -> int:
        return expert if expert < 0 else expert - self._first

    def on_task_start(self, task) -> None:
        expert = self.index_of(task) + self._first
        while self.mllm.experts.num_experts <= expert:
            self.mllm.grow_experts(1, self.rank, self.alpha)
        self._act(expert)

    def _act(self, expert: int) -> None:
        self.acting = expert
        trainable = [place == expert for place in range(self.mllm.experts.num_experts)]
        self.mllm.set_trainable(trainable, projector=self.train_projector)

    def phases(self, task) -> list[Phase]:
        index = self.index_of(task)
        found = [Phase(name="train", samples=task.train)]
        if self.router == "mllm" and index > 0:
            samples = []
            for place, other in enumerate(self.stream.tasks[: index + 1]):
                wanted = set(self._drawn(place))
                samples += [self.by_letter.as_question(s, index + 1) for s in other.train if s.id in wanted]
            found.append(Phase(name=ROUTER, samples=samples, epochs=self.router_epochs))
        return found

    def _drawn(self, place: int) -> list[str]:
        """Ids of the router samples of a task: those stored, or a fresh draw for the current one."""
        task = self.stream.tasks[place]
        if task.name not in self.buffer:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "router", task.name))
            order = torch.randperm(len(task.train), generator=generator)[: self.router_samples].tolist()
            self.buffer[task.name] = [task.train[index].id for index in order]
        return self.buffer[task.name]

    def on_phase_start(self, task, phase: Phase) -> None:
        self._act(0 if phase.name == ROUTER else self.index_of(task) + self._first)

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        return self.mllm.use_experts(torch.full((len(samples),), self.acting))

    def on_task_end(self, task) -> None:
        index = self.index_of(task)
        if self.router == "prototype":
            self.by_prototype.learn(index, task.train)
        elif self.router == "mllm":
            self._drawn(index)
        self.known = index + 1

    def state_tensors(self) -> dict[str, Tensor]:
        return {"prototypes": self.by_prototype.prototypes, "owners": self.by_prototype.owners}

    def state_values(self) -> dict:
        return {"known": self.known, "buffer": self.buffer}

    def load_state(self, tensors, values) -> None:
        self.by_prototype.prototypes, self.by_prototype.owners = tensors["prototypes"], tensors["owners"]
        self.known, self.buffer = values["known"], dict(values["buffer"])
