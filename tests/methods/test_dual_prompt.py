"""DualPrompt: a step against the paper's formula, keys at test, the layers that have prefixes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from mllmcl import methods
from mllmcl.methods.keys import query

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .boundaries import items
from .soft import answer_labels, cosine, plain_adamw
from .stepping import our_step, prepared


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=8, num_test=4)


def by_cache(mllm, sample, prefixes) -> torch.Tensor:
    """Answer logits of one sample in a plain model whose cache holds the prefix `[2, L, H, d]` of each layer."""
    batch = mllm.collate([sample], with_answers=True)
    cache = DynamicCache()
    for place, both in enumerate(prefixes):
        cache.update(*both.transpose(1, 2)[:, None], place)
    row = mllm.model.embed(batch.input_ids, batch.inputs["image_features"])
    width, length = row.shape[1], prefixes[0].shape[1]
    mask = torch.ones(1, length + width, dtype=torch.int64)
    language = mllm.model.language.model
    hidden = language(
        inputs_embeds=row, position_ids=torch.arange(width)[None], attention_mask=mask, past_key_values=cache
    )
    return mllm.head(hidden.last_hidden_state[0, batch.answer_positions])


def test_one_step_is_the_papers(stream):
    """Both prefixes in front of keys and values, cross entropy and the pull, AdamW on G, E_t and key_t."""
    mllm, method = prepared("dual_prompt", {"length": 3, "general_length": 3, "pull": 0.5}, stream, 1)
    plain = make_composed()
    plain.model.load_state_dict(mllm.model.state_dict(), strict=False)
    plain.model.double().load_state_dict(mllm.model.state_dict(), strict=False)
    general, expert, key = (
        torch.nn.Parameter(value.detach().clone())
        for value in (mllm.prompts.shared[0], mllm.prompts.own[1, 0], method.keys.weight[1])
    )
    samples = list(stream.tasks[1].train[:4])
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    ours = our_step(mllm, method, samples)

    logits = torch.cat([by_cache(plain, sample, [general, expert]) for sample in samples])
    pulls = [1 - cosine(q, key) for q in query(plain, samples).double()]
    loss = F.cross_entropy(logits, answer_labels(plain, samples)) + 0.5 * sum(pulls) / len(pulls)
    plain_adamw(loss, [general, expert, key])

    torch.testing.assert_close(ours, loss.detach(), rtol=1e-8, atol=1e-9)
    own, keys = mllm.prompts.own, method.keys.weight
    for one, grad, other in (
        (mllm.prompts.shared[0], mllm.prompts.shared.grad[0], general),
        (own[1, 0], own.grad[1, 0], expert),
        (keys[1], keys.grad[1], key),
    ):
        torch.testing.assert_close(grad, other.grad, rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    for name, value in mllm.model.named_parameters():
        rest = value[[0, 2]] if name in ("prefixes.own", "prompt_keys.weight") else value
        old = before[name][[0, 2]] if rest is not value else before[name]
        assert torch.equal(rest, old) == (name != "prefixes.shared"), name


def test_the_nearest_key_of_a_known_task_is_taken(stream):
    mllm, method = prepared("dual_prompt", {"length": 1}, stream, 1)
    samples = items(stream)
    assert method.known == 1 and method.route(samples).tolist() == [[0]] * len(samples)
    method.on_task_end(stream.tasks[1])
    with torch.no_grad():
        method.keys.weight[:2] = query(mllm, [samples[0], samples[4]])
        method.keys.weight[2] = query(mllm, [samples[8]])[0]
    ids = method.route(samples)
    expected = [[int(cosine(q, method.keys.weight[0].float()) < cosine(q, method.keys.weight[1].float()))]
                for q in query(mllm, samples)]  # fmt: skip
    assert ids.tolist() == expected and {0, 1} == set(ids.flatten().tolist())


def test_layers_are_shares_of_the_depth_or_as_told(stream):
    mllm, _ = prepared("dual_prompt", {"length": 1}, stream, 0)
    layers = mllm.model.language.model.layers
    assert [layer.self_attn.prefixes[1] for layer in layers] == ["shared", "own"]
    with pytest.raises(ValueError, match=r"expected different numbers in 0\.\.1, got \[1, 2\] and \[0\]"):
        prepared("dual_prompt", {"expert_layers": 2}, stream, 0)
    with pytest.raises(ValueError, match="pull must not be negative, got -1"):
        methods.create("dual_prompt", pull=-1)
