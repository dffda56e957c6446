"""A-GEM: no step may raise the loss on the stored samples as a whole."""

# P entries of all gradients

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import LoraMethod
from .gem import ReferenceGradientMethod


@dataclass(kw_only=True)
class AGem(ReferenceGradientMethod, LoraMethod):
    """Sequential LoRA whose gradient loses what points against the gradient on a draw of stored samples.

    g' = g - (g . r / r . r) r   if g . r < 0, else g
    """

    name: ClassVar[str] = "a_gem"
    summary: ClassVar[str] = "the gradient loses what points against the gradient on stored samples (A-GEM)"
    source: ClassVar[str] = "Chaudhry et al. 2019 (arXiv:1812.00420)"
    stores: ClassVar[str] = "ids of `per_task` samples of each task, or of `capacity` samples in all"
    at_test: ClassVar[str] = "nothing"
    extra_passes: ClassVar[str] = "forward and backward of a batch of stored samples"

    def _references(self) -> list[list]:
        return [self.draw(self.buffer_batch)[0]]

    def _turned(self, gradient_P: Tensor, references_tP: Tensor) -> Tensor:
        reference_P = references_tP[0]
        product = gradient_P @ reference_P
        # a product below 0 means that the reference is not 0
        factor = torch.where(product < 0, product / (reference_P @ reference_P), 0.0)
        return gradient_P - factor * reference_P
