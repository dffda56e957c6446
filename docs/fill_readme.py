"""Fill the tables of README.md from the code: `python docs/fill_readme.py`.

With `--check` it writes nothing and ends with 1 where they are not up to date.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
PROVIDERS = {"C++": "cpp", "Triton": "triton", "CUDA C++": "cuda"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ops() -> str:
    """Every op with a public function, what it does, and which provider files it has."""
    from mllmcl_kernels.op import REGISTRY

    packages = dict.fromkeys(op.package for op in REGISTRY.values())
    rows = []
    for package in sorted(packages):
        name, _, text = importlib.import_module(package).__doc__.partition("\n")[0].rstrip(".").partition(": ")
        found = (importlib.util.find_spec(f"{package}.{module}") for module in PROVIDERS.values())
        rows.append([name, text, "yes", *("" if spec is None else "yes" for spec in found)])
    return table(["op", "what it does", "reference", *PROVIDERS], rows)


def methods() -> str:
    """Every method with the facts of its class."""
    from mllmcl.methods import available

    facts = ("summary", "source", "stores", "at_test", "extra_passes", "deviations")
    rows = [[f"`{name}`", *(getattr(method, fact) for fact in facts)] for name, method in available().items()]
    return table(
        ["name", "what it is", "source", "stores", "needs at test", "passes beside the batch's", "deviations"], rows
    )


def streams() -> str:
    """Every stream with a name."""
    from mllmcl.streams import available

    rows = [[f"`{name}`", text] for name, text in available().items()]
    return table(
        ["name", "tasks"], [*rows, ["any folder", "LLaVA-style JSON, `<task>_train.json` and `<task>_test.json`"]]
    )


def filled(text: str) -> str:
    """README's text with every table as the code has it now."""
    for name, make in {"ops": ops, "methods": methods, "streams": streams}.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
            lambda m, make=make: m[1] + make() + m[2],
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{README.name}: expected one block <!-- {name} -->, found {count}")
    return text


def main() -> int:
    """0 where README is up to date or was written, 1 where `--check` finds it old."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = README.read_text()
    new = filled(old)
    if new != old and not check:
        README.write_text(new)
    return int(check and new != old)


if __name__ == "__main__":
    sys.exit(main())
