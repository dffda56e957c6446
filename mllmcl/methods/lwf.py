"""LwF: on the samples of a new task, the model is also held to what it answered before it learned them."""

# n answer tokens of the task's samples, k logits kept of each

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import distillation_loss, teacher_top_k

from .base import LoraMethod
from .teachers import RowsOfSamples, taught


@dataclass(kw_only=True)
class Lwf(LoraMethod):
    """Sequential LoRA with the old model's answers to the new task's samples as a second target.

        L = CE(task batch) + distil * T^2 KL(p_old || q) (the same answer tokens),   p, q = softmax(logits / T)

    The old model is asked once, when the task starts. Of each token its `top_k` largest logits are kept and all others
    as one, which gives the divergence of the distributions with the others taken together.

    Args:
        distil: weight of the distillation. temperature: T.
        top_k: logits kept of each answer token.
    """

    name: ClassVar[str] = "lwf"
    summary: ClassVar[str] = "held to the old model's answers on the new task's samples (LwF)"
    source: ClassVar[str] = "Li and Hoiem 2016 (arXiv:1606.09282)"
    stores: ClassVar[str] = (
        "nothing per task; during a task `top_k` logits of the old model for each answer token of its samples"
    )
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = "the old model's smaller logits are taken together; T^2 before the divergence"

    distil: float = 1.0
    temperature: float = 2.0
    top_k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distil < 0:
            raise ValueError(f"distil must not be negative, got {self.distil}")
        if self.top_k < 1 or self.temperature <= 0:
            raise ValueError(f"top_k must be at least 1 and temperature > 0, got {self.top_k} and {self.temperature}")
        #: logits `[n, k]`, their tokens `[n, k]`, the logit of all others `[n]`; none in the first task
        self.teacher: tuple[Tensor, ...] = ()
        self.rows = RowsOfSamples(torch.zeros(0, dtype=torch.int64))

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.places = {sample.id: place for place, sample in enumerate(task.train)}
        self.teacher = ()
        if self.index_of(task):
            found = taught(self, task.train, lambda logits: teacher_top_k(logits, self.top_k, self.temperature))
            self.teacher = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
            self.rows = RowsOfSamples(torch.tensor([len(parts[0]) for parts in found]))

    def answer_loss(self, batch) -> Tensor:
        mllm = self.mllm
        hidden = mllm.answer_hidden(batch)
        loss = mllm.cross_entropy(hidden, batch)
        if not self.teacher:
            return loss
        rows = self.rows.of(torch.tensor([self.places[sample_id] for sample_id in batch.sample_ids]))
        teacher = [part[rows].to(mllm.device, non_blocking=True) for part in self.teacher]
        return loss + self.distil * distillation_loss(hidden, mllm.head_weight, teacher, temperature=self.temperature)

    def state_tensors(self) -> dict[str, Tensor]:
        parts = {f"teacher/{place}": part for place, part in enumerate(self.teacher)}
        return {**super().state_tensors(), **parts, "lengths": self.rows.lengths}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.teacher = tuple(tensors[f"teacher/{place}"] for place in range(3) if f"teacher/{place}" in tensors)
        self.rows = RowsOfSamples(tensors["lengths"])
