"""One trial: from a config to a recorded result.

config -> model + tokenizer -> calibration windows -> quantized decoder blocks -> metrics -> record
"""

import logging
import platform
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.records import Block, Data, Failure, Metrics, Record, Stage, now
from experiments.store import ResultStore
from experiments.tracking import Tracking
from wush.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A validated config, run once: resolved to plain values, with the option chosen of each group.

    `labels` tell it from the other trials of its sweep: the choices that matter to it, and every key that differs.
    """

    trial_id: str
    config: dict[str, Any]
    choices: dict[str, str]
    labels: dict[str, str]

    @property
    def name(self) -> str:
        """One line, such as `smollm2_135m mxfp4 wush rtn seed=1`."""
        return " ".join(value if key in self.choices else f"{key}={value}" for key, value in self.labels.items())


class TrialRunner:
    """Runs trials one after the other, keeping what they can share: the store and the original model."""

    def __init__(self, store: ResultStore, sweep: str, progress: Progress) -> None:
        self.store = store
        self.sweep = sweep
        self.progress = progress
        self._originals: Any = None

    def run(self, trial: Trial) -> Record | Failure:
        """The trial's record, or why it failed; both are in the store. Only an interrupt is raised."""
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        tracking: Tracking = instantiate(trial.config["tracking"])
        try:
            return self._run(trial, tracking)
        except InstantiationException as error:  # what Hydra wraps is the error that says what is wrong
            return self._fail(trial, tracking, error.__cause__ or error)
        except Exception as error:  # any failure is the trial's own; the sweep goes on
            return self._fail(trial, tracking, error)

    def _run(self, trial: Trial, tracking: Tracking) -> Record:
        import yaml

        from experiments.environment import describe, resolve_device

        started = now()
        device = resolve_device(trial.config["device"])
        environment = describe(device)
        folder = self.store.begin(trial.trial_id, yaml.safe_dump(trial.config, sort_keys=False), environment)
        with _logged(folder / "trial.log") as warnings:
            tracking.start(trial.trial_id, trial.choices, trial.config, self.sweep, self.store.root)
            work = self._work(trial, device, tracking)
            record = _record(trial, work, warnings, environment, started)
            self.store.finish(record)
        tracking.finish(record)
        return record

    def _work(self, trial: Trial, device: str, tracking: Tracking) -> "_Work":
        """Everything heavy: load, compare, quantize, evaluate."""
        from hydra.utils import instantiate

        import wush
        from experiments.environment import measured
        from experiments.originals import Originals
        from wush.texts import sha256_of_ids

        self._originals = self._originals or Originals()
        config, progress, work = trial.config, self.progress, _Work()

        def windows(name: str) -> Any:
            text = instantiate(config[name])
            ids = text.cut(loaded.tokenizer, name)
            work.data[name] = Data(text_sha256=text.sha256, ids_sha256=sha256_of_ids(ids), tokens=ids.numel())
            return ids

        def on_block(report: wush.BlockReport) -> None:
            block = Block.model_validate(asdict(report))
            work.blocks.append(block)
            tracking.block(block)

        with measured(work.stages, "load", device):
            loaded = self._originals.load(config["model"], device)
        fmt = instantiate(config["format"])
        held_out = windows("evaluation")
        calibration = windows("calibration") if isinstance(fmt, wush.Format) else None
        _warn_if_same_text(work.data)
        batch_size = config["evaluation"]["batch_size"]
        with measured(work.stages, "original", device):
            key = {"model": config["model"], "evaluation": work.data["evaluation"].ids_sha256, "device": device}
            states = self._originals.states(loaded, held_out, key, batch_size, progress)
        bits = float(loaded.model.dtype.itemsize * 8)
        if calibration is not None:
            with measured(work.stages, "quantize", device):
                report = wush.quantize(
                    loaded.model,
                    calibration.split(config["calibration"]["batch_size"]),
                    format=fmt,
                    transform=instantiate(config["transform"]),
                    algorithm=instantiate(config["algorithm"]),
                    exclude=config["quantize"]["exclude"],
                    progress=progress,
                    on_block=on_block,
                )
            bits, work.skipped = report.bits_per_weight, report.skipped
        with measured(work.stages, "evaluate", device):
            found = wush.evaluate(loaded.model, held_out, states, batch_size=batch_size, progress=progress)
        work.metrics = Metrics(
            perplexity=found.perplexity,
            perplexity_original=found.perplexity_original,
            kl=found.kl,
            top1=found.top1,
            bits_per_weight=bits,
        )
        return work

    def _fail(self, trial: Trial, tracking: Tracking, error: BaseException) -> Failure:
        reason = one_line(error)
        failure = Failure(
            trial_id=trial.trial_id,
            reason=reason,
            kind=type(error).__name__,
            host=platform.node(),
            failed_at=now(),
        )
        log.error("trial %s failed: %s", trial.trial_id, reason)
        tracking.fail(reason)
        try:
            self.store.fail(failure)
            with (self.store.trial(trial.trial_id) / "trial.log").open("a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
        except OSError as unwritable:
            log.error("trial %s: its failure could not be stored either: %s", trial.trial_id, unwritable)
        return failure


class _Work:
    """What a trial has found so far."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.data: dict[str, Data] = {}
        self.blocks: list[Block] = []
        self.skipped: dict[str, str] = {}
        self.metrics: Metrics | None = None


def _record(trial: Trial, work: _Work, warnings: list[str], environment: dict[str, Any], started: datetime) -> Record:
    assert work.metrics is not None
    return Record(
        trial_id=trial.trial_id,
        choices=trial.choices,
        config=trial.config,
        metrics=work.metrics,
        blocks=work.blocks,
        skipped=work.skipped,
        stages=work.stages,
        data=work.data,
        seed=trial.config["seed"],
        warnings=warnings,
        versions=environment["versions"],
        git_commit=environment["git_commit"],
        host=environment["host"],
        device=environment["device"],
        started_at=started,
        finished_at=now(),
    )


def _warn_if_same_text(data: dict[str, Data]) -> None:
    if "calibration" in data and data["calibration"].text_sha256 == data["evaluation"].text_sha256:
        log.warning("calibration and evaluation use the same text: the metrics are not held out")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _logged(path: Path) -> Iterator[list[str]]:
    """While open, log lines also go to a file; yields the warnings as they come."""
    file, warnings = logging.FileHandler(path, encoding="utf-8"), _Warnings()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(file)
    root.addHandler(warnings)
    try:
        yield warnings.messages
    finally:
        root.removeHandler(file)
        root.removeHandler(warnings)
        file.close()
