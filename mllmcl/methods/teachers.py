"""Teachers: answers of a model no longer at hand, kept as logits, or a copy of it beside the one that trains."""

# n answer tokens, k logits kept of each, B samples, S positions, D hidden width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import LoraMethod

__all__ = ["PreviousModelMethod", "RowsOfSamples", "taught"]

#: samples that are run together
BATCH = 32


@torch.no_grad()
def taught(method, samples: Sequence, keep: Callable[[Tensor], Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """What `keep` makes of the answer logits `[n, V]`, on the CPU, one tuple for each sample.

    The model runs as it is, without dropout, in the run's precision.
    """
    mllm, found = method.mllm, []
    with mllm.evaluating():
        for start in range(0, len(samples), BATCH):
            batch = mllm.collate(samples[start : start + BATCH], with_answers=True)
            with method.autocast():
                kept = keep(mllm.answer_logits(batch))
            sizes = (batch.labels >= 0).sum(1).tolist()
            found += zip(*(part.cpu().split(sizes) for part in kept), strict=True)
    return found


class RowsOfSamples:
    """Where the rows of each sample are in tensors that hold those of all, one behind the other.

    Args:
        lengths: rows of each sample, int64 on the CPU.
    """

    def __init__(self, lengths: Tensor):
        self.lengths = lengths

    def of(self, places_b: Tensor) -> Tensor:
        """Rows of these samples, in their order, int64 on the CPU."""
        num_b = self.lengths[places_b]
        first_b = (self.lengths.cumsum(0) - self.lengths)[places_b]
        before_b = num_b.cumsum(0) - num_b
        return torch.arange(int(num_b.sum())) + (first_b - before_b).repeat_interleave(num_b)


@dataclass(kw_only=True)
class PreviousModelMethod(LoraMethod):
    """Sequential LoRA with the model of the last task beside it: expert 0 trains and answers, expert 1 is the old one.

    Each owns a projector, so that the old model is whole. A step takes a forward pass of it in addition.
    """

    num_experts: ClassVar[int] = 2

    def _projector_experts(self) -> bool:
        return True

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        mllm.experts.settle(0)
        self.has_previous = False

    @torch.no_grad()
    def on_task_start(self, task) -> None:
        experts, self.has_previous = self.mllm.experts, self.index_of(task) > 0
        if self.has_previous:
            new, old = experts.rows(0), experts.rows(1)
            for layer in self.mllm.expert_layers.values():
                layer.lora_a[old] = layer.lora_a[new]
                layer.lora_b[:, old] = layer.lora_b[:, new]
            for layer in self.mllm.projector_layers.values():
                layer.expert_weight[1] = layer.expert_weight[0]
                if layer.expert_bias is not None:
                    layer.expert_bias[1] = layer.expert_bias[0]
        self.mllm.set_trainable([True, False], projector=self.train_projector)

    @contextlib.contextmanager
    def teaching(self, count: int, expert: int = 1) -> Iterator[None]:
        """The old model acts, without dropout and gradients; -1 is the base."""
        mllm = self.mllm
        with torch.no_grad(), mllm.evaluating(), mllm.use_experts(torch.full((count,), expert)):
            yield
