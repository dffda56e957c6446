"""Losses on a linear head's logits: what the registry's tests do not know of, algebra, reductions and work done."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mllmcl_kernels import soft_target_cross_entropy
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import outputs_of

BACKENDS = ("reference", "chunked")
T, D, V, IGNORE = 13, 8, 21, -100


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def leaves(dtype=torch.float64, frozen: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """hidden, head_weight, head_bias that require gradients (hidden alone with a frozen head)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {"hidden": normal(T, D), "head_weight": normal(V, D), "head_bias": normal(V)}
    for name, tensor in found.items():
        tensor.requires_grad_(name == "hidden" or not frozen)
    return found


def some_labels() -> torch.Tensor:
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    labels[2::4] = IGNORE
    return labels


def soft(hidden, head_weight, head_bias, alpha=0.1, labels=None, **options):
    labels = some_labels() if labels is None else labels
    return soft_target_cross_entropy(hidden, head_weight, labels, alpha=alpha, head_bias=head_bias, **options)


def plain(hidden, head_weight, head_bias, alpha=0.1, labels=None, reduction="mean"):
    """The loss in torch's own words."""
    labels = some_labels() if labels is None else labels
    logits = F.linear(hidden, head_weight, head_bias)
    return F.cross_entropy(
        logits, labels, ignore_index=IGNORE, reduction=reduction, label_smoothing=alpha * V / (V - 1)
    )


def gradients(loss, given: dict[str, torch.Tensor], pull=None) -> list[torch.Tensor]:
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    return list(torch.autograd.grad(loss, wanted, pull))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.4])
@pytest.mark.parametrize("frozen", [False, True])
def test_soft_targets_are_label_smoothing_without_the_label(backend, reduction, alpha, frozen):
    """label_smoothing = alpha V / (V - 1) says the same; alpha = 0 is cross entropy. Value and every gradient."""
    given = leaves(frozen=frozen)
    ours = soft(**given, alpha=alpha, reduction=reduction, chunk=4, backend=backend)
    usual = plain(**given, alpha=alpha, reduction=reduction)
    torch.testing.assert_close(ours, usual)
    pull = torch.linspace(-1.0, 2.0, usual.numel(), dtype=torch.float64).view(usual.shape)
    torch.testing.assert_close(gradients(ours, given, pull), gradients(usual, given, pull))


def test_one_step_of_sgd_is_the_plain_one(backend):
    """The reduced loss scaled, as with accumulated gradients, then a step."""
    steps = []
    for loss in (lambda given: soft(**given, backend=backend), lambda given: plain(**given)):
        given = leaves()
        optimizer = torch.optim.SGD(given.values(), lr=0.5)
        (loss(given) / 4 + (given["hidden"] ** 2).sum()).backward()
        optimizer.step()
        steps.append([tensor.detach() for tensor in given.values()])
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_that_counts_is_zero(backend, tokens, reduction):
    """No token, or ignored ones alone: loss 0 and gradients 0 where F.cross_entropy's mean is NaN."""
    given = leaves()
    given["hidden"] = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    labels = torch.full((tokens,), IGNORE)
    loss = soft(**given, labels=labels, reduction=reduction, backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss)) and loss.shape == (labels.shape if reduction == "none" else ())
    for grad, tensor in zip(gradients(loss.sum(), given), given.values(), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_an_ignored_token_holds_what_it_likes(backend):
    """NaN where it is ignored changes no bit."""
    given, labels = leaves(), some_labels()
    before = [loss := soft(**given, backend=backend), *gradients(loss, given)]
    with torch.no_grad():
        given["hidden"][labels == IGNORE] = float("nan")
    after = [loss := soft(**given, backend=backend), *gradients(loss, given)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def test_a_token_gets_what_it_gets_alone(backend):
    """Loss and gradient of each token in the batch and by itself; leading dims are only shape."""
    given, labels = leaves(), some_labels()
    together = soft(**given, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(together.sum(), given["hidden"])
    for token in range(T):
        single = given | {"hidden": given["hidden"].detach()[None, None, token].requires_grad_()}
        alone = soft(**single, labels=labels[None, None, token], reduction="none", backend=backend)
        assert alone.shape == (1, 1)
        torch.testing.assert_close(alone[0, 0], together[token])
        torch.testing.assert_close(torch.autograd.grad(alone.sum(), single["hidden"])[0][0, 0], grad[token])


@pytest.mark.parametrize("needs", [[False] * 3, [True, False, False], [False, True, False], [True, True, True]])
def test_products_are_those_asked_for(needs):
    """Work of the chunked provider: a product for the logits, one for each gradient, none for ignored tokens."""
    from mllmcl_kernels.ops.soft_target_cross_entropy.chunked import soft_target_cross_entropy_chunked

    labels = some_labels()
    args = (*(tensor.detach() for tensor in leaves().values()), None, labels, 0.1, IGNORE, 3, needs)
    with FlopCounterMode(display=False) as counter:
        soft_target_cross_entropy_chunked(*args)
    counted = int((labels != IGNORE).sum())
    assert counter.get_total_flops() == 2 * counted * D * V * (1 + needs[0] + needs[1])


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype):
    """Nothing larger than a chunk of logits, the head or hidden is made, forward and gradients."""
    from mllmcl_kernels.ops.soft_target_cross_entropy.chunked import soft_target_cross_entropy_chunked

    hidden, head = torch.randn(64, 4).to(dtype), torch.randn(100, 4).to(dtype)
    args = (hidden, head, None, None, torch.arange(64), 0.1, IGNORE, 8, [True, True, True])
    with Largest() as seen:
        soft_target_cross_entropy_chunked(*args)
    assert seen.entries == 8 * 100


@pytest.mark.parametrize("backend", ["chunked"])
def test_tokens_that_do_not_count_on_a_device_without_compaction(backend, monkeypatch):
    """The path that never looks at labels on the host, on the samples of every op that has it."""
    from mllmcl_kernels.ops import linear_loss

    for op in REGISTRY.values():
        if isinstance(op.find(backend), str):
            continue
        for sample in op.samples(torch.device("cpu"), torch.float64, 3):
            usual = outputs_of(op, sample.args, lambda *args, op=op: op(*args, backend=backend))
            with monkeypatch.context() as patch:
                patch.setattr(linear_loss, "is_compacted", lambda device: False)
                there = outputs_of(op, sample.args, lambda *args, op=op: op(*args, backend=backend))
            for mine, other in zip(there, usual, strict=True):
                torch.testing.assert_close(mine, other, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(backend, reduction):
    """fullgraph, dynamic labels: no break, no recompilation for other labels, the same numbers."""
    torch._dynamo.reset()

    def step(hidden, head_weight, head_bias, labels):
        loss = soft(hidden, head_weight, head_bias, labels=labels, reduction=reduction, backend=backend)
        return loss.square().sum()

    given = leaves()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for labels in (some_labels(), some_labels().flip(0)):
        with torch.compiler.set_stance("default" if labels[2] == IGNORE else "fail_on_recompile"):
            ours = compiled(**given, labels=labels)
        usual = step(**given, labels=labels)
        torch.testing.assert_close(ours, usual)
        torch.testing.assert_close(gradients(ours, given), gradients(usual, given))


def test_autocast(backend):
    """The head in the autocast dtype, the loss in float32, gradients in the dtypes of the leaves."""
    given = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft(**given, backend=backend)
    halves = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in given.items()}
    usual = soft(**halves, backend=backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, usual)
    for grad, other in zip(gradients(loss, given), gradients(usual, halves), strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, other.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    given = leaves()
    usual = gradients(soft(**given, backend=backend), given)
    loss = checkpoint(lambda *args: soft(*args, backend=backend), *given.values(), use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close([tensor.grad for tensor in given.values()], usual)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_of_gradients_are_refused(backend, reduction):
    given = leaves()
    loss = soft(**given, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


def test_a_gradient_that_was_not_asked_for_is_refused(backend):
    """The op alone, told that the head is frozen although it requires a gradient."""
    given = leaves()
    op = REGISTRY["soft_target_cross_entropy"]
    total, *_ = op(*given.values(), None, some_labels(), 0.1, IGNORE, None, [True, False, True], backend=backend)
    with pytest.raises(RuntimeError, match="was not asked for the gradient of head_weight"):
        total.backward()


def test_the_chunk_without_a_choice():
    """64 MiB of logits in blocks of 128 tokens; with a head that trains as much as its gradient; never over T."""
    from mllmcl_kernels.ops.linear_loss import chunk_rows

    head = torch.empty(32000, 4096, dtype=torch.bfloat16, device="meta")
    assert chunk_rows(10**6, head, None, False) == 1024
    assert chunk_rows(10**6, head, None, True) == 8192
    assert chunk_rows(10**6, torch.empty(10**6, 64, device="meta"), None, False) == 128
    assert chunk_rows(700, head, None, False) == 700 and chunk_rows(0, head, None, False) == 1
    assert chunk_rows(700, head, 33, True) == 33
