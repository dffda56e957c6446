"""DistributedDataParallel: two processes, each with half a batch, learn what one process learns from the whole."""

import datetime
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mllmcl_kernels import MaskedAdamW

from ..models.tiny import fill_experts, make_composed, make_samples

WORLD = 2
RANKS = (2, 3, 4)
TRAINABLE = (True, False, True)
HALF = 4


@dataclass(frozen=True)
class Case:
    """gates: those of all samples; some_unused: a process may have a batch whose loss does not know all that trains."""

    gates: object
    router: str | None = None
    projector: bool = False
    checkpointing: bool = False
    some_unused: bool = False


CASES = {
    "floats": Case(torch.rand(2 * HALF, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
    "mixed ids": Case([0, 1, 2, -1, 2, 2, 0, 1], projector=True),
    "an expert for each process": Case([0] * HALF + [2] * HALF, projector=True),
    "recomputed": Case([0, 1, 2, -1, 2, 2, 2, 2], projector=True, checkpointing=True),
    "a frozen expert in one process": Case([0] * HALF + [1] * HALF),
    "and its projector copy": Case([0] * HALF + [1] * HALF, projector=True, some_unused=True),
    "learned router": Case(None, router="softmax"),
}


class Loss(nn.Module):
    """The model as a module whose output is the loss, the shape that DistributedDataParallel wraps."""

    def __init__(self, mllm):
        super().__init__()
        self.mllm, self.model = mllm, mllm.model

    def forward(self, batch, gates):
        with self.mllm.use_experts(gates):
            return self.mllm.loss(batch)


def make_model(case, seed):
    mllm = make_composed()
    mllm.add_experts(3, rank=list(RANKS), alpha=8, dropout=0.0, router=case.router, projector_experts=case.projector)
    fill_experts(mllm, seed=seed)
    mllm.set_trainable(TRAINABLE, projector=case.projector, router=case.router is not None)
    if case.checkpointing:
        mllm.enable_checkpointing()
    mllm.model.double()
    mllm.train()
    return mllm


def learn(case, places, wrap, seed=1):
    """One step from the samples at `places`: parameters before and after, and gradients."""
    mllm = make_model(case, seed)
    samples = make_samples("composed")
    module = wrap(Loss(mllm))
    trains = {name: p for name, p in mllm.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trains.items()}
    optimizer = MaskedAdamW(trains.values(), lr=0.01, weight_decay=0.1, max_norm=0.5)
    for name, mask in mllm.parameter_masks().items():
        optimizer.set_mask(trains[name], mask)
    gates = case.gates if case.gates is None else torch.as_tensor(case.gates)[places]
    batch = mllm.collate([samples[place] for place in places], with_answers=True)
    # the loss is a mean over answer tokens, of which the halves have unequal numbers
    tokens = len(batch.answer_labels)
    whole = len(mllm.collate(samples, with_answers=True).answer_labels)
    share = WORLD * tokens / whole if len(places) == HALF else 1.0
    (module(batch, gates) * share).backward()
    grads = {name: p.grad.clone() for name, p in trains.items()}
    optimizer.step()
    return {"before": before, "grads": grads, "after": {name: p.detach() for name, p in trains.items()}}


def work(rank, folder):
    """What each process does: every case, and the outcome to a file."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=patience)
    places = list(range(rank * HALF, (rank + 1) * HALF))
    outcomes = {}
    for name, case in CASES.items():
        # the second process starts from experts of its own and takes over those of the first
        outcomes[name] = learn(
            case,
            places,
            lambda module, case=case: DistributedDataParallel(module, find_unused_parameters=case.some_unused),
            seed=1 + rank,
        )
    torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_on_the_joined_batch(outcomes, name):
    case = CASES[name]
    alone = learn(case, list(range(2 * HALF)), lambda module: module)
    assert len(alone["grads"]) >= 2 * 2 * 7
    for found in outcomes:
        for key in ("before", "grads", "after"):
            for parameter, value in alone[key].items():
                torch.testing.assert_close(found[name][key][parameter], value, rtol=1e-6, atol=1e-10, msg=parameter)
    first, second = (found[name]["after"] for found in outcomes)
    for parameter, value in first.items():
        assert torch.equal(value, second[parameter]), parameter


@pytest.mark.parametrize("name", CASES)
def test_frozen_experts_keep_their_bits_in_both_processes(outcomes, name):
    masks = make_model(CASES[name], seed=1).parameter_masks()
    for found in outcomes:
        before, after = found[name]["before"], found[name]["after"]
        for parameter, mask in masks.items():
            frozen = ~mask.expand(after[parameter].shape).expand(after[parameter].shape)
            moved = before[parameter] != after[parameter]
            assert frozen.any() and not moved[frozen].any(), parameter
            assert moved[~frozen].any(), parameter
