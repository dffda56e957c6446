"""What a model knows of plain text, apart from any task."""

from __future__ import annotations

import torch

from ..streams.base import Sample
from .batch import Encoded

__all__ = ["perplexity"]


def perplexity(mllm, text: str, window: int, batch_size: int) -> float:
    """Perplexity of plain text, without a prompt's template: exp of the mean negative log likelihood of a token.

    Layers that look at the sample's question see the window itself in its place.

    Args:
        text: at least `window` tokens; it is cut into windows, and what is left at the end is not used. The first token
            of a window is given.

    Raises:
        ValueError: the text is shorter than a window.
    """
    ids = mllm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if not rows:
        raise ValueError(f"text: expected at least {window} tokens, got {len(ids)}")
    total = torch.zeros((), device=mllm.device)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        encoded = Encoded(ids=[row[:1] for row in part], images={}, token_extras={})
        windows = [Sample(id="", task="", question=mllm.tokenizer.decode(row), answer="") for row in part]
        with torch.no_grad():
            total += mllm.loss(mllm.padded(windows, encoded, [row[1:] for row in part])) * len(part)
    return float(torch.exp(total / len(rows)))
