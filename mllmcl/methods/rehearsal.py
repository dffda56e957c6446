"""Rehearsal: sequential LoRA with a fraction of every earlier task's data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import LoraMethod
from .buffers import RehearsalMethod


@dataclass(kw_only=True)
class Rehearsal(RehearsalMethod, LoraMethod):
    """Sequential LoRA on the current task plus a fixed share of the data of every earlier one; the loss stays."""

    name: ClassVar[str] = "rehearsal"
    summary: ClassVar[str] = "sequential LoRA on the task plus a share of the data of every earlier one"
    source: ClassVar[str] = "Srivastava et al. (arXiv:2410.19925), its Rehearsal"
    stores: ClassVar[str] = "ids of a `share` of the samples of each task"
    at_test: ClassVar[str] = "nothing"
