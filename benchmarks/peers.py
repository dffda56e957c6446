"""What ours is measured against, written from what each does."""

# T tokens, K in, N out, E experts, r rank of one expert

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Restoring",
    "base",
    "by_expert",
    "chosen",
    "eager_router",
    "loop_over_experts",
    "routed_by_hand",
    "stacked",
]


def loop_over_experts(x, weight, bias, a, b, gates, rank: int, scaling: float, dropout: float = 0.0):
    """MoE-LoRA as CoIN and its descendants run it: experts one after the other, each with a dropout mask of its own."""
    y = F.linear(x, weight, bias)
    for expert in range(gates.shape[-1]):
        rows = slice(expert * rank, (expert + 1) * rank)
        dropped = F.dropout(x, dropout) if dropout else x
        y += F.linear(F.linear(dropped, a[rows]), b[:, rows]) * scaling * gates[:, expert, None]
    return y


def stacked(x, weight, bias, a, b, gates, rank: int, scaling: float, dropout: float = 0.0):
    """Experts stacked in rank space, two products, in plain torch."""
    dropped = F.dropout(x, dropout) if dropout else x
    factors = gates.repeat_interleave(rank, -1) * scaling
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a) * factors, b)


def by_expert(x, weight, bias, a, b, ids, rank: int, scaling: float):
    """A batch that mixes adapters as PEFT runs it: for each expert its own tokens are taken out and added back."""
    y = F.linear(x, weight, bias)
    for expert in ids.unique().tolist():
        rows, tokens = slice(expert * rank, (expert + 1) * rank), (ids == expert).nonzero()[:, 0]
        y = y.index_add(0, tokens, F.linear(F.linear(x[tokens], a[rows]), b[:, rows]) * scaling)
    return y


def base(x, weight, bias, *_rest, **_options):
    """The frozen layer alone: what no adapter can undercut."""
    return F.linear(x, weight, bias)


def eager_router(x, weight, top_k: int):
    """Softmax, top-k, renormalised, dense gates, load-balance and z loss in plain torch."""
    # float32 or better
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    probs = torch.softmax(logits, -1)
    values, indices = torch.topk(probs, top_k, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(-1, indices, values)
    load = torch.zeros_like(probs).scatter(-1, indices, 1.0).sum(0)
    balance = probs.shape[-1] * ((load / load.sum()).detach() * probs.mean(0)).sum()
    return gates, balance + torch.logsumexp(logits, -1).square().mean()


def chosen(x, weight, top_k: int):
    """Values and indices of the k largest softmax scores."""
    return torch.topk(torch.softmax(F.linear(x, weight).float(), -1), top_k, dim=-1)


def routed_by_hand(mix, x, weight, bias, a, b, router, rank: int, scaling: float, top_k: int | None):
    """A router in plain torch, then `mix` with its gates."""
    logits = F.linear(x, router)
    gates = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    if top_k:
        values, indices = torch.topk(gates, top_k, dim=-1)
        gates = torch.zeros_like(gates).scatter(-1, indices, values)
    return mix(x, weight, bias, a, b, gates.to(x.dtype), rank, scaling)


class Restoring:
    """A correct freeze with a stock optimizer: mask the gradients, step, put frozen entries and moments back."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[Tensor], masks: list[Tensor]) -> None:
        self.optimizer, self.params, self.masks = optimizer, params, masks
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_mul_([param.grad for param in self.params], self.masks)
        # at the first step there are no moments yet: a masked gradient leaves them zero
        states = [self.optimizer.state[param] for param in self.params]
        names = ("exp_avg", "exp_avg_sq") if states[0] else ()
        tensors = [*self.params, *(state[name] for name in names for state in states)]
        # room for them is made once: asking for it at every step takes longer than the copies
        self.kept += [torch.empty_like(tensor) for tensor in tensors[len(self.kept) :]]
        torch._foreach_copy_(self.kept[: len(tensors)], tensors)
        self.optimizer.step()
        for tensor, mask, before in zip(tensors, itertools.cycle(self.masks), self.kept, strict=False):
            torch.where(mask, tensor, before, out=tensor)
