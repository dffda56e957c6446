"""Questions as counts of their words, rare words counting more (TF-IDF)."""

# n texts, W words known, T rows to compare with, o occurrences of known words

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Vocabulary", "holding", "words"]


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case."""
    return re.findall(r"\w+", text.lower())


def holding(texts: Sequence[str]) -> Counter:
    """Word to how many of the texts hold it, in an order that is the same in every process."""
    found = Counter()
    for text in texts:
        found.update(dict.fromkeys(words(text), 1))
    return found


class Vocabulary:
    """Words that count, and how much.

        weight(w) = ln((1 + N) / (1 + df(w))) + 1

    Args:
        frequencies: word to df, how many texts hold it. total: N, how many texts there are.
    """

    def __init__(self, frequencies: Mapping[str, int], total: int):
        self.column = {word: place for place, word in enumerate(frequencies)}
        df_W = torch.tensor(list(frequencies.values()), dtype=torch.float64)
        self.weight_W = torch.log((1 + total) / (1 + df_W)) + 1

    def _found(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text and word of every occurrence of a known word, two int64 `[o]`."""
        found = [
            (row, self.column[word]) for row, text in enumerate(texts) for word in words(text) if word in self.column
        ]
        return torch.tensor(found, dtype=torch.int64).reshape(len(found), 2).unbind(1)

    def weighted(self, counts: Sequence[Mapping[str, int]]) -> Tensor:
        """Counts of known words times their weights, float64 `[T, W]`."""
        table_TW = torch.zeros(len(counts), len(self.column), dtype=torch.float64)
        for row, found in enumerate(counts):
            columns = [self.column[word] for word in found]
            table_TW[row, columns] = torch.tensor(list(found.values()), dtype=torch.float64)
        return table_TW * self.weight_W

    def mean_unit(self, texts: Sequence[str]) -> Tensor:
        """Mean over texts of their weighted counts, each scaled to length 1, float64 `[W]`.

        The dot product of two of these is the mean cosine of all pairs of their texts. A text without a known word
        counts as 0.
        """
        size = len(self.column)
        rows, columns = self._found(texts)
        pairs, counts = torch.unique(rows * size + columns, return_counts=True)
        rows, columns = pairs // size, pairs % size
        value = counts * self.weight_W[columns]
        square_n = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, value.square())
        mean_W = torch.zeros(size, dtype=torch.float64)
        return mean_W.index_add_(0, columns, value * square_n[rows].rsqrt()) / len(texts)

    def dots(self, texts: Sequence[str], table_TW: Tensor) -> Tensor:
        """Dot products of each text's weighted counts with each row, float64 `[n, T]`."""
        rows, columns = self._found(texts)
        dot_nT = torch.zeros(len(texts), len(table_TW), dtype=torch.float64)
        return dot_nT.index_add_(0, rows, (table_TW * self.weight_W).t()[columns])
