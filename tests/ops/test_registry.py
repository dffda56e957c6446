"""Every op, every provider of this machine, every dtype, every sample: generated from the registry, none by hand."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mllmcl_kernels  # noqa: F401 (declares the ops)
from mllmcl_kernels.library import BACKENDS, FOLDER
from mllmcl_kernels.op import REGISTRY, Op, Sample
from mllmcl_kernels.testing import (
    differentiable,
    excess,
    map_tensors,
    outputs_of,
    poisoned_empty,
    snapshot,
    to_double,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = 20


def samples_of(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    return op.samples(DEVICE, dtype, SEED)


def providers_of(op: Op) -> list[str]:
    """Backends that can run here; the reference is the truth and the yardstick of the others."""
    return [name for name in BACKENDS if name != "reference" and not isinstance(op.find(name), str)]


def cells(dtypes=DTYPES):
    for op in REGISTRY.values():
        for backend in providers_of(op):
            for dtype in dtypes:
                names = [sample.name for sample in samples_of(op, dtype)]
                for index, name in enumerate(names):
                    label = f"{op.name}-{backend}-{str(dtype).removeprefix('torch.')}-{name.replace(' ', '_')}"
                    yield pytest.param(op, backend, dtype, index, id=label)


def ops(**_):
    return [pytest.param(op, id=op.name) for op in REGISTRY.values()]


def take(op: Op, dtype: torch.dtype, index: int, backend: str) -> Sample:
    sample = samples_of(op, dtype)[index]
    reason = op.reason_against(backend, sample.args)
    if reason is not None:
        pytest.skip(reason)
    return sample


@pytest.mark.parametrize("op", ops())
def test_declaration_is_whole(op: Op):
    """Samples enough to mean something, a formula in words, a provider file only where a backend has that name."""
    least = 2 if op.mutates else 6
    assert len(samples_of(op)) >= least
    if op.backward is not None or op.mutates:
        assert len(op.bad_samples()) >= 3
        assert op.cost is not None and op.cost(*samples_of(op)[0].args).bytes > 0
    folder = FOLDER / op.package.removeprefix("mllmcl_kernels.").replace(".", "/")
    assert (folder / "README.md").stat().st_size > 200
    assert op.tolerance == 2.0 or op.tolerance_reason


@pytest.mark.parametrize(("op", "backend", "dtype", "index"), list(cells()))
def test_values_follow_the_error_rule(op: Op, backend: str, dtype: torch.dtype, index: int, record_property):
    """error(ours) <= 2 error(plain torch, same dtype) + 1e-6 max|truth|, for every output, twice the same bits."""
    sample = take(op, dtype, index, backend)
    truth = outputs_of(op, to_double(sample.args), op.reference)
    plain = outputs_of(op, sample.args, op.reference)
    with poisoned_empty():
        ours = outputs_of(op, sample.args, lambda *args: op(*args, backend=backend))
    again = outputs_of(op, sample.args, lambda *args: op(*args, backend=backend))
    assert len(ours) == len(truth)
    for place, (mine, same, usual, true) in enumerate(zip(ours, again, plain, truth, strict=True)):
        assert mine.dtype == usual.dtype and mine.shape == usual.shape, place
        assert torch.equal(mine.nan_to_num(nan=7.7), same.nan_to_num(nan=7.7)), f"output {place} differs on repeat"
        if not mine.is_floating_point():
            assert torch.equal(mine.long(), true.long()), f"output {place}"
            continue
        off = excess(mine, usual, true, op.tolerance)
        record_property(f"ratio_{place}", off.ratio)
        assert off.passes, f"output {place}: {off}"


@pytest.mark.parametrize(("op", "backend", "dtype", "index"), list(cells((torch.float32,))))
def test_inputs_are_not_written(op: Op, backend: str, dtype: torch.dtype, index: int):
    """Bytes of every argument that the schema does not mark as written are the same afterwards."""
    sample = take(op, dtype, index, backend)
    args = map_tensors(sample.args, torch.clone)
    kept = [arg for name, arg in zip(op.argument_names, args, strict=True) if name not in op.mutates]
    before = snapshot(kept)
    op(*args, backend=backend)
    for old, new in zip(before, snapshot(kept), strict=True):
        assert torch.equal(old.reshape(-1).view(torch.uint8), new.reshape(-1).view(torch.uint8))


def tensors_of(args) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(args, found.append)
    return found


def is_partly_frozen(sample: Sample) -> bool:
    """Whether some expert gets no gradient: the ops' own tests compare those."""
    flags = [arg for arg in sample.args if isinstance(arg, list) and arg and isinstance(arg[0], bool)]
    return bool(flags) and not all(flags[0])


def autograd_samples():
    for op in REGISTRY.values():
        if op.backward is not None:
            for backend in ("reference", *providers_of(op)):
                for index, sample in enumerate(samples_of(op)):
                    # the reference's own autograd knows neither frozen experts nor straight-through gates, and a row of
                    # NaN has no gradient to compare; tests of their own cover these
                    if not is_partly_frozen(sample) and not any(word in sample.name for word in ("straight", "NaN")):
                        label = f"{op.name}-{backend}-{sample.name.replace(' ', '_')}"
                        yield pytest.param(op, backend, index, id=label)


def gradients(op: Op, sample: Sample, run) -> list[torch.Tensor]:
    leaves, args = differentiable(op, sample)
    outputs = [out for out in run(*args) if out.is_floating_point() and out.requires_grad]
    generator = torch.Generator().manual_seed(5)
    # drawn in float64 so that every dtype sees the same direction
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device) for out in outputs]
    total = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def differentiated(op: Op, run):
    """The outputs that pass a gradient on."""

    def outputs(*args):
        found = run(*args)
        found = [found] if isinstance(found, torch.Tensor) else found
        return [out for place, out in enumerate(found) if place not in op.aside]

    return outputs


@pytest.mark.parametrize(("op", "backend", "index"), list(autograd_samples()))
def test_gradients_are_those_of_the_formula(op: Op, backend: str, index: int):
    """The registered formula against autograd through the plain forward, which knows nothing of it."""
    sample = take(op, torch.float32, index, backend)
    reference = differentiated(op, op.reference)
    truth = gradients(op, Sample(sample.name, to_double(sample.args)), reference)
    plain = gradients(op, sample, reference)
    ours = gradients(op, sample, differentiated(op, lambda *args: op(*args, backend=backend)))
    for place, (mine, usual, true) in enumerate(zip(ours, plain, truth, strict=True)):
        off = excess(mine, usual, true, op.tolerance)
        assert off.passes, f"gradient {place}: {off}"


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in REGISTRY.values() if op.backward is not None])
def test_the_short_way_is_the_dispatchers(op: Op):
    """Plain tensors go around the dispatcher: the same bits forward and backward, and under autocast."""
    lanes = (op.__call__, op.overload)
    for sample in samples_of(op)[:4]:
        for autocast in (False, True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                values = [outputs_of(op, sample.args, run) for run in lanes]
                slopes = [gradients(op, sample, differentiated(op, run)) for run in lanes]
            for one, other in (*zip(*values, strict=True), *zip(*slopes, strict=True)):
                assert one.dtype == other.dtype
                assert torch.equal(one.nan_to_num(nan=7.7), other.nan_to_num(nan=7.7)), (sample.name, autocast)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in REGISTRY.values() if op.mutates])
def test_a_change_in_place_is_counted(op: Op):
    """So that autograd refuses to use a tensor that was saved before the change; by both ways of a call."""
    for run in (op.__call__, op.overload):
        args = map_tensors(samples_of(op)[0].args, torch.clone)
        before = [[tensor._version for tensor in tensors_of((arg,))] for arg in args]
        run(*args)
        for name, arg, versions in zip(op.argument_names, args, before, strict=True):
            changed = [tensor._version - old for tensor, old in zip(tensors_of((arg,)), versions, strict=True)]
            assert all(count > 0 if name in op.mutates else count == 0 for count in changed), name


def test_whoever_watches_operators_sees_ours():
    """A dispatch mode and a profiler get `mllmcl::lora_mix`; without them plain tensors go around the dispatcher."""
    op = REGISTRY["lora_mix"]
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        op(*samples_of(op)[0].args)
    assert "mllmcl.lora_mix.default" in seen
    with torch.profiler.profile() as profile:
        op(*samples_of(op)[0].args)
    assert "mllmcl::lora_mix" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in REGISTRY.values() if op.backward is not None])
def test_gradcheck(op: Op):
    """The formula against finite differences in float64."""
    run = differentiated(op, op)
    for sample in op.samples(DEVICE, torch.float64, SEED)[:4]:
        leaves, args = differentiable(op, sample)
        if is_partly_frozen(sample) or leaves[0].shape[0] > 20:
            continue

        def floats(*given, leaves=leaves, args=args):
            now = {id(leaf): value for leaf, value in zip(leaves, given, strict=True)}
            outputs = run(*map_tensors(args, lambda tensor: now.get(id(tensor), tensor)))
            return tuple(out for out in outputs if out.is_floating_point())

        torch.autograd.gradcheck(floats, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("op", ops())
def test_opcheck(op: Op):
    """Schema, autograd registration, fake tensors and tracing, for every provider, with and without gradients."""
    # opcheck compares outputs without equal_nan
    samples = [sample for sample in samples_of(op) if "NaN" not in sample.name][1:3]
    for backend in ("reference", *providers_of(op)):
        for sample in samples:
            if op.reason_against(backend, sample.args) is not None:
                continue
            torch.library.opcheck(op.overload, sample.args, {"backend": backend})
            if op.backward is not None:
                _, args = differentiable(op, sample)
                torch.library.opcheck(op.overload, tuple(args), {"backend": backend})


def bad_cells():
    for op in REGISTRY.values():
        for bad in op.bad_samples():
            yield pytest.param(bad, id=f"{op.name}-{bad.name.replace(' ', '_')}")


@pytest.mark.parametrize("bad", list(bad_cells()))
def test_bad_input_is_refused_in_words(bad):
    """The right exception, and a message that names argument, expectation and value."""
    with pytest.raises(bad.error) as caught:
        bad.call()
    assert re.search(bad.match, str(caught.value)), str(caught.value)
