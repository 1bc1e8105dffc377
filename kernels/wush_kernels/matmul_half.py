"""NVFP4 x NVFP4 on FP16 tensor cores, with weights decoded from 4 bits in registers: for few tokens.

`y[m, o] = alpha * 2^14 * sum_i a[m, i] * w[o, i] + bias[o]`. An NVFP4 value, `code * scale`, has 6 significand bits:
times 2^-7 it is exactly a float16 number, so the only rounding is that of the float32 sums.

Layouts: a `(M, I)` float16 in operand order, values times 2^-7 (`wush_kernels.half_operand`); packed weights
`(O, I / 2)` uint8; scales `(ceil(I / 64), O)` int32, the E4M3 bytes of four groups to a word
(`wush_kernels.encode.words`); bias `(O,)`; the result `(M, O)`. Weights are the tall side of the product; the columns
are split among programs, and their sums added in a fixed order.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.dequantize import operand_order, reference_e2m1, reference_unpack
from wush_kernels.numerics import e2m1_value
from wush_kernels.offline import CAPABILITIES, Case
from wush_kernels.spec import FLOATS
from wush_kernels.split import finish, plan_splits
from wush_kernels.support import INTERPRETED, check_aligned, check_tensor, operator, require_support
from wush_kernels.workspace import workspace

G = 16
_UNSHIFT = 2.0**14  # both operands are times 2^-7

# Two pairs of code bytes to pairs of even and of odd columns: bytes of E5M2, whose bits are E2M1's times 2^-14, for the
# even and for the odd columns (0xE2 takes the mask's bits from the first, the others from the third operand), become
# the upper halves of float16 numbers; the factor is the scale times 2^7.
_DECODE = """
{
    .reg .b16 f, g;
    .reg .b32 codes, signs, even, odd, first, second;
    mov.b32 {f, g}, $6;
    mov.b32 first, {f, f};
    mov.b32 second, {g, g};
    prmt.b32 codes, $4, $5, 0x5410;
    and.b32 signs, codes, 0x88888888;
    shr.u32 odd, codes, 3;
    lop3.b32 odd, odd, 0x0E0E0E0E, signs, 0xE2;
    shl.b32 even, codes, 1;
    shl.b32 signs, signs, 4;
    lop3.b32 even, even, 0x0E0E0E0E, signs, 0xE2;
    prmt.b32 $0, even, 0, 0x1404;
    prmt.b32 $1, even, 0, 0x3424;
    prmt.b32 $2, odd, 0, 0x1404;
    prmt.b32 $3, odd, 0, 0x3424;
    mul.rn.f16x2 $0, $0, first;
    mul.rn.f16x2 $1, $1, second;
    mul.rn.f16x2 $2, $2, first;
    mul.rn.f16x2 $3, $3, second;
}
"""

# A word of four E4M3 scales to their factors, float16, times 2^7 (0x5800).
_FACTORS = """
{
    .reg .b16 low, high;
    .reg .b32 first, second, unit;
    mov.b32 {low, high}, $4;
    mov.b32 unit, 0x58005800;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 second, high;
    mul.rn.f16x2 first, first, unit;
    mul.rn.f16x2 second, second, unit;
    mov.b32 {$0, $1}, first;
    mov.b32 {$2, $3}, second;
}
"""


@triton.jit
def _factor(word, FACTORS: tl.constexpr, EMULATE: tl.constexpr):
    """Float16 scales times 2^7, `(O, groups)`, of words `(O, words)`."""
    if EMULATE:
        shifted = word[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
        scale = (shifted & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        factor = (scale.to(tl.float32) * 128.0).to(tl.float16)
    else:
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            FACTORS, "=h,=h,=h,=h,r", [word], (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1
        )
        factor = tl.join(tl.join(f0, f2), tl.join(f1, f3)).to(tl.float16, bitcast=True)
    return tl.reshape(factor, (word.shape[0], word.shape[1] * 4))


@triton.jit
def _halves(words):
    """The two float16 numbers of each word, `(O, 2 * words)`."""
    both = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).to(tl.float16, bitcast=True)
    return tl.reshape(both, (words.shape[0], words.shape[1] * 2))


@triton.jit
def _decode(pairs, factor, DECODE: tl.constexpr, EMULATE: tl.constexpr):
    """Even and odd columns `(O, I / 2)`, float16: values times 2^-7.

    `pairs`: pairs of code bytes, `(O, I / 4)` int32. `factor`: the scales times 2^7, `(O, groups)` float16.
    """
    ROWS: tl.constexpr = pairs.shape[0]
    PAIRS: tl.constexpr = pairs.shape[1]
    spread = tl.reshape(tl.broadcast_to(factor[:, :, None], (ROWS, PAIRS // 4, 4)), (ROWS, PAIRS))
    if EMULATE:
        code = tl.reshape(tl.join(pairs & 0xFF, pairs >> 8), (ROWS, PAIRS * 2))
        scale = tl.reshape(tl.join(spread, spread), (ROWS, PAIRS * 2)).to(tl.float32) * 6.103515625e-05
        return (e2m1_value(code & 15) * scale).to(tl.float16), (e2m1_value(code >> 4) * scale).to(tl.float16)
    even, odd = tl.inline_asm_elementwise(
        DECODE, "=&r,=&r,=&r,=&r,r,r,r", [pairs, spread], (tl.int32, tl.int32), is_pure=True, pack=2
    )
    return _halves(even), _halves(odd)


@triton.jit(do_not_specialize=["M"])  # as a constant, M = 1 would change how inputs are read
def _kernel(
    a, packed, scales, bias, out, partial, counters, M, O, I, row_bytes, alpha,
    SPLIT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, FACTORS: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_I // 2
    WORDS: tl.constexpr = BLOCK_I // 64
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half, word = tl.arange(0, HALF), tl.arange(0, WORDS)
    o_in = tl.minimum(o, O - 1)  # rows past the end are read again and never stored
    given = (m < M)[:, None]  # rows past the end are not read: many programs reading one row again would queue for it
    pair = tl.arange(0, HALF // 2)
    pairs_at = packed.to(tl.pointer_type(tl.uint16)) + o_in.to(tl.int64)[:, None] * (row_bytes // 2) + pair[None, :]
    scales_at = scales + word[:, None] * O + o_in[None, :]
    a_at = a + m.to(tl.int64)[:, None] * I + ((half // 8) * 16 + half % 8)[None, :]
    steps = tl.cdiv(I, BLOCK_I)
    first = steps * tl.program_id(2) // tl.num_programs(2)
    last = steps * (tl.program_id(2) + 1) // tl.num_programs(2)
    sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for step in range(first, last):
        i = step * BLOCK_I
        column = i + (half // 8) * 16
        if WHOLE:
            pairs, scale = tl.load(pairs_at + i // 4), tl.load(scales_at + (i // 64) * O)
        else:
            pairs = tl.load(pairs_at + i // 4, mask=(i + pair // 4 * 16 < I)[None, :], other=0)
            scale = tl.load(scales_at + (i // 64) * O, mask=(i + word * 64 < I)[:, None], other=0)
        inside = given & ((column < I)[None, :] | WHOLE)
        a_even, a_odd = tl.load(a_at + i, mask=inside, other=0.0), tl.load(a_at + i + 8, mask=inside, other=0.0)
        # Only loads, views and elementwise steps lead to the product: then codes and scales come from shared memory in
        # the layout of its operand, and decoded weights never leave the registers.
        even, odd = _decode(pairs.to(tl.int32), _factor(tl.trans(scale), FACTORS, EMULATE), DECODE, EMULATE)
        part = tl.dot(even, tl.trans(a_even))
        sums += tl.dot(odd, tl.trans(a_odd), part)
    finish(sums, bias, out, partial, counters, o, m, M, O, alpha, SPLIT, BLOCK_O, BLOCK_M, HAS_BIAS)


def matmul_half(
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    alpha: float,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product `(M, O)` in `dtype`; `alpha` is the product of both sides' global scales.

    Raises `ValueError` or `TypeError` for operands that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(a, "matmul_half")
    (rows, features), outputs = a.shape, len(packed)
    if features % 32:
        raise ValueError(f"matmul_half: I = {features} is no multiple of 32; use kernels=torch")
    if dtype not in FLOATS:
        raise TypeError(f"matmul_half: dtype {dtype}, where bfloat16, float16 or float32 is needed")
    check_tensor(a, "matmul_half: a", (torch.float16,), (rows, features), a.device)
    check_tensor(packed, "matmul_half: packed", (torch.uint8,), (outputs, features // 2), a.device)
    check_tensor(scales, "matmul_half: scales", (torch.int32,), (triton.cdiv(features, 64), outputs), a.device)
    if bias is not None:
        check_tensor(bias, "matmul_half: bias", FLOATS, (outputs,), a.device)
    return _matmul_half(a, packed, scales, alpha, bias, dtype)


@operator("wush::matmul_half")
def _matmul_half(
    a: Tensor, packed: Tensor, scales: Tensor, alpha: float, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (rows, features), outputs = a.shape, len(packed)
    check_aligned(packed, "matmul_half: packed")
    out = a.new_empty(rows, outputs, dtype=dtype)
    if out.numel():
        launch(plan(rows, outputs, features, a.device), a, packed, scales, alpha, bias, out)
    return out


@_matmul_half.register_fake
def _(a: Tensor, packed: Tensor, scales: Tensor, alpha: float, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], packed.shape[0], dtype=dtype)


def plan(rows: int, outputs: int, features: int, device: torch.device) -> dict[str, int]:
    """The tile sizes, splits, warps and pipeline stages of a product: the fastest of those tried on an H100."""
    block_m = max(16, min(128, triton.next_power_of_2(rows)))
    sizes = (128, 128, 8, 4) if block_m <= 32 else (256, 128, 8, 3) if block_m == 64 else (128, 128, 8, 3)
    tile = dict(zip(("BLOCK_O", "BLOCK_I", "num_warps", "num_stages"), sizes, strict=True))
    tiles = triton.cdiv(outputs, tile["BLOCK_O"]) * triton.cdiv(rows, block_m)
    splits = plan_splits(tiles, triton.cdiv(features, tile["BLOCK_I"]), device, 2, fewest=8)
    return tile | {"BLOCK_M": block_m, "SPLITS": splits}


def launch(
    tile: dict[str, int],
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
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
        a, packed, scales, bias, out, partial, workspace(a.device, grid[0] * grid[1]), rows, outputs, features,
        features // 2, alpha * _UNSHIFT, WHOLE=features % tile["BLOCK_I"] == 0, HAS_BIAS=bias is not None,
        FACTORS=_FACTORS, DECODE=_DECODE, EMULATE=INTERPRETED, SPLIT=grid[2] > 1,
        enable_fp_fusion=False, **constants,
    )  # fmt: skip


def reference_matmul_half(
    a: Tensor, packed: Tensor, scales: Tensor, alpha: float, bias: Tensor | None = None
) -> Tensor:
    """The product in float64, `(M, O)`, of the same codes and scales."""
    elements = operand_order(reference_e2m1(reference_unpack(packed)).double(), G).unflatten(-1, (-1, G))
    by_group = scales.T.contiguous().view(torch.float8_e4m3fn)[:, : a.shape[1] // G]
    weight = (elements * by_group.double()[:, :, None]).flatten(1)
    y = a.double() * 2.0**7 @ weight.T * alpha
    return y if bias is None else y + bias.double()


def offline_cases() -> Iterator[Case]:
    """The tiles of products with few and more tokens."""
    types = {"a": "*fp16", "packed": "*u8", "scales": "*i32", "out": "*bf16", "counters": "*i32"}
    types |= {"partial": "*fp32", "bias": "*bf16", "alpha": "fp32"}
    types |= dict.fromkeys(("M", "O", "I", "row_bytes"), "i32")
    # ld.shared.b16: codes are read in the operand's layout, so weights stay in registers
    patterns = {90: r"(?s)ld\.shared\.b16.*wgmma\.mma_async\S*f16", 100: r"tcgen05\.mma\S*kind::f16"}
    patterns[120] = r"mma\.sync\S*f16\.f16"
    expects = {capability: (pattern, "mul.rn.f16x2") for capability, pattern in patterns.items()}
    for rows, whole in ((16, True), (16, False), (32, True), (64, True)):
        tile = plan(rows, 4096, 4096, torch.device("cpu"))
        constants: dict[str, object] = {name: size for name, size in tile.items() if name.startswith("BLOCK")}
        constants |= {"SPLIT": True, "WHOLE": whole, "HAS_BIAS": True}
        constants |= {"FACTORS": _FACTORS, "DECODE": _DECODE, "EMULATE": False}
        warps, stages = tile["num_warps"], tile["num_stages"]
        # 256 rows a tile spill on sm_120, which multiplies in registers; there 64 tokens take the 16-bit path
        on = CAPABILITIES if rows <= 32 else (90, 100)
        yield Case(
            f"{rows} tokens{'' if whole else ', any I'}",
            _kernel,
            types,
            constants,
            expects,
            warps,
            stages,
            ("M",),
            capabilities=on,
        )
