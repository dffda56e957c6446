"""The loop: what a run leaves behind, and that a killed run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllmcl import MLLM, methods
from mllmcl.evaluation import Report, read_predictions
from mllmcl.files import read_jsonl
from mllmcl.models import sharing
from mllmcl.training import loop
from mllmcl.training.checkpoint import CheckpointError
from mllmcl.training.config import TrainConfig
from mllmcl.training.loop import _rate

from ..models.tiny import make_composed
from .made_up_run import make_run, make_stream

ROOT = Path(__file__).parents[2]


def child(folder: Path, method: str, options: dict, *death: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.made_up_run", str(folder), method, json.dumps(options), *death]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, 9, -9), errors.decode()[-2000:]
    return process.returncode


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("0*"))[-1]
    groups = {name: load_file(newest / f"{name}.safetensors") for name in ("model", "method", "rng")}
    return {f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()}


def same_end(one: Path, other: Path) -> None:
    assert json.loads((one / "matrix.json").read_text()) == json.loads((other / "matrix.json").read_text())
    ours, theirs = final_tensors(one), final_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    first, second = (Report.load(folder).metrics for folder in (one, other))
    for name in ("last", "average", "finetune", "bwt", "forgetting", "router", "per_task"):
        assert first[name] == second[name], name


@pytest.fixture(scope="module", params=[("mr_lora", {}), ("mage", {})], ids=lambda param: param[0])
def unbroken(request, tmp_path_factory):
    method, options = request.param
    folder = tmp_path_factory.mktemp("unbroken") / method
    assert finish(child(folder, method, options)) == 0
    return folder, method, options


# a death in every stage: within a phase, before and after a task's end, in evaluation, between tasks, at the very end
DEATHS = (
    ("-_step", "1"),
    ("+_step", "9"),
    ("-write_adapters", "2"),
    ("+write_adapters", "1"),
    ("-predict", "1"),
    ("+predict", "3"),
    ("-note_evaluation", "2"),
    ("+note_evaluation", "4"),
    ("+_learn", "1"),
    ("-finish", "1"),
)


def test_killed_in_every_stage_it_ends_the_same(unbroken, tmp_path):
    """One run that dies at ten places, one after the other, and then is let through."""
    reference, method, options = unbroken
    folder = tmp_path / "killed"
    deaths = sum(finish(child(folder, method, options, *death)) == 9 for death in DEATHS)
    assert deaths >= 6
    assert finish(child(folder, method, options)) == 0
    same_end(reference, folder)
    events = [event["event"] for event in read_jsonl(folder / "events.jsonl")]
    assert events.count("start") == 1 and events.count("resume") >= 6


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    reference, folder = tmp_path / "unbroken", tmp_path / "killed"
    began = time.monotonic()
    assert finish(child(reference, "mr_lora", {"router": "mllm", "router_epochs": 2})) == 0
    whole = time.monotonic() - began
    for share in (0.5, 0.75, 0.6, 0.85, 0.7):
        process = child(folder, "mr_lora", {"router": "mllm", "router_epochs": 2})
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        finish(process)
    assert finish(child(folder, "mr_lora", {"router": "mllm", "router_epochs": 2})) == 0
    same_end(reference, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return make_run(folder), folder


def test_a_run_folder_holds_what_it_should(finished):
    report, folder = finished
    for name in ("config.yaml", "matrix.json", "metrics.json", "events.jsonl", "report.html", "samples/samples.json"):
        assert (folder / name).stat().st_size > 0
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["t0", "t1", "t2"]
    assert (folder / "adapters/t1/adapter_model.safetensors").exists()
    assert "Method mr_lora; at test it needs: nothing: a router" in (folder / "adapters/t1/README.md").read_text()
    assert len(list((folder / "predictions").glob("*.jsonl"))) == 4
    assert report.matrix.num_learned == 3 and report.matrix.zero_shot is not None
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["method"] == "mr_lora" and metrics["router"]["accuracy"] == 1.0
    # beside parameters in float32 four prototypes for each task, their features and an int64 owner
    assert metrics["stored_bytes"] == 4 * metrics["trainable_parameters"] + 12 * (4 * (12 + 32) + 8)
    assert metrics["seconds_per_step"] > 0 and metrics["peak_memory_bytes"] > 0 and metrics["eval_batch_size"] == 32
    assert metrics["bwt"].keys() >= {"T", "T-1"}
    steps = [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == "step"]
    assert steps[-1]["step"] == 3 * 6 and all(event["loss"] > 0 for event in steps)


def test_seconds_per_step_are_of_the_phase_that_takes_longest(tmp_path):
    """slm trains keys, without the model, before the rest."""
    make_run(tmp_path / "run", "slm", {"rank": 2}, logging_steps=1)
    by_phase: dict[str, list[float]] = {}
    for event in read_jsonl(tmp_path / "run/events.jsonl"):
        if event["event"] == "step":
            by_phase.setdefault(event["phase"], []).append(event["seconds"])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert len(by_phase) == 2
    assert metrics["seconds_per_step"] == pytest.approx(statistics.median(by_phase["train"][3:]), abs=2e-4)
    assert metrics["train_seconds"] == pytest.approx(sum(map(sum, by_phase.values())), abs=0.1)


def test_a_finished_run_is_not_trained_again(finished):
    report, folder = finished
    steps = len([e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "step"])
    again = make_run(folder)
    assert again.matrix == report.matrix
    assert len([e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "step"]) == steps


def test_a_folder_of_another_run_is_refused(finished):
    _, folder = finished
    with pytest.raises(CheckpointError, match=r"holds another run: train.seed was 0, is 1; take another folder"):
        make_run(folder, seed=1)
    with pytest.raises(CheckpointError, match=r"method.options.rank was 8, is 4"):
        make_run(folder, options={"rank": 4})
    with pytest.raises(RuntimeError, match="holds a run already"):
        make_run(folder, resume="never")


def test_layers_that_share_their_input_learn_the_same(finished, tmp_path, monkeypatch):
    """In float64 without dropout; a run that shares is no continuation of one that does not."""
    calls, op = [], sharing.lora_mix_shared
    monkeypatch.setattr(sharing, "lora_mix_shared", lambda *args, **options: (calls.append(1), op(*args, **options))[1])
    ends = [tmp_path / f"{shares}.pt" for shares in (False, True)]
    for shares, path in zip((False, True), ends, strict=True):
        options = {"rank": 2, "dropout": 0.0}
        make_run(tmp_path / path.stem, "lora", options, double=True, ends=path, shares=shares, max_steps=2)
        assert bool(calls) is shares
    plain, shared = (torch.load(path) for path in ends)
    for name, value in plain.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11)
    with pytest.raises(CheckpointError, match=r"holds another run: model.share_inputs was False, is True"):
        make_run(finished[1], shares=True)


def test_results_without_checkpoints_are_not_written_over(finished, tmp_path):
    """What a finished run has left stays, whoever lost its checkpoints."""
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    shutil.rmtree(folder / "checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"adapters and metrics.json of a run but none of its checkpoints"):
        make_run(folder)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path in before}
    assert kept == before


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """Without dropout 4 x 2 samples and 1 x 8 take the same steps, to the rounding of the sums."""
    ends = []
    for name, config in (("one", {}), ("four", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})):
        make_run(tmp_path / name, "lora", {"dropout": 0.0}, **config)
        ends.append(final_tensors(tmp_path / name))
    for key, value in ends[0].items():
        if key.startswith("model/"):
            torch.testing.assert_close(value, ends[1][key], rtol=1e-2, atol=1e-3)


def test_an_isolated_expert_answers_an_item_once(tmp_path, monkeypatch):
    """Every answer equals that of a run that asks again and again."""
    asked = []
    generate = MLLM.generate

    def counted(self, samples, *args, **options):
        asked.append([sample.id for sample in samples])
        return generate(self, samples, *args, **options)

    monkeypatch.setattr(MLLM, "generate", counted)
    make_run(tmp_path / "once", "mr_lora", {"router": "oracle"}, num_train_epochs=1)
    items = [item for batch in asked for item in batch]
    # three tasks of 8 items: by the base model, then each by its own expert
    assert len(items) == 2 * 24 and max(items.count(item) for item in items) == 2
    monkeypatch.setattr(methods.find("mr_lora"), "isolated", False)
    make_run(tmp_path / "again", "mr_lora", {"router": "oracle"}, num_train_epochs=1)
    assert len([item for batch in asked for item in batch]) == 2 * 24 + 4 * 24
    assert read_predictions(tmp_path / "once") == read_predictions(tmp_path / "again")


@pytest.mark.parametrize("dies", [False, True])
def test_experts_lie_by_columns_while_a_run_lasts(dies, tmp_path, monkeypatch):
    """Also those that grow from task to task; afterwards, however it ends, the user has rows as before."""
    seen: list[bool] = []
    step = loop._step

    def watched(run, *args):
        by_columns = [layer.lora_b.stride() == (1, layer.out_features) for layer in run.mllm.expert_layers.values()]
        seen.append(all(by_columns))
        assert not dies
        loss = step(run, *args)
        moments = [state["exp_avg"].stride() == param.stride() for param, state in run.optimizer.state.items()]
        assert all(moments)
        return loss

    monkeypatch.setattr(loop, "_step", watched)
    mllm = make_composed()
    config = TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1, progress="off")
    with pytest.raises(AssertionError) if dies else contextlib.nullcontext():
        loop.train(mllm, methods.create("o_lora"), make_stream(), config)
    assert seen == [True] if dies else [True] * 3
    assert all(layer.lora_b.is_contiguous() for layer in mllm.expert_layers.values())


def test_max_steps_and_bf16_and_checkpointing_run(tmp_path):
    report = make_run(tmp_path, "moelora", max_steps=3, bf16=True, gradient_checkpointing=True, evaluate_seen_only=True)
    assert report.metrics["dtype"] == "bfloat16 autocast"
    assert report.matrix.score(0, 2) is None and report.matrix.score(2, 0) is not None


def test_two_runs_do_not_share_a_folder(tmp_path):
    process = child(tmp_path, "lora", {})
    try:
        for _ in range(200):
            if (tmp_path / "events.jsonl").exists():
                break
            time.sleep(0.1)
        with pytest.raises(RuntimeError, match=str(process.pid)):
            make_run(tmp_path, "lora")
    finally:
        process.kill()
        process.communicate()


def test_the_schedule_rises_and_falls():
    config = TrainConfig(output_dir="x", warmup_ratio=0.1)
    rates = [_rate(config, step, 100) for step in range(100)]
    assert rates[:2] == [0.1, 0.2] and rates[10] == 1.0 and max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    flat = TrainConfig(output_dir="x", warmup_ratio=0.0, lr_scheduler_type="constant")
    assert [_rate(flat, step, 5) for step in range(5)] == [1.0] * 5
    line = TrainConfig(output_dir="x", warmup_ratio=0.0, lr_scheduler_type="linear")
    assert [_rate(line, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs must be positive, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1 or None, got 0"),
        ({"learning_rate": -1.0}, r"learning_rate must be at least 0 or None, got -1\.0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_options_are_refused_in_words(option, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(output_dir="x", **option)


def test_what_is_no_model_or_stream_is_refused(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path))
    given = {"mllm": make_composed(), "method": methods.create("lora"), "stream": make_stream(), "config": config}
    for name, kind in {"mllm": "MLLM", "method": "Method", "stream": "Stream", "config": "TrainConfig"}.items():
        with pytest.raises(TypeError, match=f"train: {name} must be a {kind}, got str"):
            loop.train(**{**given, name: "pocket-domain"})
