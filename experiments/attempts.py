"""Attempts at a trial: who runs it, how far it is, and how each attempt ended.

attempts/0001.json, 0002.json, ...   one file an attempt; the last one without an end is the trial's lock

An attempt is claimed by making the next file, which only one process can do. Its owner writes it anew every few
seconds. An owner that is gone is recognized on its own machine by its process, elsewhere by the age of its file, and
anyone may then claim the next attempt. An owner that was only thought gone finds a newer file, and stops.
"""

import logging
import os
import platform
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.records import now
from experiments.store import ResultStore, to_json, write_atomically
from wush.progress import Progress

T = TypeVar("T")
log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
SECONDS_BETWEEN_WRITES = 1.0
# Attributes of a file may be cached by NFS clients for a minute.
SILENCE_SECONDS = 120.0
# The start of a process is found from the boot's, which moves when the clock is set.
CLOCK_SLACK_SECONDS = 5.0

End = Literal["done", "failed", "out of memory", "crashed", "interrupted", "cancelled", "lost"]


class Owner(BaseModel):
    """A process, told from all others; `boot`: of its host, with the PID namespace; `born`: its start, a Unix time.

    `job`: the SLURM job or array task that it runs in.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    boot: str
    pid: int
    born: float
    job: str | None

    @classmethod
    def this_process(cls) -> "Owner":
        """The process that asks."""
        return cls(host=platform.node(), boot=_boot(), pid=os.getpid(), born=_born(os.getpid()), job=job_id())

    def is_here(self) -> bool:
        """Whether its process can be looked for on this machine."""
        return (self.host, self.boot) == (platform.node(), _boot())

    def runs(self) -> bool:
        """Whether the process is there; only for an owner that is here."""
        return abs(_born(self.pid) - self.born) < CLOCK_SLACK_SECONDS


class Attempt(BaseModel):
    """One attempt: `done` of `total` steps of a stage, the seconds `left` of it as far as known, and a `note`."""

    model_config = ConfigDict(extra="forbid")

    number: int
    owner: Owner
    sweep: str
    started_at: datetime
    stage: str = "starting"
    done: int = 0
    total: int = 0
    left: float | None = None
    note: str = ""
    ended_at: datetime | None = None
    end: End | None = None
    reason: str = ""


class AttemptLost(Exception):
    """Another process has taken the trial over, as this one was silent for too long; it must write no more."""


class Cancelled(Exception):
    """The user cancelled the sweep."""


class Attempts:
    """The attempts at one trial."""

    def __init__(self, store: ResultStore, trial_id: str) -> None:
        self.trial_id = trial_id
        self._store = store
        self._folder = store.trial(trial_id) / "attempts"

    def all(self) -> list[Attempt]:
        """Every attempt that can be read, the oldest first."""
        return [attempt for path in self._paths() if (attempt := _read(path))]

    def running(self) -> Attempt | None:
        """The attempt that a live owner is making now, or None."""
        paths = self._paths()
        attempt = _read(paths[-1]) if paths else None
        return attempt if attempt and _is_alive(attempt, paths[-1], time.time()) else None

    def since_failure(self) -> list[Attempt]:
        """The attempts after the last one that failed for good."""
        found = self.all()
        last = max((i for i, attempt in enumerate(found) if attempt.end == "failed"), default=-1)
        return found[last + 1 :]

    def claim(self, sweep: str) -> "Lease | Attempt":
        """A lease of the trial, or the attempt of a live owner that has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = Owner.this_process()
        while True:
            paths = self._paths()
            with tempfile.NamedTemporaryFile("w", dir=self._folder, prefix=".claim.", encoding="utf-8") as file:
                clock = os.stat(file.name).st_mtime  # the file system's own time, whatever this machine's is
                last = _read(paths[-1]) if paths else None
                if last and _is_alive(last, paths[-1], clock) and not _was_mine(last.owner, owner):
                    return last
                number = int(paths[-1].stem) + 1 if paths else 1
                attempt = Attempt(number=number, owner=owner, sweep=sweep, started_at=now())
                file.write(to_json(attempt))
                file.flush()
                try:
                    os.link(file.name, self._path(number))
                except FileExistsError:  # another process was faster; it is the one to ask about now
                    continue
            if last and last.end is None:
                reason = f"its process on {last.owner.host} is gone"
                self.close(last.number, "lost", reason)
            return Lease(self, attempt, self._store.sweep(sweep) / "cancelled")

    def close(self, number: int, end: End, reason: str = "") -> None:
        """Write how an attempt ended, unless that is known."""
        attempt = _read(self._path(number))
        if attempt and attempt.end is None:
            self.write(attempt.model_copy(update={"end": end, "reason": reason, "ended_at": now()}))

    def give_up(self, reason: str) -> None:
        """Mark the last attempt as the one after which the trial failed for good."""
        found = self.all()
        if found:
            self.write(found[-1].model_copy(update={"end": "failed", "reason": reason, "ended_at": now()}))

    def write(self, attempt: Attempt) -> None:
        """Renew an attempt's file."""
        write_atomically(self._path(attempt.number), to_json(attempt), durable=False)

    def superseded(self, number: int) -> bool:
        """Whether there is an attempt after this one."""
        return self._path(number + 1).exists()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04d}.json"

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.json"))


class Lease:
    """The right to run a trial, kept alive by a thread; the place where an attempt says how far it is."""

    def __init__(self, attempts: Attempts, attempt: Attempt, cancelled: Path) -> None:
        self.number = attempt.number
        self._attempts, self._attempt, self._cancelled = attempts, attempt, cancelled
        self._writing = threading.Lock()
        self._written = 0.0
        self._stop = threading.Event()
        self._problem: type[AttemptLost | Cancelled] | None = None

    @contextmanager
    def kept(self, interrupt: Callable[[], None], every: float = HEARTBEAT_SECONDS) -> Iterator[None]:
        """Renew the lease while open; `interrupt` is called when it is lost or the sweep is cancelled."""
        thread = threading.Thread(target=self._renew, args=(interrupt, every), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def check(self) -> None:
        """Raise `AttemptLost` or `Cancelled` when the trial must not go on."""
        if self._problem is None and self._attempts.superseded(self.number):
            self._problem = AttemptLost
        if self._problem is None and self._cancelled.exists():
            self._problem = Cancelled
        if self._problem:
            raise self._problem

    def progress(self, stage: str, done: int, total: int, left: float | None, note: str) -> None:
        """Say how far the attempt is, in steps of a stage; written at most once a second."""
        with self._writing:
            values = {"stage": stage, "done": done, "total": total, "left": left, "note": note}
            self._attempt = self._attempt.model_copy(update=values)
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._update()

    def end(self, end: End, reason: str = "") -> None:
        """Say how the attempt ended; it is no lock from here on."""
        self._stop.set()
        self._update(end=end, reason=reason, ended_at=now())

    def _update(self, **values: object) -> None:
        with self._writing:
            self._attempt = self._attempt.model_copy(update=values)
            self._written = time.monotonic()
            try:
                self._attempts.write(self._attempt)
            except OSError as error:
                log.debug("trial %s: its attempt cannot be written: %s", self._attempts.trial_id, error)

    def _renew(self, interrupt: Callable[[], None], every: float) -> None:
        while not self._stop.wait(every):
            try:
                self.check()
            except (AttemptLost, Cancelled):
                interrupt()
                return
            self._update()


class Watched:
    """Progress that is shown as before, and also said in the attempt's file."""

    def __init__(self, shown: Progress, lease: Lease) -> None:
        self.note = ""
        self._shown, self._lease = shown, lease

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield `items` on; the time left is that of the median of the last steps, as restored blocks are quick."""
        steps: deque[float] = deque(maxlen=5)
        for done, item in enumerate(self._shown.track(items, what, total)):
            started = time.monotonic()
            left = median(steps) * (total - done) if steps else None
            self._lease.progress(what, done, total, left, self.note)
            yield item
            steps.append(time.monotonic() - started)

    def detail(self, text: str) -> None:
        """Pass the detail on."""
        self._shown.detail(text)


def job_id() -> str | None:
    """The SLURM job of this process, as `squeue` shows it: `12` or, in an array, `12_3`."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _is_alive(attempt: Attempt, path: Path, clock: float) -> bool:
    return attempt.end is None and is_alive(attempt.owner, path, clock)


def is_alive(owner: Owner, path: Path, clock: float) -> bool:
    """Whether a process runs: looked for on its machine; elsewhere by the age of the file that it renews."""
    if owner.is_here():
        return owner.runs()
    with suppress(OSError):
        return clock - path.stat().st_mtime < SILENCE_SECONDS
    return False


def _was_mine(before: Owner, owner: Owner) -> bool:
    """Whether `before` is an earlier life of this process's own SLURM job, which SLURM has ended."""
    return owner.job is not None and before.job == owner.job and before.pid != owner.pid


def _read(path: Path) -> Attempt | None:
    try:
        return Attempt.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _boot() -> str:
    """This boot of this machine and the PID namespace in it: where a PID means something."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _born(pid: int) -> float:
    """When a process started, a Unix time; 0 when it is not there or a zombie."""
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0
