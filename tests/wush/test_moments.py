"""Second moments, their damping and factorizations."""

import logging

import pytest
import torch

import wush
from wush.moments import damp, damped_cholesky, diagonal_blocks, weight_moments


def test_second_moment_is_the_mean_outer_product_whatever_the_batches(generator: torch.Generator) -> None:
    x = torch.randn(6, 20, 32, generator=generator)
    whole, parts = wush.SecondMoment(32), wush.SecondMoment(32)
    whole.add(x)
    for batch in x.split(1):
        parts.add(batch)
    expected = x.double().flatten(0, 1).T @ x.double().flatten(0, 1) / 120
    torch.testing.assert_close(whole.matrix, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.matrix, parts.matrix)


def test_a_moment_of_diagonal_blocks_alone_equals_those_of_the_whole(generator: torch.Generator) -> None:
    x = torch.randn(3, 20, 64, generator=generator)
    whole, blocks = wush.SecondMoment(64), wush.SecondMoment(64, block_size=16)
    for moment in (whole, blocks):
        moment.add(x)
    torch.testing.assert_close(blocks.diagonal_blocks(16), whole.diagonal_blocks(16), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="only diagonal blocks of 16"):
        _ = blocks.matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block_size", [None, 16])
def test_peaks_are_the_largest_magnitudes_of_all_batches(
    dtype: torch.dtype, block_size: int | None, generator: torch.Generator
) -> None:
    x = torch.randn(3, 20, 64, generator=generator).to(dtype)
    moment = wush.SecondMoment(64, block_size=block_size, keep_peaks=True)
    for batch in (*x.split(1), x[:0]):
        moment.add(batch)
    inputs = moment.inputs(16)
    expected = torch.stack([x[..., i].double().abs().max() for i in range(64)]).view(4, 16)
    assert torch.equal(inputs.peaks_ng, expected)
    assert torch.equal(inputs.moments_ngg, moment.diagonal_blocks(16))
    assert torch.equal(inputs.block(2).peaks_ng, expected[2:3])
    assert torch.equal(inputs.block(2).moments_ngg, inputs.moments_ngg[2:3])


def test_peaks_are_kept_on_demand(generator: torch.Generator) -> None:
    moment = wush.SecondMoment(16)
    moment.add(torch.randn(1, 40, 16, generator=generator))
    assert moment.inputs(16).peaks_ng is None
    assert moment.inputs(16).block(0).peaks_ng is None


def test_adding_tokens_renews_what_was_derived(generator: torch.Generator) -> None:
    moment = wush.SecondMoment(16)
    moment.add(torch.randn(1, 40, 16, generator=generator))
    first, factor = moment.matrix, moment.inverse_factor
    moment.add(torch.randn(1, 40, 16, generator=generator))
    assert not torch.equal(moment.matrix, first)
    assert not torch.equal(moment.inverse_factor, factor)


def test_moments_without_tokens_or_with_nan_are_errors_that_name_the_layer() -> None:
    with pytest.raises(wush.NumericError, match="q_proj: no calibration token"):
        _ = wush.SecondMoment(16, name="q_proj").matrix
    moment = wush.SecondMoment(16, name="q_proj")
    moment.add(torch.full((1, 2, 16), torch.nan))
    with pytest.raises(wush.NumericError, match="q_proj: NaN or infinity"):
        _ = moment.matrix


def test_diagonal_blocks_are_cut_from_the_matrix(generator: torch.Generator) -> None:
    matrix = torch.randn(12, 12, generator=generator)
    blocks = diagonal_blocks(matrix, 4)
    assert blocks.shape == (3, 4, 4)
    for b in range(3):
        assert torch.equal(blocks[b], matrix[4 * b : 4 * b + 4, 4 * b : 4 * b + 4])


def test_weight_moments_average_over_outputs(generator: torch.Generator) -> None:
    weight = torch.randn(10, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(weight_moments(weight, 4)[1], weight[:, 4:].T @ weight[:, 4:] / 10)


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0]))
    assert damp(matrix).diagonal().tolist() == pytest.approx([1.02, 3.02])


def test_inverse_factor_is_the_lower_cholesky_of_the_damped_inverse(generator: torch.Generator) -> None:
    moment = wush.SecondMoment(24)
    moment.add(torch.randn(1, 100, 24, generator=generator))
    factor = moment.inverse_factor
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T @ damp(moment.matrix), torch.eye(24, dtype=torch.float64))
    assert (factor.diagonal() > 0).all()


def test_a_moment_of_nothing_has_the_identity_for_its_factor() -> None:
    moment = wush.SecondMoment(24)
    moment.add(torch.zeros(1, 100, 24))
    factor = moment.inverse_factor * 1.01**0.5
    torch.testing.assert_close(factor, torch.eye(24, dtype=torch.float64))


def test_a_part_of_the_inputs_knows_which_tiles_it_has(generator: torch.Generator) -> None:
    moment = wush.SecondMoment(64, block_size=16)
    moment.add(torch.randn(1, 40, 64, generator=generator))
    inputs = moment.inputs(16)
    assert inputs.first is None
    assert [inputs.block(n).first for n in range(4)] == [0, 1, 2, 3]
    assert torch.equal(inputs.block(2).moments_ngg, inputs.moments_ngg[2:3])


def test_a_failed_factorization_is_damped_more_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    good = torch.eye(2, dtype=torch.float64)
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        factor, damped = damped_cholesky(torch.stack([good, indefinite]), "v_proj")
    assert "v_proj" in caplog.text
    torch.testing.assert_close(factor @ factor.mT, damped)
    # Only the block that failed is damped more: 1 % doubled three times.
    torch.testing.assert_close(damped, torch.stack([good * 1.01, indefinite + 0.08 * good]))


def test_a_hopeless_factorization_is_an_error_with_the_remedy() -> None:
    with pytest.raises(wush.NumericError, match=r"v_proj.*not positive definite.*quantize\.exclude"):
        damped_cholesky(torch.zeros(2, 2), "v_proj")


def test_a_failure_in_a_batch_names_only_those_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    good = torch.eye(2, dtype=torch.float64)
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        damped_cholesky(torch.stack([good, indefinite, good]), ["q_proj", "k_proj", "v_proj"])
    assert "k_proj: " in caplog.text
    assert "q_proj" not in caplog.text
    with pytest.raises(wush.NumericError, match=r"^q_proj, v_proj: second moment"):
        damped_cholesky(torch.stack([0 * good, good, 0 * good]), ["q_proj", "k_proj", "v_proj"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [None, 32])
def test_a_gpu_sums_in_float32_or_better(
    dtype: torch.dtype, block_size: int | None, generator: torch.Generator
) -> None:
    batches = torch.randn(5, 3, 200, 96, generator=generator).to(dtype)
    moments = [wush.SecondMoment(96, device, block_size=block_size) for device in ("cpu", "cuda")]
    for batch in batches:
        for moment in moments:
            moment.add(batch.to(moment._sums_ngg.device))
    ours, theirs = (moment.diagonal_blocks(32).cpu() for moment in moments)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()  # tensor cores cut their sums off
