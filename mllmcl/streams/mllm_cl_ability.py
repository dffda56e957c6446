"""MLLM-CL, ability continual learning: four abilities, train and test from different data (arXiv:2506.05453)."""

from __future__ import annotations

from .base import Stream
from .public import load_public

SUMMARY = "MLLM-CL Ability (ACL): OCR, math, visual perception, GUI; its files in root"
SOURCE = "MLLM-CL on the Hugging Face hub or ModelScope"
NOTE = (
    "MLLM-CL, ability continual learning (arXiv:2506.05453). OCR and visual perception are scored by rules close to "
    "its scripts'. Its scores of math need a language model as a judge and those of GUI a server; here both are exact "
    "match, which does not compare with published numbers."
)

TASKS = [
    {"name": name, "description": description, "train": f"{name}/train.json",
     "test": tuple(f"{folder}/test.json" for folder in tests), "image_folder": name, "test_image_folder": tests,
     "scorer": scorer}
    for name, description, tests, scorer in (
        ("OCR", "OCR: reading text in images.", ("OCR_test",), "any_substring"),
        ("Math", "Math and logic: problems on figures.", ("Math_test",), "exact_match"),
        ("VP", "Visual perception: counting and spatial relations.", ("VP_test", "CV-Benchv2"), "substring"),
        ("APP", "GUI agent: screens of apps and what to do in them.", ("APP_test",), "exact_match"),
    )
]  # fmt: skip


def load(*, root=None, num_train=None, num_test=None, seed: int = 0, tasks: list[str] | None = None) -> Stream:
    """The stream; see `load_folder` for the options.

    Args:
        root: the folder with OCR, OCR_test, Math, Math_test, VP, VP_test (or CV-Benchv2), APP and APP_test.
    """
    return load_public(
        "mllm-cl-ability", TASKS, root=root, source=SOURCE, note=NOTE, tasks=tasks, num_train=num_train,
        num_test=num_test, seed=seed,
    )  # fmt: skip
