"""Calls of `mask_grads_`, and the masked tensors that `masked_adamw_` is tested on."""

from __future__ import annotations

import torch

from ...masks import Mask, flatten_masks
from ...op import BadSample, Sample

__all__ = ["bad_samples", "masked_tensors", "samples"]


def masked_tensors(generator: torch.Generator) -> tuple[list[torch.Tensor], list[Mask | None]]:
    """float64 tensors with one mask of every kind: none, elements, rows of either dimension, experts, owner, empty.

    Some matrices lie by columns.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def by_columns(*shape: int) -> torch.Tensor:
        return normal(*shape[::-1]).t()

    def coin(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < 0.5

    owners = torch.randint(0, 4, (9, 33), generator=generator).to(torch.uint8)
    ranks = (3, 4, 0, 6)
    experts = torch.tensor([True, False, True, True])
    tensors = [normal(7, 5), normal(129), normal(6, 19), by_columns(8, 13), normal(5, 13), by_columns(9, 33)]
    tensors += [normal(3, 4, 5), by_columns(4, 6)]
    masks = [
        None,
        Mask.elements(coin(129)),
        Mask.rows(coin(6)),
        Mask.experts(experts, ranks, 1),
        Mask.rows(coin(13), dim=1),
        Mask.owner(owners, 2),
        Mask.rows(coin(4), dim=1),
        Mask.rows(coin(4)),
    ]
    return [*tensors, normal(0, 4), normal(())], [*masks, Mask.rows(torch.zeros(0, dtype=torch.bool)), None]


def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Every kind of mask at once, one tensor alone, tensors that are not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    tensors, masks = masked_tensors(generator)
    grads = [tensor.to(device, dtype) for tensor in tensors]
    masks = [None if mask is None else mask.to(device) for mask in masks]
    strided = grads[2].t().contiguous().t()
    one = flatten_masks("samples", [strided], [masks[2]])
    return [
        Sample("every kind", (grads, *flatten_masks("samples", grads, masks))),
        Sample("one strided", ([strided], *one)),
    ]


def bad_samples() -> list[BadSample]:
    """Calls of the public function that raise."""
    from . import mask_grads_

    grad = torch.ones(4, 2)
    rows = Mask.rows(torch.ones(4, dtype=torch.bool))

    def call(grads, masks):
        return lambda: mask_grads_(grads, masks)

    return [
        BadSample("no tensor", call([1.0], [None]), TypeError, r"grads\[0\] must be a Tensor, got float"),
        BadSample(
            "integer", call([torch.ones(2, dtype=torch.int64)], [None]), TypeError, r"grads\[0\] must be of dtype"
        ),
        BadSample(
            "count",
            call([grad], [rows, None]),
            ValueError,
            r"masks must be None or one for each of the 1 tensors, got 2",
        ),
        BadSample("masks None", call([grad], None), TypeError, r"masks must be one Mask or None for each gradient"),
        BadSample(
            "no mask", call([grad], [torch.ones(4)]), TypeError, r"masks\[0\] must be a Mask or None, got Tensor"
        ),
        BadSample(
            "row count",
            call([torch.ones(3, 2)], [rows]),
            ValueError,
            r"masks\[0\] must be \[3\], the length of dimension 0, got \[4\]",
        ),
        BadSample(
            "dimension",
            call([torch.ones(4)], [Mask.rows(torch.ones(4, dtype=torch.bool), dim=1)]),
            ValueError,
            r"masks\[0\] must be over a dimension below 1, got 1",
        ),
        BadSample(
            "element shape",
            call([grad], [Mask.elements(torch.ones(4, 3, dtype=torch.bool))]),
            ValueError,
            r"the parameter's shape \[4, 2\], got \[4, 3\]",
        ),
        BadSample(
            "mask dtype",
            lambda: Mask.elements(torch.ones(4)),
            TypeError,
            r"Mask\.elements: mask must be of dtype bool, got torch\.float32",
        ),
        BadSample(
            "experts and ranks", lambda: Mask.experts([True], (2, 2), 0), ValueError, r"mask must be \[E\] with E = 2"
        ),
        BadSample("owner dtype", lambda: Mask.owner(torch.ones(4), 1), TypeError, r"owners must be of dtype uint8"),
        BadSample(
            "owner id",
            lambda: Mask.owner(torch.ones(4, dtype=torch.uint8), 256),
            ValueError,
            r"active must be an id in 0\.\.255, got 256",
        ),
    ]
