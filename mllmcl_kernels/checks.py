"""Checks at the door: one line that names the op, the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

__all__ = [
    "DTYPE",
    "FLOATS",
    "are_contiguous",
    "are_floating",
    "as_list",
    "as_number",
    "dtypes_in",
    "expect",
    "expect_betas",
    "expect_device",
    "expect_flag",
    "expect_floating",
    "expect_lists",
    "expect_mask",
    "expect_number",
    "expect_real",
    "expect_scalar",
    "expect_shape",
    "expect_tensor",
    "shapes_of",
]

DTYPE, DEVICE, SHAPE, IS_CPU = (operator.attrgetter(name) for name in ("dtype", "device", "shape", "is_cpu"))
#: what torch.compile can trace in their place
TRACEABLE = {
    DTYPE: lambda one: one.dtype,
    DEVICE: lambda one: one.device,
    SHAPE: lambda one: one.shape,
    IS_CPU: lambda one: one.is_cpu,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect(condition: bool, op: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError):
    """Raise `error` with "op: argument must be <expected>, got <got>" unless `condition` holds."""
    if not condition:
        raise error(f"{op}: {argument} must be {expected}, got {got}")


def expect_tensor(op: str, argument: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    expected = "a Tensor or None" if optional else "a Tensor"
    expect(isinstance(value, Tensor), op, argument, expected, type(value).__name__, TypeError)


def expect_floating(op: str, argument: str, value: Tensor) -> None:
    names = "float32, bfloat16, float16 or float64"
    expect(value.dtype in FLOATS, op, argument, f"of dtype {names}", value.dtype, TypeError)


def expect_device(op: str, argument: str, value: Tensor | None, device: torch.device) -> None:
    if value is not None:
        expect(value.device == device, op, argument, f"on {device} like x", value.device)


def expect_shape(op: str, argument: str, value: Tensor, letters: str, shape: Sequence[int]) -> None:
    """`letters` spells the shape in the documentation's names, `shape` in numbers."""
    expect(tuple(value.shape) == tuple(shape), op, argument, f"{letters} = {list(shape)}", list(value.shape))


def expect_mask(op: str, argument: str, mask: object, full: Sequence[int], device: torch.device) -> None:
    """A bool tensor that broadcasts to the shape `full`."""
    expect_tensor(op, argument, mask)
    expect(mask.dtype == torch.bool, op, argument, "of dtype bool", mask.dtype, TypeError)
    expect_device(op, argument, mask, device)
    fits = mask.dim() <= len(full) and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], full[::-1], strict=False)
    )
    expect(fits, op, argument, f"broadcastable to {list(full)}", list(mask.shape))


def _each(get: operator.attrgetter, tensors: Iterable[Tensor]) -> Iterable:
    """An attribute of each tensor, by means of C alone."""
    return map(TRACEABLE[get] if torch.compiler.is_compiling() else get, tensors)


def shapes_of(tensors: Iterable[Tensor]) -> list[torch.Size]:
    """The shape of each tensor."""
    return list(_each(SHAPE, tensors))


def dtypes_in(*lists: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes of all tensors of the lists."""
    return set(_each(DTYPE, chain(*lists)))


def are_contiguous(*lists: Sequence[Tensor]) -> bool:
    """Whether every tensor of the lists is contiguous."""
    return all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists)


def are_floating(*lists: Sequence) -> bool:
    """Whether all are floating tensors on one device; by means of C alone."""
    return (
        all(issubclass(kind, Tensor) for kind in set(map(type, chain(*lists))))
        and dtypes_in(*lists) <= set(FLOATS)
        # a device is an object to make for each tensor
        and (all(_each(IS_CPU, chain(*lists))) or len(set(_each(DEVICE, chain(*lists)))) <= 1)
    )


def _are_alike(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all are floating tensors, of the first list's shapes and on one device."""
    if not are_floating(*lists):
        return False
    shapes = shapes_of(lists[0])
    return all(shapes_of(tensors) == shapes for tensors in lists[1:])


def expect_lists(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    """Lists of equal length whose floating tensors share shape and device, place by place, with the first list's.

    A call may bring hundreds of tensors, so that words are made on failure only.
    """
    for name, tensors in lists.items():
        if not isinstance(tensors, Sequence):
            expect(False, op, name, "a list of tensors", type(tensors).__name__, TypeError)
    (first, heads), *rest = lists.items()
    for name, tensors in rest:
        if len(tensors) != len(heads):
            expect(False, op, name, f"as many as {first} = {len(heads)}", len(tensors))
    if _are_alike(list(lists.values())):
        return
    device = getattr(heads[0], "device", None) if heads else None
    for name, tensors in lists.items():
        for index, (tensor, head) in enumerate(zip(tensors, heads, strict=True)):
            _refuse(op, f"{name}[{index}]", tensor, f"{first}[{index}]", head, device)


def _refuse(op: str, argument: str, tensor: object, first: str, head: Tensor, device: torch.device) -> None:
    expect_tensor(op, argument, tensor)
    expect_floating(op, argument, tensor)
    shape = list(head.shape)
    expect(list(tensor.shape) == shape, op, argument, f"of {first}'s shape {shape}", list(tensor.shape))
    expect(tensor.device == device, op, argument, f"on {device} as the first tensor is", tensor.device)


def as_list(op: str, argument: str, value: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """One tensor, or those of an iterable, as a list."""
    if isinstance(value, Tensor):
        return [value]
    expect(isinstance(value, Iterable), op, argument, "a Tensor or a list of them", type(value).__name__, TypeError)
    return list(value)


def expect_real(op: str, argument: str, value: object, expected: str, fits: Callable[[float], bool]) -> float:
    """The value as a float: TypeError where it is no number, ValueError where it does not fit."""
    is_number = isinstance(value, (int, float, numbers.Real)) or (isinstance(value, Tensor) and value.dim() == 0)
    # words are made on failure alone: a compiler that traces a changing number cannot spell it
    if not is_number:
        expect(False, op, argument, expected, repr(value), TypeError)
    if not fits(value):
        expect(False, op, argument, expected, value)
    return float(value)


def expect_flag(op: str, argument: str, value: object) -> bool:
    """The value as a bool; TypeError where it equals neither True nor False."""
    if value not in (True, False):
        expect(False, op, argument, "True or False", repr(value), TypeError)
    return bool(value)


def expect_betas(op: str, betas: object) -> tuple[float, float]:
    """AdamW's two decay rates."""
    expected = "two numbers in [0, 1)"
    if not (isinstance(betas, Sequence) and len(betas) == 2):
        expect(False, op, "betas", expected, repr(betas), TypeError)
    beta1, beta2 = (expect_real(op, "betas", beta, expected, lambda b: 0.0 <= b < 1.0) for beta in betas)
    return beta1, beta2


def expect_scalar(
    op: str, argument: str, value: float | Tensor, expected: str = "a number", low: float = float("-inf")
) -> float | Tensor:
    """The number, or the one-element tensor without dimensions; a tensor is not looked at, wherever it lives."""
    if isinstance(value, Tensor):
        expect(value.numel() == 1, op, argument, "a number or a tensor with one element", list(value.shape))
        return value.reshape(())
    if not isinstance(value, numbers.Real):
        expect(False, op, argument, expected, repr(value), TypeError)
    if not value >= low:
        expect(False, op, argument, expected, value)
    return value


def as_number(value: float | Tensor) -> Tensor:
    """A 0-dim tensor of what `expect_scalar` lets through, float64 on the CPU where it was no tensor."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def expect_number(op: str, argument: str, value: float | Tensor, *expected) -> Tensor:
    """`expect_scalar` as a tensor."""
    return as_number(expect_scalar(op, argument, value, *expected))
