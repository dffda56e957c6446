"""Options of a run, named as in transformers' TrainingArguments where that has them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal

from ..options import check_at_least, check_types

__all__ = ["TrainConfig"]

#: options that may differ between a run and its continuation: they change no number
FREE = ("output_dir", "resume", "progress", "save_steps", "num_report_samples", "shard_base")


@dataclass(kw_only=True)
class TrainConfig:
    """How a stream is trained and evaluated.

    Attributes:
        output_dir: the run folder: config, matrix, metrics, events, predictions, adapters, checkpoints, report.
        num_train_epochs: passes over a task's samples.
        max_steps: at most so many optimizer steps for each phase of a task.
        per_device_train_batch_size: samples of a forward pass, in each process.
        gradient_accumulation_steps: forward passes of an optimizer step.
        learning_rate: None takes the method's own.
        projector_learning_rate: of the projector's tensors; None takes learning_rate.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        warmup_ratio: share of a phase's steps over which the rate rises.
        lr_scheduler_type: "cosine" to zero, "linear" to zero, or "constant", after the warm-up.
        max_grad_norm: clip the global norm of the gradients to this; 0 does not clip.
        gradient_checkpointing: recompute decoder layers in the backward pass.
        bf16: autocast to bfloat16.
        shard_base: let each of several processes hold a part of the language tower's frozen layers (FSDP2), and gather
            a layer where it is used; experts and all else that may train stay whole. Evaluation then takes the time of
            one process. With one process it says nothing.
        seed: of data order, dropout and everything drawn.
        eval_batch_size: samples answered together.
        max_new_tokens: at most so many tokens for an answer.
        zero_shot: evaluate every task before the first one is learned.
        evaluate_seen_only: leave out tasks that were not learned yet.
        language_text: a file of plain text, or "python-topics" (the language reference that travels with Python): its
            perplexity before the first task and after each tells what language is lost. None does not measure it.
        save_steps: a checkpoint every so many optimizer steps, beside those at every boundary.
        logging_steps: a line in events.jsonl every so many steps.
        resume: "auto" continues what the folder holds, "never" refuses a folder that holds a run.
        progress: "auto" shows bars on a terminal and a line now and then elsewhere, "on", "off".
        num_report_samples: pictures of each task in the report.
    """

    output_dir: str
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    projector_learning_rate: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    warmup_ratio: float = 0.03
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    shard_base: bool = False
    seed: int = 0
    eval_batch_size: int = 32
    max_new_tokens: int = 8
    zero_shot: bool = True
    evaluate_seen_only: bool = False
    language_text: str | None = None
    save_steps: int = 20
    logging_steps: int = 5
    resume: Literal["auto", "never"] = "auto"
    progress: Literal["auto", "on", "off"] = "auto"
    num_report_samples: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, os.PathLike):
            self.output_dir = os.fspath(self.output_dir)
        check_types(TrainConfig, vars(self))
        if not self.output_dir.strip():
            raise ValueError(f"output_dir must be a folder, got {self.output_dir!r}")
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "max_new_tokens")
        check_at_least(self, 1, (*counts, "save_steps", "logging_steps", "max_steps"))
        rates = ("learning_rate", "projector_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm")
        check_at_least(self, 0, (*rates, "num_report_samples"))
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")

    def deciding(self) -> dict[str, object]:
        """The options that decide the numbers."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}

    def sha256(self, *more: object) -> str:
        """Digest of everything that decides the numbers, together with `more` (method, stream, model)."""
        return hashlib.sha256(json.dumps([self.deciding(), *more], sort_keys=True, default=str).encode()).hexdigest()
