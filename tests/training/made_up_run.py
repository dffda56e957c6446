"""A made-up stream and a tiny random model, learned in seconds; as a program, it can be told where to die.

    python -m tests.training.made_up_run FOLDER METHOD OPTIONS_JSON [FUNCTION COUNT]

The process ends with os._exit(9) at the COUNT-th call of FUNCTION: before it runs ("-") or after it ("+"). Of
the processes that torchrun starts, the first one dies.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import torch

from mllmcl import TrainConfig, methods
from mllmcl.streams import Sample, Stream, Task
from mllmcl.training import loop

from ..models.tiny import make_composed

ANSWERS = (("x", "y"), ("ab", "cd"), ("p", "q"))


def make_stream(num_train: int = 24, num_test: int = 8, uneven: bool = False) -> Stream:
    """Three tasks: is one colour of the picture bright? Questions and answers are the task's own.

    `uneven`: answers of 1 to 5 letters, so that shares of a batch have unequal numbers of tokens.
    """

    def items(task: int, part: str, count: int) -> list[Sample]:
        random = np.random.default_rng([task, part == "test"])
        found = []
        for place in range(count):
            bright = int(random.integers(0, 2))
            image = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            image[..., task] += np.uint8(100 * bright + 40)
            question, answer = (
                ("which", "what", "how")[task],
                ANSWERS[task][bright] + "z" * (place % 4 if uneven else 0),
            )
            found.append(
                Sample(id=f"t{task}/{part}/{place}", task=f"t{task}", question=question, answer=answer, image=image)
            )
        return found

    tasks = []
    for task in range(3):
        parts = {"train": items(task, "train", num_train), "test": items(task, "test", num_test)}
        tasks.append(Task(name=f"t{task}", description=f"Colour {task}.", **parts))
    return Stream(name="made-up", tasks=tuple(tasks), note="made up for tests")


def make_run(
    folder,
    method: str = "mr_lora",
    options: dict | None = None,
    *,
    double: bool = False,
    ends=None,
    shares: bool = False,
    **config,
):
    """Train; the configuration is short and draws dropout.

    `double`: in float64 from the method's set-up on, on an uneven stream. `ends`: a file for what may train, as it is
    in the end. `shares`: whether layers with one input share it.
    """
    torch.manual_seed(0)
    made = methods.create(method, **(options or {}))
    if double:
        made.setup = lambda mllm, stream, setup=made.setup: (setup(mllm, stream), mllm.model.double())
    defaults = {"num_train_epochs": 2, "save_steps": 2, "progress": "off", "learning_rate": 1e-2, "max_new_tokens": 3}
    settings = TrainConfig(output_dir=str(folder), **{**defaults, **config})
    mllm = make_composed().share_inputs(shares)
    report = loop.train(mllm, made, make_stream(uneven=double), settings)
    if ends is not None:
        torch.save(mllm.trainable_state(), ends)
    return report


def die_at(where: str, count: int) -> None:
    """Patch a function of the loop so that its `count`-th call is the last thing this process does."""
    moment, name = where[0], where[1:]
    owner = loop.records if hasattr(loop.records, name) else loop
    original = getattr(owner, name)
    calls = 0

    def patched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and moment == "-":
            os._exit(9)
        result = original(*args, **kwargs)
        if calls == count:
            os._exit(9)
        return result

    setattr(owner, name, patched)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 4 and os.environ.get("RANK", "0") == "0":
        die_at(sys.argv[4], int(sys.argv[5]))
    make_run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
