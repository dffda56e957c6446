"""The training loop: tasks, phases, steps, evaluation; every boundary and every few steps a checkpoint.

A run is a walk through stages: zero-shot evaluation, then for each task its start ("task_start"), its phases ("train"),
its end ("task_end") and its evaluation ("evaluate"). The position is saved with every checkpoint, and with it all that
decides the numbers, so that a killed run continues to the same result.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from mllmcl_kernels import MaskedAdamW

from ..evaluation import Report, check_scorers
from ..files import FolderLock, append_line
from ..methods import Method, Phase
from ..models import MLLM
from ..streams import Stream, Task
from . import records
from .checkpoint import (
    CheckpointError,
    Loaded,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
)
from .config import TrainConfig
from .distributed import Alone, joined
from .guards import Watch, check_finite
from .progress import Progress
from .rng import capture_rng, generator, restore_rng, seed_everything

__all__ = ["Position", "train"]


@dataclass
class Position:
    """Where a run stands: task and phase by index, the stage, optimizer steps done in the phase and in the run."""

    task: int = 0
    stage: str = "zero_shot"
    phase: int = 0
    step: int = 0
    total: int = 0
    checkpoint: int = 0


@dataclass
class Run:
    """Everything a run holds while it lasts."""

    mllm: MLLM
    method: Method
    stream: Stream
    config: TrainConfig
    folder: Path
    digest: str
    processes: Alone
    position: Position = field(default_factory=Position)
    results: dict = field(default_factory=records.empty_results)
    optimizer: MaskedAdamW | None = None
    # losses since the last line in events.jsonl, still on the device
    losses: list[torch.Tensor] = field(default_factory=list)
    # what a checkpoint held and the phase it was taken in has still to take over
    pending: object = None

    def event(self, kind: str, **facts) -> None:
        if self.processes.is_first:
            append_line(self.folder / "events.jsonl", {"time": records.now(), "event": kind, **facts})

    @property
    def progress(self) -> str:
        """The mode of progress bars: one process tells."""
        return self.config.progress if self.processes.is_first else "off"

    @property
    def task(self) -> Task:
        return self.stream.tasks[self.position.task]


def train(mllm: MLLM, method: Method, stream: Stream, config: TrainConfig) -> Report:
    """Learn the tasks of a stream one after the other and evaluate after each.

    Processes that torchrun started call it alike and learn one run together, see `distributed`; all get its report.

    Args:
        mllm: a fresh model; the method puts its experts in.
        method: from `mllmcl.methods.create`. stream: from `mllmcl.streams.load`.
        config: see `TrainConfig`; a run folder that holds the same run is continued.

    Returns:
        Report with the accuracy matrix and metrics; the run folder holds the same and more.

    Raises:
        ValueError: a task or a test sample names a scorer that is none.
        RuntimeError: the folder is in use, a trainable tensor gets no gradient, or a frozen one moves.
        FloatingPointError: a loss or gradient norm that is no number, before the optimizer moves anything.
        CheckpointError: a folder of another run, or of another number of processes, or no checkpoint can be used.
    """
    kinds = (
        ("mllm", mllm, MLLM),
        ("method", method, Method),
        ("stream", stream, Stream),
        ("config", config, TrainConfig),
    )
    for argument, value, kind in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"train: {argument} must be a {kind.__name__}, got {type(value).__name__}")
    if config.shard_base and method.changes_base:
        raise ValueError(f"train: shard_base needs a base that stays as it is, and method {method.name} changes it")
    stream.validate()
    check_scorers(stream.tasks)
    folder = Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(joined(config.seed, mllm.device))
        if processes.is_first:
            stack.enter_context(FolderLock(folder))
        stack.callback(_lay_experts, mllm, by_columns=False)
        run = _begin(mllm, method, stream, config, folder, processes)
        if run.position.stage == "zero_shot":
            if config.zero_shot:
                _evaluate(run, after=None)
            records.note_language(run, after=None)
            _advance(run, stage="task_start")
        while run.position.task < len(stream.tasks):
            _learn(run)
        return records.finish(run)


def _begin(mllm: MLLM, method: Method, stream: Stream, config: TrainConfig, folder: Path, processes: Alone) -> Run:
    """Set the method up, then take over what a checkpoint holds."""
    seed_everything(config.seed)
    records.share_weights(mllm, processes)
    description = records.describe(mllm, method, stream, processes.size)
    # bars are the one thing that may be another's
    processes.check_same({**description, "train": {**asdict(config), "progress": None}}, "run")
    # experts have to be drawn alike in a run and its continuation, so the digest comes before the method's set-up
    run = Run(mllm, method, stream, config, folder, config.sha256(description), processes)
    method.autocast, method.processes = functools.partial(_autocast, run), processes
    found = _newest_checkpoint(run, description)
    if found is not None and config.resume == "never":
        raise RuntimeError(f"{folder} holds a run already (checkpoint {found.path.name}); resume=auto continues it")
    method.setup(mllm, stream)
    _lay_experts(mllm, by_columns=mllm.device.type == "cpu")
    if config.gradient_checkpointing:
        mllm.enable_checkpointing()
    if config.shard_base:
        processes.shard_base(mllm)
    if found is None:
        if processes.is_first:
            records.write_config(folder, config, description)
        run.event("start", method=method.name, stream=stream.name)
        return run
    for path, reason in found.refused:
        run.event("refused", checkpoint=path.name, reason=reason)
    run.position = Position(**found.state["position"])
    run.results = found.state["results"]
    run.pending = found
    _restore_model(run)
    if run.position.stage == "task_start":
        _restore_rng(run)
    run.event("resume", from_checkpoint=found.path.name, **asdict(run.position))
    return run


def _lay_experts(mllm: MLLM, by_columns: bool) -> None:
    if mllm.experts is not None:
        mllm.lay_experts(by_columns=by_columns)


def _newest_checkpoint(run: Run, description: dict) -> Loaded | None:
    """What to go on from, the same in every process; the first one looks."""
    folder, found = run.folder / "checkpoints", None
    if run.processes.is_first:
        records.check_processes(run)
        try:
            found = latest_checkpoint(folder, config_sha256=run.digest)
        except CheckpointError as error:
            reason = records.other_run(run.folder, run.config, description)
            if reason is None:
                raise
            raise CheckpointError(f"{run.folder} holds another run: {reason}; take another folder") from error
        results = [name for name in ("adapters", "metrics.json") if (run.folder / name).exists()]
        if found is None and results:
            raise CheckpointError(
                f"{run.folder} holds {' and '.join(results)} of a run but none of its checkpoints: take another "
                "folder, or move this one away to start anew"
            )
    name = run.processes.broadcast(None if found is None else found.path.name)
    if name is None or run.processes.is_first:
        return found
    return read_checkpoint(folder / name, config_sha256=run.digest)


def _settle(run: Run) -> None:
    """After a hook that computes alike everywhere: where rounding made processes differ, the first one is right.

    Frozen image features are encoded in the batches in which a process meets the images, so they may differ in their
    last bits, and with them what is made of a whole training set.
    """
    processes, method = run.processes, run.method
    if processes.size == 1:
        return
    model, state, values = records.saved_parameters(run), method.state_tensors(), method.state_values()
    tensors = {**model, **{f"method/{name}": value for name, value in state.items()}}
    processes.check_same({name: [*value.shape] for name, value in tensors.items()}, "shapes")
    different, held = processes.different(tensors), processes.gather(values)
    if not different and all(one == held[0] for one in held):
        return
    state = {name: value.detach().clone() for name, value in state.items()}
    taken = {**model, **{f"method/{name}": value for name, value in state.items()}}
    processes.spread({name: taken[name] for name in different})
    method.load_state(state, held[0])


def _restore_rng(run: Run) -> None:
    """The last thing a checkpoint gives: from here on everything is drawn as if nothing had happened."""
    if run.pending is not None:
        restore_rng(run.pending.tensors["rng"], run.pending.state["rng"])
        run.pending = None


def _restore_model(run: Run) -> None:
    """Grow the experts to what the checkpoint has, then copy every tensor of it."""
    state, tensors = run.pending.state, run.pending.tensors
    mllm, ranks, scaling = run.mllm, state["ranks"], state["scaling"]
    if mllm.experts is not None:
        for expert in range(mllm.experts.num_experts, len(ranks)):
            mllm.grow_experts(1, ranks[expert], ranks[expert] * scaling[expert])
    parameters = dict(mllm.model.named_parameters())
    with torch.no_grad():
        for name, value in tensors["model"].items():
            parameters[name].copy_(value)
    run.method.load_state(tensors.get("method", {}), state["method"])


def _checkpoint(run: Run, pin: bool = False) -> None:
    numbers = [*run.losses] if run.optimizer is None else [*run.losses, run.optimizer.grad_norm]
    for number in numbers:
        if number is not None:
            # elsewhere than on the CPU nobody has looked at them yet, and what they moved must not be kept
            check_finite(number, "a loss or gradient norm", run.position.total, run.task.name, ())
    experts = run.mllm.experts
    rng_tensors, rng_values = capture_rng()
    names = {parameter: name for name, parameter in run.mllm.trained_parameters().items()}
    moments, slots = ({}, None) if run.optimizer is None else optimizer_tensors(run.optimizer, names)
    run.position.checkpoint += 1
    if not run.processes.is_first:
        run.processes.wait()
        return
    tensors = {
        "model": records.saved_parameters(run),
        "method": run.method.state_tensors(),
        "optimizer": moments,
        "rng": rng_tensors,
    }
    state = {
        "position": asdict(run.position),
        "results": run.results,
        "method": run.method.state_values(),
        "optimizer": slots,
        "rng": rng_values,
        "ranks": [] if experts is None else list(experts.ranks),
        "scaling": [] if experts is None else list(experts.scaling),
        "versions": records.versions(),
    }
    folder = run.folder / "checkpoints"
    save_checkpoint(folder, run.position.checkpoint, tensors, state, pin=pin, config_sha256=run.digest)
    run.event(
        "checkpoint", checkpoint=run.position.checkpoint, stage=run.position.stage, total_steps=run.position.total
    )
    run.processes.wait()


def _advance(run: Run, pin: bool = False, **changes) -> None:
    """Move on to the next stage and make that durable."""
    for name, value in changes.items():
        setattr(run.position, name, value)
    _checkpoint(run, pin)


def _learn(run: Run) -> None:
    """One task, from wherever the run stands in it."""
    position, method, task = run.position, run.method, run.task
    method.on_task_start(task)
    if run.pending is not None:
        # the hook may have started anew what the checkpoint holds
        _restore_model(run)
    _settle(run)
    if position.stage == "task_start":
        run.event("task_start", task=task.name, index=position.task)
        position.stage = "train"
    if position.stage == "train":
        phases = method.phases(task)
        while position.phase < len(phases):
            _run_phase(run, task, phases[position.phase])
            run.optimizer = None
            position.phase, position.step = position.phase + 1, 0
        _advance(run, stage="task_end")
    _restore_rng(run)
    if position.stage == "task_end":
        method.on_task_end(task)
        _settle(run)
        records.write_adapters(run, task)
        run.event("task_end", task=task.name, index=position.task)
        _advance(run, stage="evaluate", pin=True)
    _evaluate(run, after=position.task)
    records.note_language(run, after=position.task)
    _advance(run, task=position.task + 1, stage="task_start", phase=0, step=0)


def _run_phase(run: Run, task: Task, phase: Phase) -> None:
    """All optimizer steps of a phase, from the step the run stands at."""
    config, position, method = run.config, run.position, run.method
    method.on_phase_start(task, phase)
    if run.pending is not None:
        _restore_model(run)
    _settle(run)
    order = _order(run, phase)
    trainable = run.mllm.trained_parameters()
    if not trainable:
        raise RuntimeError(f"method {method.name} lets nothing train in phase {phase.name} of task {task.name}")
    masks = {name: mask for name, mask in method.parameter_masks().items() if name in trainable}
    run.optimizer = _make_optimizer(run, trainable, masks)
    watch = Watch(run.mllm.model, trainable, masks, method.shuts_off) if position.step == 0 else None
    if run.pending is not None:
        if position.step > 0:
            names = {parameter: name for name, parameter in trainable.items()}
            held = run.pending
            load_optimizer(run.optimizer, held.tensors["optimizer"], held.state["optimizer"], names)
        _restore_rng(run)
    run.mllm.train()
    label = f"{position.task + 1}/{len(run.stream.tasks)} {task.name} {phase.name}"
    with Progress(run.progress, label, len(order), position.step) as progress:
        while position.step < len(order):
            began = time.perf_counter()
            loss = _step(run, phase, order, watch)
            if watch is not None and not watch.after_step():
                watch = None
            position.step += 1
            position.total += 1
            records.note_step(run, task, phase, loss, time.perf_counter() - began, last=position.step == len(order))
            progress.advance(loss=run.results["last_loss"])
            if position.step % config.save_steps == 0 and position.step < len(order):
                _checkpoint(run)
    state = {**trainable, "random numbers": torch.get_rng_state()}
    run.processes.check_alike(state, f"after phase {phase.name} of task {task.name}")
    if position.task == len(run.stream.tasks) - 1:
        places, _ = run.processes.share(order[0][0])
        records.note_mixing_share(run, [phase.samples[place] for place in places])
    run.mllm.eval()


def _order(run: Run, phase: Phase) -> list[list[list[int]]]:
    """For each optimizer step its micro batches, of all processes, each a list of positions in the phase's samples."""
    config, position = run.config, run.position
    epochs = config.num_train_epochs if phase.epochs is None else phase.epochs
    size = config.per_device_train_batch_size * run.processes.size
    accumulate = config.gradient_accumulation_steps
    wanted = max(1, round(epochs * len(phase.samples)))
    places: list[int] = []
    epoch = 0
    while len(places) < wanted:
        draw = generator(config.seed, "order", position.task, phase.name, epoch)
        places += torch.randperm(len(phase.samples), generator=draw).tolist()
        epoch += 1
    batches = [places[start : start + size] for start in range(0, wanted, size)]
    steps = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    return steps[: config.max_steps]


def _make_optimizer(run: Run, trainable: dict[str, nn.Parameter], masks: dict) -> MaskedAdamW:
    config = run.config
    projector = run.mllm.projector_path
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in trainable.items():
        groups[projector is not None and name.startswith(projector)].append(parameter)
    optimizer = MaskedAdamW(
        [{"params": params, "is_projector": flag} for flag, params in groups.items() if params],
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_norm=config.max_grad_norm or None,
        error_if_nonfinite=True,
    )
    for name, mask in masks.items():
        optimizer.set_mask(trainable[name], mask)
    return optimizer


def _rate(config: TrainConfig, step: int, total: int) -> float:
    """Factor of the learning rate at `step` of `total`: linear warm-up, then the schedule; not 0 at the first step."""
    warm = math.ceil(config.warmup_ratio * total)
    if step < warm:
        return (step + 1) / warm
    left = (step - warm) / max(total - warm, 1)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * left))
    return 1.0 - left if config.lr_scheduler_type == "linear" else 1.0


def _set_rates(run: Run, phase: Phase, total: int) -> None:
    config, method = run.config, run.method
    base = next(rate for rate in (phase.learning_rate, config.learning_rate, method.learning_rate) if rate is not None)
    factor = _rate(config, run.position.step, total)
    for group in run.optimizer.param_groups:
        own = config.projector_learning_rate if group["is_projector"] else None
        group["lr"] = factor * (base if own is None else own)


def _step(run: Run, phase: Phase, order: Sequence, watch: Watch | None) -> torch.Tensor:
    """One optimizer step; the loss stays on the device."""
    mllm, method, optimizer, processes = run.mllm, run.method, run.optimizer, run.processes
    processes.begin_step(run.position.total)
    batches = order[run.position.step]
    method.progress = run.position.step / max(1, len(order) - 1)
    _set_rates(run, phase, len(order))
    total = torch.zeros((), device=mllm.device)
    count = sum(len(batch) for batch in batches)
    on_host = mllm.device.type == "cpu"
    for places in batches:
        own, fraction = processes.share(places)
        samples = [phase.samples[place] for place in own]
        batch = mllm.collate(samples, with_answers=True)
        share = processes.weigh(len(places), fraction, len(batch.answer_labels)) * len(places) / count
        with processes.own_draws(), method.before_forward(samples), _autocast(run):
            loss = method.loss(batch, method.answer_loss(batch)) * share
            if on_host:
                check_finite(loss.detach(), "the loss", run.position.total, run.task.name, batch.sample_ids)
            loss.backward()
        total += loss.detach()
    processes.add_gradients([param for group in optimizer.param_groups for param in group["params"]], total)
    method.before_step(optimizer)
    if watch is not None:
        watch.after_backward()
    optimizer.step()
    method.after_step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return total


def _autocast(run: Run) -> contextlib.AbstractContextManager:
    if not run.config.bf16:
        return contextlib.nullcontext()
    return torch.autocast(run.mllm.device.type, dtype=torch.bfloat16)


def _evaluate(run: Run, after: int | None) -> None:
    """Answer every task's test items with what the run has learned and add a row to the matrix."""
    config = run.config
    tasks = [
        task for index, task in enumerate(run.stream.tasks)
        if not config.evaluate_seen_only or (after is not None and index <= after)
    ]  # fmt: skip
    began = time.perf_counter()
    total = sum(len(task.test) for task in tasks)
    label = "zero-shot evaluation" if after is None else f"evaluation after {run.stream.tasks[after].name}"
    run.mllm.eval()
    with Progress(run.progress, label, total) as progress, _autocast(run):
        predictions = records.predict(run, tasks, progress)
    records.note_evaluation(run, after, predictions, time.perf_counter() - began)
