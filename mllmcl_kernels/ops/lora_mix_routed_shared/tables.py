"""Tables of several routers side by side, for the providers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..lora_mix_shared.reference import cut

__all__ = ["routed_in_turn"]


def routed_in_turn(
    route: Callable, x: Tensor, router_weight: Sequence[Tensor], router_bias: Sequence[Tensor], noise: Tensor | None,
    *options,
) -> list[Tensor]:  # fmt: skip
    """gates, indices, values, logits, probs, planes side by side, each router with a pass over x of its own."""
    count = len(router_weight)
    each = zip(router_weight, router_bias or [None] * count, cut(noise, count), strict=True)
    tables = zip(*(route(x, *router, *options) for router in each), strict=True)
    return [torch.cat(table, 1) for table in tables]
