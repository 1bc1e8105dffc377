"""Packed MXFP4 weights as FP8 numbers with a power-of-two scale a row: exact where a row's exponents fit the window.

A weight is `code * 2^k * g`, `k` its group's exponent. `code * 2^(k - base)` is an E4M3 number for `k - base` in
[-8, 6] and an E5M2 number for [-15, 13]; a row's base brings its largest exponent to the top of the window (and is at
least -126, so that `2^base` is a normal float32). Groups of zeros fit anywhere. Groups under the window are counted,
never silently accepted: the caller sends such a layer down another path.

Layouts: packed `(O, I / 2)` uint8, lower index in the low nibble; scales `(O, N)` float8_e8m0fnu, `N = I / 32`. Bytes
`(O, I)` are in operand order: of each group the even columns first, then the odd ones. A NaN scale makes its row's
scale NaN, and no other's.

`exponents` and `fp8_row_bases` run once a weight and are plain PyTorch, without a host synchronization; `fp8_weight`
runs at every forward in the memory-saving mode: it moves 1.53 bytes an element, with about 4 instructions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.dequantize import operand_order, reference_e2m1, reference_unpack
from wush_kernels.offline import Case
from wush_kernels.support import INTERPRETED, check_aligned, check_tensor, on_device, require_support

GROUP_SIZE = 32
E4M3_WINDOW = (-8, 6)
DECODE_WINDOW = (-13, 13)  # E5M2 with 0.5 a normal number, what the decode kernel's byte table covers
_LOWEST_BASE = -126
_GROUPS_A_PROGRAM = 256


@dataclass(frozen=True)
class RowBases:
    """Of each row `base` `(O,)` int32 and `row_scales = 2^base` `(O,)` float32, NaN for a row with a NaN scale.

    `outside`: int32 scalar tensor, how many nonzero groups are under their row's window.
    """

    base: Tensor
    row_scales: Tensor
    outside: Tensor


@dataclass(frozen=True)
class Fp8Weight:
    """`bytes` `(O, I)` float8_e4m3fn in operand order; a value over the global scale is `byte * row_scale`."""

    bytes: Tensor
    row_scales: Tensor
    outside: Tensor


@dataclass(frozen=True)
class RowExponents:
    """`k - base - lowest` of each group, a byte; `row_scales`, `outside` as in `RowBases`.

    `relative`: `(ceil(N / 4), O)` int32, in its word w the groups 4 w to 4 w + 3 of a row, the first one lowest.
    """

    relative: Tensor
    row_scales: Tensor
    outside: Tensor


@triton.jit
def _pick(low, high, selector, INTERPRET: tl.constexpr):
    """Four bytes of the eight in `low`, `high`, one by each of the selector's four lowest nibbles (0..7)."""
    if INTERPRET:
        word = tl.zeros_like(selector)
        for n in tl.static_range(4):
            index = (selector >> (4 * n)) & 7
            byte = (tl.where(index < 4, low, high) >> (8 * (index & 3))) & 0xFF
            word |= byte << (8 * n)
        return word
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _e4m3_table(k):
    """E4M3 bytes of `code * 2^k` for the magnitude codes 0..3 and 4..7, k (int32) in [-8, 6]; subnormals under -5."""
    low = 0x3C383000 + k * 0x08080800
    high = 0x4C484440 + k * 0x08080808
    low = tl.where(k == -6, 0x0C080400, tl.where(k == -7, 0x06040200, tl.where(k == -8, 0x03020100, low)))
    high = tl.where(k == -7, 0x14100C08, tl.where(k == -8, 0x0C080604, high))
    return low, high


@triton.jit
def _fp8_weight_kernel(words, scales, base, out, groups, N, GROUPS: tl.constexpr, INTERPRET: tl.constexpr):
    """`GROUPS` groups a program, each 4 words of 8 codes in and 8 words of 4 bytes out."""
    first = tl.program_id(0) * GROUPS
    remaining = groups - first
    at = tl.arange(0, GROUPS * 4)
    w = tl.load(words + first.to(tl.int64) * 4 + at, mask=at // 4 < remaining, other=0)
    w = tl.reshape(w, (GROUPS, 4))

    group = tl.arange(0, GROUPS)
    exponent = tl.load(scales + first + group, mask=group < remaining, other=0).to(tl.int32) - 127
    k = exponent - tl.load(base + (first + group) // N, mask=group < remaining, other=0)
    low, high = _e4m3_table(tl.minimum(tl.maximum(k, -8), 6))
    low, high = tl.broadcast_to(low[:, None], (GROUPS, 4)), tl.broadcast_to(high[:, None], (GROUPS, 4))

    magnitudes = w & 0x77777777
    front = _pick(low, high, magnitudes, INTERPRET)
    back = _pick(low, high, (magnitudes >> 16) & 0x7777, INTERPRET)
    evens = _pick(front, back, tl.full((GROUPS, 4), 0x6420, tl.int32), INTERPRET) | ((w << 4) & -2139062144)
    odds = _pick(front, back, tl.full((GROUPS, 4), 0x7531, tl.int32), INTERPRET) | (w & -2139062144)
    halves = tl.permute(tl.join(evens, odds), (0, 2, 1))
    to = tl.arange(0, GROUPS * 8)
    tl.store(out + first.to(tl.int64) * 8 + to, tl.reshape(halves, (GROUPS * 8,)), mask=to // 8 < remaining)


def fp8_row_bases(packed: Tensor, scales: Tensor) -> RowBases:
    """The row bases of `fp8_weight`, made once a weight."""
    _check(packed, scales, "fp8_row_bases")
    _, base, row_scales, outside = _window(packed, scales, *E4M3_WINDOW)
    return RowBases(base, row_scales, outside)


def fp8_weight(packed: Tensor, scales: Tensor, rows: RowBases | None = None, out: Tensor | None = None) -> Fp8Weight:
    """The weight as E4M3 bytes, into `out` where it is given: exact if `outside` is zero.

    `rows`: what `fp8_row_bases` gave for this weight. Raises `ValueError` or `TypeError` for a tensor that does not
    fit, `RuntimeError` where kernels cannot run.
    """
    require_support(packed, "fp8_weight")
    _check(packed, scales, "fp8_weight")
    rows = fp8_row_bases(packed, scales) if rows is None else rows
    shape = (packed.shape[0], packed.shape[1] * 2)
    check_tensor(rows.base, "fp8_weight: rows.base", (torch.int32,), shape[:1], packed.device)
    if out is None:
        out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=packed.device)
    check_tensor(out, "fp8_weight: out", (torch.float8_e4m3fn,), shape, packed.device)
    torch.ops.wush.fp8_weight(packed, scales.view(torch.uint8), rows.base, out.view(torch.uint8))
    return Fp8Weight(out, rows.row_scales, rows.outside)


def exponents(packed: Tensor, scales: Tensor, lowest: int, highest: int) -> RowExponents:
    """Each group's exponent within the window [lowest, highest] of its row, laid out for the decode kernel.

    Plain PyTorch, once a weight. Groups outside, and groups of zeros, get the nearest exponent of the window.
    """
    _check(packed, scales, "exponents")
    if not 0 <= highest - lowest <= 255:
        raise ValueError(f"exponents: the window [{lowest}, {highest}] does not fit a byte")
    k, base, row_scales, outside = _window(packed, scales, lowest, highest)
    relative = (k - base[:, None]).clamp(lowest, highest) - lowest
    return RowExponents(words(relative), row_scales, outside)


def words(by_group: Tensor) -> Tensor:
    """Bytes `(O, N)` of groups, laid out for the decode kernels: four neighbours a word, `(ceil(N / 4), O)` int32."""
    padded = torch.nn.functional.pad(by_group.to(torch.uint8), (0, -by_group.shape[1] % 4))
    return padded.unflatten(1, (-1, 4)).transpose(0, 1).contiguous().view(torch.int32).squeeze(-1)


def reference_fp8_weight(packed: Tensor, scales: Tensor) -> Fp8Weight:
    """`fp8_weight` in plain PyTorch, by float64 arithmetic and a cast."""
    exponent = scales.view(torch.uint8).double() - 127
    elements = reference_e2m1(reference_unpack(packed)).double().unflatten(-1, (-1, GROUP_SIZE))
    nonzero = (elements != 0).any(-1) & (exponent < 128)
    base = exponent.masked_fill(~nonzero, -torch.inf).amax(-1, keepdim=True) - E4M3_WINDOW[1]
    base = base.masked_fill(base == -torch.inf, 0).clamp(min=_LOWEST_BASE)
    relative = exponent - base
    outside = (nonzero & (relative < E4M3_WINDOW[0])).sum()
    values = elements * torch.exp2(relative.clamp(*E4M3_WINDOW))[..., None]
    row_scales = torch.exp2(base).float().masked_fill((exponent == 128).any(-1, keepdim=True), torch.nan)
    as_bytes = values.flatten(-2).float().to(torch.float8_e4m3fn)
    ordered = operand_order(as_bytes.view(torch.uint8), GROUP_SIZE).view(torch.float8_e4m3fn)
    return Fp8Weight(ordered, row_scales.squeeze(-1), outside.int())


def _window(packed: Tensor, scales: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exponents `(O, N)` int32, row bases, row scales and the count of nonzero groups under the window."""
    k = scales.view(torch.uint8).int() - 127
    is_nan = k == 128
    nonzero = ((packed & 0x77) != 0).unflatten(-1, (-1, GROUP_SIZE // 2)).any(-1) & ~is_nan
    base = k.masked_fill(~nonzero, -(2**30)).amax(-1) - highest
    base = base.masked_fill(~nonzero.any(-1), 0).clamp(min=_LOWEST_BASE)
    outside = (nonzero & (k - base[:, None] < lowest)).sum().int()
    row_scales = ((base + 127) << 23).view(torch.float32).masked_fill(is_nan.any(-1), torch.nan)
    return k, base, row_scales, outside


@torch.library.custom_op("wush::fp8_weight", mutates_args=("out",))
@on_device
def _fp8_weight(packed: Tensor, scale_bytes: Tensor, base: Tensor, out: Tensor) -> None:
    check_aligned(packed, "fp8_weight: packed")
    check_aligned(out, "fp8_weight: out")
    groups = scale_bytes.numel()
    if groups:
        _fp8_weight_kernel[(triton.cdiv(groups, _GROUPS_A_PROGRAM),)](
            packed.view(torch.int32), scale_bytes, base, out.view(torch.int32), groups, scale_bytes.shape[1],
            GROUPS=_GROUPS_A_PROGRAM, INTERPRET=INTERPRETED, enable_fp_fusion=False,
        )  # fmt: skip


@_fp8_weight.register_fake
def _(packed: Tensor, scale_bytes: Tensor, base: Tensor, out: Tensor) -> None:
    return None


def _check(packed: Tensor, scales: Tensor, kernel: str) -> None:
    if packed.ndim != 2 or packed.shape[1] % (GROUP_SIZE // 2):
        raise ValueError(
            f"{kernel}: packed {tuple(packed.shape)}: not (O, I / 2) with I a multiple of the group size {GROUP_SIZE}"
        )
    check_tensor(packed, f"{kernel}: packed", (torch.uint8,), (None, None), packed.device)
    shape = (packed.shape[0], packed.shape[1] * 2 // GROUP_SIZE)
    check_tensor(scales, f"{kernel}: scales", (torch.float8_e8m0fnu,), shape, packed.device)


def offline_cases() -> Iterator[Case]:
    """The kernel on a weight of I a multiple of 512, and on any other."""
    types = {"words": "*i32", "scales": "*u8", "base": "*i32", "out": "*i32", "groups": "i32", "N": "i32"}
    expects = dict.fromkeys((90, 100, 120), ("prmt.b32", r"ld\.global.*\.v4\.b32", r"st\.global.*\.v4\.b32"))
    constants = {"GROUPS": _GROUPS_A_PROGRAM, "INTERPRET": False}
    yield Case("fp8 weight", _fp8_weight_kernel, types, constants, expects)
    yield Case("fp8 weight, odd sizes", _fp8_weight_kernel, types, constants, expects, odd=("groups", "N"))
