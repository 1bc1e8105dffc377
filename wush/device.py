"""Working on a GPU without waiting for it: whether kernels run there, and checks that are looked at afterwards.

A check of numbers on a GPU (is anything NaN, did a factorization fail) makes the host wait for the device. Code that
is run by `without_waiting` has its checks collected instead, and read once at the end.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from wush.errors import NumericError

Result = TypeVar("Result")

_collected: ContextVar[list[Tensor] | None] = ContextVar("_collected", default=None)


def no_triton(device: torch.device) -> str | None:
    """Why our kernels cannot run on a device, in one phrase; None when they can."""
    if torch.version.hip:
        return "no kernels for AMD GPUs"
    try:
        from wush_kernels.support import why_not
    except ImportError as error:
        return f"{error.name or 'Triton'} is not installed"
    return why_not(device)


def has_kernels(device: torch.device) -> bool:
    """Whether the quantizer's Triton kernels are used on a device: on a GPU that runs them."""
    return device.type == "cuda" and no_triton(device) is None


def found(flags: Tensor) -> bool:
    """Whether any of some boolean flags is set; inside `without_waiting` False, and looked at when its work is done."""
    collected = _collected.get()
    if collected is None:
        return bool(flags.any())
    collected.append(flags.any())
    return False


def without_waiting(work: Callable[[], Result], device: torch.device, undo: Callable[[], None]) -> Result:
    """What `work` returns, with one wait for a GPU instead of one a check.

    If a check found something, what `work` kept outside itself is undone, and it is run again with every check in
    its place: its warnings and errors come as they do on a CPU.
    """
    if device.type == "cpu":
        return work()
    collected: list[Tensor] = []
    token = _collected.set(collected)
    try:
        result = work()
        clean = not collected or not bool(torch.stack(collected).any())
    except (torch.linalg.LinAlgError, NumericError):  # type: ignore[attr-defined]  # it met what a check let pass
        clean = False
    finally:
        _collected.reset(token)
    if clean:
        return result
    undo()
    return work()
