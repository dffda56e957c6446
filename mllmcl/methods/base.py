"""What a method is: options, a few class facts for the methods table, and the hooks it needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..options import check_at_least
from ..processes import Processes

if TYPE_CHECKING:
    from ..models import MLLM
    from ..streams import Sample, Stream, Task

__all__ = ["LoraMethod", "Method", "Phase", "gradients_of", "named_under", "under"]


def gradients_of(params: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients; zeros are put where a parameter has none."""
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    return [param.grad for param in params]


def named_under(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names `kind/name`, for a method's state."""
    return {f"{kind}/{name}": value for name, value in tensors.items()}


def under(kind: str, tensors: dict[str, Tensor], mllm: MLLM) -> dict[str, Tensor]:
    """What `named_under` named so, by its own names: copies on the model's device.

    Where the model has a parameter of that name and shape the copy lies in memory as it does.
    """
    held, found = mllm.trainable_state(), {}
    for name, value in tensors.items():
        if name.startswith(f"{kind}/"):
            name = name.partition("/")[2]
            like = held.get(name, value)
            like = like if like.shape == value.shape else value
            found[name] = torch.empty_like(like, dtype=value.dtype, device=mllm.device).copy_(value)
    return found


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training run within a task.

    name: for logs. samples: what it trains on. epochs, learning_rate: None takes the run's.
    """

    name: str
    samples: Sequence[Sample]
    epochs: float | None = None
    learning_rate: float | None = None


@dataclass(kw_only=True)
class Method:
    """Base of all methods: hooks that do nothing.

    The training loop calls, for each task: `on_task_start`, then for each of `phases(...)`: `on_phase_start` and its
    steps (`before_forward`, `answer_loss`, `loss`, `before_step`, `after_step`), then `on_task_end`; evaluation uses
    the `mllm.router` that the method has set. `on_task_start` and `on_task_end` may run twice for one task, after a
    resume; what `state_tensors` and `state_values` give is saved with every checkpoint and handed to `load_state`, also
    after an `on_task_start` that ran again.

    `answer_loss` and `loss` run under the run's autocast and inside `before_forward`. A method that runs the model
    elsewhere (`before_step`, `on_task_end`) wraps that in `self.autocast()` to have the same precision.

    Where several processes share a step, gradients are of the whole batch from `before_step` on, and the hooks of all
    processes do the same with them. `mllmcl.processes.Processes` says what `answer_loss` and `loss` have to heed; an
    option that makes a batch share something, as `legacy` of some methods, means the batch of a process.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    stores: ClassVar[str] = ""
    at_test: ClassVar[str] = ""
    deviations: ClassVar[str] = "none"
    #: what a training step runs beside forward and backward of its own batch
    extra_passes: ClassVar[str] = ""
    #: whether an expert, once its task has ended, never changes: an item routed to it keeps its answer
    isolated: ClassVar[bool] = False
    #: whether an expert that trained is what the task learned, worth a folder in PEFT's format
    exports: ClassVar[bool] = True
    #: whether what trains may have no gradient, since the method shuts it off for a task
    shuts_off: ClassVar[bool] = False
    #: whether weights of the language tower change, by training or merging, so that no process can do with a part
    changes_base: ClassVar[bool] = False
    #: used where the run's configuration names none
    learning_rate: ClassVar[float] = 1e-3

    mllm: Any = field(default=None, init=False, repr=False)
    stream: Any = field(default=None, init=False, repr=False)
    #: gives the context of the run's precision; the training loop sets it
    autocast: Any = field(default=contextlib.nullcontext, init=False, repr=False)
    #: who shares the steps; the training loop sets it
    processes: Processes = field(default_factory=Processes, init=False, repr=False)
    #: share of the phase's steps that are behind, 0 at its first and 1 at its last; the training loop sets it
    progress: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options; make what is no option."""

    def check_options(self) -> None:
        """Raise ValueError where options that methods share are out of range; `create` calls it."""

    def setup(self, mllm: MLLM, stream: Stream) -> None:
        """Put into the model what the method needs, once, before any state is loaded."""
        self.mllm, self.stream = mllm, stream

    def sample_mean(self, values: Tensor) -> Tensor:
        """The mean of values `[B, ...]` over the batch, as a part of a loss that processes share, see `Processes`."""
        return self.processes.part(values.mean(), self.processes.fraction * len(values))

    def index_of(self, task: Task) -> int:
        """Position of a task in the stream."""
        return next(index for index, other in enumerate(self.stream.tasks) if other.name == task.name)

    def on_task_start(self, task: Task) -> None:
        """Before a task: grow, freeze, say what trains."""

    def training_samples(self, task: Task) -> Sequence[Sample]:
        """What the task trains on."""
        return task.train

    def phases(self, task: Task) -> list[Phase]:
        """The training runs of a task, in order."""
        return [Phase(name="train", samples=self.training_samples(task))]

    def on_phase_start(self, task: Task, phase: Phase) -> None:
        """Before the steps of a phase, and again when a run resumes inside it."""

    def before_forward(self, samples: Sequence[Sample]) -> contextlib.AbstractContextManager:
        """The context a step runs in, forward and backward: which experts act."""
        return contextlib.nullcontext()

    def answer_loss(self, batch) -> Tensor:
        """The loss on a batch's answers: mean cross entropy.

        A method with another loss on the same forward pass overrides this one and starts from
        `mllm.answer_hidden(batch)` `[n, D]` or `mllm.answer_logits(batch)` `[n, V]`.
        """
        return self.mllm.loss(batch)

    def loss(self, batch, loss: Tensor) -> Tensor:
        """The loss of a step from the answer loss: what a method adds to it."""
        return loss

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are complete and not clipped yet."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters have moved, gradients are still there."""

    def on_task_end(self, task: Task) -> None:
        """After the last step of a task: merge, store, take statistics."""

    def task_of(self, expert: int) -> int:
        """Index of the task that a routed expert belongs to; -1 is the base model."""
        return expert

    def parameter_masks(self) -> dict:
        """Masks of parameters, name to `mllmcl_kernels.Mask`, for the optimiser: frozen experts by default."""
        return self.mllm.parameter_masks() if self.mllm.experts is not None else {}

    def state_tensors(self) -> dict[str, Tensor]:
        """What the method stores beside the model's trainable tensors."""
        return {}

    def state_values(self) -> dict:
        """The same, for what JSON holds."""
        return {}

    def load_state(self, tensors: dict[str, Tensor], values: dict) -> None:
        """Take back what `state_tensors` and `state_values` gave."""


@dataclass(kw_only=True)
class LoraMethod(Method):
    """Options of every method that trains LoRA experts on the language tower.

    Args:
        rank: rank of an expert.
        alpha: scaling is alpha / rank.
        dropout: on the input of the LoRA path.
        targets: "all-linear", suffixes, or full names.
        train_projector: whether the projector (or the expert's copy of it) trains along.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: str | list[str] = "all-linear"
    train_projector: bool = True

    num_experts: ClassVar[int] = 1
    router_score: ClassVar[str | None] = None

    def check_options(self) -> None:
        super().check_options()
        check_at_least(self, 1, ("rank",))
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def setup(self, mllm: MLLM, stream: Stream) -> None:
        super().setup(mllm, stream)
        mllm.add_experts(
            self._num_experts(),
            self._rank(),
            self._alpha(),
            targets=self.targets,
            dropout=self.dropout,
            router=self.router_score,
            projector_experts=self._projector_experts(),
        )

    def _num_experts(self) -> int:
        return self.num_experts

    def _projector_experts(self) -> bool:
        return False

    def _rank(self) -> int:
        """An expert's rank."""
        return self.rank

    def _alpha(self) -> float:
        """An expert's scaling times its rank."""
        return self.alpha

    def on_task_start(self, task: Task) -> None:
        mllm = self.mllm
        mllm.set_trainable(
            [True] * mllm.experts.num_experts, projector=self.train_projector, router=self.router_score is not None
        )
