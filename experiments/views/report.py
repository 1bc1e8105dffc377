"""The report of a sweep: one HTML file with its comparison tables, plots and the details of trials.

The file needs nothing beside itself, and the same outcomes give the same bytes. It shows results and computes
no metric of its own. Trials that differ by seed only are one row and one mark, their mean; each has a row of its own in
a second table. Of a big sweep it has every row, but only some of the marks and details.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.records import Outcome, Record
from experiments.replicates import Replicates, is_seed, replicates
from experiments.schema import ConfigError
from experiments.store import DamagedRecord
from experiments.views.report_plots import SHAPES, Panel, Trial, panel
from experiments.views.report_table import DASH, SEEDS, Column, columns_of, seconds, status, table_rows
from experiments.views.selection import TELLING, best_trial, comparable, originals, telling, variant
from experiments.views.summary import OLD, SHARE
from experiments.views.values import MOST_ROWS, PLUS_MINUS, facts, measured, share_told

MAX_DETAILS = 100
MAX_PANELS = 8
FIRST_ROWS = 500  # of the table, until all are asked for

Read = Callable[[str], Record | None]


@dataclass(frozen=True)
class Detail:
    """A trial whose details are shown; `record` when it is done and can be read, else `problem` says why not."""

    outcome: Outcome
    status: str
    record: Record | None
    problem: str


@dataclass(frozen=True)
class Table:
    """A comparison table: its label columns, and its rows as HTML."""

    id: str
    keys: list[str]
    rows: list[Markup]


def render_report(title: str, outcomes: Sequence[Outcome], read: Read) -> str:
    """The report as one HTML document, the trials in the order given; `read` gives the whole record of a done one."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds, size=size, utc=utc, config=config_text, reasons=by_reason, facts=facts)
    shown, columns = telling(outcomes, MAX_DETAILS), columns_of(outcomes)
    linked = {outcome.trial_id for outcome in shown}
    found = replicates(outcomes)
    drawn, total = panels(found, linked)
    return environment.get_template("report.html.j2").render(
        title=title,
        counts=counts(outcomes),
        best=best(found),
        originals=originals(outcomes),
        linked=linked,
        columns=columns,
        first_rows=FIRST_ROWS,
        tables=tables(outcomes, found, columns, linked),
        notes=notes(outcomes),
        panels=drawn,
        panels_left_out=total - len(drawn),
        details=[detail(outcome, read) for outcome in shown],
        details_of=len(outcomes),
        telling=TELLING,
        shapes=SHAPES,
        dash=DASH,
    )


def tables(
    outcomes: Sequence[Outcome], found: Sequence[Replicates], columns: Sequence[Column], linked: set[str]
) -> list[Table]:
    """The table of single trials; before it one of means over seeds, where some trials differ by seed only."""

    def rows(own: Sequence[Replicates], keys: Sequence[str]) -> list[Markup]:
        return table_rows(own, columns, keys, linked, len(own) <= MOST_ROWS)

    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.labels))
    each = Table("trials", keys, rows([Replicates((outcome,)) for outcome in outcomes], keys))
    if len(found) == len(outcomes):
        return [each]
    keys = [*(key for key in keys if not is_seed(key)), SEEDS]
    return [Table("means", keys, rows(found, keys)), each]


def best(found: Sequence[Replicates]) -> tuple[str, Replicates] | None:
    """The best by KL, as `0.2200 ± 0.0123`, and which that is."""
    one = best_trial(found)
    return (measured(one.results, "kl").told("{:.4f}".format), one) if one else None


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What the table's signs mean."""
    results = [outcome.result for outcome in outcomes if outcome.result]
    return [
        f"{PLUS_MINUS}.",
        "Gap: perplexity above the original model's.",
        "Bold: the best of a column, KL before all; never a perplexity below the original's, which is another model's.",
        *([f"{SHARE[0].upper()}{SHARE[1:]}."] if any(share_told(result.metrics) for result in results) else []),
        "Time: the sum of a trial's stages.",
        *(["Reused: done before this sweep began."] if any(outcome.earlier for outcome in outcomes) else []),
        *([f"{OLD[0].upper()}{OLD[1:]}."] if any(outcome.old for outcome in outcomes) else []),
    ]


def counts(outcomes: Sequence[Outcome]) -> str:
    """`6 trials: 5 done, 1 failed`; those of an earlier method, running and queued are counted when there are any."""
    states = Counter("old" if outcome.old else outcome.state for outcome in outcomes)
    parts = [f"{states['done']:,} done", f"{states['failed']:,} failed"]
    parts += [f"{states[state]:,} {state}" for state in ("old", "running", "queued") if states[state]]
    return f"{len(outcomes):,} trial{'' if len(outcomes) == 1 else 's'}: {', '.join(parts)}"


def detail(outcome: Outcome, read: Read) -> Detail:
    """What is known of a trial; a done one's record is read now."""
    record, problem = None, ""
    if outcome.result:
        try:
            record = read(outcome.trial_id)
        except (DamagedRecord, ConfigError) as error:
            problem = str(error)
        if record is None:
            problem = problem or "Its record is no longer there."
    return Detail(outcome, status(outcome), record, problem)


# --- the plots


def panels(found: Sequence[Replicates], linked: set[str]) -> tuple[list[Panel], int]:
    """Plots for each model, and for each text it was evaluated on where there are several; and how many there were."""
    groups = comparable(found)
    models = Counter(model for model, _ in groups)
    drawn = []
    for (model, ids), members in list(groups.items())[:MAX_PANELS]:
        text = f", evaluated on {variant(members[0].first, 'evaluation')} ({ids[:8]})" if models[model] > 1 else ""
        drawn.append(panel(model + text, _trials(members, linked)))
    return drawn, len(groups)


def _trials(members: Sequence[Replicates], linked: set[str]) -> list[Trial]:
    several = len({variant(one.first, "algorithm") for one in members}) > 1
    groups = ("format", "algorithm") if several else ("format",)
    return [
        Trial(
            id=one.first.trial_id,
            name=one.name + (" (old)" if one.first.old else ""),
            setting=" · ".join([variant(one.first, group) for group in groups]),
            transform=variant(one.first, "transform"),
            results=tuple(one.results),
            linked=one.first.trial_id in linked,
        )
        for one in members
    ]


# --- how values are written


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
