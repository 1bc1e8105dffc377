"""The same trial gives the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import wush
from tests.experiments.conftest import Cli
from wush.models import load_random

TIMINGS = {"stages", "started_at", "finished_at"}


def state(algorithm: wush.Rtn | wush.Gptq) -> dict[str, torch.Tensor]:
    model = load_random("llama", 64, 128, 2, 4, 2, 0, "float32", "cpu").model
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    wush.quantize(model, ids.split(2), format=wush.NVFP4, transform=wush.Wush(), algorithm=algorithm)
    return model.state_dict()


@pytest.mark.parametrize("algorithm", [wush.Rtn(), wush.Gptq()], ids=lambda a: a.name)
def test_codes_scales_and_transforms_are_bit_identical(algorithm: wush.Rtn | wush.Gptq) -> None:
    first, second = state(algorithm), state(algorithm)
    assert any(key.endswith("packed_weight") for key in first)
    for key, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[key].view(torch.uint8)), key


def without_timings(path: Path) -> dict[str, Any]:
    record = {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMINGS}
    record["config"].pop("results")
    for block in record["blocks"]:
        block.pop("seconds")
    return record


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_records_are_bit_identical_timings_aside(algorithm: str, cli: Cli) -> None:
    for results in ("once", "again"):
        assert cli.small(f"results={results}", f"algorithm={algorithm}").returncode == 0
    (once,), (again,) = ((cli.folder / name).rglob("result.json") for name in ("once", "again"))
    assert without_timings(once) == without_timings(again)
