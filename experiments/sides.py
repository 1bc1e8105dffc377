"""One side of a comparison: from a text such as `transform=h` or a sweep's name to the finished trials it means."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import yaml

from experiments import plans
from experiments.earlier import choices_of_today
from experiments.estimates import parts
from experiments.identity import Identities
from experiments.records import Task, Windows
from experiments.schema import ConfigError
from experiments.store import ResultStore
from experiments.sweep import LABELLING_GROUPS, _flatten
from wush.intervals import Sums
from wush.version import METHOD_VERSION

if TYPE_CHECKING:
    from experiments.views.workspace import RunFilter

_PATHS: Final = (
    *("$.trial_id", "$.choices", "$.config", "$.metrics"),
    *("$.data.calibration", "$.data.evaluation.ids_sha256", "$.tasks", "$.method_version"),
)
CALIBRATED, EVALUATED = "calibration.text_sha256", "evaluation.ids_sha256"  # of what was really read
METHOD: Final = "method_version"
GROUPS: Final = (*LABELLING_GROUPS, "calibration", "evaluation")
VALUES_LISTED = 12
TASK: Final = "task "


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished trial: the option of each group, every other value that can change its result, and its metrics.

    `values`: by dotted config key, as YAML would have them; with the content of its texts as hashes, and the version of
    the method. `windows` and `outcomes`, of the documents of each task in `metrics`: only once they are `loaded`.
    """

    trial_id: str
    choices: dict[str, str]
    values: dict[str, str]
    metrics: dict[str, float]
    windows: Sums | None = None
    outcomes: dict[str, list[float]] = field(default_factory=dict)

    def value(self, key: str) -> str | None:
        """Of a group or config key; None for one that does not matter to the trial."""
        return self.choices.get(key, self.values.get(key))

    @property
    def name(self) -> str:
        """One line, such as `1a2b3c4d smollm2_135m mxfp4 wush rtn seed=0`."""
        own = [self.choices[group] for group in LABELLING_GROUPS if group in self.choices]
        return " ".join([self.trial_id, *own, f"seed={self.values['seed']}", *(["old"] if self.old else [])])

    @property
    def old(self) -> bool:
        """Whether an earlier version of the method made it."""
        return int(self.values[METHOD]) < METHOD_VERSION


@dataclass(frozen=True)
class Side:
    """One side as the user gave it: a sweep, or values that keys must have, or both; and the finished trials of it.

    `unfinished`: how many trials of the sweep are left.
    """

    text: str
    sweep: str | None
    wanted: dict[str, str]
    trials: tuple[Finished, ...] = ()
    unfinished: int = 0


def read(store: ResultStore) -> tuple[list[Finished], list[str]]:
    """The finished trials of a store, by id, and the ids of records that cannot be read."""
    files = sorted((store.root / "trials").glob("*/result.json"))
    found = {}
    for row in parts(files, _PATHS):
        try:
            trial = _finished(*map(_parsed, row))
        except (KeyError, TypeError, ValueError, AttributeError):  # a value is not there, or no such value
            continue
        found[trial.trial_id] = trial
    left_out = [path.parent.name for path in files if path.parent.name not in found]
    return [found[trial_id] for trial_id in sorted(found)], left_out


def loaded(store: ResultStore, trials: Iterable[Finished]) -> dict[str, Finished]:
    """The trials by id, with their windows and their tasks' outcomes, which are too much to read of all."""
    own = {trial.trial_id: trial for trial in trials}
    found = dict(own)
    for row in parts([store.trial(name) / "result.json" for name in own], ("$.trial_id", "$.windows", "$.tasks")):
        trial_id, windows, tasks = map(_parsed, row)
        sums = Sums(Windows.model_validate(windows)) if windows else None
        outcomes = {key: task.outcomes for key, task in _tasks(tasks or {}).items()}
        found[trial_id] = replace(own[trial_id], windows=sums, outcomes=outcomes)
    return found


def find(store: ResultStore, finished: Sequence[Finished], text: str) -> Side:
    """The side that a text stands for; raises `ConfigError` for a malformed or empty one."""
    sweep, wanted = _parse(store, text)
    trials, unfinished = list(finished), 0
    if sweep is not None:
        planned = {trial.trial_id for trial in plans.load(store, sweep)[0].trials}
        trials = [trial for trial in finished if trial.trial_id in planned]
        unfinished = len(planned) - len(trials)
    if not trials:
        raise ConfigError(f"{text}: no finished trials in {store.root}; run some first, or set --results")
    for key, value in wanted.items():
        _check_known(key, value, trials)
    found = tuple(trial for trial in trials if all(trial.value(key) == value for key, value in wanted.items()))
    if not found:
        raise ConfigError(f"{text}: trials have each of these values, but none has all of them; leave some out")
    return Side(text, sweep, wanted, found, unfinished)


def to_run_filter(side: Side) -> RunFilter:
    """A side for the W&B report."""
    from experiments.views.workspace import RunFilter

    config = {(f"choices.{key}" if key in GROUPS else key): yaml.safe_load(v) for key, v in side.wanted.items()}
    ids = tuple(trial.trial_id for trial in side.trials)
    plain = all(isinstance(value, (str, int, float)) for value in config.values())
    group = side.sweep if plain else None  # W&B has no filter for null or a list: then the ids alone
    return RunFilter(side.text, group, config if plain else {}, ids)


def _parse(store: ResultStore, text: str) -> tuple[str | None, dict[str, str]]:
    """The sweep and the values that a text names; a text without `=` is a sweep, and a sweep's name always is."""
    if "=" not in text or (store.sweep(text) / "plan.json").is_file():
        return text, {}
    wanted: dict[str, str] = {}
    for piece in text.split(","):
        key, equals, value = (own.strip() for own in piece.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"{text}: {piece!r} should be key=value, as in transform=h,calibration.seed=0")
        if wanted.setdefault(key, value) != value:
            raise ConfigError(f"{text}: {key} is given twice; a trial has one value of it")
    sweep = wanted.pop("sweep", None)
    return sweep, {key: value if key in GROUPS else _text(_plain(value)) for key, value in wanted.items()}


def _plain(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _check_known(key: str, value: str, trials: Sequence[Finished]) -> None:
    """Raise `ConfigError` unless some trial has the value, with those that there are."""
    values = {own for trial in trials if (own := trial.value(key)) is not None}
    if value in values:
        return
    if values:
        raise ConfigError(f"{key}={value}: no finished trial has it; {key} has: {listed(values)}")
    known = {known for trial in trials for known in (*trial.choices, *trial.values)}
    near = difflib.get_close_matches(key, known, 3) or sorted(key for key in known if "." not in key)
    raise ConfigError(f"{key}={value}: no finished trial has the key {key}; there are {', '.join(near)}, and others")


def _finished(
    trial_id: str,
    choices: dict[str, str],
    config: dict[str, Any],
    metrics: dict[str, float],
    calibrated: dict[str, Any] | None,
    evaluated: str | None,
    tasks: dict[str, Any] | None,
    method_version: int | None,
) -> Finished:
    relevant = _flatten(Identities().relevant(config))
    values = {sys.intern(key): sys.intern(_text(value)) for key, value in relevant.items()}
    if calibrated:  # a text of the hub is known by its commit
        values[CALIBRATED] = calibrated["text_sha256"] or calibrated["source"]
    values |= {EVALUATED: evaluated or "", "seed": str(config["seed"]), METHOD: str(method_version or 1)}
    choices = choices_of_today(choices)
    own = {group: choices[group] for group in GROUPS if group in choices}
    measured = {"quantized_share": 1.0} | {key: float(value) for key, value in metrics.items()}
    return Finished(trial_id, own, values, measured | {key: task.score for key, task in _tasks(tasks or {}).items()})


def _tasks(tasks: dict[str, Any]) -> dict[str, Task]:
    """The tasks whose score is a share, by what makes them comparable: the same task, few-shot count and documents."""
    whole = [task for own in tasks.values() if (task := Task.model_validate(own)).higher_is_better]
    return {f"{TASK}{task.name}, {task.num_fewshot}-shot of {task.samples:,}": task for task in whole}


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _text(value: Any) -> str:
    """A plain value as a user would write it in a filter."""
    return value if isinstance(value, str) else json.dumps(value)


def listed(values: Iterable[str]) -> str:
    """Some of the values, in order."""
    ordered = sorted(values)
    return ", ".join(ordered[:VALUES_LISTED]) + (", …" if len(ordered) > VALUES_LISTED else "")


def counted(count: int, what: str) -> str:
    """`1 trial` or `2,000 trials`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
