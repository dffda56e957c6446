"""Qwen2-VL and Qwen2.5-VL: images of any size, packed; positions on three axes; the projector is the merger."""

from __future__ import annotations

from .base import Family, three_axis_positions

IMAGE_TOKEN = "<|image_pad|>"


class QwenImageTextProcessor:
    """Tokenizer and image processor of a Qwen-VL checkpoint, called as transformers' own processor is.

    That class cannot be made without its video half, which needs torchvision; images need neither.
    """

    def __init__(self, image_processor, tokenizer):
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def apply_chat_template(self, messages: list, **options) -> str:
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, *, text: list[str], images: list | None = None, return_tensors: str = "pt", **options) -> dict:
        """Token ids with each image placeholder repeated as often as its image has merged patches, and the images."""
        inputs: dict = {}
        counts = iter(())
        if images:
            inputs = dict(self.image_processor(images, return_tensors=return_tensors))
            counts = iter((inputs["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist())
        texts = []
        for item in text:
            first, *rest = item.split(IMAGE_TOKEN)
            texts.append(first + "".join(IMAGE_TOKEN * next(counts) + part for part in rest))
        inputs.update(self.tokenizer(texts, return_tensors=return_tensors, **options))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token_id).long()
        return inputs


def load_processor(name_or_folder) -> QwenImageTextProcessor:
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    return QwenImageTextProcessor(AutoImageProcessor.from_pretrained(name_or_folder), tokenizer)


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    language=("model.language_model",),
    vision=("model.visual",),
    projector=("model.visual.merger",),
    processor=load_processor,
    positions=three_axis_positions,
)
