"""`product_nt` and `add_product_nt`: the same numbers whichever library multiplies."""

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


@pytest.mark.skipif(not products._has_own(), reason="the C++ library was not built")
@pytest.mark.parametrize("depth", [16, 37, 5, 0])
@pytest.mark.parametrize("columns", [1, 7, 50])
def test_few_rows_follow_the_error_rule_and_do_not_see_each_other(depth, columns):
    """Whatever fills no register; fewer rows and other numbers of threads give the same bits."""
    generator = torch.Generator().manual_seed(depth)
    x, weight = torch.randn(19, depth, generator=generator), torch.randn(columns, depth, generator=generator)
    bias = torch.randn(columns, generator=generator)

    def product(rows, bias):
        # one row more than asked for stays as it was
        out = torch.full((rows.shape[0] + 1, columns), 7.0)
        torch.ops.mllmcl_cpu.few_rows(rows, weight, bias, out[:-1])
        assert (out[-1] == 7.0).all()
        return out[:-1]

    whole = product(x, bias)
    for rows in range(x.shape[0] + 1):
        assert torch.equal(product(x[:rows], bias), whole[:rows])
    assert torch.equal(product(x, None), product(x, torch.zeros(columns)))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(product(x, bias), whole)
    finally:
        torch.set_num_threads(threads)
    truth = x.double() @ weight.double().t() + bias.double()
    off = excess(whole, torch.nn.functional.linear(x, weight, bias), truth)
    assert off.passes, off


@pytest.mark.skipif(not products._has_own(), reason="the C++ library was not built")
def test_few_rows_of_a_large_matrix_go_to_our_own_product(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1024, generator=generator), torch.randn(1024, 1024, generator=generator)
    mine = torch.empty(2, 1024)
    torch.ops.mllmcl_cpu.few_rows(a, b, None, mine)
    assert torch.equal(products.product_nt(a, b), mine)
    monkeypatch.setattr(products, "MOST_FEW", 1)
    monkeypatch.setattr(products, "HAS_ONEDNN", False)
    assert torch.equal(products.product_nt(a, b), torch.mm(a, b.t()))


def test_onednn_is_left_alone_where_it_is_switched_off(monkeypatch):
    called = []

    class Spy:
        @staticmethod
        def _linear_pointwise(*args):
            called.append(args)
            return torch.mm(args[0], args[1].t())

    monkeypatch.setattr(products, "HAS_ONEDNN", True)
    monkeypatch.setattr(products, "IS_MKL_AT_HOME", False)
    monkeypatch.setattr(torch.ops, "mkldnn", Spy)
    a, b = torch.randn(64, 128), torch.randn(128, 128)
    products.product_nt(a, b)
    assert len(called) == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        products.product_nt(a, b)
    products.product_nt(a.bfloat16(), b.bfloat16())
    assert len(called) == torch.backends.mkldnn.is_available()


def test_which_library_multiplies_follows_from_processor_and_layout(monkeypatch):
    small, large = torch.zeros(64, 64), torch.zeros(1024, 1024)
    monkeypatch.setattr(products, "IS_MKL_AT_HOME", True)
    assert products._pays_onednn(64, large)
    assert not products._pays_onednn(64, large.t()) and not products._pays_onednn(512, small)
    monkeypatch.setattr(products, "IS_MKL_AT_HOME", False)
    assert products._pays_onednn(64, large.t()) and products._pays_onednn(512, small)
    assert not products._pays_onednn(2, large.t()) and not products._pays_onednn(1, small)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(("rows", "depth"), [(0, 8), (3, 20), (130, 96), (130, 200)])
def test_a_product_is_added_by_whichever_library(rows, depth, runs, transposed, monkeypatch):
    """On both sides of the depth at which the way changes; in half precision torch's product alone."""
    monkeypatch.setattr(
        products, "_runs_onednn", lambda a, b: runs and products.HAS_ONEDNN and a.dtype == torch.float32
    )
    generator = torch.Generator().manual_seed(rows + depth)
    out, a, b = (torch.randn(*shape, generator=generator) for shape in ((rows, 64), (rows, depth), (64, depth)))
    b = b.t().contiguous().t() if transposed else b
    truth, ours = out.double() + a.double() @ b.double().t(), out.clone()
    products.add_product_nt(ours, a, b)
    off = excess(ours, torch.addmm(out, a, b.t()), truth)
    assert off.passes, off
    half = out.bfloat16()
    products.add_product_nt(half, a.bfloat16(), b.bfloat16())
    assert torch.equal(half, torch.addmm(out.bfloat16(), a.bfloat16(), b.bfloat16().t()))
