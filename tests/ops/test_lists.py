"""Lists of tensors in C++: work is cut into units, and what changes between two calls is seen."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import Mask, MaskedAdamW, anchor_grad_, ema_update_, importance_update_, masked_adamw_
from mllmcl_kernels.masks import flatten_masks
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import excess

pytestmark = pytest.mark.skipif(isinstance(REGISTRY["masked_adamw_"].find("cpp"), str), reason="nothing was compiled")


def draws(seed: int, shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def large_tensors_and_masks():
    """Blocks of a row mask below and above the length of a unit, runs that end anywhere, none, single rows."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape, share=0.3):
        return torch.rand(shape, generator=generator) < share

    ends = torch.arange(110) % 100 > 5
    return [
        ((60, 700), Mask.rows(some(60), 0)),
        ((110, 700), Mask.rows(ends, 0)),
        ((60, 700), Mask.rows(some(700), 1)),
        ((2, 90, 501), Mask.rows(some(90, share=0.9), 1)),
        ((40001,), Mask.rows(torch.arange(40001) % 2 == 0, 0)),
        ((600, 64), Mask.experts(torch.arange(8) == 3, (8,) * 8, 1)),
        ((90, 7), Mask.rows(torch.zeros(7, dtype=torch.bool), 1)),
        ((33, 1001), Mask.elements(some(33, 1001))),
        ((33, 1001), Mask.owner((4 * torch.rand(33, 1001, generator=generator)).to(torch.uint8), 2)),
        ((70, 500), None),
    ]


CALLS = {
    "masked_adamw_": lambda a, b, c, d, masks, backend: masked_adamw_(
        a, b, c, d, masks, step=3, lr=0.1, weight_decay=0.1, backend=backend
    ),
    "ema_update_": lambda a, b, c, d, masks, backend: ema_update_(a, b, decay=0.9, masks=masks, backend=backend),
    "importance_update_": lambda a, b, c, d, masks, backend: importance_update_(
        a, b, count=3, masks=masks, backend=backend
    ),
    "anchor_grad_": lambda a, b, c, d, masks, backend: anchor_grad_(
        a, b, c, d, strength=0.5, masks=masks, backend=backend
    ),
}


def by_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


@pytest.mark.parametrize("by", ["rows", "columns", "columns, read by rows"])
@pytest.mark.parametrize("name", CALLS)
def test_units_cover_what_may_change_and_nothing_else(name, by):
    """Each entry once, as tensors lie; frozen ones bit for bit, with NaN where the update reads."""
    shapes, masks = zip(*large_tensors_and_masks(), strict=True)
    lists = [draws(seed, shapes) for seed in range(4)]
    if by != "rows":
        # AdamW reads gradients alone, the others write the first list alone
        rest = {1} if name == "masked_adamw_" else {1, 2, 3}
        lay = [place for place in range(4) if by == "columns" or place not in rest]
        lists = [list(map(by_columns, ts)) if place in lay else ts for place, ts in enumerate(lists)]
    lists[3] = [tensor.abs() for tensor in lists[3]]
    frozen = [
        torch.zeros(shape, dtype=torch.bool) if mask is None else ~mask.expand(shape).expand(shape)
        for shape, mask in zip(shapes, masks, strict=True)
    ]
    for tensor, where in zip(lists[1], frozen, strict=True):
        tensor[where] = float("nan")
    mine, plain = ([[t.clone() for t in tensors] for tensors in lists] for _ in range(2))
    truth = [[t.double() for t in tensors] for tensors in lists]
    CALLS[name](*mine, masks, "cpp")
    CALLS[name](*plain, masks, "reference")
    CALLS[name](*truth, masks, "reference")
    for found, usual, true, before in zip(mine, plain, truth, lists, strict=True):
        for now, old, where in zip(found, before, frozen, strict=True):
            assert torch.equal(now[where].view(torch.int32), old[where].view(torch.int32)), now.shape
        free = [torch.cat([t[~where] for t, where in zip(ts, frozen, strict=True)]) for ts in (found, usual, true)]
        off = excess(*free)
        assert off.passes, off


def test_an_optimizer_sees_tensors_masks_and_states_that_were_replaced():
    """Memory that moved, another dtype, strided gradients, a state put in, a mask set and lifted: as torch steps."""
    start = draws(0, [(40, 30), (30, 40), (7,)])
    grads = [draws(seed, [(40, 30), (30, 40), (7,)]) for seed in range(1, 7)]
    outcomes = []
    for kind in (MaskedAdamW, torch.optim.AdamW):
        params = [value.clone().requires_grad_() for value in start]
        optimizer = kind(params, lr=0.1, weight_decay=0.01)
        for number, here in enumerate(grads):
            for param, grad in zip(params, here, strict=True):
                param.grad = grad.to(param.dtype).clone()
            if number == 1:
                params[0].data = params[0].data.clone()
            if number == 2:
                params[1].grad = params[1].grad.t().contiguous().t()
            if number == 3:
                for param in params:
                    state = optimizer.state[param]
                    state["exp_avg"] = 2 * state["exp_avg"]
            if number == 4:
                optimizer.state[params[2]] = {key: value.clone() for key, value in optimizer.state[params[2]].items()}
                optimizer.state[params[2]]["exp_avg_sq"] *= 4
            if number == 5:
                # transposed, as a view of the same memory
                param, state = params[1], optimizer.state[params[1]]
                param.data = param.data.view(40, 30)
                param.grad = here[1].view(40, 30).clone()
                state.update({key: state[key].view(40, 30) for key in ("exp_avg", "exp_avg_sq")})
            kept = params[0].detach()[0].clone()
            if number in (2, 3) and kind is MaskedAdamW:
                optimizer.set_mask(params[0], Mask.rows(torch.arange(40) != 0) if number == 2 else None)
            optimizer.step()
            if number == 2 and kind is MaskedAdamW:
                assert torch.equal(params[0].detach()[0], kept)
        outcomes.append(params)
    for ours, theirs, rows in zip(*outcomes, (slice(1, None), slice(None), slice(None)), strict=True):
        torch.testing.assert_close(ours.detach()[rows], theirs.detach()[rows], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_never_reaches_memory():
    """Called past the public functions: lists and masks of other sizes are refused."""
    p, g, m, v = ([torch.ones(4, 2)] for _ in range(4))
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.1, 1.0)]
    op, rest = REGISTRY["masked_adamw_"], (*numbers, 0.9, 0.999, 1e-8, 0.0)
    with pytest.raises(ValueError, match="tensors must be of one size at each place"):
        op(p, g, [torch.ones(3, 2)], v, *flatten_masks("test", p, None), *rest, backend="cpp")
    for mask, kind in ((torch.ones(3), 0), (torch.ones(2), 0), (torch.ones(4, 3), -2), (torch.ones(4, 1), -1)):
        with pytest.raises(ValueError, match="masks must be uint8 and fit their tensors"):
            op(p, g, m, v, [mask.to(torch.uint8)], [kind], [1], *rest, backend="cpp")
    with pytest.raises(ValueError, match="masks must be uint8"):
        op(p, g, m, v, [torch.ones(4, 2)], [-2], [1], *rest, backend="cpp")
    assert torch.equal(p[0], torch.ones(4, 2))
