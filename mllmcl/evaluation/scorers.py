"""Answer scorers: how right a prediction is, from 0 to 1.

    score = scorer("exact_match")
    score("Two.", "two")    # 1.0

`exact_match` is the strict one. The rest repeat what the evaluation scripts that came with public benchmarks compute,
lenient as they are, so that published numbers can be compared: a long answer that happens to hold the gold one counts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

__all__ = ["SCORERS", "Scorer", "normalize", "scorer"]

Scorer = Callable[[str, str], float]

#: name -> function (prediction, gold) -> float in [0, 1]
SCORERS: dict[str, Scorer] = {}

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
#: several accepted answers in one gold string
ALTERNATIVES = "|"


def _register(function: Scorer) -> Scorer:
    SCORERS[function.__name__] = function
    return function


def scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ValueError: there is none; the message lists all, nearest first asked about.
    """
    if not isinstance(name, str) or name not in SCORERS:
        near = difflib.get_close_matches(str(name), SCORERS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"scorer: expected one of {', '.join(sorted(SCORERS))}, got {name!r}{hint}")
    return SCORERS[name]


def normalize(text: str) -> str:
    """Lower case, runs of white space as one space, no punctuation at the end."""
    return " ".join(text.casefold().split()).rstrip(".,;:!?").rstrip()


def _refuses(prediction: str) -> bool:
    # the MLLM-CL scripts skip such a reply, which counts it as wrong
    return "Unanswerable" in prediction


@_register
def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same after `normalize`. The default, and the only strict one."""
    return float(normalize(prediction) == normalize(gold))


@_register
def exact_lower(prediction: str, gold: str) -> float:
    """1 if both are the same in lower case, nothing stripped. Source: question answering of UCIT in MCITlib."""
    return float(prediction.lower() == gold.lower())


@_register
def exact_without_spaces_and_dots(prediction: str, gold: str) -> float:
    """1 if the prediction without spaces and dots is the gold answer, in lower case. Source: MLLM-CL `eval_finvis`."""
    if _refuses(prediction):
        return 0.0
    return float(prediction.lower().replace(" ", "").replace(".", "") == gold.lower())


@_register
def substring(prediction: str, gold: str) -> float:
    """1 if the gold answer occurs anywhere in the prediction, in lower case. Source: MLLM-CL `eval_pvqa`."""
    return 0.0 if _refuses(prediction) else float(gold.lower() in prediction.lower())


@_register
def contains(prediction: str, gold: str) -> float:
    """1 if the prediction holds the gold answer as whole words, in lower case.

    A prediction of a single word is searched as in `substring`. Source: MLLM-CL `eval_ai2d`, whose released versions
    differ in where they put the word boundaries; this is the one rule "no letter or digit on either side".
    """
    if _refuses(prediction):
        return 0.0
    text, wanted = prediction.lower().strip(), gold.lower().strip()
    if " " not in text:
        return float(wanted in text)
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text) is not None)


@_register
def any_substring(prediction: str, gold: str) -> float:
    """1 if one of the gold answers, separated by "|", is in the prediction. Source: OCRBench, MLLM-CL `eval_ocr`."""
    text = prediction.lower().strip().replace("\n", "")
    return float(any(answer.lower().strip().replace("\n", "") in text for answer in gold.split(ALTERNATIVES)))


@_register
def either_substring(prediction: str, gold: str) -> float:
    """1 if one of the two texts holds the other, also an empty prediction. Source: CoIN, its ImageNet task."""
    return float(gold in prediction or prediction in gold)


@_register
def box_iou(prediction: str, gold: str) -> float:
    """1 if two boxes `[x1, y1, x2, y2]` overlap by more than half of their union.

    A prediction without exactly four numbers is wrong. Source: CoIN, its grounding task, which also cuts the first and
    the last character of a prediction, brackets or not; here only brackets are cut. Gold answers that are no boxes have
    to be met exactly.
    """
    boxes = [[float(number) for number in NUMBER.findall(text)] for text in (prediction, gold)]
    if len(boxes[1]) != 4:
        return exact_match(prediction, gold)
    if len(boxes[0]) != 4:
        return 0.0
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes
    common = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common
    return float(union > 0 and common / union > 0.5)


@_register
def listed_share(prediction: str, gold: str) -> float:
    """Share of the comma-separated gold entries that are entries of the prediction.

    Source: MLLM-CL `eval_sci`, "Which states ..." questions of MapQA; entries are stripped of spaces here, there they
    are not, which made "a, b" and "a,b" differ.
    """
    if _refuses(prediction):
        return 0.0
    found = {entry.strip() for entry in prediction.lower().split(",")}
    wanted = [entry.strip() for entry in gold.lower().split(",")]
    return sum(entry in found for entry in wanted) / len(wanted)


@_register
def rouge_l(prediction: str, gold: str) -> float:
    """F1 of the longest common subsequence of words, the best of the gold captions separated by "|".

    With P = lcs / words of the prediction and R = lcs / words of the gold caption: 2 P R / (P + R).
    Source: Lin 2004, with beta = 1.
    """
    return max(_rouge_l(normalize(prediction).split(), normalize(text).split()) for text in gold.split(ALTERNATIVES))


def _rouge_l(said: list[str], wanted: list[str]) -> float:
    lengths = [0] * (len(wanted) + 1)
    for word in said:
        diagonal = 0
        for at, other in enumerate(wanted, start=1):
            above = lengths[at]
            lengths[at] = diagonal + 1 if word == other else max(above, lengths[at - 1])
            diagonal = above
    return 2.0 * lengths[-1] / (len(said) + len(wanted)) if said and wanted else 0.0
