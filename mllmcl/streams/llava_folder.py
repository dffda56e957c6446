"""A folder of LLaVA-style JSON as a stream.

A task is a pair of JSON arrays, in one of these places:

    folder/stream.json                          {"name", "note", "tasks": [{"name", "description", "train", "test",
                                                 "image_folder", "test_image_folder", "answer_field", "scorer"}]}:
                                                 says the order and where things lie
    folder/<task>/train.json, test.json         one sub-folder for each task, in the order of their names
    folder/<task>_train.json, <task>_test.json  one pair of files for each task, in the order of their names

An entry of either array has one of the two forms

    {"id" | "question_id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}
    {"id" | "question_id", "image", "text", "answer"}

with "image" relative to the image folder, which is the task's folder unless `stream.json` says otherwise; without
"image" it is a question on text alone. An answer may be a list of accepted ones, of which the
first is trained. Other fields go into the metadata, of which "scorer" names the scorer of that entry alone.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..seeds import derive_seed
from .base import Sample, Stream, Task, check_seed, chosen_tasks

__all__ = ["load_folder", "load_tasks"]

STREAM_FILE = "stream.json"
IMAGE_TOKEN = "<image>"
STREAM_KEYS = ("name", "note", "tasks")
TASK_KEYS = ("name", "description", "train", "test", "image_folder", "test_image_folder", "answer_field", "scorer")


def load_folder(
    folder: Path,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
) -> Stream:
    """The stream in a folder; see the top of this file for how it is laid out.

    Whether pictures open and answers are there is for `Stream.validate` to find.

    Args:
        num_train, num_test: at most so many samples of each task, drawn by `seed`, in the order of the file.
        tasks: only these, in this order.

    Raises:
        ValueError: what does not fit, by file, index and field.
    """
    described = folder / STREAM_FILE
    settings = _settings(described) if described.exists() else {"tasks": _found_tasks(folder)}
    return load_tasks(
        folder,
        settings["tasks"],
        name=settings.get("name", folder.resolve().name),
        note=settings.get("note", f"read from {folder}"),
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        tasks=tasks,
    )


def load_tasks(
    folder: Path,
    entries: Sequence[dict],
    *,
    name: str,
    note: str,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
) -> Stream:
    """The stream of tasks told as in `stream.json`; options and errors are those of `load_folder`."""
    for option, value in (("num_train", num_train), ("num_test", num_test)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{option} must be None or an integer of at least 1, got {value!r}")
    check_seed(seed)
    by_name = {entry["name"]: entry for entry in entries}
    counts = {"train": num_train, "test": num_test}
    chosen = tuple(_task(folder, by_name[task], counts, seed) for task in chosen_tasks(list(by_name), tasks))
    return Stream(name=name, tasks=chosen, note=note)


def _found_tasks(folder: Path) -> list[dict]:
    """Tasks by the names of files and sub-folders."""
    found = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (inner / "train.json").exists() or (inner / "test.json").exists():
            files = {part: f"{inner.name}/{part}.json" for part in ("train", "test")}
            found.append({"name": inner.name, "image_folder": inner.name, **files})
    names = {
        path.name.removesuffix(f"_{part}.json") for part in ("train", "test") for path in folder.glob(f"?*_{part}.json")
    }
    if both := sorted(names & {entry["name"] for entry in found}):
        raise ValueError(f"{folder}: a task must be a sub-folder or a pair of files, {', '.join(both)} is both")
    found += [{"name": name, **{part: f"{name}_{part}.json" for part in ("train", "test")}} for name in sorted(names)]
    if not found:
        raise ValueError(
            f"{folder} is no stream: expected {STREAM_FILE}, or sub-folders with train.json and test.json, or pairs "
            "<task>_train.json and <task>_test.json"
        )
    return found


def _settings(path: Path) -> dict:
    settings = _json(path)
    _check_keys(settings, STREAM_KEYS, str(path))
    entries = settings.get("tasks")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: tasks must be a list of at least one task, got {entries!r}")
    for index, entry in enumerate(entries):
        where = f"{path}: tasks[{index}]"
        _check_keys(entry, TASK_KEYS, where)
        for key in ("name", "train", "test"):
            if key not in entry:
                raise ValueError(f"{where}.{key} is missing")
        for key, value in entry.items():
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}.{key} must be a string that is not empty, got {value!r}")
    names = [entry["name"] for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: tasks must have different names, got {', '.join(twice)} twice")
    for key in ("name", "note"):
        if not isinstance(settings.get(key, ""), str):
            raise ValueError(f"{path}: {key} must be a string, got {settings[key]!r}")
    return settings


def _check_keys(value: object, known: Sequence[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it knows {', '.join(known)}"
            raise ValueError(f"{where} has an unknown field {key!r}{hint}")


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def _task(folder: Path, entry: dict, counts: dict[str, int | None], seed: int) -> Task:
    name, images = entry["name"], entry.get("image_folder", ".")
    folders = {"train": folder / images, "test": folder / entry.get("test_image_folder", images)}
    parts = {}
    for part, count in counts.items():
        found = _samples(folder / entry[part], name, part, folders[part], entry.get("answer_field", "answer"))
        parts[part] = _subset(found, count, derive_seed(seed, name, part))
    description = entry.get("description", f"Questions of {name.replace('_', ' ')}.")
    return Task(name=name, description=description, scorer=entry.get("scorer", "exact_match"), **parts)


def _subset(samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    if count is None or count >= len(samples):
        return samples
    places = np.random.default_rng(seed).choice(len(samples), count, replace=False)
    return [samples[place] for place in sorted(places)]


def _samples(path: Path, task: str, part: str, images: Path, field: str) -> list[Sample]:
    entries = _json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a JSON array, got {type(entries).__name__}")
    return [_sample(entry, f"{path}[{index}]", task, part, images, field) for index, entry in enumerate(entries)]


def _sample(entry: object, where: str, task: str, part: str, images: Path, field: str) -> Sample:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {type(entry).__name__}")
    key = "question_id" if "question_id" in entry else "id"
    image = _field(entry, "image", where, str) if entry.get("image") is not None else None
    if "conversations" in entry:
        question, answer = _turns(entry["conversations"], where)
        used = {key, "image", "conversations"}
    else:
        question, answer = _field(entry, "text", where, str), _answer(entry, field, where, part)
        used = {key, "image", "text", field}
    return Sample(
        # the same number may name another question in another file
        id=f"{task}/{part}/{_field(entry, key, where, (str, int))}",
        task=task,
        question=_without_image_token(question, where, image is not None),
        answer=answer,
        image=None if image is None else images / image,
        metadata={**{name: value for name, value in entry.items() if name not in used}, "source": where},
    )


def _field(entry: dict, key: str, where: str, kind: type | tuple[type, ...]):
    if key not in entry:
        raise ValueError(f"{where}.{key} is missing; there is {', '.join(entry) or 'nothing'}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}.{key} must be {kinds}, got {value!r}")
    return value


def _answer(entry: dict, field: str, where: str, part: str) -> str:
    value = _field(entry, field, where, (str, int, float, list))
    if isinstance(value, list):
        if not all(isinstance(one, str) for one in value):
            raise ValueError(f"{where}.{field} must be a list of str, got {value!r}")
        # as the scorers with several accepted answers read them; the first is what is learned
        return "|".join(value if part == "test" else value[:1])
    return str(value)


def _turns(turns: object, where: str) -> tuple[str, str]:
    where = f"{where}.conversations"
    if not isinstance(turns, list) or len(turns) != 2:
        many = f"{len(turns)} turns" if isinstance(turns, list) else type(turns).__name__
        raise ValueError(f"{where} must be one human and one gpt turn, got {many}")
    texts = []
    for index, (turn, speaker) in enumerate(zip(turns, ("human", "gpt"), strict=True)):
        here = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{here} must be an object, got {type(turn).__name__}")
        if _field(turn, "from", here, str) != speaker:
            raise ValueError(f"{here}.from must be {speaker!r}, got {turn['from']!r}")
        texts.append(_field(turn, "value", here, str))
    return texts[0], texts[1]


def _without_image_token(question: str, where: str, has_image: bool) -> str:
    count = question.count(IMAGE_TOKEN)
    if count > 1 or (count and not has_image):
        images = "one image" if has_image else "no image"
        raise ValueError(f"{where}: the question holds {IMAGE_TOKEN} {count} times, but there is {images}")
    return question.replace(IMAGE_TOKEN, "").strip()
