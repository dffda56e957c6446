"""O-LoRA: one LoRA for each task, kept orthogonal to those of the old tasks; all of them added up."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import orthogonality_loss

from .isolated import ExpertPerTask


@dataclass(kw_only=True)
class OLora(ExpertPerTask):
    """A new LoRA for each task beside the frozen old ones, its A pushed out of the space that theirs span.

        y    = x W^T + s sum_{i <= t} B_i A_i drop(x)
        loss = CE + orthogonality sum_layers sum_{i < t} sum_jk |A_t A_i^T|_jk + size sum_layers (|A_t|_2 + |B_t|_2)

    Args:
        orthogonality: weight of the overlap; None is 0.5 as in the paper's code, 0.05 with legacy as in MCITlib.
        size: weight of the norms of the new LoRA; 0 to 0.3 in the paper's code.
        legacy: as MCITlib has it: only the new LoRA acts in training while all act at test, and the overlap moves the
            old A as well.
    """

    name: ClassVar[str] = "o_lora"
    summary: ClassVar[str] = "one LoRA for each task, added up, each orthogonal to the old ones"
    source: ClassVar[str] = "O-LoRA (arXiv:2310.14152); legacy: MCITlib (arXiv:2508.07307)"
    stores: ClassVar[str] = "a LoRA for each task, one projector"
    at_test: ClassVar[str] = "nothing (all LoRAs, equal weight)"
    deviations: ClassVar[str] = (
        "in every linear, where the paper's scripts have query and value alone (`targets`); legacy: old LoRAs are "
        "absent from the training forward and their A is not frozen"
    )

    alpha: float = 32.0
    orthogonality: float | None = None
    size: float = 0.0
    legacy: bool = False

    def __post_init__(self) -> None:
        if self.orthogonality is None:
            self.orthogonality = 0.05 if self.legacy else 0.5
        if self.orthogonality < 0 or self.size < 0:
            raise ValueError(f"orthogonality and size must not be negative, got {self.orthogonality} and {self.size}")

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        return super().before_forward(samples) if self.legacy else self.mllm.use_experts(None)

    def loss(self, batch, loss: Tensor) -> Tensor:
        layers = self.mllm.expert_layers.values()
        rows = self.mllm.experts.rows(self.acting)
        new = [layer.lora_a[rows] for layer in layers]
        if self.acting and self.orthogonality:
            loss = loss + self.orthogonality * self._overlap(new, [layer.lora_a[: rows.start] for layer in layers])
        if self.size:
            norms = torch._foreach_norm([*new, *(layer.lora_b[:, rows] for layer in layers)])
            loss = loss + self.size * torch.stack(norms).sum()
        return loss

    def _overlap(self, new: list[Tensor], old: list[Tensor]) -> Tensor:
        overlap = orthogonality_loss(new, old)
        if self.legacy:
            # the same number the other way round, for the gradient of the old side
            other = orthogonality_loss(old, new)
            overlap = overlap + other - other.detach()
        return overlap

    def parameter_masks(self) -> dict:
        masks = super().parameter_masks()
        if self.legacy:
            masks = {name: mask for name, mask in masks.items() if not name.endswith(".lora_a")}
        return masks
