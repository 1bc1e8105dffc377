"""Inputs outside a format's window are counted and said, and a calibrated scale holds them."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import wush
from tests.wush.test_backends import layer
from tests.wush.test_walk import Kept, quantize, tiny, tokens
from wush.decoder import linear_inputs
from wush.formats import INPUT_MARGIN, Nvfp4
from wush.lost import Count, counting, lost_of_weight
from wush.operands import transformed
from wush.transforms import Transform, transform_weight

CALIBRATED = wush.Nvfp4("calibrated")
TRANSFORMS: list[Transform] = [wush.Identity(), wush.Hadamard(), wush.Wush(), wush.Wush(share=True)]


def massive(scale: float = 1.0) -> nn.Module:
    """A tiny model with a channel of large activations between its up and down projections."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers[:2]:
            block.mlp.up_proj.weight[5] *= 400 * scale
            block.mlp.gate_proj.weight[5] *= 20 * scale
    return model


def of_spread(generator: torch.Generator) -> Tensor:
    """Inputs `(2, 7, 96)` whose groups of 16 are from far under NVFP4's window to far above it, one all zero."""
    powers = torch.randint(-22, 13, (2, 7, 6), generator=generator)
    x = torch.randn(2, 7, 6, 16, generator=generator) * torch.exp2(powers.float())[..., None]
    x[0, 0, 0] = 0
    return x.flatten(-2)


@pytest.mark.parametrize("transform", ["none", "shared", "block"])
@pytest.mark.parametrize("g", [0.1, 0.004])
def test_groups_are_counted_by_what_becomes_of_them(g: float, transform: str, generator: torch.Generator) -> None:
    """A flushed group is one whose codes are all zero though it is not; a clipped one has values past `6 * 448 g`."""
    ours, x = layer(wush.NVFP4, transform=transform), of_spread(generator)
    ours.input_scale = g
    with counting(nn.ModuleDict({"one": ours})) as count:
        ours(x)
    values = transformed(x, ours.transform).unflatten(-1, (-1, 16))
    rounded = wush.NVFP4.round_trip(values.flatten(-2), global_scale=g).unflatten(-1, (-1, 16))
    flushed = ((rounded == 0).all(-1) & (values != 0).any(-1)).sum().item()
    clipped = (values.abs() > 6 * 448 * g).any(-1).sum().item()
    found = count.found()["one"]
    assert (found.groups, found.clipped, found.flushed) == (2 * 7 * 6, clipped, flushed)
    assert min(clipped, flushed) > 0


class Keyword(nn.Module):
    """An MLP, or a head, that calls its linear by keyword."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, CALIBRATED])
def test_linears_may_be_called_by_keyword(fmt: wush.Format, generator: torch.Generator) -> None:
    found = []
    for by_keyword in (False, True):
        original, ids = tiny("llama"), tokens(generator.manual_seed(0))
        for block in original.model.layers if by_keyword else ():
            block.mlp.down_proj = Keyword(block.mlp.down_proj)
        model = copy.deepcopy(original)
        states = wush.original_states(model, ids)
        quantize(model, ids, fmt)
        measured = wush.measure(original, model, ids, layer_losses=True)
        found.append((wush.evaluate(model, ids, states).kl, [list(one.losses.values()) for one in measured]))
    assert found[0] == found[1]


def test_the_window_is_that_of_the_format_s_numbers() -> None:
    low, high = wush.NVFP4.window(0.1)
    assert high == pytest.approx(268.8)
    assert low == pytest.approx(5.86e-4, rel=1e-3)
    one = torch.zeros(16)
    for value, expected in ((low * 0.999, 0.0), (low * 1.001, 0.0), (high, high), (high * 2, high)):
        one[0] = value
        rounded = wush.NVFP4.round_trip(one)[0].item()
        assert (rounded == 0) == (value < low)
        if value >= high:
            assert rounded == pytest.approx(expected)


def test_formats_whose_scales_reach_as_far_as_floats_have_no_window() -> None:
    for fmt in (wush.MXFP4, wush.INT4, wush.MXFP8):
        assert fmt.window(1.0) is None
        ours = layer(fmt)
        with counting(nn.ModuleDict({"one": ours})) as count:
            assert not ours._forward_pre_hooks
            ours(torch.full((1, 96), 1e6))
        assert count.found() == {}


@dataclass(frozen=True)
class Narrow(Nvfp4):
    """A user's format with a window of its own."""

    def window(self, global_scale: float) -> tuple[float, float]:
        return 0.5, 2.0


def test_any_format_s_window_counts(generator: torch.Generator) -> None:
    ours = wush.QuantLinear(*_quantized(Narrow()), name="own")
    x = torch.ones(1, 96)
    x[:, :16], x[:, 16:32] = 0.25, 3
    with counting(nn.ModuleDict({"one": ours})) as count:
        ours(x)
    assert count.found()["one"] == wush.Lost(6, 1, 1)


def _quantized(fmt: wush.Format) -> tuple[object, wush.Format]:
    from wush.algorithms import QuantizedWeight

    return QuantizedWeight(fmt.quantize(torch.ones(8, 96)), None), fmt


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (96,), (3, 96)])
def test_inputs_of_any_shape_are_counted(shape: tuple[int, ...]) -> None:
    """An expert may get no token of a batch."""
    ours, count = layer(wush.NVFP4, transform="none"), Count()
    count.add("one", ours, torch.full(shape, 1000.0))
    groups = torch.Size(shape).numel() // 16
    assert count.found() == ({"one": wush.Lost(groups, groups, 0)} if groups else {})


def test_one_input_of_several_layers_is_counted_for_each_by_its_transform(generator: torch.Generator) -> None:
    own, same, other = layer(wush.NVFP4, seed=1), layer(wush.NVFP4, seed=2), layer(wush.NVFP4, seed=3)
    same.transform = own.transform
    x, count = of_spread(generator), Count()
    for name, one in (("own", own), ("same", same), ("other", other)):
        count.add(name, one, x)
    together = count.found()
    for name, one in (("own", own), ("same", same), ("other", other)):
        alone = Count()
        alone.add(name, one, x)
        assert together[name] == alone.found()[name]
    assert together["own"] == together["same"] != together["other"]


def test_what_is_lost_is_reported_by_layer_and_said_once_with_the_worst(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "wush"):
        report = quantize(massive(), tokens(generator), wush.NVFP4, transform=wush.Identity())
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} <= set(report.lost)
    assert all(lost.clipped + lost.flushed for lost in report.lost.values())
    (message,) = [record.getMessage() for record in caplog.records if "window" in record.getMessage()]
    assert f"inputs of {len(report.lost)} layers leave the format's window on the calibration text" in message
    worst = max(report.lost, key=lambda name: report.lost[name].share)
    assert f"{worst}: {report.lost[worst]}" in message
    assert message.endswith("format.scale_rule=calibrated fits the window to each layer")


def test_nothing_is_said_where_nothing_is_lost(generator: torch.Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wush"):
        for fmt in (CALIBRATED, wush.MXFP4):
            model = massive()
            report = quantize(model, tokens(generator), fmt, transform=wush.Hadamard())
            assert report.lost == {}
    assert not [record for record in caplog.records if "window" in record.getMessage()]


def test_evaluation_counts_its_own_text_and_says_so(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = massive(), tokens(generator, 2)
    states = wush.original_states(model, ids)
    quantize(model, tokens(generator), wush.NVFP4, transform=wush.Identity())
    caplog.clear()
    found = wush.evaluate(model, ids, states)
    lost = found.lost["model.layers.0.mlp.down_proj"]
    assert lost.groups == ids.numel() * 128 // 16
    assert 0 < lost.clipped < lost.groups
    assert "on the evaluated text" in caplog.text
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
def test_a_calibrated_scale_is_the_peak_of_the_transformed_inputs(
    algorithm: wush.Gptq, transform: Transform, generator: torch.Generator
) -> None:
    model, ids = massive(), tokens(generator)
    original = copy.deepcopy(model)
    quantize(model, ids, CALIBRATED, transform=transform, algorithm=algorithm, blocks=[0])
    block = model.model.layers[0]
    names = [name for name, module in block.named_modules() if isinstance(module, wush.QuantLinear)]
    with torch.no_grad(), linear_inputs(original.model.layers[0], names) as seen:
        original(input_ids=ids, use_cache=False)
    for name in names:
        ours = block.get_submodule(name)
        peak = transformed(seen[name][0], ours.transform).abs().max().item()
        assert ours.input_scale == pytest.approx(INPUT_MARGIN * peak / (6 * 448), rel=1e-5)
    scales = [block.get_submodule(f"self_attn.{name}_proj").input_scale for name in "qkv"]
    assert (len(set(scales)) == 1) == transform.share


def test_a_calibrated_scale_does_not_depend_on_the_batch_size(generator: torch.Generator) -> None:
    ids, scales = tokens(generator), []
    for size in (1, 6):
        model = massive()
        options = {"format": CALIBRATED, "transform": wush.Hadamard(), "algorithm": wush.Rtn(), "blocks": [0]}
        wush.quantize(model, ids.split(size), **options)  # type: ignore[arg-type]
        scales.append([m.input_scale for m in model.modules() if isinstance(m, wush.QuantLinear)])
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_calibration_brings_massive_activations_back(transform: Transform, generator: torch.Generator) -> None:
    """To what rounding costs: about as in MXFP4, of which each group's scale reaches any magnitude."""
    ids, errors = tokens(generator), {}
    for fmt in (wush.MXFP4, wush.NVFP4, CALIBRATED):
        report = quantize(massive(), ids, fmt, transform=transform)
        errors[fmt.name, fmt.scale_rule] = report.blocks[0].relative_mse
    assert errors["nvfp4", "calibrated"] < 1.1 * errors["mxfp4", "paper"]
    if transform.name in ("i", "h"):  # the others take the peak from the inputs and give it to the weight
        assert errors["nvfp4", "calibrated"] < 0.7 * errors["nvfp4", "fixed"]


def test_calibration_brings_tiny_activations_back(generator: torch.Generator) -> None:
    ids, errors = tokens(generator), []
    for fmt in (wush.NVFP4, CALIBRATED):
        model = tiny("llama")
        for block in model.model.layers:
            block.input_layernorm.weight.data *= 1e-4
            block.self_attn.q_proj.weight.data *= 1e4
            block.self_attn.k_proj.weight.data *= 1e4
            block.self_attn.v_proj.weight.data *= 1e4
        errors.append(quantize(model, ids, fmt, transform=wush.Identity()).blocks[0].relative_mse)
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("transform", [wush.Wush(), wush.Hadamard()], ids=repr)
def test_restored_blocks_have_the_same_scales_counts_and_bits(transform: Transform, generator: torch.Generator) -> None:
    ids, kept = tokens(generator), Kept()
    for fmt in (wush.NVFP4, CALIBRATED):
        kept = Kept()
        models = (massive(), massive())
        first = quantize(models[0], ids, fmt, transform=transform, saved=kept)
        del kept.blocks[2]
        again = quantize(models[1], ids, fmt, transform=transform, saved=kept)
        assert first.lost == again.lost
        assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)
        state = models[0].state_dict()
        other = massive()
        quantize(other, tokens(generator), fmt, transform=transform)
        other.load_state_dict(state)
        assert torch.equal(models[0](input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8], ids=lambda f: f.name)
def test_formats_that_calibrate_nothing_keep_their_own_scale(fmt: wush.Format, generator: torch.Generator) -> None:
    model = massive()
    quantize(model, tokens(generator), fmt)
    layers = [module for module in model.modules() if isinstance(module, wush.QuantLinear)]
    assert {one.input_scale for one in layers} == {fmt.global_scale} == {fmt.input_global_scale(1e6)}


def test_inputs_that_are_all_zero_have_a_scale_too(generator: torch.Generator) -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.weight.data.zero_()
    quantize(model, tokens(generator), CALIBRATED, transform=wush.Identity())
    assert model.model.layers[1].self_attn.q_proj.input_scale == 0.1
    assert model(input_ids=tokens(generator)).logits.isfinite().all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda one: f"{one.name}{'-shared' if one.share else ''}")
def test_groups_of_a_weight_are_counted_by_what_becomes_of_them(
    transform: Transform, generator: torch.Generator
) -> None:
    """They are those of `W T^-1`, as the window finds them before it is rounded."""
    weight = of_spread(generator).flatten(0, 1)
    moment = wush.SecondMoment(96)
    moment.add(torch.randn(64, 96, generator=generator))
    quantized = wush.Rtn().quantize_weight(weight, moment, transform, wush.NVFP4)
    found = lost_of_weight(weight, wush.QuantLinear(quantized, wush.NVFP4))
    assert found is not None
    values = weight if quantized.transform is None else transform_weight(weight, quantized.transform).float()
    groups = values.unflatten(-1, (-1, 16))
    rounded = wush.NVFP4.dequantize(quantized.quantized).unflatten(-1, (-1, 16))
    flushed = ((rounded == 0).all(-1) & (groups != 0).any(-1)).sum().item()
    clipped = (groups.abs() > 6 * 448 * 0.1).any(-1).sum().item()
    assert (found.groups, found.clipped, found.flushed) == (14 * 6, clipped, flushed)
    assert clipped + flushed > 0


def test_weights_outside_the_window_are_reported_and_warned_of(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight *= 1e-4
        model.model.layers[1].mlp.up_proj.weight *= 1e4
    with caplog.at_level(logging.WARNING, "wush"):
        lost = quantize(model, tokens(generator), wush.NVFP4, transform=wush.Identity()).weight_lost
    assert set(lost) == {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert lost["model.layers.0.mlp.gate_proj"].flushed > 0
    assert lost["model.layers.1.mlp.up_proj"].clipped > 0
    (said,) = [record.getMessage() for record in caplog.records if "weights of" in record.getMessage()]
    assert said.startswith("nvfp4: weights of 2 layers leave the format's window, model.layers.")
    assert "format.scale_rule=calibrated" in said


def test_a_calibrated_scale_or_another_format_loses_no_weight_of_such_sizes(generator: torch.Generator) -> None:
    for fmt in (CALIBRATED, wush.MXFP4):
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight *= 1e4
        assert quantize(model, tokens(generator), fmt, transform=wush.Identity()).weight_lost == {}
