"""The plain side of methods with keys and soft tokens: rows put together by hand, one step of torch's AdamW."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / (one.norm() * other.norm())


def by_hand(mllm, sample, soft_ID: Tensor) -> Tensor:
    """Answer logits `[n, V]` of one sample whose row has soft tokens behind its start token."""
    batch = mllm.collate([sample], with_answers=True)
    row_SD = mllm.model.embed(batch.input_ids, batch.inputs["image_features"])[0]
    assert batch.input_ids[0, 0] == mllm.tokenizer.bos_token_id
    row = torch.cat([row_SD[:1], soft_ID.to(row_SD.dtype), row_SD[1:]])[None]
    hidden = mllm.model.language.model(inputs_embeds=row).last_hidden_state[0]
    return mllm.head(hidden[batch.answer_positions + len(soft_ID)])


def answer_labels(mllm, samples) -> Tensor:
    """The tokens that the rows of all samples, one behind the other, have to predict."""
    return mllm.collate(samples, with_answers=True).answer_labels


def plain_adamw(loss: Tensor, moving: list[Tensor]) -> None:
    """Gradients of these tensors alone, and torch's step on them."""
    for value, grad in zip(moving, torch.autograd.grad(loss, moving), strict=True):
        value.grad = grad
    torch.optim.AdamW(moving, lr=0.01, weight_decay=0.1).step()
