"""`lora_mix`, forward and backward, beside the loop over experts, stacked torch, torch.compile and PEFT."""

from __future__ import annotations

import importlib.util

import torch

from mllmcl_kernels import lora_mix
from mllmcl_kernels.op import REGISTRY

from . import packages, peers
from .cases import MixCase, shrink
from .measuring import RESULTS, Case, misses, other_backends, providers_used, race, tuned
from .mixing import SCALING, captured, layer, step, useful_flops, values_and_gradients

NAMES = ("y", "dx", "da", "db", "dgates")
_BESIDE = {"weight": "weight_beside", "b": "b_beside"}
#: ours on tensors that lie otherwise: what takes the place of which
LAYOUTS = {
    "ours, B by columns": {"b": "b_columns"},
    "ours, W beside B": _BESIDE,
    "ours, W beside B, x in place": _BESIDE | {"x": "x_in_place"},
}


def ours(x, weight, bias, a, b, gates, *, case: MixCase, backend: str | None = None, dropout: float = 0.0):
    """lora_mix on the case's own gates: for ids the batch is what it is in a model, one row of tokens a sample."""
    options = {"ranks": (case.rank,) * case.experts, "scaling": SCALING, "dropout": dropout, "backend": backend}
    if case.gates != "sample":
        return lora_mix(x, weight, bias, a, b, gates, **options)
    rows = x.view(case.samples, -1, x.shape[-1])
    return lora_mix(rows, weight, bias, a, b, gates[:, None], **options).view(x.shape[0], -1)


def dense_gates(case: MixCase, tensors: dict) -> torch.Tensor:
    """The case's gates as `[T, E]`, which is what plain code takes."""
    x = tensors["x"]
    if case.gates == "token":
        return tensors["gates"]
    if case.gates == "none":
        return x.new_ones(case.tokens, case.experts)
    rows = torch.nn.functional.one_hot(tensors["ids"], case.experts).to(x.dtype)
    return rows.repeat_interleave(case.tokens // case.samples, 0)


def _add_grouped(field: dict, case: MixCase, tensors: dict, record: Case) -> None:
    """For one expert a sample: what takes each expert's tokens alone."""
    x, weight, bias, a, b = (tensors[key] for key in ("x", "weight", "bias", "a", "b"))
    experts, rank, device = case.experts, case.rank, x.device
    ids = tensors["ids"].repeat_interleave(case.tokens // case.samples)
    if not case.graph:
        # it asks the host which experts there are
        field["tokens by expert"] = lambda: peers.by_expert(x, weight, bias, a, b, ids, rank=rank, scaling=SCALING)

    def like():
        return peers.stacked(x, weight, bias, a, b, dense_gates(case, tensors), rank=rank, scaling=SCALING)

    a_eKr = a.detach().view(experts, rank, -1).transpose(1, 2).requires_grad_()
    b_erN = b.detach().view(-1, experts, rank).permute(1, 2, 0).contiguous().requires_grad_()
    tensors["grouped"] = [a_eKr, b_erN]
    ones = torch.ones(case.tokens, 1, device=device)

    def grouped():
        return packages.torch_grouped_mix(x, weight, bias, a_eKr, b_erN, ones, ids[:, None], SCALING)

    packages.add_optional(field, record.refused, "torch grouped_mm", "torch", device, lambda: grouped, like)
    if not case.backward and not case.graph:
        rows, stacked_a = x.detach().view(case.samples, -1, case.width), a_eKr.detach().contiguous()
        packages.add_optional(
            field, record.refused, "polylora", "polylora", device,
            lambda: packages.polylora_forward(rows, weight, bias, stacked_a, b_erN.detach(), tensors["ids"], SCALING),
            like,
        )  # fmt: skip


def contestants(case: MixCase, tensors: dict, record: Case) -> dict:
    """Every forward that can run the case, ours first, each with the gates in the layout that suits it."""
    x, weight, bias, a, b = (tensors[key] for key in ("x", "weight", "bias", "a", "b"))
    gates = tensors["ids"] if case.gates == "sample" else tensors["gates"]
    dense = dense_gates(case, tensors)
    options = {"rank": case.rank, "scaling": SCALING}
    dropping = options | {"dropout": case.dropout}
    call = {"case": case, "dropout": case.dropout}
    b_columns = tensors["b_columns"]
    field = {"ours": lambda: ours(x, weight, bias, a, b, gates, **call)}
    for name, places in LAYOUTS.items():
        if tensors.keys() >= set(places.values()):
            layer = [tensors[places.get(key, key)] for key in ("x", "weight", "bias", "a", "b")]
            field[name] = lambda layer=layer: ours(*layer, gates, **call)
    for backend in other_backends(REGISTRY["lora_mix"], record.providers["lora_mix"]):
        field[f"ours ({backend})"] = lambda backend=backend: ours(x, weight, bias, a, b, gates, backend=backend, **call)
    field["loop over experts"] = lambda: peers.loop_over_experts(x, weight, bias, a, b, dense, **dropping)
    field["stacked"] = lambda: peers.stacked(x, weight, bias, a, b, dense, **dropping)
    field["stacked, B by columns"] = lambda: peers.stacked(x, weight, bias, a, b_columns, dense, **dropping)
    if case.gates == "sample":
        _add_grouped(field, case, tensors, record)
    if case.experts == 1 and not case.dropout:
        if importlib.util.find_spec("peft") is not None:
            for name, (module, adapters) in packages.peft_linears(
                weight, bias, a.detach(), b.detach(), SCALING
            ).items():
                tensors[name] = adapters
                field[name] = lambda module=module: module(x)
        else:
            record.refused["PEFT"] = "the package peft is not installed"
    if case.compiled:
        try:
            torch._dynamo.reset()
            mode = None if case.compiled == "default" else case.compiled
            compiled = torch.compile(peers.stacked, fullgraph=True, dynamic=False, mode=mode)
            compiled(x, weight, bias, a, b, dense, **dropping)
            field["compiled stacked"] = lambda: compiled(x, weight, bias, a, b, dense, **dropping)
        except Exception as error:  # a compiler may be missing in many ways
            record.refused["compiled stacked"] = f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}"
    field["base linear"] = lambda: peers.base(x, weight, bias)
    return field


def refused(case: MixCase, tensors: dict, backend: str | None, name: str = "ours") -> str | None:
    """Why value or gradients of this backend are not what the formula says on this very case, without dropout."""
    given = {key: tensors[key] for key in ("x", "weight", "bias", "a", "b")}
    given["gates"] = tensors["ids"] if case.gates == "sample" else tensors["gates"]

    def plain(x, weight, bias, a, b, gates):
        dense = dense_gates(case, {"x": x, "gates": gates, "ids": gates})
        return peers.stacked(x, weight, bias, a, b, dense, case.rank, SCALING)

    def mine(x, weight, bias, a, b, gates):
        return ours(x, weight, bias, a, b, gates, case=case, backend=backend)

    dy = tensors["dy"]
    laid = given | {key: tensors[place] for key, place in LAYOUTS.get(name, {}).items()}
    found = values_and_gradients(mine, laid, dy, wide=False)
    usual, truth = (values_and_gradients(plain, given, dy, wide=wide) for wide in (False, True))
    return misses(found, usual, truth, NAMES[: len(found)])


def test_lora_mix(benchmark, mix_case: MixCase, device, dtype, rounds):
    case = mix_case
    tensors = layer(case, device, dtype)
    record = Case("lora_mix", f"{case}, {str(dtype).removeprefix('torch.')}", flops=useful_flops(case))
    RESULTS.append(record)
    with providers_used() as record.providers:
        reason = refused(case, tensors, None)
    field = contestants(case, tensors, record)
    for name in [name for name in field if name.startswith("ours")]:
        if name in LAYOUTS:
            why = refused(case, tensors, None, name)
        else:
            backend = name.removeprefix("ours").strip(" ()") or None
            why = reason if backend is None else refused(case, tensors, backend)
        if why:
            record.refused[name] = why
            del field[name]
    names = ("x", "a", "b", "gates", "b_columns", "b_beside", "x_in_place")
    leaves = [tensors[key] for key in names if tensors.get(key) is not None]
    leaves += [leaf for name in ("grouped", "PEFT", "PEFT, adapters not cast") for leaf in tensors.get(name, [])]
    dy = tensors["dy"] if case.backward else None
    steps = {name: step(run, leaves, dy) for name, run in field.items()}
    # only these meet ways of their own
    for name in (name for name in steps if name == "ours" or "W beside B" in name):
        tuned(record, steps[name], device, name)
    if case.graph:
        for name in list(steps):
            try:
                steps[name] = captured(steps[name])
            except RuntimeError as error:
                record.refused[name] = f"no CUDA graph: {str(error).splitlines()[0]}"
                del steps[name]
    race(record, steps, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    assert "ours" not in record.refused, record.refused["ours"]
    benchmark.pedantic(steps["ours"], rounds=3)


def saved_bytes(run, there: set[int]) -> int:
    """Bytes of the storages that autograd keeps beyond those that are there anyway."""
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(sizes.values())


def test_saved_activations(benchmark, device, dtype, request):
    """What the adapters make autograd keep besides x and the parameters."""
    case = MixCase(512, 2048, 2048, 8, 16) if device.type == "cpu" else MixCase(4096, 4096, 4096, 8, 16)
    if request.config.getoption("--tiny"):
        case = shrink(case)
    tensors = layer(case, device, dtype)
    given = [tensors[key] for key in ("x", "weight", "bias", "a", "b", "gates")]
    mine = [tensors[key] for key in ("x", "weight", "bias", "a", "b_columns", "gates")]
    there = {tensor.untyped_storage().data_ptr() for tensor in (*given, *mine)}
    field = {
        "ours": lambda: ours(*mine, case=case),
        "loop": lambda: peers.loop_over_experts(*given, case.rank, SCALING),
        "stacked": lambda: peers.stacked(*given, case.rank, SCALING),
    }
    record = Case("lora_mix", f"{case}: bytes saved for backward", notes={})
    with providers_used() as record.providers:
        found = {name: saved_bytes(run, there) for name, run in field.items()}
    record.notes = {f"{name}, bytes": value for name, value in found.items()}
    record.notes["loop / ours"] = found["loop"] / found["ours"]
    RESULTS.append(record)
    benchmark.extra_info.update(record.notes)
    benchmark.pedantic(field["ours"], rounds=2)
