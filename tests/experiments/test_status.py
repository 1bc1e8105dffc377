"""The status table: what a tired researcher sees at a glance."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from experiments.records import Result
from experiments.standing import Status, _done
from experiments.views import status as view
from tests.experiments.test_store import record
from wush.version import METHOD_VERSION

LABELS = {"model": "tiny", "format": "mxfp4", "transform": "r", "algorithm": "rtn"}


def one(number: int, state: str, **values: Any) -> Status:
    labels = LABELS | {"transform.seed": str(number), "model.hidden_size": str(64 * number)}
    return Status(f"{number:016x}", f"trial {number}", labels, state, **values)  # type: ignore[arg-type]


def drawn(*statuses: Status, width: int = 80, rows: int | None = None) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(view.to_table("mine", statuses, rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


RUNNING = {"progress": "decoder blocks 4 of 16", "host": "node7", "job": "12_3", "seconds": 61.0, "left": 180.0}


def test_at_80_columns_nothing_that_tells_trials_apart_is_cut() -> None:
    text = drawn(one(1, "running", **RUNNING), one(2, "done", seconds=100.0, kl=0.5, host="node7"))
    assert "seed=1" in text
    assert "hidden_size=128" in text
    assert "4/16" in text
    assert "0.5000" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_needs_attention_comes_first_and_empty_columns_are_left_out() -> None:
    text = drawn(one(1, "done", seconds=3.0), one(2, "failed", reason="too wide", advice="make it narrow"), width=120)
    assert text.index("failed") < text.index("done")
    assert "restarts" not in text
    assert "too wide" in text
    assert "make it narrow" in text
    assert "restarts" in drawn(one(1, "done", interruptions=2))


def test_rows_that_are_not_shown_are_counted() -> None:
    text = drawn(*(one(i, "done", seconds=1.0) for i in range(50)), rows=40)
    assert "10 more done (all: --all)" in text
    assert "50 of 50 trials done" in text


@pytest.mark.parametrize(
    ("statuses", "left"),
    [
        ([("done", 100.0), ("running", 40.0), ("queued", None)], 160.0),
        ([("done", 100.0), ("running", 40.0), ("running", 140.0), ("queued", None)], 80.0),
        ([("running", 40.0)], None),
        ([("done", 100.0)], None),
    ],
)
def test_the_time_left_is_that_of_trials_like_those_done(
    statuses: list[tuple[str, float | None]], left: float | None
) -> None:
    assert view.time_left([one(i, state, seconds=seconds) for i, (state, seconds) in enumerate(statuses)]) == left


def test_a_sweep_without_trials_is_shown_and_over() -> None:
    assert "0 of 0 trials done" in drawn()
    assert view.is_over([])


def test_a_record_of_an_earlier_method_is_shown_as_old_and_does_not_count_as_done() -> None:
    kept = Result.of(record("a1"))
    own = {"trial_id": "a1", "name": "trial", "labels": LABELS}
    done, old = (_done(own, replace(kept, method_version=METHOD_VERSION - past)) for past in (0, 1))
    assert (done.state, old.state) == ("done", "old")
    text = drawn(done, old, width=120)
    assert "1 of 2 trials done, 1 old" in text
    assert f"made by version {METHOD_VERSION - 1} of the method" in text
    assert view.is_over([done, old])
