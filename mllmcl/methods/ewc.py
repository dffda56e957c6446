"""EWC: parameters are held where old tasks left them, as firmly as the Fisher information says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .importance import ImportanceMethod


@dataclass(kw_only=True)
class Ewc(ImportanceMethod):
    """Sequential LoRA with a pull towards the parameters of every old task.

        loss + strength / 2 sum_{t < now} sum_i F_ti (theta_i - theta_ti)^2,    F_t = mean over samples of g^2

    with g the gradient of one sample's answer loss at theta_t. The sum over tasks has the gradient of a single pull,
    with the importance sum_t F_t towards the mean of the theta_t weighted by F_t, so that two tensors hold all of it.

    Args:
        online: one pull towards the newest parameters alone (online EWC): F <- decay F + F_t.
        decay: of what earlier tasks left, with `online`.
    """

    name: ClassVar[str] = "ewc"
    summary: ClassVar[str] = "parameters held where old tasks left them, by Fisher information"
    source: ClassVar[str] = "EWC (arXiv:1612.00796); online: Schwarz et al. 2018 (arXiv:1805.06370)"
    stores: ClassVar[str] = "an importance and an anchor for each trained parameter, for all tasks together"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = "Fisher information of the given answers, as public code has it, not of drawn ones"

    strength: float = 5000.0
    online: bool = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")
        if self.decay != 1 and not self.online:
            raise ValueError(f"decay must be 1 without online, got {self.decay}")

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        with torch.enable_grad():
            found = self.measured(task, "ewc")
        for name, param in self.mllm.trained_parameters().items():
            new, old = found[name], self.importances.get(name)
            if old is None or self.online:
                self.anchors[name] = param.detach().clone()
                self.importances[name] = new if old is None else self.decay * old + new
                continue
            total = old + new
            # where nothing matters the anchor says nothing
            share = torch.where(total > 0, new / total, 0.0)
            self.anchors[name] = torch.lerp(self.anchors[name], param.detach(), share)
            self.importances[name] = total
