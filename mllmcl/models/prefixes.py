"""Prefixes: trained keys and values that each sample finds before its own in some decoder layers.

They take no position, enter no cache and change no batch: attention sees them in front of what it sees anyway.
"""

# B samples, S queries, K keys, Q prefixes in the bank, n layers, L length, I prefixed keys, H key heads, d head width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .batch import Batch
from .prompts import prompt_ids

__all__ = ["Prefixes", "attention_layers"]

#: name of our attention among those of transformers
ATTENTION = "mllmcl_prefixes"


def attention_layers(tower: nn.Module) -> list[nn.Module]:
    """The attention modules of a language tower, first layer first."""
    found = [module for module in tower.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]
    return sorted(found, key=lambda module: module.layer_idx)


class Prefixes(nn.Module):
    """A bank of prefixes for some layers, and one prefix for all samples in others.

        attention(q, [K_p; k], [V_p; v])

    `.own` `[Q, n, 2, L, H, d]` and `.shared` `[n, 2, L, H, d]` or None hold keys and values in float32, from -1..1.
    `.ids` int64 `[B, k]` says which prefixes each sample has now; a sample with none (-1) has the shared one neither.

    Source: DualPrompt (arXiv:2204.04799).

    Args:
        tower: the language tower. layers, shared_layers: numbers of its decoder layers.
    """

    def __init__(
        self,
        tower: nn.Module,
        num_prefixes: int,
        length: int,
        layers: Sequence[int],
        shared_length: int,
        shared_layers: Sequence[int],
    ):
        super().__init__()
        attentions = attention_layers(tower)
        both = sorted({*layers, *shared_layers})
        if not layers or len(both) < len(layers) + len(shared_layers) or not 0 <= both[0] <= both[-1] < len(attentions):
            raise ValueError(
                f"layers, shared_layers: expected different numbers in 0..{len(attentions) - 1}, got "
                f"{list(layers)} and {list(shared_layers)}"
            )
        for name, value in (("num_prefixes", num_prefixes), ("length", length), ("shared_length", shared_length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        width = attentions[0].head_dim
        heads = attentions[0].k_proj.out_features // width
        self.own = nn.Parameter(torch.empty(num_prefixes, len(layers), 2, length, heads, width).uniform_(-1.0, 1.0))
        shared = torch.empty(len(shared_layers), 2, shared_length, heads, width).uniform_(-1.0, 1.0)
        self.shared = nn.Parameter(shared) if len(shared_layers) else None
        self.ids: Tensor | None = None
        for place, layer in enumerate(layers):
            attentions[layer].prefixes = (self, "own", place)
        for place, layer in enumerate(shared_layers):
            attentions[layer].prefixes = (self, "shared", place)
        _use_our_attention(tower)

    @contextlib.contextmanager
    def using(self, ids) -> Iterator[None]:
        """Within the context the samples have these prefixes, see `prompt_ids`."""
        before, self.ids = self.ids, prompt_ids(ids, len(self.own), self.own.device)
        try:
            yield
        finally:
            self.ids = before

    @contextlib.contextmanager
    def prompting(self, mllm, batch: Batch) -> Iterator[tuple[Batch, Callable[[Tensor], Tensor]]]:
        """The batch as it is."""
        if self.ids is not None and len(self.ids) != len(batch):
            raise ValueError(f"prompts: expected a row of ids for each of {len(batch)} samples, got {len(self.ids)}")
        yield batch, lambda hidden: hidden

    def before(self, kind: str, place: int, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Keys and values `[B, H, K, d]` and the mask `[B, 1, S, K]` of one layer with the prefixes in front."""
        ids_Bk = self.ids
        if kind == "own":
            both_B2IHd = self.own[ids_Bk.clamp(min=0), place].transpose(1, 2).flatten(2, 3)
            seen_BI = (ids_Bk >= 0).repeat_interleave(self.own.shape[3], dim=1)
        else:
            both_B2IHd = self.shared[place].expand(len(ids_Bk), *self.shared.shape[1:])
            seen_BI = (ids_Bk >= 0).any(1, keepdim=True).expand(-1, self.shared.shape[2])
        key_BHId, value_BHId = both_B2IHd.to(key.dtype).transpose(2, 3).unbind(1)
        seen = seen_BI[:, None, None, :].expand(-1, 1, mask.shape[2], -1)
        return torch.cat([key_BHId, key], 2), torch.cat([value_BHId, value], 2), torch.cat([seen, mask], 3)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options):
    """Scaled dot-product attention as transformers calls it, with the layer's prefixes in front where it has some."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefixes, kind, place = getattr(module, "prefixes", (None, "", 0))
    if prefixes is not None and prefixes.ids is not None:
        key, value, attention_mask = prefixes.before(kind, place, key, value, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _full_mask(*args, **options) -> Tensor:
    """The mask bool `[B, 1, S, K]`, written out also where attention could do without it."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


def _use_our_attention(tower: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _full_mask)
    tower.set_attn_implementation(ATTENTION)
    if tower.config._attn_implementation != ATTENTION:
        raise ValueError(f"{type(tower).__name__} lets nobody choose its attention, so it takes no prefixes")
