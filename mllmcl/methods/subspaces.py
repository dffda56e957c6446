"""Subspaces of the inputs of layers that later tasks leave alone, for every method that has such."""

# K width of an input, k directions of it, m directions on offer

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import named_under, under
from .importance import evenly_spaced
from .merging import MergedLoraMethod

__all__ = ["SubspaceMethod", "fewest"]


def fewest(energy_m: Tensor, total: Tensor, share: float) -> int:
    """The fewest leading directions that leave no more than (1 - share) * total outside.

    What a float32 does not tell from 0 beside `total` is no direction: those of the old basis come out with such.

    Args:
        energy_m: float64 energy of each direction, largest first; together all that is outside now.
        total: energy of it all.
    """
    missing = energy_m.sum() - (1 - share) * total
    if missing <= 0:
        return 0
    num_real = int((energy_m > torch.finfo(torch.float32).eps * total).sum())
    return min(int((energy_m.cumsum(0) < missing).sum()) + 1, num_real)


@dataclass(kw_only=True)
class SubspaceMethod(MergedLoraMethod):
    """A method with an orthonormal basis M `[K, k]` of the input space of its layers, which grows with each task.

    Columns are appended only, and how many there were before each task is known, so that a task's end may run twice.
    The projector trains in the first task only: it decides what the inputs are.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        #: M of each basis by name
        self.bases: dict[str, Tensor] = {}
        #: of each basis, columns before task 0, 1, ...
        self.sizes: dict[str, list[int]] = {}

    def begin(self, name: str, basis_Kk: Tensor) -> None:
        """Say what the first task finds."""
        self.bases[name], self.sizes[name] = basis_Kk, [basis_Kk.shape[1]]

    def before(self, name: str, place: int) -> Tensor:
        """The columns that the task at `place` found."""
        return self.bases[name][:, : self.sizes[name][place]]

    def grow(self, name: str, place: int, vector_Km: Tensor) -> None:
        """Append orthonormal float64 directions outside of `before(name, place)`, found by the task at `place`."""
        basis_Kk = self.before(name, place)
        old_Kk = basis_Kk.to(vector_Km.dtype)
        # the old columns are rounded; without this the new ones would lean on them the more the less energy they have
        new_Km = torch.linalg.qr(vector_Km - old_Kk @ (old_Kk.T @ vector_Km)).Q
        self.bases[name] = torch.cat((basis_Kk, new_Km.to(basis_Kk.dtype)), 1)
        self.sizes[name] = [*self.sizes[name][: place + 1], self.bases[name].shape[1]]

    def batches(self, task, count: int, size: int) -> Iterator[list]:
        """At most `count` training samples of a task, evenly spaced, in lists of `size`; in evaluation mode."""
        chosen = evenly_spaced(task.train, count)
        was_training = self.mllm.model.training
        self.mllm.eval()
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]
        self.mllm.train(was_training)

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.mllm.set_trainable(projector=self.train_projector and not self.index_of(task))

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), **named_under("bases", self.bases)}

    def state_values(self) -> dict:
        return {**super().state_values(), "sizes": self.sizes}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.sizes = {name: list(sizes) for name, sizes in values["sizes"].items()}
        self.bases = under("bases", tensors, self.mllm)
