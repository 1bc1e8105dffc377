"""Groups of a tile, from loading and transforming them to codes and values: device functions of the quantizing kernels.

Tiles are `(BLOCKS, ROWS, G)` float32: `BLOCKS` groups side by side of `ROWS` rows. Bit formulas are those of
`wush_kernels.numerics`; a group with NaN or infinity gets a NaN scale, or NaN values, and touches no other.
"""

import triton
import triton.language as tl

from wush_kernels import numerics as nm
from wush_kernels.spec import INT4_RMS_FACTOR

BLOCK_COLUMNS = 128  # columns of a program's tile
_RMS_FACTOR: tl.constexpr = tl.constexpr(INT4_RMS_FACTOR)


@triton.jit
def load_transformed(
    x, transform, row, column, M, I, stride_x, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    TRANSFORM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`T x` of a tile as float32 `(BLOCKS, ROWS, G)`; zero outside the tensor."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, BLOCKS * G)
    inside = (rows < M)[:, None] & (columns < I)[None, :]
    tile = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)
    x_brg = tl.permute(tl.reshape(tile, (ROWS, BLOCKS, G)), (1, 0, 2))
    if TRANSFORM == "none":
        return x_brg.to(tl.float32)
    else:
        t_bhg = _load_transform(transform, column // G, I, G, BLOCKS, TRANSFORM)
        if (
            INTERPRET or x_brg.dtype != t_bhg.dtype
        ):  # interpreted bfloat16 products are wrong; in float32 they are exact
            x_brg, t_bhg = x_brg.to(tl.float32), t_bhg.to(tl.float32)
        return tl.dot(x_brg, tl.permute(t_bhg, (0, 2, 1)), input_precision="ieee")


@triton.jit
def _load_transform(transform, block, I, G: tl.constexpr, BLOCKS: tl.constexpr, TRANSFORM: tl.constexpr):
    """The blocks `(BLOCKS, G, G)` of a transform from `block` on."""
    g = tl.arange(0, G)
    if TRANSFORM == "shared":
        one = tl.load(transform + g[:, None] * G + g[None, :])
        return tl.broadcast_to(one[None, :, :], (BLOCKS, G, G))
    else:
        blocks = block + tl.arange(0, BLOCKS)
        offsets = blocks[:, None, None] * (G * G) + g[None, :, None] * G + g[None, None, :]
        return tl.load(transform + offsets, mask=(blocks * G < I)[:, None, None], other=0.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitudes(x_brg):
    """The bits (int32) of each group's largest magnitude, `(BLOCKS, ROWS)`; of NaN where the group has one."""
    return tl.reduce(tl.abs(x_brg), 2, _larger).to(tl.int32, bitcast=True)


@triton.jit
def mxfp4_exponent(magnitude, RULE: tl.constexpr):
    """The exponent of a group's scale, of the bits of its largest magnitude."""
    if RULE == "paper":
        return tl.minimum((magnitude >> 23) - 127, 126)
    else:
        tl.static_assert(RULE == "ocp", "an unknown scale rule")
        return tl.maximum((magnitude >> 23) - 129, -127)


@triton.jit
def mxfp4_units(x_brg, exponent, shift, finite, inverse_g, RULE: tl.constexpr):
    """`x / g * 2^-shift`, NaN where its group is not finite, and the threshold of the group's unit.

    One rounding, as the reference's: both scale by powers of two otherwise.
    """
    factor = tl.where(finite, inverse_g * nm.power_of_two(-shift), float("nan"))
    relative = tl.minimum(tl.maximum(exponent - shift, -100), 100)
    x_brg = x_brg * factor[:, :, None]
    if RULE == "ocp":  # values past 6 units clip
        bound = (6.0 * nm.power_of_two(relative))[:, :, None]
        x_brg = tl.minimum(tl.maximum(x_brg, -bound, tl.PropagateNan.ALL), bound, tl.PropagateNan.ALL)
    return x_brg, nm.e2m1_threshold(relative)[:, :, None]


@triton.jit
def _mxfp8_exponent(magnitude):
    return tl.maximum((magnitude >> 23) - 135, -127)


@triton.jit
def _nvfp4_scale(magnitude, scale_factor, INTERPRET: tl.constexpr):
    return nm.nearest_e4m3(tl.minimum(magnitude.to(tl.float32, bitcast=True) * scale_factor, 448.0), INTERPRET)


@triton.jit
def _nvfp4_units(x_brg, magnitude, inverse_g, scale_factor, INTERPRET: tl.constexpr):
    """`x * (1/g / s)`, 0 where s = 0, and the scales `(BLOCKS, ROWS)`, float8e4nv."""
    scale = _nvfp4_scale(magnitude, scale_factor, INTERPRET)
    first, numerator = nvfp4_factors(inverse_g)
    return (x_brg * first) * _e4m3_quotient(numerator, scale.to(tl.float32), INTERPRET)[:, :, None], scale


@triton.jit
def nvfp4_factors(inverse_g):
    """What x is multiplied by, and what is divided by its scale: 1 and `1/g`, unless the quotient could overflow."""
    far = inverse_g > 3.32306998946229e35  # 2^118
    return tl.where(far, inverse_g, 1.0), tl.where(far, 1.0, inverse_g)


@triton.jit
def _e4m3_quotient(numerator, scale, INTERPRET: tl.constexpr):
    """`quotient` of E4M3 numbers, without a division: of the correctly rounded `1 / s` (a test tries them all).

    The remainder of a quotient that is within a unit of the last place is exact, and so the last step rounds once.
    """
    if INTERPRET:  # without a fused multiplication the steps below round twice
        return quotient(numerator, scale)
    else:
        guess = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], tl.float32, True, 1)
        inverse = tl.fma(guess, tl.fma(-scale, guess, 1.0), guess)
        near = numerator * inverse
        return tl.where(scale == 0.0, 0.0, tl.fma(tl.fma(-scale, near, numerator), inverse, near))


@triton.jit
def quotient(numerator, scale):
    """`numerator / s`, correctly rounded, at most float32's largest number; 0 where s = 0."""
    zero = scale == 0.0
    limited = tl.minimum(tl.div_rn(numerator, tl.where(zero, 1.0, scale)), 3.4028234663852886e38)
    return tl.where(zero, 0.0, limited)


@triton.jit
def _int4_scale(x_brg, magnitude, scale_factor, G: tl.constexpr, RULE: tl.constexpr):
    """The BF16 bits (int32) of each group's scale, and its value."""
    if RULE == "rms":
        mean = tl.sum(x_brg.to(tl.float64) * x_brg.to(tl.float64), 2) / G
        wide = tl.minimum(tl.sqrt(mean) * _RMS_FACTOR, 4e37).to(tl.float32)
    else:
        wide = magnitude.to(tl.float32, bitcast=True) * scale_factor
    bits = wide.to(tl.int32, bitcast=True)
    if RULE == "midrise":
        bits = (bits + 0xFFFF) >> 16  # up, so that nothing clips
    else:
        tl.static_assert(RULE == "absmax" or RULE == "rms", "an unknown scale rule")
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # nearest even
    return bits, (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def group_scales(
    x_brg, scale_factor, FORMAT: tl.constexpr, RULE: tl.constexpr, G: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """Scales `(BLOCKS, ROWS)`, as float32 and as stored bits (int32), NaN for groups that are not finite."""
    magnitude = magnitudes(x_brg)
    finite = magnitude < 0x7F800000
    if FORMAT == "int4":
        bits, scale = _int4_scale(x_brg, magnitude, scale_factor, G, RULE)
        return scale, tl.where(finite, bits, 0x7FC0)
    elif FORMAT == "nvfp4":
        scale = _nvfp4_scale(magnitude, scale_factor, INTERPRET)
        return scale.to(tl.float32), tl.where(finite, scale.to(tl.uint8, bitcast=True).to(tl.int32), 0x7F)
    else:
        exponent = _mxfp8_exponent(magnitude) if FORMAT == "mxfp8" else mxfp4_exponent(magnitude, RULE)
        return nm.power_of_two(exponent), tl.where(finite, exponent + 127, 255)


@triton.jit
def group_codes(
    x_brg, inverse_g, scale_factor,
    FORMAT: tl.constexpr, RULE: tl.constexpr, ELEMENT: tl.constexpr, G: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes `(BLOCKS, ROWS, G)` and the bits of the scales `(BLOCKS, ROWS)`, both int32."""
    magnitude = magnitudes(x_brg)
    finite = magnitude < 0x7F800000
    if FORMAT == "mxfp4":
        exponent = mxfp4_exponent(magnitude, RULE)
        far = tl.where(exponent > 64, 64, tl.where(exponent < -64, -64, 0))
        units, threshold = mxfp4_units(x_brg, exponent, far, finite, inverse_g, RULE)
        return nm.e2m1_code_at(units, threshold), tl.where(finite, exponent + 127, 255)
    elif FORMAT == "nvfp4":
        units, scale = _nvfp4_units(x_brg, magnitude, inverse_g, scale_factor, INTERPRET)
        code = scale.to(tl.uint8, bitcast=True).to(tl.int32)
        return nm.e2m1_code_saturated(units), tl.where(finite, code, 0x7F)
    elif FORMAT == "mxfp8":
        exponent = _mxfp8_exponent(magnitude)
        element = nm.nearest_e4m3(x_brg * nm.power_of_two(-exponent)[:, :, None], INTERPRET)
        return element.to(tl.uint8, bitcast=True).to(tl.int32), tl.where(finite, exponent + 127, 255)
    else:
        tl.static_assert(FORMAT == "int4", "an unknown format")
        bits, scale = _int4_scale(x_brg, magnitude, scale_factor, G, RULE)
        units = x_brg * quotient(1.0, scale)[:, :, None]
        return nm.to_code(nm.snap(units, ELEMENT), ELEMENT), tl.where(finite, bits, 0x7FC0)


@triton.jit
def group_values(
    x_brg, inverse_g, scale_factor, shift, FORMAT: tl.constexpr, RULE: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """`Q(x) / g * shift` for a power of two, float32 `(BLOCKS, ROWS, G)`; a group that is not finite is NaN."""
    magnitude = magnitudes(x_brg)
    finite = magnitude < 0x7F800000
    if FORMAT == "mxfp4":
        exponent = mxfp4_exponent(magnitude, RULE)
        far = tl.where(exponent > 64, 64, tl.where(exponent < -64, -64, 0))
        units, threshold = mxfp4_units(x_brg, exponent, far, finite, inverse_g, RULE)
        return nm.round_e2m1_at(units, threshold) * (nm.power_of_two(far) * shift)[:, :, None]
    elif FORMAT == "nvfp4":
        units, scale = _nvfp4_units(x_brg, magnitude, inverse_g, scale_factor, INTERPRET)
        element = nm.round_e2m1_at(nm.clamp(units, 6.0), nm.e2m1_threshold(0))
        return element * tl.where(finite, scale.to(tl.float32) * shift, float("nan"))[:, :, None]
    else:
        tl.static_assert(FORMAT == "mxfp8", "a format whose values are not exact in 16 bits")
        exponent = _mxfp8_exponent(magnitude)
        element = nm.nearest_e4m3(x_brg * nm.power_of_two(-exponent)[:, :, None], INTERPRET).to(tl.float32)
        return element * tl.where(finite, nm.power_of_two(exponent) * shift, float("nan"))[:, :, None]


@triton.jit
def store_operand(
    value_brg, out, row, block, M, I, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Store a tile `(BLOCKS, ROWS, G)` in operand order."""
    halves = tl.permute(tl.reshape(value_brg.to(out.dtype.element_ty), (BLOCKS, ROWS, G // 2, 2)), (1, 0, 3, 2))
    tile = tl.reshape(halves, (ROWS, BLOCKS * G))
    rows, columns = row + tl.arange(0, ROWS), block * G + tl.arange(0, BLOCKS * G)
    inside = (rows < M)[:, None] & (columns < I)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * I + columns[None, :], tile, inside)


@triton.jit
def store_group_scales(bits, scales, row, block, M, groups, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Store the scales' bits `(BLOCKS, ROWS)` to `(M, groups)`."""
    rows, blocks = row + tl.arange(0, ROWS), block + tl.arange(0, BLOCKS)
    at = scales + rows.to(tl.int64)[None, :] * groups + blocks[:, None]
    tl.store(at, bits.to(scales.dtype.element_ty), (rows < M)[None, :] & (blocks < groups)[:, None])
