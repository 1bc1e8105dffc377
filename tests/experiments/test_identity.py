"""What makes a trial the same trial."""

import os
from pathlib import Path

import pytest

from experiments.identity import trial_id
from tests.experiments.conftest import config


@pytest.mark.parametrize(
    "override",
    ["tracking=wandb", "device=cpu", "progress=lines", "results=elsewhere", "sweep=mine"],
)
def test_how_and_where_a_trial_runs_is_no_part_of_its_id(override: str) -> None:
    assert trial_id(config(override)) == trial_id(config())


@pytest.mark.parametrize(
    "override",
    ["seed=1", "format=nvfp4", "transform.refit=false", "algorithm=gptq", "evaluation.windows=3", "model.seed=1"],
)
def test_whatever_can_change_the_result_changes_the_id(override: str) -> None:
    assert trial_id(config(override)) != trial_id(config())


def test_the_id_does_not_depend_on_the_order_of_keys() -> None:
    whole = config()
    assert trial_id(dict(reversed(whole.items()))) == trial_id(whole)


def test_baselines_differ_only_in_what_they_use() -> None:
    base = trial_id(config("format=bf16"))
    assert base == trial_id(config("format=bf16", "transform=h", "algorithm=gptq", "seed=3", "calibration.windows=9"))
    assert base != trial_id(config("format=bf16", "evaluation.windows=3"))


def test_a_text_counts_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    ids = []
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
        ids.append(trial_id(config("evaluation=text", f"evaluation.path={tmp_path / name}")))
    assert ids[0] == ids[1] != ids[2]


def test_a_local_model_counts_by_its_files(tmp_path: Path) -> None:
    ids = []
    for step in ("new", "again", "changed"):
        weights = tmp_path / "model.safetensors"
        if step == "new":
            weights.write_bytes(b"12")
        if step == "changed":
            weights.write_bytes(b"34")
            os.utime(weights, ns=(1, 1))
        ids.append(trial_id(config("model=local", f"model.path={tmp_path}")))
    assert ids[0] == ids[1] != ids[2]
