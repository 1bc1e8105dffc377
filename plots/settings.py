"""Trials that differ by seed alone count as one setting, others never do; and which setting stands for a method.

The rule of that is `select`: what is compared was calibrated, evaluated and quantized alike. Also the paper's names.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from experiments.records import Metrics
from plots.numbers import Number
from plots.records import BASELINE, PARTS, Trial
from wush.intervals import Metric

# The paper's models, and the option of the config group `model` of each.
MODELS = {
    "Llama-3.1-8B-Instruct": "llama3_1_8b_instruct",
    "Llama-3.2-3B-Instruct": "llama3_2_3b_instruct",
    "Qwen3-8B": "qwen3_8b",
    "Qwen3-14B": "qwen3_14b",
    "Qwen3-32B": "qwen3_32b",
}
NAMES = {option: name for name, option in MODELS.items()}
FORMATS = (BASELINE, "mxfp4", "nvfp4", "int4", "mxfp8")
TRANSFORMS = ("i", "r", "h", "hu", "sq", "wus", "wush")
ALGORITHMS = ("rtn", "gptq", "mr_gptq")
SHOWN_HASH = 8  # digits of it that are shown
# What methods that are compared have in common, of the method its version; and the calibration sets of the experiments:
# the paper's, and at small scale.
SHARED = ("method", "calibration", "evaluation", "quantize")
DEFAULTS = ("fineweb_edu", "embedded")
Method = tuple[str, str | None, str | None]
Key = TypeVar("Key", bound=Hashable)


VALUES: Final[dict[Metric, Callable[[Metrics], float]]] = {
    "kl": lambda own: own.kl,
    "perplexity": lambda own: own.perplexity,
    "gap": lambda own: own.perplexity - own.perplexity_original,
    "top1": lambda own: own.top1,
}


@dataclass(frozen=True)
class Setting:
    """Trials that differ by seed alone; `note` says how they differ from others of the same key, if there are any."""

    trials: tuple[Trial, ...]
    note: str = ""

    @property
    def first(self) -> Trial:
        """Any of them."""
        return self.trials[0]

    @property
    def draws(self) -> dict[Hashable, Trial]:
        """The trials by what tells them apart: the seeds that other methods have too, if these do."""
        found: dict[Hashable, Trial] = {trial.draw: trial for trial in self.trials}
        if len(found) < len(self.trials):
            return {(trial.seeds, trial.task_seeds): trial for trial in self.trials}
        return found

    def number(self, value: Callable[[Trial], float]) -> Number:
        """A value over the trials."""
        found = Number.of({draw: value(trial) for draw, trial in self.draws.items()})
        assert found is not None
        return found

    def metric(self, metric: Metric) -> Number:
        """A metric of the evaluated text: over the trials, or over its windows where there is one or all are equal."""
        first, values = self.first, {VALUES[metric](trial.metrics) for trial in self.trials}
        if len(values) == 1 and first.windows is not None:
            return Number.of_windows(next(iter(values)), first.windows, metric, first.evaluated)
        return self.number(lambda trial: VALUES[metric](trial.metrics))


@dataclass(frozen=True)
class Selection:
    """A setting for each method, all run alike; `left_out`: how many trials were not, and how they differ."""

    settings: dict[Method, Setting]
    left_out: tuple[str, ...] = ()


def select(trials: Iterable[Trial], by_tasks: bool = False) -> Selection:
    """Of trials of one model, those that were calibrated, evaluated and quantized as most methods were."""
    kept, left_out = alike(trials, by_tasks)
    settings: dict[Method, Setting] = {}
    for one, own in by_key(kept, method, by_tasks).items():
        settings[one], others = pick(own)
        left_out += tuple(f"{' '.join(filter(None, one))}: {other}" for other in others)
    return Selection({one: settings[one] for one in sorted(settings, key=lambda one: order(*one))}, left_out)


def select_by(trials: Iterable[Trial], group: Callable[[Trial], Key], by_tasks: bool = False) -> dict[Key, Selection]:
    """The selection of each group."""
    groups: dict[Key, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[group(trial)].append(trial)
    return {one: select(own, by_tasks) for one, own in groups.items()}


def alike(
    trials: Iterable[Trial], by_tasks: bool = False, shared: Sequence[str] = SHARED
) -> tuple[list[Trial], tuple[str, ...]]:
    """The trials with those settings of the parts `shared` that most methods have, and what is said of the others.

    Of several versions of the method it is the latest. Ties go to the experiments' own calibration set, then to more
    runs, never to the newest. A trial that lacks a part (the original model is not calibrated) goes with any.
    """
    told = [(_run_with(trial, by_tasks, shared), trial) for trial in trials]
    kinds = {json.dumps(own, sort_keys=True): own for own, _ in told}
    if not kinds:
        return [], ()

    def rank(name: str) -> tuple[int, int, int, int, str]:
        own = [trial for one, trial in told if _fits(one, kinds[name])]
        default = kinds[name].get("calibration", {}).get("calibration", "")
        version = max(trial.method_version for trial in own)
        return -version, -len(set(map(method, own))), _place(DEFAULTS, default), -sum(map(_runs, own)), name

    best = kinds[min(kinds, key=rank)]
    others = Counter(_difference(one, best) for one, _ in told if not _fits(one, best))
    kept = [trial for one, trial in told if _fits(one, best)]
    return kept, tuple(f"{_counted(others[note])} with {note}" for note in sorted(others))


def pick(settings: Sequence[Setting]) -> tuple[Setting, tuple[str, ...]]:
    """The setting of most trials, the first by its note of several, and what is said of the others."""
    first, *others = sorted(settings, key=lambda setting: (-len(setting.trials), setting.note))
    return first, tuple(f"{_counted(len(other.trials))} with {other.note}" for other in others)


def by_key(trials: Iterable[Trial], key: Callable[[Trial], Key], by_tasks: bool = False) -> dict[Key, list[Setting]]:
    """The settings of each key; several of one key differ in more than their seeds and have notes that say how.

    Without `by_tasks` an evaluation is the text that was evaluated, whichever tasks were run beside it.
    """
    found: dict[Key, dict[str, dict[str, Trial]]] = defaultdict(lambda: defaultdict(dict))
    for trial in sorted(trials, key=lambda trial: trial.finished_at):
        setting = json.dumps(_told(trial, by_tasks), sort_keys=True)
        seeds = trial.seeds + (trial.task_seeds if by_tasks else "")
        found[key(trial)][setting][seeds] = trial  # the newest of those that differ in nothing that counts
    return {one: _noted([list(group.values()) for group in groups.values()], by_tasks) for one, groups in found.items()}


def method(trial: Trial) -> Method:
    """Format, algorithm and transform as the paper's tables give them: SmoothQuant, a transform here, is one there."""
    if trial.transform == "sq" and trial.algorithm == "rtn":
        return trial.format, "smoothquant", None
    return trial.format, trial.algorithm, trial.transform


def order(format_: str, algorithm: str | None, transform: str | None) -> tuple[Any, ...]:
    """A place for sorting methods: by format, algorithm and transform, unknown ones last."""
    return (
        _place(FORMATS, format_), format_, _place(ALGORITHMS, algorithm), algorithm or "",
        _place(TRANSFORMS, transform), transform or "",
    )  # fmt: skip


def or_none(settings: Sequence[Setting]) -> Sequence[Setting | None]:
    """The settings, or one None: a row without numbers of ours."""
    return settings or [None]


def shown(model: str) -> str:
    """The paper's name of a model, or its option."""
    return NAMES.get(model, model)


def _place(known: Sequence[str], one: str | None) -> int:
    return -1 if one is None else known.index(one) if one in known else len(known)


def _noted(groups: list[list[Trial]], by_tasks: bool) -> list[Setting]:
    if len(groups) == 1:
        return [Setting(tuple(groups[0]))]
    flat = [_flat(group[0], by_tasks) for group in groups]
    telling = [key for key in dict.fromkeys(key for one in flat for key in one) if _tells(key, flat)]
    settings = [
        Setting(tuple(group), " ".join(f"{key}={one.get(key, '-')}" for key in telling))
        for group, one in zip(groups, flat, strict=True)
    ]
    return sorted(settings, key=lambda setting: setting.note)


def _tells(key: str, flat: list[dict[str, str]]) -> bool:
    """Whether a key's value differs between settings that chose the same option of its group."""
    group = key.partition(".")[0] if "." in key else ""
    values: dict[str | None, set[str | None]] = defaultdict(set)
    for one in flat:
        values[one.get(group)].add(one.get(key))
    return any(len(own) > 1 for own in values.values())


def _told(trial: Trial, by_tasks: bool) -> dict[str, Any]:
    return trial.settings if by_tasks else trial.settings | {"evaluation": {"ids": trial.evaluated[:SHOWN_HASH]}}


def _flat(trial: Trial, by_tasks: bool) -> dict[str, str]:
    """Every key of the settings as text (`calibration.windows`), and the option chosen of each group."""
    flat: dict[str, str] = {part: str(getattr(trial, part)) for part in PARTS if by_tasks or part != "evaluation"}
    for part, value in _told(trial, by_tasks).items():
        flat |= _leaves(part, value)
    return flat


def _leaves(prefix: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: str(value)}
    return {name: own for key, one in value.items() for name, own in _leaves(f"{prefix}.{key}", one).items()}


def _run_with(trial: Trial, by_tasks: bool, shared: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of each part that the trial has, every key as text, and the option chosen under the part's own name."""
    told = _told(trial, by_tasks)
    found = {part: _leaves(part, told[part]) for part in shared if part in told}
    if "calibration" in found:
        found["calibration"]["calibration"] = str(trial.calibration)
    if "evaluation" in found and by_tasks:
        found["evaluation"]["evaluation"] = str(trial.evaluation)
    return found


def _fits(one: dict[str, dict[str, str]], best: dict[str, dict[str, str]]) -> bool:
    return all(best.get(part) == own for part, own in one.items())


def _difference(one: dict[str, dict[str, str]], best: dict[str, dict[str, str]]) -> str:
    """By the option chosen where that differs, or else by its keys."""
    found = []
    for part, own in one.items():
        other = best.get(part, {})
        keys = [key for key in own.keys() | other.keys() if own.get(key) != other.get(key)]
        found += [part] if part in keys else sorted(keys)
    return " ".join(f"{key}={one[key.partition('.')[0]].get(key, '-')}" for key in found)


def _runs(trial: Trial) -> int:
    return max((len(task.runs) for task in trial.tasks.values()), default=1)


def _counted(trials: int) -> str:
    return f"{trials} trial{'s' if trials > 1 else ''}"
