"""Scratch that kernels share on a device: counters that every kernel leaves at zero, and a tally of flushed groups.

All of it is allocated at the first use on a device. Run a layer once before its CUDA graphs are captured or
`torch.compile(mode="reduce-overhead")` warms up, or this memory would be the graph's own. Counters belong to the
stream that kernels are launched or captured on: graphs captured on one stream must not be replayed at the same time.
"""

from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

_STREAMS, _COUNTERS = 16, 1 << 16
_lock = Lock()


@dataclass
class _Scratch:
    counters: Tensor
    flushed: Tensor
    streams: dict[int, int] = field(default_factory=dict)  # each stream's row of the counters


_kept: dict[torch.device, _Scratch] = {}


def workspace(device: torch.device, counters: int) -> Tensor:
    """At least `counters` int32 zeros, for kernels of the current stream that set them back to zero."""
    scratch = _scratch(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        row = scratch.streams.setdefault(stream, len(scratch.streams))
    if row < _STREAMS and counters <= _COUNTERS:
        return scratch.counters[row]
    return torch.zeros(counters, dtype=torch.int32, device=device)


def flushed_groups(device: torch.device) -> Tensor:
    """The device's count, int32 `(1,)`, of activation groups too small for their row's FP8 window.

    Such a group is under `2^-28` of its row's largest one; its elements lose bits, down to zero.
    """
    return _scratch(device).flushed


def _scratch(device: torch.device) -> _Scratch:
    kept = _kept.get(device)
    if kept is None:
        zeros = torch.zeros(_STREAMS * _COUNTERS + 1, dtype=torch.int32, device=device)
        kept = _Scratch(zeros[:-1].view(_STREAMS, _COUNTERS), zeros[-1:])
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _kept[device] = kept  # what a capture allocates belongs to its graph
    return kept
