"""`ema_update_` beside torch._foreach and a loop over tensors: a constant rate, norms, a weight for each entry."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mllmcl_kernels import ema_update_

from .cases import ListCase
from .lists import draw, masks_of, race_lists

DECAY, BASE, FACTOR = 0.99, 0.01, 2.0


def foreach_lerp(averages: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_lerp_(averages, params, 1 - DECAY)


def loop_lerp(averages: list[Tensor], params: list[Tensor]) -> None:
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param, 1 - DECAY)


def foreach_dema(averages: list[Tensor], params: list[Tensor], grads: list[Tensor], before: list[Tensor]) -> None:
    """Norms and weights of all tensors, none of them read by the host."""
    moved = torch._foreach_sub(params, averages)
    norms = [torch._foreach_norm(tensors, 1) for tensors in (grads, moved, torch._foreach_sub(grads, before))]
    size, length, turned = (torch.stack(values) for values in norms)
    beta = FACTOR * (1 + size) / (length * turned)
    torch._foreach_mul_(moved, list(torch.where((beta > 0) & (beta < 1), beta, BASE).unbind()))
    torch._foreach_add_(averages, moved)


def loop_dema(averages: list[Tensor], params: list[Tensor], grads: list[Tensor], before: list[Tensor]) -> None:
    """One tensor after the other with a branch on the host, as it is commonly written."""
    for average, param, grad, old in zip(averages, params, grads, before, strict=True):
        length = torch.norm(param - average, 1) * torch.norm(grad - old, 1)
        beta = float(FACTOR * (1 + torch.norm(grad, 1)) / length)
        beta = beta if 0 < beta < 1 else BASE
        average.mul_(1 - beta).add_(param, alpha=beta)


def foreach_pema(averages: list[Tensor], params: list[Tensor], squares: list[Tensor]) -> None:
    moved = torch._foreach_sub(params, averages)
    weights = torch._foreach_mul(torch._foreach_abs(moved), squares)
    means = torch._foreach_mul(torch._foreach_norm(moved, 1), torch._foreach_norm(squares, 1))
    torch._foreach_mul_(means, BASE)
    torch._foreach_div_(means, [float(tensor.numel()) ** 2 for tensor in moved])
    torch._foreach_reciprocal_(weights)
    torch._foreach_mul_(weights, means)
    torch._foreach_clamp_max_(weights, 1.0)
    torch._foreach_clamp_min_(weights, BASE / 10)
    torch._foreach_mul_(moved, weights)
    torch._foreach_add_(averages, moved)


def loop_pema(averages: list[Tensor], params: list[Tensor], squares: list[Tensor]) -> None:
    for average, param, square in zip(averages, params, squares, strict=True):
        moved = param - average
        weight = BASE * moved.abs().mean() * square.mean() / (moved.abs() * square)
        average.add_(weight.clamp(BASE / 10, 1.0) * moved)


def by_expert(run, case: ListCase):
    """`run` on every expert's slices, as views: what weights of their own take without an op for it."""

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        parts = (tensor.split(case.rank, dim) for tensor, dim in zip(tensors, case.dims, strict=True))
        return [part for split in parts for part in split]

    return lambda *lists: run(*map(cut, lists))


def test_ema_update(benchmark, ema_case: ListCase, device, rounds):
    case = ema_case
    generator = torch.Generator(device).manual_seed(0)
    lists = {"averages": draw(case, generator), "params": draw(case, generator)}
    if case.work == "constant rate":
        options = {"decay": DECAY}
        peers = {"torch foreach": foreach_lerp, "loop": loop_lerp}
    elif case.work == "pema by entry":
        lists["squared_grads"] = [tensor.square() for tensor in draw(case, generator)]
        options = {"mode": "pema", "base_weight": BASE}
        peers = {"torch foreach": foreach_pema, "loop": loop_pema}
    else:
        lists |= {"grads": draw(case, generator, 1e-3), "previous_grads": draw(case, generator, 1e-3)}
        options = {"mode": "dema", "base_weight": BASE, "factor": FACTOR}
        peers = {"torch foreach": foreach_dema, "loop": loop_dema}
        if case.work == "dema by expert":
            options |= {"granularity": "expert", "ranks": (case.rank,) * case.experts, "dim": list(case.dims)}
            peers = {name: by_expert(run, case) for name, run in peers.items()}
    call = functools.wraps(ema_update_)(functools.partial(ema_update_, **options))
    race_lists(benchmark, case, call, lists, ("averages",), peers, masks_of(case, generator), device, rounds)
