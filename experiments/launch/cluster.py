"""Trials as SLURM jobs: submitted, then followed until they are over, or left to themselves."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.attempts import Attempts
from experiments.failures import Kind, may_go_on
from experiments.launch import slurm
from experiments.launch.driver import Board
from experiments.launch.local import tell_busy
from experiments.launch.pool import record_failure
from experiments.launch.settings import SlurmSettings
from experiments.standing import ALIVE, Follower, Status, job_states
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views import status as view

log = logging.getLogger(__name__)

# How SLURM ends jobs through no fault of the trial.
MISFORTUNES = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "COMPLETED")  # the last: its trial was running elsewhere
KINDS: dict[str, Kind] = {"OUT_OF_MEMORY": "out of memory", "TIMEOUT": "time", "DEADLINE": "time"}
MAX_JOBS_A_TRIAL = 5
# A job's end may be seen before the files that it wrote last.
LAG_SECONDS = 10.0


class SlurmLaunch:
    """Submits a job for each trial that has none; without `detach`, follows them and submits lost ones again."""

    def __init__(self, settings: SlurmSettings) -> None:
        self.settings: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
        self._own = settings
        self._stopped_since: dict[str, float] = {}

    def check(self, sweep: Sweep) -> None:
        """Raise `ConfigError` for a SLURM that cannot be used from here."""
        slurm.check_available()

    def __call__(self, pending: Sequence[Trial], board: Board) -> None:
        """Have the trials run."""
        sweep = board.sweep
        self._submit(sweep, self._without_job(sweep, pending))
        if self._own.detach:
            print(f"follow it with: python -m experiments status {sweep.name} (or wait, logs, cancel, retry)")
            return
        follower = Follower(sweep)

        def look() -> list[Status]:
            statuses = follower.look()
            self._mend(sweep, statuses)
            board.refresh()
            return [replace(one, state="queued") if one.trial_id in self._stopped_since else one for one in statuses]

        try:
            view.watch(sweep.name, look, view.ROWS_SHOWN)
        except KeyboardInterrupt:
            print(f"the jobs go on without this process; to end them: python -m experiments cancel {sweep.name}")
            raise

    def _without_job(self, sweep: Sweep, pending: Sequence[Trial]) -> list[Trial]:
        """The trials that no process runs and no job of this sweep will."""
        jobs = job_states(sweep.store, sweep.name, [trial.trial_id for trial in pending])
        wanted = []
        for trial in pending:
            running, job = Attempts(sweep.store, trial.trial_id).running(), jobs.get(trial.trial_id)
            if running:
                tell_busy(trial, running)
            elif job and job.state in ALIVE:
                log.info("trial %s: job %s is %s", trial.trial_id, job.job_id, job.state.lower())
            else:
                wanted.append(trial)
        return wanted

    def _submit(self, sweep: Sweep, trials: Sequence[Trial]) -> None:
        folder = sweep.store.sweep(sweep.name)
        for trial in trials:  # what failed before is to be tried anew
            (sweep.store.trial(trial.trial_id) / "failure.json").unlink(missing_ok=True)
        jobs = slurm.submit(sweep.name, folder, [trial.trial_id for trial in trials], self._own)
        arrays = Counter(job.job_id.partition("_")[0] for job in jobs)
        for array, count in arrays.items():
            log.info("job array %s: %d trials, at most %d at once", array, count, self._own.array_parallelism)

    def _mend(self, sweep: Sweep, statuses: Sequence[Status]) -> None:
        """Submit again what a node or memory took, and record what ended otherwise."""
        stopped = {one.trial_id: one for one in statuses if one.state == "stopped"}
        clock = time.monotonic()
        self._stopped_since = {trial_id: self._stopped_since.get(trial_id, clock) for trial_id in stopped}
        settled = {trial_id for trial_id, since in self._stopped_since.items() if clock - since >= LAG_SECONDS}
        ended = [trial for trial in sweep.trials if trial.trial_id in settled]
        again = [trial for trial in ended if self._ended(sweep, trial, stopped[trial.trial_id])]
        if again:
            self._submit(sweep, again)

    def _ended(self, sweep: Sweep, trial: Trial, status: Status) -> bool:
        """Record how a trial's job ended; whether the trial is to have another."""
        state = _end_of_job(sweep, trial.trial_id)
        attempts = Attempts(sweep.store, trial.trial_id)
        kind = KINDS.get(state, "crash")
        if kind == "out of memory" and attempts.all():
            attempts.close(attempts.all()[-1].number, "out of memory", status.reason)
        had = sum(trial.trial_id in one.jobs.values() for one in slurm.submissions(sweep.store.sweep(sweep.name)))
        excused = state in MISFORTUNES or (kind == "out of memory" and may_go_on(attempts.since_failure()))
        if excused and had < MAX_JOBS_A_TRIAL:
            log.warning("trial %s: %s; submitted again", trial.trial_id, status.reason)
            return True
        record_failure(sweep.store, sweep.name, trial, kind, status.reason)
        return False


def _end_of_job(sweep: Sweep, trial_id: str) -> str:
    """SLURM's word for how a trial's last job ended; where that is as good as none, what the job's log has."""
    folder = sweep.store.sweep(sweep.name)
    job = slurm.job_of_trial(folder)[trial_id]
    return slurm.ended_as(folder, job) or job_states(sweep.store, sweep.name, [trial_id])[trial_id].state
