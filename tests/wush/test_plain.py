"""Only plain models in memory are originals: what is offloaded, adapted, packed or scaled is refused in words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wush
from wush.models import load_random
from wush.plain import check_plain


def tiny() -> nn.Module:
    return load_random("llama", 64, 128, 2, 4, 2, 0, "float32", "cpu").model


def refused(model: nn.Module, told: str) -> None:
    """Both before anything runs: the model's forward is never called."""
    model.forward = _never
    ids = torch.zeros(1, 8, dtype=torch.long)
    options: dict[str, Any] = {"format": wush.MXFP4, "transform": wush.Hadamard(), "algorithm": wush.Rtn()}
    with pytest.raises(wush.UnsupportedModelError, match=told):
        wush.quantize(model, [ids], **options)


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("the model ran")


def _offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _spread(model: nn.Module) -> nn.Module:
    """As `device_map` leaves a model that is spread over devices: hooks, and no weight elsewhere."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for block in model.model.layers:
        add_hook_to_module(block, AlignDevicesHook("cpu", io_same_device=True))
    return model


def _one_on_meta(model: nn.Module) -> nn.Module:
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    return model


def _all_on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize("place", [_offloaded, _spread])
def test_a_model_that_accelerate_runs_is_refused(place: Callable[[nn.Module], nn.Module]) -> None:
    refused(place(tiny()), "LlamaForCausalLM: .* offloaded or spread over devices.*without device_map")


@pytest.mark.parametrize("place", [_one_on_meta, _all_on_meta])
def test_weights_on_the_meta_device_are_refused_by_name(place: Callable[[nn.Module], nn.Module]) -> None:
    refused(place(tiny()), r"LlamaForCausalLM: model\.\S+ holds weight on the meta device")


def _scaled(linear: nn.Linear) -> nn.Module:
    """FP8 weights that were cast, with their scales beside them."""
    linear.weight_scale = nn.Parameter(torch.ones(()), requires_grad=False)
    return linear


def _fp8(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def _int8(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


class Gptq(nn.Module):
    """A packed layer as GPTQ and AWQ checkpoints make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(linear.in_features // 32, linear.out_features))


def _compressed(linear: nn.Linear) -> nn.Module:
    linear.quantization_scheme = object()
    return linear


def _dynamic(linear: nn.Linear) -> nn.Module:
    return torch.ao.nn.quantized.dynamic.Linear(linear.in_features, linear.out_features)


class Wrapped(Tensor):
    """A tensor as torchao and quanto make them: a float by its dtype, something else inside."""


def _subclass(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), requires_grad=False)
    return linear


class Distributed(Tensor):
    """A tensor of which each process holds a part."""


Distributed.__module__ = "torch.distributed.tensor"


def test_weights_that_are_spread_over_processes_are_refused() -> None:
    model = tiny()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Distributed), requires_grad=False)
    refused(model, r"model\.layers\.1\.mlp\.up_proj holds weight as Distributed, spread over processes")


PACKED: dict[Callable[[nn.Linear], nn.Module], str] = {
    _scaled: "holds weight_scale",
    _fp8: r"holds weight as torch\.float8_e4m3fn",
    _int8: r"holds weight as torch\.int8",
    Gptq: "holds qweight",
    _compressed: "has a quantization_scheme",
    _dynamic: r"is a torch\.ao\.nn\.quantized\.dynamic",
    _subclass: "holds weight as Wrapped",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("pack", PACKED)
def test_a_model_with_packed_or_scaled_weights_is_quantized_already(pack: Callable[[nn.Linear], nn.Module]) -> None:
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = pack(mlp.up_proj)
    refused(model, rf"is quantized already \(model\.layers\.1\.mlp\.up_proj {PACKED[pack]}")


@pytest.mark.parametrize("config", [{"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}])
def test_a_config_that_says_quantized_is_believed(config: dict[str, Any]) -> None:
    model = tiny()
    model.config.quantization_config = config
    refused(model, rf"quantized already \({config['quant_method']}\)")


def test_weights_that_were_read_dequantized_are_plain() -> None:
    from transformers import GgufConfig

    model = tiny()
    model.config.quantization_config = GgufConfig(dequantize=True)
    check_plain(model)
    model.config.quantization_config = GgufConfig()
    with pytest.raises(wush.UnsupportedModelError, match=r"quantized already \(gguf\)"):
        check_plain(model)


class Adapted(nn.Module):
    """A linear with an adapter, by PEFT's convention."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A, self.lora_B = nn.Linear(linear.in_features, 4), nn.Linear(4, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))


def test_a_model_with_adapters_is_refused_with_the_remedy() -> None:
    model = tiny()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    refused(model, r"layers\.0\.self_attn\.q_proj has an adapter; merge it .*merge_and_unload")


def test_plain_models_of_every_dtype_pass() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_plain(tiny().to(dtype))


@pytest.mark.parametrize("place", [_offloaded, _spread, _one_on_meta])
def test_the_original_of_a_comparison_is_plain(place: Callable[[nn.Module], nn.Module]) -> None:
    model = place(tiny())
    model.forward = _never
    with pytest.raises(wush.UnsupportedModelError, match=r"LlamaForCausalLM: .* (offloaded|meta)"):
        wush.original_states(model, torch.zeros(1, 8, dtype=torch.long))


def test_a_model_that_others_quantized_is_no_original() -> None:
    model = tiny()
    _scaled(model.model.layers[0].mlp.up_proj)
    with pytest.raises(wush.UnsupportedModelError, match="is quantized already"):
        wush.original_states(model, torch.zeros(1, 8, dtype=torch.long))
