"""How the trials of a sweep stand, read from the store and the cluster: no driver needs to run, no file is changed."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from experiments import plans
from experiments.attempts import Attempt, Attempts
from experiments.launch.jobs import SILENT, JobState, states, why_waiting
from experiments.launch.submitted import ended_as, job_of_trial
from experiments.records import Failure, Outcome, Result
from experiments.store import ResultStore
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views.display import duration
from wush.version import METHOD_VERSION

State = Literal["queued", "running", "done", "old", "failed", "stopped"]
RETRY = "retry goes on from what is saved"
# SLURM's words for jobs that wait, run, or are about to.
ALIVE = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)


class Standing:
    """The outcomes of a sweep's trials, look after look; what is done once is not read again."""

    def __init__(self, sweep: Sweep, mend: bool = False) -> None:
        """`mend`: move damaged records aside, so that their trials count as not run."""
        self._sweep, self._mend = sweep, mend
        self._done: dict[str, Result] = {}
        self._earlier: set[str] | None = None

    def look(self) -> list[Outcome]:
        """Every trial as it stands now, in the sweep's order; those done at the first look count as earlier."""
        missing = [trial.trial_id for trial in self._sweep.trials if trial.trial_id not in self._done]
        self._done |= self._sweep.store.results(missing, mend=self._mend)
        if self._earlier is None:
            self._earlier = set(self._done)
        return [self._outcome(trial) for trial in self._sweep.trials]

    def _outcome(self, trial: Trial) -> Outcome:
        result = self._done.get(trial.trial_id)
        attempt = None if result else Attempts(self._sweep.store, trial.trial_id).running()
        return Outcome(
            trial_id=trial.trial_id,
            name=trial.name,
            labels=trial.labels,
            result=result,
            failure=None if result else self._sweep.store.failure(trial.trial_id),
            earlier=trial.trial_id in (self._earlier or ()),
            config=trial.config,
            running=attempt is not None,
            detail=describe(attempt) if attempt else "",
        )


@dataclass(frozen=True)
class Status:
    """A trial as its followers want it: where and how far it is, and what there is of its metrics.

    `seconds`: of its stages when done, of its attempt when running. `left`: seconds of the stage. `interruptions`: how
    often it was preempted or lost. `reason`: of a failure, of a job that waits, or why nothing runs it.
    """

    trial_id: str
    name: str
    labels: dict[str, str]
    state: State
    progress: str = ""
    host: str = ""
    job: str = ""
    seconds: float | None = None
    left: float | None = None
    interruptions: int = 0
    reason: str = ""
    advice: str = ""
    note: str = ""
    kl: float | None = None
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Follower:
    """Reads the statuses of a sweep, look after look; `jobs` are those of its trials not done, at the last look."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.jobs: dict[str, JobState] = {}
        self._standing = Standing(sweep)

    def look(self) -> list[Status]:
        """Every trial's status now, in the sweep's order."""
        outcomes = self._standing.look()
        self.jobs = job_states(self.sweep.store, self.sweep.name, [o.trial_id for o in outcomes if not o.result])
        driven = plans.is_driven(self.sweep.store, self.sweep.name)
        return [self._status(outcome, self.jobs.get(outcome.trial_id), driven) for outcome in outcomes]

    def _status(self, outcome: Outcome, job: JobState | None, driven: bool) -> Status:
        own: dict[str, Any] = {"trial_id": outcome.trial_id, "name": outcome.name, "labels": outcome.labels}
        if outcome.result:
            return _done(own, outcome.result)
        attempts = Attempts(self.sweep.store, outcome.trial_id)
        history, running = attempts.all(), attempts.running()
        own["interruptions"] = interruptions(history, running)
        if running:
            return _running(own, running)
        if job and job.state in ALIVE:
            return _queued(own, job)
        if outcome.failure:
            return _failed(own, outcome.failure, history)
        if job and job.state == SILENT:
            return Status(**own, state="queued", job=job.job_id, reason=f"unknown: {job.reason}")
        return _queued(own, None) if job is None and driven else self._stopped(own, history, job)

    def _stopped(self, own: dict[str, Any], history: list[Attempt], job: JobState | None) -> Status:
        """Nothing runs it and nothing will, until it is retried."""
        last = history[-1] if history else None
        own["progress"] = f"after {_progress(last)}" if last and last.total else ""
        own["host"] = last.owner.host if last else ""
        own["job"] = job.job_id if job else (last.owner.job or "") if last else ""
        folder = self.sweep.store.sweep(self.sweep.name)
        if (folder / "cancelled").exists():
            return Status(**own, state="stopped", reason="cancelled", advice=RETRY)
        if job:
            end = ended_as(folder, job.job_id) or job.state
            reason = f"its job ended without a result: {end}" + (f" ({job.reason})" if job.reason else "")
            return Status(**own | {"host": job.node or own["host"]}, state="stopped", reason=reason, advice=RETRY)
        if last is None:
            return Status(**own, state="stopped", reason="no process runs this sweep", advice=RETRY)
        if last.end == "done":
            return Status(**own, state="stopped", reason="its result cannot be read", advice="retry computes it again")
        reason = last.reason or last.end or f"its process on {last.owner.host} is gone"
        return Status(**own, state="stopped", reason=reason, advice=RETRY)


def job_states(store: ResultStore, sweep: str, trial_ids: list[str]) -> dict[str, JobState]:
    """What SLURM says of the last job of each trial that has one."""
    folder = store.sweep(sweep)
    if not (folder / "jobs.json").exists():
        return {}
    wanted = set(trial_ids)
    jobs = {trial_id: job for trial_id, job in job_of_trial(folder).items() if trial_id in wanted}
    found = states(jobs.values())
    return {trial_id: found[job] for trial_id, job in jobs.items()}


def interruptions(history: list[Attempt], running: Attempt | None) -> int:
    """How many attempts ended without the trial being done or failed, other than by the user's wish."""
    ended = [attempt for attempt in history if running is None or attempt.number != running.number]
    return sum(attempt.end in ("interrupted", "lost", "out of memory", None) for attempt in ended)


def describe(attempt: Attempt) -> str:
    """How far a running attempt is: `decoder blocks 3 of 30, 2 min 10 s left`."""
    left = "" if attempt.left is None else f", {duration(attempt.left)} left"
    return f"{_progress(attempt)}{left}"


def _progress(attempt: Attempt) -> str:
    return f"{attempt.stage} {attempt.done} of {attempt.total}" if attempt.total else attempt.stage


def _done(own: dict[str, Any], result: Result) -> Status:
    made = f"made by version {result.method_version} of the method, and this is {METHOD_VERSION}" if result.old else ""
    return Status(
        **own,
        state="old" if result.old else "done",
        reason=made,
        advice="start the sweep anew for today's numbers" if result.old else "",
        host=result.host,
        seconds=result.seconds,
        interruptions=result.attempts - 1,
        kl=result.metrics.kl,
        perplexity=result.metrics.perplexity,
    )


def _running(own: dict[str, Any], attempt: Attempt) -> Status:
    return Status(
        **own,
        state="running",
        progress=_progress(attempt),
        host=attempt.owner.host,
        job=attempt.owner.job or f"pid {attempt.owner.pid}",
        seconds=(datetime.now(UTC) - attempt.started_at).total_seconds(),
        left=attempt.left,
        note=attempt.note,
    )


def _queued(own: dict[str, Any], job: JobState | None) -> Status:
    if job is None:
        return Status(**own, state="queued")
    if job.state != "PENDING":
        return Status(**own, state="running", progress="starting", host=job.node or "", job=job.job_id)
    remedy = why_waiting(job.reason)
    return Status(**own, state="queued", job=job.job_id, reason=job.reason or "", advice=remedy or "")


def _failed(own: dict[str, Any], failure: Failure, history: list[Attempt]) -> Status:
    job = history[-1].owner.job or "" if history else ""
    return Status(**own, state="failed", host=failure.host, job=job, reason=failure.reason, advice=failure.advice or "")
