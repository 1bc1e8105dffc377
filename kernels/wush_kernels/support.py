"""Whether the kernels can run, and checks of the tensors they are given."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 9)  # the first with FP8 conversions
INTERPRETED = triton.knobs.runtime.interpret


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, in one phrase; None when they can."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cpu":
        return None if INTERPRETED else "the tensors are on the CPU (TRITON_INTERPRET=1 runs kernels there, slowly)"
    if device.type != "cuda":
        return f"no kernels for {device.type} devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; 8.9 or newer is needed"
    return None


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Make the device of a function's first tensor the current one while it runs: kernels are launched there."""

    @functools.wraps(function)
    def guarded(*arguments: P.args, **options: P.kwargs) -> R:
        device = next(one.device for one in (*arguments, *options.values()) if isinstance(one, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments, **options)
        with torch.cuda.device(device):
            return function(*arguments, **options)

    return guarded


class Operator:
    """A custom operator of torch with a fake kernel: traced as such by `torch.compile`, and otherwise called directly,
    since torch's dispatch costs the host several times what launching a kernel does. Its kernels run on the device of
    its first tensor.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._function = on_device(function)
        self._op = torch.library.custom_op(name, self._function, mutates_args=())
        self.register_fake = self._op.register_fake

    def __call__(self, *arguments: Any) -> Any:
        return self._op(*arguments) if torch.compiler.is_compiling() else self._function(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the operator `name`, such as `wush::quantize`."""
    return lambda function: Operator(name, function)


def require_support(x: Tensor, kernel: str) -> None:
    """Raise `RuntimeError` with the reason and the remedy where Triton kernels cannot run."""
    reason = why_not(x.device)
    if reason:
        raise RuntimeError(f"{kernel}: {reason}; use kernels=torch")


def check_aligned(tensor: Tensor, what: str) -> None:
    """Raise `ValueError` for a tensor that kernels read in words and that does not start at one."""
    if tensor.data_ptr() % 4:
        raise ValueError(f"{what}: starts at an address that is no multiple of 4 bytes; call .clone() on it")


def check_tensor(
    tensor: Tensor,
    what: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Raise `TypeError` or `ValueError` that says what is wrong with a kernel's argument and what to do.

    `shape`: None matches any size. Without `contiguous` only the last dimension has to be.
    """
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{what}: dtype {str(tensor.dtype).removeprefix('torch.')}, where {wanted} is needed")
    if tensor.device != device:
        raise ValueError(f"{what}: on {tensor.device}, the other operands on {device}; move it there")
    expected = tuple("any" if size is None else size for size in shape)
    if tensor.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{what}: shape {tuple(tensor.shape)}, where {expected} is needed")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{what}: not contiguous (strides {tensor.stride()}); call .contiguous() on it")
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{what}: its last dimension has stride {tensor.stride(-1)}; call .contiguous() on it")
