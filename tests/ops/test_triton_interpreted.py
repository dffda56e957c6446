"""The Triton kernels run by Triton's interpreter on the CPU, in a child process: it has to be chosen before the import.

The child walks the registry with the triton provider and then the tests below: guard bands, row independence, the paths
that only sizes or machines select. bfloat16 is left out, since the interpreter keeps it as integers and rounds wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmcl_kernels import masks
from mllmcl_kernels.op import REGISTRY, Op
from mllmcl_kernels.testing import excess, map_tensors, outputs_of, poisoned_empty, to_double

from . import test_prepared

pytest.importorskip("triton")
INSIDE = os.environ.get("TRITON_INTERPRET", "0") == "1"
#: the fixture
how_steps_were_made = test_prepared.calls
inside = pytest.mark.skipif(not INSIDE, reason="runs in the child process that interprets")
CPU = torch.device("cpu")
GUARD = 64
# what lies around tensors: nothing legal, and anything computed with it shows
WRONG = {torch.int64: 1 << 40, torch.int32: 1 << 30, torch.uint8: 77, torch.bool: True}


@pytest.mark.skipif(INSIDE, reason="is the child")
def test_everything_in_the_interpreter():
    """Registry and the rest of this file, with TRITON_INTERPRET=1 from the start."""
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "MLLMCL_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", "-W", "ignore"]
    files = [str(here / "test_registry.py"), str(here / "test_triton_interpreted.py")]
    child = subprocess.run(
        [*command, "-k", "triton and not bfloat16", *files], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) > 250


def triton_ops() -> list[Op]:
    return [op for op in REGISTRY.values() if INSIDE and not isinstance(op.find("triton"), str)]


@inside
def test_every_op_has_a_triton_provider():
    assert {op.name for op in triton_ops()} == set(REGISTRY)


def check(op: Op, args: tuple, run=None, but: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """The error rule on every output of one call, those at the places `but` aside; gives the outputs."""
    truth = outputs_of(op, to_double(args), op.reference)
    plain = outputs_of(op, args, op.reference)
    with poisoned_empty():
        ours = outputs_of(op, args, run or (lambda *call: op(*call, backend="triton")))
    for place, (mine, usual, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert mine.dtype == usual.dtype and mine.shape == usual.shape, place
        if place in but:
            continue
        if mine.is_floating_point():
            off = excess(mine, usual, true, op.tolerance)
            assert off.passes, f"output {place}: {off}"
        else:
            assert torch.equal(mine, usual), place
    return ours


# -- guard bands ------------------------------------------------------------------------------------------------------


def fence(tensor: torch.Tensor, fences: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A copy inside a larger buffer: NaN or wrong ids before, behind and, for two dimensions, beside every row."""
    wrong = WRONG.get(tensor.dtype, float("nan"))
    if tensor.dim() == 2 and tensor.is_floating_point():
        buffer = torch.full((tensor.shape[0] + 8, tensor.shape[1] + 24), wrong, dtype=tensor.dtype)
        copy = buffer[4 : 4 + tensor.shape[0], 8 : 8 + tensor.shape[1]]
    else:
        buffer = torch.full((tensor.numel() + 2 * GUARD,), wrong, dtype=tensor.dtype)
        copy = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    fences.append((buffer, copy))
    return copy


def intact(buffer: torch.Tensor, copy: torch.Tensor) -> bool:
    """Whether everything outside of `copy` still holds the guard's value."""
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(copy.shape, copy.stride(), copy.storage_offset()).fill_(False)
    left = buffer[outside]
    if buffer.is_floating_point():
        return bool(left.isnan().all())
    return bool((left == WRONG[buffer.dtype]).all())


@contextlib.contextmanager
def fenced_empty(fences: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """While active, torch.empty and its kin give tensors from the middle of a guarded buffer."""
    kept = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def guard(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if type(tensor) is not torch.Tensor or tensor.dtype not in kinds or tensor.numel() == 0:
                return tensor
            wrong = WRONG.get(tensor.dtype, float("nan"))
            buffer = kept[0](tensor.numel() + 2 * GUARD, dtype=tensor.dtype).fill_(wrong)
            inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
            fences.append((buffer, inner))
            return inner

        return wrapped

    kinds = (torch.float32, torch.float16, torch.int32)
    torch.empty, torch.empty_like, torch.Tensor.new_empty = (guard(make) for make in kept)
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = kept


def all_samples(dtype: torch.dtype = torch.float32):
    for op in triton_ops():
        for index, sample in enumerate(op.samples(CPU, dtype, 31)):
            yield pytest.param(op, index, id=f"{op.name}-{sample.name.replace(' ', '_')}")


@inside
@pytest.mark.parametrize(("op", "index"), list(all_samples()))
def test_guard_bands(op: Op, index: int):
    """Nothing outside of a tensor is read into a result or written, and results are those of unguarded tensors."""
    sample = op.samples(CPU, torch.float32, 31)[index]
    usual = outputs_of(op, sample.args, lambda *args: op(*args, backend="triton"))
    fences: list[tuple[torch.Tensor, torch.Tensor]] = []
    guarded = map_tensors(sample.args, lambda tensor: fence(tensor, fences))
    with fenced_empty(fences):
        result = op(*guarded, backend="triton")
    ours = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    for name, arg in zip(op.argument_names, guarded, strict=True):
        ours += list(arg) if name in op.mutates else []
    for place, (mine, other) in enumerate(zip(ours, usual, strict=True)):
        assert torch.equal(mine.isnan(), other.isnan()), place
        torch.testing.assert_close(mine.nan_to_num(), other.nan_to_num(), rtol=1e-4, atol=1e-5)
    for buffer, copy in fences:
        assert intact(buffer, copy), (buffer.shape, copy.shape)


@contextlib.contextmanager
def watched_addresses(args: tuple) -> Iterator[list[str]]:
    """Collects every access of a kernel outside of its tensors and of what tables may point to: `args`, copies."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    from mllmcl_kernels import layouts, triton_tools

    strays: list[str] = []
    ranges: list[tuple[int, int]] = []
    copies: list[torch.Tensor] = []
    lay, start, load, store = (
        layouts._like,
        triton_tools.start,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def span(tensor: torch.Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1 if tensor.numel() else 0) * tensor.element_size()

    def laying(head, tensor):
        copies.append(lay(head, tensor))
        return copies[-1]

    def starting(kernel, grid, call, *rest):
        ranges[:] = [span(arg) for arg in call if isinstance(arg, torch.Tensor)]
        map_tensors((*args, copies), lambda tensor: ranges.append(span(tensor)))
        start(kernel, grid, call, *rest)

    def look(pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.uint64)
        known = np.zeros(first.shape, dtype=bool)
        for low, high in ranges:
            known |= (first >= low) & (first + np.uint64(size) <= high)
        if not known.all():
            strays.append(f"{int((~known).sum())} of {first.size} elements of {size} bytes")

    def loading(self, pointers, mask, *rest):
        look(pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self, pointers, value, mask, *rest):
        look(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(layouts, "_like", laying),
        mock.patch.object(triton_tools, "start", starting),
        mock.patch.object(InterpreterBuilder, "create_masked_load", loading),
        mock.patch.object(InterpreterBuilder, "create_masked_store", storing),
    ):
        yield strays


@inside
@pytest.mark.parametrize(("op", "index"), list(all_samples()))
def test_every_address_lies_in_a_tensor(op: Op, index: int):
    """No element that a mask lets through lies outside of the tensors of the call, whether it matters or not."""
    args = op.samples(CPU, torch.float32, 33)[index].args
    with watched_addresses(args) as strays:
        op(*args, backend="triton")
    assert not strays


@inside
def test_every_address_of_ids_out_of_range_lies_in_a_tensor():
    """A wrong id is compared and never turned into an address."""
    args = layer_args(6, 8, 5, [2, 2], torch.tensor([0, 7, -9, 1 << 40, -(1 << 40), 1]))
    with watched_addresses(args) as strays:
        REGISTRY["lora_mix"](*args, backend="triton")
        REGISTRY["lora_mix_backward"](*backward_args(args, [True] * 5 + [False]), backend="triton")
    assert not strays


# -- row independence -------------------------------------------------------------------------------------------------


def disturb(tensor: object, rows: int, row: int) -> object:
    """The argument with every row but one changed, NaN included; arguments without rows stay."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.shape[0] != rows:
        return tensor
    other = tensor.clone()
    mine = tensor[row].clone()
    if tensor.dtype == torch.bool:
        other = ~other
    elif tensor.is_floating_point():
        other = torch.full_like(other, float("nan")) if rows % 2 else other * -3.0 + 1.0
    else:
        other = torch.where(other > 0, other - 1, other + 1)
    other[row] = mine
    return other


# outputs with a row for every token
ROW_OUTPUTS = {
    "distillation_loss": (1, 2),
    "lora_mix": (0, 1),
    "lora_mix_backward": (0,),
    "lora_mix_routed": (0, 1, 2, 3, 4, 5, 6),
    "lora_mix_routed_backward": (0,),
    "route": (0, 1, 2, 3, 4),
    "route_backward": (0,),
    "soft_target_cross_entropy": (1, 2),
}


def num_rows(args: tuple) -> int:
    return next(arg for arg in args if isinstance(arg, torch.Tensor)).shape[0]


def row_samples():
    for op in triton_ops():
        if op.name in ROW_OUTPUTS:
            for index, sample in enumerate(op.samples(CPU, torch.float32, 32)):
                if num_rows(sample.args) > 1 and "NaN" not in sample.name:
                    yield pytest.param(op, index, id=f"{op.name}-{sample.name.replace(' ', '_')}")


@inside
@pytest.mark.parametrize(("op", "index"), list(row_samples()))
def test_rows_are_independent(op: Op, index: int):
    """Other rows' values, gates and ids do not change a bit of mine."""
    args = op.samples(CPU, torch.float32, 32)[index].args
    rows = num_rows(args)
    row = rows // 2
    names = op.argument_names
    shared = {"weight", "bias", "lora_a", "lora_b", "router_weight", "router_bias", "seed"}
    # nor what would be refused
    shared |= {"head_weight", "head_bias", "labels", "teacher", "indices", "counted"}
    changed = [arg if name in shared else disturb(arg, rows, row) for name, arg in zip(names, args, strict=True)]
    before, after = op(*args, backend="triton"), op(*changed, backend="triton")
    # an output that was not asked for has no rows
    for place in (place for place in ROW_OUTPUTS[op.name] if len(before[place]) == rows):
        old, new = before[place][row], after[place][row]
        assert torch.equal(old, new), place


# -- paths that sizes or machines select ------------------------------------------------------------------------------


def layer_args(tokens: int, width: int, out: int, ranks: list[int], gates, dtype=torch.float32, dropout: float = 0.0):
    from mllmcl_kernels.ops.lora_mix.samples import layer

    generator = torch.Generator().manual_seed(tokens + width + out)
    tensors = {key: value.to(dtype) for key, value in layer(generator, tokens, width, out, sum(ranks)).items()}
    scaling = [1.0 + 0.5 * expert for expert in range(len(ranks))]
    seed = torch.tensor([987654321987654321]) if dropout else None
    return (*tensors.values(), gates, seed, ranks, scaling, [True] * len(ranks), dropout)


def backward_args(args: tuple, needs: list[bool]) -> tuple:
    x, weight, _, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout = args
    _, s = REGISTRY["lora_mix"].reference(*args)
    dy = torch.randn(x.shape[0], weight.shape[0], generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return (dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gates", [None, torch.tensor([[0.7, -1.2, 0.0]]), torch.tensor([2, -1, 0])], ids=str)
def test_contraction_split_over_programs(gates, dtype):
    """Few tokens and a long contraction: planes, and their sum in the second kernel."""
    args = layer_args(3, 2100, 1030, [5, 0, 9], gates, dtype)
    check(REGISTRY["lora_mix"], args)
    soft = gates is not None and gates.is_floating_point()
    check(REGISTRY["lora_mix_backward"], backward_args(args, [True, True, True, True, True, soft]))


STATISTICS = [name + way for name in ("routing_planes", "routing_statistics") for way in ("", "_backward")]
LINEAR_LOSSES = ("soft_target_cross_entropy", "distillation_loss")


@inside
@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_tokens_that_do_not_count_stay_in_the_chunk(name: str, monkeypatch):
    """As on a GPU, where nobody looks which tokens count: zero loss and gradient inside of the kernel."""
    from mllmcl_kernels.ops import linear_loss

    monkeypatch.setattr(linear_loss, "is_compacted", lambda device: False)
    op = REGISTRY[name]
    for sample in op.samples(CPU, torch.float32, 12):
        check(op, sample.args)


@inside
def test_targets_that_are_none_on_a_device(monkeypatch):
    """NaN for their token and not for its neighbours."""
    from . import test_linear_losses

    test_linear_losses.test_targets_that_are_none_on_a_device("triton", False, monkeypatch)


@inside
@pytest.mark.parametrize("soft", [0.0, 0.1])
def test_rows_longer_than_a_block(soft: float):
    """A vocabulary of two blocks and a bit, the label in each of them."""
    generator = torch.Generator().manual_seed(7)
    hidden, head = torch.randn(3, 6, generator=generator), torch.randn(2 * 4096 + 5, 6, generator=generator)
    labels, teacher = torch.tensor([17, 5000, 8196]), torch.randn(3, len(head), generator=generator)
    check(REGISTRY["soft_target_cross_entropy"], (hidden, head, None, None, labels, soft, -100, None, [True] * 3))
    check(REGISTRY["distillation_loss"], (hidden, head, None, None, teacher, None, None, 2.0, None, [True] * 3))


@inside
@pytest.mark.parametrize("tokens", [66, 1030])
def test_tiles_of_every_size(tokens: int):
    """The tiles of more tokens, in half precision, with ranks over one tile."""
    generator = torch.Generator().manual_seed(1)
    gates = torch.randn(tokens, 3, generator=generator)
    args = layer_args(tokens, 40, 24, [100, 130, 50], gates, torch.float16)
    check(REGISTRY["lora_mix"], args)
    check(REGISTRY["lora_mix_backward"], backward_args(args, [True, False, False, True, True, True]))


@inside
@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(wanted: int):
    """Asking for one gradient gives the bits it has among all of them."""
    op = REGISTRY["lora_mix_backward"]
    gates = torch.randn(4, 2, generator=torch.Generator().manual_seed(2))
    args = layer_args(12, 16, 20, [4, 6], gates, dropout=0.3)
    everything = op(*backward_args(args, [True] * 6), backend="triton")
    alone = op(*backward_args(args, [place == wanted for place in range(6)]), backend="triton")
    for place, (mine, other) in enumerate(zip(alone, everything, strict=True)):
        assert torch.equal(mine, other) if place == wanted else mine.numel() == 0, place


@inside
@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("name", ["lora_mix", "lora_mix_backward", "lora_mix_routed_backward"])
@pytest.mark.parametrize("way", ["dual source", "by tensor maps", "slabs"])
def test_ways_of_adding_a_product(name: str, way: str, tokens: int, dtype, capability: int):
    """In place of two products on the whole: forward and, with the factors transposed, for dx; ragged throughout."""
    from mllmcl_kernels import triton_expand

    kind = {"dual source": triton_expand.DUAL, "by tensor maps": triton_expand.MAPS, "slabs": triton_expand.SLABS}[way]
    chosen = triton_expand.Way(kind, 32 if way == "slabs" else 0)
    gates = torch.randn(tokens, 2, generator=torch.Generator().manual_seed(4))
    if name == "lora_mix":
        args = layer_args(tokens, 150, 70, [3, 8], gates, dtype)
    else:
        args = REGISTRY[name].samples(CPU, dtype, 7)[0 if tokens == 5 else 1].args
    used = []
    run = triton_expand._run
    with (
        mock.patch.object(triton_expand, "candidates", lambda *_: (chosen,)),
        mock.patch.object(triton_expand, "_run", lambda *call: (used.append(call[0]), run(*call))[1]),
        mock.patch.object(triton_expand, "compute_capability", lambda device: capability),
    ):
        check(REGISTRY[name], args)
    assert used == [chosen] or (used == [] and name != "lora_mix")


@inside
def test_what_can_add_a_product():
    """torch's two products come first, so that they run where nothing was timed."""
    from mllmcl_kernels.triton_expand import candidates

    def names(*size, side_by_side=False):
        return [str(way) for way in candidates(*size, True, side_by_side)]

    slabs, kernels = ["slabs of 1024", "slabs of 2048"], ["dual source", "dual source by tensor maps"]
    assert names(4096, 8192, 128, torch.bfloat16) == ["two products", *slabs, *kernels]
    assert names(4096, 512, 120, torch.bfloat16) == ["two products", *slabs]
    assert names(4096, 512, 128, torch.float32) == names(64, 512, 128, torch.bfloat16) == ["two products"]
    assert str(candidates(4096, 8192, 128, torch.bfloat16, False, False)[-1]) == kernels[0]
    beside = {"side_by_side": True}
    assert names(4096, 8192, 128, torch.bfloat16, **beside) == ["two products", *slabs, *kernels, "one product"]
    assert names(512, 8192, 120, torch.float16, **beside) == ["two products", "one product"]
    assert names(4096, 512, 128, torch.float32, **beside) == names(511, 512, 128, torch.float16, **beside)
    assert names(511, 512, 128, torch.float16, **beside) == ["two products"]


# -- one product of what lies side by side ----------------------------------------------------------------------------


@contextlib.contextmanager
def in_one_product(take: int = -1) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """The last way of adding a product wins, and what else is picked is the candidate `take`; collects x, s * G and
    [x | s * G] of each product in one."""
    from mllmcl_kernels import triton_expand
    from mllmcl_kernels.ops.lora_mix import triton as mix
    from mllmcl_kernels.ops.lora_mix_routed import triton as routed

    joined = []
    join = triton_expand.joined_rows

    def joining(x, mixed):
        joined.append((x, mixed, join(x, mixed)))
        return joined[-1][2]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton_expand, "joined_rows", joining))
        stack.enter_context(mock.patch.object(triton_expand, "pick_tile", lambda key, found, *_: found[-1]))
        for module in (mix, routed):
            stack.enter_context(mock.patch.object(module, "pick_tile", lambda key, found, *_: found[take]))
        yield joined


def side_by_side_layer(args: tuple, lies: str) -> tuple:
    """The arguments with W and B side by side and x "in place", "copied" or in somebody's wider "slice"; NaN in all
    that is nobody's."""
    from mllmcl_kernels import rows_with_room, side_by_side

    x, weight, bias, a, b, *rest = args
    (tokens, width), rank = x.shape, len(a)
    if lies == "in place":
        placed = rows_with_room((tokens, width), rank, dtype=x.dtype)
        behind = placed.stride(0) - width
        placed.as_strided((tokens, behind), placed.stride(), width).fill_(float("nan"))
        x = placed.copy_(x)
    elif lies == "slice":
        x = torch.cat((x, torch.full((tokens, 64), 7.0, dtype=x.dtype)), 1)[:, :width]
    weight, b = side_by_side(weight, b)
    behind = weight.stride(0) - width - rank
    weight.as_strided((len(weight), behind), weight.stride(), width + rank).fill_(float("nan"))
    return (x, weight, bias, a, b, *rest)


def step_of(args: tuple, backend: str) -> list[torch.Tensor]:
    """y and every gradient, by autograd."""
    leaves = [arg.detach().requires_grad_() for arg in args[:5] if arg is not None]
    gates = args[5]
    if gates is not None and gates.is_floating_point():
        gates = gates.detach().requires_grad_()
        leaves.append(gates)
    layer = [None if arg is None else leaf for arg, leaf in zip(args, expanded(leaves, args), strict=False)]
    y, _ = REGISTRY["lora_mix"](*layer, gates, *args[6:], backend=backend)
    return [y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)]


def expanded(leaves: list[torch.Tensor], args: tuple) -> Iterator[torch.Tensor | None]:
    """The leaves in the places of the first five arguments, None where there was none."""
    left = iter(leaves)
    return (None if arg is None else next(left) for arg in args[:5])


SOFT = torch.randn(520, 3, generator=torch.Generator().manual_seed(6))


@inside
@pytest.mark.parametrize("gates", ["soft", "ids"])
@pytest.mark.parametrize("lies", ["copied", "in place", "slice"])
def test_one_product_of_what_lies_side_by_side(lies: str, gates: str):
    """Output and gradients by the error rule; x and what is beside it keep their bits, s * G is written once.

    Soft gates come with a bias and a tile of ours for s, ids with neither.
    """
    take, gates, has_bias = (0, SOFT, True) if gates == "soft" else (-1, torch.arange(520) % 4 - 1, False)
    args = layer_args(520, 72, 40, [5, 0, 9], gates, torch.float16)
    args = (*args[:2], args[2] if has_bias else None, *args[3:])
    given = side_by_side_layer(args, lies)
    x = given[0]
    kept = torch.as_strided(x, (520, x.stride(0)), x.stride(), 0).clone()
    with in_one_product(take) as joined, poisoned_empty():
        found = step_of(given, "triton")
    ((seen, mixed, both),) = joined
    assert seen.data_ptr() == x.data_ptr() and (both.data_ptr() == x.data_ptr()) == (lies == "in place")
    assert (mixed.data_ptr() == x.data_ptr() + 72 * 2) == (lies == "in place")
    usual = step_of(args, "reference")
    wide = tuple(arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)
    for place, triple in enumerate(zip(found, usual, step_of(wide, "reference"), strict=True)):
        off = excess(*triple)
        assert off.passes, f"output {place}: {off}"
    assert all(tensor.is_contiguous() for tensor in found)
    after = torch.as_strided(x, kept.shape, kept.stride(), 0)
    ours = slice(72, 86) if lies == "in place" else slice(0, 0)
    kept[:, ours] = after[:, ours]
    assert torch.equal(kept.view(torch.int16), after.view(torch.int16))


@inside
def test_layers_that_share_x_in_place():
    """Both forwards, then both backwards: autograd sees no change of x, gradients are those of layers apart."""
    first = side_by_side_layer(layer_args(520, 72, 40, [5, 0, 9], SOFT, torch.float16), "in place")
    apart = layer_args(520, 72, 24, [3, 4, 0], SOFT, torch.float16)
    second = (first[0], *side_by_side_layer(apart, "copied")[1:])
    x = first[0].requires_grad_()
    with in_one_product() as joined:
        outputs = [REGISTRY["lora_mix"](x, *args[1:], backend="triton")[0] for args in (first, second)]
        gradients = [torch.autograd.grad(y.float().sin().sum(), x)[0] for y in outputs]
    assert [both.data_ptr() for *_, both in joined] == [x.data_ptr()] * 2
    for y, gradient, args in zip(outputs, gradients, (first, second), strict=True):
        args = (x.detach().clone(), *args[1:])
        usual, truth = step_of(args, "reference")[:2], step_of(to_double(args), "reference")[:2]
        for triple in zip((y, gradient), usual, truth, strict=True):
            assert excess(*triple).passes


@inside
@pytest.mark.parametrize("path", ["one pass", "groups"])
def test_one_product_with_a_router_in_place(path: str):
    """The merged kernel and the grouped ones write s * G behind the rows of x as well."""
    layer = layer_args(520, 72, 40, [5, 3, 9], None, torch.float16)
    router = (0.2 * torch.randn(3, 72, generator=torch.Generator().manual_seed(8))).half()
    given = side_by_side_layer(layer, "in place")
    rest = (router, None, None, None, None, None, 2, "softmax", 1.0, True, False, *layer[7:])
    with contextlib.ExitStack() as stack:
        if path == "groups":
            stack.enter_context(grouped(0))
        joined = stack.enter_context(in_one_product(0 if path == "one pass" else -1))
        y, *_ = REGISTRY["lora_mix_routed"](*given[:5], *rest, backend="triton")
    ((_, mixed, both),) = joined
    assert both.data_ptr() == given[0].data_ptr() and mixed.data_ptr() == given[0].data_ptr() + 72 * 2
    plain, *_ = REGISTRY["lora_mix_routed"](*layer[:5], *rest, backend="reference")
    truth, *_ = REGISTRY["lora_mix_routed"](*to_double(layer[:5]), router.double(), *rest[1:], backend="reference")
    assert excess(y, plain, truth).passes


@inside
def test_other_ways_take_what_lies_side_by_side():
    """With s * G behind the rows of x, which two products, slabs and both kernels read there."""
    from mllmcl_kernels import triton_expand

    x, weight, bias, _, b, *_ = side_by_side_layer(layer_args(520, 64, 48, [16, 16], None, torch.float16), "in place")
    mixed = triton_expand.mixed_rows(x, weight, b).copy_(torch.randn(520, 32))
    assert mixed.data_ptr() == x.data_ptr() + 64 * 2
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double()) + mixed.double() @ b.double().t()
    plain = torch.nn.functional.linear(x, weight, bias) + mixed @ b.t()
    found = triton_expand.ways(x, weight, bias, mixed, b)
    assert list(found) == ["two products", "dual source", "dual source by tensor maps", "one product"]
    slabs = triton_expand.Way(triton_expand.SLABS, 100)
    found["slabs"] = lambda: triton_expand._run(slabs, x, weight, bias, mixed, b)
    for name, run in found.items():
        assert excess(run(), plain, truth).passes, name


@inside
def test_a_compiled_layer_finds_x_in_place():
    args = side_by_side_layer(layer_args(520, 72, 40, [5, 0, 9], SOFT, torch.float16), "in place")

    def run(*tensors):
        from mllmcl_kernels import lora_mix

        return lora_mix(*tensors, SOFT.view(4, 130, 3), ranks=(5, 0, 9), scaling=(1.0, 1.5, 2.0), backend="triton")

    torch.compiler.reset()
    # as a batch of samples
    tensors = (args[0].view(4, 130, 72), *args[1:5])
    with in_one_product() as joined:
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(*tensors)
        assert torch.equal(y, run(*tensors))
    assert [both.data_ptr() for *_, both in joined] == [args[0].data_ptr()] * 2
    torch.compiler.reset()


@inside
@pytest.mark.parametrize("name", ["_dual_product_kernel", "_few_tokens_kernel", "_few_tokens_at_once_kernel"])
def test_rows_that_lie_apart_are_read_where_they_are(name: str):
    """x, W and B as columns of wider tensors, NaN beside them: no copy is made, nothing of it is read."""
    from mllmcl_kernels import triton_expand, triton_tools

    def apart(tensor):
        return torch.full((tensor.shape[0], tensor.shape[1] + 24), float("nan"))[:, 8:-16].copy_(tensor)

    x, weight, bias, a, b, *rest = layer_args(5, 72, 70, [5, 0, 9], None)
    op, given, seen = REGISTRY["lora_mix"], [apart(x), apart(weight), bias, a, apart(b)], set()
    start = triton_tools.start

    def noting(kernel, grid, args, *constants):
        if kernel.fn.__name__ == name:
            seen.update(arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor))
        start(kernel, grid, args, *constants)

    ways = {
        "_dual_product_kernel": mock.patch.object(
            triton_expand, "candidates", lambda *_: (triton_expand.Way(triton_expand.DUAL),)
        ),
        "_few_tokens_kernel": in_launches(2),
        "_few_tokens_at_once_kernel": in_launches(1),
    }
    with ways[name], mock.patch.object(triton_tools, "start", noting):
        y, s = op(*given, *rest, backend="triton")
    assert {given[place].data_ptr() for place in (0, 1, 4)} <= seen
    for ours, truth in zip((y, s), op(x, weight, bias, a, b, *rest, backend="reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


# -- few tokens -------------------------------------------------------------------------------------------------------


KERNELS_OF = {1: ["_few_tokens_at_once_kernel"], 2: ["_lora_mix_shrink_kernel", "_few_tokens_kernel"]}
in_one_or_two = pytest.mark.parametrize("launches", list(KERNELS_OF))


@contextlib.contextmanager
def in_launches(number: int) -> Iterator[list[str]]:
    """Every forward runs the kernels for few tokens, so many of them; collects the kernels' names."""
    from mllmcl_kernels import counters, triton_few, triton_tools
    from mllmcl_kernels.ops.lora_mix import triton as mix

    names = []
    start = triton_tools.start

    def noting(kernel, *call):
        names.append(kernel.fn.__name__)
        start(kernel, *call)
        assert not any(counts.any() for counts in counters._of_streams.values()), "counters are left as they were"

    with (
        mock.patch.object(mix, "launch_counts", lambda *_: (triton_few.Launches(number),)),
        mock.patch.object(triton_tools, "start", noting),
    ):
        yield names


FEW_GATES = {
    "none": lambda tokens: None,
    "soft": lambda tokens: torch.randn(tokens, 3, generator=torch.Generator().manual_seed(1)),
    "constant": lambda tokens: torch.tensor([[0.5, -1.0, 0.0]]),
    "ids": lambda tokens: torch.arange(tokens) % 4 - 1,
}


@inside
@pytest.mark.parametrize("gates", list(FEW_GATES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@in_one_or_two
def test_few_tokens_in_few_launches(launches: int, tokens: int, dtype, gates: str):
    """y and s, B by rows and by columns, with one plane of s and with several, ranks over one block."""
    dropout = 0.3 if tokens == 5 and gates == "soft" else 0.0
    for width, ranks in ((2100, [5, 0, 9]), (72, [40, 16, 50])):
        x, weight, bias, a, b, *rest = layer_args(tokens, width, 70, ranks, FEW_GATES[gates](tokens), dtype, dropout)
        wide = torch.cat((x, x), 1)
        for args in ((x, weight, bias, a, b, *rest), (wide[:, :width], weight, None, a, b.t().contiguous().t(), *rest)):
            with in_launches(launches) as names:
                check(REGISTRY["lora_mix"], args)
            assert names == (KERNELS_OF[launches] if tokens else [])


@inside
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [[5, 0, 9], [40, 16, 50]])
@pytest.mark.parametrize("tokens", [1, 5, 40, 70])
def test_one_launch_gives_the_bits_of_two(tokens: int, ranks: list[int], dropout: float):
    """Where both cut the contraction alike: for the same planes, the same sums in the same order."""
    from mllmcl_kernels import triton_few
    from mllmcl_kernels.ops.lora_mix import triton as mix

    args = layer_args(tokens, 2100, 70, ranks, FEW_GATES["soft"](tokens), torch.float16, dropout)
    tile, found = triton_few.FEW_TILES[16 if tokens <= 16 else 64][0], []

    def pick(key, choices, *_):
        return tile if key[0] == "lora_mix_planes" else choices[0]

    for launches in (1, 2):
        with mock.patch.object(mix, "pick_tile", pick), in_launches(launches), poisoned_empty():
            found.append(REGISTRY["lora_mix"](*args, backend="triton"))
    assert all(map(torch.equal, *found))


@inside
@in_one_or_two
def test_every_address_of_few_tokens_lies_in_a_tensor(launches: int):
    args = layer_args(5, 72, 70, [5, 0, 9], torch.tensor([1 << 40, 2, -1, 0, -(1 << 40)]))
    with in_launches(launches) as names, watched_addresses(args) as strays:
        REGISTRY["lora_mix"](*args, backend="triton")
    assert len(names) == launches and not strays


@inside
@in_one_or_two
def test_an_id_out_of_range_of_few_tokens_raises_the_flag(launches: int, monkeypatch):
    from mllmcl_kernels import faults

    args = layer_args(5, 72, 70, [5, 0, 9], torch.tensor([0, 3, -1, 0, 2]))
    monkeypatch.setattr(faults, "_watches", {})
    with in_launches(launches):
        REGISTRY["lora_mix"](*args, backend="triton")
    with pytest.raises(ValueError, match=r"lora_mix: gates must be ids in -1\.\.2; .* position 1 was not"):
        faults.raise_faults()


@inside
def test_when_few_tokens_take_few_launches():
    """Never before they were found to be quicker."""
    from mllmcl_kernels.triton_few import launch_counts

    assert [way.number for way in launch_counts(64, torch.bfloat16)] == [4, 2, 1]
    assert [way.number for way in launch_counts(65, torch.bfloat16)] == [4]
    assert [way.number for way in launch_counts(1, torch.float32)] == [4]


# -- tokens grouped by the experts they chose -------------------------------------------------------------------------


@contextlib.contextmanager
def grouped(tile: int) -> Iterator[list]:
    """Wherever tokens have a choice they are grouped; collects the pairs."""
    from mllmcl_kernels import triton_grouped
    from mllmcl_kernels.ops.lora_mix import triton as mix
    from mllmcl_kernels.ops.lora_mix_routed import triton as routed

    made = []

    def pairs(*args):
        made.append(triton_grouped.pairs_by_expert(*args))
        return made[-1]

    with contextlib.ExitStack() as stack:
        choose = lambda *args: (triton_grouped.Grouping(-1 if args[2] is None else tile),)  # noqa: E731
        stack.enter_context(mock.patch.object(mix, "groupings", choose))
        # router and ranks in one pass know no groups
        stack.enter_context(mock.patch.object(routed, "_merges", lambda *_: False))
        for module in (mix, routed):
            stack.enter_context(mock.patch.object(module, "pairs_by_expert", pairs))
        yield made


IDS = {
    "of each token": lambda generator: torch.randint(-1, 4, (150,), generator=generator),
    "of short samples": lambda generator: torch.randint(-1, 4, (15,), generator=generator),
    "of long samples": lambda generator: torch.tensor([3, 1]),
    "none": lambda generator: torch.full((150,), -1),
    "out of range": lambda generator: torch.tensor([1 << 40, 4, -2, -(1 << 40), 2]),
}


@inside
@pytest.mark.parametrize(
    ("dtype", "dropout", "tile"),
    [(torch.float32, 0.0, 0), (torch.float32, 0.3, 1), (torch.float16, 0.0, 0), (torch.float16, 0.0, 1)],
)
@pytest.mark.parametrize("ids", list(IDS))
def test_ids_in_groups(ids: str, dtype, dropout: float, tile: int):
    """Forward, every gradient, some experts frozen, B by rows and by columns, ranks of any size."""
    ranks = [16, 140, 0, 9]
    gates = IDS[ids](torch.Generator().manual_seed(5))
    x, weight, bias, a, b, *rest = layer_args(150, 72, 136, ranks, gates, dtype, dropout)
    for lora_b in (b, b.t().contiguous().t()):
        args = (x, weight, bias, a, lora_b, *rest)
        backward = list(backward_args(args, [True] * 5 + [False]))
        backward[9] = [True, False, True, True]
        with grouped(tile) as pairs:
            _, s = check(REGISTRY["lora_mix"], args, but=(1,))
            check(REGISTRY["lora_mix_backward"], tuple(backward))
        assert len(pairs) == 2 and None not in pairs
        full = REGISTRY["lora_mix"].reference(*args)[1]
        owner = torch.arange(4).repeat_interleave(torch.tensor(ranks))
        own = gates.repeat_interleave(150 // len(gates))[:, None] == owner
        torch.testing.assert_close(s, torch.where(own, full, 0.0), rtol=1e-2, atol=1e-2)
        assert not s[~own].any()


@inside
@pytest.mark.parametrize(("dtype", "tile"), [(torch.float32, 1), (torch.float16, 0)])
@pytest.mark.parametrize(
    ("score", "renormalize", "ranks", "dropout", "masked"),
    [
        ("softmax", False, [32] * 6, 0.0, False),
        ("softmax", True, [16, 48, 130, 0, 3, 16], 0.0, True),
        ("sigmoid", True, [16] * 6, 0.2, False),
        ("cosine", False, [16] * 6, 0.0, True),
    ],
)
def test_best_experts_in_groups(score, renormalize, ranks, dropout, masked, dtype, tile: int):
    """top 2 of 6, forward and every gradient; some tokens may choose one expert or none."""
    generator = torch.Generator().manual_seed(sum(ranks))
    x, weight, bias, a, b, _, seed, ranks, scaling, trainable, dropout = layer_args(
        150, 72, 136, ranks, None, dtype, dropout
    )
    router = (0.2 * torch.randn(6, 72, generator=generator)).to(dtype)
    allowed = None
    if masked:
        allowed = torch.rand(150, 6, generator=generator) < 0.5
        allowed[:3] = torch.tensor([[False] * 6, [True, *[False] * 5], [True] * 6])
        if score == "softmax":
            # a row that may choose nothing has no softmax
            allowed[:, 4] |= ~allowed.any(1)
    options = (2, score, 0.8, renormalize, False, ranks, scaling, trainable, dropout)
    args = (x, weight, bias, a, b, router, None, None, allowed, None, seed, *options)
    op, backward = REGISTRY["lora_mix_routed"], REGISTRY["lora_mix_routed_backward"]
    y, s, gates, indices, values, logits, probs, planes = op.reference(*args)
    outputs = (y, gates, values, logits, probs)
    gradients = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    gradients.append(0.1 * torch.randn(planes.shape, generator=generator))
    saved = (x, weight, a, b, router, seed, s, gates, indices, logits, probs, None)
    some = [True, False, False, True, False, True, False]
    with grouped(tile) as pairs:
        check(op, args, but=(1,))
        for needs in ([True] * 7, some, [not need for need in some])[: 3 if tile else 1]:
            check(
                backward,
                (*gradients, *saved, score, 0.8, renormalize, False, ranks, scaling, trainable, dropout, needs),
            )
    assert len(pairs) == (4 if tile else 2) and None not in pairs


@inside
@pytest.mark.parametrize("experts", [3, 40])
@pytest.mark.parametrize("run", [1, 40])
@pytest.mark.parametrize("top_k", [1, 3])
def test_pairs_are_sorted_by_expert(experts: int, run: int, top_k: int, monkeypatch):
    """Over many chunks: each expert's tokens, ascending."""
    from mllmcl_kernels import triton_grouped
    from mllmcl_kernels.triton_tools import Gating

    monkeypatch.setattr(triton_grouped, "SORT_ENTRIES", 1024)
    generator = torch.Generator().manual_seed(experts + run)
    tokens, rows = 400, 400 // run
    chosen = torch.rand(rows, experts, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
    chosen[torch.rand(chosen.shape, generator=generator) < 0.2] = -1
    x = torch.zeros(tokens, 4)
    by = Gating.of(torch.zeros(tokens, experts), [2] * experts, [1.0] * experts, x)
    choice, grouping = triton_grouped.Choice(chosen, run), triton_grouped.Grouping(0)
    pairs = triton_grouped.pairs_by_expert(choice, tokens, by, grouping)
    flat = chosen.repeat_interleave(run, 0).flatten()
    order, starts = pairs.order.tolist(), pairs.starts.tolist()
    assert [order[first:last] for first, last in itertools.pairwise(starts)] == [
        (flat == expert).nonzero().flatten().tolist() for expert in range(experts)
    ]
    assert starts[0] == 0 and starts[-1] == (flat >= 0).sum()


@inside
def test_every_address_of_groups_lies_in_a_tensor():
    """Ragged tiles, the last block of columns, experts without tokens, ids out of range."""
    args = layer_args(150, 72, 136, [16, 48, 32], torch.tensor([1 << 40, 2, -1, 0, -(1 << 40)]))
    backward = backward_args(args, [True] * 5 + [False])
    for tile in (0, 1):
        with grouped(tile) as pairs, watched_addresses((*args, *backward)) as strays:
            REGISTRY["lora_mix"](*args, backend="triton")
            REGISTRY["lora_mix_backward"](*backward, backend="triton")
        assert len(pairs) == 2 and not strays


@inside
def test_rows_of_groups_are_independent():
    """Other tokens' values, NaN included, and other tokens' choices do not change a bit of mine."""
    ids = torch.arange(150) % 3
    args = list(layer_args(150, 72, 136, [16, 48, 32], ids))
    other = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    other[0][:70], other[5][:70] = float("nan"), 1
    op = REGISTRY["lora_mix"]
    with grouped(0):
        before, after = op(*args, backend="triton"), op(*other, backend="triton")
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[70:], new[70:])


@inside
def test_when_tokens_are_grouped():
    """Only past the break-even, and never before it was found to be quicker."""
    from mllmcl_kernels.triton_grouped import Choice, groupings

    two, half = Choice(torch.zeros(4096, 2, dtype=torch.int32)), torch.bfloat16
    assert [way.tile for way in groupings(4096, [64] * 16, two, half)] == [-1, 0, 1]
    assert len(groupings(4096, [32] * 10, two, half)) == 3
    for call in (
        (4096, [64] * 16, two, torch.float32),
        (512, [64] * 16, two, half),
        (4096, [64] * 16, None, half),
        (4096, [32] * 9, two, half),
    ):
        assert [way.tile for way in groupings(*call)] == [-1], call


@inside
@pytest.mark.parametrize(("tokens", "width"), [(40, 64), (3, 4096)])
def test_an_id_out_of_range_raises_the_flag(monkeypatch, tokens: int, width: int):
    """With the product whole and in planes: the highest position is told once, the row is the base layer's."""
    from mllmcl_kernels import faults

    ids = torch.arange(tokens) % 2
    x, weight, bias, a, b, _, *rest = layer_args(tokens, width, 24, [3, 8], ids, torch.float32)
    op = REGISTRY["lora_mix"]
    # what other tests have raised
    monkeypatch.setattr(faults, "_watches", {})
    for wrong in ([2, -2], [-3, 1 << 40]):
        ids[torch.tensor([0, tokens - 2])] = torch.tensor(wrong)
        y, _ = op(x, weight, bias, a, b, ids, *rest, backend="triton")
        base = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(y[[0, tokens - 2]], base[[0, tokens - 2]])
        assert not torch.equal(y[-1], base[-1])
        with pytest.raises(
            ValueError, match=rf"lora_mix: gates must be ids in -1\.\.1; .* position {tokens - 2} was not"
        ):
            faults.raise_faults()
    op(x, weight, bias, a, b, torch.arange(tokens) % 3 - 1, *rest, backend="triton")
    faults.raise_faults()


@inside
@pytest.mark.parametrize("run", [1, 75])
def test_an_id_out_of_range_raises_the_flag_in_groups(monkeypatch, run: int):
    """Whether tokens are sorted or not."""
    from mllmcl_kernels import faults

    ids = torch.arange(150 // run) % 2
    x, weight, bias, a, b, _, *rest = layer_args(150, 24, 24, [16, 32], ids)
    monkeypatch.setattr(faults, "_watches", {})
    with grouped(0):
        for wrong in (2, -2, 1 << 40):
            ids[1] = wrong
            y, _ = REGISTRY["lora_mix"](x, weight, bias, a, b, ids, *rest, backend="triton")
            assert torch.equal(y[run : 2 * run], torch.nn.functional.linear(x, weight, bias)[run : 2 * run])
            with pytest.raises(ValueError, match=r"lora_mix: gates must be ids in -1\.\.1; .* position 1 was not"):
                faults.raise_faults()
        ids[1] = -1
        REGISTRY["lora_mix"](x, weight, bias, a, b, ids, *rest, backend="triton")
        faults.raise_faults()


@inside
@pytest.mark.parametrize(("experts", "top_k"), [(130, 130), (1024, 2)])
def test_more_experts_than_one_product_holds(experts: int, top_k: int):
    """Logits from torch, choice in the kernel."""
    generator = torch.Generator().manual_seed(experts)
    x, weight = torch.randn(21, 24, generator=generator), torch.randn(experts, 24, generator=generator)
    for score in ("softmax", "sigmoid", "cosine"):
        check(REGISTRY["route"], (x, weight, None, None, None, x[:, 0] < 1.0, top_k, score, 0.7, True, False))


@inside
def test_ties_go_to_the_lowest_expert():
    """Equal scores, in a dense choice and in the best two."""
    weight = torch.ones(6, 8)
    weight[4] = 2.0
    _, indices, *_ = REGISTRY["route"](
        torch.ones(3, 8), weight, None, None, None, None, 4, "softmax", 1.0, False, False, backend="triton"
    )
    assert indices.tolist() == [[4, 0, 1, 2]] * 3


@inside
def test_merged_and_separate_routing_agree():
    """Router and experts in one pass over x against route's kernel, then lora_mix's."""
    from mllmcl_kernels.ops.lora_mix_routed import triton as provider

    op = REGISTRY["lora_mix_routed"]
    for sample in op.samples(CPU, torch.float32, 8):
        with mock.patch.object(provider, "_merges", lambda *_: False):
            check(op, sample.args)
    backward = REGISTRY["lora_mix_routed_backward"]
    for sample in backward.samples(CPU, torch.float32, 8):
        with mock.patch.object(provider, "_merges", lambda *_: False):
            check(backward, sample.args)


@inside
def test_ids_out_of_range_select_no_expert(monkeypatch):
    """On a device nobody looks at ids; with MLLMCL_DEBUG=1 the first wrong one is named."""
    args = layer_args(6, 8, 5, [2, 2], torch.tensor([0, 7, -9, 1 << 40, -(1 << 40), 1]))
    base = layer_args(6, 8, 5, [2, 2], torch.tensor([0, -1, -1, -1, -1, 1]))
    op = REGISTRY["lora_mix"]
    for mine, other in zip(op(*args, backend="triton"), op(*base, backend="triton"), strict=True):
        assert torch.equal(mine, other)
    monkeypatch.setenv("MLLMCL_DEBUG", "1")
    with pytest.raises(ValueError, match=r"lora_mix: gates must be ids in -1\.\.1, got 7 at position 1"):
        op(*args, backend="triton")


@inside
def test_numbers_that_live_on_the_device():
    """step, lr and grad_scale read by the kernel give what they give by value."""
    from mllmcl_kernels.ops.masked_adamw import triton as provider

    op = REGISTRY["masked_adamw_"]
    for sample in op.samples(CPU, torch.float32, 9):
        args = list(sample.args)
        args[7:10] = [value.to(torch.float32) for value in args[7:10]]
        there = {"there": [True, True, True], "values": (float("nan"),) * 4}

        def run(*call, there=there):
            with mock.patch.object(provider, "_numbers", lambda *_: there):
                op(*call, backend="triton")

        check(op, tuple(args), run)


@inside
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.1}, {"lr": torch.tensor(0.01)}, {"many": True}, {"state_dtype": torch.float16}]
)
def test_prepared_steps_of_the_optimizer(options, how_steps_were_made, monkeypatch):
    """From the third step on the table is kept, whether gradients stay or move."""
    monkeypatch.setenv("MLLMCL_BACKEND", "triton")
    if options.get("many"):
        monkeypatch.setattr(test_prepared, "OTHER", torch.float16)
    run = test_prepared.Run(**options)
    run.step(6)
    assert how_steps_were_made == ["op", "op"] + 4 * ["prepared"]
    other = test_prepared.by_the_op(6, **options)
    test_prepared.assert_same(run, other)


@inside
@pytest.mark.parametrize("change", ["_elsewhere", "_by_rows", "_moment_elsewhere", "_mask_lifted"])
def test_prepared_steps_see_what_moved(change: str, how_steps_were_made, monkeypatch):
    monkeypatch.setenv("MLLMCL_BACKEND", "triton")
    test_prepared.test_what_moved_is_seen(getattr(test_prepared, change), how_steps_were_made)


@inside
def test_frozen_bits_stay():
    """Masked-out entries keep parameter and moments bit for bit, whatever their gradient holds; many chunks."""
    op = REGISTRY["masked_adamw_"]
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(3, 7001, generator=generator) for _ in range(4)]
    tensors[3] = tensors[3].abs()
    keep = torch.rand(3, 7001, generator=generator) < 0.5
    tensors[1][~keep] = float("nan")
    before = [tensor.clone() for tensor in tensors]
    flat = masks.flatten_masks("test", tensors[:1], [masks.Mask.elements(keep)])
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (3.0, 0.1, 1.0)]
    op(*([tensor] for tensor in tensors), *flat, *numbers, 0.9, 0.999, 1e-8, 0.1, backend="triton")
    for place in (0, 2, 3):
        assert torch.equal(tensors[place][~keep].view(torch.int32), before[place][~keep].view(torch.int32))
        assert not torch.any(tensors[place][keep] == before[place][keep])


@inside
@pytest.mark.parametrize("name", ["importance_update_", "anchor_grad_"])
def test_a_number_of_a_list_op_that_lives_on_the_device(name: str, monkeypatch):
    """count and strength read by the kernel, through a pointer that the host does not follow."""
    op = REGISTRY[name]
    provider = importlib.import_module(f"{op.package}.triton")
    monkeypatch.setattr(provider, "lives_there", lambda *_: True)
    place = op.argument_names.index("count" if name == "importance_update_" else "strength")
    for sample in op.samples(CPU, torch.float32, 9):
        args = list(sample.args)
        args[place] = args[place].to(torch.float32)
        check(op, tuple(args))


@inside
@pytest.mark.parametrize("chunk", [64, 1024])
def test_groups_of_many_parts(chunk: int, monkeypatch):
    """Sums of more parts than are added at a time, with masks and groups across."""
    from mllmcl_kernels.ops.ema_update import triton as provider

    monkeypatch.setattr(provider, "CHUNK", chunk)
    monkeypatch.setattr(provider, "PARTS", 16)
    for sample in REGISTRY["ema_update_"].samples(CPU, torch.float32, 31):
        check(REGISTRY["ema_update_"], sample.args)


@inside
def test_kernels_run_with_the_tiles_that_tune_found(monkeypatch, tmp_path):
    """By an invented clock the last candidate of each kernel wins; another process reads that, and numbers hold."""
    from mllmcl_kernels import lora_mix, lora_mix_routed, triton_tools, tune, tuning

    monkeypatch.setenv("MLLMCL_TUNING_FOLDER", str(tmp_path))
    tuning.forget()
    ticks = iter(range(10**6, 0, -1))
    launched = []
    start = triton_tools.start

    def spy(kernel, grid, args, constants, warps, stages):
        launched.append((kernel.fn.__name__, warps, stages, tuple(sorted(constants.items()))))
        start(kernel, grid, args, constants, warps, stages)

    monkeypatch.setattr(triton_tools, "start", spy)
    x, weight, a, b = torch.randn(7, 24), torch.randn(20, 24), torch.randn(8, 24), torch.randn(20, 8)
    x, a, router = (tensor.half().requires_grad_() for tensor in (x, a, torch.randn(2, 24)))

    def step(backend):
        y = lora_mix(x, weight.half(), None, a, b.half(), ranks=(4, 4), backend=backend)
        z, _ = lora_mix_routed(x, weight.half(), None, a, b.half(), router, backend=backend)
        return torch.autograd.grad((y + z).float().square().sum(), (x, a, router))

    def traced():
        launched.clear()
        return step("triton"), tuple(launched)

    grads, by_default = traced()
    winners = tune(lambda: step("triton"), timer=lambda run: (run(), next(ticks))[1])
    kernels = {key.split()[0] for key in winners}
    assert {"lora_mix_shrink", "lora_mix_launches", "few_tokens_product", "few_tokens_at_once"} <= kernels
    assert "lora_mix_routed_shrink" in kernels
    tuned_grads, by_winners = traced()
    assert by_winners != by_default
    # by this clock the last candidate is the quickest: one launch for few tokens, torch's product in the backward,
    # router and ranks one after the other
    names = {name for name, *_ in by_winners}
    assert {"_few_tokens_at_once_kernel", "_lora_mix_bwd_gate_kernel", "_route_fwd_kernel"} <= names
    assert not names & {"_lora_mix_gate_kernel", "_lora_mix_bwd_rank_kernel", "_lora_mix_routed_shrink_kernel"}
    tuning.forget()
    assert traced()[1] == by_winners
    for ours, first, truth in zip(tuned_grads, grads, step("reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=0.5)
        torch.testing.assert_close(ours, first, rtol=2e-2, atol=0.5)
    tuning.forget()
    monkeypatch.setenv("MLLMCL_TUNING", "0")
    assert traced()[1] == by_default
    tuning.forget()


@inside
@settings(max_examples=10)
@given(
    tokens=st.integers(0, 33),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    kind=st.sampled_from(("none", "constant", "token", "ids")),
    dropout=st.sampled_from((0.0, 0.3)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
def test_any_mix(tokens, width, out, ranks, kind, dropout, dtype):
    """Forward and backward on drawn sizes, rank lists, gates and dropout."""
    generator = torch.Generator().manual_seed(tokens * 41 + width)
    experts = len(ranks)
    gates = {
        "none": None,
        "constant": torch.randn(1, experts, generator=generator),
        "token": torch.randn(tokens, experts, generator=generator),
        "ids": torch.randint(-1, experts, (tokens,), generator=generator),
    }[kind]
    args = layer_args(tokens, width, out, ranks, gates, dtype, dropout)
    check(REGISTRY["lora_mix"], args)
    soft = kind in ("constant", "token")
    check(REGISTRY["lora_mix_backward"], backward_args(args, [True, True, True, True, True, soft]))


@inside
def test_statistics_of_many_planes():
    """Planes that take several steps to add, the last one with fewer, and more than one program adds up."""
    from mllmcl_kernels.ops.routing_statistics import triton as routing_statistics

    op = REGISTRY["routing_statistics"]
    samples = {sample.name: sample.args for sample in op.samples(CPU, torch.float32, 34)}
    # 44 planes of one expert, 3 of 64
    for name, *tiles in (("many tokens, one expert", 8, 6), ("many tokens, one expert", 8, 5), ("64 experts", 128, 2)):
        with mock.patch.object(routing_statistics, "TILES", routing_statistics.StatisticsTiles(*tiles)):
            check(op, samples[name])


@inside
@pytest.mark.parametrize("entries", [16, 512, 4096])
def test_planes_of_any_height_of_a_tile(entries: int):
    """Programs of one plane and of many, of tokens that fill neither; also of routers side by side."""
    from mllmcl_kernels.ops.route import triton as router
    from mllmcl_kernels.ops.routing_planes import triton as tables

    tiles = dataclasses.replace(router.TILES, entries=entries, widest_fused=0)
    with mock.patch.object(router, "TILES", tiles), mock.patch.object(tables, "ENTRIES", entries):
        for name in ("routing_planes", "route", "lora_mix_routed_shared"):
            for sample in REGISTRY[name].samples(CPU, torch.float32, 36)[:3]:
                check(REGISTRY[name], sample.args)


@inside
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_beside_the_reference_of_the_same_dtype(name: str):
    """Tables whose rows lie apart, and gradients of a zero, whose logarithm is clamped where the dtype ends."""
    op = REGISTRY[name]
    for sample in op.samples(CPU, torch.float32, 35):
        ours, theirs = op(*sample.args, backend="triton"), op(*sample.args, backend="reference")
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=5e-6)
