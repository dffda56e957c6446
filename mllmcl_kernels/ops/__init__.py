"""Every folder here is an op: importing this package imports them all, and each declares itself."""

import importlib
import pkgutil

for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
