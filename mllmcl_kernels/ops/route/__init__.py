"""`route`: a router's scores, choice and gates, forward and backward."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import (
    expect,
    expect_device,
    expect_flag,
    expect_floating,
    expect_mask,
    expect_real,
    expect_shape,
    expect_tensor,
)
from ...op import Cost, Op
from ..routing_planes import PLANE_ROWS, fake_planes
from .reference import route_backward_reference, route_reference
from .routing import Routing, with_planes
from .samples import backward_samples, bad_samples, samples

__all__ = ["Routing", "check_router", "route", "route_backward_op", "route_op", "wrap_routing"]

SCORES = ("softmax", "sigmoid", "cosine")


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_routing(x: Tensor, experts: int, top_k: int, count: int = 1) -> tuple[Tensor, ...]:
    """Empty outputs of `count` routers for x `[T, D]`, side by side: as of `route`, each `count` times as wide."""
    tokens, dtype = x.shape[0], _wide_dtype(x)

    def table(width: int) -> Tensor:
        return x.new_empty(tokens, count * width, dtype=dtype)

    indices = x.new_empty(tokens, count * top_k, dtype=torch.int32)
    gates = table(experts)
    return gates, indices, table(top_k), table(experts), table(experts), fake_planes(gates, count)


def _fake(x, weight, bias, noise, expert_mask, token_mask, top_k, *_options):
    return fake_routing(x, weight.shape[0], top_k)


def _fake_backward(d_gates, d_values, d_logits, d_probs, d_planes, x, weight, *rest):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, rest[-1], strict=True))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, _, token_mask, _, *options = inputs
    gates, indices, _, logits, probs, _ = output
    ctx.save_for_backward(x, weight, gates, indices, logits, probs, token_mask)
    ctx.mark_non_differentiable(indices)
    # no zeros for what nobody asks about
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx, d_gates, _d_indices, *grads):
    needs = list(ctx.needs_input_grad[:3])
    found = route_backward_op(d_gates, *grads, *ctx.saved_tensors, *ctx.options, needs, backend=ctx.backend)
    return (*(grad if need else None for need, grad in zip(needs, found, strict=True)), *([None] * 8))


def table_bytes(tokens: int, experts: int) -> int:
    """Bytes of a router's three tables and of their planes, in float32."""
    return 4 * (3 * tokens * experts + -(-tokens // PLANE_ROWS) * (3 * experts + 3))


def _cost(x, weight, *_rest) -> Cost:
    tokens, width = x.shape
    experts = weight.shape[0]
    return Cost(flops=2 * tokens * width * experts, bytes=x.numel() * x.element_size() + table_bytes(tokens, experts))


route_backward_op = Op(
    name="route_backward",
    reference=route_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

route_op = Op(
    name="route",
    reference=route_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    constants=("noise",),
    autocast=("x", "weight", "bias"),
)


def check_router(op: str, x, weight, bias, names: tuple[str, str] = ("weight", "bias")) -> None:
    """Types, devices and shapes of a router for x."""
    expect_tensor(op, "x", x)
    expect_floating(op, "x", x)
    expect(x.dim() >= 1, op, "x", "of shape [..., d]", list(x.shape))
    expect_tensor(op, names[0], weight)
    expect_floating(op, names[0], weight)
    expect_device(op, names[0], weight, x.device)
    width = x.shape[-1]
    fits = weight.dim() == 2 and weight.shape[1] == width
    expect(fits, op, names[0], f"[E, d] with d = {width}", list(weight.shape))
    expect(weight.shape[0] >= 1, op, names[0], "of at least one row", list(weight.shape))
    expect_tensor(op, names[1], bias, optional=True)
    if bias is not None:
        expect_floating(op, names[1], bias)
        expect_shape(op, names[1], bias, "[E]", (weight.shape[0],))
        expect_device(op, names[1], bias, x.device)


def check_options(
    op: str, x, experts: int, top_k, score, temperature, noise, expert_mask, token_mask
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """What the low-level op takes: noise drawn, the expert mask as [M, E], the token mask as [T], top_k as an int."""
    chosen, top_k = top_k, experts if top_k is None else top_k
    is_integer = isinstance(top_k, numbers.Integral) and not isinstance(top_k, bool)
    expect(is_integer, op, "top_k", "an integer or None", top_k, TypeError)
    top_k = int(top_k)
    expect(1 <= top_k <= experts, op, "top_k", f"an integer in 1..E = {experts}", top_k)
    expect(score in SCORES, op, "score", f"one of {', '.join(SCORES)}", repr(score))
    expect_real(op, "temperature", temperature, "positive", lambda value: 0.0 < value < math.inf)
    expect_real(op, "noise", noise, "a standard deviation >= 0", lambda value: 0.0 <= value < math.inf)
    lead = tuple(x.shape[:-1])
    flat_mask = None
    if expert_mask is not None:
        expect_mask(op, "expert_mask", expert_mask, (*lead, experts), x.device)
        if expert_mask.dim() == 1:
            flat_mask = expert_mask[None]
            if chosen is not None and expert_mask.device.type == "cpu" and not torch.compiler.is_compiling():
                allowed = int(expert_mask.sum())
                expect(top_k <= allowed, op, "top_k", f"at most the {allowed} allowed experts", top_k)
        else:
            flat_mask = expert_mask.expand(*lead, experts).reshape(-1, experts)
    if token_mask is not None:
        expect_mask(op, "token_mask", token_mask, lead, x.device)
        token_mask = token_mask.expand(lead).reshape(-1)
    drawn = None
    if noise > 0:
        tokens = x.numel() // max(x.shape[-1], 1)
        drawn = torch.randn(tokens, experts, device=x.device, dtype=_wide_dtype(x)) * noise
    return drawn, flat_mask, token_mask, top_k


def wrap_routing(outputs: Sequence[Tensor], lead: torch.Size, token_mask: Tensor | None) -> Routing:
    """A `Routing` with the leading dims of x from the flat outputs."""
    *tables, planes = outputs
    gates, indices, values, logits, probs = (out.view(*lead, out.shape[-1]) for out in tables)
    mask = None if token_mask is None else token_mask.expand(lead)
    return with_planes(Routing(gates, indices, values, logits, probs, mask), planes)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int | None = None,
    score: str = "softmax",
    temperature: float = 1.0,
    renormalize: bool = False,
    noise: float = 0.0,
    expert_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    straight_through: bool = False,
    backend: str | None = None,
) -> Routing:
    """Gates of E experts for every token, dense or the k best.

        logits = (x W^T + b) / temperature;  p = softmax(logits + noise);  gate_e = p_e for the k best, else 0

    Args:
        x: `[..., d]`, float32, bfloat16, float16 or float64; the arithmetic is float32 or better.
        weight, bias: `[E, d]` and `[E]` or None.
        top_k: how many experts a token gets, None for all. Ties go to the lowest index.
        score: "softmax", "sigmoid", or "cosine" (softmax over the cosines of x and the rows of weight).
        temperature: divides the logits.
        renormalize: divide the kept gates by their sum.
        noise: standard deviation of Gaussian noise on the logits, from torch's generator.
        expert_mask: bool `[E]` or `[..., E]`, False = may not be chosen.
        token_mask: bool `[...]`, False = counts in no statistic (padding).
        straight_through: the forward gate is 1 for the chosen (1 / k with renormalize), its gradient that of p.
        backend: "reference", "cpp", "triton", "cuda", or None to choose.

    Returns:
        Routing with gates, indices, values, logits, probs, load, importance and the auxiliary losses.
        Differentiable in x, weight and bias. A row with a NaN or infinite logit has NaN gates and the k lowest allowed
        ids, never an id out of range; a row where nothing is allowed has zero gates and ids -1.

    Raises:
        TypeError, ValueError: wrong types, shapes or devices, top_k over E or over the experts that `[E]` allows.

    >>> routing = route(torch.randn(2, 3, 8), torch.randn(4, 8), top_k=2)
    >>> routing.gates.shape, routing.indices.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3, 2]))
    """
    op = "route"
    check_router(op, x, weight, bias)
    choice = check_options(op, x, weight.shape[0], top_k, score, temperature, noise, expert_mask, token_mask)
    flags = expect_flag(op, "renormalize", renormalize), expect_flag(op, "straight_through", straight_through)
    options = (*choice, score, float(temperature), *flags)
    dtype = x.dtype
    bias = None if bias is None else bias.to(dtype)
    outputs = route_op(
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.to(dtype), bias, *options, backend=backend
    )
    return wrap_routing(outputs, x.shape[:-1], token_mask)
