"""Rules of the tree that a reader relies on: imports run one way, nothing unsafe is called, the API is documented."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS, PACKAGE = ROOT / "mllmcl_kernels", ROOT / "mllmcl"

#: floors of mllmcl, lowest first; a module may import its own floor and those below
FLOORS = (
    ("files", "processes", "seeds"),
    ("assets",),
    ("streams", "models"),
    ("methods",),
    ("evaluation",),
    ("training",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, root: Path) -> list[tuple[str, bool]]:
    """(absolute module name, only for type checking) of every import in a file."""
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    package = parts[:-1]
    found = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only = True
        if isinstance(node, ast.Import):
            found.extend((alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if node.module:
                found.append((stem, typing_only))
            else:
                found.extend((f"{stem}.{alias.name}", typing_only) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_torch_and_the_standard_library_only(path: Path):
    """Vendored or published alone they still work; triton only in files that are imported where it is there."""
    allowed = {"torch", "mllmcl_kernels", *sys.stdlib_module_names}
    if path.name.startswith("triton"):
        allowed.add("triton")
    for name, _ in imports(path, KERNELS):
        assert name.split(".")[0] in allowed, name
    tree = ast.parse(path.read_text())
    absolute = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level and n.module]
    assert not any(node.module.startswith("mllmcl") for node in absolute), "imports itself by name"
    assert not re.search(
        r"\bmllmcl\b(?!_)(?!::)", re.sub(r"'mllmcl\[triton\]'|\"mllmcl\"|mllmcl doctor", "", path.read_text())
    )


def floor_of(name: str) -> int | None:
    parts = name.split(".")
    if len(parts) < 2:
        return None
    return next((level for level, names in enumerate(FLOORS) if parts[1] in names), None)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path):
    own = floor_of(".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]))
    for name, typing_only in imports(path, PACKAGE):
        level = floor_of(name) if name.startswith("mllmcl.") else None
        # the configuration alone imports nothing heavy, so that the command line can show its options
        if own is not None and level is not None and not typing_only:
            assert level <= own, f"{path.name} imports {name}"


BANNED = {
    r"\bpickle\b|\bdill\b|\bcloudpickle\b": "pickles run code",
    r"(?<!safetensors\.)torch\.load\((?![^\n]*weights_only=True)": "torch.load without weights_only=True",
    r"(?<!def )(?<![\w.])eval\(": "eval",
    r"yaml\.load\(": "yaml.load",
    r"\.item\(\)": "a host wait",
    r"TODO|FIXME|XXX": "unfinished work",
}


@pytest.mark.parametrize("path", [*sources(KERNELS), *sources(PACKAGE)], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_is_called(path: Path):
    code = "\n".join(line for line in path.read_text().splitlines() if not line.strip().startswith("#"))
    code = re.sub(r'"""[\s\S]*?"""', "", code)
    for pattern, why in BANNED.items():
        if why == "a host wait" and "training" not in path.parts and "methods" not in path.parts:
            continue
        assert not re.search(pattern, code), why
    if path.name not in ("info.py", "cli.py", "__main__.py"):
        assert not re.search(r"(?<![\w.])print\(", code), "library code prints"
    assert path.read_text().isascii(), "not ASCII"


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_swallow_nothing(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        wide = isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type).endswith("Exception")
        )
        if wide:
            assert any(isinstance(child, ast.Raise) for child in ast.walk(node)), f"line {node.lineno}"


def test_files_and_functions_have_a_bearable_size():
    for path in [*sources(KERNELS), *sources(PACKAGE)]:
        text = path.read_text()
        assert len(text.splitlines()) <= 700, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
                assert length <= (150 if "triton" in path.name else 70), f"{path}: {node.name} has {length} lines"


def test_the_api_is_the_documented_one():
    import mllmcl
    import mllmcl_kernels

    assert set(mllmcl_kernels.__all__) == {
        "Mask", "MaskedAdamW", "Routing", "SampledEntries", "anchor_grad_", "backends", "ema_update_",
        "importance_update_", "lora_mix", "lora_mix_routed", "lora_mix_routed_shared", "lora_mix_shared", "mask_grads_",
        "masked_adamw_", "orthogonality_loss", "project_grads_", "route", "rows_with_room", "sampled_product_l1",
        "side_by_side", "soft_target_cross_entropy",
        "distillation_loss", "teacher_top_k", "tune",
    }  # fmt: skip
    for name in mllmcl.__all__:
        assert getattr(mllmcl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mllmcl.nothing  # noqa: B018
