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
from wush_kernels.offline import Case
from wush_kernels.split import finish, plan_splits
from wush_kernels.support import INTERPRETED, check_tensor, operator, require_support
from wush_kernels.workspace import workspace

G = 16
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
_UNSHIFT = 2.0**14  # both operands are times 2^-7

# Four bytes of codes to four even and four odd columns: E2M1's bits, moved to float16's exponent and mantissa, are
# the value times 2^-14; the factor is the scale times 2^7.
_DECODE = """
{
    .reg .b32 p, q, t, s;
    prmt.b32 p, $4, 0, 0x4140;
    prmt.b32 q, $4, 0, 0x4342;
    shl.b32 t, p, 9;
    shl.b32 s, p, 12;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 t, t, s, 0x80008000, 0xF8;
    mul.rn.f16x2 $0, t, $5;
    shl.b32 t, q, 9;
    shl.b32 s, q, 12;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 t, t, s, 0x80008000, 0xF8;
    mul.rn.f16x2 $1, t, $6;
    shl.b32 t, p, 5;
    shl.b32 s, p, 8;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 t, t, s, 0x80008000, 0xF8;
    mul.rn.f16x2 $2, t, $5;
    shl.b32 t, q, 5;
    shl.b32 s, q, 8;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 t, t, s, 0x80008000, 0xF8;
    mul.rn.f16x2 $3, t, $6;
}
"""


@triton.jit
def _decode(packed, factor, DECODE: tl.constexpr, EMULATE: tl.constexpr):
    """Even and odd columns, float16 like `packed`: values times 2^-7, for factors (float16) of the scale times 2^7."""
    if EMULATE:
        code, scale = packed.to(tl.int32), factor.to(tl.float32) * 6.103515625e-05
        return (e2m1_value(code & 15) * scale).to(tl.float16), (e2m1_value(code >> 4) * scale).to(tl.float16)
    return tl.inline_asm_elementwise(
        DECODE, "=&r,=&r,=&r,=&r,r,r,r", [packed, factor], (tl.float16, tl.float16), is_pure=True, pack=4
    )


@triton.jit(do_not_specialize=["M"])  # as a constant, M = 1 would change how inputs are read
def _kernel(
    a, packed, scales, bias, out, partial, counters, M, O, I, row_bytes, alpha,
    SPLIT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, DECODE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_I // 2
    GROUPS: tl.constexpr = BLOCK_I // 16
    WORDS: tl.constexpr = BLOCK_I // 64
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half, word = tl.arange(0, HALF), tl.arange(0, WORDS)
    o_in = tl.minimum(o, O - 1)  # rows past the end are read again and never stored
    given = (m < M)[:, None]  # rows past the end are not read: many programs reading one row again would queue for it
    packed_at = packed + o_in.to(tl.int64)[:, None] * row_bytes + half[None, :]
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
            codes, scale = tl.load(packed_at + i // 2), tl.load(scales_at + (i // 64) * O)
        else:
            codes = tl.load(packed_at + i // 2, mask=(column < I)[None, :], other=0)
            scale = tl.load(scales_at + (i // 64) * O, mask=(i + word * 64 < I)[:, None], other=0)
        inside = given & ((column < I)[None, :] | WHOLE)
        a_even, a_odd = tl.load(a_at + i, mask=inside, other=0.0), tl.load(a_at + i + 8, mask=inside, other=0.0)
        shifted = tl.trans(scale)[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
        by_group = tl.reshape((shifted & 0xFF).to(tl.uint8), (BLOCK_O, GROUPS)).to(tl.float8e4nv, bitcast=True)
        factor = (by_group.to(tl.float32) * 128.0).to(tl.float16)
        spread = tl.broadcast_to(factor[:, :, None], (BLOCK_O, GROUPS, 8))
        even, odd = _decode(codes, tl.reshape(spread, (BLOCK_O, HALF)), DECODE, EMULATE)
        part = tl.dot(even, tl.trans(a_even))
        sums += tl.dot(odd, tl.trans(a_odd), part)
    finish(sums, None, bias, out, partial, counters, o, m, M, O, alpha, SPLIT, BLOCK_O, BLOCK_M, False, HAS_BIAS)


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
    if dtype not in OUTPUTS:
        raise TypeError(f"matmul_half: dtype {dtype}, where bfloat16, float16 or float32 is needed")
    check_tensor(a, "matmul_half: a", (torch.float16,), (rows, features), a.device)
    check_tensor(packed, "matmul_half: packed", (torch.uint8,), (outputs, features // 2), a.device)
    check_tensor(scales, "matmul_half: scales", (torch.int32,), (triton.cdiv(features, 64), outputs), a.device)
    if bias is not None:
        check_tensor(bias, "matmul_half: bias", OUTPUTS, (outputs,), a.device)
    return _matmul_half(a, packed, scales, alpha, bias, dtype)


@operator("wush::matmul_half")
def _matmul_half(
    a: Tensor, packed: Tensor, scales: Tensor, alpha: float, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (rows, features), outputs = a.shape, len(packed)
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
    sizes = (128, 128, 4, 4) if block_m <= 32 else (256, 128, 8, 3) if block_m == 64 else (128, 128, 8, 3)
    tile = dict(zip(("BLOCK_O", "BLOCK_I", "num_warps", "num_stages"), sizes, strict=True))
    tiles = triton.cdiv(outputs, tile["BLOCK_O"]) * triton.cdiv(rows, block_m)
    splits = plan_splits(tiles, triton.cdiv(features, tile["BLOCK_I"]), device)
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
        DECODE=_DECODE, EMULATE=INTERPRETED, SPLIT=grid[2] > 1,
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
    """Decode with 16 and with 64 tokens."""
    types = {"a": "*fp16", "packed": "*u8", "scales": "*i32", "out": "*bf16", "counters": "*i32"}
    types |= {"partial": "*fp32", "bias": "*bf16", "alpha": "fp32"}
    types |= dict.fromkeys(("M", "O", "I", "row_bytes"), "i32")
    mma = {90: r"wgmma\.mma_async.*f16", 100: "mma", 120: "mma.sync"}
    expects = {capability: (pattern, "mul.rn.f16x2") for capability, pattern in mma.items()}
    for tokens, output_tile, warps, stages in ((16, 128, 4, 4), (64, 256, 8, 3)):
        constants = {
            "SPLIT": True, "BLOCK_O": output_tile, "BLOCK_M": tokens, "BLOCK_I": 128, "WHOLE": True,
            "HAS_BIAS": True, "DECODE": _DECODE, "EMULATE": False,
        }  # fmt: skip
        # 256 rows a tile spill on sm_120, which multiplies in registers; there 64 tokens take the 16-bit path
        on = (90, 100, 120) if tokens == 16 else (90, 100)
        yield Case(f"{tokens} tokens", _kernel, types, constants, expects, warps, stages, odd=("M",), capabilities=on)
