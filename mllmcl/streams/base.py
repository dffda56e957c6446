"""What a stream is: tasks in an order, each with samples to learn from and samples to be tested on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Sample", "Stream", "Task"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question about an image, and its answer.

    image: uint8 `[H, W, 3]` array, a path, or None. metadata: where it comes from.
    """

    id: str
    task: str
    question: str
    answer: str
    image: object = None
    metadata: dict = field(default_factory=dict)

    def load_image(self):
        """The picture as PIL RGB, or None."""
        from PIL import Image

        if self.image is None:
            return None
        if isinstance(self.image, (str, os.PathLike)):
            with Image.open(self.image) as picture:
                return picture.convert("RGB")
        return Image.fromarray(self.image)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. description: a sentence of expertise, for routers. scorer: see `mllmcl.evaluation.SCORERS`."""

    name: str
    description: str
    train: Sequence[Sample]
    test: Sequence[Sample]
    scorer: str = "exact_match"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tasks in the order they are learned. note: what the data is and is not."""

    name: str
    tasks: tuple[Task, ...]
    note: str = ""

    def task(self, name: str) -> Task:
        """A task by name; ValueError if there is none such."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ValueError(f"task must be one of {', '.join(task.name for task in self.tasks)}, got {name!r}")

    def validate(self) -> None:
        """Raise ValueError with all that is wrong: empty tasks, ids twice, empty answers, images that do not open."""
        problems: list[str] = []
        names = [task.name for task in self.tasks]
        problems += [f"task {name} occurs twice" for name in sorted({n for n in names if names.count(n) > 1})]
        for task in self.tasks:
            for part, samples in (("train", task.train), ("test", task.test)):
                if not len(samples):
                    problems.append(f"task {task.name} has no {part} samples")
                seen: set[str] = set()
                for sample in samples:
                    problems += _problems(task.name, part, sample, seen)
        if problems:
            more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError(f"stream {self.name}: {'; '.join(problems[:10])}{more}")


def _problems(task: str, part: str, sample: Sample, seen: set[str]) -> list[str]:
    where = f"{task} {part} sample {sample.id!r}"
    found = [f"{where} occurs twice"] if sample.id in seen else []
    seen.add(sample.id)
    if not sample.question.strip():
        found.append(f"{where} has no question")
    if not sample.answer.strip():
        found.append(f"{where} has no answer")
    if isinstance(sample.image, (str, os.PathLike)):
        if not Path(sample.image).is_file():
            return [*found, f"{where}: no file {sample.image}"]
        try:
            picture = sample.load_image()
        except OSError as error:
            return [*found, f"{where}: {sample.image} is no readable image ({error})"]
        if 0 in picture.size:
            found.append(f"{where}: {sample.image} has no pixels")
    return found
