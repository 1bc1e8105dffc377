"""Perplexity, KL and top-1 against a plain computation from both models' logits."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import wush
from wush.texts import PAD


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


# Sums by window


def test_windows_sum_up_to_the_metrics(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    other = perturbed(original)
    found = wush.evaluate(other, ids, wush.original_states(original, ids), batch_size=2)
    sums = found.windows
    assert sum(sums.predictions) == found.predictions
    assert sums.predictions == [11] * 5
    assert found.kl == pytest.approx(math.fsum(sums.kl) / 55, rel=1e-15)
    assert found.top1 == sum(sums.agree) / 55
    assert found.perplexity == pytest.approx(math.exp(math.fsum(sums.nll) / 55), rel=1e-15)
    assert found.perplexity_original == pytest.approx(math.exp(math.fsum(sums.nll_original) / 55), rel=1e-15)
    for row in range(5):
        own = ids[row : row + 1]
        alone = wush.evaluate(other, own, wush.original_states(original, own))
        assert sums.kl[row] == pytest.approx(alone.kl * 11, rel=1e-4)
        assert sums.nll[row] == pytest.approx(math.log(alone.perplexity) * 11, rel=1e-6)
        assert sums.agree[row] == round(alone.top1 * 11)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_padding_enters_no_sum(batch_size: int, generator: torch.Generator) -> None:
    """Windows of other lengths, in any order, give each its own sums."""
    original, ids = model(), windows(generator)
    other, lengths = perturbed(original), (12, 5, 12, 8, 5)
    for row, length in enumerate(lengths):
        ids[row, length:] = PAD
    states = wush.original_states(original, ids, batch_size=batch_size)
    assert states.shape == (5, 12, 32)
    assert all(not states[row, length:].any() for row, length in enumerate(lengths))
    sums = wush.evaluate(other, ids, states, batch_size=batch_size).windows
    assert sums.predictions == [length - 1 for length in lengths]
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, :length]
        alone = wush.evaluate(other, own, wush.original_states(original, own)).windows
        assert sums.kl[row] == pytest.approx(alone.kl[0], rel=1e-4)
        assert sums.nll[row] == pytest.approx(alone.nll[0], rel=1e-6)
        assert sums.nll_original[row] == pytest.approx(alone.nll_original[0], rel=1e-6)


def test_no_windows_are_an_error(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="no windows to evaluate"):
        wush.original_states(model(), windows(generator)[:0])


def test_windows_that_predict_nothing_are_an_error(generator: torch.Generator) -> None:
    own, ids = model(), windows(generator)
    with pytest.raises(ValueError, match="windows of one token predict none"):
        wush.original_states(own, ids[:, :1])
    ids[0, 1:] = PAD
    assert wush.evaluate(own, ids, wush.original_states(own, ids)).windows.predictions == [0, 11, 11, 11, 11]


class OddHead(nn.Module):
    """A forward that feeds its head what `feed` makes of the hidden states, or leaves it alone."""

    def __init__(self, own: nn.Module, feed: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.feed = own, feed

    def get_output_embeddings(self) -> nn.Module:
        return self.own.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.own.model(input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.feed(self.own.lm_head, hidden))


ODD: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "last": lambda head, hidden: head(hidden[:, -1:]),
    "flat": lambda head, hidden: head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1),
    "twice": lambda head, hidden: head(hidden) + 0 * head(hidden.flip(0)),
    "never": lambda head, hidden: F.linear(hidden, head.weight),
}


@pytest.mark.parametrize("feed", ODD)
def test_a_head_that_is_not_fed_one_state_a_token_is_refused(feed: str, generator: torch.Generator) -> None:
    with pytest.raises(wush.UnsupportedModelError, match=r"feeds its LM head .* for token ids \(4, 12\)"):
        wush.original_states(OddHead(model(), ODD[feed]), windows(generator))


@pytest.mark.parametrize("part", [(slice(3), slice(None)), (slice(None), slice(8))])
def test_states_of_other_windows_are_an_error(part: tuple[slice, slice], generator: torch.Generator) -> None:
    own, ids = model(), windows(generator)
    states = wush.original_states(own, ids)
    with pytest.raises(ValueError, match="are not those of windows"):
        wush.evaluate(own, ids[part], states)
    with pytest.raises(ValueError, match="are not those of windows"):
        wush.evaluate(own, ids, states[part])


def test_a_quantized_model_is_no_original(generator: torch.Generator) -> None:
    own, ids = model(), windows(generator)
    wush.quantize(own, [ids], format=wush.MXFP4, transform=wush.Hadamard(), algorithm=wush.Rtn(), blocks=[1])
    with pytest.raises(wush.UnsupportedModelError, match="is quantized, and no original"):
        wush.original_states(own, ids)


class KeywordHead(nn.Linear):
    """A head that is called by keyword."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(input=x)


def test_a_head_may_be_called_by_keyword(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    other, states = perturbed(original), wush.original_states(original, ids)
    exact = wush.evaluate(other, ids, states)
    for one in (original, other):
        one.lm_head.__class__ = KeywordHead
    assert torch.equal(wush.original_states(original, ids), states)
    assert wush.evaluate(other, ids, states) == exact


def test_windows_that_the_model_cannot_take_are_refused_before_anything_runs(generator: torch.Generator) -> None:
    original, ids = model(), windows(generator)
    ran: list[object] = []
    original.register_forward_pre_hook(lambda *_: ran.append(1))
    ids[2, 3] = 67
    with pytest.raises(ValueError, match=r"evaluation: token ids \d+ to 67, but the model's embeddings are 0 to 66"):
        wush.original_states(original, ids)
    learned = model("gpt2", n_positions=8, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="evaluation: windows of 12 tokens are longer than the 8 positions"):
        wush.original_states(learned, windows(generator))
    assert not ran


# Logits of -inf


class Masking(nn.Linear):
    """A head that rules tokens out; `ruled_out` are their ids."""

    ruled_out: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        logits[..., list(self.ruled_out)] = -torch.inf
        return logits


def masking(original: nn.Module, *ruled_out: int) -> nn.Module:
    head = Masking(32, 67, bias=False)
    head.weight, head.ruled_out = original.lm_head.weight, ruled_out
    original.lm_head = head
    return original


def test_tokens_that_both_models_rule_out_count_as_nothing(generator: torch.Generator) -> None:
    ids = windows(generator).clamp(max=59)
    original = masking(model(), *range(60, 67))
    other = perturbed(original)
    found = wush.evaluate(other, ids, wush.original_states(original, ids))
    with torch.no_grad():
        p, q = (F.log_softmax(m(input_ids=ids).logits[:, :-1, :60].double(), -1) for m in (original, other))
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.kl > 0
    itself = wush.evaluate(original, ids, wush.original_states(original, ids))
    assert (itself.kl, itself.top1) == (0, 1)


class _RulesOutMore:
    """After the head, in the quantized half of the batch only."""

    def __init__(self, half: slice, token: int, value: float = -torch.inf) -> None:
        self.half, self.token, self.value = half, token, value

    def __call__(self, _: nn.Module, __: object, logits: Tensor) -> None:
        logits[self.half, 3, self.token] = self.value


def joined_half(generator: torch.Generator, half: slice, token: int, value: float = -torch.inf) -> wush.Evaluation:
    """Evaluate a model on two windows of token 1 to 59 with a logit of one half of the head's batch changed."""
    original, ids = model(), windows(generator, 2).clamp(max=59)
    states = wush.original_states(original, ids)
    original.lm_head.register_forward_hook(_RulesOutMore(half, token, value))
    return wush.evaluate(original, ids, states)


def test_a_token_that_only_the_quantized_model_rules_out_is_an_error_that_says_so(generator: torch.Generator) -> None:
    with pytest.raises(wush.NumericError, match=r"quantized model rules out token 64 at position 4 .* KL is infinite"):
        joined_half(generator, slice(0, 2), 64)


def test_a_token_that_only_the_original_rules_out_is_fine(generator: torch.Generator) -> None:
    found = joined_half(generator, slice(2, 4), 64)
    assert math.isfinite(found.kl)
    assert found.kl > 0


def test_a_token_of_the_text_that_the_original_rules_out_is_the_original_s_fault(generator: torch.Generator) -> None:
    ids = windows(generator).clamp(max=59)
    ids[3, 5] = 63
    original = masking(model(), 63)
    with pytest.raises(wush.NumericError, match=r"original model rules out token 63 of the text.*another|without it"):
        wush.evaluate(original, ids, wush.original_states(original, ids))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_other_infinities_name_whose_they_are(value: float, generator: torch.Generator) -> None:
    with pytest.raises(wush.NumericError, match="the original model's logits are not finite"):
        joined_half(generator, slice(2, 4), 5, value)
    with pytest.raises(wush.NumericError, match="the quantized model's logits are not finite"):
        joined_half(generator, slice(0, 2), 5, value)


def test_a_head_that_rules_tokens_out_is_not_blamed_for_another_module_s_nan(generator: torch.Generator) -> None:
    ids = windows(generator).clamp(max=59)
    original = masking(model(), *range(60, 67))
    broken = copy.deepcopy(original)
    broken.model.layers[1].mlp.down_proj.weight.data[0] = torch.nan
    with pytest.raises(wush.NumericError, match=r"out of model\.layers\.1\.mlp\.down_proj;"):
        wush.evaluate(broken, ids, wush.original_states(original, ids))


def test_an_original_that_gives_the_text_no_probability_is_named(generator: torch.Generator) -> None:
    ids, original = windows(generator), model()
    original.lm_head.weight.data *= 1e6
    with pytest.raises(wush.NumericError, match="the original model gives the text no probability"):
        wush.evaluate(original, ids, wush.original_states(original, ids))
