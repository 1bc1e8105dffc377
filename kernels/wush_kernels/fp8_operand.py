"""Block transform and MXFP4 quantization in one pass, to exact FP8 numbers: an operand of an FP8 matmul.

An MXFP4 value over the global scale is `code * 2^k`, an E5M2 number for group exponents k in -15..13. Rows are written
relative to `2^0`; a row with a group outside that window is written again by the last program of its block of rows,
relative to its own largest exponent, in the same launch.

Layouts: x `(..., I)` and the transform as in `wush_kernels.quantize`; bytes `(M, I)` float8_e5m2 in operand order (of
each group the even columns first, then the odd ones, since nibbles decode to even and odd columns apart); row scales
`(M,)` float32, powers of two: `Q(T x) / g = byte * row_scale`. A group with NaN or infinity becomes NaN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import launch
from wush_kernels import numerics as nm
from wush_kernels.dequantize import operand_order, reference_e2m1
from wush_kernels.groups import load_transformed, magnitudes, mxfp4_exponent, mxfp4_units, store_operand
from wush_kernels.offline import Case
from wush_kernels.quantize import reference_quantize
from wush_kernels.spec import FormatSpec
from wush_kernels.support import operator
from wush_kernels.workspace import flushed_groups, workspace

WINDOW = (-15, 13)  # group exponents of which every value is an E5M2 number


@triton.jit
def _tile(
    x, transform, out, row, block, base_r, M, I, stride_x, inverse_g,
    RULE: tl.constexpr, G: tl.constexpr, TRANSFORM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, STORE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantize one tile to E5M2 bytes relative to `2^base`. Of each row: the largest exponent of a group that is not
    zero, at least -127, and how many such groups are outside the window.
    """
    x_brg = load_transformed(x, transform, row, block * G, M, I, stride_x, G, ROWS, BLOCKS, TRANSFORM, INTERPRET)
    magnitude = magnitudes(x_brg)
    finite = magnitude < 0x7F800000
    exponent = mxfp4_exponent(magnitude, RULE)
    relative = exponent - base_r[None, :]
    counts = finite & (magnitude > 0)
    outside = counts & ((relative < LOWEST) | (relative > HIGHEST))
    if STORE:
        base_br = tl.broadcast_to(base_r[None, :], (BLOCKS, ROWS))
        units, threshold = mxfp4_units(x_brg, exponent, base_br, finite, inverse_g, RULE)
        store_operand(nm.round_e2m1_at(units, threshold), out, row, block, M, I, G, ROWS, BLOCKS)
    return tl.max(tl.where(counts, exponent, -127), 0), tl.sum(outside.to(tl.int32), 0)


@triton.jit
def _rewrite(
    x, transform, out, row_scales, flushed, row, M, I, stride_x, inverse_g,
    RULE: tl.constexpr, G: tl.constexpr, TRANSFORM: tl.constexpr, ROWS: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write some rows again, those with a group outside the window relative to their largest exponent; and scales.

    Seldom run, and one group at a time, so that it takes no more registers than the ordinary path.
    """
    base = tl.zeros((ROWS,), tl.int32)
    highest, missed = base - 127, base
    for block in tl.range(0, I // G, num_stages=1):
        top, outside = _tile(
            x, transform, out, row, block, base, M, I, stride_x, inverse_g,
            RULE, G, TRANSFORM, ROWS, 1, LOWEST, HIGHEST, False, INTERPRET,
        )  # fmt: skip
        highest, missed = tl.maximum(highest, top), missed + outside
    base = tl.where(missed > 0, tl.maximum(highest - HIGHEST, -126), 0)
    lost = tl.zeros((ROWS,), tl.int32)
    for block in tl.range(0, I // G, num_stages=1):
        _, outside = _tile(
            x, transform, out, row, block, base, M, I, stride_x, inverse_g,
            RULE, G, TRANSFORM, ROWS, 1, LOWEST, HIGHEST, True, INTERPRET,
        )  # fmt: skip
        lost += outside
    if tl.sum(lost) > 0:
        tl.atomic_add(flushed, tl.sum(lost))
    rows = row + tl.arange(0, ROWS)
    tl.store(row_scales + rows, nm.power_of_two(base), rows < M)


@triton.jit
def _kernel(
    x, transform, out, row_scales, counters, flushed, M, I, stride_x, inverse_g,
    RULE: tl.constexpr, G: tl.constexpr, TRANSFORM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row, programs = tl.program_id(0) * ROWS, tl.num_programs(1)
    _, outside = _tile(
        x, transform, out, row, tl.program_id(1) * BLOCKS, tl.zeros((ROWS,), tl.int32), M, I, stride_x, inverse_g,
        RULE, G, TRANSFORM, ROWS, BLOCKS, LOWEST, HIGHEST, True, INTERPRET,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        rows = row + tl.arange(0, ROWS)
        tl.store(row_scales + rows, tl.full((ROWS,), 1.0, tl.float32), rows < M)
    missed = (tl.sum(outside) > 0).to(tl.int32)
    tl.debug_barrier()  # every warp's stores come before the ticket that announces them
    # A ticket counts programs in its low half, and those with groups outside the window in its high half.
    before = tl.atomic_add(counters + tl.program_id(0), 1 + (missed << 16))
    if (before & 0xFFFF) == programs - 1:
        tl.store(counters + tl.program_id(0), 0)
        if (before >> 16) + missed != 0:
            for part in tl.range(0, ROWS // 16, num_stages=1):
                _rewrite(
                    x, transform, out, row_scales, flushed, row + part * 16, M, I, stride_x, inverse_g,
                    RULE, G, TRANSFORM, 16, LOWEST, HIGHEST, INTERPRET,
                )  # fmt: skip


def fp8_operand(x: Tensor, fmt: FormatSpec, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Q(T x) / g` for MXFP4 as bytes `(M, I)` and row scales `(M,)`.

    A row scale is 1 unless some group's exponent is outside -15..13. Groups too small even for their row's own window
    lose bits and are counted (`wush_kernels.workspace.flushed_groups`). Raises `ValueError` or `TypeError` for a
    tensor or a format that does not fit.
    """
    launch.check_input(x, fmt, transform, "fp8_operand")
    if fmt.name != "mxfp4":
        raise ValueError(f"fp8_operand: {fmt.name} values are no FP8 numbers; use half_operand")
    return _fp8_operand(launch.as_rows(x), transform, fmt.scale_rule, fmt.group_size, fmt.global_scale)


@operator("wush::fp8_operand")
def _fp8_operand(
    x: Tensor, transform: Tensor | None, rule: str, group_size: int, global_scale: float
) -> tuple[Tensor, Tensor]:
    out, row_scales = _empty(x, transform, rule, group_size, global_scale)
    if x.numel():
        grid = launch.grid(*x.shape)
        _kernel[grid](
            x, transform, out, row_scales, workspace(x.device, grid[0]), flushed_groups(x.device), *x.shape,
            x.stride(0), 1 / global_scale, RULE=rule, LOWEST=WINDOW[0], HIGHEST=WINDOW[1], enable_fp_fusion=False,
            **launch.constants(len(x), group_size, transform),
        )  # fmt: skip
    return out, row_scales


@_fp8_operand.register_fake
def _empty(
    x: Tensor, transform: Tensor | None, rule: str, group_size: int, global_scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e5m2), x.new_empty(len(x), dtype=torch.float32)


def reference_fp8_operand(x: Tensor, fmt: FormatSpec, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8_operand` in plain PyTorch, of the codes of `reference_quantize`."""
    codes, scales = reference_quantize(x.reshape(-1, x.shape[-1]), fmt, transform)
    elements = reference_e2m1(codes).unflatten(-1, (-1, fmt.group_size))
    exponent = scales.view(torch.uint8).int() - 127
    counts = elements.abs().amax(-1) > 0
    outside = (counts & ((exponent < WINDOW[0]) | (exponent > WINDOW[1]))).any(-1)
    highest = exponent.masked_fill(~counts, -127).amax(-1)
    row_scales = torch.exp2(torch.where(outside, (highest - WINDOW[1]).clamp(min=-126), 0).float())
    values = elements.double() * torch.exp2(exponent.double()).unsqueeze(-1) / row_scales.double()[:, None, None]
    return operand_order(values.flatten(-2), fmt.group_size).float().to(torch.float8_e5m2), row_scales


def offline_cases() -> Iterator[Case]:
    """Each kind of transform."""
    types = launch.offline_types(out="*fp8e5", row_scales="*fp32")
    types |= dict.fromkeys(("counters", "flushed"), "*i32")
    for transform in ("block", "shared", "none"):
        constants = launch.offline_constants("mxfp4", transform)
        constants |= {"RULE": "paper", "LOWEST": WINDOW[0], "HIGHEST": WINDOW[1]}
        own = {key: kind for key, kind in types.items() if key not in constants}
        patterns = ("cvt.rn.satfinite.e5m2x2", *launch.offline_products(transform))
        expects = dict.fromkeys((90, 100, 120), patterns)
        yield Case(f"transform {transform}", _kernel, own, constants, expects)
