"""Two sets of finished trials compared pair by pair: each trial with the one that differs only as the sets do.

A side is a sweep, or what trials have in common, such as `transform=h`. Nothing is left out silently: a trial
without a partner is kept with the reason, and an ambiguous pair is an error.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Final

import yaml

from experiments import plans
from experiments.estimates import parts
from experiments.identity import Identities
from experiments.schema import ConfigError
from experiments.store import ResultStore
from experiments.sweep import LABELLING_GROUPS, _flatten

if TYPE_CHECKING:
    from experiments.views.workspace import RunFilter

_PATHS: Final = (
    *("$.trial_id", "$.choices", "$.config", "$.metrics"),
    *("$.data.calibration.text_sha256", "$.data.evaluation.ids_sha256"),
)
CALIBRATED, EVALUATED = "calibration.text_sha256", "evaluation.ids_sha256"  # of what was really read
GROUPS: Final = (*LABELLING_GROUPS, "calibration", "evaluation")
VALUES_LISTED = 12


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished trial: the option of each group, every other value that can change its result, and its metrics.

    `values`: by dotted config key, as YAML would have them; with the content of its texts as hashes.
    """

    trial_id: str
    choices: dict[str, str]
    values: dict[str, str]
    metrics: dict[str, float]

    def value(self, key: str) -> str | None:
        """Of a group or config key; None for one that does not matter to the trial."""
        return self.choices.get(key, self.values.get(key))

    @property
    def name(self) -> str:
        """One line, such as `1a2b3c4d smollm2_135m mxfp4 wush rtn`."""
        return " ".join([self.trial_id, *(self.choices[group] for group in LABELLING_GROUPS if group in self.choices)])


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


@dataclass(frozen=True)
class Pair:
    """Trials of each side that differ only as the sides do; several of one side differ by seed, and their mean counts."""

    a: tuple[Finished, ...]
    b: tuple[Finished, ...]


@dataclass(frozen=True)
class Metric:
    """A metric: its values are shown `scale` times as big, with so many digits."""

    name: str
    key: str
    unit: str
    scale: float
    digits: int
    lower_is_better: bool = True

    def of(self, trials: Sequence[Finished]) -> float:
        """The mean over trials."""
        return fmean(self._of(trial.metrics) for trial in trials) * self.scale

    def _of(self, metrics: dict[str, float]) -> float:
        return metrics["perplexity"] - metrics["perplexity_original"] if self.key == "gap" else metrics[self.key]


METRICS: Final = (
    Metric("perplexity gap", "gap", "", 1, 3),
    Metric("KL", "kl", "nats", 1, 4),
    Metric("top-1", "top1", "%", 100, 2, lower_is_better=False),
    Metric("bits", "bits_per_weight", "a weight", 1, 3),
)


@dataclass(frozen=True)
class Difference:
    """Of one metric over pairs: the means of both sides, that of B - A, and its standard error, sd / sqrt(n)."""

    metric: Metric
    a: float
    b: float
    mean: float
    error: float | None

    @property
    def clear(self) -> bool:
        """Whether it is larger than two standard errors; never with one pair."""
        return self.error is not None and abs(self.mean) > max(2 * self.error, 1e-12)

    @property
    def better(self) -> bool:
        """Whether B is better than A."""
        return self.mean < 0 if self.metric.lower_is_better else self.mean > 0


@dataclass(frozen=True)
class Setting:
    """The pairs that differ from each other by seed alone."""

    labels: dict[str, str]
    pairs: tuple[Pair, ...]

    @property
    def differences(self) -> list[Difference]:
        """By metric."""
        return [self._difference(metric) for metric in METRICS]

    def _difference(self, metric: Metric) -> Difference:
        a, b = ([metric.of(side) for side in sides] for sides in zip(*((p.a, p.b) for p in self.pairs), strict=True))
        differences = [own - other for own, other in zip(b, a, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        return Difference(metric, fmean(a), fmean(b), fmean(differences), error)


@dataclass(frozen=True)
class Unpaired:
    """A trial without a partner; `side` is A or B."""

    side: str
    reason: str
    trial: Finished


@dataclass(frozen=True)
class Comparison:
    """Two sides, the keys by which they differ, their pairs by setting, and what could not be compared."""

    a: Side
    b: Side
    differing: tuple[str, ...]
    settings: tuple[Setting, ...]
    unpaired: tuple[Unpaired, ...]
    notes: tuple[str, ...]


def compare(store: ResultStore, a: str, b: str) -> Comparison:
    """Compare two sweeps, or the trials that two filters such as `transform=h,format=mxfp4` find, or one with another.

    Pairs agree in every value that can change a result, except for the keys by which the sides differ: those of the
    filters, and between sweeps those that have no value in common. Seeds must agree where both sides have them.
    Raises `ConfigError` for a side that is malformed or empty, for an ambiguous pair, and when there is no pair.
    """
    finished, left_out = read(store)
    sides = (find(store, finished, a), find(store, finished, b))
    differing = _differing(*sides)
    common = {trial.trial_id for trial in sides[0].trials} & {trial.trial_id for trial in sides[1].trials}
    own = [[trial for trial in side.trials if trial.trial_id not in common] for side in sides]
    if not differing or not (own[0] and own[1]):
        raise ConfigError(
            f"{a} and {b} have no key by which they differ ({len(common)} trials are on both sides); "
            "compare filters such as transform=h and transform=wush"
        )
    pairs, unpaired = _paired(sides, own, _dropped(differing, own))
    if not pairs:
        reasons = "; ".join(dict.fromkeys(f"{one.side}: {one.reason}" for one in unpaired))
        raise ConfigError(f"{a} and {b}: no trial of one has a partner in the other: {reasons}")
    notes = _notes(sides, common, pairs, left_out)
    return Comparison(*sides, differing, _settings(pairs, differing), tuple(unpaired), notes)


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
        raise ConfigError(f"{key}={value}: no finished trial has it; {key} has: {_listed(values)}")
    known = {known for trial in trials for known in (*trial.choices, *trial.values)}
    near = difflib.get_close_matches(key, known, 3) or sorted(key for key in known if "." not in key)
    raise ConfigError(f"{key}={value}: no finished trial has the key {key}; there are {', '.join(near)}, and others")


# --- which trials are partners


def _differing(a: Side, b: Side) -> tuple[str, ...]:
    """The keys by which two sides differ: those whose wanted values do, else those without a common value."""
    given = tuple(key for key in dict.fromkeys((*a.wanted, *b.wanted)) if a.wanted.get(key) != b.wanted.get(key))
    if a.sweep == b.sweep and (given or a.sweep is not None):
        return given
    found: list[str] = list(given)
    keys = dict.fromkeys(key for side in (a, b) for trial in side.trials for key in trial.values)
    for key in (*GROUPS, *keys):
        top = key.partition(".")[0]
        if top != "evaluation" and top not in found and key not in found and _apart(key, a.trials, b.trials):
            found.append(key)
    return tuple(found)


def _apart(key: str, a: Iterable[Finished], b: Iterable[Finished]) -> bool:
    """Whether no value of a key is on both sides."""
    return {trial.value(key) for trial in a}.isdisjoint({trial.value(key) for trial in b})


def _is_seed(key: str) -> bool:
    return key == "seed" or key.endswith(".seed")


def _dropped(differing: Sequence[str], own: Sequence[Sequence[Finished]]) -> set[str]:
    """The config keys in which partners need not agree; a seed that both sides have is none, unless they differ by it.

    The evaluated text is known by its tokens, and the calibration text by its content, not by their paths.
    """
    keys = {key for trials in own for trial in trials for key in trial.values}
    dropped = {key for key in keys if any(f"{key}.".startswith(f"{one}.") for one in differing)}
    for key in filter(_is_seed, dropped - set(differing)):
        if all(key in trial.values for trials in own for trial in trials) and not _apart(key, *own):
            dropped = dropped - {key}
    if "seed" in differing:
        dropped |= set(filter(_is_seed, keys))
    if "calibration.path" in differing:
        dropped.add(CALIBRATED)
    return dropped | {key for key in keys if key.startswith("evaluation.")} | {"calibration.path", "seed"}


Key = tuple[tuple[str, str], ...]


def _paired(
    sides: Sequence[Side], own: Sequence[Sequence[Finished]], dropped: set[str]
) -> tuple[list[Pair], list[Unpaired]]:
    """The pairs, and the trials without a partner."""
    indices: list[dict[Key, dict[str, list[Finished]]]] = []
    for trials in own:
        indices.append(defaultdict(lambda: defaultdict(list)))
        for trial in trials:
            key = tuple(sorted(pair for pair in trial.values.items() if pair[0] not in dropped))
            indices[-1][key][trial.values[EVALUATED]].append(trial)
    pairs, unpaired = [], []
    for letter, side, index, other in zip("AB", sides, indices, indices[::-1], strict=True):
        known = _known_values(other)
        for key, texts in index.items():
            for text, found in texts.items():
                partners = other[key][text] if key in other and text in other[key] else []
                if partners:
                    _check_replicates(side, found)
                    pairs += [Pair(tuple(found), tuple(partners))] if letter == "A" else []
                else:
                    reason = "evaluated on a different text" if key in other else _missing(key, known)
                    unpaired += [Unpaired(letter, reason, trial) for trial in found]
    return pairs, unpaired


def _known_values(index: dict[Key, dict[str, list[Finished]]]) -> dict[str, set[str]]:
    known: dict[str, set[str]] = defaultdict(set)
    for key in index:
        for name, value in key:
            known[name].add(value)
    return known


def _missing(key: Key, known: dict[str, set[str]]) -> str:
    """Why nothing on the other side agrees in all values."""
    missing = {name: value for name, value in key if value not in known[name]}
    if not missing:
        return "the other side has each of its values, but not together"
    tops = [name.removesuffix("._target_") for name in missing if name.endswith("._target_")]
    told = [name for name in missing if name in tops or name.partition(".")[0] not in tops]
    own = [f"{name}={missing[name]} (but {_listed(known[name]) or 'no such key'})" for name in told]
    groups = [f"{top}={missing[f'{top}._target_']}" for top in tops]
    return f"the other side has no {' and no '.join([*groups, *own])}"


def _check_replicates(side: Side, trials: Sequence[Finished]) -> None:
    """Raise `ConfigError` if trials that would be one partner differ by more than seeds."""
    if len(trials) < 2:
        return
    keys = dict.fromkeys((*LABELLING_GROUPS, *(key for trial in trials for key in trial.values)))
    several = {key: values for key in keys if len(values := {trial.value(key) for trial in trials}) > 1}
    telling = [key for key in several if not _is_seed(key) and key not in ("calibration.path", "evaluation.path")]
    if not telling:
        return
    key = telling[0]
    values = sorted(value for value in several[key] if value is not None)
    text = f"sweep={side.sweep}" if side.text == side.sweep else side.text
    raise ConfigError(
        f"{side.text}: {len(trials)} of its trials match one of the other side; they differ by "
        f"{key} ({_listed(values)}): give it on both sides or on this, such as {text},{key}={values[0]}"
    )


# --- settings, and what is told beside them


def _settings(pairs: Sequence[Pair], differing: Sequence[str]) -> tuple[Setting, ...]:
    """The pairs by all that is no seed and no difference of the sides, labelled by what tells these apart."""
    shared = [_shared(pair) for pair in pairs]
    groups: dict[Key, list[Pair]] = defaultdict(list)
    for own, pair in zip(shared, pairs, strict=True):
        groups[tuple(sorted(own.items()))].append(pair)
    first = {key: members[0].a[0] for key, members in groups.items()}
    values: dict[tuple[str, str | None], set[str | None]] = defaultdict(set)
    names = dict.fromkeys(name for own in shared for name in own if not name.endswith("._target_"))
    for key, trial in first.items():
        own = dict(key)
        for name in names:
            values[name, trial.choices.get(name.partition(".")[0])].add(own.get(name))
    told = dict.fromkeys(name for (name, _), several in values.items() if len(several) > 1)
    columns = [group for group in LABELLING_GROUPS if group not in differing]
    settings = []
    for key, members in groups.items():
        own, choices = dict(key), first[key].choices
        labels = {group: choices.get(group, "-") for group in columns}
        labels |= {name: own.get(name, "-")[:12] for name in told}
        settings.append(Setting(labels, tuple(members)))
    return tuple(sorted(settings, key=lambda setting: list(setting.labels.values())))


def _shared(pair: Pair) -> dict[str, str]:
    """What both sides of a pair have in common, without seeds."""
    a, b = pair.a[0].values, pair.b[0].values
    return {key: value for key, value in a.items() if b.get(key) == value and not _is_seed(key)}


def _notes(
    sides: Sequence[Side], common: Iterable[str], pairs: Sequence[Pair], left_out: Sequence[str]
) -> tuple[str, ...]:
    unfinished = [f"{side.unfinished} trials of {side.sweep} are not finished" for side in sides if side.unfinished]
    averaged = [pair for pair in pairs if len(pair.a) > 1 or len(pair.b) > 1]
    means = f"{len(averaged)} pairs: the mean of trials that differ by seed, as the other side does not have that seed"
    both = len(list(common))
    return (
        *unfinished,
        *([means] if averaged else []),
        *([f"{both} trials are on both sides, and compared with none"] if both else []),
        *([f"{len(left_out)} records cannot be read: {_listed(left_out)}"] if left_out else []),
    )


def _listed(values: Iterable[str]) -> str:
    ordered = sorted(values)
    return ", ".join(ordered[:VALUES_LISTED]) + (", …" if len(ordered) > VALUES_LISTED else "")


# --- reading


def _finished(
    trial_id: str,
    choices: dict[str, str],
    config: dict[str, Any],
    metrics: dict[str, float],
    calibrated: str | None,
    evaluated: str | None,
) -> Finished:
    relevant = _flatten(Identities().relevant(config))
    values = {sys.intern(key): sys.intern(_text(value)) for key, value in relevant.items()}
    values |= {CALIBRATED: calibrated} if calibrated else {}
    values |= {EVALUATED: evaluated or "", "seed": str(config["seed"])}
    own = {group: choices[group] for group in GROUPS if group in choices}
    return Finished(trial_id, own, values, {key: float(value) for key, value in metrics.items()})


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _text(value: Any) -> str:
    """A plain value as a user would write it in a filter."""
    return value if isinstance(value, str) else json.dumps(value)
