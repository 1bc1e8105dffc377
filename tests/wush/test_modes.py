"""Calibration and measurement run in evaluation mode, and put every module's mode back."""

import copy

import pytest
import torch
from torch import nn

import wush
from tests.wush.test_walk import quantize, tiny, tokens
from wush.modes import evaluation_mode


def dropping() -> nn.Module:
    """A model whose layers drop activations at random in training mode."""
    model = tiny("opt")
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.3
    return model.train()


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
def test_a_model_in_training_mode_gives_what_it_gives_in_evaluation_mode(
    algorithm: wush.Gptq, generator: torch.Generator
) -> None:
    ids, original = tokens(generator), dropping()
    models = [copy.deepcopy(original), copy.deepcopy(original).eval()]
    states = [wush.original_states(model, ids) for model in models]
    assert torch.equal(*states)
    reports = [quantize(model, ids, wush.MXFP4, algorithm=algorithm) for model in models]
    assert [block.mse for block in reports[0].blocks] == [block.mse for block in reports[1].blocks]
    assert wush.evaluate(models[0], ids, states[0]) == wush.evaluate(models[1], ids, states[1])
    assert wush.measure(original, models[0], ids) == wush.measure(original.eval(), models[1], ids)


def test_a_model_in_training_mode_is_no_distance_from_itself(generator: torch.Generator) -> None:
    model, ids = dropping(), tokens(generator)
    found = wush.evaluate(model, ids, wush.original_states(model, ids))
    assert (found.kl, found.top1) == (0, 1)


def test_every_module_has_its_own_mode_again(generator: torch.Generator) -> None:
    model, ids = dropping(), tokens(generator)
    frozen = "model.decoder.layers.1"
    model.get_submodule(frozen).eval()
    before = modes(model)
    assert len(set(before.values())) == 2
    states = wush.original_states(model, ids)
    wush.evaluate(model, ids, states)
    assert modes(model) == before
    quantize(model, ids)
    assert modes(model) == before


def test_a_new_module_has_the_mode_of_its_parent(generator: torch.Generator) -> None:
    for training in (False, True):
        model = nn.Sequential(nn.Linear(2, 2)).train(training)
        with evaluation_mode(model):
            assert not model[0].training
            model[0] = nn.Linear(2, 2)
        assert model[0].training is training


def test_the_modes_come_back_after_an_error_too(generator: torch.Generator) -> None:
    model, ids = dropping(), tokens(generator)
    before = modes(model)
    model.model.decoder.layers[1].fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(wush.NumericError):
        quantize(model, ids)
    with pytest.raises(wush.NumericError):
        wush.original_states(model, ids)
    assert modes(model) == before
