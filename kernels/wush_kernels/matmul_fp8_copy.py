"""MXFP4 x MXFP4 on FP8 tensor cores with an FP8 copy of the weight, columns split: for up to a few hundred tokens.

`y[m, o] = alpha * w_scale[o] * sum_i a_scale[m, i] * a[m, i] * w[o, i] + bias[o]`. Activations are exact E5M2 numbers
and weights exact E4M3 numbers, so the only rounding is that of the sums, promoted to float32 every `BLOCK_I` columns.
A library's product gives each tile to one program; with few tiles most of the GPU idles. Here programs share a tile's
columns, and the last one to finish adds their sums in a fixed order.

Layouts: a `(M, I)` float8_e5m2 in operand order with `a_scales` `(ceil(I / SPAN), M)`
(`wush_kernels.fp8_spans`); weight `(O, I)` float8_e4m3fn in operand order with `w_scales` `(O,)`
(`wush_kernels.encode.fp8_weight`); bias `(O,)`; the result `(M, O)`.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import fp8_spans
from wush_kernels.offline import Case
from wush_kernels.split import finish, plan_splits, processors
from wush_kernels.support import INTERPRETED, check_tensor, operator, require_support
from wush_kernels.workspace import workspace

G = 32
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
SPAN: tl.constexpr = tl.constexpr(fp8_spans.SPAN)


@triton.jit(do_not_specialize=["M"])  # as a constant, M = 1 would change how inputs are read
def _kernel(
    a, a_scales, weight, w_scales, bias, out, partial, counters, M, O, I, alpha,
    SPLIT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_I)
    o_in = tl.minimum(o, O - 1)  # rows past the end are read again and never stored
    given = m < M  # rows past the end are not read: many programs reading one row again would queue for it
    weight_at = weight + o_in.to(tl.int64)[:, None] * I + column[None, :]
    a_at = a + m.to(tl.int64)[:, None] * I + column[None, :]
    scales_at = a_scales + m
    steps = tl.cdiv(I, BLOCK_I)
    first = steps * tl.program_id(2) // tl.num_programs(2)
    last = steps * (tl.program_id(2) + 1) // tl.num_programs(2)
    next_scale = tl.load(scales_at + (first * BLOCK_I // SPAN) * M, mask=given, other=0.0)
    sums = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for step in range(first, last):
        i = step * BLOCK_I
        scale = next_scale[:, None]  # loaded a step ahead, since nothing copies it ahead as it does the operands
        next_scale = tl.load(scales_at + ((i + BLOCK_I) // SPAN) * M, mask=given & (step + 1 < last), other=0.0)
        inside = (i + column < I)[None, :] | WHOLE
        w_tile = tl.load(weight_at + i) if WHOLE else tl.load(weight_at + i, mask=inside, other=0.0)
        a_tile = tl.load(a_at + i, mask=given[:, None] & inside, other=0.0)
        if EMULATE:  # the interpreter's FP8 products are float32's, exactly
            w_tile, a_tile = w_tile.to(tl.float32), a_tile.to(tl.float32)
        sums = tl.fma(tl.dot(a_tile, tl.trans(w_tile)), scale, sums)  # powers of two: exact products
    sums = tl.trans(sums * tl.load(w_scales + o_in)[None, :])
    finish(sums, bias, out, partial, counters, o, m, M, O, alpha, SPLIT, BLOCK_O, BLOCK_M, HAS_BIAS)


def matmul_fp8_copy(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product `(M, O)` in `dtype`; `alpha` is the product of both sides' global scales.

    Raises `ValueError` or `TypeError` for operands that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(a, "matmul_fp8_copy")
    (rows, features), outputs = a.shape, len(weight)
    if features % G:
        raise ValueError(f"matmul_fp8_copy: I = {features} is no multiple of the group size {G}")
    if dtype not in OUTPUTS:
        raise TypeError(f"matmul_fp8_copy: dtype {dtype}, where bfloat16, float16 or float32 is needed")
    spans = triton.cdiv(features, fp8_spans.SPAN)
    check_tensor(a, "matmul_fp8_copy: a", (torch.float8_e5m2,), (rows, features), a.device)
    check_tensor(a_scales, "matmul_fp8_copy: a_scales", (torch.float32,), (spans, rows), a.device)
    check_tensor(weight, "matmul_fp8_copy: weight", (torch.float8_e4m3fn,), (outputs, features), a.device)
    check_tensor(w_scales, "matmul_fp8_copy: w_scales", (torch.float32,), (outputs,), a.device)
    if bias is not None:
        check_tensor(bias, "matmul_fp8_copy: bias", OUTPUTS, (outputs,), a.device)
    return _matmul_fp8_copy(a, a_scales, weight, w_scales, alpha, bias, dtype)


@operator("wush::matmul_fp8_copy")
def _matmul_fp8_copy(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    rows, (outputs, features) = len(a), weight.shape
    out = a.new_empty(rows, outputs, dtype=dtype)
    if out.numel():
        launch(plan(rows, outputs, features, a.device), a, a_scales, weight, w_scales, alpha, bias, out)
    return out


@_matmul_fp8_copy.register_fake
def _(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], weight.shape[0], dtype=dtype)


def plan(rows: int, outputs: int, features: int, device: torch.device) -> dict[str, int]:
    """The tile sizes, splits, warps and pipeline stages of a product: the fastest of those tried on an H100."""
    narrow = rows <= 64 or triton.cdiv(outputs, 64) * triton.cdiv(rows, 64) <= processors(device)
    tile = {"BLOCK_O": 64, "BLOCK_M": 64 if narrow else 128, "BLOCK_I": 256, "num_warps": 4, "num_stages": 3}
    tiles = triton.cdiv(outputs, tile["BLOCK_O"]) * triton.cdiv(rows, tile["BLOCK_M"])
    resident = 2 if narrow else 1  # programs that fit a multiprocessor
    return tile | {"SPLITS": plan_splits(tiles, triton.cdiv(features, 256), device, resident, fewest=16)}


def launch(
    tile: dict[str, int],
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Run the kernel with a given tile, as `plan` makes one."""
    rows, (outputs, features) = len(a), weight.shape
    grid = (triton.cdiv(outputs, tile["BLOCK_O"]), triton.cdiv(rows, tile["BLOCK_M"]), tile["SPLITS"])
    constants = {name: size for name, size in tile.items() if name != "SPLITS"}
    cells = math.prod(grid) * tile["BLOCK_O"] * tile["BLOCK_M"] if grid[2] > 1 else 0
    partial = torch.empty(cells, dtype=torch.float32, device=a.device)
    _kernel[grid](
        a, a_scales, weight, w_scales, bias, out, partial, workspace(a.device, grid[0] * grid[1]),
        rows, outputs, features, alpha, WHOLE=features % tile["BLOCK_I"] == 0, HAS_BIAS=bias is not None,
        EMULATE=INTERPRETED, SPLIT=grid[2] > 1, enable_fp_fusion=False, **constants,
    )  # fmt: skip


def reference_matmul_fp8_copy(
    a: Tensor, a_scales: Tensor, weight: Tensor, w_scales: Tensor, alpha: float, bias: Tensor | None = None
) -> Tensor:
    """The product in float64, `(M, O)`, of the same operands."""
    spread = a_scales.double().T.repeat_interleave(fp8_spans.SPAN, -1)[:, : a.shape[1]]
    y = (a.double() * spread) @ weight.double().T * w_scales.double() * alpha
    return y if bias is None else y + bias.double()


def offline_cases() -> Iterator[Case]:
    """Either width of the tile."""
    types = {"a": "*fp8e5", "weight": "*fp8e4nv", "out": "*bf16", "counters": "*i32", "bias": "*bf16", "alpha": "fp32"}
    types |= dict.fromkeys(("a_scales", "w_scales", "partial"), "*fp32") | dict.fromkeys(("M", "O", "I"), "i32")
    expects = {
        90: (r"wgmma\.mma_async.*e5m2\.e4m3",),
        100: (r"tcgen05\.mma\S*kind::f8f6f4",),
        120: (r"mma\.sync\S*e5m2\.e4m3",),
    }
    # Chosen for 9.0 only; on the others one of the widths spills registers.
    for rows, on in ((64, (90, 120)), (256, (90, 100))):
        tile = plan(rows, 4096, 4096, torch.device("cpu"))
        constants = {name: size for name, size in tile.items() if name.startswith("BLOCK")}
        constants |= {"SPLIT": True, "WHOLE": True, "HAS_BIAS": True, "EMULATE": False}
        warps, stages = tile["num_warps"], tile["num_stages"]
        yield Case(f"{rows} tokens", _kernel, types, constants, expects, warps, stages, ("M",), capabilities=on)
