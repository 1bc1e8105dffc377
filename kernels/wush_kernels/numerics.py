"""Element arithmetic shared by the kernels: what `wush.formats` does to one number, as Triton device functions.

Every function is exact or rounds once, so that codes and scales equal the PyTorch reference bit for bit. Kernels that
use them must be launched with `enable_fp_fusion=False`: a multiplication fused into the rounding addition would skip
one of the reference's roundings.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent):
    """`2^exponent` in float32 for int32 exponents from -127 (a subnormal) to 127."""
    normal = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent < -126, 5.877471754111438e-39, normal)


@triton.jit
def copysign(magnitude, sign):
    """`|magnitude|` with the sign of `sign`, float32."""
    bits = (magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (sign.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def clamp(x, bound: tl.constexpr):
    """`x` limited to `[-bound, bound]`."""
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def round_to_spacing(x, lowest: tl.constexpr, mantissa_bits: tl.constexpr):
    """Nearest multiple, ties to even, of `2^(e - mantissa_bits)`, `2^e` the binade of x and at least `2^lowest`.

    Adding and subtracting `1.5 * 2^(e - mantissa_bits + 23)` rounds to that spacing. The sign of zero is kept.
    """
    binade = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 + lowest) << 23)
    magic = (binade + (((23 - mantissa_bits) << 23) + 0x00400000)).to(tl.float32, bitcast=True)
    return copysign((x + magic) - magic, x)


@triton.jit
def snap_e2m1(x):
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign, ties to the even code; past 6 saturates."""
    return round_to_spacing(clamp(x, 6.0), 0, 1)


@triton.jit
def e2m1_threshold(exponent):
    """What `round_e2m1_at` and `e2m1_code_at` take for the unit `2^exponent` (int32, -100 to 100)."""
    return ((exponent + (127 + 22)) << 23) + 0x00400000


@triton.jit
def _e2m1_magic(x, threshold):
    """The bits of `1.5 * 2^(e + 22)`, `2^e` the binade of x and at least the unit."""
    return tl.maximum((x.to(tl.int32, bitcast=True) & 0x7F800000) + ((22 << 23) + 0x00400000), threshold)


@triton.jit
def round_e2m1_at(x, threshold):
    """Nearest multiple of E2M1 of a unit, ties to the even code, for `|x|` of at most 6 units; zero loses its sign."""
    magic = _e2m1_magic(x, threshold).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def e2m1_code_at(x, threshold):
    """The code of the nearest multiple of E2M1 of a unit, ties to the even code, for `|x|` of at most 6 units.

    An int32 of which only the low 4 bits are defined.
    """
    return _e2m1_code(x, tl.abs(x), x, threshold)


@triton.jit
def e2m1_code_saturated(x):
    """`e2m1_code_at` of the unit 1 for any x; past 6 saturates."""
    magnitude = tl.minimum(tl.abs(x), 6.0)
    return _e2m1_code(magnitude, magnitude, x, e2m1_threshold(0))


@triton.jit
def _e2m1_code(binade, magnitude, sign, threshold):
    """`magnitude + magic` holds the rounded mantissa as an integer; each binade above the unit's is two codes more."""
    magic = _e2m1_magic(binade, threshold).to(tl.float32, bitcast=True)
    steps = (magnitude + magic).to(tl.int32, bitcast=True) - threshold
    code = steps + (steps >> 22)
    return code | ((sign.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def snap_e4m3(x):
    """Nearest E4M3 number, ties to even; past 448 saturates."""
    return round_to_spacing(clamp(x, 448.0), -6, 3)


@triton.jit
def snap_int4_midpoint(x):
    """The midpoint `k + 1/2` of the cell `[k, k + 1)` that holds x, `k = -8..7`."""
    limited = tl.minimum(tl.maximum(x, -8.0), 7.0)
    whole = limited.to(tl.int32).to(tl.float32)  # towards zero; a floor in hardware takes subnormals for zeros
    return tl.where(limited < whole, whole - 0.5, whole + 0.5)


@triton.jit
def snap_int4_symmetric(x):
    """Nearest integer, ties to even, of -7..7."""
    limited = clamp(x, 7.0)
    return (limited + 12582912.0) - 12582912.0


@triton.jit
def e2m1_code(v):
    """Codes 0..15 (int32) of E2M1 grid values: scaled into float32's subnormals, their bits are the code."""
    bits = (v * 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    return ((bits >> 22) & 7) | ((bits >> 28) & 8)


@triton.jit
def e2m1_value(code):
    """E2M1 grid values, float32, of codes 0..15 (int32): the inverse of `e2m1_code`."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e4m3_code(v):
    """The byte (int32) of E4M3 grid values."""
    return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def nearest_e4m3(x, INTERPRET: tl.constexpr):
    """The nearest E4M3 number, float8e4nv, ties to even; past 448 saturates."""
    if INTERPRET:  # whose conversion does not round to nearest
        x = snap_e4m3(x)
    return x.to(tl.float8e4nv)


@triton.jit
def snap(x, ELEMENT: tl.constexpr):
    """Nearest grid value of the element type `e2m1`, `e4m3`, `int4_midpoint` or `int4_symmetric`."""
    if ELEMENT == "e2m1":
        return snap_e2m1(x)
    elif ELEMENT == "e4m3":
        return snap_e4m3(x)
    elif ELEMENT == "int4_midpoint":
        return snap_int4_midpoint(x)
    else:
        tl.static_assert(ELEMENT == "int4_symmetric", "an unknown element type")
        return snap_int4_symmetric(x)


@triton.jit
def to_code(v, ELEMENT: tl.constexpr):
    """Codes (int32) of grid values of an element type."""
    if ELEMENT == "e2m1":
        return e2m1_code(v)
    elif ELEMENT == "e4m3":
        return e4m3_code(v)
    elif ELEMENT == "int4_midpoint":
        return (v + 7.5).to(tl.int32)
    else:
        return (v + 8.0).to(tl.int32)


@triton.jit
def from_code(code, ELEMENT: tl.constexpr):
    """Grid values, float32, of codes (int32) of an element type."""
    if ELEMENT == "e2m1":
        return e2m1_value(code)
    elif ELEMENT == "e4m3":
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif ELEMENT == "int4_midpoint":
        return code.to(tl.float32) - 7.5
    else:
        return code.to(tl.float32) - 8.0
