"""`orthogonality_loss` in plain PyTorch, with the gradient on the way."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonality_loss_reference"]

# r ranks of the current expert, Q ranks of the old experts, K width


def orthogonality_loss_reference(lora_a: list[Tensor], previous_a: list[Tensor], need: bool) -> tuple[Tensor, Tensor]:
    """Sum of |A A_old^T| over layers of A `[r, K]` and A_old `[Q, K]`, and sign(A A_old^T) A_old of all layers, flat.

    Both are in float32 or better; the second is empty unless `need`.
    """
    wide = torch.promote_types(lora_a[0].dtype, torch.float32)
    loss = lora_a[0].new_zeros((), dtype=wide)
    slopes = [lora_a[0].new_zeros(0, dtype=wide)]
    for new_rK, old_QK in zip(lora_a, previous_a, strict=True):
        product_rQ = new_rK @ old_QK.mT
        loss = loss + product_rQ.to(wide).abs().sum()
        if need:
            slopes.append((product_rQ.detach().sign() @ old_QK).to(wide).flatten())
    return loss, torch.cat(slopes)
