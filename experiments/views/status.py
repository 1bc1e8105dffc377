"""The status of a sweep: a table for the terminal, drawn once or live, and JSON."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.standing import State, Status
from experiments.views.display import duration

ORDER: tuple[State, ...] = ("running", "failed", "stopped", "old", "queued", "done")
STYLES: dict[State, str] = {"running": "cyan", "failed": "red", "stopped": "yellow", "old": "yellow"}
STYLES |= {"queued": "dim", "done": "green"}
COLUMNS = ("trial", "", "state", "where", "time", "left", "KL", "restarts")
ALWAYS = ("trial", "", "state")
ROWS_SHOWN = 40
LINES_AROUND = 16  # of a table on a terminal: title, reasons and counts
SECONDS_BETWEEN_LOOKS = 2.0


def is_over(statuses: Sequence[Status]) -> bool:
    """Whether nothing of a sweep runs or is queued."""
    return not any(status.state in ("running", "queued") for status in statuses)


def counts(statuses: Sequence[Status]) -> str:
    """`5 of 8 trials done, 1 running, 2 queued, 1 failed`."""
    found = Counter(status.state for status in statuses)
    others = [f"{found[state]:,} {state}" for state in ORDER if state != "done" and found[state]]
    return ", ".join([f"{found['done']:,} of {len(statuses):,} trials done", *others])


def time_left(statuses: Sequence[Status]) -> float | None:
    """About the seconds that a sweep has left, if its trials take as long as those done; None while that is unknown."""
    done = [status.seconds for status in statuses if status.state == "done" and status.seconds is not None]
    running = [status.seconds or 0.0 for status in statuses if status.state == "running"]
    if not done or not running:
        return None
    queued = sum(status.state == "queued" for status in statuses)
    return (fmean(done) * queued + sum(max(fmean(done) - seconds, 0) for seconds in running)) / len(running)


def to_table(name: str, statuses: Sequence[Status], rows: int | None = ROWS_SHOWN) -> Group:
    """The table, what needs attention first; at most so many rows, all when None."""
    labels = statuses[0].labels if statuses else {}
    common = {key: value for key, value in labels.items() if _is_common(key, value, statuses)}
    ordered = sorted(statuses, key=lambda status: ORDER.index(status.state))
    shown = ordered if rows is None else ordered[:rows]
    hosts = {status.host for status in statuses if status.host}
    if len(hosts) == 1:
        common |= {"host": hosts.pop()}
    cells = [_cells(status, common) for status in shown]
    table = Table(title=_title(name, common), box=SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    table.padding = (0, 1, 0, 0)  # for narrow terminals
    kept = [i for i, column in enumerate(COLUMNS) if column in ALWAYS or any(str(row[i]) for row in cells)]
    for i in kept:
        numeric = COLUMNS[i] in ("time", "left", "KL", "restarts")
        widest = max((len(word) for row in cells for word in str(row[i]).split()), default=0)
        justify: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(COLUMNS[i], justify=justify, no_wrap=numeric, overflow="fold", min_width=widest)
    for row in cells:
        table.add_row(*(row[i] for i in kept))
    return Group(table, *_remarks(shown), *_below(statuses, ordered[len(shown) :]))


def _below(statuses: Sequence[Status], hidden: Sequence[Status]) -> list[Text]:
    """What is not shown, the counts, and the time left."""
    more = Counter(status.state for status in hidden)
    left = time_left(statuses)
    lines = [", ".join(f"{n:,} more {state}" for state, n in more.items()) + " (all: --all)"] if more else []
    return [*map(Text, lines), Text(counts(statuses) + ("" if left is None else f", about {duration(left)} left"))]


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
    fitting = max(console.height - LINES_AROUND, 5)
    rows = fitting if rows is None else min(rows, fitting)
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
    telling = {key: value for key, value in status.labels.items() if key not in common and value != "-"}
    last = Counter(key.rpartition(".")[2] for key in telling)
    short = {key: key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in telling}
    own = " ".join(value if "." not in key else f"{short[key]}={value}" for key, value in telling.items())
    progress = status.progress.replace("decoder blocks", "block").replace(" of ", "/")
    return [
        status.trial_id[:8],
        Text(own),
        Text(" ".join(filter(None, [status.state, progress])), STYLES[status.state]),
        Text(" ".join(filter(None, ["" if "host" in common else status.host, status.job]))),
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
