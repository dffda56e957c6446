"""`MaskedAdamW` from its third step on: a call prepared once makes the very steps that the op makes."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import Mask, MaskedAdamW
from mllmcl_kernels.op import REGISTRY, Op, Prepared

OP = REGISTRY["masked_adamw_"]
RANKS = (3, 4, 5)
#: beside float32, where there are many dtypes
OTHER = torch.bfloat16

pytestmark = pytest.mark.skipif(isinstance(OP.find("cpp"), str), reason="no C++ library")


@pytest.fixture
def calls(monkeypatch):
    """How the steps were made: "prepared", "refused" by the prepared call, or "op"."""
    made: list[str] = []
    prepared, op = Prepared.__call__, Op.__call__

    def again(self, *args):
        done = prepared(self, *args)
        made.append("prepared" if done else "refused")
        return done

    def usual(self, *args, **kwargs):
        made.append("op")
        return op(self, *args, **kwargs)

    monkeypatch.setattr(Prepared, "__call__", again)
    monkeypatch.setattr(Op, "__call__", usual)
    return made


class Run:
    """Three parameters with masks, one of them by columns, or `many` dtypes, that step along the same gradients."""

    def __init__(self, many: bool = False, device: str = "cpu", **options) -> None:
        draws = torch.Generator().manual_seed(3)
        dtypes = (torch.float32, OTHER if many else torch.float32, torch.float32)
        values = [torch.randn(shape, generator=draws) for shape in ((12, 20), (20, 12), (7,))]
        values[1] = values[1].t().contiguous().t()
        pairs = zip(values, dtypes, strict=True)
        self.params = [torch.nn.Parameter(value.to(device=device, dtype=dtype)) for value, dtype in pairs]
        self.optimizer = MaskedAdamW(self.params, **{"lr": 0.1, "weight_decay": 0.1, **options})
        self.optimizer.set_mask(self.params[0], Mask.experts([False, True, False], RANKS, 0))
        self.optimizer.set_mask(self.params[1], Mask.experts([True, False, True], RANKS, 1))
        self.draws = torch.Generator().manual_seed(4)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for param in self.params:
                drawn = torch.randn(param.shape, generator=self.draws)
                param.grad = torch.empty_like(param).copy_(drawn)
            self.optimizer.step()

    def numbers(self) -> list[torch.Tensor]:
        states = [self.optimizer.state[param] for param in self.params]
        moments = [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
        return [*(param.detach() for param in self.params), *moments]


def assert_same(one: Run, other: Run) -> None:
    for these, those in zip(one.numbers(), other.numbers(), strict=True):
        assert torch.equal(these, those)


def by_the_op(count: int, change=lambda run: None, after: int = 0, **options) -> Run:
    """The same steps with a cohort that is made anew each time, and so never prepared."""
    run = Run(**options)
    for number in range(count):
        if number == after:
            change(run)
        run.optimizer._forget()
        run.step()
    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"max_norm": 0.1}, {"lr": torch.tensor(0.01)}, {"many": True}, {"state_dtype": torch.bfloat16}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_prepared_steps_are_those_of_the_op(options, calls):
    run = Run(**options)
    run.step(6)
    assert calls == ["op", "op"] + 4 * ["prepared"]
    assert_same(run, by_the_op(6, **options))


def test_numbers_may_change_from_step_to_step(calls):
    rates = (0.1, 0.05, 0.2, 0.0, torch.tensor(0.3), 1)

    def walk(run: Run, anew: bool) -> Run:
        for rate in rates:
            run.optimizer.param_groups[0].update(lr=rate, betas=(0.5, 0.9), weight_decay=0.01)
            if anew:
                run.optimizer._forget()
            run.step()
        return run

    run = walk(Run(), anew=False)
    assert calls == ["op", "op"] + 4 * ["prepared"]
    assert_same(run, walk(Run(), anew=True))


def _elsewhere(run: Run) -> None:
    run.params[0].data = run.params[0].data.clone()


def _by_rows(run: Run) -> None:
    run.params[1].data = run.params[1].data.contiguous()


def _moment_elsewhere(run: Run) -> None:
    state = run.optimizer.state[run.params[2]]
    state["exp_avg"].data = state["exp_avg"].data.clone()


def _moment_replaced(run: Run) -> None:
    state = run.optimizer.state[run.params[2]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def _mask_lifted(run: Run) -> None:
    run.optimizer.set_mask(run.params[0], None)


def _loaded(run: Run) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize("change", [_elsewhere, _by_rows, _moment_elsewhere, _moment_replaced, _mask_lifted, _loaded])
def test_what_moved_is_seen(change, calls):
    run = Run()
    run.step(4)
    change(run)
    run.step(4)
    assert calls[2:4] == ["prepared", "prepared"] and calls[4] != "prepared"
    assert_same(run, by_the_op(8, change, after=4))


@pytest.mark.parametrize("from_step", [0, 3])
def test_gradients_by_rows_for_a_parameter_by_columns(from_step, calls):
    def steps(run: Run, anew: bool) -> Run:
        for number in range(6):
            if anew:
                run.optimizer._forget()
            for param in run.params:
                drawn = torch.randn(param.shape, generator=run.draws)
                param.grad = drawn if number >= from_step else torch.empty_like(param).copy_(drawn)
            run.optimizer.step()
        return run

    run = steps(Run(), anew=False)
    assert "prepared" not in calls[from_step:]
    assert_same(run, steps(Run(), anew=True))


def test_the_backend_asked_for_runs(calls, monkeypatch):
    run = Run()
    run.step(3)
    monkeypatch.setenv("MLLMCL_BACKEND", "reference")
    run.step()
    assert calls == ["op", "op", "prepared", "refused", "op"]


def test_without_a_way_to_prepare_it_is_looked_for_once(calls, monkeypatch):
    asked = []
    monkeypatch.setattr(OP, "prepare", lambda *args: asked.append(args))
    Run().step(6)
    assert len(asked) == 1 and calls == 6 * ["op"]


def test_a_profiler_sees_the_op_and_what_was_prepared_stays(calls):
    run = Run()
    run.step(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.step()
    run.step()
    assert calls == ["op", "op", "prepared", "refused", "op", "prepared"]
    assert any(event.key == "mllmcl::masked_adamw_" for event in profile.key_averages())
    assert_same(run, by_the_op(5))


def test_a_graph_that_holds_the_old_values_refuses():
    run = Run()
    run.step(3)
    held = (run.params[0] ** 2).sum()
    run.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_a_subclass_of_tensors_goes_to_the_op(calls):
    class Own(torch.Tensor):
        pass

    run = Run()
    run.step(3)
    for param in run.params:
        param.grad = torch.zeros_like(param).as_subclass(Own)
    run.optimizer.step()
    assert calls[3:] == ["refused", "op"]
