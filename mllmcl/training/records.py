"""What a run writes down: configuration, events, timings, predictions, adapters, matrix, metrics, report."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor

from ..evaluation import (
    AccuracyMatrix,
    Prediction,
    Report,
    compute_metrics,
    evaluate,
    mean_scores,
    read_predictions,
    write_predictions,
)
from ..files import atomic_write, atomic_write_json
from ..models.adapter_files import export_expert
from .checkpoint import CheckpointError
from .config import TrainConfig
from .guards import check_finite
from .rng import capture_rng, restore_rng

if TYPE_CHECKING:
    from ..methods import Method, Phase
    from ..models import MLLM
    from ..streams import Sample, Stream, Task
    from .distributed import Alone
    from .loop import Run
    from .progress import Progress

__all__ = ["describe", "empty_results", "finish", "note_evaluation", "note_mixing_share", "note_step", "now", "predict"]

#: numbers of either end of a parameter that tell it from another
EDGE = 16
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton", "peft")

#: about 3000 tokens of English about a programming language, some of what `pydoc_data` holds
LANGUAGE_TOPICS = ("objects", "naming", "exceptions")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    from mllmcl import __version__

    found = {"mllmcl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def empty_results() -> dict:
    """Numbers that grow during a run and travel with its checkpoints."""
    return {
        "rows": [],
        "phase_seconds": {},
        "losses": [],
        "last_loss": "",
        "mixing_share": [],
        "evaluation_seconds": [],
        "language": [],
    }


def options_of(method: Method) -> dict:
    return {item.name: getattr(method, item.name) for item in fields(method) if item.init}


def _content(samples: Sequence) -> str:
    """A digest of ids, questions, answers, pictures (by their path, if they are files) and own scorers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        own = sample.metadata.get("scorer")
        digest.update(json.dumps([sample.id, sample.question, sample.answer, own]).encode())
        is_array = hasattr(sample.image, "tobytes")
        digest.update(sample.image.tobytes() if is_array else str(sample.image).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _weights(model: torch.nn.Module) -> str:
    """A digest of every parameter's name, shape, dtype and first and last numbers: tells models apart, reads little."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().reshape(-1)
        ends = torch.cat((flat[:EDGE], flat[-EDGE:])).double().cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:16]


def share_weights(mllm: MLLM, processes: Alone) -> None:
    """Let all processes begin with the weights of the first, as a fresh projector that each has drawn for itself."""
    if processes.size > 1 and len(set(processes.gather(_weights(mllm.model)))) > 1:
        names = {name: [*value.shape] for name, value in mllm.model.named_parameters()}
        processes.check_same(names, "model")
        processes.spread({**dict(mllm.model.named_parameters()), **dict(mllm.model.named_buffers())})


def check_processes(run: Run) -> None:
    """Raise CheckpointError where the folder holds a run of another number of processes."""
    path = run.folder / "config.yaml"
    if not path.is_file() or not (run.folder / "checkpoints").exists():
        return
    held = yaml.safe_load(path.read_text(encoding="utf-8")).get("processes", 1)
    if held != run.processes.size:
        raise CheckpointError(
            f"{run.folder} holds a run of {held} processes, this one has {run.processes.size}, and numbers would "
            "differ: start it with as many, or take another folder"
        )


def describe(mllm: MLLM, method: Method, stream: Stream, num_processes: int = 1) -> dict:
    """What ran, in values that JSON and YAML hold; part of the digest that a continuation is checked against."""
    return {
        **({"processes": num_processes} if num_processes > 1 else {}),
        "method": {"name": method.name, "options": options_of(method)},
        "stream": {
            "name": stream.name,
            "tasks": [
                {
                    "name": task.name,
                    "train": len(task.train),
                    "test": len(task.test),
                    "scorer": task.scorer,
                    "content": f"{_content(task.train)} {_content(task.test)}",
                }
                for task in stream.tasks
            ],
        },
        "model": {
            **mllm.origin,
            "class": type(mllm.model).__name__,
            "family": mllm.family.name,
            "parameters": sum(value.numel() for value in mllm.model.parameters()),
            "weights": _weights(mllm.model),
            "dtype": str(mllm.dtype).removeprefix("torch."),
            "device": mllm.device.type,
            # left out where it is off, as in runs from before there was a choice
            **({"share_inputs": True} if mllm.shares_inputs else {}),
        },
    }


def other_run(folder: Path, config: TrainConfig, description: dict) -> str | None:
    """How the run whose config.yaml is in the folder differs from this one, in words; None where it does not."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    before = _told(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _told(json.loads(json.dumps({**description, "train": config.deciding()})))
    both = [name for name in now if name in before and before[name] != now[name]]
    return "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in both[:3]) or None


def _told(values: dict) -> dict[str, object]:
    """Every value of a run's description by its way there, and what its tasks are."""
    tasks = values["stream"]["tasks"]
    rest = {name: value for name, value in values.items() if name != "processes"}
    return {
        "number of processes": values.get("processes", 1),
        **({"model.share_inputs": values["model"].get("share_inputs", False)} if "model" in values else {}),
        "tasks": ", ".join(f"{task['name']} ({task['train']} + {task['test']})" for task in tasks),
        **_flat(rest),
    }


def _flat(values: object, name: str = "") -> dict[str, object]:
    if not isinstance(values, (dict, list)):
        return {name: values}
    found: dict[str, object] = {}
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found


def write_config(folder: Path, config: TrainConfig, description: dict) -> None:
    """config.yaml: the resolved options and the versions they met."""
    values = {**description, "train": asdict(config), "versions": versions(), "started": now()}
    atomic_write(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))


def note_step(run: Run, task: Task, phase: Phase, loss: Tensor, seconds: float, last: bool) -> None:
    """Keep a step's time; every few steps read the losses since and write a line."""
    results, position, config = run.results, run.position, run.config
    results.setdefault("phase_seconds", {}).setdefault(phase.name, []).append(round(seconds, 5))
    run.losses.append(loss)
    if position.step % config.logging_steps and not last:
        return
    # the one place where the host looks at a training number
    mean = torch.stack(run.losses).mean()
    run.losses.clear()
    check_finite(mean, "the mean loss of the last steps", position.total, task.name, ())
    value = round(float(mean), 6)
    results["losses"].append([position.total, task.name, phase.name, value])
    results["last_loss"] = f"{value:.3f}"
    rate = run.optimizer.param_groups[0]["lr"]
    norm = run.optimizer.grad_norm
    run.event(
        "step", step=position.total, task=task.name, phase=phase.name, loss=value, learning_rate=rate,
        grad_norm=None if norm is None else round(float(norm), 6), seconds=round(seconds, 4),
        peak_memory_bytes=peak_memory(run),
    )  # fmt: skip


def peak_memory(run: Run) -> int:
    """Peak memory so far: of the device where that is a GPU, else of this process."""
    if run.mllm.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(run.mllm.device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _timed(run: Run, samples: Sequence[Sample], gates) -> float:
    """Seconds of one forward and backward pass with these experts; gradients are thrown away."""
    mllm = run.mllm
    batch = mllm.collate(samples, with_answers=True)
    _wait(mllm)
    began = time.perf_counter()
    with gates:
        mllm.loss(batch).backward()
    _wait(mllm)
    seconds = time.perf_counter() - began
    mllm.model.zero_grad(set_to_none=True)
    return seconds


def _wait(mllm: MLLM) -> None:
    if mllm.device.type == "cuda":
        torch.cuda.synchronize(mllm.device)


def note_mixing_share(run: Run, samples: Sequence[Sample], rounds: int = 3) -> None:
    """Share of forward and backward spent on experts: passes with and without them, in turn; leaves the run as it is.

    Measured where the pass without experts does the same work otherwise: gradients have to reach the projector.
    """
    mllm = run.mllm
    projector = mllm.projector_path
    base_trains = projector is not None and not mllm.projector_layers and any(
        parameter.requires_grad for parameter in mllm.model.get_submodule(projector).parameters()
    )  # fmt: skip
    if mllm.experts is None or not (base_trains or mllm.projector_layers):
        return
    tensors, values = capture_rng()
    shares = []
    opened = []
    if mllm.projector_layers:
        opened = [value for value in mllm.model.get_submodule(projector).parameters() if not value.requires_grad]
    for value in opened:
        value.requires_grad_(True)
    for _ in range(rounds):
        on = _timed(run, samples, run.method.before_forward(samples))
        off = _timed(run, samples, mllm.use_experts("off"))
        shares.append(1.0 - off / on)
    for value in opened:
        value.requires_grad_(False)
    restore_rng(tensors, values)
    run.results["mixing_share"].append(round(statistics.median(shares), 4))


def predict(run: Run, tasks: Sequence[Task], progress: Progress) -> list[Prediction]:
    """Answers to every test item of the tasks; `expert` is the task whose expert the method's router chose."""
    found = evaluate(
        run.mllm,
        [sample for task in tasks for sample in task.test],
        experts="route",
        scorer={task.name: task.scorer for task in tasks},
        batch_size=run.config.eval_batch_size,
        max_new_tokens=run.config.max_new_tokens,
        answered=_answered(run) if run.method.isolated else None,
        progress=progress.advance,
        processes=run.processes,
    )
    return [item if item.expert is None else replace(item, expert=run.method.task_of(item.expert)) for item in found]


def _answered(run: Run) -> dict[tuple[str, int], str]:
    """What experts that have not changed since answered at the last evaluation: (item id, expert) -> answer."""
    current = run.position.task
    last = read_predictions(run.folder).get(current - 1 if current else None, [])
    count = 0 if run.mllm.experts is None else run.mllm.experts.num_experts
    experts = {**{run.method.task_of(expert): expert for expert in range(count)}, -1: -1}
    return {(item.id, experts[item.expert]): item.prediction for item in last if item.expert not in (None, current)}


def note_evaluation(run: Run, after: int | None, found: list[Prediction], seconds: float) -> None:
    """predictions/<row>-<task>.jsonl, a row of the matrix, and the matrix so far."""
    names = [task.name for task in run.stream.tasks]
    scores = mean_scores(found, names)
    name = None if after is None else names[after]
    # files of rows sort in their order, zero-shot first
    label = "00-zero-shot" if after is None else f"{after + 1:02d}-{name}"
    if run.processes.is_first:
        write_predictions(run.folder / "predictions" / f"{label}.jsonl", found, after)
    run.results["rows"].append([after, scores])
    run.results["evaluation_seconds"].append(round(seconds, 2))
    run.event("evaluation", after=name, scores=scores, seconds=round(seconds, 2))
    if run.processes.is_first:
        _matrix(run).save(run.folder / "matrix.json")


def language_text(name: str) -> str:
    """The text that `TrainConfig.language_text` names.

    Raises:
        ValueError: it is neither "python-topics" nor a file.
    """
    if name == "python-topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in LANGUAGE_TOPICS)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f'language_text must be "python-topics" or a file, got {name!r}')
    return path.read_text(encoding="utf-8")


def note_language(run: Run, after: int | None) -> None:
    """Perplexity of plain text; where a router chooses by samples, the base model reads it."""
    if run.config.language_text is None:
        return
    mllm = run.mllm
    with mllm.use_experts(None if mllm.router is None else "off"):
        value = round(mllm.perplexity(language_text(run.config.language_text)), 4)
    run.results["language"].append([after, value])
    run.event("language", after=None if after is None else run.stream.tasks[after].name, perplexity=value)


def _matrix(run: Run) -> AccuracyMatrix:
    tasks = run.stream.tasks
    matrix = AccuracyMatrix(
        tasks=tuple(task.name for task in tasks),
        num_test=tuple(len(task.test) for task in tasks),
        stream=run.stream.name,
        method=run.method.name,
        seed=run.config.seed,
    )
    for after, scores in run.results["rows"]:
        matrix = matrix.with_row(after, scores)
    return matrix


def write_adapters(run: Run, task: Task) -> None:
    """adapters/<task>/: the expert that learned the task, as PEFT reads it; nothing for a method without LoRA."""
    mllm = run.mllm
    if not mllm.expert_layers or not run.method.exports or not run.processes.is_first:
        return
    trained = [place for place, flag in enumerate(mllm.experts.trainable) if flag]
    note = f"Method {run.method.name}; at test it needs: {run.method.at_test}."
    if mllm.experts.num_experts > 1 and not run.method.isolated:
        note += " An answer of the run may come from several experts at once, which one adapter alone does not give."
    for expert in trained:
        folder = run.folder / "adapters" / task.name
        export_expert(mllm, expert, folder if len(trained) == 1 else folder / f"expert{expert}", note)


def write_samples(run: Run) -> None:
    """samples/: the first pictures of each task, for the report."""
    import io

    entries = []
    for task in run.stream.tasks:
        for sample in task.test[: run.config.num_report_samples]:
            image = sample.load_image()
            if image is None:
                continue
            name = f"{len(entries)}.png"
            data = io.BytesIO()
            image.save(data, format="PNG")
            atomic_write(run.folder / "samples" / name, data.getvalue())
            entries.append({"id": sample.id, "task": task.name, "file": name})
    atomic_write_json(run.folder / "samples" / "samples.json", entries)


def saved_parameters(run: Run) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model: everything that may train, and what trains now."""
    trained = {name: value.detach() for name, value in run.mllm.trained_parameters().items()}
    return {**run.mllm.trainable_state(), **trained}


def finish(run: Run) -> Report:
    """The report of a run that has learned every task."""
    is_first = run.processes.is_first
    report = Report(matrix=_matrix(run), metrics=run.processes.broadcast(_metrics(run) if is_first else None))
    if is_first:
        write_samples(run)
        report.save(run.folder)
    run.event("finish")
    run.processes.wait()
    return report


def _metrics(run: Run) -> dict:
    results, config = run.results, run.config
    by_phase = results.get("phase_seconds", {}).values()
    # of the phase that takes longest; the first steps of a process warm caches up
    longest = max(by_phase, key=sum, default=[])
    steady = longest[3:] or longest
    shares, parameters = results["mixing_share"], saved_parameters(run)
    return {
        **compute_metrics(_matrix(run), read_predictions(run.folder), seed=config.seed),
        "language_perplexity": [value for _, value in results["language"]] or None,
        "seconds_per_step": round(statistics.median(steady), 4) if steady else None,
        "share_expert_mixing": round(statistics.median(shares), 4) if shares else None,
        "train_seconds": round(sum(map(sum, by_phase)), 1),
        "evaluation_seconds": round(sum(results["evaluation_seconds"]), 1),
        "peak_memory_bytes": peak_memory(run),
        "trainable_parameters": sum(value.numel() for value in parameters.values()),
        "stored_bytes": sum(value.nbytes for value in (*parameters.values(), *run.method.state_tensors().values())),
        "threads": torch.get_num_threads(),
        **({"processes": run.processes.size} if run.processes.size > 1 else {}),
        "eval_batch_size": config.eval_batch_size,
        "dtype": "bfloat16 autocast" if config.bf16 else str(run.mllm.dtype).removeprefix("torch."),
        "seed": config.seed,
        "note": run.stream.note,
        "versions": versions(),
        "finished": now(),
    }
