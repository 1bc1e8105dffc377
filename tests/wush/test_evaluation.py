"""Perplexity, KL and top-1 against a plain computation from both models' logits."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import wush


def model(architecture: str = "llama", **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
    config = AutoConfig.for_model(architecture, **sizes | heads | options)
    return AutoModelForCausalLM.from_config(config).eval()


def perturbed(original: nn.Module) -> nn.Module:
    other = copy.deepcopy(original)
    for block in other.model.layers:
        block.mlp.down_proj.weight.data += 0.3 * block.mlp.down_proj.weight.flip(0)
    return other


def windows(generator: torch.Generator, count: int = 5) -> Tensor:
    return torch.randint(1, 67, (count, 12), generator=generator)


# Gemma 2 caps its logits after the head, so what follows the head must be applied to both models.
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_metrics_equal_those_of_both_models_logits(architecture: str, generator: torch.Generator) -> None:
    original = model(architecture, **({"final_logit_softcapping": 2.0} if architecture == "gemma2" else {}))
    other, ids = perturbed(original), windows(generator)
    with torch.no_grad():
        p, q = (F.log_softmax(m(input_ids=ids).logits[:, :-1].double(), -1) for m in (original, other))
    targets = ids[:, 1:].unsqueeze(-1)
    found = wush.evaluate(other, ids, wush.original_states(original, ids), batch_size=2)
    assert found.perplexity == pytest.approx(math.exp(-q.gather(-1, targets).mean()), rel=1e-5)
    assert found.perplexity_original == pytest.approx(math.exp(-p.gather(-1, targets).mean()), rel=1e-5)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.predictions == 5 * 11


def test_the_original_agrees_with_itself_exactly(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    found = wush.evaluate(original, ids, wush.original_states(original, ids))
    assert found.kl == 0
    assert found.top1 == 1
    assert found.perplexity == found.perplexity_original


def test_the_batch_size_changes_no_number_beyond_rounding(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    other = perturbed(original)
    one = wush.evaluate(other, ids, wush.original_states(original, ids, batch_size=1), batch_size=1)
    all_at_once = wush.evaluate(other, ids, wush.original_states(original, ids, batch_size=5), batch_size=5)
    assert one.kl == pytest.approx(all_at_once.kl, rel=1e-4)
    assert one.perplexity == pytest.approx(all_at_once.perplexity, rel=1e-6)


def test_evaluation_leaves_no_hook_behind(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    wush.evaluate(original, ids, wush.original_states(original, ids))
    assert original(input_ids=ids).logits.shape[0] == 5


@pytest.mark.parametrize("name", ["model.norm", "model.layers.1.mlp.down_proj"])
def test_logits_that_are_not_finite_are_an_error_that_names_where(name: str, generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    broken = copy.deepcopy(original)
    broken.get_submodule(name).weight.data[0] = torch.nan
    with pytest.raises(wush.NumericError, match=f"logits are not finite: .* out of {name};"):
        wush.evaluate(broken, ids, wush.original_states(original, ids))


def test_finite_logits_that_give_a_token_no_probability_are_an_error_too(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    broken = copy.deepcopy(original)
    broken.lm_head.weight.data *= 1e6
    with pytest.raises(wush.NumericError, match="no probability"):
        wush.evaluate(broken, ids, wush.original_states(original, ids))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(wush.UnsupportedModelError, match="no LM head"):
        wush.original_states(nn.Linear(2, 2), torch.zeros(1, 4, dtype=torch.long))
