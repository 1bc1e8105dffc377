"""The summary of a sweep: one table for the terminal and for Markdown, the HTML report, and where they are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.display import duration
from experiments.records import Outcome
from experiments.store import ResultStore, write_atomically

METRIC_COLUMNS = ("perplexity", "vs original", "KL", "top-1", "bits", "time")


def summarize(name: str, outcomes: Sequence[Outcome], store: ResultStore) -> None:
    """Write the table and the report of a sweep, and show both and the way back to a trial on standard output."""
    from experiments.report import render_report

    folder = store.sweep(name)
    columns, rows = tabulate(outcomes, store)
    write_atomically(folder / "table.md", to_markdown(columns, rows))
    write_atomically(folder / "report.html", render_report(name, outcomes))
    console = Console()
    console.print(to_terminal(name, columns, rows))
    done = sum(outcome.record is not None for outcome in outcomes)
    earlier = sum(outcome.earlier for outcome in outcomes)
    failed = len(outcomes) - done
    console.print(
        f"{done} of {len(outcomes)} trials done" + (f" ({earlier} earlier)" if earlier else "")
        + (f", [bold red]{failed} failed[/]" if failed else "")
    )
    example = next((outcome for outcome in outcomes if outcome.failure), outcomes[0])
    lines = {
        "table": shown(folder / "table.md"),
        "report": shown(folder / "report.html"),
        "a trial": f"python -m experiments show {example.trial_id}" + _results_option(store),
    }
    for what, where in lines.items():
        console.print(f"  {what:8} {where}", highlight=False, soft_wrap=True)


def tabulate(outcomes: Sequence[Outcome], store: ResultStore) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text, one row a trial."""
    labels = list(dict.fromkeys(key for outcome in outcomes for key in outcome.labels))
    found = {row["trial_id"]: row for row in store.table(outcome.trial_id for outcome in outcomes)}
    rows = [
        [outcome.labels.get(key, "-") for key in labels] + _cells(outcome, found.get(outcome.trial_id))
        for outcome in outcomes
    ]
    return [*labels, *METRIC_COLUMNS, "trial"], rows


def _cells(outcome: Outcome, row: dict[str, Any] | None) -> list[str]:
    if row is None:
        reason = outcome.failure.reason if outcome.failure else "not run"
        return ["-"] * len(METRIC_COLUMNS) + [f"{outcome.trial_id} failed: {reason}"]
    original = row["metrics.perplexity_original"]
    return [
        f"{row['metrics.perplexity']:.3f}",
        f"{row['metrics.perplexity'] - original:+.3f}",
        f"{row['metrics.kl']:.4f}",
        f"{100 * row['metrics.top1']:.1f}%",
        f"{row['metrics.bits_per_weight']:.2f}",
        duration(row["seconds"]),
        outcome.trial_id,
    ]


def to_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    numeric = set(METRIC_COLUMNS)
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---:" if column in numeric else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_terminal(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table, numbers to the right."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        right = column in METRIC_COLUMNS
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*row, style="red" if " failed: " in row[-1] else None)
    return table


def shown(path: Path) -> str:
    """A path as short as it can be shown from the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _results_option(store: ResultStore) -> str:
    return "" if store.root == Path("results").absolute() else f" --results {shown(store.root)}"
