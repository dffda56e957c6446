"""Models composed by `MLLM.compose`: cached vision features in place of pixels, a short chat prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Encoded
from ..composed import IMAGE_TOKEN_ID
from .base import Family

#: stand for what is said while the chat template is taken apart
QUESTION_MARK, ANSWER_MARK = "<question>", "<answer>"
#: images encoded at once
ENCODER_BATCH = 32


def template_parts(tokenizer) -> tuple[str, str]:
    """What the chat template writes before and after the question of a single user turn.

    A default system turn is left out: it is the same for every sample and costs as many tokens as the question.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{type(tokenizer).__name__} has no chat_template, so the language model has no prompt form")

    def render(turns: list[tuple[str, str]], **options) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    user, assistant = ("user", QUESTION_MARK), ("assistant", ANSWER_MARK)
    before, found, after = render([user], add_generation_prompt=True).partition(QUESTION_MARK)
    if not found:
        raise ValueError("the tokenizer's chat template does not write the user's words")
    # a later user turn opens without the system turn: it follows the end of the answer before it
    end = render([user, assistant]).rpartition(ANSWER_MARK)[2]
    opening = render([user, assistant, user]).rpartition(ANSWER_MARK)[2].rpartition(QUESTION_MARK)[0].removeprefix(end)
    start = tokenizer.bos_token or ""
    if before.startswith(start) and not opening.startswith(start):
        opening = start + opening
    return opening, after


def prompt(mllm, question: str, has_image: bool) -> str:
    """The prompt as text; the image's tokens go between the two parts of the template."""
    before, after = mllm.prompt_parts
    return f"{before}{_body(question, has_image)}{after}"


def _body(question: str, has_image: bool) -> str:
    return f"\n{question}" if has_image else question


def encode(mllm, samples: Sequence) -> Encoded:
    """Prompts of image and question, with one placeholder id for each feature token."""
    before, after = mllm.prompt_parts
    tokenizer = mllm.tokenizer
    with_image = [sample for sample in samples if sample.image is not None]
    images = {"image_features": mllm.image_features(with_image)} if with_image else {}
    num_tokens = images["image_features"].shape[1] if with_image else 0
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    texts = [
        f"{_body(sample.question, True)}{after}" if sample.image is not None else prompt(mllm, sample.question, False)
        for sample in samples
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    image = [*start, *[IMAGE_TOKEN_ID] * num_tokens]
    ids = [[*image, *row] if sample.image is not None else row for sample, row in zip(samples, rows, strict=True)]
    return Encoded(ids=ids, images=images)


def vision_features(mllm, samples: Sequence) -> list[Tensor]:
    """Features of each image `[P, d]`, in batches, without a graph."""
    encoder = mllm.model.vision
    features: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(samples), ENCODER_BATCH):
            images = [sample.load_image() for sample in samples[start : start + ENCODER_BATCH]]
            pixels = encoder.preprocess(images).to(mllm.device, mllm.dtype)
            features.extend(encoder(pixels))
    return features


FAMILY = Family(
    name="composed",
    model_types=("mllmcl_composed",),
    language=("language.model", "language.transformer", "language"),
    vision=("vision",),
    projector=("projector",),
    prompt=prompt,
    encode=encode,
    vision_features=vision_features,
)
