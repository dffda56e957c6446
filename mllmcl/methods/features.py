"""Features of samples that no training moves, and what a task looks like in them.

They come from the model at hand: the output of its vision encoder before the projector, and the input embeddings of its
language model. There is no contrastive text encoder unless the model itself holds one.
"""

# n samples, T tasks, d feature width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TOWERS", "Anchors", "answer_features", "frozen_features", "image_features", "text_features"]


#: samples of which features are made at once
CHUNK = 64


def _in_chunks(tower: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The tower, given a part of the samples at a time: token features of a whole training set fit nowhere."""

    @functools.wraps(tower)
    @torch.no_grad()
    def chunked(mllm, samples: Sequence) -> Tensor:
        samples = list(samples)
        return torch.cat([tower(mllm, samples[at : at + CHUNK]) for at in range(0, len(samples), CHUNK)])

    return chunked


@_in_chunks
def image_features(mllm, samples: Sequence) -> Tensor:
    """Mean over the tokens of the vision encoder's output, of unit length: `[n, d]` float32 on the model's device.

    A sample without an image has zeros, which are like nothing.
    """
    has_image = torch.tensor([sample.image is not None for sample in samples])
    seen = [sample for sample in samples if sample.image is not None]
    if len(seen) == len(samples):
        return F.normalize(mllm.image_features(seen).float().mean(1), dim=-1)
    blank = dataclasses.replace(samples[0], id="blank", image=np.zeros((32, 32, 3), np.uint8))
    mean_nd = mllm.image_features([blank, *seen]).float().mean(1)
    found = mean_nd.new_zeros(len(samples), mean_nd.shape[1])
    found[has_image.to(found.device)] = F.normalize(mean_nd[1:], dim=-1)
    return found


@_in_chunks
def text_features(mllm, samples: Sequence) -> Tensor:
    """Mean input embedding of the question's tokens, of unit length: `[n, d]` float32 on the model's device."""
    return _mean_embeddings(mllm, [sample.question for sample in samples])


@_in_chunks
def answer_features(mllm, samples: Sequence) -> Tensor:
    """The same of the answer's tokens."""
    return _mean_embeddings(mllm, [sample.answer for sample in samples])


def _mean_embeddings(mllm, texts: Sequence[str]) -> Tensor:
    rows = mllm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    starts = [0, *accumulate(len(row) for row in rows)][:-1]
    flat = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64, device=mllm.device)
    table = mllm.model.get_input_embeddings()(flat).float()
    places = torch.arange(len(flat), device=mllm.device)
    return F.normalize(F.embedding_bag(places, table, torch.tensor(starts, device=mllm.device), mode="mean"), dim=-1)


TOWERS: dict[str, Callable[..., Tensor]] = {"image": image_features, "text": text_features}


def frozen_features(mllm, samples: Sequence) -> Tensor:
    """Image and text features side by side, `[n, d]` float32 on the CPU."""
    return torch.cat([tower(mllm, samples) for tower in TOWERS.values()], dim=-1).cpu()


class Anchors:
    """The mean feature of each task's training samples in some towers.

    Taken in one pass over the training set; a running mean over whole epochs of training ends at the same.

    Args:
        mllm: whose features. towers: names of `TOWERS`.
    """

    def __init__(self, mllm, towers: Sequence[str] = tuple(TOWERS)):
        self.mllm = mllm
        self.means = {name: torch.zeros(0, 0) for name in towers}

    def learn(self, place: int, samples: Sequence) -> None:
        """Set the anchor of a task; once more replaces it."""
        for name, feature_nd in self.features(samples).items():
            mean_1d = feature_nd.mean(0, keepdim=True)
            old_Td = self.means[name] if len(self.means[name]) else mean_1d[:0]
            self.means[name] = torch.cat([old_Td[:place], mean_1d, old_Td[place + 1 :]])

    def features(self, samples: Sequence) -> dict[str, Tensor]:
        """Tower name to features `[n, d]` on the CPU."""
        return {name: TOWERS[name](self.mllm, samples).cpu() for name in self.means}

    def cosines(self, features: dict[str, Tensor]) -> Tensor:
        """Cosine of each sample and each task's anchor in every tower, `[towers, n, T]`."""
        return torch.stack(
            [F.normalize(features[name], dim=-1) @ F.normalize(self.means[name], dim=-1).t() for name in self.means]
        )

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"anchors/{name}": value for name, value in self.means.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.means = {name: tensors[f"anchors/{name}"] for name in self.means}
