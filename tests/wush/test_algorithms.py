"""RTN and GPTQ against their definitions."""

import pytest
import torch
from torch import Tensor

import wush
from wush.moments import damp
from wush.transforms import Transform, transform_weight


def correlated(
    generator: torch.Generator, features: int = 64, outputs: int = 24
) -> tuple[Tensor, wush.SecondMoment, Tensor]:
    mix = torch.randn(features, features, generator=generator)
    x = torch.randn(400, features, generator=generator) @ mix * torch.logspace(-0.5, 0.5, features)
    moment = wush.SecondMoment(features)
    moment.add(x)
    return torch.randn(outputs, features, generator=generator), moment, x


def values(weight: object, fmt: wush.Format) -> Tensor:
    return fmt.dequantize(weight.quantized)  # type: ignore[attr-defined]


def proxy_loss(original: Tensor, result: object, fmt: wush.Format, moment: wush.SecondMoment) -> float:
    """`tr(D H D^T)`, with D the weight's error in the original coordinates."""
    weight = values(result, fmt).double()
    transform = result.transform  # type: ignore[attr-defined]
    if transform is not None:
        blocks = weight.unflatten(1, (-1, fmt.group_size))
        per_block = transform.double().expand(blocks.shape[1], -1, -1)
        weight = torch.einsum("ong,ngh->onh", blocks, per_block).flatten(1)
    error = weight - original.double()
    return torch.trace(error @ damp(moment.matrix) @ error.T).item()


def textbook_gptq(weight: Tensor, hessian: Tensor, fmt: wush.Format) -> Tensor:
    """GPTQ with T = I by its definition: after each column, the free ones minimize the loss exactly."""
    work, size = weight.double().clone(), fmt.group_size
    quantized = torch.empty_like(work)
    for c in range(work.shape[1]):
        if c % size == 0:
            scales = fmt.find_scales(work[:, c : c + size])
        group = work[:, c : c + 1].float().unsqueeze(1)
        quantized[:, c] = fmt.expand(fmt.snap(group, scales, fmt.global_scale), scales, fmt.global_scale)[:, 0, 0]
        error = quantized[:, c] - work[:, c]
        inverse = torch.linalg.inv(hessian[c:, c:])
        work[:, c:] += error[:, None] * (inverse[0] / inverse[0, 0])
    return quantized


@pytest.mark.parametrize("transform", [wush.Identity(), wush.Hadamard(), wush.Wush()], ids=lambda t: t.name)
def test_rtn_rounds_the_transformed_weight(transform: Transform, generator: torch.Generator) -> None:
    weight, moment, _ = correlated(generator)
    result = wush.Rtn().quantize_weight(weight, moment, transform, wush.MXFP4)
    matrix = transform.fit(weight, moment.diagonal_blocks(32)).float()
    assert torch.equal(values(result, wush.MXFP4), wush.MXFP4.round_trip(transform_weight(weight, matrix).float()))
    assert result.transform is None if transform.name == "i" else torch.equal(result.transform, matrix)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4], ids=lambda f: f.name)
def test_gptq_without_a_transform_equals_the_textbook_column_by_column(
    fmt: wush.Format, generator: torch.Generator
) -> None:
    weight, moment, _ = correlated(generator)
    result = wush.Gptq().quantize_weight(weight, moment, wush.Identity(), fmt)
    assert torch.equal(values(result, fmt).double(), textbook_gptq(weight, damp(moment.matrix), fmt))


@pytest.mark.parametrize("transform", [wush.Identity(), wush.Hadamard(), wush.Wush(), wush.Wush(refit=False)], ids=repr)
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8], ids=lambda f: f.name)
def test_gptq_loses_less_than_rtn(fmt: wush.Format, transform: Transform, generator: torch.Generator) -> None:
    weight, moment, _ = correlated(generator)
    rtn = wush.Rtn().quantize_weight(weight, moment, transform, fmt)
    gptq = wush.Gptq().quantize_weight(weight, moment, transform, fmt)
    assert proxy_loss(weight, gptq, fmt, moment) < 0.9 * proxy_loss(weight, rtn, fmt, moment)


def test_gptq_on_uncorrelated_inputs_is_rtn(generator: torch.Generator) -> None:
    weight = torch.randn(16, 64, generator=generator)
    moment = wush.SecondMoment(64)
    moment.add(torch.eye(64))
    rtn = wush.Rtn().quantize_weight(weight, moment, wush.Identity(), wush.MXFP4)
    gptq = wush.Gptq().quantize_weight(weight, moment, wush.Identity(), wush.MXFP4)
    assert torch.equal(rtn.quantized.codes, gptq.quantized.codes)


def test_refit_changes_every_block_but_the_first(generator: torch.Generator) -> None:
    weight, moment, _ = correlated(generator, 96)
    once = wush.Gptq().quantize_weight(weight, moment, wush.Wush(refit=False), wush.MXFP4).transform
    anew = wush.Gptq().quantize_weight(weight, moment, wush.Wush(refit=True), wush.MXFP4).transform
    assert torch.equal(once[0], anew[0])
    assert not torch.equal(once[1], anew[1])


def test_fixed_transforms_are_stored_once_for_all_blocks(generator: torch.Generator) -> None:
    weight, moment, _ = correlated(generator)
    for algorithm in (wush.Rtn(), wush.Gptq()):
        assert algorithm.quantize_weight(weight, moment, wush.Hadamard(), wush.MXFP4).transform.shape == (32, 32)


def test_transforms_are_rounded_to_the_weights_dtype(generator: torch.Generator) -> None:
    weight, moment, _ = correlated(generator)
    result = wush.Rtn().quantize_weight(weight.bfloat16(), moment, wush.Wush(), wush.MXFP4)
    assert result.transform.dtype == torch.bfloat16
