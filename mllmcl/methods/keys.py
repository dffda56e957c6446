"""Keys in the space of frozen features: a sample is given what belongs to the keys nearest to it."""

# B samples, N keys, k chosen keys, G groups, d feature width

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import image_features, text_features

__all__ = ["KEYS", "Keys", "attach_keys", "cosines", "nearest", "query", "voted"]

#: name of the keys in the model
KEYS = "prompt_keys"


def query(mllm, samples: Sequence) -> Tensor:
    """What a sample is looked up with: its frozen image and text features side by side, `[B, d]`."""
    return torch.cat([image_features(mllm, samples), text_features(mllm, samples)], dim=-1)


def cosines(one_Bd: Tensor, other_Nd: Tensor, groups: int = 1) -> Tensor:
    """Cosines `[B, N]`, in float32 or better also under autocast; the mean of those of G groups of features.

    Where d is no multiple of G, zeros are added.
    """
    dtype = torch.promote_types(other_Nd.dtype, torch.float32)
    units = []
    for rows in (one_Bd, other_Nd):
        wide = F.pad(rows.to(dtype), (0, -rows.shape[1] % groups)).unflatten(1, (groups, -1))
        units.append(F.normalize(wide, dim=-1).flatten(1))
    with torch.autocast(one_Bd.device.type, enabled=False):
        return units[0] @ units[1].t() / groups


class Keys(nn.Module):
    """`.weight` `[N, d]`; gives the cosines `[B, N]` of queries `[B, d]`, the mean over groups of features."""

    def __init__(self, weight_Nd: Tensor, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(weight_Nd)
        self.groups = groups

    def forward(self, query_Bd: Tensor) -> Tensor:
        return cosines(query_Bd, self.weight, self.groups)


def attach_keys(mllm, num_keys: int, stream) -> Keys:
    """Keys for the queries of a stream, drawn from -1..1, as a part of the model that trains."""
    width = query(mllm, stream.tasks[0].train[:1]).shape[1]
    return mllm.attach(KEYS, Keys(torch.empty(num_keys, width).uniform_(-1.0, 1.0)))


def nearest(cosine_BN: Tensor, count: int) -> Tensor:
    """Ids of the `count` most alike keys of each sample, the nearest first: int64 `[B, k]`."""
    return cosine_BN.detach().topk(count, dim=-1).indices


def voted(ids_Bk: Tensor, num_keys: int) -> Tensor:
    """The k ids that most samples of the batch have, the same for all, int64 `[B, k]`; a tie goes to the lower id."""
    votes_N = F.one_hot(ids_Bk, num_keys).sum((0, 1))
    ranked_N = votes_N * num_keys - torch.arange(num_keys, device=ids_Bk.device)
    return ranked_N.topk(ids_Bk.shape[1]).indices.expand_as(ids_Bk)
