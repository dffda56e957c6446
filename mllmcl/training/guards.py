"""Checks that a run trains what it says: gradients arrive where they should, frozen things stay, losses are numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllmcl_kernels import Mask

__all__ = ["Watch", "check_finite"]


def check_finite(value: Tensor, what: str, step: int, task: str, ids: Sequence[str]) -> None:
    """Raise FloatingPointError unless `value` is finite."""
    if not bool(torch.isfinite(value)):
        raise FloatingPointError(f"{what} is {float(value)} at step {step} of task {task}; samples {', '.join(ids)}")


def _held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Watch:
    """Looks at the first steps of a run and raises with the names when they do not train what they should.

    Every trainable tensor has to have had a non-zero gradient after three steps (A of a LoRA has none in the first, B
    being zero), unless the method says that it shuts some off, and nothing frozen may have moved: neither the base nor
    the masked-out rows of a stack.
    """

    STEPS = 3

    def __init__(
        self, model: nn.Module, trainable: dict[str, nn.Parameter], masks: dict[str, Mask], shuts_off: bool = False
    ):
        self.model, self.trainable, self.masks, self.shuts_off = model, trainable, masks, shuts_off
        self.arrived: dict[str, Tensor] = {}
        self.seen = 0
        self.before = self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        sums = {
            name: _held(parameter.detach()).sum(dtype=torch.float64)
            for name, parameter in self.model.named_parameters()
            if not parameter.requires_grad
        }
        for name, mask in self.masks.items():
            if name in self.trainable:
                parameter = self.trainable[name].detach()
                sums[f"{name} (masked out)"] = torch.where(mask.expand(parameter.shape), 0.0, parameter).clone()
        return sums

    def after_backward(self) -> None:
        """Note which gradients are not zero; on the device."""
        for name, parameter in self.trainable.items():
            if parameter.grad is not None:
                some = parameter.grad.any()
                self.arrived[name] = self.arrived[name] | some if name in self.arrived else some

    def after_step(self) -> bool:
        """True while there is more to watch; raises RuntimeError at the last look."""
        self.seen += 1
        if self.seen < self.STEPS:
            return True
        silent = [name for name in self.trainable if not bool(self.arrived.get(name, False))]
        if silent and not self.shuts_off:
            raise RuntimeError(
                f"{len(silent)} trainable tensors had no gradient in {self.STEPS} steps, e.g. {', '.join(silent[:3])}"
            )
        after = self._frozen()
        moved = [name for name, value in self.before.items() if not torch.equal(value, after[name])]
        if moved:
            raise RuntimeError(f"{len(moved)} frozen tensors moved in {self.STEPS} steps, e.g. {', '.join(moved[:3])}")
        return False
