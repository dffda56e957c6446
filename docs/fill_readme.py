"""Fill the tables of README.md and benchmarks/README.md from code and results: `python docs/fill_readme.py`.

With `--check` it writes nothing and ends with 1 where one is not up to date.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BENCHMARKS = README.parent / "benchmarks" / "README.md"
#: contestants that do less, or that are ours
NO_PEERS = ("base linear", "base linears", "base model", "base product", "route, then lora_mix")
PROVIDERS = {"C++": "cpp", "Triton": "triton", "CUDA C++": "cuda"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ops() -> str:
    """Every folder of ops, what it does, and which provider files it has."""
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


def smallest() -> str:
    """The file of the method that needs least of its own."""
    from mllmcl.methods import find

    text = Path(inspect.getfile(find("rehearsal"))).read_text()
    return f"```python\n{text}```"


def streams() -> str:
    """Every stream with a name."""
    from mllmcl.streams import available

    rows = [[f"`{name}`", text] for name, text in available().items()]
    return table(
        ["name", "tasks"], [*rows, ["any folder", "LLaVA-style JSON, `<task>_train.json` and `<task>_test.json`"]]
    )


def _newest() -> list[tuple[dict, str]]:
    """The cases of `results/*.json` with their device and date; of a case measured twice on a device the newer one."""
    found = [json.loads(path.read_text()) for path in (BENCHMARKS.parent / "results").glob("*.json")]
    cases: dict[tuple[str, str, str], tuple[dict, str]] = {}
    for result in sorted(found, key=lambda result: result["date"]):
        for case in result["cases"]:
            key = case["op"], case["case"], result["device"]
            # the newest come last
            cases.pop(key, None)
            cases[key] = case, f"{result['device']}, {result['date'][:10]}"
    return list(cases.values())


def _raced() -> Iterator[tuple[list[str], list[str]]]:
    """Every case that has a peer, op by op: op, case, ours; best peer, ratios, limit, device."""
    found = _newest()
    # cases in the order in which they were first measured, devices beside each other
    order = list(dict.fromkeys((case["op"], case["case"]) for case, _ in found))
    places = {name: place for place, name in enumerate(order)}
    for case, device in sorted(found, key=lambda one: (one[0]["op"], places[one[0]["op"], one[0]["case"]])):
        if case["op"] == "training step":
            continue
        ratios = case["peer_over_ours"].items()
        peers = {name: ratio for name, ratio in ratios if name not in NO_PEERS and not name.startswith("ours")}
        if not peers:
            continue
        best = min(peers, key=peers.get)
        loop = next((f"{ratio:.2f}x" for name, ratio in peers.items() if name.startswith("loop")), "")
        ours = 1e3 * case["seconds"]["ours"]["median"]
        share = case["rates"].get("ours", {}).get("share")
        limit = "" if share is None else f"{100 * share:.0f} %"
        name = case["case"].replace("|", "\\|")
        yield [case["op"], name, f"{ours:.2f}"], [best, f"{peers[best]:.2f}x", loop, limit, device]


def races() -> str:
    """Every case: ours, the best peer, the loop over experts, and the limit."""
    head = ("op", "case", "ours, ms", "best peer", "best peer / ours", "loop / ours", "of limit", "device")
    return table(head, ([*case, *rest] for case, rest in _raced()))


def highlights() -> str:
    """The first case of every op."""
    firsts: dict[tuple[str, str], list[str]] = {}
    for case, (best, ratio, loop, _limit, device) in _raced():
        firsts.setdefault((case[0], device), [*case, best, ratio, loop, device])
    head = ("op", "case", "ours, ms", "best peer", "best peer / ours", "loop / ours", "device")
    return table(head, firsts.values())


def steps() -> str:
    """Every method's step beside plain LoRA's, as it was measured last: its total rank may have changed since."""
    rows = {}
    for case, device in _newest():
        if case["op"] == "training step":
            name, _, rest = case["case"].partition(", ")
            passes, ratio = case["notes"].get("in addition", ""), case["notes"]["of lora's step"]
            rows[name] = [f"`{name}`", rest, f"{ratio:.2f}", passes, device]
    return table(
        ("method", "case", "of plain LoRA's step", "in addition", "device"), (rows[name] for name in sorted(rows))
    )


def sweep() -> str:
    """Every finished run of `results/methods/*.json`."""
    rows = []
    for path in sorted((BENCHMARKS.parent / "results" / "methods").glob("*.json")):
        found = json.loads(path.read_text())
        metrics, told = found["metrics"], found["metrics"]["language_perplexity"]
        low, high = metrics["intervals"]["last"]
        rows.append(
            [
                metrics["stream"], f"`{metrics['method']}`", str(metrics["seed"]),
                f"{100 * metrics['last']:.1f} ({100 * low:.0f}..{100 * high:.0f})", f"{100 * metrics['average']:.1f}",
                f"{100 * metrics['finetune']:.1f}", f"{100 * metrics['bwt']['T-1']:.1f}",
                "" if not metrics["router"] else f"{100 * metrics['router']['accuracy']:.0f}",
                "" if not told else f"{told[0]:.1f} to {told[-1]:.1f}",
                f"{metrics['trainable_parameters'] / 1e6:.1f}", f"{metrics['stored_bytes'] / 1e6:.0f}",
                f"{metrics['peak_memory_bytes'] / 2**30:.1f}", metrics["finished"][:10],
            ]
        )  # fmt: skip
    head = (
        "stream", "method", "seed", "last (95 %)", "average", "just trained", "BWT", "router, %", "perplexity",
        "trainable, M", "kept, MB", "peak, GiB", "date",
    )  # fmt: skip
    return table(head, rows)


#: file to its tables
TABLES = {
    README: {"ops": ops, "methods": methods, "smallest": smallest, "streams": streams, "highlights": highlights},
    BENCHMARKS: {"races": races, "steps": steps, "sweep": sweep},
}


def filled(path: Path) -> str:
    """A file's text with every table as the code and the results have it now."""
    text = path.read_text()
    for name, make in TABLES[path].items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
            lambda m, make=make: m[1] + make() + m[2],
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{path.name}: expected one block <!-- {name} -->, found {count}")
    return text


def main() -> int:
    """0 where the files are up to date or were written, 1 where `--check` finds one old."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = {path: path.read_text() for path in TABLES}
    new = {path: filled(path) for path in TABLES}
    if not check:
        for path in TABLES:
            if new[path] != old[path]:
                path.write_text(new[path])
    return int(check and new != old)


if __name__ == "__main__":
    sys.exit(main())
