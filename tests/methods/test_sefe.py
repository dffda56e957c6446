"""SEFE: the penalty on kept entries, which entries are kept, styles in the training data."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods

from ..training.made_up_run import make_stream
from .mixing import survives_cuts
from .plain import equal, make_plain
from .stepping import fill, our_step, plain_loss, plain_step, prepared, same_lora

OPTIONS = {"rank": 3, "alpha": 6.0, "strength": 40.0, "key_share": 0.05}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def largest(mllm, share: float = 0.05) -> dict[str, list[tuple[int, int]]]:
    """Row and column of the largest |B A| of each layer, by sorting all entries."""
    found = {}
    for path, layer in mllm.expert_layers.items():
        size = (layer.lora_b @ layer.lora_a).abs()
        entries = sorted((float(size[i, j]), i, j) for i in range(size.shape[0]) for j in range(size.shape[1]))
        found[path] = [(i, j) for _, i, j in entries[-round(share * size.numel()) :]]
    return found


def test_one_step_is_the_papers(stream):
    mllm, method = prepared("sefe", OPTIONS, stream, 0)
    kept = []
    for place in range(2):
        kept.append(largest(mllm))
        method.on_task_end(stream.tasks[place])
        method.on_task_start(stream.tasks[place + 1])
        fill(mllm, torch.Generator().manual_seed(place + 4))
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[2].train[:5])
    penalties = []
    for path in mllm.expert_layers:
        layer = plain.model.get_submodule(path)
        product = layer.b[0] @ layer.a[0]
        sizes = [product[i, j].abs() for entries in kept for i, j in entries[path]]
        penalties.append(sum(sizes) / len(sizes))
    # an entry that mattered to both tasks counts twice
    assert any(set(kept[0][path]) & set(kept[1][path]) for path in kept[0])
    loss = plain_loss(plain, samples) + 40.0 * sum(penalties) / len(penalties)
    # the op's weights of layers are float32
    torch.testing.assert_close(our_step(mllm, method, samples), plain_step(plain, loss), rtol=1e-7, atol=1e-9)
    same_lora(mllm, plain, 1e-6)


def test_what_is_kept_is_the_largest_of_the_tasks_own_product(stream):
    mllm, method = prepared("sefe", OPTIONS, stream, 0)
    wanted = largest(mllm)
    method.on_task_end(stream.tasks[0])
    method.on_task_end(stream.tasks[0])
    assert set(method.keys) == {0} and method.keys[0].dtype == torch.int32
    counts = [len(entries) for entries in wanted.values()]
    for (path, entries), flat in zip(wanted.items(), method.keys[0].split(counts), strict=True):
        width = mllm.expert_layers[path].in_features
        assert {(int(at) // width, int(at) % width) for at in flat} == set(entries)


def test_the_first_task_is_plain_and_its_data_has_styles(stream):
    mllm, method = prepared("sefe", {**OPTIONS, "style_share": 0.25}, stream, 0)
    samples = list(stream.tasks[0].train[:5])
    expected = plain_loss(mllm.eval(), samples).detach()
    torch.testing.assert_close(our_step(mllm, method, samples), expected)
    changed = [sample for sample in method.training_samples(stream.tasks[0]) if "#" in sample.id]
    assert len(changed) == 6
    assert methods.create("sefe", style_share=0.0).training_samples(stream.tasks[0]) == list(stream.tasks[0].train)


def test_wrong_options_are_refused():
    for options, match in (
        ({"strength": -1.0}, "strength must not be negative, got -1"),
        ({"key_share": 0.0}, r"key_share must be in \(0, 1\], got 0"),
        ({"style_share": 2.0}, r"style_share must be in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=match):
            methods.create("sefe", **options)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "sefe", {"rank": 2})
