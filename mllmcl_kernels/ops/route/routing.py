"""`Routing`: what a router decided, with the statistics and auxiliary losses that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Routing"]

# E experts, k chosen experts, ... the leading dims of x


@dataclass(frozen=True)
class Routing:
    """A router's decision for every token.

    gates    `[..., E]` float32, zero off the chosen experts; differentiable
    indices  `[..., k]` int32, the chosen experts, best first, -1 where none was allowed
    values   `[..., k]` float32, their gates; differentiable
    logits   `[..., E]` float32, before noise; differentiable
    probs    `[..., E]` float32, the scores over all allowed experts; differentiable
    token_mask  bool `[...]` or None: False counts in no statistic
    """

    gates: Tensor
    indices: Tensor
    values: Tensor
    logits: Tensor
    probs: Tensor
    token_mask: Tensor | None = None

    def _weights(self) -> Tensor | None:
        """1 for a token that counts, 0 for one that does not; None where all count."""
        return None if self.token_mask is None else self.token_mask.to(self.gates.dtype)

    def _mean(self, per_token: Tensor) -> Tensor:
        weights = self._weights()
        if weights is None:
            return per_token.sum() / max(per_token.numel(), 1)
        counted = torch.where(self.token_mask, per_token, torch.zeros_like(per_token))
        return counted.sum() / weights.sum().clamp_min(1.0)

    def _sum_E(self, table: Tensor) -> Tensor:
        """Sum over the counted tokens of `[..., E]`."""
        if self.token_mask is not None:
            # selected, not multiplied: padding may hold NaN
            table = torch.where(self.token_mask.unsqueeze(-1), table, torch.zeros_like(table))
        return table.reshape(-1, table.shape[-1]).sum(0)

    @property
    def load(self) -> Tensor:
        """How many counted tokens chose each expert: `[E]` float32, no gradient (Shazeer et al. 2017)."""
        experts = self.gates.shape[-1]
        weights = self._weights()
        if weights is None:
            counts = torch.ones((), dtype=self.gates.dtype, device=self.gates.device).expand(self.indices.shape)
        else:
            counts = weights.unsqueeze(-1).expand(self.indices.shape)
        total = torch.zeros(experts + 1, dtype=self.gates.dtype, device=self.gates.device)
        slots = torch.where(self.indices < 0, experts, self.indices).to(torch.int64)
        return total.index_add(0, slots.reshape(-1), counts.reshape(-1))[:experts].detach()

    @property
    def importance(self) -> Tensor:
        """Sum of each expert's gates over the counted tokens: `[E]` float32, differentiable (Shazeer et al. 2017)."""
        return self._sum_E(self.gates)

    def balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e, f the share of slots and P the mean probability (Fedus et al. 2021); 1 when even."""
        weights, load_E = self._weights(), self.load
        tokens = max(self.gates[..., 0].numel(), 1) if weights is None else weights.sum().clamp_min(1.0)
        share_E = load_E / load_E.sum().clamp_min(1.0)
        return self.gates.shape[-1] * (share_E * (self._sum_E(self.probs) / tokens)).sum()

    def z_loss(self) -> Tensor:
        """Mean over the tokens of (log sum exp logits)^2 (Zoph et al. 2022)."""
        return self._mean(torch.logsumexp(self.logits, -1).square())

    def entropy(self) -> Tensor:
        """Mean over the tokens of - sum_e p_e log p_e in nats, p the probabilities normalised over the experts."""
        total = self.probs.sum(-1, keepdim=True)
        # a row where nothing is allowed has no probabilities
        p = self.probs / torch.where(total == 0, torch.ones_like(total), total)
        log_p = torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))
        return self._mean(-(p * log_p).sum(-1))
