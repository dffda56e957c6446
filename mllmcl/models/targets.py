"""Which linear layers get experts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

__all__ = ["LINEAR_KINDS", "decoder_layer", "linear_names", "match_targets"]

#: the linears of a decoder layer, by the last part of their name
LINEAR_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_names(model: nn.Module, prefix: str) -> list[str]:
    """Full names of the `nn.Linear` modules at or below `prefix`, in the model's order."""
    below = f"{prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (name == prefix or name.startswith(below))
    ]


def decoder_layer(name: str, prefix: str) -> int:
    """Number of the decoder layer that the linear `name` of the language tower at `prefix` belongs to.

    Raises:
        ValueError: there is no number in the name.
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name.removeprefix(prefix))
    if number is None:
        raise ValueError(f"{name} belongs to no numbered decoder layer")
    return int(number.group(1))


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})) or "no linear at all"


def match_targets(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The names that `targets` means.

    Args:
        names: linears of the language tower; nothing else can match.
        targets: "all-linear" (the seven kinds of a decoder layer), a regular expression for the full name, or a list of
            full names, name endings ("q_proj", "layers.0.mlp.up_proj") and regular expressions.

    Raises:
        ValueError: an entry that matches nothing, with what could match.
    """
    if targets == "all-linear":
        matched = {name for name in names if name.rsplit(".", 1)[-1] in LINEAR_KINDS}
        if not matched:
            raise ValueError(
                f'targets: "all-linear" means {", ".join(LINEAR_KINDS)} of the language tower, '
                f"which has {_kinds(names)}"
            )
        return [name for name in names if name in matched]
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets: expected at least one name, got an empty list")
    matched = set()
    for pattern in patterns:
        found = {name for name in names if _matches(pattern, name)}
        if not found:
            try:
                found = {name for name in names if re.fullmatch(pattern, name)}
            except re.error as error:
                raise ValueError(f"targets: {pattern!r} is no name and no regular expression ({error})") from error
        if not found:
            raise ValueError(
                f"targets: {pattern!r} matches no linear of the language tower, which has {_kinds(names)}"
                + (f" (for example {names[0]})" if names else "")
            )
        matched |= found
    return [name for name in names if name in matched]
