"""Recorded trials as tables and figures need them: the light part of each `result.json`, read once.

A folder of records is a result store, whose `trials/*/result.json` are read, or any other folder, in which every
`*.json` is a record. A record that cannot be used is left out, and a note says which, why and what to do.
"""

import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from experiments.records import READABLE_VERSIONS, SCHEMA_VERSION, SEEDS, Layer, Metrics, Record, Stage, Task, Windows
from wush.version import METHOD_VERSION

COMMITTED = Path(__file__).parent / "records"
PARTS = ("model", "format", "transform", "algorithm", "calibration", "evaluation")
BASELINE = "original"
BASELINES = (BASELINE, "bf16")  # and what old records and the paper call it
NEUTRAL = ("batch_size", "layer_loss")  # keys of a config that change no result
RULES = {"mxfp4": "paper", "nvfp4": "fixed", "int4": "rms", "mxfp8": "ocp"}  # of a format that is named alone
NAMED = 3  # files that a note names; of more it gives the number
LOSSES = ("mse", "relative", "even", "paper_fp", "paper_int", "bound")


class NoRecords(ValueError):
    """A folder that the user named holds no record; the message says what would."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Layer losses of a trial: `layers` are (decoder block, linear), `values` `(layers, 6)` in the order `LOSSES`.

    NaN where the record kept no such prediction.
    """

    layers: tuple[tuple[int, str], ...]
    values: NDArray[np.float64]

    def of(self, loss: str) -> dict[tuple[int, str], float]:
        """One loss by layer."""
        return dict(zip(self.layers, self.values[:, LOSSES.index(loss)].tolist(), strict=True))

    def __bool__(self) -> bool:
        return bool(self.layers)


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished trial: which option it chose of each group, None where the group did not matter, and what it found.

    `seeds`: all of its config but those of the evaluation, which are `task_seeds`. `draw`: those by which it is paired
    with a trial of another method. `settings`: the config of those groups without seeds, and the version of the method.
    `evaluated`: the SHA-256 of the evaluated token ids, `windows` the sums over each of its windows, if kept. `blocks`:
    the decoder blocks it was restricted to; None: all. `weights`: those quantized. `losses_on`: the text that layer
    losses were measured on.
    """

    trial_id: str
    model: str
    format: str
    transform: str | None
    algorithm: str | None
    calibration: str | None
    evaluation: str | None
    seeds: str
    task_seeds: str
    draw: tuple[int, int | None]
    settings: dict[str, Any]
    evaluated: str
    blocks: tuple[int, ...] | None
    metrics: Metrics
    windows: Windows | None
    tasks: dict[str, Task]
    losses: Losses
    losses_on: str
    stages: dict[str, Stage]
    weights: int
    device: str
    environment: dict[str, Any]
    versions: dict[str, str]
    model_note: str
    method_version: int
    finished_at: datetime

    @property
    def old(self) -> bool:
        """Whether an earlier version of the method made it, whose numbers are not today's."""
        return self.method_version < METHOD_VERSION

    @property
    def whole(self) -> bool:
        """Whether the whole model is quantized, or none of it."""
        return self.blocks is None

    @property
    def baseline(self) -> bool:
        """Whether it is the unquantized model."""
        return self.format == BASELINE


@dataclass(frozen=True)
class Records:
    """All usable trials, by id, and a note for each reason why some are not."""

    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> list[Trial]:
        """Those of whole models."""
        return [trial for trial in self.trials if trial.whole]


@dataclass
class _Reading:
    trials: dict[str, Trial] = field(default_factory=dict)
    foreign: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    damaged: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            self.damaged[error.strerror or str(error)].append(path)
            return
        try:
            trial = _light(Record.model_validate_json(content))
        except ValidationError as error:
            if (version := _version(content)) not in (None, *READABLE_VERSIONS):
                self.foreign[str(version)].append(path)
            else:
                first = error.errors()[0]
                self.damaged[f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")].append(path)
        except ValueError as error:
            self.damaged[str(error)].append(path)
        else:
            known = self.trials.get(trial.trial_id)
            if known is None or known.finished_at < trial.finished_at:
                self.trials[trial.trial_id] = trial

    def notes(self) -> list[str]:
        return [
            *(
                f"{_counted(paths)} of schema version {version} left out, this program reads {SCHEMA_VERSION}: "
                f"{_listed(paths)}; run the trials again with this version"
                for version, paths in sorted(self.foreign.items())
            ),
            *(
                f"{_counted(paths)} left out as damaged ({reason}): {_listed(paths)}; "
                "remove the file and run the trial again"
                for reason, paths in sorted(self.damaged.items())
            ),
        ]


def load(folders: Sequence[Path] = ()) -> Records:
    """The records in the folders, or without any those in the repository; a trial that is in several counts once.

    Raises `NoRecords` for a folder that holds none.
    """
    reading = _Reading()
    for folder in folders or [COMMITTED]:
        paths = _files(folder)
        if not paths and folders:
            what = "holds no record" if folder.is_dir() else "is no folder"
            raise NoRecords(
                f"{folder}: {what}; name a folder of results (with trials/*/result.json) or one of records (*.json)"
            )
        for path in paths:
            reading.add(path)
    trials = sorted(reading.trials.values(), key=lambda trial: trial.trial_id)
    return Records(tuple(trials), tuple(reading.notes()))


def _files(folder: Path) -> list[Path]:
    store = folder / "trials"
    return sorted(store.glob("*/result.json") if store.is_dir() else folder.rglob("*.json"))


def _light(record: Record) -> Trial:
    """Raises `ValueError` for a number that is not finite."""
    config, choices = record.config, dict(record.choices)
    if "format" in choices:
        choices["format"] = _format(choices["format"], config)
    parts = [part for part in PARTS if part in choices]
    restricted = config.get("quantize", {}).get("blocks")
    _check_finite(record.tasks)
    return Trial(
        trial_id=record.trial_id,
        **{part: sys.intern(choices[part]) if part in choices else None for part in PARTS},  # type: ignore[arg-type]
        seeds=json.dumps(_seeds({part: config.get(part) for part in parts if part != "evaluation"})),
        task_seeds=json.dumps(_seeds({"evaluation": config.get("evaluation")})),
        draw=(record.seed, (config.get("transform") or {}).get("signs") if "transform" in parts else None),
        settings=_settings(config, parts) | {"method": {"version": record.method_version}},
        evaluated=record.data["evaluation"].ids_sha256 if "evaluation" in record.data else "",
        blocks=None if restricted is None else tuple(restricted),
        metrics=record.metrics,
        windows=record.windows,
        tasks=record.tasks,
        losses=_losses(record),
        losses_on=sys.intern((config.get("measure") or {}).get("layer_loss") or "held_out"),
        stages=record.stages,
        weights=sum(layer.weights for block in record.blocks for layer in block.layers),
        device=sys.intern(str(record.environment.get("device", "unknown machine"))),
        environment=record.environment,
        versions=record.versions,
        model_note=record.model_note or "",
        method_version=record.method_version,
        finished_at=record.finished_at,
    )


def _format(chosen: str, config: dict[str, Any]) -> str:
    """The option; with a scale rule other than its own it is another format, which no number of the option's is of."""
    if chosen in BASELINES:
        return BASELINE
    rule = (config.get("format") or {}).get("scale_rule")
    return chosen if rule in (None, RULES.get(chosen)) else f"{chosen} {rule}"


def _losses(record: Record) -> Losses:
    found = [
        (_place(block.index, layer.name), [_finite(block.index, layer, name) for name in LOSSES])
        for block in record.blocks
        for layer in block.layers
        if layer.loss is not None
    ]
    return Losses(
        tuple(place for place, _ in found), np.array([values for _, values in found]).reshape(-1, len(LOSSES))
    )


def _finite(block: int, layer: Layer, name: str) -> float:
    """A loss of the layer, NaN where the record has none; raises `ValueError` for another that is no number."""
    value: float | None = getattr(layer.loss, name)
    if value is None:
        return math.nan
    if not math.isfinite(value):
        raise ValueError(f"the {name} of decoder block {block}, {layer.name.rpartition('.')[2]} is {value}")
    return value


@functools.cache
def _place(block: int, layer: str) -> tuple[int, str]:
    """A layer, without the module it is in; one object for all trials."""
    return block, layer.rpartition(".")[2]


def _settings(config: dict[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    own = {part: config.get(part) for part in parts}
    if "transform" in own:
        own["quantize"] = config.get("quantize")
    return {part: value if part == "model" else _without(value) for part, value in own.items()}


def _without(value: Any) -> Any:
    """A part of a config without seeds and without what changes no result."""
    if isinstance(value, dict):
        own = {key: _without(one) for key, one in value.items() if key not in (*SEEDS, *NEUTRAL)}
        # Sampled signs are draws of one setting, which canonical ones are none of.
        return own | ({"signs": "sampled"} if value.get("signs") is not None else {})
    return value


def _seeds(value: Any) -> Any:
    """The seeds in a part of a config, where they stand."""
    if not isinstance(value, dict):
        return None
    own = {key: one if key in SEEDS else _seeds(one) for key, one in value.items() if key != "model"}
    return {key: one for key, one in own.items() if one is not None} or None


def _check_finite(tasks: dict[str, Task]) -> None:
    for name, task in tasks.items():
        for run in task.runs:
            if task.metric not in run.values:
                raise ValueError(f"task {name}: a run lacks its metric {task.metric}")
            if not math.isfinite(run.values[task.metric]):
                raise ValueError(f"{task.metric} of task {name} is {run.values[task.metric]}")


def _version(content: bytes) -> Any:
    try:
        return json.loads(content)["schema_version"]
    except (ValueError, TypeError, KeyError):
        return None


def _counted(paths: list[Path]) -> str:
    return f"{len(paths)} record{'s' if len(paths) > 1 else ''}"


def _listed(paths: list[Path]) -> str:
    named = ", ".join(map(str, paths[:NAMED]))
    return named if len(paths) <= NAMED else f"{named} and {len(paths) - NAMED} more"
