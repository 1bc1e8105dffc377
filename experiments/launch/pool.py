"""Worker processes that run trials, and the light parent that watches them.

A worker that dies fails its trial alone: the parent sees how it ended, records that, and starts another worker. A
worker is kept from trial to trial, with the model that it has loaded.
"""

import json
import logging
import os
import platform
import queue
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
SECONDS_BETWEEN_REPORTS = 20.0


@dataclass
class Worker:
    """One worker process at a time; `environment` are variables of its own, `log_file` takes what it prints."""

    environment: dict[str, str]
    log_file: Path
    _process: subprocess.Popen[str] | None = None
    _lock: "threading.RLock" = field(default_factory=threading.RLock)  # a signal handler may close too
    _closed: bool = False

    def run(self, store: ResultStore, sweep: str, trial: Trial) -> str:
        """`done`, `failed`, `busy`, `cancelled` or `interrupted`; what a dead worker leaves is recorded here."""
        while True:
            state = self._ask({"root": str(store.root), "sweep": sweep, "trial": asdict(trial)})
            if state is not None:
                return state
            state = _after_death(store, sweep, trial, self._ended(), self.log_file)
            if state is not None:
                return state

    def close(self) -> None:
        """End the process: it marks its attempt as interrupted, and is killed when it takes long."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(GRACE_SECONDS)  # with a limit: a wait without one cannot be entered again by a signal handler

    def _ask(self, message: dict[str, Any]) -> str | None:
        """Have the process do a trial; None when it died."""
        process = self._started()
        if process is None:
            return "interrupted"
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "state" in answer:
                    return answer["state"]
        except BrokenPipeError:
            pass
        return "interrupted" if self._closed else None

    def _started(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._closed or self._process:
                return self._process
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

    def _ended(self) -> int:
        """The exit code of the process that died."""
        with self._lock:
            process, self._process = self._process, None
        return process.wait() if process else 0


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
            worker.close()


_in_job: list[Worker] = []


def run_in_job(root: str, sweep: str, trial_id: str) -> None:
    """Run one trial of a planned sweep in a worker, as the body of a cluster's job; raises `RuntimeError` if it failed.

    When the worker is ended from outside, the job is about to be ended too: this waits for that, because a job that
    returns is not started again.
    """
    store = ResultStore(root)
    trial = _planned(store, sweep, trial_id)
    if store.finished(trial_id):
        log.info("trial %s: done already", trial_id)
        return
    worker = Worker({}, store.trial(trial_id) / "worker.log")
    _in_job.append(worker)
    state = worker.run(store, sweep, trial)
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
    outcomes = Standing(sweep).look()
    report = store.sweep(name) / "report.html"
    with suppress(FileNotFoundError):
        recent = time.time() - report.stat().st_mtime < SECONDS_BETWEEN_REPORTS
        if recent and any(outcome.state in ("queued", "running") for outcome in outcomes):
            return
    write(name, outcomes, store)


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


def _after_death(store: ResultStore, sweep: str, trial: Trial, code: int, log_file: Path) -> str | None:
    """Record how a worker's death ended its trial: the trial's state, or None when it is to be run again."""
    attempts = Attempts(store, trial.trial_id)
    if store.finished(trial.trial_id):
        return "done"
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return "interrupted"
    number = attempts.all()[-1].number if attempts.all() else 0
    if code == -signal.SIGKILL:
        reason = "its process was killed (SIGKILL), as the system does when memory runs out"
        attempts.close(number, "out of memory", reason)
        log.warning("trial %s: %s", trial.trial_id, reason)
        if may_go_on(attempts.since_failure()):
            return None
        return record_failure(store, sweep, trial, "out of memory", reason)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    attempts.close(number, "crashed", how)
    return record_failure(store, sweep, trial, "crash", f"its process crashed ({how}): {_last_line(log_file)}")


def record_failure(store: ResultStore, sweep: str, trial: Trial, kind: Kind, reason: str) -> str:
    """Record a failure that the trial's own process could not; its state."""
    from hydra.utils import instantiate

    folder = store.trial(trial.trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    log.error("trial %s failed: %s", trial.trial_id, reason)
    store.fail(
        Failure(
            trial_id=trial.trial_id,
            reason=reason,
            kind=kind,
            advice=ADVICE[kind],
            host=platform.node(),
            environment={},
            failed_at=now(),
        )
    )
    Attempts(store, trial.trial_id).give_up(reason)
    tracking = instantiate(trial.config["tracking"])
    tracking.start(trial.trial_id, trial.choices, trial.config, sweep, store.root)
    tracking.fail(reason)
    return "failed"


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "no output"
