"""Dequantizing kernels: bit-equal to the formats, every code and scale, in both orders."""

import pytest
import torch
from torch import Tensor

import wush
from wush.formats import Quantized
from wush_kernels.dequantize import (
    dequantize,
    half_weight,
    natural_order,
    operand_order,
    reference_dequantize,
    reference_half_weight,
)

FORMATS = [wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8, wush.Int4("absmax"), wush.Int4("midrise"), wush.Mxfp4("ocp")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def random_packed(fmt: wush.Format, rows: tuple[int, ...], features: int, generator: torch.Generator) -> Quantized:
    """Every byte of codes and scales alike likely, but for infinite products."""
    codes = torch.randint(0, 2**fmt.element.bits, (*rows, features), generator=generator, dtype=torch.uint8)
    shape = (*rows, features // fmt.group_size)
    if fmt.scale_dtype == torch.bfloat16:
        scales = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 30)
        return Quantized(codes, scales.abs().bfloat16(), fmt.global_scale)
    top = 240 if fmt.scale_dtype == torch.float8_e8m0fnu else 0x7E
    scales = torch.randint(0, top + 1, shape, generator=generator, dtype=torch.uint8)
    return Quantized(codes, scales.view(fmt.scale_dtype), fmt.global_scale)


def assert_same_numbers(ours: Tensor, theirs: Tensor) -> None:
    """Equal bits, any NaN for a NaN."""
    assert ours.dtype == theirs.dtype
    ours, theirs = ours.cpu(), theirs.cpu()
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0).view(bits), theirs.nan_to_num(0).view(bits))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.scale_rule}")
def test_float32_is_bit_equal_to_the_format(fmt: wush.Format, device: torch.device, generator: torch.Generator) -> None:
    quantized = random_packed(fmt, (3, 37), 160, generator)
    packed, scales = fmt.pack(quantized.codes), quantized.scales
    ours = dequantize(packed.to(device), scales.to(device), fmt)
    assert_same_numbers(ours, fmt.dequantize(quantized))
    assert_same_numbers(reference_dequantize(packed, scales, fmt), fmt.dequantize(quantized))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to infinity, as it should
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fmt", FORMATS[:4], ids=lambda f: f.name)
def test_narrow_types_are_rounded_once(
    fmt: wush.Format, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    quantized = random_packed(fmt, (64,), 96, generator)
    packed, scales = fmt.pack(quantized.codes), quantized.scales
    ours = dequantize(packed.to(device), scales.to(device), fmt, 0.37, dtype)
    assert_same_numbers(ours, reference_dequantize(packed, scales, fmt, 0.37).to(dtype))


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.MXFP8], ids=lambda f: f.name)
def test_half_weights_are_exact_and_in_operand_order(
    fmt: wush.Format, device: torch.device, generator: torch.Generator
) -> None:
    quantized = random_packed(fmt, (65,), 160, generator)
    packed, scales = fmt.pack(quantized.codes), quantized.scales
    if fmt is wush.MXFP8:  # under 2^-126 bfloat16 has fewer bits
        scales = scales.view(torch.uint8).clamp(min=16).view(fmt.scale_dtype)
    ours = half_weight(packed.to(device), scales.to(device), fmt)
    assert_same_numbers(ours, reference_half_weight(packed, scales, fmt))
    exact = reference_dequantize(packed, scales, fmt, 1.0).double()
    assert torch.equal(natural_order(ours, fmt.group_size).cpu().double().nan_to_num(9), exact.nan_to_num(9))


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4], ids=lambda f: f.name)
def test_a_nan_scale_makes_its_group_nan_and_no_other(fmt: wush.Format, device: torch.device) -> None:
    x = torch.linspace(-3, 3, 4 * 64).view(4, 64)
    quantized = fmt.quantize(x)
    bits = quantized.scales.view(torch.int16 if fmt is wush.INT4 else torch.uint8).clone()
    bits[2, 1] = {"mxfp4": 255, "nvfp4": 0x7F, "int4": 0x7FC0}[fmt.name]
    values = dequantize(fmt.pack(quantized.codes).to(device), bits.view(fmt.scale_dtype).to(device), fmt)
    nan_groups = values.isnan().unflatten(-1, (-1, fmt.group_size)).all(-1).nonzero().tolist()
    assert nan_groups == [[2, 1]]
    assert values.isnan().sum() == fmt.group_size


def test_operand_order_is_evens_then_odds_of_each_group() -> None:
    ordered = operand_order(torch.arange(8), 4)
    assert ordered.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert natural_order(ordered, 4).tolist() == list(range(8))


def test_no_rows_give_no_values(device: torch.device) -> None:
    packed = torch.empty(0, 32, dtype=torch.uint8, device=device)
    scales = torch.empty(0, 2, dtype=torch.float8_e8m0fnu, device=device)
    assert dequantize(packed, scales, wush.MXFP4).shape == (0, 64)
    assert half_weight(packed, scales, wush.MXFP4).shape == (0, 64)


def test_bad_input_is_refused_with_what_to_do(device: torch.device) -> None:
    packed = torch.zeros(4, 32, dtype=torch.uint8, device=device)
    scales = torch.zeros(4, 2, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="no multiple of 16"):
        dequantize(packed[:, :20].contiguous(), scales, wush.MXFP4)
    with pytest.raises(TypeError, match="packed: dtype int8"):
        dequantize(packed.view(torch.int8), scales, wush.MXFP4)
    with pytest.raises(TypeError, match="scales: dtype uint8, where float8_e8m0fnu"):
        dequantize(packed, scales.view(torch.uint8), wush.MXFP4)
    with pytest.raises(ValueError, match=r"scales: shape \(4, 2\), where \(4, 1\)"):
        dequantize(packed[:, :16].contiguous(), scales, wush.MXFP4)
    with pytest.raises(ValueError, match=r"call \.contiguous\(\)"):
        dequantize(packed[:, :16], scales[:, :1].contiguous(), wush.MXFP4)
    with pytest.raises(TypeError, match="float64"):
        dequantize(packed, scales, wush.MXFP4, dtype=torch.float64)
    with pytest.raises(ValueError, match="int4 values are not exact"):
        half_weight(packed, torch.zeros(4, 2, dtype=torch.bfloat16, device=device), wush.INT4)


def test_it_traces_into_a_graph(device: torch.device, generator: torch.Generator) -> None:
    quantized = wush.MXFP4.quantize(torch.randn(4, 64, generator=generator))
    arguments = wush.MXFP4.pack(quantized.codes).to(device), quantized.scales.view(torch.uint8).to(device)
    torch.library.opcheck(
        torch.ops.wush.dequantize,
        (*arguments, "e2m1", "e8m0", 32, 1.0, torch.float32, False),
        test_utils=("test_schema", "test_faketensor"),
    )
