"""`lora_mix_routed`: router and mix in one pass over x, beside a router in plain torch and each way to mix."""

from __future__ import annotations

from mllmcl_kernels import lora_mix, lora_mix_routed, route
from mllmcl_kernels.op import REGISTRY

from . import peers
from .cases import MixCase
from .measuring import RESULTS, Case, misses, other_backends, providers_used, race
from .mixing import SCALING, layer, step, useful_flops, values_and_gradients

NAMES = ("y", "dx", "da", "db", "drouter")


def test_lora_mix_routed(benchmark, routed_case: MixCase, device, dtype, rounds):
    case = routed_case
    tensors = layer(case, device, dtype)
    given = {key: tensors[key] for key in ("x", "weight", "bias", "a", "b", "router")}
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
        found = values_and_gradients(lambda **g: ours(backend, **g), given, tensors["dy"], wide=False)
        return misses(found, usual, truth, NAMES)

    with providers_used() as record.providers:
        record.refused["ours"] = refused(None)
    field = {"ours": lambda: ours(**given)}
    for backend in other_backends(REGISTRY["lora_mix_routed"], record.providers["lora_mix_routed"]):
        name = f"ours ({backend})"
        record.refused[name] = refused(backend)
        field[name] = lambda backend=backend: ours(backend, **given)
    record.refused = {name: reason for name, reason in record.refused.items() if reason}
    field |= {
        "route, then lora_mix": lambda: in_two(**given),
        "loop over experts": lambda: by_hand(peers.loop_over_experts, **given),
        "stacked": lambda: stacked(**given),
        "base linear": lambda: peers.base(*(given[key] for key in ("x", "weight", "bias"))),
    }
    leaves = [given[key] for key in ("x", "a", "b", "router")]
    steps = {name: step(run, leaves, tensors["dy"]) for name, run in field.items() if name not in record.refused}
    race(record, steps, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    assert "ours" not in record.refused, record.refused["ours"]
    benchmark.pedantic(steps["ours"], rounds=3)
