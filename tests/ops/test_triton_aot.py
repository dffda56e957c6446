"""Every Triton kernel, as the providers launch it, compiled for sm_80 and sm_90 without a GPU, and what came out.

The providers run on meta tensors of realistic sizes while `triton_tools.start` only takes notes: what is compiled is
what would be launched, with the same tiles, dtypes and divisibilities.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from mllmcl_kernels import triton_expand, triton_few, triton_grouped, triton_tools, tuning  # noqa: E402
from mllmcl_kernels.masks import ELEMENTS, NONE  # noqa: E402
from mllmcl_kernels.ops.anchor_grad import triton as anchor_grad  # noqa: E402
from mllmcl_kernels.ops.distillation_loss import triton as distillation_loss  # noqa: E402
from mllmcl_kernels.ops.ema_update import triton as ema_update  # noqa: E402
from mllmcl_kernels.ops.ema_update.reference import CONSTANT, DEMA, PEMA  # noqa: E402
from mllmcl_kernels.ops.importance_update import triton as importance_update  # noqa: E402
from mllmcl_kernels.ops.lora_mix import triton as lora_mix  # noqa: E402
from mllmcl_kernels.ops.lora_mix_routed import triton as lora_mix_routed  # noqa: E402
from mllmcl_kernels.ops.lora_mix_routed_shared import triton as lora_mix_routed_shared  # noqa: E402
from mllmcl_kernels.ops.mask_grads import triton as mask_grads  # noqa: E402
from mllmcl_kernels.ops.masked_adamw import triton as masked_adamw  # noqa: E402
from mllmcl_kernels.ops.orthogonality_loss import triton as orthogonality_loss  # noqa: E402
from mllmcl_kernels.ops.project_grads import triton as project_grads  # noqa: E402
from mllmcl_kernels.ops.route import triton as route  # noqa: E402
from mllmcl_kernels.ops.routing_planes import triton as routing_planes  # noqa: E402
from mllmcl_kernels.ops.routing_statistics import triton as routing_statistics  # noqa: E402
from mllmcl_kernels.ops.sampled_product_l1 import triton as sampled_product_l1  # noqa: E402
from mllmcl_kernels.ops.soft_target_cross_entropy import triton as soft_target  # noqa: E402

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides its machine code."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int

    @property
    def label(self) -> str:
        told = ("BLOCK", "PAD", "SPLIT", "KIND")
        shown = [f"{name}{value}" for name, value in self.constants if name.startswith(told)]
        flags = [name for name, value in self.constants if value is True]
        return "-".join([self.kernel.__name__.strip("_"), *shown, *flags])

    def compile(self, architecture: int):
        attributes = {(place,): [["tt.divisibility", 16]] for place in self.aligned}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def note(kernel, args: tuple, constants: dict, warps: int, stages: int) -> Launch:
    """The signature that Triton would derive from these arguments: 1 is a constant, multiples of 16 are marked."""
    names = [parameter.name for parameter in kernel.params]
    types, fixed, aligned = {}, dict(constants), []
    for place, (name, arg) in enumerate(zip(names, args, strict=False)):
        if isinstance(arg, torch.Tensor):
            types[name] = POINTERS[arg.dtype]
            aligned.append(place)
        elif isinstance(arg, TensorDescriptor):
            element = POINTERS[arg.base.dtype].removeprefix("*")
            types[name] = f"tensordesc<{element}{list(arg.block_shape)}>"
        elif isinstance(arg, float):
            types[name] = "fp32"
        elif arg == 1:
            types[name], fixed[name] = "constexpr", 1
        else:
            types[name] = "i32" if abs(arg) < 2**31 else "i64"
            aligned += [place] if arg % 16 == 0 else []
    types.update(dict.fromkeys(constants, "constexpr"))
    signature = tuple((name, types[name]) for name in names)
    return Launch(kernel, signature, tuple(sorted(fixed.items())), tuple(aligned), warps, stages)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mix_calls(dtype: torch.dtype, tokens: int, rank: int, experts: int, dropout: float, width: int = 4096) -> None:
    """lora_mix and lora_mix_routed, forward and backward, one more call for the dual-source product."""
    x, weight, total = empty(tokens, width, dtype=dtype), empty(width, width, dtype=dtype), rank * experts
    lora_a, b_rows, s = (empty(*shape, dtype=dtype) for shape in ((total, width), (total, width), (tokens, total)))
    lora_b = b_rows.t()
    gates, seed = empty(tokens, experts, dtype=torch.float32), empty(1, dtype=torch.int64)
    experts_of = ([rank] * experts, [1.0] * experts, [True] * experts, dropout)
    ids = empty(tokens, dtype=torch.int64)
    lora_mix.lora_mix_triton(x, weight, None, lora_a, lora_b, gates, seed, *experts_of)
    lora_mix.lora_mix_triton(x, weight, None, lora_a, lora_b, ids, seed, *experts_of)
    head = (x, x, weight, lora_a, lora_b, gates, seed, s)
    lora_mix.lora_mix_backward_triton(*head, *experts_of, [True] * 6)
    triton_expand.dual_product(x, weight, None, s, lora_b)
    triton_expand.dual_product(x, weight.t(), None, s, lora_a.t())
    if dtype != torch.float32 and triton_expand.compute_capability(x.device) >= 9:
        triton_expand.maps_product(x, weight, None, s, lora_b)
        triton_expand.maps_product(x, weight, None, s, lora_b.contiguous())
        triton_expand.maps_product(x, weight.t(), x[0], s, lora_a.t())
    if dropout == 0.0:
        router = empty(experts, width, dtype=dtype)
        options = (min(2, experts), "softmax", 1.0, True, False)
        layer = (x, weight, None, lora_a, lora_b, router, None, None, None, None, None)
        lora_mix_routed.lora_mix_routed_triton(*layer, *options, *experts_of)


def shared_calls(dtype: torch.dtype, tokens: int, rank: int, experts: int, width: int = 4096) -> None:
    """Three linears that share x, each with its router, forward and backward."""
    x, total = empty(tokens, width, dtype=dtype), rank * experts
    kinds = [
        [empty(*shape, dtype=dtype)] * 3
        for shape in ((width, width), (total, width), (width, total), (experts, width))
    ]  # fmt: skip
    weight, *rest = kinds
    options = (min(2, experts), "softmax", 1.0, True, False, [rank] * experts, [1.0] * experts, [True] * experts, 0.0)
    s, gates, indices, _, logits, probs, planes, *y = lora_mix_routed_shared.lora_mix_routed_shared_triton(
        x, weight, [], *rest, [], None, None, None, None, *options
    )
    grads = (y, None, None, None, None, planes)
    saved = (x, *kinds, None, s, gates, indices, logits, probs, None)
    lora_mix_routed_shared.lora_mix_routed_shared_backward_triton(*grads, *saved, *options[1:], [True] * 7)


def few_calls(dtype: torch.dtype, tokens: int, rank: int, experts: int, width: int = 4096) -> None:
    """A forward of few tokens in two launches and in one, with every tile it may take."""
    x, weight, total = empty(tokens, width, dtype=dtype), empty(width, width, dtype=dtype), rank * experts
    lora_a, b_rows = empty(total, width, dtype=dtype), empty(total, width, dtype=dtype)
    experts_of = ([rank] * experts, [1.0] * experts, [True] * experts)
    soft, ids = empty(tokens, experts, dtype=torch.float32), empty(tokens, dtype=torch.int64)
    seed, columns, rows = empty(1, dtype=torch.int64), b_rows.t(), b_rows.view(width, total)
    tiles = triton_few.FEW_TILES[16 if tokens <= 16 else 64]
    for place, number in itertools.product(range(len(tiles)), (2, 1)):
        with (
            mock.patch.object(lora_mix, "launch_counts", lambda *_, number=number: (triton_few.Launches(number),)),
            mock.patch.object(triton_few, "pick_tile", lambda key, found, *_, place=place: found[place]),
        ):
            for gates, lora_b, dropout in ((soft, columns, 0.0), (ids, rows, 0.1), (None, columns, 0.0))[: 3 - place]:
                lora_mix.lora_mix_triton(x, weight, x[0], lora_a, lora_b, gates, seed, *experts_of, dropout)


def grouped_mix_calls(dtype: torch.dtype, rank: int, experts: int, dropout: float, width: int = 4096) -> None:
    """Tokens grouped by the experts they chose, for top-k and for ids, B by rows and by columns."""
    tokens, total = 4096, rank * experts
    x, weight = empty(tokens, width, dtype=dtype), empty(width, width, dtype=dtype)
    lora_a, b_rows, s = (empty(*shape, dtype=dtype) for shape in ((total, width), (total, width), (tokens, total)))
    gates, seed = empty(tokens, experts, dtype=torch.float32), empty(1, dtype=torch.int64)
    ids, best = empty(tokens, dtype=torch.int64), empty(tokens, 2, dtype=torch.int32)
    router, experts_of = empty(experts, width, dtype=dtype), ([rank] * experts, [1.0] * experts, [True] * experts)
    for tile in range(len(triton_grouped.RANK_TILES)):
        chosen = mock.patch.object(lora_mix, "groupings", lambda *_, tile=tile: (triton_grouped.Grouping(tile),))
        grads = gates, empty(tokens, 2, dtype=torch.float32), gates, gates, None
        options = ("softmax", 1.0, True, False, *experts_of, dropout, [True] * 7)
        with chosen:
            columns, rows = b_rows.t(), b_rows.view(width, total)
            lora_mix.lora_mix_triton(x, weight, None, lora_a, columns, ids, seed, *experts_of, dropout)
            backward = (x, x, weight, lora_a, columns, ids, seed, s, *experts_of, dropout, [True] * 5 + [False])
            lora_mix.lora_mix_backward_triton(*backward)
            saved = (x, weight, lora_a, rows, router, seed, s, gates, best, gates, gates, None)
            lora_mix_routed.lora_mix_routed_backward_triton(x, *grads, *saved, *options)


def route_calls(dtype: torch.dtype, tokens: int, experts: int, top_k: int, score: str, width: int = 4096) -> None:
    """A router with padding and without; backward from a loss on gates, from statistics as well, and from all."""
    x, weight = empty(tokens, width, dtype=dtype), empty(experts, width, dtype=dtype)
    for mask in (None, empty(tokens, dtype=torch.bool)):
        outputs = route.route_triton(x, weight, None, None, None, mask, top_k, score, 1.0, True, False)
        gates, indices, values, logits, probs, planes = outputs
        saved = (gates, indices, logits, probs, mask, score, 1.0, True, False)
        route.logits_gradient_triton(gates, None, None, None, None, *saved)
        route.logits_gradient_triton(gates, None, None, None, planes[:1].expand(planes.shape), *saved)
        route.logits_gradient_triton(gates, values, logits, probs, planes, *saved, low=x[:, :experts])


def statistics_calls(tokens: int, experts: int, top_k: int) -> None:
    """Planes of tables, padding or none; their statistics; gradients of the usual two losses and of all."""
    tables, one = [empty(tokens, experts, dtype=torch.float32)] * 3, empty(dtype=torch.float32)
    indices = empty(tokens, top_k, dtype=torch.int32)
    for mask in (None, empty(tokens, dtype=torch.bool)):
        planes = routing_planes.routing_planes_triton(*tables, indices, mask)
        routing_planes.routing_planes_backward_triton(planes, *tables[:2], mask)
    load, *_, sums = routing_statistics.routing_statistics_triton(planes)
    routing_statistics.routing_statistics_backward_triton(None, one, one, None, sums)
    routing_statistics.routing_statistics_backward_triton(load, one, one, one, sums)


def loss_calls(dtype: torch.dtype, vocabulary: int, entries: int, tokens: int = 2048, width: int = 4096) -> None:
    """Losses on a linear head, with and without gradients; teachers of all logits and of a few entries."""
    head = (empty(tokens, width, dtype=dtype), empty(vocabulary, width, dtype=dtype), None, None)
    labels, full = empty(tokens, dtype=torch.int64), empty(tokens, vocabulary, dtype=dtype)
    cached = empty(tokens, entries, dtype=torch.float32), empty(tokens, entries, dtype=torch.int64)
    for needs in ([True, False, False], [False] * 3):
        for alpha in (0.0, 0.01):
            soft_target.soft_target_cross_entropy_triton(*head, labels, alpha, -100, None, needs)
        for teacher, indices in ((full, None), cached):
            distillation_loss.distillation_loss_triton(*head, teacher, indices, None, 2.0, None, needs)


def optimizer_calls(dtype: torch.dtype) -> None:
    params, moments, mask = [empty(64, 64, dtype=dtype)], [empty(64, 64, dtype=torch.float32)], torch.uint8
    masks, number = [empty(64, dtype=mask)], torch.tensor(1.0, dtype=torch.float64)
    there = empty(dtype=torch.float32)
    for numbers in ((number,) * 3, (there,) * 3, (number, number, there)):
        lists = (params, params, moments, moments, masks, [0], [1])
        masked_adamw.masked_adamw_triton(*lists, *numbers, 0.9, 0.999, 1e-8, 0.01)
    mask_grads.mask_grads_triton(params, masks, [0], [1])


def list_calls(dtype: torch.dtype) -> None:
    params, wide = [empty(64, 64, dtype=dtype)], [empty(64, 64, dtype=torch.float32)]
    masks, owners = ([empty(64, dtype=torch.uint8)], [0], [1]), [empty(64, 64, dtype=torch.uint8)]
    for mode, extra in ((CONSTANT, ([], [], [])), (DEMA, (params, params, [])), (PEMA, ([], [], wide))):
        for group, ranks in ((NONE, []), (0, [32, 32]), (ELEMENTS, [])):
            lists = (wide, params, *extra, *masks)
            ema_update.ema_update_triton(*lists, mode, 0.1, 2.0, [group], ranks)
    for number in (torch.tensor(3.0, dtype=torch.float64), empty(dtype=torch.float64)):
        anchor_grad.anchor_grad_triton(params, params, params, wide, *masks, number)
        importance_update.importance_update_triton(wide, params, [], *masks, 2, False, number, 0)
        for task in (1, 2):
            importance_update.importance_update_triton(params, params, owners, *masks, 1, True, number, task)


def grouped_calls(dtype: torch.dtype, rank: int, width: int = 4096) -> None:
    """Penalties and projections over layers: sizes that vectors divide, and one that they do not."""
    for old, wide in ((64, width), (9, width), (64, 4095)):
        a, other = [empty(rank, wide, dtype=dtype)] * 2, [empty(old, wide, dtype=dtype)] * 2
        for need in (False, True):
            orthogonality_loss.orthogonality_loss_triton(a, other, need)
        project_grads.project_grads_triton(a, [empty(wide, old, dtype=dtype)] * 2)
    columns, starts, places = empty(width, rank, dtype=dtype), empty(width + 1, dtype=torch.int64), torch.int32
    lists = (starts, empty(50000, dtype=places), empty(width, dtype=torch.float32))
    sampled_product_l1.sampled_product_l1_triton(columns, columns, *lists, *lists)
    loss = empty(dtype=torch.float32)
    sampled_product_l1.sampled_product_l1_backward_triton(loss, columns, columns, *lists, *lists, [True, True])


def launches(dtype: torch.dtype, architecture: int) -> list[Launch]:
    """Everything the providers would launch on this architecture, each different kernel once."""
    found: dict[Launch, None] = {}
    # what was picked for another architecture is no default of this one
    tuning.forget()

    def start(kernel, grid, args, constants, warps, stages):
        found[note(kernel, args, constants, warps, stages)] = None

    with (
        mock.patch.object(triton_tools, "start", start),
        mock.patch.object(triton_expand, "compute_capability", lambda device: architecture // 10),
    ):
        mix_calls(dtype, 1, rank=16, experts=8, dropout=0.0)
        mix_calls(dtype, 512, rank=32, experts=8, dropout=0.0)
        mix_calls(dtype, 16384, rank=16, experts=8, dropout=0.1)
        mix_calls(dtype, 16384, rank=16, experts=8, dropout=0.0)
        mix_calls(dtype, 16384, rank=16, experts=4, dropout=0.0)
        if dtype == torch.bfloat16:
            # the same in either half
            few_calls(dtype, 1, 16, 8)
            few_calls(dtype, 64, 16, 8)
            shared_calls(dtype, 16384, 16, 8)
            grouped_mix_calls(dtype, 64, 16, 0.0)
            grouped_mix_calls(dtype, 16, 24, 0.1)
        grouped_calls(dtype, rank=16)
        grouped_calls(dtype, rank=128)
        route_calls(dtype, 8192, 8, 2, "softmax")
        route_calls(dtype, 8192, 64, 8, "cosine")
        loss_calls(dtype, 32000, 64)
        loss_calls(dtype, 50257, 5)
        if dtype != torch.float16:
            # kernels without a product in x's dtype
            route_calls(dtype, 8192, 512, 8, "sigmoid")
            statistics_calls(8192, 8, 2)
            statistics_calls(8192, 512, 8)
            optimizer_calls(dtype)
            list_calls(dtype)
    return list(found)


def cells():
    for dtype in DTYPES:
        for architecture in ARCHITECTURES if dtype != torch.float32 else (90,):
            for launch in launches(dtype, architecture):
                label = f"{str(dtype).removeprefix('torch.')}-sm_{architecture}-{launch.label}"
                yield pytest.param(launch, dtype, architecture, id=label)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack, where spilled registers live, and of shared memory a block."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


CELLS = list(cells())


@pytest.mark.parametrize(("launch", "dtype", "architecture"), CELLS)
def test_compiles_without_spills(launch: Launch, dtype, architecture: int, tmp_path: Path, record_property):
    """No register spills, shared memory within the limit, and matrix instructions where halves are multiplied."""
    compiled = launch.compile(architecture)
    usage = resources(compiled.asm["cubin"], tmp_path)
    ptx = compiled.asm["ptx"]
    usage["SHARED"] = compiled.metadata.shared
    matrix = {"mma.sync": ptx.count("mma.sync"), "wgmma": ptx.count("wgmma.mma_async")}
    for name, value in {**usage, **matrix}.items():
        record_property(name, value)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, usage
    assert usage["SHARED"] <= ARCHITECTURES[architecture], usage
    if "tt.dot" not in compiled.asm["ttir"]:
        assert not any(matrix.values())
        return
    # rows of odd length lie at addresses that no asynchronous copy takes
    by_maps = ptx.count("cp.async.bulk.tensor")
    assert by_maps or ptx.count("cp.async.c") or not dict(launch.constants).get("ALIGNED", True), (
        "loads are not pipelined"
    )
    if dtype != torch.float32:
        assert any(matrix.values()), "half precision without matrix instructions"
        # the rows of the left factor are ranks where dA is made
        rows = dict(launch.constants)["BLOCK_R" if "_da_" in launch.kernel.__name__ else "BLOCK_T"]
        wide = rows >= 64 and architecture >= 90
        assert matrix["wgmma" if wide else "mma.sync"], (matrix, rows)


@pytest.mark.parametrize(
    ("launch", "dtype", "architecture"), [cell for cell in CELLS if "few_tokens_at_once" in cell.id]
)
def test_who_waits_sees_what_was_written(launch: Launch, dtype, architecture: int):
    """One thread releases behind a barrier and acquires before one; nobody reads planes from a cache of its own."""
    asm = launch.compile(architecture).asm
    steps = re.findall(
        r"(?<=tt\.atomic_rmw add, )\w+|scf\.while|(?<=\.)barrier(?= )|(?<=cacheModifier = )\w+", asm["ttgir"]
    )
    parts, tiles = ["barrier", "release"], ["scf.while", "acquire", "barrier", "cg"]
    assert steps == ["relaxed", *parts, *tiles, "relaxed"]
    # a block's instructions stay together
    kinds = r"bar\.sync|bra|(?:ld|st|atom|red|cp)\.[\w.:]+"
    code = re.findall(rf"^\s*(?:@%p\d+ )?({kinds})\s", asm["ptx"], re.MULTILINE)
    release = code.index("atom.global.gpu.release.add.u32")
    assert code[release - 1] == "bar.sync" and code[release - 2].startswith("st.global")
    acquire = code.index("ld.global.gpu.acquire.b32")
    told = ["st.shared.b32", "bar.sync", "ld.shared.b32", "bra", "bar.sync"]
    assert code[acquire + 1 : acquire + 6] == told
    assert code.count("atom.global.gpu.relaxed.add.u32") == 2
    assert any(name.startswith("ld.global.cg") for name in code) and not any(".nc" in name for name in code)


def test_every_kernel_is_compiled():
    """No kernel in the package that the calls above do not launch."""
    launched = {launch.kernel.__name__ for dtype in DTYPES for launch in launches(dtype, 90)}
    written = set()
    for path in Path(triton_tools.__file__).parent.rglob("triton*.py"):
        written |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert written == launched
