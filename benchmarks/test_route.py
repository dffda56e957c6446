"""`route` with top-k, load-balance and z loss, forward and backward, beside plain torch."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import route

from . import peers
from .measuring import Case, race


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 1), (64, 8)], ids=str)
def test_route(benchmark, experts, top_k, device, dtype, rounds, tiny):
    tokens, width = (64, 32) if tiny else (4096, 512 if device.type == "cpu" else 4096)
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(experts, width, device=device, dtype=dtype).mul_(width**-0.5).requires_grad_()
    pull = torch.randn(tokens, experts, device=device)

    def ours():
        routing = route(x, weight, top_k=top_k, renormalize=True)
        return (routing.gates * pull).sum() + routing.balance_loss() + routing.z_loss()

    def eager():
        gates, losses = peers.eager_router(x, weight, top_k)
        return (gates * pull).sum() + losses

    torch.testing.assert_close(ours(), eager(), rtol=2e-2, atol=2e-2)

    def step(run):
        def once():
            x.grad = weight.grad = None
            run().backward()

        return once

    record = Case(f"route T={tokens} E={experts} k={top_k}, with both losses", "default")
    race(record, {"ours": step(ours), "eager": step(eager)}, device, rounds)
    benchmark.pedantic(step(ours), rounds=3)
