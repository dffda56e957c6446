"""`lora_mix_shared` and `lora_mix_routed_shared` against the ops of one linear, called one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mllmcl_kernels import lora_mix, lora_mix_routed, lora_mix_routed_shared, lora_mix_shared
from mllmcl_kernels.op import REGISTRY

from .test_torch_compile import compiled, fresh_graphs  # noqa: F401 (the fixture)

BACKENDS = ["reference"] + (["cpp"] if not isinstance(REGISTRY["lora_mix"].find("cpp"), str) else [])
B, S, K, RANKS, OUTS = 4, 12, 24, (3, 4, 5), (20, 12, 8)
E, L = len(RANKS), len(OUTS)
KINDS = ("weight", "bias", "lora_a", "lora_b", "router_weight", "router_bias")
OPTIONS = {"ranks": RANKS, "scaling": (1.0, 0.5, 2.0), "trainable": (True, False, True)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def layers(seed=0, dtype=torch.float32) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """x [B, S, K] and by kind the tensors of every linear, all of which want a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    total = sum(RANKS)
    shapes = [((out, K), (out,), (total, K), (out, total), (E, K), (E,)) for out in OUTS]
    stacks = {kind: [normal(*shape[place]) for shape in shapes] for place, kind in enumerate(KINDS)}
    return normal(B, S, K), stacks


def mix_layers(stacks, at: int) -> list:
    return [stacks[kind][at] for kind in KINDS[:4]]


def close(ours, theirs, tolerance=2e-6):
    """Equal up to another order of sums, whose error grows with the largest entries."""
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)


def outcome(found, leaves):
    """Outputs and the gradient of every leaf, zeros where there is none."""
    generator = torch.Generator().manual_seed(1)
    total = sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in found)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in found), *grads]


def compare(run_shared, run_each, leaves, tolerance=2e-6):
    ours, theirs = outcome(run_shared(), leaves), outcome(run_each(), leaves)
    assert sum(float(grad.abs().sum()) > 0 for grad in theirs[L:]) >= 2 * L
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        close(mine, other, tolerance)


GATES = {
    "none": lambda: None,
    "of the batch": lambda: torch.rand(E, requires_grad=True),
    "of samples": lambda: torch.rand(B, 1, E, requires_grad=True),
    "of each linear": lambda: [torch.rand(B, S, E, requires_grad=True) for _ in range(L)],
    "of each linear, other rows": lambda: [torch.rand(B, rows, E, requires_grad=True) for rows in (1, S, 1)],
    "in half precision": lambda: torch.rand(B, 1, E, dtype=torch.bfloat16, requires_grad=True),
    "ids of samples": lambda: torch.tensor([[0], [2], [-1], [1]]),
    "ids of tokens, each linear": lambda: [torch.randint(-1, E, (B, S)) for _ in range(L)],
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_equals_one_call_for_each_linear(kind, backend, autocast):
    torch.manual_seed(0)
    (x, stacks), gates = layers(), GATES[kind]()
    each = gates if isinstance(gates, list) else [gates] * L
    given = [gate for gate in (gates if isinstance(gates, list) else [gates]) if gate is not None]
    leaves = [x, *(one for kind in KINDS[:4] for one in stacks[kind]), *(g for g in given if g.requires_grad)]
    options = OPTIONS | {"backend": backend}

    def shared():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return lora_mix_shared(x, *(stacks[kind] for kind in KINDS[:4]), gates, **options)

    def one_by_one():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [lora_mix(x, *mix_layers(stacks, at), each[at], **options) for at in range(L)]

    # bfloat16 rounds each of three gradients before they are added up
    compare(shared, one_by_one, leaves, 0.02 if autocast or "half" in kind else 2e-6)


CHOICES = {
    "dense": {},
    "top 2": {"top_k": 2, "renormalize": True},
    "sigmoid": {"top_k": 1, "score": "sigmoid", "temperature": 0.5},
    "cosine": {"score": "cosine", "top_k": 2},
    "mask of each token": {"expert_mask": torch.arange(B * S).view(B, S, 1) % E != torch.arange(E), "top_k": 2},
    "straight through": {"straight_through": True, "top_k": 1},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_routers_equal_one_call_for_each_linear(choice, backend):
    """y, gates and losses of the routings, and all gradients; padding counts in no statistic."""
    x, stacks = layers()
    leaves = [x, *(one for kind in KINDS for one in stacks[kind])]
    options = OPTIONS | CHOICES[choice] | {"backend": backend, "token_mask": torch.arange(S) < S - 2}

    def results(y, routings):
        losses = [routing.balance_loss() + routing.z_loss() + routing.entropy() for routing in routings]
        return [*y, *(routing.gates for routing in routings), torch.stack(losses)]

    def shared():
        return results(*lora_mix_routed_shared(x, *(stacks[kind] for kind in KINDS), **options))

    def one_by_one():
        found = [lora_mix_routed(x, *(stacks[kind][at] for kind in KINDS), **options) for at in range(L)]
        return results(*zip(*found, strict=True))

    compare(shared, one_by_one, leaves)


def test_an_output_that_nobody_uses(backend):
    """Its linear gets zeros, the others what they get without it."""
    x, stacks = layers()
    y = lora_mix_shared(x, *(stacks[kind] for kind in KINDS[:4]), torch.ones(E), **OPTIONS, backend=backend)
    leaves = [x, *(one for kind in KINDS[:4] for one in stacks[kind])]
    found = torch.autograd.grad(y[0].sum(), leaves, allow_unused=True, materialize_grads=True)
    alone = lora_mix(x, *mix_layers(stacks, 0), torch.ones(E), **OPTIONS, backend=backend)
    wanted = torch.autograd.grad(alone.sum(), [x, *mix_layers(stacks, 0)])
    for mine, other in zip([found[0], *found[1::L]], wanted, strict=True):
        close(mine, other)
    assert not any(grad.any() for place in (2, 3) for grad in found[place::L])


@pytest.mark.parametrize("some", [[0], [0, 2]])
def test_biases_and_gradients_of_some_linears(some, backend):
    """A bias that is None beside others, and parameters that want no gradient beside others that do."""
    x, stacks = layers()
    stacks["bias"] = [one if at in some else None for at, one in enumerate(stacks["bias"])]
    for at in some:
        stacks["lora_a"][at].requires_grad_(False)
        stacks["weight"][at].requires_grad_(False)
    leaves = [one for kind in KINDS[:4] for one in stacks[kind] if one is not None and one.requires_grad]

    def shared():
        return lora_mix_shared(x, *(stacks[kind] for kind in KINDS[:4]), None, **OPTIONS, backend=backend)

    def one_by_one():
        return [lora_mix(x, *mix_layers(stacks, at), None, **OPTIONS, backend=backend) for at in range(L)]

    compare(shared, one_by_one, leaves)


def test_dropout_is_one_mask_for_all(backend):
    """Linears with the same A see the same entries dropped, and a seed brings them back."""
    x, stacks = layers()
    stacks["lora_a"] = [stacks["lora_a"][0]] * L
    stacks["lora_b"] = [stacks["lora_b"][0][:8]] * L
    stacks["weight"] = [torch.zeros(8, K)] * L

    def run(seed):
        torch.manual_seed(seed)
        tensors = (stacks[kind] for kind in ("weight", "lora_a", "lora_b"))
        weight, a, b = tensors
        return lora_mix_shared(x, weight, None, a, b, ranks=RANKS, dropout=0.5, backend=backend)

    first, again, other = run(0), run(0), run(1)
    close(first[1], first[0])
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self, routed: bool):
        super().__init__()
        _, stacks = layers()
        self.routed = routed
        for kind, tensors in stacks.items():
            setattr(self, kind, nn.ParameterList(tensors))

    def forward(self, x, gates):
        kinds = [list(getattr(self, kind)) for kind in KINDS]
        if not self.routed:
            q, k, v = lora_mix_shared(x, *kinds[:4], gates, **OPTIONS)
            return q.sum(-1) * k.sum(-1) + v.sum(-1)
        (q, k, v), routings = lora_mix_routed_shared(x, *kinds, top_k=2, token_mask=gates, **OPTIONS)
        return q.sum(-1) * k.sum(-1) + v.sum(-1) + sum(routing.balance_loss() for routing in routings)


def slopes(run, module, x, gates) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x, gates)
    y.square().sum().backward()
    zero = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x, *module.parameters())]
    return [y.detach(), *zero]


@pytest.mark.parametrize("routed", [False, True])
def test_in_one_graph_and_under_checkpointing(routed):
    """One compilation for every choice; recomputed activations give the same bits."""
    module = Attention(routed)
    step, counter = compiled(module)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(B, S, K)
        gates = torch.rand(B, S) < 0.8 if routed else torch.rand(B, S, E)
        plain = slopes(module, module, x, gates)
        for ours, theirs in zip(slopes(step, module, x, gates), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        again = slopes(lambda x, gates: checkpoint(module, x, gates, use_reentrant=False), module, x, gates)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))
    assert counter.frame_count == 1
