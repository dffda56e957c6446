"""Folders of LLaVA-style JSON: round trip, layouts, and errors by file, index and field."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mllmcl import streams


def talk(name, question="<image>\nWhat is it?", answer="a cat", image="images/a.png", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns, **more}


def ask(name, question="What is it?", answer="a dog", image="images/a.png", **more) -> dict:
    return {"question_id": name, "image": image, "text": question, "answer": answer, **more}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """Two tasks in sub-folders."""
    for task in ("zoo", "art"):
        write(tmp_path / task / "train.json", [talk(place) for place in range(4)])
        write(tmp_path / task / "test.json", [ask(place) for place in range(3)])
        (tmp_path / task / "images").mkdir()
        Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / task / "images" / "a.png")
    return tmp_path


def test_sub_folders_in_the_order_of_names(folder):
    stream = streams.load(folder)
    stream.validate()
    assert stream.name == folder.name and [task.name for task in stream.tasks] == ["art", "zoo"]
    first, last = stream.tasks[0].train[0], stream.tasks[1].test[-1]
    assert (first.id, first.task, first.question, first.answer) == ("art/train/0", "art", "What is it?", "a cat")
    assert (last.id, last.question, last.answer) == ("zoo/test/2", "What is it?", "a dog")
    assert first.metadata["source"] == f"{folder}/art/train.json[0]"
    assert np.array_equal(np.asarray(first.load_image())[0, 0], (9, 8, 7))
    assert len({sample.id for task in stream.tasks for sample in [*task.train, *task.test]}) == 14


def test_pairs_of_files(tmp_path):
    for task in ("b_two", "a_one"):
        write(tmp_path / f"{task}_train.json", [talk(1, "How much?", "two", image=None)])
        write(tmp_path / f"{task}_test.json", [talk(2, "How much?", "three", image=None)])
    stream = streams.load(tmp_path.name, root=tmp_path.parent)
    stream.validate()
    assert [task.name for task in stream.tasks] == ["a_one", "b_two"]
    assert stream.tasks[0].test[0].answer == "three" and stream.tasks[0].test[0].image is None


def test_stream_file_says_order_and_places(folder):
    tasks = [
        {"name": "Zoo", "description": "Animals.", "train": "zoo/train.json", "test": "zoo/test.json",
         "image_folder": "zoo", "scorer": "substring"},
        {"name": "Art", "train": "art/train.json", "test": "art/test.json", "image_folder": "art"},
    ]  # fmt: skip
    write(folder / "stream.json", {"name": "mine", "note": "made up", "tasks": tasks})
    stream = streams.load(folder)
    stream.validate()
    assert (stream.name, stream.note, [task.name for task in stream.tasks]) == ("mine", "made up", ["Zoo", "Art"])
    assert (stream.tasks[0].description, stream.tasks[0].scorer) == ("Animals.", "substring")
    assert stream.tasks[1].scorer == "exact_match"
    assert [task.name for task in streams.load(folder, tasks=["Art"]).tasks] == ["Art"]


def test_answers_and_other_fields(tmp_path):
    write(tmp_path / "x_train.json", [talk("a", "Is it?\n<image>")])
    write(tmp_path / "x_test.json", [ask(1, answer=7), ask(2, answer=["one", "1"], answer_type="number")])
    task = streams.load(tmp_path).tasks[0]
    assert task.train[0].question == "Is it?" and task.train[0].id == "x/train/a"
    assert [sample.answer for sample in task.test] == ["7", "one|1"]
    assert task.test[1].metadata["answer_type"] == "number"


def test_subsets_are_drawn_by_seed_in_file_order(tmp_path):
    write(tmp_path / "x_train.json", [talk(place) for place in range(50)])
    write(tmp_path / "x_test.json", [ask(place) for place in range(50)])

    def drawn(**options):
        return [int(sample.id.split("/")[-1]) for sample in streams.load(tmp_path, **options).tasks[0].train]

    assert len(drawn(num_train=9)) == 9 and drawn(num_train=9) == sorted(drawn(num_train=9)) == drawn(num_train=9)
    assert drawn(num_train=9) != drawn(num_train=9, seed=1)
    assert drawn(num_train=99) == drawn() == list(range(50))
    assert len(streams.load(tmp_path, num_test=2).tasks[0].test) == 2


BROKEN = [
    ([talk(1), 5], r"x_train\.json\[1\] must be an object, got int"),
    (
        [{"image": "a.png", "text": "?", "answer": "!"}],
        r"x_train\.json\[0\]\.id is missing; there is image, text, answer",
    ),
    ([talk(1.5)], r"x_train\.json\[0\]\.id must be str or int, got 1\.5"),
    ([talk(True)], r"x_train\.json\[0\]\.id must be str or int, got True"),
    ([talk(1, image=3)], r"x_train\.json\[0\]\.image must be str, got 3"),
    ([{"id": 1, "text": "?"}], r"x_train\.json\[0\]\.answer is missing"),
    ([{"id": 1, "answer": "?"}], r"x_train\.json\[0\]\.text is missing"),
    ([ask(1, answer=None)], r"x_train\.json\[0\]\.answer must be .*, got None"),
    ([ask(1, answer=[1])], r"x_train\.json\[0\]\.answer must be a list of str"),
    ([talk(1, answer=2)], r"x_train\.json\[0\]\.conversations\[1\]\.value must be str, got 2"),
    ([{"id": 1, "conversations": []}], r"x_train\.json\[0\]\.conversations must be one human and one gpt turn, got 0"),
    ([{"id": 1, "conversations": [1, 2]}], r"conversations\[0\] must be an object"),
    (
        [{"id": 1, "conversations": [{"from": "gpt", "value": ""}] * 2}],
        r"conversations\[0\]\.from must be 'human', got",
    ),
    ([{"id": 1, "conversations": [{"value": ""}] * 2}], r"conversations\[0\]\.from is missing"),
    (
        [talk(1, "<image><image> what?")],
        r"x_train\.json\[0\]: the question holds <image> 2 times, but there is one image",
    ),
    ([talk(1, image=None)], r"x_train\.json\[0\]: the question holds <image> 1 times, but there is no image"),
    ({"a": 1}, r"x_train\.json must hold a JSON array, got dict"),
    ("[{", r"x_train\.json is not JSON"),
]


@pytest.mark.parametrize("content, message", BROKEN)
def test_broken_entries_are_named(tmp_path, content, message):
    write(tmp_path / "x_train.json", content)
    write(tmp_path / "x_test.json", [ask(1)])
    with pytest.raises(ValueError, match=message):
        streams.load(tmp_path)


def test_missing_part_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is no stream: expected stream\.json"):
        streams.load(tmp_path)
    write(tmp_path / "x_train.json", [])
    with pytest.raises(ValueError, match=r"x_test\.json: there is no such file"):
        streams.load(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ([], "stream.json must be an object, got list"),
        ({"task": []}, "unknown field 'task'; did you mean tasks"),
        ({"tasks": []}, "tasks must be a list of at least one task"),
        ({"tasks": [{"name": "a", "train": "t"}]}, r"tasks\[0\]\.test is missing"),
        ({"tasks": [{"name": "a", "train": "t", "test": 3}]}, r"tasks\[0\]\.test must be a string"),
        ({"tasks": [{"name": "a", "train": "t", "test": "t"}] * 2}, "different names, got a twice"),
        (
            {"tasks": [{"name": "a", "train": "t", "test": "t", "images": "i"}]},
            r"tasks\[0\] has an unknown field 'images'",
        ),
        ({"name": 3, "tasks": [{"name": "a", "train": "t", "test": "t"}]}, "name must be a string, got 3"),
        ({"tasks": [{"name": "a", "train": "gone.json", "test": "t"}]}, r"gone\.json: there is no such file"),
    ],
)
def test_broken_stream_files_are_named(tmp_path, settings, message):
    write(tmp_path / "stream.json", settings)
    with pytest.raises(ValueError, match=message):
        streams.load(tmp_path)


def test_wrong_options(folder):
    with pytest.raises(ValueError, match="num_train must be None or an integer of at least 1, got 0"):
        streams.load(folder, num_train=0)
    with pytest.raises(ValueError, match="tasks must be among art, zoo, got cat"):
        streams.load(folder, tasks=["cat"])
    with pytest.raises(ValueError, match="tasks must be None or at least one name, got none"):
        streams.load(folder, tasks=[])
    with pytest.raises(TypeError, match="tasks must be None or a list of names, got 'art'"):
        streams.load(folder, tasks="art")
    with pytest.raises(ValueError, match="seed must be an integer, got None"):
        streams.load(folder, seed=None)


def test_a_task_in_two_places_is_refused(folder):
    write(folder / "zoo_test.json", [ask(9)])
    with pytest.raises(ValueError, match="a task must be a sub-folder or a pair of files, zoo is both"):
        streams.load(folder)


def test_what_validate_finds_in_a_folder(tmp_path):
    write(tmp_path / "x_train.json", [talk(1, answer=""), talk(1, image="gone.png")])
    write(tmp_path / "x_test.json", [])
    with pytest.raises(ValueError) as caught:
        streams.load(tmp_path).validate()
    text = str(caught.value)
    assert f"x train sample 'x/train/1' ({tmp_path}/x_train.json[0]) has no answer" in text
    assert f"x train sample 'x/train/1' ({tmp_path}/x_train.json[1]) occurs twice" in text
    assert f"no file {tmp_path}/gone.png" in text and "task x has no test samples" in text
