"""Answer styles: deterministic, right, and the same samples otherwise."""

from __future__ import annotations

import pytest

from mllmcl.streams import Sample
from mllmcl.streams.styles import diversified

ANSWERS = {
    "Which colour?": ("red", "green", "blue", "white", "black"),
    "Up or down?": ("up", "down"),
    "Name it.": ("x",),
}


def made(count: int = 120) -> list[Sample]:
    found = []
    for place in range(count):
        question = list(ANSWERS)[place % 3]
        answer = ANSWERS[question][place % len(ANSWERS[question])]
        found.append(Sample(id=f"s{place}", task="t", question=question, answer=answer, metadata={"place": place}))
    return found


def test_every_rewritten_sample_has_its_right_answer_in_the_style():
    samples = made()
    seen = dict.fromkeys(("choice", "yes-no", "sentence", "blank"), 0)
    said = set()
    for old, new in zip(samples, diversified(samples, 1.0), strict=True):
        old_id, _, style = new.id.partition("#")
        seen[style] += 1
        assert old_id == old.id and new.question.startswith(old.question) and new.metadata == old.metadata
        rest = new.question.removeprefix(old.question)
        if style == "choice":
            listed = rest.removesuffix(" Answer with the letter.").split(". ")
            letters = [part[-1] for part in listed[:-1]]
            options = [part.rpartition(" ")[0] for part in listed[1:-1]] + [listed[-1]]
            assert letters == list("ABCD"[: len(letters)]) and len(set(options)) == len(options) >= 2
            assert options[letters.index(new.answer)] == old.answer
            if len(ANSWERS[old.question]) > 1:
                assert set(options) <= set(ANSWERS[old.question])
        elif style == "yes-no":
            told = rest.removeprefix(" Is the answer ").removesuffix("? Answer yes or no.")
            assert new.answer == ("yes" if told == old.answer else "no")
            said.add(new.answer)
        else:
            assert new.answer == (f"The answer is {old.answer}." if style == "sentence" else old.answer)
    assert min(seen.values()) > 15 and said == {"yes", "no"}


def test_a_share_is_a_part_of_a_larger_one_and_the_rest_stays():
    samples = made()
    small, large = (diversified(samples, share, seed=3) for share in (0.2, 0.5))
    changed = [{place for place, sample in enumerate(part) if sample is not samples[place]} for part in (small, large)]
    assert [len(part) for part in changed] == [24, 60] and changed[0] < changed[1]
    assert all(small[place] == large[place] for place in changed[0])
    assert diversified(samples, 0.2, seed=3) == small and diversified(samples, 0.2, seed=4) != small
    assert diversified(samples, 0.0) == samples
    assert len({sample.id for sample in large}) == len(samples)


def test_nothing_to_draw_from_takes_a_style_without_options():
    alone = [Sample(id=f"a{place}", task="t", question="Name it.", answer="x") for place in range(20)]
    assert {sample.id.partition("#")[2] for sample in diversified(alone, 1.0)} == {"sentence", "blank"}


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1\.5"):
        diversified(made(3), 1.5)
