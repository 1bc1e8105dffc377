"""Products with weights decoded in registers, against float64 products of the same codes."""

import pytest
import torch
from torch import Tensor

import wush
from wush_kernels.encode import DECODE_WINDOW, exponents, words
from wush_kernels.fp8_operand import fp8_operand
from wush_kernels.half_operand import half_operand
from wush_kernels.matmul_fp8 import SUMS_BOUND, matmul_fp8, reference_matmul_fp8
from wush_kernels.matmul_half import matmul_half, reference_matmul_half
from wush_kernels.quantize import quantize

SHAPES = [(1, 40, 64), (1, 130, 1056), (5, 64, 512), (20, 100, 1056), (64, 200, 256), (100, 130, 288)]
FP32_SUMS = 2e-6
FORMAT_ROUNDING = 3e-7  # `wush.formats` multiplies by the global scale in float32, on both sides


def operands(
    rows: int, outputs: int, features: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, features, generator=generator).to(device)
    weight = torch.randn(outputs, features, generator=generator)
    weight *= torch.exp2(torch.randint(-3, 3, (outputs, 1), generator=generator).float())
    return x, weight.to(device), torch.randn(outputs, generator=generator).to(device).bfloat16()


def fp8(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    packed, scales = quantize(weight, wush.MXFP4)
    rows = exponents(packed, scales, *DECODE_WINDOW)
    return *fp8_operand(x, wush.MXFP4), packed, rows.relative, rows.row_scales


def half(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    packed, scales = quantize(weight, wush.NVFP4)
    return half_operand(x, wush.NVFP4, None, torch.float16), packed, words(scales.view(torch.uint8))


def exact(x: Tensor, weight: Tensor, fmt: wush.Format) -> tuple[Tensor, Tensor]:
    """The float64 product of the quantized sides, and the sum of magnitudes that bounds its rounding errors."""
    a, w = fmt.round_trip(x).double(), fmt.round_trip(weight).double()
    return a @ w.T, a.abs() @ w.abs().T


@pytest.mark.parametrize("shape", [*SHAPES, (150, 70, 544)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_mxfp4_products_stay_within_the_accumulators_bound(
    shape: tuple[int, int, int], biased: bool, device: torch.device, generator: torch.Generator
) -> None:
    x, weight, bias = operands(*shape, device, generator)
    x[0, :32] *= 2.0**20  # a row with a scale of its own
    prepared = fp8(x, weight)
    expected, size = exact(x, weight, wush.MXFP4)
    assert ((reference_matmul_fp8(*prepared, 1 / 9) - expected).abs() <= FORMAT_ROUNDING * size).all()
    y = matmul_fp8(*prepared, 1 / 9, bias if biased else None, torch.float32)
    expected = expected + bias.double() if biased else expected
    bound = SUMS_BOUND if device.type == "cuda" else FP32_SUMS
    assert ((y.double() - expected).abs() <= bound * (size + 1)).all()


def test_long_sums_of_one_sign_stay_within_the_bound(device: torch.device, generator: torch.Generator) -> None:
    rows, features = (16, 28672) if device.type == "cuda" else (2, 2048)
    x, weight, _ = operands(rows, 64, features, device, generator)
    x, weight = x.abs() + 0.5, weight.abs() + 0.01
    expected, size = exact(x, weight, wush.MXFP4)
    y = matmul_fp8(*fp8(x, weight), 1 / 9, None, torch.float32)
    bound = SUMS_BOUND if device.type == "cuda" else FP32_SUMS
    assert ((y.double() - expected).abs() <= bound * size).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_nvfp4_products_stay_within_float32s_bound(
    shape: tuple[int, int, int], biased: bool, device: torch.device, generator: torch.Generator
) -> None:
    x, weight, bias = operands(*shape, device, generator)
    prepared = half(x, weight)
    expected, size = exact(x, weight, wush.NVFP4)
    assert ((reference_matmul_half(*prepared, 0.01) - expected).abs() <= FORMAT_ROUNDING * size).all()
    y = matmul_half(*prepared, 0.01, bias if biased else None, torch.float32)
    expected = expected + bias.double() if biased else expected
    assert ((y.double() - expected).abs() <= FP32_SUMS * (size + 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_the_rounded_sum(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    x, weight, _ = operands(3, 64, 256, device, generator)
    wide = matmul_fp8(*fp8(x, weight), 1 / 9, None, torch.float32)
    rounding = torch.finfo(dtype).eps  # twice a rounding: the interpreter cuts bfloat16 off
    torch.testing.assert_close(matmul_fp8(*fp8(x, weight), 1 / 9, None, dtype).float(), wide, rtol=rounding, atol=1e-6)


def test_split_sums_are_the_same_every_time(device: torch.device, generator: torch.Generator) -> None:
    x, weight, _ = operands(5, 130, 2048, device, generator)
    first = matmul_fp8(*fp8(x, weight), 1 / 9, None, torch.float32)
    assert torch.equal(first, matmul_fp8(*fp8(x, weight), 1 / 9, None, torch.float32))


@pytest.mark.parametrize("product", ["fp8", "half"])
def test_a_nan_row_stays_in_its_row(product: str, device: torch.device, generator: torch.Generator) -> None:
    if product != "half" and device.type == "cpu":
        pytest.skip("Triton's interpreter does not know E5M2's NaN")
    x, weight, _ = operands(3, 64, 256, device, generator)
    run = {
        "fp8": lambda x: matmul_fp8(*fp8(x, weight), 1 / 9),
        "half": lambda x: matmul_half(*half(x, weight), 0.01),
    }
    clean = run[product](x)
    x[1, 7] = torch.nan
    y = run[product](x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_no_tokens_make_an_empty_result(device: torch.device, generator: torch.Generator) -> None:
    x, weight, _ = operands(0, 64, 256, device, generator)
    assert matmul_fp8(*fp8(x, weight), 1 / 9).shape == (0, 64)
    assert matmul_half(*half(x, weight), 0.01).shape == (0, 64)


def test_bad_operands_are_told_apart(device: torch.device, generator: torch.Generator) -> None:
    x, weight, _ = operands(2, 64, 256, device, generator)
    a, a_scales, packed, relative, w_scales = fp8(x, weight)
    with pytest.raises(TypeError, match="matmul_fp8: a: dtype float32, where float8_e5m2 is needed"):
        matmul_fp8(x, a_scales, packed, relative, w_scales, 1.0)
    with pytest.raises(ValueError, match=r"packed: shape \(64, 64\), where \(64, 128\) is needed"):
        matmul_fp8(a, a_scales, packed[:, :64].contiguous(), relative, w_scales, 1.0)
    with pytest.raises(ValueError, match="not contiguous"):
        matmul_fp8(a, a_scales, packed.T.contiguous().T, relative, w_scales, 1.0)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(packed)
    with pytest.raises(ValueError, match="matmul_fp8: packed: starts at an address that is no multiple of 4 bytes"):
        matmul_fp8(a, a_scales, shifted, relative, w_scales, 1.0)
