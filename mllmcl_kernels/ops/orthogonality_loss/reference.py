"""`orthogonality_loss` in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonality_loss_backward_reference", "orthogonality_loss_reference"]

# G layers of one shape, r ranks of the current expert, Q ranks of the old experts, K width


def orthogonality_loss_reference(lora_a: Tensor, previous_a: Tensor) -> Tensor:
    """Sum of |A A_old^T| over `[G, r, Q]`."""
    product_GrQ = torch.bmm(lora_a, previous_a.mT)
    return product_GrQ.to(torch.promote_types(lora_a.dtype, torch.float32)).abs().sum()


def orthogonality_loss_backward_reference(d_loss: Tensor, lora_a: Tensor, previous_a: Tensor) -> Tensor:
    """dA = d sign(A A_old^T) A_old, `[G, r, K]`."""
    sign_GrQ = torch.bmm(lora_a, previous_a.mT).sign()
    return torch.bmm(sign_GrQ, previous_a) * d_loss.to(lora_a.dtype)
