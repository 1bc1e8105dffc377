"""Small eigenproblems: the decomposition holds to float64, in the library's order."""

import pytest
import torch
from torch import Tensor

from wush_kernels.eigen import eigen, reference_eigen

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
SIZES = pytest.mark.parametrize("size", [16, 32])


def positive(generator: torch.Generator, device: torch.device, size: int, spread: float, count: int = 2) -> Tensor:
    """Matrices whose columns differ in size by `10^spread`."""
    mix = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    mix = mix * torch.logspace(-spread / 2, spread / 2, size, dtype=torch.float64)
    return (mix.mT @ mix + 1e-6 * torch.eye(size)).to(device)


def assert_decomposes(matrices: Tensor) -> None:
    values, vectors = eigen(matrices)
    expected, _ = reference_eigen(matrices)
    largest = expected[:, -1:, None]
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64, device=matrices.device)
    assert (values.diff(dim=1) >= 0).all()
    assert ((values - expected).abs() <= 1e-12 * largest[..., 0]).all()
    residual = (matrices @ vectors - vectors * values[:, None]).abs() / largest
    assert residual.max() <= 1e-11
    assert ((vectors.mT @ vectors - identity).abs() <= 1e-12).all()


@SIZES
@pytest.mark.parametrize("spread", [0, 4])
def test_it_decomposes_positive_definite_matrices(
    size: int, spread: float, generator: torch.Generator, device: torch.device
) -> None:
    assert_decomposes(positive(generator, device, size, spread))


@SIZES
def test_equal_and_zero_and_sorted_values_are_no_trouble(size: int, device: torch.device) -> None:
    diagonals = torch.stack([torch.full((size,), 3.0), torch.arange(size) / 1.0, torch.arange(size).flip(0) // 2 + 1.0])
    assert_decomposes(torch.diag_embed(diagonals).double().to(device))


@SIZES
def test_the_scale_of_a_matrix_does_not_matter(size: int, generator: torch.Generator, device: torch.device) -> None:
    matrices = positive(generator, device, size, 2, 1)
    values, vectors = eigen(torch.cat([matrices * 2.0**-300, matrices * 2.0**300]))
    assert torch.equal(values[0] * 2.0**300, values[1] * 2.0**-300)
    assert torch.equal(vectors[0], vectors[1])


def test_what_is_not_positive_definite_shows(generator: torch.Generator, device: torch.device) -> None:
    matrices = positive(generator, device, 16, 0, 3)
    matrices[0, 3, 4] = torch.nan
    matrices[1] -= 2 * torch.linalg.eigvalsh(matrices[1])[0] * torch.eye(16, dtype=torch.float64, device=device)
    values, _ = eigen(matrices)
    assert [bool((own > 0).all()) for own in values] == [False, False, True]


@pytest.mark.gpu
@SIZES
def test_many_are_decomposed_at_once(size: int, generator: torch.Generator, device: torch.device) -> None:
    assert_decomposes(positive(generator, device, size, 3, 1000))


def test_none_and_wrong_ones(device: torch.device) -> None:
    values, vectors = eigen(torch.empty(0, 16, 16, dtype=torch.float64, device=device))
    assert values.shape == (0, 16)
    assert vectors.shape == (0, 16, 16)
    with pytest.raises(ValueError, match="size 24, where 16 or 32"):
        eigen(torch.empty(1, 24, 24, dtype=torch.float64, device=device))
    with pytest.raises(TypeError, match="float32, where float64"):
        eigen(torch.empty(1, 16, 16, device=device))
