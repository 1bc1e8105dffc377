"""What a trial came to, or the mean of those that differ by seed, each with its 95% interval; and how that is written.

Of a single trial the interval is over evaluated windows, or a task's documents; of several it is over seeds. Seeds that
change nothing, such as the calibration's where nothing reads it, are a single trial: a spread of zero says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from experiments.records import Metrics, Record, Result, Task
from experiments.views.selection import MEAN_OF_TASKS, task_score

if TYPE_CHECKING:  # it needs NumPy, a tenth of a second that a command without numbers does not have to take
    from wush.intervals import Interval, Metric

# The one form in which intervals are shown, and what it means.
PLUS_MINUS = (
    "±: 95% interval, bootstrapped over a trial's windows (a task's documents), Student's t of under 30 windows "
    "and for a mean over seeds"
)
MOST_ROWS = 500  # of single trials: of more none is bootstrapped, which would take seconds
_OF: dict[Metric, Callable[[Metrics], float]] = {
    "perplexity": lambda metrics: metrics.perplexity,
    "gap": lambda metrics: metrics.perplexity - metrics.perplexity_original,
    "kl": lambda metrics: metrics.kl,
    "top1": lambda metrics: metrics.top1,
}


@dataclass(frozen=True, slots=True)
class Value:
    """A number and its 95% interval, None where that is not known."""

    value: float
    interval: Interval | None = None

    def scaled(self, factor: float) -> Value:
        """In another unit."""
        return Value(self.value * factor, self.interval and self.interval.scaled(factor))

    def told(self, write: Callable[[float], str], write_margin: Callable[[float], str] | None = None) -> str:
        """`0.3390 ± 0.0210`: the number, and the distance to the farther end of its interval."""
        margin = "" if self.interval is None else f" ± {(write_margin or write)(self.interval.margin(self.value))}"
        return write(self.value) + margin


def measured(results: Sequence[Result], metric: Metric, over_windows: bool = True) -> Value:
    """A metric of a trial, or of several that differ by seed; `over_windows` False: a single one has no interval."""
    from wush import intervals

    values = [_OF[metric](result.metrics) for result in results]
    if _vary(values):
        return Value(fmean(values), intervals.of_runs(values))
    one = results[0]
    known = over_windows and one.windows is not None and (one.quantized or metric == "perplexity")
    return Value(values[0], one.windows.interval(metric) if known and one.windows else None)


def measured_task(results: Sequence[Result], column: str, over_documents: bool = True) -> Value | None:
    """The score of a task, or the mean of all, as a share; None unless every trial has it."""
    from wush import intervals

    scores = [score for result in results if (score := task_score(result, column)) is not None]
    if len(scores) < len(results):
        return None
    if _vary(scores):
        return Value(fmean(scores), intervals.of_runs(scores))
    return Value(scores[0], _of_documents(results[0], column) if over_documents else None)


def _vary(values: Sequence[float]) -> bool:
    return any(abs(value - values[0]) > 1e-12 * abs(values[0]) for value in values[1:])


def _of_documents(result: Result, column: str) -> Interval | None:
    from wush import intervals

    if column in result.tasks:
        return intervals.of_documents(result.outcomes.get(column, []))
    assert column == MEAN_OF_TASKS
    found = [(score, intervals.of_documents(result.outcomes.get(name, []))) for name, score in result.tasks.items()]
    known = [(score, interval) for score, interval in found if interval]
    return intervals.combined(known) if len(known) == len(found) else None


def share_told(metrics: Metrics) -> str:
    """The share of weights that is quantized, as `96.4%`, rounded down; empty when all are or the model is not."""
    return f"{int(1000 * metrics.quantized_share + 1e-9) / 10:g}%" if 0 < metrics.quantized_share < 1 else ""


def _interval_told(task: Task) -> str:
    from wush import intervals

    interval = intervals.of_documents(task.outcomes)
    return f", 95% interval {interval.low:.4f} to {interval.high:.4f}" if interval else ""


def facts(record: Record) -> dict[str, str]:
    """What a finished trial measured, with intervals, and what these numbers are of."""
    result = Result.of(record)

    def told(metric: Metric, digits: int, scale: float = 1.0) -> str:
        return measured([result], metric).scaled(scale).told(f"{{:.{digits}f}}".format)

    metrics, windows = record.metrics, len(record.windows.kl) if record.windows else None
    share = share_told(metrics)
    lost = {text: sum(one.clipped + one.flushed for one in own.values()) for text, own in record.lost.items()}
    return {
        "KL": f"{told('kl', 4)} nats",
        "perplexity": f"{told('perplexity', 4)}, original {metrics.perplexity_original:.4f}",
        "top-1": f"{told('top1', 2, 100)}%",
        "predictions": f"{metrics.predictions:,}" + (f" in {windows:,} windows" if windows else ""),
        "bits a weight": f"{metrics.bits_per_weight:.3f}" + (f", {share} of the weights quantized" if share else ""),
        **({"original": record.model_note} if record.model_note else {}),
        **{f"lost, {text}": f"{count:,} groups outside the format's window" for text, count in lost.items() if count},
        **{name: f"{task.told}{_interval_told(task)}" for name, task in record.tasks.items()},
        "method": f"version {record.method_version}" + (" (old)" if result.old else ""),
    }
