"""Random numbers that a resumed run draws again: the state of every generator as tensors and JSON, seeds by purpose.

    order = torch.randperm(n, generator=generator(seed, "order", "task", 3, "epoch", 1))

Data order comes from `generator`, which depends on names and never on what was drawn before. Dropout and the like draw
from the process's generators, which `capture_rng` and `restore_rng` carry through a checkpoint without pickle.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from ..seeds import derive_seed

__all__ = ["capture_rng", "derive_seed", "generator", "restore_rng", "seed_everything"]


def generator(seed: int, *names: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch generator for one purpose: `generator(0, "order", "task", 2, "epoch", 0)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device), each with a seed of its own derived from `seed`."""
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))


def capture_rng() -> tuple[dict[str, Tensor], dict]:
    """The state of python's, numpy's and torch's global generators, of every visible CUDA device too.

    Returns:
        Tensors (`python` int64 `[625]`, `numpy` int64 `[624]`, `torch` and `cuda_<index>` uint8) and JSON values, both
        for `restore_rng` and fit for a checkpoint.

    Raises:
        ValueError: numpy's global generator was exchanged for another kind.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    if kind != "MT19937":
        raise ValueError(f"capture_rng: numpy's global generator must be its own MT19937, got {kind}")
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    values = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"position": int(position), "has_gauss": int(has_gauss), "cached_gaussian": float(cached_gaussian)},
    }
    return tensors, values


def restore_rng(tensors: dict[str, Tensor], values: dict) -> None:
    """Set every generator to where `capture_rng` saw it.

    Raises:
        ValueError: states are missing or left over, as with another number of CUDA devices: numbers would differ.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    expected = {"python", "numpy", "torch", *(f"cuda_{index}" for index in range(num_devices))}
    if tensors.keys() != expected:
        raise ValueError(
            f"restore_rng: expected the generators {', '.join(sorted(expected))}, got {', '.join(sorted(tensors))}; "
            "resume with as many visible CUDA devices as before"
        )
    python, numpy = values["python"], values["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"]))
    torch.set_rng_state(tensors["torch"])
    for index in range(num_devices):
        torch.cuda.set_rng_state(tensors[f"cuda_{index}"], index)
