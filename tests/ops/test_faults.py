"""The flag of ids out of range: read late, told once, never waited for but where that is asked for."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from mllmcl_kernels import faults

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    with mock.patch.dict(faults._watches, clear=True):
        yield


def test_a_raised_flag_is_told_once_with_what_was_asked():
    flag = faults.fault_flag("lora_mix", 4, CPU)
    assert faults.fault_flag("lora_mix", 9, CPU) is flag
    faults.raise_faults()
    flag.fill_(18)
    with pytest.raises(
        ValueError, match=r"ids in -1\.\.3 or lora_mix: gates must be ids in -1\.\.8; on cpu one at position 17"
    ):
        faults.raise_faults()
    faults.raise_faults()
    flag.fill_(1)
    with pytest.raises(ValueError, match="position 0"):
        faults.raise_faults()


class Event:
    """An event that is over when it is told so."""

    def __init__(self):
        self.is_over, self.records = False, 0

    def query(self):
        return self.is_over

    def record(self):
        self.records += 1


def test_polling_waits_for_nothing(monkeypatch):
    """A copy that has not arrived is left alone; one that has is looked at, and the next one starts."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    faults.poll_faults(device)
    zero = torch.zeros(1, dtype=torch.int64)
    watch = faults._watches[device] = faults._Watch(zero.clone(), zero.clone())
    faults.poll_faults(device)
    watch.flag.fill_(3)
    faults.poll_faults(device)
    assert watch.arrived.records == 1 and int(watch.host) == 0
    watch.arrived.is_over = True
    faults.poll_faults(device)
    assert watch.arrived.records == 2 and int(watch.host) == 3
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        faults.poll_faults(device)
    with pytest.raises(ValueError, match="cuda:0 one at position 2"):
        faults.poll_faults(device)
    faults.poll_faults(device)
    assert watch.arrived.records == 3
    faults.poll_faults(device)


def test_calls_with_ids_look_now_and_then(monkeypatch):
    looks = []
    monkeypatch.setattr(faults, "poll_faults", looks.append)
    for _ in range(2 * faults.EVERY + 1):
        faults.fault_flag("lora_mix", 4, CPU)
    assert looks == [CPU, CPU]
