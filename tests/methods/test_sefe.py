"""SEFE: key entries and penalty against the paper's formula, what is stored, resumed and trained on."""

from __future__ import annotations

import copy

import pytest
import torch

from mllmcl import methods
from mllmcl.streams.styles import diversified

from ..training.made_up_run import make_run, make_stream
from ..training.test_loop import final_tensors
from .mixing import items, learned, reloaded, routed_logits, same_alone_and_mixed, survives_cuts
from .plain import equal, make_plain
from .stepping import our_step, plain_loss, plain_step, prepared, same_lora

OPTIONS = {"rank": 3, "alpha": 6.0, "strength": 32.0, "key_share": 0.05}


@pytest.fixture(scope="module")
def stream():
    return make_stream()


def start_phase(method, task):
    method.on_phase_start(task, method.phases(task)[0])


def largest(product, share):
    """(row, column) of the largest entries, one after the other."""
    size, found = product.abs(), []
    for _ in range(max(1, int(share * product.numel()))):
        place = int(size.argmax())
        found.append((place // size.shape[1], place % size.shape[1]))
        size[found[-1]] = -1.0
    return found


def factors(mllm):
    return {
        path: (layer.lora_a.detach().clone(), layer.lora_b.detach().clone())
        for path, layer in mllm.expert_layers.items()
    }


def pairs_of(places, width):
    return [(int(place) // width, int(place) % width) for place in places]


def three_tasks(stream, **options):
    """A model in its third task, and the key entries of the first two, found one by one."""
    mllm, method = prepared("sefe", {**OPTIONS, **options}, stream, 0)
    generator = torch.Generator().manual_seed(5)
    keys = {path: [] for path in mllm.expert_layers}
    for place in (0, 1):
        for path, (a, b) in factors(mllm).items():
            keys[path] += largest(b @ a, OPTIONS["key_share"])
        method.on_task_end(stream.tasks[place])
        method.on_task_start(stream.tasks[place + 1])
        with torch.no_grad():
            for layer in mllm.expert_layers.values():
                # a row and a column that are large in both tasks make entries occur twice
                layer.lora_b.copy_(0.3 * torch.randn(layer.lora_b.shape, generator=generator))
                layer.lora_b[0] *= 5.0
                layer.lora_a[:, 0] *= 5.0
    return mllm, method, keys


def test_one_step_of_the_third_task_is_the_papers(stream):
    """Forward, loss, gradients and AdamW; the penalty is written out entry by entry, those of both tasks."""
    mllm, method, keys = three_tasks(stream)
    start_phase(method, stream.tasks[2])
    assert mllm.experts.scaling == (2.0,)
    plain = copy.deepcopy(mllm)
    make_plain(plain, [True], equal)
    samples = list(stream.tasks[2].train[:5])
    batch = plain.collate(samples, with_answers=True)
    with torch.no_grad():
        torch.testing.assert_close(mllm.answer_logits(batch), plain.answer_logits(batch), rtol=1e-9, atol=1e-9)
    answer_loss = plain_loss(plain, samples)
    penalty = 0.0
    for path, found in keys.items():
        layer = plain.model.get_submodule(path)
        product = layer.b[0] @ layer.a[0]
        # the mean over layers of means over entries; the op holds an entry's weight, here times 2^5, in float32
        weight = torch.tensor(1 / len(keys) / len(found), dtype=torch.float32).double()
        penalty = penalty + 32.0 * weight * sum(product[row, col].abs() for row, col in found)
    # a tenth at least, so that the comparison is one of the penalty
    assert float(penalty.detach()) > 0.1 * float(answer_loss.detach())
    theirs = plain_step(plain, answer_loss + penalty)
    torch.testing.assert_close(our_step(mllm, method, samples), theirs, rtol=1e-9, atol=1e-10)
    same_lora(mllm, plain)


def test_key_entries_are_the_largest_of_each_task_and_stay_twice_where_both_have_them(stream):
    mllm, method, keys = three_tasks(stream)
    method.on_task_end(stream.tasks[2])
    assert list(method.keys) == ["t0", "t1", "t2"]
    for path, layer in mllm.expert_layers.items():
        width = layer.in_features
        first, second, third = (method.keys[name][path] for name in method.keys)
        assert first.dtype == torch.int32 and len(first) == int(0.05 * layer.weight.numel())
        assert sorted(pairs_of(torch.cat([first, second]), width)) == sorted(keys[path])
        assert pairs_of(third, width) == sorted(largest((layer.lora_b @ layer.lora_a).detach(), 0.05))
    start = {path: torch.cat([method.keys["t1"][path], method.keys["t2"][path]]) for path in keys}
    assert any(len(places.unique()) < len(places) for places in start.values())


def test_the_scaling_does_not_count_and_one_entry_is_the_least(stream):
    mllm, method = prepared("sefe", {"rank": 2, "alpha": 0.5, "key_share": 1e-6}, stream, 0)
    wanted = {path: largest(b @ a, 1e-6) for path, (a, b) in factors(mllm).items()}
    method.on_task_end(stream.tasks[0])
    for path, layer in mllm.expert_layers.items():
        assert pairs_of(method.keys["t0"][path], layer.in_features) == wanted[path]


def test_the_first_task_and_strength_zero_have_no_penalty(stream):
    _, method = prepared("sefe", OPTIONS, stream, 0)
    start_phase(method, stream.tasks[0])
    one = torch.tensor(1.5)
    assert method.loss(None, one) is one
    _, method, _ = three_tasks(stream, strength=0.0)
    start_phase(method, stream.tasks[2])
    assert method.loss(None, one) is one
    # the keys of a task that is not over do not count
    method.on_task_end(stream.tasks[2])
    method.strength = 1.0
    start_phase(method, stream.tasks[2])
    assert sum(len(group.tensors[1]) for group in method.entries.groups) == sum(
        len(method.keys[name][path]) for name in ("t0", "t1") for path in method.keys[name]
    )


def test_a_task_whose_keys_are_missing_is_told(stream):
    _, method, _ = three_tasks(stream)
    del method.keys["t1"]
    with pytest.raises(KeyError, match="t1"):
        start_phase(method, stream.tasks[2])


def test_a_task_that_ends_twice_is_stored_once(stream):
    mllm, method = prepared("sefe", OPTIONS, stream, 0)
    method.on_task_end(stream.tasks[0])
    before = {path: places.clone() for path, places in method.keys["t0"].items()}
    kept = factors(mllm)
    method.on_task_end(stream.tasks[0])
    assert list(method.keys) == ["t0"]
    assert all(torch.equal(method.keys["t0"][path], places) for path, places in before.items())
    # nor does a list of keys change the LoRA
    assert all(
        torch.equal(a, kept[path][0]) and torch.equal(b, kept[path][1]) for path, (a, b) in factors(mllm).items()
    )
    with torch.no_grad():
        for layer in mllm.expert_layers.values():
            layer.lora_b.copy_(layer.lora_b.flip(0))
    method.on_task_end(stream.tasks[0])
    for path, layer in mllm.expert_layers.items():
        wanted = largest((layer.lora_b @ layer.lora_a).detach(), 0.05)
        assert sorted(pairs_of(method.keys["t0"][path], layer.in_features)) == sorted(wanted)


def test_state_holds_keys_and_merged_weights_and_gives_the_same_penalty(stream):
    mllm, method = learned("sefe", stream, rank=3)
    layers = set(mllm.expert_layers)
    tensors = method.state_tensors()
    assert set(tensors) == {f"merged/{path}.weight" for path in layers} | {
        f"keys/{name}/{path}" for name in ("t0", "t1", "t2") for path in layers
    }
    other, fresh = reloaded("sefe", stream, mllm, method, rank=3)
    assert fresh.keys.keys() == method.keys.keys()
    assert torch.equal(routed_logits(mllm, items(stream)), routed_logits(other, items(stream)))
    zero = torch.zeros(())
    for one in (method, fresh):
        one.acting = 2
        start_phase(one, stream.tasks[2])
    assert float(method.loss(None, zero).detach()) > 0
    assert torch.equal(method.loss(None, zero), fresh.loss(None, zero))


def test_old_weights_stay_in_a_step(stream):
    mllm, method, _ = three_tasks(stream)
    start_phase(method, stream.tasks[2])
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters()}
    our_step(mllm, method, list(stream.tasks[2].train[:5]))
    for name, value in mllm.model.named_parameters():
        trains = name.endswith((".lora_a", ".lora_b")) or name.startswith(mllm.projector_path)
        assert value.requires_grad == trains and torch.equal(value, before[name]) != trains, name


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(stream):
    mllm, _ = learned("sefe", stream, tasks=2)
    same_alone_and_mixed(mllm, items(stream))


def test_a_share_of_the_samples_is_asked_in_other_styles(stream):
    task = stream.tasks[1]
    method = methods.create("sefe", style_share=0.5, seed=3)
    found = method.phases(task)[0].samples
    assert found == diversified(task.train, 0.5, 3) != diversified(task.train, 0.5, 0)
    assert sum("style" in sample.metadata for sample in found) == 12
    assert methods.create("sefe", style_share=0.0).training_samples(task) == list(task.train)


def test_a_run_that_is_cut_off_ends_the_same(tmp_path):
    survives_cuts(tmp_path, "sefe", {"rank": 3, "key_share": 0.1, "strength": 10.0})


def test_a_strong_penalty_keeps_the_key_entries_small(tmp_path):
    """Of a whole run: the last LoRA at the keys of the tasks before, with and without the penalty."""
    sizes = []
    for strength in (0.0, 1e4):
        folder = tmp_path / str(strength)
        make_run(folder, "sefe", {"rank": 3, "strength": strength, "dropout": 0.0}, max_new_tokens=2)
        tensors, total = final_tensors(folder), 0.0
        for name, places in tensors.items():
            if name.startswith("method/keys/") and "/t2/" not in name:
                path = name.rpartition("/")[2]
                product = tensors[f"model/{path}.lora_b"] @ tensors[f"model/{path}.lora_a"]
                total += float(product.flatten()[places.long()].abs().mean())
        sizes.append(total)
    assert 0 < sizes[1] < 0.5 * sizes[0]


def test_its_defaults_are_the_papers():
    method = methods.create("sefe")
    assert (method.strength, method.key_share, method.rslora) == (2.5e3, 0.02, False)
    assert method.alpha == 2 * method.rank


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="strength must not be negative, got -1"):
        methods.create("sefe", strength=-1)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"key_share must be in \(0, 1\], got"):
            methods.create("sefe", key_share=share)
    with pytest.raises(ValueError, match=r"style_share must be in \[0, 1\], got 2"):
        methods.create("sefe", style_share=2)
