"""`Mask`: which entries of a parameter may change, at four granularities, in one form that every masked op takes."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import DEVICE, SHAPE, expect, expect_tensor

__all__ = ["ELEMENTS", "NONE", "OWNER", "Mask", "broadcast_mask", "flatten_masks"]

# how a mask tensor is read; a number >= 0 is the dimension whose rows it selects
NONE, ELEMENTS, OWNER = -3, -2, -1
TENSOR, KIND, ACTIVE = (operator.attrgetter(name) for name in ("tensor", "kind", "active"))


@dataclass(frozen=True)
class Mask:
    """Entries that may change (True) and entries that must not (False).

    Build one with `elements`, `rows`, `experts` or `owner`. `tensor` holds uint8 0 or 1 (`owner`: the map itself),
    `kind` says how it is read.
    """

    tensor: Tensor
    kind: int
    active: int = 1

    @staticmethod
    def elements(mask: Tensor) -> Mask:
        """One bool for each entry, of the parameter's shape."""
        _expect_bool("elements", mask)
        return Mask(mask.to(torch.uint8), ELEMENTS)

    @staticmethod
    def rows(mask: Tensor, dim: int = 0) -> Mask:
        """bool `[n]` over the slices of dimension `dim`."""
        _expect_bool("rows", mask)
        expect(mask.dim() == 1, "Mask.rows", "mask", "of shape [n]", list(mask.shape))
        fits = isinstance(dim, numbers.Integral) and dim >= 0
        expect(fits, "Mask.rows", "dim", "a non-negative dimension", repr(dim))
        return Mask(mask.to(torch.uint8), int(dim))

    @staticmethod
    def experts(
        mask: Tensor | Sequence[bool], ranks: Sequence[int], dim: int, *, start: int = 0, length: int | None = None
    ) -> Mask:
        """bool `[E]`, each expert owning `ranks[e]` consecutive slices of dimension `dim`.

        A shard of the stack passes `start` and `length`, its global range of slices: FSDP2 cuts a stack wherever the
        world size says, in the middle of an expert too.
        """
        if not isinstance(mask, (Tensor, Sequence)):
            expect(False, "Mask.experts", "mask", "a bool tensor or booleans", type(mask).__name__, TypeError)
        mask = torch.as_tensor(mask)
        _expect_bool("experts", mask)
        ranks = ranks.tolist() if isinstance(ranks, Tensor) else ranks
        fits = isinstance(ranks, Iterable) and all(isinstance(rank, numbers.Integral) and rank >= 0 for rank in ranks)
        expect(fits, "Mask.experts", "ranks", "integers of at least 0", ranks)
        expect(
            mask.shape == (len(ranks),),
            "Mask.experts",
            "mask",
            f"[E] with E = {len(ranks)} as in ranks",
            list(mask.shape),
        )
        slices = mask.repeat_interleave(torch.tensor(list(ranks), device=mask.device))
        whole = all(value is None or isinstance(value, numbers.Integral) for value in (start, length))
        expect(whole, "Mask.experts", "start, length", "integers", (start, length), TypeError)
        length = len(slices) - start if length is None else length
        inside = start >= 0 and length >= 0 and start + length <= len(slices)
        expect(inside, "Mask.experts", "start, length", f"a range within the {len(slices)} slices", (start, length))
        return Mask.rows(slices[start : start + length].contiguous(), dim)

    @staticmethod
    def owner(owners: Tensor, active: int) -> Mask:
        """uint8 map of the parameter's shape: entries whose owner is `active` may change (PackNet)."""
        expect_tensor("Mask.owner", "owners", owners)
        expect(owners.dtype == torch.uint8, "Mask.owner", "owners", "of dtype uint8", owners.dtype, TypeError)
        fits = isinstance(active, numbers.Integral) and 0 <= active <= 255
        expect(fits, "Mask.owner", "active", "an id in 0..255", repr(active))
        return Mask(owners, OWNER, active)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        return Mask(self.tensor.to(device), self.kind, self.active)

    def check(self, op: str, argument: str, parameter: Tensor) -> None:
        """Raise ValueError unless this mask fits `parameter`."""
        if self.kind in (ELEMENTS, OWNER):
            if self.tensor.shape != parameter.shape:
                wanted = f"of the parameter's shape {list(parameter.shape)}"
                expect(False, op, argument, wanted, list(self.tensor.shape))
        else:
            if self.kind >= parameter.dim():
                expect(False, op, argument, f"over a dimension below {parameter.dim()}", self.kind)
            rows = parameter.shape[self.kind]
            if self.tensor.shape[0] != rows:
                wanted = f"[{rows}], the length of dimension {self.kind}"
                expect(False, op, argument, wanted, list(self.tensor.shape))
        if self.tensor.device != parameter.device:
            expect(False, op, argument, f"on {parameter.device}", self.tensor.device)

    def expand(self, shape: Sequence[int]) -> Tensor:
        """The mask as bool, broadcastable to a parameter of `shape`."""
        return broadcast_mask(self.tensor, self.kind, self.active, len(shape))


def _expect_bool(kind: str, mask: Tensor) -> None:
    expect_tensor(f"Mask.{kind}", "mask", mask)
    expect(mask.dtype == torch.bool, f"Mask.{kind}", "mask", "of dtype bool", mask.dtype, TypeError)


def broadcast_mask(tensor: Tensor, kind: int, active: int, dims: int) -> Tensor:
    """bool, broadcastable to a parameter with `dims` dimensions."""
    if kind == NONE:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if kind == ELEMENTS:
        return tensor != 0
    if kind == OWNER:
        return tensor == active
    return (tensor != 0).view(*(-1 if dim == kind else 1 for dim in range(dims)))


@functools.lru_cache(maxsize=4096)
def _fits(shape: torch.Size, mask: torch.Size, kind: int) -> bool:
    if kind < 0:
        return mask == shape
    return kind < len(shape) and tuple(mask) == (shape[kind],)


def _all_fit(tensors: Sequence[Tensor], masks: Sequence[Mask | None]) -> bool:
    """Whether there is a mask for every tensor and each fits; by means of C alone."""
    if set(map(type, masks)) != {Mask}:
        return False
    found = list(map(TENSOR, masks))
    places = set(map(DEVICE, tensors)) | set(map(DEVICE, found))
    return len(places) == 1 and all(map(_fits, map(SHAPE, tensors), map(SHAPE, found), map(KIND, masks)))


def flatten_masks(
    op: str, tensors: Sequence[Tensor], masks: Sequence[Mask | None] | None
) -> tuple[list[Tensor], list[int], list[int]]:
    """What the ops take: one mask tensor, kind and active id for each tensor; an empty tensor where there is none."""
    if masks is None:
        masks = [None] * len(tensors)
    if not isinstance(masks, Sequence):
        expect(False, op, "masks", "None or a list of them", type(masks).__name__, TypeError)
    expect(len(masks) == len(tensors), op, "masks", f"None or one for each of the {len(tensors)} tensors", len(masks))
    if not tensors:
        return [], [], []
    # one empty tensor stands for every mask that is not there
    nothing = tensors[0].new_empty(0, dtype=torch.uint8)
    if not torch.compiler.is_compiling() and _all_fit(tensors, masks):
        return list(map(TENSOR, masks)), list(map(KIND, masks)), list(map(ACTIVE, masks))
    flat, kinds, actives = [nothing] * len(tensors), [NONE] * len(tensors), [0] * len(tensors)
    for index, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        if mask is not None:
            if not isinstance(mask, Mask):
                expect(False, op, f"masks[{index}]", "a Mask or None", type(mask).__name__, TypeError)
            mask.check(op, f"masks[{index}]", tensor)
            flat[index], kinds[index], actives[index] = mask.tensor, mask.kind, mask.active
    return flat, kinds, actives
