"""M2Distill: the new model keeps the old one's features, modality by modality, and its answers."""

# B samples, S positions, D hidden width, P feature tokens of an image

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mllmcl_kernels import distillation_loss

from .teachers import PreviousModelMethod

#: taps that every model has: the projector's output, and the last hidden states at prompt and answer tokens
IMAGE, LANGUAGE = "image", "language"


@dataclass(kw_only=True)
class M2Distill(PreviousModelMethod):
    """Sequential LoRA whose features and answers stay near those of the model before the task, on the task's samples.

        L = CE + sum over taps of weight * |f - f_old|^2 / |f_old|^2 + policy * KL(p_old || p)

    Squared lengths are over all tokens of the batch but pads. p is the distribution of answer tokens.

    Args:
        taps: weight of each feature: "image" (output of the projector), "language" (last hidden states), or the full
            name of a module whose output is a tensor.
        policy: weight of the divergence of the answers.
    """

    name: ClassVar[str] = "m2distill"
    summary: ClassVar[str] = "features of each modality and answers kept near those of the model before the task"
    source: ClassVar[str] = "M2Distill (arXiv:2410.00064), for language models instead of a robot's policy"
    stores: ClassVar[str] = "the model of the last task: one LoRA and projector"
    at_test: ClassVar[str] = "nothing"
    extra_passes: ClassVar[str] = "forward of the old model"
    deviations: ClassVar[str] = (
        "answer tokens take the place of actions, with the exact divergence; distances are relative, for the paper's "
        "weights are not published; no memory of samples"
    )

    taps: dict[str, float] = field(default_factory=lambda: {IMAGE: 1.0, LANGUAGE: 1.0})
    policy: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in {**self.taps, "policy": self.policy}.items():
            if weight < 0:
                raise ValueError(f"the weight of {name} must not be negative, got {weight}")

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        #: names of the modules behind the taps
        self.modules = {tap: mllm.projector_path if tap == IMAGE else tap for tap in self.taps if tap != LANGUAGE}
        known = dict(mllm.model.named_modules())
        for tap, path in self.modules.items():
            if path not in known:
                near = difflib.get_close_matches(tap, [IMAGE, LANGUAGE, *known], 3, 0.0)
                raise ValueError(f"taps: {tap!r} is no module of the model; near to it: {', '.join(near)}")

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[dict[str, Tensor]]:
        """What the tapped modules give within the context, by tap."""
        found: dict[str, Tensor] = {}

        def keep(tap: str):
            return lambda module, inputs, output: found.__setitem__(tap, output)

        hooks = [
            self.mllm.model.get_submodule(path).register_forward_hook(keep(tap)) for tap, path in self.modules.items()
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _features(self, batch) -> tuple[dict[str, Tensor], Tensor]:
        """Features by tap, and the hidden states that predict the answers."""
        with self._tapped() as found:
            hidden_BSD = self.mllm.hidden_states(batch)
        return {**found, LANGUAGE: hidden_BSD}, self.mllm.at_answers(hidden_BSD, batch)

    def answer_loss(self, batch) -> Tensor:
        mllm = self.mllm
        features, answers = self._features(batch)
        loss = mllm.cross_entropy(answers, batch)
        if not self.has_previous:
            return loss
        with self.teaching(len(batch)):
            old, old_answers = self._features(batch)
            logits = mllm.head(old_answers)
        for tap, weight in self.taps.items():
            moved, length = _distance(features[tap], old[tap], batch.attention_mask)
            loss = loss + weight * self.processes.part(moved / length, self.processes.fraction * length)
        return loss + self.policy * distillation_loss(answers, mllm.head_weight, logits)


def _distance(new: Tensor, old: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """|new - old|^2 and |old|^2, without pads where there is a row for each position."""
    wide = torch.promote_types(new.dtype, torch.float32)
    new, old = new.to(wide), old.to(wide)
    counts = mask_BS.to(wide)[..., None] if new.shape[:2] == mask_BS.shape else 1.0
    return ((new - old).square() * counts).sum(), (old.square() * counts).sum()
