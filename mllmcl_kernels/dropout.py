"""Dropout whose mask is a function of (seed, row, column), so that no mask is ever stored.

    key(t)    = mix(t * C1 + low32(seed))
    keep(t,c) = mix(key(t) xor (c * C2 + high32(seed))) >= round(p * 2^32)

with `mix` the 32-bit finaliser of MurmurHash3 and all arithmetic modulo 2^32. Every backend computes the same mask;
recomputation under activation checkpointing sees the same seed, hence the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COLUMN_STEP", "ROW_STEP", "draw_seed", "drop", "keep_mask", "threshold"]

# T rows, K columns
ROW_STEP = 0x9E3779B1
COLUMN_STEP = 0x85EBCA77
LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator of `device`, left on the device: [1]."""
    return torch.randint(0, 2**62, (1,), device=device)


def threshold(p: float) -> int:
    """Hashes below this are dropped."""
    return min(round(p * 2**32), LOW)


def _mix(h: Tensor) -> Tensor:
    # int64 products wrap modulo 2^64, so their low 32 bits are those of the 32-bit product
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & LOW
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & LOW
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """bool [rows, columns] on the seed's device, True with probability 1 - p."""
    row_T = torch.arange(rows, device=seed.device)
    column_K = torch.arange(columns, device=seed.device)
    key_T = _mix((row_T * ROW_STEP + (seed & LOW)) & LOW)
    step_K = (column_K * COLUMN_STEP + ((seed >> 32) & LOW)) & LOW
    return _mix(key_T[:, None] ^ step_K[None, :]) >= threshold(p)


def drop(x_TK: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x with dropped entries zero and the rest divided by 1 - p; x itself when p is 0."""
    if p == 0.0:
        return x_TK
    keep = keep_mask(seed, x_TK.shape[0], x_TK.shape[1], p)
    return torch.where(keep, x_TK * (1.0 / (1.0 - p)), torch.zeros((), dtype=x_TK.dtype, device=x_TK.device))
