"""LLaCA: LoRA sets shared by tasks with like instructions; within a set a dynamic moving average keeps old tasks."""

# n samples, S sets, W words

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import ema_update_

from .averages import hold_average_
from .base import gradients_of, named_under, under
from .instructions import Vocabulary, holding
from .isolated import ExpertPerTask


@dataclass(kw_only=True)
class Llaca(ExpertPerTask):
    """A task trains the LoRA set whose instructions are like its own, or a new one; each set has its own projector.

        sim(task, set) = mean cosine of the TF-IDF vectors of all pairs of their unique instructions

    A set's instructions are those of all its tasks. The task trains the set with the largest sim if that is at least
    `reuse_above`. If the set knows tasks already, an average follows it: after each step, for each tensor,

        average <- beta average + (1 - beta) parameter
        beta = (1 + |g|_1) / (|parameter - average|_1 |g - g_before|_1) where that is in (0, 1), else 1 - base_weight

    with g the gradients of this step and of the one before. The first step of a task has none before: its beta is
    1 - base_weight. At the end of the task the average becomes the set. At test a sample has the set whose instructions
    have the largest mean cosine with its question.

    Args:
        reuse_above: the public code has 0.90 where a task has one instruction, 0.30 where it has several wordings: the
            more wordings, the smaller the mean over pairs of even a task with itself. 0 keeps a single set.
        base_weight: of the parameter in a step whose beta is out of range. The public code's 0.01 belongs to tasks of
            thousands of steps.
        legacy: twice that quotient is the weight of the parameter instead, as in the public code, 0.01 out of range.
    """

    name: ClassVar[str] = "llaca"
    summary: ClassVar[str] = "a LoRA set and projector for tasks with like instructions, with a dynamic average in it"
    source: ClassVar[str] = "LLaCA, Large Continual Instruction Assistant (arXiv:2410.10868)"
    stores: ClassVar[str] = (
        "a LoRA and a projector for each set, the unique questions of each task; during a task in an old set averages "
        "and the last gradients"
    )
    at_test: ClassVar[str] = "nothing: a set by the words of the question, sample by sample"
    deviations: ClassVar[str] = (
        "words of one letter count; one idf over all sets and the task; base_weight is 0.1, for short tasks, and the "
        "weight of a task's first step; legacy: the average has the weight of the parameter and the other way round"
    )

    reuse_above: float = 0.3
    base_weight: float = 0.1
    legacy: bool = False

    #: the set of each task that has started, and the task's unique questions
    owners: list[int] = field(default_factory=list, init=False, repr=False)
    questions: list[list[str]] = field(default_factory=list, init=False, repr=False)
    #: of what trains, while a task trains a set that knows others: averages and the gradients of the last step
    averages: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    previous: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reuse_above <= 1:
            raise ValueError(f"reuse_above must be in [0, 1], got {self.reuse_above}")
        if not 0 < self.base_weight < 1:
            raise ValueError(f"base_weight must be in (0, 1), got {self.base_weight}")
        self.masks = {}
        #: vocabulary and mean vectors `[S, W]` of the sets; None until they are asked for
        self.codebooks = None

    def _projector_experts(self) -> bool:
        return self.train_projector

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        mllm.router = self.route

    def route(self, samples: Sequence) -> Tensor:
        """The set of each sample, int64 `[n]`; -1, the base model, while nothing was learned."""
        if not self.known:
            return torch.full((len(samples),), -1)
        if self.codebooks is None:
            self.codebooks = _codebooks(self._instructions(self.known))
        vocabulary, mean_SW = self.codebooks
        # the length of a question's own vector does not change which set is nearest
        return vocabulary.dots([sample.question for sample in samples], mean_SW).argmax(1)

    def _instructions(self, num_tasks: int) -> list[list[str]]:
        """The unique questions of each set that the first tasks have trained."""
        sets = [{} for _ in range(max(self.owners[:num_tasks], default=-1) + 1)]
        for owner, questions in zip(self.owners[:num_tasks], self.questions, strict=False):
            sets[owner].update(dict.fromkeys(questions))
        return [list(found) for found in sets]

    def task_of(self, expert: int) -> int:
        """The first task that the set learned."""
        return self.owners.index(expert) if expert in self.owners else -1

    def expert_for(self, task) -> int:
        """The set with the likest instructions, or a new one."""
        place = self.index_of(task)
        own = list(dict.fromkeys(sample.question for sample in task.train))
        sets = self._instructions(place)
        _, mean_SW = _codebooks([*sets, own])
        likeness_S = mean_SW[:-1] @ mean_SW[-1]
        is_like = bool(sets) and float(likeness_S.max()) >= self.reuse_above
        self.owners = [*self.owners[:place], int(likeness_S.argmax()) if is_like else len(sets)]
        self.questions = [*self.questions[:place], own]
        return self.owners[place]

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.averages, self.previous = {}, {}
        self.masks = self.parameter_masks()
        if self.acting in self.owners[:-1]:
            self.averages = {name: value.detach().clone() for name, value in self.mllm.trained_parameters().items()}

    @torch.no_grad()
    def after_step(self, optimizer) -> None:
        if not self.averages:
            return
        trained = self.mllm.trained_parameters()
        grads = gradients_of(list(trained.values()))
        if not self.previous:
            # a gradient that does not change puts w out of range
            self.previous = {name: grad.clone() for name, grad in zip(trained, grads, strict=True)}
        averages, previous = ([store[name] for name in trained] for store in (self.averages, self.previous))
        rule = {"mode": "dema", "grads": grads, "previous_grads": previous}
        rule["masks"] = [self.masks.get(name) for name in trained]
        if self.legacy:
            ema_update_(averages, list(trained.values()), base_weight=0.01, factor=2.0, **rule)
        else:
            hold_average_(averages, list(trained.values()), base_weight=self.base_weight, factor=1.0, **rule)
        torch._foreach_copy_(previous, grads)

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.codebooks = None
        trained = self.mllm.trained_parameters()
        if self.averages:
            torch._foreach_copy_(list(trained.values()), [self.averages[name] for name in trained])
        self.averages, self.previous = {}, {}

    def state_tensors(self) -> dict[str, Tensor]:
        held = {**named_under("average", self.averages), **named_under("previous", self.previous)}
        return {**super().state_tensors(), **held}

    def state_values(self) -> dict:
        return {**super().state_values(), "owners": self.owners, "questions": self.questions}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.owners, self.questions = list(values["owners"]), [list(texts) for texts in values["questions"]]
        self.codebooks = None
        self.averages, self.previous = under("average", tensors, self.mllm), under("previous", tensors, self.mllm)


def _codebooks(sets: Sequence[Sequence[str]]) -> tuple[Vocabulary, Tensor]:
    """Vocabulary of all unique instructions, and each set's mean vector `[S, W]`."""
    unique = list(dict.fromkeys(itertools.chain.from_iterable(sets)))
    vocabulary = Vocabulary(holding(unique), len(unique))
    return vocabulary, torch.stack([vocabulary.mean_unit(texts) for texts in sets])
