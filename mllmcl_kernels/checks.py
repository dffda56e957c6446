"""Checks at the door: one line that names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FLOATS", "expect", "expect_device", "expect_floating", "expect_like", "expect_shape", "expect_tensor"]

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


def expect_like(op: str, name: str, index: int, tensor: Tensor, like: Tensor, first: Tensor) -> None:
    """`name[index]` is a floating tensor of `like`'s shape on `first`'s device; words are made only for what is wrong.

    Lists of hundreds of tensors pass here at every step.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype in FLOATS
        and tensor.shape == like.shape
        and tensor.device == first.device
    ):
        return
    label = f"{name}[{index}]"
    expect_tensor(op, label, tensor)
    expect_floating(op, label, tensor)
    expect(tensor.shape == like.shape, op, label, f"of the parameter's shape {list(like.shape)}", list(tensor.shape))
    expect(tensor.device == first.device, op, label, f"on {first.device} like the first tensor", tensor.device)
