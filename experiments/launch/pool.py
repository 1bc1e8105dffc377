"""Worker processes that run trials, and the light parent that watches them.

A worker that dies fails its trial alone: the parent sees how it ended, records that, and starts another worker. A
worker is kept from trial to trial, with the model that it has loaded.
"""

import json
import logging
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments import plans
from experiments.attempts import Attempts
from experiments.failures import ADVICE, Kind, may_go_on
from experiments.records import Failure, now
from experiments.standing import Standing
from experiments.store import ResultStore
from experiments.trial import Trial
from experiments.views.summary import write

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).parent.parent.parent
GRACE_SECONDS = 10.0
MAX_WORKERS_A_TRIAL = 4
LINES_OF_A_CRASH = 30
SECONDS_BETWEEN_REPORTS = 20.0


_told: set[str] = set()


@dataclass
class Worker:
    """One worker process at a time; `environment` are variables of its own, `log_file` takes what it prints."""

    environment: dict[str, str]
    log_file: Path
    _process: subprocess.Popen[str] | None = None
    _last: subprocess.Popen[str] | None = None
    _kills: int | None = None
    _lock: "threading.RLock" = field(default_factory=threading.RLock)  # a signal handler may close too
    _closed: bool = False

    def run(self, store: ResultStore, sweep: str, trial: Trial, in_job: bool = False) -> str:
        """`done`, `failed`, `busy`, `cancelled` or `interrupted`; what a dead worker leaves is recorded here.

        A worker that somebody else ends is replaced, but not `in_job`: a cluster ends what it ends.
        """
        for _ in range(MAX_WORKERS_A_TRIAL):
            answer = self._ask({"root": str(store.root), "sweep": sweep, "trial": asdict(trial)})
            process, self._last = self._last, None
            if self._closed:
                return "interrupted"
            if answer is None:
                assert process is not None
                starved = self._kills is None or self._kills != out_of_memory_kills()
                state = _after_death(store, sweep, trial, process.pid, process.returncode, starved, self.log_file)
            else:
                state = answer["state"]
            if state in ("done", "failed", "busy", "cancelled") or (in_job and state == "interrupted"):
                return state
        return record_failure(store, sweep, trial, "crash", f"its process ended {MAX_WORKERS_A_TRIAL} times")

    def tell_to_end(self) -> None:
        """Have the process mark its attempt as interrupted, and end; no other is started."""
        with self._lock:
            self._closed = True
            if self._process:
                self._process.terminate()

    def close(self) -> None:
        """End the process, and wait for it."""
        self.tell_to_end()
        with self._lock:
            process, self._process = self._process, None
        if process:
            _end(process)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Have the process do a trial; None when it died, and is `_last`."""
        process = self._started()
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        answer = None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            for message in map(json.loads, process.stdout):
                if "state" in message:
                    answer = message
                    break
                self._tell(message["log"], message["level"])
        except BrokenPipeError:
            pass
        if answer is None or answer["ends"]:
            self._forget(process)
        return answer

    def _tell(self, text: str, level: int) -> None:
        """Say once what a worker warns of."""
        if text not in _told:
            _told.add(text)
            log.log(level, "%s", text)

    def _started(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._closed or (self._process and self._process.poll() is None):
                return self._process
            self._kills = out_of_memory_kills()
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
            with self.log_file.open("a", encoding="utf-8") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "experiments.launch.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=os.environ | {"PYTHONPATH": path} | self.environment,
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                )
            return self._process

    def _forget(self, process: subprocess.Popen[str]) -> None:
        """Leave a process that has ended, or is about to."""
        with self._lock:
            if self._process is process:
                self._process = None
        _end(process)
        self._last = process


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a process that was told to end, and kill it when it takes long.

    With a limit: a wait without one cannot be entered again by a signal handler.
    """
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
        return
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)


def run_all(
    workers: Sequence[Worker],
    trials: Sequence[Trial],
    store: ResultStore,
    sweep: str,
    on_end: Callable[[Trial, str], None],
) -> None:
    """Run trials on workers as these get free; `on_end` is called, in this thread, with how each ended."""
    waiting, ended = deque(trials), queue.Queue[tuple[Trial | None, str]]()

    def serve(worker: Worker) -> None:
        try:
            while waiting:
                try:
                    trial = waiting.popleft()
                except IndexError:  # another worker was faster
                    break
                ended.put((trial, worker.run(store, sweep, trial)))
        except Exception:
            log.exception("a worker cannot be used")
        finally:
            ended.put((None, ""))

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        left = len(threads)
        while left:
            trial, state = ended.get()
            if trial is None:
                left -= 1
            else:
                on_end(trial, state)
    finally:
        waiting.clear()
        for worker in workers:
            worker.tell_to_end()
        for worker in workers:
            worker.close()


_in_job: list[Worker] = []


def run_in_job(root: str, sweep: str, trial_id: str) -> None:
    """Run one trial of a planned sweep in a worker, as the body of a cluster's job; raises `RuntimeError` if it failed.

    When the worker is ended from outside, the job is about to be ended too: this waits for that, because a job that
    returns is not started again.
    """
    store = ResultStore(root)
    trial = _planned(store, sweep, trial_id)
    plans.check_version(plans.load(store, sweep)[0])
    if store.finished(trial_id):
        log.info("trial %s: done already", trial_id)
        return
    worker = Worker({}, store.trial(trial_id) / "worker.log")
    _in_job.append(worker)
    state = worker.run(store, sweep, trial, in_job=True)
    log.info("trial %s: %s", trial_id, state)
    if state == "interrupted":
        time.sleep(600)
    worker.close()
    _refresh(store, sweep)
    if state == "failed":
        failure = store.failure(trial_id)
        raise RuntimeError(f"trial {trial_id} failed: {failure.reason if failure else 'see its log'}")


def _refresh(store: ResultStore, name: str) -> None:
    """Write the sweep's table and report, unless another job did a moment ago and will not have been the last."""
    sweep, _ = plans.load(store, name)
    report, recent = store.sweep(name) / "report.html", False
    with suppress(FileNotFoundError):
        recent = time.time() - report.stat().st_mtime < SECONDS_BETWEEN_REPORTS
    if recent and any(not _is_over(store, trial.trial_id) for trial in sweep.trials):
        return
    write(name, Standing(sweep).look(), store)


def _is_over(store: ResultStore, trial_id: str) -> bool:
    return any((store.trial(trial_id) / name).exists() for name in ("result.json", "failure.json"))


def interrupt() -> None:
    """End the worker of this job, because the job is to be started again later."""
    for worker in _in_job:
        worker.close()


def give_up(root: str, sweep: str, trial_id: str, kind: Kind, reason: str) -> None:
    """Record that a trial is not started again."""
    store = ResultStore(root)
    record_failure(store, sweep, _planned(store, sweep, trial_id), kind, reason)


def _planned(store: ResultStore, sweep: str, trial_id: str) -> Trial:
    for trial in plans.load(store, sweep)[0].trials:
        if trial.trial_id == trial_id:
            return trial
    raise RuntimeError(f"trial {trial_id} is not in the plan of sweep {sweep} any more: it was planned anew")


def out_of_memory_kills() -> int | None:
    """How many processes of this machine the kernel has killed because memory ran out; None where it does not say."""
    with suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def _after_death(
    store: ResultStore, sweep: str, trial: Trial, pid: int, code: int, starved: bool, log_file: Path
) -> str:
    """Record how a worker's death ended its attempt: the trial's state, `again` when it is to be run again.

    `starved`: the kernel has killed processes for memory meanwhile, or does not say.
    """
    attempts = Attempts(store, trial.trial_id)
    own = attempts.of_process(pid)
    if store.finished(trial.trial_id):
        return "done"
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return "interrupted"
    if code == -signal.SIGKILL and not starved:
        log.warning("trial %s: its process was killed (SIGKILL), and not for its memory; it goes on", trial.trial_id)
        if own:
            attempts.close(own.number, "lost", "its process was killed (SIGKILL)")
        return "again"
    if code == -signal.SIGKILL:
        reason = "its process was killed (SIGKILL) when memory ran out"
        log.warning("trial %s: %s", trial.trial_id, reason)
        if own:
            attempts.close(own.number, "out of memory", reason)
        if not own or may_go_on(attempts.since_failure()):
            return "again"
        return record_failure(store, sweep, trial, "out of memory", reason)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if own:
        attempts.close(own.number, "crashed", how)
    said = _last_lines(log_file)
    with suppress(OSError), (store.trial(trial.trial_id) / "trial.log").open("a", encoding="utf-8") as log_of_trial:
        log_of_trial.write("\n".join(["the last lines of its process:", *said, ""]))
    last = said[-1] if said else "no output"
    return record_failure(store, sweep, trial, "crash", f"its process crashed ({how}): {last}")


def record_failure(
    store: ResultStore, sweep: str, trial: Trial, kind: Kind, reason: str, host: str | None = None
) -> str:
    """Record a failure that the trial's own process could not; its state, `busy` when another process runs it.

    `host`: where it failed, if not here.
    """
    from hydra.utils import instantiate

    if Attempts(store, trial.trial_id).running():
        return "busy"
    folder = store.trial(trial.trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    log.error("trial %s failed: %s", trial.trial_id, reason)
    store.fail(
        Failure(
            trial_id=trial.trial_id,
            reason=reason,
            kind=kind,
            advice=ADVICE[kind],
            host=host or platform.node(),
            environment={},
            failed_at=now(),
        )
    )
    Attempts(store, trial.trial_id).give_up(reason)
    tracking = instantiate(trial.config["tracking"])
    tracking.start(trial.trial_id, trial.choices, trial.config, sweep, store.root)
    tracking.fail(reason)
    return "failed"


def _last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").strip().splitlines()[-LINES_OF_A_CRASH:]
    except OSError:
        return []
