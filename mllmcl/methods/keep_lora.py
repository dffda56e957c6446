"""KeepLoRA: a task's LoRA reads the main directions of its gradient, outside of what earlier knowledge reads."""

# N out, K in, R rank, k kept directions, m directions on offer

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import project_grads_

from .subspaces import SubspaceMethod, fewest

#: samples that a gradient is taken of together
BATCH = 8


@dataclass(kw_only=True)
class KeepLora(SubspaceMethod):
    """A LoRA for each task whose A is drawn from the task's own gradient and stays; only B trains.

        G = dL/dW,   A = the first R right singular vectors of G - G U U^T,   B = 0         U [K, k] of each linear
        y = x W_t^T + s (drop(x) A^T) B^T,   W_{t+1} = W_t + s B A

    U starts as the right singular vectors of the pretrained W that hold a share `weight_energy` of |W|^2. After each
    task it gains the fewest leading right singular vectors of G - G U U^T, G taken again, that bring |G U|^2 to
    `gradient_energy` |G|^2. While gradients are taken they need as much room as the adapted weights in float32.

    A's rows have length 1 and lie along the gradient, where most of x lies too: a step of B moves y much further than
    in a LoRA of the same scaling.

    Args:
        rank, alpha: 32 and 8 in the public code's scripts for UCIT, with a learning rate of 2e-4; those for MLLM-DCL
            have 64 and 128, with 2e-5.
        weight_energy: share of the pretrained weight that is kept.
        gradient_energy: share of each task's gradient that is kept.
        gradient_share: share of the task's training data that gradients are the mean over.
    """

    name: ClassVar[str] = "keep_lora"
    summary: ClassVar[str] = "LoRA along the task's gradient, off the main directions of base and earlier tasks"
    source: ClassVar[str] = "KeepLoRA (arXiv:2601.19659), its public code for multimodal LLMs"
    stores: ClassVar[str] = "the merged weights, one LoRA and the projector; a basis of kept directions for each linear"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = (
        "merges into the weights that hold the earlier tasks, where MCITlib merges each task into the raw base and so "
        "loses them; an exact SVD instead of a randomised one; kept after a task are directions of its gradient, as in "
        "the public code, where the paper says features; the projector trains in the first task only"
    )
    #: a layer of which all directions are kept has nothing left to train
    shuts_off: ClassVar[bool] = True

    rank: int = 32
    alpha: float = 8.0
    rslora: bool = False
    weight_energy: float = 0.6
    gradient_energy: float = 0.99
    gradient_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("weight_energy", "gradient_energy", "gradient_share"):
            value = getattr(self, option)
            if not 0 < value <= 1:
                raise ValueError(f"{option} must be in (0, 1], got {value}")

    @torch.no_grad()
    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        place, layers = self.index_of(task), self.mllm.expert_layers
        if not self.bases:
            for path, layer in layers.items():
                nothing_K0 = layer.lora_a.new_zeros(layer.in_features, 0)
                self.begin(path, _leading(layer.weight, nothing_K0, self.weight_energy).to(nothing_K0.dtype))
        for path, gradient_NK in self._gradients(task).items():
            lora_a, basis_Kk = layers[path].lora_a.requires_grad_(False), self.before(path, place)
            _, row_mK = _outside(gradient_NK, basis_Kk)
            lora_a.zero_()[: len(row_mK)] = row_mK[: self.rank]
            # beyond the rank of the gradient singular vectors are any, those of U too
            project_grads_([lora_a], [basis_Kk])

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        place = self.index_of(task)
        for path, gradient_NK in self._gradients(task).items():
            self.grow(path, place, _leading(gradient_NK, self.before(path, place), self.gradient_energy))

    @torch.enable_grad()
    def _gradients(self, task) -> dict[str, Tensor]:
        """G of each linear over a share of the task's samples, float32 or better; no parameter's `grad` is touched."""
        mllm, gradients = self.mllm, {}
        count = max(1, round(self.gradient_share * len(task.train)))
        for part in self.batches(task, count, BATCH):
            batch = mllm.collate(part, with_answers=True)
            with self._gathering(gradients, len(part) / count):
                with self.autocast():
                    loss = self.answer_loss(batch)
                # a path through every layer; what it ends in is not needed
                torch.autograd.grad(loss, [layer.lora_b for layer in mllm.expert_layers.values()])
        return gradients

    @contextlib.contextmanager
    def _gathering(self, gradients: dict[str, Tensor], weight: float) -> Iterator[None]:
        """Add weight * dL/dW of what runs forward and backward within the context, from x and dL/dy of each layer."""

        def see(layer, args, y) -> None:
            y.register_hook(lambda dy: add(layer.path, args[0].detach(), dy))

        def add(path: str, x: Tensor, dy: Tensor) -> None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            gradient_NK = weight * (dy.flatten(0, -2).T.to(dtype) @ x.flatten(0, -2).to(dtype))
            gradients[path] = gradients[path] + gradient_NK if path in gradients else gradient_NK

        with contextlib.ExitStack() as hooks:
            for layer in self.mllm.expert_layers.values():
                hooks.enter_context(layer.register_forward_hook(see))
            yield


def _outside(rows_nK: Tensor, basis_Kk: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values `[m]` and right singular vectors `[m, K]` of what of the rows is outside of the basis.

    In float64, so that the basis itself stays apart from what is small.
    """
    outside_nK = rows_nK.to(torch.float64, copy=True)
    project_grads_([outside_nK], [basis_Kk])
    _, value_m, row_mK = torch.linalg.svd(outside_nK, full_matrices=False)
    return value_m.square(), row_mK


def _leading(rows_nK: Tensor, basis_Kk: Tensor, share: float) -> Tensor:
    """The fewest directions `[K, m]` that hold, together with the basis, a share of the energy of the rows."""
    energy_m, row_mK = _outside(rows_nK, basis_Kk)
    return row_mK[: fewest(energy_m, rows_nK.double().square().sum(), share)].T
