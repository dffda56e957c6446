"""Algebra of `lora_mix` that holds without looking at the reference, and its behaviour under torch's machinery."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mllmcl_kernels import lora_mix, lora_mix_routed, route
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import excess

BACKENDS = ["reference"] + (["cpp"] if not isinstance(REGISTRY["lora_mix"].find("cpp"), str) else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def layer(seed=0, lead=(4, 5), width=24, out=20, ranks=(3, 4, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total = sum(ranks)
    return normal(*lead, width), normal(out, width), normal(out), normal(total, width), normal(out, total)


def loop_over_experts(x, weight, bias, a, b, gates, ranks, scaling):
    """What the public code of the field does: one expert after the other, each as wide as the output."""
    y, start = F.linear(x, weight, bias), 0
    for expert, rank in enumerate(ranks):
        rows = slice(start, start + rank)
        y = y + F.linear(F.linear(x, a[rows]), b[:, rows]) * scaling[expert] * gates[..., expert, None]
        start += rank
    return y


# what fixed examples miss: no token, ragged rows, mixed and zero ranks, signed gates, own scalings, transposes
ranks_lists = st.lists(st.integers(0, 6), min_size=1, max_size=9)
shapes = st.tuples(st.integers(0, 40), st.integers(1, 19), st.integers(1, 17), ranks_lists)


@given(
    shapes,
    st.integers(0, 10**6),
    st.sampled_from(["token", "constant", "ids"]),
    st.booleans(),
    st.sampled_from(BACKENDS),
)
def test_equals_the_loop_over_experts(shape, seed, kind, transposed, backend):
    tokens, width, out, ranks = shape
    if sum(ranks) == 0:
        ranks = [*ranks, 2]
    x, weight, bias, a, b = layer(seed, (tokens,), width, out, ranks)
    generator = torch.Generator().manual_seed(seed)
    experts = len(ranks)
    scaling = [0.25 + 0.5 * expert for expert in range(experts)]
    if transposed:
        a, x = a.t().contiguous().t(), x.t().contiguous().t()
    if kind == "ids":
        gates = torch.randint(-1, experts, (tokens,), generator=generator)
        dense = F.one_hot(gates + 1, experts + 1)[:, 1:].float()
    else:
        gates = torch.randn(*((experts,) if kind == "constant" else (tokens, experts)), generator=generator) * 1e-2
        dense = gates.expand(tokens, experts)
    ours = lora_mix(x, weight, bias, a, b, gates, ranks=ranks, scaling=scaling, backend=backend)
    wide = [tensor.double() for tensor in (x, weight, bias, a, b)]
    truth = loop_over_experts(*wide, dense.double(), ranks, scaling)
    plain = loop_over_experts(x, weight, bias, a, b, dense, ranks, scaling)
    assert excess(ours, plain, truth).passes


def close(ours, theirs):
    """Equal up to another order of float32 sums, whose error grows with the largest entries."""
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5 * float(theirs.abs().max()))


def gradients(run, *tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    run(*tensors).square().sum().backward()
    return [tensor.grad for tensor in tensors]


def test_one_hot_gates_are_ids_are_a_single_lora(backend):
    """One expert for a sample, said in three ways."""
    x, weight, bias, a, b = layer()
    ranks, ids = (3, 4, 5), torch.tensor([0, 2, 1, -1])
    by_id = lora_mix(x, weight, bias, a, b, ids[:, None], ranks=ranks, scaling=2.0, backend=backend)
    hot = F.one_hot(ids + 1, 4)[:, 1:].float()[:, None]
    by_gate = lora_mix(x, weight, bias, a, b, hot, ranks=ranks, scaling=2.0, backend=backend)
    close(by_id, by_gate)
    alone = lora_mix(x[1], weight, bias, a[7:], b[:, 7:], scaling=2.0, backend=backend)
    close(by_id[1], alone)
    close(by_id[3], F.linear(x[3], weight, bias))


def test_permuting_experts_permutes_their_gradients(backend):
    x, weight, bias, a, b = layer(ranks=(4, 4))
    gates = torch.rand(4, 5, 2)
    swap = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    da, db, dg = gradients(
        lambda a, b, g: lora_mix(x, weight, bias, a, b, g, ranks=(4, 4), backend=backend), a, b, gates
    )
    pa, pb, pg = gradients(
        lambda a, b, g: lora_mix(x, weight, bias, a, b, g, ranks=(4, 4), backend=backend),
        a[swap],
        b[:, swap],
        gates.flip(-1),
    )
    close(pa, da[swap])
    close(pb, db[:, swap])
    close(pg, dg.flip(-1))


def test_a_zero_gate_gives_exactly_zero_gradients(backend):
    x, weight, bias, a, b = layer()
    gates = torch.tensor([0.7, 0.0, -0.3])
    da, db = gradients(lambda a, b: lora_mix(x, weight, bias, a, b, gates, ranks=(3, 4, 5), backend=backend), a, b)
    assert not da[3:7].any() and not db[:, 3:7].any()
    assert da[:3].any() and db[:, 7:].any()


@pytest.mark.parametrize(
    "frozen", [(True, False, True), (False, True, False), (False, False, True), (False, False, False)]
)
def test_a_frozen_expert_adds_to_y_and_dx_and_gets_no_gradient(backend, frozen):
    x, weight, bias, a, b = layer()
    gates, ranks = torch.randn(4, 5, 3), (3, 4, 5)
    trainable = [not flag for flag in frozen]

    def run(trains):
        return lambda x, a, b, g: lora_mix(x, weight, bias, a, b, g, ranks=ranks, trainable=trains, backend=backend)

    all_x, all_a, all_b, all_g = gradients(run(None), x, a, b, gates)
    dx, da, db, dg = gradients(run(trainable), x, a, b, gates)
    close(dx, all_x)
    close(dg, all_g)
    keep = torch.tensor(trainable).repeat_interleave(torch.tensor(ranks))
    if not any(trainable):
        assert da is None and db is None
        return
    close(da, all_a * keep[:, None])
    close(db, all_b * keep)
    assert not da[~keep].any() and not db[:, ~keep].any()


def test_rows_do_not_see_each_other(backend):
    """Another expert or another value in one row leaves every other row bit for bit."""
    x, weight, bias, a, b = layer(lead=(16,))
    ids = torch.randint(0, 3, (16,))
    y = lora_mix(x, weight, bias, a, b, ids, ranks=(3, 4, 5), backend=backend)
    other, changed = ids.clone(), x.clone()
    other[3], changed[3] = (ids[3] + 1) % 3, 100.0
    z = lora_mix(changed, weight, bias, a, b, other, ranks=(3, 4, 5), backend=backend)
    rest = torch.arange(16) != 3
    assert torch.equal(y[rest], z[rest]) and not torch.equal(y[3], z[3])


def test_dropout_is_reproducible_and_has_the_right_mean(backend):
    eye = torch.eye(512)

    def dropped(seed):
        torch.manual_seed(seed)
        return lora_mix(torch.ones(64, 512), torch.zeros(512, 512), None, eye, eye, dropout=0.3, backend=backend)

    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))
    values = dropped(1)
    assert torch.equal(values.unique(), torch.tensor([0.0, 1.0 / 0.7]))
    assert abs(float((values == 0).float().mean()) - 0.3) < 0.01


def test_dropout_masks_agree_between_backends():
    x, weight, bias, a, b = layer()
    results = []
    for name in BACKENDS:
        torch.manual_seed(3)
        results.append(lora_mix(x, weight, bias, a, b, dropout=0.5, backend=name))
    for other in results[1:]:
        close(results[0], other)


def test_activation_checkpointing_sees_the_same_mask(backend):
    x, weight, bias, a, b = layer()

    def run(x):
        return lora_mix(x, weight, bias, a, b, dropout=0.5, backend=backend)

    grads = []
    for wrapped in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads += gradients(wrapped, x)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(backend, dtype):
    x, weight, bias, a, b = layer()
    gates = torch.rand(4, 5, 3)
    with torch.autocast("cpu", dtype=dtype):
        y = lora_mix(x, weight, bias, a, b, gates, ranks=(3, 4, 5), backend=backend)
        da, dg = gradients(lambda a, g: lora_mix(x, weight, bias, a, b, g, ranks=(3, 4, 5), backend=backend), a, gates)
    assert y.dtype == dtype and da.dtype == torch.float32 and dg.dtype == torch.float32
    torch.testing.assert_close(y.float(), lora_mix(x, weight, bias, a, b, gates, ranks=(3, 4, 5)), rtol=0.05, atol=0.3)


def test_adapters_wider_than_x_are_cast_once_and_get_their_own_gradients(backend):
    x, weight, bias, a, b = layer()
    half = [tensor.bfloat16() for tensor in (x, weight, bias)]
    (da,) = gradients(lambda a: lora_mix(*half, a, b, ranks=(3, 4, 5), backend=backend), a)
    assert da.dtype == torch.float32


def test_compiles_whole_and_never_again_for_other_routing():
    """fullgraph, one compilation for 20 routings."""
    x, weight, bias, a, b = layer()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x, a, ids, gates):
        y = lora_mix(x, weight, bias, a, b, ids, ranks=(3, 4, 5))
        return lora_mix(y, weight.t(), None, b.t(), a.t(), gates, ranks=(3, 4, 5)).sum()

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-1, 3, (4, 1), generator=generator)
        gates = torch.rand(4, 5, 3, generator=generator)
        tensors = x.clone().requires_grad_(), a.clone().requires_grad_()
        value = step(*tensors, ids, gates)
        value.backward()
        y = lora_mix(x, weight, bias, a, b, ids, ranks=(3, 4, 5))
        expected = lora_mix(y, weight.t(), None, b.t(), a.t(), gates, ranks=(3, 4, 5)).sum()
        close(value, expected)
        assert tensors[1].grad.any()
    assert counter.frame_count == 1


def test_routed_equals_route_then_mix(backend):
    x, weight, bias, a, b = layer(ranks=(4, 4, 4))
    router = torch.randn(3, 24)
    options = {"top_k": 2, "renormalize": True, "backend": backend}

    def apart(x, a, b, router):
        routing = route(x, router, **options)
        return lora_mix(x, weight, bias, a, b, routing.gates, backend=backend) + routing.balance_loss()

    def together(x, a, b, router):
        y, routing = lora_mix_routed(x, weight, bias, a, b, router, **options)
        return y + routing.balance_loss()

    close(together(x, a, b, router), apart(x, a, b, router))
    for ours, theirs in zip(gradients(together, x, a, b, router), gradients(apart, x, a, b, router), strict=True):
        close(ours, theirs)


def test_a_double_backward_is_refused():
    x, weight, bias, a, b = layer()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(lora_mix(x, weight, bias, a, b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(dx.sum(), x)
