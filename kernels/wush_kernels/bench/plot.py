"""The ratio of whole layers to BF16 against M, a panel for each model."""

import importlib
from pathlib import Path
from typing import Any

from wush_kernels.bench.measurement import BF16
from wush_kernels.bench.record import Record
from wush_kernels.bench.report import joined_layers
from wush_kernels.bench.shapes import JOINED, MODELS

COLORS = dict(zip(JOINED, ("#4269d0", "#efb118", "#ff725c", "#3ca951"), strict=True))
STYLES = {"mxfp4": "-", "nvfp4": ":"}


class MissingLibraryError(RuntimeError):
    """Something that only the plot needs is not installed; the message says how to install it."""


def plot(record: Record, path: Path) -> None:
    """Draw the ratios into a PNG or SVG; raises `MissingLibraryError`, or `ValueError` for a record without layers."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingLibraryError("the plot needs matplotlib; run: pip install matplotlib") from error
    shown = [model for model in MODELS if any(joined_layers(record, variant, model) for variant in STYLES)]
    if not shown:
        raise ValueError("the record has no layers to plot; measure them with --only layers")
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.4 * rows + 0.8), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, model in zip(axes.flat, shown, strict=False):
        _panel(axis, record, model)
    axes[0, 0].set_ylim(bottom=0)  # of all, since they share it, and after all are drawn
    for axis in axes[-1]:
        axis.set_xlabel("tokens (M)")
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as BF16")
    handles = [pyplot.Line2D([], [], color=COLORS[linear], marker="o", markersize=3, label=linear) for linear in JOINED]
    handles += [
        pyplot.Line2D([], [], color="#555", linestyle=style, label=name.upper()) for name, style in STYLES.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(f"Whole layers (transform + quantize + matmul), {record.environment['gpu']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, record: Record, model: str) -> None:
    axis.axhline(1, color="#999", linewidth=0.8)
    tokens: set[int] = set()
    for variant, style in STYLES.items():
        for linear, own in joined_layers(record, variant, model).items():
            right = [one for one in own if not one.failure]
            points = [(one.tokens, ratio) for one in right if (ratio := one.ratio(BF16)) is not None]
            if not points:
                continue
            tokens |= {x for x, _ in points}
            axis.plot(*zip(*points, strict=True), style, color=COLORS[linear], marker="o", markersize=3, linewidth=1.4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(tokens), [str(x) for x in sorted(tokens)], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_title(model, fontsize=10)
    axis.grid(axis="y", color="#ddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
