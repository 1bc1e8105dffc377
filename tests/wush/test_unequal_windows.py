"""Windows of unequal length through the method: what they give is what each gives alone, without any padding."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import wush
from tests.wush.test_walk import tiny
from wush.decoder import find_blocks, linear_inputs, linears
from wush.moments import SecondMoment
from wush.texts import PAD, batches, filled

LENGTHS = (24, 9, 24, 2, 17, 9, 9)


@pytest.fixture
def windows(generator: torch.Generator) -> Tensor:
    return filled([torch.randint(1, 101, (length,), generator=generator).tolist() for length in LENGTHS], 24)


def alone(windows: Tensor) -> list[Tensor]:
    """Each window by itself, `(1, m)`, in the order given."""
    return [window[window != PAD][None] for window in windows]


def together(windows: Tensor, size: int) -> list[Tensor]:
    return [batch.ids for batch in batches(windows, size)]


def moments(model: nn.Module, passes: Sequence[Tensor]) -> dict[str, SecondMoment]:
    """Second moments of what each linear of the first decoder block is fed."""
    block = find_blocks(model)[1][0]
    found = {name: SecondMoment(linear.in_features) for name, linear in linears(block).items()}
    for ids in passes:
        with torch.no_grad(), linear_inputs(block, list(found)) as seen:
            model(input_ids=ids, use_cache=False)
        for name, inputs in seen.items():
            for x in inputs:
                found[name].add(x)
    return found


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt"])
def test_moments_are_those_of_the_windows_one_by_one(architecture: str, size: int, windows: Tensor) -> None:
    model = tiny(architecture)
    ours, theirs = moments(model, together(windows, size)), moments(model, alone(windows))
    for name, moment in theirs.items():
        assert ours[name].tokens == moment.tokens == sum(LENGTHS)
        torch.testing.assert_close(ours[name].matrix, moment.matrix, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=["rtn", "gptq"])
def test_the_number_of_windows_at_a_time_changes_no_bit_of_a_model(
    algorithm: wush.Rtn | wush.Gptq, windows: Tensor
) -> None:
    original = tiny("llama")
    states = []
    for size in (1, 2, 100):
        model = copy.deepcopy(original)
        wush.quantize(model, together(windows, size), format=wush.MXFP4, transform=wush.Wush(), algorithm=algorithm)
        states.append({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_block_errors_count_each_token_once(windows: Tensor) -> None:
    reports = []
    for passes in (together(windows, 3), alone(windows)):
        model, report = tiny("llama"), wush.QuantizationReport()
        wush.quantize(model, passes, format=wush.MXFP4, transform=wush.Hadamard(), algorithm=wush.Rtn(), report=report)
        reports.append([block.relative_mse for block in report.blocks])
    assert reports[0] == pytest.approx(reports[1], rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_metrics_are_those_of_the_windows_one_by_one(architecture: str, size: int, windows: Tensor) -> None:
    original = tiny(architecture)
    model = copy.deepcopy(original)
    wush.quantize(model, together(windows, 3), format=wush.MXFP4, transform=wush.Hadamard(), algorithm=wush.Rtn())
    found = wush.evaluate(model, windows, wush.original_states(original, windows), batch_size=size)
    singly = [wush.evaluate(model, ids, wush.original_states(original, ids)) for ids in alone(windows)]
    assert found.predictions == sum(LENGTHS) - len(LENGTHS)
    for metric in ("nll", "nll_original", "kl", "agree", "predictions"):
        expected = [value for one in singly for value in getattr(one.windows, metric)]
        assert getattr(found.windows, metric) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.kl == pytest.approx(sum(one.kl * one.predictions for one in singly) / found.predictions, rel=1e-4)
    assert found.kl > 0.01
