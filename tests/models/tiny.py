"""Tiny models with random weights, saved to a folder and loaded as a user would."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from mllmcl.models import MLLM

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|user|>",
    "<|assistant|>",
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|user|>{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system words\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Item:
    """What models need of a sample."""

    id: str
    question: str
    answer: str = ""
    image: object = None
    task: str = "task"
    metadata: dict = field(default_factory=dict)

    def load_image(self):
        return None if self.image is None else Image.fromarray(self.image)


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[3:])})
    return fast


def text_options(tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # a tiny random model draws the same few tokens from everything; wider weights make it answer differently
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }


def save_llava(folder, template: str | None = LLAVA_TEMPLATE) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_options(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_resize=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)


def save_qwen(folder) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **text_options(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    Qwen2VLImageProcessor(**sizes).save_pretrained(folder)
    make_tokenizer(QWEN_TEMPLATE).save_pretrained(folder)


class PatchMeans(nn.Module):
    """A vision encoder that is a linear map of 7 x 7 patches."""

    hidden_size, image_size = 12, 14

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, self.hidden_size, 7, 7)
        self.num_images = 0

    def preprocess(self, images):
        arrays = [np.asarray(image.resize((14, 14)), dtype=np.float32) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255

    def forward(self, pixel_values):
        self.num_images += len(pixel_values)
        return self.conv(pixel_values).flatten(2).transpose(1, 2)


def make_composed() -> MLLM:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    language = LlamaForCausalLM(LlamaConfig(**text_options(tokenizer))).eval()
    mllm = MLLM.compose(vision=PatchMeans(), language=language, tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in mllm.model.projector.parameters():
            parameter.mul_(4.0)
    return mllm


def make_samples(family: str, num: int = 8) -> list[Item]:
    """Questions and answers of unequal length; images of unequal size, and one sample without an image."""
    generator = np.random.default_rng(0)
    items = []
    for index in range(num):
        size = (16 + 8 * (index % 3), 24) if family == "qwen2_5_vl" else (28, 28)
        image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        items.append(
            Item(
                id=f"s{index}",
                question="what is it" + " then" * (index % 4),
                answer="yes no maybe"[: 2 + 3 * (index % 4)].strip(),
                image=None if index == 5 else image,
            )
        )
    return items


def fill_experts(mllm: MLLM, seed: int = 1, scale: float = 0.3) -> None:
    """Random B, routers and projector copies, so that every expert is a different model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in mllm.trainable_state().items():
            if not name.endswith("lora_a") and ("lora_b" in name or "router" in name or "expert_" in name):
                value.add_(torch.randn(value.shape, generator=generator) * scale)
