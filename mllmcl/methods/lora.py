"""Sequential LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import LoraMethod


@dataclass(kw_only=True)
class Lora(LoraMethod):
    """One LoRA on the language tower, trained on one task after the other, with the projector.

    y = x W^T + (alpha / rank) (drop(x) A^T) B^T
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "one LoRA continued from task to task"
    source: ClassVar[str] = "Hu et al. 2021; LoRA-FT of MLLM-CL (arXiv:2506.05453)"
    stores: ClassVar[str] = "one LoRA and the projector, nothing per task"
    at_test: ClassVar[str] = "nothing"
