"""`route` where its CPU code takes different ways: few and many experts, widths with a tail, ties, no token mask."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mllmcl_kernels import Routing, lora_mix_routed_shared, route
from mllmcl_kernels.op import REGISTRY
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


STATISTICS = [name + way for name in ("routing_planes", "routing_statistics") for way in ("", "_backward")]
NAMES = ("load", "importance", "balance_loss", "z_loss", "entropy")


def statistics_of(routing: Routing) -> list[torch.Tensor]:
    found = [getattr(routing, name) for name in NAMES]
    return [value() if callable(value) else value for value in found]


def written_out(routing: Routing) -> list[torch.Tensor]:
    """The formulas over the counted tokens alone, gathered, in float64."""
    lead, experts = routing.gates.shape[:-1], routing.gates.shape[-1]
    counted = torch.ones(lead, dtype=torch.bool) if routing.token_mask is None else routing.token_mask.expand(lead)
    logits, probs, gates = (table[counted].double() for table in (routing.logits, routing.probs, routing.gates))
    load = torch.stack([(routing.indices[counted] == expert).sum() for expert in range(experts)]).double()
    tokens, total = max(len(logits), 1), probs.sum(-1, keepdim=True)
    q = torch.where(total > 0, probs / total, 0.0)
    balance = experts * (load / load.sum().clamp_min(1) * probs.sum(0) / tokens).sum()
    z = logits.exp().sum(-1).log().square().sum() / tokens
    return [load, gates.sum(0), balance, z, -torch.xlogy(q, q).sum() / tokens]


LEADS = {"one": (), "many": (300,), "none": (0,), "batch": (3, 50)}
MASKS = {
    "no mask": lambda lead: None,
    "tokens": lambda lead: torch.rand(lead) < 0.6,
    "positions": lambda lead: torch.rand(lead[-1:]) < 0.6,
    "samples": lambda lead: torch.rand((*lead[:1], *[1] * (len(lead) - 1))) < 0.6,
    "nothing": lambda lead: torch.zeros(lead, dtype=torch.bool),
}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lead", LEADS)
def test_statistics_are_the_formulas(lead: str, mask: str, backend: str | None, monkeypatch):
    """Values, shapes, dtypes, over any leading dims; some tokens may go nowhere, padding holds NaN."""
    monkeypatch.setenv("MLLMCL_BACKEND", backend or "")
    torch.manual_seed(0)
    shape, width = LEADS[lead], 6
    for experts, top_k in ((1, 1), (5, 2), (12, None), (40, 4)):
        x, allowed = torch.randn(*shape, width), torch.rand(*shape, experts) < 0.8
        # one where everything is allowed, and one in seven where nothing is
        allowed.view(-1, experts)[:1] = True
        allowed.view(-1, experts)[3::7] = False
        routing = route(x, torch.randn(experts, width), top_k=top_k, expert_mask=allowed, score="sigmoid")
        counted = MASKS[mask](shape)
        if counted is not None:
            padding = ~counted.expand(shape).unsqueeze(-1)
            tables = {
                name: getattr(routing, name).masked_fill(padding, torch.nan) for name in ("gates", "logits", "probs")
            }
            routing = replace(routing, token_mask=counted, **tables)
        for name, ours, true in zip(NAMES, statistics_of(routing), written_out(routing), strict=True):
            assert ours.dtype == torch.float32 and ours.shape == true.shape, name
            torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=2e-6, msg=name)


def test_gradients_of_padding_without_numbers_are_zero():
    """And those of the rest are those of the rest alone."""
    torch.manual_seed(0)
    logits, counted = torch.randn(2, 9, 5), torch.rand(2, 9) < 0.5
    slots = logits.topk(2, -1).indices.int()

    def gradients_of(logits, slots, mask):
        tables = [table.clone().requires_grad_() for table in (logits, logits.softmax(-1), logits.sigmoid())]
        routing = Routing(tables[2], slots, tables[2], tables[0], tables[1], mask)
        _, importance, *losses = statistics_of(routing)
        return torch.autograd.grad(sum(losses) + importance.square().sum(), tables)

    whole = gradients_of(logits.masked_fill(~counted.unsqueeze(-1), torch.nan), slots, counted)
    rest = gradients_of(logits[counted], slots[counted], None)
    for ours, theirs in zip(whole, rest, strict=True):
        torch.testing.assert_close(ours[counted], theirs)
        assert theirs.abs().max() > 0 and not ours[~counted].any()


ROUTERS = {
    "softmax": {"top_k": 2},
    "sigmoid": {"score": "sigmoid", "top_k": 3, "renormalize": True},
    "cosine, noise": {"score": "cosine", "top_k": 2, "noise": 0.5, "temperature": 0.3},
    "straight through": {"top_k": 1, "straight_through": True},
    "forbidden experts": {
        "top_k": 2,
        "expert_mask": torch.arange(40)[:, None] % 9 > torch.arange(9),
        "renormalize": True,
    },
}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("choice", ROUTERS)
def test_a_router_sums_up_what_its_tables_hold(choice: str, padding: bool, backend: str | None, monkeypatch):
    """Statistics and gradients of a routing with planes, beside those of the same tables without."""
    monkeypatch.setenv("MLLMCL_BACKEND", backend or "")
    torch.manual_seed(0)
    x, weight = torch.randn(40, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    routing = route(x, weight, token_mask=torch.rand(40) < 0.6 if padding else None, **ROUTERS[choice])
    tables = replace(routing)
    assert routing.planes.shape == (3, 30) and tables.planes is None
    found = []
    for one in (routing, tables):
        _, importance, *losses = values = statistics_of(one)
        total = sum(loss * factor for loss, factor in zip(losses, (1.0, 0.1, 2.0), strict=True))
        total = total + importance.square().mean() + (one.gates[:, 1] * one.logits[:, 2]).sum()
        found.append([*values, *torch.autograd.grad(total, (x, weight), retain_graph=True)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_loss_without_logits_does_not_see_an_infinite_one(backend: str | None):
    """The logit of an expert that may not be chosen: z is infinite, balance and its gradient are not."""
    x, weight = torch.randn(20, 4, requires_grad=True), torch.randn(3, 4)
    bias, allowed = torch.tensor([0.0, 0.5, torch.inf]), torch.tensor([True, True, False])
    routing = route(x, weight, bias, top_k=1, expert_mask=allowed, backend=backend)
    assert routing.z_loss() == torch.inf
    (gradient,) = torch.autograd.grad(routing.balance_loss() + routing.entropy(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def counting_calls():
    """The op's calls, while it is patched."""
    return mock.patch.object(REGISTRY["routing_statistics"], "_run", wraps=REGISTRY["routing_statistics"]._run)


def test_statistics_come_from_one_pass_and_copies_make_their_own():
    weight = torch.randn(5, 8, requires_grad=True)
    with counting_calls() as calls:
        routing = route(torch.randn(7, 8), weight, top_k=2)
        with torch.no_grad():
            quiet = statistics_of(routing)
        loud = statistics_of(routing)
        assert calls.call_count == 2
        assert not any(value.requires_grad for value in quiet)
        assert [value.requires_grad for value in loud] == [False, True, True, True, True]
        sum(loud[1:], loud[0]).sum().backward()
        assert weight.grad.abs().max() > 0
        masked = replace(routing, token_mask=torch.arange(7) < 3)
        assert masked.load.sum() == 6 and calls.call_count == 3
        doubled = replace(routing, gates=2.0 * routing.gates)
        assert doubled.planes is None and torch.equal(doubled.importance, 2.0 * routing.importance)
    plain = route(torch.randn(7, 8), weight.detach(), top_k=2)
    before = repr(plain), statistics_of(plain)
    for twin in (copy.copy(plain), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(twin.planes, plain.planes)
        with counting_calls() as calls:
            assert all(map(torch.equal, statistics_of(twin), before[1])) and calls.call_count == 1
        assert repr(twin) == before[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("routed", ["inside", "outside", "outside, asked before"])
def test_statistics_under_activation_checkpointing(routed: str, reentrant: bool):
    """A second pass finds nothing that the first one left."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)

    def total(x, routing):
        routing = routing or route(x, weight, top_k=2)
        return x.square().sum() + routing.balance_loss() + routing.z_loss()

    found = []
    for is_checkpointed in (False, True):
        routing = None if routed == "inside" else route(x, weight, top_k=2)
        if routed == "outside, asked before":
            assert routing.load.sum() == 14
        run = (lambda *args: checkpoint(total, *args, use_reentrant=reentrant)) if is_checkpointed else total
        x.grad = weight.grad = None
        run(x, routing).backward()
        found.append((x.grad, weight.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("backend", ["reference", None])
def test_statistics_of_routers_side_by_side(backend: str | None, monkeypatch):
    """Tables whose rows lie apart are read where they are."""
    monkeypatch.setenv("MLLMCL_BACKEND", backend or "")
    torch.manual_seed(0)
    weights, a, b = ([torch.randn(6, shape)] * 3 for shape in (6, 6, 6))
    routings = lora_mix_routed_shared(
        torch.randn(2, 30, 6), weights, None, a, b, [torch.randn(3, 6) for _ in range(3)], top_k=2
    )[1]
    for routing in routings:
        assert routing.probs.stride() == (270, 9, 1)
        for ours, true in zip(statistics_of(routing), written_out(routing), strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=2e-6)


def test_an_expert_out_of_range_is_refused():
    table = torch.rand(3, 4)
    with pytest.raises(RuntimeError, match="out of range"):
        Routing(table, torch.tensor([[0], [4], [1]], dtype=torch.int32), table, table, table).load  # noqa: B018


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_beside_the_reference_of_the_same_dtype(name: str):
    """Tables whose rows lie apart, and gradients of a zero, whose logarithm is clamped where the dtype ends."""
    op = REGISTRY[name]
    for sample in op.samples(torch.device("cpu"), torch.float32, 35):
        ours, theirs = op(*sample.args), op(*sample.args, backend="reference")
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=5e-6)


def test_an_expert_out_of_reach_has_the_gradient_that_torch_gives():
    probs = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    total = probs.sum(-1, keepdim=True)
    q = probs / torch.where(total == 0, torch.ones_like(total), total)
    true = -(q * q.clamp_min(torch.finfo(q.dtype).tiny).log()).sum() / 3
    table = probs.detach()
    ours = Routing(table, torch.zeros(3, 1, dtype=torch.int32), table, table, probs).entropy()
    torch.testing.assert_close(torch.autograd.grad(ours, probs), torch.autograd.grad(true, probs))
