"""The sweep of one block against its definition, bit for bit where the float64 sums allow it."""

import pytest
import torch
from torch import Tensor

import wush
from wush_kernels.gptq_sweep import gptq_sweep, reference_gptq_sweep, supports

FORMATS = [
    wush.MXFP4,
    wush.Mxfp4("ocp"),
    wush.NVFP4,
    wush.Nvfp4("calibrated"),
    wush.INT4,
    wush.Int4("midrise"),
    wush.Int4("absmax"),
    wush.MXFP8,
]
ALL = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.scale_rule}")

Block = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(fmt: wush.Format, generator: torch.Generator, rows: int, device: torch.device) -> Block:
    """A block, the inverse of a transform, a unit lower factor and a full matrix, as GPTQ makes them."""
    size = fmt.group_size
    mix = torch.randn(3, size, size, generator=generator, dtype=torch.float64)
    lower = torch.linalg.cholesky(mix[0] @ mix[0].T + torch.eye(size))
    block = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    block *= torch.logspace(-3, 3, rows, dtype=torch.float64)[:, None]
    return block.to(device), mix[1].to(device), (lower / lower.diagonal()).to(device), mix[2].to(device)


def swept(fmt: wush.Format, block: Block, global_scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows, device = len(block[0]), block[0].device
    codes = torch.empty(rows, fmt.group_size, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, 1, dtype=fmt.scale_dtype, device=device)
    errors = torch.empty(rows, fmt.group_size, dtype=torch.float64, device=device)
    gptq_sweep(*block, fmt, codes, scales, errors, global_scale)  # type: ignore[arg-type]
    return codes, scales, errors


def assert_same(actual: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1].view(torch.uint8), expected[1].view(torch.uint8))
    size = expected[2].abs().amax(1, keepdim=True)
    assert ((actual[2] - expected[2]).abs() <= 1e-10 * size).all()


@ALL
@pytest.mark.parametrize("rows", [1, 16, 45])
def test_codes_scales_and_errors_are_those_of_the_definition(
    fmt: wush.Format, rows: int, generator: torch.Generator, device: torch.device
) -> None:
    block = problem(fmt, generator, rows, device)
    g = fmt.weight_global_scale(block[0])
    assert_same(swept(fmt, block, g), reference_gptq_sweep(*block, fmt, g))  # type: ignore[arg-type]


@pytest.mark.gpu
@ALL
def test_many_rows_differ_in_no_more_than_a_code_in_a_million(
    fmt: wush.Format, generator: torch.Generator, device: torch.device
) -> None:
    block = problem(fmt, generator, 20_000, device)
    codes, scales, _ = swept(fmt, block)
    expected_codes, expected_scales, _ = reference_gptq_sweep(*block, fmt)  # type: ignore[arg-type]
    assert (codes != expected_codes).double().mean() < 1e-6
    assert (scales.float() != expected_scales.float()).double().mean() < 1e-6


@ALL
def test_a_row_of_zeros_has_the_codes_of_the_definition(
    fmt: wush.Format, generator: torch.Generator, device: torch.device
) -> None:
    block = problem(fmt, generator, 3, device)
    block[0][1] = 0
    assert_same(swept(fmt, block), reference_gptq_sweep(*block, fmt))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
@ALL
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_marked_and_no_other_changes(
    fmt: wush.Format, value: float, generator: torch.Generator, device: torch.device
) -> None:
    block = problem(fmt, generator, 18, device)
    expected = swept(fmt, block)
    block[0][4, 7] = value
    codes, scales, _ = swept(fmt, block)
    assert scales.float().isnan().flatten().tolist() == [row == 4 for row in range(18)]
    others = torch.arange(18, device=device) != 4
    assert torch.equal(codes[others], expected[0][others])


def test_operands_may_be_slices_and_matrices_transposed(generator: torch.Generator, device: torch.device) -> None:
    fmt = wush.MXFP4
    block, inverse, lower, spread = problem(fmt, generator, 20, device)
    expected = swept(fmt, (block, inverse, lower, spread))
    wide = torch.zeros(20, 96, dtype=torch.float64, device=device)
    wide[:, 32:64] = block
    codes = torch.zeros(20, 96, dtype=torch.uint8, device=device)
    scales = torch.zeros(20, 3, dtype=torch.uint8, device=device).view(fmt.scale_dtype)
    errors = torch.zeros(20, 96, dtype=torch.float64, device=device)
    own = slice(32, 64)
    turned = [matrix.mT.contiguous().mT for matrix in (inverse, lower, spread)]
    gptq_sweep(wide[:, own], *turned, fmt, codes[:, own], scales[:, 1:2], errors[:, own])
    assert_same((codes[:, own], scales[:, 1:2].contiguous(), errors[:, own]), expected)
    for written in (codes, errors):
        assert not written[:, :32].any()
        assert not written[:, 64:].any()
    assert not scales.view(torch.uint8)[:, ::2].any()


def test_formats_without_a_kernel_are_known(device: torch.device) -> None:
    class Other:
        name, group_size = "other", 32

    assert not supports(Other())  # type: ignore[arg-type]
    assert all(supports(fmt) for fmt in FORMATS)


def test_what_does_not_fit_is_refused(generator: torch.Generator, device: torch.device) -> None:
    block = problem(wush.MXFP4, generator, 4, device)
    with pytest.raises(TypeError, match="block: dtype float32"):
        swept(wush.MXFP4, (block[0].float(), *block[1:]))
    with pytest.raises(ValueError, match=r"lower: shape \(3[12], 3[12]\)"):
        swept(wush.MXFP4, (block[0], block[1], block[2][:, :31], block[3]))
    with pytest.raises(ValueError, match=r"block: shape \(4, 32\)"):
        swept(wush.NVFP4, block)
