"""The status of a sweep: a table for the terminal, drawn once or live, and JSON."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.standing import State, Status
from experiments.views.display import duration

ORDER: tuple[State, ...] = ("running", "failed", "stopped", "queued", "done")
STYLES: dict[State, str] = {"running": "cyan", "failed": "red", "stopped": "yellow", "queued": "dim", "done": "green"}
ROWS_SHOWN = 40
SECONDS_BETWEEN_LOOKS = 2.0


def is_over(statuses: Sequence[Status]) -> bool:
    """Whether nothing of a sweep runs or is queued."""
    return not any(status.state in ("running", "queued") for status in statuses)


def counts(statuses: Sequence[Status]) -> str:
    """`5 of 8 trials done, 1 running, 2 queued, 1 failed`."""
    found = Counter(status.state for status in statuses)
    others = [f"{found[state]:,} {state}" for state in ORDER if state != "done" and found[state]]
    return ", ".join([f"{found['done']:,} of {len(statuses):,} trials done", *others])


def to_table(name: str, statuses: Sequence[Status], rows: int | None = ROWS_SHOWN) -> Group:
    """The table, what needs attention first; at most so many rows, all when None."""
    labels = statuses[0].labels if statuses else {}
    common = {key: value for key, value in labels.items() if _is_common(key, value, statuses)}
    table = Table(title=_title(name, common), box=SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    for column in ("trial", "", "state", "where", "time", "left", "KL", "again"):
        table.add_column(column, justify="right" if column in ("time", "left", "KL", "again") else "left")
    ordered = sorted(statuses, key=lambda status: ORDER.index(status.state))
    shown = ordered if rows is None else ordered[:rows]
    for status in shown:
        table.add_row(*_cells(status, common))
    hidden = Counter(status.state for status in ordered[len(shown) :])
    below = [Text(counts(statuses))]
    if hidden:
        below.insert(0, Text(", ".join(f"{n:,} more {state}" for state, n in hidden.items()) + " (all: --all)"))
    return Group(table, *_remarks(shown), *below)


def to_json(name: str, statuses: Sequence[Status]) -> str:
    """The statuses as JSON."""
    found = Counter(status.state for status in statuses)
    content = {"sweep": name, "counts": dict(found), "trials": [status.to_json() for status in statuses]}
    return json.dumps(content, indent=2)


def watch(name: str, look: Callable[[], list[Status]], rows: int | None) -> list[Status]:
    """Draw the table anew every few seconds, until the sweep is over; without a terminal, lines when counts change."""
    console = Console()
    statuses = look()
    if not console.is_terminal:
        told = ""
        while True:
            told = _tell(statuses, told)
            if is_over(statuses):
                return statuses
            time.sleep(SECONDS_BETWEEN_LOOKS)
            statuses = look()
    with Live(to_table(name, statuses, rows), console=console, auto_refresh=False) as live:
        while not is_over(statuses):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            statuses = look()
            live.update(to_table(name, statuses, rows), refresh=True)
    return statuses


def _tell(statuses: Sequence[Status], told: str) -> str:
    text = counts(statuses)
    if text != told:
        print(text, flush=True)
    return text


def _title(name: str, common: dict[str, str]) -> str:
    return escape(name) + "".join(f"\n[dim]{key}[/] {escape(value)}" for key, value in common.items())


def _is_common(key: str, value: str, statuses: Sequence[Status]) -> bool:
    return len(statuses) > 1 and all(status.labels.get(key) == value for status in statuses)


def _cells(status: Status, common: dict[str, str]) -> list[str | Text]:
    own = " ".join(
        value if "." not in key else f"{key}={value}"
        for key, value in status.labels.items()
        if key not in common and value != "-"
    )
    return [
        status.trial_id[:8],
        Text(own),
        Text(" ".join(filter(None, [status.state, status.progress])), STYLES[status.state]),
        Text(" ".join(filter(None, [status.host, status.job]))),
        "" if status.seconds is None else duration(status.seconds),
        "" if status.left is None else duration(status.left),
        "" if status.kl is None else f"{status.kl:.4f}",
        str(status.interruptions) if status.interruptions else "",
    ]


def _remarks(statuses: Sequence[Status]) -> list[Text]:
    """Why trials failed, stopped or wait, once a reason, and what can be done."""
    found: dict[tuple[State, str, str], list[str]] = {}
    for status in statuses:
        if status.reason:
            found.setdefault((status.state, status.reason, status.advice), []).append(status.trial_id[:8])
    lines = []
    for (state, reason, advice), trials in found.items():
        which = ", ".join(trials[:3]) + (f" and {len(trials) - 3} more" if len(trials) > 3 else "")
        lines.append(Text.assemble((f"{which}: ", "bold"), (reason, STYLES[state]), f"\n  {advice}" if advice else ""))
    return [*lines, Text()] if lines else []
