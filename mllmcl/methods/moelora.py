"""MoELoRA of CoIN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import LoraMethod


@dataclass(kw_only=True)
class MoeLora(LoraMethod):
    """E experts in every linear, mixed by a softmax router of that linear for each token; everything trains always.

        y = x W^T + s sum_e g_e(x) B_e A_e drop(x),   g = softmax(x W_g^T),   s = alpha / (E * rank)

    Args:
        experts: how many. rank is that of one expert, so the stacked rank is experts * rank.
    """

    name: ClassVar[str] = "moelora"
    summary: ClassVar[str] = "a dense softmax mixture of LoRA experts in every linear, for each token"
    source: ClassVar[str] = "CoIN (arXiv:2403.08350)"
    stores: ClassVar[str] = "one set of experts, routers and the projector, nothing per task"
    at_test: ClassVar[str] = "nothing (routed for each token in every layer)"
    deviations: ClassVar[str] = (
        "one dropout mask for all experts, where the public code draws one for each; A is drawn as for a plain LoRA"
    )
    router_score: ClassVar[str | None] = "softmax"

    experts: int = 4
    rank: int = 4
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"experts must be at least 2, got {self.experts}")

    def _num_experts(self) -> int:
        return self.experts

    def _alpha(self) -> float:
        # CoIN divides alpha by the stacked rank, so that one expert scales by (alpha / E) / rank
        return self.alpha / self.experts
