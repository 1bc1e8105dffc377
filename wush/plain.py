"""Whether a model is a plain one in memory, floating-point weights and nothing about them, and a linear a plain linear.

What others have quantized, offloaded or adapted is no original to compare with: it is refused in words.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from wush.errors import UnsupportedModelError

# Tensors that libraries keep beside, or instead of, a weight that they have quantized.
PACKED = {
    "qweight",
    "qzeros",
    "absmax",
    "quant_map",
    "SCB",
    "SCBt",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
}
PACKED_ENDINGS = ("_packed", "_scale_inv", "_weight_scale", "_zero_point", "proj_blocks", "proj_scales")
# What of these libraries modules carry without a tensor.
PACKED_ATTRIBUTES = ("quantization_scheme", "quant_state", "_packed_params")


def is_packed(name: str) -> bool:
    """Whether a tensor of this name belongs to a weight that was quantized."""
    last = name.rpartition(".")[2]
    return last in PACKED or last.endswith(PACKED_ENDINGS)


def check_plain(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, with the remedy, for a model whose weights are not plain tensors in memory."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        reason = _why_not_in_memory(module) or _why_adapted(module)
        if reason:
            raise UnsupportedModelError(f"{kind}: {name or 'the model'} {reason}")
    method = _quantization_of(model)
    reasons = [f"{name} {reason}" for name, module in model.named_modules() for reason in _why_packed(module)]
    if method or reasons:
        raise UnsupportedModelError(
            f"{kind} is quantized already ({method or reasons[0]}): its weights are not the original's; load the "
            "unquantized checkpoint"
        )


def why_no_plain_linear(linear: nn.Linear) -> str:
    """What a linear does besides `x W^T + b`, as the reason to leave it as it is; empty when it does nothing else."""
    kind = type(linear)
    if kind.forward is not nn.Linear.forward or kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__} is an nn.Linear with a forward of its own"
    if "forward" in vars(linear):
        return "its forward has been replaced"
    if parametrize.is_parametrized(linear):
        return "its weight is parametrized"
    if any(not _only_records(hook) for hooks in _hooks(linear) for hook in hooks.values()):
        return "a hook runs with its forward"
    more = sorted({*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"})
    return f"it holds {', '.join(more)} besides its weight and bias" if more else ""


def _hooks(module: nn.Module) -> Iterator[Mapping[int, object]]:
    yield module._forward_hooks
    yield module._forward_pre_hooks
    yield torch_module._global_forward_hooks  # of every module, and not of a QuantLinear as of an nn.Linear
    yield torch_module._global_forward_pre_hooks


def _only_records(hook: object) -> bool:
    """Whether a hook is transformers' own that hands outputs to a caller who asks, and changes none."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _why_not_in_memory(module: nn.Module) -> str:
    if hasattr(module, "_hf_hook"):
        return (
            "has a hook of accelerate: weights are offloaded or spread over devices; load the model whole on one "
            "device, without device_map"
        )
    for name, tensor in _tensors(module):
        if tensor.is_meta:
            return f"holds {name} on the meta device, offloaded or never loaded; load the model whole on one device"
        if type(tensor.data).__module__.startswith("torch.distributed"):
            return f"holds {name} as {_told(tensor)}, spread over processes; load the model whole on one device"
    return ""


def _why_adapted(module: nn.Module) -> str:
    # The convention of PEFT, which computes with more of the linear than its output.
    if isinstance(getattr(module, "base_layer", None), nn.Module) or getattr(module, "_hf_peft_config_loaded", False):
        return "has an adapter; merge it into the weights first (merge_and_unload)"
    return ""


def _quantization_of(model: nn.Module) -> str:
    """How the model's config says that it is quantized; empty for one that was read dequantized."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not config:
        return ""
    options = config if isinstance(config, dict) else vars(config)
    if options.get("dequantize"):
        return ""
    method = options.get("quant_method", "quantization_config")
    return str(getattr(method, "value", method))


def _why_packed(module: nn.Module) -> Iterator[str]:
    kind = type(module)
    if kind.__module__.startswith("torch.") and ".quantized." in f"{kind.__module__}.":
        yield f"is a {kind.__module__}.{kind.__name__}"
    yield from (f"has a {name}" for name in PACKED_ATTRIBUTES if getattr(module, name, None) is not None)
    own_forward = isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward
    for name, tensor in _tensors(module):
        if is_packed(name) and not (own_forward and tensor.is_floating_point()):
            yield f"holds {name}"
        elif isinstance(tensor, nn.Parameter) and _is_packed_tensor(tensor):
            yield f"holds {name} as {_told(tensor)}"


def _is_packed_tensor(tensor: Tensor) -> bool:
    """Whether a parameter is no tensor of torch's own, or has values of 8 bits or less."""
    one_byte = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
    return one_byte or type(tensor.data) is not Tensor


def _told(tensor: Tensor) -> str:
    return str(tensor.dtype) if type(tensor.data) is Tensor else type(tensor.data).__name__


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers."""
    for tensors in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
