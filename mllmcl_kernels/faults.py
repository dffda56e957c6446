"""Expert ids out of range on a GPU: the kernel leaves the row to the base layer and raises a flag that is read later.

Nobody waits for it. Every optimizer step, and some calls with ids, start a copy of the flag to the host and look at the
copy that was started before, if it has arrived; `raise_faults` waits. MLLMCL_DEBUG=1 raises at the call itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["fault_flag", "poll_faults", "raise_faults"]

#: calls with ids between two looks where no optimizer steps
EVERY = 64


@dataclass
class _Watch:
    """A device's flag, 0 or 1 + the highest wrong position [1] int64, and its last copy on the host."""

    flag: Tensor
    host: Tensor
    arrived: torch.cuda.Event | None = None
    calls: int = 0
    #: what has been asked since the flag was last clear, in words
    asked: dict[str, None] = field(default_factory=dict)


_watches: dict[torch.device, _Watch] = {}


def fault_flag(op: str, experts: int, device: torch.device) -> Tensor:
    """The flag that a kernel raises by `max(flag, 1 + position)`; now and then it is looked at."""
    watch = _watches.get(device)
    if watch is None:
        with torch.inference_mode(False):
            flag = torch.zeros(1, dtype=torch.int64, device=device)
            host = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        watch = _watches[device] = _Watch(flag, host)
    watch.asked[f"{op}: gates must be ids in -1..{experts - 1}"] = None
    watch.calls += 1
    if watch.calls % EVERY == 0:
        poll_faults(device)
    return watch.flag


def poll_faults(device: torch.device) -> None:
    """ValueError if the last copy of the flag has arrived and is raised; starts the next one and waits for nothing."""
    watch = _watches.get(device)
    if watch is None or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    with torch.cuda.device(device):
        if watch.arrived is None:
            watch.arrived = torch.cuda.Event()
        elif not watch.arrived.query():
            return
        else:
            _judge(watch, device)
        watch.host.copy_(watch.flag, non_blocking=True)
        watch.arrived.record()


def raise_faults() -> None:
    """Wait for every device that was given ids; ValueError if one of them was out of range."""
    for device, watch in _watches.items():
        watch.host.copy_(watch.flag)
        _judge(watch, device)


def _judge(watch: _Watch, device: torch.device) -> None:
    position = int(watch.host) - 1
    if position < 0:
        return
    watch.flag.zero_()
    watch.host.zero_()
    asked = " or ".join(watch.asked)
    watch.asked.clear()
    raise ValueError(
        f"{asked}; on {device} one at position {position} was not, and its row got the base layer alone "
        "(MLLMCL_DEBUG=1 raises at the call itself)"
    )
