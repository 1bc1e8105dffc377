"""Trials one after the other in this process."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.attempts import Attempt, Attempts
from experiments.launch.driver import Board
from experiments.launch.settings import LocalSettings
from experiments.records import Record, now
from experiments.store import ResultStore
from experiments.sweep import Sweep
from experiments.trial import Trial, TrialRunner
from experiments.views.display import showing

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0


class LocalLaunch:
    """Runs each trial in turn; those that another process is running come last, and are waited for or skipped."""

    def __init__(self, settings: LocalSettings) -> None:
        self.settings: dict[str, Any] = settings.model_dump(by_alias=True)
        self._busy = settings.busy

    def check(self, sweep: Sweep) -> None:
        """Raise `ConfigError` for a GPU that is not there."""
        check_device(sweep.trials[0].config["device"])

    def __call__(self, pending: Sequence[Trial], board: Board) -> None:
        """Run the trials."""
        from hydra.utils import instantiate

        sweep, busy = board.sweep, []
        tracking = instantiate(sweep.trials[0].config["tracking"])
        with showing(sweep.progress) as progress:
            runner = TrialRunner(sweep.store, sweep.name, tracking, progress)
            for trial in progress.track(pending, "trials", len(pending)):
                if not _run(trial, runner):
                    busy.append(trial)
                board.refresh()
        if self._busy == "wait":
            wait_for(busy, sweep.store, lambda trial: _run(trial, runner), board.refresh)


def _run(trial: Trial, runner: TrialRunner) -> bool:
    """Run a trial; False when another process is running it."""
    log.info("trial %s: %s", trial.trial_id, trial.name)
    found = runner.run(trial)
    if isinstance(found, Attempt):
        tell_busy(trial, found)
        return False
    if isinstance(found, Record):
        log.info("trial %s: perplexity %.3f, KL %.4f", trial.trial_id, found.metrics.perplexity, found.metrics.kl)
    return True


def tell_busy(trial: Trial, attempt: Attempt) -> None:
    """Say who runs a trial that is not run twice."""
    owner = attempt.owner
    where = f"job {owner.job} on {owner.host}" if owner.job else f"process {owner.pid} on {owner.host}"
    log.info("trial %s: running already in sweep %s, %s", trial.trial_id, attempt.sweep, where)


def wait_for(
    busy: Sequence[Trial], store: ResultStore, run: Callable[[Trial], bool], refresh: Callable[[], None]
) -> None:
    """Wait for trials that other processes run; one whose process is gone without a result is run here."""
    since, waiting = now(), list(busy)
    while waiting:
        for trial in list(waiting):
            if Attempts(store, trial.trial_id).running():
                continue
            failure = store.failure(trial.trial_id)
            theirs = failure is not None and failure.failed_at >= since
            if theirs or store.finished(trial.trial_id) or run(trial):
                waiting.remove(trial)
                refresh()
        if waiting:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def check_device(device: str) -> None:
    """Raise `ConfigError` for a GPU that is not there; torch is imported only to look for one."""
    if device.startswith("cuda"):
        from experiments.environment import resolve_device

        resolve_device(device)
