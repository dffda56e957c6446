"""The error rule and the helpers with which every op and provider is tested; usable by other packages' tests too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .op import Op, Sample

__all__ = ["Excess", "differentiable", "excess", "map_tensors", "outputs_of", "poisoned_empty", "snapshot", "to_double"]

# what a value may be off by beyond the plain path's own error, relative to the largest true value
FLOOR = 1e-6
TAIL = 0.999


@dataclass(frozen=True)
class Excess:
    """How far an output misses the rule: 0 and below passes. `ratio` is its error over the plain path's."""

    norm: float
    tail: float
    ratio: float

    @property
    def passes(self) -> bool:
        return self.norm <= 0.0 and self.tail <= 0.0


def excess(ours: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0) -> Excess:
    """error(ours) <= factor * error(plain) + 1e-6 * max|truth|, for the norm and for the 99.9th percentile.

    `plain` is the reference in the same dtype as ours, `truth` the reference in float64. NaN and infinity have to
    sit where the truth has them and count no further.
    """
    ours, plain, truth = (tensor.detach().to("cpu", torch.float64).flatten() for tensor in (ours, plain, truth))
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    assert torch.equal(ours.isnan(), truth.isnan()), "NaN in other places than the truth's"
    infinite = truth.isinf()
    assert torch.equal(ours[infinite], truth[infinite]), "infinities are not the truth's"
    known = truth.isfinite()
    ours, plain, truth = ours[known], plain[known], truth[known]
    if truth.numel() == 0:
        return Excess(0.0, 0.0, 0.0)
    floor = FLOOR * float(truth.abs().max())
    error, allowed = (ours - truth).abs(), (plain - truth).abs()
    norm = float(error.norm()) - factor * float(allowed.norm()) - floor * truth.numel() ** 0.5
    tail = float(error.quantile(TAIL)) - factor * float(allowed.quantile(TAIL)) - floor
    return Excess(norm, tail, float(error.norm()) / max(float(allowed.norm()), floor, 1e-300))


def map_tensors(args: Sequence, change: Callable[[Tensor], object]) -> tuple:
    """The arguments with `change` applied to every tensor, inside lists too."""

    def visit(arg):
        if isinstance(arg, Tensor):
            return change(arg)
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return [change(item) for item in arg]
        return arg

    return tuple(visit(arg) for arg in args)


def to_double(args: Sequence) -> tuple:
    """A copy of the arguments with floating tensors in float64."""
    return map_tensors(args, lambda tensor: (tensor.double() if tensor.is_floating_point() else tensor).clone())


def snapshot(args: Sequence) -> list[Tensor]:
    """Copies of all tensors among the arguments, to compare bytes with later."""
    copies: list[Tensor] = []
    map_tensors(args, lambda tensor: copies.append(tensor.detach().clone()))
    return copies


def outputs_of(op: Op, args: Sequence, run: Callable) -> list[Tensor]:
    """Everything a call gives back: outputs and arguments changed in place. The arguments are copied first."""
    args = map_tensors(args, lambda tensor: tensor.detach().clone())
    result = run(*args)
    outputs = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    for name, arg in zip(op.argument_names, args, strict=True):
        if name in op.mutates:
            outputs += [arg] if isinstance(arg, Tensor) else list(arg)
    return outputs


def differentiable(op: Op, sample: Sample) -> tuple[list[Tensor], list]:
    """The floating tensors that get a gradient, those of lists one by one, and the arguments that hold them."""
    args = list(map_tensors(sample.args, lambda tensor: tensor.detach().clone()))
    leaves: list[Tensor] = []

    def mark(tensor: Tensor) -> None:
        if tensor.is_floating_point():
            leaves.append(tensor.requires_grad_())

    for name, arg in zip(op.argument_names, args, strict=True):
        if name not in op.constants:
            map_tensors((arg,), mark)
    return leaves, args


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """While active, uninitialised floating memory from torch.empty and its kin is NaN, and integers are -77."""

    def poison(make: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta" or type(tensor) is not Tensor:
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(-77) if tensor.dtype in (torch.int32, torch.int64) else tensor

        return wrapped

    kept = (torch.empty, torch.empty_like, Tensor.new_empty)
    torch.empty, torch.empty_like, Tensor.new_empty = (poison(make) for make in kept)
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = kept
