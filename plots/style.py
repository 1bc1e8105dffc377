"""How figures look and how they are written: two styles, colours by meaning, and the same bytes for the same input.

Figures are laid out once, in the paper's inches and points; the screen style is the same figure, larger.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
from matplotlib.figure import Figure

SOURCE = "arXiv 2512.00956 v3"
PUBLISHED = f"published ({SOURCE}), not run here"
COLUMN_INCHES = {1: 3.25, 2: 6.75}  # a two-column paper: one column, and both
POINTS = 7.5  # of the paper's text in figures
CHARACTERS = 18.5  # of a caption to an inch of the paper
SCALES = {"paper": 1.0, "screen": 1.6}
DPI = {"paper": 300, "screen": 150}

# Okabe and Ito's colours, which people with any colour vision tell apart.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, BLACK = "#0072B2", "#D55E00", "#CC79A7", "#000000"
GREY, PALE = "#666666", "#DDDDDD"

FORMATS = {"original": GREY, "mxfp4": BLUE, "nvfp4": ORANGE, "int4": GREEN, "mxfp8": SKY}
TRANSFORMS = {"i": GREY, "r": SKY, "h": BLUE, "hu": PURPLE, "w": YELLOW, "sq": ORANGE, "wus": GREEN, "wush": VERMILLION}

# Without dates or versions, a file depends on nothing but what it shows.
METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"Creator": "wush", "Producer": "matplotlib", "CreationDate": None},
    "svg": {"Creator": "wush", "Date": None},
    "png": {"Software": None},
}


class Unusable(ValueError):
    """A model that the user named cannot be drawn; the message says why and what to do."""


class Absent(RuntimeError):
    """A figure's data is not there; the message says what is missing and how to get it."""


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Draw and save in a style of `SCALES`, whatever the user's own settings of matplotlib."""
    with matplotlib.style.context(["default", _settings(SCALES[name], DPI[name])]):
        yield


def scale() -> float:
    """How many times larger than in the paper the present style draws."""
    return mpl.rcParams["font.size"] / POINTS


def figure(columns: int, height: float) -> Figure:
    """An empty figure, one or two of the paper's columns wide and `height` of the paper's inches high."""
    return Figure(figsize=(scale() * COLUMN_INCHES[columns], scale() * height), layout="constrained")


def caption(drawn: Figure, text: str) -> None:
    """Lines at the foot of the figure that say where its numbers come from, as long as the figure is wide."""
    width = int(CHARACTERS * drawn.get_figwidth() / scale())
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)]
    drawn.supxlabel("\n".join(lines), fontsize="small", color=GREY)


def save(drawn: Figure, folder: Path, name: str) -> list[Path]:
    """Write the figure as PDF, SVG and PNG, the same bytes each time; raises `OSError` where that cannot be done."""
    paths = []
    for kind, metadata in METADATA.items():
        content = io.BytesIO()
        drawn.savefig(content, format=kind, metadata=metadata)
        paths.append(folder / f"{name}.{kind}")
        paths[-1].write_bytes(content.getvalue())
    return paths


def _settings(scale: float, dpi: int) -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that every machine draws the same
        "font.size": scale * POINTS,
        "axes.titlesize": "medium",
        "axes.labelsize": "medium",
        "xtick.labelsize": "small",
        "ytick.labelsize": "small",
        "legend.fontsize": "small",
        "legend.frameon": False,
        "axes.linewidth": scale * 0.6,
        "axes.titlepad": scale * 5,
        "axes.labelpad": scale * 3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "lines.linewidth": scale * 1.2,
        "lines.markersize": scale * 3.5,
        "lines.markeredgewidth": scale * 0.8,
        "patch.linewidth": scale * 0.6,
        "grid.linewidth": scale * 0.5,
        "grid.color": PALE,
        **{
            f"{axis}tick.major.{key}": scale * size
            for axis in "xy"
            for key, size in (("size", 2.5), ("width", 0.6), ("pad", 3))
        },
        **{f"{axis}tick.minor.{key}": scale * size for axis in "xy" for key, size in (("size", 1.5), ("width", 0.4))},
        "hatch.linewidth": scale * 0.5,
        "figure.constrained_layout.h_pad": scale * 0.04,
        "figure.constrained_layout.w_pad": scale * 0.04,
        "savefig.dpi": dpi,
        "pdf.fonttype": 42,  # TrueType, embedded
        "svg.fonttype": "path",  # an SVG cannot carry its font here, and without it another one would not fit
        "svg.hashsalt": "wush",
    }
