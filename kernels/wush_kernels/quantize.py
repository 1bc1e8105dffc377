"""Block transform and quantization of a tensor in one pass: `Q(T x)` as packed codes and scales.

Layouts: x `(..., I)` with contiguous rows, in float32, bfloat16 or float16; the transform `(N, G, G)` or `(G, G)` in
any of these, or None. Packed codes `(..., I * bits / 8)` uint8, two 4-bit codes a byte with the lower index in the low
nibble; scales `(..., N)`.

The transform is multiplied in float32 sums of exact products, in another order than PyTorch's: a code can differ
where the result is within a rounding error of a tie. Without a transform codes and scales equal the reference.
A group with NaN or infinity gets a NaN scale: its row of a product is NaN, and no other row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import launch
from wush_kernels.groups import group_codes, load_transformed, store_group_scales
from wush_kernels.offline import Case
from wush_kernels.spec import ELEMENTS, INT4_RMS_FACTOR, FormatSpec
from wush_kernels.support import operator


@triton.jit
def _kernel(
    x, transform, codes, scales, M, I, stride_x, inverse_g, scale_factor,
    FORMAT: tl.constexpr, RULE: tl.constexpr, ELEMENT: tl.constexpr, G: tl.constexpr, TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCKS
    x_brg = load_transformed(x, transform, row, block * G, M, I, stride_x, G, ROWS, BLOCKS, TRANSFORM, INTERPRET)
    code_brg, scale_bits = group_codes(x_brg, inverse_g, scale_factor, FORMAT, RULE, ELEMENT, G, INTERPRET)

    groups = I // G
    store_group_scales(scale_bits, scales, row, block, M, groups, ROWS, BLOCKS)
    BYTES: tl.constexpr = G if ELEMENT == "e4m3" else G // 2
    if ELEMENT == "e4m3":
        byte_brg = code_brg
    else:
        low, high = tl.split(tl.reshape(code_brg, (BLOCKS, ROWS, G // 2, 2)))
        byte_brg = low | (high << 4)
    tile = tl.reshape(tl.permute(byte_brg.to(tl.uint8), (1, 0, 2)), (ROWS, BLOCKS * BYTES))
    rows = row + tl.arange(0, ROWS)
    columns = block * BYTES + tl.arange(0, BLOCKS * BYTES)
    inside = (rows < M)[:, None] & (columns < groups * BYTES)[None, :]
    tl.store(codes + rows.to(tl.int64)[:, None] * (groups * BYTES) + columns[None, :], tile, inside)


def quantize(
    x: Tensor, fmt: FormatSpec, transform: Tensor | None = None, global_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`Q(T x)`: packed codes `(..., I * bits / 8)` uint8 and scales `(..., N)` in the format's scale type.

    Raises `ValueError` or `TypeError` for a tensor that does not fit, `RuntimeError` where kernels cannot run.
    """
    launch.check_input(x, fmt, transform, "quantize")
    g = fmt.global_scale if global_scale is None else global_scale
    rows = launch.as_rows(x)
    packed, scales = _quantize(rows, transform, fmt.name, fmt.scale_rule, fmt.group_size, g)
    leading = x.shape[:-1]
    return packed.reshape(*leading, packed.shape[-1]), scales.view(fmt.scale_dtype).reshape(*leading, scales.shape[-1])


@operator("wush::quantize")
def _quantize(
    x: Tensor, transform: Tensor | None, name: str, rule: str, group_size: int, global_scale: float
) -> tuple[Tensor, Tensor]:
    packed, scales = _empty(x, transform, name, rule, group_size, global_scale)
    if x.numel():
        _kernel[launch.grid(*x.shape)](
            x, transform, packed, scales, *x.shape, x.stride(0), 1 / global_scale,
            launch.scale_factor(name, rule, global_scale), FORMAT=name, RULE=rule, ELEMENT=ELEMENTS[name, rule],
            enable_fp_fusion=False, **launch.constants(len(x), group_size, transform),
        )  # fmt: skip
    return packed, scales


@_quantize.register_fake
def _empty(
    x: Tensor, transform: Tensor | None, name: str, rule: str, group_size: int, global_scale: float
) -> tuple[Tensor, Tensor]:
    rows, features = x.shape
    packed = x.new_empty(rows, features if name == "mxfp8" else features // 2, dtype=torch.uint8)
    return packed, x.new_empty(rows, features // group_size, dtype=torch.int16 if name == "int4" else torch.uint8)


def reference_quantize(
    x: Tensor, fmt: FormatSpec, transform: Tensor | None = None, global_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize` in plain PyTorch, by comparing with every number of the grid: codes `(..., I)` unpacked, and scales.

    For finite inputs of normal float32 magnitude.
    """
    g = fmt.global_scale if global_scale is None else global_scale
    x_ng = x.float().unflatten(-1, (-1, fmt.group_size))
    if transform is not None:
        x_ng = torch.einsum("...ng,nhg->...nh", x_ng, transform.float().expand(x_ng.shape[-2], -1, -1))
    amax, rms = x_ng.abs().amax(-1), x_ng.double().square().mean(-1).sqrt()
    if fmt.name in ("mxfp4", "mxfp8"):
        offset = {"paper": 0, "ocp": 2}[fmt.scale_rule] if fmt.name == "mxfp4" else 8
        exponent = torch.frexp(amax).exponent - 1 - offset
        scales = torch.exp2(exponent.masked_fill(amax == 0, -127).float()).to(torch.float8_e8m0fnu)
    elif fmt.name == "nvfp4":
        scales = (amax * (1 / (6 * g))).clamp(max=448).to(torch.float8_e4m3fn)
    else:
        wide = {"absmax": amax * (1 / 7), "midrise": amax / 8, "rms": (INT4_RMS_FACTOR * rms).float()}[fmt.scale_rule]
        scales = wide.bfloat16()
        if fmt.scale_rule == "midrise":  # up
            scales = torch.where(scales.float() < wide, (scales.view(torch.int16) + 1).view(torch.bfloat16), scales)
    numerator = torch.full_like(amax, 1 / g if fmt.name == "nvfp4" else 1.0)
    factor = (numerator / scales.float()).masked_fill(scales.float() == 0, 0).unsqueeze(-1)
    units = (x_ng if fmt.name == "nvfp4" else x_ng * (1 / g)) * factor
    return _nearest(units, ELEMENTS[fmt.name, fmt.scale_rule]).flatten(-2), scales


def _nearest(units: Tensor, element: str) -> Tensor:
    """Codes of the nearest grid values; ties to the even code, or for cells of integers to the upper one."""
    if element == "int4_midpoint":
        return (units.floor().clamp(-8, 7) + 8).to(torch.uint8)
    if element == "int4_symmetric":
        return (units.round().clamp(-7, 7) + 8).to(torch.uint8)
    codes = torch.arange(8 if element == "e2m1" else 127, device=units.device, dtype=torch.uint8)
    if element == "e2m1":
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=units.device)
    else:
        grid = codes.view(torch.float8_e4m3fn).float()
    distance = (units.abs().double().unsqueeze(-1) - grid.double()).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    code = (nearest.int() * (2 + (codes % 2 == 0).int())).argmax(-1).to(torch.uint8)
    return code | torch.signbit(units).to(torch.uint8) << (3 if element == "e2m1" else 7)


def offline_cases() -> Iterator[Case]:
    """Each format, and each kind of transform."""
    types = launch.offline_types(codes="*u8", scales="*u8", scale_factor="fp32")
    for name, rule, transform in (
        ("mxfp4", "paper", "block"),
        ("mxfp4", "paper", "shared"),
        ("mxfp4", "ocp", "none"),
        ("nvfp4", "fixed", "block"),
        ("int4", "rms", "block"),
        ("mxfp8", "ocp", "none"),
    ):
        constants = launch.offline_constants(name, transform)
        constants |= {"FORMAT": name, "RULE": rule, "ELEMENT": ELEMENTS[name, rule]}
        own = {key: kind for key, kind in types.items() if key not in constants}
        expects = dict.fromkeys((90, 100, 120), launch.offline_products(transform))
        yield Case(f"{name} {rule}, transform {transform}", _kernel, own, constants, expects)
