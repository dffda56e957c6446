"""The plain side of methods that keep the old model as a second expert."""

from __future__ import annotations

import copy

import torch

from .plain import make_plain, one
from .stepping import our_step, prepared


def in_second_task(name: str, options: dict, stream):
    """A method in its second task with projectors that differ; plain copies of new, old and base model."""
    mllm, method = prepared(name, options, stream, 1)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in mllm.projector_layers.values():
            for stack in (layer.expert_weight, layer.expert_bias):
                stack.add_(0.1 * torch.randn(stack.shape, generator=generator))
    return mllm, method, *(plain_of(mllm, expert) for expert in (0, 1, -1))


def plain_of(mllm, expert: int):
    """A model with this expert alone; -1 is the base."""
    plain = copy.deepcopy(mllm)
    base = [(layer.weight.data, layer.bias.data) for layer in plain.projector_layers.values()]
    paths = list(plain.projector_layers)
    make_plain(plain, [expert == 0, False], one(expert), max(expert, 0))
    if expert < 0:
        for path, (weight, bias) in zip(paths, base, strict=True):
            layer = plain.model.get_submodule(path)
            layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return plain.eval()


def rows_of(model, samples):
    """Of each sample alone: its batch, the projector's output `[P, D]` and the last hidden states `[S, D]`."""
    found = []
    for sample in samples:
        seen = []
        module = model.model.get_submodule(model.projector_path)
        hook = module.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output[0]))
        batch = model.collate([sample], with_answers=True)
        found.append((batch, seen, model.hidden_states(batch)[0]))
        hook.remove()
    return [(batch, seen[0], hidden) for batch, seen, hidden in found]


def same_step(mllm, method, samples, plain, loss) -> None:
    """Loss, gradients and a step of expert 0 are those of the plain model; the old one stays bit for bit."""
    layers = [(layer, plain.model.get_submodule(path)) for path, layer in mllm.expert_layers.items()]
    copies = [(layer, plain.model.get_submodule(path)) for path, layer in mllm.projector_layers.items()]
    theirs = [value for _, other in layers for value in (other.a[0], other.b[0])]
    theirs += [value for _, other in copies for value in (other.weight, other.bias)]
    for value, grad in zip(theirs, torch.autograd.grad(loss, theirs), strict=True):
        value.grad = grad
    torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1).step()
    rows, old = mllm.experts.rows(0), mllm.experts.rows(1)
    before = {name: value.detach().clone() for name, value in mllm.trainable_state().items()}
    torch.testing.assert_close(our_step(mllm, method, samples), loss.detach(), rtol=1e-6, atol=1e-7)
    ours, grads = [], []
    for layer, _ in layers:
        ours += [layer.lora_a[rows], layer.lora_b[:, rows]]
        grads += [layer.lora_a.grad[rows], layer.lora_b.grad[:, rows]]
        assert torch.equal(layer.lora_a[old], before[f"{layer.path}.lora_a"][old])
        assert torch.equal(layer.lora_b[:, old], before[f"{layer.path}.lora_b"][:, old])
    for layer, _ in copies:
        ours += [layer.expert_weight[0], layer.expert_bias[0]]
        grads += [layer.expert_weight.grad[0], layer.expert_bias.grad[0]]
        assert torch.equal(layer.expert_weight[1], before[f"{layer.path}.expert_weight"][1])
    # norms of the tower are float32, and samples alone are rounded otherwise than in a padded batch
    for mine, grad, other in zip(ours, grads, theirs, strict=True):
        torch.testing.assert_close(grad, other.grad, rtol=1e-4, atol=2e-7)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)
