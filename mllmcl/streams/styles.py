"""Samples asked in another answer style, by rules: what is known stays, the form of the answer changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..seeds import derive_seed
from .base import Sample

__all__ = ["STYLES", "diversified"]

#: options of a multiple choice
MOST_OPTIONS = 4


def _choice(sample: Sample, others: list[str], draw: Callable[[str], int]) -> tuple[str, str]:
    options = sorted({sample.answer, *others[: MOST_OPTIONS - 1]}, key=lambda option: draw(f"place of {option}"))
    letters = "ABCD"[: len(options)]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return f"{sample.question} {listed} Answer with the letter.", letters[options.index(sample.answer)]


def _yes_no(sample: Sample, others: list[str], draw: Callable[[str], int]) -> tuple[str, str]:
    is_right = draw("right or wrong") % 2 == 0
    said = sample.answer if is_right else others[0]
    return f"{sample.question} Is the answer {said}? Answer yes or no.", "yes" if is_right else "no"


def _sentence(sample: Sample, others: list[str], draw: Callable[[str], int]) -> tuple[str, str]:
    return f"{sample.question} Answer in a full sentence.", f"The answer is {sample.answer}."


def _blank(sample: Sample, others: list[str], draw: Callable[[str], int]) -> tuple[str, str]:
    return f"{sample.question} Fill in the blank: The answer is ____.", sample.answer


#: name of a style to what makes question and answer of a sample, other answers and a draw; and whether it needs others
STYLES: dict[str, tuple[Callable, bool]] = {
    "choice": (_choice, True),
    "yes-no": (_yes_no, True),
    "sentence": (_sentence, False),
    "blank": (_blank, False),
}


def diversified(samples: Sequence[Sample], share: float, seed: int = 0) -> list[Sample]:
    """A share of the samples asked in another of `STYLES`; the others, and the order, as they are.

    The same samples and seed give the same; a smaller share rewrites a part of what a larger one does. Wrong options
    are answers of samples with the same question, or of any other where those agree.

    Args:
        samples: of one task. share: of them to rewrite, 0 to 1.

    Source: answer style diversification of SEFE (arXiv:2505.02486), which has a language model write the styles.

    >>> one, other = (Sample(id=n, task="t", question="Which?", answer=n) for n in ("cat", "dog"))
    >>> [sample.answer for sample in diversified([one, other], 0.0)]
    ['cat', 'dog']
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}")
    of_question: dict[str, set[str]] = {}
    for sample in samples:
        of_question.setdefault(sample.question, set()).add(sample.answer)
    every = {sample.answer for sample in samples}
    ranked = sorted(samples, key=lambda sample: derive_seed(seed, "restyled", sample.id))
    chosen = {sample.id for sample in ranked[: round(share * len(ranked))]}
    found = []
    for sample in samples:
        if sample.id in chosen:
            others = of_question[sample.question] - {sample.answer} or every - {sample.answer}
            sample = _restyled(sample, others, seed)
        found.append(sample)
    return found


def _restyled(sample: Sample, others: set[str], seed: int) -> Sample:
    def draw(purpose: str) -> int:
        return derive_seed(seed, "style", sample.id, purpose)

    names = [name for name, (_, needs_others) in STYLES.items() if others or not needs_others]
    name = names[draw("which") % len(names)]
    shuffled = sorted(others, key=lambda other: draw(f"order of {other}"))
    question, answer = STYLES[name][0](sample, shuffled, draw)
    return dataclasses.replace(sample, id=f"{sample.id}#{name}", question=question, answer=answer)
