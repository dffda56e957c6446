"""Tables of several routers side by side, for the providers."""

# T tokens, L linears with a router each, D columns of one router

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..lora_mix_shared.reference import cut

__all__ = ["mask_by_router", "routed_in_turn", "row_by_row"]


def row_by_row(table: Tensor | None, count: int) -> Tensor | None:
    """`[T, L * D]` as a row for each token and router, `[T * L, D]`."""
    return None if table is None else table.reshape(table.shape[0] * count, table.shape[1] // count)


def mask_by_router(expert_mask: Tensor | None, count: int) -> Tensor | None:
    """The expert mask of such rows: one of each token holds for all its routers."""
    if expert_mask is None or expert_mask.shape[0] <= 1:
        return expert_mask
    return expert_mask.repeat_interleave(count, 0)


def routed_in_turn(
    route: Callable, x: Tensor, router_weight: Sequence[Tensor], router_bias: Sequence[Tensor], noise: Tensor | None,
    *options,
) -> list[Tensor]:  # fmt: skip
    """gates, indices, values, logits, probs side by side, each router with a pass over x of its own."""
    count = len(router_weight)
    each = zip(router_weight, router_bias or [None] * count, cut(noise, count), strict=True)
    tables = zip(*(route(x, *router, *options) for router in each), strict=True)
    return [torch.cat(table, 1) for table in tables]
