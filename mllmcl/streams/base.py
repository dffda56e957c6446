"""What a stream is: tasks in an order, each with samples to learn from and samples to be tested on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Sample", "Stream", "Task", "check_seed", "chosen_tasks"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question about an image, and its answer.

    image: uint8 `[H, W, 3]` array, a PIL image, a path, or None. metadata: where it comes from.
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
        picture = self.image if isinstance(self.image, Image.Image) else Image.fromarray(self.image)
        return picture.convert("RGB")


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
        """Raise ValueError with all that is wrong: no tasks or empty ones, ids twice, no answers, images that fail."""
        names = [task.name for task in self.tasks]
        problems = [] if names else ["has no tasks"]
        problems += [f"task name {name!r} is no name of a file" for name in names if not _names_a_file(name)]
        problems += [f"task {name} occurs twice" for name in sorted({n for n in names if names.count(n) > 1})]
        # features are remembered by id: two samples of one stream must not share it
        seen: set[str] = set()
        pictures: dict[Path, str] = {}
        for task in self.tasks:
            for part, samples in (("train", task.train), ("test", task.test)):
                if not len(samples):
                    problems.append(f"task {task.name} has no {part} samples")
                for sample in samples:
                    where = f"{task.name} {part} sample {sample.id!r}{_source(sample)}"
                    problems += [f"{where} {problem}" for problem in _text_problems(sample, task.name, seen)]
                    if isinstance(sample.image, (str, os.PathLike)):
                        pictures.setdefault(Path(sample.image), where)
                    elif problem := _pixel_problem(sample.image):
                        problems.append(f"{where} {problem}")
        problems += _picture_problems(pictures)
        if problems:
            more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError(f"stream {self.name}: {'; '.join(problems[:10])}{more}")


def _names_a_file(name: object) -> bool:
    """Whether files of a run may be called so: one part of a path, shown by a listing, in characters that print."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode()) <= 200
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set('/\\:*?"<>|')
        and name == name.strip()
    )


def chosen_tasks(known: Sequence[str], tasks: Sequence[str] | None) -> list[str]:
    """The names in `tasks`, in its order; all of `known` for None. TypeError, ValueError: it is no such choice."""
    if tasks is None:
        return list(known)
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TypeError(f"tasks must be None or a list of names, got {tasks!r}")
    if not tasks:
        raise ValueError("tasks must be None or at least one name, got none")
    if strangers := [str(name) for name in tasks if name not in known]:
        raise ValueError(f"tasks must be among {', '.join(known)}, got {', '.join(strangers)}")
    if twice := [name for name in known if list(tasks).count(name) > 1]:
        raise ValueError(f"tasks must be different ones, got {', '.join(twice)} twice")
    return list(tasks)


def check_seed(seed: object) -> None:
    """Raise ValueError if `seed` is no integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")


def _source(sample: Sample) -> str:
    source = sample.metadata.get("source")
    return f" ({source})" if source else ""


def _text_problems(sample: Sample, task: str, seen: set[str]) -> list[str]:
    found = ["occurs twice"] if sample.id in seen else []
    seen.add(sample.id)
    if sample.task != task:
        found.append(f"is of task {sample.task!r}")
    if not sample.question.strip():
        found.append("has no question")
    if not sample.answer.strip():
        found.append("has no answer")
    return found


def _pixel_problem(image: object) -> str | None:
    """What is wrong with an image that is no file."""
    if image is None:
        return None
    size = getattr(image, "size", None)
    if isinstance(size, tuple):
        return None if min(size) > 0 else f"has an image of {size[0]} x {size[1]} pixels"
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or str(dtype) != "uint8" or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        got = type(image).__name__ if shape is None else f"{dtype} {list(shape)}"
        return f"has an image that is no uint8 [H, W, 3] array, PIL image or path: {got}"
    return None if min(shape[:2]) > 0 else f"has an image of {shape[1]} x {shape[0]} pixels"


def _picture_problems(pictures: dict[Path, str]) -> list[str]:
    """Decode every file once, several at a time; `pictures` says who needs it first."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(_picture_problem, pictures)
        return [f"{where}: {problem}" for where, problem in zip(pictures.values(), results, strict=True) if problem]


def _picture_problem(path: Path) -> str | None:
    from PIL import Image

    if not path.is_file():
        return f"no file {path}"
    try:
        with Image.open(path) as picture:
            # all of a JPEG is read, but only an eighth of its pixels computed
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
    # PIL raises all of these for files that it cannot make sense of
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path} is no readable image ({error})"
    return None
