"""Geometry of the sweep report's plots: marks and lines, in SVG units.

It draws nothing: the template turns these records into SVG. It reads results, never files.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from experiments.records import Result
from experiments.views.scales import Scale, Tick, index_scale, log_scale, metric_scale, number
from experiments.views.selection import MEAN_OF_TASKS, rank
from experiments.views.values import Value, measured, measured_task

MAX_CURVES, MAX_MARKS = 24, 500  # in one plot
DOTS_WIDTH, LANE, GROUP_PADDING, DOTS_TOP, DOTS_BOTTOM = 460.0, 17.0, 6.0, 24.0, 26.0
CURVES_WIDTH, CURVES_HEIGHT, CURVES_LEFT, CURVES_TOP, CURVES_BOTTOM = 720.0, 380.0, 66.0, 12.0, 56.0
CHARACTER, MAX_LABEL = 6.8, 22  # width of a label's character; characters before it is cut

Lanes = dict[tuple[str, str], tuple[float, list["Trial"]]]  # (setting, transform) -> centre, trials

# Each outline is centred on the origin.
SHAPES = {
    "cross": "M-3.3-5.1L0-1.8L3.3-5.1L5.1-3.3L1.8 0L5.1 3.3L3.3 5.1L0 1.8L-3.3 5.1L-5.1 3.3L-1.8 0L-5.1-3.3Z",
    "triangle": "M0-5.6L5.6 4.4H-5.6Z",
    "square": "M-4.5-4.5h9v9h-9Z",
    "diamond": "M0-6.2L6.2 0L0 6.2L-6.2 0Z",
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "plus": "M-1.7-5.6h3.4v3.9h3.9v3.4h-3.9v3.9h-3.4v-3.9h-3.9v-3.4h3.9Z",
    "wedge": "M0 5.6L5.6-4.4H-5.6Z",
}
TRANSFORMS = ("i", "r", "h", "wus", "wush")  # their position is their colour and shape, the same in every report
DASHES = ("", "7 4", "2 4", "10 4 2 4", "14 5", "5 2 1 2 1 2")


@dataclass(frozen=True)
class Trial:
    """A quantized trial, or the mean of those that differ by seed, as the plots tell it apart.

    `setting`: its format, and its algorithm where several are. `linked`: its details are on the page.
    """

    id: str
    name: str
    setting: str
    transform: str
    results: tuple[Result, ...]
    linked: bool

    @property
    def kl(self) -> float:
        """By which trials are ranked."""
        return measured(self.results, "kl", over_windows=False).value

    def errors(self, calibration: bool) -> dict[int, float]:
        """The relative error of each decoder block, mean over seeds; on the calibration tokens or held-out ones."""
        found = [result.calibration_errors if calibration else result.errors for result in self.results]
        return {index: fmean(own[index] for own in found) for index in found[0] if all(index in own for own in found)}


@dataclass(frozen=True)
class Style:
    """How a transform looks everywhere: `colour` is an index into the stylesheet's palette."""

    name: str
    colour: int
    shape: str


@dataclass(frozen=True)
class Mark:
    """A trial's dot; `text` is its value when it stands alone in its lane, written left of it when `flipped`.

    `low` and `high`: the ends of its interval, those of the dot where there is none.
    """

    x: float
    y: float
    low: float
    high: float
    style: Style
    title: str
    text: str
    flipped: bool


@dataclass(frozen=True)
class Band:
    """A row group: the trials of one setting, a lane for each transform."""

    name: str
    label: str
    top: float
    height: float


@dataclass(frozen=True)
class DotPlot:
    """One metric of a panel's trials. `missing`: trials whose value is not finite, which are not drawn.

    `total`: the trials that have a value; of a lane with many, only some are drawn.
    """

    title: str
    log: bool
    width: float
    height: float
    left: float
    ticks: list[Tick]
    bands: list[Band]
    marks: list[Mark]
    references: list[Tick]
    missing: int
    total: int


@dataclass(frozen=True)
class Curve:
    """A trial's error over its decoder blocks; `points` lists `x y block value`, separated by semicolons.

    `calibration`: on the calibration tokens, not on held-out ones.
    """

    id: str
    name: str
    calibration: bool
    style: Style
    dash: str
    path: str
    points: str
    linked: bool


@dataclass(frozen=True)
class CurvePlot:
    """The curves of a panel's best trials, those on calibration tokens last; `total` counts the trials left out too.

    `drawn`: the trials with a curve, each once.
    """

    width: float
    height: float
    left: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    drawn: list[Curve]
    total: int

    @property
    def held_out(self) -> bool:
        """Whether there are curves on held-out tokens."""
        return any(not curve.calibration for curve in self.curves)

    @property
    def calibration(self) -> bool:
        """Whether there are curves on calibration tokens."""
        return any(curve.calibration for curve in self.curves)


@dataclass(frozen=True)
class Panel:
    """The plots of the trials that can be compared: one model, evaluated on one text."""

    title: str
    legend: list[Style]
    dots: list[DotPlot]
    curves: CurvePlot | None


def panel(title: str, trials: Sequence[Trial]) -> Panel:
    """The plots of comparable trials, of which there is at least one."""

    def tasks(results: Sequence[Result]) -> Value:
        score = measured_task(results, MEAN_OF_TASKS if len(results[0].tasks) > 1 else next(iter(results[0].tasks)))
        return score.scaled(100) if score else Value(math.nan)

    styles = styles_of(trial.transform for trial in trials)
    found = {round(result.metrics.perplexity_original, 2) for trial in trials for result in trial.results}
    references = [value for value in sorted(found) if math.isfinite(value)]
    with_tasks = [trial for trial in trials if all(result.tasks for result in trial.results)]
    dots = [
        dot_plot("KL (nats)", trials, lambda results: measured(results, "kl"), "{:.4f}", styles),
        dot_plot("Perplexity", trials, lambda results: measured(results, "perplexity"), "{:.2f}", styles, references),
        dot_plot("Tasks, mean (%)", with_tasks, tasks, "{:.2f}", styles),
    ]
    return Panel(title, list(styles.values()), [plot for plot in dots if plot.marks], curve_plot(trials, styles))


def styles_of(transforms: Iterable[str]) -> dict[str, Style]:
    """Colour and shape of each transform: the paper's own are fixed, others follow in order of appearance."""
    present = list(dict.fromkeys(transforms))
    shapes = list(SHAPES)
    known = [Style(name, i, shapes[i]) for i, name in enumerate(TRANSFORMS) if name in present]
    first = len(TRANSFORMS)
    others = [name for name in present if name not in TRANSFORMS]
    found = [Style(name, first + k % 2, shapes[(first + k) % len(shapes)]) for k, name in enumerate(others)]
    return {style.name: style for style in known + found}


# --- dots


def dot_plot(
    title: str,
    trials: Sequence[Trial],
    value: Callable[[Sequence[Result]], Value],
    shown: str,
    styles: dict[str, Style],
    references: Sequence[float] = (),
) -> DotPlot:
    """Trials as dots: a band for each setting, in it a lane for each transform, values along the x axis.

    Of more than `MAX_MARKS` each lane has its least and greatest value and some of even rank between them.
    """
    values = {trial.id: value(trial.results) for trial in trials}
    finite = [trial for trial in trials if math.isfinite(values[trial.id].value)]
    lanes, bands = _lay_out(finite, styles)
    most = MAX_MARKS // len(lanes) if len(finite) > MAX_MARKS else len(finite)
    drawn = {place: _of_even_rank(own, lambda trial: values[trial.id].value, most) for place, own in lanes.values()}
    left = 24 + CHARACTER * max((len(band.label) for band in bands), default=0)
    ends = [end for own in drawn.values() for trial in own for end in _ends(values[trial.id])]
    scale = metric_scale([*(values[trial.id].value for trial in finite), *ends, *references], left, DOTS_WIDTH - 16)
    alone = {place for place, own in lanes.values() if len(own) == 1}
    return DotPlot(
        title=title,
        log=scale.log,
        width=DOTS_WIDTH,
        height=(bands[-1].top + bands[-1].height if bands else DOTS_TOP) + DOTS_BOTTOM,
        left=scale.start,
        ticks=scale.labelled(),
        bands=bands,
        marks=[
            _mark(trial, values[trial.id], scale, y, shown, styles, y in alone)
            for y, own in drawn.items()
            for trial in own
        ],
        references=[Tick(scale.at(x), shown.format(x)) for x in references],
        missing=len(trials) - len(finite),
        total=len(finite),
    )


def _ends(value: Value) -> tuple[float, float]:
    """Of the interval as it is drawn: not below zero, which no metric here is, and a log axis has not."""
    if value.interval is None:
        return value.value, value.value
    low = value.interval.low
    return (low if low > 0 or value.value <= 0 else value.value), value.interval.high


def _of_even_rank(trials: Sequence[Trial], value: Callable[[Trial], float], most: int) -> Sequence[Trial]:
    """At most so many of a lane's trials (but two), the extreme ones among them; all in their order if they fit."""
    if len(trials) <= max(most, 2):
        return trials
    ranked = sorted(trials, key=value)
    last = max(most, 2) - 1
    return [ranked[k * (len(ranked) - 1) // last] for k in range(last + 1)]


def _mark(
    trial: Trial, value: Value, scale: Scale, y: float, shown: str, styles: dict[str, Style], alone: bool
) -> Mark:
    text, (low, high) = shown.format(value.value), map(scale.at, _ends(value))
    flipped = high + 12 + CHARACTER * len(text) > DOTS_WIDTH
    title = f"{trial.name}: {value.told(shown.format)}"
    return Mark(scale.at(value.value), y, low, high, styles[trial.transform], title, text if alone else "", flipped)


def _lay_out(trials: Sequence[Trial], styles: dict[str, Style]) -> tuple[Lanes, list[Band]]:
    settings = list(dict.fromkeys(trial.setting for trial in trials))
    order = list(styles)

    def lane(trial: Trial) -> tuple[int, int]:
        return settings.index(trial.setting), order.index(trial.transform)

    lanes: Lanes = {}
    bands: list[Band] = []
    top = DOTS_TOP
    for setting, in_band in groupby(sorted(trials, key=lane), key=lambda trial: trial.setting):
        y = top + GROUP_PADDING
        for transform, in_lane in groupby(in_band, key=lambda trial: trial.transform):
            lanes[setting, transform] = (y + LANE / 2, list(in_lane))
            y += LANE
        bands.append(Band(setting, _shortened(setting), top, y + GROUP_PADDING - top))
        top = y + GROUP_PADDING
    return lanes, bands


def _shortened(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


# --- curves


def curve_plot(trials: Sequence[Trial], styles: dict[str, Style]) -> CurvePlot | None:
    """Relative error over decoder blocks of the trials lowest in KL; None when no error is positive.

    On held-out tokens, and thinner on those of the calibration, which say how well a transform was fitted.
    """
    settings = list(dict.fromkeys(trial.setting for trial in trials))
    best = sorted(trials, key=lambda trial: rank(trial.kl))[:MAX_CURVES]
    wanted = [(trial, calibration) for calibration in (False, True) for trial in best]
    points = [(trial, kind, own) for trial, kind in wanted if (own := _drawable(trial.errors(kind)))]
    if not points:
        return None
    blocks = [block for _, _, own in points for block, _ in own]
    x = index_scale(min(blocks), max(blocks), CURVES_LEFT, CURVES_WIDTH - 14)
    errors = [error for _, _, own in points for _, error in own]
    y = log_scale(min(errors), max(errors), CURVES_HEIGHT - CURVES_BOTTOM, CURVES_TOP)
    curves = [
        _curve(trial, kind, own, (x, y), styles, DASHES[settings.index(trial.setting) % len(DASHES)])
        for trial, kind, own in points
    ]
    drawn = list({curve.id: curve for curve in reversed(curves)}.values())[::-1]
    bottom = CURVES_HEIGHT - CURVES_BOTTOM
    axes = x.labelled(), y.labelled()
    return CurvePlot(CURVES_WIDTH, CURVES_HEIGHT, CURVES_LEFT, bottom, *axes, curves, drawn, len(trials))


def _drawable(errors: dict[int, float]) -> list[tuple[int, float]]:
    """Block index and relative error, of the blocks whose error a log axis can show."""
    return sorted((index, error) for index, error in errors.items() if math.isfinite(error) and error > 0)


def _curve(
    trial: Trial,
    calibration: bool,
    points: list[tuple[int, float]],
    axes: tuple[Scale, Scale],
    styles: dict[str, Style],
    dash: str,
) -> Curve:
    places = [(axes[0].at(index), axes[1].at(error)) for index, error in points]
    # A segment from the first point to itself shows a lone point as a dot.
    path = f"M{places[0][0]} {places[0][1]}" + "".join(f"L{a} {b}" for a, b in places[1:] or places)
    listed = [f"{a} {b} {index} {number(error)}" for (a, b), (index, error) in zip(places, points, strict=True)]
    return Curve(trial.id, trial.name, calibration, styles[trial.transform], dash, path, ";".join(listed), trial.linked)
