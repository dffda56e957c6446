"""Runs that torchrun starts, from the command line and from a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mllmcl import cli
from mllmcl.files import read_jsonl

from ..models.tiny import save_llava
from .several import errors, learn, together
from .test_loop import same_end

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str, seconds: float = 240.0) -> subprocess.CompletedProcess:
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


def configure(folder: Path) -> Path:
    """A configuration of a run of two tasks with a model of random weights."""
    save_llava(folder / "model")
    (folder / "data").mkdir()
    for task, colour in (("one", 0), ("two", 255)):
        Image.fromarray(np.full((28, 28, 3), colour, np.uint8)).save(folder / "data" / f"{task}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": task}]
        train = [{"id": str(place), "image": f"{task}.png", "conversations": turns} for place in range(5)]
        test = [{"question_id": str(place), "image": f"{task}.png", "text": "what?", "answer": task} for place in "abc"]
        (folder / "data" / f"{task}_train.json").write_text(json.dumps(train))
        (folder / "data" / f"{task}_test.json").write_text(json.dumps(test))
    values = {
        "model": {"pretrained": str(folder / "model")},
        "method": {"name": "lora", "options": {"dropout": 0.0}},
        "stream": {"name": str(folder / "data")},
        "train": {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, "max_new_tokens": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def signals_stay(monkeypatch):
    """The program is called within this process, whose signals are not the program's."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.mark.usefixtures("signals_stay")
def test_the_command_line_runs_under_torchrun(tmp_path, capsys):
    config = configure(tmp_path)
    done = torchrun("-m", "mllmcl", "run", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    # one process tells, and one writes
    assert done.stdout.count("report: ") == 1
    events = [event["event"] for event in read_jsonl(tmp_path / "run/events.jsonl")]
    assert events.count("start") == events.count("finish") == 1 and events.count("task_end") == 2
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["processes"] == 2
    assert (tmp_path / "run/adapters/two/adapter_model.safetensors").exists()
    alone = ["run", str(config), "--train.output_dir", str(tmp_path / "alone"), "--train.per_device_train_batch_size=4"]
    assert cli.main(alone) == 0
    ours, theirs = (json.loads((tmp_path / name / "matrix.json").read_text()) for name in ("run", "alone"))
    assert ours == theirs
    # one process is told before it loads anything
    assert cli.main(["run", str(config)]) == 1
    assert "number of processes was 2, is 1" in capsys.readouterr().err


def test_a_script_whose_process_dies_ends_and_continues(tmp_path):
    """The first process is gone in a step; torchrun ends the other, and the same command goes on to the same end."""
    script = ["-m", "tests.training.made_up_run", str(tmp_path / "cut"), "lora", "{}"]
    done = torchrun(*script, "-_step", "8", seconds=120)
    assert done.returncode != 0
    assert not (tmp_path / "cut/metrics.json").exists()
    done = torchrun(*script)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [event["event"] for event in read_jsonl(tmp_path / "cut/events.jsonl")]
    assert events.count("start") == events.count("resume") == events.count("finish") == 1
    whole = {"folder": str(tmp_path / "whole"), "method": "lora"}
    assert together(learn, tmp_path, [whole]) == [0, 0], errors(tmp_path)
    same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.usefixtures("signals_stay")
def test_a_sweep_is_not_started_by_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = tmp_path / "sweep.yaml"
    path.write_text("sweep: {}\n")
    assert cli.main(["run", str(path)]) == 1
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_half_an_environment_is_refused(missing, tmp_path, monkeypatch):
    from .made_up_run import make_run

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is 2, but {missing} is not set"):
        make_run(tmp_path / "run", "lora")
