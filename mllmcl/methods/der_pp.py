"""DER++: experience replay with stored logits."""

# n answer tokens of all stored samples, k logits kept of each, b samples of a draw

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import distillation_loss

from .base import LoraMethod
from .buffers import BatchReplayMethod
from .teachers import RowsOfSamples, taught


@dataclass(kw_only=True)
class DerPp(BatchReplayMethod, LoraMethod):
    """Sequential LoRA held to the labels of one buffer batch and to the stored logits of another.

        L = CE(task batch) + distil * T^2 KL(p_stored || q) (buffer batch) + beta CE(another buffer batch)

    with p_stored over the `top_k` largest logits of each answer token and q over the whole vocabulary.

    Args:
        distil: weight of the distillation. beta: weight of the buffer's cross entropy.
        top_k: logits stored of each answer token.
        temperature: T.
    """

    name: ClassVar[str] = "der_pp"
    summary: ClassVar[str] = "experience replay that also distils the logits stored with the samples (DER++)"
    source: ClassVar[str] = "Buzzega et al. 2020 (arXiv:2004.07211)"
    stores: ClassVar[str] = "ids of samples as in er; `top_k` logits and tokens of each of their answer tokens"
    at_test: ClassVar[str] = "nothing"
    extra_passes: ClassVar[str] = "forward and backward of two batches of stored samples"
    deviations: ClassVar[str] = (
        "stores the largest logits of the vocabulary and compares by divergence instead of squared distance of all; "
        "samples and logits are taken when a task ends, not while it is learned"
    )

    distil: float = 0.5
    beta: float = 0.5
    top_k: int = 32
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1 or self.temperature <= 0:
            raise ValueError(f"top_k must be at least 1 and temperature > 0, got {self.top_k} and {self.temperature}")
        #: in the order of the buffer: logits `[n, k]`, their tokens `[n, k]`, tokens of each sample
        self.values, self.indices = torch.zeros(0, self.top_k), torch.zeros(0, self.top_k, dtype=torch.int32)
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def loss(self, batch, loss: Tensor) -> Tensor:
        if not self.pools:
            return loss
        mllm = self.mllm
        samples, places, fraction = self.replay(batch)
        hidden = mllm.answer_hidden(mllm.collate(samples, with_answers=True))
        rows = RowsOfSamples(self.lengths).of(places)
        values, indices = (stored[rows].to(mllm.device, non_blocking=True) for stored in (self.values, self.indices))
        distilled = distillation_loss(hidden, mllm.head_weight, (values, indices), temperature=self.temperature)
        distilled = self.processes.part(distilled, fraction * len(rows))
        samples, _, fraction = self.replay(batch)
        again = mllm.collate(samples, with_answers=True)
        labelled = self.processes.part(self.answer_loss(again), fraction * len(again.answer_labels))
        return loss + self.distil * distilled + self.beta * labelled

    def on_task_end(self, task) -> None:
        ids = [sample_id for kept in self.buffer.values() for sample_id in kept]
        sizes = self.lengths.tolist()
        known = dict(zip(ids, zip(self.values.split(sizes), self.indices.split(sizes), strict=True), strict=True))
        super().on_task_end(task)
        known |= self._taught(self.stored([task]))
        kept = [known[sample_id] for each in self.buffer.values() for sample_id in each]
        self.values, self.indices = (torch.cat(parts) for parts in zip(*kept, strict=True))
        self.lengths = torch.tensor([len(values) for values, _ in kept])

    def _taught(self, samples: list) -> dict[str, tuple[Tensor, Tensor]]:
        """Id of each sample to the largest logits of its answer tokens, and their tokens."""

        def largest(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = logits_nV.topk(self.top_k)
            return values, indices.int()

        return dict(zip((sample.id for sample in samples), taught(self, samples, largest), strict=True))

    def state_tensors(self) -> dict[str, Tensor]:
        stored = {"values": self.values, "indices": self.indices, "lengths": self.lengths}
        return {**super().state_tensors(), **stored}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.values, self.indices, self.lengths = (tensors[name] for name in ("values", "indices", "lengths"))
