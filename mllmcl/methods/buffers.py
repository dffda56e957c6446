"""Stored samples of finished tasks: which are kept, and how methods get at them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..seeds import derive_seed
from .base import Method

__all__ = ["BatchReplayMethod", "BufferMethod", "RehearsalMethod"]


@dataclass(kw_only=True)
class BufferMethod(Method):
    """A method that keeps ids of samples of every finished task.

    Kept are the samples whose hash with `seed` is smallest. So the draw is uniform, needs no state, and a smaller
    draw is a part of a larger one.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        self.buffer: dict[str, list[str]] = {}
        self._pools: dict[str, list] | None = None

    def _num_kept(self, task) -> int:
        """How many samples of a finished task are kept."""
        raise NotImplementedError

    def _smallest(self, ids, count: int) -> list[str]:
        return heapq.nsmallest(count, ids, key=lambda sample_id: derive_seed(self.seed, "buffer", sample_id))

    def stored(self, tasks: Sequence) -> list:
        """The samples kept of these tasks, in the order of the buffer."""
        found = []
        for task in tasks:
            by_id = {sample.id: sample for sample in task.train}
            ids = self.buffer[task.name]
            missing = [sample_id for sample_id in ids if sample_id not in by_id]
            if missing:
                raise ValueError(
                    f"{self.name}: the stream no longer holds {len(missing)} stored samples, e.g. {missing[0]!r}"
                )
            found += [by_id[sample_id] for sample_id in ids]
        return found

    def earlier(self, task) -> Sequence:
        """The tasks before this one."""
        return self.stream.tasks[: self.index_of(task)]

    @property
    def pools(self) -> dict[str, list]:
        """Name of each task in the buffer to its samples, in the order of the stream; looked up once in a task."""
        if self._pools is None:
            self._pools = {task.name: self.stored([task]) for task in self.stream.tasks if self.buffer.get(task.name)}
        return self._pools

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.buffer[task.name] = self._smallest([sample.id for sample in task.train], self._num_kept(task))
        self._pools = None

    def state_values(self) -> dict:
        return {**super().state_values(), "buffer": self.buffer}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.buffer = {name: list(ids) for name, ids in values["buffer"].items()}
        self._pools = None


@dataclass(kw_only=True)
class RehearsalMethod(BufferMethod):
    """A method that trains on the task and a share of the data of every earlier task.

    Args:
        share: of each earlier task's training data that is mixed in, at least one sample; 0 mixes nothing in. The
            paper has 0.001, 0.01, 0.1 and 0.2.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must be in [0, 1], got {self.share}")

    def _num_kept(self, task) -> int:
        return max(1, round(self.share * len(task.train))) if self.share else 0

    def training_samples(self, task) -> Sequence:
        return [*task.train, *self.stored(self.earlier(task))]


@dataclass(kw_only=True)
class BatchReplayMethod(BufferMethod):
    """A method that draws a batch of stored samples beside each batch of the task.

    Args:
        per_task: samples kept of each task.
        capacity: keep so many in all instead, a uniform draw from everything seen (a reservoir); None for `per_task`.
        buffer_batch: samples of a draw, None for as many as the task's batch has.
    """

    per_task: int = 20
    capacity: int | None = None
    buffer_batch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("per_task", "capacity", "buffer_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def _num_kept(self, task) -> int:
        return self.per_task if self.capacity is None else self.capacity

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        if self.capacity is not None:
            # the reservoir: the smallest hashes of all are a uniform draw from all samples seen
            left = set(self._smallest([sample_id for ids in self.buffer.values() for sample_id in ids], self.capacity))
            self.buffer = {name: [one for one in ids if one in left] for name, ids in self.buffer.items()}

    def replay(self, batch) -> tuple[list, Tensor, float]:
        """Stored samples to see beside a batch, their places, and by how much they count: the share of this process."""
        samples, places = self.draw(self.buffer_batch or self.processes.batch_size or len(batch))
        own, fraction = self.processes.share(samples)
        return own, self.processes.share(places)[0], fraction

    def draw(self, count: int, pool: Sequence | None = None) -> tuple[list, Tensor]:
        """Samples of `pool` (the whole buffer for None) and their places in it, int64 on the CPU.

        At most `count`, no sample twice; drawn from torch's generator, of which a resumed run knows the state. The same
        in all processes.
        """
        if pool is None:
            pool = [sample for samples in self.pools.values() for sample in samples]
        with self.processes.alike_draws():
            places = torch.randperm(len(pool))[:count]
        return [pool[place] for place in places.tolist()], places
