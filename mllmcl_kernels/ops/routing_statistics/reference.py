"""The statistics that planes add up to, and their gradient, in plain PyTorch; float64, the truth of every test."""

# P planes, E experts
# planes_PC with C = 3 E + 3: of each expert choices, gates, probabilities; then lse^2, entropy, tokens

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

__all__ = ["routing_statistics_backward_reference", "routing_statistics_reference"]


def _parts(sums: Tensor) -> tuple[Tensor, ...]:
    experts = (sums.shape[0] - 3) // 3
    return sums.split([experts, experts, experts, 1, 1, 1])


def routing_statistics_reference(planes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """load [E], importance [E], then without dimensions balance, z and entropy; and the sum of the planes [3 E + 3]."""
    sums = planes.sum(0)
    load, importance, mass, square, entropy, tokens = _parts(sums)
    count, slots = tokens.clamp_min(1.0), load.sum().clamp_min(1.0)
    balance = load.shape[0] * (load * mass).sum() / (slots * count)
    return load.clone(), importance.clone(), balance[0], (square / count)[0], (entropy / count)[0], sums.clone()


def routing_statistics_backward_reference(
    d_importance: Optional[Tensor],
    d_balance: Optional[Tensor],
    d_z: Optional[Tensor],
    d_entropy: Optional[Tensor],
    sums: Tensor,
) -> Tensor:
    """The gradient [3 E + 3] of every plane, zero from what is None."""
    load, _, mass, square, entropy, tokens = _parts(sums)
    count, slots = tokens.clamp_min(1.0), load.sum().clamp_min(1.0)
    d_load, d_gates, d_mass = (torch.zeros_like(load) for _ in range(3))
    d_square, d_entropies, lost, zero = (torch.zeros_like(tokens) for _ in range(4))
    if d_importance is not None:
        d_gates = d_importance
    if d_balance is not None:
        slope, even = d_balance * load.shape[0] / (slots * count), (load * mass).sum()
        d_load = slope * (mass - torch.where(load.sum() < 1.0, zero, even / slots))
        d_mass, lost = slope * load, slope * even
    if d_z is not None:
        d_square = d_z / count
        lost = lost + d_square * square
    if d_entropy is not None:
        d_entropies = d_entropy / count
        lost = lost + d_entropies * entropy
    d_tokens = torch.where(tokens < 1.0, zero, -lost / count)
    return torch.cat([d_load, d_gates, d_mass, d_square, d_entropies, d_tokens])
