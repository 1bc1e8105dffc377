"""The FP4 matmul: its twin without FP4 tensor cores here, the instruction itself on Blackwell; and swizzled scales."""

import pytest
import torch
from torch import Tensor

import wush
from wush_kernels.matmul_blackwell import (
    matmul_dot_scaled,
    reference_matmul_dot_scaled,
    swizzle_scales,
    unswizzle_scales,
)

FP4 = [wush.MXFP4, wush.NVFP4]
BY_NAME = {"ids": lambda f: f.name}


def has_fp4(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def operand(fmt: wush.Format, rows: int, features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, features, generator=generator) * torch.exp2(torch.randn(rows, 1, generator=generator) * 2)
    quantized = fmt.quantize(x)
    return fmt.pack(quantized.codes), quantized.scales


def multiply(
    a: tuple[Tensor, Tensor],
    w: tuple[Tensor, Tensor],
    fmt: wush.Format,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """By the wrapper where there are FP4 tensor cores or an interpreter, by the emulation on other GPUs."""
    (a_packed, a_scales), (w_packed, w_scales) = ((packed.to(device), scales.to(device)) for packed, scales in (a, w))
    bias = None if bias is None else bias.to(device)
    if device.type == "cpu" or has_fp4(device):
        return matmul_dot_scaled(a_packed, a_scales, w_packed, w_scales, fmt, alpha, bias, out_dtype)
    bits = a_scales.view(torch.uint8), w_scales.view(torch.uint8)
    return torch.ops.wush.matmul_dot_scaled(
        a_packed, bits[0], w_packed, bits[1], fmt.name, alpha, bias, out_dtype, True
    )


@pytest.mark.parametrize("fmt", FP4, **BY_NAME)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "features", "inputs"), [(1, 32, 96), (17, 160, 352), (33, 37, 64), (130, 129, 32)])
def test_products_are_float64s_within_the_rounding_of_sums_and_output(
    fmt: wush.Format,
    out_dtype: torch.dtype,
    rows: int,
    features: int,
    inputs: int,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    a, w = operand(fmt, rows, inputs, generator), operand(fmt, features, inputs, generator)
    bias, alpha = torch.randn(features, generator=generator).bfloat16(), fmt.global_scale**2
    ours = multiply(a, w, fmt, alpha, bias, out_dtype, device)
    exact = reference_matmul_dot_scaled(*a, *w, fmt, alpha, bias, torch.float64)
    magnitude = reference_matmul_dot_scaled(*unsigned(a), *unsigned(w), fmt, alpha, bias.abs(), torch.float64)
    bound = exact.abs() * torch.finfo(out_dtype).eps / 2 + magnitude * (inputs + 4) * 2.0**-23
    assert ours.dtype == out_dtype
    assert ours.shape == (rows, features)
    assert ((ours.cpu().double() - exact).abs() <= bound).all()


def unsigned(operand: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return operand[0] & 0x77, operand[1]


@pytest.mark.parametrize("fmt", FP4, **BY_NAME)
def test_integer_sums_are_exact(fmt: wush.Format, device: torch.device, generator: torch.Generator) -> None:
    shape = (20, 128)
    codes = [fmt.pack(torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)) for _ in range(2)]
    ones = torch.full((20, 128 // fmt.group_size), 127 if fmt is wush.MXFP4 else 0x38, dtype=torch.uint8)
    a, w = ((code, ones.view(fmt.scale_dtype)) for code in codes)
    ours = multiply(a, w, fmt, 4.0, None, torch.float32, device)
    assert torch.equal(ours.cpu(), reference_matmul_dot_scaled(*a, *w, fmt, 4.0, None, torch.float32))


@pytest.mark.parametrize("fmt", FP4, **BY_NAME)
def test_a_nan_scale_makes_its_row_nan_and_no_other(
    fmt: wush.Format, device: torch.device, generator: torch.Generator
) -> None:
    (a_packed, a_scales), w = operand(fmt, 5, 64, generator), operand(fmt, 6, 64, generator)
    bits = a_scales.view(torch.uint8).clone()
    bits[3, 1] = 255 if fmt is wush.MXFP4 else 0x7F
    ours = multiply((a_packed, bits.view(fmt.scale_dtype)), w, fmt, 1.0, None, torch.float32, device)
    assert ours.isnan().all(1).tolist() == [False, False, False, True, False]
    assert ours.isnan().sum() == 6


@pytest.mark.parametrize(("rows", "features"), [(0, 8), (4, 0)])
def test_an_empty_operand_gives_an_empty_product(rows: int, features: int, device: torch.device) -> None:
    a, w = ((torch.zeros(n, 32, dtype=torch.uint8), torch.zeros(n, 2, dtype=torch.uint8)) for n in (rows, features))
    a, w = ((packed, scales.view(torch.float8_e8m0fnu)) for packed, scales in (a, w))
    assert multiply(a, w, wush.MXFP4, 1.0, None, torch.bfloat16, device).shape == (rows, features)


@pytest.mark.gpu
def test_before_blackwell_it_says_which_path_to_take() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if has_fp4(device):
        pytest.skip("this GPU has FP4 tensor cores")
    packed = torch.zeros(4, 32, dtype=torch.uint8, device=device)
    scales = torch.zeros(4, 2, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
    with pytest.raises(RuntimeError, match=r"no FP4 tensor cores; use .*matmul_fp8 for mxfp4"):
        matmul_dot_scaled(packed, scales, packed, scales, wush.MXFP4, 1.0, None, torch.bfloat16)


def test_bad_input_is_refused_with_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("the capability is refused first; checks do not depend on the device")
    packed, more = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 48, dtype=torch.uint8)
    scales = torch.zeros(4, 2, dtype=torch.uint8).view(torch.float8_e8m0fnu)

    def call(a: Tensor = packed, w: Tensor = packed, fmt: wush.Format = wush.MXFP4, **others: object) -> None:
        arguments = {"alpha": 1.0, "bias": None, "out_dtype": torch.bfloat16} | others
        matmul_dot_scaled(a, scales, w, scales, fmt, **arguments)  # type: ignore[arg-type]

    call()
    with pytest.raises(ValueError, match="multiple of the group size 32"):
        call(packed[:, :20].contiguous())
    with pytest.raises(ValueError, match=r"w_packed: shape \(4, 48\), where \(4, 32\)"):
        call(w=more)
    with pytest.raises(ValueError, match="a_packed: not contiguous"):
        call(more[:, :32])
    with pytest.raises(TypeError, match="a_scales: dtype float8_e8m0fnu, where float8_e4m3fn"):
        call(fmt=wush.NVFP4)
    with pytest.raises(ValueError, match="no FP4 tensor core multiplies int4; there are mxfp4, nvfp4"):
        call(fmt=wush.INT4)
    with pytest.raises(ValueError, match=r"bias: shape \(3,\), where \(4,\)"):
        call(bias=torch.zeros(3))
    with pytest.raises(TypeError, match="out_dtype"):
        call(out_dtype=torch.float64)


def test_swizzled_scales_stand_where_the_tensor_cores_look() -> None:
    scales = torch.randint(0, 255, (200, 9), dtype=torch.uint8)
    swizzled = swizzle_scales(scales.view(torch.float8_e8m0fnu))
    assert swizzled.dtype == torch.float8_e8m0fnu
    flat = swizzled.view(torch.uint8)
    assert flat.shape == (256 * 12,)
    for r, c in ((0, 0), (31, 3), (32, 0), (127, 3), (128, 4), (199, 8)):
        tile = (r // 128) * 3 + c // 4
        assert flat[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] == scales[r, c]
    assert flat.sum() == scales.sum()  # the padding is zero
    assert torch.equal(unswizzle_scales(swizzled, 200, 9).view(torch.uint8), scales)


@pytest.mark.parametrize("fmt", FP4, **BY_NAME)
def test_it_traces_into_a_graph(fmt: wush.Format, device: torch.device, generator: torch.Generator) -> None:
    (a, a_scales), (w, w_scales) = operand(fmt, 3, 64, generator), operand(fmt, 5, 64, generator)
    bits = a_scales.view(torch.uint8), w_scales.view(torch.uint8)
    tensors = (tensor.to(device) for tensor in (a, bits[0], w, bits[1]))
    arguments = (*tensors, fmt.name, 1.0, None, torch.float32, not has_fp4(device))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.wush.matmul_dot_scaled, arguments, test_utils=checks)
