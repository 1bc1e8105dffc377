"""95% intervals of what is measured: over evaluated windows, over runs that differ by seed, over a task's documents.

Windows are resampled whole, since the tokens of one are not independent. A pair is resampled together: both sides see
the same windows, so what the text itself varies cancels. Arithmetic on numbers only; nothing here knows of records.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

Metric = Literal["kl", "perplexity", "gap", "top1"]
Numbers = NDArray[np.float64]

RESAMPLES: Final = 10_000
SEED: Final = 0
ENOUGH_WINDOWS: Final = 30  # below it a bootstrap is too narrow, and a t interval is used
_COVERED: Final = 0.95
_NORMAL: Final = 1.959963984540054  # 95% of a normal distribution is within it
_CHUNK: Final = 2**22  # resampled counts held at once: 32 MiB
_ROUNDING: Final = 1e-12  # differences of equal runs are no larger


@dataclass(frozen=True)
class Interval:
    """A 95% interval, in the unit of what it is of."""

    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether it excludes zero, by more than rounding."""
        return self.low > _ROUNDING or self.high < -_ROUNDING

    def margin(self, value: float) -> float:
        """The distance from a value inside to the farther end: what follows the sign ±."""
        return max(self.high - value, value - self.low)

    def scaled(self, factor: float) -> "Interval":
        """In another unit; `factor` is positive."""
        return Interval(self.low * factor, self.high * factor)


class Windows(Protocol):
    """Sums over each window's predictions, lists of equal length: nats, but `agree` and `predictions`, which count."""

    @property
    def nll(self) -> Sequence[float]: ...
    @property
    def nll_original(self) -> Sequence[float]: ...
    @property
    def kl(self) -> Sequence[float]: ...
    @property
    def agree(self) -> Sequence[int]: ...
    @property
    def predictions(self) -> Sequence[int]: ...


class Sums:
    """The sums of windows as one array, light enough to keep for thousands of trials; an interval is made once."""

    def __init__(self, windows: Windows) -> None:
        names = ("nll", "nll_original", "kl", "agree", "predictions")
        self.array: Numbers = np.array([getattr(windows, name) for name in names], dtype=np.float64)  # (5, windows)
        self._known: dict[Metric, Interval | None] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sums) and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]  # equal by content

    def interval(self, metric: Metric) -> Interval | None:
        """As `of_metric`."""
        if metric not in self._known:
            self._known[metric] = _over(self.array, lambda sums: _value(sums, metric))
        return self._known[metric]


def of_metric(windows: Windows | Sums, metric: Metric) -> Interval | None:
    """The interval of one trial's metric over its windows; None of fewer than two windows."""
    return _as_sums(windows).interval(metric)


def paired(a: Windows | Sums, b: Windows | Sums, metric: Metric) -> Interval | None:
    """The interval of B's metric minus A's on the same windows; None of fewer than two.

    Raises `ValueError` if the windows cannot be the same: others in number or in predictions.
    """
    first, second = _as_sums(a).array, _as_sums(b).array
    if not np.array_equal(first[-1], second[-1]):
        raise ValueError(
            f"{first.shape[1]} and {second.shape[1]} windows that do not agree in their predictions are not the same "
            "windows: compare what was evaluated on the same tokens"
        )
    half = len(first)
    both = np.concatenate([first, second])
    return _over(both, lambda sums: _value(sums[half:], metric) - _value(sums[:half], metric))


def value(windows: Windows | Sums, metric: Metric) -> float:
    """The metric over all predictions: a ratio of sums, not a mean of the windows' means."""
    return float(_value(_as_sums(windows).array.sum(axis=1), metric))


def of_runs(values: Sequence[float]) -> Interval | None:
    """The interval of a mean over runs, mean ± t sd / sqrt(n), Student's t; None of one, or where one is not finite."""
    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        return None
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (count - 1))
    margin = student(count - 1) * deviation / math.sqrt(count)
    return Interval(mean - margin, mean + margin)


def combined(intervals: Sequence[tuple[float, Interval]]) -> Interval:
    """Of the mean of independent values, each with its interval: ends at the root of the summed squared distances."""
    count = len(intervals)
    mean = math.fsum(value for value, _ in intervals) / count
    below = math.sqrt(math.fsum((value - one.low) ** 2 for value, one in intervals)) / count
    above = math.sqrt(math.fsum((one.high - value) ** 2 for value, one in intervals)) / count
    return Interval(mean - below, mean + above)


def of_documents(outcomes: Sequence[float]) -> Interval | None:
    """The interval of a task's score, the mean over its documents' outcomes; None of fewer than two.

    Of outcomes that are all 0 or 1 it is Wilson's, which is true for shares near 0 and 1 as well: resampling 40
    failures gives 40 failures. Others are resampled.
    """
    if len(outcomes) < 2:
        return None
    return _wilson(outcomes) if set(outcomes) <= {0, 1} else _of_mean(outcomes)


def paired_documents(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """The interval of B's score minus A's on the same documents, in the same order; None of fewer than two.

    Only documents on which the two differ count, as in McNemar's test. Of outcomes that are all 0 or 1 it is that of
    Agresti and Min (2005): where the two differ on a few documents only, resampling calls chance a difference. Raises
    `ValueError` if they are not as many.
    """
    gaps = [own - other for own, other in zip(b, a, strict=True)]
    return _of_signs(gaps) if len(gaps) > 1 and {*a, *b} <= {0, 1} else _of_mean(gaps)


def mean_outcomes(runs: Sequence[Sequence[float]], score: float) -> list[float]:
    """Each document's mean over runs; none where runs have no or other documents, or the score is not their mean.

    A score that weighs its documents unequally, such as a mean over a group's tasks, says nothing of one document.
    """
    if not runs or not runs[0] or any(len(run) != len(runs[0]) for run in runs):
        return []
    means = [fmean(values) for values in zip(*runs, strict=True)]
    return means if abs(fmean(means) - score) < 1e-6 else []


@lru_cache(maxsize=1024)
def student(freedom: int) -> float:
    """Student's t with `freedom` degrees of freedom that 95% of draws are within: 12.706 of 1, 1.960 of many.

    For a whole number of degrees the distribution is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4), which a
    bisection inverts: exact, and no dependency for one number.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom: there must be at least 1")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < _COVERED else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The share of draws within ±t, where t = sqrt(freedom) tan(angle)."""
    odd = freedom % 2
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):  # powers of the cosine: 1, 3, ... or 0, 2, ... up to freedom - 2
        total += term
        term *= square * (power + 1) / (power + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def _as_sums(windows: Windows | Sums) -> Sums:
    return windows if isinstance(windows, Sums) else Sums(windows)


def _value(sums: Numbers, metric: Metric) -> Numbers:
    """The metric of sums (5, ...) over windows, each of the trailing dimensions its own."""
    nll, nll_original, kl, agree, predictions = sums
    if metric == "kl":
        return kl / predictions
    if metric == "top1":
        return agree / predictions
    if metric == "perplexity":
        return np.exp(nll / predictions)
    if metric == "gap":
        return np.exp(nll / predictions) - np.exp(nll_original / predictions)
    raise ValueError(f"metric {metric!r} has no interval over windows: one of {', '.join(get_args(Metric))}")


def _over(sums: Numbers, statistic: Callable[[Numbers], Numbers]) -> Interval | None:
    """The interval of a statistic of totals, from sums (k, W) of its windows."""
    count = sums.shape[1]
    if count < 2:
        return None
    if count >= ENOUGH_WINDOWS:
        return _between(statistic(_resampled(sums)), count)
    # Of a mean over windows with equally many predictions, these pseudo-values are the windows' own means; of other
    # statistics, such as the exponential of a mean, they are what a window adds to it (the jackknife's).
    totals = sums.sum(axis=1, keepdims=True)
    whole, without = statistic(totals), statistic(totals - sums)
    interval = of_runs((count * whole - (count - 1) * without).tolist())
    if interval is None:
        return None
    shift = float(whole[0]) - (interval.low + interval.high) / 2  # around the estimate, not its jackknife
    return Interval(interval.low + shift, interval.high + shift)


def _of_mean(values: Sequence[float]) -> Interval | None:
    """The interval of a mean over documents."""
    count = len(values)
    if count < ENOUGH_WINDOWS:
        return of_runs(values)
    # Documents with one outcome are alike, so a resample is how often each outcome came: few numbers, not `count`.
    distinct, times = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(count, times / count, RESAMPLES)
    return _between(drawn @ distinct / count, count)


def _of_signs(gaps: Sequence[float]) -> Interval:
    """Of the mean of documents' -1, 0 and 1: Wald's, of half a document more in each of the four cells of a pair."""
    count, gain, differing = len(gaps) + 2, math.fsum(gaps), sum(gap != 0 for gap in gaps) + 1
    middle = gain / count
    spread = _NORMAL * math.sqrt(differing - gain**2 / count) / count
    return Interval(max(-1.0, middle - spread), min(1.0, middle + spread))


def _wilson(outcomes: Sequence[float]) -> Interval:
    """Wilson's score interval of a share (1927), with the quantile of a normal distribution."""
    count, square = len(outcomes), _NORMAL**2
    share = math.fsum(outcomes) / count
    middle = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(square * (share * (1 - share) / count + square / (4 * count**2))) / (1 + square / count)
    return Interval(max(0.0, middle - spread), min(1.0, middle + spread))


def _resampled(sums: Numbers) -> Numbers:
    """Totals (k, RESAMPLES) of as many windows drawn with replacement from (k, W)."""
    count = sums.shape[1]
    step = max(1, _CHUNK // count)
    if step >= RESAMPLES:
        return sums @ _counts(count)
    random = np.random.default_rng(SEED)
    rows = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([sums @ _draw(random, count, row) for row in rows], axis=1)


@lru_cache(maxsize=4)
def _counts(count: int) -> Numbers:
    """How often each of `count` windows comes in each resample: the same resamples for all trials."""
    return _draw(np.random.default_rng(SEED), count, RESAMPLES)


def _draw(random: np.random.Generator, count: int, resamples: int) -> Numbers:
    drawn = random.integers(0, count, (resamples, count)) + np.arange(resamples)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).T.astype(np.float64)


def _between(values: Numbers, count: int) -> Interval:
    """The interval between two quantiles of resampled statistics of `count` windows.

    A resample varies by the windows' sample variance, sqrt((n - 1) / n) too little, and the quantile of a normal
    distribution takes that variance for known: of 30 windows 92% of such intervals hold the truth. Quantiles a little
    further out make up for both (Hesterberg, 2015, "What teachers should know about the bootstrap", section 3.3).
    """
    tail = math.erfc(student(count - 1) * math.sqrt(count / (count - 1) / 2)) / 2
    ordered, place = np.sort(values), tail * (len(values) - 1)  # four times as fast as NumPy's quantile
    whole, part = int(place), place - int(place)
    low = ordered[whole] + part * (ordered[whole + 1] - ordered[whole])
    high = ordered[-1 - whole] + part * (ordered[-2 - whole] - ordered[-1 - whole])
    return Interval(float(low), float(high))
