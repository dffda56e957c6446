"""A batch of samples as tensors, and how unequal rows become one rectangle."""

# B samples, S positions, n answer tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

__all__ = ["IGNORE", "Batch", "Encoded", "answer_places", "pad_rows", "prompt_mask", "text_positions"]

#: label of a position that is no answer
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompts of some samples, not padded yet.

    ids: token ids of each prompt, image placeholders expanded.
    token_extras: further per-token inputs by name, rows as long as the ids; 0 stands for text.
    images: the model's image inputs by name, for the images in order.
    """

    ids: list[list[int]]
    images: dict[str, Tensor] = field(default_factory=dict)
    token_extras: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of a batch.

    input_ids, attention_mask: int64 `[B, S]`.
    position_ids: int64 `[B, S]`, or `[3, B, S]` for models with three-axis positions.
    labels: int64 `[B, S]`, the token itself at answer positions (answer and end token), -100 elsewhere; None for
        prompts.
    answer_positions: int64 `[n]`, flat positions in `[B * S]` whose output predicts an answer token.
    answer_labels: int64 `[n]`, the tokens they predict.
    inputs: further inputs of the model by name (pixels, grids, image features). token_inputs: names of those that have
        a value for each token, `[B, S]`.
    features: float `[B, d]`, what the expert layers are told of each sample, see `ExpertState.sample_features`.
    image_index: the sample of each image. image_rows: placeholder positions of each image.
    """

    sample_ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None = None
    answer_positions: Tensor | None = None
    answer_labels: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    token_inputs: tuple[str, ...] = ()
    features: Tensor | None = None
    image_index: tuple[int, ...] = ()
    image_rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        moved = {
            item.name: getattr(self, item.name).to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(getattr(self, item.name), Tensor)
        }
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, **moved, inputs=inputs)


def pad_rows(rows: Sequence[Sequence[int]], fill: int, left: bool) -> Tensor:
    """Rows of unequal length as int64 `[B, S]`, filled on the left or on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor(
        [[fill] * (width - len(row)) + [*row] if left else [*row] + [fill] * (width - len(row)) for row in rows]
    )


def text_positions(attention_mask: Tensor) -> Tensor:
    """Positions `[B, S]` that count the attended tokens of a row from 0; a pad repeats its neighbour's or has 0."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def prompt_mask(batch: Batch) -> Tensor:
    """bool `[B, S]`, True at the tokens of the prompt: neither pad nor answer."""
    mask = batch.attention_mask.bool()
    return mask if batch.labels is None else mask & (batch.labels == IGNORE)


def answer_places(prompts: list[list[int]], answers: list[list[int]], width: int) -> dict[str, Tensor]:
    """Labels, and where the answer tokens are predicted, of right-padded rows."""
    labels = pad_rows(
        [[*[IGNORE] * len(prompt), *answer] for prompt, answer in zip(prompts, answers, strict=True)],
        IGNORE,
        left=False,
    )
    # the output at a position predicts the next token
    positions = [
        row * width + len(prompt) - 1 + step
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for step in range(len(answer))
    ]
    tokens = [token for answer in answers for token in answer]
    return {
        "labels": labels,
        "answer_positions": torch.tensor(positions),
        "answer_labels": torch.tensor(tokens),
    }
