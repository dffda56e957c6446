"""LoRA merged into the base at each task boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .merging import MergedLoraMethod


@dataclass(kw_only=True)
class LoraMerged(MergedLoraMethod):
    """A fresh LoRA for each task on the base into which the LoRAs of all earlier tasks were merged; the loss stays.

    y = x W_t^T + s (drop(x) A_t^T) B_t^T,   W_{t+1} = W_t + s B_t A_t
    """

    name: ClassVar[str] = "lora_merged"
    summary: ClassVar[str] = "a fresh LoRA for each task, merged into the base before the next"
    source: ClassVar[str] = "Srivastava et al. (arXiv:2410.19925), its LoRA; rsLoRA scaling: arXiv:2312.03732"
    stores: ClassVar[str] = "the merged weights, one LoRA and the projector, nothing per task"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = "the last task's LoRA stays beside the base, for no task follows that would merge it"
