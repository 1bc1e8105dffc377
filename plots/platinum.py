"""Figures 3 and 7-10: the published Platinum Benchmarks, and beside them the recorded runs where there are some.

Figure 3 has the average of each model and method with its standard deviation between runs. Figures 7-10 have the means
of each benchmark, a model a figure in the published order; of the five models the last two share figure 10, which also
has other models that were run here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from plots import style
from plots.numbers import Number
from plots.platinum_tasks import Suite, suites
from plots.records import BASELINE, Records
from plots.reference import BENCHMARKS, Platinum, Unreadable, read
from plots.settings import MODELS, order, shown

Method = tuple[str, str | None, str | None]
Array = NDArray[np.float64]
ORIGINAL: Method = (BASELINE, None, None)
DARK = 0.18  # luminance below which white stands out more than black
PALER = 1.25  # the scale beyond the largest difference, so that numbers stand out from every colour
COLUMNS = ("average", *BENCHMARKS)
BELOW = 0.3  # how far ours are below the published dot, where methods are 1 apart


@dataclass(frozen=True)
class Panel:
    """A model of Figure 3: published rows, own runs, or both."""

    title: str
    rows: tuple[Platinum, ...]
    suite: Suite | None


@dataclass(frozen=True)
class Line:
    """A line of a table: the average and each benchmark, and how far above the original; NaN where that is unknown."""

    name: str
    values: Array
    differences: Array


def averages(records: Records) -> Figure:
    """Figure 3: a panel a model, a line a method; the original is the dashed line. Crosses are ours."""
    panels = _panels(records)
    known = {row.method for panel in panels for row in panel.rows}
    known |= {one for panel in panels if panel.suite for one in panel.suite.settings}
    methods = [one for one in _ordered(known) if one[0] != BASELINE]
    figure = style.figure(columns=2, height=1.1 + 0.14 * len(methods) * (1.4 if any(p.suite for p in panels) else 1))
    drawn = figure.subplots(1, len(panels), sharey=True)
    for axes, panel in zip(drawn, panels, strict=True):
        _average_panel(axes, methods, panel)
        axes.set_title(panel.title)
    drawn[0].set_yticks(range(len(methods)), [named(one) for one in methods])
    drawn[0].set_ylim(len(methods) - 0.5, -0.5)
    drawn[len(panels) // 2].set_xlabel(f"average of {len(BENCHMARKS)} Platinum Benchmarks, percent")
    colors = {(one[2] or one[1] or ""): _color(one) for one in sorted(methods, key=lambda one: order("", None, one[2]))}
    dots: list[Any] = [
        Line2D([], [], color=color, marker="o", linestyle="", label=name.upper()) for name, color in colors.items()
    ]
    line = Line2D([], [], color=style.GREY, linestyle="--", label="original (published: BF16), one run")
    figure.legend(handles=[*dots, line], loc="outside upper center", ncols=len(dots) + 1)
    style.caption(figure, _average_caption(panels))
    return figure


def figure7(records: Records) -> Figure:
    """The first model's benchmarks."""
    return benchmarks([0], records)


def figure8(records: Records) -> Figure:
    """The second model's benchmarks."""
    return benchmarks([1], records)


def figure9(records: Records) -> Figure:
    """The third model's benchmarks."""
    return benchmarks([2], records)


def figure10(records: Records) -> Figure:
    """The benchmarks of all further models."""
    further = [suite for suite in _own(records) if suite.platinum]
    return benchmarks(range(3, len(by_model())), records, further)


def benchmarks(which: Sequence[int], records: Records, further: Sequence[Suite] = ()) -> Figure:
    """A table a model: means in percent, coloured by their distance from the original, on one scale for all models."""
    models, own = by_model(), {shown(suite.model): suite for suite in suites(records) if suite.platinum}
    tables = {model: _published_lines(rows) for model, rows in models.items()}
    chosen = {model: tables[model] + _own_lines(own.get(model)) for model in (list(models)[number] for number in which)}
    chosen |= {suite.model: _own_lines(suite) for suite in further}
    limit = PALER * max(float(np.nanmax(np.abs(line.differences))) for lines in tables.values() for line in lines)
    counts = [len(lines) for lines in chosen.values()]
    figure = style.figure(columns=2, height=0.9 + 0.45 * len(chosen) + 0.17 * sum(counts))
    panels = figure.subplots(len(chosen), 1, sharex=True, height_ratios=counts, squeeze=False)[:, 0]
    for axes, (model, lines) in zip(panels, chosen.items(), strict=True):
        mesh = _table(axes, lines, limit)
        axes.set_title(model, loc="left")
    panels[-1].set_xticks(np.arange(len(COLUMNS)) + 0.5, COLUMNS, rotation=40, ha="right", rotation_mode="anchor")
    bar: Any = figure.colorbar(mesh, ax=list(panels), pad=0.01, fraction=0.03, aspect=30)
    bar.set_label("points above the original")
    bar.outline.set_visible(False)
    ours = [suite for model, suite in own.items() if model in chosen]
    style.caption(figure, f"{_source(ours)}; percent, means over runs (published BF16: one run)")
    return figure


def by_model() -> dict[str, list[Platinum]]:
    """The published rows of each model, the original in BF16 first; raises `Unreadable`."""
    found: dict[str, dict[Method, Platinum]] = {}
    for row in read(Platinum):
        found.setdefault(row.model, {})[row.method] = row
    for model, rows in found.items():
        if not any(one[0] == BASELINE for one in rows):
            raise Unreadable(f"no BF16 row of {model} in the published Platinum Benchmarks; restore plots/reference")
    return {model: [rows[one] for one in _ordered(set(rows))] for model, rows in found.items()}


def named(one: Method) -> str:
    """A method in a figure, such as `MXFP4 GPTQ WUSH`."""
    return " ".join(part.upper() for part in one if part)


def _ordered(methods: set[Method]) -> list[Method]:
    return sorted(methods, key=lambda one: order(*one))


def _color(one: Method) -> str:
    transform = one[2] or ("sq" if one[1] == "smoothquant" else "i")
    return style.TRANSFORMS.get(transform, style.BLACK)


def _own(records: Records) -> list[Suite]:
    """Of models that are not among the published ones."""
    published = {MODELS.get(model, model) for model in by_model()}
    return [suite for suite in suites(records) if suite.model not in published]


def _panels(records: Records) -> list[Panel]:
    own = {shown(suite.model): suite for suite in suites(records) if suite.platinum}
    published = [
        Panel(model.replace("-Instruct", "\nInstruct"), tuple(rows), own.get(model))
        for model, rows in by_model().items()
    ]
    return published + [Panel(_own_title(suite), (), suite) for suite in _own(records)]


def _own_title(suite: Suite) -> str:
    return suite.model if suite.platinum else f"{suite.model}\nother tasks"


def _source(ours: Sequence[Suite]) -> str:
    if not ours:
        return style.PUBLISHED
    trials = [trial for suite in ours for trial in suite.trials]
    machines = ", ".join(sorted({trial.device for trial in trials}))
    left_out = [f"{suite.model}: {text}" for suite in ours for text in suite.left_out]
    others = f"; not shown: {', '.join(left_out)}" if left_out else ""
    return f"published ({style.SOURCE}) and ours ({len(trials)} trials on {machines}{others})"


def _average_caption(panels: Sequence[Panel]) -> str:
    runs = [row.runs for panel in panels for row in panel.rows if row.std_between_runs is not None]
    spread = f"bars: standard deviation between {_range(runs)} runs"
    ours = [panel.suite for panel in panels if panel.suite]
    counts = [len(suite.runs(one)) for suite in ours for one in suite.settings if one[0] != BASELINE]
    crosses = f"\ncrosses: ours, 95% intervals of {_range(counts)} runs" if counts else ""
    other = "".join(f"; {suite.model}: {', '.join(suite.columns)}" for suite in ours if not suite.platinum)
    return f"{_source(ours)}; {spread}{crosses}{other}; – : no {'number' if ours else 'published number'}"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _average_panel(axes: Axes, methods: list[Method], panel: Panel) -> None:
    found = {row.method: row for row in panel.rows}
    own = panel.suite.settings if panel.suite else {}
    if panel.rows:
        axes.axvline(panel.rows[0].average, color=style.GREY, linestyle="--")
    elif panel.suite and ORIGINAL in own and (original := panel.suite.average(ORIGINAL)):
        axes.axvline(original.mean, color=style.GREY, linestyle="--")
    for y, one in enumerate(methods):
        color = _color(one)
        if one in own and panel.suite and (number := panel.suite.average(one)):
            _cross(axes, number, y + (BELOW if panel.rows else 0), color)
        if (row := found.get(one)) is not None:
            axes.errorbar(row.average, y, xerr=row.std_between_runs, fmt="o", color=color, capsize=2 * style.scale())
        elif one not in own:
            axes.text(0.5, y, "–", transform=axes.get_yaxis_transform(), ha="center", va="center", color=style.GREY)
    formats = [one[0] for one in methods]
    for y in range(1, len(formats)):
        if formats[y] != formats[y - 1]:
            axes.axhline(y - 0.5, color=style.BLACK, linewidth=0.4 * style.scale())
    axes.grid(visible=True)
    axes.margins(x=0.1)
    axes.locator_params(axis="x", nbins=4, integer=True)


def _cross(axes: Axes, number: Number, y: float, color: str) -> None:
    """Ours, with its 95% interval where it has one."""
    axes.errorbar(number.mean, y, xerr=number.ends, fmt="x", color=color, capsize=1.2 * style.scale())


def _values(rows: list[Platinum]) -> Array:
    return np.array([[row.average, *row.benchmarks.values()] for row in rows])


def _published_lines(rows: list[Platinum]) -> list[Line]:
    """The original is the first row."""
    values = _values(rows)
    return [Line(named(row.method), own, own - values[0]) for row, own in zip(rows, values, strict=True)]


def _own_lines(suite: Suite | None) -> list[Line]:
    if suite is None:
        return []
    values = {one: _means(list(suite.runs(one).values())) for one in _ordered(set(suite.settings))}
    original = values.get(ORIGINAL, np.full(len(COLUMNS), np.nan))
    return [Line(f"ours: {named(one)}", own, own - original) for one, own in values.items()]


def _means(runs: Sequence[Mapping[str, float]]) -> Array:
    """Of the average and of each benchmark."""
    columns = np.array([[run[name] for name in BENCHMARKS] for run in runs]).mean(axis=0)
    return np.concatenate([[columns.mean()], columns])


def _luminance(color: Any) -> float:
    """Relative luminance of an RGBA colour, with sRGB's curve taken as a power."""
    return float(np.dot((0.2126, 0.7152, 0.0722), np.power(color[:3], 2.2)))


def _table(axes: Axes, lines: list[Line], limit: float) -> Any:
    values, differences = (np.array([getattr(line, name) for line in lines]) for name in ("values", "differences"))
    colors = np.ma.masked_invalid(differences)
    mesh = axes.pcolormesh(colors, cmap="PuOr", vmin=-limit, vmax=limit, edgecolors="white",
                           linewidth=0.8 * style.scale())  # fmt: skip
    for (y, x), value in np.ndenumerate(values):
        dark = np.isfinite(differences[y, x]) and _luminance(mesh.to_rgba(differences[y, x])) < DARK
        axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", fontsize="small",
                  color="white" if dark else style.BLACK)  # fmt: skip
    axes.axvline(1, color=style.BLACK, linewidth=0.8 * style.scale())
    axes.set_yticks(np.arange(len(lines)) + 0.5, [line.name for line in lines])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh
