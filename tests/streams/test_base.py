"""Samples, streams and how they are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllmcl import streams
from mllmcl.streams import Sample, Stream, Task


def sample(name="1", **options) -> Sample:
    return Sample(**{"id": name, "task": "toy", "question": "What?", "answer": "this", **options})


def stream(*train, test=None, **options) -> Stream:
    task = Task(name="toy", description="Toys.", train=train, test=[sample("t")] if test is None else test)
    return Stream(**{"name": "made-up", "tasks": (task,), **options})


def test_images_load_as_rgb(tmp_path):
    assert sample().load_image() is None
    array = np.zeros((4, 6, 3), np.uint8)
    array[1, 2] = (1, 2, 3)
    assert np.array_equal(sample(image=array).load_image(), array)
    Image.fromarray(array).convert("P").save(tmp_path / "a.png")
    picture = sample(image=tmp_path / "a.png").load_image()
    assert picture.mode == "RGB" and picture.size == (6, 4)
    for other in (array[..., 0], np.zeros((4, 6, 4), np.uint8), Image.new("RGBA", (6, 4))):
        picture = sample(image=other).load_image()
        assert picture.mode == "RGB" and picture.size == (6, 4)


def test_a_right_stream_passes(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.jpg")
    stream(sample("1", image=tmp_path / "a.jpg"), sample("2")).validate()


def test_validate_names_everything_that_is_wrong(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    # the header is there
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    wrong = stream(
        sample("1", answer=" "),
        sample("1", question=""),
        sample("2", image=tmp_path / "none.png", metadata={"source": "train.json[2]"}),
        sample("3", image=tmp_path / "text.png"),
        sample("4", image=tmp_path / "cut.jpg"),
        sample("5", task="other"),
        test=[],
    )
    with pytest.raises(ValueError) as caught:
        wrong.validate()
    text = str(caught.value)
    assert text.startswith("stream made-up: ")
    for part in (
        "toy train sample '1' has no answer",
        "toy train sample '1' occurs twice",
        "toy train sample '1' has no question",
        f"toy train sample '2' (train.json[2]): no file {tmp_path / 'none.png'}",
        f"toy train sample '3': {tmp_path / 'text.png'} is no readable image",
        f"toy train sample '4': {tmp_path / 'cut.jpg'} is no readable image",
        "toy train sample '5' is of task 'other'",
        "task toy has no test samples",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 9, 3), np.uint8), "an image of 9 x 0 pixels"),
        (Image.new("RGB", (0, 9)), "an image of 0 x 9 pixels"),
        (np.zeros((4, 6, 3)), r"no uint8 \[H, W, 3\] array, PIL image or path: float64 \[4, 6, 3\]"),
        (np.zeros((3, 4, 6), np.uint8), r"no uint8 .*: uint8 \[3, 4, 6\]"),
        (b"png", "no uint8 .*: bytes"),
    ],
)
def test_images_in_memory_are_looked_at(image, message):
    with pytest.raises(ValueError, match=f"toy train sample '1' .*{message}"):
        stream(sample("1", image=image)).validate()
    stream(sample("1", image=Image.new("L", (3, 3)))).validate()


def test_ids_are_unique_in_the_whole_stream():
    with pytest.raises(ValueError, match="toy test sample '1' occurs twice"):
        stream(sample("1"), test=[sample("1")]).validate()


def test_a_stream_needs_tasks_of_different_names():
    with pytest.raises(ValueError, match="stream made-up: has no tasks"):
        stream(tasks=()).validate()
    first = stream(sample("1")).tasks[0]
    with pytest.raises(ValueError, match="stream made-up: task toy occurs twice"):
        stream(tasks=(first, first)).validate()


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", "a\\b", "..", ".hidden", "", " a", "a\n", "a:b", "x" * 201])
def test_a_task_is_called_as_a_file_may_be(name):
    """Its adapter and its predictions lie under its name in the run's folder, and nowhere else."""
    first = stream(sample("1")).tasks[0]
    with pytest.raises(ValueError, match="is no name of a file"):
        stream(tasks=(replace(first, name=name),)).validate()


def test_many_problems_are_counted():
    with pytest.raises(ValueError, match="; 15 more") as caught:
        stream(*(sample(str(place), answer="") for place in range(25))).validate()
    assert str(caught.value).count("has no answer") == 10


def test_task_by_name():
    assert stream(sample()).task("toy").name == "toy"
    with pytest.raises(ValueError, match="task must be one of toy, got 'other'"):
        stream(sample()).task("other")


def test_every_stream_file_is_listed():
    folder = Path(streams.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if "SUMMARY = " in path.read_text()}
    assert {name.replace("-", "_") for name in streams.available()} == files
    pocket = {"pocket-domain", "pocket-ability", "pocket-domain-signs", "pocket-ability-hard"}
    assert pocket <= streams.available().keys()
    assert all("\n" not in line and len(line) < 120 for line in streams.available().values())


def test_unknown_streams_are_refused(tmp_path):
    with pytest.raises(TypeError, match="stream must be a name or a folder, got None"):
        streams.load(None)
    with pytest.raises(ValueError, match="did you mean pocket-domain"):
        streams.load("pocket-domian")
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/gone"):
        streams.load("gone", root=tmp_path)
    with pytest.raises(TypeError, match="num_tests"):
        streams.load("pocket-ability", num_tests=3)


@pytest.mark.parametrize("name", [name for name in streams.available() if name.startswith("pocket-")])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_train": 0}, "num_train must be an integer of at least 1, got 0"),
        ({"num_test": 1.5}, "num_test must be an integer of at least 1, got 1.5"),
        ({"image_size": True}, "image_size must be an integer of at least 16, got True"),
        ({"image_size": 15}, "image_size must be an integer of at least 16, got 15"),
        ({"seed": "0"}, "seed must be an integer, got '0'"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"tasks": []}, "tasks must be None or at least one name, got none"),
        ({"tasks": ["cooking"]}, "tasks must be among .*, got cooking"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        streams.load(name, **options)


def test_tasks_are_a_list_of_different_names():
    with pytest.raises(TypeError, match="tasks must be None or a list of names, got 'gui'"):
        streams.load("pocket-ability", tasks="gui")
    with pytest.raises(TypeError, match="tasks must be None or a list of names, got 3"):
        streams.load("pocket-ability", tasks=3)
    with pytest.raises(ValueError, match="tasks must be different ones, got gui twice"):
        streams.load("pocket-ability", tasks=["gui", "ocr", "gui"])
