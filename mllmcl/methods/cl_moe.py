"""CL-MoE: a mixture of LoRA experts with a router for tokens and one for tasks, and a momentum for each expert."""

# L layers with experts, E experts, T tasks learned, B samples, S positions, n samples

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .moelora import MoeLora
from .routers import RouterOptions, find_router


@dataclass(kw_only=True)
class ClMoe(MoeLora):
    """MoELoRA whose experts remember what they were used for.

    While task t trains, g = softmax(x W_g^T) alone mixes, and c_t counts how often each expert of a layer is among the
    `top_k` of a token. At the task's end experts move by their role in the layer,

        theta_t = lambda theta_{t-1} + (1 - lambda) phi_t
        lambda  = momentum         among the top_k of c_t and of an earlier task (shared)
                  1 - momentum     among the top_k of c_t alone (new)
                  1                not among the top_k of c_t

    with phi_t the tuned weights. At test, for a sample nearest to the prototype of task k,

        gates = token_share g(x) + (1 - token_share) G_k,    G_k = c_k on its top_k, divided by their sum

    Args:
        token_share: beta of the paper. momentum: gamma of the paper.
        top_k: experts that count as important.
        legacy: MoELoRA alone, which is what the public code does: its merge matches no tensor.
    """

    name: ClassVar[str] = "cl_moe"
    summary: ClassVar[str] = "MoELoRA with a second router for tasks and a momentum for each expert by its role"
    source: ClassVar[str] = "CL-MoE (arXiv:2503.00413); legacy: its public code"
    stores: ClassVar[str] = (
        "one set of experts, routers and the projector; for each task a prototype and counts of experts in each layer; "
        "during a task the experts as they were before"
    )
    at_test: ClassVar[str] = "nothing (routed for each token, and by the nearest task prototype)"
    deviations: ClassVar[str] = (
        "roles and counts are those of a layer; the prototype is in features of the model at hand; routers and "
        "projector are taken over as tuned; one dropout mask for all experts, A drawn as for a plain LoRA; legacy: no "
        "second router and no momentum"
    )

    rank: int = 8
    alpha: float = 64.0
    token_share: float = 0.5
    momentum: float = 0.7
    top_k: int = 2
    legacy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k must be in 1..{self.experts}, got {self.top_k}")
        for name in ("token_share", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        #: experts before the task, by parameter name; empty in the first task and between tasks
        self.previous: dict[str, Tensor] = {}

    def setup(self, mllm, stream) -> None:
        super().setup(mllm, stream)
        layers = mllm.expert_layers
        self.counts_LE = torch.zeros(len(layers), self.experts, device=mllm.device)
        self.counts_TLE = torch.zeros(0, len(layers), self.experts, device=mllm.device)
        if not self.legacy:
            self.chooser = find_router("prototype")(mllm, stream.tasks, RouterOptions(prototypes=1))
            mllm.router = self.route
            mllm.experts.router_share = self.token_share
            mllm.experts.groups = {path: place for place, path in enumerate(layers)}

    def route(self, samples: Sequence) -> Tensor:
        """Gates of the task router in each layer, `[n, L, E]`; ids -1, the base model, while nothing was learned."""
        tasks = self.chooser(samples)
        if not len(self.counts_TLE):
            return tasks
        kept = self.counts_TLE * self._important(self.counts_TLE)
        return (kept / kept.sum(-1, keepdim=True).clamp_min(1.0)).cpu()[tasks]

    def _important(self, counts: Tensor) -> Tensor:
        """True at the `top_k` of the last dimension."""
        return torch.zeros_like(counts, dtype=torch.bool).scatter_(-1, counts.topk(self.top_k).indices, True)

    def on_task_start(self, task) -> None:
        super().on_task_start(task)
        self.counts_LE = torch.zeros_like(self.counts_LE)
        if self.index_of(task) and not self.legacy:
            self.previous = {name: value.clone() for name, value in self._experts().items()}

    def _experts(self) -> dict[str, Tensor]:
        layers = self.mllm.expert_layers.items()
        return {
            f"{path}.{name}": getattr(layer, name).detach() for path, layer in layers for name in ("lora_a", "lora_b")
        }

    def before_forward(self, samples: Sequence) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.legacy else self.mllm.experts.collecting()

    @torch.no_grad()
    def loss(self, batch, loss: Tensor) -> Tensor:
        if not self.legacy:
            routings = [self.mllm.experts.routings[path] for path in self.mllm.expert_layers]
            is_top_LBSE = self._important(torch.stack([routing.probs for routing in routings]))
            count_LE = (is_top_LBSE & routings[0].token_mask[..., None]).sum((1, 2)) * self.processes.fraction
            self.processes.add_([count_LE])
            self.counts_LE += count_LE
        return loss

    @torch.no_grad()
    def on_task_end(self, task) -> None:
        if self.legacy:
            return
        place = self.index_of(task)
        self.chooser.learn(place)
        self.counts_TLE = torch.cat([self.counts_TLE[:place], self.counts_LE[None], self.counts_TLE[place + 1 :]])
        if self.previous:
            self._merge(place)
            # merged once, whatever is asked for again
            self.previous = {}

    def _merge(self, place: int) -> None:
        important_TLE = self._important(self.counts_TLE[: place + 1])
        is_new_LE, was_LE = important_TLE[-1], important_TLE[:-1].any(0)
        keep_LE = torch.where(was_LE, self.momentum, 1.0 - self.momentum).masked_fill(~is_new_LE, 1.0)
        keep_LR = keep_LE.repeat_interleave(self.rank, dim=1)
        for keep_R, (path, layer) in zip(keep_LR, self.mllm.expert_layers.items(), strict=True):
            keep_R = keep_R.to(layer.lora_a.dtype)
            layer.lora_a.lerp_(self.previous[f"{path}.lora_a"], keep_R[:, None])
            layer.lora_b.lerp_(self.previous[f"{path}.lora_b"], keep_R[None])

    def state_tensors(self) -> dict[str, Tensor]:
        if self.legacy:
            return {}
        return {
            **self.chooser.state_tensors(),
            "counts": self.counts_LE,
            "counts_of_tasks": self.counts_TLE,
            **{f"previous/{name}": value for name, value in self.previous.items()},
        }

    def state_values(self) -> dict:
        return {} if self.legacy else self.chooser.state_values()

    def load_state(self, tensors, values) -> None:
        if self.legacy:
            return
        self.chooser.load_state(tensors, values)
        device = self.mllm.device
        # what was loaded may be asked for again, so what grows is a copy
        self.counts_LE, self.counts_TLE = tensors["counts"].to(device, copy=True), tensors["counts_of_tasks"].to(device)
        self.previous = {
            name.partition("/")[2]: value.to(device) for name, value in tensors.items() if name.startswith("previous/")
        }
