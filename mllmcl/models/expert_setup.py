"""Putting expert layers into a model, growing them, and naming what of it may train."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mllmcl_kernels import Mask

from ..options import check_count
from .experts import SCORES, ExpertLinear, ExpertProjectorLinear, ExpertState
from .sharing import join
from .targets import linear_names, match_targets

__all__ = ["experts_added", "experts_grown", "fill", "masks_of", "parameters_that_may_train"]


def _each(name: str, value, num: int, kind: type) -> tuple:
    """One positive number for each expert."""
    if isinstance(value, str) or not isinstance(value, (numbers.Real, Iterable)):
        raise TypeError(f"{name}: expected one number or {num} of them, got {value!r}")
    values = [value] * num if isinstance(value, numbers.Real) else list(value)
    if len(values) != num:
        raise ValueError(f"{name}: expected one number or {num} of them, got {len(values)}")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, numbers.Real):
            raise TypeError(f"{name}: expected positive {kind.__name__}s, got {values}")
        if not 0 < item < math.inf or item != kind(item):
            raise ValueError(f"{name}: expected positive {kind.__name__}s, got {values}")
    return tuple(kind(item) for item in values)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    layer.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), name, layer)


def _check(num_experts: int, dropout: float, router: str | None, router_top_k: int | None) -> None:
    check_count("num_experts", num_experts)
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if router is not None and router not in SCORES:
        raise ValueError(f"router: expected None or one of {', '.join(SCORES)}, got {router!r}")
    if router_top_k is not None:
        check_count("router_top_k", router_top_k)
    if router_top_k is not None and (router is None or not 1 <= router_top_k <= num_experts):
        raise ValueError(f"router_top_k: expected 1..{num_experts} together with a router, got {router_top_k}")


def experts_added(
    mllm, num_experts, rank, alpha, *, targets, dropout, router, router_top_k, projector_experts
) -> None:  # fmt: skip
    """See `MLLM.add_experts`."""
    if mllm.experts is not None:
        raise ValueError(f"there are {mllm.experts.num_experts} experts already; append more with grow_experts")
    _check(num_experts, dropout, router, router_top_k)
    ranks = _each("rank", rank, num_experts, int)
    alphas = _each("alpha", alpha, num_experts, float)
    if targets is None and not projector_experts:
        raise ValueError("targets: None leaves the experts nothing unless projector_experts is set")
    names = [] if targets is None else match_targets(linear_names(mllm.model, mllm.language_path), targets)
    projector = []
    if projector_experts:
        projector = [] if mllm.projector_path is None else linear_names(mllm.model, mllm.projector_path)
        if not projector:
            raise ValueError(f"projector_experts: {type(mllm.model).__name__} has no projector with linear layers")
    state = ExpertState(
        ranks=ranks,
        scaling=tuple(a / r for a, r in zip(alphas, ranks, strict=True)),
        trainable=(True,) * num_experts,
        dropout=dropout,
        router=router,
        router_top_k=router_top_k,
    )
    mllm.experts = state
    for path in names:
        mllm.expert_layers[path] = ExpertLinear(mllm.model.get_submodule(path), state, path)
        _put(mllm.model, path, mllm.expert_layers[path])
    if mllm.shares_inputs:
        join(mllm.expert_layers)
    for path in projector:
        mllm.projector_layers[path] = ExpertProjectorLinear(mllm.model.get_submodule(path), state, path)
        _put(mllm.model, path, mllm.projector_layers[path])


def experts_grown(mllm, num: int, rank: int | Sequence[int] | None, alpha) -> None:
    """See `MLLM.grow_experts`."""
    state = mllm.experts
    if state is None:
        raise ValueError("there are no experts to grow, call add_experts first")
    check_count("num", num)
    ranks = _each("rank", state.ranks[-1] if rank is None else rank, num, int)
    alphas = _each("alpha", state.scaling[-1] * state.ranks[-1] if alpha is None else alpha, num, float)
    state.ranks += ranks
    state.scaling += tuple(a / r for a, r in zip(alphas, ranks, strict=True))
    state.trainable += (True,) * num
    for layer in mllm.expert_layers.values():
        layer.grow(sum(ranks), num)
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    for layer in mllm.projector_layers.values():
        layer.grow(num)


def parameters_that_may_train(mllm) -> dict[str, nn.Parameter]:
    """Name to parameter of experts, routers, projector and attached modules, whether they train now or not."""
    found = {}
    for path, layer in mllm.expert_layers.items():
        found[f"{path}.lora_a"] = layer.lora_a
        found[f"{path}.lora_b"] = layer.lora_b
        found.update({f"{path}.{name}": parameter for name, parameter in layer.router_parameters.items()})
    if mllm.projector_path is not None:
        for name, parameter in mllm.model.get_submodule(mllm.projector_path).named_parameters():
            found[f"{mllm.projector_path}.{name}"] = parameter
    for name, module in mllm.attached.items():
        found.update(module.named_parameters(prefix=name))
    return found


def fill(own: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    """See `MLLM.load_trainable_state`."""
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    wrong = [
        f"{name}: expected {list(own[name].shape)}, got {list(state[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [("missing", missing), ("left over", extra), ("of another shape", wrong)]
    told = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
        for what, names in problems
        if names
    ]
    if told:
        raise ValueError(f"state does not fit the model: {'; '.join(told)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def masks_of(mllm) -> dict[str, Mask]:
    """See `MLLM.parameter_masks`."""
    masks: dict[str, Mask] = {}
    state = mllm.experts
    for path, layer in mllm.expert_layers.items():
        for name, dim in (("lora_a", 0), ("lora_b", 1)):
            masks[f"{path}.{name}"] = Mask.experts(state.trainable, state.ranks, dim).to(layer.lora_a.device)
    for path, layer in mllm.projector_layers.items():
        rows = Mask.rows(torch.tensor(state.trainable, device=layer.expert_weight.device))
        masks[f"{path}.expert_weight"] = rows
        if layer.expert_bias is not None:
            masks[f"{path}.expert_bias"] = rows
    return masks
