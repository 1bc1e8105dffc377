"""Trials one after the other in this process."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.attempts import Attempt, Attempts, Cancelled
from experiments.launch.driver import Board
from experiments.launch.settings import LocalSettings
from experiments.records import Failure, Record, now
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
                found = _run(trial, runner)
                if isinstance(found, Attempt):
                    busy.append(trial)
                board.refresh()
                if isinstance(found, Failure) and found.kind == "gpu":
                    log.error("the GPU cannot be used by this process any more; the trials that are left need another")
                    return
        if self._busy == "wait":
            wait_for(busy, board, lambda trial: not isinstance(_run(trial, runner), Attempt))


def _run(trial: Trial, runner: TrialRunner) -> Record | Failure | Attempt:
    """Run a trial, and say how it came out."""
    log.info("trial %s: %s", trial.trial_id, trial.name)
    found = runner.run(trial)
    if isinstance(found, Attempt):
        tell_busy(trial, found)
    elif isinstance(found, Record):
        log.info("trial %s: perplexity %.3f, KL %.4f", trial.trial_id, found.metrics.perplexity, found.metrics.kl)
    return found


def tell_busy(trial: Trial, attempt: Attempt) -> None:
    """Say who runs a trial that is not run twice."""
    owner = attempt.owner
    where = f"job {owner.job} on {owner.host}" if owner.job else f"process {owner.pid} on {owner.host}"
    log.info("trial %s: running already in sweep %s, %s", trial.trial_id, attempt.sweep, where)


def wait_for(busy: Sequence[Trial], board: Board, run: Callable[[Trial], bool]) -> None:
    """Wait for trials that other processes run; one whose process is gone without a result is run here.

    `run` says whether it could run a trial. Raises `Cancelled`.
    """
    store, since, waiting = board.sweep.store, now(), list(busy)
    while waiting:
        if (store.sweep(board.sweep.name) / "cancelled").exists():
            raise Cancelled
        for trial in list(waiting):
            if Attempts(store, trial.trial_id).running():
                continue
            failure = store.failure(trial.trial_id)
            theirs = failure is not None and failure.failed_at >= since
            if theirs or store.finished(trial.trial_id) or run(trial):
                waiting.remove(trial)
                board.refresh()
        if waiting:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def check_device(device: str) -> None:
    """Raise `ConfigError` for a GPU that is not there; torch is imported only to look for one."""
    if device.startswith("cuda"):
        from experiments.environment import resolve_device

        resolve_device(device)
