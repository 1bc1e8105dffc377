"""MXFP4 x MXFP4 on FP8 tensor cores, with weights decoded from 4 bits in registers: for few tokens.

`y[m, o] = alpha * a_scale[m] * w_scale[o] * sum_i a[m, i] * w[o, i] + bias[o]`. Both operands are exact E5M2 numbers,
so the only rounding is that of the sums, promoted to float32 every `BLOCK_I` columns.

Layouts: a `(M, I)` float8_e5m2 in operand order with `a_scales` `(M,)` (`wush_kernels.fp8_operand`); packed weights
`(O, I / 2)` uint8; exponents `(ceil(I / 128), O)` int32, four groups' to a word, each above its row's base plus 13,
with `w_scales` `(O,)` (`wush_kernels.encode.exponents`); bias `(O,)`; the result `(M, O)`.
Weights are the tall side of the product. The columns are split among programs; the last one of a tile to finish adds
the partial sums in a fixed order.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.dequantize import operand_order, reference_e2m1, reference_unpack
from wush_kernels.numerics import e2m1_value
from wush_kernels.offline import Case
from wush_kernels.spec import FLOATS
from wush_kernels.split import finish, plan_splits
from wush_kernels.support import INTERPRETED, check_aligned, check_tensor, operator, require_support
from wush_kernels.workspace import workspace

G = 32
SUMS_BOUND = 2.0**-12  # of the sum of magnitudes: what FP8 tensor cores lose of a product between promotions

# A word of four bytes of codes: look the eight magnitudes up, sort even from odd columns, put the signs in place.
_DECODE = """
{
    .reg .b32 magnitudes, upper, first, second, signs;
    and.b32 magnitudes, $2, 0x77777777;
    shr.u32 upper, magnitudes, 16;
    prmt.b32 first, $3, $4, magnitudes;
    prmt.b32 second, $3, $4, upper;
    shl.b32 signs, $2, 4;
    prmt.b32 $0, first, second, 0x6420;
    prmt.b32 $1, first, second, 0x7531;
    lop3.b32 $0, $0, signs, 0x80808080, 0xF8;
    lop3.b32 $1, $1, $2, 0x80808080, 0xF8;
}
"""


@triton.jit
def _bytes(words):
    """The four bytes of each word, int32, `(O, 4 * words)`."""
    evens, odds = tl.join(words & 0xFF, (words >> 16) & 0xFF), tl.join((words >> 8) & 0xFF, (words >> 24) & 0xFF)
    return tl.reshape(tl.join(evens, odds), (words.shape[0], words.shape[1] * 4))


@triton.jit
def _in_order(even, odd):
    """Each group's even, then its odd columns, `(O, I)`, of two `(O, groups, G / 2)`; or words of columns."""
    both = tl.permute(tl.join(even, odd), (0, 1, 3, 2))
    return tl.reshape(both, (both.shape[0], both.shape[1] * both.shape[2] * both.shape[3]))


@triton.jit
def _decode(codes, exponent, DECODE: tl.constexpr, EMULATE: tl.constexpr):
    """Weights in operand order, `(O, I)` float8e5.

    `codes`: words of four bytes of codes, `(O, I / 8)` int32. `exponent`: the groups', plus 13, `(O, I / 32)` int32.
    """
    ROWS: tl.constexpr = exponent.shape[0]
    GROUPS: tl.constexpr = exponent.shape[1]
    exponent = exponent[:, :, None]
    if EMULATE:
        factor = ((exponent + (127 - 13)) << 23).to(tl.float32, bitcast=True)
        code = tl.reshape(_bytes(codes), (ROWS, GROUPS, 16))
        return _in_order(e2m1_value(code & 15) * factor, e2m1_value(code >> 4) * factor).to(tl.float8e5)
    # E2M1 magnitudes 0..3 and 4..7 as bytes of E5M2, times 2^(exponent - 13); zero does not move.
    low = exponent * 0x04040400 + (0x3E3C3800 - 13 * 0x04040400)
    high = exponent * 0x04040404 + (0x46444240 - 13 * 0x04040404)
    codes = tl.reshape(codes, (ROWS, GROUPS, 4))
    even, odd = tl.inline_asm_elementwise(
        DECODE, "=&r,=&r,r,r,r", [codes, low, high], (tl.int32, tl.int32), is_pure=True, pack=1
    )
    return _bytes(_in_order(even, odd)).to(tl.uint8).to(tl.float8e5, bitcast=True)


@triton.jit(do_not_specialize=["M"])  # as a constant, M = 1 would change how inputs are read
def _kernel(
    a, a_scales, packed, exponents, w_scales, bias, out, partial, counters, M, O, I, row_bytes, alpha,
    SPLIT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = BLOCK_I // 8
    WORDS: tl.constexpr = BLOCK_I // 128
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, code, word = tl.arange(0, BLOCK_I), tl.arange(0, CODES), tl.arange(0, WORDS)
    o_in = tl.minimum(o, O - 1)  # rows past the end are read again and never stored
    given = (m < M)[:, None]  # rows past the end are not read: many programs reading one row again would queue for it
    codes_at = packed.to(tl.pointer_type(tl.int32)) + o_in.to(tl.int64)[:, None] * (row_bytes // 4) + code[None, :]
    a_at = a + m.to(tl.int64)[:, None] * I + column[None, :]
    exponents_at = exponents + word[:, None] * O + o_in[None, :]
    steps = tl.cdiv(I, BLOCK_I)
    first = steps * tl.program_id(2) // tl.num_programs(2)
    last = steps * (tl.program_id(2) + 1) // tl.num_programs(2)
    sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for step in range(first, last):
        i = step * BLOCK_I
        if WHOLE:
            codes = tl.load(codes_at + i // 8)
            exponent = tl.load(exponents_at + (i // 128) * O)
        else:
            codes = tl.load(codes_at + i // 8, mask=(i + code // 4 * 32 < I)[None, :], other=0)
            exponent = tl.load(exponents_at + (i // 128) * O, mask=(i + word * 128 < I)[:, None], other=0)
        a_tile = tl.load(a_at + i, mask=given & ((i + column < I)[None, :] | WHOLE), other=0.0)
        # Only loads, views and elementwise steps lead to the product: then codes and exponents come from shared memory
        # in the layout of its operand, and decoded weights never leave the registers.
        weight = _decode(codes, _bytes(tl.trans(exponent)), DECODE, EMULATE)
        if EMULATE:  # the interpreter's FP8 products are float32's, exactly
            weight, a_tile = weight.to(tl.float32), a_tile.to(tl.float32)
        sums += tl.dot(weight, tl.trans(a_tile))
    sums = sums * tl.load(w_scales + o_in)[:, None] * tl.load(a_scales + m, mask=m < M, other=0.0)[None, :]
    finish(sums, bias, out, partial, counters, o, m, M, O, alpha, SPLIT, BLOCK_O, BLOCK_M, HAS_BIAS)


def matmul_fp8(
    a: Tensor,
    a_scales: Tensor,
    packed: Tensor,
    exponents: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product `(M, O)` in `dtype`; `alpha` is the product of both sides' global scales.

    Raises `ValueError` or `TypeError` for operands that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(a, "matmul_fp8")
    (rows, features), outputs = a.shape, len(packed)
    if features % G:
        raise ValueError(f"matmul_fp8: I = {features} is no multiple of the group size {G}")
    if dtype not in FLOATS:
        raise TypeError(f"matmul_fp8: dtype {dtype}, where bfloat16, float16 or float32 is needed")
    check_tensor(a, "matmul_fp8: a", (torch.float8_e5m2,), (rows, features), a.device)
    check_tensor(a_scales, "matmul_fp8: a_scales", (torch.float32,), (rows,), a.device)
    check_tensor(packed, "matmul_fp8: packed", (torch.uint8,), (outputs, features // 2), a.device)
    check_tensor(exponents, "matmul_fp8: exponents", (torch.int32,), (triton.cdiv(features, 128), outputs), a.device)
    check_tensor(w_scales, "matmul_fp8: w_scales", (torch.float32,), (outputs,), a.device)
    if bias is not None:
        check_tensor(bias, "matmul_fp8: bias", FLOATS, (outputs,), a.device)
    return _matmul_fp8(a, a_scales, packed, exponents, w_scales, alpha, bias, dtype)


@operator("wush::matmul_fp8")
def _matmul_fp8(
    a: Tensor,
    a_scales: Tensor,
    packed: Tensor,
    exponents: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (rows, features), outputs = a.shape, len(packed)
    check_aligned(packed, "matmul_fp8: packed")
    out = a.new_empty(rows, outputs, dtype=dtype)
    if out.numel():
        tile = plan(rows, outputs, features, a.device)
        launch(tile, a, a_scales, packed, exponents, w_scales, alpha, bias, out)
    return out


@_matmul_fp8.register_fake
def _(
    a: Tensor,
    a_scales: Tensor,
    packed: Tensor,
    exponents: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], packed.shape[0], dtype=dtype)


def plan(rows: int, outputs: int, features: int, device: torch.device) -> dict[str, int]:
    """The tile sizes, splits, warps and pipeline stages of a product: the fastest of those tried on an H100."""
    block_m = max(16, min(64, triton.next_power_of_2(rows)))
    tall = outputs >= 1 << 14 if block_m == 64 else outputs * features >= 1 << 28
    tile = {"BLOCK_O": 128 if tall else 64, "BLOCK_M": block_m, "BLOCK_I": 256, "num_warps": 8 if tall else 4}
    tiles = triton.cdiv(outputs, tile["BLOCK_O"]) * triton.cdiv(rows, block_m)
    resident = 1 if tall else 2 if block_m == 64 else 3
    splits = plan_splits(tiles, triton.cdiv(features, 256), device, resident, fewest=4)
    return tile | {"num_stages": 3, "SPLITS": splits}


def launch(
    tile: dict[str, int],
    a: Tensor,
    a_scales: Tensor,
    packed: Tensor,
    exponents: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Run the kernel with a given tile, as `plan` makes one."""
    (rows, features), outputs = a.shape, len(packed)
    grid = (triton.cdiv(outputs, tile["BLOCK_O"]), triton.cdiv(rows, tile["BLOCK_M"]), tile["SPLITS"])
    constants = {name: size for name, size in tile.items() if name != "SPLITS"}
    cells = math.prod(grid) * tile["BLOCK_O"] * tile["BLOCK_M"] if grid[2] > 1 else 0
    partial = torch.empty(cells, dtype=torch.float32, device=a.device)
    _kernel[grid](
        a, a_scales, packed, exponents, w_scales, bias, out, partial, workspace(a.device, grid[0] * grid[1]),
        rows, outputs, features, features // 2, alpha, WHOLE=features % tile["BLOCK_I"] == 0, HAS_BIAS=bias is not None,
        DECODE=_DECODE, EMULATE=INTERPRETED, SPLIT=grid[2] > 1,
        enable_fp_fusion=False, **constants,
    )  # fmt: skip


def reference_matmul_fp8(
    a: Tensor,
    a_scales: Tensor,
    packed: Tensor,
    exponents: Tensor,
    w_scales: Tensor,
    alpha: float,
    bias: Tensor | None = None,
) -> Tensor:
    """The product in float64, `(M, O)`, of the same codes and scales."""
    features = a.shape[1]
    elements = operand_order(reference_e2m1(reference_unpack(packed)).double(), G).unflatten(-1, (-1, G))
    by_group = exponents.T.contiguous().view(torch.uint8)[:, : features // G]
    weight = (elements * torch.exp2(by_group.double() - 13)[:, :, None]).flatten(1)
    y = a.double() @ weight.T * a_scales.double()[:, None] * w_scales.double() * alpha
    return y if bias is None else y + bias.double()


def offline_cases() -> Iterator[Case]:
    """The tiles of products with few and more tokens, small and large."""
    types = {"a": "*fp8e5", "packed": "*u8", "exponents": "*i32", "out": "*bf16", "counters": "*i32"}
    types |= dict.fromkeys(("a_scales", "w_scales", "partial"), "*fp32") | {"bias": "*bf16", "alpha": "fp32"}
    types |= dict.fromkeys(("M", "O", "I", "row_bytes"), "i32")
    # decoding between ldmatrix and wgmma: codes are read in the operand's layout, so weights stay in registers
    expects = {
        90: (r"wgmma\.mma_async.*e5m2\.e5m2", r"(?s)ldmatrix((?!wgmma).)*prmt\.b32"),
        100: (r"tcgen05\.mma\S*kind::f8f6f4", "prmt.b32"),
        120: (r"mma\.sync\S*e5m2\.e5m2", "prmt.b32"),
    }
    tiles = ((16, 4096, True), (16, 4096, False), (32, 4096, True), (16, 16384, True), (64, 4096, True))
    for rows, size, whole in (*tiles, (64, 16384, True)):
        tile = plan(rows, size, size, torch.device("cpu"))
        constants: dict[str, object] = {name: tile[name] for name in ("BLOCK_O", "BLOCK_M", "BLOCK_I")}
        constants |= {"SPLIT": True, "WHOLE": whole, "HAS_BIAS": True, "DECODE": _DECODE, "EMULATE": False}
        warps, stages = tile["num_warps"], tile["num_stages"]
        name = f"{rows} tokens, {size} x {size}{'' if whole else ', any I'}"
        yield Case(name, _kernel, types, constants, expects, warps, stages, ("M",), (r"mma\S*bf16",))
