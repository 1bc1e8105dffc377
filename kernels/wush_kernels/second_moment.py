"""`X^T X` for tokens `X`, accumulated: a symmetric product at half the work of a general one.

Layouts: x `(M, I)` with contiguous rows, in bfloat16, float16 or float32; the result `(I, I)` float32, both triangles.
Only tiles that touch the lower triangle are computed; each is stored once more, mirrored. Sums are float32 (16-bit
products are exact in it, those of float32 inputs are rounded: no TF32), in the order of the tokens within a call.
Where the tiles are too few to fill a GPU, the tokens are split, and the parts summed in a fixed order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.offline import Case
from wush_kernels.spec import FLOATS
from wush_kernels.support import INTERPRETED, check_tensor, on_device, require_support


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: tiles of `rows` x `columns` (one or two to a square), `depth` tokens a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8


@triton.jit
def _triangle_row(index):
    """The row of an index in a lower triangle listed row by row: the largest r with `r (r + 1) / 2 <= index`."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def _square(index, squares, GROUP: tl.constexpr):
    """The square (i, j), `j <= i < squares`, of an index: bands of GROUP rows, column by column, so that squares that
    are worked on at the same time read few distinct columns of X; then the band's own triangle.
    """
    first = _triangle_row(index) // GROUP * GROUP
    height = tl.minimum(GROUP, squares - first)
    within = index - first * (first + 1) // 2
    triangle = tl.maximum(within - height * first, 0)
    row = _triangle_row(triangle)
    left = within < height * first
    i = tl.where(left, first + within % height, first + row)
    j = tl.where(left, within // height, first + triangle - row * (row + 1) // 2)
    return i, j


@triton.jit
def _kernel(
    x, out, M, I, stride_x, stride_part, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN_I: tl.constexpr, EVEN_M: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = ROWS // COLUMNS
    i, j = _square(tl.program_id(0) // HALVES, tl.cdiv(I, ROWS), GROUP)
    row, column = i * ROWS, j * ROWS + tl.program_id(0) % HALVES * COLUMNS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * steps * DEPTH
    tokens = tl.arange(0, DEPTH)
    left_at = x + first.to(tl.int64) * stride_x + tokens[:, None] * stride_x + rows[None, :]
    right_at = x + first.to(tl.int64) * stride_x + tokens[:, None] * stride_x + columns[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        if EVEN_I and EVEN_M:
            left, right = tl.load(left_at), tl.load(right_at)
        else:
            here = (first + step * DEPTH + tokens < M)[:, None]
            left = tl.load(left_at, mask=here & (rows < I)[None, :], other=0.0)
            right = tl.load(right_at, mask=here & (columns < I)[None, :], other=0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision="ieee")
        left_at += DEPTH * stride_x
        right_at += DEPTH * stride_x

    out += tl.program_id(1).to(tl.int64) * stride_part
    _store_cut(sums, out, row, column, I, i == j, EVEN_I, ACCUMULATE)


@triton.jit
def _store_cut(sums, out, row, column, I, diagonal, EVEN_I: tl.constexpr, ACCUMULATE: tl.constexpr):
    """`_store` of pieces of 16 columns, for which the registers suffice."""
    ROWS: tl.constexpr = sums.shape[0]
    HALF: tl.constexpr = sums.shape[1] // 2
    if HALF < 16:
        _store(sums, out, row, column, I, diagonal, EVEN_I, ACCUMULATE)
    else:
        left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
        _store_cut(left, out, row, column, I, diagonal, EVEN_I, ACCUMULATE)
        _store_cut(right, out, row, column + HALF, I, diagonal, EVEN_I, ACCUMULATE)


@triton.jit
def _store(sums, out, row, column, I, diagonal, EVEN_I: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Store a piece at `(row, column)`, and mirrored; of one on the diagonal, only what is on or under it."""
    rows, columns = tl.arange(0, sums.shape[0]), tl.arange(0, sums.shape[1])
    lower_at = out + row.to(tl.int64) * I + column + rows[:, None] * I + columns[None, :]
    upper_at = out + column.to(tl.int64) * I + row + columns[:, None] * I + rows[None, :]
    if diagonal or not EVEN_I:
        inside = (row + rows < I)[:, None] & (column + columns < I)[None, :]
        inside = inside & ((row + rows)[:, None] >= (column + columns)[None, :])
        if ACCUMULATE:
            sums += tl.load(lower_at, mask=inside, other=0.0)
        tl.store(lower_at, sums, inside)
        tl.store(upper_at, tl.trans(sums), tl.trans(inside))
    else:
        if ACCUMULATE:
            sums += tl.load(lower_at)
        tl.store(lower_at, sums)
        tl.store(upper_at, tl.trans(sums))


@on_device
def second_moment(x: Tensor, out: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    """`out + X^T X`, in place, or `X^T X` where no `out` `(I, I)`, symmetric float32, is given.

    Raises `ValueError` or `TypeError` for tensors that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(x, "second_moment")
    check_tensor(x, "second_moment: x", FLOATS, (None, None), x.device, contiguous=False)
    tokens, features = x.shape
    if out is None:
        out = x.new_zeros(features, features, dtype=torch.float32)
    check_tensor(out, "second_moment: out", (torch.float32,), (features, features), x.device)
    if not tokens:
        return out
    tiling = tiling or choose_tiling(features, x.dtype, _capability(x.device))
    squares = triton.cdiv(features, tiling.rows)
    tiles = squares * (squares + 1) // 2 * (tiling.rows // tiling.columns)
    steps = triton.cdiv(tokens, tiling.depth)
    parts = _parts(tiles, steps, x.device)
    steps = triton.cdiv(steps, parts)
    parts = triton.cdiv(tokens, steps * tiling.depth)
    sums = out if parts == 1 else torch.empty(parts, features, features, dtype=torch.float32, device=x.device)
    _kernel[tiles, parts](
        x, sums, tokens, features, x.stride(0), features * features, steps,
        ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, GROUP=tiling.group,
        EVEN_I=features % tiling.rows == 0, EVEN_M=tokens % (steps * tiling.depth) == 0, ACCUMULATE=parts == 1,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out if parts == 1 else out.add_(sums.sum(0))


def reference_second_moment(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`out + X^T X` in float64, rounded once."""
    product = x.double().T @ x.double()
    return (product if out is None else product + out).float()


def choose_tiling(features: int, dtype: torch.dtype, capability: int = 90) -> Tiling:
    """The fastest tiling on an H100: wide tiles, where the GPU can hold them and they are many enough to fill it."""
    if dtype == torch.float32:
        return Tiling(64, 64, 16, num_warps=4, num_stages=3)
    if INTERPRETED:
        return Tiling(64, 32, 32, num_warps=4, num_stages=1)
    if features >= 8192 and capability in (90, 100):
        return Tiling(256, 128, 64, num_warps=8, num_stages=3)
    return Tiling(128, 128, 64, num_warps=8, num_stages=4)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def _parts(tiles: int, steps: int, device: torch.device) -> int:
    """Into how many parts to split the tokens: enough for a tile on each multiprocessor, of at least 8 steps each."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    return max(1, min(processors // tiles, steps // 8))


def offline_cases() -> Iterator[Case]:
    """Both tilings of 16-bit inputs, and that of float32, with even sizes and with any."""
    tensor_cores = {90: ("wgmma.mma_async",), 100: ("tcgen05.mma",), 120: ("mma.sync",)}
    for name, kind, features, capability in (
        ("narrow", "bf16", 4096, 90),
        ("wide", "bf16", 14336, 90),
        ("narrow", "fp16", 14336, 120),
        ("narrow", "fp32", 4096, 90),
    ):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
        tiling = choose_tiling(features, dtype, capability)
        for even in (True, False):
            types = {"x": f"*{kind}", "out": "*fp32", "M": "i32", "I": "i32", "stride_x": "i32"}
            types |= {"stride_part": "i64", "steps": "i32"}
            constants = {
                "ROWS": tiling.rows, "COLUMNS": tiling.columns, "DEPTH": tiling.depth, "GROUP": tiling.group,
                "EVEN_I": even, "EVEN_M": even, "ACCUMULATE": True,
            }  # fmt: skip
            yield Case(
                f"{name} {kind} {'even' if even else 'any size'}", _kernel, types, constants,
                {} if kind == "fp32" else tensor_cores, tiling.num_warps, tiling.num_stages, odd=("steps",),
                capabilities=(90, 100) if name == "wide" else (90, 100, 120),
            )  # fmt: skip
