"""What SLURM says about jobs: their states, why they wait, and how to end or restart them."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

FIELDS = ("JobArrayID", "State", "Reason", "NodeList", "RestartCnt", "StartTime")
UNKNOWN = "UNKNOWN"  # SLURM answered, and does not know the job any more
SILENT = "NO ANSWER"  # SLURM, or a way to ask it, is not there now
IDS_A_COMMAND = 500
# What squeue shows in place of the state while something is done to a job.
PASSING = {
    **{"SIGNALING": "RUNNING", "STAGE_OUT": "COMPLETING", "POWER_UP_NODE": "CONFIGURING"},
    **dict.fromkeys(("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"), "PENDING"),
}

WAITING = {
    "Resources": "the nodes are in use; it starts when enough of one is free",
    "Priority": "other jobs come first",
    "JobArrayTaskLimit": "hydra.launcher.array_parallelism jobs are running already",
    "BeginTime": "it was queued again; SLURM lets about two minutes pass before it starts",
    "Dependency": "it starts after the sweep's earlier array, to keep to hydra.launcher.array_parallelism",
    "PartitionDown": "the partition is down; ask why, or set hydra.launcher.partition=...",
    "PartitionInactive": "the partition starts no jobs now; ask why, or set hydra.launcher.partition=...",
    "PartitionTimeLimit": "the partition's limit is shorter: lower hydra.launcher.time=...",
    "PartitionNodeLimit": "the partition allows no job of this size: lower hydra.launcher.gpus, cpus or memory",
    "PartitionConfig": "the partition can run no such job: lower hydra.launcher.time, gpus, cpus or memory",
    "BadConstraints": "no node is like that: change hydra.launcher.extra=..., gpus, cpus or memory",
    "ReqNodeNotAvail": "the nodes that it could use are down or reserved; wait, or set hydra.launcher.partition=...",
    "NodeDown": "its node is down; wait, or set hydra.launcher.partition=...",
    "JobHeldUser": "it was held: scontrol release JOB",
    "JobHeldAdmin": "an administrator holds it; ask them",
    "JobHoldMaxRequeue": "it was queued again too often, and is held: scontrol release JOB",
    "launch failed requeued held": "its node could not start it, and it is held: scontrol release JOB",
    "Reservation": "its reservation has not begun",
    "Licenses": "it waits for a license",
    "InvalidAccount": "its account cannot be used: set hydra.launcher.account=...",
    "InvalidQOS": "its QOS cannot be used: set hydra.launcher.qos=...",
    "MaxMemPerLimit": "it asks for more memory than allowed: lower hydra.launcher.memory=...",
}


class SlurmAway(RuntimeError):
    """SLURM, or its commands, cannot be reached; the message says which and how."""


class SlurmRefused(RuntimeError):
    """SLURM answered, and refused; the message is its own."""


@dataclass(frozen=True)
class JobState:
    """One job: `state` is SLURM's word, `UNKNOWN` or `SILENT`; `restarts`: how often it was queued again."""

    job_id: str
    state: str
    reason: str | None = None
    node: str | None = None
    restarts: int = 0
    started_at: datetime | None = None


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """The state of every job, in the order given; never raises, whatever SLURM does."""
    wanted = list(job_ids)
    if not wanted:
        return {}
    known: dict[str, JobState] = {}
    silent: str | None = None
    arrays = ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in wanted))
    try:
        known = _queued(arrays)
    except SlurmAway as error:
        silent = str(error)
    for job_id in wanted:  # tasks that were cancelled before they began are one line, that of their array
        array = known.get(job_id.partition("_")[0])
        if job_id not in known and array:
            known[job_id] = replace(array, job_id=job_id)
    if any(job_id not in known for job_id in wanted):
        known = _accounted(arrays) | known
    state, reason = (SILENT, silent) if silent else (UNKNOWN, "SLURM no longer knows this job")
    return {job_id: known.get(job_id) or JobState(job_id, state, reason) for job_id in wanted}


def named(names: Sequence[str]) -> dict[str, list[str]]:
    """The jobs of each name that wait or run. Raises `SlurmAway`."""
    if not names:
        return {}
    fields = "--Format=JobArrayID:|,Name:|"
    done = _done(("squeue", "--noheader", "--array", f"--name={','.join(names)}", fields), 60)
    if done.returncode:
        raise SlurmAway(f"squeue: {done.stderr.strip()}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        job_id, name = line.split("|")[:2]
        found.setdefault(name, []).append(job_id)
    return found


def why_waiting(reason: str | None) -> str | None:
    """What the reason of a waiting job means and what can be done about it; None for one not known here."""
    if reason is None:
        return None
    if reason.startswith("Nodes required for job are DOWN"):
        return WAITING["ReqNodeNotAvail"]
    found = WAITING.get(re.split(r"[,(]", reason)[0].strip())
    if found is None and re.match(r"QOS|Assoc", reason):
        kind = "QOS" if reason.startswith("QOS") else "account"
        return (
            f"a limit of the {kind} is reached; it starts when other jobs end, or set hydra.launcher.{kind.lower()}=..."
        )
    return found


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs, waiting or running; those that are over stay as they are. Raises `SlurmAway` and `SlurmRefused`."""
    for part in _parts(job_ids):
        _act("scancel", *part)


def requeue(job_ids: Sequence[str]) -> None:
    """End running jobs and queue them again under the same id. Raises `SlurmAway` and `SlurmRefused`."""
    for part in _parts(job_ids):
        _act("scontrol", "requeue", ",".join(part))


def call(*command: str, seconds: float = 30) -> str:
    """A SLURM command's output, whatever its exit status; errors come after it. Raises `SlurmAway`."""
    done = _done(command, seconds)
    return (done.stdout + done.stderr).strip()


def _done(command: Sequence[str], seconds: float = 30) -> "subprocess.CompletedProcess[str]":
    # These variables change what the commands print.
    hidden = ("SQUEUE_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except FileNotFoundError as error:
        raise SlurmAway(f"{command[0]} is not on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmAway(f"{command[0]} did not answer in {seconds:.0f} s") from error
    if re.search(r"Unable to contact|Socket timed out|authentication error|Connection refused", done.stderr):
        raise SlurmAway(f"SLURM does not answer ({done.stderr.strip().splitlines()[-1]})")
    return done


def _parts(job_ids: Sequence[str]) -> list[Sequence[str]]:
    return [job_ids[i : i + IDS_A_COMMAND] for i in range(0, len(job_ids), IDS_A_COMMAND)]


def _act(*command: str) -> None:
    done = _done(command)
    over = re.compile(r"Invalid job id|already complet|^$", re.IGNORECASE)
    refused = [line for line in done.stderr.splitlines() if not over.search(line)]
    if done.returncode and refused:
        raise SlurmRefused("; ".join(refused))


def _queued(arrays: str) -> dict[str, JobState]:
    """What the controller knows: jobs that wait, run, or ended less than `MinJobAge` ago."""
    fields = ",".join(f"{field}:|" for field in FIELDS)
    done = _done(("squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}", f"--Format={fields}"), 60)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SlurmAway(f"squeue: {done.stderr.strip()}")
    found = {}
    for line in done.stdout.splitlines():
        job_id, state, reason, node, restarts, started = line.split("|")[: len(FIELDS)]
        found[job_id] = _job_state(job_id, state, reason, node, started, int(restarts))
    return found


def _accounted(arrays: str) -> dict[str, JobState]:
    """What the accounting knows, where there is one: every start of a job is a line, and the last one counts."""
    from submitit.slurm.slurm import read_job_id

    fields = ("JobID", "State", "Reason", "NodeList", "Start")
    command = ("sacct", "--allocations", "--duplicates", "--parsable2", "--noheader", f"--jobs={arrays}")
    try:
        done = _done((*command, f"--format={','.join(fields)},Submit"), 60)
    except SlurmAway:
        return {}
    found: dict[str, JobState] = {}
    lines = [line.split("|") for line in done.stdout.splitlines() if done.returncode == 0]
    for ids, state, reason, node, started, _ in sorted(lines, key=lambda own: own[-1]):
        for job_id in _expanded(read_job_id(ids)):
            restarts = found[job_id].restarts + 1 if job_id in found else 0
            found[job_id] = _job_state(job_id, state, reason, node, started, restarts)
    return found


def _expanded(parts: list[tuple[str, ...]]) -> list[str]:
    """The ids of `(main,)`, `(main, task)` or `(main, first, last)`."""
    ids = []
    for main, *tasks in parts:
        last = tasks[-1] if tasks else None
        ids += [f"{main}_{i}" for i in range(int(tasks[0]), int(last) + 1)] if last is not None else [main]
    return ids


def _job_state(job_id: str, state: str, reason: str, node: str, started: str, restarts: int) -> JobState:
    """SLURM's many words for nothing become None, and an expected start is no start."""
    word = PASSING.get(state.split(" ")[0], state.split(" ")[0])
    return JobState(
        job_id=job_id,
        state=word,
        reason=None if reason in ("", "None", "N/A") else reason,
        node=None if node in ("", "None assigned", "(null)") else node,
        restarts=restarts,
        started_at=None if word == "PENDING" else _time(started),
    )


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        return None
