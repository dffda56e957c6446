"""README's tables are those of the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_up_to_date():
    found = subprocess.run([sys.executable, "docs/fill_readme.py", "--check"], cwd=ROOT, check=False)
    assert found.returncode == 0, "run: python docs/fill_readme.py"
