"""MLLM-CL, domain continual learning: five domains, train and test alike distributed (arXiv:2506.05453)."""

from __future__ import annotations

from .base import Sample, Stream
from .public import load_public

SUMMARY = "MLLM-CL Domain (DCL): remote sensing, medical, driving, science, finance; its files in root"
SOURCE = "MLLM-CL on the Hugging Face hub or ModelScope"
NOTE = (
    "MLLM-CL, domain continual learning (arXiv:2506.05453), scored by rules close to its scripts', lenient as they are."
)

TASKS = [
    {"name": name, "description": description, "train": f"{name}/train.json", "test": f"{name}/test.json",
     "image_folder": name, "scorer": scorer}
    for name, description, scorer in (
        ("RS", "Remote sensing: questions on satellite and aerial images.", "contains"),
        ("Med", "Medical: questions on pathology images.", "substring"),
        ("AD", "Autonomous driving: questions on what the cameras of a car see.", "contains"),
        ("Sci", "Science: questions on diagrams, maps and textbook figures.", "substring"),
        ("Fin", "Finance: questions on stock charts.", "exact_without_spaces_and_dots"),
    )
]  # fmt: skip
#: first parts of the names of science images whose answers have to be met exactly; the rest are maps
EXACT = ("AI2D", "TQA", "VQA", "SciVerse")


def scorer_of(sample: Sample) -> str | None:
    """The science task has three rules, by the image's name and the question."""
    if sample.task != "Sci":
        return None
    if str(sample.image).replace("\\", "/").rpartition("/")[2].partition("_")[0] in EXACT:
        return "exact_lower"
    return "listed_share" if "Which states" in sample.question else None


def load(*, root=None, num_train=None, num_test=None, seed: int = 0, tasks: list[str] | None = None) -> Stream:
    """The stream; see `load_folder` for the options.

    Args:
        root: the folder with RS, Med, AD, Sci and Fin, each with train.json, test.json and its images.
    """
    return load_public(
        "mllm-cl-domain", TASKS, root=root, source=SOURCE, note=NOTE, scorer_of=scorer_of, tasks=tasks,
        num_train=num_train, num_test=num_test, seed=seed,
    )  # fmt: skip
