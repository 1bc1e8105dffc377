"""Committed records: which there are, how they are remade, and when a fresh one is no more the same."""

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import committed
from experiments.benchmarks import hours
from experiments.committed import SWEEPS, differences
from experiments.records import Record, Windows
from tests.experiments.conftest import ROOT
from tests.plots.conftest import answered, record
from wush.version import METHOD_VERSION

trials_of = functools.cache(hours.trials_of)
KLS = [0.1, 0.2, 0.3, 0.4]


def test_every_experiment_has_records_or_is_a_part_of_those_that_have() -> None:
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    ids = {name: {trial.trial_id for trial in trials_of(name, "small")} for name in experiments}
    kept = set().union(*(ids[name] for name in committed.EXPERIMENTS))
    for name in experiments:
        assert ids[name] <= kept, f"{name} has trials without a committed record; add it to EXPERIMENTS"


def test_the_main_job_is_that_of_make_sweep() -> None:
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "run.py -m" in line]
    assert " ".join(SWEEPS["main"]) in line


@pytest.mark.parametrize(
    ("kls", "alike"), [(KLS, True), ([kl + 0.01 for kl in KLS], True), ([kl + 1 for kl in KLS], False)]
)
def test_a_fresh_record_is_alike_within_the_committed_ones_interval(kls: Sequence[float], alike: bool) -> None:
    found = list(differences({"a": record(kls=KLS)}, {"a": record(kls=kls)}))
    assert (not found) == alike
    assert all(one.startswith("a: kl is 1.25 now, outside ") for one in found[:1])


def test_missing_and_stale_records_are_named() -> None:
    one = record(kls=KLS)
    assert list(differences({"old": one, "both": one}, {"both": one, "new": one})) == [
        "new: missing", "old: stale, of no trial that is run today",
    ]  # fmt: skip


@pytest.mark.parametrize("name", committed.EXPERIMENTS)
def test_committed_records_are_those_of_the_trials_that_are_run_today(name: str) -> None:
    kept = {path.stem for path in committed.folder_of(name).glob("*.json")}
    assert kept == {trial.trial_id for trial in trials_of(name, "small")}, f"run make records ARGS={name}"


def test_committed_records_are_of_this_version_of_the_method() -> None:
    paths = [*committed.PLOTS.glob("records/*/*.json"), *committed.PLOTS.glob("asides/*/*.json")]
    versions = {str(path): Record.model_validate_json(path.read_bytes()).method_version for path in paths}
    assert len(paths) > 100
    assert not [path for path, version in versions.items() if version != METHOD_VERSION]


def test_losses_are_compared_in_the_first_quantized_block() -> None:
    def losses(first: float, second: float) -> Record:
        return record(mse={3: first, 4: second})

    assert not list(differences({"a": losses(0.1, 0.1)}, {"a": losses(0.101, 0.2)}))
    found = list(differences({"a": losses(0.1, 0.1)}, {"a": losses(0.11, 0.1)}))
    assert found
    assert all(one.startswith("a: loss of ") for one in found)


def test_tasks_are_compared_by_their_documents() -> None:
    def with_task(right: int) -> Record:
        made = record()
        made.tasks["one"] = answered("one", [1.0] * right + [0.0] * (100 - right))
        return made

    assert not list(differences({"a": with_task(50)}, {"a": with_task(55)}))
    (found,) = differences({"a": with_task(50)}, {"a": with_task(80)})
    assert found.startswith("a: one, acc,none is 0.8 now, outside 0.40")


def test_the_original_model_is_compared_by_its_perplexity() -> None:
    def original(nll: float) -> Record:
        made = record("original", kl=0.0)
        made.windows = Windows(
            nll=[nll] * 3, nll_original=[nll] * 3, kl=[0.0] * 3, agree=[10] * 3, predictions=[10] * 3
        )
        return made

    assert not list(differences({"a": original(30)}, {"a": original(30)}))
    (found,) = differences({"a": original(30)}, {"a": original(40)})
    assert "perplexity" in found


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs that leave one record, `fresh`, and what was run."""
    state: dict[str, Any] = {"fresh": {"new": record(kls=KLS)}, "code": 0, "runs": []}

    def run(command: Sequence[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        state["runs"].append([str(one) for one in command])
        return subprocess.CompletedProcess(list(command), state["code"])

    def export(store: object, sweep: str, folder: Path) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        for trial_id, one in state["fresh"].items():
            (folder / f"{trial_id}.json").write_text(one.model_dump_json())
        return 0

    monkeypatch.setattr(committed, "PLOTS", tmp_path)
    monkeypatch.setattr(committed.subprocess, "run", run)
    monkeypatch.setattr(committed.commands, "export", export)
    monkeypatch.setattr(committed, "_fresh", lambda store, sweep: state["fresh"])
    return state


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_records_are_replaced_and_those_of_no_trial_removed(tmp_path: Path, made: dict[str, Any]) -> None:
    folder = tmp_path / "records" / "table4"
    folder.mkdir(parents=True)
    (folder / "old.json").write_text("{}")
    assert committed.main(["table4", "device=cpu", "--results", str(tmp_path / "results")]) == 0
    assert names(folder) == {"new.json"}
    (command,) = made["runs"]
    assert command[2:] == [
        *("-m", "experiment=table4", "scale=small", "sweep=records-table4"),
        *(f"results={tmp_path / 'results'}", "device=cpu"),
    ]  # fmt: skip


def test_checking_changes_nothing_and_says_what_differs(
    tmp_path: Path, made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "records" / "table4"
    folder.mkdir(parents=True)
    (folder / "old.json").write_text(record(kls=KLS).model_dump_json())
    (folder / "broken.json").write_text("{")
    arguments = ["table4", "--check", "--results", str(tmp_path / "results")]
    assert committed.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == "table4: new: missing\ntable4: old: stale, of no trial that is run today\n"
    assert "broken.json: holds no record" in said.err
    assert names(folder) == {"old.json", "broken.json"}
    (folder / "new.json").write_text(made["fresh"]["new"].model_dump_json())
    (folder / "old.json").unlink()
    assert committed.main(arguments) == 0
    assert capsys.readouterr().out == "table4: 1 records alike\n"


def test_a_sweep_that_is_not_done_is_not_copied(tmp_path: Path, made: dict[str, Any]) -> None:
    made["code"] = 1
    assert committed.main(["table4", "--results", str(tmp_path)]) == 1
    assert not (tmp_path / "records").exists()


def test_an_unknown_name_is_told_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert committed.main(["table3"]) == 2
    assert capsys.readouterr().err.startswith("no records of table3; choose from main, share")
