"""Public benchmarks in folders laid out as their authors hand them out."""

from __future__ import annotations

import pytest

from mllmcl import streams
from mllmcl.evaluation import SCORERS, check_scorers, evaluate

from .test_llava_folder import ask, talk, write

DOMAIN = ("RS", "Med", "AD", "Sci", "Fin")
UCIT = {
    "ImageNet-R": "train", "ArxivQA": "train_4w", "VizWiz-caption": "train", "IconQA": "train",
    "CLEVR-Math": "train_4w", "Flickr30k-cap": "train_brief_4w",
}  # fmt: skip


@pytest.fixture
def domain(tmp_path):
    for task in DOMAIN:
        write(tmp_path / task / "train.json", [talk(place) for place in range(4)])
        write(tmp_path / task / "test.json", [ask(place, answer="Two", image="images/a.png") for place in range(3)])
    maps = [
        ask(0, "Which states border it?", "ohio,iowa", "images/MapQA_1.png"),
        ask(1, "How many?", "3", "images/MapQA_2.png"),
        ask(2, "Which part?", "B", "images/AI2D_3.png"),
    ]
    write(tmp_path / "Sci" / "test.json", maps)
    return tmp_path


class Says:
    """A model that knows its answers by question."""

    router = None

    def __init__(self, answers):
        self.answers = answers

    def generate(self, samples, experts=None, *, max_new_tokens, batch_size):
        return [self.answers[sample.question] for sample in samples]


def test_domain(domain):
    stream = streams.load("mllm-cl-domain", root=domain)
    assert stream.name == "mllm-cl-domain" and tuple(task.name for task in stream.tasks) == DOMAIN
    scorers = ("contains", "substring", "contains", "substring", "exact_without_spaces_and_dots")
    assert tuple(task.scorer for task in stream.tasks) == scorers
    medical = stream.task("Med")
    assert medical.test[0].image == domain / "Med/images/a.png" and medical.test[0].answer == "Two"
    assert medical.train[0].answer == "a cat" and len({task.description for task in stream.tasks}) == 5
    few = streams.load("mllm-cl-domain", root=domain, tasks=["Fin", "RS"], num_train=2)
    assert [(task.name, len(task.train), len(task.test)) for task in few.tasks] == [("Fin", 2, 3), ("RS", 2, 3)]


def test_each_science_item_is_scored_by_its_own_rule(domain):
    """As its script does: states by their share, maps by substring, diagrams exactly."""
    science = streams.load("mllm-cl-domain", root=domain).task("Sci")
    mllm = Says({"Which states border it?": "Ohio, Utah", "How many?": "about 3", "Which part?": "B, I think"})
    found = evaluate(mllm, science.test, scorer=science.scorer)
    assert [item.score for item in found] == [0.5, 1.0, 0.0]
    mllm.answers["Which part?"] = "b"
    assert evaluate(mllm, science.test, scorer=science.scorer)[2].score == 1.0


@pytest.mark.parametrize("perception", ["VP_test", "CV-Benchv2"])
def test_ability(tmp_path, perception):
    for task in ("OCR", "Math", "VP", "APP"):
        write(tmp_path / task / "train.json", [talk(0)])
    for folder in ("OCR_test", "Math_test", perception, "APP_test"):
        write(tmp_path / folder / "test.json", [ask(0, answer=["stop", "halt"])])
    stream = streams.load("mllm-cl-ability", root=tmp_path)
    assert [task.name for task in stream.tasks] == ["OCR", "Math", "VP", "APP"]
    vision = stream.task("VP")
    assert vision.train[0].image == tmp_path / "VP/images/a.png"
    assert vision.test[0].image == tmp_path / perception / "images/a.png"
    assert SCORERS[stream.task("OCR").scorer]("It says HALT.", stream.task("OCR").test[0].answer) == 1.0


def test_ucit(tmp_path):
    for folder, train in UCIT.items():
        write(tmp_path / folder / f"{train}.json", [talk(0, image=f"datasets/{folder}/a.png")])
        write(tmp_path / folder / "test_3000.json", [ask(0, image=f"datasets/{folder}/b.png")])
    stream = streams.load("ucit", root=tmp_path)
    assert [task.name for task in stream.tasks] == [
        "ImageNet-R",
        "ArxivQA",
        "VizWiz",
        "IconQA",
        "CLEVR-Math",
        "Flickr30k",
    ]
    assert stream.task("VizWiz").test[0].image == tmp_path / "datasets/VizWiz-caption/b.png"


@pytest.mark.parametrize(("folder", "options"), [("Instruction_Type1", {}), ("mine", {"instructions": "mine"})])
def test_coin(tmp_path, folder, options):
    names = ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA"]
    for name in names:
        answer = {"answer_bbox": "[0.1, 0.1, 0.5, 0.5]"} if name == "Grounding" else {"answer": "B"}
        test = {"question_id": 0, "image": "COCO2014/a.jpg", "text": "Which?", **answer}
        write(tmp_path / folder / name / "train.json", [talk(0)])
        write(tmp_path / folder / name / ("val.json" if name == "TextVQA" else "test.json"), [test])
    stream = streams.load("coin", root=tmp_path, **options)
    assert [task.name for task in stream.tasks] == names
    box = stream.task("Grounding")
    assert box.test[0].answer == "[0.1, 0.1, 0.5, 0.5]" and box.test[0].image == tmp_path / "COCO2014/a.jpg"
    assert SCORERS[box.scorer]("[0.1,0.1,0.5,0.45]", box.test[0].answer) == 1.0
    write(tmp_path / folder / "VQAv2" / "test.json", [{"question_id": 0, "image": "a.jpg", "text": "Which?"}])
    with pytest.raises(
        ValueError, match=r"VQAv2/test\.json\[0\]\.answer is missing; there is question_id, image, text"
    ):
        streams.load("coin", root=tmp_path, **options)
    assert len(streams.load("coin", root=tmp_path, tasks=names[:6], **options).tasks) == 6


@pytest.mark.parametrize("name", [name for name in streams.available() if not name.startswith("pocket")])
def test_what_is_not_there_is_told_in_whole(name, tmp_path):
    with pytest.raises(ValueError, match=rf"stream {name} needs root=, .* get them from"):
        streams.load(name)
    with pytest.raises(ValueError, match=rf"root must be the folder with the files of {name}, got .*nowhere"):
        streams.load(name, root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lacks \S+/train\S*\.json, \S+/test\S*\.json, .* get them from"):
        streams.load(name, root=tmp_path)


def test_scorers_are_looked_at_before_anything_is_trained(domain):
    stream = streams.load("mllm-cl-domain", root=domain)
    check_scorers(stream.tasks)
    write(domain / "RS" / "test.json", [ask(0, scorer="substrnig")])
    with pytest.raises(
        ValueError, match=r"task RS: scorer: expected one of .* got 'substrnig'; did you mean substring"
    ):
        check_scorers(streams.load("mllm-cl-domain", root=domain).tasks)
