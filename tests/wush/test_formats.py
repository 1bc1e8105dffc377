"""Formats as users see them: scales, requantization, packing, the ends of float32, errors."""

import pytest
import torch

import wush
from wush.formats import Format

FLOAT32_MAX = torch.finfo(torch.float32).max
FORMATS = [
    wush.MXFP4,
    wush.Mxfp4(scale_rule="ocp"),
    wush.NVFP4,
    wush.Nvfp4(scale_rule="calibrated"),
    wush.INT4,
    wush.Int4(scale_rule="midrise"),
    wush.Int4(scale_rule="absmax"),
    wush.MXFP8,
]
ids = [f"{fmt.name}-{fmt.scale_rule}" for fmt in FORMATS]  # type: ignore[attr-defined]


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
    assert torch.equal(quantized.scales.float(), (amax * (1 / (6 * 0.1))).to(torch.float8_e4m3fn).float())
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
    k = (groups * (1 / scale.float().unsqueeze(-1))).floor().clamp(-8, 7)
    assert torch.equal(quantized.scales, scale)
    assert torch.equal(quantized.codes.unflatten(1, (-1, 32)).int() - 8, k.int())
    assert torch.equal(wush.INT4.dequantize(quantized).unflatten(1, (-1, 32)), (k + 0.5) * scale.float().unsqueeze(-1))


def test_midrise_int4_clips_nothing(generator: torch.Generator) -> None:
    """No value is further than half a step from what it becomes, with `s = amax / 8` and a BF16 step more at most."""
    x = wide_values(generator)
    x[3] = torch.linspace(-1, 1, 128)
    quantized = wush.Int4("midrise").quantize(x)
    scales = quantized.scales.double().unsqueeze(-1)
    groups = x.unflatten(1, (-1, 32)).double()
    error = wush.Int4("midrise").dequantize(quantized).unflatten(1, (-1, 32)).double() - groups
    assert (error.abs() <= scales / 2 * (1 + 2.0**-22)).all()
    exact = groups.abs().amax(-1, keepdim=True) / 8
    assert (scales >= exact).all()
    assert (scales <= exact * (1 + 2.0**-7)).all()


@pytest.mark.parametrize("amax", [1.0, 8.0, 8 * 2.0**-30])
def test_midrise_int4_is_the_papers_quantizer(amax: float, generator: torch.Generator) -> None:
    """Equation 60 with `s = 2^(1-b) amax`, a BF16 number here: `(floor(x / s) + 1/2) s`; amax itself is at an edge."""
    x = (torch.rand(4, 32, generator=generator) * 2 - 1) * amax
    x[:, 3] = amax * torch.tensor([1, -1, 1, -1])
    found = wush.Int4("midrise").round_trip(x).double()
    step = amax / 8
    expected = ((x.double() / step).floor().clamp(max=7) + 0.5) * step
    assert torch.equal(found, expected)


def test_midrise_int4_has_the_noise_of_the_theory(generator: torch.Generator) -> None:
    """Uniform in a cell, variance `s^2 / 12`, whatever the values are; but the largest one is at its cell's edge."""
    fmt = wush.Int4("midrise")
    for values in (torch.randn(2000, 32, generator=generator), torch.rand(2000, 32, generator=generator) - 0.5):
        error = (fmt.round_trip(values) - values) / fmt.find_scales(values).float()
        largest = values.abs() == values.abs().amax(1, keepdim=True)
        assert error.mean().abs() < 0.01
        assert error[~largest].square().mean().item() == pytest.approx(1 / 12, rel=0.02)
        assert error[largest].abs().min() > 0.5 - 8 * 2.0**-7


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


def possible_scales(fmt: Format) -> torch.Tensor:
    """Every scale that `quantize` can store, `(N,)`, if `1 / s` and `x / g` of its elements x are float32 numbers."""
    if fmt.scale_dtype == torch.bfloat16:
        scales = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
        return scales[(8 * scales.float() <= FLOAT32_MAX) & (1 / scales.float() <= FLOAT32_MAX)]
    if fmt.scale_dtype == torch.float8_e4m3fn:
        return torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    amax = torch.exp2(torch.arange(-149, 128).double()).float()
    codes = fmt.find_scales(amax[:, None].expand(-1, fmt.group_size))[:, 0].view(torch.uint8).unique()
    return codes[: -1 if fmt == wush.MXFP4 else None].view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_requantizing_at_the_same_scales_gives_every_code_back_at_every_scale(fmt: Format) -> None:
    codes = torch.arange(2**fmt.element.bits, dtype=torch.uint8)
    elements = fmt.element.from_codes(codes)
    kept = elements.isfinite() & (elements != (-8 if fmt == wush.Int4("absmax") else torch.inf))
    scales = possible_scales(fmt)
    values = fmt.expand(elements[kept].expand(len(scales), -1), scales, fmt.global_scale)
    again = fmt.element.to_codes(fmt.snap(values, scales, fmt.global_scale))
    assert torch.equal(again, codes[kept].expand_as(again))


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_requantizing_a_tensor_at_its_own_scales_changes_no_code(fmt: Format, generator: torch.Generator) -> None:
    quantized = fmt.quantize(wide_values(generator))
    values = fmt.groups(fmt.dequantize(quantized))
    again = fmt.element.to_codes(fmt.snap(values, quantized.scales, fmt.global_scale)).flatten(-2)
    assert torch.equal(again, quantized.codes)


@pytest.mark.parametrize("fmt", [wush.Mxfp4("ocp"), wush.Int4("absmax"), wush.MXFP8], ids=repr)
def test_requantizing_finds_the_same_scales_again(fmt: Format, generator: torch.Generator) -> None:
    quantized = fmt.quantize(wide_values(generator))
    again = fmt.quantize(fmt.dequantize(quantized))
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.scales.float(), quantized.scales.float())


def test_requantizing_paper_mxfp4_doubles_the_scale_just_where_the_largest_element_is_6(
    generator: torch.Generator,
) -> None:
    """That element is `6 s / 3 = 2 s`, whose own scale is `2 s`; of 3 and 4, `s` and `4/3 s`, the scale is `s`."""
    quantized = wush.MXFP4.quantize(wide_values(generator)[3:])
    again = wush.MXFP4.quantize(wush.MXFP4.dequantize(quantized))
    largest_is_6 = ((quantized.codes.unflatten(-1, (-1, 32)) & 7) == 7).any(-1)
    assert largest_is_6.any()
    assert not largest_is_6.all()
    assert torch.equal(again.scales.float(), torch.where(largest_is_6, 2, 1) * quantized.scales.float())


def test_requantizing_nvfp4_finds_the_same_scale_unless_it_is_subnormal(generator: torch.Generator) -> None:
    """A subnormal E4M3 is rounded so coarsely that the largest element of its group need not be 6."""
    quantized = wush.NVFP4.quantize(wide_values(generator))
    again = wush.NVFP4.quantize(wush.NVFP4.dequantize(quantized))
    normal = quantized.scales.float() >= 2.0**-6
    assert torch.equal(again.scales.float()[normal], quantized.scales.float()[normal])
    coarse = torch.zeros(1, 16)
    coarse[0, 0] = 1.6 * 2.0**-9 * 0.6
    scale = wush.NVFP4.quantize(coarse).scales
    assert scale.float().item() == 2.0**-8
    assert wush.NVFP4.find_scales(wush.NVFP4.round_trip(coarse)).float().item() == 2.0**-9


def test_requantizing_rms_int4_may_change_the_scale(generator: torch.Generator) -> None:
    quantized = wush.INT4.quantize(torch.randn(8, 64, generator=generator))
    assert not torch.equal(wush.INT4.quantize(wush.INT4.dequantize(quantized)).scales, quantized.scales)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_zero_groups_dequantize_to_zero(fmt: Format) -> None:
    zeros = torch.zeros(2, 64)
    assert torch.equal(fmt.dequantize(fmt.quantize(zeros)), zeros)
    assert torch.equal(fmt.round_trip(zeros), zeros)


@pytest.mark.parametrize("fmt", [wush.NVFP4, wush.INT4, wush.Int4("midrise"), wush.Int4("absmax")], ids=repr)
def test_a_scale_of_zero_snaps_every_value_to_the_element_of_zero(fmt: Format) -> None:
    """So it must be for GPTQ, whose later columns may grow after the scale is fixed."""
    x = torch.tensor([[-1e3, -0.0, 0.0, 1e3, FLOAT32_MAX]])
    snapped = fmt.snap(x, torch.zeros(1, dtype=fmt.scale_dtype), fmt.global_scale)
    zero = fmt.snap(torch.zeros(1, 5), torch.ones(1, dtype=fmt.scale_dtype), fmt.global_scale)
    assert torch.equal(snapped, zero)


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


# The first element of a group, else zeros, and the value it must come back as.
ENDS = [
    # The largest float32: MXFP4 by the paper's rule ends at 6/3 * 2^126, the others at their largest element.
    (wush.MXFP4, FLOAT32_MAX, 2.0**127),
    (wush.MXFP4, 2.0**127, 2.0**127),
    (wush.MXFP4, 2.0**126, 2.0**126),
    (wush.Mxfp4("ocp"), FLOAT32_MAX, 6 * 2.0**125),
    (wush.Mxfp4("ocp"), 2.0**127, 2.0**127),
    (wush.Mxfp4("ocp"), 2.0**126, 2.0**126),
    (wush.MXFP8, FLOAT32_MAX, 448 * 2.0**119),
    (wush.MXFP8, 2.0**127, 2.0**127),
    (wush.MXFP8, 2.0**126, 2.0**126),
    (wush.NVFP4, FLOAT32_MAX, 6 * 448 * 0.1),
    (wush.NVFP4, 2.0**126, 6 * 448 * 0.1),
    (wush.Nvfp4("calibrated"), FLOAT32_MAX, FLOAT32_MAX),
    (wush.Nvfp4("calibrated"), 2.0**126, 2.0**126),
    (wush.Int4("absmax"), FLOAT32_MAX, 7 * 146 / 128 * 2.0**125),
    (wush.Int4("absmax"), 2.0**126, 7 * 146 / 128 * 2.0**123),
    # The scale is the BF16 number from amax / 8 on, and the last cell's midpoint 7.5 of them.
    (wush.Int4("midrise"), FLOAT32_MAX, 7.5 * 2.0**125),
    (wush.Int4("midrise"), 2.0**126, 7.5 * 2.0**123),
    (wush.Int4("midrise"), 2.0**-123, 7.5 * 2.0**-126),
    (wush.Int4("midrise"), 2.0**-149, 0.0),
    # One element of 32 in a group is sqrt(32) = 5.66 rms, past the clip: 7.5 s, with s = 0.0593 amax in BF16.
    (wush.INT4, FLOAT32_MAX, 7.5 * 243 / 128 * 2.0**123),
    (wush.INT4, 2.0**126, 7.5 * 243 / 128 * 2.0**121),
    # The smallest normal, the largest and other subnormals, the smallest. No E8M0 scale is below 2^-127.
    (wush.MXFP4, 2.0**-126, 2.0**-126),
    (wush.MXFP4, 2.0**-127, 2.0**-127),
    (wush.MXFP4, 2.0**-128, 2.0**-127 / 2),
    (wush.MXFP4, 2.0**-130, 2.0**-127 / 6),
    (wush.MXFP4, 2.0**-149, 0.0),
    (wush.Mxfp4("ocp"), 2.0**-126, 2.0**-126),
    (wush.Mxfp4("ocp"), 2.0**-128, 2.0**-128),
    (wush.Mxfp4("ocp"), 2.0**-129, 0.0),
    (wush.MXFP8, 2.0**-126, 2.0**-126),
    (wush.MXFP8, 2.0**-136, 2.0**-136),
    (wush.MXFP8, 2.0**-138, 0.0),
    # E4M3 scales end at 2^-9, and half of that is a tie with zero.
    (wush.NVFP4, 0.6 * 2.0**-9, 0.6 * 2.0**-9),
    (wush.NVFP4, 0.59 * 2.0**-10, 0.0),
    (wush.NVFP4, 2.0**-149, 0.0),
    # BF16 scales end at 2^-133.
    (wush.Int4("absmax"), 7 * 2.0**-127, 7 * 2.0**-127),
    # Their inverses end at 2^128: a scale of 2^-133 counts as 2^-128, and its elements vanish.
    (wush.Int4("absmax"), 7 * 2.0**-133, 0.0),
    (wush.Int4("absmax"), 2.0**-149, 0.0),
    (wush.INT4, 2.0**-149, 0.0),
]


@pytest.mark.parametrize(("fmt", "x", "expected"), ENDS, ids=[f"{f!r}-{x:.9g}" for f, x, _ in ENDS])
def test_values_at_the_ends_of_float32(fmt: Format, x: float, expected: float) -> None:
    group = torch.zeros(1, fmt.group_size)
    group[0, 0] = x
    for signed in (group, -group):
        quantized = fmt.quantize(signed, global_scale=fmt.weight_global_scale(signed))
        back = fmt.dequantize(quantized)
        assert back[0, 0].abs().item() == pytest.approx(expected, rel=2.0**-21, abs=2.0**-149)
        assert back[0, 0].sign() * (expected > 0) == signed[0, 0].sign() * (expected > 0)


def test_paper_mxfp4_saturates_where_x_over_g_is_past_float32() -> None:
    """Only in the last binade: 3x of `4/3 * 2^126` is 2^128, and it becomes the element 6 in place of 4."""
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([2.0**127, 4 / 3 * 2.0**126 * (1 - 2.0**-23), 4 / 3 * 2.0**126 * (1 + 2.0**-22)])
    assert (wush.MXFP4.quantize(x).codes[0, :3] & 7).tolist() == [7, 6, 7]


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_unchecked_a_non_finite_value_makes_its_group_nan_and_changes_no_other(fmt: Format, bad: float) -> None:
    x = wide_values(torch.Generator().manual_seed(1), rows=8)
    expected = fmt.quantize(x)
    x[3, 65] = bad
    group = 65 // fmt.group_size
    found = fmt.quantize(x, checked=False)
    values, others = fmt.dequantize(found).unflatten(-1, (-1, fmt.group_size)), torch.ones(found.scales.shape) == 1
    others[3, group] = False
    assert values[3, group].isnan().all()
    assert torch.equal(found.scales.float()[others], expected.scales.float()[others])
    assert torch.equal(values[others], fmt.groups(fmt.dequantize(expected))[others])
    assert fmt.groups(fmt.round_trip(x, checked=False))[3, group].isnan().all()


def test_the_scale_of_a_non_finite_group_has_the_nan_that_the_kernels_write() -> None:
    bits = {}
    for fmt in FORMATS:
        scale = fmt.find_scales(torch.full((1, 32), torch.inf), checked=False)[0, 0]
        bits[fmt.name] = scale.view(torch.uint8 if scale.itemsize == 1 else torch.int16).item()
    assert bits == {"mxfp4": 255, "mxfp8": 255, "nvfp4": 127, "int4": 0x7FC0}


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != wush.INT4], ids=repr)
@pytest.mark.parametrize("rest", [0.0, 1e-38, 0.5 * FLOAT32_MAX, -FLOAT32_MAX])
def test_values_at_the_end_of_float32_stay_finite(fmt: Format, rest: float) -> None:
    x = torch.full((1, 64), FLOAT32_MAX)
    x[0, 1::2] = rest
    for g in (fmt.global_scale, fmt.weight_global_scale(x)):
        assert fmt.dequantize(fmt.quantize(x, global_scale=g)).isfinite().all()


def test_rms_int4_stays_finite_at_the_end_of_float32() -> None:
    x = torch.full((1, 32), FLOAT32_MAX)
    x[0, 1::2] = 0
    assert wush.INT4.round_trip(x).isfinite().all()


@pytest.mark.parametrize("amax", [2.0**-118, 2.0**-126])
def test_calibrated_nvfp4_keeps_half_of_amax_however_small_that_is(amax: float) -> None:
    x = torch.zeros(1, 16)
    x[0, :2] = torch.tensor([amax, amax / 2])
    fmt = wush.Nvfp4("calibrated")
    back = fmt.dequantize(fmt.quantize(x, global_scale=fmt.weight_global_scale(x)))
    torch.testing.assert_close(back, x, rtol=2.0**-4, atol=2.0**-149)  # the rounding of an E4M3 scale


def test_bits_per_weight_count_the_scales() -> None:
    assert [fmt.bits_per_weight for fmt in (wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8)] == [4.25, 4.5, 4.5, 8.25]


def test_an_unknown_scale_rule_names_the_choices() -> None:
    with pytest.raises(ValueError, match="mxfp4: unknown scale_rule 'plain'; choose one of paper, ocp"):
        wush.Mxfp4(scale_rule="plain")  # type: ignore[arg-type]
