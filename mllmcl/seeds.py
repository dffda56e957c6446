"""Seeds derived by purpose, so that no draw depends on the order of calls."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one purpose: `derive_seed(0, "task", 3, "epoch", 1)`."""
    text = "\0".join([str(int(seed)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
