"""`Routing`: what a router decided, with the statistics and auxiliary losses that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..routing_statistics import Statistics, routing_statistics, statistics_of

__all__ = ["Routing", "with_planes"]

# E experts, k chosen experts, ... the leading dims of x


def _saves_elsewhere() -> bool:
    """Whether hooks take what backward needs, as those of activation checkpointing do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@dataclass(frozen=True)
class Routing:
    """A router's decision for every token.

    gates    `[..., E]` float32, zero off the chosen experts; differentiable
    indices  `[..., k]` int32, the chosen experts, best first, -1 where none was allowed
    values   `[..., k]` float32, their gates; differentiable
    logits   `[..., E]` float32, before noise; differentiable
    probs    `[..., E]` float32, the scores over all allowed experts; differentiable
    token_mask  bool `[...]` or None: False counts in no statistic
    planes   what the router summed up while it made these tables, for load, importance and losses; None, and summed up
             anew where they are asked for, in a Routing made by hand or by `dataclasses.replace`

    Load, importance and losses are made together when the first is asked for, and kept.
    """

    gates: Tensor
    indices: Tensor
    values: Tensor
    logits: Tensor
    probs: Tensor
    token_mask: Tensor | None = None
    # no argument: a copy with another table would keep the sums of the old one
    planes: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    _kept: dict[bool, Statistics] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict:
        """Copies and pickles compute anew: what is kept may hang on a graph."""
        return {**self.__dict__, "_kept": {}}

    def _statistics(self) -> Statistics:
        """All of them together, kept for the next that is asked for, with and without gradients apart."""
        has_grad = torch.is_grad_enabled()
        kept = self._kept.get(has_grad)
        # activation checkpointing counts what is saved in a second pass, which must not find what the first one left
        is_replayed = not torch.compiler.is_compiling() and _saves_elsewhere()
        if kept is None or is_replayed:
            if self.planes is not None:
                kept = statistics_of(self.planes)
            else:
                kept = routing_statistics(self.logits, self.probs, self.gates, self.indices, self.token_mask)
            if not is_replayed:
                self._kept[has_grad] = kept
        return kept

    @property
    def load(self) -> Tensor:
        """How many counted tokens chose each expert: `[E]` float32, no gradient (Shazeer et al. 2017)."""
        return self._statistics().load

    @property
    def importance(self) -> Tensor:
        """Sum of each expert's gates over the counted tokens: `[E]` float32, differentiable (Shazeer et al. 2017)."""
        return self._statistics().importance

    def balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e, f the share of slots and P the mean probability (Fedus et al. 2021); 1 when even."""
        return self._statistics().balance

    def z_loss(self) -> Tensor:
        """Mean over the tokens of (log sum exp logits)^2 (Zoph et al. 2022)."""
        return self._statistics().z

    def entropy(self) -> Tensor:
        """Mean over the tokens of - sum_e p_e log p_e in nats, p the probabilities normalised over the experts."""
        return self._statistics().entropy


def with_planes(routing: Routing, planes: Tensor) -> Routing:
    """The new routing, told the planes `[P, 3 E + 3]` of its tables."""
    object.__setattr__(routing, "planes", planes)
    return routing
