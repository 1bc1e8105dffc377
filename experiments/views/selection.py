"""Which trials of a sweep are shown where not all can be, which can be compared, and how a trial stands in words."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Protocol, TypeVar

from experiments.records import Outcome, Result, State
from experiments.replicates import Replicates, is_seed

TASK_COLUMNS = 6  # of more tasks only the mean is shown
TELLING = "the failed, then the running, then the lowest in KL"


class _Ranked(Protocol):
    @property
    def state(self) -> State: ...

    @property
    def kl(self) -> float: ...


Rankable = TypeVar("Rankable", bound=_Ranked)


def telling(outcomes: Sequence[Rankable], most: int) -> Sequence[Rankable]:
    """At most so many outcomes, in the order of `TELLING`; in the order given when that is all.

    The failed leave half of the places to the others, as far as these need them.
    """
    if len(outcomes) <= most:
        return outcomes
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    others = sorted((outcome for outcome in outcomes if outcome.state != "failed"), key=_rank)
    kept = failed[: max(most // 2, most - len(others))]
    return kept + others[: most - len(kept)]


def _rank(outcome: _Ranked) -> tuple[int, float]:
    order = ("running", "done", "queued")
    return order.index(outcome.state), rank(outcome.kl) if outcome.state == "done" else 0.0


def rank(value: float) -> float:
    """A sort key that puts what is not a number last."""
    return math.inf if math.isnan(value) else value


def best_trial(found: Sequence[Replicates]) -> Replicates | None:
    """The quantized trial, or mean over seeds, of the lowest KL, the first of equals; None when none has a finite one.

    Those of an earlier method are not in the running.
    """
    quantized = [one for one in found if one.results and one.results[0].quantized and not one.results[0].old]
    finite = [one for one in quantized if math.isfinite(one.kl)]
    return min(finite, key=lambda one: one.kl) if finite else None


MEAN_OF_TASKS = "tasks"


def task_columns(results: Sequence[Result]) -> list[str]:
    """The tasks to show a column of, and their mean; of many the mean alone."""
    names = list(dict.fromkeys(name for result in results for name in result.tasks))
    return names if len(names) < 2 else [*names, MEAN_OF_TASKS] if len(names) <= TASK_COLUMNS else [MEAN_OF_TASKS]


def task_score(result: Result, column: str) -> float | None:
    """The score of a trial's task, a share, or the mean of all; None for a task it does not have."""
    if column == MEAN_OF_TASKS and column not in result.tasks:
        return mean_of_tasks(result) if result.tasks else None
    return result.tasks.get(column)


def mean_of_tasks(result: Result) -> float:
    """The mean score, a share, of a trial that has tasks."""
    return fmean(result.tasks.values())


def standing(outcome: Outcome) -> str:
    """How a trial that is not done stands: `failed: <reason>; <advice>`, `running: block 3 of 30` or `queued`."""
    told = outcome.failure.told if outcome.failure and outcome.state == "failed" else outcome.detail
    return f"{outcome.state}: {told}" if told else outcome.state


def comparable(found: Sequence[Replicates]) -> dict[tuple[str, str], list[Replicates]]:
    """Quantized trials by model and evaluated text: across these, neither perplexity nor KL can be compared."""
    sorted_: dict[tuple[str, str], list[Replicates]] = {}
    for one in found:
        if one.results and one.results[0].quantized:
            sorted_.setdefault((variant(one.first, "model"), one.results[0].evaluated), []).append(one)
    return sorted_


def originals(outcomes: Sequence[Outcome]) -> list[str]:
    """A line on each original model: what its weights are, and its perplexity on each evaluated text.

    `smollm2_135m (Q4_1, read dequantized): original perplexity 14.791`.
    """
    found: dict[tuple[str, str | None], dict[str, set[str]]] = {}
    for result in (outcome.result for outcome in outcomes if outcome.result):
        texts = found.setdefault((result.choices.get("model", "–"), result.model_note), {})
        texts.setdefault(result.evaluated, set()).add(f"{result.metrics.perplexity_original:.3f}")
    return [
        f"{model}{f' ({note})' if note else ''}: original perplexity "
        + ", ".join(
            " and ".join(sorted(values)) + (f" on {ids[:8]}" if len(texts) > 1 else "") for ids, values in texts.items()
        )
        for (model, note), texts in found.items()
    ]


def variant(outcome: Outcome, group: str) -> str:
    """A done trial's option of a group with the keys of it that differ within the sweep: `mxfp4 scale_rule=ocp`.

    A seed makes no variant: trials that differ by it share a colour and a lane.
    """
    assert outcome.result is not None
    start = f"{group}."
    inner = [f"{key[len(start) :]}={value}" for key, value in outcome.labels.items() if key.startswith(start)]
    own = [pair for pair in inner if not is_seed(pair.partition("=")[0])]
    return " ".join([outcome.result.choices.get(group, "–"), *own])
