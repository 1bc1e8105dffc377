"""Two sets of finished trials compared pair by pair: each trial with the one that differs only as the sets do.

A side is a sweep, or what trials have in common, such as `transform=h`. Nothing is left out silently: a trial
without a partner is kept with the reason, and an ambiguous pair is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import fmean
from typing import Final, cast, get_args

from experiments.replicates import is_seed
from experiments.schema import ConfigError
from experiments.sides import CALIBRATED, EVALUATED, GROUPS, TASK, Finished, Side, counted, find, listed, loaded, read
from experiments.store import ResultStore
from experiments.sweep import LABELLING_GROUPS
from wush import intervals
from wush.intervals import Interval


@dataclass(frozen=True)
class Pair:
    """Trials of each side that differ only as the sides do. The mean counts of several, which differ by seed."""

    a: tuple[Finished, ...]
    b: tuple[Finished, ...]


@dataclass(frozen=True)
class Metric:
    """A metric: its values are shown `scale` times as big, with so many digits; None where neither is better."""

    name: str
    key: str
    unit: str
    scale: float
    digits: int
    lower_is_better: bool | None = True

    def of(self, trials: Sequence[Finished]) -> float:
        """The mean over trials."""
        return fmean(self._of(trial.metrics) for trial in trials) * self.scale

    def paired(self, a: Finished, b: Finished) -> Interval | None:
        """The interval of B - A over windows, or a task's documents; None where they are not known."""
        if self.key.startswith(TASK):
            own, other = a.outcomes.get(self.key, []), b.outcomes.get(self.key, [])
            found = intervals.paired_documents(own, other) if len(own) == len(other) else None
        elif self.key in get_args(intervals.Metric) and a.windows and b.windows:
            found = intervals.paired(a.windows, b.windows, cast(intervals.Metric, self.key))
        else:
            found = None
        return found and found.scaled(self.scale)

    def _of(self, metrics: dict[str, float]) -> float:
        return metrics["perplexity"] - metrics["perplexity_original"] if self.key == "gap" else metrics[self.key]


KL, GAP = Metric("KL", "kl", "nats", 1, 4), Metric("perplexity gap", "gap", "", 1, 3)
METRICS: Final = (
    KL,
    GAP,
    Metric("top-1", "top1", "%", 100, 2, lower_is_better=False),
    Metric("bits", "bits_per_weight", "a weight", 1, 3, lower_is_better=None),
)
SHARE: Final = Metric("quantized", "quantized_share", "% of weights", 100, 1, lower_is_better=None)


@dataclass(frozen=True)
class Difference:
    """Of one metric over pairs: the means of both sides, and that of B - A with its 95% interval.

    The interval is over windows, or a task's documents, for a single pair, and over several pairs Student's t; None
    where neither is known.
    """

    metric: Metric
    a: float
    b: float
    mean: float
    interval: Interval | None
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and self.interval.clear

    @property
    def better(self) -> bool:
        """Whether B is better than A: never by a perplexity below the original's, which is another model's."""
        if self.metric.lower_is_better is None or (self.metric == GAP and self.b < 0):
            return False
        return self.mean < 0 if self.metric.lower_is_better else self.mean > 0

    @property
    def worse(self) -> bool:
        """Whether A is better than B, as `better`."""
        swapped = replace(self, a=self.b, b=self.a, mean=-self.mean)
        return swapped.better


@dataclass(frozen=True)
class Setting:
    """The pairs that differ from each other by seed alone."""

    labels: dict[str, str]
    pairs: tuple[Pair, ...]

    @property
    def differences(self) -> list[Difference]:
        """By metric, and by task that all of them have; the share quantized where it is not all."""
        trials = [trial for pair in self.pairs for trial in (*pair.a, *pair.b)]
        tasks = [key for key in trials[0].metrics if all(key.startswith(TASK) and key in t.metrics for t in trials)]
        of_tasks = [Metric(key.removeprefix(TASK), key, "%", 100, 2, lower_is_better=False) for key in tasks]
        share = [SHARE] if any(trial.metrics[SHARE.key] < 1 for trial in trials) else []
        return [self._difference(metric) for metric in (*METRICS, *share, *of_tasks)]

    @property
    def single(self) -> tuple[Finished, Finished] | None:
        """The two trials of a setting that has no more, or none with other numbers: whose seeds change nothing."""
        a, b = ([trial for pair in self.pairs for trial in side(pair)] for side in (attrgetter("a"), attrgetter("b")))
        alike = all(trial.metrics == side[0].metrics for side in (a, b) for trial in side)
        return (a[0], b[0]) if alike else None

    def _difference(self, metric: Metric) -> Difference:
        a, b = ([metric.of(side) for side in sides] for sides in zip(*((p.a, p.b) for p in self.pairs), strict=True))
        differences = [own - other for own, other in zip(b, a, strict=True)]
        interval = None
        if metric.lower_is_better is not None:  # bits have no noise
            interval = metric.paired(*self.single) if self.single else self._over_seeds(metric, differences)
        return Difference(metric, fmean(a), fmean(b), fmean(differences), interval, len(differences))

    def _over_seeds(self, metric: Metric, differences: list[float]) -> Interval | None:
        if len(differences) > 1:
            return intervals.of_runs(differences)
        # One pair of means: each side's own spread over its seeds, where it has several.
        (pair,), (mean,) = self.pairs, differences
        margins = []
        for side in (pair.a, pair.b):
            own = intervals.of_runs([metric.of([trial]) for trial in side])
            margins += [(own.high - own.low) / 2] if own else []
        margin = sum(one**2 for one in margins) ** 0.5
        return Interval(mean - margin, mean + margin) if margins else None


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
    common = {trial.trial_id for trial in sides[0].trials} & {trial.trial_id for trial in sides[1].trials}
    own = [[trial for trial in side.trials if trial.trial_id not in common] for side in sides]
    differing = _differing(*sides, own)
    if not differing or not (own[0] and own[1]):
        raise ConfigError(
            f"{a} and {b}: there is no key in which all trials of one differ from all of the other "
            f"({len(common)} are on both sides); compare filters such as transform=h and transform=wush"
        )
    pairs, unpaired = _paired(sides, own, _dropped(differing, own))
    if not pairs:
        reasons = "; ".join(dict.fromkeys(f"{one.side}: {one.reason}" for one in unpaired))
        raise ConfigError(f"{a} and {b}: no trial of one has a partner in the other: {reasons}")
    notes = _notes(sides, common, pairs, left_out)
    settings = _with_windows(store, _settings(pairs, differing))
    return Comparison(*sides, differing, settings, tuple(unpaired), notes)


def _with_windows(store: ResultStore, settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """The settings, with windows and outcomes of single pairs of trials, whose intervals are over these."""
    found = loaded(store, [trial for setting in settings for trial in setting.single or ()])

    def filled(pair: Pair) -> Pair:
        a, b = (tuple(found.get(trial.trial_id, trial) for trial in side) for side in (pair.a, pair.b))
        return Pair(a, b)

    return tuple(replace(one, pairs=tuple(map(filled, one.pairs))) for one in settings)


# --- which trials are partners


def _differing(a: Side, b: Side, own: Sequence[Sequence[Finished]]) -> tuple[str, ...]:
    """The keys by which two sides differ: wanted with other values, and between sweeps those without a common value."""
    found = [key for key in dict.fromkeys((*a.wanted, *b.wanted)) if a.wanted.get(key) != b.wanted.get(key)]
    if a.sweep == b.sweep:
        return tuple(found)
    keys = dict.fromkeys(key for trials in own for trial in trials for key in trial.values)
    for key in (*GROUPS, *keys):
        top = key.partition(".")[0]
        if top not in ("evaluation", *found) and key not in found and _apart(key, *own):
            found.append(key)
    return tuple(found)


def _apart(key: str, a: Iterable[Finished], b: Iterable[Finished]) -> bool:
    """Whether both sides have values of a key, but none in common."""
    own, others = ({value for trial in side if (value := trial.value(key)) is not None} for side in (a, b))
    return bool(own and others) and own.isdisjoint(others)


def _dropped(differing: Sequence[str], own: Sequence[Sequence[Finished]]) -> set[str]:
    """The config keys in which partners need not agree; a seed that both sides have is none, unless they differ by it.

    The evaluated text is known by its tokens, and the calibration text by its content, not by their paths.
    """
    keys = {key for trials in own for trial in trials for key in trial.values}
    dropped = {key for key in keys if any(f"{key}.".startswith(f"{one}.") for one in differing)}
    for key in filter(is_seed, dropped - set(differing)):
        if all(key in trial.values for trials in own for trial in trials) and not _apart(key, *own):
            dropped = dropped - {key}
    if "seed" in differing:
        dropped |= set(filter(is_seed, keys))
    if "calibration.path" in differing:
        dropped.add(CALIBRATED)
    # What is measured besides cannot change what is compared; seeds of a task's answers can.
    unread = {key for key in keys if key.startswith(("evaluation.", "measure.")) and not key.endswith(".seeds")}
    return dropped | unread | {"calibration.path", "seed"}


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
    own = [f"{name}={missing[name]} (but {listed(known[name]) or 'no such key'})" for name in told]
    groups = [f"{top}={missing[f'{top}._target_']}" for top in tops]
    return f"the other side has no {' and no '.join([*groups, *own])}"


def _check_replicates(side: Side, trials: Sequence[Finished]) -> None:
    """Raise `ConfigError` if trials that would be one partner differ by more than seeds."""
    if len(trials) < 2:
        return
    keys = dict.fromkeys((*LABELLING_GROUPS, *(key for trial in trials for key in trial.values)))
    several = {key: values for key in keys if len(values := {trial.value(key) for trial in trials}) > 1}
    telling = [key for key in several if not is_seed(key) and key not in ("calibration.path", "evaluation.path")]
    if not telling:
        return
    key = telling[0]
    known = sorted(value for value in several[key] if value is not None)
    text = f"sweep={side.sweep}" if side.text == side.sweep else side.text
    raise ConfigError(
        f"{side.text}: {len(trials)} of its trials match one of the other side; they differ by "
        f"{key} ({listed(known)}): choose one, as with {text},{key}={known[0]}"
    )


# --- settings, and what is told beside them


def _settings(pairs: Sequence[Pair], differing: Sequence[str]) -> tuple[Setting, ...]:
    """The pairs by all that is no seed and no difference of the sides, labelled by what tells these apart."""
    shared = [_shared(pair, differing) for pair in pairs]
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


def _shared(pair: Pair, differing: Sequence[str]) -> dict[str, str]:
    """What both sides of a pair have in common, without seeds."""
    a, b = pair.a[0].values, pair.b[0].values
    own = {key: value for key, value in a.items() if b.get(key) == value and not is_seed(key)}
    return {key: value for key, value in own.items() if not any(f"{key}.".startswith(f"{one}.") for one in differing)}


def _notes(
    sides: Sequence[Side], common: Iterable[str], pairs: Sequence[Pair], left_out: Sequence[str]
) -> tuple[str, ...]:
    unfinished = [
        f"not finished yet: {counted(side.unfinished, 'trial')} of {side.sweep}" for side in sides if side.unfinished
    ]
    averaged = [pair for pair in pairs if len(pair.a) > 1 or len(pair.b) > 1]
    means = f"the mean of trials that differ by a seed that the other side has not: {counted(len(averaged), 'pair')}"
    both = len(list(common))
    old = [trial for pair in pairs for trial in (*pair.a, *pair.b) if trial.old]
    return (
        *unfinished,
        *([means] if averaged else []),
        *([f"of an earlier version of the method (old): {counted(len(old), 'trial')}"] if old else []),
        *([f"on both sides, and compared with none: {counted(both, 'trial')}"] if both else []),
        *(
            [f"{counted(len(left_out), 'record')} left out, damaged or of another version: {listed(left_out)}"]
            if left_out
            else []
        ),
    )
