"""Element arithmetic of the kernels: bit-equal to `wush.elements` on every float32 exponent, every tie, every code."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from wush.elements import E2M1, E4M3, INT4_MIDPOINT, INT4_SYMMETRIC, Element
from wush_kernels import numerics as nm

ELEMENTS = [E2M1, E4M3, INT4_MIDPOINT, INT4_SYMMETRIC]
N, BLOCK = 1 << 16, 1 << 12


@triton.jit
def _element_kernel(x, snapped, code, back, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = nm.snap(tl.load(x + at), ELEMENT)
    tl.store(snapped + at, value)
    codes = nm.to_code(value, ELEMENT)
    tl.store(code + at, codes.to(tl.uint8))
    tl.store(back + at, nm.from_code(codes, ELEMENT))


@triton.jit
def _power_kernel(power, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(power + at, nm.power_of_two(tl.minimum(at, 254) - 127))


def every_kind_of_number(generator: torch.Generator) -> Tensor:
    """Random bits; Gaussians of many sizes; multiples of 1/16, so all ties; grid midpoints and their neighbours."""
    bits = torch.randint(-(2**31), 2**31, (N // 4,), generator=generator).int()
    anything = bits.view(torch.float32)
    spread = torch.randn(N // 4, generator=generator) * torch.exp2(
        torch.randint(-12, 10, (N // 4,), generator=generator).float()
    )
    sixteenths = torch.arange(-N // 8, N // 8) / 16
    near = sixteenths.view(torch.int32) + torch.randint(-1, 2, (N // 4,), generator=generator).int()
    x = torch.cat([anything.nan_to_num(0, 1e38, -1e38), spread, sixteenths, near.view(torch.float32)])
    zeros_and_subnormals = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, 448.0, 464.0, 480.0, 3.4e38])
    x[: len(zeros_and_subnormals)] = zeros_and_subnormals
    return x.nan_to_num(0)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_elements_are_bit_equal_to_pytorchs(element: Element, device: torch.device, generator: torch.Generator) -> None:
    x = every_kind_of_number(generator)
    snapped, back = torch.empty(N, device=device), torch.empty(N, device=device)
    code = torch.empty(N, dtype=torch.uint8, device=device)
    _element_kernel[(N // BLOCK,)](x.to(device), snapped, code, back, element.name, BLOCK, enable_fp_fusion=False)
    expected = element.snap(x.clone())
    assert torch.equal(snapped.cpu(), expected)
    assert torch.equal(code.cpu(), element.to_codes(expected))  # with the sign of zero, where there is one
    assert torch.equal(back.cpu(), expected)


def test_powers_of_two_are_exact_subnormals_included(device: torch.device) -> None:
    power = torch.empty(256, device=device)
    _power_kernel[(1,)](power, 256, enable_fp_fusion=False)
    assert torch.equal(power[:255].cpu().double(), torch.exp2(torch.arange(-127, 128).double()))
