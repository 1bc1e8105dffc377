"""Block transform and MXFP4 quantization in one pass, to exact FP8 numbers with a scale for `SPAN` columns of a row.

As `wush_kernels.fp8_operand`, but every program decides alone what its bytes are relative to: `2^0` where all groups of
a span are inside the window, else the span's largest exponent. No program waits for another, which at few tokens is a
third of the time; the matmul multiplies its sums by the scales step by step.

Layouts: x, the transform and bytes as there; scales `(ceil(I / SPAN), M)` float32, powers of two:
`Q(T x) / g = byte * scale`.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import launch
from wush_kernels import numerics as nm
from wush_kernels.fp8_operand import WINDOW, check
from wush_kernels.groups import load_transformed, magnitudes, mxfp4_exponent, mxfp4_units, store_operand
from wush_kernels.offline import Case
from wush_kernels.spec import FormatSpec
from wush_kernels.support import operator
from wush_kernels.workspace import flushed_groups

SPAN = 256
_ROWS = 32  # at most, of a program


@triton.jit
def _wider(high, low, other_high, other_low):
    return tl.maximum(high, other_high), tl.minimum(low, other_low)


@triton.jit
def _kernel(
    x, transform, out, scales, flushed, M, I, stride_x, inverse_g,
    RULE: tl.constexpr, G: tl.constexpr, TRANSFORM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCKS
    x_brg = load_transformed(x, transform, row, block * G, M, I, stride_x, G, ROWS, BLOCKS, TRANSFORM, INTERPRET)
    magnitude = magnitudes(x_brg)
    finite = magnitude < 0x7F800000
    exponent = mxfp4_exponent(magnitude, RULE)
    counts = finite & (magnitude > 0)
    high, low = tl.reduce((tl.where(counts, exponent, -127), tl.where(counts, exponent, 127)), 0, _wider)
    outside = (high > HIGHEST) | ((low < LOWEST) & (high > -127))
    base = tl.where(outside, tl.maximum(high - HIGHEST, -126), 0)
    base_br = tl.broadcast_to(base[None, :], (BLOCKS, ROWS))
    lost = counts & (exponent - base_br < LOWEST)
    tl.atomic_add(flushed + tl.zeros((BLOCKS, ROWS), tl.int32), lost.to(tl.int32), mask=lost, sem="relaxed")
    units, threshold = mxfp4_units(x_brg, exponent, base_br, finite, inverse_g, RULE)
    store_operand(nm.round_e2m1_at(units, threshold), out, row, block, M, I, G, ROWS, BLOCKS)
    rows = row + tl.arange(0, ROWS)
    tl.store(scales + tl.program_id(1) * M + rows, nm.power_of_two(base), rows < M)


def fp8_spans(x: Tensor, fmt: FormatSpec, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Q(T x) / g` for MXFP4 as bytes `(M, I)` and scales `(ceil(I / SPAN), M)`.

    A scale is 1 unless some group's exponent is outside -15..13. Groups too small even for their span's own window
    lose bits and are counted (`wush_kernels.workspace.flushed_groups`). Raises `ValueError` or `TypeError` for a
    tensor or a format that does not fit.
    """
    check(x, fmt, transform, "fp8_spans")
    return _fp8_spans(launch.as_rows(x), transform, fmt.scale_rule, fmt.group_size, fmt.global_scale)


@operator("wush::fp8_spans")
def _fp8_spans(
    x: Tensor, transform: Tensor | None, rule: str, group_size: int, global_scale: float
) -> tuple[Tensor, Tensor]:
    out, scales = _empty(x, transform, rule, group_size, global_scale)
    if x.numel():
        constants = launch.constants(len(x), group_size, transform)
        constants |= {"BLOCKS": SPAN // group_size, "ROWS": min(_ROWS, launch.block_rows(len(x)))}
        grid = triton.cdiv(len(x), constants["ROWS"]), len(scales)
        _kernel[grid](
            x, transform, out, scales, flushed_groups(x.device), *x.shape, x.stride(0), 1 / global_scale, RULE=rule,
            LOWEST=WINDOW[0], HIGHEST=WINDOW[1], enable_fp_fusion=False, **constants,
        )  # fmt: skip
    return out, scales


@_fp8_spans.register_fake
def _empty(
    x: Tensor, transform: Tensor | None, rule: str, group_size: int, global_scale: float
) -> tuple[Tensor, Tensor]:
    scales = x.new_empty(-(-x.shape[1] // SPAN), len(x), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e5m2), scales


def offline_cases() -> Iterator[Case]:
    """Each kind of transform."""
    types = launch.offline_types(out="*fp8e5", scales="*fp32", flushed="*i32")
    for transform in ("block", "shared", "none"):
        constants = launch.offline_constants("mxfp4", transform) | {"ROWS": _ROWS, "BLOCKS": SPAN // 32}
        constants |= {"RULE": "paper", "LOWEST": WINDOW[0], "HIGHEST": WINDOW[1]}
        own = {key: kind for key, kind in types.items() if key not in constants}
        patterns = ("cvt.rn.satfinite.e5m2x2", *launch.offline_products(transform))
        yield Case(f"transform {transform}", _kernel, own, constants, dict.fromkeys((90, 100, 120), patterns))
