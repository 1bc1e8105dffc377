"""The benchmark: what it measures, and what it says of it."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks.promises import BenchmarkError, Measure, _run
from tests.experiments.conftest import Cli


def test_the_quick_benchmark_measures_every_promise(cli: Cli) -> None:
    done = cli.experiments("bench", "--quick", "--results", "kept", "--output", "bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((cli.folder / "bench.json").read_text())
    targets = {one["what"]: one["target"] for one in found["measures"]}
    assert list(targets.values()) == [2, 2, 300, 6, 3, 0.3, 0.3, 2, None]
    assert all(one["measured"] > 0 for one in found["measures"])
    assert found["measures"][-1]["measured"] < 100
    assert {"processor", "cores", "torch"} <= set(found["machine"])
    assert all(what in done.stdout for what in targets)
    assert len(list((cli.folder / "kept").rglob("result.json"))) == 5
    assert cli.experiments("bench", "--quick", "--results", "kept").returncode == 2


@pytest.mark.parametrize(("measured", "target", "verdict"), [(2, 2, "met"), (2.1, 2, "MISSED"), (9, None, "stated")])
def test_a_target_is_met_missed_or_absent(measured: float, target: float | None, verdict: str) -> None:
    assert Measure("x", measured, "s", target).verdict == verdict


def test_a_process_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"exit code 2, not 0\n.*formt: unknown key"):
        _run("formt=mxfp4", f"results={tmp_path}")
