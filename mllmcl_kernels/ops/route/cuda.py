"""`route` on the GPU for up to 64 experts: the product through torch, scores, choice and gates in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from . import fake_routing, route_backward_op, route_op
from .reference import _logits, logits_backward

__all__: list[str] = []

LIBRARY = Library("mllmcl_cuda", "FRAGMENT")
LIBRARY.define(
    "router_gates(Tensor logits, Tensor? noise, Tensor? mask, int top_k, int score, bool renormalize, bool straight, "
    "Tensor(a!) gates, Tensor(b!) indices, Tensor(c!) values, Tensor(d!) probs) -> ()"
)
LIBRARY.define(
    "router_backward(Tensor d_gates, Tensor d_values, Tensor d_logits, Tensor d_probs, Tensor gates, Tensor indices, "
    "Tensor probs, int score, bool renormalize, bool straight, float inverse_temperature, Tensor(a!) d_scores) -> ()"
)
OPS = torch.ops.mllmcl_cuda
MAX_EXPERTS = 64
# cosine is softmax over other logits
SCORE = {"softmax": 0, "cosine": 0, "sigmoid": 1}


def _reason(x: Tensor, experts: int) -> str | None:
    if x.dtype == torch.float64:
        return f"computes in float32, got {x.dtype}"
    return f"takes up to {MAX_EXPERTS} experts, got {experts}" if experts > MAX_EXPERTS else None


@route_op.provider("cuda", supports=lambda x, weight, *_rest: _reason(x, weight.shape[0]))
def route_cuda(x, weight, bias, noise, expert_mask, top_k, score, temperature, renormalize, straight_through):
    logits = _logits(x, weight, bias, score, temperature).contiguous()
    gates, indices, values, _, probs = fake_routing(logits, logits.shape[1], top_k)
    mask = None if expert_mask is None else expert_mask.contiguous().view(torch.uint8)
    noise = None if noise is None else noise.float().contiguous()
    OPS.router_gates(
        logits, noise, mask, top_k, SCORE[score], renormalize, straight_through, gates, indices, values, probs
    )
    return gates, indices, values, logits, probs


def _supports_backward(d_gates, d_values, d_logits, d_probs, x, weight, *_rest) -> str | None:
    return _reason(x, weight.shape[0])


@route_backward_op.provider("cuda", supports=_supports_backward)
def route_backward_cuda(
    d_gates, d_values, d_logits, d_probs, x, weight, gates, indices, probs, score, temperature, renormalize,
    straight_through, needs,
):  # fmt: skip
    dl = torch.empty_like(gates)
    grads = (grad.float().contiguous() for grad in (d_gates, d_values, d_logits, d_probs))
    OPS.router_backward(
        *grads, gates.contiguous(), indices.contiguous(), probs.contiguous(), SCORE[score], renormalize,
        straight_through, 1.0 / temperature, dl,
    )  # fmt: skip
    dx, dweight = logits_backward(dl, x, weight, score, needs[0], needs[1])
    return dx, dweight, dl.sum(0).to(x.dtype) if needs[2] else x.new_empty(0)
