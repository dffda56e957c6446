"""DISCO: one LoRA for each task, mixed sample by sample by the likeness of the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .anchored import AnchoredExperts


@dataclass(kw_only=True)
class Disco(AnchoredExperts):
    """A LoRA for each task, trained alone; at test all of them act in every layer.

        y = x W^T + s sum_i w_i B_i A_i x,    w = softmax(cos(u, U_i) / temperature)

    with u the text feature of the sample's question and U_i its mean over the training samples of task i.

    Args:
        temperature: of the softmax.
        legacy: w from the mean of u over the batch, one for all its samples.
    """

    name: ClassVar[str] = "disco"
    summary: ClassVar[str] = "one LoRA for each task, all mixed by how like each task's questions the question is"
    source: ClassVar[str] = "FCIT (arXiv:2503.12897) without its federated part, as in MCITlib; legacy: MCITlib"
    stores: ClassVar[str] = "a LoRA and a mean text feature for each task, one projector"
    at_test: ClassVar[str] = "nothing: the question decides"
    deviations: ClassVar[str] = (
        "text features are mean input embeddings of the language model instead of CLIP's; anchors are taken at the "
        "task's end over its training set; legacy: one weighting for each batch"
    )
    towers: ClassVar[tuple[str, ...]] = ("text",)

    temperature: float = 0.05

    def pooled_cosines(self, samples: Sequence) -> Tensor:
        feature_nd = self.anchors.features(samples)["text"]
        return self.anchors.cosines({"text": feature_nd.mean(0, keepdim=True).expand_as(feature_nd)})[0]

    def gates(self, weight_nT: Tensor) -> Tensor:
        gate_nE = torch.zeros(len(weight_nT), self.mllm.experts.num_experts)
        gate_nE[:, : weight_nT.shape[1]] = weight_nT
        return gate_nE
