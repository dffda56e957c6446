"""Answers: samples in batches of like length, each by its experts, decoded greedily with a key-value cache."""

# B samples, S prompt positions, E experts

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..options import check_count
from .batch import Batch
from .prompts import prompt_rows, prompting

if TYPE_CHECKING:
    from .mllm import MLLM

__all__ = ["answers", "greedy"]

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


def answers(mllm: MLLM, samples: Sequence, experts, prompts, *, max_new_tokens: int, batch_size: int) -> list[str]:
    """What `MLLM.generate` returns."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_count(name, value)
    if isinstance(samples, str) or not isinstance(samples, Iterable):
        raise TypeError(f"samples: expected a list of samples, got {type(samples).__name__}")
    samples = list(samples)
    for place, sample in enumerate(samples):
        if not hasattr(sample, "question"):
            raise TypeError(f"samples[{place}]: expected a Sample, got {type(sample).__name__}")
    with mllm.evaluating():
        gates = _gates(mllm, samples, experts)
        soft = prompt_rows(prompts, len(samples))
        found = [""] * len(samples)
        order = sorted(range(len(samples)), key=lambda at: len(samples[at].question))
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            ids = soft[at] if isinstance(soft, Tensor) else soft
            texts = _decoded(mllm, [samples[i] for i in at], _rows(gates, at), ids, max_new_tokens)
            for index, text in zip(at, texts, strict=True):
                found[index] = text
        return found


def _gates(mllm: MLLM, samples: Sequence, experts):
    """What `experts` of `MLLM.generate` says, with the router asked where it answers for all samples at once."""
    if not isinstance(experts, str):
        gates = None if experts is None else _tensor(experts)
    elif experts == "route":
        if mllm.routes_batches:
            return experts
        gates = None if mllm.router is None else _tensor(mllm.router(samples))
    elif experts in ("current", "off"):
        return experts
    else:
        raise ValueError(f'experts: expected "route", "current", "off", ids, floats or None, got {experts!r}')
    if gates is not None and gates.dim() == 0:
        raise ValueError(f"experts: expected one id for each of {len(samples)} samples, got {gates.item()}")
    per_sample = gates is not None and not (gates.is_floating_point() and gates.dim() == 1)
    if per_sample and gates.shape[0] != len(samples):
        raise ValueError(f"experts: expected one row for each of {len(samples)} samples, got {gates.shape[0]}")
    return gates


def _tensor(experts) -> Tensor:
    try:
        return torch.as_tensor(experts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"experts: expected ids, floats or None, got {experts!r}") from error


def _rows(gates, at: list[int]):
    """The rows of `gates` for the samples `at`; constant gates as they are."""
    if not isinstance(gates, Tensor) or (gates.is_floating_point() and gates.dim() == 1):
        return gates
    return gates[at]


def _decoded(mllm: MLLM, samples: Sequence, gates, prompts, max_new_tokens: int) -> list[str]:
    batch = mllm.collate(samples, with_answers=False)
    if isinstance(gates, str) and gates == "route":
        gates = mllm.router(samples)
    if isinstance(prompts, str):
        prompts = None if mllm.prompt_router is None else mllm.prompt_router(samples)
    current = isinstance(gates, str) and gates == "current"

    def forward(input_ids, mask, positions, inputs, cache):
        return mllm.run_trunk(input_ids, mask, positions, inputs, cache, use_cache=True)

    # not inference_mode: buffers of a sharded base that are made in it could not be written in training
    with (
        torch.no_grad(),
        contextlib.nullcontext() if current else mllm.use_experts(gates),
        mllm.use_prompts(prompts),
        prompting(mllm, batch) as (batch, _),
        mllm.in_batch(batch, memory={}),
    ):
        tokens = greedy(
            forward, mllm.head, batch, max_new_tokens=max_new_tokens, end_ids=mllm.end_ids, pad_id=mllm.pad_id
        )
    return [text.strip() for text in mllm.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)]
