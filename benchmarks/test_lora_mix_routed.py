"""`lora_mix_routed`: router and mix in one pass over x, beside a router in plain torch and each way to mix."""

from __future__ import annotations

import torch

from mllmcl_kernels import lora_mix, lora_mix_routed, route
from mllmcl_kernels.op import REGISTRY

from . import packages, peers
from .cases import MixCase
from .measuring import RESULTS, Case, misses, other_backends, providers_used, race, tuned
from .mixing import SCALING, layer, step, useful_flops, values_and_gradients

NAMES = ("y", "dx", "da", "db", "drouter")


def add_grouped(field: dict, case: MixCase, given: dict, record: Case, like) -> list[torch.Tensor]:
    """Peers that take each expert's tokens alone, and their adapters in the layout that suits their products."""
    x, weight, bias, a, b, router = (given[key] for key in ("x", "weight", "bias", "a", "b", "router"))
    a_erK = a.detach().view(case.experts, case.rank, -1).requires_grad_()
    b_erN = b.detach().view(-1, case.experts, case.rank).permute(1, 2, 0).contiguous().requires_grad_()
    b_eNr = b_erN.detach().transpose(1, 2).contiguous().requires_grad_()

    def torch_grouped():
        values, indices = peers.chosen(x, router, case.top_k)
        return packages.torch_grouped_mix(x, weight, bias, a_erK.transpose(1, 2), b_erN, values, indices, SCALING)

    def moe_ops():
        values, indices = peers.chosen(x, router, case.top_k)
        return packages.moe_ops_mix(x, weight, bias, a_erK, b_eNr, values, indices, SCALING)

    packages.add_optional(field, record.refused, "torch grouped_mm", "torch", x.device, lambda: torch_grouped, like)
    packages.add_optional(field, record.refused, "moe-ops", "moe_ops", x.device, lambda: moe_ops, like)
    return [a_erK, b_erN, b_eNr]


def test_lora_mix_routed(benchmark, routed_case: MixCase, device, dtype, rounds):
    case = routed_case
    tensors = layer(case, device, dtype)
    given = {key: tensors[key] for key in ("x", "weight", "bias", "a", "b", "router")}
    mine = given | {"b": tensors["b_columns"]}
    work = useful_flops(case) + (6 if case.backward else 2) * case.tokens * case.width * case.experts
    record = Case("lora_mix_routed", f"{case}, {str(dtype).removeprefix('torch.')}", flops=work)
    RESULTS.append(record)

    def ours(backend=None, **given):
        return lora_mix_routed(
            *(given[key] for key in ("x", "weight", "bias", "a", "b", "router")),
            scaling=SCALING, top_k=case.top_k, backend=backend,
        )[0]  # fmt: skip

    def by_hand(mix, x, weight, bias, a, b, router):
        return peers.routed_by_hand(mix, x, weight, bias, a, b, router, case.rank, SCALING, case.top_k)

    def in_two(x, weight, bias, a, b, router):
        return lora_mix(x, weight, bias, a, b, route(x, router, top_k=case.top_k).gates, scaling=SCALING)

    def stacked(**given):
        return by_hand(peers.stacked, **given)

    usual, truth = (values_and_gradients(stacked, given, tensors["dy"], wide=wide) for wide in (False, True))

    def refused(backend) -> str | None:
        for layout in (given, mine):
            found = values_and_gradients(lambda **g: ours(backend, **g), layout, tensors["dy"], wide=False)
            if reason := misses(found, usual, truth, NAMES):
                return reason
        return None

    with providers_used() as record.providers:
        record.refused["ours"] = refused(None)
    field = {"ours": lambda: ours(**given), "ours, B by columns": lambda: ours(**mine)}
    for backend in other_backends(REGISTRY["lora_mix_routed"], record.providers["lora_mix_routed"]):
        name = f"ours ({backend})"
        record.refused[name] = refused(backend)
        field[name] = lambda backend=backend: ours(backend, **given)
    record.refused = {name: reason for name, reason in record.refused.items() if reason}
    field |= {
        "route, then lora_mix": lambda: in_two(**given),
        "loop over experts": lambda: by_hand(peers.loop_over_experts, **given),
        "stacked": lambda: stacked(**given),
        "stacked, B by columns": lambda: stacked(**mine),
        "base linear": lambda: peers.base(*(given[key] for key in ("x", "weight", "bias"))),
    }
    leaves = [given[key] for key in ("x", "a", "b", "router")] + [mine["b"]]
    if case.top_k:
        leaves += add_grouped(field, case, given, record, lambda: stacked(**given))
    dy = tensors["dy"] if case.backward else None
    steps = {name: step(run, leaves, dy) for name, run in field.items() if name not in record.refused}
    if "ours" in steps:
        tuned(record, steps["ours"], device)
    race(record, steps, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    assert "ours" not in record.refused, record.refused["ours"]
    benchmark.pedantic(steps["ours"], rounds=3)
