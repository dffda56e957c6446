"""No training: the lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method, Phase


@dataclass(kw_only=True)
class ZeroShot(Method):
    """The model as it comes: nothing is added, nothing trains, every row of the accuracy matrix is the same."""

    name: ClassVar[str] = "zero_shot"
    summary: ClassVar[str] = "the model as it comes, without training (lower bound)"
    source: ClassVar[str] = "the lower bound of continual learning"
    stores: ClassVar[str] = "nothing"
    at_test: ClassVar[str] = "nothing"

    def on_task_start(self, task) -> None:
        self.mllm.set_trainable()

    def phases(self, task) -> list[Phase]:
        return []
