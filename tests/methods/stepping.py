"""One optimizer step of a method as the loop takes it, and of a plain model, to be compared."""

from __future__ import annotations

import contextlib

import torch

from mllmcl import methods
from mllmcl_kernels import MaskedAdamW

from ..models.tiny import make_composed

#: every method, and options that make it another
EVERY = [(name, {}) for name in methods.available()] + [
    ("mr_lora", {"router": "oracle"}),
    ("mr_lora", {"router": "mllm", "router_epochs": 1.0}),
    ("der_pp", {"capacity": 12}),
    ("msgm", {"share": 0.25}),
    ("llaca", {"reuse_above": 0.0}),
]
#: every method that can do as public code does, so that it does
LEGACY = [(name, {"legacy": True}) for name, found in methods.available().items() if hasattr(found, "legacy")]


def prepared(name: str, options: dict, stream, task: int):
    """A float64 model with the method in it, standing in a task, B and routers not zero; earlier tasks have ended."""
    torch.manual_seed(0)
    mllm = make_composed()
    has_experts = issubclass(methods.find(name), methods.base.LoraMethod)
    method = methods.create(name, **options, **({"dropout": 0.0} if has_experts else {}))
    method.setup(mllm, stream)
    mllm.model.double()
    generator = torch.Generator().manual_seed(1)
    for place in range(task + 1):
        method.on_task_start(stream.tasks[place])
        fill(mllm, generator)
        if place < task:
            method.on_task_end(stream.tasks[place])
    return mllm, method


@torch.no_grad()
def fill(mllm, generator: torch.Generator) -> None:
    """Random B and routers."""
    for layer in mllm.expert_layers.values():
        layer.lora_b.copy_(0.3 * torch.randn(layer.lora_b.shape, generator=generator))
        if layer.router_weight is not None:
            layer.router_weight.copy_(0.5 * torch.randn(layer.router_weight.shape, generator=generator))


def trainable(mllm) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in mllm.model.named_parameters() if value.requires_grad}


def our_step(mllm, method, samples, lr: float = 0.01) -> torch.Tensor:
    """All hooks of a step; the gradients stay."""
    optimizer = MaskedAdamW(trainable(mllm).values(), lr=lr, weight_decay=0.1)
    for name, mask in method.parameter_masks().items():
        if name in trainable(mllm):
            optimizer.set_mask(trainable(mllm)[name], mask)
    mllm.train()
    batch = mllm.collate(samples, with_answers=True)
    with method.before_forward(samples):
        loss = method.loss(batch, method.answer_loss(batch))
        loss.backward()
    method.before_step(optimizer)
    optimizer.step()
    method.after_step(optimizer)
    return loss.detach()


def plain_loss(mllm, samples) -> torch.Tensor:
    return mllm.loss(mllm.collate(samples, with_answers=True))


def plain_step(mllm, loss: torch.Tensor, change=None, lr: float = 0.01) -> torch.Tensor:
    """AdamW on a loss; `change` is given the parameters that have gradients before the step."""
    params = list(trainable(mllm).values())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.1)
    loss.backward()
    if change is not None:
        change([param for param in params if param.grad is not None])
    optimizer.step()
    return loss.detach()


def same_lora(mllm, plain, rtol: float = 1e-8) -> None:
    """Every gradient and every parameter of experts and shared projector are those of the plain model."""
    for path, layer in mllm.expert_layers.items():
        other = plain.model.get_submodule(path)
        for ours, parts, dim in ((layer.lora_a, other.a, 0), (layer.lora_b, other.b, 1)):
            torch.testing.assert_close(
                ours.grad, torch.cat([part.grad for part in parts], dim), rtol=rtol, atol=1e-4 * rtol
            )
            torch.testing.assert_close(ours, torch.cat(list(parts), dim), rtol=10 * rtol, atol=0.1 * rtol)
    projectors = (model.model.get_submodule(model.projector_path).parameters() for model in (mllm, plain))
    for ours, theirs in zip(*projectors, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=1e-4 * rtol)
        torch.testing.assert_close(ours, theirs, rtol=10 * rtol, atol=0.1 * rtol)


@contextlib.contextmanager
def recorded_draws(method):
    """The samples of every draw from the method's buffer within the context, in order."""
    draws, original = [], method.draw

    def draw(*args):
        samples, places = original(*args)
        draws.append(samples)
        return samples, places

    method.draw = draw
    yield draws
    del method.draw
