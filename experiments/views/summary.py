"""The summary of a sweep: one table for the terminal and for Markdown, the HTML report, and where they are."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.records import Outcome
from experiments.replicates import Replicates, is_seed, replicates
from experiments.store import ResultStore, write_atomically
from experiments.views.display import duration, on_stdout
from experiments.views.selection import TELLING, originals, standing, task_columns, telling
from experiments.views.values import MOST_ROWS, PLUS_MINUS, measured, measured_task, share_told

if TYPE_CHECKING:
    from wush.intervals import Metric

METRIC_COLUMNS = ("perplexity", "vs original", "KL", "top-1", "bits", "time")
_MEASURED: tuple[Metric, ...] = ("perplexity", "gap", "kl", "top1")
ROWS_SHOWN = 40
SPARED = ("time", "perplexity")  # on a narrow terminal, in this order; a perplexity follows from the original's
GAP, TRIAL = 2, 12  # characters between columns, and of a shortened id with what follows it
SHARE = "bits: of all weights of the decoder blocks, 16 for those left as they are; in parentheses the share quantized"
OLD = "old: made by an earlier version of the method, whose numbers are not today's; run the sweep again to replace it"


@dataclass(frozen=True)
class Summary:
    """A table of text, a row a trial or the mean of those that differ by seed.

    `common` are the labels that all trials share, and so no column. `numbers`: the columns that hold numbers. `notes`:
    lines on the originals, and on what signs in the table mean.
    """

    common: dict[str, str]
    columns: list[str]
    rows: list[list[str]]
    numbers: list[str]
    notes: list[str]


def summarize(name: str, outcomes: Sequence[Outcome], store: ResultStore) -> None:
    """Show the table of a sweep on standard output, write it and the report, and show where these are.

    Raises `OSError` that names the file when one cannot be written; the table has been shown by then.
    """
    console = on_stdout()
    folder = store.sweep(name)
    show_table(console, name, outcomes, folder)
    write(name, outcomes, store)
    example = next((outcome for outcome in outcomes if outcome.state == "failed"), outcomes[0])
    for what, where in (
        ("table", shown(folder / "table.md")),
        ("report", shown(folder / "report.html")),
        ("a trial", command(store, "show", example.trial_id)),
    ):
        console.print(f"  {what:8} {where}", highlight=False, markup=False, soft_wrap=True)


def show_table(console: Console, name: str, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Print the table, of many rows only some, and how many trials stand how."""
    rows = replicates(outcomes)
    most = telling(rows, ROWS_SHOWN)
    table = tabulate(outcomes, most)
    console.print(to_terminal(name, fitting(table, console.width)))
    for note in table.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    if len(most) < len(rows):
        where, what = shown(folder / "table.md"), "trials" if len(rows) == len(outcomes) else "rows"
        said = f"{len(most)} of {len(rows):,} {what}: {TELLING}; all are in {where}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    console.print(_counts(outcomes))


def write(name: str, outcomes: Sequence[Outcome], store: ResultStore) -> None:
    """Write the table and the report of a sweep, as far as it is."""
    write_table(name, outcomes, store)
    write_report(name, outcomes, store)


def write_table(name: str, outcomes: Sequence[Outcome], store: ResultStore) -> None:
    """Write `table.md`, with every row."""
    write_atomically(store.sweep(name) / "table.md", to_markdown(name, tabulate(outcomes)))


def write_report(name: str, outcomes: Sequence[Outcome], store: ResultStore) -> None:
    """Write `report.html`."""
    from experiments.views.report import render_report

    write_atomically(store.sweep(name) / "report.html", render_report(name, outcomes, store.record))


def tabulate(outcomes: Sequence[Outcome], shown: Sequence[Replicates] | None = None) -> Summary:
    """The outcomes as text, in order, those that differ by seed in one row; only rows to be shown, where given."""
    rows = replicates(outcomes)
    labels = dict.fromkeys(key for outcome in outcomes for key in outcome.labels if not is_seed(key))
    values = {key: {outcome.labels.get(key, "-") for outcome in outcomes} for key in labels}
    common = {key: next(iter(own)) for key, own in values.items() if len(own) == 1}
    varying = [key for key in labels if key not in common]
    seeds = any(is_seed(key) for outcome in outcomes for key in outcome.labels)
    tasks = task_columns([outcome.result for outcome in outcomes if outcome.result])
    over_windows = len(rows if shown is None else shown) <= MOST_ROWS
    cells = [
        [row.labels.get(key, "-") for key in varying]
        + ([row.seeds or "-"] if seeds else [])
        + _cells(row, tasks, over_windows)
        for row in (rows if shown is None else shown)
    ]
    numbers = [*METRIC_COLUMNS[:-1], *tasks, METRIC_COLUMNS[-1]]
    columns = [*varying, *(["seeds"] if seeds else []), *numbers, "trial"]
    return Summary(common, columns, cells, numbers, _notes(outcomes, cells))


def to_markdown(title: str, summary: Summary) -> str:
    """A Markdown table under a title, numbers to the right."""
    lines = [f"# {title}", "", ", ".join(f"{key} {value}" for key, value in summary.common.items()), ""]
    lines += [f"- {note}" for note in summary.notes] + ([""] if summary.notes else [])
    lines.append("| " + " | ".join(summary.columns) + " |")
    lines.append("|" + "|".join("---:" if column in summary.numbers else "---" for column in summary.columns) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in summary.rows]
    return "\n".join(lines) + "\n"


def fitting(summary: Summary, width: int) -> Summary:
    """The table without its least telling columns, as far as it is wider than a terminal; labels may yet be folded."""
    for column in SPARED:
        widths = [max(map(len, cells)) for cells in zip(summary.columns, *summary.rows, strict=True)][:-1]
        if sum(widths) + TRIAL + GAP * (len(widths) + 1) <= width:
            break
        place = summary.columns.index(column)
        rows = [row[:place] + row[place + 1 :] for row in summary.rows]
        summary = replace(summary, columns=[name for name in summary.columns if name != column], rows=rows)
    return summary


def to_terminal(title: str, summary: Summary) -> Table:
    """A rich table, numbers to the right, failed trials in red."""
    heading = escape(title) + "".join(f"\n[dim]{key}[/] {escape(value)}" for key, value in summary.common.items())
    table = Table(title=heading, box=SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    table.padding = (0, 1, 0, 0)  # for narrow terminals
    for column in summary.columns:
        right = column in summary.numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold", min_width=4)
    for row in summary.rows:
        trial, space, rest = row[-1].partition(" ")
        cells = [*row[:-1], trial[:8] + space + rest]
        table.add_row(*map(escape, cells), style="red" if " failed: " in row[-1] else None)
    return table


def shown(path: Path) -> str:
    """A path as short as it can be shown from the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _cells(row: Replicates, tasks: Sequence[str], over_windows: bool) -> list[str]:
    results, first = row.results, row.first
    if not results:
        return ["-"] * (len(METRIC_COLUMNS) + len(tasks)) + [f"{first.trial_id} {standing(first)}"]
    perplexity, gap, kl, top1 = (measured(results, metric, over_windows) for metric in _MEASURED)
    scores = [measured_task(results, name, over_windows) for name in tasks]
    metrics, share = results[0].metrics, share_told(results[0].metrics)
    return [
        f"{perplexity.value:.2f}",
        gap.told("{:+.2f}".format, "{:.2f}".format),
        kl.told("{:.4f}".format),
        f"{top1.scaled(100).told('{:.1f}'.format)}%",
        f"{metrics.bits_per_weight:.2f}" + (f" ({share})" if share else ""),
        *("-" if score is None else f"{score.scaled(100).told('{:.2f}'.format)}%" for score in scores),
        duration(fmean(result.seconds for result in results)),
        first.trial_id + (f" +{len(results) - 1}" if len(results) > 1 else "") + (" old" if first.old else ""),
    ]


def _notes(outcomes: Sequence[Outcome], cells: Sequence[Sequence[str]]) -> list[str]:
    results = [outcome.result for outcome in outcomes if outcome.result]
    notes = originals(outcomes)
    if any(" ± " in cell for row in cells for cell in row):
        notes.append(PLUS_MINUS)
    if any(share_told(result.metrics) for result in results):
        notes.append(SHARE)
    return [*notes, *([OLD] if any(result.old for result in results) else [])]


def _counts(outcomes: Sequence[Outcome]) -> str:
    states = Counter(outcome.state for outcome in outcomes)
    earlier = sum(outcome.earlier and not outcome.old for outcome in outcomes)
    old = sum(outcome.old for outcome in outcomes)
    text = f"{states['done'] - old} of {len(outcomes)} trials done"
    text += f", {earlier} of them earlier" if earlier else ""
    text += f", {old} old" if old else ""
    text += f", [bold red]{states['failed']} failed[/]" if states["failed"] else ""
    return text + "".join(f", {states[state]} {state}" for state in ("running", "queued") if states[state])


def command(store: ResultStore, *words: str) -> str:
    """The line of `python -m experiments` that does something with this store."""
    results = [] if store.root == Path("results").absolute() else ["--results", shown(store.root)]
    return shlex.join(["python", "-m", "experiments", *words, *results])
