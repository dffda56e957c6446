"""Options held against their annotations, before anything is loaded or computed."""

from __future__ import annotations

import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["check_at_least", "check_count", "check_model_name", "check_types"]


def check_types(owner: type, values: Mapping[str, object], label: str = "") -> None:
    """Raise TypeError "<label><option> must be <annotation>, got <value>" for the first option of another type.

    An integer passes for a float; True and False pass for bool alone.
    """
    try:
        hints = typing.get_type_hints(owner)
    except NameError:
        # annotations of names that only a type checker imports
        return
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{label}{name} must be {_words(hints[name])}, got {value!r}")


def check_at_least(values: object, least: float, names: Iterable[str]) -> None:
    """Raise ValueError where an attribute that is no None is below `least`, or no number."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}{_or_none(type(values), name)}, got {value}")


def check_count(argument: str, value: object) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")


def _or_none(owner: type, name: str) -> str:
    return " or None" if "None" in str(owner.__annotations__.get(name, "")) else ""


def check_model_name(argument: str, name: str | os.PathLike, known: Sequence[str] = ()) -> None:
    """Raise ValueError where `name` reads like a folder and there is none, which a model hub would tell oddly."""
    text = os.fspath(name)
    if not os.path.exists(text) and (text.startswith((".", "~", os.sep)) or text.count("/") > 1 or not text):
        more = f"{', '.join(known)}, " if known else ""
        raise ValueError(f"{argument} must be {more}a folder or a name on the model hub, got {text!r}: no such folder")
    if os.path.isdir(text) and not os.path.isfile(os.path.join(text, "config.json")):
        raise ValueError(f"{argument}: the folder {text!r} holds no model, since there is no config.json")


def _fits(value: object, hint: object) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return not isinstance(hint, type) or origin is not None or isinstance(value, hint)


def _words(hint: object) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in inner)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inner))
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
