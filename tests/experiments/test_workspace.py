"""The comparison as a W&B report: built without a network, of names that are logged, and saved by the real client."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from experiments.records import Metrics
from experiments.tracking import WandbTracking
from experiments.views.workspace import CHOICES, COLOURS, RunFilter, report, to_json
from tests.experiments.conftest import ROOT, config, environment
from tests.experiments.test_store import record
from tests.experiments.test_tracking import CHOICES as CHOSEN
from tests.experiments.test_tracking import KEY, a_block, history_of, runs, summary_of
from tests.experiments.wandb_server import Fault, serving

A = RunFilter("first", "sweep-a", trials=("a1", "a2"))
B = RunFilter("second", "sweep-b", {"format.scale_rule": "it's", "seed": 1})


def spec(a: RunFilter = A, b: RunFilter = B) -> dict[str, Any]:
    return json.loads(to_json(report("wush", "team", a, b)))


def grids(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in found["spec"]["blocks"] if block["type"] == "panel-grid"]


def panels(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for grid in grids(found) for panel in grid["panelBankSectionConfig"]["panels"]]


def strings(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from strings(child)
    elif isinstance(node, str):
        yield node


def filters(runset: dict[str, Any]) -> list[tuple[str, str, object]]:
    def leaves(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            yield from leaves(item["filters"]) if "filters" in item else [item]

    return [
        (leaf["key"]["section"], leaf["key"]["name"], leaf["value"]) for leaf in leaves(runset["filters"]["filters"])
    ]


def test_each_grid_has_a_run_set_for_each_side() -> None:
    for grid in grids(spec()):
        first, second = grid["runSets"]
        assert (first["name"], second["name"]) == ("first", "second")
        assert filters(first) == [("run", "group", ["sweep-a"]), ("run", "name", ["a1", "a2"])]
        assert filters(second) == [
            ("run", "group", ["sweep-b"]),
            ("config", "format.value.scale_rule", ["it's"]),
            ("config", "seed.value", [1]),
        ]


def test_trials_that_are_known_are_joined_by_or_and_have_the_colour_of_their_side() -> None:
    found = grids(spec(A, RunFilter("second", trials=("b1",))))[0]
    assert [item.get("connector") for item in found["runSets"][0]["filters"]["filters"]] == [None, "OR"]
    assert found["customRunColors"] == {"a1": COLOURS[0], "a2": COLOURS[0], "b1": COLOURS[1]}


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What tracking writes of a trial."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tracking = WandbTracking("wush", None, "offline")
    tracking.start("abc123", CHOSEN, config(), "sweep-a", tmp_path)
    tracking.block(a_block(0))
    tracking.measured([a_block(0)])
    tracking.finish(record("abc123"))
    wandb.teardown()  # writes what is not in the file yet
    (messages,) = runs(tmp_path)
    return messages


def test_every_name_in_the_panels_is_one_that_tracking_logs(logged: list[Any]) -> None:
    summary, history = set(summary_of(logged)), set().union(*history_of(logged))
    choices = {f"config:choices.value.{group}" for group in CHOSEN}
    for panel in panels(spec()):
        shown = panel["config"]
        if panel["viewType"] == "Bar Chart":
            assert set(shown["metrics"]) <= summary & set(Metrics.model_fields)
        elif panel["viewType"] == "Scatter Plot":
            assert {shown["xAxis"], shown["yAxis"]} <= {f"summary:{name}" for name in Metrics.model_fields}
        elif panel["viewType"] == "Run History Line Plot":
            assert {shown["xAxis"], *shown["metrics"]} <= history
        else:
            columns = {column["accessor"] for column in shown["columns"]}
            assert columns <= choices | {f"summary:{name}" for name in Metrics.model_fields}


def test_the_comparison_has_kl_perplexity_bits_blocks_and_means_by_choice() -> None:
    found = spec()
    shown = [panel["config"] for panel in panels(found)]
    assert {name for panel in shown for name in panel.get("metrics", [])} == {
        "kl",
        "perplexity",
        "bits_per_weight",
        "block/held_out_relative_mse",
        "block/relative_mse",
    }
    _, means = grids(found)
    for runset in means["runSets"]:
        assert [key["name"] for key in runset["grouping"]] == [f"choices.value.{group}" for group in CHOICES]


def test_the_paired_differences_stand_before_the_panels() -> None:
    found = json.loads(to_json(report("wush", "team", A, B, differences="| KL | -0.1 ± 0.02* |")))
    kinds = [block["type"] for block in found["spec"]["blocks"]]
    assert kinds.index("markdown-block") < kinds.index("panel-grid")
    assert "| KL | -0.1 ± 0.02* |" in list(strings(found))
    assert "markdown-block" not in [block["type"] for block in spec()["spec"]["blocks"]]


def test_no_two_panels_of_a_grid_overlap() -> None:
    for grid in grids(spec()):
        taken = [
            (x, y)
            for place in (panel["layout"] for panel in grid["panelBankSectionConfig"]["panels"])
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(taken) == len(set(taken))
        assert max(x for x, _ in taken) < 24


def test_a_side_that_is_everything_or_called_as_the_other_is_an_error() -> None:
    with pytest.raises(ValueError, match="every run of the project"):
        RunFilter("all")
    with pytest.raises(ValueError, match="both sides are called 'first'"):
        report("wush", "team", A, RunFilter("first", "sweep-b"))


# --- saving, in a process of its own: the client keeps its login for the life of one

SAVE = """
from experiments.views.workspace import ReportNotSaved, save, report
from tests.experiments.test_workspace import A, B
try:
    print(save(report("wush", "team", A, B)))
except ReportNotSaved as error:
    print("ReportNotSaved:", error)
"""


def saved(home: Path, url: str, key: str) -> tuple[str, float]:
    own = {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_BASE_URL": url, "WANDB_API_KEY": key}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SAVE], cwd=ROOT, env=environment() | own, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began


def test_a_report_is_saved_and_its_address_returned(tmp_path: Path) -> None:
    with serving() as server:
        said, _ = saved(tmp_path, server.url, KEY)
        assert said == f"{server.url}/team/wush/reports/first-against-second--report\n"
        (sent,) = server.reports
    assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("team", "wush", "first against second")
    assert {"sweep-a", "sweep-b"} <= set(strings(json.loads(sent["spec"])))


def test_who_is_not_logged_in_is_told_how_to(tmp_path: Path) -> None:
    with serving() as server:
        said, _ = saved(tmp_path, server.url, "")
    assert "ReportNotSaved: the report was not saved in team/wush: " in said
    assert "log in with `wandb login`" in said


@pytest.mark.parametrize("fault", ["silent", 500, 401])
def test_a_server_that_does_not_serve_is_an_error_within_seconds(fault: Fault, tmp_path: Path) -> None:
    with serving(fault) as server:
        said, seconds = saved(tmp_path, server.url, KEY)
    assert "ReportNotSaved: the report was not saved" in said
    assert seconds < 10


def test_importing_the_view_imports_no_client() -> None:
    check = (
        "import sys, experiments.views.workspace; sys.exit('wandb' in sys.modules or 'wandb_workspaces' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment(), check=False).returncode == 0
