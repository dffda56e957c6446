"""Gemma 3: its processor wants a list of images for each sample."""

from __future__ import annotations

import pytest
import torch
import transformers

from mllmcl import MLLM

from .tiny import LLAVA_TEMPLATE, fill_experts, make_samples, make_tokenizer, text_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Gemma 3 as a user would have it on disk."""
    tokens = make_tokenizer(None)
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<imgtok>"}
    tokens.add_special_tokens({"additional_special_tokens": list(names.values())})
    ids = {name: tokens.convert_tokens_to_ids(token) for name, token in names.items()}
    for name, token in names.items():
        setattr(tokens, name, token)
        setattr(tokens, f"{name}_id", ids[name])
    tokens.init_kwargs.update(**names, model_specific_special_tokens={})
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        text_config={**text_options(tokens), "head_dim": 8, "sliding_window": 16},
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokens,
        image_seq_length=4,
        chat_template=LLAVA_TEMPLATE.replace("<image>\n", "<boi>"),
    )
    path = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_batches_with_and_without_pictures(folder):
    mllm = MLLM.from_pretrained(folder)
    assert mllm.family.name == "gemma3"
    samples = make_samples("llava", 6)
    assert {sample.image is None for sample in samples} == {True, False}
    together = mllm.generate(samples, max_new_tokens=4)
    assert together == [mllm.generate([one], max_new_tokens=4)[0] for one in samples]
    mllm.add_experts(2, 2, 4.0)
    fill_experts(mllm)
    mixed = mllm.generate(samples, [0, 1, -1, 0, 1, -1], max_new_tokens=4)
    assert mixed[2] == together[2] and mixed[5] == together[5]
    mllm.loss(mllm.collate(samples, with_answers=True)).backward()
    assert all(layer.lora_b.grad is not None for layer in mllm.expert_layers.values())
