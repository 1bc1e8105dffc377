"""What a device offers for products of quantized tensors: its compute capability, Triton, torch's scaled matmuls."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from wush.device import no_triton
from wush.formats import Format
from wush.operands import scaled_fp4, scaled_mm

TENSOR_CORES_FP4 = (10, 0)


@dataclass(frozen=True)
class Machine:
    """What a device offers: its compute capability, None without CUDA; and why it cannot do something, or None."""

    capability: tuple[int, int] | None
    no_triton: str | None = None
    no_scaled_mm: str | None = None
    no_scaled_fp4: str | None = None


@cache
def machine(device: torch.device, dtype: torch.dtype, fmt: Format) -> Machine:
    """What a device offers for products of a format in a dtype; torch's scaled matmuls are tried on small operands."""
    found = Machine(torch.cuda.get_device_capability(device) if device.type == "cuda" else None, no_triton(device))
    if found.no_triton:
        return found
    if fmt.name == "mxfp4":
        found = replace(found, no_scaled_mm=_trial(lambda: _try_scaled_mm(device, dtype)))
    if found.capability and found.capability >= TENSOR_CORES_FP4 and fmt.name in ("mxfp4", "nvfp4"):
        found = replace(found, no_scaled_fp4=_trial(lambda: _try_scaled_fp4(device, fmt)))
    return found


def _trial(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except torch.OutOfMemoryError:  # says nothing of what the device can do
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"torch says {str(error).splitlines()[0][:160] if str(error) else type(error).__name__}"
    return None


def _try_scaled_mm(device: torch.device, dtype: torch.dtype) -> None:
    a = torch.zeros(16, 32, device=device).to(torch.float8_e5m2)
    weight = torch.zeros(16, 32, device=device).to(torch.float8_e4m3fn)
    scales, bias = torch.ones(16, 1, device=device), torch.zeros(16, device=device, dtype=dtype)
    scaled_mm(a, scales, weight, scales.view(1, 16), bias, dtype)


def _try_scaled_fp4(device: torch.device, fmt: Format) -> None:
    codes = torch.zeros(128, 64, device=device, dtype=torch.uint8)
    scales = torch.ones(128 * 128 // fmt.group_size, device=device).to(fmt.scale_dtype)
    scaled_fp4(codes, scales, codes, scales, fmt)
