"""L2P: a pool of prompts with keys; each sample takes the prompts whose keys are nearest to it."""

# B samples, N prompts in the pool, k prompts of a sample

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .keys import attach_keys, nearest, query, voted
from .prompted import PromptMethod


@dataclass(kw_only=True)
class L2P(PromptMethod):
    """One pool for all tasks, trained on one after the other; the k nearest keys of a sample name its prompts.

        ids  = top-k of cos(q, key),   q frozen features of image and question
        loss = CE + pull mean_samples sum_{chosen} (1 - cos(q, key))

    Args:
        pool: prompts in the pool.
        chosen: k, prompts of a sample.
        pull: weight of the term that draws the chosen keys to the samples.
        legacy: a batch votes, and all its samples take the k prompts that most of them would take.
    """

    name: ClassVar[str] = "l2p"
    summary: ClassVar[str] = "a pool of prompts with keys, the nearest ones put before each sample"
    source: ClassVar[str] = "L2P (arXiv:2112.08654)"
    stores: ClassVar[str] = "one pool of prompts and keys, nothing per task"
    at_test: ClassVar[str] = "nothing: prompts by key, sample by sample"
    deviations: ClassVar[str] = (
        "the query is mean image feature and mean embedding of the question, where a vision transformer has its "
        "class token; the head of the model stays frozen; legacy: one choice for a batch, in training and at test"
    )
    learning_rate: ClassVar[float] = 3e-2

    length: int = 5
    pool: int = 10
    chosen: int = 5
    pull: float = 0.1
    legacy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.pool:
            raise ValueError(f"chosen must be in 1..pool = {self.pool}, got {self.chosen}")
        if self.pull < 0:
            raise ValueError(f"pull must not be negative, got {self.pull}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        self.keys = attach_keys(mllm, self.pool, stream)

    def _num_prompts(self) -> int:
        return self.pool

    def choose(self, samples: Sequence) -> tuple[Tensor, Tensor]:
        """The prompts of each sample `[B, k]`, and the cosines with their keys."""
        cosine_BN = self.keys(query(self.mllm, samples))
        ids_Bk = nearest(cosine_BN, self.chosen)
        if self.legacy:
            ids_Bk = voted(ids_Bk, self.pool)
        return ids_Bk, cosine_BN.gather(1, ids_Bk)

    @torch.no_grad()
    def route(self, samples: Sequence) -> Tensor | None:
        return self.choose(samples)[0] if self.known else None

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        ids_Bk, self.cosine_Bk = self.choose(samples)
        return self.mllm.use_prompts(ids_Bk)

    def loss(self, batch, loss: Tensor) -> Tensor:
        return loss + self.pull * self.sample_mean((1.0 - self.cosine_Bk).sum(1))
