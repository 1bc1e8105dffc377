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
# A file that is replaced while it is read from a network file system is "stale" for a moment.
READS, SECONDS_BETWEEN_READS = 4, 0.05

End = Literal["done", "failed", "out of memory", "gpu", "crashed", "interrupted", "cancelled", "lost"]


class Owner(BaseModel):
    """A process, told from all others; `boot`: of its host, with the PID namespace; `born`: its start in that boot.

    `job`: the SLURM job or array task that it runs in, started again `restarts` times.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    boot: str
    pid: int
    born: float
    job: str | None
    restarts: int = 0

    @classmethod
    def this_process(cls) -> "Owner":
        """The process that asks."""
        return cls(
            host=platform.node(),
            boot=_boot(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            job=job_id(),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        )

    def is_here(self) -> bool:
        """Whether its process can be looked for on this machine."""
        return (self.host, self.boot) == (platform.node(), _boot())

    def runs(self) -> bool:
        """Whether the process is there; only for an owner that is here."""
        return self.born != 0 and _born(self.pid) == self.born

    def replaces(self, before: "Owner") -> bool:
        """Whether `before` is an earlier start, elsewhere, of this process's own SLURM job: SLURM has ended it."""
        is_own_job = self.job is not None and before.job == self.job
        return is_own_job and before.restarts < self.restarts and not before.is_here()


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
        attempt = _last(paths[-1]) if paths else None
        return attempt if attempt and _is_alive(attempt, paths[-1], time.time()) else None

    def of_process(self, pid: int) -> Attempt | None:
        """The open attempt of a process of this machine, dead or alive."""
        found = self.all()
        own = found and found[-1].end is None and found[-1].owner.is_here() and found[-1].owner.pid == pid
        return found[-1] if own else None

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
                last = _last(paths[-1]) if paths else None
                if last and _is_alive(last, paths[-1], clock) and not owner.replaces(last.owner):
                    return last
                number = int(paths[-1].stem) + 1 if paths else 1
                attempt = Attempt(number=number, owner=owner, sweep=sweep, started_at=now())
                file.write(to_json(attempt))
                file.flush()
                os.fsync(file.fileno())  # another machine must not find the new file empty
                if not _linked(file.name, self._path(number)):  # another process was faster, and is to be asked now
                    continue
            if last and last.end is None:
                self.close(last.number, "lost", f"its process on {last.owner.host} is gone")
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


def _linked(source: str, target: Path) -> bool:
    """Give a file a second name, unless that is taken by another; a repeated request may find its own success."""
    try:
        os.link(source, target)
    except FileExistsError:
        return os.stat(source).st_nlink == 2
    return True


def _read(path: Path) -> Attempt | None:
    for _ in range(READS):
        try:
            return Attempt.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            time.sleep(SECONDS_BETWEEN_READS)
    return None


def _last(path: Path) -> Attempt:
    """An attempt; of one that cannot be read nothing is known but its file's age, by which it is judged."""
    nobody = Owner(host="unknown", boot="", pid=0, born=0, job=None)
    return _read(path) or Attempt(number=int(path.stem), owner=nobody, sweep="unknown", started_at=now())


def _boot() -> str:
    """This boot of this machine and the PID namespace in it: where a PID means something."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _born(pid: int) -> float:
    """When a process started, in clock ticks of the boot (a Unix time where there is no /proc); 0 when it is gone."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return 0 if state in "ZX" else int(fields[18])
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0
