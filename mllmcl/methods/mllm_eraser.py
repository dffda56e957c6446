"""MLLMEraser: a task is forgotten at test time by steering; nothing trains."""

# L layers, n forgotten samples, m retained samples, r forgotten tasks, d width

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.batch import prompt_mask
from ..models.steering import Steering
from .base import Phase
from .buffers import BufferMethod

#: samples of a forward pass that only looks
LOOK_BATCH = 16


@dataclass(kw_only=True)
class MllmEraser(BufferMethod):
    """In every layer the prompt of a sample that is to be forgotten moves from recall to refusal; others stay.

        h <- h + h_last M,   M^T = D H_f^T P (P H_f H_f^T P + gamma P)^+ P        (in the pass over the prompt alone)

    H_f holds the states of the last prompt token of forgotten samples as columns, D for each of them the direction of
    its task, mean state of a refusal's last token minus that of the true answer's, and P projects onto the null space
    of the states of retained samples. Everything is in closed form, in float64, from a few samples of each task.

    Args:
        forget: names of the tasks to forget, each from its own end on; None: the first task of the stream.
        refusal: the answer that a forgotten question moves to.
        num_samples: kept of each task.
        strength: factor of D.
        damping: gamma, in mean squared lengths of the forgotten states' part in the null space.
        energy: share of the retained states' energy that lies outside of the null space.
    """

    name: ClassVar[str] = "mllm_eraser"
    summary: ClassVar[str] = "test-time unlearning: prompts of forgotten tasks are steered towards a refusal"
    source: ClassVar[str] = "MLLMEraser (arXiv:2510.04217)"
    stores: ClassVar[str] = "states of `num_samples` samples of each task, a direction for each forgotten task"
    at_test: ClassVar[str] = "nothing: the map is near zero on what is retained"
    deviations: ClassVar[str] = (
        "the images of recalled answers are not perturbed; the null space is cut by energy; the damping is relative; M "
        "is kept in factors of one direction for each forgotten task, the same map"
    )

    forget: list[str] | None = None
    refusal: str = "I do not know."
    num_samples: int = 64
    strength: float = 1.0
    damping: float = 1e-2
    energy: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.damping <= 0:
            raise ValueError(f"damping must be positive, got {self.damping}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        # of each finished task the states [n, L, d], of each forgotten one the direction [L, d]
        self.states: dict[str, Tensor] = {}
        self.directions: dict[str, Tensor] = {}

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        names = [task.name for task in stream.tasks]
        unknown = [name for name in self.forget or () if name not in names]
        if unknown:
            raise ValueError(f"forget must name tasks of the stream ({', '.join(names)}), got {unknown[0]!r}")
        self.forgotten = {names[0]} if self.forget is None else set(self.forget)
        mllm.steering = Steering(mllm.model.get_submodule(mllm.language_path))

    def _num_kept(self, task) -> int:
        return self.num_samples

    def on_task_start(self, task) -> None:
        self.mllm.set_trainable()

    def phases(self, task) -> list[Phase]:
        return []

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        super().on_task_end(task)
        samples = self.stored([task])
        asked, recalled = self.look(samples).unbind(1)
        self.states[task.name] = asked.cpu()
        if task.name in self.forgotten:
            refused = self.look([dataclasses.replace(sample, answer=self.refusal) for sample in samples])[:, 1]
            self.directions[task.name] = (refused.double().mean(0) - recalled.double().mean(0)).float().cpu()
        self.fit()

    def look(self, samples: Sequence) -> Tensor:
        """States after every layer at the last token of the prompt and of the answer, `[n, 2, L, d]` float32."""
        mllm, parts = self.mllm, []
        for start in range(0, len(samples), LOOK_BATCH):
            batch = mllm.collate(samples[start : start + LOOK_BATCH], with_answers=True)
            # rows are padded on the right, and the end token stands behind the answer
            ends = (prompt_mask(batch).sum(1) - 1, batch.attention_mask.sum(1) - 2)
            with self.autocast(), mllm.steering.watching(torch.stack(ends, dim=1)) as found:
                mllm.hidden_states(batch)
            parts.append(torch.stack(found, dim=2).float())
        return torch.cat(parts)

    def fit(self) -> None:
        """M of all layers from what is known, as factors for the model to steer by."""
        tasks = [task.name for task in self.stream.tasks if task.name in self.states]
        erased = [name for name in tasks if name in self.directions]
        if not erased:
            self.mllm.steering.read = self.mllm.steering.write = None
            return
        forget_Lnd = self._by_layer(erased)
        kept = [name for name in tasks if name not in self.directions]
        if kept:
            forget_Lnd = forget_Lnd - _within(forget_Lnd, self._by_layer(kept), self.energy)
        owner_n = torch.tensor([place for place, name in enumerate(erased) for _ in self.states[name]])
        owner_nr = F.one_hot(owner_n, len(erased)).to(forget_Lnd)
        # (P H_f H_f^T P + gamma P)^+ P H_f = P H_f (H_f^T P H_f + gamma I)^-1, which is n x n
        gram_Lnn = forget_Lnd @ forget_Lnd.mT
        lengths_Ln = gram_Lnn.diagonal(dim1=1, dim2=2)
        lengths_Ln += self.damping * lengths_Ln.mean(1, keepdim=True)
        solved_Lnr = torch.linalg.solve(gram_Lnn, owner_nr.expand(len(gram_Lnn), -1, -1))
        direction_Lrd = torch.stack([self.directions[name] for name in erased], dim=1)
        self.mllm.steering.read = (forget_Lnd.mT @ solved_Lnr).float().to(self.mllm.device)
        self.mllm.steering.write = (self.strength * direction_Lrd).to(self.mllm.device)

    def _by_layer(self, names: Sequence[str]) -> Tensor:
        """The states of some tasks, `[L, samples, d]` float64 on the CPU."""
        return torch.cat([self.states[name] for name in names]).double().transpose(0, 1)

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            **{f"states/{name}": value for name, value in self.states.items()},
            **{f"directions/{name}": value for name, value in self.directions.items()},
        }

    def load_state(self, tensors, values) -> None:
        super().load_state(tensors, values)
        for kind, store in (("states", self.states), ("directions", self.directions)):
            store.clear()
            store.update(
                {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{kind}/")}
            )
        self.fit()


def _within(rows_Lnd: Tensor, others_Lmd: Tensor, energy: float) -> Tensor:
    """The part of the rows within the span of the others: of their main directions up to a share of the energy."""
    _, size_Lq, basis_Lqd = torch.linalg.svd(others_Lmd, full_matrices=False)
    square_Lq = size_Lq.square()
    before_Lq = (square_Lq.cumsum(1) - square_Lq) / square_Lq.sum(1, keepdim=True)
    basis_Lqd = basis_Lqd * (before_Lq < energy)[..., None]
    return rows_Lnd @ basis_Lqd.mT @ basis_Lqd
