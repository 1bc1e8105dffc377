"""Running a sweep from this process: the trials not done yet, one after the other, and what came out."""

import logging
import shlex
import sys
from collections.abc import Sequence

from experiments.identity import hash_of
from experiments.records import Failure, Outcome, Record
from experiments.store import to_json, write_atomically
from experiments.sweep import Sweep
from experiments.trial import Trial, TrialRunner
from experiments.views.display import showing
from experiments.views.summary import summarize, write

log = logging.getLogger(__name__)


class SweepFailed(Exception):
    """Some trials failed; the summary has been shown."""


def run(sweep: Sweep) -> list[Outcome]:
    """Run the trials that are not done, then show and write the summary; raises `SweepFailed` if any failed.

    The table and the report are written after every trial, so that an interrupt leaves those of what is finished.
    """
    from hydra.utils import instantiate

    sweep.store.check_writable()
    outcomes = {trial.trial_id: _outcome(trial, sweep.store.finished(trial.trial_id), True) for trial in sweep.trials}
    pending = _by_original([trial for trial in sweep.trials if outcomes[trial.trial_id].record is None])
    if pending:
        _check_device(pending[0].config["device"])
    _write_plan(sweep)
    tracking = instantiate(sweep.trials[0].config["tracking"])
    for outcome in outcomes.values():
        if outcome.record:
            tracking.skip(outcome.trial_id)
    log.info("%d of %d trials already done", len(sweep.trials) - len(pending), len(sweep.trials))
    if pending:
        with showing(sweep.progress) as progress:
            runner = TrialRunner(sweep.store, sweep.name, tracking, progress)
            for trial in progress.track(pending, "trials", len(pending)):
                outcomes[trial.trial_id] = _outcome(trial, _run_unless_done(trial, runner), False)
                write(sweep.name, list(outcomes.values()), sweep.store)
    summarize(sweep.name, list(outcomes.values()), sweep.store)
    if any(outcome.failure for outcome in outcomes.values()):
        raise SweepFailed
    return list(outcomes.values())


def _by_original(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of one original model and evaluation after one another, otherwise in the order given."""
    seen: dict[str, int] = {}

    def order(trial: Trial) -> list[int]:
        return [seen.setdefault(hash_of(trial.identity[part]), len(seen)) for part in ("model", "evaluation")]

    return sorted(trials, key=order)


def _check_device(device: str) -> None:
    """Raise `ConfigError` for a GPU that is not there; torch is imported only to look for one."""
    if device.startswith("cuda"):
        from experiments.environment import resolve_device

        resolve_device(device)


def _run_unless_done(trial: Trial, runner: TrialRunner) -> Record | Failure:
    """The trial's result; that of another process, if one has finished the trial since the sweep began."""
    record = runner.store.finished(trial.trial_id)
    if record is not None:
        log.info("trial %s: another process has finished it meanwhile", trial.trial_id)
        runner.tracking.skip(trial.trial_id)
        return record
    log.info("trial %s: %s", trial.trial_id, trial.name)
    result = runner.run(trial)
    if isinstance(result, Record):
        log.info("trial %s: perplexity %.3f, KL %.4f", trial.trial_id, result.metrics.perplexity, result.metrics.kl)
    return result


def _outcome(trial: Trial, found: Record | Failure | None, earlier: bool) -> Outcome:
    return Outcome(
        trial_id=trial.trial_id,
        name=trial.name,
        labels=trial.labels,
        record=found if isinstance(found, Record) else None,
        failure=found if isinstance(found, Failure) else None,
        earlier=earlier and found is not None,
        config=trial.config,
        environment=found.environment if found else {},
    )


def _write_plan(sweep: Sweep) -> None:
    folder = sweep.store.sweep(sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    trials = [
        {"trial_id": trial.trial_id, "name": trial.name, "labels": trial.labels, "config": trial.config}
        for trial in sweep.trials
    ]
    command = shlex.join(["python", *sys.argv])
    write_atomically(folder / "plan.json", to_json({"sweep": sweep.name, "command": command, "trials": trials}))
