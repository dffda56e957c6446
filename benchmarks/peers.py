"""What ours is measured against, written from what each does."""

# T tokens, K in, N out, E experts, r rank of one expert

from __future__ import annotations

import torch
import torch.nn.functional as F


def loop_over_experts(x, weight, bias, a, b, gates, rank: int, scaling: float, dropout: float = 0.0):
    """MoE-LoRA as CoIN and its descendants run it: experts one after the other, each with a dropout mask of its own."""
    y = F.linear(x, weight, bias)
    for expert in range(gates.shape[-1]):
        rows = slice(expert * rank, (expert + 1) * rank)
        dropped = F.dropout(x, dropout) if dropout else x
        y = y + F.linear(F.linear(dropped, a[rows]), b[:, rows]) * scaling * gates[:, expert, None]
    return y


def stacked(x, weight, bias, a, b, gates, rank: int, scaling: float, dropout: float = 0.0):
    """Experts stacked in rank space, two products, in plain torch."""
    dropped = F.dropout(x, dropout) if dropout else x
    factors = gates.repeat_interleave(rank, -1) * scaling
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a) * factors, b)


def base(x, weight, bias, *_rest, **_options):
    """The frozen layer alone: what no adapter can undercut."""
    return F.linear(x, weight, bias)


def compiled_stacked():
    """torch.compile of `stacked`."""
    return torch.compile(stacked, fullgraph=True)


def eager_router(x, weight, top_k: int):
    """Softmax, top-k, renormalised, dense gates, load-balance and z loss in plain torch."""
    logits = F.linear(x, weight).float()
    probs = torch.softmax(logits, -1)
    values, indices = torch.topk(probs, top_k, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(-1, indices, values)
    load = torch.zeros_like(probs).scatter(-1, indices, 1.0).sum(0)
    balance = probs.shape[-1] * ((load / load.sum()).detach() * probs.mean(0)).sum()
    return gates, balance + torch.logsumexp(logits, -1).square().mean()


def adamw_that_restores(optimizer, params, masks):
    """A correct freeze with a stock optimizer: mask the gradients, step, put frozen entries and moments back."""
    kept = []
    for param, mask in zip(params, masks, strict=True):
        param.grad.mul_(mask)
        state = optimizer.state[param]
        values = (param.detach(), state.get("exp_avg"), state.get("exp_avg_sq"))
        kept.append([value.clone() for value in values if value is not None])
    optimizer.step()
    for param, mask, old in zip(params, masks, kept, strict=True):
        state = optimizer.state[param]
        for value, before in zip((param.detach(), state["exp_avg"], state["exp_avg_sq"]), old, strict=False):
            value.copy_(torch.where(mask, value, before))
