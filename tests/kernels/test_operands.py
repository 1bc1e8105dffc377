"""Activations as exact operands of FP8 and 16-bit matmuls."""

import pytest
import torch

import wush
from wush_kernels.dequantize import operand_order
from wush_kernels.fp8_operand import fp8_operand, reference_fp8_operand
from wush_kernels.half_operand import half_operand, reference_half_operand
from wush_kernels.workspace import flushed_groups, workspace


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.Mxfp4("ocp")], ids=lambda f: f.scale_rule)
@pytest.mark.parametrize("rows", [1, 70])
def test_fp8_operands_are_the_quantized_values(
    fmt: wush.Format, rows: int, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(rows, 160, generator=generator).to(device)
    x[0] = 0
    operand, scales = fp8_operand(x, fmt)
    expected = operand_order(fmt.round_trip(x) / fmt.global_scale, 32)
    torch.testing.assert_close(operand.float() * scales[:, None], expected, rtol=1e-6, atol=0)
    reference, reference_scales = reference_fp8_operand(x, fmt)
    assert torch.equal(operand.float(), reference.float())
    assert torch.equal(scales, reference_scales)


@pytest.mark.parametrize("transform", ["none", "block", "shared"])
def test_rows_outside_the_fp8_window_get_their_own_scale_and_stay_exact(
    transform: str, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(70, 160, generator=generator).to(device).bfloat16()
    x[3] *= 2.0**20
    x[5] *= 2.0**-30
    x[66] *= 2.0**-120
    matrix = torch.eye(32, device=device).repeat(5, 1, 1).bfloat16() * 2
    given = {"none": None, "block": matrix, "shared": matrix[0]}[transform]
    operand, scales = fp8_operand(x, wush.MXFP4, given)
    transformed = x.float() if given is None else x.float() * 2
    expected = operand_order(wush.MXFP4.round_trip(transformed).double() * 3, 32)
    torch.testing.assert_close(operand.double() * scales.double()[:, None], expected, rtol=1e-6, atol=0)
    changed = (scales != 1).nonzero().flatten().tolist()
    assert changed == [3, 5, 66]


def test_groups_too_small_for_their_rows_window_are_counted(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(4, 96, generator=generator).to(device)
    x[2, 32:64] *= 2.0**-45
    before = flushed_groups(device).item()
    fp8_operand(x, wush.MXFP4)
    assert flushed_groups(device).item() == before + 1


def test_the_counters_are_left_at_zero(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(70, 160, generator=generator).to(device) * 2.0**20
    first, second = fp8_operand(x, wush.MXFP4), fp8_operand(x, wush.MXFP4)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0].float(), second[0].float())
    assert not workspace(device, 1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_group_is_nan_and_no_other(bad: float, device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(3, 96, generator=generator).to(device)
    x[1, 40] = bad
    hit = torch.zeros(3, 96, dtype=torch.bool, device=device)
    hit[1, 32:64] = True
    assert torch.equal(fp8_operand(x, wush.MXFP4)[0].float().isnan(), hit)
    assert torch.equal(half_operand(x, wush.MXFP4).float().isnan(), hit)


@pytest.mark.parametrize(
    ("fmt", "dtype", "shift"),
    [
        (wush.MXFP4, torch.bfloat16, 1.0),
        (wush.MXFP8, torch.bfloat16, 1.0),
        (wush.NVFP4, torch.bfloat16, 1.0),
        (wush.NVFP4, torch.float16, 2.0**-7),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_half_operands_are_the_quantized_values(
    fmt: wush.Format, dtype: torch.dtype, shift: float, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(37, 160, generator=generator).to(device)
    operand = half_operand(x, fmt, None, dtype)
    expected = operand_order(fmt.round_trip(x) / fmt.global_scale * shift, fmt.group_size)
    torch.testing.assert_close(operand.float(), expected, rtol=1e-6, atol=0)
    assert torch.equal(operand, reference_half_operand(x, fmt, None, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g", [3e-6, 0.004, 7.0])
def test_half_operands_of_a_calibrated_global_scale_are_exact_too(
    g: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    x = (torch.randn(37, 160, generator=generator) * 300 * g).to(device)
    operand = half_operand(x, wush.NVFP4, None, dtype, g)
    shift = 1.0 if dtype == torch.bfloat16 else 2.0**-7
    expected = operand_order(wush.NVFP4.round_trip(x, global_scale=g) / g * shift, 16)
    torch.testing.assert_close(operand.float(), expected, rtol=1e-6, atol=0)
    assert torch.equal(operand, reference_half_operand(x, wush.NVFP4, None, dtype, g))


def test_values_that_are_not_exact_are_refused(device: torch.device) -> None:
    x = torch.ones(2, 64, device=device)
    with pytest.raises(ValueError, match="nvfp4 values are no FP8 numbers; use half_operand"):
        fp8_operand(x, wush.NVFP4)
    with pytest.raises(ValueError, match="int4 values are not exact in bfloat16"):
        half_operand(x, wush.INT4)
