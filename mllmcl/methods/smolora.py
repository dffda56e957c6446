"""SMoLoRA: a group of LoRA experts for what is seen and one for what is asked, one of each chosen for every sample."""

# B samples, S positions, E experts, H = E / 2 experts of a group, R sum of ranks, r rank, K in, N out, d text width

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllmcl_kernels import route

from .features import text_features
from .moelora import MoeLora


class TwoGroupGating(nn.Module):
    """Gates of one layer: in each group the best expert for the sample, and how the two share a token.

        vu = top-1 of softmax(mean over the prompt of x . W_v^T),    if = top-1 of softmax(e W_i^T)
        [a, b] = softmax([f_vu . y_vu, f_if . y_if]),    y_group = s sum_{e in group} gate_e B_e A_e x
        gates = [a vu, b if]

    The scores f . y are taken in rank space, x (s A_e^T B_e^T f): y is never formed. The choice is hard and has the
    gradient of the softmax; `is_hash` leaves it none.
    """

    def __init__(self, layer, text_width: int, is_hash: bool):
        super().__init__()
        half, device = layer.state.num_experts // 2, layer.weight.device
        self.is_hash = is_hash
        self.vision = nn.Parameter(torch.empty(half, layer.in_features).normal_(0.0, 0.02).to(device))
        self.instruction = nn.Parameter(torch.empty(half, text_width).normal_(0.0, 0.02).to(device))
        bound = layer.out_features**-0.5
        self.fusion = nn.Parameter(torch.empty(2, layer.out_features).uniform_(-bound, bound).to(device))

    def forward(self, layer, x: Tensor, selection) -> Tensor:
        """Gates `[B, S, E]`."""
        choice_B1E = self._choice(layer.path, x, selection)[:, None]
        score_BSE = F.linear(x, self._directions(layer).to(x.dtype)).to(choice_B1E.dtype) * choice_B1E
        share_BS2 = torch.softmax(score_BSE.unflatten(-1, (2, -1)).sum(-1), dim=-1)
        return share_BS2.repeat_interleave(len(self.vision), dim=-1) * choice_B1E

    def _choice(self, path: str, x: Tensor, selection) -> Tensor:
        """One expert of each group, `[B, E]`; while an answer is decoded, that chosen for its prompt."""
        memory = selection.memory
        if memory is not None and path in memory:
            return memory[path]
        mask_B1S = selection.prompt_mask[:, None].to(x.dtype)
        prompt_BK = torch.bmm(mask_B1S / mask_B1S.sum(-1, keepdim=True), x)[:, 0]
        options = {"top_k": 1, "straight_through": True}
        seen = route(prompt_BK, self.vision, **options).gates
        asked = route(selection.features.to(self.instruction.dtype), self.instruction, **options).gates
        choice_BE = torch.cat([seen, asked.to(seen.dtype)], dim=-1)
        if self.is_hash:
            choice_BE = choice_BE.detach()
        if memory is not None:
            memory[path] = choice_BE
        return choice_BE

    def _directions(self, layer) -> Tensor:
        """s A_e^T B_e^T f of every expert, f that of its group, `[E, K]`."""
        experts, scaling = layer.state.num_experts, layer.state.scaling[0]
        f_R = torch.cat([f_N @ b_NR for f_N, b_NR in zip(self.fusion, layer.lora_b.chunk(2, dim=1), strict=True)])
        return scaling * torch.bmm(f_R.view(experts, 1, -1), layer.lora_a.unflatten(0, (experts, -1)))[:, 0]


@dataclass(kw_only=True)
class SMoLora(MoeLora):
    """Two groups of LoRA experts in every linear, for visual understanding and for instruction following.

    Each sample uses one expert of each group, chosen in every layer by its mean input and by its instruction; for each
    token the two are fused by a softmax over learned scores of their outputs. See `TwoGroupGating`.

    Args:
        experts: of both groups together. rank is that of one expert; alpha is divided by the stacked rank.
        targets: the linears of the feed-forward part.
        legacy: gates that never learn, random projections, as in the public code.
    """

    name: ClassVar[str] = "smolora"
    summary: ClassVar[str] = "one expert for what is seen and one for what is asked, chosen by sample, fused by token"
    source: ClassVar[str] = "SMoLoRA (arXiv:2411.13949); legacy: its public code"
    stores: ClassVar[str] = "one set of experts, gates and the projector, nothing per task"
    at_test: ClassVar[str] = "nothing (the question itself is the instruction)"
    deviations: ClassVar[str] = (
        "gates learn by a straight-through gradient, where theirs in the public code never get one (legacy); the "
        "instruction is the sample's question in mean input embeddings, not a sentence embedding looked up by task; "
        "the choice sees the prompt alone and holds while decoding; fusion scores see x without dropout; the projector "
        "trains whole and has no experts; gates go on learning after the first task"
    )
    router_score: ClassVar[str | None] = None

    experts: int = 8
    alpha: float = 64.0
    targets: str | list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    legacy: bool = False

    def __post_init__(self) -> None:
        if self.experts < 4 or self.experts % 2:
            raise ValueError(f"experts must be even and at least 4, got {self.experts}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        mllm.experts.sample_features = functools.partial(text_features, mllm)
        width = mllm.model.get_input_embeddings().weight.shape[1]
        for layer in mllm.expert_layers.values():
            layer.gating = TwoGroupGating(layer, width, self.legacy)

    def on_task_start(self, task) -> None:
        self.mllm.set_trainable([True] * self.experts, projector=self.train_projector, router=True)
        if self.legacy:
            for layer in self.mllm.expert_layers.values():
                layer.gating.vision.requires_grad_(False)
                layer.gating.instruction.requires_grad_(False)
