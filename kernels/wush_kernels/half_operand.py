"""Block transform and quantization in one pass, to exact 16-bit numbers: an operand of a 16-bit matmul.

Layouts: x `(..., I)` and the transform as in `wush_kernels.quantize`; the result `(M, I)` in operand order (of each
group the even columns first, then the odd ones, since nibbles decode to even and odd columns apart). MXFP4, NVFP4 and
MXFP8 values, `code * scale`, have at most 6 significand bits and are bfloat16 numbers; NVFP4's, times 2^-7, are
float16 numbers. A group with NaN or infinity becomes NaN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import launch
from wush_kernels.dequantize import operand_order, reference_e2m1
from wush_kernels.groups import group_values, load_transformed, store_operand
from wush_kernels.offline import Case
from wush_kernels.quantize import reference_quantize
from wush_kernels.spec import FormatSpec
from wush_kernels.support import operator

_SHIFTS = {
    ("mxfp4", torch.bfloat16): 1.0,
    ("mxfp8", torch.bfloat16): 1.0,
    ("nvfp4", torch.bfloat16): 1.0,
    ("nvfp4", torch.float16): 2.0**-7,  # brings code * scale into float16's range
}


@triton.jit
def _kernel(
    x, transform, out, M, I, stride_x, inverse_g, scale_factor, shift,
    FORMAT: tl.constexpr, RULE: tl.constexpr, G: tl.constexpr, TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCKS
    x_brg = load_transformed(x, transform, row, block * G, M, I, stride_x, G, ROWS, BLOCKS, TRANSFORM, INTERPRET)
    value_brg = group_values(x_brg, inverse_g, scale_factor, shift, FORMAT, RULE, INTERPRET)
    store_operand(value_brg, out, row, block, M, I, G, ROWS, BLOCKS)


def half_operand(
    x: Tensor,
    fmt: FormatSpec,
    transform: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    global_scale: float | None = None,
) -> Tensor:
    """`Q(T x) / g`, exactly, `(M, I)` in operand order: in bfloat16, or for NVFP4 `* 2^-7` in float16.

    Raises `ValueError` or `TypeError` for a tensor or a format that does not fit.
    """
    launch.check_input(x, fmt, transform, "half_operand")
    if (fmt.name, dtype) not in _SHIFTS:
        raise ValueError(f"half_operand: {fmt.name} values are not exact in {str(dtype).removeprefix('torch.')}")
    g = fmt.global_scale if global_scale is None else global_scale
    rows = launch.as_rows(x)
    return _half_operand(rows, transform, fmt.name, fmt.scale_rule, fmt.group_size, g, dtype)


@operator("wush::half_operand")
def _half_operand(
    x: Tensor,
    transform: Tensor | None,
    name: str,
    rule: str,
    group_size: int,
    global_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    out = _empty(x, transform, name, rule, group_size, global_scale, dtype)
    if x.numel():
        _kernel[launch.grid(*x.shape)](
            x, transform, out, *x.shape, x.stride(0), 1 / global_scale,
            launch.scale_factor(name, rule, global_scale), _SHIFTS[name, dtype], FORMAT=name, RULE=rule,
            enable_fp_fusion=False, **launch.constants(len(x), group_size, transform),
        )  # fmt: skip
    return out


@_half_operand.register_fake
def _empty(
    x: Tensor,
    transform: Tensor | None,
    name: str,
    rule: str,
    group_size: int,
    global_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def reference_half_operand(
    x: Tensor,
    fmt: FormatSpec,
    transform: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    global_scale: float | None = None,
) -> Tensor:
    """`half_operand` in plain PyTorch, of the codes of `reference_quantize`."""
    codes, scales = reference_quantize(x.reshape(-1, x.shape[-1]), fmt, transform, global_scale)
    elements = codes.view(torch.float8_e4m3fn).float() if fmt.name == "mxfp8" else reference_e2m1(codes)
    spread = scales.float().repeat_interleave(fmt.group_size, -1)
    return operand_order(elements * spread * _SHIFTS[fmt.name, dtype], fmt.group_size).to(dtype)


def offline_cases() -> Iterator[Case]:
    """The formats of 16-bit products."""
    types = launch.offline_types(out="*bf16", scale_factor="fp32", shift="fp32")
    for name, rule, transform in (("mxfp4", "paper", "block"), ("nvfp4", "fixed", "block"), ("mxfp8", "ocp", "none")):
        constants = launch.offline_constants(name, transform) | {"FORMAT": name, "RULE": rule}
        own = {key: kind for key, kind in types.items() if key not in constants}
        expects = dict.fromkeys((90, 100, 120), launch.offline_products(transform))
        yield Case(f"{name}, transform {transform}", _kernel, own, constants, expects)
