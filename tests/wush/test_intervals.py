"""Intervals hold what they are of as often as they say, for windows, pairs, runs and documents."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from wush import intervals
from wush.intervals import Interval, of_documents, of_metric, of_runs, paired, paired_documents, student, value

METRICS = ("kl", "perplexity", "gap", "top1")
SIMULATIONS = 1200  # the share of 95% among them varies by 0.6%


@dataclass(frozen=True)
class Sums:
    """Windows as records have them."""

    nll: list[float]
    nll_original: list[float]
    kl: list[float]
    agree: list[int]
    predictions: list[int]


def simulated(random: np.random.Generator, windows: int, kl: float = 0.3, base: Any = None) -> Sums:
    """Windows of unequal length from a population with a known KL, perplexity 20 and top-1 70%."""
    predictions = random.integers(300, 512, windows)
    base = random.normal(0, 0.2, windows) if base is None else base
    noise = random.gamma(25, 1 / 25, windows)  # positive and skewed, of mean 1
    return Sums(
        nll=list((np.log(20) + base) * predictions),
        nll_original=list((np.log(16) + base) * predictions),
        kl=list(kl * noise * np.exp(base - 0.02) * predictions),
        agree=[int(n) for n in random.binomial(predictions, 0.7)],
        predictions=[int(n) for n in predictions],
    )


@pytest.mark.parametrize("windows", [8, 20, 29, 30, 64, 150])
@pytest.mark.parametrize(("metric", "truth"), [("perplexity", 20.0), ("kl", 0.3), ("top1", 0.7)])
def test_the_interval_of_a_trial_holds_the_truth_95_times_in_100(windows: int, metric: Any, truth: float) -> None:
    random = np.random.default_rng(windows)
    simulations = SIMULATIONS * (4 if windows < 30 else 1)
    found = [of_metric(simulated(random, windows), metric) for _ in range(simulations)]
    held = np.mean([one is not None and one.low <= truth <= one.high for one in found])
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize("windows", [8, 29, 30, 64])
def test_the_interval_of_a_pair_holds_the_true_difference_95_times_in_100(windows: int) -> None:
    random, held = np.random.default_rng(windows), 0
    for _ in range(SIMULATIONS):
        base = random.normal(0, 0.2, windows)
        a = simulated(random, windows, 0.3, base)
        noise = random.gamma(25, 1 / 25, windows) * np.exp(base - 0.02)
        b = replace(a, kl=list(0.4 * noise * a.predictions))
        one = paired(a, b, "kl")
        assert one is not None
        held += one.low <= 0.1 <= one.high
    assert 0.93 <= held / SIMULATIONS <= 0.97


@pytest.mark.parametrize("windows", [8, 64])
def test_what_the_text_varies_cancels_in_a_pair(windows: int) -> None:
    random = np.random.default_rng(1)
    a = simulated(random, windows)
    b = replace(a, nll=[nll + 0.05 * n for nll, n in zip(a.nll, a.predictions, strict=True)])
    alone, pair = of_metric(b, "perplexity"), paired(a, b, "perplexity")
    assert alone is not None
    assert pair is not None
    assert pair.clear
    assert pair.high - pair.low < 0.2 * (alone.high - alone.low)


@pytest.mark.parametrize("windows", [2, 29, 30, 100])
@pytest.mark.parametrize("metric", METRICS)
def test_identical_windows_give_an_interval_without_width(windows: int, metric: Any) -> None:
    same = Sums([1200.0] * windows, [1100.0] * windows, [130.0] * windows, [300] * windows, [400] * windows)
    one = of_metric(same, metric)
    assert one is not None
    assert (one.low, one.high) == pytest.approx((value(same, metric),) * 2, rel=1e-12)


@pytest.mark.parametrize("windows", [2, 29, 30, 100])
@pytest.mark.parametrize("metric", METRICS)
def test_a_trial_does_not_differ_from_itself(windows: int, metric: Any) -> None:
    a = simulated(np.random.default_rng(2), windows)
    one = paired(a, a, metric)
    assert one is not None
    assert (one.low, one.high) == pytest.approx((0, 0), abs=1e-9)
    assert not one.clear


@pytest.mark.parametrize("windows", [12, 29, 30, 80])
@pytest.mark.parametrize("metric", METRICS)
def test_an_interval_holds_the_ratio_of_sums_and_is_the_same_every_time(windows: int, metric: Any) -> None:
    a = simulated(np.random.default_rng(3), windows)
    one, again = of_metric(a, metric), of_metric(a, metric)
    assert one is not None
    assert one == again
    assert one.low < value(a, metric) < one.high


def test_a_metric_is_a_ratio_of_sums_and_not_a_mean_of_means() -> None:
    windows = Sums([10.0, 400.0], [10.0, 400.0], [9.0, 1.0], [1, 99], [1, 99])
    assert value(windows, "kl") == pytest.approx(10 / 100)
    assert value(windows, "gap") == 0
    assert value(windows, "perplexity") == pytest.approx(np.exp(4.1))


def test_few_windows_get_the_t_interval_of_their_means() -> None:
    means = [0.2, 0.35, 0.3, 0.26]
    windows = Sums([1.0] * 4, [1.0] * 4, [100 * mean for mean in means], [1] * 4, [100] * 4)
    one, expected = of_metric(windows, "kl"), of_runs(means)
    assert one is not None
    assert expected is not None
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    assert expected.high - np.mean(means) == pytest.approx(3.182446305284263 * np.std(means, ddof=1) / 2)


def test_one_window_one_run_and_one_document_have_no_interval() -> None:
    one = Sums([1.0], [1.0], [1.0], [1], [2])
    assert of_metric(one, "kl") is None
    assert paired(one, one, "kl") is None
    assert of_runs([0.3]) is None
    assert of_runs([]) is None
    assert of_documents([1.0]) is None
    assert paired_documents([1.0], [0.0]) is None


def test_windows_that_are_not_the_same_are_refused() -> None:
    a = simulated(np.random.default_rng(4), 10)
    with pytest.raises(ValueError, match="evaluated on the same tokens"):
        paired(a, simulated(np.random.default_rng(4), 11), "kl")
    with pytest.raises(ValueError, match="evaluated on the same tokens"):
        paired(a, replace(a, predictions=[n + 1 for n in a.predictions]), "kl")
    with pytest.raises(ValueError, match="no interval over windows"):
        of_metric(a, "bits")  # type: ignore[arg-type]


def test_student_is_the_table_of_every_textbook() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
    assert {freedom: round(student(freedom), 3) for freedom in table} == table
    assert student(100_000) == pytest.approx(1.95996, abs=1e-4)
    with pytest.raises(ValueError, match="at least 1"):
        student(0)


def test_student_agrees_with_draws() -> None:
    random = np.random.default_rng(5)
    for freedom in (1, 2, 3, 4, 7, 28):
        drawn = np.abs(random.standard_t(freedom, 400_000))
        assert np.mean(drawn < student(freedom)) == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_intervals_of_runs_hold_where_two_standard_errors_do_not(runs: int) -> None:
    random, held, star = np.random.default_rng(runs), 0, 0
    for values in random.normal(0.4, 0.01, (4000, runs)).tolist():
        one = of_runs(values)
        assert one is not None
        held += one.low <= 0.4 <= one.high
        star += abs(np.mean(values) - 0.4) <= 2 * np.std(values, ddof=1) / np.sqrt(runs)
    assert 0.93 <= held / 4000 <= 0.97
    assert star / 4000 < 0.9  # 82% of 3 runs: why the star went


@pytest.mark.parametrize(("share", "documents"), [(0.5, 40), (0.9, 100), (0.03, 150), (0.75, 2000)])
def test_the_interval_of_a_score_holds_the_true_share(share: float, documents: int) -> None:
    random, held = np.random.default_rng(documents), 0
    for count in random.binomial(documents, share, SIMULATIONS):
        one = of_documents([1.0] * int(count) + [0.0] * int(documents - count))
        assert one is not None
        held += one.low <= share <= one.high
    assert 0.92 <= held / SIMULATIONS <= 0.98  # outcomes are discrete


def test_failing_every_document_proves_no_score_of_zero() -> None:
    one = of_documents([0.0] * 40)
    assert one is not None
    assert one.low == 0
    assert 0.05 < one.high < 0.15


def test_outcomes_between_zero_and_one_are_resampled() -> None:
    random = np.random.default_rng(6)
    outcomes = (random.integers(0, 6, 200) / 5).tolist()  # shares of five seeds
    one = of_documents(outcomes)
    assert one is not None
    error = np.std(outcomes, ddof=1) / np.sqrt(200)
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.05)


@pytest.mark.parametrize("documents", [29, 200])
def test_only_documents_on_which_two_trials_differ_count(documents: int) -> None:
    random, held = np.random.default_rng(documents), 0
    for _ in range(SIMULATIONS):
        kind = random.choice(4, documents, p=[0.4, 0.3, 0.2, 0.1])  # both right, both wrong, only B, only A
        one = paired_documents((np.isin(kind, [0, 3]) * 1.0).tolist(), (np.isin(kind, [0, 2]) * 1.0).tolist())
        assert one is not None
        held += one.low <= 0.1 <= one.high
    assert 0.92 <= held / SIMULATIONS <= 0.98
    with pytest.raises(ValueError, match="zip"):
        paired_documents([1.0, 0.0], [1.0])


@pytest.mark.parametrize(("gained", "lost", "clear"), [(1, 0, False), (3, 0, False), (9, 0, True), (12, 8, False)])
def test_a_few_documents_that_differ_prove_nothing(gained: int, lost: int, clear: bool) -> None:
    rest = [1.0, 0.0] * 100
    a = [0.0] * gained + [1.0] * lost + rest
    one = paired_documents(a, [1.0] * gained + [0.0] * lost + rest)
    assert one is not None
    assert one.clear == clear
    same = paired_documents(rest, rest)
    assert same is not None
    assert not same.clear
    assert same.high > 0


def test_a_difference_is_clear_when_its_interval_excludes_zero() -> None:
    assert Interval(0.1, 0.2).clear
    assert Interval(-0.2, -0.1).clear
    assert not Interval(-0.1, 0.2).clear
    assert not Interval(1e-17, 2e-17).clear  # rounding
    assert Interval(0.1, 0.4).margin(0.2) == pytest.approx(0.2)
    assert Interval(0.1, 0.4).scaled(100) == Interval(10.0, 40.0)


def test_many_windows_are_resampled_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a = simulated(np.random.default_rng(7), 60)
    whole = of_metric(a, "kl")
    monkeypatch.setattr(intervals, "_CHUNK", 60 * 777)
    pieces = of_metric(a, "kl")
    assert whole is not None
    assert pieces is not None
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), rel=1e-9)


def test_outcomes_of_several_runs_are_averaged_where_the_score_is_their_mean() -> None:
    assert intervals.mean_outcomes([[1.0, 0.0], [1.0, 1.0]], 0.75) == [1.0, 0.5]
    assert intervals.mean_outcomes([[1.0, 0.0]], 0.6) == [], "a mean over a group's tasks, say"
    assert intervals.mean_outcomes([[1.0, 0.0], [1.0]], 0.75) == []
    assert intervals.mean_outcomes([[], []], 0.75) == []
    assert intervals.mean_outcomes([], 0.0) == []


def test_the_mean_of_independent_values_is_known_better_than_each() -> None:
    one = intervals.combined([(0.5, Interval(0.4, 0.7)), (0.7, Interval(0.6, 0.9))])
    assert (one.low, one.high) == pytest.approx((0.6 - 0.1 / 2**0.5, 0.6 + 0.2 / 2**0.5))
    assert intervals.combined([(0.5, Interval(0.4, 0.7))]) == Interval(0.4, 0.7)


def test_sums_are_equal_by_content_and_keep_their_intervals() -> None:
    a = simulated(np.random.default_rng(8), 40)
    one, other = intervals.Sums(a), intervals.Sums(a)
    assert one == other
    assert one.interval("kl") is one.interval("kl")
    assert of_metric(one, "kl") == of_metric(a, "kl")
    assert one != intervals.Sums(replace(a, kl=a.nll))


def test_a_run_that_is_not_finite_leaves_no_interval() -> None:
    assert of_runs([0.1, float("inf")]) is None
    assert of_runs([0.1, float("nan"), 0.2]) is None
