"""Re-encoding of packed MXFP4 weights in FP8 with a power of two a row: the same numbers, or a count of misfits."""

import pytest
import torch
from torch import Tensor

import wush
from wush_kernels.dequantize import natural_order, reference_dequantize
from wush_kernels.encode import (
    DECODE_WINDOW,
    E4M3_WINDOW,
    exponents,
    fp8_row_bases,
    fp8_weight,
    reference_fp8_weight,
)

NAN = 255


def packed_weight(exponent_on: Tensor, generator: torch.Generator, zero_on: Tensor | None = None) -> tuple[Tensor, ...]:
    """Random codes with the given group exponents; all zeros, of either sign, in the groups `zero_on`."""
    codes = torch.randint(0, 16, (*exponent_on.shape, 32), generator=generator, dtype=torch.uint8)
    codes[..., :2] |= 7
    if zero_on is not None:
        codes[zero_on] &= 8
    scales = (exponent_on + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return wush.MXFP4.pack(codes.flatten(-2)), scales


def values(weight: Tensor, row_scales: Tensor) -> Tensor:
    """Float64, natural order."""
    return natural_order(weight.cpu().double(), 32) * row_scales.cpu().double()[:, None]


def exact(packed: Tensor, scales: Tensor) -> Tensor:
    return reference_dequantize(packed, scales, wush.MXFP4, 1.0).double()


@pytest.mark.parametrize("top", [-100, -3, 0, 5, 120])
def test_every_exponent_of_the_window_is_exact(top: int, device: torch.device, generator: torch.Generator) -> None:
    exponent_on = torch.arange(top - 14, top + 1).roll(4).repeat(3, 1)
    packed, scales = packed_weight(exponent_on, generator)
    encoded = fp8_weight(packed.to(device), scales.to(device))
    assert torch.equal(values(encoded.bytes, encoded.row_scales), exact(packed, scales))
    assert encoded.row_scales.tolist() == [2.0 ** (top - 6)] * 3
    assert encoded.outside.item() == 0


def test_the_kernel_equals_its_reference_bit_for_bit(device: torch.device, generator: torch.Generator) -> None:
    exponent_on = torch.randint(-20, 8, (67, 5), generator=generator)  # some do not fit
    zero_on = torch.rand(67, 5, generator=generator) < 0.2
    packed, scales = packed_weight(exponent_on, generator, zero_on)
    ours, theirs = fp8_weight(packed.to(device), scales.to(device)), reference_fp8_weight(packed, scales)
    assert torch.equal(ours.bytes.view(torch.uint8).cpu(), theirs.bytes.view(torch.uint8))
    assert torch.equal(ours.row_scales.cpu(), theirs.row_scales)
    assert ours.outside.item() == theirs.outside.item() > 0


@pytest.mark.parametrize("window", [E4M3_WINDOW, DECODE_WINDOW, (-15, 13)], ids=str)
def test_groups_outside_are_counted_and_no_others(window: tuple[int, int], generator: torch.Generator) -> None:
    width = window[1] - window[0]
    exponent_on = torch.tensor([[3, 3 - width, 2], [3, 2 - width, 2], [3, 2 - width, 2], [-5, -5, 90]])
    zero_on = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    packed, scales = packed_weight(exponent_on, generator, zero_on)
    found = exponents(packed, scales, *window)
    assert found.outside.item() == 2  # one of row 2, one of row 3
    assert found.outside.dtype == torch.int32
    assert found.row_scales.tolist() == [2.0 ** (3 - window[1])] * 3 + [2.0 ** (90 - window[1])]


def test_exponents_are_relative_to_the_rows_base_four_to_a_word(generator: torch.Generator) -> None:
    exponent_on = torch.tensor([[0, -26, -1], [7, 7, -2]])
    found = exponents(*packed_weight(exponent_on, generator), *DECODE_WINDOW)
    assert found.relative.dtype == torch.int32
    assert found.relative.is_contiguous()
    assert found.relative.tolist() == [[26 | 0 << 8 | 25 << 16, 26 | 26 << 8 | 17 << 16]]
    assert found.row_scales.tolist() == [2.0**-13, 2.0**-6]


def test_groups_of_zeros_are_zeros_wherever_their_scale_is(device: torch.device, generator: torch.Generator) -> None:
    exponent_on = torch.tensor([[0, -127, 1], [-127, 100, -127], [5, 127, 5]])
    zero_on = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool()
    packed, scales = packed_weight(exponent_on, generator, zero_on)
    encoded = fp8_weight(packed.to(device), scales.to(device))
    assert torch.equal(values(encoded.bytes, encoded.row_scales), exact(packed, scales))
    assert encoded.outside.item() == 0
    assert encoded.row_scales.tolist() == [2.0**-5, 1.0, 2.0**-1]


def test_the_smallest_rows_keep_a_normal_row_scale(device: torch.device, generator: torch.Generator) -> None:
    packed, scales = packed_weight(torch.tensor([[-127, -126], [-125, -127]]), generator)
    encoded = fp8_weight(packed.to(device), scales.to(device))
    assert torch.equal(values(encoded.bytes, encoded.row_scales), exact(packed, scales))
    assert encoded.row_scales.tolist() == [2.0**-126] * 2


def test_a_nan_scale_makes_its_row_nan_and_no_other(device: torch.device, generator: torch.Generator) -> None:
    exponent_on = torch.tensor([[0, 1], [NAN - 127, 1], [2, 1], [NAN - 127, NAN - 127]])
    packed, scales = packed_weight(exponent_on, generator, torch.tensor([[0, 0], [0, 0], [0, 0], [1, 1]]).bool())
    encoded = fp8_weight(packed.to(device), scales.to(device))
    assert encoded.row_scales.isnan().tolist() == [False, True, False, True]
    found = values(encoded.bytes, encoded.row_scales)
    assert torch.equal(found[::2], exact(packed, scales)[::2])
    assert found[1::2].isnan().all()
    assert not encoded.bytes.float().isnan().any()
    for_decoding = exponents(packed, scales, *DECODE_WINDOW)
    assert for_decoding.row_scales.isnan().tolist() == [False, True, False, True]
    assert encoded.outside.item() == for_decoding.outside.item() == 0


def test_it_writes_into_the_buffer_that_is_given(device: torch.device, generator: torch.Generator) -> None:
    packed, scales = (t.to(device) for t in packed_weight(torch.randint(-6, 3, (9, 4), generator=generator), generator))
    scratch = torch.empty(5000, dtype=torch.float8_e4m3fn, device=device)
    out = scratch[: 9 * 128].view(9, 128)
    encoded = fp8_weight(packed, scales, fp8_row_bases(packed, scales), out)
    assert encoded.bytes.data_ptr() == scratch.data_ptr()
    assert torch.equal(out.view(torch.uint8), fp8_weight(packed, scales).bytes.view(torch.uint8))


def test_quantized_gaussian_weights_fit(device: torch.device, generator: torch.Generator) -> None:
    quantized = wush.MXFP4.quantize(torch.randn(96, 256, generator=generator))
    packed = wush.MXFP4.pack(quantized.codes)
    encoded = fp8_weight(packed.to(device), quantized.scales.to(device))
    assert encoded.outside.item() == 0
    assert torch.equal(values(encoded.bytes, encoded.row_scales), exact(packed, quantized.scales))


def test_no_rows_give_no_bytes(device: torch.device) -> None:
    packed = torch.empty(0, 32, dtype=torch.uint8, device=device)
    scales = torch.empty(0, 2, dtype=torch.float8_e8m0fnu, device=device)
    encoded = fp8_weight(packed, scales)
    assert encoded.bytes.shape == (0, 64)
    assert encoded.row_scales.shape == (0,)
    assert exponents(packed, scales, *DECODE_WINDOW).relative.shape == (1, 0)


def test_bad_input_is_refused_with_what_to_do(device: torch.device) -> None:
    packed = torch.zeros(4, 32, dtype=torch.uint8, device=device)
    scales = torch.zeros(4, 2, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="a multiple of the group size 32"):
        fp8_weight(packed[:, :20].contiguous(), scales)
    with pytest.raises(TypeError, match="scales: dtype float8_e4m3fn, where float8_e8m0fnu"):
        fp8_weight(packed, scales.view(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="packed: not contiguous"):
        fp8_weight(packed[:, :16], scales[:, :1].contiguous())
    with pytest.raises(ValueError, match=r"out: shape \(4, 32\), where \(4, 64\)"):
        fp8_weight(packed, scales, out=torch.empty(4, 32, dtype=torch.float8_e4m3fn, device=device))
    with pytest.raises(ValueError, match=r"multiple of 4 bytes; call .clone\(\)"):
        fp8_weight(torch.zeros(129, dtype=torch.uint8, device=device)[1:].view(4, 32), scales)
    with pytest.raises(ValueError, match="does not fit a byte"):
        exponents(packed, scales, -200, 200)


def test_it_traces_into_a_graph(device: torch.device) -> None:
    packed, scales = (torch.zeros(shape, dtype=torch.uint8, device=device) for shape in ((4, 32), (4, 2)))
    base = torch.zeros(4, dtype=torch.int32, device=device)
    arguments = packed, scales, base, torch.empty(4, 64, dtype=torch.uint8, device=device)
    torch.library.opcheck(torch.ops.wush.fp8_weight, arguments, test_utils=("test_schema", "test_faketensor"))
