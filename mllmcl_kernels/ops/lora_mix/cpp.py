"""`lora_mix` on the CPU: products through oneDNN and torch, rank space in C++."""

# T tokens, K in, N out, E experts, R sum of ranks, G rows of gates

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from ...dropout import threshold
from ...products import has_few_rows, product_nt
from . import lora_mix_backward_op, lora_mix_op
from .reference import expert_of_rank

__all__ = ["dropped", "float_path", "lora_gradients", "mixed_ranks", "rank_tables"]

LIBRARY = Library("mllmcl_cpu", "FRAGMENT")
LIBRARY.define(
    "mix_few(Tensor x, Tensor dropped, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? gates, "
    "Tensor starts, Tensor scaling, Tensor(a!) s, Tensor(b!) y) -> ()"
)
LIBRARY.define("rank_gate(Tensor s, Tensor? gates, Tensor starts, Tensor scaling, Tensor(a!) mixed) -> ()")
LIBRARY.define(
    "rank_gate_backward(Tensor u, Tensor s, Tensor? gates, Tensor starts, Tensor scaling, Tensor(a!) ds, "
    "Tensor(b!) mixed, Tensor(c!) dgates) -> ()"
)
LIBRARY.define("dropout(Tensor x, Tensor seed, int below, float scale, bool add, Tensor(a!) out) -> ()")
OPS = torch.ops.mllmcl_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def float_path(*tensors: Tensor | None) -> str | None:
    """Why these tensors do not fit: the C++ kernels compute in float32, so float64 stays with the reference."""
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"computes in float32, got {tensor.dtype}"
    return None


@functools.lru_cache(maxsize=1024)
def _tables(ranks: tuple[int, ...], scaling: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *ranks]).cumsum(0)
    return starts, torch.tensor(scaling, dtype=torch.float32)


def rank_tables(ranks: Sequence[int], scaling: Sequence[float]) -> tuple[Tensor, Tensor]:
    """First rank of each expert and one past the last `[E + 1]`, and the scalings `[E]`."""
    return _tables(tuple(ranks), tuple(scaling))


@functools.lru_cache(maxsize=1024)
def _trained_span(ranks: tuple[int, ...], trainable: tuple[bool, ...]) -> tuple[int, int, Tensor | None]:
    """The smallest run of ranks that holds all trainable ones, and which of the run to keep where not all."""
    keep = [trainable[expert] for expert in expert_of_rank(ranks)]
    if not any(keep):
        return 0, 0, None
    first, last = keep.index(True), len(keep) - keep[::-1].index(True)
    inside = keep[first:last]
    return first, last, None if all(inside) else torch.tensor(inside)


def dropped(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """drop(x), or x itself."""
    if dropout == 0.0:
        return x
    out = torch.empty_like(x)
    OPS.dropout(x, seed, threshold(dropout), 1.0 / (1.0 - dropout), False, out)
    return out


def mixed_ranks(s: Tensor, gates: Tensor | None, ranks: Sequence[int], scaling: Sequence[float]) -> Tensor:
    """s times the factor of every rank of every token, `[T, R]`."""
    mixed = torch.empty_like(s)
    OPS.rank_gate(s, gates, *rank_tables(ranks, scaling), mixed)
    return mixed


def _prepared(gates: Tensor | None) -> Tensor | None:
    if gates is None:
        return None
    return gates.contiguous() if gates.is_floating_point() else gates.to(torch.int64).contiguous()


def _supports(x, weight, bias, lora_a, lora_b, gates, *_rest) -> str | None:
    return float_path(x, weight, bias, lora_a, lora_b, gates)


def _supports_backward(dy, x, weight, lora_a, lora_b, gates, *_rest) -> str | None:
    return float_path(dy, x, weight, lora_a, lora_b, gates)


@lora_mix_op.provider("cpp", supports=_supports)
def lora_mix_cpp(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    """The mix is added into y by the product itself: no pass over [T, N] besides the two products."""
    x = x.contiguous()
    if has_few_rows(x):
        s, y = x.new_empty(x.shape[0], lora_a.shape[0]), x.new_empty(x.shape[0], weight.shape[0])
        layer = weight.contiguous(), None if bias is None else bias.contiguous(), lora_a.contiguous(), lora_b.contiguous()
        OPS.mix_few(x, dropped(x, seed, dropout), *layer, _prepared(gates), *rank_tables(ranks, scaling), s, y)
        return y, s
    s = product_nt(dropped(x, seed, dropout), lora_a)
    y = product_nt(x, weight, bias)
    if gates is None and len(set(scaling)) == 1:
        y.addmm_(s, lora_b.t(), alpha=scaling[0])
    else:
        y.addmm_(mixed_ranks(s, _prepared(gates), ranks, scaling), lora_b.t())
    return y, s


def lora_gradients(
    dy: Tensor, x_dropped: Tensor, ds: Tensor, mixed: Tensor, ranks, trainable, needs_a: bool, needs_b: bool
) -> tuple[Tensor, Tensor]:
    """dA and dB from the products of the trainable ranks alone; the rest is zero."""
    first, last, keep = _trained_span(tuple(ranks), tuple(trainable))
    total, empty = ds.shape[1], dy.new_empty(0)
    whole = (first, last) == (0, total)
    da, db = empty, empty
    if needs_a:
        part = product_nt(ds[:, first:last].t(), x_dropped.t())
        da = part if whole else ds.new_zeros(total, x_dropped.shape[1])
        if not whole:
            da[first:last] = part
        if keep is not None:
            da[first:last].mul_(keep[:, None])
    if needs_b:
        part = torch.mm(dy.t(), mixed[:, first:last])
        db = part if whole else dy.new_zeros(dy.shape[1], total)
        if not whole:
            db[:, first:last] = part
        if keep is not None:
            db[:, first:last].mul_(keep)
    return da, db


@lora_mix_backward_op.provider("cpp", supports=_supports_backward)
def lora_mix_backward_cpp(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    """One product for u, one pass in rank space for ds, s * G and the gates' gradient, then what is asked for."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gates = needs
    dy, x = dy.contiguous(), x.contiguous()
    empty = x.new_empty(0)
    u = torch.mm(dy, lora_b)
    gates = _prepared(gates)
    ds, mixed = torch.empty_like(u), torch.empty_like(u)
    dgates = torch.empty_like(gates) if needs_gates else empty
    OPS.rank_gate_backward(u, s.contiguous(), gates, *rank_tables(ranks, scaling), ds, mixed, dgates)
    dx = dweight = dbias = empty
    if needs_x:
        dx = product_nt(dy, weight.t())
        if dropout == 0.0:
            dx.addmm_(ds, lora_a)
        else:
            OPS.dropout(torch.mm(ds, lora_a), seed, threshold(dropout), 1.0 / (1.0 - dropout), True, dx)
    if needs_weight:
        dweight = product_nt(dy.t(), x.t())
    if needs_bias:
        dbias = dy.sum(0)
    x_dropped = dropped(x, seed, dropout) if needs_a else x
    da, db = lora_gradients(dy, x_dropped, ds, mixed, ranks, trainable, needs_a, needs_b)
    return dx, dweight, dbias, da, db, dgates
