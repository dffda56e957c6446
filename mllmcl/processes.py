"""What a method asks of the processes that share its steps. Here there is one, which has it all."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Processes"]


class Processes:
    """One process alone: it has every sample, every sum is its own, and nothing is computed for the others' sake.

    Where there are several, each runs its share of a batch, and the parts of all add up to the loss, and the gradient,
    of one process with the whole batch. The loop weighs what `Method.loss` gives by the process's share of the answer
    tokens. That is right for means over these, and for terms that look at parameters alone. Whatever else is a mean
    goes through `part`, with the number of things it is over, and whatever is counted up goes through `add_`.

    Attributes:
        rank, size: of this process, and how many there are.
        fraction: by how much a sample of the batch at hand counts; below 1 where several processes have the same one.
        batch_size: samples of the batch at hand in all processes; 0 for as many as it has.
    """

    rank: int = 0
    size: int = 1
    fraction: float = 1.0
    batch_size: int = 0

    def share(self, items: Sequence) -> tuple[Sequence, float]:
        """This process's part of what all have in the same order, never empty, and by how much each item counts."""
        return items, 1.0

    def weigh(self, batch_size: int, fraction: float, tokens: int) -> float:
        """Take up a batch: this process's share of its answer tokens, by which to multiply its loss.

        Args:
            batch_size: samples in all processes. fraction: what `share` gave. tokens: answer tokens in this process.
        """
        return 1.0

    def part(self, mean: Tensor, weight: float | Tensor) -> Tensor:
        """A mean over `weight` things, so that with `weigh` the parts add up to the mean over those of all processes.

        The weight has to count by `fraction`, and is not differentiated.
        """
        return mean

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the processes, in place."""

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, where rounding may make those of the others differ."""
        return tensor

    def gather(self, value: Any) -> list:
        """What each process has, in order; values that JSON holds."""
        return [value]

    def batches_of(self, batches: list) -> list:
        """Those of the batches of an evaluation that this process answers."""
        return batches

    def own_draws(self) -> contextlib.AbstractContextManager:
        """Within the context torch draws other numbers in each process, as dropout has to."""
        return contextlib.nullcontext()

    def alike_draws(self) -> contextlib.AbstractContextManager:
        """Within `own_draws`, a context in which all processes draw the same numbers after all."""
        return contextlib.nullcontext()
