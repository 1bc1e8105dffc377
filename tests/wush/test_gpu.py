"""The same numbers on a GPU as on the CPU, up to the order of sums."""

import copy

import pytest
import torch

import wush
from wush.models import load_random

pytestmark = pytest.mark.gpu
FORMATS = [wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_codes_and_scales_are_bit_equal(fmt: wush.Format, generator: torch.Generator) -> None:
    x = torch.randn(256, 512, generator=generator) * torch.exp2(torch.randn(256, 1, generator=generator) * 8)
    ours, theirs = fmt.quantize(x), fmt.quantize(x.cuda())
    assert torch.equal(ours.scales.view(torch.uint8), theirs.scales.cpu().view(torch.uint8))
    assert torch.equal(ours.codes, theirs.codes.cpu())


@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_is_as_good(algorithm: wush.Rtn, dtype: str, generator: torch.Generator) -> None:
    loaded = load_random("llama", 256, 512, 3, 4, 2, 0, dtype, "cpu")  # type: ignore[arg-type]
    ids = torch.randint(0, 256, (4, 64), generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(loaded.model).to(device)
        states = wush.original_states(model, ids)
        wush.quantize(model, ids.split(2), format=wush.MXFP4, transform=wush.Wush(), algorithm=algorithm)
        found.append(wush.evaluate(model, ids, states))
    assert found[1].kl == pytest.approx(found[0].kl, rel=0.1)
    assert found[1].perplexity_original == pytest.approx(found[0].perplexity_original, rel=0.02)
