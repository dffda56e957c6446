"""Streams of tasks: one file each, found by listing this folder, or any folder of LLaVA-style JSON."""

from __future__ import annotations

import difflib
import importlib
import inspect
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
        name_or_folder: see `available`; a folder that bears such a name is meant by "./name".
        root: where a folder lies, if not in the current one, or the files of a public benchmark; the streams that are
            built in need none.
        options: of the stream, e.g. num_train, num_test, seed, tasks.

    Raises:
        ValueError: no such stream, with near names. TypeError: an option it does not take.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise TypeError(f"stream must be a name or a folder, got {name_or_folder!r}")
    name = os.fspath(name_or_folder)
    modules = _modules()
    if name in modules:
        known = inspect.signature(modules[name].load).parameters
        if root is not None and "root" in known:
            options = {"root": root, **options}
        if unknown := [option for option in options if option not in known]:
            raise TypeError(f"stream {name} takes {', '.join(known)}, got {', '.join(unknown)}")
        return modules[name].load(**options)
    folder = Path(name) if root is None else Path(root) / name
    if folder.is_dir():
        from .llava_folder import load_folder

        known = list(inspect.signature(load_folder).parameters)[1:]
        if unknown := [option for option in options if option not in known]:
            raise TypeError(f"a folder as a stream takes {', '.join(known)}, got {', '.join(unknown)}")
        return load_folder(folder, **options)
    near = difflib.get_close_matches(name, modules, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; there is no folder {folder}"
    raise ValueError(f"stream must be one of {', '.join(modules)} or a folder, got {name!r}{hint}")
