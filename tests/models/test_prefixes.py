"""Prefixes: the numbers of a cache that held them, mixed batches, checkpointing, save and load."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from .test_prompts import logits, mixed_ids, relative
from .tiny import Item, make_samples


@pytest.fixture
def prefixed(mllm):
    """Four prefixes of length 3 in layer 1, a shared one of length 2 in layer 0."""
    return mllm.add_prefixes(4, 3, [1], shared_length=2, shared_layers=[0])


def test_they_are_what_a_cache_would_hold(mllm, build, family):
    """Logits and gradients equal those of a plain model whose cache was filled with the prefixes, of one length."""
    mllm.add_prefixes(3, 2, [1], shared_length=4, shared_layers=[0])
    plain = build(family)
    for model in (mllm, plain):
        model.model.double()
    sample = Item(id="t", question="what is it", answer="yes no")
    batch = mllm.collate([sample], with_answers=True)
    with mllm.use_prompts([[2, 0]]):
        ours = mllm.answer_logits(batch)
    bank = mllm.prompts
    layers = [bank.shared[0], torch.cat([bank.own[2, 0], bank.own[0, 0]], dim=1)]
    cache = DynamicCache()
    for place, both in enumerate(layers):
        cache.update(*both.transpose(1, 2)[:, None], place)
    width = batch.input_ids.shape[1]
    hidden = plain.model.get_submodule(plain.language_path)(
        inputs_embeds=plain.model.get_input_embeddings()(batch.input_ids),
        position_ids=torch.arange(width)[None],
        attention_mask=torch.ones(1, 4 + width, dtype=torch.int64),
        past_key_values=cache,
    )
    theirs = plain.head(hidden.last_hidden_state[0, batch.answer_positions])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    moving = [bank.own, bank.shared]
    grads = [torch.autograd.grad(F.cross_entropy(found, batch.answer_labels), moving) for found in (ours, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
    assert not grads[0][0][1].any() and grads[0][0][[0, 2]].flatten(1).any(1).all()


def test_without_ids_the_model_is_the_base(prefixed, build, family, samples):
    plain = build(family)
    torch.testing.assert_close(logits(prefixed, samples, None), logits(plain, samples, None), rtol=1e-4, atol=1e-4)
    none = [[-1]] * len(samples)
    torch.testing.assert_close(logits(prefixed, samples, none), logits(plain, samples, None), rtol=1e-4, atol=1e-4)
    assert prefixed.generate(samples, max_new_tokens=4) == plain.generate(samples, max_new_tokens=4)


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(prefixed, samples):
    ids = mixed_ids(len(samples))
    together = logits(prefixed, samples, ids)
    alone = torch.cat([logits(prefixed, [s], [[one for one in row if one >= 0] or [-1]])
                       for s, row in zip(samples, ids.tolist(), strict=True)])  # fmt: skip
    assert relative(together, alone) < 1e-4
    assert relative(together, logits(prefixed, samples, None)) > 0.1
    answers = prefixed.generate(samples, prompts=ids, max_new_tokens=5, batch_size=3)
    assert answers == [
        prefixed.generate([s], prompts=ids[i : i + 1], max_new_tokens=5)[0] for i, s in enumerate(samples)
    ]
    assert answers != prefixed.generate(samples, max_new_tokens=5)


def test_checkpointing_gives_the_same_gradients_after_the_context_has_ended(prefixed, samples):
    grads = []
    for _ in range(2):
        prefixed.train()
        with prefixed.use_prompts(mixed_ids(len(samples))):
            loss = prefixed.loss(prefixed.collate(samples, with_answers=True))
        loss.backward()
        grads.append([value.grad.clone() for value in prefixed.prompts.parameters()])
        prefixed.model.zero_grad(set_to_none=True)
        prefixed.enable_checkpointing()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


def test_what_is_saved_brings_a_fresh_bank_to_the_same_logits(prefixed, build, family, samples):
    other = build(family)
    torch.manual_seed(7)
    other.add_prefixes(4, 3, [1], shared_length=2, shared_layers=[0])
    ids = mixed_ids(len(samples))
    assert not torch.equal(logits(other, samples, ids), logits(prefixed, samples, ids))
    other.load_trainable_state(prefixed.trainable_state())
    assert torch.equal(logits(other, samples, ids), logits(prefixed, samples, ids))
    assert {"prefixes.own", "prefixes.shared"} <= set(prefixed.trainable_state())


def test_wrong_prefixes_are_refused(build):
    for layers, shared in (([2], []), ([], [0]), ([0, 1], [1]), ([-1], [])):
        with pytest.raises(ValueError, match=r"expected different numbers in 0\.\.1, got"):
            build("composed").add_prefixes(2, 1, layers, shared_layers=shared)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        build("composed").add_prefixes(2, 0, [0])
    mllm = build("composed").add_prefixes(2, 1, [0])
    samples = make_samples("composed", 2)
    with pytest.raises(ValueError, match="each of 2 samples, got 1"), mllm.use_prompts([0]):
        mllm.loss(mllm.collate(samples, with_answers=True))
