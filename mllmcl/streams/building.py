"""Building streams from data in packages: order of draws, balance, and a cache of the finished arrays."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL
import PIL.features

from ..assets import ASSETS, cache_dir
from ..files import atomic_write
from ..seeds import derive_seed
from .base import Sample, Stream, Task, check_seed, chosen_tasks

__all__ = ["Item", "Recipe", "build_stream", "loader", "loading", "note", "pick_balanced"]

log = logging.getLogger(__name__)

MIN_IMAGE_SIZE = 16  # pixels; below, nothing can be told apart


@dataclass(frozen=True, kw_only=True)
class Item:
    """A finished picture, uint8 `[H, W, 3]`, its question and answer, and where it comes from."""

    image: np.ndarray
    question: str
    answer: str
    metadata: dict


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task is made: `make(part, count, size, random)` yields `count` items of the part "train" or "test".

    libraries: packages beside Pillow that draw it, and the extra of mllmcl that installs each.
    """

    name: str
    description: str
    make: Callable[[str, int, int, np.random.Generator], Iterator[Item]]
    libraries: Mapping[str, str] = field(default_factory=dict)


def note(sources: Mapping[str, str]) -> str:
    """What a built-in stream is and is not, with the sources of its tasks."""
    intro = (
        "Small tasks made from real data in packages; not the MLLM-CL benchmark, and no score here compares with "
        "published ones."
    )
    return " ".join([intro, *sources.values()])


def pick_balanced(
    pools: dict[str, Sequence], count: int, random: np.random.Generator, repeat: bool = False
) -> list[tuple[str, object]]:
    """`count` (label, candidate) pairs, labels in equal numbers and in random order.

    Args:
        pools: label -> candidates.
        repeat: whether candidates may be taken again when a pool is used up; for those that are drawn differently each
            time.

    Raises:
        ValueError: a pool has too few candidates.
    """
    labels = [label for label, _ in zip(itertools.cycle(pools), range(count), strict=False)]
    for label, pool in pools.items():
        wanted = labels.count(label)
        if wanted > len(pool) and not (repeat and len(pool)):
            raise ValueError(f"{wanted} different items with the answer {label!r} are asked for, there are {len(pool)}")
    orders = {label: _shuffled(len(pool), random) for label, pool in pools.items()}
    random.shuffle(labels)
    return [(label, pools[label][next(orders[label])]) for label in labels]


def _shuffled(count: int, random: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (int(place) for place in random.permutation(count))


def build_stream(
    module: ModuleType,
    name: str,
    recipes: Sequence[Recipe],
    note: str,
    *,
    num_train: int,
    num_test: int,
    seed: int,
    image_size: int,
    tasks: Sequence[str] | None,
) -> Stream:
    """The stream of some recipes, from the cache where it was built before with the same code, data and options."""
    chosen = chosen_tasks([recipe.name for recipe in recipes], tasks)
    options = (("num_train", num_train, 1), ("num_test", num_test, 1), ("image_size", image_size, MIN_IMAGE_SIZE))
    for option, value, least in options:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option} must be an integer of at least {least}, got {value!r}")
    check_seed(seed)
    by_name = {recipe.name: recipe for recipe in recipes}
    code = _code_digest(module)
    finished = []
    for task in chosen:
        recipe = by_name[task]
        drawn_by = [code, *_library_versions(name, recipe)]
        parts = {
            part: _part(name, recipe, part, count, seed, image_size, drawn_by)
            for part, count in (("train", num_train), ("test", num_test))
        }
        finished.append(Task(name=task, description=recipe.description, **parts))
    return Stream(name=name, tasks=tuple(finished), note=note)


def loading(build: Callable[..., Stream]) -> Callable[..., Stream]:
    """`load` of a built-in stream from `build(tasks=..., **options)`: its options and their defaults."""

    def load(
        *,
        num_train: int = 384,
        num_test: int = 96,
        seed: int = 0,
        image_size: int = 112,
        tasks: list[str] | None = None,
    ) -> Stream:
        """The stream.

        Args:
            num_train, num_test: items of each task, answers in equal numbers.
            seed: of which items, and of their jitter. image_size: pixels of a side.
            tasks: only these, in this order.
        """
        return build(num_train=num_train, num_test=num_test, seed=seed, image_size=image_size, tasks=tasks)

    return load


def loader(file: str, stream: str, recipes: Sequence[Recipe], note: str) -> Callable[..., Stream]:
    """`load` of a stream all of whose recipes are of one file, which gives its `__name__`."""
    return loading(lambda **options: build_stream(sys.modules[file], stream, recipes, note, **options))


def _code_digest(module: ModuleType) -> str:
    """Of all that decides the pictures: this file, seeds, the stream's own file and those it uses, data, libraries."""
    from .. import seeds

    parts = [seeds, *_used_files(module, {inspect.getmodule(_code_digest)})]
    sources = [inspect.getsource(part) for part in parts]
    facts = {key: value.sha256 for key, value in ASSETS.items()}
    # one Pillow may stand on different libraries that draw glyphs and decode photographs
    versions = [np.__version__, PIL.__version__, *(PIL.features.version(part) for part in ("freetype2", "jpg"))]
    return hashlib.sha256(json.dumps([sources, facts, versions]).encode()).hexdigest()


def _used_files(module: ModuleType, known: set[ModuleType]) -> list[ModuleType]:
    """The modules `known`, this one, and those of this folder that it takes anything from, and so on, by name."""
    if module not in known:
        known.add(module)
        for value in vars(module).values():
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
            if name.startswith(f"{__package__}."):
                _used_files(sys.modules[name], known)
    return sorted(known, key=lambda part: part.__name__)


def _library_versions(stream: str, recipe: Recipe) -> list[str]:
    found = []
    for library, extra in recipe.libraries.items():
        try:
            found.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                f"{stream}, task {recipe.name} is drawn by the package {library}: pip install 'mllmcl[{extra}]'"
            ) from error
    return found


def _part(
    stream: str, recipe: Recipe, part: str, count: int, seed: int, size: int, drawn_by: list[str]
) -> list[Sample]:
    facts = json.dumps([stream, recipe.name, part, count, seed, size, drawn_by])
    key = hashlib.sha256(facts.encode()).hexdigest()[:24]
    path = cache_dir("streams", stream) / f"{recipe.name}-{part}-{key}.safetensors"
    found = _read(path)
    if found is None:
        random = np.random.default_rng(derive_seed(seed, stream, recipe.name, part))
        try:
            items = list(recipe.make(part, count, size, random))
        except ValueError as error:
            raise ValueError(f"{stream}, task {recipe.name}, {part}: {error}") from error
        assert len(items) == count, (recipe.name, part, len(items))
        _write(path, items)
        found = _read(path)
    images, records = found
    return [
        Sample(id=f"{recipe.name}/{part}/{place:04d}", task=recipe.name, image=image, **record)
        for place, (image, record) in enumerate(zip(images, records, strict=True))
    ]


def _write(path: Path, items: list[Item]) -> None:
    from safetensors.numpy import save

    records = [{"question": item.question, "answer": item.answer, "metadata": item.metadata} for item in items]
    images = np.stack([item.image for item in items])
    text = json.dumps(records)
    digest = hashlib.sha256(images.tobytes() + text.encode()).hexdigest()
    atomic_write(path, save({"images": images}, metadata={"records": text, "sha256": digest}))


def _read(path: Path) -> tuple[np.ndarray, list[dict]] | None:
    """Images and records of a cache file; None where it is absent or damaged, which is told."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            images, facts = file.get_tensor("images"), file.metadata()
        text = facts["records"]
        if hashlib.sha256(images.tobytes() + text.encode()).hexdigest() != facts["sha256"]:
            raise ValueError("its sha256 is another")
        return images, json.loads(text)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s) and is built anew", path, error)
        return None
