"""The report of a sweep: one HTML file with its comparison table, plots and every trial's details.

The file needs nothing beside itself, and the same outcomes give the same bytes. It shows records and computes
no metric of its own.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.records import Outcome, Record
from experiments.views.display import duration
from experiments.views.report_plots import SHAPES, Panel, Trial, panel

DASH = "–"


@dataclass(frozen=True)
class Column:
    """A number of a done trial; `better` picks the best of several, None where there is no better."""

    title: str
    value: Callable[[Record], float]
    show: Callable[[float], str]
    better: Callable[[Iterable[float]], float] | None


@dataclass(frozen=True)
class Cell:
    """What a table cell shows, and the value it sorts by (empty: last)."""

    text: str
    value: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A trial in the comparison table; `numbers` is None unless it is done."""

    outcome: Outcome
    labels: list[Cell]
    numbers: list[Cell] | None
    status: str


def render_report(title: str, outcomes: Sequence[Outcome]) -> str:
    """The report as one HTML document, the trials in the order given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds, size=size, utc=utc, config=config_text, reasons=by_reason)
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.labels))
    return environment.get_template("report.html.j2").render(
        title=title,
        counts=counts(outcomes),
        best=best_trial(outcomes),
        keys=keys,
        columns=COLUMNS,
        rows=table_rows(outcomes, keys),
        panels=panels(outcomes),
        shapes=SHAPES,
        dash=DASH,
    )


# --- the table


def table_rows(outcomes: Sequence[Outcome], keys: Sequence[str]) -> list[Row]:
    """The comparison table; the best of comparable quantized trials is marked in each column."""
    best = _best_cells(outcomes)
    rows = []
    for outcome in outcomes:
        labels = [Cell(outcome.labels.get(key, DASH), outcome.labels.get(key, "")) for key in keys]
        numbers = _numbers(outcome.record, best.get(outcome.trial_id, set())) if outcome.record else None
        rows.append(Row(outcome, labels, numbers, status(outcome)))
    return rows


def _numbers(record: Record, best: set[str]) -> list[Cell]:
    values = [(column, column.value(record)) for column in COLUMNS]
    return [Cell(column.show(value), repr(value), column.title in best) for column, value in values]


def _best_cells(outcomes: Sequence[Outcome]) -> dict[str, set[str]]:
    """Titles of the columns in which a trial is best; none is where all show the same."""
    best: dict[str, set[str]] = {}
    for members in comparable(outcomes).values():
        for column in COLUMNS:
            values = {o.trial_id: column.value(o.record) for o in members if o.record}
            finite = {trial_id: value for trial_id, value in values.items() if math.isfinite(value)}
            if column.better is None or len({column.show(value) for value in finite.values()}) < 2:
                continue
            shown = column.show(column.better(finite.values()))
            for trial_id in (trial_id for trial_id, value in finite.items() if column.show(value) == shown):
                best.setdefault(trial_id, set()).add(column.title)
    return best


def status(outcome: Outcome) -> str:
    """How a trial stands; `reused` when it was done before the sweep began."""
    if outcome.record:
        return "reused" if outcome.earlier else "done"
    return "failed" if outcome.failure else "not run"


def counts(outcomes: Sequence[Outcome]) -> str:
    """`6 trials: 5 done, 1 failed`; those not run are counted when there are any."""
    done = sum(outcome.record is not None for outcome in outcomes)
    failed = sum(status(outcome) == "failed" for outcome in outcomes)
    waiting = len(outcomes) - done - failed
    parts = [f"{done} done", f"{failed} failed"] + ([f"{waiting} not run"] if waiting else [])
    return f"{len(outcomes)} trial{'' if len(outcomes) == 1 else 's'}: {', '.join(parts)}"


def best_trial(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The quantized trial of the lowest perplexity, the first of equals; None when none has a finite one."""
    found = [(o.record.metrics.perplexity, o) for o in outcomes if o.record and o.record.blocks]
    finite = [(perplexity, outcome) for perplexity, outcome in found if math.isfinite(perplexity)]
    return min(finite, key=lambda pair: pair[0])[1] if finite else None


# --- the plots


def comparable(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Quantized trials by model and evaluated text: across these, neither perplexity nor KL can be compared."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.record and outcome.record.blocks:
            text = outcome.record.data.get("evaluation")
            found.setdefault((_variant(outcome, "model"), text.ids_sha256 if text else ""), []).append(outcome)
    return found


def panels(outcomes: Sequence[Outcome]) -> list[Panel]:
    """Plots for each model, and for each text it was evaluated on where there are several."""
    found = comparable(outcomes)
    models = [model for model, _ in found]
    drawn = []
    for (model, ids), members in found.items():
        text = f", evaluated on {_variant(members[0], 'evaluation')} ({ids[:8]})" if models.count(model) > 1 else ""
        drawn.append(panel(model + text, _trials(members)))
    return drawn


def _trials(members: Sequence[Outcome]) -> list[Trial]:
    several = len({_variant(outcome, "algorithm") for outcome in members}) > 1
    trials = []
    for outcome in members:
        assert outcome.record is not None
        groups = ("format", "algorithm") if several else ("format",)
        setting = " · ".join(_variant(outcome, group) for group in groups)
        trials.append(Trial(outcome.trial_id, outcome.name, setting, _variant(outcome, "transform"), outcome.record))
    return trials


def _variant(outcome: Outcome, group: str) -> str:
    """A group's option with the keys of it that differ within the sweep: `mxfp4 scale_rule=ocp`.

    A seed makes no variant: trials that differ by it share a colour and a lane.
    """
    assert outcome.record is not None
    option = outcome.record.choices.get(group, DASH)
    inner = {key.removeprefix(f"{group}."): v for key, v in outcome.labels.items() if key.startswith(f"{group}.")}
    return " ".join([option, *(f"{key}={value}" for key, value in inner.items() if key != "seed")])


# --- how values are written


def seconds(value: float) -> str:
    """`3.2 s` below ten seconds, longer times as progress shows them."""
    return f"{value:.1f} s" if value < 10 else duration(value)


def size(value: int | None) -> str:
    """Bytes as `512 B`, `38.2 MiB` or `1.5 GiB`; a dash for None."""
    if value is None:
        return DASH
    amount, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def utc(value: datetime) -> str:
    """A time to the second, in UTC."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def config_text(config: dict[str, object]) -> str:
    """A config as YAML, in the order of its keys."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    """Skipped layers under the reason they share."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        reasons.setdefault(reason, []).append(layer)
    return reasons


def _decimals(digits: int, sign: str = "") -> Callable[[float], str]:
    """Writes numbers with fixed decimals, those from a million on in powers of ten."""

    def show(value: float) -> str:
        if math.isfinite(value) and abs(value) >= 1e6:
            return f"{value:{sign}.2e}"
        return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")

    return show


COLUMNS = (
    Column("Perplexity", lambda record: record.metrics.perplexity, _decimals(2), min),
    Column(
        "Gap", lambda record: record.metrics.perplexity - record.metrics.perplexity_original, _decimals(2, "+"), min
    ),
    Column("KL (nats)", lambda record: record.metrics.kl, _decimals(4), min),
    Column("Top-1 (%)", lambda record: 100 * record.metrics.top1, _decimals(1), max),
    Column("Bits/weight", lambda record: record.metrics.bits_per_weight, _decimals(2), min),
    Column("Time", lambda record: sum(stage.seconds for stage in record.stages.values()), seconds, None),
)
