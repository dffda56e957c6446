"""Replay: sequential LoRA with a few stored samples of every old task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..seeds import derive_seed
from .base import LoraMethod


@dataclass(kw_only=True)
class Replay(LoraMethod):
    """Sequential LoRA on the current task plus `per_task` stored samples of each old one; the loss does not change.

    Args:
        per_task: samples kept of each task (20 in MLLM-CL), drawn once with `seed`.
        repeat: how often each stored sample appears in an epoch.
        seed: of the draw.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "sequential LoRA on the task plus stored samples of the old ones"
    source: ClassVar[str] = "MLLM-CL (arXiv:2506.05453), its Replay baseline"
    stores: ClassVar[str] = "ids of `per_task` samples of each task"
    at_test: ClassVar[str] = "nothing"

    per_task: int = 20
    repeat: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_task < 1 or self.repeat < 1:
            raise ValueError(f"per_task and repeat must be at least 1, got {self.per_task} and {self.repeat}")
        self.buffer: dict[str, list[str]] = {}

    def training_samples(self, task) -> Sequence:
        index = self.index_of(task)
        stored = []
        for old in self.stream.tasks[:index]:
            by_id = {sample.id: sample for sample in old.train}
            missing = [sample_id for sample_id in self.buffer[old.name] if sample_id not in by_id]
            if missing:
                raise ValueError(
                    f"replay: the stream no longer holds {len(missing)} stored samples, e.g. {missing[0]!r}"
                )
            stored += [by_id[sample_id] for sample_id in self.buffer[old.name]]
        return [*task.train, *stored * self.repeat]

    def on_task_end(self, task) -> None:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "replay", task.name))
        order = torch.randperm(len(task.train), generator=generator)[: self.per_task].tolist()
        self.buffer[task.name] = [task.train[place].id for place in order]

    def state_values(self) -> dict:
        return {"buffer": self.buffer}

    def load_state(self, tensors, values) -> None:
        self.buffer = dict(values["buffer"])
