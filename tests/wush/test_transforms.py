"""Properties that the transforms must have, on correlated random weights and inputs."""

import pytest
import torch
from torch import Tensor

import wush
from wush.transforms import Transform, apply_blocks, hadamard, inverse, transform_weight

ALL = [
    wush.Identity(), wush.RandomRotation(3), wush.RandomRotation(3, per_tile=True), wush.Hadamard(),
    wush.SmoothQuant(), wush.Hu(), wush.Wus(), wush.Wush(), wush.Wush(power=0.2, signs=1),
]  # fmt: skip


def layer(
    generator: torch.Generator, size: int = 32, outputs: int = 48, blocks: int = 3
) -> tuple[Tensor, Tensor, wush.Inputs]:
    """A weight `(O, I)`, correlated tokens `(M, I)` with outlier channels, and what is known of them."""
    features = size * blocks
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    weight *= torch.logspace(-1, 1, features, dtype=torch.float64)[torch.randperm(features, generator=generator)]
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(500, features, generator=generator, dtype=torch.float64) @ mix
    x[:, 7] *= 30
    moment = wush.SecondMoment(features, keep_peaks=True)
    moment.add(x)
    return weight, x, moment.inputs(size)


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
    weight, _, inputs = layer(generator, size)
    x_side, w_side, spectra = balanced_moments(weight, inputs.moments_ngg, wush.Wush().fit(weight, inputs))
    assert_relatively_close(x_side, w_side)
    rotated = sylvester(size).T @ x_side @ sylvester(size)
    own = rotated.diagonal(dim1=1, dim2=2)
    assert_relatively_close(rotated, torch.diag_embed(own))
    torch.testing.assert_close(own.sort(descending=True).values, spectra, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [16, 32])
def test_the_diagonal_of_wush_moments_is_the_mean_of_s(size: int, generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator, size)
    *sides, spectra = balanced_moments(weight, inputs.moments_ngg, wush.Wush().fit(weight, inputs))
    for side in sides:
        diagonal = side.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, spectra.mean(1, keepdim=True).expand_as(diagonal), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [16, 32])
def test_wus_turns_both_moments_into_s(size: int, generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator, size)
    x_side, w_side, spectra = balanced_moments(weight, inputs.moments_ngg, wush.Wus().fit(weight, inputs))
    for side in (x_side, w_side):
        assert_relatively_close(side.flip(1, 2), torch.diag_embed(spectra))


def test_wus_is_wush_without_its_hadamard(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    torch.testing.assert_close(hadamard(32) @ wush.Wus().fit(weight, inputs), wush.Wush().fit(weight, inputs))


@pytest.mark.parametrize("size", [16, 32])
def test_hu_gives_each_side_a_constant_diagonal_and_balances_none(size: int, generator: torch.Generator) -> None:
    """`Hd S^2 Hd^T` of the inputs and the identity of the weight: the largest diagonal is 1.0 of the smallest."""
    weight, _, inputs = layer(generator, size)
    x_side, w_side, spectra = balanced_moments(weight, inputs.moments_ngg, wush.Hu().fit(weight, inputs))
    assert_relatively_close(w_side, torch.eye(size, dtype=torch.float64).expand_as(w_side))
    diagonal = x_side.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, spectra.square().mean(1, keepdim=True).expand_as(diagonal), rtol=1e-9, atol=0)


def test_hu_is_a_rotation_of_what_the_weights_factor_makes_of_the_inputs(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    m_w = damped(torch.stack([w.T @ w / len(w) for w in weight.split(32, dim=1)]))
    rotation = wush.Hu().fit(weight, inputs) @ torch.linalg.inv(torch.linalg.cholesky(m_w).mT)
    identity = torch.eye(32, dtype=torch.float64).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.mT, identity, rtol=0, atol=1e-9)


def test_the_powers_of_s_lead_from_one_side_balanced_alone_to_the_other(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    fitted = {p: wush.Wush(power=p).fit(weight, inputs) for p in (0.0, 0.25, 0.5, 1.0)}
    assert torch.equal(fitted[0.5], wush.Wush().fit(weight, inputs))
    torch.testing.assert_close(fitted[1.0], wush.Hu().fit(weight, inputs), rtol=1e-12, atol=0)
    for p, transform in fitted.items():
        x_side, w_side, spectra = balanced_moments(weight, inputs.moments_ngg, transform)
        for side, power in ((x_side, 2 * p), (w_side, 2 - 2 * p)):
            means = spectra.pow(power).mean(1, keepdim=True).expand(3, 32)
            torch.testing.assert_close(side.diagonal(dim1=1, dim2=2), means, rtol=1e-8, atol=0)


@pytest.mark.parametrize("power", [-0.1, 1.1, float("nan")])
def test_a_power_outside_of_0_to_1_is_an_error(power: float) -> None:
    with pytest.raises(ValueError, match=rf"power={power}: wush needs a number from 0 to 1"):
        wush.Wush(power=power)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_divides_each_channel_by_its_number(alpha: float, generator: torch.Generator) -> None:
    weight, x, inputs = layer(generator)
    fitted = wush.SmoothQuant(alpha).fit(weight, inputs)
    expected = [
        max(abs(w.item()) for w in weight[:, i]) ** (1 - alpha) / max(abs(v.item()) for v in x[:, i]) ** alpha
        for i in range(96)
    ]
    oracle = torch.tensor(expected, dtype=torch.float64).view(3, 32).diag_embed()
    torch.testing.assert_close(fitted, oracle, rtol=1e-12, atol=0)


def test_smoothquant_gives_a_channel_the_same_maximum_on_both_sides(generator: torch.Generator) -> None:
    weight, x, inputs = layer(generator)
    fitted = wush.SmoothQuant().fit(weight, inputs)
    torch.testing.assert_close(apply_blocks(x, fitted).abs().amax(0), transform_weight(weight, fitted).abs().amax(0))


def test_smoothquant_leaves_a_channel_alone_that_is_zero_on_a_side(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    assert inputs.peaks_ng is not None
    inputs.peaks_ng[0, 3] = 0
    weight[:, 40] = 0
    fitted = wush.SmoothQuant().fit(weight, inputs)
    assert fitted[0, 3, 3] == fitted[1, 8, 8] == 1
    assert fitted.isfinite().all()


def test_smoothquant_without_peaks_or_with_a_wrong_alpha_is_an_error(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    with pytest.raises(ValueError, match=r"up_proj: sq needs the peaks.*keep_peaks=True"):
        wush.SmoothQuant().fit(weight, wush.Inputs(inputs.moments_ngg), "up_proj")
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        wush.SmoothQuant(1.5)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4], ids=lambda f: f.name)
def test_smoothquant_tames_an_outlier_channel(fmt: wush.Format, generator: torch.Generator) -> None:
    weight = torch.randn(48, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(300, 64, generator=generator, dtype=torch.float64)
    x[:, 7] *= 50
    weight[:, 7] /= 50
    moment = wush.SecondMoment(64, keep_peaks=True)
    moment.add(x)
    losses = []
    for transform in (wush.Identity(), wush.SmoothQuant()):
        matrix = transform.fit(weight, moment.inputs(fmt.group_size))
        rounded = fmt.round_trip(transform_weight(weight, matrix).float())
        losses.append(wush.layer_loss(x, weight, rounded, matrix, fmt))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_hadamard_is_the_normalized_sylvester_matrix(size: int) -> None:
    torch.testing.assert_close(hadamard(size), sylvester(size), rtol=1e-15, atol=0)
    torch.testing.assert_close(hadamard(size) @ hadamard(size).T, torch.eye(size, dtype=torch.float64))


def test_a_hadamard_size_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, not 24"):
        hadamard(24)


def test_random_rotation_is_orthogonal_and_depends_on_its_seed_alone(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    torch.manual_seed(0)
    first = wush.RandomRotation(5).fit(weight, inputs)
    torch.manual_seed(1)
    again = wush.RandomRotation(5).fit(weight * 2, wush.Inputs(inputs.moments_ngg.flip(0)))
    torch.testing.assert_close(first @ first.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(first, again)
    assert not torch.allclose(first, wush.RandomRotation(6).fit(weight, inputs))


def test_random_rotations_have_no_preferred_sign() -> None:
    # QR without the sign correction leaves a biased, not a Haar, distribution.
    inputs = wush.Inputs(torch.eye(4, dtype=torch.float64)[None])
    corners = torch.stack([wush.RandomRotation(s).fit(torch.empty(1, 4), inputs).diagonal() for s in range(400)])
    assert corners.mean(0).abs().max() < 0.12


@pytest.mark.parametrize("transform", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_transform_preserves_the_product_exactly(
    transform: Transform, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The weight's inverse is that of the rounded transform: in float64 nothing is lost to the rounding."""
    weight, x, inputs = layer(generator)
    rounded = transform.fit(weight, inputs).to(dtype)
    product = apply_blocks(x, rounded.double()) @ transform_weight(weight, rounded).T
    assert_relatively_close(product[None], (x @ weight.T)[None], 1e-12)


@pytest.mark.parametrize("transform", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computed_in_its_dtype_preserves_its_product_to_that_dtypes_rounding(
    transform: Transform, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The textbook bound: three roundings to the dtype and float32 sums of G and of I terms, of the magnitudes."""
    weight, x, inputs = layer(generator)
    weight, x = weight.to(dtype), x.to(dtype)
    rounded = transform.fit(weight, inputs).to(dtype)
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
    weight, x, inputs = layer(generator, fmt.group_size, 96)
    losses = {}
    for transform in (wush.Identity(), wush.Hadamard(), wush.Wush()):
        matrix = transform.fit(weight, inputs)
        losses[transform.name] = wush.layer_loss(
            x, weight, fmt.round_trip(transform_weight(weight, matrix)), matrix, fmt
        )
    assert losses["wush"] < 0.8 * losses["h"] < 0.8 * losses["i"]


FITTED = pytest.mark.parametrize("transform", [wush.Hu(), wush.Wus(), wush.Wush()], ids=lambda t: t.name)


@FITTED
@pytest.mark.parametrize("side", ["inputs", "weight", "both"])
def test_a_tile_of_zeros_takes_the_identity_and_changes_no_other(
    side: str, transform: Transform, generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    weight, _, inputs = layer(generator)
    expected = transform.fit(weight, inputs)
    assert not caplog.text
    if side != "weight":
        inputs.moments_ngg[1] = 0
    if side != "inputs":
        weight[:, 32:64] = 0
    fitted = transform.fit(weight, inputs, "down_proj")
    assert torch.equal(fitted[1], torch.eye(32, dtype=torch.float64))
    assert torch.equal(fitted[[0, 2]], expected[[0, 2]])
    assert "down_proj: 1 of its 3 tiles of 32 channels have only zeros for inputs or weights" in caplog.text


@FITTED
def test_a_layer_without_any_signal_takes_the_identity(transform: Transform, generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    identity = torch.eye(32, dtype=torch.float64).expand(3, 32, 32)
    assert torch.equal(transform.fit(0 * weight, inputs), identity)
    assert torch.equal(transform.fit(weight, wush.Inputs(0 * inputs.moments_ngg)), identity)


@FITTED
@pytest.mark.parametrize("side", ["inputs", "weight", "both"])
def test_a_dead_channel_among_live_ones_needs_no_identity(
    side: str, transform: Transform, generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    weight, x, inputs = layer(generator)
    if side != "weight":
        inputs.moments_ngg[1, 5] = inputs.moments_ngg[1, :, 5] = 0
        x[:, 37] = 0
    if side != "inputs":
        weight[:, 37] = 0
    fitted = transform.fit(weight, inputs, "down_proj")
    assert not caplog.text
    assert not torch.equal(fitted[1], torch.eye(32, dtype=torch.float64))
    product = apply_blocks(x, fitted) @ transform_weight(weight, fitted).T
    assert_relatively_close(product[None], (x @ weight.T)[None], 1e-10)


@FITTED
def test_in_a_batch_the_tiles_of_one_weight_are_dead_for_it_alone(
    transform: Transform, generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    weight, _, inputs = layer(generator)
    dead = weight.clone()
    dead[:, :64] = 0
    together = transform.fit_each([weight, dead], inputs, ["gate_proj", "up_proj"])
    assert torch.equal(together[0], transform.fit(weight, inputs))
    assert torch.equal(together[1, 2], together[0, 2])
    assert torch.equal(together[1, :2], torch.eye(32, dtype=torch.float64).expand(2, 32, 32))
    assert "up_proj: 2 of its 3 tiles" in caplog.text
    assert "gate_proj" not in caplog.text


@FITTED
def test_a_moment_that_is_no_moment_is_an_error_that_names_the_layer_and_the_tile(
    transform: Transform, generator: torch.Generator
) -> None:
    weight, _, inputs = layer(generator)
    indefinite = wush.Inputs(inputs.moments_ngg.clone())
    indefinite.moments_ngg[1] -= 2 * indefinite.moments_ngg[1].trace() / 32 * torch.eye(32, dtype=torch.float64)
    with pytest.raises(wush.NumericError, match=r"^down_proj input: second moment is not positive definite"):
        transform.fit(weight, indefinite, "down_proj")
    with pytest.raises(wush.NumericError, match=r"^down_proj input tile 1: second moment is not positive definite"):
        transform.fit(weight[:, 32:64], indefinite.block(1), "down_proj")
    weight[3, 40] = torch.nan
    with pytest.raises(wush.NumericError, match=r"^down_proj weight: second moment is not positive definite"):
        transform.fit(weight, inputs, "down_proj")


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_weights_fitted_in_one_batch_get_the_transforms_they_get_alone(
    transform: Transform, generator: torch.Generator
) -> None:
    weight, _, inputs = layer(generator)
    weights = [weight, weight[:16].float(), -weight.flip(1)]
    together = transform.fit_each(weights, inputs, ["a", "b", "c"])
    for name, own, alone in zip("abc", together, weights, strict=True):
        assert torch.equal(own, transform.fit(alone, inputs, name))


def test_transforms_are_shared_where_that_is_usual_and_others_on_demand() -> None:
    assert {transform.name for transform in ALL if transform.share} == {"i", "r", "h", "sq"}
    assert wush.Wush(share=True).share


def test_in_a_batch_the_error_names_the_layer_it_is_about(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    broken = weight.clone()
    broken[:, 32:64] = torch.nan
    with pytest.raises(wush.NumericError, match=r"^up_proj weight: second moment is not positive definite"):
        wush.Wush().fit_each([weight, broken], inputs, ["gate_proj", "up_proj"])


def test_a_transform_without_an_inverse_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(wush.NumericError, match="up_proj: its transform has no inverse in bfloat16"):
        inverse(torch.ones(2, 4, 4, dtype=torch.bfloat16), "up_proj")


@pytest.mark.gpu
def test_wush_on_a_gpu_balances_the_moments_too(generator: torch.Generator) -> None:
    weight, _, inputs = layer(generator)
    fitted = wush.Wush().fit(weight.cuda(), wush.Inputs(inputs.moments_ngg.cuda())).cpu()
    x_side, w_side, _ = balanced_moments(weight, inputs.moments_ngg, fitted)
    assert_relatively_close(x_side, w_side)
