"""`route` on the CPU: scores, choice and gates in C++, products too where the experts are few."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from . import fake_routing, route_backward_op, route_op
from .reference import _logits, logits_backward

__all__ = ["gates_from_logits", "logits_gradient", "product_gradient"]

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "router_gates(Tensor logits, Tensor? noise, Tensor? mask, int top_k, int score, bool renormalize, bool straight, "
    "Tensor(a!) gates, Tensor(b!) indices, Tensor(c!) values, Tensor(d!) probs) -> ()"
)
LIBRARY.define(
    "router_backward(Tensor d_gates, Tensor d_values, Tensor d_logits, Tensor d_probs, Tensor gates, Tensor indices, "
    "Tensor probs, int score, bool renormalize, bool straight, float inverse_temperature, Tensor(a!) d_scores) -> ()"
)
LIBRARY.define("router_product(Tensor x, Tensor weight, Tensor(a!) out) -> ()")
LIBRARY.define("router_product_backward(Tensor d, Tensor x, Tensor weight, Tensor(a!) dx, Tensor(b!) dweight) -> ()")
OPS = torch.ops.mllmcl_cpu
#: experts up to which our own products beat a general one
MOST_SLIM = 16
# cosine is softmax over other logits
SCORE = {"softmax": 0, "cosine": 0, "sigmoid": 1}


def _float_path(x: Tensor, *_rest) -> str | None:
    return f"computes in float32, got {x.dtype}" if x.dtype == torch.float64 else None


def _is_slim(weight: Tensor, score: str) -> bool:
    """Whether the router has so few experts that memory alone limits its products."""
    return score != "cosine" and weight.shape[0] <= MOST_SLIM


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, score: str, temperature: float) -> Tensor:
    """The logits `[T, E]` in float32."""
    if not _is_slim(weight, score):
        return _logits(x, weight, bias, score, temperature).contiguous()
    logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    OPS.router_product(x.contiguous(), weight.float().contiguous(), logits)
    if bias is not None:
        logits += bias
    return logits if temperature == 1.0 else logits.div_(temperature)


def product_gradient(dl: Tensor, x: Tensor, weight: Tensor, score: str, needs_x: bool, needs_weight: bool):
    """Gradients of x and weight in x's dtype from that of the product."""
    if not _is_slim(weight, score):
        return logits_backward(dl, x, weight, score, needs_x, needs_weight)
    x = x.contiguous()
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    dweight = torch.empty(weight.shape if needs_weight else 0, dtype=torch.float32)
    OPS.router_product_backward(dl.contiguous(), x, weight.float().contiguous(), dx, dweight)
    return dx, dweight.to(x.dtype)


def gates_from_logits(logits, noise, expert_mask, top_k, score, renormalize, straight_through):
    """gates, indices, values, logits, probs from float32 logits `[T, E]`."""
    gates, indices, values, _, probs = fake_routing(logits, logits.shape[1], top_k)
    mask = None if expert_mask is None else expert_mask.contiguous().view(torch.uint8)
    noise = None if noise is None else noise.float().contiguous()
    OPS.router_gates(
        logits, noise, mask, top_k, SCORE[score], renormalize, straight_through, gates, indices, values, probs
    )
    return gates, indices, values, logits, probs


def logits_gradient(d_gates, d_values, d_logits, d_probs, gates, indices, probs, score, temperature, renorm, hard):
    """Gradient of the product x W^T, `[T, E]` float32."""
    d_scores = torch.empty_like(gates)
    grads = (grad.float().contiguous() for grad in (d_gates, d_values, d_logits, d_probs))
    OPS.router_backward(
        *grads, gates.contiguous(), indices.contiguous(), probs.contiguous(), SCORE[score], renorm, hard,
        1.0 / temperature, d_scores,
    )  # fmt: skip
    return d_scores


@route_op.provider("cpp", supports=_float_path)
def route_cpp(x, weight, bias, noise, expert_mask, top_k, score, temperature, renormalize, straight_through):
    logits = _product(x, weight, bias, score, temperature)
    return gates_from_logits(logits, noise, expert_mask, top_k, score, renormalize, straight_through)


@route_backward_op.provider("cpp", supports=lambda d_gates, d_values, d_logits, d_probs, x, *_rest: _float_path(x))
def route_backward_cpp(
    d_gates, d_values, d_logits, d_probs, x, weight, gates, indices, probs, score, temperature, renormalize,
    straight_through, needs,
):  # fmt: skip
    dl = logits_gradient(
        d_gates, d_values, d_logits, d_probs, gates, indices, probs, score, temperature, renormalize, straight_through
    )
    dx, dweight = product_gradient(dl, x, weight, score, needs[0], needs[1])
    return dx, dweight, dl.sum(0).to(x.dtype) if needs[2] else x.new_empty(0)
