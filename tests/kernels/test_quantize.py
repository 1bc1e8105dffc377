"""The fused transform and quantization against the format's own reference."""

import pytest
import torch
from torch import Tensor

import wush
from wush.formats import Format
from wush.transforms import apply_blocks
from wush_kernels.quantize import quantize, reference_quantize

FORMATS = [wush.MXFP4, wush.Mxfp4("ocp"), wush.NVFP4, wush.INT4, wush.Int4("midrise"), wush.Int4("absmax"), wush.MXFP8]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def name_of(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.scale_rule}"  # type: ignore[attr-defined]


def spread(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Rows of many magnitudes, one of zeros, and numbers on the ties of the grids."""
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-6, 6, (rows, 1), generator=generator).float())
    x[0] = 0
    x[-1] = torch.randint(-24, 25, (columns,), generator=generator) / 8
    return x


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 70])
def test_codes_and_scales_are_the_formats_own(
    fmt: Format, dtype: torch.dtype, rows: int, device: torch.device, generator: torch.Generator
) -> None:
    x = spread(rows, 160, generator).to(device, dtype)
    packed, scales = quantize(x, fmt)
    expected = fmt.quantize(x)
    assert torch.equal(packed, fmt.pack(expected.codes))
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_the_reference_finds_the_same_by_comparing_with_every_grid_value(
    fmt: Format, device: torch.device, generator: torch.Generator
) -> None:
    x = spread(9, 96, generator).to(device)
    codes, scales = reference_quantize(x, fmt)
    expected = fmt.quantize(x)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["per block", "shared"])
def test_with_a_transform_few_codes_differ_and_those_by_a_tie(
    fmt: Format, dtype: torch.dtype, shared: bool, device: torch.device, generator: torch.Generator
) -> None:
    size = fmt.group_size
    x = torch.randn(65, 5 * size, generator=generator).to(device, dtype)
    transform = torch.randn(5, size, size, generator=generator).to(device, dtype)
    transform = transform[0] if shared else transform
    packed, scales = quantize(x, fmt, transform)
    expected = fmt.quantize(apply_blocks(x.float(), transform.float()))
    codes = fmt.unpack(packed)
    assert (codes != expected.codes).float().mean() < 1e-3
    assert (scales.view(torch.uint8) != expected.scales.view(torch.uint8)).float().mean() < 1e-2


def test_a_calibrated_global_scale_is_used(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(4, 64, generator=generator).to(device)
    packed, scales = quantize(x, wush.NVFP4, global_scale=0.003)
    expected = wush.NVFP4.quantize(x, global_scale=0.003)
    assert torch.equal(packed, wush.NVFP4.pack(expected.codes))
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.parametrize("g", [0.1, 0.003, 2.0**-118, 2.0**-121])
def test_nvfp4_ties_are_the_formats_own_at_every_scale(g: float, device: torch.device) -> None:
    """A row for each scale: the largest value, which gives it, and what lies between two elements."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()[:, None]
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, 4, 0.5, -3, 1, 2, 0], dtype=torch.float64)
    x = (scales * ties * g).float().to(device)
    packed, found = quantize(x, wush.NVFP4, global_scale=g)
    expected = wush.NVFP4.quantize(x, global_scale=g)
    assert torch.equal(found.view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(packed, wush.NVFP4.pack(expected.codes))


def test_every_nvfp4_scale_has_its_exact_reciprocal(device: torch.device) -> None:
    bytes_on = torch.arange(1, 127, dtype=torch.uint8, device=device)
    x = torch.linspace(-1, 1, 126 * 32, device=device).reshape(126, 32)
    x = x * 0.6 * bytes_on.view(torch.float8_e4m3fn).float()[:, None]
    packed, scales = quantize(x, wush.NVFP4)
    expected = wush.NVFP4.quantize(x)
    assert len(scales.view(torch.uint8).unique()) > 100
    assert torch.equal(packed, wush.NVFP4.pack(expected.codes))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_group_gets_a_nan_scale_and_no_other(
    fmt: Format, bad: float, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(3, 128, generator=generator).to(device)
    _, clean = quantize(x, fmt)
    x[1, 40] = bad
    _, scales = quantize(x, fmt)
    hit = torch.zeros(scales.shape, dtype=torch.bool, device=device)
    hit[1, 40 // fmt.group_size] = True
    assert torch.equal(scales.float().isnan(), hit)
    assert torch.equal(scales.float()[~hit], clean.float()[~hit])


def test_leading_dimensions_and_strided_rows(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 128, generator=generator).to(device)[..., :64]
    packed, scales = quantize(x, wush.MXFP4)
    flat, flat_scales = quantize(x.reshape(6, 64).contiguous(), wush.MXFP4)
    assert packed.shape == (2, 3, 32)
    assert torch.equal(packed.flatten(0, 1), flat)
    assert torch.equal(scales.flatten(0, 1).view(torch.uint8), flat_scales.view(torch.uint8))
    assert quantize(x[:0], wush.MXFP4)[0].shape == (0, 3, 32)


def test_bad_input_is_told_what_is_wrong(device: torch.device) -> None:
    with pytest.raises(ValueError, match="no multiple of the group size 32"):
        quantize(torch.ones(2, 40, device=device), wush.MXFP4)
    with pytest.raises(TypeError, match="float64"):
        quantize(torch.ones(2, 64, device=device, dtype=torch.float64), wush.MXFP4)
    with pytest.raises(ValueError, match=r"transform: shape \(3, 32, 32\)"):
        quantize(torch.ones(2, 64, device=device), wush.MXFP4, torch.ones(3, 32, 32, device=device))
