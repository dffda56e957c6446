"""Layers that are given the same tensor: the same model, fewer passes, and nothing stale."""

from __future__ import annotations

import pytest
import torch

from mllmcl.models import sharing
from mllmcl_kernels import lora_mix_routed_shared, lora_mix_shared

from .test_experts import logits
from .tiny import fill_experts, make_samples


@pytest.fixture
def counts(monkeypatch):
    """How many linears each shared call took."""
    found = []
    for name, op in (("lora_mix_shared", lora_mix_shared), ("lora_mix_routed_shared", lora_mix_routed_shared)):

        def counted(x, weight, *args, op=op, **options):
            found.append(len(weight))
            return op(x, weight, *args, **options)

        monkeypatch.setattr(sharing, name, counted)
    return found


def learn(mllm, batch, gates):
    """The loss and the gradient of everything that trains."""
    with mllm.use_experts(gates):
        loss = mllm.loss(batch)
    leaves = [value for value in mllm.model.parameters() if value.requires_grad]
    return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


GATES = {
    "none": None,
    "one expert": [1] * 8,
    "ids": [0, 1, 2, -1] * 2,
    "floats": torch.tensor([0.5, 0.2, 0.3]),
}


def check_sharing(mllm, samples, counts, gates, router=None):
    mllm.add_experts(3, rank=[2, 3, 1], alpha=6, dropout=0.0, router=router)
    fill_experts(mllm)
    batch = mllm.collate(samples, with_answers=True)
    alone = learn(mllm, batch, gates)
    assert not counts
    together = learn(mllm.share_inputs(), batch, gates)
    # two decoder layers
    assert counts == [3, 2] * 2
    for ours, other in zip(together, alone, strict=True):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-5 * max(1.0, scale))
    assert torch.equal(learn(mllm.share_inputs(False), batch, gates)[0], alone[0])
    assert len(counts) == 4


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("router", [None, "softmax", "cosine"])
def test_sharing_is_the_same_model(build, counts, kind, router):
    if router is None or kind in ("none", "floats"):
        check_sharing(build("llava"), make_samples("llava"), counts, GATES[kind], router)


def test_sharing_in_every_family(mllm, samples, counts):
    check_sharing(mllm, samples, counts, GATES["ids"])


def test_the_base_alone_has_nothing_to_share(mllm, samples, counts):
    mllm.add_experts(3, rank=2, alpha=6)
    assert torch.equal(logits(mllm, samples, "off"), logits(mllm.share_inputs(), samples, "off"))
    assert not counts


def test_experts_to_come_share_as_well(mllm, samples, counts):
    mllm.share_inputs().add_experts(1, rank=2, alpha=4, targets=["q_proj", "v_proj", "up_proj"])
    logits(mllm, samples, None)
    assert counts == [2] * 2
    mllm.grow_experts(2)
    logits(mllm, samples, [0, 1] * 4)
    assert counts == [2] * 4


def test_routings_are_kept_of_every_layer(mllm, samples):
    mllm.share_inputs().add_experts(3, rank=2, alpha=4, router="softmax", router_top_k=2)
    with torch.no_grad(), mllm.experts.collecting():
        mllm.answer_logits(mllm.collate(samples, with_answers=True))
        together = mllm.experts.loads()
    mllm.share_inputs(False)
    with torch.no_grad(), mllm.experts.collecting():
        mllm.answer_logits(mllm.collate(samples, with_answers=True))
        alone = mllm.experts.loads()
    assert together.keys() == alone.keys() == mllm.expert_layers.keys()
    assert all(torch.equal(load, alone[path]) for path, load in together.items())


def test_recomputed_layers_give_the_same_gradients(mllm, samples):
    mllm.share_inputs().add_experts(2, rank=2, alpha=4, dropout=0.3).train()
    fill_experts(mllm)
    batch = mllm.collate(samples, with_answers=True)
    torch.manual_seed(3)
    plain = learn(mllm, batch, [0, 1] * 4)
    mllm.enable_checkpointing()
    torch.manual_seed(3)
    for ours, other in zip(learn(mllm, batch, [0, 1] * 4), plain, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


@pytest.fixture
def attention(build):
    """q, k and v of a layer that share, and an input."""
    mllm = build("llava").share_inputs().add_experts(2, rank=2, alpha=4, dropout=0.0)
    fill_experts(mllm)
    layers = [layer for path, layer in mllm.expert_layers.items() if ".layers.0.self_attn" in path]
    q, k, v = (next(layer for layer in layers if layer.path.endswith(name)) for name in ("q_proj", "k_proj", "v_proj"))
    return mllm, q, k, v, torch.randn(1, 3, q.in_features)


def alone(layer, x):
    together, layer.shared_input = layer.shared_input, None
    try:
        return layer(x)
    finally:
        layer.shared_input = together


CHANGES = {
    "a weight": lambda mllm, k, x: k.lora_b.detach().mul_(2.0),
    "the input": lambda mllm, k, x: x.mul_(2.0),
    "the experts that act": lambda mllm, k, x: mllm.experts.settle(1),
    "gradients": lambda mllm, k, x: torch.set_grad_enabled(False),
    "training mode": lambda mllm, k, x: mllm.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_waits_is_not_given_out_after_a_change(attention, change):
    """q computes k and v as well; what changes in between makes k compute anew."""
    mllm, q, k, _, x = attention
    try:
        q(x)
        before = alone(k, x).detach().clone()
        CHANGES[change](mllm, k, x)
        found = k(x)
        torch.testing.assert_close(found, alone(k, x))
        assert found.requires_grad == torch.is_grad_enabled()
        assert change in ("gradients", "training mode") or not torch.allclose(found, before)
    finally:
        torch.set_grad_enabled(True)


def test_layers_with_other_inputs_stop_sharing(attention, counts):
    """As in attention over another sequence: k and v are given what q is not."""
    _, q, k, v, x = attention
    other = torch.randn_like(x)
    for _ in range(2):
        torch.testing.assert_close(q(x), alone(q, x))
        torch.testing.assert_close(k(other), alone(k, other))
        torch.testing.assert_close(v(other), alone(v, other))
    assert counts == [3]


def test_nothing_is_held_once_all_are_called(attention):
    _, q, k, v, x = attention
    outputs = [q(x), k(x), v(x)]
    assert q.shared_input._x is None and not q.shared_input._waiting
    for layer, y in zip((q, k, v), outputs, strict=True):
        torch.testing.assert_close(y, alone(layer, x))
    # called the other way round each computes for itself
    torch.testing.assert_close(v(x), alone(v, x))
    torch.testing.assert_close(k(x), alone(k, x))


def test_a_compiled_model_does_not_share(attention, counts):
    _, q, k, v, x = attention
    torch.compiler.reset()
    step = torch.compile(lambda x: (q(x), k(x), v(x)), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(x), tuple(alone(layer, x) for layer in (q, k, v)))
    assert not counts
    torch.compiler.reset()
