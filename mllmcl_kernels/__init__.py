"""Kernels for continual learning with LoRA experts: mixing, routing, masked updates, forward and backward."""

from . import ops as _ops
from .library import backends
from .ops.lora_mix import lora_mix

__all__ = ["backends", "lora_mix"]
