"""Ops that keep new experts away from old ones, against their formulas written out layer by layer."""

from __future__ import annotations

import torch

from mllmcl_kernels import SampledEntries, orthogonality_loss, project_grads_, sampled_product_l1
from mllmcl_kernels.ops.project_grads.samples import basis_of

WIDTHS = ((12, 9), (12, 9), (20, 7))


def layers(rank: int = 3, dtype: torch.dtype = torch.float64):
    """A `[r, d_in]` and B `[d_out, r]` of three layers, two of one shape."""
    generator = torch.Generator().manual_seed(5)
    a = [torch.randn(rank, width, generator=generator, dtype=dtype).requires_grad_() for width, _ in WIDTHS]
    b = [torch.randn(out, rank, generator=generator, dtype=dtype).requires_grad_() for _, out in WIDTHS]
    return a, b


def gradients(loss: torch.Tensor, tensors) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def test_orthogonality_is_the_sum_over_layers():
    a, _ = layers()
    old = [torch.randn(5, width, dtype=torch.float64, requires_grad=True) for width, _ in WIDTHS]
    loss = orthogonality_loss(a, old)
    plain = sum((new @ other.detach().t()).abs().sum() for new, other in zip(a, old, strict=True))
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(gradients(loss, a), gradients(plain, a), strict=True):
        torch.testing.assert_close(ours, theirs)
    # the old side is a constant
    assert not orthogonality_loss([tensor.detach() for tensor in a], old).requires_grad
    torch.testing.assert_close(orthogonality_loss(a[0], old[0]), (a[0] @ old[0].t()).abs().sum().detach())


def test_autograd_sees_no_tensor_of_a_list_without_gradient():
    """It would look at each of them, in the forward and in the backward."""
    a, _ = layers(dtype=torch.float32)
    loss = orthogonality_loss(a, [torch.randn(5, width) for width, _ in WIDTHS])
    seen = [getattr(node, "variable", None) for node, _ in loss.grad_fn.next_functions]
    assert list(map(id, seen)) == list(map(id, a))


def test_orthogonal_directions_cost_nothing():
    basis = basis_of(torch.Generator().manual_seed(0), 10, 6).t()
    assert orthogonality_loss(basis[:2], basis[2:]) < 1e-12
    assert orthogonality_loss(basis[:2], basis[:0]) == 0


def test_sampled_entries_are_those_of_the_product():
    a, b = layers()
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(0, out, (count,), generator=generator) for (_, out), count in zip(WIDTHS, (30, 0, 4), strict=True)
    ]
    cols = [
        torch.randint(0, width, (len(row),), generator=generator) for (width, _), row in zip(WIDTHS, rows, strict=True)
    ]
    loss = sampled_product_l1(a, b, rows, cols)
    plain = torch.zeros((), dtype=torch.float64)
    for one_a, one_b, row, col in zip(a, b, rows, cols, strict=True):
        if len(row):
            plain = plain + (one_b @ one_a)[row, col].abs().mean() / 3
    # weights are float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-7)
    for tensors in (a, b):
        theirs = torch.autograd.grad(plain, tensors, allow_unused=True, retain_graph=True)
        ours = torch.autograd.grad(loss, tensors, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-6, atol=1e-7)


def test_entries_made_once_are_those_given_at_every_call():
    (a, b), (other_a, other_b) = layers(), layers(4)
    a[1], b[1] = other_a[1], other_b[1]
    rows = [torch.tensor([8, 0, 3, 0]), torch.tensor([2]), torch.tensor([6, 5])]
    cols = [torch.tensor([1, 11, 0, 2]), torch.tensor([7]), torch.tensor([19, 19])]
    entries = SampledEntries.of(a, b, rows, cols)
    assert sorted(group.layers for group in entries.groups) == [(0, 2), (1,)]
    losses = sampled_product_l1(a, b, entries), sampled_product_l1(a, b, rows, cols)
    assert torch.equal(*losses)
    plain = sum((y @ x)[i, j].abs().mean() / 3 for x, y, i, j in zip(a, b, rows, cols, strict=True))
    torch.testing.assert_close(losses[0], plain, rtol=1e-6, atol=1e-7)


def test_an_entry_that_is_there_twice_counts_twice():
    a, b = layers()
    once = sampled_product_l1(a[0], b[0], torch.tensor([2]), torch.tensor([3]))
    twice = sampled_product_l1(a[0], b[0], torch.tensor([2, 2]), torch.tensor([3, 3]))
    torch.testing.assert_close(once, twice)
    (d_once,) = torch.autograd.grad(once, a[0])
    (d_twice,) = torch.autograd.grad(twice, a[0])
    torch.testing.assert_close(d_once, d_twice)


def test_a_projected_gradient_changes_no_output_in_the_subspace():
    generator = torch.Generator().manual_seed(2)
    basis = basis_of(generator, 12, 4)
    grad = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    kept, other = grad.clone(), torch.randn(3, 5, dtype=torch.float64)
    before = other.clone()
    project_grads_([grad, other], [basis, None])
    assert (grad @ basis).abs().max() < 1e-12
    torch.testing.assert_close(grad, kept - kept @ basis @ basis.t())
    assert torch.equal(other, before)
    again = grad.clone()
    project_grads_([grad], [basis])
    torch.testing.assert_close(grad, again)
