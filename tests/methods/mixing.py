"""What the tests of methods with mixed experts share: learned models, logits of batches, runs that are cut off."""

from __future__ import annotations

import pytest
import torch

from mllmcl import methods
from mllmcl.training import loop

from ..models.tiny import make_composed
from ..training.made_up_run import make_run
from ..training.test_loop import same_end


def learned(name: str, stream, tasks: int = 3, before_end=None, **options):
    """A method that has ended some tasks without training, with experts and routers that differ.

    Args:
        before_end: called with the method before the end of each task.
    """
    torch.manual_seed(0)
    mllm = make_composed()
    method = methods.create(name, **options)
    method.setup(mllm, stream)
    generator = torch.Generator().manual_seed(3)
    for task in stream.tasks[:tasks]:
        method.on_task_start(task)
        with torch.no_grad():
            for key, value in mllm.trainable_state().items():
                if not key.endswith("lora_a") and not key.startswith(mllm.projector_path):
                    value.add_(torch.randn(value.shape, generator=generator) * 0.2)
        if before_end is not None:
            before_end(method)
        method.on_task_end(task)
    return mllm.eval(), method


def items(stream, count: int = 2) -> list:
    """Test samples of all tasks, one task after the other."""
    return [sample for task in stream.tasks for sample in task.test[:count]]


@torch.no_grad()
def routed_logits(mllm, samples) -> torch.Tensor:
    """Logits of the answers as a batch, with the gates the router gives."""
    gates = None if mllm.router is None else mllm.router(samples)
    with mllm.use_experts(gates):
        return mllm.answer_logits(mllm.collate(samples, with_answers=True))


def same_alone_and_mixed(mllm, samples) -> None:
    """A batch gives each sample what it gets alone: logits and decoded answers."""
    alone = torch.cat([routed_logits(mllm, [sample]) for sample in samples])
    torch.testing.assert_close(routed_logits(mllm, samples), alone, rtol=1e-4, atol=1e-4)
    answers = [mllm.generate([sample], max_new_tokens=4)[0] for sample in samples]
    assert mllm.generate(samples, max_new_tokens=4) == answers


def reloaded(name: str, stream, mllm, method, **options):
    """A fresh model and method with the state of others."""
    other, fresh = learned(name, stream, tasks=0, **options)
    while other.experts.num_experts < mllm.experts.num_experts:
        other.grow_experts(1)
    other.load_trainable_state(mllm.trainable_state())
    fresh.load_state({key: value.clone() for key, value in method.state_tensors().items()}, method.state_values())
    return other.eval(), fresh


class CutError(Exception):
    """What stands for a killed process."""


def survives_cuts(
    folder, name: str, options: dict, cuts=(("_step", 5), ("write_adapters", 2), ("predict", 2)), **config
) -> None:
    """A run that is cut off in a phase, at a task's end and in evaluation ends as one that is not.

    Args:
        cuts: name of a function of the loop, and the call before which the run stops. config: of the run.
    """
    make_run(folder / "whole", name, options, **config)
    for where, count in cuts:
        owner = loop.records if hasattr(loop.records, where) else loop
        original = getattr(owner, where)
        calls = []

        def cut(*args, original=original, calls=calls, count=count, **kwargs):
            calls.append(None)
            if len(calls) == count:
                raise CutError
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(CutError):
            patch.setattr(owner, where, cut)
            make_run(folder / "cut", name, options, **config)
    make_run(folder / "cut", name, options, **config)
    same_end(folder / "whole", folder / "cut")
