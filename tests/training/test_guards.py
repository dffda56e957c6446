"""A run that does not train what it says stops, and names what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllmcl.training.guards import Watch, check_finite
from mllmcl_kernels import Mask


def watched(masks=None, shuts_off=False):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return model, trainable, Watch(model, trainable, masks or {}, shuts_off)


def look(watch, trainable, silent=()):
    for _ in range(3):
        for name, value in trainable.items():
            value.grad = torch.zeros_like(value) if name in silent else torch.ones_like(value)
        watch.after_backward()
        more = watch.after_step()
    return more


def test_three_good_steps_end_the_watch():
    _, trainable, watch = watched()
    assert look(watch, trainable) is False


def test_a_method_that_shuts_tensors_off_may_leave_one_without_gradient():
    _, trainable, watch = watched(shuts_off=True)
    assert look(watch, trainable, silent=("1.bias",)) is False


def test_a_tensor_without_gradient_is_named():
    _, trainable, watch = watched()
    with pytest.raises(RuntimeError, match=r"1 trainable tensors had no gradient in 3 steps, e\.g\. 1\.bias"):
        look(watch, trainable, silent={"1.bias"})


def test_a_frozen_tensor_that_moves_is_named():
    model, trainable, watch = watched()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"1 frozen tensors moved in 3 steps, e\.g\. 0\.weight"):
        look(watch, trainable)


def test_a_masked_row_that_moves_is_named():
    rows = Mask.rows(torch.tensor([True, False, True]))
    model, trainable, watch = watched({"1.weight": rows})
    with torch.no_grad():
        model[1].weight[0].add_(1.0)
    assert watch._frozen()["1.weight (masked out)"][0].sum() == 0.0
    with torch.no_grad():
        model[1].weight[1].add_(1.0)
    with pytest.raises(RuntimeError, match=r"1\.weight \(masked out\)"):
        look(watch, trainable)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_step_task_and_samples(value):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 7 of task rs; samples a, b"):
        check_finite(torch.tensor(value), "the loss", 7, "rs", ("a", "b"))
    check_finite(torch.tensor(1.0), "the loss", 7, "rs", ("a", "b"))


def test_a_broken_loss_stops_the_run_before_anything_moves(tmp_path, monkeypatch):
    from mllmcl.models import MLLM

    from .made_up_run import make_run

    original, calls, kept = MLLM.loss, [], {}

    def loss(self, batch):
        calls.append(1)
        kept["now"] = [value.clone() for value in self.trainable_state().values()]
        kept["model"] = self
        return original(self, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(MLLM, "loss", loss)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2 of task t0; samples t0/train/"):
        make_run(tmp_path, "lora")
    after = list(kept["model"].trainable_state().values())
    assert all(torch.equal(one, other) for one, other in zip(kept["now"], after, strict=True))
