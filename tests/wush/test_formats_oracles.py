"""Elements and scales against exhaustive exact arithmetic, and whole groups against independent implementations."""

import math
from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import wush
from tests.wush.test_formats import FLOAT32_MAX, FORMATS, wide_values
from wush.elements import E2M1, E4M3, INT4_MIDPOINT, INT4_SYMMETRIC, Element
from wush.formats import Format, Mxfp4, Nvfp4, Quantized


def minifloat(code: int, mantissa_bits: int, bias: int) -> Fraction:
    """The value of a sign-less code of a binary minifloat with subnormals, by its definition."""
    exponent, mantissa = divmod(code, 2**mantissa_bits)
    fraction = Fraction(mantissa, 2**mantissa_bits)
    return fraction * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + fraction) * Fraction(2) ** (exponent - bias)


# The magnitudes of the codes in order; of E4M3 code 127 is NaN.
GRIDS = {
    E2M1: [minifloat(code, mantissa_bits=1, bias=1) for code in range(8)],
    E4M3: [minifloat(code, mantissa_bits=3, bias=7) for code in range(127)],
}
MINIFLOATS = [pytest.param(element, grid, id=element.name) for element, grid in GRIDS.items()]
MX_FORMATS = [pytest.param(wush.MXFP4, 0, id="paper"), pytest.param(Mxfp4("ocp"), 2, id="ocp"), (wush.MXFP8, 8)]


def nearest(grid: list[Fraction], x: float | Fraction) -> int:
    """The sign-less code of the nearest magnitude, ties to the even code, the last one for all beyond it."""
    magnitude = abs(Fraction(x))
    above = min(bisect_left(grid, magnitude), len(grid) - 1)
    return min((max(above - 1, 0), above), key=lambda code: (abs(grid[code] - magnitude), code % 2))


def signed_code(element: Element, x: float) -> int:
    return nearest(GRIDS[element], x) | (math.copysign(1, x) < 0) << (element.bits - 1)


def neighbourhoods(points: list[Fraction]) -> Tensor:
    """The three float32 to each side of every point and of the ends of float32, with both signs."""
    ends = [0.0, 2.0**-149, 2.0**-126 - 2.0**-149, 2.0**-126, 2.0**-64, 2.0**64, 2.0**126, 2.0**127, FLOAT32_MAX]
    bits = torch.tensor([*map(float, points), *ends]).view(torch.int32)
    bits = (bits[:, None] + torch.arange(-3, 4, dtype=torch.int32)).clamp(0, 0x7F7FFFFF).flatten()
    x = bits.view(torch.float32)
    return torch.cat([x, -x])


def ties_and_grid(grid: list[Fraction]) -> Tensor:
    return neighbourhoods([*grid, *((a + b) / 2 for a, b in pairwise(grid))])


def random_floats(generator: torch.Generator, count: int = 200_000) -> Tensor:
    """Finite float32 with uniformly random bits: every binade, both signs, subnormals."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    return x[x.isfinite()]


def codes_of(element: Element, x: Tensor) -> Tensor:
    return element.to_codes(element.snap(x.clone()))


# Codes and scales


@pytest.mark.parametrize(("element", "grid"), MINIFLOATS)
def test_every_minifloat_code_decodes_to_its_definition_and_back(element: Element, grid: list[Fraction]) -> None:
    magnitudes = torch.arange(len(grid), dtype=torch.uint8)
    for sign, codes in ((1, magnitudes), (-1, magnitudes + 2 ** (element.bits - 1))):
        values = element.from_codes(codes)
        assert [Fraction(v) for v in values.tolist()] == [sign * v for v in grid]
        assert torch.equal(values.signbit(), torch.full_like(values, sign < 0).bool())
        assert torch.equal(element.to_codes(values), codes)


def test_the_two_codes_of_e4m3_left_over_are_nan() -> None:
    assert E4M3.from_codes(torch.tensor([127, 255], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize(("element", "offset"), [(INT4_MIDPOINT, Fraction(1, 2)), (INT4_SYMMETRIC, 0)])
def test_every_int4_code_decodes_to_its_definition_and_back(element: Element, offset: Fraction) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = element.from_codes(codes)
    assert [Fraction(v) for v in values.tolist()] == [k + offset for k in range(-8, 8)]
    assert torch.equal(element.to_codes(values), codes)


def decoded_scales(fmt: Format, scales: Tensor) -> list[float]:
    """What a format makes of a group of ones with each of these scales and g = 1."""
    one = fmt.element.to_codes(torch.ones(fmt.group_size)).expand(len(scales), -1)
    return fmt.dequantize(Quantized(one, scales[:, None], 1.0))[:, 0].tolist()


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.MXFP8], ids=lambda fmt: fmt.name)
def test_every_e8m0_scale_decodes_to_its_power_of_two(fmt: Format) -> None:
    *decoded, last = decoded_scales(fmt, torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert [Fraction(v) for v in decoded] == [Fraction(2) ** (code - 127) for code in range(255)]
    assert math.isnan(last)


def test_every_e4m3_scale_decodes_to_its_definition() -> None:
    *decoded, last = decoded_scales(wush.NVFP4, torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert [Fraction(v) for v in decoded] == GRIDS[E4M3]
    assert math.isnan(last)


def test_every_bfloat16_scale_decodes_to_its_definition() -> None:
    bits = torch.arange(0x7F80, dtype=torch.int16)
    decoded = decoded_scales(wush.Int4("absmax"), bits.view(torch.bfloat16))
    assert [Fraction(v) for v in decoded] == [minifloat(b, mantissa_bits=7, bias=127) for b in bits.tolist()]


# Rounding


@pytest.mark.parametrize(("element", "grid"), MINIFLOATS)
def test_minifloats_round_to_nearest_even_around_every_tie_and_grid_point(
    element: Element, grid: list[Fraction]
) -> None:
    x = ties_and_grid(grid)
    assert codes_of(element, x).tolist() == [signed_code(element, v) for v in x.tolist()]


def test_int4_elements_round_exactly_around_every_cell_edge() -> None:
    x = neighbourhoods([Fraction(k, 2) for k in range(20)])
    floors = [max(-8, min(7, math.floor(Fraction(v)))) for v in x.tolist()]
    assert (codes_of(INT4_MIDPOINT, x).int() - 8).tolist() == floors
    rounded = [max(-7, min(7, round(Fraction(v)))) for v in x.tolist()]
    assert (codes_of(INT4_SYMMETRIC, x).int() - 8).tolist() == rounded


@pytest.mark.parametrize(("fmt", "offset"), MX_FORMATS)
def test_an_mx_scale_is_the_floor_of_log2_of_amax_in_every_binade(fmt: Format, offset: int) -> None:
    """`2^(floor(log2 amax) - offset)`, within the exponents of E8M0; `paper` ends at 2^126 to stay finite."""
    amax = neighbourhoods([Fraction(2) ** e for e in range(-149, 128)])
    amax = amax[amax > 0]
    scales = fmt.find_scales(amax[:, None].expand(-1, 32))[:, 0].float().tolist()
    top = 126 if fmt == wush.MXFP4 else 127
    exponents = [max(-127, min(top, math.frexp(v)[1] - 1 - offset)) for v in amax.tolist()]
    assert scales == [2.0**e for e in exponents]


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.element in GRIDS], ids=repr)
def test_group_codes_are_the_nearest_in_exact_arithmetic(fmt: Format, generator: torch.Generator) -> None:
    """Codes of `x / s / g`: exact where s is a power of two and g = 1; where g = 1/3, after the one float32 rounding
    of `3x`; else after three: of `1 / g`, of its quotient by s and of the product.
    """
    x = wide_values(generator, rows=24)
    g = {1 / 3: Fraction(1, 3), 0.1: Fraction(1, 10)}.get(fmt.global_scale, Fraction(1))
    slack = {Fraction(1): 0, Fraction(1, 3): Fraction(1, 2**24), Fraction(1, 10): Fraction(1, 2**22)}[g]
    quantized = fmt.quantize(x)
    scales = quantized.scales.float().repeat_interleave(fmt.group_size, -1).flatten().tolist()
    for v, scale, code in zip(x.flatten().tolist(), scales, quantized.codes.flatten().tolist(), strict=True):
        unit = Fraction(v) / Fraction(scale) / g if scale else Fraction(0)
        magnitudes = {nearest(GRIDS[fmt.element], unit * (1 + side * slack)) for side in (-1, 1)}
        assert code % 2 ** (fmt.element.bits - 1) in magnitudes
        assert code >> (fmt.element.bits - 1) == (math.copysign(1, v) < 0)


def exact_ties(g: Fraction) -> tuple[Tensor, Tensor, list[int]]:
    """Every `x = t s g` that is a BF16 number, s an E4M3 scale and t between two magnitudes, and its even code."""
    grid, found = GRIDS[E2M1], []
    for scale in GRIDS[E4M3][1:]:
        for low, (a, b) in enumerate(pairwise(grid)):
            x = (a + b) / 2 * scale * g
            if Fraction(torch.tensor(float(x)).bfloat16().item()) == x:
                found.append((float(x), float(scale), low + low % 2))
    x, scales, codes = zip(*found, strict=True)
    return torch.tensor(x), torch.tensor(scales), list(codes)


@pytest.mark.parametrize(("g", "wrong"), [(Fraction(1, 10), 0), (Fraction(1, 5), 0), (Fraction(1, 4), 42)], ids=str)
def test_exact_ties_of_nvfp4_go_to_the_even_code(g: Fraction, wrong: int) -> None:
    """All of them with g = 0.1 and `2^k / 10`; with any g those that do not are few, and as near as the even one."""
    x, scales, codes = exact_ties(g)
    assert len(x) > 400
    for sign in (1, -1):
        elements = wush.NVFP4.snap(sign * x[:, None, None], scales.to(torch.float8_e4m3fn)[:, None], float(g))
        found = [code & 7 for code in E2M1.to_codes(elements).flatten().tolist()]
        missed = [(own, even) for own, even in zip(found, codes, strict=True) if own != even]
        assert len(missed) == wrong
        assert all(abs(own - even) == 1 for own, even in missed)


def test_exact_ties_of_nvfp4_scales_go_to_the_even_code() -> None:
    grid = GRIDS[E4M3]
    for low, (a, b) in enumerate(pairwise(grid)):
        amax = (a + b) / 2 * Fraction(6, 10)
        if Fraction(torch.tensor(float(amax)).bfloat16().item()) == amax:
            scale = wush.NVFP4.find_scales(torch.full((1, 16), float(amax)))
            assert scale.view(torch.uint8).item() == low + low % 2


def test_nvfp4_scale_codes_are_the_nearest_in_exact_arithmetic(generator: torch.Generator) -> None:
    """The E4M3 code nearest to `amax * (1 / (6 g))`, after its two float32 roundings."""
    amax = torch.exp2(torch.rand(4000, generator=generator) * 22 - 12)
    codes = wush.NVFP4.find_scales(amax[:, None].expand(-1, 16))[:, 0].view(torch.uint8).tolist()
    for v, code in zip(amax.tolist(), codes, strict=True):
        share = Fraction(v) / (6 * Fraction(1, 10))
        assert code in {nearest(GRIDS[E4M3], share * (1 + side * Fraction(1, 2**22))) for side in (-1, 1)}


# Independent implementations


def ml_codes(x: Tensor, name: str) -> list[int]:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, in the dev extras, is not installed")
    return x.numpy().astype(getattr(ml_dtypes, name)).view(np.uint8).tolist()


@pytest.mark.parametrize(
    ("element", "name", "largest"), [(E2M1, "float4_e2m1fn", FLOAT32_MAX), (E4M3, "float8_e4m3fn", 448.0)]
)
def test_minifloat_codes_agree_with_ml_dtypes(
    element: Element, name: str, largest: float, generator: torch.Generator
) -> None:
    """Deliberate difference: past 448 ml_dtypes makes NaN of an E4M3, and we saturate."""
    near_one = torch.randn(200_000, generator=generator) * GRIDS[element][-1].numerator / 3
    x = torch.cat([ties_and_grid(GRIDS[element]), random_floats(generator), near_one])
    x = x[x.abs() <= largest]
    assert codes_of(element, x).tolist() == ml_codes(x, name)


def test_mx_scales_agree_with_ml_dtypes() -> None:
    """On powers of two, where the rule of ml_dtypes, nearest, and ours, floor, must not differ."""
    amax = torch.exp2(torch.arange(-125, 127).float())
    scales = Mxfp4("ocp").find_scales(amax[:, None].expand(-1, 32))[:, 0]
    assert scales.view(torch.uint8).tolist() == ml_codes(amax / 4, "float8_e8m0fnu")


class CompressedTensors:
    """Its codes and scales of groups, from the presets that vLLM's checkpoints are made with."""

    def __init__(self, preset: str) -> None:
        reason = "compressed-tensors, in the dev extras, cannot be imported"
        schemes = pytest.importorskip("compressed_tensors.quantization", reason=reason, exc_type=ImportError)
        from compressed_tensors.compressors.nvfp4 import helpers
        from compressed_tensors.quantization.lifecycle import forward
        from compressed_tensors.quantization.utils import calculate_qparams

        self.args = schemes.preset_name_to_scheme(preset, ["Linear"]).weights
        self.forward, self.pack_values, self.qparams = forward, helpers.pack_fp4_to_uint8, calculate_qparams

    def scales(self, x: Tensor, global_scale: Tensor | None = None) -> Tensor:
        groups = x.unflatten(-1, (-1, self.args.group_size))
        return self.qparams(groups.amin(-1), groups.amax(-1), self.args, global_scale=global_scale)[0]

    def packed(self, x: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return self.pack_values(self.forward.quantize(x, scales, None, self.args, global_scale=global_scale))

    def values(self, x: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return self.forward.fake_quantize(x, scales, None, self.args, global_scale=global_scale)


def without_zeros(generator: torch.Generator) -> Tensor:
    """`wide_values` less its zeros, whose sign compressed-tensors does not keep."""
    return wide_values(generator, rows=256)[3:]


def test_ocp_mxfp4_agrees_with_compressed_tensors(generator: torch.Generator) -> None:
    """Deliberate difference: its scale is twice OCP's floor rule, ours, where amax >= 1.75 * 2^floor(log2 amax)."""
    theirs, fmt, x = CompressedTensors("MXFP4"), Mxfp4("ocp"), without_zeros(generator)
    quantized = fmt.quantize(x)
    scales = quantized.scales.float()
    amax = fmt.groups(x).abs().amax(-1)
    doubled = amax >= 1.75 * amax.log2().floor().exp2()
    assert doubled.any()
    assert torch.equal(theirs.scales(x), torch.where(doubled, 2 * scales, scales))
    assert torch.equal(fmt.pack(quantized.codes), theirs.packed(x, scales))
    assert torch.equal(fmt.dequantize(quantized), theirs.values(x, scales))


def test_paper_mxfp4_agrees_with_compressed_tensors_on_tripled_values(generator: torch.Generator) -> None:
    """Deliberate differences: it has no g, so that x is multiplied by 1/g = 3, and the scale rule has no `- 2`."""
    theirs, x = CompressedTensors("MXFP4"), without_zeros(generator)
    quantized = wush.MXFP4.quantize(x)
    scales = quantized.scales.float()
    assert torch.equal(scales, Mxfp4("ocp").find_scales(x).float() * 4)
    assert torch.equal(wush.MXFP4.pack(quantized.codes), theirs.packed(3 * x, scales))
    torch.testing.assert_close(wush.MXFP4.dequantize(quantized), theirs.values(3 * x, scales) / 3, rtol=3e-7, atol=0)


@pytest.mark.parametrize("g", [0.1, 2.0**-4])
def test_nvfp4_agrees_with_compressed_tensors(g: float, generator: torch.Generator) -> None:
    """Deliberate differences: its global scale is 1/g; a scale that rounds to zero becomes 0.125, and stays 0 here."""
    theirs, fmt, x = CompressedTensors("NVFP4"), wush.NVFP4, without_zeros(generator)
    inverse = torch.tensor([1 / g])
    quantized = fmt.quantize(x, global_scale=g)
    scales = quantized.scales.float()
    assert (scales == 0).any()
    assert torch.equal(theirs.scales(x, inverse), scales.masked_fill(scales == 0, 0.125))
    kept = (scales > 0).repeat_interleave(16, -1)
    codes = fmt.unpack(theirs.packed(x, theirs.scales(x, inverse), inverse))
    assert torch.equal(quantized.codes[kept], codes[kept])
    values = theirs.values(x, theirs.scales(x, inverse), inverse)
    torch.testing.assert_close(fmt.dequantize(quantized)[kept], values[kept], rtol=3e-7, atol=0)


def test_calibrated_nvfp4_has_the_global_scale_of_compressed_tensors(generator: torch.Generator) -> None:
    """Deliberate difference: theirs is the inverse, `6 * 448 / amax`."""
    CompressedTensors("NVFP4")
    from compressed_tensors.quantization.utils import generate_gparam

    weight = torch.randn(8, 64, generator=generator)
    inverse = generate_gparam(weight.min(), weight.max()).item()
    assert Nvfp4("calibrated").weight_global_scale(weight) == pytest.approx(1 / inverse, rel=1e-6)
