"""What a model family answers: where its towers are, and how samples become the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..batch import Encoded, text_positions

__all__ = ["Family", "chat_prompt", "encode", "first_module", "processor_inputs", "three_axis_positions"]

#: outputs of a processor that are one value for each token
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")


def first_module(model: nn.Module, paths: Sequence[str]) -> str | None:
    """The first of `paths` that names a module of `model`."""
    have = {name for name, _ in model.named_modules()}
    return next((path for path in paths if path in have), None)


def load_processor(name_or_folder):
    """The processor that transformers has for this checkpoint."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(name_or_folder)


def chat_prompt(mllm, question: str, has_image: bool) -> str:
    """The prompt through the chat template of the model's processor."""
    content = [{"type": "image"}] if has_image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if mllm.processor.chat_template is None:
        raise ValueError(
            f"{type(mllm.processor).__name__} has no chat_template, "
            f"and the family {mllm.family.name!r} no prompt of its own"
        )
    return mllm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def processor_inputs(mllm, samples: Sequence, prompt: Callable) -> tuple[dict, list]:
    """What the processor makes of the samples, right padded, and the loaded images."""
    loaded = [sample.load_image() for sample in samples]
    texts = [prompt(mllm, sample.question, image is not None) for sample, image in zip(samples, loaded, strict=True)]
    images = [image for image in loaded if image is not None]
    listed = [[] if image is None else [image] for image in loaded] if mllm.family.lists_images else images
    # templates write the start token themselves
    start = mllm.tokenizer.bos_token
    options = {"add_special_tokens": False} if start and texts[0].startswith(start) else {}
    outputs = mllm.processor(
        text=texts,
        images=listed if images else None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        **options,
    )
    return dict(outputs), images


def encode(mllm, samples: Sequence) -> Encoded:
    """Prompts and image inputs through the model's own processor."""
    outputs, _ = processor_inputs(mllm, samples, mllm.family.prompt)
    keep = [row.bool() for row in outputs.pop("attention_mask")]
    ids = [row[mask].tolist() for row, mask in zip(outputs.pop("input_ids"), keep, strict=True)]
    extras = {
        name: [row[mask].tolist() for row, mask in zip(outputs.pop(name), keep, strict=True)]
        for name in TOKEN_INPUTS
        if name in outputs
    }
    images = {
        name: value.to(mllm.dtype) if value.is_floating_point() else value
        for name, value in outputs.items()
        if isinstance(value, Tensor)
    }
    return Encoded(ids=ids, images=images, token_extras=extras)


def _text_positions(mllm, batch_inputs: dict[str, Tensor], attention_mask: Tensor) -> Tensor:
    return text_positions(attention_mask)


def _captured_projector_input(mllm, samples: Sequence) -> list[Tensor]:
    """What the projector is given for each image, caught on its way in; `[P, d]` each."""
    path = mllm.projector_path
    if path is None:
        raise ValueError(f"the family {mllm.family.name!r} finds no projector, so it has no vision features to show")
    outputs, images = processor_inputs(mllm, samples, mllm.family.prompt)
    caught: list[Tensor] = []
    hook = mllm.model.get_submodule(path).register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    keep = {name: value.to(mllm.device) for name, value in outputs.items() if isinstance(value, Tensor)}
    keep = {name: value for name, value in keep.items() if name not in ("input_ids", "attention_mask", *TOKEN_INPUTS)}
    keep["pixel_values"] = keep["pixel_values"].to(mllm.dtype)
    try:
        with mllm.base_model_only():
            mllm.trunk.get_image_features(**keep)
    finally:
        hook.remove()
    (features,) = caught
    if features.dim() == 3 and features.shape[0] == len(images):
        return list(features)
    grid = outputs.get("image_grid_thw")
    if features.dim() == 2 and grid is not None and int(grid.prod(1).sum()) == features.shape[0]:
        return list(features.split(grid.prod(1).tolist()))
    raise ValueError(f"the projector's input {list(features.shape)} cannot be told apart into {len(images)} images")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    name: for messages. model_types: values of `config.model_type` it serves; none for the default.
    language, vision, projector: paths of the towers, the first that exists counts; a projector may lie in the vision
        tower.
    processor: `name_or_folder -> processor`.
    prompt: `(mllm, question, has_image) -> str`.
    encode: `(mllm, samples) -> Encoded`.
    positions: `(mllm, inputs, attention_mask) -> Tensor`, position ids from the padded inputs.
    vision_features: `(mllm, samples) -> [[P, d], ...]`, frozen features of samples that all have an image.
    lists_images: whether the processor wants a list of images for each sample.
    """

    name: str
    model_types: tuple[str, ...]
    language: tuple[str, ...]
    vision: tuple[str, ...]
    projector: tuple[str, ...]
    processor: Callable = load_processor
    prompt: Callable = chat_prompt
    encode: Callable = encode
    positions: Callable = _text_positions
    vision_features: Callable = _captured_projector_input
    lists_images: bool = False


def three_axis_positions(mllm, inputs: dict[str, Tensor], attention_mask: Tensor) -> Tensor:
    """Position ids `[3, B, S]` by the model's own `get_rope_index`; text rows have three equal axes."""
    types = inputs.get("mm_token_type_ids")
    grid = inputs.get("image_grid_thw")
    if types is None or grid is None:
        return text_positions(attention_mask).expand(3, -1, -1)
    position_ids, _ = mllm.trunk.get_rope_index(
        inputs["input_ids"], types, image_grid_thw=grid, attention_mask=attention_mask
    )
    return position_ids
