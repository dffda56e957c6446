"""W and B side by side, x in rows with room: what is known about memory, and that every provider takes the layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mllmcl_kernels import Mask, MaskedAdamW, lora_mix, rows_with_room, side_by_side
from mllmcl_kernels.concat import are_side_by_side, joined_rows, joined_weights, room_behind
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import excess, poisoned_empty

BACKENDS = ["reference"] + (["cpp"] if not isinstance(REGISTRY["lora_mix"].find("cpp"), str) else [])
T, K, N, RANKS = 12, 40, 30, (3, 0, 5)
R = sum(RANKS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def test_both_keep_their_values_and_zeros_lie_behind():
    weight, lora_b = normal(N, K), normal(N, R)
    with poisoned_empty():
        wide, narrow = side_by_side(nn.Parameter(weight), lora_b.t().contiguous().t())
    assert torch.equal(wide, weight) and torch.equal(narrow, lora_b)
    assert torch.equal(joined_weights(wide, narrow), torch.cat((weight, lora_b), 1))
    assert wide.stride() == narrow.stride() == (64, 1)
    assert not torch.as_strided(wide, (N, 64 - K - R), (64, 1), K + R).any()
    before = wide._version
    narrow.add_(1.0)
    assert wide._version == before and torch.equal(wide, weight)


def test_what_lies_side_by_side():
    wide, narrow = side_by_side(normal(N, K), normal(N, R))
    buffer = normal(N, 64)
    assert are_side_by_side(wide, narrow) and are_side_by_side(buffer[:, :K], buffer[:, K : K + R])
    for weight, lora_b in (
        (wide.clone(), narrow),
        (wide, narrow.clone()),
        (wide[:, :-1], narrow),
        (wide, narrow[:, 1:]),
        (wide[1:], narrow[:-1]),
        (wide, narrow[:, :0]),
        (wide, narrow.view(torch.int32)),
        (wide.t(), narrow.t()),
        (wide[::2], narrow[: N // 2]),
        (side_by_side(wide, narrow)[0], narrow),
        # B where the next rows of W are
        (buffer[:-1], buffer[1:, :R]),
    ):
        assert not are_side_by_side(weight, lora_b)


def test_room_is_known_through_views():
    x = rows_with_room((3, 4, K), R)
    # to autograd it is a tensor of its own
    assert x._base is None
    flat = x.view(T, K)
    for view in (flat, x.reshape(-1, K), flat.detach(), nn.Parameter(flat), flat[2:], flat[::3], flat[:, 7:]):
        behind = room_behind(view, R)
        assert behind.data_ptr() == view.data_ptr() + 4 * view.shape[1] and behind.stride() == view.stride()
        assert behind.shape == (view.shape[0], R)
    assert room_behind(flat, 64 - K).shape == (T, 64 - K)
    before = flat._version
    room_behind(flat, R).zero_()
    assert flat._version == before


def test_where_nobody_knows_of_room_there_is_none():
    """What lies behind a slice may be anybody's, the columns that were not asked for among it."""
    flat = rows_with_room((T, K), R)
    wide = normal(T, 64)
    for tensor, rank in (
        (flat, 64 - K + 1),
        (flat[:, :-1], R),
        (flat[:, 3:-4], R),
        (flat.clone(), R),
        (flat.view(torch.int32), R),
        (flat.view(torch.float16)[:, : 2 * K - 4], R),
        (flat[:1].expand(T, K), R),
        (flat.t(), 1),
        (rows_with_room((3, K, K), R)[:, :, 0], R),
        (wide[:, :K], R),
        (wide[:, :K].detach(), 1),
    ):
        assert room_behind(tensor, rank) is None


@pytest.mark.parametrize("place", ["elsewhere", "in place"])
def test_rows_are_joined(place: str):
    value, mixed = normal(T, K), normal(T, R)
    x = rows_with_room((T, K), R).copy_(value) if place == "in place" else value
    for given in (mixed, room_behind(x, R)):
        if given is not None:
            both = joined_rows(x, given.copy_(mixed))
            assert torch.equal(both, torch.cat((value, mixed), 1))
            assert (both.data_ptr() == x.data_ptr()) == (place == "in place")


def packed_layer(place: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x, weight, bias, A and B without gaps, and with W and B side by side and x in place or not."""
    values = [normal(T, K), normal(N, K), normal(N), normal(R, K), normal(N, R)]
    x, weight, bias, a, b = values
    if place == "in place":
        x = rows_with_room((T, K), R).copy_(x)
    weight, b = side_by_side(weight, b)
    return values, [x, weight, bias, a, b]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, T])
def test_every_provider_takes_the_layouts(backend: str, dtype, tokens: int):
    """Values and all gradients by the error rule; what lies behind a row is NaN, and stays."""
    values, _ = packed_layer("elsewhere")
    values[0] = values[0][:tokens]
    values = [value.to(dtype) for value in values]
    gates = normal(tokens, 3)

    def outcome(tensors, gates, backend):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = lora_mix(*leaves, gates, ranks=RANKS, trainable=[True, True, False], backend=backend)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    x = rows_with_room((tokens, K), R, dtype=dtype)
    room_behind(x, 64 - K).fill_(float("nan"))
    weight, b = side_by_side(values[1], values[4])
    torch.as_strided(weight, (N, 64 - K - R), (64, 1), K + R).fill_(float("nan"))
    found = outcome([x.copy_(values[0]), weight, *values[2:4], b], gates, backend)
    usual = outcome(values, gates, "reference")
    truth = outcome([value.double() for value in values], gates.double(), "reference")
    for place, triple in enumerate(zip(found, usual, truth, strict=True)):
        assert excess(*triple).passes, place
    assert all(tensor.is_contiguous() for tensor in found)
    assert room_behind(x, 64 - K).isnan().all()


def test_an_optimizer_steps_b_beside_w():
    """The same steps as elsewhere, and no bit of W or of a frozen expert moves."""
    values, (_, weight, _, _, b) = packed_layer("elsewhere")
    kept, frozen, steps = weight.clone(), b[:, 3:].clone(), []
    for tensor in (values[4], b):
        param = nn.Parameter(tensor)
        optimizer = MaskedAdamW([param], lr=0.1)
        optimizer.set_mask(param, Mask.experts(torch.tensor([True, True, False]), RANKS, 1))
        for step in range(4):
            param.grad = normal(N, R, seed=step)
            optimizer.step()
        steps.append(param.detach())
    torch.testing.assert_close(*steps)
    assert steps[1].data_ptr() == b.data_ptr() and torch.equal(b[:, 3:], frozen) and torch.equal(weight, kept)
    assert not torch.any(torch.isclose(b[:, :3], normal(N, R)[:, :3]))


def test_gradients_reach_what_was_written_into_the_rows():
    values, (_, weight, bias, a, b) = packed_layer("elsewhere")
    leaf = values[0].requires_grad_()
    placed = rows_with_room((T, K), R).copy_(2.0 * leaf)
    assert room_behind(placed, R) is not None
    found, expected = (lora_mix(x, weight, bias, a, b, ranks=RANKS) for x in (placed, 2.0 * leaf))
    for ours, usual in zip(*(torch.autograd.grad(y.square().sum(), leaf) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, usual)


def test_rows_with_room_in_a_compiled_graph():
    """One graph, the same values and gradients."""
    values, (_, weight, bias, a, b) = packed_layer("elsewhere")
    leaf = values[0].requires_grad_()

    def run(leaf):
        return lora_mix(rows_with_room(leaf.shape, R).copy_(leaf.sin()), weight, bias, a, b, ranks=RANKS)

    torch.compiler.reset()
    found, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(leaf), run(leaf)
    torch.testing.assert_close(found, expected)
    for ours, eager in zip(*(torch.autograd.grad(y.square().sum(), leaf) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, eager)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: side_by_side(normal(N, K), normal(N + 1, R)), ValueError, r"lora_b must be \[d_out, R\] = \[30, 8\]"),
        (lambda: side_by_side(normal(N), normal(N, R)), ValueError, "weight must be a matrix"),
        (lambda: side_by_side(normal(N, K), normal(N, R).half()), TypeError, "lora_b must be of weight's dtype"),
        (lambda: side_by_side(normal(N, K).long(), normal(N, R)), TypeError, "weight must be of dtype float32"),
        (lambda: side_by_side(normal(N, K), normal(N, R).to("meta")), ValueError, "lora_b must be on cpu like weight"),
        (lambda: side_by_side(None, normal(N, R)), TypeError, "weight must be a Tensor"),
        (lambda: rows_with_room((), 4), ValueError, "shape must be of one dimension or more"),
        (lambda: rows_with_room((3, 4), -1), ValueError, "rank must be 0 or more, got -1"),
    ],
)
def test_wrong_arguments_are_told(call, error, match: str):
    with pytest.raises(error, match=match):
        call()
