"""Loss terms that several methods share."""

# G layers of one width, r rank of the current expert, Q ranks of the old experts, K in

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthogonality_loss"]


def orthogonality_loss(lora_a: Sequence[Tensor], previous_a: Sequence[Tensor]) -> Tensor:
    """Sum over the layers of the absolute entries of A_t A_old^T; the old side gets no gradient.

    Layers of one shape share a product, whatever the number of old experts.

    Args:
        lora_a: A of the current expert in every layer, `[r, K]`. previous_a: A of all old experts in the same layers,
            stacked, `[Q, K]`.

    Returns:
        A scalar, float32 or wider.

    Source: O-LoRA (arXiv:2310.14152).
    """
    alike: dict[tuple, list[int]] = {}
    for place, (new, old) in enumerate(zip(lora_a, previous_a, strict=True)):
        alike.setdefault((new.shape, old.shape), []).append(place)
    parts = []
    with torch.autocast(lora_a[0].device.type, enabled=False):
        for places in alike.values():
            new_GrK = torch.stack([lora_a[place] for place in places])
            old_GQK = torch.stack([previous_a[place].detach() for place in places])
            parts.append(torch.bmm(new_GrK, old_GQK.mT).abs().sum())
    return torch.stack(parts).sum()
