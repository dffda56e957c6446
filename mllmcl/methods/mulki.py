"""MulKI: two teachers, weighed sample by sample, say how like a sample is to the prototypes of all tasks."""

# B samples, S positions, D hidden width, P prototypes of all tasks so far, n answer tokens, K teachers

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.batch import prompt_mask
from .keys import cosines
from .routers import cluster
from .teachers import BATCH, PreviousModelMethod

#: the teachers, by expert: the base and the model of the last task
BASE, PREVIOUS = -1, 1


@dataclass(kw_only=True)
class MulKi(PreviousModelMethod):
    """Sequential LoRA that keeps the likeness of samples to prototypes as the base and the last task's model have it.

        L = CE + distil * mean over samples of sum_k w_k KL(softmax(s_k / tau) || softmax(s / tau))
               - align * mean log of what softmax(s / tau) gives to the prototypes of the sample's own task
        s = cos(f, prototypes),   w = softmax over teachers of minus their loss on the sample's answer

    with f the mean last hidden state over the prompt. When a task starts, the centres of its training samples' f, by
    the model at hand, join the prototypes. In the first task the base is the only teacher.

    Args:
        distil, align: weights. tau: temperature.
        prototypes: of a task.
    """

    name: ClassVar[str] = "mulki"
    summary: ClassVar[str] = "likeness to prototypes kept as two teachers have it, weighed sample by sample"
    source: ClassVar[str] = "MulKI (arXiv:2411.06764), in a form for language models that generate"
    stores: ClassVar[str] = "the model of the last task: one LoRA and projector; `prototypes` features of each task"
    at_test: ClassVar[str] = "nothing"
    extra_passes: ClassVar[str] = "forward of base and old model"
    deviations: ClassVar[str] = (
        "written for CLIP, whose classes are its prototypes; here they are centres of a task's prompts; the paper's "
        "weights are not published"
    )

    distil: float = 1.0
    align: float = 0.1
    tau: float = 0.1
    prototypes: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("distil", "align"):
            if getattr(self, option) < 0:
                raise ValueError(f"{option} must not be negative, got {getattr(self, option)}")
        if self.tau <= 0 or self.prototypes < 1:
            raise ValueError(f"tau must be > 0 and prototypes at least 1, got {self.tau} and {self.prototypes}")
        #: centres `[P, D]` and the task of each
        self.centres, self.owners = torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        mllm, found = self.mllm, []
        samples = list(task.train)
        with mllm.evaluating():
            for start in range(0, len(samples), BATCH):
                batch = mllm.collate(samples[start : start + BATCH], with_answers=True)
                with self.autocast():
                    found.append(_prompt_features(mllm.hidden_states(batch), batch))
        place = self.index_of(task)
        new = cluster(F.normalize(torch.cat(found), dim=-1), self.prototypes)
        is_old = self.owners < place
        old = self.centres[is_old] if len(self.owners) else new[:0]
        self.centres = torch.cat([old, new])
        self.owners = torch.cat([self.owners[is_old], torch.full((len(new),), place, device=new.device)])
        self.is_own_P = self.owners == place

    def _seen(self, batch) -> tuple[Tensor, Tensor]:
        """Log softmax of a sample's likeness `[B, P]`, and the hidden states that predict the answers."""
        hidden_BSD = self.mllm.hidden_states(batch)
        likeness_BP = cosines(_prompt_features(hidden_BSD, batch), self.centres)
        return F.log_softmax(likeness_BP / self.tau, dim=-1), self.mllm.at_answers(hidden_BSD, batch)

    def answer_loss(self, batch) -> Tensor:
        mllm = self.mllm
        log_q_BP, answers = self._seen(batch)
        loss = mllm.cross_entropy(answers, batch)
        taught, losses = [], []
        for teacher in (BASE, PREVIOUS) if self.has_previous else (BASE,):
            with self.teaching(len(batch), teacher):
                log_p_BP, old_answers = self._seen(batch)
                taught.append(log_p_BP)
                losses.append(_by_sample(mllm.cross_entropy(old_answers, batch, "none"), batch))
        log_p_KBP, weight_KB = torch.stack(taught), torch.softmax(-torch.stack(losses), dim=0)
        divergence_KB = F.kl_div(log_q_BP.expand_as(log_p_KBP), log_p_KBP, reduction="none", log_target=True).sum(-1)
        own_B = log_q_BP.masked_fill(~self.is_own_P, float("-inf")).logsumexp(-1)
        distilled = self.sample_mean((weight_KB * divergence_KB).sum(0))
        return loss + self.distil * distilled - self.align * self.sample_mean(own_B)

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), "centres": self.centres, "owners": self.owners}

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        device = self.mllm.device
        self.centres, self.owners = (tensors[name].to(device) for name in ("centres", "owners"))
        self.is_own_P = self.owners == self.owners.max() if len(self.owners) else self.owners.bool()


def _prompt_features(hidden_BSD: Tensor, batch) -> Tensor:
    """Mean over the positions of the prompt, `[B, D]` in float32 or better."""
    counts_BS = prompt_mask(batch).to(torch.promote_types(hidden_BSD.dtype, torch.float32))
    return torch.einsum("bsd,bs->bd", hidden_BSD.to(counts_BS.dtype), counts_BS) / counts_BS.sum(1, keepdim=True)


def _by_sample(losses_n: Tensor, batch) -> Tensor:
    """Mean over each sample's answer tokens, `[B]`."""
    sample_n = batch.answer_positions // batch.input_ids.shape[1]
    totals = losses_n.new_zeros(2, len(batch)).index_add(
        1, sample_n, torch.stack([losses_n, torch.ones_like(losses_n)])
    )
    return totals[0] / totals[1]
