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
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from experiments.attempts import Attempt, AttemptLost, Attempts, Cancelled, Lease, Watched
from experiments.checkpoints import Checkpoint
from experiments.environment import code_versions
from experiments.failures import ADVICE, Kind, classify, may_go_on, memory_failures
from experiments.logs import logged, one_line
from experiments.records import Block, Data, Failure, Metrics, Record, Stage, now
from experiments.store import ResultStore
from experiments.tracking import Tracking
from wush.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    import wush
    from experiments.originals import Originals
    from wush.models import LoadedModel

log = logging.getLogger(__name__)

HELD_OUT = "held_out"


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
    def name(self) -> str:
        """One line, such as `smollm2_135m mxfp4 wush rtn calibration.seed=1`."""
        used = {key: value for key, value in self.labels.items() if value != "-"}
        return " ".join(value if key in self.choices else f"{key}={value}" for key, value in used.items())


@dataclass
class _Attempt:
    """What a trial has found so far."""

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
    bits_per_weight: float = math.nan
    metrics: Metrics | None = None
    kernels: dict[str, list[str]] = field(default_factory=dict)

    def batch_size(self, text: str) -> int:
        """Windows a forward; one after the trial ran out of memory."""
        return 1 if self.one_window else self.trial.config[text]["batch_size"]


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

        attempt = _Attempt(trial, lease)
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

    def _logged_attempt(self, attempt: _Attempt, attempts: Sequence[Attempt]) -> Record:
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

    def _run(self, attempt: _Attempt) -> Record:
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
        loaded = self._load(attempt)
        held_out = self._windows(attempt, loaded, "evaluation")
        calibration = self._windows(attempt, loaded, "calibration") if "calibration" in trial.identity else None
        _warn_if_same_text(attempt.data)
        states = self._states(attempt, loaded, held_out, checkpoint)
        if calibration is not None:
            self._quantize(attempt, loaded, calibration, checkpoint)
        self._evaluate(attempt, loaded, held_out, states, checkpoint)
        record = _record(attempt, len(checkpoint.restored))
        attempt.lease.check()
        self.store.finish(record)
        attempt.lease.end("done")
        checkpoint.remove(trial.config["keep_blocks"])
        self.tracking.finish(record)
        return record

    def _interrupted(self, attempt: _Attempt, error: BaseException) -> None:
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

    def _failed(self, attempt: _Attempt, attempts: Attempts, error: BaseException) -> Failure | None:
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

    def _look_around(self, attempt: _Attempt) -> None:
        from experiments.environment import describe, resolve_device

        attempt.device = resolve_device(attempt.trial.config["device"])
        attempt.environment = describe(attempt.device)
        self.store.keep_environment(attempt.trial.trial_id, attempt.environment)

    @property
    def _originals(self) -> Originals:
        from experiments.originals import Originals

        self._kept = self._kept or Originals()
        return self._kept

    def _load(self, attempt: _Attempt) -> LoadedModel:
        from experiments.environment import measured

        trial = attempt.trial
        with measured(attempt.stages, "load", attempt.device):
            loaded = self._originals.load(trial.config["model"], trial.identity["model"], attempt.device)
        attempt.bits_per_weight = float(loaded.model.dtype.itemsize * 8)
        attempt.revision = getattr(loaded.model.config, "_commit_hash", None)
        return loaded

    def _windows(self, attempt: _Attempt, loaded: LoadedModel, name: str) -> Tensor:
        """The windows of the calibration or evaluation text, as it was when the sweep was planned."""
        from hydra.utils import instantiate

        from wush.texts import sha256_of_ids

        planned = attempt.trial.identity[name]

        def cut() -> Tensor:
            text = instantiate(attempt.trial.config[name])
            ids = text.cut(loaded.tokenizer, name)
            if text.sha256 != planned["sha256"]:
                raise ValueError(f"{name}: the text changed since the sweep was planned; start it again")
            return ids

        ids = self._originals.windows(planned, cut)
        attempt.data[name] = Data(text_sha256=planned["sha256"], ids_sha256=sha256_of_ids(ids), tokens=ids.numel())
        return ids

    def _states(self, attempt: _Attempt, loaded: LoadedModel, held_out: Tensor, checkpoint: Checkpoint) -> Tensor:
        import wush
        from experiments.environment import measured

        def make() -> Tensor:
            saved = checkpoint.states()
            if saved is not None:
                return saved
            size, watched = attempt.batch_size("evaluation"), self._watched(attempt)
            states = wush.original_states(loaded.model, held_out, batch_size=size, progress=watched)
            checkpoint.save_states(states)
            return states

        with measured(attempt.stages, "original", attempt.device):
            return self._originals.states(attempt.trial.identity["evaluation"], make)

    def _quantize(self, attempt: _Attempt, loaded: LoadedModel, calibration: Tensor, checkpoint: Checkpoint) -> None:
        from hydra.utils import instantiate

        import wush
        from experiments.environment import measured
        from wush.backends import Settings

        def on_block(report: wush.BlockReport) -> None:
            attempt.blocks.append(Block.model_validate(asdict(report)))
            watched.note = f"{report.name}: relative error {report.relative_mse:.2e}"
            if report.index not in checkpoint.restored:
                self.tracking.block(attempt.blocks[-1])

        config, report, watched = attempt.trial.config, wush.QuantizationReport(), self._watched(attempt)
        with measured(attempt.stages, "quantize", attempt.device):
            wush.quantize(
                loaded.model,
                calibration.split(attempt.batch_size("calibration")),
                format=instantiate(config["format"]),
                transform=instantiate(config["transform"]),
                algorithm=instantiate(config["algorithm"]),
                exclude=config["quantize"]["exclude"],
                report=report,
                progress=watched,
                on_block=on_block,
                saved=checkpoint,
                settings=Settings(config["kernels"], config["keep_operands"]),
            )
        attempt.bits_per_weight, attempt.skipped = report.bits_per_weight, report.skipped
        if checkpoint.restored:
            log.info(
                "%d of %d decoder blocks restored from an earlier attempt",
                len(checkpoint.restored),
                len(attempt.blocks),
            )
            attempt.stages["quantize"].seconds += sum(attempt.blocks[index].seconds for index in checkpoint.restored)

    def _evaluate(
        self, attempt: _Attempt, loaded: LoadedModel, held_out: Tensor, states: Tensor, checkpoint: Checkpoint
    ) -> None:
        import wush
        from experiments.environment import measured
        from wush import backends

        saved = checkpoint.evaluation(HELD_OUT)
        if saved is None:
            with measured(attempt.stages, "evaluate", attempt.device):
                size, watched = attempt.batch_size("evaluation"), self._watched(attempt)
                found = wush.evaluate(loaded.model, held_out, states, batch_size=size, progress=watched)
            values = asdict(found)
            wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
            if wrong:
                raise wush.NumericError(f"{', '.join(wrong)}: no result; look for the first such block in the log")
            saved = {"metrics": values, "stage": attempt.stages["evaluate"].model_dump()}
            saved["kernels"] = backends.chosen(loaded.model)
            checkpoint.save_evaluation(HELD_OUT, saved)
        attempt.stages["evaluate"] = Stage(**saved["stage"])
        attempt.metrics = Metrics(**saved["metrics"], bits_per_weight=attempt.bits_per_weight)
        attempt.kernels = saved["kernels"]

    def _watched(self, attempt: _Attempt) -> Watched:
        return Watched(self.progress, attempt.lease)

    def _fail(self, attempt: _Attempt, error: BaseException, kind: Kind) -> Failure:
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


def _record(attempt: _Attempt, restored_blocks: int) -> Record:
    assert attempt.metrics is not None
    machine = {key: value for key, value in attempt.environment.items() if key not in ("versions", "git_commit")}
    return Record(
        trial_id=attempt.trial.trial_id,
        choices=attempt.trial.choices,
        config=attempt.trial.config,
        metrics=attempt.metrics,
        blocks=attempt.blocks,
        skipped=attempt.skipped,
        stages=attempt.stages,
        data=attempt.data,
        seed=attempt.trial.config["seed"],
        attempts=attempt.lease.number,
        restored_blocks=restored_blocks,
        kernels=attempt.kernels,
        warnings=attempt.warnings,
        versions=attempt.environment["versions"],
        git_commit=attempt.environment["git_commit"],
        model_revision=attempt.revision,
        environment=machine,
        started_at=attempt.started,
        finished_at=now(),
    )


def _warn_if_same_text(data: dict[str, Data]) -> None:
    if "calibration" in data and data["calibration"].text_sha256 == data["evaluation"].text_sha256:
        log.warning("calibration and evaluation use the same text: the metrics are not held out")
