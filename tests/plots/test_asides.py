"""README's tables of free choices and machines, from made-up records."""

import json
from pathlib import Path
from typing import Any

import pytest

from plots import asides, records
from plots.style import Absent

COMMITTED = asides.FOLDER


def written(folder: Path, name: str, change: dict[str, Any], kl: float) -> None:
    """A committed record of a choice with another id, transform and KL."""
    source = json.loads(min((COMMITTED / "share").glob("*.json")).read_text())
    source["trial_id"] = name
    source["config"]["transform"] |= change
    source["metrics"]["kl"] = kl
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(source))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pairs of `share`, which costs 0.03, 0.05 and 0.04; and of `refit`, which costs nothing."""
    for signs, (without, shared) in enumerate([(0.30, 0.33), (0.31, 0.36), (0.32, 0.36)]):
        written(tmp_path / "share", f"a{signs}", {"signs": signs, "share": False}, without)
        written(tmp_path / "share", f"b{signs}", {"signs": signs, "share": True}, shared)
        for refit in (False, True):
            change = {"signs": signs, "share": False, "refit": refit}
            written(tmp_path / "refit", f"{refit}{signs}", change, 0.25 + signs / 100)
    monkeypatch.setattr(asides, "FOLDER", tmp_path)
    return tmp_path


def test_a_choice_is_the_mean_of_paired_differences_with_its_t_interval(folder: Path) -> None:
    share, refit = (line for line in asides.choices().splitlines() if line.startswith("| `"))
    margin = 4.303 * 0.01 / 3**0.5
    assert f"| +0.0400 ± {margin:.4f} |" in share
    assert "| 0.3100 (sd 0.0100) | 0.3500 (sd 0.0173) |" in share
    assert "| +0.0000 ± 0.0000 |" in refit


def test_a_trial_without_its_partner_is_no_pair(folder: Path) -> None:
    (folder / "share" / "b1.json").unlink()
    assert "| +0.0350 ±" in asides.choices()
    (folder / "share" / "b2.json").unlink()
    with pytest.raises(Absent, match="1 pairs of"):
        asides.choices()


def test_a_machine_that_has_not_run_a_trial_says_so(folder: Path) -> None:
    (folder / "share").rename(folder / "main_one")
    for path in (folder / "main_one").glob("b*.json"):
        target = folder / "main_two" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    written(folder / "main_one", "b0", {"signs": 0, "share": True}, 0.33)
    lines = asides.machines().splitlines()
    assert sum("not run" in line for line in lines) == 5


def test_what_is_not_there_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asides, "FOLDER", tmp_path)
    with pytest.raises(Absent, match="make records"):
        asides.choices()


def test_no_committed_record_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in (*COMMITTED.rglob("*.json"), *records.COMMITTED.rglob("*.json")):
        assert json.loads(path.read_text())["config"]["results"] == "results", path
