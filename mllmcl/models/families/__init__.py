"""Model families, one file each, found by listing this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from .base import Family

__all__ = ["Family", "find"]


@functools.cache
def _families() -> dict[str, Family]:
    """`config.model_type` to family; the default is under ''."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f".{info.name}", __name__), "FAMILY", None)
        if family is not None:
            found.update(dict.fromkeys(family.model_types or ("",), family))
    return found


def find(model_type: str) -> Family:
    """The family of a `config.model_type`, or the default that looks for the usual names."""
    families = _families()
    return families.get(model_type, families[""])
