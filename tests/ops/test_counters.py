"""Counters of launches: who shares them, and who never does."""

from __future__ import annotations

import pytest
import torch

from mllmcl_kernels import counters
from mllmcl_kernels.counters import launch_counters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_there(monkeypatch):
    monkeypatch.setattr(counters, "_of_streams", {})
    monkeypatch.setattr(counters, "_spare", {})
    monkeypatch.setattr(counters, "_kept_for_replays", [])
    monkeypatch.setattr(counters, "SPARE", 3)


def captured(monkeypatch, number: int) -> list[torch.Tensor]:
    with monkeypatch.context() as capture:
        capture.setattr(counters, "is_capturing", lambda device: True)
        return [launch_counters(CPU) for _ in range(number)]


def apart(found: list[torch.Tensor]) -> bool:
    return len({tensor.data_ptr() for tensor in found}) == len(found)


def test_eager_launches_of_a_stream_share_their_counters():
    first = launch_counters(CPU)
    assert launch_counters(CPU) is first
    assert first.dtype == torch.int32 and first.shape == (4,) and not first.any()


def test_captured_launches_share_counters_with_nobody(monkeypatch):
    eager = launch_counters(CPU)
    # as kernels that wait leave them
    first = captured(monkeypatch, 2)
    for tensor in first:
        tensor.fill_(1)
    assert launch_counters(CPU) is eager
    later = captured(monkeypatch, 4)
    assert apart([eager, *first, *later]) and not any(tensor.any() for tensor in later)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in [eager, *first, *later])


def test_a_capture_goes_on_where_nothing_is_left(monkeypatch):
    """Also where nothing ran before it; then the graph zeroes the counters, which are not kept."""
    eager = launch_counters(CPU)
    found = captured(monkeypatch, 5)
    assert apart([eager, *found]) and len(counters._kept_for_replays) == 3
    monkeypatch.setattr(counters, "_spare", {})
    assert not captured(monkeypatch, 1)[0].any()
    assert len(counters._kept_for_replays) == 3


def test_counters_outlive_inference_mode():
    with torch.inference_mode():
        assert not launch_counters(CPU).is_inference()
