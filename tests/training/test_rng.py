"""Random numbers go on where they stopped, and data order depends on names alone."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from mllmcl.training.checkpoint import latest_checkpoint, save_checkpoint
from mllmcl.training.rng import capture_rng, derive_seed, generator, restore_rng, seed_everything


def draw() -> dict:
    """Some numbers of every generator, with those that keep a second one for later."""
    return {
        "python": [random.random(), random.gauss(0, 1), random.randrange(1000)],
        "numpy": [*np.random.rand(3), np.random.randn(), np.random.permutation(10).tolist()],
        "torch": torch.cat((torch.rand(3), torch.randn(17), torch.nn.functional.dropout(torch.ones(9)))).tolist(),
        "cuda": torch.rand(3, device="cuda").tolist() if torch.cuda.is_available() else [],
    }


@pytest.fixture(autouse=True)
def own_generators():
    state = capture_rng()
    yield
    restore_rng(*state)


def test_continues_after_a_checkpoint(tmp_path):
    seed_everything(3)
    # odd numbers of gaussians: both libraries now hold the second of a pair
    random.gauss(0, 1), np.random.randn()
    tensors, values = capture_rng()
    save_checkpoint(tmp_path, 1, {"rng": tensors}, {"rng": values}, config_sha256="0" * 64)
    expected = draw()
    seed_everything(99)
    assert draw() != expected
    loaded = latest_checkpoint(tmp_path, config_sha256="0" * 64)
    restore_rng(loaded.tensors["rng"], loaded.state["rng"])
    assert draw() == expected


def test_capturing_draws_nothing():
    seed_everything(4)
    expected = draw()
    seed_everything(4)
    capture_rng()
    assert draw() == expected


def test_captured_state_is_a_copy():
    seed_everything(5)
    tensors, values = capture_rng()
    before, text = {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(values)
    draw()
    assert all(torch.equal(tensors[name], before[name]) for name in before) and json.dumps(values) == text


def test_seeding_gives_each_library_its_own():
    seed_everything(0)
    first = draw()
    seed_everything(0)
    assert draw() == first
    seed_everything(1)
    second = draw()
    assert all(second[name] != first[name] for name in ("python", "numpy", "torch"))


def test_restore_refuses_other_devices():
    tensors, values = capture_rng()
    for other in ({**tensors, "cuda_7": tensors["torch"]}, {k: v for k, v in tensors.items() if k != "numpy"}):
        with pytest.raises(ValueError, match="restore_rng: expected the generators numpy, python, torch"):
            restore_rng(other, values)


def test_capture_refuses_a_foreign_numpy_generator(monkeypatch):
    monkeypatch.setattr(np.random, "get_state", lambda: ("PCG64", np.zeros(1), 0, 0, 0.0))
    with pytest.raises(ValueError, match="MT19937, got PCG64"):
        capture_rng()


def test_derived_seeds_never_change():
    """Stored runs depend on these numbers."""
    assert derive_seed(0, "task", 3, "epoch", 1) == 5612174713171716388
    assert derive_seed(0) == 4761921975702974394


def test_derived_seeds_differ():
    purposes = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), ("a", 1, 2), ("a", 12)]
    seeds = {derive_seed(seed, *names) for seed in (0, 1, -1, 2**40) for names in purposes}
    assert len(seeds) == 4 * len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_depends_on_names_alone():
    expected = torch.randperm(50, generator=generator(0, "order", "task", 2, "epoch", 0))
    torch.rand(7), generator(0, "order", "task", 1, "epoch", 0)
    before = torch.get_rng_state()
    assert torch.equal(torch.randperm(50, generator=generator(0, "order", "task", 2, "epoch", 0)), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.randperm(50, generator=generator(0, "order", "task", 2, "epoch", 1)), expected)
    assert not torch.equal(torch.randperm(50, generator=generator(1, "order", "task", 2, "epoch", 0)), expected)
