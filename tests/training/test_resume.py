"""Every method, cut off at its checkpoints and continued by a fresh model, ends as if nothing had happened."""

from __future__ import annotations

import pytest

from mllmcl.training import loop

from ..methods.stepping import EVERY
from .made_up_run import make_run
from .test_loop import same_end

#: one epoch of three steps, a checkpoint within: 4 checkpoints in a task
CONFIG = {"num_train_epochs": 1, "save_steps": 2, "zero_shot": False, "evaluate_seen_only": True, "max_new_tokens": 2}
#: checkpoints of a process before it is cut off; prime to 4, so that every kind of checkpoint is the last one once
CUT = 3


class Cut(Exception):
    pass


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_a_run_that_is_cut_off_ends_the_same(name, options, tmp_path, monkeypatch):
    make_run(tmp_path / "whole", name, options, **CONFIG)
    original, count = loop._checkpoint, [0]

    def checkpoint(*args, **kwargs):
        original(*args, **kwargs)
        count[0] += 1
        if count[0] % CUT == 0:
            raise Cut

    monkeypatch.setattr(loop, "_checkpoint", checkpoint)
    cuts = 0
    while not (tmp_path / "cut" / "metrics.json").exists():
        try:
            make_run(tmp_path / "cut", name, options, **CONFIG)
        except Cut:
            cuts += 1
    assert cuts >= 3
    same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_every_method_runs_in_bf16_with_accumulated_and_recomputed_batches(name, options, tmp_path):
    config = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 3, "max_steps": 1}
    report = make_run(tmp_path, name, options, **CONFIG, **config, gradient_accumulation_steps=2)
    assert report.matrix.num_learned == 3
