"""What makes a trial the same trial."""

import os
from pathlib import Path

import pytest

from experiments.identity import Identities, model_identity, trial_id
from tests.experiments.conftest import config
from wush.texts import EmbeddedText


@pytest.mark.parametrize(
    "override",
    [
        *("tracking=wandb", "device=auto", "progress=lines", "results=elsewhere", "sweep=mine", "keep_blocks=true"),
        *("kernels=torch", "keep_operands=false"),
        *("calibration.batch_size=1", "evaluation.batch_size=8"),
    ],
)
def test_how_and_where_a_trial_runs_is_no_part_of_its_id(override: str) -> None:
    assert trial_id(config(override)) == trial_id(config())


@pytest.mark.parametrize(
    "override",
    ["seed=1", "format=nvfp4", "transform=h", "algorithm=gptq", "evaluation.windows=3", "model.seed=1"],
)
def test_whatever_can_change_the_result_changes_the_id(override: str) -> None:
    assert trial_id(config(override)) != trial_id(config())


def test_refit_counts_only_where_something_is_refitted() -> None:
    rtn, gptq = (
        {trial_id(config(a, f"transform.refit={r}")) for r in ("true", "false")}
        for a in ("algorithm=rtn", "algorithm=gptq")
    )
    assert (len(rtn), len(gptq)) == (1, 2)


def test_the_top_seed_counts_only_where_another_key_takes_it() -> None:
    fixed = "calibration.seed=0"
    assert trial_id(config(fixed, "seed=1")) == trial_id(config(fixed, "seed=2"))
    assert trial_id(config(fixed, "transform=r", "seed=1")) != trial_id(config(fixed, "transform=r", "seed=2"))


def test_the_id_does_not_depend_on_the_order_of_keys() -> None:
    whole = config()
    assert trial_id(dict(reversed(whole.items()))) == trial_id(whole)


def test_baselines_differ_only_in_what_they_use() -> None:
    base = trial_id(config("format=original"))
    assert base == trial_id(
        config("format=original", "transform=h", "algorithm=gptq", "seed=3", "calibration.windows=9")
    )
    assert base != trial_id(config("format=original", "evaluation.windows=3"))


def test_a_text_counts_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    ids = []
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
        ids.append(trial_id(config("evaluation=text", f"evaluation.path={tmp_path / name}")))
    assert ids[0] == ids[1] != ids[2]


def test_a_local_model_counts_by_its_content_and_not_by_its_path_or_times(tmp_path: Path) -> None:
    ids = []
    for name, weights, time in (("a", b"12", 1), ("b", b"12", 2), ("c", b"34", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        os.utime(folder / "model.safetensors", ns=(time, time))
        (folder / "notes.md").write_text(name)
        (folder / "tokenizer.json").symlink_to("nowhere")
        ids.append(trial_id(config("model=local", f"model.path={folder}")))
    assert ids[0] == ids[1] != ids[2]


def test_a_models_files_are_read_once_while_they_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12")
    node = config("model=local", f"model.path={tmp_path}")["model"]
    before = model_identity(node)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert model_identity(node) == before


def test_configs_that_share_a_text_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    text = EmbeddedText.text
    monkeypatch.setattr(EmbeddedText, "text", lambda self: calls.append(self.part) or text(self))
    identities = Identities()
    configs = [config(f"seed={seed}", f"calibration.batch_size={1 + seed}") for seed in range(3)]
    parts = [identities.identity(one) for one in configs]
    assert sorted(calls) == ["calibration", "evaluation"]
    assert len({one["calibration"]["sha256"] for one in parts}) == 1
    assert [one["calibration"]["seed"] for one in parts] == [0, 1, 2]
