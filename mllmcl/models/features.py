"""Frozen image features, computed once for each image; in memory and, where asked, in a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mllmcl.files import atomic_write

__all__ = ["FeatureCache", "image_key"]


def image_key(identity: str, image_size, sample) -> str:
    """A digest of encoder, image size, sample id and the image's own bytes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{identity}\0{image_size}\0{sample.id}\0".encode())
    image = sample.image
    if isinstance(image, (str, os.PathLike)):
        digest.update(Path(image).read_bytes())
    else:
        array = np.ascontiguousarray(np.asarray(image))
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array)
    return digest.hexdigest()


class FeatureCache:
    """Features `[P, d]` by key.

    Args:
        folder: where to keep them between runs, one safetensors file for each encoded batch; None keeps them in memory
            only.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self.memory: dict[str, Tensor] = {}
        self.files: dict[str, Path] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._list()

    def _list(self) -> None:
        from safetensors import safe_open

        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))

    def _read(self, keys: Sequence[str]) -> None:
        from safetensors import safe_open

        wanted: dict[Path, list[str]] = {}
        for key in keys:
            if key not in self.memory and key in self.files:
                wanted.setdefault(self.files[key], []).append(key)
        for path, names in wanted.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    self.memory[name] = file.get_tensor(name)

    def _write(self, features: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        name = hashlib.blake2b("".join(sorted(features)).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.safetensors"
        atomic_write(path, save({key: value.contiguous() for key, value in features.items()}))
        self.files.update(dict.fromkeys(features, path))

    def get(self, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """The features of `keys` on the CPU; `compute` is called once with the positions of those that are missing."""
        self._read(keys)
        missing = [at for at, key in enumerate(keys) if key not in self.memory]
        if missing:
            fresh = dict(zip((keys[at] for at in missing), compute(missing), strict=True))
            fresh = {key: value.detach().cpu() for key, value in fresh.items()}
            self.memory.update(fresh)
            if self.folder is not None:
                self._write(fresh)
        return [self.memory[key] for key in keys]
