"""mSGM: mitigation of the stability gap for multimodal LLMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .buffers import RehearsalMethod
from .merging import MergedLoraMethod
from .soft_targets import SoftTargetMethod


@dataclass(kw_only=True)
class Msgm(SoftTargetMethod, RehearsalMethod, MergedLoraMethod):
    """LoRA (little plasticity), soft targets (gentle gradients) and merging at task boundaries; rehearsal on request.

    Args:
        share: of every earlier task's data that is mixed in; the paper's mSGM with rehearsal, 0 without.
    """

    name: ClassVar[str] = "msgm"
    summary: ClassVar[str] = "LoRA merged at each boundary, with soft targets and optional rehearsal (mSGM)"
    source: ClassVar[str] = "Srivastava et al. (arXiv:2410.19925), its mSGM"
    stores: ClassVar[str] = "the merged weights, one LoRA and the projector; with rehearsal ids of samples"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = (
        "the last task's LoRA stays beside the base; legacy: the public code's average over all positions"
    )

    share: float = 0.0
