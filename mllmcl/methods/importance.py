"""What methods share that hold each parameter where old tasks left it, as firmly as it mattered to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllmcl_kernels import anchor_grad_, importance_update_

from .base import LoraMethod, gradients_of, named_under, under

__all__ = ["MEASURES", "ImportanceMethod", "evenly_spaced"]


def _answer_loss(method, batch) -> Tensor:
    return method.answer_loss(batch)


def _output_norm(method, batch) -> Tensor:
    logits = method.mllm.answer_logits(batch)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean()


#: what a parameter matters to, and the power of its gradient's size: "ewc" the squared gradient of a sample's answer
#: loss, "mas" the absolute gradient of the mean square of a sample's answer logits
MEASURES: dict[str, tuple[Callable, int]] = {"ewc": (_answer_loss, 2), "mas": (_output_norm, 1)}


def evenly_spaced(samples: Sequence, count: int) -> list:
    """At most `count` of the samples, from first to last."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


@dataclass(kw_only=True)
class ImportanceMethod(LoraMethod):
    """Sequential LoRA whose parameters are pulled back to where old tasks left them.

        loss + strength / 2 sum_i importance_i (theta_i - anchor_i)^2

    The pull goes straight into the gradients; the loss that is reported is without it. Importances are taken when a
    task ends, sample by sample, without dropout.

    Args:
        strength: lambda.
        importance_samples: training samples of a task that importances are taken on, evenly spaced.
    """

    strength: float = 1.0
    importance_samples: int = 32

    importances: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    anchors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if self.importance_samples < 1:
            raise ValueError(f"importance_samples must be at least 1, got {self.importance_samples}")

    def measured(self, task, measure: str) -> dict[str, Tensor]:
        """Name of each trained parameter to its importance for the task."""
        mllm = self.mllm
        loss_of, power = MEASURES[measure]
        params = mllm.trained_parameters()
        found = {name: torch.zeros_like(param) for name, param in params.items()}
        with mllm.evaluating():
            for count, sample in enumerate(evenly_spaced(task.train, self.importance_samples), 1):
                batch = mllm.collate([sample], with_answers=True)
                with self.before_forward([sample]), self.autocast():
                    loss = loss_of(self, batch)
                grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
                importance_update_(list(found.values()), grads, power=power, count=float(count))
        return found

    def in_force(self) -> dict[str, Tensor]:
        """The importances that the task at hand is trained with; empty for no pull."""
        return self.importances

    @torch.no_grad()
    def before_step(self, optimizer) -> None:
        super().before_step(optimizer)
        importances = self.in_force()
        if importances:
            params = self.mllm.trained_parameters()
            held = [[store[name] for name in params] for store in (self.anchors, importances)]
            anchor_grad_(gradients_of(list(params.values())), list(params.values()), *held, self.strength)

    def state_tensors(self) -> dict[str, Tensor]:
        held = {**named_under("importance", self.importances), **named_under("anchor", self.anchors)}
        return {**super().state_tensors(), **held}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.importances, self.anchors = under("importance", tensors, self.mllm), under("anchor", tensors, self.mllm)
