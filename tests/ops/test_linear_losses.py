"""Losses on a linear head's logits: what the registry's tests do not know of, algebra, reductions and work done."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mllmcl_kernels import distillation_loss, soft_target_cross_entropy, teacher_top_k
from mllmcl_kernels.op import REGISTRY
from mllmcl_kernels.testing import outputs_of

BACKENDS = ("reference", "chunked")
T, D, V, IGNORE = 13, 8, 21, -100
TEACHER = torch.randn(T, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2.0


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


def distil(hidden, head_weight, head_bias, teacher=None, labels=None, temperature=2.0, **options):
    teacher = TEACHER if teacher is None else teacher
    labels = some_labels() if labels is None else labels
    return distillation_loss(
        hidden, head_weight, teacher, temperature=temperature, labels=labels, head_bias=head_bias, **options
    )


def distil_top(hidden, head_weight, head_bias, **options):
    cached = teacher_top_k(TEACHER, 4, 2.0)
    return distil(hidden, head_weight, head_bias, teacher=cached, **options)


@pytest.fixture(params=[soft, distil, distil_top], ids=lambda loss: loss.__name__)
def loss_of(request):
    return request.param


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


def test_an_ignored_token_holds_what_it_likes(loss_of, backend):
    """NaN where it is ignored changes no bit."""
    given, labels = leaves(), some_labels()
    before = [loss := loss_of(**given, backend=backend), *gradients(loss, given)]
    with torch.no_grad():
        given["hidden"][labels == IGNORE] = float("nan")
    after = [loss := loss_of(**given, backend=backend), *gradients(loss, given)]
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


def cached_log_p(teacher, entries, temperature):
    """What the op itself is given of a cached teacher."""
    values, indices, rest = teacher_top_k(teacher, entries, temperature)
    return torch.cat((values, rest[:, None]), -1).div(temperature).log_softmax(-1)[:, :entries], indices


def wrong_calls() -> tuple[list[tuple[str, tuple, torch.Tensor]], list[torch.Tensor]]:
    """Ops with targets of which some are none, and which; the head they share."""
    given = [tensor.detach() for tensor in leaves(torch.float32).values()]
    labels = some_labels()
    labels[1], labels[4] = V, -7
    values, indices = cached_log_p(TEACHER.float(), 3, 2.0)
    indices = indices.long()
    indices[3, 1], indices[5, 2], indices[7, 0], indices[7, 1] = V, -1, 0, 0
    values[9] += 2.0
    tokens = torch.arange(T)
    return [
        ("soft_target_cross_entropy", (labels, 0.1, IGNORE), (tokens == 1) | (tokens == 4)),
        ("distillation_loss", (values, indices, tokens != 5, 2.0), (tokens == 3) | (tokens == 7) | (tokens == 9)),
    ], given


@pytest.mark.parametrize("compacted", [False, True])
def test_targets_that_are_none_on_a_device(backend, compacted, monkeypatch):
    """Where nobody waits to look: NaN for the token, its gradient and the total, and not for its neighbours."""
    from mllmcl_kernels.ops import linear_loss
    from mllmcl_kernels.ops.distillation_loss import reference as of_distillation
    from mllmcl_kernels.ops.soft_target_cross_entropy import reference as of_soft_targets

    for module in (of_distillation, of_soft_targets):
        monkeypatch.setattr(module, "may_look", lambda device: False)
    monkeypatch.setattr(linear_loss, "is_compacted", lambda device: compacted)
    calls, given = wrong_calls()
    for name, arguments, wrong in calls:
        op = REGISTRY[name]
        total, losses, dhidden, *_ = op(*given, None, *arguments, 4, [True] * 3, backend=backend)
        assert bool(total.isnan())
        assert torch.equal(losses.isnan(), wrong) and torch.equal(dhidden.isnan().all(-1), wrong)
        assert torch.equal(dhidden.isnan().any(-1), wrong)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(loss_of, backend, reduction):
    """fullgraph, dynamic labels: no break, no recompilation for other labels, the same numbers."""
    torch._dynamo.reset()

    def step(hidden, head_weight, head_bias, labels):
        loss = loss_of(hidden, head_weight, head_bias, labels=labels, reduction=reduction, backend=backend)
        return loss.square().sum()

    given = leaves()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for labels in (some_labels(), some_labels().flip(0)):
        with torch.compiler.set_stance("default" if labels[2] == IGNORE else "fail_on_recompile"):
            ours = compiled(**given, labels=labels)
        usual = step(**given, labels=labels)
        torch.testing.assert_close(ours, usual)
        torch.testing.assert_close(gradients(ours, given), gradients(usual, given))


def test_autocast(loss_of, backend):
    """The head in the autocast dtype, the loss in float32, gradients in the dtypes of the leaves."""
    given = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(**given, backend=backend)
    halves = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in given.items()}
    usual = loss_of(**halves, backend=backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, usual)
    for grad, other in zip(gradients(loss, given), gradients(usual, halves), strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, other.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(loss_of, backend, reentrant):
    given = leaves()
    usual = gradients(loss_of(**given, backend=backend), given)
    loss = checkpoint(lambda *args: loss_of(*args, backend=backend), *given.values(), use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close([tensor.grad for tensor in given.values()], usual)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_of_gradients_are_refused(loss_of, backend, reduction):
    given = leaves()
    loss = loss_of(**given, reduction=reduction, backend=backend).sum()
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


# -- distillation -----------------------------------------------------------------------------------------------------


def plain_distillation(hidden, head_weight, head_bias, teacher, temperature, labels, reduction):
    """The loss in torch's own words."""
    log_q = F.log_softmax(F.linear(hidden, head_weight, head_bias) / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    losses = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    losses = losses * (labels != IGNORE)
    total = {"mean": losses.sum() / (labels != IGNORE).sum(), "sum": losses.sum()}
    return total.get(reduction, losses)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_distillation_is_kl_div(backend, reduction, temperature, frozen):
    """Value and every gradient against torch's own function."""
    given, teacher, labels = leaves(frozen=frozen), TEACHER, some_labels()
    ours = distil(**given, temperature=temperature, reduction=reduction, chunk=4, backend=backend)
    usual = plain_distillation(**given, teacher=teacher, temperature=temperature, labels=labels, reduction=reduction)
    torch.testing.assert_close(ours, usual)
    pull = torch.linspace(-1.0, 2.0, usual.numel(), dtype=torch.float64).view(usual.shape)
    torch.testing.assert_close(gradients(ours, given, pull), gradients(usual, given, pull))


def test_a_cached_teacher_is_the_divergence_of_what_is_taken_together(backend):
    """Both distributions summed over the rest by hand, entry by entry."""
    given, temperature, top = leaves(), 1.7, 3
    cached = teacher_top_k(TEACHER, top, temperature)
    indices = cached[1]
    ours = distil(**given, teacher=cached, temperature=temperature, reduction="none", backend=backend)
    q = F.softmax(F.linear(*given.values()) / temperature, -1)
    p = F.softmax(TEACHER / temperature, -1)
    losses = []
    for token in range(T):
        chosen = indices[token].tolist()
        others = [entry for entry in range(V) if entry not in chosen]
        p_taken, q_taken = (torch.cat((r[token, chosen], r[token, others].sum()[None])) for r in (p, q))
        losses.append(temperature**2 * (p_taken * (p_taken / q_taken).log()).sum())
    usual = torch.stack(losses) * (some_labels() != IGNORE)
    torch.testing.assert_close(ours, usual)
    torch.testing.assert_close(gradients(ours.sum(), given), gradients(usual.sum(), given))


def test_a_cached_teacher_is_a_lower_bound_that_closes(backend):
    """More entries never lower the loss; all of them are all logits."""
    given = leaves(frozen=True)
    losses = [
        distil(**given, teacher=teacher_top_k(TEACHER, top, 2.0), reduction="none", backend=backend)
        for top in range(1, V + 1)
    ]
    for fewer, more in itertools.pairwise(losses):
        assert bool((more >= fewer - 1e-12).all())
    assert bool((losses[0] < losses[-1])[some_labels() != IGNORE].all())
    full = distil(**given, reduction="none", backend=backend)
    torch.testing.assert_close(losses[-1], full)
    torch.testing.assert_close(gradients(losses[-1].sum(), given), gradients(full.sum(), given))


def test_mass_beside_the_cached_entries_is_seen(backend):
    """A student that agrees on the ratio of the teacher's two tokens and puts its mass elsewhere is pulled back."""
    teacher = torch.tensor([[6.0, 5.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[6.0, 5.0, 9.0, 0.0, 0.0]], requires_grad=True)
    cached = teacher_top_k(teacher, 2)
    loss = distillation_loss(student, torch.eye(5), cached, backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss > 1.0 and grad[0, 2] > 0.5 and bool((grad[0, :2] < 0).all())


def test_a_student_that_is_its_teacher_has_no_loss(backend):
    """In half precision too: zero to the rounding of float32, and so is the gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        given = leaves(dtype, frozen=True)
        teacher = F.linear(*(tensor.detach() for tensor in given.values()))
        for kind in (teacher, teacher_top_k(teacher, 5, 2.0)):
            loss = distil(**given, teacher=kind, reduction="sum", backend=backend)
            assert abs(float(loss.detach())) < 1e-5
            (grad,) = gradients(loss, given)
            assert float(grad.abs().max()) < 1e-5


def test_caches_in_half_precision_and_small_integers(backend):
    """float16 values and int32 indices, as a buffer on disk has them."""
    given = leaves(torch.float32)
    values, indices, rest = teacher_top_k(TEACHER, 6, 2.0)
    assert indices.dtype == torch.int32
    exact = distil(**given, teacher=(values, indices.long(), rest), backend=backend)
    ours = distil(**given, teacher=[values.half(), indices, rest.half()], backend=backend)
    torch.testing.assert_close(ours, exact, rtol=1e-2, atol=1e-3)


def test_a_teacher_of_top_logits_alone(backend):
    """(values, indices) of torch.topk: the teacher's softmax over the k, the student's over all; scaled logits too."""
    given, temperature = leaves(), 1.3
    values, indices = TEACHER.topk(4, -1)
    ours = distil(**given, teacher=(values, indices), temperature=temperature, reduction="none", backend=backend)
    log_q = F.log_softmax(F.linear(*given.values()) / temperature, -1).gather(-1, indices)
    log_p = F.log_softmax(values / temperature, -1)
    usual = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1) * (some_labels() != IGNORE)
    torch.testing.assert_close(ours, usual)
    torch.testing.assert_close(gradients(ours.sum(), given), gradients(usual.sum(), given))
    moved = distil(**given, teacher=(values + 9.0, indices), temperature=temperature, reduction="none", backend=backend)
    torch.testing.assert_close(moved, ours)


def test_teacher_top_k():
    """The best k in order and the weight of the others, for any leading dims; bad arguments in words."""
    logits = TEACHER.view(1, T, V)
    values, indices, rest = teacher_top_k(logits, 3, temperature=0.5)
    order = logits.argsort(-1, descending=True)
    assert torch.equal(indices.long(), order[..., :3])
    assert torch.equal(values, logits.gather(-1, order[..., :3]))
    torch.testing.assert_close((rest / 0.5).exp(), (logits.gather(-1, order[..., 3:]) / 0.5).exp().sum(-1))
    assert teacher_top_k(logits.bfloat16(), 2)[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"teacher_top_k: k must be an integer in 1\.\.V = 21, got 22"):
        teacher_top_k(logits, 22)
    with pytest.raises(ValueError, match="temperature must be a positive number, got -1"):
        teacher_top_k(logits, 2, -1)
