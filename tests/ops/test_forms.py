"""Forms of arguments that callers use beyond the samples: accepted as documented, or refused in words."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from mllmcl_kernels import (
    Mask,
    MaskedAdamW,
    ema_update_,
    importance_update_,
    lora_mix,
    lora_mix_routed,
    masked_adamw_,
    orthogonality_loss,
    route,
    sampled_product_l1,
)
from mllmcl_kernels.info import report

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
    assert torch.equal(mix(scaling=torch.tensor(2.0)), mix(scaling=2.0))
    assert torch.equal(Mask.experts([True, False], torch.tensor([2, 2]), 0).tensor, torch.tensor([1, 1, 0, 0]).byte())
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


def test_a_default_that_the_machine_lacks_is_an_error(monkeypatch):
    monkeypatch.setenv("MLLMCL_BACKEND", "cuda")
    monkeypatch.setattr("mllmcl_kernels.library.machine_reason", lambda name: "no device" if name == "cuda" else None)
    with pytest.raises(ValueError, match="lora_mix: MLLMCL_BACKEND='cuda' cannot run on this machine: no device"):
        mix()
    assert "default    cuda" in report()
    monkeypatch.setenv("MLLMCL_BACKEND", "fast")
    assert "default    MLLMCL_BACKEND must be one of" in report()


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("shape", [(2,), (1, 2)])
def test_gates_of_no_tokens_have_gradient_zero(lead, shape):
    gates = torch.rand(shape, requires_grad=True)
    lora_mix(X.new_empty(*lead, 8), W, None, A, B, gates, ranks=(2, 2)).sum().backward()
    assert torch.equal(gates.grad, torch.zeros(shape))


def updated(**options):
    tensors = [[torch.ones(2)] for _ in range(4)]
    masked_adamw_(*tensors, options.pop("masks", None), **{"step": 1, "lr": 0.1, **options})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: route(X, ROUTER, temperature="hot"), TypeError, "route: temperature must be positive, got 'hot'"),
        (lambda: route(X, ROUTER, temperature=float("inf")), ValueError, "temperature must be positive, got inf"),
        (lambda: route(X, ROUTER, noise=None), TypeError, "noise must be a standard deviation >= 0, got None"),
        (lambda: route(X, ROUTER, noise=float("inf")), ValueError, "noise must be a standard deviation >= 0, got inf"),
        (lambda: route(X, ROUTER, renormalize="yes"), TypeError, "renormalize must be True or False, got 'yes'"),
        (lambda: route(X, ROUTER[:0]), ValueError, "weight must be of at least one row"),
        (lambda: route(X, ROUTER, torch.ones(2, dtype=torch.int64)), TypeError, "bias must be of dtype float32"),
        (
            lambda: lora_mix_routed(X, W, None, A, B, ROUTER, straight_through="no"),
            TypeError,
            "lora_mix_routed: straight_through must be True or False, got 'no'",
        ),
        (lambda: updated(betas=0.9), TypeError, r"betas must be two numbers in \[0, 1\), got 0.9"),
        (lambda: updated(eps="small"), TypeError, "eps must be >= 0, got 'small'"),
        (lambda: updated(weight_decay=None), TypeError, "weight_decay must be >= 0, got None"),
        (lambda: updated(masks=Mask.rows(torch.ones(2).bool())), TypeError, "masks must be None or a list of them"),
        (lambda: MaskedAdamW([A], lr="fast"), TypeError, "MaskedAdamW: lr must be >= 0, got 'fast'"),
        (lambda: MaskedAdamW([A], betas=(0.9,)), TypeError, r"betas must be two numbers in \[0, 1\)"),
        (lambda: MaskedAdamW([A]).set_mask("a", None), TypeError, "param must be a Tensor, got str"),
        (lambda: ema_update_([A], [A], decay="slow"), TypeError, r"decay must be in \[0, 1\], got 'slow'"),
        (
            lambda: importance_update_([A], [A], reduce="max", owners=[torch.zeros(4, 8).byte()], task=1.5),
            TypeError,
            "task must be an id in 0..255, got 1.5",
        ),
        (lambda: Mask.rows(torch.ones(2).bool(), dim="rows"), ValueError, "dim must be a non-negative dimension"),
        (lambda: Mask.experts([True], 2, 0), ValueError, "ranks must be integers of at least 0, got 2"),
        (lambda: Mask.owner(torch.ones(2).byte(), 0.5), ValueError, "active must be an id in 0..255, got 0.5"),
        (lambda: orthogonality_loss(None, A), TypeError, "lora_a must be a Tensor or a list of them, got NoneType"),
        (lambda: sampled_product_l1(A, None, A, A), TypeError, "lora_b must be a Tensor or a list of them"),
    ],
)
def test_the_argument_is_named_whatever_came(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_padding_counts_in_no_statistic_even_without_numbers():
    x = X.clone()
    x[0, 0] = float("nan")
    counted = torch.ones(2, 3, dtype=torch.bool)
    counted[0, 0] = False
    whole, rest = route(x, ROUTER, top_k=1, token_mask=counted), route(X[counted], ROUTER, top_k=1)
    torch.testing.assert_close(whole.importance, rest.importance)
    for name in ("balance_loss", "z_loss", "entropy"):
        torch.testing.assert_close(getattr(whole, name)(), getattr(rest, name)())


def test_a_token_that_may_go_nowhere_has_finite_gradients():
    allowed = torch.ones(2, 3, 2, dtype=torch.bool)
    allowed[1, 1] = False
    weight = ROUTER.clone().requires_grad_()
    routing = route(X, weight, expert_mask=allowed)
    (routing.entropy() + routing.balance_loss() + routing.z_loss() + routing.gates.square().sum()).backward()
    assert torch.isfinite(weight.grad).all() and weight.grad.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_optimizer_has_its_masks_and_options(copied):
    param = torch.ones(2, requires_grad=True)
    optimizer = MaskedAdamW([param], lr=0.1, max_norm=1.0)
    optimizer.set_mask(param, Mask.rows(torch.tensor([True, False])))
    param.grad = torch.ones(2)
    optimizer.step()
    twin, other = copied((param, optimizer))
    for one, its in ((param, optimizer), (twin, other)):
        one.grad = torch.full((2,), 9.0)
        its.step()
    assert torch.equal(twin, param) and twin[1] == 1.0 and other.max_norm == 1.0


def test_moments_are_loaded_in_the_dtype_asked_for():
    param = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer, other = (MaskedAdamW([param], lr=0.1, state_dtype=torch.float32) for _ in range(2))
    param.grad = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert other.state[param][name].dtype == torch.float32
        assert torch.equal(other.state[param][name], optimizer.state[param][name])


def test_no_width_no_data_and_float64_under_autocast():
    """Sizes of zero, tensors of the meta device, and what autocast leaves alone."""
    assert route(torch.zeros(2, 3, 0), torch.zeros(4, 0)).gates.shape == (2, 3, 4)
    assert lora_mix(torch.zeros(2, 3, 0), torch.zeros(5, 0), None, torch.zeros(2, 0), torch.zeros(5, 2)).shape == (
        2,
        3,
        5,
    )
    x, w, a, b = torch.ones(2, 3, 8), torch.ones(5, 8), torch.ones(4, 8), torch.ones(5, 4)
    assert lora_mix(*(t.to("meta") for t in (x, w)), None, *(t.to("meta") for t in (a, b))).shape == (2, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_mix(x, w, None, a, b).dtype == torch.bfloat16
        assert lora_mix(*(t.double() for t in (x, w)), None, *(t.double() for t in (a, b))).dtype == torch.float64
