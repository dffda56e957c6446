"""`route` on the CPU: scores, choice and gates in C++, products too where the experts are few."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from ...layouts import dense_rows, mask_bytes
from . import fake_routing, route_backward_op, route_op
from .reference import _logits, logits_backward

__all__ = ["gates_from_logits", "logits_gradient", "product_gradient"]

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "router_gates(Tensor logits, Tensor? noise, Tensor? mask, Tensor? counted, int routers, int top_k, int score, "
    "bool renormalize, bool straight, Tensor(a!) gates, Tensor(b!) indices, Tensor(c!) values, Tensor(d!) probs, "
    "Tensor(e!) planes) -> ()"
)
LIBRARY.define(
    "router_backward(Tensor? d_gates, Tensor? d_values, Tensor? d_logits, Tensor? d_probs, Tensor? d_planes, "
    "Tensor gates, Tensor indices, Tensor logits, Tensor probs, Tensor? counted, int routers, int score, "
    "bool renormalize, bool straight, float inverse_temperature, Tensor(a!) d_scores) -> ()"
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


def gates_from_logits(
    logits, noise, expert_mask, token_mask, top_k, score, renormalize, straight_through, count=1
):  # fmt: skip
    """gates, indices, values, logits, probs, planes from float32 logits `[T, count * E]` of routers side by side."""
    gates, indices, values, _, probs, planes = fake_routing(logits, logits.shape[1] // count, top_k, count)
    noise = None if noise is None else noise.float().contiguous()
    OPS.router_gates(
        logits, noise, mask_bytes(expert_mask), mask_bytes(token_mask), count, top_k, SCORE[score], renormalize,
        straight_through, gates, indices, values, probs, planes,
    )  # fmt: skip
    return gates, indices, values, logits, probs, planes


def logits_gradient(
    d_gates, d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask, score, temperature,
    renormalize, straight_through, count=1,
):  # fmt: skip
    """Gradient of the product x W^T, `[T, count * E]` float32."""
    d_scores = torch.empty_like(gates)
    grads = (None if grad is None else grad.float().contiguous() for grad in (d_gates, d_values, d_logits, d_probs))
    saved = (tensor.contiguous() for tensor in (gates, indices, logits, probs))
    d_planes = None if d_planes is None else dense_rows(d_planes.float())
    OPS.router_backward(
        *grads, d_planes, *saved, mask_bytes(token_mask), count, SCORE[score], renormalize, straight_through,
        1.0 / temperature, d_scores,
    )  # fmt: skip
    return d_scores


@route_op.provider("cpp", supports=_float_path)
def route_cpp(x, weight, bias, noise, expert_mask, token_mask, top_k, score, temperature, renormalize, straight):
    logits = _product(x, weight, bias, score, temperature)
    return gates_from_logits(logits, noise, expert_mask, token_mask, top_k, score, renormalize, straight)


def _supports_backward(d_gates, d_values, d_logits, d_probs, d_planes, x, *_rest) -> str | None:
    return _float_path(x)


@route_backward_op.provider("cpp", supports=_supports_backward)
def route_backward_cpp(
    d_gates, d_values, d_logits, d_probs, d_planes, x, weight, gates, indices, logits, probs, token_mask, score,
    temperature, renormalize, straight_through, needs,
):  # fmt: skip
    tables = (d_gates, d_values, d_logits, d_probs, d_planes, gates, indices, logits, probs, token_mask)
    dl = logits_gradient(*tables, score, temperature, renormalize, straight_through)
    dx, dweight = product_gradient(dl, x, weight, score, needs[0], needs[1])
    return dx, dweight, dl.sum(0).to(x.dtype) if needs[2] else x.new_empty(0)
