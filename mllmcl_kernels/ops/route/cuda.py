"""`route` on the GPU for up to 64 experts: the product through torch, scores, choice, gates and planes in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...layouts import dense_rows, mask_bytes
from . import fake_routing, route_backward_op, route_op
from .reference import _logits, logits_backward

__all__: list[str] = []

LIBRARY = Library("mllmcl_cuda", "FRAGMENT")
LIBRARY.define(
    "router_gates(Tensor logits, Tensor? noise, Tensor? mask, Tensor? counted, int top_k, int score, bool renormalize, "
    "bool straight, Tensor(a!) gates, Tensor(b!) indices, Tensor(c!) values, Tensor(d!) probs, Tensor(e!) planes) -> ()"
)
LIBRARY.define(
    "router_backward(Tensor? d_gates, Tensor? d_values, Tensor? d_logits, Tensor? d_probs, Tensor? d_planes, "
    "Tensor gates, Tensor indices, Tensor logits, Tensor probs, Tensor? counted, int score, bool renormalize, "
    "bool straight, float inverse_temperature, Tensor(a!) d_scores) -> ()"
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
def route_cuda(x, weight, bias, noise, expert_mask, token_mask, top_k, score, temperature, renormalize, straight):
    logits = _logits(x, weight, bias, score, temperature).contiguous()
    gates, indices, values, _, probs, planes = fake_routing(logits, logits.shape[1], top_k)
    noise = None if noise is None else noise.float().contiguous()
    OPS.router_gates(
        logits, noise, mask_bytes(expert_mask), mask_bytes(token_mask), top_k, SCORE[score], renormalize, straight,
        gates, indices, values, probs, planes,
    )  # fmt: skip
    return gates, indices, values, logits, probs, planes


def _supports_backward(d_gates, d_values, d_logits, d_probs, d_planes, x, weight, *_rest) -> str | None:
    return _reason(x, weight.shape[0])


@route_backward_op.provider("cuda", supports=_supports_backward)
def route_backward_cuda(
    d_gates, d_values, d_logits, d_probs, d_planes, x, weight, gates, indices, logits, probs, token_mask, score,
    temperature, renormalize, straight_through, needs,
):  # fmt: skip
    dl = torch.empty_like(gates)
    grads = (None if grad is None else grad.float().contiguous() for grad in (d_gates, d_values, d_logits, d_probs))
    saved = (tensor.contiguous() for tensor in (gates, indices, logits, probs))
    OPS.router_backward(
        *grads, None if d_planes is None else dense_rows(d_planes.float()), *saved, mask_bytes(token_mask),
        SCORE[score], renormalize, straight_through, 1.0 / temperature, dl,
    )  # fmt: skip
    dx, dweight = logits_backward(dl, x, weight, score, needs[0], needs[1])
    return dx, dweight, dl.sum(0).to(x.dtype) if needs[2] else x.new_empty(0)
