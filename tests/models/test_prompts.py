"""Soft prompts: a row with them is the row a plain model would be given; batches mix; what is saved comes back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .tiny import Item, make_samples


@pytest.fixture
def prompted(mllm):
    mllm.add_prompts(4, 3)
    with torch.no_grad():
        mllm.prompts.weight.normal_(0.0, 0.5)
    return mllm


def mixed_ids(num: int) -> torch.Tensor:
    """Two prompts, one, none, and one behind nothing."""
    return torch.tensor([[0, 1], [-1, 2], [-1, -1], [3, -1]]).repeat(-(-num // 4), 1)[:num]


def logits(mllm, samples, ids) -> torch.Tensor:
    with torch.no_grad(), mllm.use_prompts(ids):
        return mllm.answer_logits(mllm.collate(samples, with_answers=True))


def relative(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


def by_hand(mllm, sample: Item, ids: list[int]) -> torch.Tensor:
    """Logits of a text-only sample from the embeddings of its tokens with the soft tokens between them."""
    batch = mllm.collate([sample], with_answers=True)
    embeddings = mllm.model.get_input_embeddings()(batch.input_ids[0])
    at = int(batch.input_ids[0, 0] == mllm.tokenizer.bos_token_id)
    soft = [mllm.prompts.weight[place] for place in ids]
    row = torch.cat([embeddings[:at], *soft, embeddings[at:]])[None]
    positions = torch.arange(row.shape[1])[None]
    language = mllm.model.get_submodule(mllm.language_path)
    hidden = language(inputs_embeds=row, position_ids=positions, attention_mask=torch.ones_like(positions))
    return mllm.head(hidden.last_hidden_state[0, batch.answer_positions + 3 * len(ids)])


def test_the_tokens_stand_behind_the_start_and_carry_gradients(prompted, family):
    """Logits and gradients of the bank equal those of a row that is put together by hand."""
    prompted.model.double()
    sample = Item(id="t", question="what is it", answer="yes no")
    batch = prompted.collate([sample], with_answers=True)
    with prompted.use_prompts([[2, 0]]):
        ours = prompted.answer_logits(batch)
    theirs = by_hand(prompted, sample, [2, 0])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = prompted.prompts.weight
    grads = [torch.autograd.grad(F.cross_entropy(found, batch.answer_labels), weight)[0] for found in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-12)
    assert grads[0][[0, 2]].abs().amin(1).gt(0).all() and not grads[0][[1, 3]].any()


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(prompted, samples):
    ids = mixed_ids(len(samples))
    together = logits(prompted, samples, ids)
    alone = torch.cat(
        [logits(prompted, [sample], [[one for one in row if one >= 0] or [-1]])
         for sample, row in zip(samples, ids.tolist(), strict=True)]
    )  # fmt: skip
    assert relative(together, alone) < 1e-4
    assert relative(together, logits(prompted, samples, None)) > 0.1


def test_answers_of_a_mixed_batch_equal_those_alone(prompted, samples):
    ids = mixed_ids(len(samples))
    answers = prompted.generate(samples, prompts=ids, max_new_tokens=6, batch_size=3)
    alone = [prompted.generate([s], prompts=ids[i : i + 1], max_new_tokens=6)[0] for i, s in enumerate(samples)]
    plain = prompted.generate(samples, max_new_tokens=6)
    assert answers == alone and answers != plain
    prompted.prompt_router = lambda asked: ids[[samples.index(sample) for sample in asked]]
    assert prompted.generate(samples, max_new_tokens=6) == answers
    assert prompted.generate(samples, prompts=None, max_new_tokens=6) == plain


def test_decoding_continues_what_the_whole_row_says(prompted, samples):
    """The first answer token of a generation is the one that the training forward finds most likely."""
    ids = mixed_ids(len(samples))
    asked = [Item(id=s.id, question=s.question, answer="x", image=s.image) for s in samples]
    found = logits(prompted, asked, ids)
    first = found.view(len(samples), -1, found.shape[-1])[:, 0].argmax(-1)
    told = prompted.generate(samples, prompts=ids, max_new_tokens=1)
    ends = set(prompted.end_ids.tolist())
    assert told == [
        "" if int(token) in ends else prompted.tokenizer.decode([int(token)], skip_special_tokens=True).strip()
        for token in first
    ]


def test_checkpointing_gives_the_same_gradients(prompted, samples):
    grads = []
    for _ in range(2):
        prompted.train()
        with prompted.use_prompts(mixed_ids(len(samples))):
            prompted.loss(prompted.collate(samples, with_answers=True)).backward()
        grads.append(prompted.prompts.weight.grad.clone())
        prompted.prompts.weight.grad = None
        prompted.enable_checkpointing()
    torch.testing.assert_close(*grads)
    assert grads[0].flatten(1).any(1).all()


def test_what_is_saved_brings_a_fresh_bank_to_the_same_logits(prompted, build, family, samples):
    other = build(family).add_prompts(4, 3)
    ids = mixed_ids(len(samples))
    assert not torch.equal(logits(other, samples, ids), logits(prompted, samples, ids))
    assert "soft_prompts.weight" in prompted.trainable_state()
    other.load_trainable_state(prompted.trainable_state())
    assert torch.equal(logits(other, samples, ids), logits(prompted, samples, ids))


def test_new_prompts_are_tokens_of_the_vocabulary(build, family):
    mllm = build(family).add_prompts(2, 5)
    table = mllm.model.get_input_embeddings().weight
    assert bool((mllm.prompts.weight[:, :, None] == table).all(-1).any(-1).all())
    assert "soft_prompts: SoftPrompts" in mllm.describe()


def test_wrong_prompts_are_refused(build):
    mllm = build("composed")
    samples = make_samples("composed", 2)
    with (
        pytest.raises(ValueError, match="there are none, call add_prompts or add_pref"),
        mllm.use_prompts([0]),
    ):
        pass
    mllm.add_prompts(2, 1)
    for ids, error, match in (
        ([2], ValueError, r"ids in -1\.\.1, got 2"),
        ([[0, -2]], ValueError, r"ids in -1\.\.1, got -2"),
        ([0.5], TypeError, "integer ids, got torch.float32"),
        ([[[0]]], ValueError, r"\[B\] or \[B, k\], got \[1, 1, 1\]"),
    ):
        with pytest.raises(error, match=match), mllm.use_prompts(ids):
            pass
    with pytest.raises(ValueError, match="each of 2 samples, got 1"), mllm.use_prompts([0]):
        mllm.loss(mllm.collate(samples, with_answers=True))
    with pytest.raises(ValueError, match=r"each of 2 samples, got \[1\]"):
        mllm.generate(samples, prompts=[0])
    with pytest.raises(ValueError, match="expected \"route\", ids or None, got 'here'"):
        mllm.generate(samples, prompts="here")
    with pytest.raises(ValueError, match="has 'soft_prompts' already"):
        mllm.add_prompts(2, 1)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        build("composed").add_prompts(2, 0)
