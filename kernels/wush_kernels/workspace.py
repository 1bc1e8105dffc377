"""Scratch that kernels share on a device: counters that every kernel leaves at zero, and a tally of flushed groups."""

import torch
from torch import Tensor

_COUNTERS = 1 << 16
_kept: dict[tuple[torch.device, int], Tensor] = {}
_flushed: dict[torch.device, Tensor] = {}


def workspace(device: torch.device, counters: int) -> Tensor:
    """At least `counters` int32 zeros, for kernels of the current stream that set them back to zero."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _kept.get((device, stream))
    if kept is not None and counters <= len(kept):
        return kept
    fresh = torch.zeros(max(counters, _COUNTERS), dtype=torch.int32, device=device)
    if not _capturing(device):  # memory of a graph's own pool is not for others
        _kept[device, stream] = fresh
    return fresh


def flushed_groups(device: torch.device) -> Tensor:
    """The device's count, int32 `(1,)`, of activation groups too small for their row's FP8 window.

    Such a group is under `2^-28` of its row's largest one; its elements lose bits, down to zero.
    """
    if device not in _flushed:
        fresh = torch.zeros(1, dtype=torch.int32, device=device)
        if _capturing(device):
            return fresh
        _flushed[device] = fresh
    return _flushed[device]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
