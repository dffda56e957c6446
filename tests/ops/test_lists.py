"""Lists of tensors in C++: work is cut into units, and what changes between two calls is seen."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import Mask, MaskedAdamW, anchor_grad_, ema_update_, importance_update_, masked_adamw_
from mllmcl_kernels.cpu_tables import list_table, look
from mllmcl_kernels.masks import flatten_masks
from mllmcl_kernels.op import REGISTRY, Op
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


SHAPES = [(40, 30), (7,), (1, 5), (5, 1), (0, 3), (), (2, 3, 4)]
#: pairs of lists as they mostly are
USUAL = {
    "by rows": lambda: (draws(0, SHAPES), draws(1, SHAPES)),
    "tuples": lambda: (tuple(draws(0, SHAPES)), tuple(draws(1, SHAPES))),
    "by columns": lambda: (list(map(by_columns, draws(0, SHAPES))), list(map(by_columns, draws(1, SHAPES)))),
    "wide averages": lambda: (draws(0, SHAPES), [t.bfloat16() for t in draws(1, SHAPES)]),
    "half": lambda: ([t.half() for t in draws(0, SHAPES)], [t.half() for t in draws(1, SHAPES)]),
    "parameters": lambda: (draws(0, SHAPES), [torch.nn.Parameter(t) for t in draws(1, SHAPES)]),
}


class Own(torch.Tensor):
    pass


#: pairs of lists that are taken as well, but not at once
UNUSUAL = {
    "read by columns": lambda: ([torch.ones(4, 3)], [by_columns(draws(0, [(4, 3)])[0])]),
    "with gaps": lambda: ([torch.ones(4, 6)[:, ::2]], draws(0, [(4, 3)])),
    "both with gaps": lambda: ([torch.ones(4, 6)[:, ::2]], [torch.zeros(4, 6)[:, ::2]]),
    "two dtypes": lambda: ([torch.ones(3), torch.ones(3).half()], draws(0, [(3,), (3,)])),
    "float64": lambda: ([torch.ones(3).double()], [draws(0, [(3,)])[0].double()]),
    "a subclass": lambda: ([torch.ones(3)], [draws(0, [(3,)])[0].as_subclass(Own)]),
    "no tensors": lambda: ([], []),
}


@pytest.fixture
def ops_called(monkeypatch) -> list[str]:
    """Names of ops that were called, with lists that were looked at in Python."""
    called, call = [], Op.__call__

    def watched(self, *args, **kwargs):
        called.append(self.name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", watched)
    return called


@pytest.mark.parametrize("masks", [None, [None] * len(SHAPES)], ids=["no list of masks", "no mask"])
@pytest.mark.parametrize("make", USUAL.values(), ids=USUAL)
def test_one_look_finds_what_several_find(make, masks):
    averages, params = make()
    table, _held = list_table((averages,), (params,), *flatten_masks("test", averages, None))
    assert torch.equal(look((averages, params), masks), table)


@pytest.mark.parametrize("make", [*USUAL.values(), *UNUSUAL.values()], ids=[*USUAL, *UNUSUAL])
def test_averages_of_usual_lists_are_updated_at_once(make, ops_called):
    """To the bits that the op gives, which is left out; any other lists are left to it."""
    (averages, params), (plain, _) = make(), make()
    versions = [average._version for average in averages]
    ema_update_(averages, params, decay=0.75)
    assert ops_called == ([] if make in USUAL.values() else ["ema_update_"] * bool(averages))
    assert all(average._version > version for average, version in zip(averages, versions, strict=True))
    none = [torch.empty(0, dtype=torch.uint8)] * len(plain), [-3] * len(plain), [0] * len(plain)
    if plain:
        REGISTRY["ema_update_"](list(plain), list(params), [], [], [], *none, 0, 0.25, 1.0, [-3] * len(plain), [])
    assert all(map(torch.equal, averages, plain))


def test_whom_the_call_names_runs_and_who_watches_sees_the_op(ops_called, monkeypatch):
    averages, params = USUAL["by rows"]()

    def called(**options) -> list[str]:
        ops_called.clear()
        ema_update_(averages, params, decay=0.75, **options)
        return list(ops_called)

    assert called(backend="cpp") == []
    assert called(backend="reference") == ["ema_update_"]
    assert called(masks=[*[None] * (len(SHAPES) - 1), Mask.rows(torch.tensor([True, False]))]) == ["ema_update_"]
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'fast'"):
        called(backend="fast")
    monkeypatch.setenv("MLLMCL_BACKEND", "reference")
    assert called() == ["ema_update_"]
    monkeypatch.delenv("MLLMCL_BACKEND")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        called()
    assert any(event.key == "mllmcl::ema_update_" for event in profile.key_averages())


WRONG = (
    (lambda p: [*p[:2], p[2].t(), *p[3:]], None, ValueError, r"params\[2\] must be of averages\[2\]'s shape \[1, 5\]"),
    (lambda p: [*p[:3], p[3].view(5), *p[4:]], None, ValueError, r"params\[3\] must be of averages\[3\]'s shape"),
    (lambda p: [*p[:1], p[1].int(), *p[2:]], None, TypeError, r"params\[1\] must be of dtype"),
    (lambda p: [*p[:1], None, *p[2:]], None, TypeError, r"params\[1\] must be a Tensor, got NoneType"),
    (lambda p: [*p[:1], p[1].to("meta"), *p[2:]], None, ValueError, r"params\[1\] must be on cpu"),
    (lambda p: p[:-1], None, ValueError, "params must be as many as averages = 7, got 6"),
    (lambda p: torch.ones(7), None, TypeError, "params must be a list of tensors, got Tensor"),
    (lambda p: p, [None], ValueError, "masks must be None or one for each of the 7 tensors, got 1"),
    (lambda p: p, [0] * 7, TypeError, r"masks\[0\] must be a Mask or None, got int"),
)


@pytest.mark.parametrize(("change", "masks", "error", "match"), WRONG, ids=[wrong[3][:24] for wrong in WRONG])
def test_what_one_look_refuses_is_told_in_words(change, masks, error, match):
    averages, params = USUAL["by rows"]()
    kept = [average.clone() for average in averages]
    with pytest.raises(error, match=match):
        ema_update_(averages, change(params), decay=0.75, masks=masks)
    assert all(map(torch.equal, averages, kept))
