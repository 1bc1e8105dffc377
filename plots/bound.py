"""Does the theory hold on real layers? Measured layer loss against what the transform's theory predicts, and its bound.

A point is a linear. The prediction is up to one factor of each format, so that agreement is a line of slope 1 in
log-log and a correlation of logarithms. Layers differ in the power of their outputs, which alone correlates loss and
prediction: the answer is by both over that power. From whole quantized models whose layer losses were measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from plots import style
from plots.chosen import chosen
from plots.heatmap import ABSENT, with_losses
from plots.records import LOSSES, Records, Trial

Array = NDArray[np.float64]
HOLDS, PARTLY = 0.9, 0.7  # rank correlation from which the theory is said to hold, and to hold in part
FEWEST = 3  # points of a correlation


@dataclass(frozen=True)
class Points:
    """Of layers: measured loss, prediction, bound and the output's mean square, all `(layers,)` and positive."""

    measured: Array
    predicted: Array
    bound: Array
    power: Array

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> "Points":
        """The layers of all the trials; those of which a value is not positive have no logarithm and are left out."""
        values = np.concatenate([trial.losses.values for trial in trials])
        values = values[(values > 0).all(axis=1)]
        columns = (values[:, LOSSES.index(name)] for name in ("mse", "even", "bound", "relative"))
        measured, predicted, bound, relative = columns
        return cls(measured, predicted, bound, measured / relative)

    @property
    def normalized(self) -> "Points":
        """All over the power of the layer's output: the measured loss becomes the relative one."""
        power = self.power
        return Points(self.measured / power, self.predicted / power, self.bound / power, np.ones_like(power))

    def __len__(self) -> int:
        return len(self.measured)

    @property
    def pearson(self) -> float:
        """Of the logarithms of measured and predicted; NaN for too few or constant points."""
        return correlation(np.log(self.measured), np.log(self.predicted))

    @property
    def spearman(self) -> float:
        """Of ranks."""
        return correlation(ranks(self.measured), ranks(self.predicted))

    @property
    def factor(self) -> float:
        """Measured over predicted, the geometric mean."""
        return float(np.exp(np.mean(np.log(self.measured / self.predicted))))

    @property
    def spread(self) -> float:
        """By what factor measured over predicted differs from its geometric mean, in the root mean square of logs."""
        return float(np.exp(np.std(np.log(self.measured / self.predicted))))

    @property
    def bounded(self) -> int:
        """How many predictions are not below their bound, but for rounding."""
        return int((self.predicted >= self.bound * (1 - 1e-6)).sum())


def draw(records: Records) -> Figure:
    """Rows: formats. Columns: transforms. Filled: against the prediction; hollow: against the bound."""
    found = chosen(with_losses(records), ABSENT)
    trials = {(trial.format, trial.transform): trial for trial in found.trials}
    verdict = answer({one: Points.of(_of(found.trials, one)) for one in found.formats})
    missing = len(found.formats) * len(found.transforms) - len(trials)
    source = f"{found.source}; PARTIAL: panels not run: {missing}" if missing else found.source
    figure = style.figure(columns=2, height=1.0 + 1.35 * len(found.formats))
    axes = figure.subplots(len(found.formats), len(found.transforms), sharex=True, sharey="row", squeeze=False)
    for row, format_ in enumerate(found.formats):
        pooled = Points.of(_of(found.trials, format_))
        for column, transform in enumerate(found.transforms):
            trial = trials.get((format_, transform))
            _panel(axes[row, column], Points.of([trial]) if trial else None, transform, pooled.factor)
        axes[row, 0].set_ylabel(f"{format_.upper()}\nmeasured loss")
    for axis, transform in zip(axes[0], found.transforms, strict=True):
        axis.set_title(transform.upper())
    figure.legend(handles=_handles(), loc="outside upper center", ncols=3)
    style.caption(figure, f"across: prediction or bound\n{verdict}\n{source}")
    return figure


def answer(by_format: dict[str, Points]) -> str:
    """What the normalized rank correlation over all layers and transforms of each format says, beside the raw one."""
    over = {name: points.normalized for name, points in by_format.items()}
    words = ", ".join(f"{name.upper()} {_word(points.spearman)}" for name, points in over.items())
    lines = [
        f"{name.upper()}: normalized r = {over[name].pearson:.2f}, ρ = {over[name].spearman:.2f}; raw "
        f"r = {points.pearson:.2f}, ρ = {points.spearman:.2f}; within ×{points.spread:.2f} of "
        f"{points.factor:.3g} × prediction, {points.bounded} of {len(points)} not below the bound"
        for name, points in by_format.items()
    ]
    rule = (
        f"by normalized ρ over all transforms: yes from {HOLDS}, in part from {PARTLY};\nnormalized, in brackets: loss "
        "and prediction over the power of the layer's output"
    )
    return "\n".join([f"Does the theory hold on real layers? {words}", f"({rule})", *lines])


def _word(spearman: float) -> str:
    if np.isnan(spearman):
        return "too few layers"
    return "yes" if spearman >= HOLDS else "in part" if spearman >= PARTLY else "no"


def correlation(a: Array, b: Array) -> float:
    """Pearson's; NaN for fewer than `FEWEST` points or where one side is constant."""
    if len(a) < FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values: Array) -> Array:
    """From 0; values that tie share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[which])


def _of(trials: Iterable[Trial], format_: str) -> list[Trial]:
    return [trial for trial in trials if trial.format == format_]


def _panel(axes: Axes, points: Points | None, transform: str, factor: float) -> None:
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
    axes.grid(visible=True)
    if points is None:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=style.GREY)
        return
    color, size = style.TRANSFORMS.get(transform, style.BLACK), (1.6 * style.scale()) ** 2
    axes.scatter(points.bound, points.measured, s=size, facecolors="none", edgecolors=style.GREY,
                 linewidths=0.3 * style.scale())  # fmt: skip
    axes.scatter(points.predicted, points.measured, s=size, color=color, linewidths=0)
    across = np.array([points.predicted.min(), points.predicted.max()])
    axes.plot(across, factor * across, color=style.BLACK, linewidth=0.7 * style.scale())
    over = points.normalized
    told = f"r {points.pearson:.2f} ({over.pearson:.2f})\nρ {points.spearman:.2f} ({over.spearman:.2f})"
    axes.text(
        0.04, 0.96, told, transform=axes.transAxes, va="top",
        fontsize="small",
    )  # fmt: skip


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], color=style.VERMILLION, marker="o", linestyle="", label="prediction"),
        Line2D([], [], color=style.GREY, marker="o", markerfacecolor="none", linestyle="", label="bound"),
        Line2D([], [], color=style.BLACK, label="slope 1, the format's factor"),
    ]
