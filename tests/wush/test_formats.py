"""Formats against exact arithmetic on the definitions, element by element."""

import math
from fractions import Fraction

import pytest
import torch

import wush
from wush.elements import E2M1, E4M3
from wush.formats import Format

E2M1_GRID = [Fraction(v) for v in (0, "1/2", 1, "3/2", 2, 3, 4, 6)]
FORMATS = [
    wush.MXFP4,
    wush.Mxfp4(scale_rule="ocp"),
    wush.NVFP4,
    wush.Nvfp4(scale_rule="calibrated"),
    wush.INT4,
    wush.Int4(scale_rule="absmax"),
    wush.MXFP8,
]
ids = [f"{fmt.name}-{fmt.scale_rule}" for fmt in FORMATS]  # type: ignore[attr-defined]


def nearest_e2m1(x: float) -> int:
    """The code of the nearest grid value, ties to the even code, in exact arithmetic."""
    magnitude = abs(Fraction(x))
    code = min(range(8), key=lambda c: (abs(E2M1_GRID[c] - magnitude), c % 2))
    return code | (8 if str(x).startswith("-") else 0)


def wide_values(generator: torch.Generator, rows: int = 64, columns: int = 128) -> torch.Tensor:
    """Values over many binades, with rows of zeros, single spikes and negative zeros."""
    scale = torch.exp2(torch.randint(-20, 20, (rows, columns // 16), generator=generator).float()).repeat_interleave(
        16, 1
    )
    x = torch.randn(rows, columns, generator=generator) * scale
    x[0] = 0
    x[1] = -0.0
    x[2] = 0
    x[2, 5] = -3e4
    return x


def test_e2m1_rounds_to_nearest_with_ties_to_the_even_code() -> None:
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    near = [m + d for m in midpoints for d in (-1e-6, 0, 1e-6)]
    values = torch.tensor([*near, 0.0, 6.0, 7.0, 1e30, 1e-40, 2.0**-126])
    for x in (values, -values):
        assert E2M1.to_codes(E2M1.snap(x.clone())).tolist() == [nearest_e2m1(v) for v in x.tolist()]


def test_e2m1_codes_and_values_are_inverses() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = E2M1.from_codes(codes)
    assert values[:8].tolist() == [float(v) for v in E2M1_GRID]
    assert torch.equal(E2M1.to_codes(values), codes)


def test_e4m3_snaps_to_nearest_and_saturates() -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    x = torch.rand(4000, dtype=torch.float64) * 500
    best = grid[(x[:, None].float().double() - grid).abs().argmin(1)]
    ours = E4M3.snap(x.float()).double()
    # Nearest in distance; on ties either neighbour is as near.
    assert torch.equal((ours - x.float()).abs(), (best - x.float().double()).abs())
    assert E4M3.snap(torch.tensor([1e9, -1e9])).tolist() == [448.0, -448.0]


def test_mxfp4_codes_equal_exact_arithmetic(generator: torch.Generator) -> None:
    x = wide_values(generator)
    quantized = wush.MXFP4.quantize(x)
    for row in range(x.shape[0]):
        for group in range(x.shape[1] // 32):
            values = x[row, group * 32 : group * 32 + 32].tolist()
            amax = max(map(abs, values))
            scale = Fraction(2) ** (math.frexp(amax)[1] - 1)
            assert not amax or float(quantized.scales[row, group]) == float(scale)
            codes = quantized.codes[row, group * 32 : group * 32 + 32].tolist()
            # 3x is rounded to float32 once, as the definition code = x / s / g with g = 1/3 allows.
            tripled = (x[row, group * 32 : group * 32 + 32] * 3).tolist()
            expected = [nearest_e2m1(float(Fraction(v) / scale) if v else v) for v in tripled]
            assert codes == expected


def test_paper_rule_of_mxfp4_never_clips_and_ocp_does(generator: torch.Generator) -> None:
    x = torch.rand(200, 32, generator=generator) * 0.2
    x[:, 0] = torch.linspace(1.0, 1.999, 200)
    paper, ocp = wush.MXFP4.dequantize(wush.MXFP4.quantize(x)), wush.Mxfp4("ocp").round_trip(x)
    assert ((paper[:, 0] - x[:, 0]).abs() <= 1 / 3 + 1e-6).all()
    assert paper[:, 0].max() == 2.0
    assert ocp[:, 0].max() == 1.5


def test_nvfp4_scale_is_the_rounded_share_of_amax(generator: torch.Generator) -> None:
    x = torch.randn(8, 64, generator=generator)
    quantized = wush.NVFP4.quantize(x)
    amax = x.unflatten(1, (-1, 16)).abs().amax(-1)
    assert torch.equal(quantized.scales.float(), (amax / (6 * 0.1)).to(torch.float8_e4m3fn).float())
    huge = wush.NVFP4.quantize(torch.full((1, 16), 1e6))
    assert huge.scales.float().item() == 448.0
    assert wush.NVFP4.dequantize(huge).max() == pytest.approx(6 * 448 * 0.1)


def test_calibrated_nvfp4_gives_the_largest_group_the_largest_scale(generator: torch.Generator) -> None:
    weight = torch.randn(8, 64, generator=generator) * 1e-4
    fmt = wush.Nvfp4(scale_rule="calibrated")
    quantized = fmt.quantize(weight, global_scale=fmt.weight_global_scale(weight))
    assert quantized.scales.float().max() == 448.0
    fixed_error = (wush.NVFP4.round_trip(weight) - weight).norm()
    assert (fmt.dequantize(quantized) - weight).norm() < 0.2 * fixed_error


def test_int4_is_the_floor_with_the_gaussian_clip(generator: torch.Generator) -> None:
    x = torch.randn(16, 64, generator=generator)
    quantized = wush.INT4.quantize(x)
    groups = x.unflatten(1, (-1, 32))
    scale = (2 * 2.513930578568423 / 15 * groups.double().square().mean(-1).sqrt()).bfloat16()
    k = (groups / scale.float().unsqueeze(-1)).floor().clamp(-8, 7)
    assert torch.equal(quantized.scales, scale)
    assert torch.equal(quantized.codes.unflatten(1, (-1, 32)).int() - 8, k.int())
    assert torch.equal(wush.INT4.dequantize(quantized).unflatten(1, (-1, 32)), (k + 0.5) * scale.float().unsqueeze(-1))


def test_absmax_int4_reaches_its_largest_element() -> None:
    x = torch.linspace(-7, 7, 32).unsqueeze(0)
    quantized = wush.Int4("absmax").quantize(x)
    assert quantized.scales.item() == 1.0
    assert wush.Int4("absmax").dequantize(quantized)[0, [0, -1]].tolist() == [-7.0, 7.0]


def test_mxfp8_error_is_within_half_a_step(generator: torch.Generator) -> None:
    x = wide_values(generator)
    values = wush.MXFP8.round_trip(x)
    groups, rounded = x.unflatten(1, (-1, 32)), values.unflatten(1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True)
    # Three mantissa bits: half a step is 2^-4 of a value, or of the smallest normal; past 448 of 512 it saturates.
    bound = torch.maximum(groups.abs() / 16, amax * 2.0**-17)
    clipped = groups.abs() > amax.log2().floor().exp2() * 1.75
    assert ((rounded - groups).abs() <= torch.where(clipped, groups.abs() / 8, bound)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_zero_groups_dequantize_to_zero(fmt: Format) -> None:
    zeros = torch.zeros(2, 64)
    assert torch.equal(fmt.dequantize(fmt.quantize(zeros)), zeros)
    assert torch.equal(fmt.round_trip(zeros), zeros)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_packing_loses_nothing_and_puts_the_lower_index_in_the_low_nibble(
    fmt: Format, generator: torch.Generator
) -> None:
    codes = torch.randint(0, 2**fmt.element.bits, (3, 64), generator=generator, dtype=torch.uint8)
    packed = fmt.pack(codes)
    assert packed.shape == (3, 64 * fmt.element.bits // 8)
    assert torch.equal(fmt.unpack(packed), codes)
    if fmt.element.bits == 4:
        assert packed[0, 0].item() == codes[0, 0].item() + 16 * codes[0, 1].item()


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_round_trip_equals_dequantized_codes_bit_for_bit(fmt: Format, generator: torch.Generator) -> None:
    x = wide_values(generator)
    assert torch.equal(fmt.round_trip(x), fmt.dequantize(fmt.quantize(x)))


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_an_error_that_names_the_tensor(fmt: Format, bad: float) -> None:
    x = torch.ones(2, 64)
    x[1, 33] = bad
    with pytest.raises(wush.NumericError, match=r"model\.layers\.3: NaN or infinity"):
        fmt.quantize(x, "model.layers.3")


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_a_length_that_is_no_multiple_of_the_group_is_an_error_with_the_remedy(fmt: Format) -> None:
    with pytest.raises(
        ValueError, match=rf"o_proj: in_features 72.*group size {fmt.group_size} of {fmt.name}.*exclude"
    ):
        fmt.quantize(torch.ones(2, 72), "o_proj")


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_values_near_the_end_of_float32_stay_finite(fmt: Format) -> None:
    x = torch.full((1, 64), 2.0**127)
    x[0, 1::2] = 1e-38
    assert fmt.round_trip(x).isfinite().all()


def test_bits_per_weight_count_the_scales() -> None:
    assert [fmt.bits_per_weight for fmt in (wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8)] == [4.25, 4.5, 4.5, 8.25]


def test_an_unknown_scale_rule_names_the_choices() -> None:
    with pytest.raises(ValueError, match="mxfp4: unknown scale_rule 'plain'; choose one of paper, ocp"):
        wush.Mxfp4(scale_rule="plain")  # type: ignore[arg-type]
