"""The package as users install it: with a compiler, without one, and as a source archive; in real second processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import torch, mllmcl_kernels
from mllmcl_kernels.library import build_info
x, w, a, b = torch.randn(3, 8), torch.randn(5, 8), torch.randn(4, 8), torch.randn(5, 4)
y = mllmcl_kernels.lora_mix(x, w, None, a, b, scaling=2.0)
torch.testing.assert_close(y, x @ w.t() + 2.0 * (x @ a.t()) @ b.t())
print(mllmcl_kernels.backends()["cpp"])
print(build_info()["compiled"])
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources without anything built."""
    target = tmp_path / "tree"
    names = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "constraints.txt", "Makefile")
    target.mkdir()
    for name in names:
        shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    for name in ("mllmcl", "mllmcl_kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **env}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


def install(tree: Path, target: Path, **env: str) -> subprocess.CompletedProcess:
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", str(target)]
    return run([*pip, str(tree)], tree, **env)


def use(target: Path, cwd: Path) -> list[str]:
    # the installed copy has to answer, not an editable install of this tree, whose finder knows its modules by name
    alone = "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]"
    code = f"import sys; sys.path.insert(0, {str(target)!r}); {alone}\n{CHECK}"
    done = run([sys.executable, "-P", "-c", code], cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_without_a_compiler_it_installs_is_right_and_says_why(tree, tmp_path):
    done = install(tree, tmp_path / "site", CXX="/nonexistent/c++", CC="/nonexistent/cc", MLLMCL_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "cpp was not built" in done.stdout + done.stderr
    assert not list((tmp_path / "site").rglob("*.so"))
    facts = json.loads((tmp_path / "site/mllmcl_kernels/build.json").read_text())
    assert all(fact.startswith("not built") for fact in facts.values()), facts
    cpp, compiled, *_ = use(tmp_path / "site", tmp_path)
    assert cpp.startswith("libmllmcl_cpu.so was not built") and compiled == "False"


@pytest.mark.slow
def test_a_wheel_holds_the_libraries_and_works(tree, tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(tree)]
    done = run(pip, tree, MLLMCL_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "mllmcl_kernels/libmllmcl_cpu.so" in names and "mllmcl/py.typed" in names
    assert "mllmcl_kernels/ops/route/README.md" in names and not any(name.startswith("tests/") for name in names)
    cpp, compiled, *_ = use(tmp_path / "site", tmp_path)
    assert cpp == "available" and compiled == "True"


def test_a_forced_cuda_build_without_nvcc_is_an_error(tree, tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    done = install(tree, tmp_path / "site", MLLMCL_CUDA="1", PATH=str(path), CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "no nvcc" in done.stdout + done.stderr


def test_the_source_archive_holds_what_a_build_needs(tree, tmp_path):
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    (tree / "dist").mkdir()
    done = run([sys.executable, "-c", code], tree)
    assert done.returncode == 0, done.stderr
    import tarfile

    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"csrc/checks.h", "csrc/cpu/lora_mix.cpp", "setup.py", "mllmcl_kernels/op.py"} <= names
