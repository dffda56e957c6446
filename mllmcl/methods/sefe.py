"""SEFE: training data in several answer styles, and a LoRA kept off the entries that mattered to old tasks."""

# K in, N out, n kept entries of all layers of a task

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import SampledEntries, sampled_product_l1

from ..streams.styles import diversified
from .merging import MergedLoraMethod


@dataclass(kw_only=True)
class Sefe(MergedLoraMethod):
    """A fresh LoRA for each task, merged before the next, which is to leave alone what the merged ones changed most.

        loss = CE + strength * mean over layers of mean over Omega_l of |(B_l A_l)_ij|
        Omega_l = the entries that are among the `key_share` largest |B_l A_l| of an old task, once for each such task

    Superficial forgetting, of the form of answers, is met by data: of each task a share is asked in another style.

    Args:
        strength: of the penalty.
        key_share: of the entries of each matrix, for each task.
        style_share: share of a task's samples that are rewritten, see `streams.styles`; 0 leaves the penalty alone
            (RegLoRA).
        seed: of their draw.
    """

    name: ClassVar[str] = "sefe"
    summary: ClassVar[str] = "answer styles made diverse; a fresh LoRA kept off the entries that mattered to old tasks"
    source: ClassVar[str] = "SEFE: answer style diversification and RegLoRA (arXiv:2505.02486)"
    stores: ClassVar[str] = "the merged weights, places of `key_share` of their entries for each task, one projector"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = (
        "styles are written by rules (choice, yes or no, sentence, blank) instead of by a language model; the last "
        "task's LoRA stays beside the base"
    )

    alpha: float = 32.0
    rslora: bool = False
    strength: float = 2.5e3
    key_share: float = 0.02
    style_share: float = 0.2
    seed: int = 0

    #: by place of the task: flat places `[n]` in the matrices of all layers, one layer after the other
    keys: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if not 0 < self.key_share <= 1:
            raise ValueError(f"key_share must be in (0, 1], got {self.key_share}")
        if not 0 <= self.style_share <= 1:
            raise ValueError(f"style_share must be in [0, 1], got {self.style_share}")
        self.acting = 0
        self.entries: SampledEntries | None = None

    def training_samples(self, task) -> Sequence:
        return diversified(task.train, self.style_share, self.seed)

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.acting = self.index_of(task)
        self._sort_entries()

    def _sort_entries(self) -> None:
        """The entries of all earlier tasks in the order in which steps read them."""
        old = [keys.to(self.mllm.device) for place, keys in self.keys.items() if place < self.acting]
        self.entries = None
        if not old:
            return
        layers = list(self.mllm.expert_layers.values())
        counts = [self._num_keys(layer) for layer in layers]
        places = [torch.cat(parts).long() for parts in zip(*(keys.split(counts) for keys in old), strict=True)]
        rows = [flat // layer.in_features for layer, flat in zip(layers, places, strict=True)]
        cols = [flat % layer.in_features for layer, flat in zip(layers, places, strict=True)]
        self.entries = SampledEntries.of(*self._factors(), rows, cols)

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        layers = self.mllm.expert_layers.values()
        return [layer.lora_a for layer in layers], [layer.lora_b for layer in layers]

    def _num_keys(self, layer) -> int:
        return max(1, round(self.key_share * layer.in_features * layer.out_features))

    def loss(self, batch, loss: Tensor) -> Tensor:
        if self.entries is None:
            return loss
        return loss + self.strength * sampled_product_l1(*self._factors(), self.entries)

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        found = []
        for layer in self.mllm.expert_layers.values():
            size = (layer.lora_b @ layer.lora_a).abs().flatten()
            kept = size.topk(self._num_keys(layer)).indices
            found.append(kept if len(size) > torch.iinfo(torch.int32).max else kept.int())
        self.keys[self.index_of(task)] = torch.cat(found).cpu()

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), **{f"keys/{place}": keys for place, keys in self.keys.items()}}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.keys = {int(name.partition("/")[2]): keys for name, keys in tensors.items() if name.startswith("keys/")}
        self._sort_entries()
