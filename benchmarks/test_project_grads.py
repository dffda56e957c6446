"""`project_grads_` beside loops over layers, with and without temporaries, and batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from mllmcl_kernels import project_grads_

from .cases import LayerCase
from .layers import by_shape
from .measuring import RESULTS, Case, misses, providers_used, race


def loop(grads: list[Tensor], bases: list[Tensor]) -> None:
    """One layer after the other, as hooks do it."""
    for grad, basis in zip(grads, bases, strict=True):
        grad.sub_((grad @ basis) @ basis.t())


def loop_in_place(grads: list[Tensor], bases: list[Tensor]) -> None:
    for grad, basis in zip(grads, bases, strict=True):
        grad.addmm_(grad @ basis, basis.t(), alpha=-1)


def stacked(grads: list[Tensor], bases: list[Tensor]) -> None:
    """Layers of one shape under each other and back."""
    for places in by_shape(grads):
        all_grads, all_bases = (torch.stack([tensors[place] for place in places]) for tensors in (grads, bases))
        all_grads.baddbmm_(torch.bmm(all_grads, all_bases), all_bases.mT, alpha=-1)
        torch._foreach_copy_([grads[place] for place in places], list(all_grads.unbind()))


def test_project_grads(benchmark, projection_case: LayerCase, device, dtype, rounds):
    case = projection_case
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    grads = [normal(case.rank or out, width).to(dtype) for width, out in case.linears]
    bases = [torch.linalg.qr(normal(width, case.number)).Q.to(dtype).contiguous() for width, _ in case.linears]
    numbers = 3 * sum(grad.numel() for grad in grads) + 2 * sum(basis.numel() for basis in bases)
    record = Case(
        "project_grads_", f"{case}, {str(dtype).removeprefix('torch.')}", bytes=numbers * grads[0].element_size()
    )
    RESULTS.append(record)
    mine, plain = ([grad.clone() for grad in grads] for _ in range(2))
    truth = [grad.double() for grad in grads]
    with providers_used() as record.providers:
        project_grads_(mine, bases)
    loop(plain, bases)
    loop(truth, [basis.double() for basis in bases])
    reason = misses(mine, plain, truth, [f"gradient {place}" for place in range(len(grads))])
    if reason:
        record.refused["ours"] = reason
    assert reason is None, reason
    peers = {"ours": project_grads_, "loop": loop, "loop in place": loop_in_place, "stacked": stacked}

    def contestant(run):
        own = [grad.clone() for grad in grads]
        return lambda: run(own, bases)

    field = {name: contestant(run) for name, run in peers.items()}
    race(record, field, device, max(3, rounds * 2 // 3))
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(field["ours"], rounds=3)
