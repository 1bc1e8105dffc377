"""Properties that the transforms must have, on correlated random weights and inputs."""

import pytest
import torch
from torch import Tensor

import wush
from wush.moments import damp, weight_moments
from wush.transforms import Transform, apply_blocks, hadamard, transform_weight

ALL = [wush.Identity(), wush.RandomRotation(3), wush.Hadamard(), wush.Wus(), wush.Wush()]


def layer(
    generator: torch.Generator, size: int = 32, outputs: int = 48, blocks: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `(O, I)`, correlated tokens `(M, I)` with outlier channels, and `M_X` `(N, G, G)`."""
    features = size * blocks
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    weight *= torch.logspace(-1, 1, features, dtype=torch.float64)[torch.randperm(features, generator=generator)]
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(500, features, generator=generator, dtype=torch.float64) @ mix
    x[:, 7] *= 30
    moment = wush.SecondMoment(features)
    moment.add(x)
    return weight, x, moment.diagonal_blocks(size)


@pytest.mark.parametrize("size", [16, 32])
def test_wush_gives_both_sides_the_same_moment_with_constant_diagonal(size: int, generator: torch.Generator) -> None:
    weight, _, moments = layer(generator, size)
    transform = wush.Wush().fit(weight, moments)
    inverse = torch.linalg.inv(transform)
    x_side = transform @ damp(moments) @ transform.mT
    w_side = inverse.mT @ damp(weight_moments(weight, size)) @ inverse
    torch.testing.assert_close(x_side, w_side, rtol=1e-8, atol=1e-8)
    diagonal = x_side.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, diagonal.mean(1, keepdim=True).expand_as(diagonal), rtol=1e-8, atol=0)
    spectrum = hadamard(size).T @ x_side @ hadamard(size)
    torch.testing.assert_close(spectrum, torch.diag_embed(spectrum.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-7)


def test_wus_is_wush_without_its_hadamard(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    torch.testing.assert_close(hadamard(32) @ wush.Wus().fit(weight, moments), wush.Wush().fit(weight, moments))


def test_hadamard_is_the_normalized_sylvester_matrix() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(hadamard(8), torch.kron(torch.kron(two, two), two) / 8**0.5)
    with pytest.raises(ValueError, match="power of two, not 24"):
        hadamard(24)


def test_random_rotation_is_orthogonal_and_depends_on_its_seed_alone(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    first, again = wush.RandomRotation(5).fit(weight, moments), wush.RandomRotation(5).fit(weight * 2, moments)
    torch.testing.assert_close(first @ first.T, torch.eye(32, dtype=torch.float64))
    assert torch.equal(first, again)
    assert not torch.allclose(first, wush.RandomRotation(6).fit(weight, moments))


def test_random_rotations_have_no_preferred_sign() -> None:
    # QR without the sign correction leaves a biased, not a Haar, distribution.
    moments = torch.eye(4, dtype=torch.float64)[None]
    corners = torch.stack([wush.RandomRotation(s).fit(torch.empty(1, 4), moments).diagonal() for s in range(400)])
    assert corners.mean(0).abs().max() < 0.12


@pytest.mark.parametrize("transform", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_a_layer_does_not_change(
    transform: Transform, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight, x, moments = layer(generator)
    rounded = transform.fit(weight, moments).to(dtype)
    product = apply_blocks(x, rounded.double()) @ transform_weight(weight, rounded).T
    torch.testing.assert_close(product, x @ weight.T, rtol=1e-6, atol=1e-6 * (x @ weight.T).abs().max().item())


def test_apply_blocks_multiplies_each_block_by_its_own_matrix(generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 12, generator=generator)
    matrices = torch.randn(3, 4, 4, generator=generator)
    expected = torch.cat([x[..., 4 * b : 4 * b + 4] @ matrices[b].T for b in range(3)], -1)
    torch.testing.assert_close(apply_blocks(x, matrices), expected)
    torch.testing.assert_close(apply_blocks(x, matrices[0]), torch.cat([c @ matrices[0].T for c in x.split(4, -1)], -1))


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4], ids=lambda f: f.name)
def test_layer_loss_of_wush_is_below_hadamard_and_identity(fmt: wush.Format, generator: torch.Generator) -> None:
    weight, x, moments = layer(generator, fmt.group_size, 96)
    losses = {}
    for transform in (wush.Identity(), wush.Hadamard(), wush.Wush()):
        matrix = transform.fit(weight, moments)
        losses[transform.name] = wush.layer_loss(
            x, weight, fmt.round_trip(transform_weight(weight, matrix)), matrix, fmt
        )
    assert losses["wush"] < 0.8 * losses["h"] < 0.8 * losses["i"]


def test_a_group_of_dead_channels_is_an_error_that_names_the_layer(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    moments[1] = 0
    with pytest.raises(wush.NumericError, match="down_proj input: second moment is not positive definite"):
        wush.Wush().fit(weight, moments, "down_proj")
