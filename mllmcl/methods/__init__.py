"""Continual-learning methods: one file each, found by listing this folder, and entry points of `mllmcl.methods`."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import logging
import math
import pkgutil
from collections.abc import Collection

from ..options import check_types
from .base import Method, Phase

__all__ = ["Method", "Phase", "available", "create", "find"]

GROUP = "mllmcl.methods"
log = logging.getLogger("mllmcl")


def _ours() -> dict[str, type[Method]]:
    """name -> class, from every module of this folder that defines a concrete method."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for value in vars(loaded).values():
            if (
                inspect.isclass(value)
                and issubclass(value, Method)
                and value.__module__ == loaded.__name__
                and value.name
            ):
                found[value.name] = value
    return found


@functools.cache
def _warn(text: str) -> None:
    log.warning(text)


def _theirs(taken: Collection[str]) -> tuple[dict[str, type[Method]], dict[str, str]]:
    """Classes by the names of the entry points, and why those that are left out are."""
    found, refused = {}, {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        where = f"entry point {entry.name} = {entry.value}"
        try:
            value = entry.load()
        except Exception as error:  # what a stranger's module raises when it is imported
            refused[entry.name] = f"{where} cannot be loaded: {type(error).__name__}: {error}"
            continue
        if entry.name in taken:
            refused[entry.name] = f"{where} has the name of a method that is here already"
        elif not (inspect.isclass(value) and issubclass(value, Method)):
            refused[entry.name] = f"{where} is no class derived from mllmcl.methods.Method"
        else:
            found[entry.name] = value
    return found, refused


def available() -> dict[str, type[Method]]:
    """Every method by name; the class carries `summary`, `source`, `stores`, `at_test` and `deviations`.

    An entry point of another package that is no method, or has the name of one, is left out with a warning.
    """
    ours = _ours()
    theirs, refused = _theirs(ours)
    for reason in refused.values():
        _warn(reason)
    return dict(sorted({**theirs, **ours}.items()))


def find(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: there is no such method; the message lists near names.
    """
    known = available()
    if not isinstance(name, str):
        raise TypeError(f"method must be a name, got {name!r}")
    if name not in known:
        _, refused = _theirs(known)
        if name in refused:
            raise ValueError(f"method {name}: {refused[name]}")
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"method must be one of {', '.join(known)}, got {name!r}{hint}")
    return known[name]


def create(name: str, **options) -> Method:
    """A method with its options, e.g. `create("mr_lora", rank=8, router="prototype")`.

    Raises:
        ValueError: unknown name, an option out of range. TypeError: unknown option, with the ones it takes, or an
            option of another type.
    """
    method = find(name)
    known = inspect.signature(method).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"method {name} takes {', '.join(known)}, got {', '.join(unknown)}")
    check_types(method, options, f"method {name}: ")
    made = method(**options)
    made.check_options()
    for option, value in options.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"method {name}: {option} must be a number, got nan")
    return made
