"""What a trial's log and record keep of what is said while it runs, and an error in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REASON_LENGTH = 240


def one_line(error: BaseException) -> str:
    """An error's message with its lines joined, cut where it gets long; the error's type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0] if len(lines[0]) <= REASON_LENGTH else f"{lines[0][: REASON_LENGTH - 1]}…"
    text, kept = first, 1
    while kept < len(lines) and len(text) + 2 + len(lines[kept]) <= REASON_LENGTH:
        text, kept = f"{text}; {lines[kept]}", kept + 1
    left = len(lines) - kept
    return f"{text} (+{left} more line{'s' if left > 1 else ''})" if left else text


class _Warnings(logging.Handler):
    """Keeps this project's own warnings, each once; those of a tracker are not about the result."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        own = record.name.partition(".")[0] in ("wush", "experiments") and record.name != "experiments.tracking"
        if own and record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())


@contextmanager
def logged(path: Path, warnings: list[str]) -> Iterator[None]:
    """While open, log lines also go to a file, and the messages of warnings to a list."""
    handlers = (logging.FileHandler(path, encoding="utf-8"), _Warnings(warnings))
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
