"""SEFE: LoRA merged at each task boundary that spares what mattered to old tasks, on data of several answer styles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import SampledEntries, sampled_product_l1

from ..streams.styles import diversified
from .merging import MergedLoraMethod


@dataclass(kw_only=True)
class Sefe(MergedLoraMethod):
    """RegLoRA: a fresh LoRA for each task, kept small where the LoRAs of old tasks were largest; and answer styles.

        y      = x W_t^T + s (drop(x) A^T) B^T,   W_{t+1} = W_t + s B A,   s = alpha / rank
        loss   = CE + strength / L sum_l mean_{(i, j) in K_l} |(B_l A_l)_ij|
        K_l    = the entries that were among the `key_share` largest |B_l A_l| of an old task, as often as they were

    A share of each task's training samples is asked in other answer styles, see `mllmcl.streams.styles.diversified`.

    Args:
        strength: weight of the penalty; 0 leaves it out.
        key_share: share of a layer's entries that are key entries of a task.
        style_share: share of the training samples in another answer style; 0 is RegLoRA alone.
        seed: of the choice of samples and styles.
    """

    name: ClassVar[str] = "sefe"
    summary: ClassVar[str] = "LoRA merged at each boundary, kept small at old tasks' key entries; answer styles vary"
    source: ClassVar[str] = "SEFE (arXiv:2505.02486), its RegLoRA and answer style diversification"
    stores: ClassVar[str] = (
        "the merged weights, one LoRA and the projector; for each task an int32 for each key entry (2 % of the weights)"
    )
    at_test: ClassVar[str] = "nothing"
    deviations: ClassVar[str] = (
        "styles are written by rules, not by a language model: multiple choice, yes or no, a full sentence, a blank to "
        "fill, no explanations; the last task's LoRA stays beside the base; MCITlib has no styles (style_share=0)"
    )

    alpha: float = 32.0
    rslora: bool = False
    strength: float = 2.5e3
    key_share: float = 0.02
    style_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if not 0.0 < self.key_share <= 1.0:
            raise ValueError(f"key_share must be in (0, 1], got {self.key_share}")
        if not 0.0 <= self.style_share <= 1.0:
            raise ValueError(f"style_share must be in [0, 1], got {self.style_share}")
        #: name of a task -> path of each layer -> its key entries i * d_in + j, in order, on the CPU
        self.keys: dict[str, dict[str, Tensor]] = {}
        self.acting = 0
        self.entries: SampledEntries | None = None

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.acting, self.entries = self.index_of(task), None

    def on_phase_start(self, task, phase) -> None:
        super().on_phase_start(task, phase)
        if self.acting and self.strength:
            self.entries = self._entries([self.keys[other.name] for other in self.stream.tasks[: self.acting]])

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of every layer."""
        layers = self.mllm.expert_layers.values()
        return [layer.lora_a for layer in layers], [layer.lora_b for layer in layers]

    def _entries(self, keys: Sequence[dict[str, Tensor]]) -> SampledEntries:
        a, b = self._factors()
        flat = [torch.cat([each[path] for each in keys]).to(self.mllm.device) for path in self.mllm.expert_layers]
        widths = [each.shape[1] for each in a]
        rows = [places // width for places, width in zip(flat, widths, strict=True)]
        cols = [places % width for places, width in zip(flat, widths, strict=True)]
        return SampledEntries.of(a, b, rows, cols)

    def training_samples(self, task) -> Sequence:
        return diversified(task.train, self.style_share, self.seed)

    def loss(self, batch, loss: Tensor) -> Tensor:
        if self.acting and self.strength:
            loss = loss + self.strength * sampled_product_l1(*self._factors(), self.entries)
        return loss

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        layers = self.mllm.expert_layers.items()
        self.keys[task.name] = {path: self._largest(layer.lora_b @ layer.lora_a) for path, layer in layers}

    def _largest(self, product: Tensor) -> Tensor:
        """Flat places of the largest entries of a layer's B A by size, in order."""
        count = max(1, int(self.key_share * product.numel()))
        places = product.abs_().flatten().topk(count, sorted=False).indices.sort().values
        return places.to("cpu", torch.int32 if product.numel() < 2**31 else torch.int64)

    def state_tensors(self) -> dict[str, Tensor]:
        keys = {
            f"keys/{task}/{path}": places for task, by_path in self.keys.items() for path, places in by_path.items()
        }
        return {**super().state_tensors(), **keys}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        self.keys = {}
        for name, places in tensors.items():
            if name.startswith("keys/"):
                task, _, path = name.removeprefix("keys/").rpartition("/")
                self.keys.setdefault(task, {})[path] = places.cpu()
