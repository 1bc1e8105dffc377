"""One trial: from a config to a recorded result.

config -> model + tokenizer -> calibration windows -> quantized decoder blocks -> metrics -> record
"""

from __future__ import annotations

import logging
import math
import platform
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

REASON_LENGTH = 240


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


class TrialRunner:
    """Runs trials one after the other, keeping what they can share: the store, the tracker and the original model."""

    def __init__(self, store: ResultStore, sweep: str, tracking: Tracking, progress: Progress) -> None:
        self.store = store
        self.sweep = sweep
        self.tracking = tracking
        self.progress = progress
        self._kept: Originals | None = None

    def run(self, trial: Trial) -> Record | Failure:
        """The trial's record, or why it failed; both are in the store. Only an interrupt is raised."""
        import yaml
        from hydra.errors import InstantiationException

        attempt = _Attempt(trial)
        try:
            folder = self.store.begin(trial.trial_id, yaml.safe_dump(trial.config, sort_keys=False))
            with _logged(folder / "trial.log", attempt.warnings):
                return self._run(attempt)
        except InstantiationException as error:  # what Hydra wraps is the error that says what is wrong
            return self._fail(attempt, error.__cause__ or error)
        except Exception as error:  # any failure is the trial's own; the sweep goes on
            return self._fail(attempt, error)

    def _run(self, attempt: _Attempt) -> Record:
        trial = attempt.trial
        self.tracking.start(trial.trial_id, trial.choices, trial.config, self.sweep, self.store.root)
        self._look_around(attempt)
        loaded = self._load(attempt)
        held_out = self._windows(attempt, loaded, "evaluation")
        calibration = self._windows(attempt, loaded, "calibration") if "calibration" in trial.identity else None
        _warn_if_same_text(attempt.data)
        states = self._states(attempt, loaded, held_out)
        if calibration is not None:
            self._quantize(attempt, loaded, calibration)
        self._evaluate(attempt, loaded, held_out, states)
        record = _record(attempt)
        self.store.finish(record)
        self.tracking.finish(record)
        return record

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

    def _states(self, attempt: _Attempt, loaded: LoadedModel, held_out: Tensor) -> Tensor:
        from experiments.environment import measured

        text, size = attempt.trial.identity["evaluation"], attempt.trial.config["evaluation"]["batch_size"]
        with measured(attempt.stages, "original", attempt.device):
            return self._originals.states(loaded, held_out, text, size, self.progress)

    def _quantize(self, attempt: _Attempt, loaded: LoadedModel, calibration: Tensor) -> None:
        from hydra.utils import instantiate

        import wush
        from experiments.environment import measured

        def on_block(report: wush.BlockReport) -> None:
            attempt.blocks.append(Block.model_validate(asdict(report)))
            self.tracking.block(attempt.blocks[-1])

        config, report = attempt.trial.config, wush.QuantizationReport()
        with measured(attempt.stages, "quantize", attempt.device):
            wush.quantize(
                loaded.model,
                calibration.split(config["calibration"]["batch_size"]),
                format=instantiate(config["format"]),
                transform=instantiate(config["transform"]),
                algorithm=instantiate(config["algorithm"]),
                exclude=config["quantize"]["exclude"],
                report=report,
                progress=self.progress,
                on_block=on_block,
            )
        attempt.bits_per_weight, attempt.skipped = report.bits_per_weight, report.skipped

    def _evaluate(self, attempt: _Attempt, loaded: LoadedModel, held_out: Tensor, states: Tensor) -> None:
        import wush
        from experiments.environment import measured

        size = attempt.trial.config["evaluation"]["batch_size"]
        with measured(attempt.stages, "evaluate", attempt.device):
            found = wush.evaluate(loaded.model, held_out, states, batch_size=size, progress=self.progress)
        values = asdict(found) | {"bits_per_weight": attempt.bits_per_weight}
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: no result; look for the first such block in this trial's log")
        attempt.metrics = Metrics(**values)

    def _fail(self, attempt: _Attempt, error: BaseException) -> Failure:
        trial_id = attempt.trial.trial_id
        failure = Failure(
            trial_id=trial_id,
            reason=one_line(error),
            kind=type(error).__name__,
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


def _record(attempt: _Attempt) -> Record:
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


def one_line(error: BaseException) -> str:
    """An error's message with its lines joined, cut where it gets long; the error's type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0] if len(lines[0]) <= REASON_LENGTH else f"{lines[0][: REASON_LENGTH - 1]}…"
    text, kept = first, 1
    while kept < len(lines) and len(text) + 2 + len(lines[kept]) <= REASON_LENGTH:
        text, kept = f"{text}; {lines[kept]}", kept + 1
    left = len(lines) - kept
    return f"{text} (+{left} more line{'s' if left > 1 else ''})" if left else text


class _Warnings(logging.Handler):
    """Keeps this project's own warnings; those of a tracker are not about the result."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in ("wush", "experiments") and record.name != "experiments.tracking":
            self.messages.append(record.getMessage())


@contextmanager
def _logged(path: Path, warnings: list[str]) -> Iterator[None]:
    """While open, log lines also go to a file, and the messages of warnings to a list."""
    handlers = (logging.FileHandler(path, encoding="utf-8"), _Warnings(warnings))
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
