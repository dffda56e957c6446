"""Answer styles: the same questions asked so that a letter, yes or no, a sentence or a filled blank is the answer."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..seeds import derive_seed
from .base import Sample

__all__ = ["STYLES", "diversified"]

#: a multiple choice has at most so many options
MOST_OPTIONS = 4
LETTERS = tuple(string.ascii_uppercase)


def _key(answer: str) -> str:
    """What two answers that differ in case, spaces or a full stop have in common."""
    return " ".join(answer.casefold().split()).rstrip(".,;:!?").rstrip()


def _accepted(sample: Sample) -> list[str]:
    """The accepted answers of a sample; "|" stands between several."""
    return [answer.strip() for answer in sample.answer.split("|") if answer.strip()]


@dataclass(frozen=True)
class Draft:
    """What a style may use: the question, its answer, wrong answers in random order, and what decides by chance.

    turn: counts the questions that were given this style. seed: of this sample.
    """

    question: str
    answer: str
    wrong: tuple[str, ...]
    turn: int
    seed: int


def multiple_choice(draft: Draft) -> tuple[str, str] | None:
    if not draft.wrong or draft.answer in LETTERS:
        return None
    options = [draft.answer, *draft.wrong[: MOST_OPTIONS - 1]]
    random.Random(derive_seed(draft.seed, "options")).shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    question = "\n".join([draft.question, *lines, "Answer with the letter of the correct option."])
    return question, LETTERS[options.index(draft.answer)]


def yes_no(draft: Draft) -> tuple[str, str] | None:
    if not draft.wrong or _key(draft.answer) in ("yes", "no"):
        return None
    shown, answer = (draft.wrong[0], "No") if draft.turn % 2 else (draft.answer, "Yes")
    return f'{draft.question}\nIs "{shown}" the correct answer? Answer with yes or no.', answer


def sentence(draft: Draft) -> tuple[str, str]:
    return f"{draft.question}\nAnswer in a full sentence.", f"The correct answer is {draft.answer.rstrip('.')}."


def fill_in(draft: Draft) -> tuple[str, str]:
    return f'{draft.question}\nFill in the blank: "The correct answer is ____."', draft.answer


#: name -> what makes question and answer of a draft; None where it makes no sense
STYLES: dict[str, Callable[[Draft], tuple[str, str] | None]] = {
    "multiple-choice": multiple_choice,
    "yes-no": yes_no,
    "sentence": sentence,
    "fill-in": fill_in,
}


def diversified(samples: Sequence[Sample], share: float, seed: int = 0) -> list[Sample]:
    """The samples with a share of them asked in another answer style; their number, order and pictures stay.

    The `round(share * n)` samples whose hash with `seed` is smallest are rewritten, so that a smaller share is a part
    of a larger one. They are given the styles of `STYLES` in turn, the next one where one makes no sense: a multiple
    choice of the right and up to three wrong answers, to be told by letter; whether an answer is right, every second
    time a wrong one; a full sentence; a blank to be filled. Wrong answers are those of other samples of the task, with
    the same question if there are such; where there are none at all, the last two styles are left. A rewritten sample
    bears its style at the end of its id and in its metadata.

    Source: the answer style diversification of Chen et al. (arXiv:2505.02486). There a language model writes wrong
    answers, and explanations in place of sentences and blanks.

    Raises:
        ValueError: share is not in [0, 1].

    >>> animals = [Sample(id=str(n), task="t", question="What?", answer=name) for n, name in enumerate(["cat", "dog"])]
    >>> [sample.answer for sample in diversified(animals, 1.0)]
    ['B', 'Yes']
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}")
    order = sorted(range(len(samples)), key=lambda place: derive_seed(seed, "style", samples[place].id))
    pools = _pools(samples)
    names, turns = list(STYLES), dict.fromkeys(STYLES, 0)
    found = list(samples)
    for rank, place in enumerate(order[: round(share * len(samples))]):
        sample = samples[place]
        own_seed = derive_seed(seed, "rewrite", sample.id)
        wrong = _wrong(sample, pools, own_seed)
        for offset in range(len(names)):
            name = names[(rank + offset) % len(names)]
            draft = Draft(sample.question, _accepted(sample)[0], wrong, turns[name], own_seed)
            if (rewritten := STYLES[name](draft)) is not None:
                break
        turns[name] += 1
        question, answer = rewritten
        metadata = {**sample.metadata, "style": name}
        found[place] = replace(sample, id=f"{sample.id}/{name}", question=question, answer=answer, metadata=metadata)
    return found


def _pools(samples: Iterable[Sample]) -> dict[tuple[str, ...], list[str]]:
    """Different answers, in alphabetical order: by (task, question), and by (task,)."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for sample in samples:
        answer = _accepted(sample)[0]
        for group in ((sample.task, sample.question), (sample.task,)):
            known = found.setdefault(group, {})
            # the same spelling whatever the order of the samples
            known[_key(answer)] = min(known.get(_key(answer), answer), answer)
    return {group: [known[key] for key in sorted(known)] for group, known in found.items()}


def _wrong(sample: Sample, pools: dict[tuple[str, ...], list[str]], seed: int) -> tuple[str, ...]:
    """Answers of other samples that are not accepted here, in random order; enough for a multiple choice."""
    own = {_key(answer) for answer in _accepted(sample)}
    for group in ((sample.task, sample.question), (sample.task,)):
        pool = pools[group]
        drawn = random.Random(seed).sample(pool, min(len(pool), MOST_OPTIONS - 1 + len(own)))
        if wrong := tuple(answer for answer in drawn if _key(answer) not in own):
            return wrong
    return ()
