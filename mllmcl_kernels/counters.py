"""Counters on the device by which the programs of one launch wait for each other, zero whenever a launch begins.

A launch sets its counters back to zero itself, so that nothing is launched for them. Launches that may run at the same
time never share them: an eager one takes those of its stream, a captured one takes some of its own, since its graph may
be replayed on any stream. A kernel that is aborted leaves its counters as they are, but no kernel of that process runs
after it: its CUDA context is lost as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tuning import is_capturing

__all__ = ["launch_counters"]

#: int32 of a launch: 16 bytes, so that all are aligned alike
COUNTERS = 4
#: launches that may be captured before the next eager one, at least
SPARE = 1024

_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}
# what captured CUDA graphs count with, for as long as they may be replayed
_kept_for_replays: list[Tensor] = []


def _zeros(*shape: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(*shape, COUNTERS, dtype=torch.int32, device=device)


def launch_counters(device: torch.device) -> Tensor:
    """int32 [4] for the next launch on the current stream, which leaves them zero.

    A captured launch takes what eager ones had zeroed for it, once and for all; where nothing is left, the graph zeroes
    its counters at every replay.
    """
    if is_capturing(device):
        if not _spare.get(device):
            return _zeros(device=device)
        _kept_for_replays.append(_spare[device].pop())
        return _kept_for_replays[-1]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    spare = _spare.setdefault(device, [])
    if len(spare) < SPARE:
        fresh = _zeros(SPARE, device=device).unbind()
        if stream is not None:
            # a replay on another stream does not wait for this one
            stream.synchronize()
        spare.extend(fresh)
    place = device, stream.cuda_stream if stream is not None else 0
    if place not in _of_streams:
        _of_streams[place] = _zeros(device=device)
    return _of_streams[place]
