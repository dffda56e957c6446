"""Gates that differ from layer to layer, that mix a router with what is given, or that a layer makes itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllmcl.models import ExpertLinear, ExpertState
from mllmcl.models.experts import select
from mllmcl.models.targets import decoder_layer

from .tiny import fill_experts, make_composed, make_samples


def logits(mllm, samples, gates):
    with torch.no_grad(), mllm.use_experts(gates):
        return mllm.answer_logits(mllm.collate(samples, with_answers=True))


def test_each_group_of_layers_takes_its_own_row():
    """Gates [B, G, E] give in every layer what [B, E] gives there; a row with one expert is taken as that expert."""
    state = ExpertState(ranks=(2, 3), scaling=(0.5, 2.0), trainable=(True, True), groups={"b": 1})
    layers = {name: ExpertLinear(nn.Linear(6, 5), state, name) for name in ("a", "b", "c")}
    for layer in layers.values():
        nn.init.normal_(layer.lora_b)
    x, gates = torch.randn(4, 3, 6), torch.rand(4, 2, 2)
    gates[:, 0] = torch.tensor([0.0, 1.0])
    assert state.num_groups == 2
    selection = select(state, gates, x.device)
    assert [part.uniform for part in selection.groups] == [1, None]
    with state.using(selection):
        found = {name: layer(x) for name, layer in layers.items()}
    for name, group in (("a", 0), ("b", 1), ("c", 0)):
        with state.using(select(state, gates[:, group], x.device)):
            torch.testing.assert_close(found[name], layers[name](x), rtol=1e-5, atol=1e-6)
    assert [part.uniform for part in select(state, gates * 1.5, x.device).groups] == [None, None]
    gates[2, 0] = torch.tensor([1.0, 0.0])
    assert [part.uniform for part in select(state, gates, x.device).groups] == [None, None]
    with pytest.raises(ValueError, match=r"E = 2 and G = 2, got \[4, 3, 2\]"):
        select(state, torch.rand(4, 3, 2), x.device)


def test_groups_mix_in_a_model_and_projector_copies_refuse_them():
    mllm = make_composed().add_experts(3, rank=2, alpha=8)
    fill_experts(mllm)
    mllm.experts.groups = {path: place % 3 for place, path in enumerate(mllm.expert_layers)}
    samples = make_samples("composed")
    gates = torch.rand(8, 3, 3)
    alone = torch.cat([logits(mllm, [sample], gates[at : at + 1]) for at, sample in enumerate(samples)])
    torch.testing.assert_close(logits(mllm, samples, gates), alone, rtol=1e-4, atol=1e-4)
    same = gates[:, :1].expand(8, 3, 3)
    torch.testing.assert_close(logits(mllm, samples, same), logits(mllm, samples, gates[:, 0]))
    answers = mllm.generate(samples, experts=gates, max_new_tokens=3)
    assert answers == [
        mllm.generate([sample], experts=gates[at : at + 1], max_new_tokens=3)[0] for at, sample in enumerate(samples)
    ]
    other = make_composed().add_experts(1, rank=2, alpha=8, projector_experts=True)
    with pytest.raises(ValueError, match="gates have to be expert ids"):
        logits(other, samples, torch.ones(8, 1, 1))


def test_a_share_of_the_learned_router_joins_given_floats():
    state = ExpertState(ranks=(2, 2), scaling=(1.0, 2.0), trainable=(True, True), router="softmax", router_share=0.3)
    layer = ExpertLinear(nn.Linear(6, 5), state, "layer")
    nn.init.normal_(layer.lora_b)
    nn.init.normal_(layer.router_weight)
    x, given = torch.randn(4, 3, 6), torch.rand(4, 2)
    mixed = 0.3 * torch.softmax(x @ layer.router_weight.t(), -1) + 0.7 * given[:, None]
    with state.using(select(state, given, x.device)):
        found = layer(x)
    a, b = layer.lora_a.split(2), layer.lora_b.split(2, 1)
    expected = layer.weight @ x[..., None]
    expected = expected[..., 0] + layer.bias
    for expert in range(2):
        expected = expected + mixed[..., expert, None] * state.scaling[expert] * (x @ a[expert].t() @ b[expert].t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # one expert alone is not taken for the whole answer where a router joins in
    assert select(state, torch.tensor([[[0.0, 1.0]]]), x.device).groups[0].uniform is None
    with state.using(select(state, torch.ones(4, dtype=torch.int64), x.device)):
        ids = layer(x)
    state.router_share = 0.0
    with state.using(select(state, torch.tensor([0.0, 1.0]).expand(4, 2), x.device)):
        torch.testing.assert_close(layer(x), ids)


class Counted(nn.Module):
    """A gating that notes what it is told."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.told = []

    def forward(self, layer, x, selection):
        self.told.append((x.shape[1], selection.prompt_mask, selection.features, selection.memory))
        return self.weight.expand(x.shape[0], 1, 2)


def test_a_gating_is_asked_where_no_gates_are_given_and_trains_with_the_routers():
    mllm = make_composed().add_experts(2, rank=2, alpha=8)
    samples = make_samples("composed")
    fill_experts(mllm)
    plain = logits(mllm, samples, None)
    mllm.experts.sample_features = lambda batch: torch.tensor([[float(len(item.question))] for item in batch])
    for layer in mllm.expert_layers.values():
        layer.gating = Counted()
    path, layer = next(iter(mllm.expert_layers.items()))
    assert torch.equal(logits(mllm, samples, None), plain)
    batch = mllm.collate(samples, with_answers=True)
    (told,) = layer.gating.told
    assert torch.equal(told[1], batch.attention_mask.bool() & (batch.labels == -100)) and told[3] is None
    assert told[2].flatten().tolist() == [len(sample.question) for sample in samples]
    logits(mllm, samples, [0, 1] * 4)
    assert len(layer.gating.told) == 1
    mllm.generate(samples, max_new_tokens=3)
    memories = [told[3] for told in layer.gating.told[1:]]
    assert [told[0] for told in layer.gating.told[2:]] == [1] * (len(memories) - 1)
    assert all(memory is memories[0] for memory in memories) and memories[0] is not None
    assert f"{path}.gating.weight" in mllm.trainable_state()
    assert not mllm.set_trainable([True, True]).expert_layers[path].gating.weight.requires_grad
    assert mllm.set_trainable([True, True], router=True).expert_layers[path].gating.weight.requires_grad


def test_a_router_for_whole_batches_is_asked_batch_by_batch():
    mllm = make_composed().add_experts(2, rank=2, alpha=8)
    asked = []

    def router(samples):
        asked.append([sample.id for sample in samples])
        return torch.ones(len(samples), 2)

    mllm.router = router
    samples = make_samples("composed")
    mllm.generate(samples, max_new_tokens=2, batch_size=3)
    assert [len(ids) for ids in asked] == [8]
    mllm.routes_batches = True
    asked.clear()
    mllm.generate(samples, max_new_tokens=2, batch_size=3)
    assert [len(ids) for ids in asked] == [3, 3, 2]


def test_the_number_of_a_decoder_layer():
    assert decoder_layer("model.language_model.layers.12.mlp.up_proj", "model.language_model") == 12
    assert decoder_layer("language.model.layers.3.mlp.experts.7.up_proj", "language") == 3
    with pytest.raises(ValueError, match="lm_head belongs to no numbered decoder layer"):
        decoder_layer("lm_head", "model")
