"""Greedy decoding of a left-padded batch with a key-value cache."""

# B samples, S prompt positions

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Batch

__all__ = ["greedy"]

#: tokens between two looks at whether every row has ended, where looking waits for the device
CHECK_EVERY = 4


def greedy(
    forward: Callable,
    head: Callable[[Tensor], Tensor],
    batch: Batch,
    *,
    max_new_tokens: int,
    end_ids: Tensor,
    pad_id: int,
) -> Tensor:
    """New token ids int64 `[B, <= max_new_tokens]`, `pad_id` after the end of a row.

    Args:
        forward: `(input_ids, attention_mask, position_ids, inputs, past_key_values) -> output` with
            `.last_hidden_state` and `.past_key_values`.
        head: hidden states `[B, D]` to logits.
        end_ids: int64 `[e]`, tokens that end a row.
    """
    mask = batch.attention_mask
    # the next text position follows the largest of the prompt on any axis
    position = batch.position_ids.masked_fill(mask == 0, 0).amax(dim=-1, keepdim=True) + 1
    if position.dim() == 3:
        position = position.amax(dim=0, keepdim=True).expand(3, -1, -1)
    output = forward(batch.input_ids, mask, batch.position_ids, batch.inputs, None)
    has_ended = torch.zeros(len(batch), dtype=torch.bool, device=mask.device)
    check_every = 1 if mask.device.type == "cpu" else CHECK_EVERY
    tokens = []
    while True:
        token = head(output.last_hidden_state[:, -1]).argmax(dim=-1)
        token = token.masked_fill(has_ended, pad_id)
        tokens.append(token)
        has_ended = has_ended | torch.isin(token, end_ids)
        if len(tokens) == max_new_tokens or (len(tokens) % check_every == 0 and bool(has_ended.all())):
            return torch.stack(tokens, dim=1)
        mask = torch.cat((mask, mask.new_ones(len(batch), 1)), dim=1)
        output = forward(token[:, None], mask, position, {}, output.past_key_values)
        position = position + 1
