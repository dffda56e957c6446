"""What the design of the mixing kernels rests on: products of padded depth, Triton's share of cuBLAS, slabs, skinny
products."""

# T tokens, K in, N out, R sum of ranks

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllmcl_kernels import rows_with_room, side_by_side
from mllmcl_kernels.op import REGISTRY

from .cases import MixCase, ShrinkCase
from .measuring import RESULTS, Case, misses, race, tuned
from .mixing import layer

#: columns beside K in a row of [x | s * G]
PADDING = (0, 64, 128, 144, 512)
#: tokens of a slab
SLABS = (1024, 2048)


@pytest.fixture
def sizes(request, device) -> tuple[list[int], int, int]:
    """Numbers of tokens, width, rank."""
    if request.config.getoption("--tiny"):
        return [32], 64, 16
    return ([4096, 16384], 4096, 128) if device.type == "cuda" else ([512], 2048, 128)


def normal(*shape: int, device, dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def few(rounds: int) -> int:
    return max(3, rounds // 3)


@pytest.mark.parametrize("padding", PADDING)
def test_padded_depth(benchmark, padding: int, sizes, device, dtype, rounds):
    """[x | s * G] [W | B]^T of depth K + padding, and of depth K in rows of that length."""
    tokens, width, _ = sizes
    depth = width + padding
    x, weight = (normal(rows, depth, device=device, dtype=dtype) for rows in (tokens[0], width))
    record = Case("limits", f"product, T={tokens[0]} N={width} K={depth}", flops=2 * tokens[0] * width * depth)
    RESULTS.append(record)
    field = {"product": lambda: F.linear(x, weight)}
    race(record, field, device, few(rounds))
    if padding:
        rows = Case("limits", f"product, T={tokens[0]} N={width} K={width} in rows of {depth}")
        rows.flops = 2 * tokens[0] * width * width
        race(rows, {"product": lambda: F.linear(x[:, :width], weight[:, :width])}, device, few(rounds))
        RESULTS.append(rows)
    benchmark.pedantic(field["product"], rounds=1)


def test_triton_beside_torch(benchmark, sizes, device, dtype, rounds):
    """The kernels that add s * G B^T within the base product, tile by tile, beside two products of torch."""
    tokens, width, rank = sizes
    shape = {"device": device, "dtype": dtype}
    x, weight, mixed, b = (
        normal(*size, **shape) for size in ((tokens[0], width), (width,) * 2, (tokens[0], rank), (width, rank))
    )
    field = {
        "base product": lambda: F.linear(x, weight),
        "two products": lambda: F.linear(x, weight).addmm_(mixed, b.t()),
    }
    record = Case("limits", f"x W^T + (s * G) B^T, T={tokens[0]} d={width} R={rank}")
    record.flops = 2 * tokens[0] * width * (width + rank)
    RESULTS.append(record)
    if device.type == "cuda" and not isinstance(REGISTRY["lora_mix"].find("triton"), str):
        from mllmcl_kernels.triton_expand import ways

        for name, run in (ways(x, weight, None, mixed, b) | in_one_product(x, weight, mixed, b)).items():
            tuned(record, run, device, name)
            usual, truth = field["two products"](), x.double() @ weight.double().t() + mixed.double() @ b.double().t()
            reason = misses([run()], [usual], [truth], ["y"])
            if reason:
                record.refused[name] = reason
            else:
                field[name] = run
    race(record, field, device, few(rounds))
    base = record.seconds["base product"][0] * (width + rank) / width
    for name, (median, _, _) in record.seconds.items():
        record.notes[f"{name}, share of the base product's throughput"] = base / median
    benchmark.pedantic(field["two products"], rounds=1)
    assert not record.refused, record.refused


def in_one_product(x: Tensor, weight: Tensor, mixed: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """[x | s * G] [W | B]^T with x copied beside s * G, and with x in rows that have s * G behind them already."""
    from mllmcl_kernels.triton_expand import mixed_rows, ways

    placed = rows_with_room(x.shape, b.shape[1], dtype=x.dtype, device=x.device).copy_(x)
    weight, b = side_by_side(weight, b)
    behind = mixed_rows(placed, weight, b).copy_(mixed)
    lies = {"copied": (x, mixed), "in place": (placed, behind)}
    found = {name: ways(rows, weight, None, factor, b).get("one product") for name, (rows, factor) in lies.items()}
    return {f"one product, x {name}": run for name, run in found.items() if run is not None}


def stacked(x, weight, bias, a, b, factors) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a) * factors, b)


def slabbed(x, weight, bias, a, b, factors, size: int) -> Tensor:
    """The stacked mixture on `size` tokens at a time, whose rows of x and y stay in the cache; added in place."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, part, factor in zip(x.split(size), y.split(size), factors.split(size), strict=True):
        torch.addmm(bias, rows, weight.t(), out=part)
        part.addmm_((rows @ a.t()) * factor, b.t())
    return y


def test_slabs(benchmark, sizes, device, dtype, rounds):
    """Forward of the stacked mixture whole and in slabs."""
    tokens, width, rank = sizes
    for count in tokens:
        tensors = layer(MixCase(count, width, width, max(rank // 16, 1), 16), device, dtype)
        given = [tensors[key].detach() for key in ("x", "weight", "bias", "a", "b")]
        given.append((tensors["gates"].detach().repeat_interleave(16, -1) * 2.0).to(dtype))
        field = {"stacked": partial(stacked, *given), "base product": partial(F.linear, *given[:3])}
        for size in (count, *(size for size in SLABS if size < count)):
            field["in place" if size == count else f"slabs of {size}"] = partial(slabbed, *given, size)
        record = Case("limits", f"stacked forward, T={count} d={width} R={given[3].shape[0]}")
        record.flops = 2 * count * (width * width + 2 * width * given[3].shape[0])
        RESULTS.append(record)
        race(record, field, device, few(rounds))
    benchmark.pedantic(field["stacked"], rounds=1)


def test_shrink(benchmark, shrink_case: ShrinkCase, device, dtype, rounds):
    """Bytes a second of x A^T with the gates in its epilogue, beside torch's product and its gates after it."""
    case = shrink_case
    x = normal(case.tokens, case.width, device=device, dtype=dtype)
    a = normal(case.rank, case.width, device=device, dtype=dtype, scale=case.width**-0.5)
    experts = case.rank // 16 or 1
    gates = torch.softmax(torch.randn(case.tokens, experts, device=device), -1)
    factors = gates.repeat_interleave(case.rank // experts, -1).to(dtype)
    moved = (case.tokens * (case.width + 2 * case.rank) + a.numel()) * x.element_size()
    record = Case("limits", str(case), bytes=moved)
    RESULTS.append(record)

    def product_and_gates():
        s = F.linear(x, a)
        return s, s * factors

    field = {"product": lambda: F.linear(x, a), "product, then gates": product_and_gates}
    if device.type == "cuda" and not isinstance(REGISTRY["lora_mix"].find("triton"), str):
        from mllmcl_kernels.ops.lora_mix.triton import shrink
        from mllmcl_kernels.triton_tools import Gating

        by = Gating.of(gates, (case.rank // experts,) * experts, (1.0,) * experts, x)
        field = {"ours": lambda: shrink(x, a, None, 0.0, by, x.new_empty(case.tokens, case.rank)), **field}
        tuned(record, field["ours"], device)
    race(record, field, device, few(rounds))
    benchmark.pedantic(field["product"], rounds=1)
