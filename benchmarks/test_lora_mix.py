"""`lora_mix` and `lora_mix_routed`, forward and backward, beside the loop, stacked torch, torch.compile and PEFT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mllmcl_kernels import lora_mix, lora_mix_routed
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import excess

from . import peers
from .measuring import Case, race

# name, T, K, N, E, r, dropout, backward
CPU = (
    ("T=512 d=2048 E=8 r=16", 512, 2048, 2048, 8, 16, 0.0, True),
    ("T=512 d=2048 E=8 r=16 dropout 0.05, as the loop trains", 512, 2048, 2048, 8, 16, 0.05, True),
    ("T=512 d=576 E=8 r=16", 512, 576, 576, 8, 16, 0.0, True),
    ("T=512 576->1536 E=5 r=8", 512, 576, 1536, 5, 8, 0.0, True),
    ("T=64 d=2048 E=8 r=16", 64, 2048, 2048, 8, 16, 0.0, True),
    ("T=8 d=2048 E=8 r=16 forward", 8, 2048, 2048, 8, 16, 0.0, False),
    ("T=1 d=2048 E=8 r=16 forward", 1, 2048, 2048, 8, 16, 0.0, False),
)
CUDA = (
    ("T=4096 d=4096 E=8 r=16 forward", 4096, 4096, 4096, 8, 16, 0.0, False),
    ("T=4096 d=4096 E=8 r=16", 4096, 4096, 4096, 8, 16, 0.0, True),
    ("T=16384 d=4096 E=8 r=16", 16384, 4096, 4096, 8, 16, 0.0, True),
    ("T=4096 4096->11008 E=8 r=16", 4096, 4096, 11008, 8, 16, 0.0, True),
    ("T=4096 11008->4096 E=8 r=16", 4096, 11008, 4096, 8, 16, 0.0, True),
    ("T=4096 d=4096 E=8 r=64", 4096, 4096, 4096, 8, 64, 0.0, True),
    ("T=64 d=4096 E=8 r=16 forward", 64, 4096, 4096, 8, 16, 0.0, False),
    ("T=1 d=4096 E=8 r=16 forward", 1, 4096, 4096, 8, 16, 0.0, False),
)
CASES = CUDA if torch.cuda.is_available() else CPU
SCALING = 2.0


def tensors(tokens, width, out, experts, rank, device, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    x, weight, bias = normal(tokens, width), normal(out, width, scale=width**-0.5), normal(out)
    a, b = normal(experts * rank, width, scale=width**-0.5), normal(out, experts * rank, scale=0.1)
    gates = torch.softmax(normal(tokens, experts).float(), -1)
    for tensor in (x, a, b, gates):
        tensor.requires_grad_()
    return x, weight, bias, a, b, gates


def step(run, args, dy):
    """A forward, or a forward and backward with fresh gradients."""

    def once():
        if dy is None:
            with torch.no_grad():
                return run()
        for tensor in args:
            tensor.grad = None
        run().backward(dy)

    return once


def wrong(args, rank, dtype, ours) -> str | None:
    """Why our value or a gradient is not what the formula says on this very case."""
    leaves = [tensor for tensor in args if tensor.requires_grad]

    def all_of(run, tensors):
        y = run(*tensors)
        grads = torch.autograd.grad(y.float().square().sum(), [tensor for tensor in tensors if tensor.requires_grad])
        return [y, *grads]

    def double(tensor):
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    plain = all_of(lambda *t: peers.stacked(*t[:5], t[5].to(dtype), rank, SCALING), args)
    truth = all_of(lambda *t: peers.stacked(*t, rank, SCALING), [double(tensor) for tensor in args])
    mine = all_of(ours, args)
    for place, triple in enumerate(zip(mine, plain, truth, strict=True)):
        rows = [tensor.reshape(-1)[:4_000_000] for tensor in triple]
        if not excess(*rows).passes:
            return f"output {place} of {len(leaves) + 1} misses the error rule: {excess(*rows)}"
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_lora_mix(benchmark, case, device, dtype, rounds, tiny, roofline):
    name, tokens, width, out, experts, rank, dropout, backward = case
    if tiny:
        tokens, width, out = min(tokens, 32), 64, 96
    args = tensors(tokens, width, out, experts, rank, device, dtype)
    low = args[5].detach().to(dtype).requires_grad_()
    dy = torch.randn(tokens, out, device=device, dtype=dtype) if backward else None
    op = REGISTRY["lora_mix"]
    provider = next(b for b in ("cuda", "triton", "cpp", "reference") if not isinstance(op.find(b), str))
    record = Case(name, provider)

    def ours(*tensors, dropout=0.0):
        return lora_mix(*tensors, scaling=SCALING, dropout=dropout)

    reason = wrong(args, rank, dtype, ours) if tokens * out <= 2**22 else None
    if reason:
        record.refused["ours"] = reason
        pytest.fail(reason)
    options = {"rank": rank, "scaling": SCALING, "dropout": dropout}
    field = {
        "ours": lambda: ours(*args, dropout=dropout),
        "loop": lambda: peers.loop_over_experts(*args[:5], low, **options),
        "stacked": lambda: peers.stacked(*args[:5], low, **options),
        "base": lambda: peers.base(*args),
    }
    try:
        compiled = peers.compiled_stacked()
        compiled(*args[:5], low, **options)
        field["compiled"] = lambda: compiled(*args[:5], low, **options)
    except Exception as error:
        record.refused["compiled"] = f"torch.compile: {type(error).__name__}"
    race(record, {key: step(run, [*args, low], dy) for key, run in field.items()}, device, rounds)
    work = 2 * tokens * width * out * (2 if backward else 1)
    record.notes["share of the machine's FLOP/s"] = work / record.seconds["ours"][0] / roofline["flops"]
    benchmark.extra_info.update({key: value[0] for key, value in record.seconds.items()})
    benchmark.pedantic(step(field["ours"], args, dy), rounds=3)


def test_saved_activations(benchmark, device, dtype, tiny):
    """Bytes that autograd keeps for the adapters, beyond x and the weights, which are there anyway."""
    tokens, width, out, experts, rank = (32, 64, 96, 8, 4) if tiny else (512, 2048, 2048, 8, 16)
    args = tensors(tokens, width, out, experts, rank, device, dtype)
    there = {tensor.untyped_storage().data_ptr() for tensor in args}

    def saved(run) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = run()
        assert y.requires_grad
        return sum(sizes.values())

    gates = args[5].to(dtype)
    ours = saved(lambda: lora_mix(*args, scaling=SCALING))
    loop = saved(lambda: peers.loop_over_experts(*args[:5], gates, rank, SCALING))
    from .measuring import RESULTS

    RESULTS.append(
        Case("saved bytes of the adapters", "any", notes={"ours": ours, "loop": loop, "loop over ours": loop / ours})
    )
    benchmark.extra_info.update({"ours": ours, "loop": loop})
    benchmark.pedantic(lambda: lora_mix(*args, scaling=SCALING), rounds=2)


def test_routed(benchmark, device, dtype, rounds, tiny):
    """Router and mix in one pass, against the two by hand."""
    tokens, width, out, experts, rank = (32, 64, 96, 8, 4) if tiny else (512, 2048, 2048, 8, 16)
    x, weight, bias, a, b, _ = tensors(tokens, width, out, experts, rank, device, dtype)
    router = torch.randn(experts, width, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    dy = torch.randn(tokens, out, device=device, dtype=dtype)
    record = Case("routed T=512 d=2048 E=8 r=16", "default")

    def by_hand(mix):
        gates = torch.softmax(F.linear(x, router).float(), -1).to(dtype)
        return mix(x, weight, bias, a, b, gates, rank, SCALING)

    field = {
        "ours": lambda: lora_mix_routed(x, weight, bias, a, b, router, scaling=SCALING)[0],
        "loop": lambda: by_hand(peers.loop_over_experts),
        "stacked": lambda: by_hand(peers.stacked),
    }
    race(record, {key: step(run, [x, a, b, router], dy) for key, run in field.items()}, device, rounds)
    benchmark.pedantic(step(field["ours"], [x, a, b, router], dy), rounds=3)
