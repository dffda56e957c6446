"""What methods share that mix isolated experts by the likeness of a sample to each task's training samples."""

# n samples, T tasks learned, E experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .features import TOWERS, Anchors
from .isolated import ExpertPerTask

__all__ = ["AnchoredExperts"]


@dataclass(kw_only=True)
class AnchoredExperts(ExpertPerTask):
    """Experts mixed at test by how near a sample is to each task's anchors.

        w = softmax(mean over the towers of cos(feature, anchor of the task) / temperature)

    Args:
        temperature: of the softmax.
        legacy: one w for a whole batch, see `pooled_cosines`.
    """

    towers: ClassVar[tuple[str, ...]] = tuple(TOWERS)

    temperature: float = 0.1
    legacy: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        self.anchors = Anchors(mllm, self.towers)
        mllm.router, mllm.routes_batches = self.route, self.legacy

    @torch.no_grad()
    def route(self, samples: Sequence) -> Tensor:
        """Gates of each sample; ids -1, the base model, while nothing was learned."""
        if not self.known:
            return torch.full((len(samples),), -1)
        cosine_nT = self.pooled_cosines(samples) if self.legacy else self.cosines(samples).mean(0)
        return self.gates(torch.softmax(cosine_nT / self.temperature, dim=-1))

    def cosines(self, samples: Sequence) -> Tensor:
        """`[towers, n, T]`."""
        return self.anchors.cosines(self.anchors.features(samples))

    def pooled_cosines(self, samples: Sequence) -> Tensor:
        """`[n, T]` with equal rows: what the public code makes of a batch."""
        raise NotImplementedError

    def gates(self, weight_nT: Tensor) -> Tensor:
        """What `use_experts` is given."""
        raise NotImplementedError

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.anchors.learn(self.index_of(task), task.train)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.anchors.state_tensors()

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.anchors.load_state(tensors)
