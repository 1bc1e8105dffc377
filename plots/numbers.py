"""A number of a table or figure: what it is the mean of, its 95% interval, and how two of ours are compared.

The intervals are those of `wush.intervals`: over seeds where there are several, else over evaluated windows or over a
task's documents. Published numbers have no interval, and a standard deviation where the paper states one.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from wush.intervals import Interval, Metric, Windows, of_metric, of_runs, paired, paired_documents

Outcomes = Mapping[str, Sequence[float]]  # of each task of an average, its documents' values, in percent


@dataclass(frozen=True)
class Sample:
    """What a number of ours was measured on, by which it is compared with another in pairs.

    `runs`: the value of each, by what tells runs of one setting apart. Of a single run: `windows` with their `metric`
    and the SHA-256 of the evaluated `text`, or the documents' `outcomes`.
    """

    runs: Mapping[Hashable, float] = field(default_factory=dict)
    windows: Windows | None = None
    metric: Metric = "kl"
    text: str = ""
    outcomes: Outcomes = field(default_factory=dict)


@dataclass(frozen=True)
class Number:
    """The mean of one or several runs. `std`: between them, as published; `interval`: of ours, None where unknown."""

    mean: float
    std: float | None = None
    runs: int = 1
    interval: Interval | None = None
    sample: Sample = field(default=Sample(), repr=False, compare=False)

    @classmethod
    def of(cls, values: Mapping[Hashable, float] | Sequence[float]) -> "Number | None":
        """Over runs, with Student's interval where there are several; None of no values. A sequence's are by place."""
        own: Mapping[Hashable, float] = values if isinstance(values, Mapping) else dict(enumerate(values))
        if not own:
            return None
        sample = Sample(runs=own) if len(own) > 1 else Sample()
        return cls(fmean(own.values()), None, len(own), of_runs(list(own.values())), sample)

    @classmethod
    def of_windows(cls, value: float, windows: Windows, metric: Metric, text: str) -> "Number":
        """A metric of a single trial over its evaluated windows."""
        return cls(value, interval=of_metric(windows, metric), sample=Sample({}, windows, metric, text))

    @property
    def ends(self) -> list[list[float]] | None:
        """How far the interval goes below and above the mean, as matplotlib's error bars take it."""
        own = self.interval
        return [[self.mean - own.low], [own.high - self.mean]] if own else None

    def scaled(self, factor: float) -> "Number":
        """The same in another unit; it is no more compared in pairs."""
        std = None if self.std is None else self.std * factor
        return Number(self.mean * factor, std, self.runs, self.interval and self.interval.scaled(factor))


def difference(a: Number, b: Number, exact: bool = False) -> Interval | None:
    """The interval of B's mean less A's; None where nothing tells it.

    In pairs where both have the same seeds, windows or documents, else as of two independent numbers, of which one
    without an interval is `exact` or unknown.
    """
    known = exact or (a.interval is not None and b.interval is not None)
    return _by_run(a, b) or _by_window(a, b) or _by_document(a, b) or (_apart(a, b) if known else None)


def mean_of(numbers: Sequence[Number]) -> Interval | None:
    """The interval of the mean of independent numbers; None where one of them has none."""
    known = [(one.mean, one.interval) for one in numbers if one.interval]
    return _mean_of(known) if known and len(known) == len(numbers) else None


def _by_run(a: Number, b: Number) -> Interval | None:
    ours, theirs = a.sample.runs, b.sample.runs
    if len(ours) < 2 or ours.keys() != theirs.keys():
        return None
    return of_runs([theirs[key] - ours[key] for key in ours])


def _by_window(a: Number, b: Number) -> Interval | None:
    ours, theirs = a.sample, b.sample
    if ours.windows is None or theirs.windows is None or (ours.text, ours.metric) != (theirs.text, theirs.metric):
        return None
    return paired(ours.windows, theirs.windows, ours.metric)


def _by_document(a: Number, b: Number) -> Interval | None:
    ours, theirs = a.sample.outcomes, b.sample.outcomes
    if not ours or {name: len(own) for name, own in ours.items()} != {name: len(own) for name, own in theirs.items()}:
        return None
    found = []
    for name, own in ours.items():
        interval = paired_documents(own, theirs[name])
        if interval is None:
            return None
        found.append((fmean(theirs[name]) - fmean(own), interval))
    return _mean_of(found)


def _apart(a: Number, b: Number) -> Interval | None:
    if a.interval is None and b.interval is None:
        return None
    gap = b.mean - a.mean
    first, second = (one.interval or Interval(one.mean, one.mean) for one in (a, b))
    below, above = (second.low - b.mean, a.mean - first.high), (second.high - b.mean, a.mean - first.low)
    return Interval(gap - math.hypot(*below), gap + math.hypot(*above))


def _mean_of(parts: Iterable[tuple[float, Interval]]) -> Interval:
    """Of the mean of independent estimates with intervals, which may be skew: sides add as root sums of squares.

    Zou and Donner (2008), "Construction of confidence intervals about effect measures".
    """
    own = list(parts)
    mean = fmean(value for value, _ in own)
    below, above = [value - one.low for value, one in own], [one.high - value for value, one in own]
    return Interval(mean - math.hypot(*below) / len(own), mean + math.hypot(*above) / len(own))
