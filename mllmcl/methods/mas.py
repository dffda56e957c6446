"""MAS: parameters are held where the last task left them, as firmly as the model's output depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .importance import ImportanceMethod


@dataclass(kw_only=True)
class Mas(ImportanceMethod):
    """Sequential LoRA with a pull towards the parameters of the last task, by what moves the output.

        loss + strength / 2 sum_i Omega_i (theta_i - theta*_i)^2,    Omega = sum_t mean over samples of |d ||z||^2 / V|

    with z the logits `[n, V]` that predict a sample's answer, ||z||^2 averaged over its n tokens.

    Args:
        strength: lambda for a squared length that is divided by V.
    """

    name: ClassVar[str] = "mas"
    summary: ClassVar[str] = "parameters held where the last task left them, by how much the output depends on them"
    source: ClassVar[str] = "MAS (arXiv:1711.09601)"
    stores: ClassVar[str] = "an importance and an anchor for each trained parameter, for all tasks together"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = "the squared length of the logits is divided by the vocabulary's size"

    strength: float = 1.0

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        for name, new in self.measured(task, "mas").items():
            old = self.importances.get(name)
            self.importances[name] = new if old is None else old + new
        self.anchors = {name: param.detach().clone() for name, param in self.mllm.trained_parameters().items()}
