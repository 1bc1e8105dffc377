"""Trials as tasks of SLURM job arrays, through submitit: submitting them, and what runs inside each job.

What SLURM says about jobs afterwards is in `experiments.launch.jobs`.
"""

import logging
import os
import re
import secrets
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit
from submitit.core.job_environment import JobEnvironment
from submitit.core.logger import get_logger
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths, UncompletedJobError

from experiments.launch.jobs import SlurmAway, call, states
from experiments.launch.settings import SlurmSettings, validate_launcher
from experiments.launch.submitted import Submission, forget, keep, locked, submissions, unrecorded
from experiments.records import now
from experiments.schema import ConfigError

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).parent.parent.parent

# What sbatch says when it refuses, and the keys that can mend it; the first that matches counts.
REMEDIES = (
    (r"account or account", "account", "`sacctmgr show assoc user=$USER` lists the accounts that you may use"),
    (r"partition", "partition", "`sinfo` lists the partitions"),
    (r"qos spec", "qos", "`sacctmgr show assoc user=$USER format=account,qos` lists those that you may use"),
    (r"Memory spec", "memory", "`sinfo -o '%P %m'` shows what the nodes of each partition have, in MiB"),
    (r"time limit (is )?invalid|Requested time limit|TimeLimit", "time", "`sinfo -o '%P %l'` shows the limits"),
    (r"gres|generic resource", "gpus", "`sinfo -o '%P %G'` shows what the nodes have"),
    (r"CPU count", "cpus", "`sinfo -o '%P %c'` shows what the nodes have"),
    (r"policy|limit", "qos", "or start fewer trials at once: the cluster limits what one user may submit"),
    (r"node config", "gpus", "or cpus or memory: no node has that much; `sinfo -o '%P %c %m %G'` shows what they have"),
    (r"feature|unrecognized|Invalid", "extra", "one of the options in it is not right on this cluster"),
)

SUBMITTING = ".lock"  # held by the process that submits jobs of a sweep
SITE = ("SLURM_CONF", "SLURM_CLUSTERS")


class SubmissionError(ConfigError):
    """SLURM refused jobs; `submitted` are those that it took before."""

    def __init__(self, message: str, submitted: "Sequence[Job]" = ()) -> None:
        super().__init__(message)
        self.submitted = list(submitted)


@dataclass(frozen=True)
class Job:
    """A submitted array task, its trial, and the file that takes what it prints."""

    job_id: str
    trial_id: str
    log_file: Path


@dataclass
class TrialJob:
    """What submitit runs in a job: one trial, in a worker process of its own."""

    root: str
    sweep_name: str
    trial_id: str
    limit: str

    def __call__(self) -> None:
        """Run the trial; raises when it failed."""
        try:  # the imports too: submitit's handler raises when it does not queue the job again, at any moment
            from experiments.launch import pool

            signal.signal(signal.SIGTERM, self._on_term)
            pool.run_in_job(self.root, self.sweep_name, self.trial_id)
        except UncompletedJobError:
            from experiments.launch import pool

            reason = f"stopped by the time limit ({self.limit}) more than hydra.launcher.max_timeouts times"
            pool.give_up(self.root, self.sweep_name, self.trial_id, "time", reason)
            raise

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before it queues the job again: what is saved is the trial's own, block by block."""
        from experiments.launch import pool

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pool.interrupt()
        half_written = JobEnvironment().paths.submitted_pickle.with_suffix(".pkl.save_tmp")
        half_written.unlink(missing_ok=True)  # submitit refuses to write where an earlier try was killed
        return DelayedSubmission(self)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """End the worker, then the job.

        A job that ends by itself in the grace time of a preemption has failed for SLURM, so a job that is not being
        ended already queues itself again, as it does before its time limit.
        """
        from experiments.launch import pool

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        again = {JobEnvironment._usr_sig()}
        signal.pthread_sigmask(signal.SIG_BLOCK, again)
        pool.interrupt()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, again)
        job_id = JobEnvironment().job_id
        own = states([job_id])[job_id]
        get_logger().info("SIGTERM while the job is %s (%s)", own.state, own.reason)
        if own.state == "RUNNING":
            signal.raise_signal(*again)
        raise SystemExit(1)


def check_available() -> None:
    """Raise `ConfigError` that says what is missing to submit jobs from here."""
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"hydra/launcher=slurm: {program} is not on PATH; start the sweep on a login node of the cluster, "
                "or choose hydra/launcher=local_parallel"
            )
    try:
        answer = call("scontrol", "ping", seconds=20)
    except SlurmAway as error:
        raise ConfigError(f"hydra/launcher=slurm: {error}; try again when SLURM answers") from error
    if not re.search(r"\bis UP\b", answer):
        raise ConfigError(f"hydra/launcher=slurm: {answer.splitlines()[0]}; try again when `scontrol ping` says UP")


def submit(sweep_name: str, folder: Path, trial_ids: Sequence[str], settings: SlurmSettings) -> list[Job]:
    """Submit a job for each trial, in as few arrays as the cluster allows.

    `folder`: the sweep's; jobs.json and jobs/ are written there. Jobs that a killed process has submitted are taken as
    they are. Raises `SubmissionError` with sbatch's own words; what was submitted before is recorded.
    """
    if not trial_ids:
        return []
    size = _max_array_size()
    with locked(folder, SUBMITTING), _clean_environment(settings):
        try:
            jobs = [job for job in _adopt(folder) if job.trial_id in set(trial_ids)]
        except SlurmAway as error:
            raise SubmissionError(f"{error}; nothing was submitted, try again when SLURM answers") from error
        there = {job.trial_id for job in jobs}
        wanted = [trial_id for trial_id in trial_ids if trial_id not in there]
        arrays = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        ids: list[str] = []
        for number, part in enumerate(arrays):
            # No more than `array_parallelism` jobs of the whole sweep at once: arrays share it, or follow each other.
            share = max(1, settings.array_parallelism // len(arrays))
            after = ids[number - settings.array_parallelism] if number >= settings.array_parallelism else None
            try:
                new = _submit_array(_job_name(sweep_name), folder, part, settings, share, after)
            except (FailedJobError, FailedSubmissionError) as error:
                jobs += [job for job in _left_behind(folder) if job.trial_id in part]
                raise SubmissionError(_explain(str(error), settings, len(jobs), len(trial_ids)), jobs) from error
            jobs += new
            ids.append(new[0].job_id.partition("_")[0])
    return jobs


def adopt(folder: Path) -> list[Job]:
    """Record the jobs that a process submitted and was killed before it could; `folder` is the sweep's.

    Those of a SLURM that does not answer now are left for the next time.
    """
    if not any(one.intended for one in submissions(folder)):
        return []
    with locked(folder, SUBMITTING), suppress(SlurmAway):
        return _adopt(folder)
    return []


def _submit_array(
    name: str, folder: Path, trial_ids: Sequence[str], settings: SlurmSettings, share: int, after: str | None
) -> list[Job]:
    """One call of sbatch, written down before and after."""
    kept = settings.model_dump(mode="json", by_alias=True)
    own = Submission(submitted_at=now(), name=name, intended=list(trial_ids), settings=kept)
    keep(folder, own)
    executor = _executor(name, folder / "jobs", settings, share, after)
    found = executor.submit_array([_trial_job(folder, one, settings) for one in trial_ids])
    new = [Job(job.job_id, one, job.paths.stdout) for job, one in zip(found, trial_ids, strict=True)]
    keep(folder, own.model_copy(update={"intended": [], "jobs": {job.job_id: job.trial_id for job in new}}))
    return new


def _adopt(folder: Path) -> list[Job]:
    """As `adopt`, for who has the lock; raises `SlurmAway`."""
    jobs: list[Job] = []
    for one in unrecorded(folder):
        if not one.jobs:
            forget(folder, one)
            continue
        settings = validate_launcher(one.settings)
        assert isinstance(settings, SlurmSettings)
        for job_id, trial_id in one.jobs.items():
            paths = JobPaths(folder / "jobs", job_id)
            _give_pickle(paths.submitted_pickle, _trial_job(folder, trial_id, settings), settings)
            jobs.append(Job(job_id, trial_id, paths.stdout))
        keep(folder, one.model_copy(update={"intended": []}))
        log.warning("%d jobs named %s are there, submitted by a process that was killed", len(one.jobs), one.name)
    return jobs


def _left_behind(folder: Path) -> list[Job]:
    """The jobs that SLURM took although sbatch failed, as it does when the answer is late."""
    _remove_unsubmitted(folder / "jobs")
    with suppress(SlurmAway):
        return _adopt(folder)
    return []


def _give_pickle(path: Path, own: TrialJob, settings: SlurmSettings) -> None:
    """Write what a job runs where submitit, which waits a minute for it, has not."""
    if path.exists():
        return
    delayed = DelayedSubmission(own)
    delayed.set_timeout(settings.minutes, settings.max_timeouts)
    half_written = path.with_suffix(".new")
    delayed.dump(half_written)
    half_written.replace(path)


def _trial_job(folder: Path, trial_id: str, settings: SlurmSettings) -> TrialJob:
    return TrialJob(str(folder.parents[1]), folder.name, trial_id, f"{settings.minutes} min")


def _job_name(sweep_name: str) -> str:
    """One for each call of sbatch, to find its jobs by; squeue takes names with commas between."""
    return f"{sweep_name.replace(',', '_')}.{secrets.token_hex(4)}"


def _executor(
    name: str, folder: Path, settings: SlurmSettings, parallelism: int, after: str | None
) -> submitit.SlurmExecutor:
    """What writes the pickles and calls sbatch."""
    executor = submitit.SlurmExecutor(folder, max_num_timeout=settings.max_timeouts)
    executor.update_parameters(
        job_name=name,
        partition=settings.partition,
        account=settings.account,
        qos=settings.qos,
        time=settings.minutes,
        mem=settings.memory,
        cpus_per_task=settings.cpus,
        gpus_per_node=settings.gpus or None,
        array_parallelism=parallelism,
        signal_delay_s=settings.signal_before,
        stderr_to_stdout=True,
        dependency=f"afterany:{after}" if after else None,
        setup=[*settings.setup, f'export PYTHONPATH={shlex.quote(str(CHECKOUT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'],
        srun_args=["--cpus-per-task", str(settings.cpus)],  # since SLURM 22.05 srun takes one, unless told
        additional_parameters={"requeue": True} | settings.extra,
    )
    return executor


def _max_array_size() -> int:
    try:
        shown = call("scontrol", "show", "config")
    except SlurmAway as error:
        raise SubmissionError(f"{error}; nothing was submitted, try again when SLURM answers") from error
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    assert found is not None, shown
    return int(found[1])


@contextmanager
def _clean_environment(settings: SlurmSettings) -> Iterator[None]:
    """Hide the variables of a job that this process may run in, and those that would overrule the settings."""
    given = {f"SBATCH_{key.upper()}" for key in ("partition", "account", "qos") if getattr(settings, key) is not None}
    given |= {"SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "SBATCH_ARRAY_INX", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"}
    hidden = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name not in SITE) or name in given
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _remove_unsubmitted(folder: Path) -> None:
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh", path.name) and not path.is_symlink():
            path.unlink()


def _explain(message: str, settings: SlurmSettings, submitted: int, total: int) -> str:
    """Sbatch's words, and the key to change."""
    lines = re.findall(r"^sbatch: (?:error: )?(?:Batch job submission failed: )?(.+)$", message, re.MULTILINE)
    words = "; ".join(line for line in dict.fromkeys(lines) if not line.startswith("Try ")) or message.strip()
    before = f"{submitted} of {total} jobs were submitted, then " if submitted else ""
    refusal = f"{before}sbatch refused: {words}"
    for pattern, key, advice in REMEDIES:
        if re.search(pattern, words, re.IGNORECASE):
            value = getattr(settings, key)
            return f"hydra.launcher.{key}={'null' if value is None else value}: {refusal}; change it: {advice}"
    return f"hydra/launcher=slurm: {refusal}"
