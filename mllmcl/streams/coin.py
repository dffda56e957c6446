"""CoIN: eight tasks of instruction tuning in a row (arXiv:2403.08350)."""

from __future__ import annotations

from .base import Stream
from .public import load_public

SUMMARY = "CoIN: ScienceQA, TextVQA, ImageNet, GQA, VizWiz, grounding, VQAv2, OCR-VQA; its files in root"
SOURCE = "CoIN on the Hugging Face hub, images from the data sets that it names"
NOTE = (
    "CoIN (arXiv:2403.08350) in its order. ImageNet and grounding are scored as its scripts do; the rest by exact "
    "match with the answer in the file, where its scripts use each data set's own rule or server."
)
#: names that the folder of instructions has had
INSTRUCTIONS = ("Instructions_Original", "Instruction_Type1", "Instructions")

NAMES = (
    ("ScienceQA", "Multiple-choice questions of school science.", "exact_match"),
    ("TextVQA", "Questions on text in photographs.", "exact_match"),
    ("ImageNet", "Naming the object in a photograph.", "either_substring"),
    ("GQA", "Compositional questions on scenes.", "exact_match"),
    ("VizWiz", "Questions of blind people on their pictures.", "exact_match"),
    ("Grounding", "The bounding box of what an expression refers to.", "box_iou"),
    ("VQAv2", "Questions on everyday photographs.", "exact_match"),
    ("OCRVQA", "Questions on the text of book covers.", "exact_match"),
)


def _entry(name: str, description: str, scorer: str, folders: tuple[str, ...]) -> dict:
    tests = ("test", "val") if name == "TextVQA" else ("test",)
    entry = {
        "name": name,
        "description": description,
        "train": tuple(f"{folder}/{name}/train.json" for folder in folders),
        "test": tuple(f"{folder}/{name}/{test}.json" for folder in folders for test in tests),
        "image_folder": ".",
        "scorer": scorer,
    }
    return {**entry, "answer_field": "answer_bbox"} if name == "Grounding" else entry


def load(
    *,
    root=None,
    instructions: str | None = None,
    num_train=None,
    num_test=None,
    seed: int = 0,
    tasks: list[str] | None = None,
) -> Stream:
    """The stream; see `load_folder` for the options. A test file without answers is an error: leave its task out.

    Args:
        root: the folder with the images (COCO2014, GQA, OCR-VQA, TextVQA, ...) and the folder of instructions.
        instructions: name of the latter, where it is none of Instructions_Original, Instruction_Type1, Instructions.
    """
    folders = INSTRUCTIONS if instructions is None else (instructions,)
    return load_public(
        "coin", [_entry(*task, folders) for task in NAMES], root=root, source=SOURCE, note=NOTE, tasks=tasks,
        num_train=num_train, num_test=num_test, seed=seed,
    )  # fmt: skip
