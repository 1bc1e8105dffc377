"""One trial: from a config to a recorded result.

config -> model + tokenizer -> calibration windows -> quantized decoder blocks -> metrics -> record
"""

from __future__ import annotations

import _thread
import logging
import math
import platform
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from experiments.attempts import Attempt, AttemptLost, Attempts, Cancelled, Lease
from experiments.checkpoints import Checkpoint
from experiments.environment import code_versions
from experiments.failures import ADVICE, Kind, classify, may_go_on, memory_failures
from experiments.identity import text_of
from experiments.logs import logged, one_line
from experiments.records import Block, Data, Failure, Lost, Metrics, Record, Stage, Task, Windows, now
from experiments.store import ResultStore
from experiments.tracking import Tracking
from wush.progress import Progress

if TYPE_CHECKING:
    from experiments.originals import Originals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A validated config, run once: resolved to plain values, with the option chosen of each group that matters.

    `labels` tell it from the other trials of its sweep: the choices that matter to it, and every key that differs.
    `identity` is what its id is the hash of, the content of its texts and model included.
    """

    trial_id: str
    config: dict[str, Any]
    choices: dict[str, str]
    labels: dict[str, str]
    identity: dict[str, Any]

    @property
    def method_version(self) -> int:
        """The version of the method that it was planned with; plans of before it was kept have none."""
        return int(self.identity.get("method_version", 1))

    @property
    def name(self) -> str:
        """One line, such as `smollm2_135m mxfp4 wush rtn calibration.seed=1`."""
        used = {key: value for key, value in self.labels.items() if value != "-"}
        return " ".join(value if key in self.choices else f"{key}={value}" for key, value in used.items())


@dataclass
class Findings:
    """What an attempt at a trial has found so far."""

    trial: Trial
    lease: Lease
    one_window: bool = False
    started: datetime = field(default_factory=now)
    device: str = "cpu"
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    note: str | None = None
    bits_per_weight: float = math.nan
    quantized_share: float = 0.0
    metrics: Metrics | None = None
    windows: Windows | None = None
    lost: dict[str, dict[str, Lost]] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)

    def batch_size(self, text: str) -> int:
        """Windows a forward; one after the trial ran out of memory."""
        return 1 if self.one_window else text_of(self.trial.config[text])["batch_size"]


class GpuLost(Exception):
    """The GPU failed, and this process cannot use it any more; the trial is to be tried again by another."""


class TrialRunner:
    """Runs trials one after the other, keeping what they can share: the store, the tracker and the original model."""

    def __init__(
        self, store: ResultStore, sweep: str, tracking: Tracking, progress: Progress, replaceable: bool = False
    ) -> None:
        """`replaceable`: another process goes on when a GPU fails, which this one cannot use any more."""
        self._replaceable = replaceable
        self.store = store
        self.sweep = sweep
        self.tracking = tracking
        self.progress = progress
        self._kept: Originals | None = None

    def run(self, trial: Trial) -> Record | Failure | Attempt:
        """The trial's record, or why it failed; both are in the store. Or the attempt of a process that runs it now.

        What was saved of an earlier attempt is used. Out of memory is tried again once, one window at a time. Only
        an interrupt, `Cancelled` and `GpuLost` are raised.
        """
        attempts = Attempts(self.store, trial.trial_id)
        while True:
            lease = attempts.claim(self.sweep)
            if isinstance(lease, Attempt):
                return lease
            found = self._done_meanwhile(trial, lease) or self._attempt(trial, attempts, lease)
            if found is not None:
                return found
            self._kept = None  # whatever it holds, another attempt needs the memory more

    def _done_meanwhile(self, trial: Trial, lease: Lease) -> Record | None:
        record = self.store.finished(trial.trial_id)
        if record is not None:
            lease.end("done")
            log.info("trial %s: another process has finished it meanwhile", trial.trial_id)
            self.tracking.skip(trial.trial_id)
        return record

    def _attempt(self, trial: Trial, attempts: Attempts, lease: Lease) -> Record | Failure | None:
        """One attempt; None when there is to be another."""
        from hydra.errors import InstantiationException

        attempt = Findings(trial, lease)
        try:
            with lease.kept(_thread.interrupt_main):
                lease.check()
                return self._logged_attempt(attempt, attempts.since_failure())
        except AttemptLost:
            self._taken_over(trial)
            return None
        except (KeyboardInterrupt, Cancelled) as error:
            self._interrupted(attempt, error)
            return None
        except InstantiationException as error:  # what Hydra wraps is the error that says what is wrong
            return self._failed(attempt, attempts, error.__cause__ or error)
        except Exception as error:  # any failure is the trial's own; the sweep goes on
            return self._failed(attempt, attempts, error)

    def _logged_attempt(self, attempt: Findings, attempts: Sequence[Attempt]) -> Record:
        import yaml

        trial = attempt.trial
        folder = self.store.begin(trial.trial_id, yaml.safe_dump(trial.config, sort_keys=False))
        with logged(folder / "trial.log", attempt.warnings):
            if len(attempts) > 1:
                log.info("trial %s: attempt %d", trial.trial_id, attempt.lease.number)
            attempt.one_window = memory_failures(attempts) > 0
            if attempt.one_window:
                log.warning("the trial ran out of memory before: calibrated and evaluated one window at a time")
            return self._run(attempt)

    def _run(self, attempt: Findings) -> Record:
        from experiments.stages import Stages

        trial = attempt.trial
        self.tracking.start(trial.trial_id, trial.choices, trial.config, self.sweep, self.store.root)
        self._look_around(attempt)
        checkpoint = Checkpoint(
            self.store.trial(trial.trial_id),
            code_versions(),
            f"{attempt.environment['device']}, {attempt.environment['threads']} threads",
            attempt.warnings,
            attempt.lease.check,
        )
        record = Stages(attempt, checkpoint, self._originals, self.tracking, self.progress).run()
        attempt.lease.check()
        self.store.finish(record)
        attempt.lease.end("done")
        checkpoint.remove(trial.config["keep_blocks"])
        self.tracking.finish(record)
        return record

    def _interrupted(self, attempt: Findings, error: BaseException) -> None:
        """End an attempt that was told to stop; raises `error`, or `Cancelled`, unless the trial was taken over."""
        try:
            attempt.lease.check()
        except AttemptLost:
            return self._taken_over(attempt.trial)
        except Cancelled as cancelled:
            error = cancelled
        cancelled_now = isinstance(error, Cancelled)
        attempt.lease.end("cancelled" if cancelled_now else "interrupted")
        self.tracking.interrupt("cancelled" if cancelled_now else "interrupted")
        raise error

    def _taken_over(self, trial: Trial) -> None:
        log.warning("trial %s: this process was silent for long, and another has taken it over", trial.trial_id)
        self.tracking.interrupt("taken over by another process")

    def _failed(self, attempt: Findings, attempts: Attempts, error: BaseException) -> Failure | None:
        """Record why an attempt failed; None when it is tried again, here or by who has taken it over."""
        if attempts.superseded(attempt.lease.number):
            self._taken_over(attempt.trial)
            return None
        kind, reason = classify(error), one_line(error)
        if kind == "out of memory" or (kind == "gpu" and self._replaceable):
            attempt.lease.end(kind, reason)
            if may_go_on(attempts.since_failure()):
                how = "one window at a time" if kind == "out of memory" else "in another process"
                log.warning("trial %s: %s; tried again %s", attempt.trial.trial_id, reason, how)
                self.tracking.interrupt(kind)
                if kind == "gpu":
                    raise GpuLost(reason) from error
                return None
        failure = self._fail(attempt, error, kind)
        attempt.lease.end("failed", failure.reason)
        return failure

    def _look_around(self, attempt: Findings) -> None:
        from experiments.environment import describe, resolve_device

        attempt.device = resolve_device(attempt.trial.config["device"])
        attempt.environment = describe(attempt.device)
        self.store.keep_environment(attempt.trial.trial_id, attempt.environment)

    @property
    def _originals(self) -> Originals:
        from experiments.originals import Originals

        self._kept = self._kept or Originals()
        return self._kept

    def _fail(self, attempt: Findings, error: BaseException, kind: Kind) -> Failure:
        trial_id = attempt.trial.trial_id
        failure = Failure(
            trial_id=trial_id,
            reason=one_line(error),
            kind=kind,
            advice=ADVICE[kind],
            host=platform.node(),
            environment=attempt.environment,
            failed_at=now(),
        )
        log.error("trial %s failed: %s", trial_id, failure.reason)
        self.tracking.fail(failure.reason)
        try:
            self.store.fail(failure)
            with (self.store.trial(trial_id) / "trial.log").open("a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
        except OSError as unwritable:
            log.error("trial %s: its failure could not be stored either: %s", trial_id, unwritable)
        return failure
