"""HiDe-LLaVA: one LoRA for each task, merged in all layers but the last, mixed sample by sample in that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.targets import decoder_layer
from .anchored import AnchoredExperts


@dataclass(kw_only=True)
class Hide(AnchoredExperts):
    """A LoRA for each task, trained alone. At test, with the tasks 1 to t seen,

        y = x W^T + s sum_i B_i A_i x                    in all layers but the last
        y = x W^T + s sum_i w_i B_i A_i x                in the last one
        w = softmax(0.5 (cos(v, V_i) + cos(u, U_i)) / temperature)

    with v and u the image and text feature of the sample, V_i and U_i their means over the training samples of task i.

    Args:
        temperature: of the softmax.
        legacy: s (sum_i B_i) (sum_i A_i) x in all layers but the last, as the public code has it, which holds the cross
            terms B_i A_j of tasks that never met; and one w for a batch: the largest cosine in it counts, tower by
            tower. The sums are expert 0 of the stack then, and task i has expert i + 1.
    """

    name: ClassVar[str] = "hide"
    summary: ClassVar[str] = "one LoRA for each task, merged in all layers but the last, mixed by likeness in that one"
    source: ClassVar[str] = "HiDe-LLaVA (arXiv:2503.12941); legacy: its public code"
    stores: ClassVar[str] = (
        "a LoRA, a mean image and a mean text feature for each task, one projector; legacy: one merged LoRA as well"
    )
    at_test: ClassVar[str] = "nothing: image and question decide"
    deviations: ClassVar[str] = (
        "features are those of the model at hand (vision encoder, mean input embedding) instead of CLIP's; anchors are "
        "taken at the task's end over its training set; legacy: A and B are summed apart, one weighting for each batch"
    )

    @property
    def first(self) -> int:
        return int(self.legacy)

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        layer_of = {path: decoder_layer(path, mllm.language_path) for path in mllm.expert_layers}
        last = max(layer_of.values())
        mllm.experts.groups = {path: int(number == last) for path, number in layer_of.items()}

    def pooled_cosines(self, samples: Sequence) -> Tensor:
        cosines = self.cosines(samples)
        return cosines.amax(1, keepdim=True).expand_as(cosines).mean(0)

    def gates(self, weight_nT: Tensor) -> Tensor:
        gates_n2E = torch.zeros(len(weight_nT), 2, self.mllm.experts.num_experts)
        seen = slice(self.first, self.first + weight_nT.shape[1])
        gates_n2E[:, 0, 0 if self.legacy else seen] = 1.0
        gates_n2E[:, 1, seen] = weight_nT
        return gates_n2E

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        if not self.legacy:
            return
        rank, seen = self.rank, slice(1, 1 + self.known)
        for layer in self.mllm.expert_layers.values():
            layer.lora_a[:rank] = layer.lora_a.unflatten(0, (-1, rank))[seen].sum(0)
            layer.lora_b[:, :rank] = layer.lora_b.unflatten(1, (-1, rank))[:, seen].sum(1)
