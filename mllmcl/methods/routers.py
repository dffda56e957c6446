"""Routers over isolated experts: which task does a sample belong to? Each answers for a whole batch at once.

A subclass of `Router` with a name is a router that any method can be told to use; `find_router` and its message know no
other list.
"""

# n samples, P prototypes, d feature width, T tasks

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeds import derive_seed
from .base import Phase
from .features import Anchors, frozen_features
from .instructions import Vocabulary, holding, words

__all__ = ["Router", "RouterOptions", "available_routers", "cluster", "find_router"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Numbers that one router or another takes.

    prototypes: of a task. samples, epochs: of each task to train the letter router on, and passes over them.
    seed: of the draw of these samples.
    """

    prototypes: int = 4
    samples: int = 20
    epochs: float = 30.0
    seed: int = 0


class Router:
    """Base of all routers.

    Args:
        mllm: the model. tasks: all tasks of the stream, in order; only those learned can be answered.
        options: see `RouterOptions`.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    #: experts of its own, which stand before those of the tasks
    num_experts: ClassVar[int] = 0

    def __init__(self, mllm, tasks: Sequence, options: RouterOptions):
        self.mllm, self.tasks, self.options = mllm, tasks, options
        self.known = 0

    def learn(self, place: int) -> None:
        """Take in the task at `place`, after its training; once more replaces what it knew."""
        self.known = place + 1

    def phases(self, place: int) -> list[Phase]:
        """Training of the router's own expert after the task at `place` was trained."""
        return []

    @torch.no_grad()
    def __call__(self, samples: Sequence) -> Tensor:
        """The task of each sample, int64 `[n]`; -1 while no task is known."""
        return self._choose(samples) if self.known else torch.full((len(samples),), -1)

    def _choose(self, samples: Sequence) -> Tensor:
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def state_values(self) -> dict:
        return {"known": self.known}

    def load_state(self, tensors: dict[str, Tensor], values: dict) -> None:
        self.known = values["known"]


def available_routers() -> dict[str, type[Router]]:
    """Every router by name."""
    return {found.name: found for found in Router.__subclasses__()}


def find_router(name: str) -> type[Router]:
    """The class of a router; ValueError with all names if there is none such."""
    known = available_routers()
    if name not in known:
        raise ValueError(f"router must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def cluster(points: Tensor, count: int, rounds: int = 20) -> Tensor:
    """k-means centres `[count, d]` from a farthest-point start: deterministic, no draw.

    Args:
        points: `[n, d]`. count: centres; at most n are returned.
    """
    count = min(count, len(points))
    centres = points.mean(0, keepdim=True)
    centres = points[torch.cdist(points, centres).argmin()][None]
    while len(centres) < count:
        far = torch.cdist(points, centres).amin(1).argmax()
        centres = torch.cat([centres, points[far][None]])
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(1)
        one_hot = F.one_hot(owner, count).to(points.dtype)
        sizes = one_hot.sum(0).clamp_min(1.0)
        moved = one_hot.t() @ points / sizes[:, None]
        centres = torch.where((one_hot.sum(0) > 0)[:, None], moved, centres)
    return centres


class PrototypeRouter(Router):
    """Nearest prototype on frozen features, by cosine; training-free.

    Source: the training-free prototype router (RePro) of "Is our benchmark enough?" (2026), on MLLM-CL.
    """

    name = "prototype"
    summary = "nearest of a few cluster centres of each task's image and text features; no training"

    def __init__(self, mllm, tasks, options):
        super().__init__(mllm, tasks, options)
        self.prototypes = torch.zeros(0, 0)
        self.owners = torch.zeros(0, dtype=torch.int64)

    def learn(self, place: int) -> None:
        super().learn(place)
        centres = cluster(frozen_features(self.mllm, self.tasks[place].train), self.options.prototypes)
        others = self.owners != place
        kept = self.prototypes[others] if len(self.owners) else centres[:0]
        self.prototypes = torch.cat([kept, centres])
        self.owners = torch.cat([self.owners[others], torch.full((len(centres),), place)])

    def _choose(self, samples: Sequence) -> Tensor:
        features = F.normalize(frozen_features(self.mllm, samples), dim=-1)
        return self.owners[(features @ F.normalize(self.prototypes, dim=-1).t()).argmax(1)]

    def state_tensors(self) -> dict[str, Tensor]:
        return {"prototypes": self.prototypes, "owners": self.owners}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.prototypes, self.owners = tensors["prototypes"], tensors["owners"]


class ClipRouter(Router):
    """Two towers: the task whose mean image and mean text feature have the largest sum of cosines to the sample's.

    The towers are those of the model at hand, see `features`; they share a space only if the model's do.

    Source: the anchors of HiDe-LLaVA (arXiv:2503.12941), taken as a router.
    """

    name = "clip"
    summary = "largest cosine to the task's mean image feature plus that to its mean text feature; no training"

    def __init__(self, mllm, tasks, options):
        super().__init__(mllm, tasks, options)
        self.anchors = Anchors(mllm)

    def learn(self, place: int) -> None:
        super().learn(place)
        self.anchors.learn(place, self.tasks[place].train)

    def _choose(self, samples: Sequence) -> Tensor:
        return self.anchors.cosines(self.anchors.features(samples)).sum(0).argmax(1)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.anchors.state_tensors()

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.anchors.load_state(tensors)


class TfidfRouter(Router):
    """The task whose questions share most words with the sample's, rare words counting more.

        weight(w) = ln((1 + N) / (1 + df(w))) + 1,    cos(count_q * weight, count_task * weight)

    with N the training questions of all tasks seen and df(w) how many of them hold w. Words of no task count nothing.
    """

    name = "tfidf"
    summary = "cosine of the question's words to the words of the task's questions, rare ones counting more"

    def __init__(self, mllm, tasks, options):
        super().__init__(mllm, tasks, options)
        #: of each task: number of questions, word to number of questions with it, word to number of occurrences
        self.seen: list[dict] = []

    def learn(self, place: int) -> None:
        super().learn(place)
        questions = [sample.question for sample in self.tasks[place].train]
        counts = Counter(word for text in questions for word in words(text))
        found = {"questions": len(questions), "holding": dict(holding(questions)), "counts": dict(counts)}
        self.seen[place:] = [found, *self.seen[place + 1 :]]

    def _choose(self, samples: Sequence) -> Tensor:
        frequencies = sum((Counter(task["holding"]) for task in self.seen), Counter())
        vocabulary = Vocabulary(frequencies, sum(task["questions"] for task in self.seen))
        task_TW = F.normalize(vocabulary.weighted([task["counts"] for task in self.seen]), dim=-1)
        # the length of a question's own vector does not change which task is nearest
        return vocabulary.dots([sample.question for sample in samples], task_TW).argmax(1)

    def state_values(self) -> dict:
        return {**super().state_values(), "seen": self.seen}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.seen = list(values["seen"])


class OracleRouter(Router):
    """The task is given with the sample; a task not learned yet gets the base model."""

    name = "oracle"
    summary = "the task is given"

    def _choose(self, samples: Sequence) -> Tensor:
        places = {task.name: place for place, task in enumerate(self.tasks[: self.known])}
        return torch.tensor([places.get(sample.task, -1) for sample in samples])


class LetterRouter(Router):
    """The MLLM itself, with an expert of its own, names the letter of the task.

    The prompt lists one sentence of expertise for each letter, then the question. Only letters of known tasks can win:
    their logits are compared at the first answer position, so no answer is illegal and nothing is decoded.

    Source: MR-LoRA (arXiv:2506.05453), whose public code decodes text and takes a random expert for an illegal one.
    """

    name = "mllm"
    summary = "the model with an expert of its own names a letter, trained on a few samples of every task seen"
    num_experts = 1
    batch_size: ClassVar[int] = 16

    def __init__(self, mllm, tasks, options):
        super().__init__(mllm, tasks, options)
        #: ids of the samples of each task that the router trains on
        self.buffer: dict[str, list[str]] = {}

    def learn(self, place: int) -> None:
        super().learn(place)
        self._drawn(place)

    def phases(self, place: int) -> list[Phase]:
        if place == 0:
            return []
        samples = []
        for index, other in enumerate(self.tasks[: place + 1]):
            wanted = set(self._drawn(index))
            samples += [self.as_question(sample, place + 1) for sample in other.train if sample.id in wanted]
        return [Phase(name="router", samples=samples, epochs=self.options.epochs)]

    def _drawn(self, place: int) -> list[str]:
        """Ids of the samples of a task: those stored, or a fresh draw for the current one."""
        task = self.tasks[place]
        if task.name not in self.buffer:
            generator = torch.Generator().manual_seed(derive_seed(self.options.seed, "router", task.name))
            order = torch.randperm(len(task.train), generator=generator)[: self.options.samples].tolist()
            self.buffer[task.name] = [task.train[index].id for index in order]
        return self.buffer[task.name]

    def as_question(self, sample, known: int):
        """The sample with the routing prompt as question and its task's letter as answer."""
        pool = " ".join(f"{LETTERS[place]}: {task.description}" for place, task in enumerate(self.tasks[:known]))
        names = [task.name for task in self.tasks]
        prompt = (
            f"Experts: {pool} Which expert should answer the question below? Do not answer the question itself.\n"
            f"Question: {sample.question}\nReply with one letter."
        )
        # a sample of no known task is asked like any other; its own letter is only learned from
        place = names.index(sample.task) if sample.task in names else known
        return dataclasses.replace(
            sample, id=f"{sample.id}/route{known}", question=prompt, answer=LETTERS[place if place < known else 0]
        )

    def _choose(self, samples: Sequence) -> Tensor:
        if self.known == 1:
            return torch.zeros(len(samples), dtype=torch.int64)
        return torch.cat(
            [self._route(samples[start : start + self.batch_size]) for start in range(0, len(samples), self.batch_size)]
        )

    def _route(self, samples: Sequence) -> Tensor:
        asked = [self.as_question(sample, self.known) for sample in samples]
        letters = [dataclasses.replace(asked[0], answer=LETTERS[place]) for place in range(self.known)]
        first = self.mllm.collate(letters, with_answers=True).answer_labels.view(self.known, -1)[:, 0]
        batch = self.mllm.collate(asked, with_answers=True)
        with self.mllm.use_experts(torch.zeros(len(asked), dtype=torch.int64)):
            logits = self.mllm.answer_logits(batch)
        # letter and end token: the first of the two predicts the letter
        logits = logits.view(len(asked), -1, logits.shape[-1])[:, 0]
        return logits.index_select(1, first).argmax(1).cpu()

    def state_values(self) -> dict:
        return {**super().state_values(), "buffer": self.buffer}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.buffer = dict(values["buffer"])
