"""A sweep: real runs in processes of their own; a second call runs only what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mllmcl.sweep import SweepConfig, cells, is_done, run_sweep

from .models.tiny import save_llava


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Two methods on two tiny tasks with a tiny LLaVA of random weights."""
    root = tmp_path_factory.mktemp("sweep")
    save_llava(root / "model")
    data = root / "tasks"
    data.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "a.png")
    for task in ("one", "two"):
        turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "x"}]
        train = [{"id": str(place), "image": "a.png", "conversations": turns} for place in range(2)]
        test = [{"question_id": "9", "image": "a.png", "text": "what", "answer": "x"}]
        (data / f"{task}_train.json").write_text(json.dumps(train))
        (data / f"{task}_test.json").write_text(json.dumps(test))
    (root / "text.txt").write_text("what x y " * 200)
    values = {
        "sweep": {
            "runs": str(root / "runs"),
            "results": str(root / "results"),
            "methods": {"lora": {"rank": 2}, "replay": {"rank": 2, "per_task": 1}},
            "streams": {str(data): {}},
        },
        "model": {"pretrained": str(root / "model"), "threads": 1},
        "train": {"max_steps": 1, "progress": "off", "language_text": str(root / "text.txt"), "max_new_tokens": 2},
    }
    path = root / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_sweep_runs_what_is_missing_and_compares_all(config):
    root = config.parent
    assert run_sweep(config, print) == 0
    results = {path.stem: json.loads(path.read_text()) for path in (root / "results").glob("*.json")}
    assert sorted(results) == ["tasks-lora-seed0", "tasks-replay-seed0"]
    for values in results.values():
        assert len(values["metrics"]["language_perplexity"]) == 3 and values["matrix"]["tasks"] == ["one", "two"]
    assert "replay" in (root / "results/report-tasks.html").read_text()
    (root / "results/tasks-replay-seed0.json").unlink()
    kept = (root / "results/tasks-lora-seed0.json").stat().st_mtime_ns
    lines = []
    assert run_sweep(config, lines.append) == 0
    assert lines == ["1/2 tasks-lora-seed0: done before", "2/2 tasks-replay-seed0"]
    assert (root / "results/tasks-replay-seed0.json").exists()
    assert (root / "results/tasks-lora-seed0.json").stat().st_mtime_ns == kept
    page = root / "results/report-tasks.html"
    assert "replay" in page.read_text() and "lora" in page.read_text()
    drawn = page.stat().st_mtime_ns
    assert run_sweep(config, print) == 0
    assert page.stat().st_mtime_ns == drawn


def test_a_result_of_other_defaults_is_not_done(config):
    """What was run is kept with every default of then."""
    shared = yaml.safe_load(config.read_text())
    cell = next(cells(SweepConfig(**shared.pop("sweep")), shared))
    path = config.parent / "held.json"
    held = cell.resolved
    assert held["method"]["options"]["alpha"] == 16.0
    path.write_text(json.dumps({"resolved": held}))
    assert is_done(cell, path)
    held["method"]["options"]["alpha"] = 4.0
    path.write_text(json.dumps({"resolved": held}))
    assert not is_done(cell, path)
    assert not is_done(cell, config.parent / "nothing.json")


def test_runs_side_by_side_give_what_one_after_the_other_gives(config, tmp_path):
    """Also: the page shows runs of which only the JSON is here."""
    values = yaml.safe_load(config.read_text())
    alone = Path(values["sweep"]["results"])
    values["sweep"].update(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), jobs=2)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    assert run_sweep(path, print) == 0
    for result in sorted((tmp_path / "results").glob("*.json")):
        assert json.loads(result.read_text())["matrix"] == json.loads((alone / result.name).read_text())["matrix"]
    assert "last (MFN)" in (tmp_path / "runs/tasks-lora-seed0/output.txt").read_text()
    page = tmp_path / "results/report-tasks.html"
    shutil.rmtree(tmp_path / "runs")
    page.unlink()
    assert run_sweep(path, print) == 0
    assert "replay" in page.read_text() and "lora" in page.read_text() and not (tmp_path / "runs").exists()


def test_a_run_that_fails_does_not_stop_the_others(config, tmp_path):
    values = yaml.safe_load(config.read_text())
    values["sweep"].update(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    values["sweep"]["streams"] = {str(tmp_path / "nothing"): {}, **values["sweep"]["streams"]}
    values["sweep"]["methods"] = {"lora": {"rank": 2}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    lines = []
    assert run_sweep(path, lines.append) == 1
    assert any(line.startswith("nothing-lora-seed0 failed:") for line in lines)
    assert [path.name for path in (tmp_path / "results").glob("*.json")] == ["tasks-lora-seed0.json"]


def test_another_option_is_another_run_and_a_wrong_one_is_refused_before_any():
    def resolved(shared=None, runs="runs", **options):
        sweep = SweepConfig(runs=runs, results="results", methods={"lora": options})
        return next(cells(sweep, shared or {})).resolved

    assert resolved(rank=2) == resolved(rank=2) != resolved(rank=3)
    # a default is the same whether said or not; where a run lies decides nothing
    assert resolved() == resolved({"train": {"learning_rate": 1e-3}}, runs="elsewhere", rank=8)
    assert resolved() != resolved({"train": {"learning_rate": 2e-3}})
    assert resolved() != resolved({"model": {"num_layers": 2}})
    with pytest.raises(TypeError, match=r"method lora takes .*, got rnak"):
        SweepConfig(runs="runs", results="results", methods={"lora": {"rnak": 3}})
    with pytest.raises(ValueError, match=r"sweep.jobs must be a whole number of at least 1, got 0"):
        SweepConfig(runs="runs", results="results", methods={"lora": {}}, jobs=0)
    with pytest.raises(
        ValueError, match=r"streams.pocket-domain.methods must be among sweep.methods, got \['moelora'\]"
    ):
        SweepConfig(
            runs="r", results="r", methods={"lora": {}}, streams={"pocket-domain": {"methods": ["lora", "moelora"]}}
        )
