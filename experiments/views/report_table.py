"""The report's tables: what their columns show, which values are the best, and their rows as HTML.

The rows are written here and not by the template, which would take a second for a thousand.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup, escape

from experiments.records import Outcome, Result
from experiments.replicates import Replicates
from experiments.views.display import duration
from experiments.views.selection import comparable, task_columns
from experiments.views.values import Value, measured, measured_task, share_told
from wush.intervals import Metric

DASH = "–"
Results = Sequence[Result]


@dataclass(frozen=True)
class Column:
    """A number of a finished trial, or of several that differ by seed; `better` picks the best of several.

    `value`: of the results, with an interval where they are a single one only if so told. `better` is None where there
    is no better, and `may_be_best` says of which results the number can be.
    """

    title: str
    value: Callable[[Results, bool], Value]
    show: Callable[[float], str]
    better: Callable[[Iterable[float]], float] | None
    may_be_best: Callable[[Results], bool] = lambda results: not results[0].old
    note: Callable[[Results], str] = lambda results: ""


@dataclass(frozen=True)
class Cell:
    """What a table cell shows, and the value it sorts by."""

    text: str
    value: float
    alone: str  # the number without its interval


def columns_of(outcomes: Sequence[Outcome]) -> list[Column]:
    """What every trial has, and the tasks that some have."""
    tasks = task_columns([outcome.result for outcome in outcomes if outcome.result])
    return [*COLUMNS[:-1], *map(_task_column, tasks), COLUMNS[-1]]


def _task_column(name: str) -> Column:
    def percent(results: Results, over_documents: bool) -> Value:
        score = measured_task(results, name, over_documents)
        return Value(math.nan) if score is None else score.scaled(100)

    def show(value: float) -> str:
        return DASH if math.isnan(value) else _decimals(2)(value)

    return Column(f"{name} (%)", percent, show, max)


def table_rows(
    found: Sequence[Replicates], columns: Sequence[Column], keys: Sequence[str], linked: set[str], over_windows: bool
) -> list[Markup]:
    """A table row for each: its labels of the keys, its numbers or why it has none, and itself.

    The best of comparable quantized trials is bold in each column. `linked` trials have details on the page. The key
    `seeds` is how many there are. `over_windows` False: single trials have no intervals.
    """
    cells = [[_cell(column, one.results, over_windows) for column in columns] if one.results else [] for one in found]
    best = _best_cells(found, columns, {id(one): own for one, own in zip(found, cells, strict=True)})
    texts: dict[str, str] = {}

    def label(text: str | None) -> str:
        if not text:
            return f'<td data-value="">{DASH}</td>'
        if text not in texts:
            texts[text] = f"<td>{escape(text)}</td>"
        return texts[text]

    rows = []
    for one, numbers in zip(found, cells, strict=True):
        labels = one.first.labels if len(one.members) == 1 else one.labels
        own = "".join([label(one.seeds if key == SEEDS else labels.get(key)) for key in keys])
        middle = _numbers(numbers, best.get(id(one), ())) if numbers else _reason(one.first, len(columns))
        last = _trial(one, one.first.trial_id in linked)
        rows.append(Markup(f'<tr data-status="{status(one.first)}">{own}{middle}{last}</tr>'))
    return rows


def status(outcome: Outcome) -> str:
    """How a trial stands; `reused` when it was done before the sweep began, `old` when by an earlier method."""
    if outcome.old:
        return "old"
    return "reused" if outcome.state == "done" and outcome.earlier else outcome.state


def _cell(column: Column, results: Results, over_windows: bool) -> Cell:
    value, write = column.value(results, over_windows), column.show
    note = column.note(results)
    text = value.told(write, lambda margin: write(margin).removeprefix("+"))
    return Cell(text + (f" ({note})" if note else ""), value.value, write(value.value))


def _numbers(cells: Sequence[Cell], best: Sequence[int]) -> str:
    shown = [f"<strong>{cell.text}</strong>" if i in best else cell.text for i, cell in enumerate(cells)]
    return "".join(
        [
            f'<td class="number" data-value="{cell.value:.10g}">{text}</td>'
            for cell, text in zip(cells, shown, strict=True)
        ]
    )


def _reason(outcome: Outcome, columns: int) -> str:
    if outcome.failure and outcome.state == "failed":
        told = escape(outcome.failure.told)
        return f'<td class="reason bad" colspan="{columns}" title="{told}">{told}</td>'
    return f'<td class="reason muted" colspan="{columns}">{escape(outcome.detail or DASH)}</td>'


def _trial(one: Replicates, linked: bool) -> str:
    state, trial_id = status(one.first), one.first.trial_id
    tag, link = ("a", f' href="#trial-{trial_id}"') if linked else ("span", "")
    bad = " bad" if state in ("failed", "old") else ""
    more = f" +{len(one.members) - 1}" if len(one.members) > 1 else ""
    return (
        f'<td><span class="state{bad}">{state}</span> '
        f'<{tag} class="mono"{link} title="{trial_id}">{trial_id[:8]}</{tag}>{more}</td>'
    )


def _best_cells(
    found: Sequence[Replicates], columns: Sequence[Column], cells: dict[int, list[Cell]]
) -> dict[int, list[int]]:
    """Indices of the columns in which a row, named by its `id`, is best; none is where all show the same."""
    best: dict[int, list[int]] = {}
    for members in comparable(found).values():
        for i, column in enumerate(columns):
            able = [one for one in members if column.may_be_best(one.results)]
            finite = {id(one): cell for one in able if math.isfinite((cell := cells[id(one)][i]).value)}
            if column.better is None or len({cells[id(one)][i].alone for one in members}) < 2 or not finite:
                continue
            shown = column.show(column.better([cell.value for cell in finite.values()]))
            for row in (row for row, cell in finite.items() if cell.alone == shown):
                best.setdefault(row, []).append(i)
    return best


def seconds(value: float) -> str:
    """`3.2 s` below ten seconds, longer times as progress shows them."""
    return f"{value:.1f} s" if value < 10 else duration(value)


def _decimals(digits: int, sign: str = "") -> Callable[[float], str]:
    """Writes numbers with fixed decimals, those from a million on in powers of ten."""

    def show(value: float) -> str:
        if math.isfinite(value) and abs(value) >= 1e6:
            return f"{value:{sign}.2e}"
        return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")

    return show


def _of(metric: Metric, scale: float = 1.0) -> Callable[[Results, bool], Value]:
    return lambda results, over_windows: measured(results, metric, over_windows).scaled(scale)


def _is_above_original(results: Results) -> bool:
    """Whether a perplexity can be a good one: below the original's, the model is another, and no better for it."""
    return not results[0].old and measured(results, "gap", over_windows=False).value >= 0


def _mean(value: Callable[[Result], float]) -> Callable[[Results, bool], Value]:
    return lambda results, _: Value(fmean(map(value, results)))


SEEDS = "seeds"
COLUMNS = (
    Column("Perplexity", _of("perplexity"), _decimals(2), min, _is_above_original),
    Column("Gap", _of("gap"), _decimals(2, "+"), min, _is_above_original),
    Column("KL (nats)", _of("kl"), _decimals(4), min),
    Column("Top-1 (%)", _of("top1", 100), _decimals(1), max),
    Column(
        "Bits/weight",
        _mean(lambda result: result.metrics.bits_per_weight),
        _decimals(2),
        None,
        note=lambda results: share_told(results[0].metrics),
    ),
    Column("Time", _mean(lambda result: result.seconds), seconds, None),
)
