"""Packed codes and scales back to numbers: in natural order for reading, in operand order for a 16-bit matmul.

Layouts: packed `(..., I * bits / 8)` uint8, two 4-bit codes a byte with the lower index in the low nibble; scales
`(..., N)` in the format's scale type. Natural order is `(..., I)`; operand order stores each group's even columns
first, then its odd ones, since nibbles decode to even and odd columns apart. Both are limited by memory: a program
takes whole groups of a flat tensor, 16 bytes a thread. A NaN scale makes its group NaN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import numerics as nm
from wush_kernels.offline import Case
from wush_kernels.spec import FLOATS, FormatSpec, element_of
from wush_kernels.support import INTERPRETED, check_tensor, on_device, require_support

_ELEMENTS_A_PROGRAM = 4096
SCALE_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}


@triton.jit
def e4m3_value(byte):
    """Float32 numbers of E4M3 bytes (int32), NaN among them: moved into float32's fields and scaled by `2^120`."""
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def scale_value(bits, SCALE: tl.constexpr):
    """Float32 scales of their stored bits (int32): `e8m0`, `e4m3` or `bf16`. NaN stays NaN."""
    if SCALE == "e8m0":
        return tl.where(bits == 255, float("nan"), nm.power_of_two(bits - 127))
    elif SCALE == "e4m3":
        return e4m3_value(bits)
    else:
        tl.static_assert(SCALE == "bf16", "an unknown scale type")
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def element_value(code, ELEMENT: tl.constexpr):
    """Float32 elements of codes (int32); unlike `numerics.from_code` it knows E4M3's NaN when interpreted, too."""
    if ELEMENT == "e4m3":
        return e4m3_value(code)
    else:
        return nm.from_code(code, ELEMENT)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Float32 to `dtype`, nearest even. Interpreted casts to bfloat16 truncate: there the bits are rounded by hand."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, high, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _dequantize_kernel(
    packed, scales, out, groups, global_scale,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr,
    OPERAND_ORDER: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`GROUPS` groups a program, of a flat tensor of `groups`."""
    BYTES: tl.constexpr = G if ELEMENT == "e4m3" else G // 2
    first = tl.program_id(0).to(tl.int64) * GROUPS
    remaining = tl.minimum(groups - first, GROUPS).to(tl.int32)
    byte = tl.arange(0, GROUPS * BYTES)
    code = tl.load(packed + first * BYTES + byte, mask=byte < remaining * BYTES, other=0).to(tl.int32)
    code = tl.reshape(code, (GROUPS, BYTES))

    group = tl.arange(0, GROUPS)
    scale_bits = tl.load(scales + first + group, mask=group < remaining, other=0).to(tl.int32)
    factor = (scale_value(scale_bits, SCALE) * global_scale)[:, None]

    if ELEMENT == "e4m3":
        value = element_value(code, ELEMENT) * factor
        if OPERAND_ORDER:
            value = tl.permute(tl.reshape(value, (GROUPS, G // 2, 2)), (0, 2, 1))
    else:
        value = tl.join(element_value(code & 15, ELEMENT) * factor, element_value(code >> 4, ELEMENT) * factor)
        if OPERAND_ORDER:
            value = tl.permute(value, (0, 2, 1))
    value = tl.reshape(rounded(value, out.dtype.element_ty, INTERPRET), (GROUPS * G,))
    column = tl.arange(0, GROUPS * G)
    tl.store(out + first * G + column, value, mask=column < remaining * G)


def dequantize(
    packed: Tensor,
    scales: Tensor,
    fmt: FormatSpec,
    global_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values `element * (scale * global_scale)`, `(..., I)` in natural order.

    Computed in float32, bit-equal to `Format.dequantize`, and rounded to `dtype` (float32, bfloat16 or float16).
    Raises `ValueError` or `TypeError` for a tensor that does not fit, `RuntimeError` where kernels cannot run.
    """
    _check(packed, scales, fmt, "dequantize")
    if dtype not in FLOATS:
        raise TypeError(f"dequantize: dtype {dtype}, where float32, bfloat16 or float16 is needed")
    g = fmt.global_scale if global_scale is None else global_scale
    return torch.ops.wush.dequantize(packed, _bits(scales), *_kinds(fmt), fmt.group_size, g, dtype, False)


def half_weight(packed: Tensor, scales: Tensor, fmt: FormatSpec) -> Tensor:
    """`element * scale` in bfloat16, `(..., I)` in operand order.

    Exact for MXFP4 and NVFP4, and for MXFP8 where it is not under bfloat16's smallest normal number, `2^-126`. Raises
    `ValueError` for INT4, whose products with a bfloat16 scale are not bfloat16 numbers.
    """
    _check(packed, scales, fmt, "half_weight")
    if fmt.name == "int4":
        raise ValueError("half_weight: int4 values are not exact in bfloat16; use dequantize with dtype=torch.float32")
    kinds = _kinds(fmt)
    return torch.ops.wush.dequantize(packed, _bits(scales), *kinds, fmt.group_size, 1.0, torch.bfloat16, True)


def reference_dequantize(
    packed: Tensor,
    scales: Tensor,
    fmt: FormatSpec,
    global_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize` in plain PyTorch."""
    g = fmt.global_scale if global_scale is None else global_scale
    elements = _reference_elements(packed, element_of(fmt)).unflatten(-1, (-1, fmt.group_size))
    return (elements * (scales.float() * g).unsqueeze(-1)).flatten(-2).to(dtype)


def reference_half_weight(packed: Tensor, scales: Tensor, fmt: FormatSpec) -> Tensor:
    """`half_weight` in plain PyTorch."""
    return operand_order(reference_dequantize(packed, scales, fmt, 1.0, torch.bfloat16), fmt.group_size)


def operand_order(x: Tensor, group_size: int) -> Tensor:
    """Of each group of the last dimension the even columns first, then the odd ones; any dtype."""
    groups = x.unflatten(-1, (-1, group_size // 2, 2))
    return groups.transpose(-1, -2).flatten(-3)


def natural_order(x: Tensor, group_size: int) -> Tensor:
    """The inverse of `operand_order`."""
    groups = x.unflatten(-1, (-1, 2, group_size // 2))
    return groups.transpose(-1, -2).flatten(-3)


def reference_unpack(packed: Tensor) -> Tensor:
    """4-bit codes `(..., I)` of bytes `(..., I / 2)`, the lower index in the low nibble."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def reference_e2m1(codes: Tensor) -> Tensor:
    """E2M1 values, float32, of codes 0..15."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat([grid, -grid])[codes.int()]


def _reference_elements(packed: Tensor, element: str) -> Tensor:
    if element == "e4m3":
        return packed.view(torch.float8_e4m3fn).float()
    codes = reference_unpack(packed)
    if element == "e2m1":
        return reference_e2m1(codes)
    return codes.float() - (7.5 if element == "int4_midpoint" else 8.0)


@torch.library.custom_op("wush::dequantize", mutates_args=())
@on_device
def _dequantize(
    packed: Tensor,
    scale_bits: Tensor,
    element: str,
    scale: str,
    group_size: int,
    global_scale: float,
    dtype: torch.dtype,
    in_operand_order: bool,
) -> Tensor:
    out = _values_like(packed, scale_bits, element, scale, group_size, global_scale, dtype, in_operand_order)
    groups = scale_bits.numel()
    if groups:
        size = _ELEMENTS_A_PROGRAM // group_size
        _dequantize_kernel[(triton.cdiv(groups, size),)](
            packed, scale_bits, out, groups, global_scale,
            ELEMENT=element, SCALE=scale, G=group_size, GROUPS=size, OPERAND_ORDER=in_operand_order,
            INTERPRET=INTERPRETED, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_dequantize.register_fake
def _values_like(
    packed: Tensor,
    scale_bits: Tensor,
    element: str,
    scale: str,
    group_size: int,
    global_scale: float,
    dtype: torch.dtype,
    in_operand_order: bool,
) -> Tensor:
    return packed.new_empty((*scale_bits.shape[:-1], scale_bits.shape[-1] * group_size), dtype=dtype)


def _kinds(fmt: FormatSpec) -> tuple[str, str]:
    return element_of(fmt), SCALE_KINDS[fmt.scale_dtype]


def _bits(scales: Tensor) -> Tensor:
    """Scales as unsigned integers of their size."""
    return scales.view(torch.uint16 if scales.dtype == torch.bfloat16 else torch.uint8)


def _check(packed: Tensor, scales: Tensor, fmt: FormatSpec, kernel: str) -> None:
    require_support(packed, kernel)
    size = fmt.group_size if element_of(fmt) == "e4m3" else fmt.group_size // 2
    if not packed.ndim or packed.shape[-1] % size:
        raise ValueError(
            f"{kernel}: packed {tuple(packed.shape)}: its last dimension is no multiple of {size}, "
            f"the bytes of a group of {fmt.group_size} of {fmt.name}"
        )
    check_tensor(packed, f"{kernel}: packed", (torch.uint8,), tuple(packed.shape), packed.device)
    shape = (*packed.shape[:-1], packed.shape[-1] // size)
    check_tensor(scales, f"{kernel}: scales", (fmt.scale_dtype,), shape, packed.device)


def offline_cases() -> Iterator[Case]:
    """Every format in natural order, and the 16-bit operands that matmuls use."""
    stores = dict.fromkeys((90, 100, 120), (r"ld\.global.*\.v4\.b32", r"st\.global.*\.v4\.b32"))
    for element, scale, size, dtype, ordered in (
        ("e2m1", "e8m0", 32, "fp32", False),
        ("e2m1", "e4m3", 16, "fp32", False),
        ("int4_midpoint", "bf16", 32, "fp32", False),
        ("e4m3", "e8m0", 32, "fp32", False),
        ("e2m1", "e8m0", 32, "bf16", True),
        ("e2m1", "e4m3", 16, "bf16", True),
    ):
        types = {"packed": "*u8", "scales": "*u16" if scale == "bf16" else "*u8", "out": f"*{dtype}"}
        yield Case(
            f"{element} {scale} to {dtype}{' in operand order' if ordered else ''}",
            _dequantize_kernel,
            types | {"groups": "i32", "global_scale": "fp32"},
            {
                "ELEMENT": element,
                "SCALE": scale,
                "G": size,
                "GROUPS": _ELEMENTS_A_PROGRAM // size,
                "OPERAND_ORDER": ordered,
                "INTERPRET": False,
            },
            stores,
        )
