"""PackNet: tasks packed into one LoRA, each in the entries that the earlier ones left free."""

# L expert layers, R stacked rank rows of all experts, r rank of one expert

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import Mask

from .base import Phase, named_under
from .mr_lora import MrLora

RETRAIN = "retrain"
#: owner of an entry: 0 nobody yet, t + 1 task t, and this where nothing may change
FREE, CLOSED = 0, 255


@dataclass(kw_only=True)
class PackNet(MrLora):
    """After each task the smallest of its entries are given back; the next task trains only what is free.

        train the free entries;  of them keep the (1 - prune) largest by |w| in each matrix as task t's, set the others
        to 0;  train what task t owns once more

    At test a sample of task t sees the entries that tasks 0..t own. So that a batch may mix tasks, the experts of the
    model are these views of the one packed LoRA: expert t equals expert t + 1 wherever tasks 0..t own an entry.

    Args:
        prune: share of the entries still free that a task gives back.
        retrain_epochs: passes over the task after pruning.
    """

    name: ClassVar[str] = "packnet"
    summary: ClassVar[str] = "tasks packed into one LoRA by pruning: each owns entries that later ones see and keep"
    source: ClassVar[str] = "PackNet (arXiv:1711.05769)"
    stores: ClassVar[str] = (
        "a uint8 owner of each LoRA entry; a projector for each task, what the router keeps; the model holds a view "
        "of the packed LoRA for each task"
    )
    at_test: ClassVar[str] = "a router chooses the task; task id with router=oracle"
    deviations: ClassVar[str] = "packs a LoRA, not the network; the projector is a copy for each task"

    prune: float = 0.5
    retrain_epochs: float = 0.5

    #: uint8 owners of the acting expert's A `[r, K]` and B `[N, r]`, by name of the parameter
    owners: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prune < 1:
            raise ValueError(f"prune must be in (0, 1), got {self.prune}")
        self.retrains = False

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        if len(stream.tasks) >= CLOSED:
            raise ValueError(f"packnet takes at most {CLOSED - 1} tasks, the stream has {len(stream.tasks)}")
        for name, weight in self._acting(self.first):
            self.owners[name] = torch.zeros_like(weight, dtype=torch.uint8)

    def _acting(self, expert: int) -> Iterator[tuple[str, Tensor]]:
        """Name of each stacked LoRA parameter, and the expert's part of it as a view."""
        rows = self.mllm.experts.rows(expert)
        for path, layer in self.mllm.expert_layers.items():
            yield f"{path}.lora_a", layer.lora_a.detach()[rows]
            yield f"{path}.lora_b", layer.lora_b.detach()[:, rows]

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        if self.index_of(task):
            pairs = zip(self._acting(self.acting), self._acting(self.acting - 1), strict=True)
            for (name, weight), (_, before) in pairs:
                weight.copy_(before.where(self.owners[name] != FREE, 0.0))

    def phases(self, task) -> list[Phase]:
        train, *router = super().phases(task)
        retrain = Phase(name=RETRAIN, samples=train.samples, epochs=self.retrain_epochs)
        return [train, retrain, *router]

    def on_phase_start(self, task, phase: Phase) -> None:
        self.retrains = phase.name == RETRAIN
        place = self.index_of(task)
        if self.retrains:
            self.act(place + self.first)
            self._prune(place + 1)
        else:
            super().on_phase_start(task, phase)

    def _prune(self, owner: int) -> None:
        """Give the largest free entries of each matrix to `owner` and set the others to 0."""
        for name, weight in self._acting(self.acting):
            owners = self.owners[name]
            size = weight.abs().masked_fill(owners != FREE, -1.0).flatten()
            count = round((1 - self.prune) * int((owners == FREE).sum()))
            owners.put_(size.topk(count).indices, owners.new_full((count,), owner))
            weight.masked_fill_(owners == FREE, 0.0)

    def parameter_masks(self) -> dict:
        masks = super().parameter_masks()
        if self.acting < self.first:
            return masks
        rows = self.mllm.experts.rows(self.acting)
        active = self.acting - self.first + 1 if self.retrains else FREE
        for path, layer in self.mllm.expert_layers.items():
            for kind, part in (("lora_a", (rows,)), ("lora_b", (slice(None), rows))):
                closed = torch.full_like(getattr(layer, kind), CLOSED, dtype=torch.uint8)
                closed[part] = self.owners[f"{path}.{kind}"]
                masks[f"{path}.{kind}"] = Mask.owner(closed, active)
        return masks

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), **named_under("owners", self.owners)}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        for name, owners in self.owners.items():
            owners.copy_(tensors[f"owners/{name}"])
