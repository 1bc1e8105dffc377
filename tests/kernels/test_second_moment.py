"""The symmetric product against float64, whatever the sizes; on a GPU in bfloat16 too."""

import pytest
import torch
from torch import Tensor

from wush_kernels.second_moment import Tiling, choose_tiling, reference_second_moment, second_moment

SHAPES = [(1, 16), (7, 32), (33, 64), (70, 80), (100, 144), (64, 208), (600, 48)]


def tokens(generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Interpreted bfloat16 products are wrong, so these run on a GPU only."""
    return [torch.float16, torch.float32, *([torch.bfloat16] if device.type == "cuda" else [])]


def assert_close_to(actual: Tensor, expected: Tensor, x: Tensor) -> None:
    """The bound of a float32 sum of M terms, any order: `M u` of the magnitudes' sum, and one rounding to add."""
    unit = torch.finfo(torch.float32).eps
    bound = len(x) * unit * (x.double().abs().T @ x.double().abs()) + unit * expected.abs().double()
    assert ((actual.double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_of_every_pair_of_columns(
    shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> None:
    for dtype in dtypes(device):
        x = tokens(generator, shape, dtype, device)
        assert_close_to(second_moment(x), reference_second_moment(x), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_triangles_are_the_same_bits(
    shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> None:
    for dtype in dtypes(device):
        moment = second_moment(tokens(generator, shape, dtype, device))
        assert torch.equal(moment, moment.T)


def test_it_adds_to_what_there_is_with_one_rounding(generator: torch.Generator, device: torch.device) -> None:
    first, second = (tokens(generator, (50, 96), torch.float16, device) for _ in range(2))
    sums = second_moment(first)
    expected = sums + second_moment(second)
    assert second_moment(second, out=sums) is sums
    assert torch.equal(sums, expected)


def test_small_integers_are_summed_exactly(generator: torch.Generator, device: torch.device) -> None:
    x = torch.randint(-8, 9, (333, 272), generator=generator).to(device)
    for dtype in dtypes(device):
        assert torch.equal(second_moment(x.to(dtype)), (x.T.double() @ x.double()).float())


@pytest.mark.parametrize(
    "tiling",
    [Tiling(32, 32, 16, 4, 1), Tiling(32, 16, 16, 4, 1, group=2), Tiling(32, 32, 32, 4, 1, group=3)],
    ids=lambda t: f"{t.rows}x{t.columns} group {t.group}",
)
def test_any_tiling_covers_the_matrix(tiling: Tiling, generator: torch.Generator, device: torch.device) -> None:
    for features in (16, 32, 96, 176, 288):
        x = torch.randint(-8, 9, (40, features), generator=generator).half().to(device)
        assert torch.equal(second_moment(x, tiling=tiling), reference_second_moment(x))


@pytest.mark.gpu
@pytest.mark.parametrize("features", [576, 1536, 4096, 14336])
def test_the_tilings_of_a_gpu_cover_the_matrix(features: int, generator: torch.Generator, device: torch.device) -> None:
    x = torch.randint(-8, 9, (1000, features), generator=generator).bfloat16().to(device)
    assert choose_tiling(features, torch.bfloat16).rows >= 128
    assert torch.equal(second_moment(x), (x.float().T @ x.float()))


def test_rows_may_be_apart_and_there_may_be_none(generator: torch.Generator, device: torch.device) -> None:
    x = tokens(generator, (40, 128), torch.float16, device)
    assert torch.equal(second_moment(x[:, :64]), second_moment(x[:, :64].contiguous()))
    assert torch.equal(second_moment(x[:0]), torch.zeros(128, 128, device=device))


def test_nan_reaches_its_own_row_and_column_alone(generator: torch.Generator, device: torch.device) -> None:
    x = tokens(generator, (40, 64), torch.float16, device)
    x[3, 5] = torch.nan
    wrong = second_moment(x).isnan()
    expected = torch.zeros_like(wrong)
    expected[5, :], expected[:, 5] = True, True
    assert torch.equal(wrong, expected)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = torch.zeros(8, 32, dtype=torch.float16, device=device)
    with pytest.raises(TypeError, match="x: dtype float64"):
        second_moment(x.double())
    with pytest.raises(ValueError, match=r"x: shape \(8, 32, 1\)"):
        second_moment(x[..., None])
    with pytest.raises(ValueError, match=r"out: shape \(32, 16\)"):
        second_moment(x, out=torch.zeros(32, 16, device=device))
    with pytest.raises(ValueError, match="stride 32"):
        second_moment(x.T)
