"""Running a sweep: what is not done yet is handed to a launch, and what came out is shown and written."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

from experiments import plans
from experiments.attempts import HEARTBEAT_SECONDS, Owner
from experiments.identity import hash_of
from experiments.records import Outcome
from experiments.schema import ConfigError
from experiments.standing import Follower, Standing
from experiments.store import to_json, write_atomically
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views.summary import command, summarize, write

log = logging.getLogger(__name__)

# The table and the report are written so seldom that they cost a twentieth of the time.
REFRESH_SHARE = 0.05


class SweepFailed(Exception):
    """Some trials failed, or were left undone; the summary has been shown."""


class Board:
    """A sweep's standing, with its table and report kept up to date while trials finish."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._standing = Standing(sweep, mend=True)
        self._next = 0.0

    def look(self) -> list[Outcome]:
        """Every trial as it stands now."""
        return self._standing.look()

    def refresh(self) -> None:
        """Write the table and the report, unless that was done a moment ago."""
        started = time.monotonic()
        if started < self._next:
            return
        write(self.sweep.name, self.look(), self.sweep.store)
        self._next = time.monotonic() + (time.monotonic() - started) / REFRESH_SHARE


class Launch(Protocol):
    """A way to run trials; `settings` is the launcher's config node, kept in the plan."""

    settings: dict[str, Any]

    def check(self, sweep: Sweep) -> None:
        """Raise `ConfigError` when trials cannot be launched in this way here."""

    def __call__(self, pending: Sequence[Trial], board: Board) -> None:
        """Run the trials, or see to it that they are run; the board is refreshed as they finish."""


def run(sweep: Sweep, launch: Launch) -> list[Outcome]:
    """Run the trials that are not done, then show and write the summary; raises `SweepFailed` unless all are done.

    The table and the report are written as trials finish, so that an interrupt leaves those of what is finished.
    """
    sweep.store.check_writable()
    board = Board(sweep)
    outcomes = board.look()
    done = {outcome.trial_id for outcome in outcomes if outcome.result}
    pending = by_original([trial for trial in sweep.trials if trial.trial_id not in done])
    _check_left_out(sweep)
    if pending:
        launch.check(sweep)
    plans.save(sweep, launch.settings)
    (sweep.store.sweep(sweep.name) / "cancelled").unlink(missing_ok=True)
    log.info("%d of %d trials already done", len(done), len(sweep.trials))
    if pending:
        with _announced(sweep):
            launch(pending, board)
        outcomes = board.look()
    summarize(sweep.name, outcomes, sweep.store)
    left_to_others = launch.settings.get("detach") or launch.settings["busy"] == "skip"
    if any(outcome.state == "failed" or (not outcome.result and not left_to_others) for outcome in outcomes):
        raise SweepFailed
    return outcomes


def _check_left_out(sweep: Sweep) -> None:
    """Raise `ConfigError` when the sweep's plan would be replaced while trials run that the new one has not."""
    if sweep.name not in plans.names(sweep.store):
        return
    try:
        before, _ = plans.load(sweep.store, sweep.name)
    except ConfigError:  # it cannot be read, and is to be replaced
        return
    kept = {trial.trial_id for trial in sweep.trials}
    dropped = tuple(trial for trial in before.trials if trial.trial_id not in kept)
    if not dropped:
        return
    statuses = Follower(replace(before, trials=dropped)).look()
    busy = [one.trial_id for one in statuses if one.state in ("running", "queued")]
    if busy:
        raise ConfigError(
            f"sweep={sweep.name}: {len(busy)} trials of the sweep of that name still run or are "
            f"queued ({', '.join(busy[:3])}) and are not in this one; choose another sweep=NAME, or first: "
            f"{command(sweep.store, 'cancel', sweep.name)}"
        )


@contextmanager
def _announced(sweep: Sweep) -> Iterator[None]:
    """While open, a file says that this process runs the sweep; written anew every few seconds."""
    owner, done = Owner.this_process(), threading.Event()
    path = plans.driver_file(sweep.store, sweep.name, owner)

    def announce() -> None:
        while True:
            with suppress(OSError):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, to_json(owner), durable=False)
            if done.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)
        with suppress(OSError):  # another driver's file is there
            path.parent.rmdir()


def by_original(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of one original model and evaluation after one another, otherwise in the order given."""
    seen: dict[str, int] = {}

    def order(trial: Trial) -> list[int]:
        return [seen.setdefault(hash_of(trial.identity[part]), len(seen)) for part in ("model", "evaluation")]

    return sorted(trials, key=order)
