"""Following a model's forward: what a block is called with and returns, in any shape, or a refusal in words."""

import logging
from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput

import wush
from wush.decoder import check_positions, check_windows, find_blocks, follow, linear_inputs, record_calls, run_block
from wush.texts import PAD

Forward = Callable[["Row", Tensor], Tensor]
Pair = namedtuple("Pair", "hidden aux")


class Block(nn.Module):
    """A residual linear; `shape` makes of the hidden states what the block returns."""

    def __init__(self, shape: Callable[[Tensor], Any] = lambda hidden: hidden) -> None:
        super().__init__()
        self.proj, self.shape = nn.Linear(32, 32), shape

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        return self.shape(hidden_states + scale * self.proj(hidden_states))


class Row(nn.Module):
    """A model of three blocks, run by the function it is given."""

    def __init__(self, run: Forward, blocks: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.stages = nn.ModuleList(blocks() for _ in range(3))
        self.run = run

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.head(self.run(self, self.embed(input_ids)))


def each(unpack: Callable[[Any], Tensor] = lambda output: output) -> Forward:
    def run(model: Row, hidden: Tensor) -> Tensor:
        for stage in model.stages:
            hidden = unpack(stage(hidden))
        return hidden

    return run


def ids(generator: torch.Generator, windows: int = 4, length: int = 12) -> Tensor:
    return torch.randint(0, 50, (windows, length), generator=generator)


def quantize(model: nn.Module, tokens: Tensor) -> wush.QuantizationReport:
    report = wush.QuantizationReport()
    options: dict[str, Any] = {"transform": wush.Hadamard(), "algorithm": wush.Rtn(), "report": report}
    wush.quantize(model, tokens.split(2), format=wush.MXFP8, **options)
    return report


RETURNED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda h: h, lambda o: o),
    "single": (lambda h: (h,), lambda o: o[0]),
    "pair with None": (lambda h: (h, None), lambda o: _pair(o)[0]),
    "pair with a tensor": (lambda h: (h, h.sum()), lambda o: o[0] + 0 * o[1].isnan()),
    "hidden states last": (lambda h: (h.sum(-1), h), lambda o: _pair(o)[1]),
    "list": (lambda h: [h, None], lambda o: o[0]),
    "dict": (lambda h: {"router": None, "hidden_states": h}, lambda o: o["hidden_states"]),
    "model output": (lambda h: BaseModelOutput(last_hidden_state=h), lambda o: o.last_hidden_state),
    "named tuple": (lambda h: Pair(h, None), lambda o: o.hidden),
}


def _pair(output: Any) -> Any:
    first, second = output
    return first, second


@pytest.mark.parametrize("kind", RETURNED)
def test_whatever_a_block_returns_is_followed(kind: str, generator: torch.Generator) -> None:
    shape, unpack = RETURNED[kind]
    model, tokens = Row(each(unpack), lambda: Block(shape)), ids(generator)
    exact = model(tokens, False)
    assert [len(block.layers) for block in quantize(model, tokens).blocks] == [1, 1, 1]
    assert 0 < (model(tokens, False) - exact).norm() < 0.1 * exact.norm()


def by_keyword(name: str, position: bool) -> tuple[Forward, Callable[[], nn.Module]]:
    """A model whose blocks take hidden states under a name, or behind another argument."""

    class Named(Block):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(args[1] if position else kwargs.pop(name), *args[2:], **kwargs)

    def run(model: Row, hidden: Tensor) -> Tensor:
        for index, stage in enumerate(model.stages):
            hidden = stage(index, hidden, index + 0.5) if position else stage(scale=index + 0.5, **{name: hidden})
        return hidden

    return run, Named


@pytest.mark.parametrize(("name", "position"), [("hidden_states", False), ("x", False), ("", True)])
def test_hidden_states_may_be_given_anywhere(name: str, position: bool, generator: torch.Generator) -> None:
    model, tokens = Row(*by_keyword(name, position)), ids(generator)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    exact = model(tokens, False)
    calls = record_calls(model, model.stages, tokens)
    hidden = calls.hidden
    for stage, arguments in zip(model.stages, calls.arguments, strict=True):
        hidden = run_block(stage, hidden, arguments)
    assert torch.equal(hidden, seen[0])
    quantize(model, tokens)
    assert 0 < (model(tokens, False) - exact).norm() < 0.1 * exact.norm()


def twice(model: Row, hidden: Tensor) -> Tensor:
    return each()(model, each()(model, hidden))


def each_twice(model: Row, hidden: Tensor) -> Tensor:
    for stage in model.stages:
        hidden = stage(stage(hidden))
    return hidden


def last_again(model: Row, hidden: Tensor) -> Tensor:
    return model.stages[2](each()(model, hidden))


def backwards(model: Row, hidden: Tensor) -> Tensor:
    for stage in reversed(model.stages):
        hidden = stage(hidden)
    return hidden


def skips_one(model: Row, hidden: Tensor) -> Tensor:
    return model.stages[1](model.stages[0](hidden))


def skips_the_second(model: Row, hidden: Tensor) -> Tensor:
    return model.stages[2](model.stages[0](hidden))


def scaled_between(model: Row, hidden: Tensor) -> Tensor:
    for stage in model.stages:
        hidden = 0.5 * stage(hidden)
    return hidden


def parallel(model: Row, hidden: Tensor) -> Tensor:
    return sum((stage(hidden) for stage in model.stages), hidden)


def skip_connection(model: Row, hidden: Tensor) -> Tensor:
    first = model.stages[0](hidden)
    return model.stages[2](first + model.stages[1](first))


def changed_in_place(model: Row, hidden: Tensor) -> Tensor:
    for stage in model.stages:
        hidden = stage(hidden).add_(1)
    return hidden


def fed_by_the_first(model: Row, hidden: Tensor) -> Tensor:
    first = model.stages[0](hidden)
    return model.stages[2](model.stages[1](first, first.mean()), 1.0)


REFUSED = {
    twice: "decoder block 0 runs again after 3 of 3",
    each_twice: "decoder block 0 runs again after 1 of 3",
    last_again: "decoder block 2 runs again",
    backwards: "decoder block 2 runs where block 0 is due",
    skips_one: "ran 2 of its 3 decoder blocks, each of which must run once",
    skips_the_second: "decoder block 2 runs where block 1 is due",
    scaled_between: "decoder block 1 is not fed what block 0 returns",
    parallel: "decoder block 1 is not fed what block 0 returns",
    skip_connection: "decoder block 2 is not fed what block 1 returns",
    changed_in_place: "decoder block 1 is not fed what block 0 returns",
    fed_by_the_first: "decoder block 1 is called with what other blocks compute",
}


@pytest.mark.parametrize("run", REFUSED, ids=lambda run: run.__name__)
def test_a_model_whose_blocks_are_no_row_is_refused_untouched(run: Forward, generator: torch.Generator) -> None:
    model, tokens = Row(run), ids(generator)
    exact = model(tokens, False)
    with pytest.raises(wush.UnsupportedModelError, match=f"Row: .*{REFUSED[run]}"):
        quantize(model, tokens)
    assert torch.equal(model(tokens, False), exact)
    assert not any(isinstance(module, wush.QuantLinear) for module in model.modules())


def test_a_block_that_only_some_batches_run_is_refused(generator: torch.Generator) -> None:
    def run(model: Row, hidden: Tensor) -> Tensor:
        hidden = model.stages[1](model.stages[0](hidden))
        return model.stages[2](hidden) if hidden.shape[1] > 8 else hidden

    options: dict[str, Any] = {"format": wush.MXFP8, "transform": wush.Hadamard(), "algorithm": wush.Rtn()}
    with pytest.raises(wush.UnsupportedModelError, match="ran 2 of its 3 decoder blocks"):
        wush.quantize(Row(run), [ids(generator), ids(generator, length=6)], **options)


def test_a_loop_that_only_a_later_batch_takes_is_refused(generator: torch.Generator) -> None:
    def run(model: Row, hidden: Tensor) -> Tensor:
        hidden = each()(model, hidden)
        return each()(model, hidden) if hidden.shape[1] > 8 else hidden

    options: dict[str, Any] = {"format": wush.MXFP8, "transform": wush.Hadamard(), "algorithm": wush.Rtn()}
    with pytest.raises(wush.UnsupportedModelError, match="decoder block 0 runs again"):
        wush.quantize(Row(run), [ids(generator, length=6), ids(generator)], **options)


class Counting(Block):
    """A block that depends on how often it has run."""

    ran = 0

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        self.ran += 1
        return super().forward(hidden_states, float(self.ran))


class Sharing(Block):
    """A block that uses what the first one of its model kept last."""

    kept: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.first = not self.kept
        if self.first:
            self.kept.append(torch.zeros(()))

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        if self.first:
            self.kept[0] = hidden_states.mean()
            return super().forward(hidden_states)
        return super().forward(hidden_states + 10 * self.kept[0])


@pytest.mark.parametrize("kind", [Counting, Sharing])
def test_a_block_with_a_state_is_refused(kind: type[Block], generator: torch.Generator) -> None:
    Sharing.kept = []
    with pytest.raises(wush.UnsupportedModelError, match=r"decoder block \d, run alone, does not return"):
        quantize(Row(each(), kind), ids(generator))


def test_a_hook_that_changes_the_first_blocks_input_is_refused(generator: torch.Generator) -> None:
    model = Row(each())
    model.stages[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    with pytest.raises(wush.UnsupportedModelError, match="a hook changes what decoder block 0 is fed"):
        quantize(model, ids(generator))


def test_a_hook_on_a_later_block_is_followed(generator: torch.Generator) -> None:
    model, tokens = Row(each()), ids(generator)
    model.stages[1].register_forward_hook(lambda _, __, output: output + 1)
    exact = model(tokens, False)
    report = quantize(model, tokens)
    assert all(block.relative_mse < 0.01 for block in report.blocks)
    assert (model(tokens, False) - exact).norm() < 0.1 * exact.norm()


class InPlace(Block):
    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        return hidden_states.add_(self.proj(hidden_states.clone()))


def test_a_block_that_writes_into_its_input_is_followed(generator: torch.Generator) -> None:
    model, tokens = Row(each(), InPlace), ids(generator)
    with torch.no_grad():
        exact = model(tokens, False)
        report = quantize(model, tokens)
        assert (model(tokens, False) - exact).norm() < 0.1 * exact.norm()
    assert all(0 < block.relative_mse < 0.01 for block in report.blocks)


class Overwriting(Block):
    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        x = hidden_states.clone()
        return hidden_states + self.proj(x) + x.zero_()


def test_a_linears_input_that_is_overwritten_before_it_is_read_is_refused(generator: torch.Generator) -> None:
    block = Overwriting()
    with (
        torch.no_grad(),
        pytest.raises(wush.UnsupportedModelError, match="proj: its input is overwritten in place"),
        linear_inputs(block, ["proj"]),
    ):
        block(torch.randn(2, 3, 32, generator=generator))


class Listed(Block):
    """A block that calls its linear through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [self.proj]

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        return hidden_states + self.calls[0](hidden_states)


class Reading(Block):
    """A block that calls its linear, and reads its weight besides."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        return super().forward(hidden_states) + self.proj.weight.mean()


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Listed, "goes on with the original proj"), (Reading, "needs an nn.Linear for more than to call it")],
)
def test_a_block_that_does_more_than_call_a_linear_is_refused(
    kind: type[Block], told: str, generator: torch.Generator
) -> None:
    with pytest.raises(wush.UnsupportedModelError, match=rf"stages\.0: .*{told}.*exclude"):
        quantize(Row(each(), kind), ids(generator))


class Doubling(Block):
    """A block that feeds its linear in a dtype that only an nn.Linear of that dtype takes."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        if isinstance(self.proj, nn.Linear):
            return super().forward(hidden_states)
        return self.proj(hidden_states.double())


def test_what_a_quantized_layer_refuses_is_told_in_its_own_words(generator: torch.Generator) -> None:
    with pytest.raises(TypeError, match=r"stages\.0\.proj: the input is torch\.float64"):
        quantize(Row(each(), Doubling), ids(generator))


def test_recording_stops_at_the_head(generator: torch.Generator) -> None:
    model, tokens = Row(each()), ids(generator)
    route, ran = follow(model, model.stages, tokens), []
    model.head.register_forward_hook(lambda *_: ran.append(1))
    record_calls(model, model.stages, tokens, route)
    assert not ran


TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "attn_layer_indices": [1],
    },
    "bloom": {},
    "gpt_bigcode": {},
    "gptj": {"rotary_dim": 16},
    "llama4_text": {"intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {},
    "mpt": {},
}


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **TINY | FAMILIES[name])).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_blocks_of_other_kinds_are_quantized_and_stay_close(
    name: str, generator: torch.Generator
) -> None:
    model, tokens = family(name), torch.randint(1, 101, (4, 24), generator=generator)
    states = wush.original_states(model, tokens)
    report = quantize(model, tokens)
    assert all(block.layers for block in report.blocks)
    assert 0 < wush.evaluate(model, tokens, states).kl < 0.05


def test_gemmas_shared_keys_and_values_are_refused(generator: torch.Generator) -> None:
    options = {
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "global_head_dim": 16,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **TINY | options)).eval()
    with pytest.raises(wush.UnsupportedModelError, match="Gemma4ForCausalLM: decoder block"):
        quantize(model, torch.randint(1, 101, (4, 24), generator=generator))


def test_a_list_of_linears_is_no_row_of_blocks() -> None:
    model = Row(each())
    model.heads = nn.ModuleList(nn.Linear(32, 500) for _ in range(8))
    assert find_blocks(model)[0] == "stages"


@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "gptj", "xglm", "mpt", "gpt2"])
def test_windows_past_a_table_of_positions_are_refused_with_both_numbers(name: str) -> None:
    config = AutoConfig.for_model(name)
    limit = {"gpt_bigcode": 1024, "gpt2": 1024}.get(name, 2048)
    check_positions(config, limit, "calibration")
    with pytest.raises(ValueError, match=rf"{limit + 1} tokens .* the {limit} positions .*n\.window_length={limit}"):
        check_positions(config, limit + 1, "evaluation")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon", "gemma3"])
def test_windows_past_rotary_positions_are_warned_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model(name)
    limit = config.get_text_config().max_position_embeddings
    with caplog.at_level(logging.WARNING):
        check_positions(config, limit, "calibration")
        assert not caplog.text
        check_positions(config, limit + 1, "calibration")
    assert f"windows of {limit + 1} tokens are longer than the {limit} positions" in caplog.text


@pytest.mark.parametrize("name", ["bloom", "mamba2"])
def test_models_without_a_limit_take_any_window(name: str) -> None:
    check_positions(AutoConfig.for_model(name), 10**9, "calibration")


@pytest.mark.parametrize("tokens", [torch.tensor([[3, 101]]), torch.tensor([[-1, 5]])])
def test_tokens_without_an_embedding_are_refused_before_they_reach_a_gpu(tokens: Tensor) -> None:
    model = family("bloom")
    with pytest.raises(ValueError, match=r"token ids -?\d+ to \d+, but the model's embeddings are 0 to 100"):
        quantize(model, tokens)


@pytest.mark.parametrize("tokens", [torch.zeros(4), torch.zeros(2, 4), torch.zeros(0, 4, dtype=torch.long)])
def test_what_is_no_batch_of_token_ids_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"calibration: expected token ids \(B, M\)"):
        check_windows(Row(each()), [tokens], "calibration")


def test_every_batch_is_checked_before_the_first_runs(generator: torch.Generator) -> None:
    model, ran = Row(each()), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    model.get_input_embeddings = lambda: model.embed
    options: dict[str, Any] = {"format": wush.MXFP8, "transform": wush.Hadamard(), "algorithm": wush.Rtn()}
    with pytest.raises(ValueError, match="token ids 99 to 99"):
        wush.quantize(model, [ids(generator), torch.full((1, 4), 99)], **options)
    assert not ran


@pytest.mark.parametrize("length", [33, 100])
def test_windows_past_learned_positions_are_refused_wherever_they_are_run(length: int) -> None:
    config = AutoConfig.for_model("opt", **TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64})
    config.max_position_embeddings = 32
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = torch.full((2, length), 5)
    windows[1, 20:] = PAD
    states = torch.zeros(2, length, 64)
    for run in (
        lambda: quantize(model, windows[:1]),
        lambda: wush.original_states(model, windows),
        lambda: wush.evaluate(model, windows, states),
    ):
        with pytest.raises(ValueError, match=rf"windows of {length} tokens are longer than the 32 positions"):
            run()


def test_padding_of_shorter_windows_is_no_token(generator: torch.Generator) -> None:
    model = family("bloom")
    windows = torch.randint(1, 101, (3, 24), generator=generator)
    windows[1, 10:] = PAD
    assert wush.evaluate(model, windows, wush.original_states(model, windows)).kl == pytest.approx(0, abs=1e-6)


def test_long_windows_are_warned_of_once_for_all_batches(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY | {"max_position_embeddings": 16}))
    quantize(model.eval(), torch.randint(1, 101, (4, 24), generator=generator))
    assert caplog.text.count("windows of 24 tokens are longer than the 16 positions") == 1
