"""DualPrompt: a general prefix in the first layers for all tasks, and one of its own for each task behind them."""

# B samples, T tasks

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.prefixes import attention_layers
from .keys import KEYS, attach_keys, nearest, query
from .prompted import PromptMethod


@dataclass(kw_only=True)
class DualPrompt(PromptMethod):
    """Prefixes of keys and values: G, shared, in the first layers, and E_t, of the task, in those behind.

        attention(q, [K_p; k], [V_p; v])
        loss = CE + pull (1 - mean cos(q, key_t)),   q frozen features of image and question

    In training the task is known; at test a sample has E of the task whose key is nearest. G trains always, E_t and
    key_t during task t only.

    Args:
        length: of E. general_length: of G.
        general_layers: how many of the first layers have G; None: as 2 of 12. expert_layers: how many behind them have
            E; None: as 3 of 12.
        pull: weight of the term that draws the key to its task's samples.
    """

    name: ClassVar[str] = "dual_prompt"
    summary: ClassVar[str] = "a general prefix in the first layers and a task's own prefix behind, by key"
    source: ClassVar[str] = "DualPrompt (arXiv:2204.04799)"
    stores: ClassVar[str] = "a prefix and a key for each task, one general prefix"
    at_test: ClassVar[str] = "nothing: a task's prefix by key, sample by sample"
    deviations: ClassVar[str] = (
        "the query is mean image feature and mean embedding of the question, where a vision transformer has its class "
        "token; the head of the model stays frozen; as large a share of the layers as in the paper"
    )
    learning_rate: ClassVar[float] = 5e-3

    length: int = 20
    general_length: int = 5
    general_layers: int | None = None
    expert_layers: int | None = None
    pull: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pull < 0:
            raise ValueError(f"pull must not be negative, got {self.pull}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        self.keys = attach_keys(mllm, len(stream.tasks), stream)

    def add_prompts(self) -> None:
        mllm, num_tasks = self.mllm, len(self.stream.tasks)
        depth = len(attention_layers(mllm.model.get_submodule(mllm.language_path)))
        general = self.general_layers or max(1, depth * 2 // 12)
        expert = self.expert_layers or max(1, depth * 3 // 12)
        mllm.add_prefixes(
            num_tasks, self.length, range(general, general + expert), self.general_length, range(general)
        )  # fmt: skip

    @torch.no_grad()
    def route(self, samples: Sequence) -> Tensor | None:
        if not self.known:
            return None
        return nearest(self.keys(query(self.mllm, samples))[:, : self.known], 1)

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        self.cosine_B = self.keys(query(self.mllm, samples))[:, self.acting]
        return self.mllm.use_prompts(torch.full((len(samples),), self.acting))

    def loss(self, batch, loss: Tensor) -> Tensor:
        return loss + self.pull * (1.0 - self.sample_mean(self.cosine_B))

    def parameter_masks(self) -> dict:
        rows = self.task_rows(len(self.stream.tasks))
        return {"prefixes.own": rows, f"{KEYS}.weight": rows}
