"""Streams of tasks: one file each, found by listing this folder, or any folder of LLaVA-style JSON."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from pathlib import Path
from types import ModuleType

from .base import Sample, Stream, Task

__all__ = ["Sample", "Stream", "Task", "available", "load"]


def _modules() -> dict[str, ModuleType]:
    """name -> module, for every module here that says what it is in SUMMARY."""
    found = {}
    for item in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{item.name}")
        if hasattr(module, "SUMMARY"):
            found[item.name.replace("_", "-")] = module
    return found


def available() -> dict[str, str]:
    """Name -> one line, for every stream that has a name."""
    return {name: module.SUMMARY for name, module in _modules().items()}


def load(name_or_folder: str | os.PathLike, root: str | os.PathLike | None = None, **options) -> Stream:
    """A stream by name, or a folder of LLaVA-style JSON.

    Args:
        name_or_folder: see `available`; anything with a path separator, or that is a folder, is read as a folder.
        root: where the files of a stream lie, for those that need them.
        options: of the stream, e.g. num_train, num_test, seed.

    Raises:
        ValueError: no such stream, with near names. TypeError: an option it does not take.
    """
    name = os.fspath(name_or_folder)
    modules = _modules()
    if name in modules:
        return modules[name].load(**({} if root is None else {"root": root}), **options)
    if Path(name).is_dir():
        from .llava_folder import load_folder

        return load_folder(Path(name), **options)
    near = difflib.get_close_matches(name, modules, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"stream must be one of {', '.join(modules)} or a folder, got {name!r}{hint}")
