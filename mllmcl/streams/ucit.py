"""UCIT: six data sets that a pretrained MLLM does badly on without training (arXiv:2503.12941, MCITlib)."""

from __future__ import annotations

from .base import Stream
from .public import load_public

SUMMARY = "UCIT: ImageNet-R, ArxivQA, VizWiz captions, IconQA, CLEVR-Math, Flickr30k; its files in root"
SOURCE = "UCIT of HiDe-LLaVA on the Hugging Face hub"
NOTE = (
    "UCIT (arXiv:2503.12941) in the order and with the files of MCITlib. Questions are scored as there; captions by "
    "ROUGE-L alone, of which the published score is a mean with BLEU, METEOR and CIDEr."
)

TASKS = [
    {"name": name, "description": description, "train": f"{folder}/{train}.json", "test": f"{folder}/test_3000.json",
     "image_folder": ".", "scorer": scorer}
    for name, description, folder, train, scorer in (
        ("ImageNet-R", "Naming objects in drawings and renditions.", "ImageNet-R", "train", "exact_lower"),
        ("ArxivQA", "Questions on figures of scientific papers.", "ArxivQA", "train_4w", "exact_lower"),
        ("VizWiz", "Captions of pictures taken by blind people.", "VizWiz-caption", "train", "rouge_l"),
        ("IconQA", "Questions on abstract diagrams and icons.", "IconQA", "train", "exact_lower"),
        ("CLEVR-Math", "Arithmetic on rendered scenes of solids.", "CLEVR-Math", "train_4w", "exact_lower"),
        ("Flickr30k", "Captions of everyday photographs.", "Flickr30k-cap", "train_brief_4w", "rouge_l"),
    )
]  # fmt: skip


def load(*, root=None, num_train=None, num_test=None, seed: int = 0, tasks: list[str] | None = None) -> Stream:
    """The stream; see `load_folder` for the options.

    Args:
        root: the folder UCIT, with a folder for each task's JSON; images lie where these say, relative to root.
    """
    return load_public(
        "ucit",
        TASKS,
        root=root,
        source=SOURCE,
        note=NOTE,
        tasks=tasks,
        num_train=num_train,
        num_test=num_test,
        seed=seed,
    )
