"""What the cases of penalties over all layers share: adapters, the check before the clock, the race."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cases import LayerCase
from .measuring import RESULTS, Case, misses, race

__all__ = ["by_shape", "factors", "race_penalty"]


def factors(case: LayerCase, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """A `[r, K]` and B `[N, r]` of every linear."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    lists = zip(*((normal(case.rank, width), normal(out, case.rank)) for width, out in case.linears), strict=True)
    return tuple(map(list, lists))


def by_shape(tensors: list[Tensor]) -> list[list[int]]:
    """Places of tensors of one shape."""
    alike: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault(tuple(tensor.shape), []).append(place)
    return list(alike.values())


def _outcome(run: Callable, leaves: list[Tensor], wide: bool) -> list[Tensor]:
    """The loss and its gradients, in float64 where `wide`."""
    own = [(leaf.detach().double() if wide else leaf.detach().clone()).requires_grad_() for leaf in leaves]
    loss = run(own)
    return [loss.detach(), *torch.autograd.grad(loss, own)]


def race_penalty(benchmark, record: Case, ours: Callable, peers: dict, leaves: list[Tensor], device, rounds) -> None:
    """Check `ours(leaves)` against the first peer in float64, then race forward and backward against all peers."""
    RESULTS.append(record)
    plain = next(iter(peers.values()))
    outcomes = [_outcome(ours, leaves, False), _outcome(plain, leaves, False), _outcome(plain, leaves, True)]
    reason = misses(*outcomes, ["loss", *(f"gradient {place}" for place in range(len(leaves)))])
    if reason:
        record.refused["ours"] = reason
    assert reason is None, reason
    for leaf in leaves:
        leaf.requires_grad_()

    def step(run: Callable) -> Callable[[], None]:
        def once() -> None:
            for leaf in leaves:
                leaf.grad = None
            run(leaves).backward()

        return once

    field = {name: step(run) for name, run in {"ours": ours, **peers}.items()}
    race(record, field, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(field["ours"], rounds=3)
