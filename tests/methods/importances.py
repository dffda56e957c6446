"""The plain side of methods with importances: gradients sample by sample, a pull by autograd."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .plain import equal, make_plain
from .stepping import fill, our_step, plain_loss, plain_step, prepared, same_lora, trainable


def in_halves(plain) -> dict[str, Tensor]:
    """Parameters of a plain model with one expert by the names that ours have."""
    found = {}
    for name, value in trainable(plain).items():
        if ".base." in name:
            continue
        found[name.replace(".a.0", ".lora_a").replace(".b.0", ".lora_b")] = value
    return found


def squared_gradients(plain, samples) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of a sample's answer loss."""
    return mean_over(plain, samples, lambda sample: plain_loss(plain, [sample]), torch.square)


def output_gradients(plain, samples) -> dict[str, Tensor]:
    """Mean over samples of the absolute gradient of the mean square of a sample's answer logits."""

    def output(sample):
        logits = plain.answer_logits(plain.collate([sample], with_answers=True))
        return sum((row @ row) / len(row) for row in logits) / len(logits)

    return mean_over(plain, samples, output, torch.abs)


def mean_over(plain, samples, loss_of, size) -> dict[str, Tensor]:
    plain.eval()
    params = in_halves(plain)
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for sample in samples:
        for name, grad in zip(params, torch.autograd.grad(loss_of(sample), list(params.values())), strict=True):
            total[name] += size(grad) / len(samples)
    return total


def made_plain(mllm):
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    return plain


def two_tasks(name: str, options: dict, stream, measure):
    """A method in its third task, and of both old ones what `measure(plain, samples)` gave, and the parameters."""
    mllm, method = prepared(name, options, stream, 0)
    history = []
    generator = torch.Generator().manual_seed(5)
    for place in range(2):
        count = method.importance_samples
        samples = [stream.tasks[place].train[at * len(stream.tasks[place].train) // count] for at in range(count)]
        plain = made_plain(mllm)
        values = {key: value.detach().clone() for key, value in in_halves(plain).items()}
        history.append((measure(plain, samples), values))
        method.on_task_end(stream.tasks[place])
        method.on_task_start(stream.tasks[place + 1])
        fill(mllm, generator)
    return mllm, method, history


def same_step(mllm, method, samples, penalty) -> None:
    """One step is that of a plain model with `penalty(parameters)` in its loss."""
    plain = made_plain(mllm)
    answer = plain_loss(plain.train(), samples)
    plain_step(plain, answer + penalty(in_halves(plain)))
    torch.testing.assert_close(our_step(mllm, method, samples), answer.detach(), rtol=1e-10, atol=1e-12)
    same_lora(mllm, plain)
