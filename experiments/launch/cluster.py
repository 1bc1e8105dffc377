"""Trials as SLURM jobs: submitted, then followed until they are over, or left to themselves."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from experiments.attempts import Attempts, Cancelled
from experiments.failures import Kind, may_go_on
from experiments.launch import slurm, submitted
from experiments.launch.driver import Board
from experiments.launch.jobs import SILENT, JobState
from experiments.launch.local import tell_busy
from experiments.launch.pool import record_failure
from experiments.launch.settings import SlurmSettings
from experiments.records import Failure
from experiments.standing import ALIVE, Follower, Status, job_states
from experiments.store import ResultStore
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views import status as view

log = logging.getLogger(__name__)

# How SLURM ends jobs through no fault of the trial.
MISFORTUNES = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "COMPLETED")  # the last: its trial was running elsewhere
KINDS: dict[str, Kind] = {"OUT_OF_MEMORY": "out of memory", "TIMEOUT": "time", "DEADLINE": "time"}
MAX_JOBS_A_TRIAL = 5
MENDING = ".mending"  # held by the process that decides what becomes of a sweep's trials
# A job's end may be seen before the files that it wrote last: NFS clients keep what they know of a file for a minute.
LAG_SECONDS, LOCAL_LAG_SECONDS = 60.0, 5.0
LOCAL_FILE_SYSTEMS = {"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"}
MAX_REFUSALS, SECONDS_AFTER_REFUSAL = 5, 30.0
SECONDS_TO_CANCEL = 30.0


class SlurmLaunch:
    """Submits a job for each trial that has none; without `detach`, follows them and submits lost ones again."""

    def __init__(self, settings: SlurmSettings) -> None:
        self.settings: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
        self._own = settings
        self._cancelled_since: float | None = None

    def check(self, sweep: Sweep) -> None:
        """Raise `ConfigError` for a SLURM that cannot be used from here."""
        slurm.check_available()

    def __call__(self, pending: Sequence[Trial], board: Board) -> None:
        """Have the trials run; raises `Cancelled` when the sweep is cancelled meanwhile."""
        sweep = board.sweep
        busy = self._submit_the_rest(sweep, pending)
        if self._own.detach:
            print(f"follow it with: python -m experiments status {sweep.name} (or wait, logs, cancel, retry)")
            return
        skipped = busy if self._own.busy == "skip" else set()
        followed = tuple(trial for trial in sweep.trials if trial.trial_id not in skipped)
        mender = Mender(replace(sweep, trials=followed), self._own)

        def look() -> list[Status]:
            statuses = mender.look()
            board.refresh()
            self._check_cancelled(mender, statuses)
            return statuses

        try:
            view.watch(sweep.name, look, view.ROWS_SHOWN)
        except KeyboardInterrupt:
            print(f"the jobs go on without this process; to end them: python -m experiments cancel {sweep.name}")
            raise

    def _submit_the_rest(self, sweep: Sweep, pending: Sequence[Trial]) -> set[str]:
        """Submit the trials that nothing runs or will run; those that run outside of this sweep's jobs."""
        folder, wanted, busy = sweep.store.sweep(sweep.name), [], set()
        with submitted.locked(folder, MENDING):
            slurm.adopt(folder)
            jobs = _jobs_at_rest(sweep, pending)
            for trial in pending:
                running, job = Attempts(sweep.store, trial.trial_id).running(), jobs.get(trial.trial_id)
                if job and job.state in (*ALIVE, SILENT):
                    log.info("trial %s: job %s is %s", trial.trial_id, job.job_id, job.state.lower())
                elif running:
                    tell_busy(trial, running)
                    busy.add(trial.trial_id)
                else:
                    wanted.append(trial)
            submit(sweep, wanted, self._own)
        if busy:
            log.info("%d trials are %s", len(busy), "skipped" if self._own.busy == "skip" else "waited for")
        return busy

    def _check_cancelled(self, mender: "Mender", statuses: Sequence[Status]) -> None:
        """Raise `Cancelled` once the jobs of a cancelled sweep are over, or do not end in time."""
        if not mender.cancelled or all(one.state in ("done", "failed") for one in statuses):
            return
        clock = time.monotonic()
        self._cancelled_since = self._cancelled_since or clock
        left = [job.job_id for job in mender.jobs.values() if job.state in (*ALIVE, SILENT)]
        if left and clock - self._cancelled_since < SECONDS_TO_CANCEL:
            return
        if left:
            log.warning("cancelled, but %d jobs have not ended yet: %s ...", len(left), left[0])
        mender.close_attempts()
        raise Cancelled


class Mender:
    """Looks at a submitted sweep, and sees to it that each trial comes to an end: with a result, or with a reason.

    What a node or memory took is submitted again, also a trial whose process elsewhere is gone, unless those are to be
    skipped; what ended otherwise is recorded. Any number of processes may do so at once.
    """

    def __init__(self, sweep: Sweep, settings: SlurmSettings) -> None:
        self.sweep, self._settings = sweep, settings
        self._folder = sweep.store.sweep(sweep.name)
        self._follower = Follower(sweep)
        self._lag = lag_seconds(self._folder)
        self._ended_since: dict[str, float] = {}
        self._refusals, self._not_before = 0, 0.0
        self._silent = False

    @property
    def jobs(self) -> dict[str, JobState]:
        """The jobs of the trials that are not done, as of the last look."""
        return self._follower.jobs

    @property
    def cancelled(self) -> bool:
        """Whether the user cancelled the sweep."""
        return (self._folder / "cancelled").exists()

    def look(self) -> list[Status]:
        """Every trial's status now; one that may be submitted again, or of which files are awaited, is queued."""
        with submitted.locked(self._folder, MENDING):
            slurm.adopt(self._folder)
            statuses = self._follower.look()
            self._tell_silence()
            self._mend(statuses)
        return [replace(one, state="queued") if one.trial_id in self._ended_since else one for one in statuses]

    def close_attempts(self) -> None:
        """Write the attempts of this sweep that its ended jobs left open as cancelled."""
        for trial in self.sweep.trials:
            attempts, job = Attempts(self.sweep.store, trial.trial_id), self.jobs.get(trial.trial_id)
            last = next(reversed(attempts.all()), None)
            if last is None or last.end is not None or last.sweep != self.sweep.name:
                continue
            ended = job is not None and job.state not in (*ALIVE, SILENT) and last.owner.job == job.job_id
            if ended or attempts.running() is None:
                attempts.close(last.number, "cancelled", "cancelled")

    def _tell_silence(self) -> None:
        """Say once that SLURM does not answer, and that it does again."""
        reason = next((job.reason for job in self.jobs.values() if job.state == SILENT), None)
        if reason and not self._silent:
            log.warning("%s; running jobs go on, and this waits until SLURM answers", reason)
        elif self._silent and not reason:
            log.info("SLURM answers again")
        self._silent = reason is not None

    def _mend(self, statuses: Sequence[Status]) -> None:
        """Submit again or record what ended without a result, once its last files must have come."""
        clock, mended = time.monotonic(), not self.cancelled
        ended = {one.trial_id: one for one in statuses if mended and self._has_ended(one)}
        self._ended_since = {trial_id: self._ended_since.get(trial_id, clock) for trial_id in ended}
        settled = {trial_id for trial_id, since in self._ended_since.items() if clock - since >= self._lag}
        if not settled or clock < self._not_before:
            return
        known = submitted.submissions(self._folder)
        again = [
            trial
            for trial in self.sweep.trials
            if trial.trial_id in settled and self._is_to_go_on(trial, ended[trial.trial_id], known)
        ]
        if again:
            self._submit_again(again)

    def _has_ended(self, status: Status) -> bool:
        """Whether nothing runs the trial; one without a job of this sweep counts if it is to be waited for."""
        if status.trial_id in self.jobs:
            return status.state == "stopped"
        return self._settings.busy == "wait" and status.state in ("stopped", "queued")

    def _is_to_go_on(self, trial: Trial, status: Status, known: Sequence[submitted.Submission]) -> bool:
        """Whether a trial that ended without a result is to have another job; if not, there is a reason on record."""
        store, attempts = self.sweep.store, Attempts(self.sweep.store, trial.trial_id)
        job, own = self.jobs.get(trial.trial_id), [one for one in known if trial.trial_id in one.jobs.values()]
        failure = store.failure(trial.trial_id)
        if store.finished(trial.trial_id) or attempts.running():  # seen late
            return False
        if job is None or not own:
            return failure is None
        if failure and failure.failed_at >= (job.started_at or own[-1].submitted_at).replace(microsecond=0):
            return False
        last = next(reversed(attempts.all()), None)
        if last and last.owner.job != job.job_id and last.started_at > own[-1].submitted_at:
            return True  # it was running elsewhere since, and that process is gone
        state = submitted.ended_as(self._folder, job.job_id) or job.state
        kind = KINDS.get(state, "crash")
        if kind == "out of memory" and last:
            attempts.close(last.number, "out of memory", status.reason)
        excused = state in MISFORTUNES or (kind == "out of memory" and may_go_on(attempts.since_failure()))
        if excused and len(own) < MAX_JOBS_A_TRIAL:
            log.warning("trial %s: %s; to be submitted again", trial.trial_id, status.reason)
            return True
        record_failure(store, self.sweep.name, trial, kind, status.reason, host=job.node)
        return False

    def _submit_again(self, trials: Sequence[Trial]) -> None:
        """Submit, now or at a later look; trials that sbatch refuses again and again have failed."""
        try:
            submit(self.sweep, trials, self._settings)
            self._refusals = 0
        except slurm.SubmissionError as error:
            self._refusals += 1
            self._not_before = time.monotonic() + SECONDS_AFTER_REFUSAL
            taken = {job.trial_id for job in error.submitted}
            left = [trial for trial in trials if trial.trial_id not in taken]
            if self._refusals < MAX_REFUSALS:
                log.warning("%s; tried again in %.0f s", error, SECONDS_AFTER_REFUSAL)
                return
            self._refusals = 0
            for trial in left:
                record_failure(self.sweep.store, self.sweep.name, trial, "error", str(error))


def looks_of(sweep: Sweep, settings: SlurmSettings) -> Callable[[], list[Status]]:
    """How to look at a submitted sweep while waiting for it: mending it if it is the user's own, else only reading."""
    folder = sweep.store.sweep(sweep.name)
    own = (folder / "plan.json").stat().st_uid == os.geteuid() and os.access(folder, os.W_OK)
    return Mender(sweep, settings).look if own else Follower(sweep).look


def submit(sweep: Sweep, trials: Sequence[Trial], settings: SlurmSettings) -> None:
    """Submit trials, and forget why those that SLURM takes failed before; raises `SubmissionError`."""
    before = {trial.trial_id: sweep.store.failure(trial.trial_id) for trial in trials}
    try:
        jobs = slurm.submit(sweep.name, sweep.store.sweep(sweep.name), list(before), settings)
    except slurm.SubmissionError as error:
        _forget(sweep.store, before, error.submitted)
        raise
    _forget(sweep.store, before, jobs)
    for array, count in Counter(job.job_id.partition("_")[0] for job in jobs).items():
        log.info("job array %s: %d trials, at most %d at once", array, count, settings.array_parallelism)


def lag_seconds(folder: Path) -> float:
    """How long what another machine writes may not be seen here."""
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    own = next((mounts[path] for path in (folder, *folder.resolve().parents) if path in mounts), "")
    return LOCAL_LAG_SECONDS if own in LOCAL_FILE_SYSTEMS else LAG_SECONDS


def _jobs_at_rest(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, JobState]:
    """The trials' jobs, once those that are ending have ended, as those of a sweep that was cancelled just now."""
    deadline = time.monotonic() + SECONDS_TO_CANCEL
    while True:
        jobs = job_states(sweep.store, sweep.name, [trial.trial_id for trial in trials])
        if time.monotonic() > deadline or not any(job.state == "COMPLETING" for job in jobs.values()):
            return jobs
        time.sleep(1)


def _forget(store: ResultStore, before: dict[str, Failure | None], jobs: Sequence[slurm.Job]) -> None:
    for job in jobs:
        old = before[job.trial_id]
        if old is not None and store.failure(job.trial_id) == old:  # a quick job may have failed anew
            (store.trial(job.trial_id) / "failure.json").unlink(missing_ok=True)
