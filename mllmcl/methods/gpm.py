"""GPM: updates stay outside of the space that the inputs of each layer took up in old tasks."""

# B samples, S positions, K width of an input, k directions of it, n tokens

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import project_grads_

from .subspaces import SubspaceMethod, fewest

#: samples that go through the model together
BATCH = 32


@dataclass(kw_only=True)
class Gpm(SubspaceMethod):
    """A LoRA for each task whose A has no part in the space of old inputs, so that s B A x = 0 for every x in it.

        A <- A - (A M) M^T,   dL/dA <- dL/dA - (dL/dA M) M^T                M [K, k] of each input, orthonormal columns

    After task t, with C = sum x x^T over tokens of the task, M gains the fewest leading eigenvectors of
    (1 - M M^T) C (1 - M M^T) such that

        trace(M^T C M) >= (threshold + threshold_step * t) trace(C)

    Layers that read one and the same input share C and M.

    Args:
        threshold: share of the energy of the first task's inputs that is kept.
        threshold_step: added with each task, up to 1 in all.
        basis_samples: training samples whose inputs are taken.
    """

    name: ClassVar[str] = "gpm"
    summary: ClassVar[str] = "updates orthogonal to the inputs that each layer had in earlier tasks"
    source: ClassVar[str] = "GPM (arXiv:2103.09762)"
    stores: ClassVar[str] = "the merged weights, one LoRA and the projector; a basis of old inputs, shared by layers"
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = (
        "on a LoRA that is merged, where only A has to be projected; A itself is projected after each step too, since "
        "Adam and weight decay leave the subspace; directions from the eigenvectors of a covariance instead of an SVD "
        "of the inputs; the projector trains in the first task only"
    )

    #: a layer whose inputs took up the whole space has nothing left to train
    shuts_off: ClassVar[bool] = True

    threshold: float = 0.97
    threshold_step: float = 0.003
    basis_samples: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1 or self.threshold_step < 0:
            raise ValueError(
                f"threshold must be in (0, 1] and threshold_step at least 0, "
                f"got {self.threshold} and {self.threshold_step}"
            )
        if self.basis_samples < 1:
            raise ValueError(f"basis_samples must be at least 1, got {self.basis_samples}")
        #: name of each layer to that of the first layer with the same input, which names its basis
        self.leaders: dict[str, str] = {}
        #: M of each layer for the task at hand
        self.closed: list[Tensor] = []

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        place = self.index_of(task)
        self.closed = [self.before(self.leaders[path], place) for path in self.mllm.expert_layers] if place else []
        self._project()

    def _project(self, *, grads: bool = False) -> None:
        """Take what lies in the closed space out of every A, or out of its gradient."""
        if self.closed:
            rows = [layer.lora_a for layer in self.mllm.expert_layers.values()]
            project_grads_([a.grad if grads else a.detach() for a in rows], self.closed)

    def before_step(self, optimizer) -> None:
        super().before_step(optimizer)
        self._project(grads=True)

    def after_step(self, optimizer) -> None:
        super().after_step(optimizer)
        self._project()

    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        place = self.index_of(task)
        share = min(1.0, self.threshold + self.threshold_step * place)
        for name, gram_KK in self._grams(task).items():
            if name not in self.bases:
                self.begin(name, gram_KK.new_zeros(len(gram_KK), 0))
            basis_Kk, outside_KK = self.before(name, place), gram_KK.double()
            for _ in range(2):
                outside_KK = outside_KK.T.contiguous()
                project_grads_([outside_KK], [basis_Kk])
            energy_K, vector_KK = torch.linalg.eigh(outside_KK)
            count = fewest(energy_K.flip(0), gram_KK.trace(), share)
            self.grow(name, place, vector_KK.flip(1)[:, :count])

    @torch.no_grad()
    def _grams(self, task) -> dict[str, Tensor]:
        """C of each distinct input, float32 or better, by the name of the first layer that reads it."""
        mllm, grams = self.mllm, {}
        for part in self.batches(task, self.basis_samples, BATCH):
            batch = mllm.collate(part, with_answers=True)
            with self._gathering(grams, batch.attention_mask.bool()), self.autocast():
                mllm.hidden_states(batch)
        return grams

    @contextlib.contextmanager
    def _gathering(self, grams: dict[str, Tensor], mask_BS: Tensor) -> Iterator[None]:
        """Add what the layers read within the context to `grams`, and note who reads the same."""
        last = [None, ""]

        def see(layer, args) -> None:
            if args[0] is last[0]:
                self.leaders[layer.path] = last[1]
                return
            last[:] = args[0], layer.path
            self.leaders[layer.path] = layer.path
            x_nK = args[0][mask_BS]
            x_nK = x_nK.to(torch.promote_types(x_nK.dtype, torch.float32))
            with torch.autocast(x_nK.device.type, enabled=False):
                gram_KK = x_nK.T @ x_nK
            grams[layer.path] = grams[layer.path] + gram_KK if layer.path in grams else gram_KK

        with contextlib.ExitStack() as hooks:
            for layer in self.mllm.expert_layers.values():
                hooks.enter_context(layer.register_forward_pre_hook(see))
            yield

    def state_values(self) -> dict:
        return {**super().state_values(), "leaders": self.leaders}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.leaders = dict(values["leaders"])
