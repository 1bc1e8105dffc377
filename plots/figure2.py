"""Figure 2: per-layer speed over BF16, published on an RTX 5090 beside the newest record of this project's kernels.

Both panels show the same layers at the same number of tokens, on different GPUs: the matmul alone, and whole layers
with one Hadamard matrix and with a transform for each block, as WUSH has. What a record lacks is marked so.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import style
from plots.reference import Speedup, Unreadable, read
from wush_kernels.bench.measurement import BF16, HADAMARD, OURS, Measurement
from wush_kernels.bench.record import RESULTS, Record, load

FP4_CAPABILITY = 10.0  # from here on tensor cores take FP4
HEIGHT = 0.8  # of a layer's bars together, where layers are 1 apart
MATMUL = ("kernels", "scaled_mm", "mxfp4 accurate")
Series = tuple[str, str, list[float | None]]  # label, colour, times as fast as BF16 of each layer


@dataclass(frozen=True)
class Measured:
    """What a record's panel shows of each layer, and the GPU it ran on."""

    title: str
    series: list[Series]


def draw() -> Figure:
    """Published on the left, measured on the right."""
    layers = read(Speedup)
    record = newest(RESULTS)
    figure = style.figure(columns=2, height=5.0)
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    _bars(left, published(layers))
    left.set_title(f"published: RTX 5090\n({style.SOURCE}, not run here)")
    found = measured(record, layers) if record else Measured("measured here", [])
    right.set_title(found.title)
    if found.series:
        _bars(right, found.series)
    else:
        _note(right, "not measured: no record of a GPU;\nmake one with make kernels-bench")
    _label_layers(left, layers)
    for axes in (left, right):
        axes.set_xlabel("times as fast as BF16")
        axes.axvline(1, color=style.BLACK, linewidth=0.6 * style.scale())
        axes.grid(visible=True, axis="x")
    left.set_xlim(0, 7.6)
    style.caption(figure, _caption(layers, found.series))
    return figure


def published(layers: list[Speedup]) -> list[Series]:
    """The paper's three bars of each layer."""
    return [
        ("FP4 matmul only", style.GREY, [layer.matmul_only for layer in layers]),
        ("Hadamard + quantize + matmul", style.TRANSFORMS["h"], [layer.hadamard_quantize_matmul for layer in layers]),
        ("WUSH + quantize + matmul", style.TRANSFORMS["wush"], [layer.wush_quantize_matmul for layer in layers]),
    ]


def measured(record: Record, layers: list[Speedup]) -> Measured:
    """The record's whole layers, and the matmul alone, at the published sizes."""
    capability = float(record.environment["compute_capability"])
    without = "" if capability >= FP4_CAPABILITY else "no FP4 tensor cores; "
    whole = {fmt: lines(record, layers, ("layers", "layer", fmt)) for fmt in ("mxfp4", "nvfp4")}
    series = [
        ("MXFP4 matmul only (scaled_mm, accurate)", style.GREY, lines(record, layers, MATMUL), OURS),
        ("MXFP4 layer: Hadamard + quantize + matmul", style.TRANSFORMS["h"], whole["mxfp4"], HADAMARD),
        ("MXFP4 layer: WUSH + quantize + matmul", style.TRANSFORMS["wush"], whole["mxfp4"], OURS),
        ("NVFP4 layer: WUSH + quantize + matmul", style.FORMATS["nvfp4"], whole["nvfp4"], OURS),
    ]
    return Measured(
        f"measured here: {record.environment['gpu']}\n({without}record of {record.environment['date'][:10]})",
        [(label, color, [over_bf16(one, contender) for one in own]) for label, color, own, contender in series],
    )


def lines(record: Record, layers: list[Speedup], kind: tuple[str, str, str]) -> list[Measurement | None]:
    """The measurement of a section, name and variant at each layer's sizes; None where it is absent or failed."""
    found = {
        (one.tokens, one.out_features, one.in_features): one
        for one in record.measurements
        if (one.section, one.name, one.variant) == kind and not one.failure
    }
    return [found.get((layer.m, layer.n, layer.k)) for layer in layers]


def over_bf16(one: Measurement | None, contender: str) -> float | None:
    """Times as fast as BF16; None where one of both was not timed."""
    if one is None or not {contender, BF16} <= one.timings.keys():
        return None
    return one.timings[BF16].us / one.timings[contender].us


def behind(series: list[Series]) -> float | None:
    """How much slower the third series is than the second, the mean share over layers that have both, or None."""
    pairs = zip(series[1][2], series[2][2], strict=True)
    gaps = [1 - wush / hadamard for hadamard, wush in pairs if hadamard and wush]
    return fmean(gaps) if gaps else None


def newest(folder: Path) -> Record | None:
    """The latest complete record in a folder, or None; raises `Unreadable` for a file that holds no record."""
    try:
        records = [load(path) for path in sorted(folder.glob("*.json"))]
    except ValueError as error:
        raise Unreadable(f"{error}; restore or remove the file") from error
    complete = [record for record in records if record.finished and not record.settings["quick"]]
    return max(complete, key=lambda record: record.environment["date"], default=None)


def _caption(layers: list[Speedup], ours: list[Series]) -> str:
    text = f"Different GPUs: the two panels are not comparable. M = {layers[0].m:,} tokens; layers are N × K."
    sides = {"published": behind(published(layers)), "ours": behind(ours) if ours else None}
    told = [f"{side} {'not measured' if gap is None else f'{gap:.1%}'}" for side, gap in sides.items()]
    return f"{text}\nHow much slower layers are with WUSH than with Hadamard, on average: {', '.join(told)}."


def _bars(axes: Axes, series: list[Series]) -> None:
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.4 * style.scale()}  # keeps the line at 1 off numbers
    height = HEIGHT / len(series)
    for place, (label, color, ratios) in enumerate(series):
        ys = [layer + (place - (len(series) - 1) / 2) * height for layer in range(len(ratios))]
        axes.barh(ys, [ratio or 0 for ratio in ratios], height, color=color, label=label)
        for y, ratio in zip(ys, ratios, strict=True):
            text, shade = ("not measured", style.GREY) if ratio is None else (f"{ratio:.2f}", style.BLACK)
            axes.annotate(
                text, (ratio or 0, y), (2 * style.scale(), 0), textcoords="offset points", va="center",
                fontsize="x-small", color=shade, style="italic" if ratio is None else "normal", bbox=ground,
            )  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _label_layers(axes: Axes, layers: list[Speedup]) -> None:
    names = [f"{layer.model}\n{layer.n:,} × {layer.k:,}" for layer in layers]
    axes.set_yticks(range(len(layers)), names)
    axes.set_ylim(len(layers) - 0.5, -0.5)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=style.GREY)
