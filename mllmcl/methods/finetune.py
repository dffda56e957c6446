"""Sequential full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(kw_only=True)
class Finetune(Method):
    """Every parameter of the language tower and the projector trains on one task after the other.

    Args:
        train_language: whether the language tower trains; False trains the projector alone.
    """

    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "sequential full fine-tuning of language tower and projector"
    source: ClassVar[str] = "the lower bound of continual learning; naive fine-tuning in arXiv:2410.19925"
    stores: ClassVar[str] = "the model itself, nothing per task"
    at_test: ClassVar[str] = "nothing"
    changes_base: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-5

    train_language: bool = True

    def on_task_start(self, task) -> None:
        mllm = self.mllm
        mllm.set_trainable(projector=mllm.projector_path is not None)
        mllm.model.get_submodule(mllm.language_path).requires_grad_(self.train_language)
