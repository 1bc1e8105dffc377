"""Measurements are functions of two models and some windows: they change neither, and need nothing of the walk."""

import copy

import pytest
import torch
from torch import Tensor, nn

import wush
from tests.wush.test_walk import ARCHITECTURES, AlternatingModel, quantize, tiny, tokens
from wush.decoder import record_calls, run_block
from wush.progress import Silent
from wush.texts import PAD


def pair(ids: Tensor, architecture: str = "llama", **options: object) -> tuple[nn.Module, nn.Module]:
    """A tiny model, and a copy that is quantized."""
    original = tiny(architecture)
    quantized = copy.deepcopy(original)
    quantize(quantized, ids, **{"fmt": wush.MXFP4} | options)  # type: ignore[arg-type]
    return original, quantized


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "phi3"])
def test_block_errors_are_those_of_both_blocks_on_the_quantized_stream(
    architecture: str, generator: torch.Generator
) -> None:
    held_out = tokens(generator, 4)
    original, quantized = pair(tokens(generator), architecture)
    found = wush.measure(original, quantized, held_out, batch_size=4)
    blocks, others = (model.get_submodule(name_of_blocks(model)) for model in (original, quantized))
    calls = record_calls(quantized, others, held_out)
    hidden = calls.hidden
    assert [block.index for block in found] == [0, 1, 2]
    for index, (one, other) in enumerate(zip(blocks, others, strict=True)):
        with torch.no_grad():
            exact = run_block(one, hidden, calls.arguments[index]).double()
            ours = run_block(other, hidden, calls.arguments[index])
        difference = (ours.double() - exact).square()
        assert found[index].error.mse == pytest.approx(difference.mean().item(), rel=1e-9)
        assert found[index].error.relative == pytest.approx((difference.sum() / exact.square().sum()).item(), rel=1e-9)
        assert found[index].losses == {}
        hidden = ours


def name_of_blocks(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def test_on_the_calibration_tokens_it_is_the_error_that_the_walk_reports(generator: torch.Generator) -> None:
    ids = tokens(generator)
    original = tiny("llama")
    quantized = copy.deepcopy(original)
    report = quantize(quantized, ids, wush.MXFP4)
    found = wush.measure(original, quantized, ids, batch_size=2)
    assert [block.error.mse for block in found] == pytest.approx([block.mse for block in report.blocks], rel=1e-9)
    expected = [block.relative_mse for block in report.blocks]
    assert [block.error.relative for block in found] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_measuring_changes_neither_model(training: bool, generator: torch.Generator) -> None:
    original, quantized = (model.train(training) for model in pair(tokens(generator), transform=wush.Wush(share=True)))
    models, ids = (original, quantized), tokens(generator, 2)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    first = wush.measure(original, quantized, ids, layer_losses=True)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert {module.training for module in model.modules()} == {training}
    assert wush.measure(original, quantized, ids, layer_losses=True) == first


def test_losses_beside_change_no_block_error(generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator), transform=wush.Wush())
    ids = tokens(generator, 2)
    plain, beside = (wush.measure(original, quantized, ids, layer_losses=wanted) for wanted in (False, True))
    assert [block.error for block in plain] == [block.error for block in beside]
    assert all(len(block.losses) == 7 for block in beside)


class Counted(Silent):
    """Keeps how many steps were announced."""

    totals: dict[str, int]

    def __init__(self) -> None:
        self.totals = {}

    def track(self, steps, what, total):  # type: ignore[no-untyped-def]
        self.totals[what] = total
        return super().track(steps, what, total)


def test_only_the_quantized_blocks_are_measured_and_nothing_runs_after_the_last(generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator), blocks=[1])
    lengths, progress = [], Counted()
    for model in (original, quantized):
        model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    found = wush.measure(original, quantized, tokens(generator, 2, 90), layer_losses=True, progress=progress)
    assert [(block.index, block.name, len(block.losses)) for block in found] == [(1, "model.layers.1", 7)]
    assert all(length < 90 for length in lengths)
    assert progress.totals["measured decoder blocks"] == 2


def test_windows_of_unequal_length_are_measured_without_their_padding(generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator), transform=wush.Wush())
    windows = tokens(generator, 3)
    windows[1, 10:] = windows[2, 17:] = PAD
    found = wush.measure(original, quantized, windows, layer_losses=True)
    alone = [
        wush.measure(original, quantized, windows[row : row + 1, :length], layer_losses=True)
        for row, length in enumerate((24, 10, 17))
    ]
    for block, *parts in zip(found, *alone, strict=True):
        mean = sum(part.error.mse * length for part, length in zip(parts, (24, 10, 17), strict=True)) / 51
        assert block.error.mse == pytest.approx(mean, rel=1e-6)
        for name, loss in block.losses.items():
            own = [part.losses[name].mse for part in parts]
            mean = sum(value * length for value, length in zip(own, (24, 10, 17), strict=True)) / 51
            assert loss.mse == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_batch_size_changes_no_error_beyond_rounding(wanted: bool, generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator), transform=wush.Wush())
    ids = tokens(generator, 5)
    one, more = (wush.measure(original, quantized, ids, layer_losses=wanted, batch_size=size) for size in (1, 4))
    for a, b in zip(one, more, strict=True):
        assert a.error.mse == pytest.approx(b.error.mse, rel=1e-4)
        for name, loss in a.losses.items():
            assert loss.even == pytest.approx(b.losses[name].even, rel=1e-5)


def test_a_linear_that_no_token_reaches_has_no_loss(generator: torch.Generator) -> None:
    ids = torch.randint(0, 50, (2, 16), generator=generator)
    original = AlternatingModel()
    quantized = copy.deepcopy(original)
    options = {"format": wush.MXFP4, "transform": wush.Wush(), "algorithm": wush.Rtn()}
    wush.quantize(quantized, [ids[:, :8], ids], **options)  # type: ignore[arg-type]
    (block,) = wush.measure(original, quantized, ids, layer_losses=True)
    assert set(block.losses) == {"long"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_measured(architecture: str, generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator), architecture, fmt=wush.MXFP8)
    found = wush.measure(original, quantized, tokens(generator, 2), layer_losses=True)
    assert len(found) == 3
    assert all(0 < block.error.relative < 0.1 for block in found)
    assert all(0 < loss.relative < 0.1 for block in found for loss in block.losses.values())


def test_two_models_that_are_no_pair_are_refused(generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator))
    ids = tokens(generator, 1)
    with pytest.raises(ValueError, match="not the quantized first one"):
        wush.measure(original, original, ids)
    with pytest.raises(ValueError, match="the original is quantized"):
        wush.measure(quantized, original, ids)
    with pytest.raises(ValueError, match="not the quantized first one"):
        wush.measure(tiny("gpt_neox"), quantized, ids)
    with pytest.raises(ValueError, match="no windows"):
        wush.measure(original, quantized, ids[:0])


def test_an_error_that_is_not_finite_names_its_block_or_layer(generator: torch.Generator) -> None:
    original, quantized = pair(tokens(generator))
    layer = quantized.model.layers[1].mlp.down_proj
    layer.scales = torch.full_like(layer.scales.view(torch.uint8), 255).view(layer.scales.dtype)
    for wanted in (False, True):
        with pytest.raises(wush.NumericError, match=r"model\.layers\.1: its output .* is not finite"):
            wush.measure(original, quantized, tokens(generator, 2), layer_losses=wanted)


@pytest.mark.gpu
def test_an_original_on_the_cpu_is_lent_to_the_gpu_block_by_block(generator: torch.Generator) -> None:
    ids = tokens(generator)
    original = tiny("llama")
    quantized = copy.deepcopy(original).cuda()
    quantize(quantized, ids, wush.MXFP4)
    on_gpu = wush.measure(copy.deepcopy(original).cuda(), quantized, ids, layer_losses=True)
    lent = wush.measure(original, quantized, ids, layer_losses=True)
    assert lent == on_gpu
    assert {parameter.device.type for parameter in original.parameters()} == {"cpu"}
