"""A worker process: runs the trials that its parent sends, one at a time, until its standard input ends.

In: a line of JSON a trial. Out: a line of JSON for each trial, and for each warning meanwhile. What libraries print
goes to standard error. A parent that dies closes the input, and the worker ends at once: no trial runs unwatched.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO

from experiments.attempts import Attempt, Cancelled
from experiments.records import Failure, Record
from experiments.store import ResultStore
from experiments.trial import GpuLost, Trial, TrialRunner
from experiments.views.display import log_to_console, showing

_answering = threading.Lock()


def main() -> None:
    """Serve the parent."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    log_to_console()
    logging.getLogger().addHandler(_ToParent(answers))
    signal.signal(signal.SIGTERM, _interrupt)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, requests), daemon=True).start()
    try:
        _serve(requests, answers)
    except KeyboardInterrupt:  # told to end
        os._exit(0)


class _ToParent(logging.Handler):
    """Hands warnings, and what a tracker says, to the parent, which shows them to the user."""

    def __init__(self, answers: TextIO) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.name == "experiments.tracking":
            _answer(self._answers, {"log": record.getMessage(), "level": record.levelno})


def _serve(requests: "queue.Queue[str]", answers: TextIO) -> None:
    runners: dict[str, TrialRunner] = {}
    while request := requests.get():
        message = json.loads(request)
        trial = Trial(**message["trial"])
        key = json.dumps([message["root"], message["sweep"], trial.config["tracking"]])
        runner = runners.get(key) or runners.setdefault(key, _runner(message, trial))
        answer = _run(runner, trial)
        _answer(answers, answer)
        if answer["ends"]:
            raise KeyboardInterrupt


def _runner(message: dict[str, Any], trial: Trial) -> TrialRunner:
    from hydra.utils import instantiate

    with showing("lines") as progress:
        return TrialRunner(
            ResultStore(message["root"]), message["sweep"], instantiate(trial.config["tracking"]), progress, True
        )


def _run(runner: TrialRunner, trial: Trial) -> dict[str, Any]:
    """How a trial came out, in a line; `ends` when this process is of no more use."""
    try:
        found = runner.run(trial)
    except KeyboardInterrupt:
        return {"state": "interrupted", "ends": True}
    except GpuLost:
        return {"state": "again", "ends": True}
    except Cancelled:
        return {"state": "cancelled", "ends": False}
    state = {Record: "done", Failure: "failed", Attempt: "busy"}[type(found)]
    return {"state": state, "ends": isinstance(found, Failure) and found.kind == "gpu"}


def _listen(stdin: TextIO, requests: queue.Queue[str]) -> None:
    for line in stdin:
        requests.put(line)
    os._exit(0)


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    with _answering:  # threads answer too
        answers.write(json.dumps(message) + "\n")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
