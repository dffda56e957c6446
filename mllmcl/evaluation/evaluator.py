"""Answer test items in batches and score them."""

# B samples, E experts

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..processes import Processes
from .predictions import Prediction
from .scorers import scorer as find_scorer

__all__ = ["Answerer", "check_batching", "check_scorers", "evaluate"]

#: batches whose samples are sorted and handed over together, so that progress is told in between
BATCHES_A_CALL = 4


class Answerer(Protocol):
    """What evaluation needs of a model.

    `router` takes samples and returns expert ids int64 `[B]` or float gates `[B, ...]`, or is None; where the model has
    a true `routes_batches` it is left to `generate` to ask it. `generate` returns one text a sample.
    """

    router: Callable[[Sequence], object] | None

    def generate(self, samples: Sequence, experts=..., *, max_new_tokens: int, batch_size: int) -> list[str]: ...


def evaluate(
    mllm: Answerer,
    samples: Sequence,
    *,
    experts="route",
    scorer: str | Mapping[str, str] = "exact_match",
    batch_size: int = 32,
    max_new_tokens: int = 16,
    answered: Mapping[tuple[str, int], str] | None = None,
    progress: Callable[[int], object] | None = None,
    processes: Processes | None = None,
) -> list[Prediction]:
    """Answer every sample greedily and score it, in the order given.

    Samples of like question length share a batch, which saves padding; the order is restored by position. A model's
    router is asked once for all samples and its ids are handed to `generate`, so that the expert recorded is the expert
    used.

    Args:
        experts: "route" (the router's choice for each sample; without a router what the model does by itself), integer
            ids `[B]` (-1: base alone), floats `[E]` or `[B, E]`, or None (the model's default), as in `generate`.
        scorer: the name of a scorer, or task -> name. A sample whose metadata name a `scorer` is scored by that one.
        answered: (item id, expert id) -> the answer that is known already; such items are not answered again.
        progress: called with the number of samples just done.
        processes: who shares the batches, each of which is the same as in one process; all get all predictions.

    Returns:
        One Prediction a sample; its expert is None where no single one was chosen.

    Raises:
        ValueError: unknown scorer, a task without one, a batch size below 1, ids that are not one a sample, or a model
            that does not return one answer a sample.
    """
    samples = list(samples)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    processes = processes or Processes()
    score = _scores_by_task(scorer, samples)
    gates, ids = _choose(mllm, samples, experts, processes)
    answers: list[str | None] = [None] * len(samples)
    if answered and ids is not None:
        answers = [answered.get((sample.id, int(expert))) for sample, expert in zip(samples, ids, strict=True)]
    order = [place for place, answer in enumerate(answers) if answer is None]
    order.sort(key=lambda place: (len(samples[place].question), place))
    if progress is not None and len(order) < len(samples):
        progress(len(samples) - len(order))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = processes.batches_of(batches)
    for start in range(0, len(own), BATCHES_A_CALL):
        places = [place for batch in own[start : start + BATCHES_A_CALL] for place in batch]
        _answer(mllm, samples, gates, places, answers, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if progress is not None:
            progress(len(places) * round(len(batches) / len(own)))
    for found in processes.gather([[place, answers[place]] for batch in own for place in batch]):
        for place, answer in found:
            answers[place] = answer
    return [
        Prediction(
            id=sample.id,
            task=sample.task,
            question=sample.question,
            gold=sample.answer,
            prediction=answers[place],
            expert=None if ids is None else int(ids[place]),
            score=float(_scorer_of(sample, score)(answers[place], sample.answer)),
        )
        for place, sample in enumerate(samples)
    ]


def check_scorers(tasks: Sequence) -> None:
    """Raise ValueError where a task, or a test sample for itself, names a scorer that is none."""
    for task in tasks:
        for name in {task.scorer, *(sample.metadata.get("scorer", task.scorer) for sample in task.test)}:
            try:
                find_scorer(name)
            except ValueError as error:
                raise ValueError(f"task {task.name}: {error}") from error


def _scorer_of(sample, by_task: Mapping[str, Callable]) -> Callable:
    own = getattr(sample, "metadata", {}).get("scorer")
    return by_task[sample.task] if own is None else find_scorer(own)


def _scores_by_task(scorer: str | Mapping[str, str], samples: Sequence) -> dict[str, Callable]:
    tasks = sorted({sample.task for sample in samples})
    if isinstance(scorer, str):
        return dict.fromkeys(tasks, find_scorer(scorer))
    missing = [task for task in tasks if task not in scorer]
    if missing:
        raise ValueError(f"scorer: expected a name for every task, none for {', '.join(missing)}")
    return {task: find_scorer(scorer[task]) for task in tasks}


def _choose(mllm: Answerer, samples: list, experts, processes: Processes) -> tuple[object, np.ndarray | None]:
    """What to hand to `generate` for all samples, and the ids to record."""
    routes_alone = mllm.router is not None and not getattr(mllm, "routes_batches", False)
    if isinstance(experts, str) and experts == "route" and routes_alone and samples:
        experts = mllm.router(samples)
        experts = processes.of_first(experts) if hasattr(experts, "detach") else experts
    if experts is None or isinstance(experts, str):
        return experts, None
    gates = experts.detach().cpu().numpy() if hasattr(experts, "detach") else np.asarray(experts)
    if np.issubdtype(gates.dtype, np.integer):
        if gates.shape != (len(samples),):
            raise ValueError(f"experts: expected one id for each of {len(samples)} samples, got shape {gates.shape}")
        return experts, gates
    if gates.ndim == 2 and len(gates) != len(samples):
        raise ValueError(f"experts: expected one row for each of {len(samples)} samples, got {len(gates)}")
    return experts, None


def _select(gates, places: list[int]):
    """The part of `gates` that belongs to the samples at `places`."""
    if gates is None or isinstance(gates, str):
        return gates
    if hasattr(gates, "dim"):
        return gates if gates.dim() == 1 and gates.is_floating_point() else gates[places]
    array = np.asarray(gates)
    shared = array.ndim == 1 and not np.issubdtype(array.dtype, np.integer)
    return array.tolist() if shared else array[places].tolist()


def _answer(mllm: Answerer, samples: list, gates, places: list[int], answers: list, **options: int) -> None:
    """Fill in the answers of the samples at `places`."""
    texts = mllm.generate([samples[place] for place in places], experts=_select(gates, places), **options)
    if len(texts) != len(places):
        raise ValueError(f"generate: expected {len(places)} answers, got {len(texts)}")
    for place, text in zip(places, texts, strict=True):
        answers[place] = text


def check_batching(
    mllm: Answerer, samples: Sequence, batch_size: int = 8, *, experts="route", max_new_tokens: int = 16
) -> list[dict]:
    """Whether a batch gives each sample what it gets alone.

    The samples are batched in the order given, so that unequal lengths meet in one batch.

    Returns:
        The items that differ, each {"id", "alone", "batched"}; empty when all agree.
    """
    samples = list(samples)
    gates, _ = _choose(mllm, samples, experts, Processes())
    alone, batched = [""] * len(samples), [""] * len(samples)
    for start in range(0, len(samples), batch_size):
        places = list(range(start, min(start + batch_size, len(samples))))
        _answer(mllm, samples, gates, places, batched, max_new_tokens=max_new_tokens, batch_size=batch_size)
        for place in places:
            _answer(mllm, samples, gates, [place], alone, max_new_tokens=max_new_tokens, batch_size=1)
    return [
        {"id": sample.id, "alone": one, "batched": other}
        for sample, one, other in zip(samples, alone, batched, strict=True)
        if one != other
    ]
