"""Opens what another process saved of methods and answers with it.

    python -m tests.methods.reopen FOLDER THREADS

FOLDER holds `cases.json`, a list of [name, options], and a folder of checkpoints for each by its place; the logits go
to `logits.safetensors` by the same places.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mllmcl.training.checkpoint import latest_checkpoint, save_checkpoint

from ..training.made_up_run import make_stream
from .boundaries import items, learned, restore, routed_logits, stored

DIGEST = "0" * 64


def save(folder: Path, mllm, method) -> None:
    """As the training loop does at a task's end."""
    held, experts = stored(mllm, method), mllm.experts
    state = {
        "values": held.pop("values"),
        "ranks": [] if experts is None else list(experts.ranks),
        "scaling": [] if experts is None else list(experts.scaling),
    }
    save_checkpoint(folder, 1, held, state, config_sha256=DIGEST)


def open_again(folder: Path, name: str, options: dict, stream):
    """A fresh model and method with what was saved."""
    found = latest_checkpoint(folder, config_sha256=DIGEST)
    mllm, method = learned(name, stream, tasks=0, **options)
    ranks, scaling = found.state["ranks"], found.state["scaling"]
    for expert in range(0 if mllm.experts is None else mllm.experts.num_experts, len(ranks)):
        mllm.grow_experts(1, ranks[expert], ranks[expert] * scaling[expert])
    held = {"model": found.tensors["model"], "method": found.tensors.get("method", {})}
    restore(mllm, method, {**held, "values": found.state["values"]})
    return mllm, method


def main(folder: Path) -> None:
    stream, logits = make_stream(), {}
    for place, (name, options) in enumerate(json.loads((folder / "cases.json").read_text())):
        mllm, _ = open_again(folder / str(place), name, options, stream)
        logits[str(place)] = routed_logits(mllm, items(stream)).contiguous()
    save_file(logits, folder / "logits.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    main(Path(sys.argv[1]))
