"""`route` where its CPU code takes different ways: few and many experts, widths with a tail, ties, no token mask."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import route
from mllmcl_kernels.testing import excess

# T tokens, D width, E experts


def gradients(x, weight, dtype, backend, **options):
    """Logits, gates and the gradients of x and weight under fixed directions."""
    x, weight = (tensor.to(dtype).requires_grad_() for tensor in (x, weight))
    routing = route(x, weight, backend=backend, **options)
    generator = torch.Generator().manual_seed(3)
    pulls = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in (routing.gates, routing.logits)
    ]
    total = (routing.gates * pulls[0]).sum() + (routing.logits * pulls[1]).sum()
    return [routing.logits, routing.gates, *torch.autograd.grad(total, (x, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 40])
def test_products_of_every_count_of_experts(experts, dtype):
    """Also widths that are no multiple of a register, one token, and more tokens than one partial sum has."""
    generator = torch.Generator().manual_seed(experts)
    for tokens, width in ((1, 3), (2, 16), (33, 17), (700, 40)):
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        weight = (torch.randn(experts, width, generator=generator) / width**0.5).to(dtype)
        truth = gradients(x, weight, torch.float64, "reference")
        plain = gradients(x, weight, dtype, "reference")
        ours = gradients(x, weight, dtype, None)
        for place, (mine, usual, true) in enumerate(zip(ours, plain, truth, strict=True)):
            assert mine.dtype == usual.dtype and mine.shape == usual.shape
            off = excess(mine, usual, true)
            assert off.passes, f"{tokens} x {width}, value {place}: {off}"


@pytest.mark.parametrize("experts", [4, 16, 17, 24, 33, 64])
@pytest.mark.parametrize("top_k", [1, 3, None])
def test_ties_go_to_the_lowest_index_for_any_count_of_experts(experts, top_k):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randint(-2, 3, (200, experts), generator=generator).float()
    ours, plain = (route(logits, torch.eye(experts), top_k=top_k, backend=name) for name in (None, "reference"))
    assert torch.equal(ours.indices, plain.indices)
    torch.testing.assert_close(ours.gates, plain.gates, equal_nan=True)


def test_no_token_mask_is_a_mask_that_leaves_nothing_out():
    x, weight = torch.randn(2, 9, 8), torch.randn(5, 8)
    bare, masked = route(x, weight, top_k=2), route(x, weight, top_k=2, token_mask=torch.ones(2, 9, dtype=torch.bool))
    assert torch.equal(bare.load, masked.load)
    for name in ("importance", "balance_loss", "z_loss", "entropy"):
        one, other = getattr(bare, name), getattr(masked, name)
        torch.testing.assert_close(one() if callable(one) else one, other() if callable(other) else other)
    empty = route(x[:, :0], weight, top_k=2)
    assert empty.z_loss() == 0 and empty.balance_loss() == 0 and empty.load.sum() == 0
