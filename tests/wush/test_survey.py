"""What of a model is quantized: plain linears, once each; all else stays, is reported, and counts as 16 bits."""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import wush
from wush.models import load_random
from wush.plain import why_no_plain_linear


def tiny() -> nn.Module:
    return load_random("llama", 64, 128, 3, 4, 2, 0, "float32", "cpu").model


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (4, 16), generator=generator)


def quantize(model: nn.Module, ids: Tensor, **options: Any) -> wush.QuantizationReport:
    report = wush.QuantizationReport()
    chosen = {"format": wush.MXFP4, "transform": wush.Hadamard(), "algorithm": wush.Rtn(), "report": report} | options
    wush.quantize(model, ids.split(2), **chosen)
    return report


class Scaling(nn.Linear):
    """A linear whose forward does something else as well."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Calling(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class SameForward(nn.Linear):
    """A subclass in name only, as torch's `NonDynamicallyQuantizableLinear`."""


def _of(kind: type[nn.Linear]) -> Callable[[nn.Linear], nn.Module]:
    def replaced(linear: nn.Linear) -> nn.Module:
        other = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
        other.load_state_dict(linear.state_dict())
        return other

    return replaced


def _with_own_forward(linear: nn.Linear) -> nn.Module:
    original = linear.forward
    linear.forward = lambda x: 2 * original(x)
    return linear


def _with_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda _, __, output: 2 * output)
    return linear


def _with_pre_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    return linear


def _weight_norm(linear: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear)


def _old_weight_norm(linear: nn.Linear) -> nn.Module:
    return nn.utils.weight_norm(linear)


def _with_buffer(linear: nn.Linear) -> nn.Module:
    linear.register_buffer("offset", torch.zeros(3))
    return linear


NOT_PLAIN: dict[Callable[[nn.Linear], nn.Module], str] = {
    _of(Scaling): "Scaling is an nn.Linear with a forward of its own",
    _of(Calling): "Calling is an nn.Linear with a forward of its own",
    _with_own_forward: "its forward has been replaced",
    _with_hook: "a hook runs with its forward",
    _with_pre_hook: "a hook runs with its forward",
    _weight_norm: "its weight is parametrized",
    _old_weight_norm: "a hook runs with its forward",
    _with_buffer: "it holds offset besides its weight and bias",
}


@pytest.mark.parametrize("pre", [True, False])
def test_hooks_of_every_module_are_of_linears_too(pre: bool, generator: torch.Generator) -> None:
    """They run with an `nn.Linear`, and would not know a quantized layer for one."""
    register = (
        nn.modules.module.register_module_forward_pre_hook if pre else nn.modules.module.register_module_forward_hook
    )
    handle = register(lambda *_: None)
    try:
        with pytest.raises(wush.UnsupportedModelError, match=r"no plain nn\.Linear"):
            quantize(tiny(), tokens(generator))
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", NOT_PLAIN)
def test_a_linear_that_does_something_else_stays_and_is_reported(
    change: Callable[[nn.Linear], nn.Module], generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny(), tokens(generator)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = kept = change(mlp.up_proj)
    exact = model(input_ids=ids).logits
    report = quantize(model, ids, format=wush.MXFP8)
    assert model.model.layers[1].mlp.up_proj is kept
    assert report.skipped == {"model.layers.1.mlp.up_proj": NOT_PLAIN[change]}
    assert f"model.layers.1.mlp.up_proj: not quantized, {NOT_PLAIN[change]}" in caplog.text
    assert [len(block.layers) for block in report.blocks] == [7, 6, 7]
    assert ((model(input_ids=ids).logits - exact).norm() / exact.norm()) < 0.3


def test_a_subclass_in_name_only_is_quantized(generator: torch.Generator) -> None:
    model = tiny()
    model.model.layers[0].mlp.up_proj = _of(SameForward)(model.model.layers[0].mlp.up_proj)
    assert not quantize(model, tokens(generator)).skipped


def test_hooks_by_which_transformers_hands_outputs_out_are_no_reason(generator: torch.Generator) -> None:
    from transformers.utils.output_capturing import install_output_capuring_hook

    linear = nn.Linear(32, 32)
    install_output_capuring_hook(linear, "router_logits", 0)
    assert not why_no_plain_linear(linear)


def test_an_exclusion_is_named_before_another_reason(generator: torch.Generator) -> None:
    model = tiny()
    _with_hook(model.model.layers[1].mlp.up_proj)
    report = quantize(model, tokens(generator), exclude=["*.up_proj"])
    assert set(report.skipped.values()) == {"excluded by '*.up_proj'"}


def test_a_model_without_plain_linears_is_refused(generator: torch.Generator) -> None:
    model = tiny()
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                _with_hook(module)
    with pytest.raises(wush.UnsupportedModelError, match=r"no plain nn\.Linear: nothing to quantize"):
        quantize(model, tokens(generator))


def _shared_mlp(model: nn.Module) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


def _shared_linear(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj = model.model.layers[0].mlp.down_proj


def _two_names(model: nn.Module) -> None:
    model.model.layers[0].down = model.model.layers[0].mlp.down_proj


def _one_block_twice(model: nn.Module) -> None:
    model.model.layers[1] = model.model.layers[0]


SHARED = {
    _shared_mlp: r"model\.layers\.0\.mlp and model\.layers\.2\.mlp",
    _shared_linear: r"model\.layers\.0\.mlp\.down_proj and model\.layers\.2\.mlp\.down_proj",
    _two_names: r"model\.layers\.0\.down and model\.layers\.0\.mlp\.down_proj",
    _one_block_twice: "decoder block 0 and decoder block 1",
}


@pytest.mark.parametrize("blocks", [None, [0]])
@pytest.mark.parametrize("share", SHARED)
def test_a_linear_that_is_part_of_a_model_twice_is_refused(
    share: Callable[[nn.Module], None], blocks: list[int] | None, generator: torch.Generator
) -> None:
    model = tiny()
    share(model)
    with pytest.raises(wush.UnsupportedModelError, match=rf"more than once \({SHARED[share]}\).*exclude"):
        quantize(model, tokens(generator), blocks=blocks)
    assert not any(isinstance(module, wush.QuantLinear) for module in model.modules())


def test_shared_modules_may_be_left_out_and_count_once(generator: torch.Generator) -> None:
    model, ids = tiny(), tokens(generator)
    _shared_mlp(model)
    report = quantize(model, ids, exclude=["*.mlp.*"])
    assert [len(block.layers) for block in report.blocks] == [4, 4, 4]
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128
    assert report.quantized_share == pytest.approx(3 * attention / (3 * attention + 2 * mlp))


def test_linears_with_one_weight_are_refused(generator: torch.Generator) -> None:
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    with pytest.raises(wush.UnsupportedModelError, match=r"1\.mlp\.gate_proj and .*1\.mlp\.up_proj have one weight"):
        quantize(model, tokens(generator))


def test_linears_outside_of_the_decoder_blocks_are_reported(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    model.model.projector = nn.Linear(64, 64)
    report = quantize(model, tokens(generator))
    assert report.skipped == {"model.projector": "outside of the decoder blocks"}
    assert "1 linears outside of the decoder blocks stay as they are: model.projector" in caplog.text


def test_float64_weights_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"down_proj: the weight is torch\.float64; load the model in float32"):
        quantize(tiny().double(), tokens(generator))


MLP, ATTENTION = 3 * 64 * 128, 64 * (64 + 32 + 32 + 64)


def test_bits_are_those_of_all_weights(generator: torch.Generator) -> None:
    report = quantize(tiny(), tokens(generator))
    assert report.weights == 3 * (MLP + ATTENTION)
    assert report.bits_per_weight == pytest.approx(4.25)
    assert report.quantized_share == 1


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"exclude": ["*.mlp.*"]}, 3 * ATTENTION),
        ({"exclude": ["*.self_attn.*"]}, 3 * MLP),
        ({"blocks": [1]}, MLP + ATTENTION),
        ({"blocks": [0, 2], "exclude": ["*.down_proj"]}, 2 * (MLP * 2 // 3 + ATTENTION)),
    ],
)
@pytest.mark.parametrize("transform", [wush.Hadamard(), wush.Wush(share=True), wush.Wush()], ids=repr)
def test_what_is_left_whole_counts_as_16_bits(
    options: dict[str, Any], quantized: int, transform: wush.Wush, generator: torch.Generator
) -> None:
    report = quantize(tiny(), tokens(generator), transform=transform, **options)
    total = 3 * (MLP + ATTENTION)
    stored = sum(layer.bits_per_weight * layer.weights for block in report.blocks for layer in block.layers)
    assert report.quantized_share == pytest.approx(quantized / total)
    assert report.bits_per_weight == pytest.approx((stored + 16 * (total - quantized)) / total)


def test_leaving_more_out_never_lowers_the_bits(generator: torch.Generator) -> None:
    ids = tokens(generator)
    patterns = [[], ["*.down_proj"], ["*.mlp.*"], ["*.mlp.*", "*.o_proj"]]
    bits = [quantize(tiny(), ids, transform=wush.Hadamard(), exclude=exclude).bits_per_weight for exclude in patterns]
    assert all(fewer < more for fewer, more in itertools.pairwise(bits))


def test_experts_that_are_no_linears_count_as_whole(generator: torch.Generator) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **more)).eval()
    report = quantize(model, tokens(generator))
    experts, router = 2 * MLP, 2 * 64
    assert report.weights == 2 * (ATTENTION + experts + router)
    assert report.quantized_share == pytest.approx(ATTENTION / (ATTENTION + experts + router))


def test_a_restored_walk_counts_the_same(generator: torch.Generator) -> None:
    from tests.wush.test_walk import Kept

    ids, kept = tokens(generator), Kept()
    first, again = (quantize(tiny(), ids, saved=kept, exclude=["*.o_proj"]) for _ in range(2))
    assert first.bits_per_weight == again.bits_per_weight
    assert first.quantized_share == again.quantized_share


@pytest.fixture
def quantized(generator: torch.Generator) -> nn.Module:
    model = tiny()
    # INT4: plain pickles, unlike torch.save, know no scales of eight bits.
    quantize(model, tokens(generator), blocks=[0], format=wush.INT4)
    return model


def _pickled(model: nn.Module, folder: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES: list[Callable[[nn.Module, Path], nn.Module]] = [
    lambda model, _: model,
    lambda model, _: copy.deepcopy(model),
    lambda model, _: copy.copy(model),
    lambda model, _: model.to(torch.bfloat16),
    _pickled,
    _saved,
]


@pytest.mark.parametrize("copied", COPIES)
def test_a_quantized_model_and_its_copies_refuse_to_be_saved_as_another(
    copied: Callable[[nn.Module, Path], nn.Module], quantized: nn.Module, tmp_path: Path
) -> None:
    model = copied(quantized, tmp_path)
    with pytest.raises(wush.UnsupportedModelError, match=r"quantized by wush.*torch\.save"):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(wush.UnsupportedModelError, match="quantized by wush"):
        model.model.save_pretrained(tmp_path / "b", state_dict=model.model.state_dict())
    with pytest.raises(wush.UnsupportedModelError, match="quantized by wush"):
        model.push_to_hub("nobody/nothing")
    assert not list(tmp_path.glob("[ab]"))


def test_what_torch_saves_computes_the_same(quantized: nn.Module, tmp_path: Path, generator: torch.Generator) -> None:
    ids = tokens(generator)
    again = _saved(quantized, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, quantized(input_ids=ids).logits)


def test_a_quantized_models_tensors_do_not_load_into_an_original(quantized: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*layers\.0\.self_attn\.q_proj\.weight"):
        tiny().load_state_dict(quantized.state_dict())


def test_an_original_that_was_refused_can_still_be_saved(tmp_path: Path, generator: torch.Generator) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="matches no linear"):
        quantize(model, tokens(generator), exclude=["nothing"])
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
