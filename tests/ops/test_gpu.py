"""What only a GPU can show: replayed CUDA graphs, every tile that tuning may choose, streams, sizes, late errors."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

import torch.nn.functional as F

from mllmcl_kernels import (
    Mask,
    MaskedAdamW,
    counters,
    faults,
    lora_mix,
    lora_mix_routed,
    lora_mix_routed_shared,
    lora_mix_shared,
    masked_adamw_,
    route,
    rows_with_room,
    side_by_side,
)
from mllmcl_kernels.concat import room_behind
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import excess

from . import test_prepared

#: the fixture
how_steps_were_made = test_prepared.calls
DEVICE = torch.device("cuda", torch.cuda.current_device())
E, R = 8, 16
RANKS = (R,) * E
needs_triton = pytest.mark.skipif(
    isinstance(REGISTRY["lora_mix"].find("triton"), str), reason="the Triton provider is not there"
)


def layer(
    tokens: int, width: int, out: int, dtype=torch.bfloat16, seed: int = 0, rank: int = R
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0):
        return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)

    return {
        "x": normal(tokens, width).requires_grad_(),
        "weight": normal(out, width, scale=width**-0.5),
        "bias": normal(out),
        "lora_a": normal(E * rank, width, scale=width**-0.5).requires_grad_(),
        "lora_b": normal(out, E * rank, scale=0.1).requires_grad_(),
        "router": normal(E, width, scale=width**-0.5).requires_grad_(),
        "dy": normal(tokens, out),
    }


def mixed(given: dict, gates, backend=None):
    tensors = [given[key] for key in ("x", "weight", "bias", "lora_a", "lora_b")]
    return lora_mix(*tensors, gates, ranks=(len(given["lora_a"]) // E,) * E, backend=backend)


def outcome(given: dict, gates, backend=None) -> list[torch.Tensor]:
    """y and every gradient."""
    leaves = [given[key] for key in ("x", "lora_a", "lora_b")]
    if gates.is_floating_point():
        gates = gates.detach().requires_grad_()
        leaves.append(gates)
    y = mixed(given, gates, backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, given["dy"])]


def follow_the_rule(found, given: dict, gates) -> None:
    wide = {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in given.items()}
    plain, truth = outcome(given, gates, "reference"), outcome(wide, gates, "reference")
    for place, triple in enumerate(zip(found, plain, truth, strict=True)):
        off = excess(*triple)
        assert off.passes, f"output {place}: {off}"


def same(ours: torch.Tensor, eager: torch.Tensor) -> bool:
    """Up to what another split of the same sums changes; a gate or an id of before changes far more."""
    return float((ours.double() - eager.double()).norm()) <= 1e-2 * float(eager.double().norm())


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def captured(run):
    """The graph of `run` and what it gave."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


GATES = {
    "floats of tokens": [
        lambda n: torch.rand(n, E),
        lambda n: torch.rand(n, E),
        lambda n: torch.eye(E)[[1]].expand(n, E),
    ],
    "ids of tokens": [
        lambda n: torch.arange(n) % E,
        lambda n: torch.full((n,), 2),
        lambda n: torch.full((n,), -1),
        lambda n: torch.randint(-1, E, (n,)),
        lambda n: (torch.arange(n) >= n - 3).long() * 3,
    ],
}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_a_graph_replays_with_other_gates(kind: str, tokens: int):
    """Forward and backward are captured once; a replay follows the gates and tokens it finds, however they group."""
    torch.manual_seed(0)
    given = layer(tokens, 256, 384)
    gates = GATES[kind][0](tokens).to(DEVICE)
    graph, found = captured(lambda: outcome(given, gates))
    for seed, make in enumerate([*GATES[kind], GATES[kind][0]]):
        gates.copy_(make(tokens))
        given["x"].data.copy_(layer(tokens, 256, 384, seed=seed + 1)["x"].data)
        graph.replay()
        torch.cuda.synchronize()
        for place, (ours, eager) in enumerate(zip(found, outcome(given, gates), strict=True)):
            assert same(ours, eager), (seed, place)
    follow_the_rule(found, given, gates)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_graph_of_a_router_replays_with_other_tokens(top_k: int | None):
    given = layer(130, 256, 384)
    names = ("x", "weight", "bias", "lora_a", "lora_b", "router")

    def run():
        y, routing = lora_mix_routed(*(given[key] for key in names), top_k=top_k)
        total = (y * given["dy"]).sum() + routing.balance_loss() + routing.z_loss()
        return [
            y.detach(),
            routing.gates.detach(),
            *torch.autograd.grad(total, [given[k] for k in names if k not in ("weight", "bias")]),
        ]

    graph, found = captured(run)
    before = [tensor.clone() for tensor in found]
    given["x"].data.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(found[1], before[1])
    for place, (ours, eager) in enumerate(zip(found, run(), strict=True)):
        assert same(ours, eager), place


@contextlib.contextmanager
def in_one_launch():
    """Every forward of the Triton provider is the one kernel for few tokens."""
    from mllmcl_kernels.ops.lora_mix import triton as mix
    from mllmcl_kernels.triton_few import Launches

    with mock.patch.object(mix, "launch_counts", lambda *_: (Launches(1),)), torch.no_grad():
        yield


def all_counters_are_zero() -> bool:
    torch.cuda.synchronize()
    found = [*counters._of_streams.values(), *counters._kept_for_replays]
    return bool(found) and not any(bool(counts.any()) for counts in found)


@needs_triton
@pytest.mark.parametrize("spare", [0, counters.SPARE])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("tokens", [1, 33, 64])
def test_a_graph_of_one_launch_replays_with_other_gates(tokens: int, kind: str, spare: int, monkeypatch):
    """The bits of the eager launch, with counters zeroed before the capture and with some that the graph zeroes."""
    monkeypatch.setattr(counters, "SPARE", spare)
    monkeypatch.setattr(counters, "_spare", {})
    torch.manual_seed(0)
    given, gates = layer(tokens, 1024, 768), GATES[kind][0](tokens).to(DEVICE)
    with in_one_launch():
        graph, found = captured(lambda: mixed(given, gates, "triton"))
        for seed, make in enumerate([*GATES[kind], GATES[kind][0]]):
            gates.copy_(make(tokens))
            given["x"].data.copy_(layer(tokens, 1024, 768, seed=seed + 1)["x"].data)
            graph.replay()
            assert torch.equal(found, mixed(given, gates, "triton")), seed
            assert all_counters_are_zero(), seed
        wide = {key: value.double() for key, value in given.items()}
        off = excess(found, mixed(given, gates, "reference"), mixed(wide, gates, "reference"))
        assert off.passes, off


@needs_triton
def test_one_launch_with_more_programs_than_run_at_a_time():
    given, gates = layer(3, 1024, 100_000), torch.rand(3, E, device=DEVICE)
    with in_one_launch():
        found = mixed(given, gates, "triton")
        assert all_counters_are_zero()
        wide = {key: value.double() for key, value in given.items()}
        off = excess(found, mixed(given, gates, "reference"), mixed(wide, gates, "reference"))
        assert off.passes, off


@needs_triton
def test_one_launch_on_several_streams_at_once():
    """Two streams of eager launches and one that replays a graph, all queued before any of them begins."""
    given, gates = [layer(16, 2048, 2048, seed=seed) for seed in range(3)], torch.rand(16, E, device=DEVICE)
    with in_one_launch():
        expected = [mixed(one, gates, "triton") for one in given]
        graph, replayed = captured(lambda: mixed(given[2], gates, "triton"))

        def replay():
            graph.replay()
            return replayed

        runs = [*(lambda one=one: mixed(one, gates, "triton") for one in given[:2]), replay]
        streams, wrong = [torch.cuda.Stream() for _ in runs], torch.zeros(len(runs), dtype=torch.int64, device=DEVICE)
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)
        for _ in range(20):
            for place, (stream, run) in enumerate(zip(streams, runs, strict=True)):
                with torch.cuda.stream(stream):
                    wrong[place] += (run() != expected[place]).any()
        assert all_counters_are_zero()
    assert not wrong.any()


def shared_outcome(given: list[dict], routed: bool, backend=None) -> list[torch.Tensor]:
    """Of three linears over the first one's x: every y, then the gradients of x, A, B and, routed, the routers."""
    x, kinds = given[0]["x"], ("weight", "bias", "lora_a", "lora_b")
    stacks = [[one[kind] for one in given] for kind in kinds]
    routers = [one["router"] for one in given]
    if routed:
        found, _ = lora_mix_routed_shared(x, *stacks, routers, backend=backend)
    else:
        gates = torch.softmax(x.detach()[:, :E].float(), -1)
        found = lora_mix_shared(x, *stacks, gates, ranks=RANKS, backend=backend)
    leaves = [x, *stacks[2], *stacks[3], *(routers if routed else ())]
    return [*(y.detach() for y in found), *torch.autograd.grad(found, leaves, [one["dy"] for one in given])]


def follow_the_rule_shared(found, given: list[dict], routed: bool) -> None:
    def wide(one):
        return {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in one.items()}

    plain = shared_outcome(given, routed, "reference")
    truth = shared_outcome([wide(one) for one in given], routed, "reference")
    for place, triple in enumerate(zip(found, plain, truth, strict=True)):
        off = excess(*triple)
        assert off.passes, f"output {place}: {off}"


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_a_graph_of_linears_that_share_x(tokens: int, routed: bool):
    given = [layer(tokens, 256, out, seed=out) for out in (384, 128, 128)]
    graph, found = captured(lambda: shared_outcome(given, routed))
    follow_the_rule_shared(found, given, routed)
    given[0]["x"].data.copy_(layer(tokens, 256, 384, seed=9)["x"].data)
    graph.replay()
    torch.cuda.synchronize()
    for place, (ours, eager) in enumerate(zip(found, shared_outcome(given, routed), strict=True)):
        assert same(ours, eager), place


def test_a_graph_of_an_optimizer_step():
    """The step is counted on the device; three replays are three steps."""
    torch.manual_seed(0)
    start = [torch.randn(E * R, 40, device=DEVICE), torch.randn(30, E * R, device=DEVICE)]
    grads = [torch.randn_like(tensor) for tensor in start]
    masks = [Mask.experts(torch.arange(E) == 1, RANKS, dim).to(DEVICE) for dim in (0, 1)]

    def fresh():
        lists = [tensor.clone() for tensor in start], *([torch.zeros_like(t) for t in start] for _ in range(2))
        return lists, torch.ones((), dtype=torch.float64, device=DEVICE)

    def step(lists, count):
        params, means, squares = lists
        masked_adamw_(params, grads, means, squares, masks, step=count, lr=1e-2)
        count.add_(1)

    eager, graphed = fresh(), fresh()
    for _ in range(5):
        step(*eager)
    # two steps of warming up, and three replays
    graph, _ = captured(lambda: step(*graphed))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(graphed[0][0], eager[0][0], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(eager[0][0][0], start[0])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"many": True}], ids=str)
def test_prepared_steps_of_an_optimizer(options, backend: str, how_steps_were_made, monkeypatch):
    """From the third step on tables are kept, and follow gradients that move; numbers of a clipped norm stay there."""
    if isinstance(REGISTRY["masked_adamw_"].find(backend), str):
        pytest.skip(REGISTRY["masked_adamw_"].find(backend))
    monkeypatch.setenv("MLLMCL_BACKEND", backend)
    run = test_prepared.Run(device=str(DEVICE), **options)
    run.step(6)
    assert how_steps_were_made == ["op", "op"] + 4 * ["prepared"]
    test_prepared.assert_same(run, test_prepared.by_the_op(6, device=str(DEVICE), **options))


# -- tiles, streams, sizes --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def picking(place: int):
    """The candidate at `place`, of each kernel that has so many."""
    from mllmcl_kernels import triton_expand, triton_few
    from mllmcl_kernels.ops.lora_mix import triton as mix
    from mllmcl_kernels.ops.lora_mix_routed import triton as routed
    from mllmcl_kernels.ops.route import triton as router

    def pick(key, candidates, device, run):
        return candidates[place % len(candidates)]

    with contextlib.ExitStack() as stack:
        for module in (triton_expand, triton_few, mix, routed, router):
            stack.enter_context(mock.patch.object(module, "pick_tile", pick))
        yield


@needs_triton
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("tokens", [1, 33, 700, 4096])
def test_whatever_tuning_chooses_is_right(tokens: int, place: int):
    given, gates = layer(tokens, 1024, 768), torch.rand(tokens, E, device=DEVICE)
    with picking(place):
        follow_the_rule(outcome(given, gates, "triton"), given, gates)


def laid_side_by_side(given: dict, lies: str) -> dict:
    """The layer with W and B side by side and x "copied" or "in place"; NaN behind the rows of x."""
    x, room = given["x"].detach(), len(given["lora_a"])
    if lies == "in place":
        placed = rows_with_room(x.shape, room, dtype=x.dtype, device=DEVICE)
        room_behind(placed, room).fill_(float("nan"))
        x = placed.copy_(x)
    weight, b = side_by_side(given["weight"], given["lora_b"])
    return given | {"x": x.requires_grad_(), "weight": weight, "lora_b": b.requires_grad_()}


@needs_triton
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("tokens", [33, 700, 4096])
@pytest.mark.parametrize("lies", ["copied", "in place"])
def test_whatever_tuning_chooses_is_right_side_by_side(lies: str, tokens: int, place: int):
    """The last candidate is one product; x keeps its bits."""
    given, gates = laid_side_by_side(layer(tokens, 1024, 768), lies), torch.rand(tokens, E, device=DEVICE)
    x = given["x"].detach().clone()
    with picking(place):
        follow_the_rule(outcome(given, gates, "triton"), given, gates)
    assert torch.equal(given["x"], x)


@needs_triton
@pytest.mark.parametrize("lies", ["copied", "in place"])
def test_a_graph_of_one_product_replays_with_other_gates(lies: str):
    torch.manual_seed(0)
    given, gates = laid_side_by_side(layer(600, 256, 384), lies), torch.rand(600, E, device=DEVICE)
    with picking(-1):
        graph, found = captured(lambda: outcome(given, gates, "triton"))
        for seed in range(2):
            gates.copy_(torch.rand(600, E))
            given["x"].data.copy_(layer(600, 256, 384, seed=seed + 1)["x"].data)
            graph.replay()
            torch.cuda.synchronize()
            follow_the_rule(found, given, gates)


@needs_triton
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("tokens", [33, 700, 4096])
def test_whatever_tuning_chooses_is_right_with_a_router(tokens: int, place: int):
    """The merged kernel against router and mixture one after the other, whose choice of experts is the same."""
    given = layer(tokens, 1024, 768, torch.float16)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    with picking(place):
        y, routing = lora_mix_routed(*(given[k] for k in names), given["router"], top_k=2, backend="triton")
    logits = F.linear(given["x"].double(), given["router"].double())
    assert excess(routing.logits, F.linear(given["x"].float(), given["router"].float()), logits).passes
    assert torch.equal(routing.indices.long().sort(-1).values, routing.logits.topk(2, -1).indices.sort(-1).values)
    wide = {key: value.detach().double() for key, value in given.items()}
    gates = routing.gates.detach()
    off = excess(y, mixed(given, gates, "reference"), mixed(wide, gates, "reference"))
    assert off.passes, off


@needs_triton
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("tokens", [33, 700, 4096])
@pytest.mark.parametrize("routed", [False, True])
def test_whatever_tuning_chooses_is_right_for_linears_that_share_x(tokens: int, place: int, routed: bool):
    given = [layer(tokens, 1024, out, seed=out) for out in (768, 256)]
    with picking(place):
        follow_the_rule_shared(shared_outcome(given, routed, "triton"), given, routed)


@needs_triton
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("run", [1, 512])
def test_grouped_tokens_by_ids(run: int, place: int):
    """Past the break-even: dense kernels and both tiles of the grouped ones, replayed with ids that group otherwise."""
    tokens, given = 2048, layer(2048, 512, 384, rank=64)
    ids = (torch.arange(tokens // run, device=DEVICE) % E).view(-1, 1).expand(-1, run).reshape(-1)
    with picking(place):
        follow_the_rule(outcome(given, ids, "triton"), given, ids)
        graph, found = captured(lambda: outcome(given, ids, "triton"))
        for make in GATES["ids of tokens"]:
            ids.copy_(make(tokens))
            graph.replay()
            torch.cuda.synchronize()
            follow_the_rule(found, given, ids)


@needs_triton
@pytest.mark.parametrize("place", [1, 2])
def test_grouped_tokens_by_a_router(place: int):
    """The best two of eight in groups against the dense kernels: y, gates and every gradient."""
    given = layer(2048, 512, 384, rank=64)
    names = ("x", "weight", "bias", "lora_a", "lora_b", "router")

    def run():
        y, routing = lora_mix_routed(*(given[key] for key in names), top_k=2, renormalize=True, backend="triton")
        leaves = [given[key] for key in names if given[key].requires_grad]
        return [y.detach(), routing.gates.detach(), *torch.autograd.grad((y * given["dy"]).sum(), leaves)]

    with picking(0):
        dense = run()
    with picking(place):
        grouped = run()
    for position, (ours, other) in enumerate(zip(grouped, dense, strict=True)):
        assert same(ours, other), position


@pytest.mark.parametrize("name", ["lora_mix", "route"])
def test_kernels_run_on_the_current_stream(name: str):
    """What another stream has still to write is waited for by the kernels queued behind it."""
    given = layer(256, 512, 512)
    gates = torch.rand(256, E, device=DEVICE)

    def run(x):
        if name == "route":
            return route(x, given["router"], top_k=2).gates
        return lora_mix(x, *(given[k] for k in ("weight", "bias", "lora_a", "lora_b")), gates, ranks=RANKS)

    with torch.no_grad():
        expected = run(given["x"])
        stream, late = torch.cuda.Stream(), torch.zeros_like(given["x"])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(given["x"])
            found = run(late)
        stream.synchronize()
    assert torch.equal(found, expected)


@needs_triton
def test_sizes_beyond_int32():
    """More entries in x than 32 bits count; the last rows are right."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("24 GiB of free memory are needed")
    tokens, width = 70_000, 32_768
    given = layer(8, width, 64)
    x = torch.empty(tokens, width, device=DEVICE, dtype=torch.bfloat16).normal_()
    gates = torch.rand(tokens, E, device=DEVICE)
    rest = [given[key].detach() for key in ("weight", "bias", "lora_a", "lora_b")]
    y = lora_mix(x, *rest, gates, ranks=RANKS, backend="triton")
    few = lora_mix(x[-64:].clone(), *rest, gates[-64:], ranks=RANKS, backend="reference")
    torch.testing.assert_close(y[-64:], few, rtol=0.02, atol=0.05)


# -- errors that come late --------------------------------------------------------------------------------------------


@needs_triton
def test_an_id_out_of_range_is_the_base_layer_and_raises_later(monkeypatch):
    monkeypatch.delenv("MLLMCL_DEBUG", raising=False)
    faults.raise_faults()
    given = layer(40, 128, 96)
    ids = torch.arange(40, device=DEVICE) % E
    ids[17] = E
    y = mixed(given, ids, "triton")
    assert torch.equal(y[17], F.linear(given["x"], given["weight"], given["bias"])[17])
    with pytest.raises(ValueError, match=r"lora_mix: gates must be ids in -1\.\.7; on cuda:\d one at position 17"):
        faults.raise_faults()
    faults.raise_faults()


@needs_triton
def test_the_next_optimizer_steps_raise_it(monkeypatch):
    monkeypatch.delenv("MLLMCL_DEBUG", raising=False)
    given = layer(40, 128, 96)
    optimizer = MaskedAdamW([given["lora_a"], given["lora_b"]], lr=1e-3)
    mixed(given, torch.full((40,), -2, device=DEVICE), "triton").sum().backward()
    with pytest.raises(ValueError, match="at position 39"):
        for _ in range(3):
            optimizer.step()
            torch.cuda.synchronize()
    faults.raise_faults()


@needs_triton
def test_debugging_raises_at_the_call(monkeypatch):
    monkeypatch.setenv("MLLMCL_DEBUG", "1")
    given = layer(40, 128, 96)
    with pytest.raises(ValueError, match="got 8 at position 0"):
        mixed(given, torch.full((40,), E, device=DEVICE), "triton")
    monkeypatch.delenv("MLLMCL_DEBUG")
    with contextlib.suppress(ValueError):
        faults.raise_faults()


@needs_triton
def test_a_compiled_step_follows_the_ids():
    """One graph by inductor, whatever ids come."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    given = layer(64, 128, 96)
    run = torch.compile(lambda ids: mixed(given, ids), backend=counter, fullgraph=True)
    for make in GATES["ids of tokens"]:
        ids = make(64).to(DEVICE)
        torch.testing.assert_close(run(ids), mixed(given, ids))
    assert counter.frame_count == 1
    torch.compiler.reset()
