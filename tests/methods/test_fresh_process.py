"""What is saved of a method answers the same in a process that knows nothing else, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..training.made_up_run import make_stream
from .boundaries import items, learned, routed_logits
from .reopen import save
from .stepping import EVERY, LEGACY

ROOT = Path(__file__).parents[2]
CASES = EVERY + LEGACY


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of every case here and in the other process."""
    folder, stream, ours = tmp_path_factory.mktemp("saved"), make_stream(), []
    for place, (name, options) in enumerate(CASES):
        mllm, method = learned(name, stream, **options)
        save(folder / str(place), mllm, method)
        ours.append(routed_logits(mllm, items(stream)))
    (folder / "cases.json").write_text(json.dumps(CASES))
    command = [sys.executable, "-m", "tests.methods.reopen", str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return ours, load_file(folder / "logits.safetensors")


@pytest.mark.parametrize("place", range(len(CASES)), ids=[f"{name}-{options}" for name, options in CASES])
def test_a_fresh_process_gives_the_same_logits(place, answers):
    ours, theirs = answers
    assert ours[place].std() > 0 and torch.equal(ours[place], theirs[str(place)])
