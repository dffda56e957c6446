"""`route` with top-k, load-balance and z loss, forward and backward, beside plain torch."""

from __future__ import annotations

import torch

from mllmcl_kernels import route
from mllmcl_kernels.op import REGISTRY

from . import packages, peers
from .cases import RouteCase
from .measuring import RESULTS, Case, misses, other_backends, providers_used, race
from .mixing import values_and_gradients

NAMES = ("weighted sum and losses", "dx", "dweight")


def test_route(benchmark, route_case: RouteCase, device, dtype, rounds):
    case = route_case
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    given = {
        "x": normal(case.tokens, case.width).requires_grad_(),
        "weight": normal(case.experts, case.width, scale=case.width**-0.5).requires_grad_(),
    }
    pull = torch.randn(case.tokens, case.experts, generator=generator, device=device)
    one = torch.ones((), device=device)
    # x is read forward and once backward for the weight, its gradient is written
    work = 3 * given["x"].numel() * given["x"].element_size()
    record = Case("route", f"{case}, {str(dtype).removeprefix('torch.')}", bytes=work)
    RESULTS.append(record)

    def ours(x, weight, backend=None):
        routing = route(x, weight, top_k=case.top_k, renormalize=True, backend=backend)
        return (routing.gates * pull).sum() + routing.balance_loss() + routing.z_loss()

    def eager(x, weight):
        gates, losses = peers.eager_router(x, weight, case.top_k)
        return (gates * pull.to(gates.dtype)).sum() + losses

    usual, truth = (values_and_gradients(eager, given, one, wide=wide) for wide in (False, True))
    with providers_used() as record.providers:
        default = values_and_gradients(ours, given, one, wide=False)
    refused = {"ours": misses(default, usual, truth, NAMES)}
    field = {"ours": lambda: ours(**given)}
    for backend in other_backends(REGISTRY["route"], record.providers["route"]):
        name = f"ours ({backend})"
        found = values_and_gradients(lambda x, weight, b=backend: ours(x, weight, b), given, one, wide=False)
        refused[name] = misses(found, usual, truth, NAMES)
        field[name] = lambda backend=backend: ours(**given, backend=backend)
    field["plain torch"] = lambda: eager(**given)

    def moe_ops(x, weight):
        gates, losses = packages.moe_ops_router(x, weight, case.top_k)
        return (gates * pull).sum() + losses

    add = (field, record.refused)
    packages.add_optional(*add, "moe-ops", "moe_ops", device, lambda: lambda: moe_ops(**given), lambda: eager(**given))
    record.refused |= {name: reason for name, reason in refused.items() if reason}

    def step(run):
        def once():
            given["x"].grad = given["weight"].grad = None
            run().backward()

        return once

    steps = {name: step(run) for name, run in field.items() if name not in record.refused}
    race(record, steps, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    assert "ours" not in record.refused, record.refused["ours"]
    benchmark.pedantic(steps["ours"], rounds=3)
