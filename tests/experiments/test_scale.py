"""A sweep of many trials: what it costs apart from them grows no faster than their number, and the benchmark works."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import scale
from experiments.records import Record
from experiments.store import ResultStore


def test_the_benchmark_measures_each_size_from_overrides_to_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale.main((100, 300), tmp_path / "scale.json") == 0
    found = json.loads((tmp_path / "scale.json").read_text())["costs"]
    assert [cost["trials"] for cost in found] == [100, 300]
    for cost in found:
        assert set(cost["seconds"]) == set(scale.STEPS)
        assert cost["missed"] == []
        assert sum(cost["seconds"].values()) < cost["total_seconds"]
        assert 5e7 < cost["peak_bytes"] < 1e9
    first, second = found
    growing = [sum(cost["seconds"][step] for step in ("plan", "read", "table", "report")) for cost in found]
    assert growing[1] < 3 * 3 * growing[0] + 1  # three times the trials, and three times that for noise
    assert second["html_bytes"] - first["html_bytes"] < 200 * 1500
    shown = capsys.readouterr().out
    assert "target" in shown
    assert "met" in shown


def test_all_but_a_thousandth_of_the_trials_have_records_of_the_real_size(tmp_path: Path) -> None:
    scale.write_records(100, tmp_path)
    paths = list(tmp_path.glob("trials/*/result.json"))
    assert len(paths) == 99
    assert all(50_000 < path.stat().st_size < 75_000 for path in paths)
    store = ResultStore(tmp_path)
    records = [store.record(path.parent.name) for path in paths[:3]]
    assert all(isinstance(one, Record) and len(one.blocks) == 30 and len(one.blocks[0].layers) == 7 for one in records)
    cost = scale.measure(100, tmp_path)
    (report,) = tmp_path.glob("sweeps/*/report.html")
    assert cost.html_bytes == report.stat().st_size
    assert "100 trials: 99 done, 0 failed, 1 queued" in report.read_text()


def test_a_missed_target_is_named() -> None:
    met = scale.Cost(100, {}, html_bytes=10, total_seconds=9.9, peak_bytes=10)
    over = scale.Cost(100, {}, html_bytes=11_000_000, total_seconds=10.1, peak_bytes=1_100_000_000)
    assert met.missed() == []
    assert over.missed() == ["total", "peak memory", "HTML"]
