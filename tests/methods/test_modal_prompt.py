"""ModalPrompt: a step against the paper's formulas, what stays frozen, which prompts a sample gets, resumed runs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mllmcl import methods
from mllmcl.methods.features import image_features, text_features

from ..training.made_up_run import make_stream
from .boundaries import items, learned
from .soft import answer_labels, by_hand, cosine, plain_adamw
from .stepping import our_step, prepared


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=8, num_test=4)


def prototype(prompt, head) -> torch.Tensor:
    return sum(head[2](F.silu(head[0](token))) for token in prompt) / len(prompt)


def scores(mllm, sample, p, weight) -> tuple[torch.Tensor, ...]:
    """Score of a task for a sample, and its two cosines, from the paper's formulas."""
    v, u = (tower(mllm, [sample])[0].double() for tower in (image_features, text_features))
    image, text = cosine(v, p[: len(v)]), cosine(u, p[len(v) :])
    return weight * image + (1 - weight) * text, image, text


@pytest.mark.parametrize(("task", "legacy"), [(0, False), (1, False), (2, False), (2, True)], ids=str)
def test_one_step_is_the_papers(task, legacy, stream):
    """A current prompt behind the two best earlier ones; cross entropy and two cosines; AdamW on P_t and h_t alone."""
    options = {"length": 3, "guidance": 0.4, "transfer": 2, "legacy": legacy}
    mllm, method = prepared("modal_prompt", options, stream, task)
    plain = copy.deepcopy(mllm)
    heads = plain.model.prompt_heads
    prompts = [torch.nn.Parameter(one.detach().clone()) for one in plain.prompts.weight]
    samples = list(stream.tasks[task].train[:4])
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    ours = our_step(mllm, method, samples)

    logits, images, texts = [], [], []
    for sample in samples:
        known = [scores(plain, sample, prototype(prompts[t], heads[t]), 0.4) for t in range(task + 1)]
        order = sorted(range(task), key=lambda place, known=known: known[place][0].item())
        chosen = [] if legacy else order[-1:]
        row = torch.cat([*[prompts[place].detach() for place in chosen], prompts[task]])
        logits.append(by_hand(plain, sample, row))
        images.append(known[task][1])
        texts.append(known[task][2])
    loss = F.cross_entropy(torch.cat(logits), answer_labels(plain, samples))
    loss = loss + (1 - sum(images) / len(images)) + (1 - sum(texts) / len(texts))
    moving = [prompts[task], *heads[task].parameters()]
    plain_adamw(loss, moving)

    torch.testing.assert_close(ours, loss.detach(), rtol=1e-8, atol=1e-9)
    bank = mllm.prompts.weight
    torch.testing.assert_close(bank.grad[task], prompts[task].grad, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(bank[task], prompts[task], rtol=1e-6, atol=1e-8)
    for one, other in zip(mllm.model.prompt_heads[task].parameters(), heads[task].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    rest = [place for place in range(3) if place != task]
    assert torch.equal(bank[rest], before["soft_prompts.weight"][rest])
    moved = {name for name, value in mllm.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {
        "soft_prompts.weight",
        *(f"prompt_heads.{task}.{name}" for name, _ in heads[task].named_parameters()),
    }


def ended(stream, tasks: int, **options):
    """A model and its method after some tasks."""
    mllm, method = prepared("modal_prompt", {"length": 2, **options}, stream, tasks - 1)
    method.on_task_end(stream.tasks[tasks - 1])
    return mllm, method


def test_the_best_prompts_stand_last(stream):
    mllm, method = ended(stream, 3, guidance=0.3)
    for place, p in enumerate(method.prototypes):
        torch.testing.assert_close(p, prototype(mllm.prompts.weight[place], method.heads[place]))
    samples = items(stream)
    # prototypes that lie among the samples, so that the order is not the same for all
    parts = [tower(mllm, samples[::4]).double() for tower in (image_features, text_features)]
    method.prototypes = torch.cat(parts, 1)
    ids = method.route(samples)
    for sample, row in zip(samples, ids.tolist(), strict=True):
        found = [scores(mllm, sample, p, 0.3)[0].item() for p in method.prototypes]
        assert row == sorted(range(3), key=found.__getitem__)
    assert len({tuple(row) for row in ids.tolist()}) > 1, "every sample has the same order, so this shows nothing"
    _, legacy = ended(stream, 3, guidance=0.3, legacy=True)
    legacy.prototypes = method.prototypes
    assert torch.equal(legacy.route(samples), ids[:, -1:])
    _, fewer = ended(stream, 2)
    assert fewer.route(samples).shape == (len(samples), 2) and int(fewer.route(samples).max()) == 1


def test_nothing_is_put_in_before_the_first_task(stream):
    mllm, method = learned("modal_prompt", stream, tasks=0)
    samples = items(stream)
    assert method.route(samples) is None
    assert mllm.generate(samples, max_new_tokens=3) == mllm.generate(samples, prompts=None, max_new_tokens=3)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="transfer must be at least 1, got 0"):
        methods.create("modal_prompt", transfer=0)
    with pytest.raises(ValueError, match=r"guidance must be in \[0, 1\], got 2"):
        methods.create("modal_prompt", guidance=2)
