"""SLM: increments in slots, retrieved by keys and mixed by likeness; the keys are trained first and then frozen."""

# B samples, N slots (experts), k slots of a sample

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mllmcl_kernels import Mask

from .base import LoraMethod, Phase
from .keys import Keys, nearest, query

KEY_PHASE = "keys"
#: name of the keys in the model
SLOT_KEYS = "slot_keys"
#: more than two cosines can lie apart
FAR = 4.0


@dataclass(kw_only=True)
class Slm(LoraMethod):
    """Each task has some slots, each a key and a low-rank increment; a sample takes the increments of its nearest keys.

        s_n = mean over groups of cos(q_g, key_ng),   w = s / sum s over the k nearest,   W' = W + sum_n w_n B_n A_n

    with q the frozen features of image and question, cut into groups. First the keys of the task are trained on
    -mean(s of the k nearest), each key hidden from a sample with probability `mask_rate` so that all are used; then
    they are frozen and the increments are trained. In training only the task's own slots are looked at, at test those
    of all tasks.

    Args:
        slots: of each task. chosen: k. groups: of the features.
        mask_rate: how often a key is hidden while keys are trained.
        key_epochs: passes over the task that train its keys. key_learning_rate: in them.
        legacy: s is averaged over the batch, so that all its samples have one increment.
    """

    name: ClassVar[str] = "slm"
    summary: ClassVar[str] = "slots of increments retrieved by keys and mixed by likeness, sample by sample"
    source: ClassVar[str] = "SLM: JARe and DTKR (arXiv:2404.07470)"
    stores: ClassVar[str] = "keys and increments of `slots` slots for each task"
    at_test: ClassVar[str] = "nothing: slots by key, sample by sample"
    deviations: ClassVar[str] = (
        "an increment for each sample where the public code has one for a batch; features of the model at hand, not of "
        "a sentence encoder; no loss that drives keys away from older ones; legacy: one increment for a batch"
    )
    learning_rate: ClassVar[float] = 2e-4

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: str | list[str] = "o_proj"
    train_projector: bool = False
    slots: int = 4
    chosen: int = 2
    groups: int = 6
    mask_rate: float = 0.25
    key_epochs: float = 2.0
    key_learning_rate: float = 2e-4
    legacy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.slots:
            raise ValueError(f"chosen must be in 1..slots = {self.slots}, got {self.chosen}")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if not 0 <= self.mask_rate < 1:
            raise ValueError(f"mask_rate must be in [0, 1), got {self.mask_rate}")
        self.known = 0
        self.acting = 0
        self.trains_keys = False

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        with torch.no_grad():
            for layer in mllm.expert_layers.values():
                layer.lora_a.copy_(torch.randn(layer.lora_a.shape))
        width = query(mllm, stream.tasks[0].train[:1]).shape[1]
        weight = nn.init.orthogonal_(torch.empty(self._num_experts(), width))
        self.keys = mllm.attach(SLOT_KEYS, Keys(weight, self.groups))
        mllm.router, mllm.routes_batches = self.route, self.legacy

    def _num_experts(self) -> int:
        return self.slots * len(self.stream.tasks)

    def likeness(self, samples: Sequence) -> Tensor:
        """s `[B, N]`; its mean over the batch in every row with `legacy`."""
        likeness_BN = self.keys(query(self.mllm, samples))
        return likeness_BN.mean(0, keepdim=True).expand_as(likeness_BN) if self.legacy else likeness_BN

    def gates(self, likeness_BN: Tensor, first: int, end: int) -> Tensor:
        """w `[B, N]`, zero but at the k nearest of the slots first..end."""
        ids_Bk = nearest(likeness_BN[:, first:end], self.chosen) + first
        # likeness below zero says nothing, and weights of both signs would cancel
        share_Bk = likeness_BN.gather(1, ids_Bk).clamp(min=1e-6)
        share_Bk = share_Bk / share_Bk.sum(1, keepdim=True)
        return torch.zeros_like(likeness_BN).scatter(1, ids_Bk, share_Bk)

    @torch.no_grad()
    def route(self, samples: Sequence) -> Tensor:
        """Gates of each sample; ids -1, the base model, while nothing was learned."""
        if not self.known:
            return torch.full((len(samples),), -1)
        return self.gates(self.likeness(samples), 0, self.known * self.slots)

    @property
    def own(self) -> range:
        """The slots of the task that trains."""
        return range(self.acting * self.slots, (self.acting + 1) * self.slots)

    def on_task_start(self, task) -> None:
        self.acting = self.index_of(task)
        self._train(keys=False)

    def phases(self, task) -> list[Phase]:
        keys = Phase(
            name=KEY_PHASE, samples=task.train, epochs=self.key_epochs, learning_rate=self.key_learning_rate
        )  # fmt: skip
        return [keys, *super().phases(task)]

    def on_phase_start(self, task, phase: Phase) -> None:
        self._train(keys=phase.name == KEY_PHASE)

    def _train(self, keys: bool) -> None:
        """Let the keys or the increments of the task train."""
        self.trains_keys = keys
        trainable = [not keys and slot in self.own for slot in range(self._num_experts())]
        self.mllm.set_trainable(trainable, projector=self.train_projector and not keys)
        self.keys.requires_grad_(keys)

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        likeness_BN = self.likeness(samples)
        if self.trains_keys:
            own_Bn = likeness_BN[:, self.own.start : self.own.stop]
            is_hidden_Bn = (torch.rand(own_Bn.shape) < self.mask_rate).to(own_Bn.device)
            self.near_Bk = own_Bn.gather(1, nearest(own_Bn - FAR * is_hidden_Bn, self.chosen))
            return contextlib.nullcontext()
        return self.mllm.use_experts(self.gates(likeness_BN, self.own.start, self.own.stop))

    def answer_loss(self, batch) -> Tensor:
        # keys are trained without the model
        return -self.sample_mean(self.near_Bk) if self.trains_keys else super().answer_loss(batch)

    def parameter_masks(self) -> dict:
        rows = torch.zeros(self._num_experts(), dtype=torch.bool)
        rows[self.own.start : self.own.stop] = True
        return {**super().parameter_masks(), f"{SLOT_KEYS}.weight": Mask.rows(rows.to(self.mllm.device))}

    def on_task_end(self, task) -> None:
        self.known = self.index_of(task) + 1

    def state_values(self) -> dict:
        return {"known": self.known}

    def load_state(self, tensors, values) -> None:
        self.known = values["known"]
