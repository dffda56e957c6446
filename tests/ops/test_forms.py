"""Forms of arguments that callers use beyond the samples: accepted as documented, or refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllmcl_kernels import Mask, MaskedAdamW, ema_update_, importance_update_, lora_mix, lora_mix_routed, route

X, W, A, B = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 3, 8), (5, 8), (4, 8), (5, 4))
)
ROUTER = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def mix(gates=None, **options):
    return lora_mix(X, W, None, A, B, gates, **{"ranks": (2, 2), **options})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_every_integer_dtype(dtype):
    ids = torch.tensor([[0, 1, 1], [1, 0, 0]])
    assert torch.equal(mix(ids.to(dtype)), mix(ids))


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (2, 3, 1)])
def test_gates_without_a_dimension_of_experts_weigh_all_alike(shape):
    gates = torch.rand(shape)
    every = torch.broadcast_to(gates if gates.dim() else gates[None], (2, 3, 1)).expand(2, 3, 2)
    torch.testing.assert_close(mix(gates), mix(every))


def test_numbers_of_numpy():
    assert torch.equal(mix(scaling=np.float32(2)), mix(scaling=2.0))
    assert torch.equal(mix(ranks=np.array([2, 2]), trainable=np.array([True, False])), mix())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": (1.5, 2.5)}, r"ranks must be E integers or None, got \(1.5, 2.5\)"),
        ({"ranks": 4}, "ranks must be E integers or None, got 4"),
        ({"scaling": None}, "scaling must be a number or E numbers, got None"),
        ({"scaling": "x"}, "scaling must be a number or E numbers, got 'x'"),
        ({"trainable": ["no", "no"]}, r"trainable must be E booleans or None, got \['no', 'no'\]"),
    ],
)
def test_what_is_no_value_for_each_expert(options, words):
    with pytest.raises(TypeError, match=words):
        mix(**options)


def test_dense_routing_with_experts_that_may_not_be_chosen():
    """Softmax over the rest; what top_k was asked for has to be there."""
    mask = torch.tensor([True, False])
    for routing in (route(X, ROUTER, expert_mask=mask), lora_mix_routed(X, W, None, A, B, ROUTER, expert_mask=mask)[1]):
        assert torch.equal(routing.gates, torch.tensor([1.0, 0.0]).expand(2, 3, 2))
    with pytest.raises(ValueError, match="top_k must be at most the 1 allowed experts, got 2"):
        route(X, ROUTER, top_k=2, expert_mask=mask)


def test_one_token_without_leading_dimensions():
    one, many = route(X[0, 0], ROUTER, top_k=1), route(X[0, :1], ROUTER, top_k=1)
    for name in ("load", "importance"):
        assert torch.equal(getattr(one, name), getattr(many, name))
    assert torch.equal(one.balance_loss(), many.balance_loss()) and torch.equal(one.gates, many.gates[0])


def test_updates_in_their_shortest_form():
    importance, grad = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    importance_update_([importance], [grad])
    assert importance.tolist() == [1.0, 4.0, 9.0]
    averages = [torch.ones(3) for _ in range(4)]
    param = torch.tensor([2.0, 4.0, 8.0])
    ema_update_(averages[:1], [param], decay=0.5)
    ema_update_(averages[1:2], [param], decay=0.5, granularity="tensor")
    ema_update_(averages[2:3], [param], mode="pema", grads=[grad])
    ema_update_(averages[3:], [param], mode="pema", squared_grads=[grad.square()])
    assert torch.equal(averages[0], averages[1]) and torch.equal(averages[2], averages[3])


def test_what_is_no_list_no_mask_and_no_number():
    with pytest.raises(TypeError, match="averages must be a list of tensors, got Tensor"):
        ema_update_(torch.ones(2), torch.ones(2), decay=0.5)
    param = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="mask must be a Mask or None, got Tensor"):
        MaskedAdamW([param]).set_mask(param, torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"ranks must be integers of at least 0, got \(-1, 3\)"):
        Mask.experts([True, False], ranks=(-1, 3), dim=0)
    with pytest.raises(TypeError, match="count must be at least 1, got 'two'"):
        importance_update_([torch.zeros(2)], [torch.ones(2)], count="two")


def test_the_environment_is_asked_at_every_call(monkeypatch):
    monkeypatch.setenv("MLLMCL_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"MLLMCL_BACKEND must be one of .*, got 'fast'"):
        mix()
    monkeypatch.setenv("MLLMCL_BACKEND", "reference")
    monkeypatch.setattr("mllmcl_kernels.library.machine_reason", lambda name: None if name == "reference" else "no")
    assert torch.equal(mix(), mix(backend="reference"))
