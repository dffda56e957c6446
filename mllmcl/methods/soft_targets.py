"""Soft targets: cross entropy to labels that leave a little to every other token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mllmcl_kernels import soft_target_cross_entropy

from .base import LoraMethod, Method

__all__ = ["SoftTargetMethod", "SoftTargets"]


@dataclass(kw_only=True)
class SoftTargetMethod(Method):
    """A method whose answer loss has soft targets.

    Args:
        soft_alpha: what the target leaves to all other tokens together; 0.01 in the paper's scripts.
        legacy: average over all positions of a batch, answers or not, as the public code does; this divides the loss by
            a number that depends on the length of the prompts.
    """

    soft_alpha: float = 0.01
    legacy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.soft_alpha < 1.0:
            raise ValueError(f"soft_alpha must be in [0, 1), got {self.soft_alpha}")

    def answer_loss(self, batch) -> Tensor:
        mllm, labels = self.mllm, batch.answer_labels
        loss = soft_target_cross_entropy(mllm.answer_hidden(batch), mllm.head_weight, labels, alpha=self.soft_alpha)
        if not self.legacy:
            return loss
        rows, width = batch.labels.shape
        positions = rows * (width - 1)
        return self.processes.part(loss * (len(labels) / positions), self.processes.fraction * positions)


@dataclass(kw_only=True)
class SoftTargets(SoftTargetMethod, LoraMethod):
    """Sequential LoRA with soft targets.

    L = mean over answer tokens of CE(q, softmax(z)),   q = 1 - soft_alpha on the label, soft_alpha / (V - 1) else
    """

    name: ClassVar[str] = "soft_targets"
    summary: ClassVar[str] = "sequential LoRA with soft targets"
    source: ClassVar[str] = "Srivastava et al. (arXiv:2410.19925), its soft targets"
    stores: ClassVar[str] = "one LoRA and the projector, nothing per task"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = "none; legacy: the public code's average over all positions, masked ones included"
