"""ModalPrompt: soft tokens for each task, put before the samples whose image and question are near to them."""

# B samples, T tasks learned, L tokens of a prompt, k prompts of a sample, D width of the model, v and u feature widths

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import image_features, text_features
from .keys import cosines
from .prompted import BANK, PromptMethod


@dataclass(kw_only=True)
class ModalPrompt(PromptMethod):
    """L soft tokens P_t and a head h_t for each task; the k prompts most like a sample stand before its text.

        p_t   = mean over L of h_t(P_t),    h_t = Linear(D -> D), SiLU, Linear(D -> features)
        score = guidance cos(v, p_t) + (1 - guidance) cos(u, p_t)
        loss  = CE + (1 - mean cos(v, p_t)) + (1 - mean cos(u, p_t))

    with v the frozen image feature and u the frozen text feature of a sample. In training the k - 1 best earlier
    prompts come first and the current one nearest to the text; at test the k best of all, the best last. Only P_t and
    h_t change during task t, and p_t is kept from its end on.

    Args:
        transfer: k, prompts of a sample.
        guidance: weight of the image in the score.
        legacy: k = 1, as in MCITlib.
    """

    name: ClassVar[str] = "modal_prompt"
    summary: ClassVar[str] = "soft tokens for each task, the nearest tasks' tokens put before each sample"
    source: ClassVar[str] = "ModalPrompt (arXiv:2410.05849); legacy: MCITlib (arXiv:2508.07307)"
    stores: ClassVar[str] = "soft tokens, a head and a prototype for each task"
    at_test: ClassVar[str] = "nothing: prompts by similarity of image and question, sample by sample"
    deviations: ClassVar[str] = (
        "image and text features of the model at hand share no space as CLIP's do, so a head has an output for each; "
        "one learning rate for tokens and heads; legacy: one prompt for each sample"
    )
    learning_rate: ClassVar[float] = 2e-4

    transfer: int = 3
    guidance: float = 0.5
    legacy: bool = False

    def __post_init__(self) -> None:
        if self.transfer < 1:
            raise ValueError(f"transfer must be at least 1, got {self.transfer}")
        if not 0 <= self.guidance <= 1:
            raise ValueError(f"guidance must be in [0, 1], got {self.guidance}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        image_v, text_u = self._features(stream.tasks[0].train[:1])
        self.widths = image_v.shape[1], text_u.shape[1]
        inner = text_u.shape[1]
        heads = [
            nn.Sequential(nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, sum(self.widths))) for _ in stream.tasks
        ]
        self.heads = mllm.attach("prompt_heads", nn.ModuleList(heads))
        self.prototypes = torch.zeros(0, sum(self.widths), device=mllm.device)

    def _features(self, samples: Sequence) -> tuple[Tensor, Tensor]:
        return image_features(self.mllm, samples), text_features(self.mllm, samples)

    @property
    def num_chosen(self) -> int:
        return 1 if self.legacy else self.transfer

    def prototype(self, task: int) -> Tensor:
        """p_t `[v + u]`."""
        weight_LD = self.mllm.prompts.weight[task]
        with torch.autocast(weight_LD.device.type, enabled=False):
            return self.heads[task](weight_LD).mean(0)

    def cosines(self, features: tuple[Tensor, Tensor], prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of image and text with their parts of the prototypes `[T, v + u]`, each `[B, T]`."""
        parts = prototypes.split(self.widths, dim=-1)
        return tuple(cosines(own, part) for own, part in zip(features, parts, strict=True))

    def best(self, features: tuple[Tensor, Tensor], num_tasks: int, count: int) -> Tensor:
        """Of the first tasks those with the highest scores, the best last: int64 `[B, min(count, num_tasks)]`."""
        image_BT, text_BT = self.cosines(features, self.prototypes[:num_tasks])
        score_BT = self.guidance * image_BT + (1.0 - self.guidance) * text_BT
        return score_BT.topk(min(count, num_tasks), dim=1).indices.flip(1)

    @torch.no_grad()
    def route(self, samples: Sequence) -> Tensor | None:
        return self.best(self._features(samples), self.known, self.num_chosen) if self.known else None

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        for place, head in enumerate(self.heads):
            head.requires_grad_(place == self.acting)

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        self.seen = self._features(samples)
        earlier_Bk = self.best(self.seen, self.acting, self.num_chosen - 1)
        return self.mllm.use_prompts(F.pad(earlier_Bk, (0, 1), value=self.acting))

    def loss(self, batch, loss: Tensor) -> Tensor:
        image_B1, text_B1 = self.cosines(self.seen, self.prototype(self.acting)[None])
        return loss + (1.0 - self.sample_mean(image_B1)) + (1.0 - self.sample_mean(text_B1))

    def parameter_masks(self) -> dict:
        return {BANK: self.task_rows(len(self.heads))}

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        self.prototypes = torch.cat([self.prototypes[: self.acting], self.prototype(self.acting)[None]])

    def state_tensors(self) -> dict[str, Tensor]:
        return {"prototypes": self.prototypes}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.prototypes = tensors["prototypes"].to(self.mllm.device)
