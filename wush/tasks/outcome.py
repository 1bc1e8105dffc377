"""From what the LM Evaluation Harness gives to the result of a task; a number that is missing is an error here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from numbers import Real
from typing import Any

from wush.tasks.specs import TaskResult, TaskRun, TaskSpec


def outcome(
    spec: TaskSpec, tasks: Mapping[str, Any], seeds: Sequence[int], timed: Sequence[tuple[Mapping[str, Any], float]]
) -> TaskResult:
    """The result of the runs, one for each seed: the harness's results and seconds of each.

    Raises `ValueError` for a metric that the task does not give, and where the metric that counts is no number.
    """
    runs = [_run(spec.task, seed, results, seconds) for seed, (results, seconds) in zip(seeds, timed, strict=True)]
    metric = _headline(spec, runs)
    runs = [replace(run, outcomes=_outcomes(metric, tasks, own)) for run, (own, _) in zip(runs, timed, strict=True)]
    return TaskResult(
        name=spec.task,
        version=_joined(task.VERSION for task in tasks.values()),
        harness=version("lm_eval"),
        num_fewshot=max(task.get_config("num_fewshot") for task in tasks.values()),
        chat_template=bool(spec.chat_template),
        samples=sum(timed[0][0]["n-samples"][name]["effective"] for name in tasks),
        metric=metric,
        higher_is_better=_higher_is_better(spec.task, metric, tasks.values()),
        runs=runs,
    )


def _run(name: str, seed: int, results: Mapping[str, Any], seconds: float) -> TaskRun:
    found = results["results"][name]
    keys = [key for key in found if "," in key and "_stderr," not in key and _number(found[key]) is not None]
    return TaskRun(
        seed=seed,
        values={key: float(found[key]) for key in keys},
        stderrs={key: _number(found.get(key.replace(",", "_stderr,", 1))) for key in keys},
        seconds=seconds,
    )


def _outcomes(metric: str, tasks: Iterable[str], results: Mapping[str, Any]) -> list[float]:
    """The metric of each document, those of a group task by task; none where a document has no number of it.

    Such are metrics that only a whole task has.
    """
    name, _, chosen = metric.partition(",")
    samples = [one for task in tasks for one in results["samples"].get(task, ()) if one["filter"] == chosen]
    values = [_number(one.get(name)) for one in samples]
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else []


def _headline(spec: TaskSpec, runs: Sequence[TaskRun]) -> str:
    metric = next(iter(runs[0].values), "acc,none") if spec.metric is None else spec.metric
    for run in runs:
        if metric not in run.values:
            given = ", ".join(run.values) or "none at all"
            raise ValueError(
                f"task {spec.task}: gives no number for {metric!r} with seed {run.seed}; it gives: {given}"
            )
    return metric


def _higher_is_better(name: str, metric: str, tasks: Iterable[Any]) -> bool:
    """As the tasks say of the metric, or of all theirs where its name is made while it is scored (`pass@1`)."""
    said: set[bool] = set()
    for task in tasks:
        directions = task.higher_is_better()
        bare = metric.partition(",")[0]
        said |= {directions[bare]} if bare in directions else set(directions.values())
    if len(said) != 1:
        raise ValueError(f"task {name}: its definition does not say whether more of {metric} is better")
    return said.pop()


def _joined(versions: Iterable[Any]) -> str:
    return ", ".join(sorted({str(each) for each in versions}))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
