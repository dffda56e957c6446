"""The Python side of the CUDA list kernels: tables and launches, with the kernels' part played by the formula.

The stand-ins find every tensor by the addresses and numbers of the tables alone, as the kernels do.
"""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch

from mllmcl_kernels import Mask, cuda_launch, device_tables
from mllmcl_kernels.masks import ELEMENTS, NONE, OWNER, flatten_masks
from mllmcl_kernels.op import REGISTRY

RANKS = (3, 4, 5)
DTYPES = {code: dtype for dtype, code in cuda_launch.DTYPE_CODE.items()}
NUMBERS = (torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.1), 0.5)
OPTIONS = (0.9, 0.99, 1e-8, 0.1)


def at(address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor whose numbers begin at the address."""
    memory = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def allowed(row: list[int], places: torch.Tensor) -> torch.Tensor:
    """Which entries may change, by the mask's columns of a row."""
    _, _, _, _, mask, kind, active, inner, slices, numel = row
    if kind == NONE:
        return torch.ones_like(places, dtype=torch.bool)
    found = at(mask, numel if kind in (ELEMENTS, OWNER) else slices, torch.uint8)
    found = found[places if kind < 0 else places // inner % slices]
    return found == active if kind == OWNER else found != 0


def chunks_of(rows: torch.Tensor, chunks: torch.Tensor, size: int):
    for tensor, first in chunks.tolist():
        row = rows[tensor].tolist()
        yield row, torch.arange(first, min(first + size, row[-1]))


def adamw(rows, chunks, size, param_dtype, wide, step, lr, scale, *rest):
    values, (beta1, beta2, eps, decay) = rest[:3], rest[3:]
    numbers = zip((step, lr, scale), values, strict=True)
    step, lr, scale = (value if there is None else float(there) for there, value in numbers)
    dtype = DTYPES[param_dtype]
    moment = torch.float32 if wide else dtype
    for row, places in chunks_of(rows, chunks, size):
        chosen = places[allowed(row, places)]
        p, g, m, v = (
            at(address, row[-1], kind) for address, kind in zip(row, (dtype, dtype, moment, moment), strict=False)
        )
        grad = g[chosen].float() * scale
        mean = m[chosen].float() * beta1 + grad * (1 - beta1)
        square = v[chosen].float() * beta2 + grad * grad * (1 - beta2)
        down = lr / (1 - beta1**step) * mean / (square.sqrt() / (1 - beta2**step) ** 0.5 + eps)
        p[chosen] = (p[chosen].float() * (1 - lr * decay) - down).to(dtype)
        m[chosen], v[chosen] = mean.to(moment), square.to(moment)


def clear(rows, chunks, size, dtype):
    for row, places in chunks_of(rows, chunks, size):
        at(row[1], row[-1], DTYPES[dtype])[places[~allowed(row, places)]] = 0


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The modules of the CUDA providers with stand-ins for their kernels, and small chunks."""
    modules = {}
    for name in ("masked_adamw", "mask_grads"):
        modules[name] = importlib.import_module(f"mllmcl_kernels.ops.{name}.cuda")
        monkeypatch.setattr(modules[name], "CHUNK", 64)
    monkeypatch.setattr(torch.ops.mllmcl_cuda, "masked_adamw", adamw, raising=False)
    monkeypatch.setattr(torch.ops.mllmcl_cuda, "mask_grads", clear, raising=False)
    return modules


def lists(dtypes: tuple = (torch.float32,) * 6, moment: torch.dtype | None = None, seed: int = 0):
    """Parameters, gradients and moments: rows, columns, no entries, each kind of mask."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((12, 20), (20, 12), (9, 12), (0, 3), (7, 30), (130,))
    found = []
    for place in range(4):
        drawn = [torch.rand(shape, generator=generator) for shape in shapes]
        drawn[2] = drawn[2].t().contiguous().t()
        wide = [moment or dtype if place > 1 else dtype for dtype in dtypes]
        found.append([tensor.to(kind) for tensor, kind in zip(drawn, wide, strict=True)])
    masks = [
        Mask.experts([False, True, False], RANKS, 0),
        Mask.experts([True, False, True], RANKS, 1),
        Mask.experts([False, True, True], RANKS, 1),
        None,
        Mask.owner(torch.randint(0, 3, (7, 30), generator=generator, dtype=torch.uint8), 2),
        Mask.elements(torch.rand(130, generator=generator) < 0.5),
    ]
    return found, flatten_masks("test", found[0], masks)


def copies(found):
    return [[tensor.clone() for tensor in tensors] for tensors in found]


def assert_like(ours, reference) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        for tensor, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-2 if tensor.dtype != torch.float32 else 1e-5, atol=1e-5)


MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 6, MIXED], ids=["one", "several"])
@pytest.mark.parametrize("moment", [None, torch.float32])
def test_adamw(kernels, dtypes, moment):
    found, masks = lists(dtypes, moment)
    usual = copies(found)
    kernels["masked_adamw"].masked_adamw_cuda(*found, *masks, *NUMBERS, *OPTIONS)
    REGISTRY["masked_adamw_"].reference(*usual, *masks, *map(torch.as_tensor, NUMBERS), *OPTIONS)
    assert_like(found, usual)


def test_gradients_that_lie_otherwise_are_copied(kernels):
    found, masks = lists()
    found[1] = [tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in found[1]]
    usual = copies(found)
    kernels["masked_adamw"].masked_adamw_cuda(*found, *masks, *NUMBERS, *OPTIONS)
    REGISTRY["masked_adamw_"].reference(*usual, *masks, *map(torch.as_tensor, NUMBERS), *OPTIONS)
    assert_like(found, usual)


def test_mask_grads(kernels):
    (_, grads, *_), masks = lists(MIXED)
    usual = [grad.clone() for grad in grads]
    kernels["mask_grads"].mask_grads_cuda(grads, *masks)
    REGISTRY["mask_grads_"].reference(usual, *masks)
    assert all(map(torch.equal, grads, usual))
    assert any(bool((grad == 0).any()) for grad in grads)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 6, MIXED], ids=["one", "several"])
def test_a_prepared_step_follows_gradients_and_sees_what_moved(kernels, dtypes):
    found, masks = lists(dtypes, torch.float32)
    usual = copies(found)
    prepared = kernels["masked_adamw"]._Prepared(*found, *masks, *NUMBERS, *OPTIONS)
    for seed in range(4):
        # the same gradients again, written into, then others elsewhere
        grads = found[1] if seed < 2 else lists(dtypes, seed=seed)[0][1]
        for grad in grads if seed == 1 else ():
            grad.mul_(-0.5)
        assert prepared([grads], float(seed + 1), 0.1, torch.tensor(0.5), *OPTIONS)
        numbers = map(torch.as_tensor, (float(seed + 1), 0.1, 0.5))
        usual[1] = [grad.clone() for grad in grads]
        REGISTRY["masked_adamw_"].reference(*usual, *masks, *numbers, *OPTIONS)
    assert_like((found[0], *found[2:]), (usual[0], *usual[2:]))
    before = copies(found)
    by_rows = [grad.contiguous() for grad in grads]
    assert not prepared([by_rows], 5.0, 0.1, 0.5, *OPTIONS)
    narrow = [grad.to(torch.float16) for grad in grads]
    assert not prepared([narrow], 5.0, 0.1, 0.5, *OPTIONS)
    found[2][0].data = found[2][0].data.clone()
    assert not prepared([grads], 5.0, 0.1, 0.5, *OPTIONS)
    for these, those in zip(found, before, strict=True):
        assert all(map(torch.equal, these, those))


def test_a_captured_graph_makes_its_own_tables(kernels, monkeypatch):
    found, masks = lists()
    prepared = kernels["masked_adamw"]._Prepared(*found, *masks, *NUMBERS, *OPTIONS)
    assert prepared([found[1]], 1.0, 0.1, 0.5, *OPTIONS)
    monkeypatch.setattr(device_tables, "is_capturing", lambda device: True)
    assert not prepared([found[1]], 2.0, 0.1, 0.5, *OPTIONS)
