"""Freezing: masked entries stay bit for bit, whatever the optimiser's history; masks of shards; AdamW's own numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl_kernels import Mask, MaskedAdamW, lora_mix, mask_grads_, masked_adamw_
from mllmcl_kernels.op import REGISTRY

BACKENDS = ["reference"] + (["cpp"] if not isinstance(REGISTRY["masked_adamw_"].find("cpp"), str) else [])
RANKS = (3, 4, 5)


def shapes_and_masks():
    experts = torch.tensor([False, True, False])
    owners = torch.randint(0, 3, (12, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return [
        ((12, 20), Mask.experts(experts, RANKS, 0)),
        ((20, 12), Mask.experts(experts, RANKS, 1)),
        ((12, 20), Mask.rows(torch.arange(12) % 2 == 0)),
        ((12, 20), Mask.elements(owners == 1)),
        ((12, 20), Mask.owner(owners, 2)),
    ]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"max_norm": 0.1}, {"lr": torch.tensor(0.01)}], ids=str)
def test_masked_entries_keep_bits_for_200_steps_after_a_history(options):
    """Momentum from 20 unmasked steps, decay, clipping, NaN under the mask: nothing frozen moves, the rest does."""
    torch.manual_seed(0)
    cases = shapes_and_masks()
    params = [torch.randn(shape, requires_grad=True) for shape, _ in cases]
    optimizer = MaskedAdamW(params, **{"lr": 0.01, **options})

    def step(nan=False):
        for param, (shape, mask) in zip(params, cases, strict=True):
            param.grad = torch.randn(shape)
            if nan:
                param.grad[~mask.expand(shape).expand(shape)] = float("nan")
        optimizer.step()

    for _ in range(20):
        step()
    for param, (_, mask) in zip(params, cases, strict=True):
        optimizer.set_mask(param, mask)
    kept = [
        [tensor.detach().clone() for tensor in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
        for p in params
    ]
    for count in range(200):
        step(nan=count % 7 == 0)
    for param, (shape, mask), old in zip(params, cases, kept, strict=True):
        frozen = ~mask.expand(shape).expand(shape)
        state = optimizer.state[param]
        for before, after in zip(old, (param.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True):
            assert torch.equal(before[frozen], after[frozen])
            assert (before != after)[~frozen].float().mean() > 0.99
            assert torch.isfinite(after).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_masks_it_is_adamw(backend, weight_decay):
    """50 steps beside torch.optim.AdamW in float32: within the rounding of the other order of operations."""
    torch.manual_seed(0)
    params = [torch.randn(37, 5), torch.randn(1), torch.randn(4, 3, 2)]
    theirs = [param.clone().requires_grad_() for param in params]
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=weight_decay)
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(1, 51):
        grads = [torch.randn_like(p) for p in params]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        reference.step()
        masked_adamw_(params, grads, m, v, None, step=step, lr=0.01, weight_decay=weight_decay, backend=backend)
    for ours, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, other.detach(), rtol=1e-5, atol=1e-6)


def test_zeroed_gradients_alone_do_not_freeze():
    """Why `mask_grads_` says so: with a history the masked rows drift on."""
    param = torch.ones(4, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([param], lr=0.01)
    param.grad = torch.ones(4, 3)
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(4, 3)
    mask_grads_([param.grad], [Mask.rows(torch.tensor([True, False, False, True]))])
    assert not param.grad[1:3].any()
    optimizer.step()
    assert not torch.equal(param.detach()[1:3], before[1:3])


@pytest.mark.parametrize("world", [2, 3, 5, 7])
def test_experts_of_a_shard_are_those_of_the_whole(world):
    """FSDP2 cuts a stack anywhere; the masks of all shards together are the mask of the stack."""
    mask, total = torch.tensor([True, False, True]), sum(RANKS)
    size = -(-total // world)
    whole = Mask.experts(mask, RANKS, 0).tensor
    parts = [
        Mask.experts(mask, RANKS, 0, start=start, length=min(size, total - start)).tensor
        for start in range(0, total, size)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_the_hidden_step_of_get_optimizer_state_dict_changes_nothing():
    """torch.distributed.checkpoint takes one step with lr 0 on an optimizer without state, and leaves its count."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def run(peek):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = MaskedAdamW(model.parameters(), lr=0.01)
        if peek:
            get_optimizer_state_dict(model, optimizer)
        for _ in range(5):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    assert torch.equal(run(False), run(True))


def test_state_has_adamws_layout_and_goes_into_it():
    param = torch.ones(3, requires_grad=True)
    ours = MaskedAdamW([param], lr=0.01)
    param.grad = torch.ones(3)
    ours.step()
    state = ours.state_dict()["state"][0]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and float(state["step"]) == 1.0
    other = torch.optim.AdamW([torch.ones(3, requires_grad=True)], lr=0.01)
    taken = other.state_dict()
    taken["state"] = ours.state_dict()["state"]
    other.load_state_dict(taken)
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], state["exp_avg"])


def test_the_norm_is_that_of_the_gradients_the_masks_let_through():
    """A huge gradient of a frozen row does not shrink the step of the others."""
    param = torch.zeros(2, 3, requires_grad=True)
    optimizer = MaskedAdamW([param], lr=0.1, max_norm=1.0)
    optimizer.set_mask(param, Mask.rows(torch.tensor([True, False])))
    param.grad = torch.tensor([[0.3, 0.0, 0.4], [1e9, 0.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(0.5))
    torch.testing.assert_close(optimizer.state[param]["exp_avg"][0], torch.tensor([0.03, 0.0, 0.04]))


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)])
def test_the_norm_is_taken_in_float32_or_better(dtypes):
    """Clipped as torch clips, for parameters of any dtype and of several."""
    params = [torch.zeros(5, 7, dtype=dtype, requires_grad=True) for dtype in dtypes]
    grads = [torch.randn(5, 7).to(dtype) for dtype in dtypes]
    optimizer = MaskedAdamW(params, lr=0.1, max_norm=0.5)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    norm = torch.cat([grad.double().flatten() for grad in grads]).norm()
    assert norm > 0.5
    wide = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    torch.testing.assert_close(optimizer.grad_norm, norm.to(wide))
    for param, grad in zip(params, grads, strict=True):
        wanted = grad.double() * 0.1 * 0.5 / (norm + 1e-6)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], wanted.to(param.dtype))


def test_set_mask_refuses_strangers_and_misfits():
    param = torch.zeros(2, 3, requires_grad=True)
    optimizer = MaskedAdamW([param], lr=0.1)
    with pytest.raises(ValueError, match="param must be a parameter of this optimizer"):
        optimizer.set_mask(torch.zeros(2, 3), None)
    with pytest.raises(ValueError, match=r"mask must be \[2\], the length of dimension 0, got \[3\]"):
        optimizer.set_mask(param, Mask.rows(torch.ones(3, dtype=torch.bool)))


def test_one_expert_of_a_stack_trains_and_the_others_stay():
    """End to end: lora_mix with a frozen expert, MaskedAdamW with its mask, 100 steps with decay."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 20), torch.randn(20, 20)
    a, b = torch.randn(12, 20, requires_grad=True), torch.randn(20, 12, requires_grad=True)
    optimizer = MaskedAdamW([a, b], lr=0.01, weight_decay=0.1, max_norm=1.0)
    experts = torch.tensor([False, True, False])
    optimizer.set_mask(a, Mask.experts(experts, RANKS, 0))
    optimizer.set_mask(b, Mask.experts(experts, RANKS, 1))
    before_a, before_b = a.detach().clone(), b.detach().clone()
    for _ in range(100):
        y = lora_mix(x, weight, None, a, b, torch.rand(8, 3), ranks=RANKS, trainable=experts.tolist())
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    keep = torch.ones(12, dtype=torch.bool)
    keep[3:7] = False
    assert torch.equal(a.detach()[keep], before_a[keep]) and torch.equal(b.detach()[:, keep], before_b[:, keep])
    assert (a.detach() != before_a)[~keep].all() and (b.detach() != before_b)[:, ~keep].all()


def test_parameters_that_miss_steps_count_their_own():
    """As torch's AdamW, with a state that was loaded on the way: each parameter's bias correction is its own."""
    torch.manual_seed(0)
    start = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    grads = torch.randn(6, 3, 3, 4, dtype=torch.float64)
    outcomes = []
    for kind in (MaskedAdamW, torch.optim.AdamW):
        params = [value.clone().requires_grad_() for value in start]
        optimizer = kind(params, lr=0.1, weight_decay=0.01)
        for number, here in enumerate([(0, 1, 2), (0,), (0, 2), (0, 1, 2), (1,), (0, 1, 2)]):
            for place, param in enumerate(params):
                param.grad = grads[number, place].clone() if place in here else None
            if number == 3:
                held = copy.deepcopy(optimizer.state_dict())
                optimizer = kind(params, lr=0.1, weight_decay=0.01)
                optimizer.load_state_dict(held)
            optimizer.step()
        outcomes.append([*params, *(optimizer.state[param]["step"] for param in params)])
    assert [float(step) for step in outcomes[0][3:]] == [5.0, 4.0, 4.0]
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False)


def test_moments_from_a_file_lie_as_their_parameter():
    """B by columns, moments by rows as a file has them: the same steps to the bit, in the parameter's layout."""
    torch.manual_seed(5)
    start, grads = torch.randn(12, 20), torch.randn(6, 12, 20)
    mask = Mask.experts([False, True, False, True], (5, 5, 5, 5), dim=1)

    def made(values: torch.Tensor) -> tuple[torch.nn.Parameter, MaskedAdamW]:
        param = torch.nn.Parameter(values.t().contiguous().t())
        optimizer = MaskedAdamW([param], lr=0.1, weight_decay=0.1)
        optimizer.set_mask(param, mask)
        return param, optimizer

    def steps(param: torch.nn.Parameter, optimizer: MaskedAdamW, some: torch.Tensor) -> None:
        for grad in some:
            param.grad = grad.t().contiguous().t()
            optimizer.step()

    whole, optimizer = made(start)
    steps(whole, optimizer, grads)
    half, optimizer = made(start)
    steps(half, optimizer, grads[:3])
    state = optimizer.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        assert not state["state"][0][name].is_contiguous()
        state["state"][0][name] = state["state"][0][name].contiguous()
    again, optimizer = made(half.detach())
    optimizer.load_state_dict(state)
    steps(again, optimizer, grads[3:])
    assert torch.equal(again, whole)
    assert optimizer.state[again]["exp_avg"].stride() == again.stride() == (1, 12)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_adamw_goes_on_from_the_state(options, tmp_path):
    """Through a file or not: the steps that torch's own AdamW would have taken from the start."""

    def params():
        return [torch.nn.Parameter(torch.linspace(-1.0, 1.0, size)) for size in (3, 4, 5)]

    def step(optimizer, params, number):
        for place, param in enumerate(params):
            param.grad = torch.full_like(param, 0.1 * (number + 1) * (place - 1.5))
        optimizer.step()

    usual, mine = params(), params()
    theirs, ours = torch.optim.AdamW(usual, lr=0.1), MaskedAdamW(mine, lr=0.1, weight_decay=0.01)
    for number in range(3):
        step(theirs, usual, number)
        step(ours, mine, number)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    for state in (ours.state_dict(), torch.load(tmp_path / "state.pt")):
        copies = [param.detach().clone().requires_grad_() for param in mine]
        other = torch.optim.AdamW(copies, lr=0.1, **options)
        other.load_state_dict(state)
        expected = [param.detach().clone().requires_grad_() for param in usual]
        same = torch.optim.AdamW(expected, lr=0.1)
        same.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for number in range(2):
            step(other, copies, number)
            step(same, expected, number)
        assert [float(other.state[param]["step"]) for param in copies] == [5.0] * 3
        torch.testing.assert_close(copies, expected)
    assert {float(ours.state[param]["step"]) for param in mine} == {3.0}


def test_settings_that_a_group_or_a_file_brings_are_looked_at():
    param = torch.nn.Parameter(torch.ones(3))
    for group, words in (
        ({"betas": (3.0, 1.0)}, "betas must be two numbers"),
        ({"eps": -1.0}, "eps must be >= 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"amsgrad": True}, "amsgrad must be False or absent"),
    ):
        with pytest.raises(ValueError, match=f"MaskedAdamW: {words}"):
            MaskedAdamW([{"params": [param], **group}])
    for option in ("amsgrad", "maximize"):
        state = torch.optim.AdamW([param], **{option: True}).state_dict()
        with pytest.raises(ValueError, match=f"MaskedAdamW: {option} must be False or absent"):
            MaskedAdamW([param]).load_state_dict(state)
    with pytest.raises(TypeError, match=r"params must be floating, got torch.complex64"):
        MaskedAdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match=r"state_dtype must be a floating dtype or None, got torch.int32"):
        MaskedAdamW([param], state_dtype=torch.int32)
