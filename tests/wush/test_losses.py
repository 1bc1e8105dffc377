"""Layer losses, measured and predicted, and walks over some of a model's decoder blocks."""

import copy
import itertools
import json
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor, nn

import wush
from tests.wush.test_walk import Kept, quantize, tiny, tokens
from wush.decoder import linear_inputs
from wush.losses import theory
from wush.moments import weight_moments
from wush.transforms import Transform, apply_blocks, inverse, transform_weight

TRANSFORMS: list[Transform] = [
    wush.Identity(),
    wush.RandomRotation(3),
    wush.Hadamard(),
    wush.SmoothQuant(),
    wush.Hu(),
    wush.Wus(),
    wush.Wush(share=True),
    wush.Wush(),
]
FORMATS = [wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8]


def spread_out(architecture: str = "llama") -> nn.Module:
    """A tiny model of which some channels are much larger than others, as in a trained one."""
    model = tiny(architecture)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data *= torch.logspace(-1, 1, len(parameter))[torch.randperm(len(parameter))]
    return model


def losses_of(
    model: nn.Module, ids: Tensor, fmt: wush.Format, held_out: Tensor, **options: object
) -> dict[tuple[int, str], wush.LayerLoss]:
    """Of the model once quantized, in place."""
    original = copy.deepcopy(model)
    quantize(model, ids, fmt, **options)
    found = wush.measure(original, model, held_out, layer_losses=True, batch_size=2)
    return {(block.index, name): loss for block in found for name, loss in block.losses.items()}


def own_inputs(model: nn.Module, original: nn.Module, index: int, ids: Tensor) -> dict[str, Tensor]:
    """What the linears of the original block are fed, `(M, I)`, with quantized blocks before it."""
    mixed = copy.deepcopy(original)
    for before in range(index):
        mixed.model.layers[before] = model.model.layers[before]
    names = [name for name, module in mixed.model.layers[index].named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), linear_inputs(mixed.model.layers[index], names) as seen:
        mixed(input_ids=ids, use_cache=False)
    return {name: inputs[0].flatten(0, 1) for name, inputs in seen.items()}


@pytest.mark.parametrize(
    "transform", [wush.Identity(), wush.SmoothQuant(), wush.Wush(), wush.Wush(share=True)], ids=repr
)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_losses_are_those_of_the_original_blocks_inputs(
    fmt: wush.Format, transform: Transform, generator: torch.Generator
) -> None:
    model, ids, held_out = spread_out(), tokens(generator), tokens(generator, 4, 16)
    original = copy.deepcopy(model)
    losses = losses_of(model, ids, fmt, held_out, transform=transform)
    assert len(losses) == 3 * 7
    for index in (0, 2):
        for name, x in own_inputs(model, original, index, held_out).items():
            layer, linear = (
                model.model.layers[index].get_submodule(name),
                original.model.layers[index].get_submodule(name),
            )
            matrix = torch.eye(fmt.group_size) if layer.transform is None else layer.transform
            expected = wush.layer_loss(x, linear.weight.detach(), layer.weight(), matrix, fmt)
            exact = x.double() @ linear.weight.detach().double().T
            assert losses[index, name].relative == pytest.approx(expected, rel=1e-4)
            assert losses[index, name].mse == pytest.approx(expected * exact.square().mean().item(), rel=1e-4)


def test_a_bias_is_no_part_of_an_outputs_power(generator: torch.Generator) -> None:
    ids, relative = tokens(generator), []
    for bias in (0.0, 100.0):
        model = tiny("gpt_neox")
        model.gpt_neox.layers[0].attention.query_key_value.bias.data += bias
        losses = losses_of(model, ids, wush.MXFP4, ids, blocks=[0])
        relative.append(losses[0, "attention.query_key_value"].relative)
    assert relative[1] == pytest.approx(relative[0], rel=1e-3)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
def test_no_transform_is_predicted_to_be_below_the_bound(
    algorithm: wush.Gptq, transform: Transform, generator: torch.Generator
) -> None:
    ids, held_out = tokens(generator, 8, 32), tokens(generator, 2)
    losses = losses_of(spread_out(), ids, wush.MXFP4, held_out, transform=transform, algorithm=algorithm)
    assert len(losses) == 3 * 7
    for loss in losses.values():
        assert min(loss.even, loss.paper_fp) > (1 - 1e-6) * loss.bound > 0


def known(generator: torch.Generator, size: int = 32) -> tuple[Tensor, wush.Inputs]:
    """A weight `(O, I)` and inputs with a moderate spread of channels."""
    spread = torch.logspace(-0.5, 0.5, 2 * size)[torch.randperm(2 * size, generator=generator)]
    weight = torch.randn(200, 2 * size, generator=generator) * spread.flip(0)
    moment = wush.SecondMoment(2 * size, keep_peaks=True)
    moment.add(torch.randn(400, 2 * size, generator=generator) * spread)
    return weight, moment.inputs(size)


@pytest.mark.parametrize("transform", [wush.Wus(), wush.Wush()], ids=lambda t: t.name)
@pytest.mark.parametrize("size", [16, 32])
def test_wush_is_predicted_to_reach_the_bound(size: int, transform: Transform, generator: torch.Generator) -> None:
    """To what damping costs."""
    weight, inputs = known(generator, size)
    even, paper_fp, _, bound = theory(weight, transform.fit(weight, inputs), inputs.moments_ngg).tolist()
    assert bound <= even < 1.005 * bound
    assert (paper_fp < 1.005 * bound) == (transform.name == "wush")
    *rotated, _, same = theory(weight, wush.Hadamard().fit(weight, inputs), inputs.moments_ngg).tolist()
    assert same == bound
    assert min(rotated) > 1.5 * bound


def test_the_bound_is_of_the_singular_values_of_both_sides_together(generator: torch.Generator) -> None:
    weight, inputs = known(generator)
    expected = 0.0
    for m_x, m_w in zip(inputs.moments_ngg, weight_moments(weight, 32), strict=True):
        spectrum = torch.linalg.svdvals(torch.linalg.cholesky(m_x).T @ torch.linalg.cholesky(m_w))
        expected += spectrum.sum().item() ** 2 / 32
    assert theory(weight, None, inputs.moments_ngg)[-1].item() == pytest.approx(expected, rel=1e-9)


def test_predictions_follow_their_formula(generator: torch.Generator) -> None:
    weight, inputs = known(generator)
    sides = list(zip(inputs.moments_ngg, weight_moments(weight, 32), strict=True))
    plain = sum((m_x.trace() * m_w.trace() / 32).item() for m_x, m_w in sides)
    assert theory(weight, None, inputs.moments_ngg)[0].item() == pytest.approx(plain, rel=1e-12)
    # A rotation changes no trace.
    rotation = wush.RandomRotation(1).fit(weight, inputs)
    assert theory(weight, rotation, inputs.moments_ngg)[0].item() == pytest.approx(plain, rel=1e-9)
    smooth = wush.SmoothQuant().fit(weight, inputs).bfloat16()
    back = inverse(smooth)
    expected = sum(
        ((t.double() @ m_x @ t.double().T).trace() * (b.T @ m_w @ b).trace() / 32).item()
        for t, b, (m_x, m_w) in zip(smooth, back, sides, strict=True)
    )
    assert theory(weight, smooth, inputs.moments_ngg)[0].item() == pytest.approx(expected, rel=1e-9)


def test_each_prediction_follows_its_formula_with_correlated_channels(generator: torch.Generator) -> None:
    """The integer model against rounding's own expectation: of the drawn rows, and of many Gaussian tokens."""
    mix = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    weight, x = torch.randn(300, 64, generator=generator).double() @ mix[0], torch.randn(20_000, 64).double() @ mix[1]
    moment = wush.SecondMoment(64, block_size=16)
    moment.add(x)
    inputs = moment.inputs(16)
    for transform in (wush.Identity(), wush.Hadamard(), wush.Wus(), wush.Wush()):
        fitted = transform.fit(weight, inputs)
        even, paper_fp, paper_int, _ = theory(weight, fitted, inputs.moments_ngg).tolist()
        sides = [apply_blocks(x, fitted), transform_weight(weight, fitted)]
        groups = [side.unflatten(1, (-1, 16)) for side in sides]
        powers = [side.square().mean(0) for side in groups]
        assert even == pytest.approx((powers[0].sum(-1) @ powers[1].sum(-1) / 16).item(), rel=1e-5)
        assert paper_fp == pytest.approx((powers[0] * powers[1]).sum().item(), rel=1e-5)
        peaks = [side.abs().amax(-1).square().mean(0) for side in groups]
        expected = (peaks[0] @ powers[1].sum(-1) + peaks[1] @ powers[0].sum(-1)) / 2
        assert paper_int == pytest.approx(expected.item(), rel=0.03)


def test_the_integer_prediction_is_the_same_at_each_call_and_scales_as_a_loss(generator: torch.Generator) -> None:
    weight, inputs = known(generator)
    fitted = wush.Wush().fit(weight, inputs)
    predicted = theory(weight, fitted, inputs.moments_ngg)
    assert torch.equal(theory(weight, fitted, inputs.moments_ngg), predicted)
    torch.testing.assert_close(theory(3 * weight, fitted, 4 * inputs.moments_ngg), 36 * predicted)
    torch.testing.assert_close(theory(weight, 5 * fitted, inputs.moments_ngg), predicted)
    order = torch.randperm(len(weight), generator=generator)
    torch.testing.assert_close(theory(weight[order], fitted, inputs.moments_ngg), predicted)


def test_a_shared_transform_predicts_what_its_copies_do(generator: torch.Generator) -> None:
    weight, inputs = known(generator)
    rotation = wush.RandomRotation(1).fit(weight, inputs)
    shared, copied = (theory(weight, one, inputs.moments_ngg) for one in (rotation, rotation.expand(2, -1, -1)))
    torch.testing.assert_close(shared, copied)


@dataclass(frozen=True)
class Synthetic:
    """A layer whose channels span `decades` on either side, at other places; `mixed` by a rotation of each group."""

    decades: float
    mixed: bool
    heavy: bool

    def sides(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Inputs `(768, 2 size)` and a weight `(256, 2 size)`; `heavy` tails are products of two Gaussians."""
        return [self._side(count, size, generator) for count in (768, 256)]

    def _side(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        values = torch.randn(count, 2 * size, generator=generator, dtype=torch.float64)
        if self.heavy:
            values = values * torch.randn(count, 2 * size, generator=generator, dtype=torch.float64)
        spread = torch.logspace(-self.decades / 2, self.decades / 2, 2 * size, dtype=torch.float64)
        values = values * spread[torch.randperm(2 * size, generator=generator)]
        if not self.mixed:
            return values
        turns = torch.linalg.qr(torch.randn(2, size, size, generator=generator, dtype=torch.float64))[0]
        return apply_blocks(values, turns)


SYNTHETIC = [Synthetic(*one) for one in itertools.product((1.5, 2, 2.5), (False, True), (False, True))]


def logs_of_measured_over_predicted(fmt: wush.Format) -> dict[str, Tensor]:
    """Of all synthetic layers under all transforms, by prediction, `(layers * transforms,)`."""
    generator, rows = torch.Generator().manual_seed(0), []
    transforms = [one for one in TRANSFORMS if not isinstance(one, wush.SmoothQuant)]
    for layer in SYNTHETIC:
        x, weight = layer.sides(fmt.group_size, generator)
        moment = wush.SecondMoment(x.shape[1], block_size=fmt.group_size)
        moment.add(x)
        inputs = moment.inputs(fmt.group_size)
        for transform in transforms:
            fitted = transform.fit(weight, inputs)
            rounded = fmt.round_trip(transform_weight(weight, fitted))
            mse = wush.layer_loss(x, weight, rounded, fitted, fmt) * (x @ weight.mT).square().mean()
            rows.append(mse / theory(weight, fitted, inputs.moments_ngg)[:3])
    return dict(zip(("even", "paper_fp", "paper_int"), torch.stack(rows).log().unbind(1), strict=True))


@pytest.mark.parametrize(
    ("fmt", "holds", "within", "others"),
    [
        (wush.MXFP4, "paper_fp", 0.2, 0.25),
        (wush.NVFP4, "even", 0.3, 0.4),
        (wush.Int4(scale_rule="midrise"), "paper_int", 0.28, 0.38),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_each_format_has_a_prediction_that_holds_on_synthetic_layers(
    fmt: wush.Format, holds: str, within: float, others: float
) -> None:
    """By the root mean square of log(measured / predicted): a prediction is up to a factor of the format."""
    spreads = {name: logs.std(correction=0).item() for name, logs in logs_of_measured_over_predicted(fmt).items()}
    assert spreads.pop(holds) < within
    assert min(spreads.values()) > others


def test_the_integer_models_factor_is_that_of_uniform_noise() -> None:
    """`2 E[eta^2] = 2 * 4^(1 - b) / 12` of b = 4 bits (equation 63), and more where the largest magnitudes vary."""
    logs = logs_of_measured_over_predicted(wush.Int4(scale_rule="midrise"))["paper_int"]
    assert 1 / 384 < logs.mean().exp().item() < 1.4 / 384


def test_a_weight_of_fewer_rows_than_columns_has_a_bound_too(generator: torch.Generator) -> None:
    weight, inputs = known(generator)
    *predicted, bound = theory(weight[:8], None, inputs.moments_ngg).tolist()
    assert 0 < bound < min(predicted)


def test_losses_and_predictions_put_wush_before_hadamard_where_there_are_outliers(generator: torch.Generator) -> None:
    ids, held_out = tokens(generator, 12, 32), tokens(generator, 4, 32)
    found = {}
    for transform in (wush.Hadamard(), wush.Wush()):
        model = tiny("llama")
        for block in model.model.layers:
            block.input_layernorm.weight.data[5] *= 20
            block.self_attn.q_proj.weight.data[:, 5] /= 20
        found[transform.name] = losses_of(model, ids, wush.MXFP4, held_out, transform=transform)
    for index in range(3):
        own, other = (found[name][index, "self_attn.q_proj"] for name in ("wush", "h"))
        assert own.relative < 0.7 * other.relative
        assert own.even < 0.7 * other.even
        assert own.paper_fp < 0.7 * other.paper_fp
        assert own.paper_int < 0.7 * other.paper_int


def test_a_loss_is_plain_numbers(generator: torch.Generator) -> None:
    loss = losses_of(tiny("llama"), tokens(generator), wush.MXFP4, tokens(generator, 2))[1, "mlp.up_proj"]
    assert wush.LayerLoss(**json.loads(json.dumps(asdict(loss)))) == loss


@pytest.mark.gpu
@pytest.mark.parametrize("transform", [wush.Hadamard(), wush.SmoothQuant(), wush.Hu(), wush.Wush(share=True)], ids=repr)
@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
def test_a_gpu_measures_and_predicts_the_same(
    fmt: wush.Format, algorithm: wush.Gptq, transform: Transform, generator: torch.Generator
) -> None:
    """But for codes decided otherwise at ties, and eigenvectors of the other sign; theory is of float64 moments."""
    same = 0.3 if isinstance(transform, (wush.Hu, wush.Wush)) else 0.1
    ids, held_out = tokens(generator, 8, 32), tokens(generator, 4, 32)
    options = {"transform": transform, "algorithm": algorithm, "blocks": [0]}
    ours, theirs = (losses_of(spread_out().to(device), ids, fmt, held_out, **options) for device in ("cpu", "cuda"))
    for key, loss in ours.items():
        assert theirs[key].relative == pytest.approx(loss.relative, rel=same), key
        for name in ("even", "paper_fp", "paper_int"):
            assert getattr(theirs[key], name) == pytest.approx(getattr(loss, name), rel=1e-2), (key, name)
        assert theirs[key].bound == pytest.approx(loss.bound, rel=1e-3), key


@pytest.mark.gpu
def test_a_singular_moment_has_the_same_bound_on_a_gpu(generator: torch.Generator) -> None:
    weight, inputs = known(generator)
    ours = theory(weight[:8], None, inputs.moments_ngg)
    theirs = theory(weight[:8].cuda(), None, inputs.moments_ngg.cuda()).cpu()
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)


# Some of the blocks


def test_only_the_chosen_blocks_are_quantized(generator: torch.Generator) -> None:
    model, ids = tiny("llama"), tokens(generator)
    before, seen = copy.deepcopy(model.state_dict()), []
    kept = Kept()
    report = quantize(model, ids, blocks=[1], on_block=lambda block: seen.append(block.index), saved=kept)
    assert [block.index for block in report.blocks] == seen == list(kept.blocks) == [1]
    assert report.skipped == {"model.layers": "all but 1, chosen by quantize.blocks"}
    for index, block in enumerate(model.model.layers):
        kinds = {type(module) for module in block.modules()} & {nn.Linear, wush.QuantLinear}
        assert kinds == {wush.QuantLinear if index == 1 else nn.Linear}
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "layers.1." not in key)


def test_a_block_chosen_alone_is_fed_by_the_original_ones(generator: torch.Generator) -> None:
    model, ids, held_out = tiny("llama"), tokens(generator), tokens(generator, 2)
    original = copy.deepcopy(model)
    losses = losses_of(model, ids, wush.MXFP4, held_out, transform=wush.Wush(), blocks=[2, 2])
    assert {index for index, _ in losses} == {2}
    x = own_inputs(original, original, 2, held_out)["mlp.down_proj"]
    layer, linear = (m.model.layers[2].mlp.down_proj for m in (model, original))
    expected = wush.layer_loss(x, linear.weight.detach(), layer.weight(), layer.transform, wush.MXFP4)
    assert losses[2, "mlp.down_proj"].relative == pytest.approx(expected, rel=1e-4)
    moment = wush.SecondMoment(128)
    moment.add(own_inputs(original, original, 2, held_out)["mlp.down_proj"].unflatten(0, (2, 24)))
    expected = theory(linear.weight, layer.transform, moment.diagonal_blocks(32)).tolist()
    found = losses[2, "mlp.down_proj"]
    assert [found.even, found.paper_fp, found.paper_int, found.bound] == pytest.approx(expected, rel=1e-4)


def test_choosing_every_block_is_the_default(generator: torch.Generator) -> None:
    ids, models = tokens(generator), (tiny("llama"), tiny("llama"))
    reports = [quantize(model, ids, blocks=blocks) for model, blocks in zip(models, (None, [2, 0, 1]), strict=True)]
    assert reports[1].skipped == {}
    assert [block.mse for block in reports[0].blocks] == [block.mse for block in reports[1].blocks]


@pytest.mark.parametrize("blocks", [[3], [0, -1], []], ids=repr)
def test_a_block_that_is_not_there_is_an_error_before_any_work(blocks: list[int], generator: torch.Generator) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"quantize\.blocks=\[.*\]: choose some of the decoder blocks 0 to 2"):
        quantize(model, tokens(generator), blocks=blocks)
    assert not any(isinstance(module, wush.QuantLinear) for module in model.modules())


def test_layers_of_other_blocks_need_not_fit(generator: torch.Generator) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(wush.NumericError, match="NaN or infinity in the weight"):
        quantize(copy.deepcopy(model), tokens(generator))
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 0
    assert len(quantize(model, tokens(generator), blocks=[0, 1]).blocks) == 2
