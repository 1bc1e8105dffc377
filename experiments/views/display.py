"""Progress as a user sees it: rich bars on a terminal, plain lines elsewhere, or nothing."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from wush.progress import Progress, Silent

T = TypeVar("T")
log = logging.getLogger(__name__)
console = Console(stderr=True)

WIDTH_OF_A_FILE = 160
SECONDS_BETWEEN_LINES = 20.0
SECONDS_WORTH_A_LINE = 5.0


class Bars:
    """Nested bars, one for each loop that is running, with the time left and what is being worked on."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._running: list[TaskID] = []

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        task = self._bars.add_task("  " * len(self._running) + what, total=total, detail="")
        self._running.append(task)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._running.remove(task)
            self._bars.remove_task(task)

    def detail(self, text: str) -> None:
        self._bars.update(self._running[-1], detail=text)


class Lines:
    """A log line at the end of each loop that took a while, and every so often in between."""

    def __init__(self) -> None:
        self._detail = ""

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        started = last = time.monotonic()
        self._detail = ""
        for done, item in enumerate(items):
            if done and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                left = (last - started) / done * (total - done)
                log.info("%s: %d of %d, about %s left%s", what, done, total, duration(left), self._detail)
            yield item
        self._detail = ""
        if time.monotonic() - started >= SECONDS_WORTH_A_LINE:
            log.info("%s: %d of %d in %s", what, total, total, duration(time.monotonic() - started))

    def detail(self, text: str) -> None:
        self._detail = f" ({text})"


@contextmanager
def showing(kind: Literal["auto", "bars", "lines", "none"]) -> Iterator[Progress]:
    """Progress of the kind asked for; `auto` is bars on a terminal, else lines."""
    if kind == "auto":
        kind = "bars" if console.is_terminal else "lines"
    if kind != "bars":
        yield Lines() if kind == "lines" else Silent()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with RichProgress(*columns, console=console, transient=True) as bars:
        yield Bars(bars)


def on_stdout() -> Console:
    """A console on standard output: as wide as the terminal, and wide enough for tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_A_FILE)


def log_to_console() -> None:
    """Show this project's log lines, and everyone's warnings, on standard error."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=True, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("wush", "experiments"):
        logging.getLogger(name).setLevel(logging.INFO)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
