"""The command line as a user meets it: in a second process, with its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def mllmcl(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mllmcl", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two tasks of LLaVA-style JSON."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    for task in ("one", "two"):
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "black"}]
        train = [{"id": str(place), "image": "a.png", "conversations": turns} for place in range(3)]
        test = [{"question_id": "9", "image": "a.png", "text": "what?", "answer": "black"}]
        (tmp_path / f"{task}_train.json").write_text(json.dumps(train))
        (tmp_path / f"{task}_test.json").write_text(json.dumps(test))
    return tmp_path


def test_help_needs_no_torch():
    looked = "print('torch' in sys.modules, 'transformers' in sys.modules)"
    code = f"import sys; from mllmcl.cli import main; main(['--help']); {looked}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False False"
    for command in ("run", "report", "methods", "streams", "doctor", "export"):
        assert f"  {command} " in done.stdout


def test_an_unknown_command_is_wrong_usage_with_a_hint():
    done = mllmcl("reprot")
    assert done.returncode == 2 and "did you mean report?" in done.stderr
    assert mllmcl().returncode == 2


def test_a_dry_run_checks_everything_and_loads_nothing(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"method: {{name: lora}}\nstream: {{name: {folder}}}\ntrain: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    done = mllmcl("run", str(config), "--method.name", "mr_lora", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "method mr_lora" in done.stdout and "one (3 + 1), two (3 + 1)" in done.stdout
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("text", "code", "match"),
    [
        ("trian: 3\ntrain: {output_dir: x}", 2, "trian"),
        ("train: {output_dir: x, sede: 1}", 2, "sede"),
        ("train: {output_dir: x, lr_scheduler_type: wobbly}", 2, "wobbly"),
        ("method: {name: mrlora}\ntrain: {output_dir: x}", 1, "did you mean mr_lora"),
        ("method: {name: lora, options: {rnak: 3}}\ntrain: {output_dir: x}", 1, "got rnak"),
        ("stream: {name: pocket-domian}\ntrain: {output_dir: x}", 1, "did you mean pocket-domain"),
        ("train: {output_dir: ''}", None, "output_dir must be a folder, got ''"),
        ("train: {output_dir: x, max_steps: 0}", None, "max_steps must be at least 1"),
    ],
)
def test_a_wrong_configuration_is_refused_in_words(text, code, match, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(text + "\n")
    done = mllmcl("run", str(config), "--dry-run", cwd=tmp_path)
    assert match in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == code or (code is None and done.returncode in (1, 2))


@pytest.mark.parametrize("text", [b"a: [1", b"\xff\xfe", b"!!python/object/apply:os.getcwd []", None])
def test_what_is_no_yaml_is_wrong_usage_in_one_line(text, tmp_path):
    config = tmp_path / "lauf \u00e4.yaml"
    if text is not None:
        config.write_bytes(text)
    done = mllmcl("run", str(config))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"mllmcl run: {config} cannot be read as YAML (")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("run", "--train.output_dir", "x", "--trian.seed", "1"), "--trian.seed"),
        (("run",), "train.output_dir"),
        (("report",), "runs"),
        (("methods", "--all"), "--all"),
        (("export", "x", "--format", "onnx"), "onnx"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments, match):
    done = mllmcl(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and match in done.stderr
    assert done.stderr.startswith(f"mllmcl {arguments[0]}: ") and f"mllmcl {arguments[0]} --help" in done.stderr


def test_methods_streams_and_doctor_tell_what_is_there():
    from mllmcl import methods
    from mllmcl.streams import available

    told = mllmcl("methods").stdout
    for name, method in methods.available().items():
        assert f"\n{name}\n" in f"\n{told}" and method.source in told and method.deviations in told
    listed = mllmcl("streams").stdout
    assert all(name in listed for name in available())
    doctor = mllmcl("doctor").stdout
    assert "reference" in doctor and "torch" in doctor and "cache:" in doctor
    assert "resvg-py" in doctor and "npm" in doctor


@pytest.mark.parametrize("arguments", [("methods",), ("streams",), ("--help",)], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    """As with `mllmcl methods | head`: nothing on stderr, and the exit code of a program that a closed pipe ended."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mllmcl", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_package_that_is_missing_is_told_in_a_line():
    missing = "def missing(arguments): raise ImportError('it needs the package toys')"
    used = "cli.COMMANDS['streams'] = (missing,)\nraise SystemExit(cli.main(['streams']))"
    code = f"from mllmcl import cli\n{missing}\n{used}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "mllmcl streams: it needs the package toys\n"


def test_a_report_of_nothing_and_an_export_of_nothing_fail_by_name(tmp_path):
    done = mllmcl("report", str(tmp_path))
    assert done.returncode == 1 and "matrix.json" in done.stderr
    done = mllmcl("export", str(tmp_path))
    assert done.returncode == 1 and "adapters" in done.stderr
