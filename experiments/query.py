"""Many records at once, by DuckDB: only what tables, plots and comparisons need, in bounded memory.

It says of a file only that it holds such a result. Why one does not is for the store to find out.
"""

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from experiments.earlier import choices_of_today
from experiments.records import READABLE_VERSIONS, Metrics, Result
from wush.intervals import Sums, mean_outcomes

FILES_AT_ONCE = 500  # with their whole content in memory: 30 MB of the records of a 30-block model

_RUNS = 'STRUCT("values" MAP(VARCHAR, DOUBLE), outcomes DOUBLE[])[]'
_STRUCTURE = json.dumps(
    {
        **dict.fromkeys(("trial_id", "status", "finished_at", "model_note"), "VARCHAR"),
        **dict.fromkeys(("schema_version", "attempts", "restored_blocks", "method_version"), "INTEGER"),
        "choices": "JSON",
        "metrics": "MAP(VARCHAR, DOUBLE)",
        "windows": {name: ["DOUBLE"] for name in ("nll", "nll_original", "kl", "agree", "predictions")},
        "tasks": f"MAP(VARCHAR, STRUCT(metric VARCHAR, higher_is_better BOOLEAN, runs {_RUNS}))",
        "stages": "MAP(VARCHAR, STRUCT(seconds DOUBLE))",
        "blocks": [
            {
                "index": "INTEGER",
                "relative_mse": "DOUBLE",  # of schema version 4
                "calibration": {"relative": "DOUBLE"},
                "held_out": {"relative": "DOUBLE"},
            }
        ],
        "data": {"evaluation": {"ids_sha256": "VARCHAR"}},
        "environment": {"host": "VARCHAR"},
    }
)
# Materialized: else the content is parsed again for every column.
_QUERY = """
    WITH read AS MATERIALIZED (SELECT try(json_transform(content, $structure)) AS r FROM read_text($files))
    SELECT r.trial_id, r.choices, r.metrics,
           coalesce(list_sum(list_transform(map_values(r.stages), lambda stage: stage.seconds)), 0) AS seconds,
           list_transform(r.blocks, lambda block: block.index) AS indices,
           list_transform(r.blocks, lambda block: block.held_out.relative) AS errors,
           list_transform(r.blocks, lambda block: coalesce(block.calibration.relative, block.relative_mse)),
           r.data.evaluation.ids_sha256, r.environment.host, r.finished_at, r.attempts, r.restored_blocks, r.tasks,
           r.windows, r.method_version, r.model_note
    FROM read WHERE list_contains($versions, r.schema_version) AND r.status = 'done'
"""


def results(files: Sequence[Path]) -> Iterator[Result]:
    """The results that the files hold, in no order; a file that is damaged, foreign or gone gives none.

    Neither do those read together with one that is gone or no text at all.
    """
    import duckdb

    with duckdb.connect() as connection:
        for start in range(0, len(files), FILES_AT_ONCE):
            names = [str(path) for path in files[start : start + FILES_AT_ONCE]]
            given = {"files": names, "structure": _STRUCTURE, "versions": list(READABLE_VERSIONS)}
            try:
                rows = connection.execute(_QUERY, given).fetchall()
            except duckdb.Error:
                continue
            for row in rows:
                with suppress(ValueError, TypeError):  # a value is not there, or no such value
                    yield _result(*row)


def _result(
    trial_id: str,
    choices: str,
    metrics: dict[str, Any],
    seconds: float,
    indices: list[int],
    errors: list[float | None],
    calibration_errors: list[float | None],
    evaluated: str | None,
    host: str | None,
    finished_at: str,
    attempts: int | None,
    restored_blocks: int | None,
    tasks: dict[str, dict[str, Any]] | None,
    windows: dict[str, list[float]] | None,
    method_version: int | None,
    model_note: str | None,
) -> Result:
    if None in (trial_id, choices, *indices):
        raise ValueError("a value is not there")
    scores = {
        sys.intern(name): fmean(run["values"][task["metric"]] for run in task["runs"])
        for name, task in (tasks or {}).items()
        if task["higher_is_better"]
    }
    outcomes = {name: _outcomes(tasks[name], score) for name, score in scores.items()} if tasks else {}
    return Result(
        trial_id=sys.intern(trial_id),
        choices=_choices(choices),
        metrics=Metrics(**metrics),
        seconds=seconds,
        errors=_there(indices, errors),
        calibration_errors=_there(indices, calibration_errors),
        evaluated=sys.intern(evaluated or ""),
        host=sys.intern(host or ""),
        finished_at=datetime.fromisoformat(finished_at),
        attempts=1 if attempts is None else attempts,
        restored_blocks=restored_blocks or 0,
        tasks=scores,
        outcomes={name: found for name, found in outcomes.items() if found},
        windows=Sums(SimpleNamespace(**windows)) if windows and windows["nll"] else None,
        method_version=1 if method_version is None else method_version,
        model_note=model_note,
    )


def _outcomes(task: dict[str, Any], score: float) -> list[float]:
    return mean_outcomes([run["outcomes"] or () for run in task["runs"]], score)


def _there(indices: list[int], errors: list[float | None]) -> dict[int, float]:
    return {index: error for index, error in zip(indices, errors, strict=True) if error is not None}


@functools.cache
def _choices(text: str) -> dict[str, str]:
    """Choices, as JSON in a record: one object for the trials that share them."""
    return choices_of_today({group: str(option) for group, option in json.loads(text).items()})
