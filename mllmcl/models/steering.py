"""Steering: what the last token of a prompt shows in a decoder layer moves all of the prompt; no weight changes.

Source: MLLMEraser (arXiv:2510.04217).
"""

# B samples, S positions, p places of a row, n layers, r rank of the map, d width

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .batch import Batch, prompt_mask

__all__ = ["Steering"]


class Steering:
    """At every decoder layer l, in the pass over the prompt alone:

        h <- h + (h_last M_l),    M_l = read_l write_l,    read `[n, d, r]`, write `[n, r, d]`

    with h_last the state of the prompt's last token; tokens of the answer are left as they are. `read` and `write` are
    None where nothing is steered.

    Args:
        tower: the language tower, whose `.layers` are hooked once and for all.
    """

    def __init__(self, tower: nn.Module):
        if not hasattr(tower, "layers"):
            raise ValueError(f"{type(tower).__name__} has no .layers to steer")
        self.num_layers = len(tower.layers)
        self.read: Tensor | None = None
        self.write: Tensor | None = None
        self._is_prompt: Tensor | None = None
        self._watched: tuple[Tensor, list[Tensor]] | None = None
        for place, layer in enumerate(tower.layers):
            layer.register_forward_hook(functools.partial(self._after, place))

    @contextlib.contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Steer within the context, which is about this batch."""
        before, self._is_prompt = self._is_prompt, prompt_mask(batch)
        try:
            yield
        finally:
            self._is_prompt = before

    @contextlib.contextmanager
    def watching(self, places_Bp: Tensor) -> Iterator[list[Tensor]]:
        """Do not steer; yields a list that the states `[B, p, d]` at some places are put in, layer by layer."""
        found: list[Tensor] = []
        before, self._watched = self._watched, (places_Bp, found)
        try:
            yield found
        finally:
            self._watched = before

    def _after(self, place: int, _module: nn.Module, _args, output):
        hidden_BSd = output if isinstance(output, Tensor) else output[0]
        if self._watched is not None:
            places_Bp, found = self._watched
            found.append(_at(hidden_BSd, places_Bp))
            return None
        # a pass of decoding has one token a row, and the cache holds what was steered
        if self.read is None or self._is_prompt is None or hidden_BSd.shape[1] != self._is_prompt.shape[1]:
            return None
        order_S = torch.arange(hidden_BSd.shape[1], device=hidden_BSd.device)
        last_B1 = (self._is_prompt * order_S).argmax(1, keepdim=True)
        move_B1d = _at(hidden_BSd, last_B1).to(self.read.dtype) @ self.read[place] @ self.write[place]
        steered = hidden_BSd + (self._is_prompt[..., None] * move_B1d).to(hidden_BSd.dtype)
        return steered if isinstance(output, Tensor) else (steered, *output[1:])


def _at(hidden_BSd: Tensor, places_Bp: Tensor) -> Tensor:
    """The states at some places of each row, `[B, p, d]`."""
    return hidden_BSd.gather(1, places_Bp[..., None].expand(-1, -1, hidden_BSd.shape[2]))
