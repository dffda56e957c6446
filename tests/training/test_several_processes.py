"""Runs that two processes share: the same numbers as one process, the same bits in both, killed or not."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from mllmcl import methods
from mllmcl.evaluation import Report, read_predictions
from mllmcl.files import read_jsonl
from mllmcl.training import distributed, loop
from mllmcl.training.checkpoint import CheckpointError

from .made_up_run import make_run
from .several import errors, learn, together
from .test_loop import final_tensors, same_end

#: of methods whose loss or gradient is more than a mean over the answer tokens of a batch, and of some where it is not
METHODS = ("lora", "mr_lora", "a_gem", "ewc", "der_pp", "l2p", "m2distill", "cl_moe")
#: a last batch of 4 samples after two of 10; 25 of 24 samples, so that a process has no sample of the last batch
CONFIG = {"num_train_epochs": 1, "save_steps": 100, "evaluate_seen_only": True, "zero_shot": False, "max_new_tokens": 2}
WHOLE, HALF = {"per_device_train_batch_size": 10}, {"per_device_train_batch_size": 5}
SINGLE = {"num_train_epochs": 25 / 24}


def without_draws(name: str) -> dict:
    """Options with which a step draws nothing but what all processes have to draw alike."""
    return {"dropout": 0.0} if "dropout" in inspect.signature(methods.find(name)).parameters else {}


def runs_of(folder, size: int) -> dict[str, dict]:
    """Name of each run to the arguments that one process, or two, learn it with."""
    share = WHOLE if size == 1 else HALF
    found = {
        name: {"method": name, "options": without_draws(name), "double": True, **CONFIG, **share} for name in METHODS
    }
    one = {**found["lora"], "method": "er", **SINGLE, "per_device_train_batch_size": 6 // size}
    found["a batch of one sample"] = one
    found["accumulated"] = {**found["lora"], "per_device_train_batch_size": 4 // size, "gradient_accumulation_steps": 3}
    return {name: {"folder": str(folder / name), **arguments} for name, arguments in found.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of all runs, learned by two processes and by one."""
    folders = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    assert together(learn, folders[0], list(runs_of(folders[0], 2).values())) == [0, 0], errors(folders[0])
    assert together(learn, folders[1], list(runs_of(folders[1], 1).values()), size=1) == [0], errors(folders[1])
    return folders


@pytest.mark.parametrize("name", [*METHODS, "a batch of one sample", "accumulated"])
def test_two_processes_learn_what_one_learns(both, name):
    two, one = (folder / name for folder in both)
    ours, theirs = final_tensors(two), final_tensors(one)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-8, atol=1e-10, msg=key)
    assert read_predictions(two) == read_predictions(one)
    assert json.loads((two / "matrix.json").read_text()) == json.loads((one / "matrix.json").read_text())
    losses = [[e["loss"] for e in read_jsonl(path / "events.jsonl") if e["event"] == "step"] for path in (two, one)]
    # losses are float32 and rounded to six places
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=2e-6) and len(losses[0]) >= 3


@pytest.mark.parametrize("name", METHODS)
def test_both_processes_end_with_the_same_bits(both, name):
    first, second = (torch.load(both[0] / f"{name}-process-{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and first
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


def test_a_folder_of_two_processes_is_refused_to_one(both):
    arguments = {**runs_of(both[0], 2)["lora"], "folder": str(both[0] / "lora")}
    with pytest.raises(CheckpointError, match="holds a run of 2 processes, this one has 1"):
        make_run(**arguments)


#: dropout as it comes, a zero-shot row, an expert of its own for the letter router
DRAWN = {"method": "mr_lora", "options": {"router": "mllm", "router_epochs": 1.0}, "save_steps": 2}
DRAWN |= {"per_device_train_batch_size": 4, "num_train_epochs": 1, "max_new_tokens": 2}


def test_two_processes_that_die_end_the_same(tmp_path):
    """In a phase, between a task's end and its checkpoint, and in evaluation."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert together(learn, tmp_path, [{"folder": str(whole), **DRAWN}]) == [0, 0], errors(tmp_path)
    for death in (("-_step", 3), ("+write_adapters", 1), ("-note_evaluation", 2)):
        codes = together(learn, tmp_path, [{"folder": str(cut), **DRAWN}], death)
        assert codes == [9, 1] and "hears nothing from the others" in errors(tmp_path)[-1]
    assert together(learn, tmp_path, [{"folder": str(cut), **DRAWN}]) == [0, 0], errors(tmp_path)
    same_end(whole, cut)
    events = [event["event"] for event in read_jsonl(cut / "events.jsonl")]
    assert events.count("start") == 1 and events.count("resume") == 3 and events.count("finish") == 1
    assert Report.load(whole).metrics["processes"] == 2


def shard(rank: int, arguments: dict, death: tuple[str, int] | None, folder) -> None:
    """A run with a sharded base, and how many of its numbers each process holds."""
    original = distributed.Several.shard_base

    def counted(self, mllm):
        original(self, mllm)
        sharded = [value for value in mllm.model.parameters() if hasattr(value, "to_local")]
        trains = [name for name in mllm.trainable_state() if hasattr(mllm.model.get_parameter(name), "to_local")]
        here, whole = sum(value.to_local().numel() for value in sharded), sum(value.numel() for value in sharded)
        (folder / f"held-{rank}.json").write_text(json.dumps([here, whole, trains]))

    distributed.Several.shard_base = counted
    learn(rank, [{**arguments, "shard_base": True}], death)


def test_a_sharded_base_learns_the_same_to_the_bit(tmp_path):
    """With layers recomputed, killed once; beside the same run with a whole base."""
    arguments = {"method": "mr_lora", **CONFIG, **HALF, "save_steps": 2, "gradient_checkpointing": True}
    # its first forward is an evaluation
    arguments.update(zero_shot=True, evaluate_seen_only=False)
    whole, cut = tmp_path / "whole", tmp_path / "sharded"
    assert together(learn, tmp_path, [{"folder": str(whole), **arguments}]) == [0, 0], errors(tmp_path)
    arguments = {"folder": str(cut), **arguments}
    assert together(shard, tmp_path, arguments, ("-_step", 6), tmp_path) == [9, 1]
    assert together(shard, tmp_path, arguments, None, tmp_path) == [0, 0], errors(tmp_path)
    same_end(whole, cut)
    assert read_predictions(whole) == read_predictions(cut)
    for rank in range(2):
        here, everything, trains = json.loads((tmp_path / f"held-{rank}.json").read_text())
        # two layers of q, k, v, o, gate, up, down and two norms
        assert everything == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) and here == everything // 2
        assert trains == []


@pytest.mark.parametrize("name", ["finetune", "lora_merged"])
def test_a_base_that_changes_is_not_sharded(name, tmp_path):
    with pytest.raises(ValueError, match=f"shard_base needs a base that stays as it is, and method {name} changes it"):
        make_run(tmp_path, name, shard_base=True)


def fail(rank: int, where: str, arguments: dict) -> None:
    """A run in which something goes wrong in the second process alone."""
    original = loop._step

    def step(run, phase, order, watch):
        if where == "error" and run.position.total == 4:
            raise KeyError("no such thing")
        loss = original(run, phase, order, watch)
        if where == "drift":
            next(iter(run.mllm.trained_parameters().values())).data.view(-1)[0] += 1e-6
        return loss

    if rank == 1 and where in ("error", "drift"):
        loop._step = step
    if rank == 1 and where == "seed":
        arguments = {**arguments, "seed": 1}
    make_run(**arguments)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("error", "KeyError: 'no such thing'"),
        ("drift", "RuntimeError: 1 tensors are not the same in every process after phase train of task t0, e.g. "),
        ("seed", "ValueError: train: expected the same run in every process, got train.seed 0 and 1 (0 and 1)"),
    ],
)
def test_what_goes_wrong_in_one_process_ends_both(where, match, tmp_path):
    arguments = {"folder": str(tmp_path / "run"), "method": "lora", **CONFIG, **HALF}
    assert together(fail, tmp_path, where, arguments) == [1, 1]
    assert any(match in error for error in errors(tmp_path))


def look(rank: int, folder) -> None:
    """What a step asks of three processes, looked at from inside."""
    several = distributed.Several(0, torch.device("cpu"))
    shares = [several.share(list(range(count))) for count in (7, 3, 2, 1)]
    torch.manual_seed(0)
    several.begin_step(5)
    with several.own_draws():
        own = torch.rand(2).tolist()
        with several.alike_draws():
            alike = torch.rand(2).tolist()
    after = torch.rand(2).tolist()
    share = several.weigh(6, 1.0, rank + 1)
    # means over 1, 2, 3 things, of which the mean over all six is (1 * 10 + 2 * 20 + 3 * 30) / 6
    mean = share * several.part(torch.tensor(10.0 * (rank + 1)), rank + 1.0)
    on_device = share * several.part(torch.tensor(10.0 * (rank + 1)), torch.tensor(rank + 1.0))
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    params[0].grad = torch.full((3, 2), rank + 1.0).T
    if rank == 1:
        params[1].grad = torch.ones(2, 3)
    loss = torch.tensor(float(rank))
    several.add_gradients(params, loss)
    grads = [None if param.grad is None else param.grad.tolist() for param in params]
    facts = {"shares": shares, "own": own, "alike": alike, "after": after, "grads": grads, "loss": float(loss)}
    facts["means"] = [float(mean), float(on_device)]
    (folder / f"{rank}.json").write_text(json.dumps(facts))


def test_shares_draws_means_and_gradients_of_three_processes(tmp_path):
    assert together(look, tmp_path, tmp_path, size=3) == [0, 0, 0], errors(tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    by_count = [list(shares) for shares in zip(*(one["shares"] for one in found), strict=True)]
    assert by_count[0] == [[[0, 1], 1.0], [[2, 3], 1.0], [[4, 5, 6], 1.0]]
    assert by_count[1] == [[[0], 1.0], [[1], 1.0], [[2], 1.0]]
    assert by_count[2] == [[[0], 0.5], [[0], 0.5], [[1], 1.0]]
    assert by_count[3] == [[[0], 1 / 3]] * 3
    assert len({str(one["own"]) for one in found}) == 3
    torch.manual_seed(0)
    drawn = torch.rand(4).tolist()
    assert all(one["alike"] == drawn[:2] and one["after"] == drawn[2:] for one in found)
    for one in found:
        assert one["grads"] == [[[6.0] * 3] * 2, [[1.0] * 3] * 2, None] and one["loss"] == 3.0
    assert [sum(one["means"][place] for one in found) for place in range(2)] == pytest.approx([140 / 6] * 2)
