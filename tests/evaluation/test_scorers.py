"""Answer scorers on answers judged by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmcl.evaluation import SCORERS, scorer


@pytest.mark.parametrize(
    ("name", "prediction", "gold", "score"),
    [
        ("exact_match", "Yes.", "yes", 1.0),
        ("exact_match", "  turn   left\n", "Turn left", 1.0),
        ("exact_match", "yes, it is", "yes", 0.0),
        ("exact_match", "", "yes", 0.0),
        ("exact_match", "3.5", "35", 0.0),
        ("exact_lower", "YES", "yes", 1.0),
        ("exact_lower", "yes.", "yes", 0.0),
        ("exact_without_spaces_and_dots", " B. ", "b", 1.0),
        # only the prediction is stripped, as in the script
        ("exact_without_spaces_and_dots", "new york", "New York", 0.0),
        ("exact_without_spaces_and_dots", "Unanswerable", "unanswerable", 0.0),
        ("substring", "It is not a lung.", "lung", 1.0),
        ("substring", "plunge", "lung", 1.0),
        ("substring", "Unanswerable, but lung", "lung", 0.0),
        ("contains", "the plunge was long", "lung", 0.0),
        ("contains", "the lung, I think", "lung", 1.0),
        ("contains", "a lungfish swims", "lung", 0.0),
        ("contains", "plunge", "lung", 1.0),
        ("contains", "it costs (5+5)", "(5+5)", 1.0),
        ("contains", "there are 12 cars", "2", 0.0),
        ("contains", "Unanswerable 2", "2", 0.0),
        ("any_substring", "The sign says STOP", "halt|stop", 1.0),
        ("any_substring", "The sign says go", "halt|stop", 0.0),
        ("either_substring", "a golden retriever", "retriever", 1.0),
        ("either_substring", "tabby", "tabby cat", 1.0),
        ("either_substring", "Tabby", "tabby cat", 0.0),
        ("box_iou", "[0.10, 0.10, 0.50, 0.50]", "[0.1,0.1,0.5,0.6]", 1.0),
        ("box_iou", "0 0 1 1", "[0.5, 0.5, 1.0, 1.0]", 0.0),
        ("box_iou", "[0.1, 0.1, 0.5]", "[0.1, 0.1, 0.5, 0.5]", 0.0),
        ("box_iou", "[0.5, 0.5, 0.1, 0.1]", "[0.1, 0.1, 0.5, 0.5]", 0.0),
        ("listed_share", "Ohio, Texas, Utah", "texas,ohio,iowa,maine", 0.5),
        ("rouge_l", "a dog runs fast", "a dog walks", 4 / 7),
        ("rouge_l", "a dog", "a cat sleeps|a dog", 1.0),
        ("rouge_l", "", "a dog", 0.0),
    ],
)
def test_score_of_an_answer(name, prediction, gold, score):
    assert scorer(name)(prediction, gold) == pytest.approx(score)


def test_unknown_name_lists_near_ones():
    with pytest.raises(ValueError, match=r"got 'exact_macth'; did you mean exact_match"):
        scorer("exact_macth")


@pytest.mark.parametrize("name", sorted(SCORERS))
@given(prediction=st.text(max_size=30), gold=st.text(min_size=1, max_size=20))
def test_scores_lie_between_zero_and_one(name, prediction, gold):
    assert 0.0 <= scorer(name)(prediction, gold) <= 1.0


@given(text=st.from_regex(r"[a-z]{1,8}( [a-z]{1,8}){0,3}", fullmatch=True))
def test_the_gold_answer_itself_is_right_unless_spaces_are_stripped(text):
    wrong = {name for name in SCORERS if scorer(name)(text, text) != 1.0}
    assert wrong == ({"exact_without_spaces_and_dots"} if " " in text else set())
