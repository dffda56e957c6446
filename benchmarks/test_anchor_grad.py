"""`anchor_grad_` beside torch._foreach, a loop over tensors, and autograd through the penalty."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mllmcl_kernels import anchor_grad_

from .cases import ListCase
from .lists import draw, masks_of, race_lists

STRENGTH = 1e-3


def foreach_pull(grads: list[Tensor], params: list[Tensor], anchors: list[Tensor], importances: list[Tensor]) -> None:
    moved = torch._foreach_sub(params, anchors)
    torch._foreach_addcmul_(grads, moved, importances, value=STRENGTH)


def loop_pull(grads: list[Tensor], params: list[Tensor], anchors: list[Tensor], importances: list[Tensor]) -> None:
    for grad, param, anchor, importance in zip(grads, params, anchors, importances, strict=True):
        grad.addcmul_(param - anchor, importance, value=STRENGTH)


def penalty(grads: list[Tensor], params: list[Tensor], anchors: list[Tensor], importances: list[Tensor]) -> None:
    """The loss term as it is commonly written, and its backward pass."""
    leaves = [param.detach().requires_grad_() for param in params]
    lists = zip(leaves, anchors, importances, strict=True)
    total = sum((importance * (leaf - anchor).square()).sum() for leaf, anchor, importance in lists)
    pulls = torch.autograd.grad(0.5 * STRENGTH * total, leaves)
    torch._foreach_add_(grads, list(pulls))


def test_anchor_grad(benchmark, anchor_case: ListCase, device, rounds):
    case = anchor_case
    generator = torch.Generator(device).manual_seed(0)
    lists = {name: draw(case, generator) for name in ("grads", "params", "anchors", "importances")}
    dtype = torch.bfloat16 if "bfloat16" in case.work else torch.float32
    lists["importances"] = [tensor.abs().to(dtype) for tensor in lists["importances"]]
    peers = {"torch foreach": foreach_pull, "loop": loop_pull, "autograd": penalty}
    call = functools.wraps(anchor_grad_)(functools.partial(anchor_grad_, strength=STRENGTH))
    race_lists(benchmark, case, call, lists, ("grads",), peers, masks_of(case, generator), device, rounds)
