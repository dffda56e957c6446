"""Losses on a linear head beside those that hold its logits: time, and bytes at the peak."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from mllmcl_kernels import distillation_loss, soft_target_cross_entropy, teacher_top_k
from mllmcl_kernels.op import REGISTRY

from . import packages
from .cases import LossCase
from .measuring import RESULTS, Case, misses, other_backends, providers_used, race
from .mixing import step, values_and_gradients

ALPHA, TEMPERATURE, PARTS = 0.05, 2.0, 4


def of_logits(kind: str, logits: Tensor, target) -> Tensor:
    """Sum of the losses in torch's own functions."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "soft targets":
        vocabulary = logits.shape[-1]
        smoothing = ALPHA * vocabulary / (vocabulary - 1)
        return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum")
    log_q = F.log_softmax(logits / TEMPERATURE, -1)
    if kind == "teacher":
        log_p = F.log_softmax(target.to(logits.dtype) / TEMPERATURE, -1)
    else:
        values, indices = target
        log_q, log_p = log_q.gather(-1, indices), F.log_softmax(values.to(logits.dtype) / TEMPERATURE, -1)
    return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def rows(target, part: slice):
    return target[part] if isinstance(target, Tensor) else tuple(tensor[part] for tensor in target)


def peak_bytes(run, device: torch.device) -> int:
    """What a step holds at most beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.fixture
def given(loss_case: LossCase, device, dtype) -> tuple[dict[str, Tensor], object]:
    """hidden that asks for its gradient, the frozen head, and what the loss is against."""
    case, generator = loss_case, torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    tensors = {
        "hidden": normal(case.tokens, case.width).requires_grad_(),
        "head": normal(case.vocabulary, case.width, scale=2 * case.width**-0.5),
    }
    if case.loss == "soft targets":
        return tensors, torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    teacher = normal(case.tokens, case.vocabulary, scale=2.0)
    if case.loss == "teacher":
        return tensors, teacher
    values, indices, _ = teacher_top_k(teacher, case.entries, TEMPERATURE)
    return tensors, (values, indices.long())


def test_linear_loss(benchmark, loss_case: LossCase, given, device, dtype, rounds):
    case, (tensors, target) = loss_case, given
    one = torch.ones((), device=device)

    def ours(hidden, head, backend=None):
        if case.loss == "soft targets":
            return soft_target_cross_entropy(hidden, head, target, alpha=ALPHA, reduction="sum", backend=backend)
        options = {"temperature": TEMPERATURE, "reduction": "sum", "backend": backend}
        return distillation_loss(hidden, head, target, **options)

    def plain(hidden, head):
        return of_logits(case.loss, hidden @ head.t(), target)

    def parts(hidden, head):
        """Logits of a part of the tokens at a time, computed again in the backward."""
        size = -(-case.tokens // PARTS)
        spans = [slice(start, start + size) for start in range(0, case.tokens, size)]

        def part(hidden, target):
            return of_logits(case.loss, hidden @ head.t(), target)

        return sum(checkpoint(part, hidden[span], rows(target, span), use_reentrant=False) for span in spans)

    # logits once and the gradient of hidden
    flops = 2 * 2 * case.tokens * case.width * case.vocabulary
    record = Case("linear losses", f"{case}, {str(dtype).removeprefix('torch.')}", flops=flops)
    RESULTS.append(record)
    names = ("loss", "dhidden")
    usual, truth = (values_and_gradients(plain, tensors, one, wide=wide) for wide in (False, True))
    with providers_used() as record.providers:
        default = values_and_gradients(ours, tensors, one, wide=False)
    refused = {"ours": misses(default, usual, truth, names)}
    field = {"ours": lambda: ours(**tensors)}
    (name,) = record.providers
    for backend in other_backends(REGISTRY[name], record.providers[name]):
        found = values_and_gradients(lambda hidden, head, b=backend: ours(hidden, head, b), tensors, one, wide=False)
        refused[f"ours ({backend})"] = misses(found, usual, truth, names)
        field[f"ours ({backend})"] = lambda backend=backend: ours(**tensors, backend=backend)
    field["logits"] = lambda: plain(**tensors)
    field["logits in parts"] = lambda: parts(**tensors)
    if case.loss == "soft targets":
        smoothing = ALPHA * case.vocabulary / (case.vocabulary - 1)

        def liger():
            return packages.liger_cross_entropy(*tensors.values(), target, smoothing)

        others = (field, record.refused, "Liger", "liger_kernel", device)
        packages.add_optional(*others, lambda: liger, lambda: plain(**tensors))
    record.refused |= {name: reason for name, reason in refused.items() if reason}
    steps = {name: step(run, [tensors["hidden"]], one) for name, run in field.items() if name not in record.refused}
    record.notes = {f"{name}, bytes at the peak": peak_bytes(run, device) for name, run in steps.items()}
    race(record, steps, device, rounds)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    assert "ours" not in record.refused, record.refused["ours"]
    benchmark.pedantic(steps["ours"], rounds=3)
