"""Answer styles: which samples are rewritten, that what is asked has the answer that is given, what stays."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from mllmcl import streams
from mllmcl.streams import Sample
from mllmcl.streams.styles import STYLES, diversified

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)
SHOWN = re.compile(r'Is "(.*)" the correct answer\?')


def make(place, question, answer, task="t"):
    return Sample(id=f"{task}/{place}", task=task, question=question, answer=answer, metadata={"place": place})


def make_samples(count=60):
    """Two questions of one task with answers of their own."""
    random = np.random.default_rng(0)
    picks = random.integers(0, 6, count)
    return [
        make(place, "Which colour?", COLOURS[pick]) if place % 3 else make(place, "How many?", str(pick))
        for place, pick in enumerate(picks)
    ]


def changed(samples, **options):
    """(original, rewritten) of the samples that were rewritten."""
    found = diversified(samples, **{"share": 1.0, **options})
    assert len(found) == len(samples)
    return [(old, new) for old, new in zip(samples, found, strict=True) if new is not old]


def of_style(pairs, style):
    return [(old, new) for old, new in pairs if new.metadata["style"] == style]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_is_rewritten_in_equal_styles_and_the_rest_stays(share):
    samples = make_samples()
    pairs = changed(samples, share=share)
    assert len(pairs) == round(60 * share)
    styles = Counter(new.metadata["style"] for _, new in pairs)
    assert all(abs(styles[style] - len(pairs) / len(STYLES)) < 1 for style in STYLES)
    ids = [sample.id for sample in diversified(samples, share)]
    assert len(set(ids)) == 60
    for old, new in pairs:
        assert new.id == f"{old.id}/{new.metadata['style']}" and new.question != old.question
        assert (new.task, new.image, new.metadata["place"]) == (old.task, old.image, old.metadata["place"])
        assert new.question.startswith(old.question)


def test_a_smaller_share_is_a_part_of_a_larger_one():
    samples = make_samples()
    small, large = ({new.id: new for _, new in changed(samples, share=share)} for share in (0.2, 0.7))
    assert len(small) == 12 and len(large) == 42
    assert all(large[name] == new for name, new in small.items())


def test_a_seed_decides_and_the_order_of_samples_does_not():
    samples = make_samples()
    first, again, other = (diversified(samples, 0.5, seed) for seed in (1, 1, 2))
    assert first == again != other
    # not even where an answer is spelled in two ways
    samples += [make(100 + place, "Which colour?", colour.title()) for place, colour in enumerate(COLOURS)]
    assert diversified(samples[::-1], 1.0)[::-1] == diversified(samples, 1.0)


def test_the_choice_is_spread_over_the_samples():
    """Neither the first ones nor one question."""
    pairs = changed(make_samples(600), share=0.3)
    places = np.array([old.metadata["place"] for old, _ in pairs])
    assert abs((places < 300).mean() - 0.5) < 0.1
    assert abs((places % 3 == 0).mean() - 1 / 3) < 0.1


def test_of_the_options_exactly_one_is_right_and_its_letter_is_the_answer():
    samples = make_samples(240)
    pairs = of_style(changed(samples), "multiple-choice")
    answers = {
        question: {s.answer for s in samples if s.question == question} for question in ("Which colour?", "How many?")
    }
    letters = Counter()
    for old, new in pairs:
        options = dict(OPTION.findall(new.question))
        assert list(options) == ["A", "B", "C", "D"] and len(set(options.values())) == 4
        assert set(options.values()) <= answers[old.question]
        assert options[new.answer] == old.answer
        letters[new.answer] += 1
    assert set(letters) == set("ABCD") and max(letters.values()) < len(pairs) / 2


def test_half_of_the_yes_no_questions_show_a_wrong_answer():
    samples = make_samples(240)
    pairs = of_style(changed(samples), "yes-no")
    answers = {
        question: {s.answer for s in samples if s.question == question} for question in ("Which colour?", "How many?")
    }
    counts = Counter()
    for old, new in pairs:
        (shown,) = SHOWN.findall(new.question)
        assert shown in answers[old.question]
        assert new.answer == ("Yes" if shown == old.answer else "No")
        counts[new.answer] += 1
    assert len(pairs) == 60 and counts == {"Yes": 30, "No": 30}


def test_sentences_and_blanks():
    pairs = changed([make(place, "What?", f"{name}.") for place, name in enumerate(COLOURS)])
    for old, new in of_style(pairs, "sentence"):
        assert "full sentence" in new.question and new.answer == f"The correct answer is {old.answer}"
    for old, new in of_style(pairs, "fill-in"):
        assert "____" in new.question and new.answer == old.answer
    assert of_style(pairs, "sentence") and of_style(pairs, "fill-in")


def test_without_a_wrong_answer_other_styles_are_taken():
    pairs = changed([make(place, "What?", answer) for place, answer in enumerate(["cat", "Cat", " cat."] * 4)])
    assert Counter(new.metadata["style"] for _, new in pairs).keys() == {"sentence", "fill-in"}
    assert len(pairs) == 12


def test_a_question_of_its_own_takes_wrong_answers_from_its_task():
    samples = [make(place, f"What is in picture {place}?", name) for place, name in enumerate(COLOURS)]
    others = [make(place, "Which?", name, "u") for place, name in enumerate(("one", "two", "three", "four"))]
    pairs = [(old, new) for old, new in changed([*samples, *others]) if old.task == "t"]
    chosen = of_style(pairs, "multiple-choice")
    for _, new in chosen:
        options = dict(OPTION.findall(new.question))
        assert len(options) == 4 and set(options.values()) <= set(COLOURS)
    assert chosen


def test_an_answer_that_is_accepted_too_is_no_wrong_one():
    samples = [make(place, "Who?", ("cat|kitten", "Kitten | cat")[place % 2]) for place in range(24)]
    assert {new.metadata["style"] for _, new in changed(samples)} == {"sentence", "fill-in"}
    pairs = changed([*samples, *(make(place, "Who?", "dog") for place in range(24, 32))])
    for old, new in of_style(pairs, "multiple-choice"):
        options = list(dict(OPTION.findall(new.question)).values())
        first = old.answer.split("|")[0].strip()
        assert first in options and "|" not in "".join(options)
        assert sorted(options) == sorted({first, "dog"}) or old.answer == "dog"
    assert any(old.answer != "dog" for old, _ in of_style(pairs, "multiple-choice"))
    for old, new in of_style(pairs, "fill-in"):
        assert new.answer == old.answer.split("|")[0].strip()


def test_no_style_is_asked_for_twice():
    """An answer that is a letter is no option, and yes or no is not asked about yes and no."""
    pairs = changed([make(place, "A. cat B. dog", "AB"[place % 2]) for place in range(12)])
    assert not of_style(pairs, "multiple-choice") and of_style(pairs, "yes-no")
    pairs = changed([make(place, "Is it?", ("Yes", "no.")[place % 2]) for place in range(12)])
    assert not of_style(pairs, "yes-no") and of_style(pairs, "multiple-choice")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got"):
        diversified(make_samples(3), share)


def test_styles_are_no_stream():
    assert "styles" not in streams.available()


@pytest.mark.network
def test_the_built_in_questions_in_every_style(domain):
    for task in domain.tasks:
        known = {}
        for sample in task.train:
            known.setdefault(sample.question, set()).add(sample.answer)
        pairs = changed(task.train)
        assert {new.metadata["style"] for _, new in pairs} == set(STYLES)
        for old, new in of_style(pairs, "multiple-choice"):
            options = dict(OPTION.findall(new.question))
            assert options[new.answer] == old.answer and len(options) == min(4, len(known[old.question]))
            assert set(options.values()) <= known[old.question]
            assert new.image is old.image
