"""`lora_mix_shared` and `lora_mix_routed_shared`: q, k, v or gate, up in one pass over their input, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mllmcl_kernels import lora_mix, lora_mix_routed, lora_mix_routed_shared, lora_mix_shared
from mllmcl_kernels.op import REGISTRY

from . import peers
from .cases import MixCase, SharedCase
from .measuring import RESULTS, Case, misses, other_backends, providers_used, race, tuned
from .mixing import SCALING, layer, useful_flops

KINDS = ("weight", "bias", "a", "b", "router")


def linears(case: SharedCase, device: torch.device, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Tensors of every linear by kind, with gates and directions of the backward; x is that of the first."""
    cells = [MixCase(case.tokens, case.width, out, case.experts, case.rank) for out in case.outs]
    each = [layer(cell, device, dtype) for cell in cells]
    return {key: [tensors[key] for tensors in each] for key in (*KINDS, "x", "gates", "dy")}


def flops(case: SharedCase) -> int:
    routers = 6 * case.tokens * case.width * case.experts * len(case.outs) * case.routed
    cells = [MixCase(case.tokens, case.width, out, case.experts, case.rank) for out in case.outs]
    return sum(map(useful_flops, cells)) + routers


def at(kinds: dict, place: int) -> list[Tensor]:
    return [kinds[kind][place] for kind in ("weight", "bias", "a", "b")]


def together(x, kinds, case: SharedCase, backend=None) -> list[Tensor]:
    stacks = [kinds[kind] for kind in ("weight", "bias", "a", "b")]
    if case.routed:
        return lora_mix_routed_shared(x, *stacks, kinds["router"], scaling=SCALING, backend=backend)[0]
    return lora_mix_shared(x, *stacks, kinds["gates"], scaling=SCALING, backend=backend)


def one_by_one(x, kinds, case: SharedCase) -> list[Tensor]:
    if case.routed:
        pairs = zip(range(len(case.outs)), kinds["router"], strict=True)
        return [lora_mix_routed(x, *at(kinds, place), router, scaling=SCALING)[0] for place, router in pairs]
    pairs = zip(range(len(case.outs)), kinds["gates"], strict=True)
    return [lora_mix(x, *at(kinds, place), gates, scaling=SCALING) for place, gates in pairs]


def by_hand(mix: Callable, x, kinds, case: SharedCase) -> list[Tensor]:
    """`mix` in plain torch for one linear after the other."""
    if case.routed:
        mix = partial(peers.routed_by_hand, mix, top_k=None)
    last = kinds["router" if case.routed else "gates"]
    return [mix(x, *at(kinds, place), one, rank=case.rank, scaling=SCALING) for place, one in enumerate(last)]


def one_shrink(x, kinds, case: SharedCase) -> list[Tensor]:
    """Stacked torch with all A, and all routers, as one product."""
    count, total = len(case.outs), case.experts * case.rank
    s = F.linear(x, torch.cat([*kinds["a"], *(kinds["router"] if case.routed else ())]))
    ranks = s[:, : count * total].split(total, 1)
    if case.routed:
        logits = s[:, count * total :].unflatten(1, (count, -1))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        gates = torch.softmax(wide, -1).to(x.dtype).unbind(1)
    else:
        gates = kinds["gates"]
    found = []
    for place, (own, gate) in enumerate(zip(ranks, gates, strict=True)):
        weight, bias, _, b = at(kinds, place)
        mixed = own * (gate.repeat_interleave(case.rank, -1) * SCALING)
        found.append(F.linear(x, weight, bias) + F.linear(mixed, b))
    return found


def leaves_of(x: Tensor, kinds: dict, case: SharedCase) -> list[Tensor]:
    return [x, *(one for kind in ("a", "b", "router" if case.routed else "gates") for one in kinds[kind])]


def outcome(run: Callable, x: Tensor, kinds: dict, case: SharedCase, wide: bool) -> list[Tensor]:
    """Every y and every gradient; `wide`: from float64 copies."""
    if wide:
        x = x.detach().double().requires_grad_()
        kinds = {
            key: [one.detach().double().requires_grad_(one.requires_grad) for one in tensors]
            for key, tensors in kinds.items()
        }
    found = run(x, kinds, case)
    return [*(y.detach() for y in found), *torch.autograd.grad(found, leaves_of(x, kinds, case), kinds["dy"])]


def step(run: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], dy: Sequence[Tensor]) -> Callable[[], None]:
    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(run(), dy)

    return both


def test_shared_input(benchmark, shared_case: SharedCase, device, dtype, rounds):
    case = shared_case
    kinds = linears(case, device, dtype)
    x = kinds["x"][0]
    name = "lora_mix_routed_shared" if case.routed else "lora_mix_shared"
    record = Case(name, f"{case}, {str(dtype).removeprefix('torch.')}", flops=flops(case))
    RESULTS.append(record)
    stacked = partial(by_hand, peers.stacked)
    usual, truth = (outcome(stacked, x, kinds, case, wide) for wide in (False, True))
    names = [f"output {place}" for place in range(len(truth))]
    with providers_used() as record.providers:
        reason = misses(outcome(together, x, kinds, case, False), usual, truth, names)
    assert reason is None, reason
    field = {"ours": partial(together, x, kinds, case), "ours, one by one": partial(one_by_one, x, kinds, case)}
    for backend in other_backends(REGISTRY[name], record.providers[name]):
        run = partial(together, backend=backend)
        if reason := misses(outcome(run, x, kinds, case, False), usual, truth, names):
            record.refused[f"ours ({backend})"] = reason
        else:
            field[f"ours ({backend})"] = partial(run, x, kinds, case)
    field |= {
        "loop over experts": partial(by_hand, peers.loop_over_experts, x, kinds, case),
        "stacked": partial(stacked, x, kinds, case),
        "stacked, one shrink": partial(one_shrink, x, kinds, case),
        "base linears": lambda: [F.linear(x, *pair) for pair in zip(kinds["weight"], kinds["bias"], strict=True)],
    }
    leaves = leaves_of(x, kinds, case)
    steps = {title: step(run, leaves, kinds["dy"]) for title, run in field.items()}
    for title in ("ours", "ours, one by one"):
        tuned(record, steps[title], device, title)
    race(record, steps, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(steps["ours"], rounds=3)
