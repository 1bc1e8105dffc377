"""Properties that the transforms must have, on correlated random weights and inputs."""

import pytest
import torch
from torch import Tensor

import wush
from wush.transforms import Transform, apply_blocks, hadamard, inverse, transform_weight

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


def sylvester(size: int) -> Tensor:
    """`H_ij = (-1)^popcount(i & j) / sqrt(size)`."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def damped(matrices: Tensor) -> Tensor:
    """`M + 0.01 mean(diag M) I` of each `(G, G)` matrix, by the definition."""
    means = torch.stack([m.trace() / len(m) for m in matrices])
    return matrices + 0.01 * means[:, None, None] * torch.eye(matrices.shape[-1], dtype=torch.float64)


def balanced_moments(weight: Tensor, moments: Tensor, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`T M_X T^T`, `T^-T M_W T^-1` and the diagonals of S, falling, all of damped moments.

    S is found another way than in `fit`: as the singular values of `L_X^T L_W`, L the Cholesky factors.
    """
    blocks = weight.split(moments.shape[-1], dim=1)
    m_x, m_w = damped(moments), damped(torch.stack([w.T @ w / len(w) for w in blocks]))
    spectra = torch.linalg.svdvals(torch.linalg.cholesky(m_x).mT @ torch.linalg.cholesky(m_w))
    inverse = torch.linalg.inv(transform)
    return transform @ m_x @ transform.mT, inverse.mT @ m_w @ inverse, spectra


def assert_relatively_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """To `tolerance` of the largest entry of each expected matrix or vector."""
    scale = expected.flatten(1).abs().amax(1).view(-1, *[1] * (expected.ndim - 1))
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [16, 32])
def test_wush_turns_both_moments_into_the_hadamard_rotation_of_s(size: int, generator: torch.Generator) -> None:
    weight, _, moments = layer(generator, size)
    x_side, w_side, spectra = balanced_moments(weight, moments, wush.Wush().fit(weight, moments))
    assert_relatively_close(x_side, w_side)
    rotated = sylvester(size).T @ x_side @ sylvester(size)
    own = rotated.diagonal(dim1=1, dim2=2)
    assert_relatively_close(rotated, torch.diag_embed(own))
    torch.testing.assert_close(own.sort(descending=True).values, spectra, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [16, 32])
def test_the_diagonal_of_wush_moments_is_the_mean_of_s(size: int, generator: torch.Generator) -> None:
    weight, _, moments = layer(generator, size)
    *sides, spectra = balanced_moments(weight, moments, wush.Wush().fit(weight, moments))
    for side in sides:
        diagonal = side.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, spectra.mean(1, keepdim=True).expand_as(diagonal), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [16, 32])
def test_wus_turns_both_moments_into_s(size: int, generator: torch.Generator) -> None:
    weight, _, moments = layer(generator, size)
    x_side, w_side, spectra = balanced_moments(weight, moments, wush.Wus().fit(weight, moments))
    for side in (x_side, w_side):
        assert_relatively_close(side.flip(1, 2), torch.diag_embed(spectra))


def test_wus_is_wush_without_its_hadamard(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    torch.testing.assert_close(hadamard(32) @ wush.Wus().fit(weight, moments), wush.Wush().fit(weight, moments))


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_hadamard_is_the_normalized_sylvester_matrix(size: int) -> None:
    torch.testing.assert_close(hadamard(size), sylvester(size), rtol=1e-15, atol=0)
    torch.testing.assert_close(hadamard(size) @ hadamard(size).T, torch.eye(size, dtype=torch.float64))


def test_a_hadamard_size_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, not 24"):
        hadamard(24)


def test_random_rotation_is_orthogonal_and_depends_on_its_seed_alone(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    torch.manual_seed(0)
    first = wush.RandomRotation(5).fit(weight, moments)
    torch.manual_seed(1)
    again = wush.RandomRotation(5).fit(weight * 2, moments.flip(0))
    torch.testing.assert_close(first @ first.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(first, again)
    assert not torch.allclose(first, wush.RandomRotation(6).fit(weight, moments))


def test_random_rotations_have_no_preferred_sign() -> None:
    # QR without the sign correction leaves a biased, not a Haar, distribution.
    moments = torch.eye(4, dtype=torch.float64)[None]
    corners = torch.stack([wush.RandomRotation(s).fit(torch.empty(1, 4), moments).diagonal() for s in range(400)])
    assert corners.mean(0).abs().max() < 0.12


@pytest.mark.parametrize("transform", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_transform_preserves_the_product_exactly(
    transform: Transform, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The weight's inverse is that of the rounded transform: in float64 nothing is lost to the rounding."""
    weight, x, moments = layer(generator)
    rounded = transform.fit(weight, moments).to(dtype)
    product = apply_blocks(x, rounded.double()) @ transform_weight(weight, rounded).T
    assert_relatively_close(product[None], (x @ weight.T)[None], 1e-12)


@pytest.mark.parametrize("transform", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computed_in_its_dtype_preserves_its_product_to_that_dtypes_rounding(
    transform: Transform, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The textbook bound: three roundings to the dtype and float32 sums of G and of I terms, of the magnitudes."""
    weight, x, moments = (t.to(dtype) for t in layer(generator))
    rounded = transform.fit(weight, moments.double()).to(dtype)
    transformed = transform_weight(weight, rounded)
    product = apply_blocks(x, rounded) @ transformed.to(dtype).T
    magnitudes = apply_blocks(x.double().abs(), rounded.double().abs()) @ transformed.abs().T
    error = (product.double() - x.double() @ weight.double().T).abs()
    unit = torch.finfo(dtype).eps / 2
    float32_sums = (rounded.shape[-1] + x.shape[1]) * torch.finfo(torch.float32).eps / 2
    assert (error <= (3 * unit + float32_sums) * magnitudes).all()


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


@pytest.mark.parametrize("transform", ALL, ids=lambda t: t.name)
def test_weights_fitted_in_one_batch_get_the_transforms_they_get_alone(
    transform: Transform, generator: torch.Generator
) -> None:
    weight, _, moments = layer(generator)
    weights = [weight, weight[:16].float(), -weight.flip(1)]
    together = transform.fit_each(weights, moments, ["a", "b", "c"])
    assert all(torch.equal(own, transform.fit(alone, moments)) for own, alone in zip(together, weights, strict=True))


def test_transforms_that_look_at_no_weight_are_shared_and_others_on_demand() -> None:
    assert [transform.share for transform in ALL] == [True, True, True, False, False]
    assert wush.Wush(share=True).share


def test_in_a_batch_the_error_names_the_layer_it_is_about(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    dead = weight.clone()
    dead[:, 32:64] = 0
    with pytest.raises(wush.NumericError, match=r"^up_proj weight: second moment is not positive definite"):
        wush.Wush().fit_each([weight, dead], moments, ["gate_proj", "up_proj"])


def test_a_transform_without_an_inverse_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(wush.NumericError, match="up_proj: its transform has no inverse in bfloat16"):
        inverse(torch.ones(2, 4, 4, dtype=torch.bfloat16), "up_proj")


@pytest.mark.gpu
def test_wush_on_a_gpu_balances_the_moments_too(generator: torch.Generator) -> None:
    weight, _, moments = layer(generator)
    fitted = wush.Wush().fit(weight.cuda(), moments.cuda()).cpu()
    x_side, w_side, _ = balanced_moments(weight, moments, fitted)
    assert_relatively_close(x_side, w_side)
