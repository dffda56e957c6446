"""Importances and the pull they weigh: means over calls, maxima with owners, the penalty's own gradient."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import Mask, anchor_grad_, importance_update_
from mllmcl_kernels.op import REGISTRY

OPS = ("importance_update_", "anchor_grad_")
BACKENDS = ["reference"] + (["cpp"] if not any(isinstance(REGISTRY[op].find("cpp"), str) for op in OPS) else [])
SHAPES = ((5, 7), (129,), (40_003,))


def drawn(seed: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [1, 2])
def test_the_mean_is_that_of_all_calls(backend, power):
    importances = [torch.zeros(shape) for shape in SHAPES]
    calls = [drawn(seed) for seed in range(5)]
    for count, grads in enumerate(calls, 1):
        number = torch.tensor(float(count)) if count % 2 else count
        importance_update_(importances, grads, power=power, count=number, backend=backend)
    wanted = [torch.stack(grads).double().abs().pow(power).mean(0).float() for grads in zip(*calls, strict=True)]
    torch.testing.assert_close(importances, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_the_owner_is_the_task_of_the_maximum(backend, dtype, power):
    """Four tasks; where two are stored alike the earlier one owns, so that a second time changes nothing."""
    importances = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    owners = [torch.full(shape, 255, dtype=torch.uint8) for shape in SHAPES]
    tasks = [drawn(seed) for seed in range(4)]
    options = {"power": power, "reduce": "max", "backend": backend}
    for task, grads in enumerate(tasks):
        importance_update_(importances, grads, **options, owners=owners, task=task)
    for importance, owner, *grads in zip(importances, owners, *tasks, strict=True):
        stored = torch.stack(grads).abs().pow(power).to(dtype)
        assert torch.equal(importance, stored.amax(0))
        # the first of equal ones
        first = (stored == stored.amax(0)).to(torch.uint8).argmax(0)
        assert torch.equal(owner.long(), first)
    before = [value.clone() for value in (*importances, *owners)]
    for grads in tasks:
        importance_update_(importances, grads, **options, owners=owners, task=9)
    assert all(map(torch.equal, before, (*importances, *owners)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_and_is_owned_by_who_brought_it(backend):
    importance = torch.tensor([1.0, float("nan"), 1.0, 2.0])
    owner = torch.zeros(4, dtype=torch.uint8)
    grad = torch.tensor([float("nan"), 5.0, 5.0, 1.0])
    importance_update_([importance], [grad], power=1, reduce="max", owners=[owner], task=3, backend=backend)
    assert importance.isnan().tolist() == [True, True, False, False] and importance[2:].tolist() == [5.0, 2.0]
    assert owner.tolist() == [3, 0, 3, 0]


def masks_of(keep: torch.Tensor, columns: int) -> list[Mask]:
    elements = keep[:, None].expand(-1, columns).contiguous()
    return [Mask.rows(keep), Mask.elements(elements), Mask.owner(elements.to(torch.uint8) * 3, 3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_entries_keep_bits(backend, dtype):
    """Importance, owner and gradient under a mask, NaN with a payload among them; the rest as without a mask."""
    keep = torch.arange(70) % 3 > 0
    payload = {torch.float32: 0x7FC12345, torch.bfloat16: 0x7FC1, torch.float16: 0x7E01}[dtype]
    words = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    tensors = [torch.randn(70, 24, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(4)]
    tensors[0][~keep] = torch.tensor(payload, dtype=words).view(dtype)
    owners = torch.full((70, 24), 200, dtype=torch.uint8)

    def mean(first, owner, others, **options):
        importance_update_([first], [others[0]], count=3, **options)

    def larger(first, owner, others, **options):
        importance_update_([first], [others[0]], reduce="max", owners=[owner], task=1, **options)

    def pull(first, owner, others, **options):
        anchor_grad_([first], *([other] for other in others), 2.5, **options)

    for run in (mean, larger, pull):
        whole = tensors[0].clone(), owners.clone()
        run(*whole, tensors[1:], backend=backend)
        assert not torch.equal(whole[0][keep], tensors[0][keep])
        for mask in masks_of(keep, 24):
            first, owner = tensors[0].clone(), owners.clone()
            run(first, owner, tensors[1:], masks=[mask], backend=backend)
            assert torch.equal(first[~keep].view(words), tensors[0][~keep].view(words))
            assert torch.equal(owner[~keep], owners[~keep])
            assert torch.equal(first[keep], whole[0][keep]) and torch.equal(owner[keep], whole[1][keep])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_the_pull_is_the_penaltys_gradient(backend, kept):
    """Beside autograd through strength / 2 sum importance (param - anchor)^2, added to a gradient that is there."""
    params, anchors, grads = drawn(0), drawn(1), drawn(2)
    importances = [value.abs().to(kept) for value in drawn(3)]
    leaves = [param.double().requires_grad_() for param in params]
    lists = zip(leaves, anchors, importances, strict=True)
    penalty = sum((f.double() * (p - a.double()).square()).sum() for p, a, f in lists)
    (0.5 * 7.0 * penalty).backward()
    wanted = [(grad.double() + leaf.grad).float() for grad, leaf in zip(grads, leaves, strict=True)]
    anchor_grad_(grads, params, anchors, importances, torch.tensor(7.0), backend=backend)
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-5)
