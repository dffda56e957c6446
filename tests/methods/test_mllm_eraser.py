"""MLLMEraser: the map against the formula with full matrices, what is steered and when, what stays."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mllmcl import methods

from ..models.tiny import make_composed
from ..training.made_up_run import make_stream
from .boundaries import items

OPTIONS = {"num_samples": 6, "damping": 0.05, "strength": 0.7, "energy": 0.9}


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_train=8, num_test=4)


def ended(stream, tasks: int, **options):
    mllm = make_composed()
    method = methods.create("mllm_eraser", **{**OPTIONS, **options})
    method.setup(mllm, stream)
    for task in stream.tasks[:tasks]:
        method.on_task_start(task)
        method.on_task_end(task)
    return mllm, method


@torch.no_grad()
def states(mllm, sample, place: int) -> list[torch.Tensor]:
    """State at a place of a sample's row with its answer after each layer, from a plain pass over it alone."""
    batch = mllm.collate([sample], with_answers=True)
    row = mllm.model.embed(batch.input_ids, batch.inputs["image_features"])
    width = int((batch.labels[0] == -100).sum())
    found, language = [], mllm.model.language.model
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: found.append(out[0, width - 1 if place == 0 else -2].double()))
        for layer in language.layers
    ]
    language(inputs_embeds=row)
    for handle in handles:
        handle.remove()
    return found


def full_maps(mllm, method, stream, erased, kept, refusal: str) -> list[torch.Tensor]:
    """M of each layer from the formula, with projector and pseudo-inverse of full size."""
    by_task = {task.name: method.stored([task]) for task in stream.tasks}
    maps = []
    for layer in range(2):
        forget = {name: [states(mllm, sample, 0)[layer] for sample in by_task[name]] for name in erased}
        h_f = torch.stack([one for name in erased for one in forget[name]], dim=1)
        d = []
        for name in erased:
            said = [states(mllm, sample, 1)[layer] for sample in by_task[name]]
            unsaid = [states(mllm, dataclasses.replace(s, answer=refusal), 1)[layer] for s in by_task[name]]
            d += [sum(unsaid) / len(unsaid) - sum(said) / len(said)] * len(said)
        p = torch.eye(len(h_f), dtype=torch.float64)
        if kept:
            h_r = torch.stack([states(mllm, s, 0)[layer] for name in kept for s in by_task[name]], dim=1)
            values, vectors = torch.linalg.eigh(h_r @ h_r.t())
            main, reached = [], 0.0
            for value, vector in reversed(list(zip(values, vectors.t(), strict=True))):
                if reached < 0.9 * values.sum():
                    main.append(vector)
                reached = reached + value
            p = p - sum(torch.outer(vector, vector) for vector in main)
        inside = p @ h_f
        gamma = 0.05 * (inside**2).sum(0).mean()
        w = 0.7 * torch.stack(d, dim=1) @ h_f.t() @ p @ torch.linalg.pinv(inside @ inside.t() + gamma * p, rcond=1e-10)
        maps.append((w @ p).t())
    return maps


@pytest.mark.parametrize("erased", [["t0"], ["t0", "t2"], ["t1"]], ids=str)
def test_the_map_is_the_papers(erased, stream):
    mllm, method = ended(stream, 3, forget=erased, refusal="no")
    kept = [name for name in ("t0", "t1", "t2") if name not in erased]
    steering = mllm.steering
    maps = full_maps(make_composed(), method, stream, erased, kept, "no")
    for layer, m in enumerate(maps):
        ours = (steering.read[layer] @ steering.write[layer]).double()
        assert float((ours - m).abs().max() / m.abs().max()) < 1e-3
    assert steering.read.shape[2] == len(erased)


def steered_by_hand(mllm, sample, maps) -> torch.Tensor:
    """Answer logits of one sample when every layer moves its prompt by the state of the last prompt token."""
    batch = mllm.collate([sample], with_answers=True)
    width = int((batch.labels[0] == -100).sum())
    language = mllm.model.language.model

    def move(m):
        def hook(_module, _args, out):
            moved = out.clone()
            moved[0, :width] += out[0, width - 1] @ m
            return moved

        return hook

    handles = [layer.register_forward_hook(move(m)) for layer, m in zip(language.layers, maps, strict=True)]
    row = mllm.model.embed(batch.input_ids, batch.inputs["image_features"])
    hidden = language(inputs_embeds=row).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return mllm.head(hidden[batch.answer_positions])


@torch.no_grad()
def test_the_prompt_moves_and_the_answer_does_not(stream):
    mllm, _ = ended(stream, 3)
    steering, samples = mllm.steering, items(stream, 2)
    maps = list(steering.read @ steering.write)
    plain = make_composed()
    rows = [steered_by_hand(plain, sample, maps) for sample in samples]
    theirs = torch.cat(rows)
    batch = mllm.collate(samples, with_answers=True)
    torch.testing.assert_close(mllm.answer_logits(batch), theirs, rtol=1e-4, atol=1e-4)
    assert float((theirs - plain.answer_logits(plain.collate(samples, with_answers=True))).abs().max()) > 0.1
    # decoding goes on from the steered prompt: its first token is the one that the whole row finds most likely
    first = [int(row[0].argmax()) for row in rows]
    told = mllm.generate(samples, max_new_tokens=1)
    assert told == [mllm.tokenizer.decode([one], skip_special_tokens=True).strip() for one in first]


def test_forgotten_states_move_as_told_and_retained_ones_hardly(stream):
    _, method = ended(stream, 3, energy=1.0, damping=1e-6, strength=1.0)
    steering = method.mllm.steering
    moves = {name: torch.einsum("nld,ldr,lre->nle", value, steering.read, steering.write)
             for name, value in method.states.items()}  # fmt: skip
    direction = method.directions["t0"]
    torch.testing.assert_close(moves["t0"], direction.expand_as(moves["t0"]), rtol=1e-2, atol=1e-2)
    for name in ("t1", "t2"):
        assert float(moves[name].norm(dim=-1).max() / direction.norm(dim=-1).min()) < 1e-2


def test_nothing_is_steered_before_and_nothing_trains(stream):
    samples = items(stream)
    plain = make_composed()
    mllm, method = ended(stream, 0)
    assert mllm.generate(samples, max_new_tokens=3) == plain.generate(samples, max_new_tokens=3)
    mllm, method = ended(stream, 3, forget=[])
    assert mllm.steering.read is None and method.phases(stream.tasks[0]) == []
    assert mllm.generate(samples, max_new_tokens=3) == plain.generate(samples, max_new_tokens=3)
    mllm, _ = ended(stream, 1)
    assert mllm.generate(samples, max_new_tokens=3) != plain.generate(samples, max_new_tokens=3)
    assert not [name for name, value in mllm.model.named_parameters() if value.requires_grad]
    for (name, value), other in zip(mllm.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_wrong_options_are_refused(stream):
    with pytest.raises(ValueError, match=r"forget must name tasks of the stream \(t0, t1, t2\), got 'x'"):
        ended(stream, 0, forget=["x"])
    for option, match in (({"num_samples": 0}, "num_samples must be at least 1, got 0"),
                          ({"damping": 0.0}, r"damping must be positive, got 0\.0"),
                          ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0\.0")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            methods.create("mllm_eraser", **option)
