"""What some streams need beside the Python package index."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

NEEDS_NPM = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
NEEDS_RESVG = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")
