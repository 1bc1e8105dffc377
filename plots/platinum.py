"""Figures 3 and 7-10: the published Platinum Benchmarks, none of them run here.

Figure 3 has the average of each model and method with its standard deviation between runs. Figures 7-10 have the means
of each benchmark, a model a figure in the published order; of the five models the last two share figure 10.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import style
from plots.reference import BENCHMARKS, Platinum, Unreadable, read

Method = tuple[str, str | None, str | None]
FORMATS, ALGORITHMS, TRANSFORMS = ("bf16", "mxfp4", "nvfp4"), (None, "rtn", "gptq"), (None, "i", "h", "wush")
DARK = 0.18  # luminance below which white stands out more than black
PALER = 1.25  # the scale beyond the largest difference, so that numbers stand out from every colour
COLUMNS = ("average", *BENCHMARKS)


def averages() -> Figure:
    """Figure 3: a panel a model, a line a method; BF16 is the dashed line."""
    models = by_model()
    methods = [one for one in _ordered({method(row) for rows in models.values() for row in rows}) if one[0] != "bf16"]
    figure = style.figure(columns=2, height=2.9)
    panels = figure.subplots(1, len(models), sharey=True)
    for axes, (model, rows) in zip(panels, models.items(), strict=True):
        _average_panel(axes, methods, rows)
        axes.set_title(model.replace("-Instruct", "\nInstruct"))
    panels[0].set_yticks(range(len(methods)), [named(one) for one in methods])
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    panels[len(panels) // 2].set_xlabel(f"average of {len(BENCHMARKS)} Platinum Benchmarks, percent")
    shown = [one for one in TRANSFORMS if one is not None]
    dots: list[Any] = [
        Line2D([], [], color=style.TRANSFORMS[one], marker="o", linestyle="", label=one.upper()) for one in shown
    ]
    line = Line2D([], [], color=style.GREY, linestyle="--", label="BF16, one run")
    figure.legend(handles=[*dots, line], loc="outside upper center", ncols=len(dots) + 1)
    runs = [row.runs for rows in models.values() for row in rows if row.std_between_runs is not None]
    spread = f"bars: standard deviation between {min(runs)} to {max(runs)} runs"
    style.caption(figure, f"{style.PUBLISHED}; {spread}; – : no published number")
    return figure


def figure7() -> Figure:
    """The first model's benchmarks."""
    return benchmarks([0])


def figure8() -> Figure:
    """The second model's benchmarks."""
    return benchmarks([1])


def figure9() -> Figure:
    """The third model's benchmarks."""
    return benchmarks([2])


def figure10() -> Figure:
    """The benchmarks of all further models."""
    return benchmarks(range(3, len(by_model())))


def benchmarks(which: Sequence[int]) -> Figure:
    """A table a model: means in percent, coloured by their distance from BF16, on one scale for all models."""
    models = by_model()
    limit = PALER * max(float(np.abs(_differences(rows)).max()) for rows in models.values())
    chosen = [list(models.items())[number] for number in which]
    counts = [len(rows) for _, rows in chosen]
    figure = style.figure(columns=2, height=0.9 + 0.45 * len(chosen) + 0.17 * sum(counts))
    panels = figure.subplots(len(chosen), 1, sharex=True, height_ratios=counts, squeeze=False)[:, 0]
    for axes, (model, rows) in zip(panels, chosen, strict=True):
        mesh = _table(axes, rows, limit)
        axes.set_title(model, loc="left")
    panels[-1].set_xticks(np.arange(len(COLUMNS)) + 0.5, COLUMNS, rotation=40, ha="right", rotation_mode="anchor")
    bar: Any = figure.colorbar(mesh, ax=list(panels), pad=0.01, fraction=0.03, aspect=30)
    bar.set_label("points above BF16")
    bar.outline.set_visible(False)
    style.caption(figure, f"{style.PUBLISHED}; percent, means over runs (BF16: one run)")
    return figure


def by_model() -> dict[str, list[Platinum]]:
    """The published rows of each model, BF16 first; raises `Unreadable`."""
    found: dict[str, dict[Method, Platinum]] = {}
    for row in read(Platinum):
        found.setdefault(row.model, {})[method(row)] = row
    for model, rows in found.items():
        if not any(one[0] == "bf16" for one in rows):
            raise Unreadable(f"no BF16 row of {model} in the published Platinum Benchmarks; restore plots/reference")
    return {model: [rows[one] for one in _ordered(set(rows))] for model, rows in found.items()}


def method(row: Platinum) -> Method:
    """What the row was quantized with."""
    return row.format, row.algorithm, row.transform


def named(one: Method) -> str:
    """A method in a figure, such as `MXFP4 GPTQ WUSH`."""
    return " ".join(part.upper() for part in one if part)


def _ordered(methods: set[Method]) -> list[Method]:
    def place(one: Method) -> tuple[int, int, int]:
        return FORMATS.index(one[0]), ALGORITHMS.index(one[1]), TRANSFORMS.index(one[2])

    return sorted(methods, key=place)


def _average_panel(axes: Axes, methods: list[Method], rows: list[Platinum]) -> None:
    found = {method(row): row for row in rows}
    axes.axvline(rows[0].average, color=style.GREY, linestyle="--")
    for y, one in enumerate(methods):
        if (row := found.get(one)) is None:
            axes.text(0.5, y, "–", transform=axes.get_yaxis_transform(), ha="center", va="center", color=style.GREY)
            continue
        color = style.TRANSFORMS[one[2] or "i"]
        axes.errorbar(row.average, y, xerr=row.std_between_runs, fmt="o", color=color, capsize=2 * style.scale())
    formats = [one[0] for one in methods]
    axes.axhline(formats.index("nvfp4") - 0.5, color=style.BLACK, linewidth=0.4 * style.scale())
    axes.grid(visible=True)
    axes.margins(x=0.1)
    axes.locator_params(axis="x", nbins=4, integer=True)


def _values(rows: list[Platinum]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[row.average, *row.benchmarks.values()] for row in rows])


def _differences(rows: list[Platinum]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Points above BF16, the first row; `(methods, 1 + benchmarks)`."""
    values = _values(rows)
    return values - values[0]


def _luminance(color: Any) -> float:
    """Relative luminance of an RGBA colour, with sRGB's curve taken as a power."""
    return float(np.dot((0.2126, 0.7152, 0.0722), np.power(color[:3], 2.2)))


def _table(axes: Axes, rows: list[Platinum], limit: float) -> Any:
    values, differences = _values(rows), _differences(rows)
    mesh = axes.pcolormesh(differences, cmap="PuOr", vmin=-limit, vmax=limit, edgecolors="white",
                           linewidth=0.8 * style.scale())  # fmt: skip
    for (y, x), value in np.ndenumerate(values):
        shade = "white" if _luminance(mesh.to_rgba(differences[y, x])) < DARK else style.BLACK
        axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", fontsize="small", color=shade)
    axes.axvline(1, color=style.BLACK, linewidth=0.8 * style.scale())
    axes.set_yticks(np.arange(len(rows)) + 0.5, [named(method(row)) for row in rows])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh
