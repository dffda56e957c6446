"""`lora_mix` on the CPU: products through oneDNN and torch, rank space in C++."""

# T tokens, K in, N out, E experts, R sum of ranks, G rows of gates

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import Library

from ...dropout import threshold
from ...layouts import by_columns
from ...products import add_product_nt, has_few_rows, product_nt
from . import lora_mix_backward_op, lora_mix_op
from .reference import expert_of_rank

__all__ = ["by_rank", "dropped", "float_path", "lora_gradients", "mixed_ranks", "rank_tables"]

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
#: tokens in a run times experts that it leaves alone, from which products of each run pay for the copies they take
LEAST_SAVED = 64


def float_path(*tensors: Tensor | None) -> str | None:
    """Why these tensors do not fit: the C++ kernels compute in float32, so float64 stays with the reference."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES and tensor.is_floating_point():
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


@functools.lru_cache(maxsize=1024)
def _frozen_ranks(ranks: tuple[int, ...], trainable: tuple[bool, ...]) -> Tensor | None:
    """Which ranks do not train, None where all do."""
    return None if all(trainable) else torch.tensor([not trainable[expert] for expert in expert_of_rank(ranks)])


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


@dataclass(frozen=True)
class _Runs:
    """Runs of tokens with one expert each, where products with that expert's ranks alone cost less than with all.

    owner   the expert of each run `[G]`, any where the id is -1
    scale   its factor `[G, 1, 1]`, 0 where the id is -1
    """

    owner: Tensor
    scale: Tensor
    rank: int

    def split(self, rows: Tensor) -> Tensor:
        """`[T, D]` as `[G, T / G, D]`."""
        return rows.view(self.owner.shape[0], -1, rows.shape[1])

    def own(self, by_rank: Tensor) -> Tensor:
        """The runs' own ranks of `[T, R]`, times the factor: `[G, T / G, r]`."""
        rows = self.split(by_rank).unflatten(2, (-1, self.rank))
        where = self.owner.view(-1, 1, 1, 1).expand(*rows.shape[:2], 1, self.rank)
        return rows.gather(2, where).squeeze(2) * self.scale

    def a(self, lora_a: Tensor) -> Tensor:
        """A's rows of each run `[G, r, K]`."""
        return lora_a.unflatten(0, (-1, self.rank)).index_select(0, self.owner)

    def b(self, lora_b: Tensor) -> Tensor:
        """B's columns of each run `[G, N, r]`."""
        if by_columns(lora_b):
            return self.a(lora_b.t()).transpose(1, 2)
        return lora_b.unflatten(1, (-1, self.rank)).index_select(1, self.owner).transpose(0, 1)

    def collected(self, parts: Tensor, experts: int) -> Tensor:
        """`[G, r, D]` added up by expert: `[R, D]`."""
        return parts.new_zeros(experts, *parts.shape[1:]).index_add_(0, self.owner, parts).flatten(0, 1)


def _runs(gates: Tensor | None, x: Tensor, ranks: Sequence[int], scaling: Sequence[float]) -> _Runs | None:
    """What the products of runs need, or None where those of all ranks are the better ones."""
    if gates is None or gates.is_floating_point() or x.dtype != torch.float32 or gates.shape[0] == 0:
        return None
    if len(set(ranks)) != 1 or ranks[0] == 0 or x.shape[0] * (len(ranks) - 1) < LEAST_SAVED * gates.shape[0]:
        return None
    owner = gates.clamp(min=0)
    scale = rank_tables(ranks, scaling)[1].index_select(0, owner) * (gates >= 0)
    return _Runs(owner, scale.view(-1, 1, 1), ranks[0])


@lora_mix_op.provider("cpp", supports=_supports)
def lora_mix_cpp(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    """The mix is added into y by the product itself: no pass over [T, N] besides the two products."""
    if has_few_rows(x):
        few = gates if gates is None or gates.is_floating_point() else gates.to(torch.int64)
        drop_x = x if dropout == 0.0 else dropped(x.contiguous(), seed, dropout)
        s, y = x.new_empty(x.shape[0], lora_a.shape[0]), x.new_empty(x.shape[0], weight.shape[0])
        OPS.mix_few(x, drop_x, weight, bias, lora_a, lora_b, few, *rank_tables(ranks, scaling), s, y)
        return y, s
    x, gates = x.contiguous(), _prepared(gates)
    s = product_nt(dropped(x, seed, dropout), lora_a)
    y = product_nt(x, weight, bias)
    if (runs := _runs(gates, x, ranks, scaling)) is not None:
        runs.split(y).baddbmm_(runs.own(s), runs.b(lora_b).transpose(1, 2))
    elif gates is None and len(set(scaling)) == 1:
        y.addmm_(s, lora_b.t(), alpha=scaling[0])
    else:
        add_product_nt(y, mixed_ranks(s, gates, ranks, scaling), lora_b)
    return y, s


def by_rank(ranked: Tensor, wide: Tensor, ranks, trainable) -> Tensor:
    """ranked^T wide `[R, D]` of `[T, R]` and `[T, D]`, for the trainable ranks alone; the rest is zero."""
    first, last, keep = _trained_span(tuple(ranks), tuple(trainable))
    product = product_nt(ranked[:, first:last].t(), wide.t())
    if (first, last) != (0, ranked.shape[1]):
        part, product = product, ranked.new_zeros(ranked.shape[1], wide.shape[1])
        product[first:last] = part
    if keep is not None:
        product[first:last].mul_(keep[:, None])
    return product


def lora_gradients(
    dy: Tensor, x_dropped: Tensor, ds: Tensor, mixed: Tensor, lora_b: Tensor, ranks, trainable, needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA and dB from the products of the trainable ranks alone; the rest is zero. dB lies as B does."""
    first, last, keep = _trained_span(tuple(ranks), tuple(trainable))
    total, empty = ds.shape[1], dy.new_empty(0)
    whole = (first, last) == (0, total)
    da, db = empty, empty
    if needs_a:
        da = by_rank(ds, x_dropped, ranks, trainable)
    if needs_b and by_columns(lora_b):
        db = by_rank(mixed, dy, ranks, trainable).t()
    elif needs_b:
        part = torch.mm(dy.t(), mixed[:, first:last])
        db = part if whole else dy.new_zeros(dy.shape[1], total)
        if not whole:
            db[:, first:last] = part
        if keep is not None:
            db[:, first:last].mul_(keep)
    return da, db


def _base_gradients(dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dy W and the gradients of the base layer's weight and bias; empty where not asked for."""
    empty = dy.new_empty(0)
    return (
        product_nt(dy, weight.t()) if needs[0] else empty,
        product_nt(dy.t(), x.t()) if needs[1] else empty,
        dy.sum(0) if needs[2] else empty,
    )


def _backward_of_runs(
    runs: _Runs, dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, seed: Tensor | None, s: Tensor,
    ranks, trainable, dropout: float, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All gradients, in rank space each run with the ranks of its own expert alone."""
    dx, dweight, dbias = _base_gradients(dy, x, weight, needs)
    da = db = dgates = dy.new_empty(0)
    frozen, dy_runs = _frozen_ranks(tuple(ranks), tuple(trainable)), runs.split(dy)
    if needs[0] or needs[3]:
        ds = torch.bmm(dy_runs, runs.b(lora_b)).mul_(runs.scale)
    if needs[0] and dropout == 0.0:
        runs.split(dx).baddbmm_(ds, runs.a(lora_a))
    elif needs[0]:
        through = torch.bmm(ds, runs.a(lora_a)).flatten(0, 1)
        OPS.dropout(through, seed, threshold(dropout), 1.0 / (1.0 - dropout), True, dx)
    if needs[3]:
        da = runs.collected(torch.bmm(ds.transpose(1, 2), runs.split(dropped(x, seed, dropout))), len(ranks))
        da = da if frozen is None else da.masked_fill_(frozen[:, None], 0.0)
    if needs[4]:
        db = runs.collected(torch.bmm(runs.own(s).transpose(1, 2), dy_runs), len(ranks)).t()
        db = db if by_columns(lora_b) else db.contiguous()
        db = db if frozen is None else db.masked_fill_(frozen, 0.0)
    return dx, dweight, dbias, da, db, dgates


@lora_mix_backward_op.provider("cpp", supports=_supports_backward)
def lora_mix_backward_cpp(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    """One product for u, one pass in rank space for ds, s * G and the gates' gradient, then what is asked for."""
    needs_x, _, _, needs_a, needs_b, needs_gates = needs
    dy, x, s, gates = dy.contiguous(), x.contiguous(), s.contiguous(), _prepared(gates)
    if (runs := _runs(gates, x, ranks, scaling)) is not None:
        return _backward_of_runs(
            runs, dy, x, weight, lora_a, lora_b, seed, s, ranks, trainable, dropout, needs
        )  # fmt: skip
    u = product_nt(dy, lora_b.t())
    ds, mixed = torch.empty_like(u), torch.empty_like(u)
    dgates = torch.empty_like(gates) if needs_gates else x.new_empty(0)
    OPS.rank_gate_backward(u, s, gates, *rank_tables(ranks, scaling), ds, mixed, dgates)
    dx, dweight, dbias = _base_gradients(dy, x, weight, needs)
    if needs_x and dropout == 0.0:
        add_product_nt(dx, ds, lora_a.t())
    elif needs_x:
        OPS.dropout(product_nt(ds, lora_a.t()), seed, threshold(dropout), 1.0 / (1.0 - dropout), True, dx)
    x_dropped = dropped(x, seed, dropout) if needs_a else x
    da, db = lora_gradients(dy, x_dropped, ds, mixed, lora_b, ranks, trainable, needs_a, needs_b)
    return dx, dweight, dbias, da, db, dgates
