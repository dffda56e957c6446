"""Routers over isolated experts: which task does a sample belong to? Each answers for a whole batch at once."""

# n samples, P prototypes, d feature width

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LetterRouter", "PrototypeRouter", "cluster", "frozen_features"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@torch.no_grad()
def frozen_features(mllm, samples: Sequence) -> Tensor:
    """Features that no training moves: mean image feature and mean token embedding, each of unit length: `[n, d]`.

    The image part is the vision encoder's output before the projector, the text part the frozen input embedding of the
    question's tokens. On the CPU, float32.
    """
    image = mllm.image_features(samples).float().mean(1).cpu()
    ids = mllm.tokenizer([sample.question for sample in samples], add_special_tokens=False)["input_ids"]
    table = mllm.model.get_input_embeddings()
    rows = [table(torch.tensor(row, device=mllm.device)).float().mean(0).cpu() for row in ids]
    return torch.cat([F.normalize(image, dim=-1), F.normalize(torch.stack(rows), dim=-1)], dim=-1)


def cluster(points: Tensor, count: int, rounds: int = 20) -> Tensor:
    """k-means centres `[count, d]` from a farthest-point start: deterministic, no draw.

    Args:
        points: `[n, d]`. count: centres; at most n are returned.
    """
    count = min(count, len(points))
    centres = points.mean(0, keepdim=True)
    centres = points[torch.cdist(points, centres).argmin()][None]
    while len(centres) < count:
        far = torch.cdist(points, centres).amin(1).argmax()
        centres = torch.cat([centres, points[far][None]])
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(1)
        one_hot = F.one_hot(owner, count).to(points.dtype)
        sizes = one_hot.sum(0).clamp_min(1.0)
        moved = one_hot.t() @ points / sizes[:, None]
        centres = torch.where((one_hot.sum(0) > 0)[:, None], moved, centres)
    return centres


class PrototypeRouter:
    """Nearest prototype on frozen features, by cosine; training-free.

    Source: the training-free prototype router (RePro) of "Is our benchmark enough?" (2026), on MLLM-CL.

    Args:
        mllm: whose frozen encoder and embeddings are used. per_task: prototypes of a task.
    """

    def __init__(self, mllm, per_task: int):
        self.mllm, self.per_task = mllm, per_task
        self.prototypes = torch.zeros(0, 0)
        self.owners = torch.zeros(0, dtype=torch.int64)

    def learn(self, task: int, samples: Sequence) -> None:
        """Set the prototypes of a task; once more replaces them."""
        centres = cluster(frozen_features(self.mllm, samples), self.per_task)
        others = self.owners != task
        kept = self.prototypes[others] if len(self.owners) else centres[:0]
        self.prototypes = torch.cat([kept, centres])
        self.owners = torch.cat([self.owners[others], torch.full((len(centres),), task)])

    def __call__(self, samples: Sequence) -> Tensor:
        """The nearest task of each sample, int64 `[n]`; -1 while no task is known."""
        if not len(self.owners):
            return torch.full((len(samples),), -1)
        features = F.normalize(frozen_features(self.mllm, samples), dim=-1)
        return self.owners[(features @ F.normalize(self.prototypes, dim=-1).t()).argmax(1)]


class LetterRouter:
    """The MLLM itself, with an expert of its own, names the letter of the task.

    The prompt lists one sentence of expertise for each letter, then the question. Only letters of known tasks can win:
    their logits are compared at the first answer position, so no answer is illegal and nothing is decoded.

    Source: MR-LoRA (arXiv:2506.05453), whose public code decodes text and takes a random expert for an illegal one.

    Args:
        mllm: the model. tasks: all tasks of the stream, in order. expert: index of the router's own expert.
    """

    def __init__(self, mllm, tasks: Sequence, expert: int, batch_size: int = 16):
        self.mllm, self.tasks, self.expert, self.batch_size = mllm, tasks, expert, batch_size
        self.known = 0

    def as_question(self, sample, known: int):
        """The sample with the routing prompt as question and its task's letter as answer."""
        pool = " ".join(f"{LETTERS[place]}: {task.description}" for place, task in enumerate(self.tasks[:known]))
        names = [task.name for task in self.tasks]
        prompt = (
            f"Experts: {pool} Which expert should answer the question below? Do not answer the question itself.\n"
            f"Question: {sample.question}\nReply with one letter."
        )
        place = names.index(sample.task)
        return dataclasses.replace(
            sample, id=f"{sample.id}/route{known}", question=prompt, answer=LETTERS[place if place < known else 0]
        )

    @torch.no_grad()
    def __call__(self, samples: Sequence) -> Tensor:
        """The task of each sample, int64 `[n]`; -1 while no task is known."""
        if self.known < 2:
            return torch.full((len(samples),), self.known - 1)
        return torch.cat(
            [self._route(samples[start : start + self.batch_size]) for start in range(0, len(samples), self.batch_size)]
        )

    def _route(self, samples: Sequence) -> Tensor:
        asked = [self.as_question(sample, self.known) for sample in samples]
        letters = [dataclasses.replace(asked[0], answer=LETTERS[place]) for place in range(self.known)]
        first = self.mllm.collate(letters, with_answers=True).answer_labels.view(self.known, -1)[:, 0]
        batch = self.mllm.collate(asked, with_answers=True)
        with self.mllm.use_experts(torch.full((len(asked),), self.expert)):
            logits = self.mllm.answer_logits(batch)
        # letter and end token: the first of the two predicts the letter
        logits = logits.view(len(asked), -1, logits.shape[-1])[:, 0]
        return logits.index_select(1, first).argmax(1).cpu()
