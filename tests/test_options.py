"""Options are refused by name, expectation and value before a model is there."""

from __future__ import annotations

import json

import pytest

from mllmcl import MLLM, TrainConfig, methods, streams
from mllmcl.cli import MethodConfig, RunConfig, StreamConfig, check
from mllmcl.models.adapter_files import export_run
from mllmcl.models.composed import load_language
from mllmcl.models.vision import load_vision
from mllmcl.training.records import options_of, write_config

from .models.tiny import make_composed


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("lora", {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ("lora", {"rank": 2.0}, TypeError, "method lora: rank must be int, got 2.0"),
        ("lora", {"rank": True}, TypeError, "rank must be int, got True"),
        ("lora", {"alpha": -1}, ValueError, "alpha must be positive, got -1"),
        ("lora", {"alpha": float("nan")}, ValueError, "alpha must be positive, got nan"),
        ("mr_lora", {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ("mr_lora", {"targets": 3}, TypeError, r"targets must be str or list\[str\], got 3"),
        ("mr_lora", {"targets": ["q_proj", 3]}, TypeError, r"targets must be str or list\[str\], got"),
        ("replay", {"per_task": 2.5}, TypeError, "method replay: per_task must be int, got 2.5"),
        ("cl_moe", {"top_k": "two"}, TypeError, "method cl_moe: top_k must be int, got 'two'"),
    ],
)
def test_a_methods_options(name, options, error, words):
    with pytest.raises(error, match=words):
        methods.create(name, **options)


def test_every_default_fits_its_own_annotation():
    for name in methods.available():
        made = methods.create(name)
        again = {key: value for key, value in vars(made).items() if key in made.__dataclass_fields__}
        methods.create(name, **{key: value for key, value in again.items() if made.__dataclass_fields__[key].init})
    assert methods.create("lora", alpha=16, targets=["q_proj"]).alpha == 16


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be float or None, got '1e-3'"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be at least 0 or None, got nan"),
        ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size must be at least 1, got 0"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1 or None, got 0"),
        ({"num_train_epochs": 0}, ValueError, "num_train_epochs must be positive, got 0"),
        ({"adam_beta2": 1.0}, ValueError, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        ({"lr_scheduler_type": "step"}, TypeError, "lr_scheduler_type must be one of 'cosine', 'linear', 'constant'"),
        ({"bf16": 1}, TypeError, "bf16 must be bool, got 1"),
    ],
)
def test_a_runs_options(options, error, words):
    with pytest.raises(error, match=words):
        TrainConfig(output_dir="somewhere", **options)


@pytest.mark.parametrize(
    ("section", "option", "value", "words"),
    [
        (
            "model",
            "pretrained",
            "/nope/x",
            "model.pretrained must be a folder or a name on the model hub, got '/nope/x'",
        ),
        (
            "model",
            "language",
            "./nope",
            "model.language must be smollm2-135m-instruct, a folder or a name on the model",
        ),
        ("model", "projector", "foo", "model.projector must be one of mlp2x_gelu, got 'foo'"),
        ("model", "image_size", 33, "model.image_size must be a positive multiple of 32, got 33"),
        ("model", "num_layers", -3, "num_layers must be at least 1 or None, got -3"),
        ("model", "device", "foo", "model.device must be auto, cpu or cuda, got 'foo'"),
        ("train", "language_text", "nofile", "train.language_text must be .* or a file, got 'nofile'"),
        ("method", "options", {"rank": 4}, "holds another run: method.options.rank was 8, is 4"),
        ("train", "seed", 3, "holds another run: train.seed was 0, is 3"),
        ("train", "learning_rate", 0.5, "holds another run: train.learning_rate was None, is 0.5"),
        ("train", "resume", "never", "holds a run already; train.resume=auto continues it"),
    ],
)
def test_what_a_dry_run_finds(tmp_path, section, option, value, words):
    task = [{"id": 0, "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "yes"}]}]
    for part in ("train", "test"):
        (tmp_path / f"one_{part}.json").write_text(json.dumps(task))
    settings = RunConfig(
        train=TrainConfig(output_dir=tmp_path / "run"),
        method=MethodConfig(name="lora"),
        stream=StreamConfig(name=str(tmp_path)),
    )
    method, stream = check(settings)
    write_config(tmp_path / "run", settings.train, {
        "method": {"name": "lora", "options": options_of(method)},
        "stream": {"name": stream.name, "tasks": [{"name": "one", "train": 1, "test": 1}]},
    })  # fmt: skip
    check(settings)
    setattr(getattr(settings, section), option, value)
    with pytest.raises(ValueError, match=words):
        check(settings)


def test_streams_take_a_root_and_refuse_options_in_words(tmp_path):
    few = {"num_train": 8, "num_test": 8, "tasks": ["finance"]}
    assert streams.load("pocket-domain", root=tmp_path, **few).tasks[0].name == "finance"
    with pytest.raises(TypeError, match=r"stream pocket-domain takes .*num_train.*, got num_trian"):
        streams.load("pocket-domain", num_trian=8)


def test_options_of_a_folder_and_of_a_method_are_refused_in_words(tmp_path):
    with pytest.raises(TypeError, match=r"a folder as a stream takes num_train, num_test, seed, tasks, got nm"):
        streams.load(tmp_path, nm=3)
    with pytest.raises(ValueError, match=r"method ewc: strength must be a number, got nan"):
        methods.create("ewc", strength=float("nan"))
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype, got 'flot'"):
        (tmp_path / "config.json").write_text("{}")
        MLLM.from_pretrained(tmp_path, dtype="flot")
    with pytest.raises(FileNotFoundError, match=r"there is no run folder"):
        export_run(tmp_path / "nothing", tmp_path / "out")


def test_a_folder_without_a_model_is_told_before_anything_loads(tmp_path):
    with pytest.raises(
        ValueError, match=r"name_or_folder: the folder .* holds no model, since there is no config.json"
    ):
        MLLM.from_pretrained(tmp_path)


def test_a_path_without_a_folder_is_no_name(tmp_path):
    for load in (MLLM.from_pretrained, load_language, load_vision):
        with pytest.raises(ValueError, match=r"a folder or a name on the model hub, got '.*/nothing': no such folder"):
            load(str(tmp_path / "nothing"))


def test_a_model_says_what_it_is_and_answers_samples_alone():
    mllm = make_composed()
    assert repr(mllm).startswith("MLLM(ComposedModel, family composed: ")
    with pytest.raises(TypeError, match=r"samples\[0\]: expected a Sample, got str"):
        mllm.generate(["what?"])
