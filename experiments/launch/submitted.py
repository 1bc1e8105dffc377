"""What was submitted to SLURM for a sweep, from its jobs.json and its jobs' logs; nothing is submitted here.

A submission is written before sbatch is called, with the job's name and the trials, and again once the ids of the jobs
are known. One that has no ids belongs to a process that is at it now or was killed: squeue tells its jobs by the name.
"""

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from experiments.launch.jobs import SlurmAway, named
from experiments.store import to_json, write_atomically

# What slurmstepd writes into a job's log when it ends the job. For want of memory the job's own state is FAILED only:
# it is a step of the job that ran out.
LAST_WORDS = (
    (r"oom-kill event|exceeded memory limit", "OUT_OF_MEMORY"),
    (r"CANCELLED AT .* DUE TO TIME LIMIT", "TIMEOUT"),
    (r"CANCELLED AT .* DUE TO NODE FAILURE", "NODE_FAIL"),
    (r"CANCELLED AT .* DUE TO PREEMPTION", "PREEMPTED"),
)
TAIL = 1 << 16


class Submission(BaseModel):
    """One call of sbatch: when, the jobs' name, the trial of each job, and the settings in force.

    `intended`: the trials in the array's order, until the ids of their jobs are known.
    """

    submitted_at: datetime
    name: str = ""
    intended: list[str] = []
    jobs: dict[str, str] = {}
    settings: dict[str, Any]


class _Submissions(BaseModel):
    submissions: list[Submission] = []


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a sweep's lock of a name, which one process has at a time; `folder` is the sweep's."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    with (folder / "jobs" / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def submissions(folder: Path) -> list[Submission]:
    """What was submitted for a sweep, in order; `folder` is the sweep's."""
    try:
        return _Submissions.model_validate_json((folder / "jobs.json").read_bytes()).submissions
    except FileNotFoundError:
        return []


def keep(folder: Path, own: Submission) -> None:
    """Write a submission, in place of the one of its name if there is one."""
    others = submissions(folder)
    at = next((i for i, one in enumerate(others) if one.name == own.name), len(others))
    _write(folder, [*others[:at], own, *others[at + 1 :]])


def forget(folder: Path, own: Submission) -> None:
    """Take a submission back of which no job came."""
    _write(folder, [one for one in submissions(folder) if one.name != own.name])


def unrecorded(folder: Path) -> list[Submission]:
    """The submissions whose jobs' ids were not written; `jobs` are those that wait or run. Raises `SlurmAway`."""
    open_ones = [one for one in submissions(folder) if one.intended]
    found = named([one.name for one in open_ones])
    return [one.model_copy(update={"jobs": _trials(found.get(one.name, []), one.intended)}) for one in open_ones]


def job_of_trial(folder: Path) -> dict[str, str]:
    """The last job submitted for each trial of a sweep; `folder` is the sweep's."""
    known = submissions(folder)
    if any(one.intended for one in known):
        with suppress(SlurmAway):
            known += unrecorded(folder)
    return {trial_id: job_id for one in known for job_id, trial_id in one.jobs.items()}


def log_file(folder: Path, job_id: str) -> Path:
    """The file that takes what a job prints, all its starts one after the other; `folder` is the sweep's."""
    return folder / "jobs" / f"{job_id}_0_log.out"


def ended_as(folder: Path, job_id: str) -> str | None:
    """The state that the last start of a job ended in, as its log tells it; None when the log does not."""
    try:
        with log_file(folder, job_id).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            last = file.read().decode(errors="replace").rpartition("Starting with JobEnvironment")[2]
    except FileNotFoundError:
        return None
    return next((state for pattern, state in LAST_WORDS if re.search(pattern, last)), None)


def _trials(job_ids: Sequence[str], intended: Sequence[str]) -> dict[str, str]:
    """The trial of each job; an array of one is a job without a task number."""
    return {job_id: intended[int(job_id.partition("_")[2] or 0)] for job_id in job_ids}


def _write(folder: Path, known: list[Submission]) -> None:
    path = folder / "jobs.json"
    if known:
        write_atomically(path, to_json(_Submissions(submissions=known)))
    else:
        path.unlink(missing_ok=True)
