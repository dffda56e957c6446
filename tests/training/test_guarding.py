"""What a run refuses or survives: numbers that are none, other data in the same folder, samples without a picture."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mllmcl
from mllmcl import methods
from mllmcl.training import TrainConfig
from mllmcl.training.checkpoint import CheckpointError

from ..methods.test_boundaries import learned
from ..models.tiny import make_composed
from .made_up_run import make_stream


def config(folder, **options) -> TrainConfig:
    return TrainConfig(output_dir=folder, **{"max_steps": 2, "progress": "off", "max_new_tokens": 2, **options})


def run(folder, stream, method="lora", mllm=None, **options):
    torch.manual_seed(0)
    return mllmcl.train(mllm or make_composed(), methods.create(method), stream, config(folder, **options))


def with_tasks(stream, change):
    """The stream with every training sample of its first task changed."""
    first, *rest = stream.tasks
    train = [change(sample) for sample in first.train]
    return dataclasses.replace(stream, tasks=(dataclasses.replace(first, train=train), *rest))


def test_a_folder_may_be_a_path_and_holds_what_the_model_was(tmp_path):
    report = run(tmp_path / "run", make_stream())
    assert report.metrics["method"] == "lora" and config(tmp_path).output_dir == str(tmp_path)
    report.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "report.html").is_file()
    last = report.metrics["per_task"]["t0"]
    assert last["bwt"] == last["last"] - last["just_trained"]


@pytest.mark.parametrize("what", ["question", "answer", "image", "weights", "seed of the projector"])
def test_other_data_or_another_model_is_another_run(tmp_path, what):
    stream = make_stream()
    run(tmp_path, stream)
    mllm, other = make_composed(), stream
    if what == "weights":
        with torch.no_grad():
            next(mllm.model.parameters()).add_(1.0)
    elif what == "seed of the projector":
        with torch.no_grad():
            mllm.model.projector.linear_2.bias.add_(0.5)
    elif what == "image":
        other = with_tasks(stream, lambda one: dataclasses.replace(one, image=255 - one.image))
    else:
        other = with_tasks(stream, lambda one: dataclasses.replace(one, **{what: getattr(one, what) + "x"}))
    with pytest.raises(CheckpointError):
        run(tmp_path, other, mllm=mllm)
    assert run(tmp_path, stream).metrics["num_learned"] == len(stream.tasks)


def test_a_gradient_that_is_no_number_moves_nothing_and_is_not_saved(tmp_path, monkeypatch):
    mllm = make_composed()

    class Bad(type(methods.create("lora"))):
        def before_step(self, optimizer):
            held.update({name: value.detach().clone() for name, value in mllm.trained_parameters().items()})
            next(iter(mllm.trained_parameters().values())).grad.view(-1)[0] = float("inf")

    held: dict = {}
    with pytest.raises(FloatingPointError, match="norm of the gradients is inf; nothing moved"):
        mllmcl.train(mllm, Bad(), make_stream(), config(tmp_path, save_steps=1))
    assert held and all(torch.equal(value, held[name]) for name, value in mllm.trained_parameters().items())


def test_arguments_of_train_and_more_than_one_process(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="train: method must be a Method, got str"):
        mllmcl.train(make_composed(), "lora", make_stream(), config(tmp_path))
    stream = make_stream()
    empty = dataclasses.replace(stream, tasks=(dataclasses.replace(stream.tasks[0], train=[]),))
    with pytest.raises(ValueError, match="has no train samples"):
        run(tmp_path, empty)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but RANK, .* is not set; .* started by torchrun"):
        run(tmp_path, make_stream())


def test_a_router_learned_last_does_not_take_the_place_of_the_tasks_expert():
    stream = make_stream()
    mllm, method = learned("mr_lora", stream, tasks=2, router="mllm")
    assert method.acting == method.expert_for(stream.tasks[1]) == 2
    assert mllm.experts.trainable == (False, False, True)


@pytest.mark.parametrize("name", ["mr_lora", "l2p", "cl_moe", "eproj"])
def test_questions_without_a_picture_are_routed_too(name):
    stream = make_stream()
    bare = dataclasses.replace(stream.tasks[0].train[0], id="bare", image=None)
    second = stream.tasks[0].train[1]
    stream = with_tasks(stream, lambda one: dataclasses.replace(one, image=None) if one is second else one)
    mllm, _ = learned(name, stream, tasks=2)
    assert len(mllm.generate([bare, *stream.tasks[0].test[:2]], max_new_tokens=2)) == 3


def test_the_letter_router_takes_samples_of_no_known_task():
    stream = make_stream()
    _, method = learned("mr_lora", stream, tasks=2, router="mllm")
    stranger = dataclasses.replace(stream.tasks[0].test[0], task="")
    assert torch.equal(method.route([stranger]), method.route([stream.tasks[0].test[0]]))
