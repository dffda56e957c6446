"""`product_nt`: the same numbers whichever library multiplies."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import products
from mllmcl_kernels.testing import excess


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(0, 8, 3), (1, 1024, 1024), (7, 1024, 128), (8, 1024, 128), (130, 96, 64), (3, 5, 2)]
)
def test_products_follow_the_error_rule(rows, depth, columns, transposed):
    """On both sides of the sizes at which the library changes; matrices in either order; twice the same bits."""
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    a, bias = draw(rows, depth), draw(columns)
    b = draw(depth, columns).t() if transposed else draw(columns, depth)
    for given in (None, bias):
        truth = a.double() @ b.double().t() + (0.0 if given is None else given.double())
        ours = products.product_nt(a, b, given)
        assert ours.dtype == a.dtype and ours.shape == (rows, columns)
        assert torch.equal(ours, products.product_nt(a, b, given))
        off = excess(ours, torch.nn.functional.linear(a, b, given), truth)
        assert off.passes, off
        wide = products.product_nt(a.double(), b.double(), None if given is None else given.double())
        assert torch.equal(wide, truth if rows else wide) or (wide - truth).abs().max() < 1e-10


def test_onednn_is_left_alone_where_it_is_switched_off(monkeypatch):
    called = []

    class Spy:
        @staticmethod
        def _linear_pointwise(*args):
            called.append(args)
            return torch.mm(args[0], args[1].t())

    monkeypatch.setattr(products, "HAS_ONEDNN", True)
    monkeypatch.setattr(torch.ops, "mkldnn", Spy)
    a, b = torch.randn(64, 128), torch.randn(128, 128)
    products.product_nt(a, b)
    assert len(called) == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        products.product_nt(a, b)
    products.product_nt(a.bfloat16(), b.bfloat16())
    assert len(called) == torch.backends.mkldnn.is_available()
