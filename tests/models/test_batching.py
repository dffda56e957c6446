"""A batch gives each sample what it gets alone: logits, answers, experts."""

import pytest
import torch

from mllmcl.models import MLLM
from mllmcl.models.batch import IGNORE

from .tiny import LLAVA_TEMPLATE, fill_experts, make_samples, save_llava


def relative(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


def test_answer_logits_of_a_batch_equal_those_alone(mllm, samples):
    with torch.no_grad():
        together = mllm.answer_logits(mllm.collate(samples, with_answers=True))
        alone = torch.cat([mllm.answer_logits(mllm.collate([sample], with_answers=True)) for sample in samples])
    assert together.shape == alone.shape
    assert relative(together, alone) < 1e-4


def test_answers_of_a_batch_equal_those_alone(mllm, samples):
    alone = [mllm.generate([sample], max_new_tokens=6)[0] for sample in samples]
    assert mllm.generate(samples, max_new_tokens=6, batch_size=3) == alone
    assert mllm.generate(samples, max_new_tokens=6) == alone
    assert len(set(alone)) > 3, "the tiny model says the same to everything, so this test shows nothing"


def test_labels_are_the_answer_and_the_end(mllm, samples):
    batch = mllm.collate(samples, with_answers=True)
    for row, sample in enumerate(samples):
        labels = batch.labels[row]
        tokens = labels[labels != IGNORE]
        assert tokens[-1] == mllm.tokenizer.eos_token_id
        assert mllm.tokenizer.decode(tokens[:-1]).strip() == sample.answer
        assert torch.equal(batch.input_ids[row][labels != IGNORE], tokens)
    flat = batch.labels[:, 1:].flatten()
    assert torch.equal(flat[flat != IGNORE], batch.answer_labels)
    # the position before each label predicts it
    shifted = torch.zeros_like(batch.labels, dtype=torch.bool)
    shifted[:, :-1] = batch.labels[:, 1:] != IGNORE
    assert torch.equal(shifted.flatten().nonzero().flatten(), batch.answer_positions)


def test_a_prompt_for_training_is_the_prompt_for_generation(mllm, samples):
    train, test = mllm.collate(samples, with_answers=True), mllm.collate(samples, with_answers=False)
    for row in range(len(samples)):
        is_prompt = (train.labels[row] == IGNORE) & train.attention_mask[row].bool()
        assert torch.equal(train.input_ids[row][is_prompt], test.input_ids[row][test.attention_mask[row].bool()])
    assert bool(test.attention_mask[:, -1].all()), "generation pads on the left"
    assert bool(train.attention_mask[:, 0].all()), "training pads on the right"


def test_loss_is_the_mean_over_answer_tokens_of_the_whole_model(folders):
    mllm, samples = MLLM.from_pretrained(folders / "llava"), make_samples("llava")
    batch = mllm.collate(samples, with_answers=True)
    with torch.no_grad():
        want = mllm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.inputs["pixel_values"],
            labels=batch.labels,
        ).loss
        have = mllm.loss(batch)
    assert have.dtype == torch.float32
    assert relative(have, want) < 1e-5


def test_generate_equals_the_one_of_transformers(build, samples, family):
    if family == "composed":
        pytest.skip("transformers has no such model")
    mllm = build(family)
    ours = mllm.generate(samples, max_new_tokens=8)
    for sample, text in zip(samples, ours, strict=True):
        image = sample.load_image()
        prompt = mllm.family.prompt(mllm, sample.question, image is not None)
        inputs = mllm.processor(text=[prompt], images=None if image is None else [image], return_tensors="pt")
        tokens = mllm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert mllm.tokenizer.decode(new, skip_special_tokens=True).strip() == text


def test_a_batch_mixes_experts(mllm, samples):
    mllm.add_experts(3, rank=[2, 4, 2], alpha=8, dropout=0.0)
    fill_experts(mllm)
    ids = [0, 1, 2, -1, 2, 1, 0, -1]
    alone = [mllm.generate([s], [e], max_new_tokens=6)[0] for s, e in zip(samples, ids, strict=True)]
    assert mllm.generate(samples, ids, max_new_tokens=6) == alone
    assert alone != mllm.generate(samples, "off", max_new_tokens=6)
    with torch.no_grad():
        with mllm.use_experts(ids):
            together = mllm.answer_logits(mllm.collate(samples, with_answers=True))
        rows = []
        for sample, expert in zip(samples, ids, strict=True):
            with mllm.use_experts([expert]):
                rows.append(mllm.answer_logits(mllm.collate([sample], with_answers=True)))
    assert relative(together, torch.cat(rows)) < 1e-4


def test_generate_follows_the_router(mllm, samples):
    mllm.add_experts(2, rank=2, alpha=8, dropout=0.0)
    fill_experts(mllm)
    ids = torch.tensor([0, 1] * 4)
    mllm.router = lambda given: ids[[int(sample.id[1:]) for sample in given]]
    assert mllm.generate(samples, max_new_tokens=5) == mllm.generate(samples, ids, max_new_tokens=5)
    assert mllm.generate(samples[::-1], max_new_tokens=5) == mllm.generate(samples, ids, max_new_tokens=5)[::-1]
    with mllm.use_experts("off"):
        assert mllm.generate(samples, "current", max_new_tokens=5) == mllm.generate(samples, "off", max_new_tokens=5)
    with pytest.raises(ValueError, match="one row for each of 8 samples, got 2"):
        mllm.generate(samples, [0, 1])


def test_generation_leaves_the_mode_as_it_was(mllm, samples):
    mllm.train()
    mllm.generate(samples[:2], max_new_tokens=2)
    assert mllm.model.training
    mllm.eval()
    mllm.generate(samples[:2], max_new_tokens=2)
    assert not mllm.model.training


def test_rows_end_at_the_end_token(mllm, samples):
    """A model whose head prefers the end token says nothing, and stops."""
    calls = 0

    class AlwaysEnds(torch.nn.Module):
        weight = mllm.head.weight

        def forward(self, hidden):
            nonlocal calls
            calls += 1
            logits = torch.zeros(*hidden.shape[:-1], self.weight.shape[0])
            logits[..., mllm.tokenizer.eos_token_id] = 1
            return logits

    mllm.head = AlwaysEnds()
    assert mllm.generate(samples, max_new_tokens=9) == [""] * len(samples)
    assert calls == 1


def test_llava_without_a_template_has_the_vicuna_prompt(tmp_path):
    save_llava(tmp_path, template=None)
    bare, full = MLLM.from_pretrained(tmp_path), LLAVA_TEMPLATE
    assert bare.family.prompt(bare, "q", True) == "USER: <image>\nq ASSISTANT:"
    bare.processor.chat_template = full
    assert bare.family.prompt(bare, "q", True) == "USER: <image>\nq ASSISTANT:"


def test_no_samples_is_an_error(mllm):
    with pytest.raises(ValueError, match="at least one"):
        mllm.collate([], with_answers=True)


def test_positions_count_from_the_first_real_token(mllm, samples):
    """Rotary models give the same answer from a shifted start, so the outputs alone would not show it."""
    batch = mllm.collate(samples, with_answers=False)
    for row in range(len(samples)):
        positions = batch.position_ids[..., row, :][..., batch.attention_mask[row].bool()]
        alone = mllm.collate([samples[row]], with_answers=False).position_ids[..., 0, :]
        assert torch.equal(positions, alone)
        assert int(positions.min()) == 0 and not bool(positions[..., 0].any())


def test_qwen_images_have_three_axes(build):
    """An image's rows and columns count on their own axes, and the text after it goes on from the largest."""
    mllm, (sample, *_) = build("qwen2_5_vl"), make_samples("qwen2_5_vl")
    batch = mllm.collate([sample], with_answers=False)
    _, height, width = (batch.inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    assert height != width
    at_image = batch.input_ids[0] == mllm.model.config.image_token_id
    assert int(at_image.sum()) == height * width
    start = int(at_image.nonzero()[0])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    want = torch.stack((torch.zeros_like(rows), rows, columns)).flatten(1) + start
    assert torch.equal(batch.position_ids[:, 0, at_image], want)
    after = batch.position_ids[:, 0, start + height * width :]
    assert torch.equal(after, (start + max(height, width) + torch.arange(after.shape[1])).expand(3, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # a number of tokens that is never reached decoded without an end
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected an integer, got 1.5"),
        ({"batch_size": "all"}, "batch_size: expected an integer, got 'all'"),
        ({"experts": ["a", "b"]}, r"experts: expected ids, floats or None, got \['a', 'b'\]"),
        ({"experts": {}}, "experts: expected ids, floats or None, got {}"),
    ],
)
def test_what_is_no_number_or_id_is_refused(build, options, message):
    mllm = build("composed").add_experts(2, rank=2, alpha=4)
    with pytest.raises(TypeError, match=message):
        mllm.generate(make_samples("composed", 2), **options)


def test_what_is_no_list_of_samples_is_refused(build):
    mllm, samples = build("composed"), make_samples("composed", 2)
    for wrong, kind in ((samples[0], "Item"), ("what", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"samples: expected a list of samples, got {kind}"):
            mllm.generate(wrong)


def test_a_router_may_answer_with_a_list(build):
    mllm, samples = build("composed").add_experts(2, rank=2, alpha=4), make_samples("composed", 3)
    fill_experts(mllm)
    mllm.router = lambda some: [1, 0, -1]
    assert mllm.generate(samples, max_new_tokens=4) == mllm.generate(samples, [1, 0, -1], max_new_tokens=4)
