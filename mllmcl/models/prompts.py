"""Soft prompts: trained tokens of which each sample may have its own, put in behind its start token.

The batch outside never shows them: they enter with the input embeddings, and their outputs are taken out again.
"""

# B samples, S positions, Q prompts in the bank, L tokens of a prompt, k prompts of a sample, I = k L, D width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .batch import IGNORE, Batch

__all__ = ["PromptedBatch", "SoftPrompts", "prompt_ids", "prompt_rows", "prompting", "with_room"]


def prompt_ids(ids, num_prompts: int, device: torch.device) -> Tensor | None:
    """`ids` as int64 `[B, k]` on `device`; None where no sample has a prompt.

    Args:
        ids: None, or integers `[B]` or `[B, k]` (a tensor or lists), -1 = none.

    Raises:
        TypeError, ValueError: another type or shape, or, for ids on the CPU, an id outside -1..Q-1.
    """
    if ids is None:
        return None
    ids = torch.as_tensor(ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"prompts: expected integer ids, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"prompts: expected ids of shape [B] or [B, k], got {list(ids.shape)}")
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(value) for value in ids.aminmax())
        if low < -1 or high >= num_prompts:
            raise ValueError(f"prompts: expected ids in -1..{num_prompts - 1}, got {low if low < -1 else high}")
    return (ids[:, None] if ids.dim() == 1 else ids).to(device=device, dtype=torch.int64)


def prompt_rows(prompts, num_samples: int):
    """What `MLLM.generate` is given: "route" and None as they are, ids as a tensor with a row for each sample."""
    if prompts is None or isinstance(prompts, str):
        if prompts not in (None, "route"):
            raise ValueError(f'prompts: expected "route", ids or None, got {prompts!r}')
        return prompts
    ids = torch.as_tensor(prompts)
    if ids.dim() == 0 or len(ids) != num_samples:
        raise ValueError(f"prompts: expected one row for each of {num_samples} samples, got {list(ids.shape)}")
    return ids


class SoftPrompts(nn.Module):
    """A bank of prompts, `.weight` `[Q, L, D]` in float32; they start as tokens of the vocabulary, drawn at random.

    `.ids` int64 `[B, k]` says which prompts each sample has now, the last one nearest to the text; None: none.
    """

    def __init__(self, num_prompts: int, length: int, table_VD: Tensor):
        super().__init__()
        for name, value in (("num_prompts", num_prompts), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        rows = torch.randint(len(table_VD), (num_prompts, length)).to(table_VD.device)
        self.weight = nn.Parameter(table_VD.detach()[rows].float())
        self.ids: Tensor | None = None

    @contextlib.contextmanager
    def using(self, ids) -> Iterator[None]:
        """Within the context the samples have these prompts, see `prompt_ids`."""
        before, self.ids = self.ids, prompt_ids(ids, len(self.weight), self.weight.device)
        try:
            yield
        finally:
            self.ids = before

    def chosen(self) -> Tensor:
        """The tokens of each sample, `[B, k L, D]`; anything where it has none, since nothing attends to that."""
        return self.weight[self.ids.clamp(min=0)].flatten(1, 2)

    @contextlib.contextmanager
    def entering(self, embedding: nn.Module, places_BI: Tensor) -> Iterator[None]:
        """Put the tokens over what `embedding` gives at `places_BI` the next time it is called, and only then."""
        tokens_BID = self.chosen()

        def put(_module, _args, output_BSD: Tensor) -> Tensor:
            handle.remove()
            index = places_BI[..., None].expand(tokens_BID.shape)
            return output_BSD.scatter(1, index, tokens_BID.to(output_BSD.dtype))

        handle = embedding.register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def prompting(self, mllm, batch: Batch) -> Iterator[tuple[Batch, Callable[[Tensor], Tensor]]]:
        """The batch with room for the tokens, which the next forward pass fills, and what takes the room out again."""
        prompted = with_room(batch, self.ids, self.weight.shape[1], mllm.tokenizer.bos_token_id, mllm.pad_id)
        with self.entering(mllm.model.get_input_embeddings(), prompted.places):
            yield prompted.batch, prompted.original

    def extra_repr(self) -> str:
        return "prompts={}, length={}, width={}".format(*self.weight.shape)


@dataclass(frozen=True, kw_only=True)
class PromptedBatch:
    """A batch with room for soft tokens.

    batch: with the new positions; answers lie where `kept` says. places: int64 `[B, k L]`, positions of the soft
    tokens. kept: int64 `[B, S]`, where each old position is now.
    """

    batch: Batch
    places: Tensor
    kept: Tensor

    def original(self, hidden: Tensor) -> Tensor:
        """`[B, S, D]` of the old positions from what the model gave for the new ones."""
        return hidden.gather(1, self.kept[..., None].expand(-1, -1, hidden.shape[-1]))


def with_room(batch: Batch, ids_Bk: Tensor, length: int, start_id: int | None, fill_id: int) -> PromptedBatch:
    """Make room for the prompts of each sample behind its start token, or in front where it has none.

    Prompt -1 takes room as well, which nothing attends to and which has no position of its own.

    Args:
        start_id: the tokenizer's start token. fill_id: what stands in `input_ids` at soft tokens.
    """
    if len(ids_Bk) != len(batch):
        raise ValueError(f"prompts: expected a row of ids for each of {len(batch)} samples, got {len(ids_Bk)}")
    mask_BS, (rows, width) = batch.attention_mask, batch.input_ids.shape
    is_real_BI = (ids_Bk >= 0).repeat_interleave(length, dim=1).long()
    room = is_real_BI.shape[1]
    # the first token of a row, behind its pads on the left
    first_B1 = mask_BS.argmax(1, keepdim=True)
    has_start_B1 = torch.zeros_like(first_B1)
    if start_id is not None:
        has_start_B1 = (batch.input_ids.gather(1, first_B1) == start_id).long()
    begin_B1 = first_B1 + has_start_B1
    places_BI = begin_B1 + torch.arange(room, device=mask_BS.device)
    old_S = torch.arange(width, device=mask_BS.device)
    kept_BS = old_S + room * (old_S >= begin_B1)

    def spread(old: Tensor, soft: Tensor | int) -> Tensor:
        """`[B, S]` at its new positions, with `soft` `[B, k L]` in the room."""
        new = old.new_zeros(rows, width + room).scatter(1, kept_BS, old)
        return new.scatter(1, places_BI, soft if isinstance(soft, Tensor) else torch.full_like(places_BI, soft))

    positions = batch.position_ids
    behind_BS = positions + is_real_BI.sum(1, keepdim=True) * (old_S >= begin_B1)
    own_BI = (has_start_B1 + is_real_BI.cumsum(1) - 1).clamp(min=0)
    if positions.dim() == 3:
        moved = torch.stack([spread(axis, own_BI) for axis in behind_BS])
    else:
        moved = spread(behind_BS, own_BI)
    prompted = replace(
        batch,
        input_ids=spread(batch.input_ids, fill_id),
        attention_mask=spread(mask_BS, is_real_BI),
        position_ids=moved,
        labels=None if batch.labels is None else spread(batch.labels, IGNORE),
        answer_positions=None,
        inputs={
            name: spread(value, 0) if name in batch.token_inputs else value for name, value in batch.inputs.items()
        },
    )
    return PromptedBatch(batch=prompted, places=places_BI, kept=kept_BS)


def prompting(mllm, batch: Batch) -> contextlib.AbstractContextManager:
    """Context for one forward pass: yields the batch with the model's current prompts in it, and what takes them out of
    the output again."""
    if mllm.prompts is None or mllm.prompts.ids is None:
        return contextlib.nullcontext((batch, lambda hidden: hidden))
    return mllm.prompts.prompting(mllm, batch)
