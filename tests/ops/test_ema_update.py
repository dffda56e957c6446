"""Averages: LLaCA's rule as written, groups that know nothing of each other, masked entries that count nowhere."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import Mask, ema_update_
from mllmcl_kernels.op import REGISTRY

BACKENDS = ["reference"] + (["cpp"] if not isinstance(REGISTRY["ema_update_"].find("cpp"), str) else [])
RANKS = (3, 1, 8)
# beyond what one part of a tensor holds, and not a multiple of anything
LONG = 100_003
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ({"decay": 0.75}, {"mode": "dema"}, {"mode": "pema"})


def drawn(shape, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("average", "param", "grad", "previous", "square")
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name in names}
    tensors["square"] = tensors["square"].square()
    return tensors


def lists(tensors: dict[str, torch.Tensor], mode: str | None) -> dict:
    """The arguments that belong to a mode, one tensor a list."""
    named = {"averages": ["average"], "params": ["param"]}
    named |= {"dema": {"grads": ["grad"], "previous_grads": ["previous"]}, "pema": {"squared_grads": ["square"]}}.get(
        mode, {}
    )
    return {name: [tensors[key] for key in keys] for name, keys in named.items()}


def update(tensors: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """The new average of a copy."""
    tensors = tensors | {"average": tensors["average"].clone()}
    ema_update_(**lists(tensors, options.get("mode")), **options)
    return tensors["average"]


def pick(tensors: dict[str, torch.Tensor], choose) -> dict[str, torch.Tensor]:
    return {name: choose(value).clone() for name, value in tensors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [2.0, 0.01, 1e6])
def test_dema_is_llacas_rule(backend, factor):
    """Three steps on two tensors beside the rule with its host branch, in float64."""
    wanted, kept = [], []
    for place, shape in enumerate(((9, 14), (LONG,))):
        steps = [drawn(shape, seed=3 * place + step) for step in range(3)]
        average, plain = steps[0]["average"].clone(), steps[0]["average"].double()
        for tensors in steps:
            param, grad, before = (tensors[name].double() for name in ("param", "grad", "previous"))
            beta = factor * (1 + grad.abs().sum()) / ((param - plain).abs().sum() * (grad - before).abs().sum())
            beta = float(beta) if 0 < float(beta) < 1 else 0.125
            plain = (1 - beta) * plain + beta * param
            rest = lists(tensors, "dema") | {"averages": [average]}
            ema_update_(**rest, mode="dema", base_weight=0.125, factor=factor, backend=backend)
        wanted.append(plain.float())
        kept.append(average)
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pema_is_the_clipped_ratio(backend):
    """Every entry by itself, in float64; without curvature the base weight, without an entry's own all of the move."""
    tensors = drawn((37, 11))
    tensors["square"][3] = 0.0
    tensors["param"][5] = tensors["average"][5]
    d, square = (tensors["param"] - tensors["average"]).double(), tensors["square"].double()
    weight = 0.2 * d.abs().mean() * square.mean() / (d.abs() * square)
    plain = tensors["average"] + weight.clamp(0.02, 1.0) * d
    plain[5] = tensors["average"][5].double()
    options = {"mode": "pema", "base_weight": 0.2, "backend": backend}
    ours = update(tensors, **options)
    torch.testing.assert_close(ours, plain.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[3], tensors["param"][3], rtol=1e-6, atol=1e-6)
    flat = update(tensors | {"square": torch.zeros(37, 11)}, **options)
    torch.testing.assert_close(flat, tensors["average"] + 0.2 * d.float())
    whole = update(tensors, **options, granularity="tensor")
    torch.testing.assert_close(whole, tensors["average"] + 0.2 * d.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(sum(RANKS), 7), (7, sum(RANKS)), (LONG // 100, sum(RANKS), 9)], ids=str)
def test_an_expert_is_averaged_as_if_it_were_alone(backend, shape):
    """dema by expert is dema by tensor on each expert's slices; by row on single slices; by entry on single entries."""
    dim = shape.index(sum(RANKS))
    tensors = drawn(shape)
    options = {"mode": "dema", "factor": 10.0, "backend": backend}
    grouped = update(tensors, **options, granularity="expert", ranks=RANKS, dim=dim)
    parts = zip(*(value.split(RANKS, dim) for value in tensors.values()), strict=True)
    alone = [update(dict(zip(tensors, part, strict=True)), **options) for part in parts]
    torch.testing.assert_close(grouped, torch.cat(alone, dim), rtol=1e-5, atol=1e-6)
    by_row = update(tensors, **options, granularity="row", dim=dim)
    ones = update(tensors, **options, granularity="expert", ranks=(1,) * sum(RANKS), dim=dim)
    torch.testing.assert_close(by_row, ones, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(grouped, by_row)
    by_entry = update(tensors, **options, granularity="element")
    column = update(pick(tensors, lambda value: value.reshape(-1, 1)), **options, granularity="row")
    torch.testing.assert_close(by_entry, column.reshape(shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [*MODES, *({"mode": m, "granularity": "row", "dim": 1} for m in ("dema", "pema"))], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_entries_keep_bits_and_count_nowhere(backend, options, dtype):
    """NaN and infinities under the mask reach nobody; the rest is what it is without the masked entries."""
    shape = (70, 24)
    keep = torch.rand(shape[0], generator=torch.Generator().manual_seed(9)) < 0.5
    elements = keep[:, None].expand(shape).contiguous()
    masks = [Mask.rows(keep), Mask.elements(elements), Mask.owner(elements.to(torch.uint8) * 5, 5)]
    tensors = drawn(shape, dtype=dtype)
    for place, value in enumerate(tensors.values()):
        value[~keep] = (float("nan"), float("inf"), float("-inf"))[place % 3]
    # a NaN whose bits no conversion gives back
    payload = 0x7FC12345 if dtype == torch.float32 else 0x7FC1 if dtype == torch.bfloat16 else 0x7E01
    words = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    tensors["average"][~keep] = torch.tensor(payload, dtype=words).view(dtype)
    alone = update(pick(tensors, lambda value: value[keep]), **options, backend=backend)
    assert alone.isfinite().all()
    for mask in masks:
        average = update(tensors, **options, masks=[mask], backend=backend)
        assert torch.equal(average[~keep].view(words), tensors["average"][~keep].view(words))
        torch.testing.assert_close(average[keep], alone, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_groups_may_lie_across(backend):
    """Experts of columns weigh the rows that a mask lets through; one tensor of several, each with its dimension."""
    tall, wide = drawn((600, sum(RANKS)), 1), drawn((sum(RANKS), 40), 2)
    rows = torch.arange(600) % 7 != 0
    pairs = [lists(tensors, "dema") for tensors in (tall, wide)]
    joined = {name: pairs[0][name] + pairs[1][name] for name in pairs[0]}
    joined["averages"] = [value.clone() for value in joined["averages"]]
    options = {"mode": "dema", "granularity": "expert", "ranks": RANKS, "factor": 10.0, "backend": backend}
    ema_update_(**joined, **options, dim=[1, 0], masks=[Mask.rows(rows), None])
    alone = update(pick(tall, lambda value: value[rows]), **options, dim=1)
    torch.testing.assert_close(joined["averages"][0][rows], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(joined["averages"][0][~rows], tall["average"][~rows])
    torch.testing.assert_close(joined["averages"][1], update(wide, **options, dim=0), rtol=1e-5, atol=1e-6)
