"""What quality costs: KL against bits a weight, and against the speed of the format's layers.

KL and bits are of whole quantized models, speed of the newest record of this project's kernels: a format's layer with
its block transform, over BF16, the geometric mean over layer sizes. The dashed line joins what nothing beats in both.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from plots import style
from plots.chosen import chosen
from plots.figure2 import newest
from plots.records import Records, Trial
from plots.settings import Setting
from plots.tables.divergence import usable
from wush_kernels.bench.measurement import BF16
from wush_kernels.bench.record import RESULTS, Record

ABSENT = (
    "no record of a quantized whole model; make some with python run.py -m experiment=layers scale=small, "
    "and name their folder with --records"
)
TOKENS = 1024  # as in the paper's Figure 2
MARKERS = {"mxfp4": "o", "nvfp4": "s", "int4": "^", "mxfp8": "D"}
Point = tuple[Trial, float]  # and its place along the axis


def draw(records: Records) -> Figure:
    """Left: bits a weight. Right: times as fast as BF16."""
    found = chosen(usable(records), ABSENT)
    record = newest(RESULTS)
    figure = style.figure(columns=2, height=3.0)
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, [(trial, trial.metrics.bits_per_weight) for trial in found.trials], smaller_is_better=True)
    left.set(xlabel="bits a weight, transforms included", ylabel="KL from the original, nats", yscale="log")
    _speed_panel(right, found.trials, record)
    handles = _handles(found.formats, found.transforms)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles) // 2)
    style.caption(figure, f"{found.source}\nbars: 95% intervals over evaluated windows, where records keep them")
    return figure


def speeds(record: Record) -> dict[str, float]:
    """Times as fast as BF16 of each format's layer, the geometric mean over the sizes measured at `TOKENS`."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for one in record.of("layers"):
        ratio = one.ratio(BF16)
        if one.name == "layer" and one.tokens == TOKENS and not one.failure and ratio is not None:
            ratios[one.variant].append(math.log(ratio))
    return {name: math.exp(fmean(own)) for name, own in ratios.items()}


def front(points: Sequence[Point], smaller_is_better: bool) -> list[Point]:
    """Those that no other beats in both KL and the axis, from the best KL on."""
    sign = 1 if smaller_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0].metrics.kl, sign * point[1], point[0].trial_id)):
        if not best or sign * point[1] < sign * best[-1][1]:
            best.append(point)
    return best


def _speed_panel(axes: Axes, trials: Sequence[Trial], record: Record | None) -> None:
    axes.set_xlabel(f"times as fast as BF16, {TOKENS:,} tokens")
    measured = speeds(record) if record else {}
    # Without a transform a layer is faster than what the record has.
    points = [(one, measured[one.format]) for one in trials if one.format in measured and one.transform != "i"]
    if record is None or not points:
        why = "no record of a GPU;\nmake one with make kernels-bench" if record is None else "these formats' layers"
        axes.text(
            0.5, 0.5, f"not measured: {why}", transform=axes.transAxes, ha="center", va="center", color=style.GREY
        )
        return
    _scatter(axes, points, smaller_is_better=False)
    without = sorted({trial.format.upper() for trial in trials} - {name.upper() for name in measured})
    lacks = f"\nnot measured: {', '.join([*without, 'layers without a transform'])}"
    axes.set_title(f"layers of 8B to 70B models, {record.environment['gpu']}{lacks}", fontsize="small")


def _scatter(axes: Axes, points: Sequence[Point], smaller_is_better: bool) -> None:
    for trial, along in points:
        color = style.TRANSFORMS.get(trial.transform or "", style.BLACK)
        kl = Setting((trial,)).metric("kl")
        axes.errorbar(
            along, kl.mean, yerr=kl.ends, fmt=MARKERS.get(trial.format, "*"), color=color,
            markerfacecolor="white" if trial.algorithm == "rtn" else color, elinewidth=0.6 * style.scale(),
        )  # fmt: skip
    best = front(points, smaller_is_better)
    axes.plot([along for _, along in best], [trial.metrics.kl for trial, _ in best], color=style.GREY, linestyle="--",
              zorder=0)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(FuncFormatter(_tick))
    axes.grid(visible=True, which="both", axis="y")
    axes.margins(x=0.08)


def _tick(value: float, _: int | None) -> str:
    """A label at 1, 2 and 5 of each decade."""
    return f"{value:g}" if f"{value:.0e}"[0] in "125" else ""


def _handles(formats: Sequence[str], transforms: Sequence[str]) -> list[Line2D]:
    """Two lines, which a legend fills column by column: what colours mean, and what shapes do."""

    def dot(label: str, marker: str, color: str, filled: bool = True) -> Line2D:
        face = color if filled else "white"
        return Line2D([], [], color=color, marker=marker, linestyle="", label=label, markerfacecolor=face)

    colors = [dot(one.upper(), "o", style.TRANSFORMS.get(one, style.BLACK)) for one in transforms]
    shapes = [
        *(dot(one.upper(), MARKERS.get(one, "*"), style.BLACK) for one in formats),
        dot("filled: GPTQ", "o", style.BLACK),
        dot("hollow: RTN", "o", style.BLACK, filled=False),
        Line2D([], [], color=style.GREY, linestyle="--", label="Pareto front"),
    ]
    nothing = Line2D([], [], linestyle="", label=" ")
    return [one for pair in zip_longest(colors, shapes, fillvalue=nothing) for one in pair]
