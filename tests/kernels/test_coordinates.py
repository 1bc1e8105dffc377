"""Inverses and factors of many blocks against LAPACK, to float64."""

import pytest
import torch
from torch import Tensor

from wush_kernels.coordinates import coordinates, reference_coordinates

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
SIZES = pytest.mark.parametrize("size", [16, 32])


def problem(
    generator: torch.Generator, device: torch.device, size: int, transforms: int, blocks: int
) -> tuple[Tensor, Tensor]:
    """Transforms with channels of unequal size, and lower factors."""
    channels = torch.logspace(-1, 1, size, dtype=torch.float64)
    fitted = torch.randn(transforms, blocks, size, size, generator=generator, dtype=torch.float64) * channels
    mix = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    factors = torch.linalg.cholesky(mix @ mix.mT + 0.1 * torch.eye(size))
    return fitted.to(device), factors.to(device)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        scale = other.abs().amax((-2, -1), keepdim=True)
        assert ((own - other).abs() <= 1e-9 * scale).all()


@SIZES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_they_are_those_of_the_definition(
    size: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    transforms, factors = problem(generator, device, size, 2, 2)
    transforms = transforms.to(dtype)
    assert_close(coordinates(transforms, factors), reference_coordinates(transforms, factors))


@SIZES
def test_lower_is_unit_lower_triangular_and_the_products_hold(
    size: int, generator: torch.Generator, device: torch.device
) -> None:
    transforms, factors = problem(generator, device, size, 1, 2)
    inverse, lower, spread = coordinates(transforms, factors)
    identity = torch.eye(size, dtype=torch.float64, device=device)
    assert torch.equal(lower, lower.tril())
    assert torch.equal(lower.diagonal(dim1=-2, dim2=-1), torch.ones_like(lower[..., 0]))
    torch.testing.assert_close(inverse @ transforms, identity.expand_as(transforms), rtol=0, atol=1e-10)
    torch.testing.assert_close(spread @ factors.mT, transforms)


@pytest.mark.parametrize("order", ["reversed", "rotated"])
def test_zero_pivots_are_no_trouble(order: str, device: torch.device) -> None:
    identity = torch.eye(16, dtype=torch.float64, device=device)
    transform = identity.flip(0) if order == "reversed" else identity.roll(5, 0)
    inverse, lower, _ = coordinates(transform[None, None], identity[None])
    assert torch.equal(inverse[0, 0], transform.T)
    assert torch.equal(lower[0, 0], identity)


def test_a_transform_without_an_inverse_is_not_finite_and_no_other_changes(
    generator: torch.Generator, device: torch.device
) -> None:
    transforms, factors = problem(generator, device, 16, 1, 3)
    expected = coordinates(transforms, factors)
    transforms[0, 1, 4] = 0
    found = coordinates(transforms, factors)
    assert [bool(own.isfinite().all()) for own in found[0][0]] == [True, False, True]
    assert torch.equal(found[1][0, ::2], expected[1][0, ::2])


@pytest.mark.gpu
@SIZES
def test_many_blocks_at_once(size: int, generator: torch.Generator, device: torch.device) -> None:
    transforms, factors = problem(generator, device, size, 2, 300)
    assert_close(coordinates(transforms, factors), reference_coordinates(transforms, factors))


def test_what_does_not_fit_is_refused(generator: torch.Generator, device: torch.device) -> None:
    transforms, factors = problem(generator, device, 16, 1, 2)
    with pytest.raises(TypeError, match="factors: dtype float32"):
        coordinates(transforms, factors.float())
    with pytest.raises(ValueError, match=r"factors: shape \(1, 16, 16\)"):
        coordinates(transforms, factors[:1])
    with pytest.raises(ValueError, match="size 8, where 16 or 32"):
        coordinates(transforms[..., :8, :8], factors[..., :8, :8])
