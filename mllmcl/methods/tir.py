"""TIR: importances as in EWC or MAS, released where the new task is like the one they belong to."""

# T tasks that have ended, d feature width

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mllmcl_kernels import importance_update_

from .base import named_under, under
from .features import answer_features, image_features, text_features
from .importance import MEASURES, ImportanceMethod, evenly_spaced

#: what tasks are compared by
MODALITIES = {"image": image_features, "question": text_features, "answer": answer_features}


@dataclass(kw_only=True)
class Tir(ImportanceMethod):
    """Sequential LoRA with a pull towards the parameters of the last task, weak where a like task owns the parameter.

        loss + strength / 2 sum_i Omega_i (1 - sim(now, owner_i)) (theta_i - theta*_i)^2
        Omega = max over tasks of Omega_t,   owner = the task that has it,   sum over all entries of Omega_t = 1
        sim(now, t) = product over image, question, answer of sigmoid(c_t),   c = standardised cosines to all old tasks

    Args:
        strength: lambda; published runs have 1e2, for LoRA up to 1e4.
        measure: what makes Omega_t, see `importance.MEASURES`.
        feature_samples: training samples of a task that its features are taken of, evenly spaced.
    """

    name: ClassVar[str] = "tir"
    summary: ClassVar[str] = "importances of old tasks, released where the new task is like the one that owns them"
    source: ClassVar[str] = "TIR (arXiv:2311.16206)"
    stores: ClassVar[str] = (
        "an importance, an anchor and a uint8 owner for each trained parameter, three mean features for each task"
    )
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = (
        "features of the model at hand (vision encoder, mean input embeddings) instead of a text encoder's; what a "
        "like task releases is held again in the task after it"
    )

    strength: float = 1e4
    measure: str = "ewc"
    feature_samples: int = 1000

    owners: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    #: `[T, d]` of each modality
    seen: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    released: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        self.now = None
        if self.feature_samples < 1:
            raise ValueError(f"feature_samples must be at least 1, got {self.feature_samples}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        if len(stream.tasks) > 256:
            raise ValueError(f"tir takes at most 256 tasks, the stream has {len(stream.tasks)}")

    def _features(self, task) -> dict[str, Tensor]:
        """Mean feature `[1, d]` of each modality, of unit length, float64: cosines lie close together."""
        samples = evenly_spaced(task.train, self.feature_samples)
        return {
            name: F.normalize(tower(self.mllm, samples).double().mean(0, keepdim=True), dim=-1)
            for name, tower in MODALITIES.items()
        }

    @torch.no_grad()
    def similarity(self, task) -> Tensor:
        """sim of the task to each old one, `[T]`."""
        features = self._features(task)
        product_T = 1.0
        for name, old_Td in self.seen.items():
            cosine_T = old_Td @ features[name][0]
            spread = cosine_T.std(correction=0)
            standard_T = torch.where(spread > 0, (cosine_T - cosine_T.mean()) / spread, 0.0)
            product_T = product_T * torch.sigmoid(standard_T)
        return product_T

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.now = task
        self._release()

    def _release(self) -> None:
        """The importances for the task at hand."""
        self.released = {}
        if self.importances and self.now is not None:
            kept_T = 1 - self.processes.of_first(self.similarity(self.now))
            self.released = {
                name: importance * kept_T.to(importance.dtype)[self.owners[name].int()]
                for name, importance in self.importances.items()
            }

    def in_force(self) -> dict[str, Tensor]:
        return self.released

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        with torch.enable_grad():
            found = self.measured(task, self.measure)
        total = torch.stack([value.sum() for value in found.values()]).sum()
        torch._foreach_div_(list(found.values()), total)
        if not self.importances:
            self.importances = {name: torch.zeros_like(value) for name, value in found.items()}
            self.owners = {name: torch.zeros_like(value, dtype=torch.uint8) for name, value in found.items()}
        largest, owners = ([store[name] for name in found] for store in (self.importances, self.owners))
        place = self.index_of(task)
        importance_update_(largest, list(found.values()), power=1, reduce="max", owners=owners, task=place)
        self.anchors = {name: param.detach().clone() for name, param in self.mllm.trained_parameters().items()}
        features = self._features(task)
        self.seen = {name: torch.cat([self.seen[name], one]) if self.seen else one for name, one in features.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        held = {**named_under("owner", self.owners), **named_under("seen", self.seen)}
        return {**super().state_tensors(), **held}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.owners, self.seen = under("owner", tensors, self.mllm), under("seen", tensors, self.mllm)
        self._release()
