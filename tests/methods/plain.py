"""The methods once more, as the papers write them: loops over experts, one parameter for each expert, torch's AdamW."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mllmcl.models.experts import ExpertLinear, ExpertProjectorLinear


class PlainExperts(nn.Module):
    """y = W x + b + sum_e g_e(x) scaling_e B_e A_e x, with g from `weigh(x, router)`."""

    def __init__(self, layer: ExpertLinear, trains: list[bool], weigh):
        super().__init__()
        ranks = layer.state.ranks
        self.base, self.scaling, self.weigh = layer, layer.state.scaling, weigh
        rows_a, rows_b = layer.lora_a.detach().split(ranks), layer.lora_b.detach().split(ranks, 1)
        self.a = nn.ParameterList(nn.Parameter(a.clone(), requires_grad=t) for a, t in zip(rows_a, trains, strict=True))
        self.b = nn.ParameterList(nn.Parameter(b.clone(), requires_grad=t) for b, t in zip(rows_b, trains, strict=True))
        router = layer.router_weight
        self.router = None if router is None else nn.Parameter(router.detach().clone())

    def forward(self, x):
        y = F.linear(x, self.base.weight, self.base.bias)
        gates = self.weigh(x, self.router, len(self.a))
        for expert, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            y = y + gates[expert] * self.scaling[expert] * ((x @ a.t()) @ b.t())
        return y


class PlainProjector(nn.Module):
    """The copy of one expert."""

    def __init__(self, layer: ExpertProjectorLinear, expert: int):
        super().__init__()
        self.weight = nn.Parameter(layer.expert_weight[expert].detach().clone())
        self.bias = nn.Parameter(layer.expert_bias[expert].detach().clone())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def one(expert: int):
    """Only this expert."""
    return lambda x, router, count: [1.0 if place == expert else 0.0 for place in range(count)]


def equal(x, router, count):
    """Every expert with weight 1."""
    return [1.0] * count


def softmax(x, router, count):
    """MoELoRA: g = softmax(x W_g^T), token by token."""
    return [gate[..., None] for gate in torch.softmax(x @ router.t(), -1).unbind(-1)]


def make_plain(mllm, trains: list[bool], weigh, expert: int | None = None) -> None:
    """Replace the layers of a copied model in place."""
    for path, layer in list(mllm.expert_layers.items()):
        parent, _, name = path.rpartition(".")
        setattr(mllm.model.get_submodule(parent), name, PlainExperts(layer, trains, weigh))
    for path, layer in list(mllm.projector_layers.items()):
        parent, _, name = path.rpartition(".")
        setattr(mllm.model.get_submodule(parent), name, PlainProjector(layer, expert))
