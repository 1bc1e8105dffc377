"""Does the theory hold on real layers? Measured layer loss against three predictions of it, and against the bound.

A point is a linear under one transform. A prediction is up to one factor of each format, so what counts is by how much
the logarithm of measured over predicted varies. Layers differ in the power of their outputs, which alone correlates
loss and prediction: both are shown over that power. From whole quantized models whose layer losses were measured.
Shape legend: `P` points, `L` linears, each under several transforms.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

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
from wush.intervals import Interval

Array = NDArray[np.float64]
PREDICTIONS = {"even": "even noise", "paper_fp": "paper's FP", "paper_int": "paper's INT"}
FORMULAS = {
    "even": r"$\sum_b \mathrm{tr}\,A\ \mathrm{tr}\,B\ /\ G$",
    "paper_fp": r"$\sum_b \sum_i A_{ii} B_{ii}$",
    "paper_int": r"$\mathrm{tr}\,B\ E|Tx|_\infty^2$ and weights alike",
    "bound": r"$\sum_b (\mathrm{tr}\,S)^2 / G$",
}
HOLDS, PARTLY = 0.9, 0.7  # rank correlation from which a prediction is said to hold, and to hold in part
FEWEST = 3  # points of a correlation
RESAMPLES = 2000


@dataclass(frozen=True)
class Points:
    """Of one format: measured losses, the power of outputs and what was predicted, all `(P,)` and positive.

    `predicted`: by its name in `LOSSES` each prediction that all the records have, and the bound. `linears`: which
    linear a point is of, from 0; `transforms`: under which transform.
    """

    measured: Array
    power: Array
    predicted: Mapping[str, Array]
    linears: NDArray[np.int64]
    transforms: tuple[str, ...]

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> "Points":
        """The layers of all the trials; those of which a value is not positive have no logarithm and are left out."""
        trials = list(trials)
        values = np.concatenate([trial.losses.values for trial in trials])
        present = [name for name, column in zip(LOSSES, values.T, strict=True) if not np.isnan(column).any()]
        kept = (values[:, [LOSSES.index(name) for name in present]] > 0).all(axis=1)
        known = {
            layer: index for index, layer in enumerate(dict.fromkeys(one for t in trials for one in t.losses.layers))
        }
        linears = np.array([known[layer] for trial in trials for layer in trial.losses.layers])
        names = np.array([trial.transform or "" for trial in trials for _ in trial.losses.layers])
        column = {name: values[kept, LOSSES.index(name)] for name in present}
        measured, relative = column.pop("mse"), column.pop("relative")
        return cls(measured, measured / relative, column, linears[kept], tuple(names[kept].tolist()))

    def __len__(self) -> int:
        return len(self.measured)

    def __contains__(self, name: object) -> bool:
        return name in self.predicted

    @property
    def relative(self) -> Array:
        """Measured over power."""
        return self.measured / self.power

    def over_power(self, name: str) -> Array:
        """A prediction over the power of the layer's output."""
        return self.predicted[name] / self.power

    def spearman(self, name: str) -> float:
        """The rank correlation of measured and predicted, both over power; NaN for too few or constant points."""
        return correlation(ranks(self.relative), ranks(self.over_power(name)))

    def factor(self, name: str) -> float:
        """Measured over predicted, the geometric mean."""
        return float(np.exp(np.mean(self._logarithms(name))))

    def spread(self, name: str) -> float:
        """How much measured over predicted differs from its geometric mean: the root mean square of logarithms."""
        return float(np.std(self._logarithms(name)))

    def interval(self, name: str) -> Interval:
        """Of the spread, by a bootstrap over linears, each with all its transforms."""
        return _quantiles(self._resampled(name))

    @cached_property
    def nearest(self) -> tuple[str, bool]:
        """The prediction with the least spread, and whether each other one's is clearly larger, compared in pairs."""
        names = sorted((name for name in PREDICTIONS if name in self), key=self.spread)
        least = self._resampled(names[0])
        return names[0], all(_quantiles(self._resampled(other) - least).clear for other in names[1:])

    def bounded(self, name: str) -> int:
        """How many predictions are not below the bound, but for rounding."""
        return int((self.predicted[name] >= self.predicted["bound"] * (1 - 1e-6)).sum())

    def _logarithms(self, name: str) -> Array:
        return np.log(self.measured / self.predicted[name])

    def _resampled(self, name: str) -> Array:
        """The spread in each resample, `(RESAMPLES,)`."""
        logs = self._logarithms(name) - np.mean(self._logarithms(name))
        size = int(self.linears.max()) + 1
        sums = np.stack([np.bincount(self.linears, logs**power, size) for power in range(3)])
        count, first, second = sums @ self._draws
        return np.sqrt(np.maximum(second / count - (first / count) ** 2, 0))

    @cached_property
    def _draws(self) -> Array:
        """How often each linear comes in each resample, `(L, RESAMPLES)`: of those that have points."""
        present = np.unique(self.linears)
        counts = np.zeros((int(self.linears.max()) + 1, RESAMPLES))
        chances = np.full(len(present), 1 / len(present))
        counts[present] = np.random.default_rng(0).multinomial(len(present), chances, RESAMPLES).T
        return counts


def draw(records: Records) -> Figure:
    """Rows: formats. Columns: the predictions and the bound, with all transforms in a panel, each in its colour."""
    found = chosen(with_losses(records), ABSENT)
    points = {one: Points.of(trial for trial in found.trials if trial.format == one) for one in found.formats}
    missing = len(found.formats) * len(found.transforms) - len(found.trials)
    source = f"{found.source}; PARTIAL: not run: {missing}" if missing else found.source
    figure = style.figure(columns=2, height=1.6 + 1.55 * len(points))
    axes = figure.subplots(len(points), len(FORMULAS), sharey="row", squeeze=False)
    for row, (format_, own) in enumerate(points.items()):
        for axis, name in zip(axes[row], FORMULAS, strict=True):
            _panel(axis, own, name)
        low, high = axes[row, 0].get_ylim()
        axes[row, 0].set_ylim(low, high * (high / low) ** 0.25)  # room for the words of a panel
        axes[row, 0].set_ylabel(f"{format_.upper()}\nrelative loss")
    for axis, (name, formula) in zip(axes[0], FORMULAS.items(), strict=True):
        axis.set_title(f"{PREDICTIONS.get(name, 'bound')}\n{formula}", fontsize="small")
    figure.legend(handles=_handles(found.transforms), loc="outside upper center", ncols=len(found.transforms) + 1)
    across = "across: prediction or bound, over the power of the layer's output"
    style.caption(figure, f"{across}\n{answer(points)}\n{source}")
    return figure


def answer(by_format: Mapping[str, Points]) -> str:
    """Which prediction is nearest in each format and whether it holds, what is absent, and what decides."""
    lines = [f"{format_.upper()}: {_verdict(points)}" for format_, points in by_format.items()]
    rule = (
        "nearest: least root mean square of log(measured / predicted), brackets: 95% over linears;\n"
        f"it holds by the rank correlation ρ: yes from {HOLDS}, in part from {PARTLY}"
    )
    return "\n".join(["Does the theory hold on real layers?", *lines, rule])


def _verdict(points: Points) -> str:
    name, clear = points.nearest
    absent = [title for one, title in PREDICTIONS.items() if one not in points]
    others = "" if clear else ", not clearly nearest"
    others += f"; absent from these records: {', '.join(absent)}" if absent else ""
    below = sum(len(points) - points.bounded(one) for one in ("even", "paper_fp") if one in points)
    limit = f"; {below} predictions below the bound" if below else ""
    return f"{_word(points.spearman(name))}, by {PREDICTIONS[name]}{others}{limit}"


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


def _quantiles(values: Array) -> Interval:
    return Interval(*np.quantile(values, (0.025, 0.975)).tolist())


def _panel(axes: Axes, points: Points, name: str) -> None:
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())  # they would overlap
    axes.grid(visible=True)
    if name not in points:
        text = "absent: these records\nkept no such prediction"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=style.GREY)
        axes.tick_params(which="both", bottom=False, labelbottom=False)
        return
    x = points.over_power(name)
    colours = [style.TRANSFORMS.get(transform, style.BLACK) for transform in points.transforms]
    axes.scatter(x, points.relative, s=(1.4 * style.scale()) ** 2, c=colours, linewidths=0)
    # The bound is the least of the even-noise prediction, whose factor is therefore its own.
    factor = points.factor("even" if name == "bound" else name)
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, factor * ends, color=style.BLACK, linewidth=0.7 * style.scale())
    if name in PREDICTIONS:
        interval = points.interval(name)
        nearest = points.nearest[0] == name and sum(one in points for one in PREDICTIONS) > 1
        told = (
            f"rms of logs {points.spread(name):.2f} ({interval.low:.2f}–{interval.high:.2f})\n"
            f"ρ {points.spearman(name):.2f}, factor {factor:.2g}"
        )
        axes.text(
            0.03, 0.97, told, transform=axes.transAxes, va="top", fontsize="x-small",
            weight="bold" if nearest else "normal",
        )  # fmt: skip


def _handles(transforms: Iterable[str]) -> list[Line2D]:
    return [
        *(
            Line2D([], [], color=style.TRANSFORMS.get(one, style.BLACK), marker="o", linestyle="", label=one.upper())
            for one in transforms
        ),
        Line2D([], [], color=style.BLACK, label="slope 1, the format's factor"),
    ]
