"""The walk through whole models: any architecture, grouped inputs, exact errors, refused models."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import wush
from wush.decoder import find_blocks, linear_inputs, record_calls, run_block
from wush.models import load_random

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt_neox": {},
    "phi3": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "olmo2": {},
}


def tiny(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | ARCHITECTURES[architecture])
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(generator: torch.Generator, windows: int = 6, length: int = 24) -> Tensor:
    return torch.randint(1, 101, (windows, length), generator=generator)


def quantize(
    model: nn.Module, ids: Tensor, fmt: wush.Format = wush.MXFP8, **options: object
) -> wush.QuantizationReport:
    options = {"transform": wush.Hadamard(), "algorithm": wush.Rtn()} | options
    report = wush.QuantizationReport()
    assert wush.quantize(model, ids.split(2), format=fmt, report=report, **options) is model  # type: ignore[arg-type]
    return report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_is_quantized_whole_and_stays_close(architecture: str, generator: torch.Generator) -> None:
    model, ids = tiny(architecture), tokens(generator)
    states = wush.original_states(model, ids)
    blocks = find_blocks(model)[1]
    expected = sum(isinstance(m, nn.Linear) for m in blocks.modules())
    report = quantize(model, ids)
    assert len(report.blocks) == 3
    assert (
        sum(isinstance(m, wush.QuantLinear) for m in blocks.modules())
        == expected
        == sum(len(b.layers) for b in report.blocks)
    )
    assert not any(isinstance(m, nn.Linear) for m in blocks.modules())
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert 0 < wush.evaluate(model, ids, states).kl < 0.15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_run_alone_reproduce_the_models_own_forward(architecture: str, generator: torch.Generator) -> None:
    model, ids = tiny(architecture), tokens(generator, 2)
    _, blocks = find_blocks(model)
    last: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    calls = record_calls(model, blocks, ids)
    hidden = calls.hidden
    with torch.no_grad():
        for block, arguments in zip(blocks, calls.arguments, strict=True):
            hidden = run_block(block, hidden, arguments)
    assert torch.equal(hidden, last[0])


def test_recording_leaves_the_blocks_as_they_were(generator: torch.Generator) -> None:
    model, ids = tiny("llama"), tokens(generator, 2)
    before = model(input_ids=ids).logits
    blocks = find_blocks(model)[1]
    record_calls(model, blocks, ids)
    assert all("forward" not in block.__dict__ for block in blocks)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_linears_fed_by_one_tensor_share_their_moment(generator: torch.Generator) -> None:
    report = quantize(tiny("llama"), tokens(generator))
    groups = {layer.shared_input for layer in report.blocks[0].layers}
    assert groups == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }


GROUPS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]


@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
def test_linears_fed_by_one_tensor_can_share_their_transform(algorithm: wush.Gptq, generator: torch.Generator) -> None:
    model, ids = tiny("llama"), tokens(generator)
    quantize(model, ids, wush.MXFP4, transform=wush.Wush(share=True), algorithm=algorithm)
    for names in GROUPS:
        first, *others = (model.model.layers[1].get_submodule(name).transform for name in names)
        assert first.ndim == 3
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("transform", [wush.Wush(share=True), wush.Hadamard(), wush.Identity()], ids=repr)
def test_linears_with_one_transform_and_input_run_as_one(transform: wush.Wush, generator: torch.Generator) -> None:
    model, ids = tiny("llama"), tokens(generator)
    quantize(model, ids, wush.MXFP4, transform=transform)
    layer = model.model.layers[2]
    for names in GROUPS:
        assert len({id(layer.get_submodule(name).joint) for name in names}) == 1
        assert layer.get_submodule(names[0]).joint is not None
    assert layer.self_attn.o_proj.joint is None


def test_linears_with_transforms_of_their_own_run_apart(generator: torch.Generator) -> None:
    model = tiny("llama")
    quantize(model, tokens(generator), wush.MXFP4, transform=wush.Wush())
    assert all(module.joint is None for module in model.modules() if isinstance(module, wush.QuantLinear))


def test_a_shared_transform_is_counted_once(generator: torch.Generator) -> None:
    own, shared = (
        quantize(tiny("llama"), tokens(generator), wush.MXFP4, transform=wush.Wush(share=share)).blocks[0].layers
        for share in (False, True)
    )
    # Of 64 inputs: two blocks of 32 x 32 float32, over 64 q, 32 k and 32 v rows, each for itself or for all.
    transform = 2 * 32 * 32 * 32
    for layers, expected in (
        (own, [transform / (rows * 64) for rows in (64, 32, 32)]),
        (shared, [transform / 8192] * 3),
    ):
        found = {layer.name: layer.bits_per_weight - 4.25 for layer in layers}
        assert [found[name] for name in GROUPS[0]] == expected


class Kept:
    """Keeps blocks in memory, as they would be read from a file."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[wush.BlockReport, dict[str, Tensor]]] = {}

    def load(self, index: int) -> tuple[wush.BlockReport, dict[str, Tensor]] | None:
        return self.blocks.get(index)

    def save(self, report: wush.BlockReport, tensors: dict[str, Tensor]) -> None:
        self.blocks[report.index] = report, tensors


@pytest.mark.parametrize("transform", [wush.Wush(share=True), wush.Wush(), wush.Hadamard()], ids=repr)
def test_restored_blocks_are_joined_as_new_ones_and_compute_the_same(
    transform: wush.Wush, generator: torch.Generator
) -> None:
    ids, kept, models = tokens(generator), Kept(), (tiny("llama"), tiny("llama"))
    for model in models:
        quantize(model, ids, wush.MXFP4, transform=transform, saved=kept)
    layers = [model.model.layers[1].mlp.up_proj for model in models]
    assert (layers[0].joint is None) == (layers[1].joint is None) == (not transform.share)
    assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)


def test_saved_tensors_share_no_memory(generator: torch.Generator) -> None:
    kept = Kept()
    quantize(tiny("llama"), tokens(generator), wush.MXFP4, transform=wush.Wush(share=True), saved=kept)
    tensors = list(kept.blocks[0][1].values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_each_layer_is_calibrated_on_its_own_inputs_after_the_quantized_blocks(generator: torch.Generator) -> None:
    ids, model = tokens(generator, 2), tiny("llama")
    reference = copy.deepcopy(model)
    quantize(model, ids, wush.MXFP4, transform=wush.Wush())
    # By hand: quantized blocks 0 and 1 in front of the original block 2.
    for index in (0, 1):
        reference.model.layers[index] = model.model.layers[index]
    with torch.no_grad(), linear_inputs(reference.model.layers[2], ["mlp.down_proj"]) as seen:
        reference(input_ids=ids, use_cache=False)
    moment = wush.SecondMoment(128)
    moment.add(seen["mlp.down_proj"][0])
    linear = reference.model.layers[2].mlp.down_proj
    expected = wush.Rtn().quantize_weight(linear.weight.detach(), moment, wush.Wush(), wush.MXFP4)
    assert torch.equal(model.model.layers[2].mlp.down_proj.transform, expected.transform)


def test_block_errors_are_those_of_the_outputs(generator: torch.Generator) -> None:
    ids, model = tokens(generator), tiny("llama")
    original = copy.deepcopy(model.model.layers[0])
    calls = record_calls(model, model.model.layers, ids)
    report = quantize(model, ids, wush.MXFP4)
    with torch.no_grad():
        exact = run_block(original, calls.hidden, calls.arguments[0]).double()
        ours = run_block(model.model.layers[0], calls.hidden, calls.arguments[0]).double()
    assert report.blocks[0].mse == pytest.approx((ours - exact).square().mean().item(), rel=1e-6)
    expected = ((ours - exact).square().sum() / exact.square().sum()).item()
    assert report.blocks[0].relative_mse == pytest.approx(expected, rel=1e-6)


def test_the_result_does_not_depend_on_how_windows_are_batched(generator: torch.Generator) -> None:
    ids = tokens(generator)
    one, three = tiny("llama"), tiny("llama")
    options = {"format": wush.MXFP4, "transform": wush.Wush(), "algorithm": wush.Gptq()}
    wush.quantize(one, ids.split(1), **options)  # type: ignore[arg-type]
    wush.quantize(three, ids.split(3), **options)  # type: ignore[arg-type]
    states = wush.original_states(tiny("llama"), ids)
    assert wush.evaluate(one, ids, states).kl == pytest.approx(wush.evaluate(three, ids, states).kl, rel=0.02)


def test_excluded_linears_stay_and_are_named(generator: torch.Generator) -> None:
    model = tiny("llama")
    report = quantize(model, tokens(generator), exclude=["*.down_proj", "model.layers.0.self_attn.*"])
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert isinstance(model.model.layers[1].self_attn.q_proj, wush.QuantLinear)
    assert len(report.skipped) == 3 + 4
    assert report.skipped["model.layers.2.mlp.down_proj"] == "excluded by '*.down_proj'"


def test_a_pattern_that_excludes_nothing_is_an_error_that_shows_names(generator: torch.Generator) -> None:
    with pytest.raises(
        ValueError, match=r"exclude=\['down_proj'\] matches no linear.*model\.layers\.0\.mlp\.down_proj"
    ):
        quantize(tiny("llama"), tokens(generator), exclude=["down_proj", "*.up_proj"])


def test_patterns_may_overlap(generator: torch.Generator) -> None:
    report = quantize(tiny("llama"), tokens(generator), exclude=["*.mlp.*", "*.down_proj"])
    assert len(report.skipped) == 3 * 3


def test_a_block_can_be_excluded_whole(generator: torch.Generator) -> None:
    report = quantize(tiny("llama"), tokens(generator), exclude=["model.layers.1.*"])
    assert [len(block.layers) for block in report.blocks] == [7, 0, 7]
    assert report.blocks[1].mse == 0


def test_weights_that_are_no_linears_are_named_as_left_out(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    config = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    report = quantize(model, tokens(generator))
    left = [name for name in report.skipped if "experts" in name]
    assert len(left) == 3 * 2
    assert "is no nn.Linear" in caplog.text


class Alternating(nn.Module):
    """Two linears, of which short and long batches run one each."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + (self.long if hidden_states.shape[1] > 8 else self.short)(hidden_states)


class AlternatingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.stages = nn.Embedding(50, 32), nn.ModuleList([Alternating()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.stages[0](self.embed(input_ids))


def test_a_linear_that_only_a_later_batch_runs_is_quantized(generator: torch.Generator) -> None:
    model, ids = AlternatingModel(), torch.randint(0, 50, (2, 16), generator=generator)
    options = {"format": wush.MXFP4, "transform": wush.Wush(), "algorithm": wush.Gptq()}
    report = wush.QuantizationReport()
    wush.quantize(model, [ids[:, :8], ids], report=report, **options)  # type: ignore[arg-type]
    assert {layer.name for layer in report.blocks[0].layers} == {"short", "long"}
    assert not report.skipped


def test_biases_are_kept(generator: torch.Generator) -> None:
    model = tiny("gpt_neox")
    bias = model.gpt_neox.layers[0].mlp.dense_h_to_4h.bias.detach().clone().uniform_(-1, 1)
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.bias.data.copy_(bias)
    quantize(model, tokens(generator))
    assert torch.equal(model.gpt_neox.layers[0].mlp.dense_h_to_4h.bias, bias)


def test_every_layer_that_does_not_fit_the_format_is_listed_before_any_work(generator: torch.Generator) -> None:
    model = load_random("llama", 48, 80, 2, 4, 2, 0, "float32", "cpu").model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not a multiple of the group size 32") as raised:
        quantize(model, tokens(generator))
    assert len(str(raised.value).splitlines()) == 2 * 7
    assert "model.layers.1.mlp.down_proj: in_features 80" in str(raised.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_non_finite_weight_is_refused_by_name(generator: torch.Generator) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(wush.NumericError, match=r"model\.layers\.1\.mlp\.up_proj: NaN or infinity in the weight"):
        quantize(model, tokens(generator))


def test_a_non_finite_activation_is_refused_by_name(generator: torch.Generator) -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.weight.data[5] = torch.nan
    with pytest.raises(wush.NumericError, match=r"model\.layers\.1\.self_attn\.q_proj: NaN or infinity"):
        quantize(model, tokens(generator))


def test_a_model_without_decoder_blocks_is_refused() -> None:
    with pytest.raises(wush.UnsupportedModelError, match="Sequential has no decoder blocks"):
        wush.quantize(
            nn.Sequential(nn.Linear(32, 32)),
            [torch.zeros(1, 4, dtype=torch.long)],
            format=wush.MXFP4,
            transform=wush.Identity(),
            algorithm=wush.Rtn(),
        )


def test_a_quantized_model_is_not_quantized_again(generator: torch.Generator) -> None:
    model = tiny("llama")
    quantize(model, tokens(generator))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, tokens(generator))


def test_no_batches_and_nothing_to_quantize_are_errors(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="no calibration batches"):
        wush.quantize(tiny("llama"), [], format=wush.MXFP4, transform=wush.Identity(), algorithm=wush.Rtn())
    with pytest.raises(wush.UnsupportedModelError, match="every linear is excluded"):
        quantize(tiny("llama"), tokens(generator), exclude=["*"])


class OddBlock(nn.Module):
    """A block with names of its own that returns a tuple and leaves one of its linears unused."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(32, 32)
        self.spare = nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor, scale: float) -> tuple[Tensor]:
        return (hidden_states + scale * self.mixer(hidden_states),)


class OddModel(nn.Module):
    """A model that calls its blocks by keyword, each with an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.stages = nn.ModuleList(OddBlock() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed(input_ids)
        for index, stage in enumerate(self.stages):
            (hidden,) = stage(hidden_states=hidden, scale=index + 1.0)
        return hidden


class Experts(nn.Module):
    """A linear for positive tokens and one for the others, and one that is called with no token at all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(size, size, bias=False) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        expert_of = (tokens[:, 0] <= 0).long()
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            output[expert_of == number] = expert(tokens[expert_of == number])
        return output.view(x.shape)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.Nvfp4("calibrated")])
@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()])
def test_an_expert_that_is_called_without_tokens_stays_as_it_is(
    fmt: wush.Format, algorithm: wush.Rtn | wush.Gptq, generator: torch.Generator
) -> None:
    model, ids = tiny("llama"), tokens(generator)
    for block in model.model.layers:
        block.mlp = Experts(model.config.hidden_size)
    report = quantize(model, ids, fmt, transform=wush.Wush(), algorithm=algorithm)
    assert report.skipped["model.layers.0.mlp.experts.2"] == "no calibration token reaches it"
    names = {layer.name for block in report.blocks for layer in block.layers}
    assert {"mlp.experts.0", "mlp.experts.1"} <= names
    assert "mlp.experts.2" not in names
    assert model(ids).logits.isfinite().all()


def test_blocks_with_tuples_keywords_and_own_arguments_are_walked(generator: torch.Generator) -> None:
    model = OddModel()
    ids = torch.randint(0, 50, (4, 8), generator=generator)
    exact = model(ids, False)
    report = quantize(model, ids)
    assert [set(b.layers[0].shared_input) for b in report.blocks] == [{"mixer"}] * 3
    assert report.skipped["stages.2.spare"] == "no calibration token reaches it"
    assert ((model(ids, False) - exact).norm() / exact.norm()) < 0.1
