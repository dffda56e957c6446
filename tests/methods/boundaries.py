"""Methods that have ended some tasks, what a checkpoint holds of them, and what they answer."""

from __future__ import annotations

import json

import torch

from mllmcl import methods

from ..models.tiny import make_composed
from .stepping import trainable


def learned(name: str, stream, tasks: int = 3, **options):
    """A method that has ended some tasks; everything that trained in them was moved."""
    torch.manual_seed(0)
    mllm = make_composed()
    method = methods.create(name, **options)
    method.setup(mllm, stream)
    generator = torch.Generator().manual_seed(3)
    for task in stream.tasks[:tasks]:
        method.on_task_start(task)
        for phase in method.phases(task):
            method.on_phase_start(task, phase)
            with torch.no_grad():
                for value in trainable(mllm).values():
                    value.add_(torch.randn(value.shape, generator=generator) * 0.1)
        method.on_task_end(task)
    return mllm.eval(), method


def stored(mllm, method) -> dict:
    """What a checkpoint of the training loop holds of model and method, copied."""
    model = {**mllm.trainable_state(), **{name: value.detach() for name, value in trainable(mllm).items()}}
    groups = {"model": model, "method": method.state_tensors()}
    tensors = {group: {name: value.clone() for name, value in named.items()} for group, named in groups.items()}
    return {**tensors, "values": json.loads(json.dumps(method.state_values()))}


def restore(mllm, method, held: dict) -> None:
    parameters = dict(mllm.model.named_parameters())
    with torch.no_grad():
        for name, value in held["model"].items():
            parameters[name].copy_(value)
    method.load_state(held["method"], held["values"])


def items(stream, count=4):
    return [sample for task in stream.tasks for sample in task.test[:count]]


@torch.no_grad()
def routed_logits(mllm, samples) -> torch.Tensor:
    """Logits of the answers, with the experts and soft prompts that the routers choose."""
    gates = None if mllm.router is None else mllm.router(samples)
    prompts = None if mllm.prompt_router is None else mllm.prompt_router(samples)
    with mllm.use_experts(gates), mllm.use_prompts(prompts):
        return mllm.answer_logits(mllm.collate(samples, with_answers=True))
