"""What methods that ask a router which task a sample belongs to share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Method, Phase
from .routers import RouterOptions, find_router

__all__ = ["RoutedMethod"]


@dataclass(kw_only=True)
class RoutedMethod(Method):
    """A method whose `route` is asked, with `chooser` as the router over tasks.

    Args:
        router: name of a router of `routers`: "prototype" (nearest prototype on frozen features), "mllm" (the model
            with an expert of its own names a letter), "oracle" (the task is given), and the others there.
        prototypes: prototypes of a task.
        router_samples: samples of each task the letter router trains on.
        router_epochs: passes over them after each task.
        seed: of the draw of router samples.
    """

    router: str = "prototype"
    prototypes: int = 4
    router_samples: int = 20
    router_epochs: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        find_router(self.router)

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        options = RouterOptions(
            prototypes=self.prototypes, samples=self.router_samples, epochs=self.router_epochs, seed=self.seed
        )
        self.chooser = find_router(self.router)(mllm, stream.tasks, options)
        mllm.router = self.route

    def phases(self, task) -> list[Phase]:
        return [*super().phases(task), *self.chooser.phases(self.index_of(task))]

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.chooser.learn(self.index_of(task))

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), **self.chooser.state_tensors()}

    def state_values(self) -> dict:
        return {**super().state_values(), "router": self.chooser.state_values()}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.chooser.load_state(tensors, values["router"])
