"""GEM: no step may raise the loss on the stored samples of any old task."""

# t old tasks, P entries of all gradients

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import LoraMethod, gradients_of
from .buffers import BatchReplayMethod

__all__ = ["Gem", "ReferenceGradientMethod", "gem_gradient", "nonnegative_quadratic"]


@dataclass(kw_only=True)
class ReferenceGradientMethod(BatchReplayMethod):
    """A method that turns the gradient of a step by gradients on stored samples, on the device throughout.

    Args:
        buffer_batch: samples of a draw, for each of these gradients.
    """

    buffer_batch: int = 8

    def _references(self) -> list[list]:
        """The samples of each reference gradient."""
        raise NotImplementedError

    def _turned(self, gradient_P: Tensor, references_tP: Tensor) -> Tensor:
        """The gradient to step with, `[P]`."""
        raise NotImplementedError

    def before_step(self, optimizer) -> None:
        super().before_step(optimizer)
        if not self.pools:
            return
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = gradients_of(params)
        references = torch.stack([self._gradient(samples, params) for samples in self._references()])
        self.processes.add_([references])
        turned = self._turned(torch.cat([grad.flatten() for grad in grads]), references)
        sizes = [grad.numel() for grad in grads]
        parts = [part.view_as(grad) for part, grad in zip(turned.split(sizes), grads, strict=True)]
        torch._foreach_copy_(grads, parts)

    def _gradient(self, samples: list, params: list) -> Tensor:
        """What this process has of the gradient `[P]` of the answer loss on these samples."""
        own, fraction = self.processes.share(samples)
        batch = self.mllm.collate(own, with_answers=True)
        share = self.processes.weigh(len(samples), fraction, len(batch.answer_labels))
        with self.processes.own_draws(), self.before_forward(own), self.autocast():
            loss = self.answer_loss(batch) * share
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params, materialize_grads=True)])


@dataclass(kw_only=True)
class Gem(ReferenceGradientMethod, LoraMethod):
    """Sequential LoRA whose gradient is turned until it has no negative product with the gradient of any old task.

        g' = g + G^T (v + strength),   v = argmin_{v >= 0} 1/2 v^T G G^T v + (G g)^T v     if any (G g)_k < 0, else g

    with the gradients on a draw of each old task's stored samples in the rows of G. Each step takes a forward and
    backward pass for every old task.

    Args:
        strength: added to the weights of the old gradients, a bias towards the old tasks.
        legacy: v >= strength as a constraint and 0.001 on the diagonal of G G^T, as in the public code.
    """

    name: ClassVar[str] = "gem"
    summary: ClassVar[str] = "the gradient is turned so that the loss on no old task's samples rises (GEM)"
    source: ClassVar[str] = "Lopez-Paz and Ranzato 2017 (arXiv:1706.08840)"
    stores: ClassVar[str] = "ids of `per_task` samples of each task, or of `capacity` samples in all"
    at_test: ClassVar[str] = "nothing"
    extra_passes: ClassVar[str] = "forward and backward of stored samples of every old task"
    deviations: ClassVar[str] = (
        "old gradients from a draw of `buffer_batch` samples, not all; legacy: the public code's margin and ridge"
    )

    strength: float = 0.5
    legacy: bool = False

    def _references(self) -> list[list]:
        return [self.draw(self.buffer_batch, pool)[0] for pool in self.pools.values()]

    def _turned(self, gradient_P: Tensor, references_tP: Tensor) -> Tensor:
        return gem_gradient(gradient_P, references_tP, self.strength, legacy=self.legacy)


def gem_gradient(gradient: Tensor, references: Tensor, strength: float, *, legacy: bool = False) -> Tensor:
    """The formula of `Gem`; no host wait.

    Args:
        gradient: `[P]`. references: `[t, P]`.
    """
    products_t = references @ gradient
    gram_tt = references @ references.T
    if legacy:
        gram_tt = gram_tt + 0.001 * torch.eye(len(gram_tt), dtype=gram_tt.dtype, device=gram_tt.device)
        # v >= strength is w >= 0 for v = w + strength
        weights_t = nonnegative_quadratic(gram_tt, products_t + strength * gram_tt.sum(1)) + strength
    else:
        weights_t = nonnegative_quadratic(gram_tt, products_t) + strength
    return torch.where((products_t < 0).any(), gradient + weights_t @ references, gradient)


def nonnegative_quadratic(matrix: Tensor, linear: Tensor) -> Tensor:
    """argmin_{v >= 0} 1/2 v^T matrix v + linear^T v by principal pivoting, `[t]`; no host wait.

    Each round lets the first entry that is wrong (free and negative, or 0 with a negative slope) change sides, then
    solves for the free ones; for a positive definite matrix that ends. The number of rounds is fixed and enough for
    the few tasks of a stream.

    Args:
        matrix: positive semidefinite `[t, t]`. linear: `[t]`.
    """
    size = len(linear)
    matrix_tt, linear_t = matrix.double(), linear.double()
    # entries of one size, and a ridge above their rounding, for gradients that point the same way
    scale_t = matrix_tt.diagonal().sqrt().clamp_min(1e-30)
    unit_tt = torch.eye(size, dtype=matrix_tt.dtype, device=matrix.device)
    ridge = 10 * size * torch.finfo(matrix.dtype).eps
    matrix_tt = matrix_tt / scale_t / scale_t[:, None] + ridge * unit_tt
    linear_t = linear_t / scale_t
    free_t = torch.zeros(size, dtype=torch.bool, device=matrix.device)
    weights_t = torch.zeros_like(linear_t)
    for _ in range(4 * size):
        slope_t = matrix_tt @ weights_t + linear_t
        wrong_t = torch.where(free_t, weights_t < 0, slope_t < 0)
        free_t = free_t ^ (wrong_t & (wrong_t.cumsum(0) == 1))
        system_tt = torch.where(free_t[:, None] & free_t, matrix_tt, unit_tt)
        weights_t, _ = torch.linalg.solve_ex(system_tt, torch.where(free_t, -linear_t, 0.0))
    return (weights_t.clamp_min(0.0) / scale_t).to(linear.dtype)
