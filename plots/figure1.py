"""Figure 1: what a transform does to the error of quantization, in two dimensions and by the paper's noise models.

The one-sided problem (equation 14): `y = L^T x`, of second moment `U S^2 U^T`, is quantized as `T^-1 q(T y)` and the
error is `E|T^-1 e|^2`. Rounding is noise: `e = diag(eta) T y` for floating point (equation 18), `e = |T y|_inf eta` for
integers (equation 23), eta independent, of mean 0 and one variance. So a point's error and its expectation over
Gaussian y are in closed form, and each is shown relative to that of `T = I`. In floating point only WUSH changes any
error at all. The toy is the one of the paper's release.
Shape legend: `P` points; a row is a point.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon
from numpy.typing import NDArray

from plots import style
from wush.transforms import hadamard

Array = NDArray[np.float64]
Kind = Literal["FP", "INT"]

SPECTRUM, DEGREES = (1.0, 0.3), 15.0  # S, and the angle of the first axis
# Of the errors drawn for a point, eta is uniform up to this; the relative errors do not depend on it.
NOISE = 0.4
EXAMPLES = ((0.92, 0.08), (-0.3, 0.45))
LIMIT = 2.2  # of a panel, in RMS of the transformed points
LOG_LIMIT = 1.0
PALENESS = 0.35  # how far the map's colours are moved towards white
PIXELS = 240  # even, so that no pixel is the origin, which has no error
GRID, LINES = 0.5, 12  # the distance of its lines, in RMS, and their number on a side
COLOURS = (style.GREEN, style.ORANGE)  # of the examples
LABELS = {
    "i": "I",
    "h": "H",
    "hu": r"$HU^\top$",
    "whitening": "whitening\n" + r"$S^{-1}U^\top$",
    "wus": "WUS\n" + r"$S^{-1/2}U^\top$",
    "wush": "WUSH\n" + r"$HS^{-1/2}U^\top$",
}


def axes_of_data() -> Array:
    """`U`, with the main axes of y in its columns."""
    angle = math.radians(DEGREES)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def second_moment() -> Array:
    """`E[y y^T] = U S^2 U^T`."""
    u = axes_of_data()
    return (u * np.square(SPECTRUM)) @ u.T


def transforms() -> dict[str, Array]:
    """The one-sided `T` of each row: a transform `T L^T` of activations, where `L L^T = M_W` (equation 15)."""
    s, ut = np.array(SPECTRUM)[:, None], axes_of_data().T
    hd = hadamard(2).numpy()
    return {"i": np.eye(2), "h": hd, "hu": hd @ ut, "whitening": ut / s, "wus": ut / s**0.5, "wush": hd @ (ut / s**0.5)}


@dataclass(frozen=True)
class Model:
    """Rounding as noise in the coordinates of `forth`, a transform `(2, 2)`; errors are in units of `E[eta^2]`."""

    forth: Array
    kind: Kind

    @cached_property
    def back(self) -> Array:
        """`T^-1`."""
        return np.asarray(np.linalg.inv(self.forth), dtype=np.float64)

    @cached_property
    def moment(self) -> Array:
        """`T U S^2 U^T T^T`, the second moment of transformed points."""
        return self.forth @ second_moment() @ self.forth.T

    @property
    def rms(self) -> float:
        """Root mean square of transformed points over both coordinates."""
        return math.sqrt(np.trace(self.moment) / 2)

    @property
    def costs(self) -> Array:
        """`|T^-1 e_k|^2`, what a unit of noise in each transformed coordinate costs, `(2,)`."""
        return np.square(self.back, dtype=np.float64).sum(axis=0)

    def deviations(self, y: Array) -> Array:
        """Of the noise of points `(P, 2)` in each transformed coordinate, over that of eta."""
        size = np.abs(y @ self.forth.T)
        return size if self.kind == "FP" else np.broadcast_to(size.max(1, keepdims=True), size.shape)

    def errors(self, y: Array) -> Array:
        """`E|T^-1 e|^2` of points `(P, 2)`."""
        return np.square(self.deviations(y)) @ self.costs

    def expected_error(self) -> float:
        """`E|T^-1 e|^2` over Gaussian y: equation 19, or 24."""
        if self.kind == "FP":
            return float(np.diag(self.moment) @ self.costs)
        return float(self.costs.sum()) * expected_largest_square(self.moment)

    def zone(self, y: Array) -> Array:
        """Corners `(4, 2)`, in transformed coordinates, of where noise uniform in `+-NOISE` takes a point `(2,)`."""
        reach = NOISE * self.deviations(y[None])[0]
        return y @ self.forth.T + reach * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


def expected_largest_square(moment: Array) -> float:
    """`E max(a^2, b^2)` of Gaussian a and b of mean 0 with a second moment `(2, 2)`.

    It is `(E a^2 + E b^2 + E|a^2 - b^2|) / 2`, and `a^2 - b^2` the product of the Gaussians a - b and a + b, the mean
    magnitude of which is known.
    """
    turn = np.array([[1, -1], [1, 1]])
    product = turn @ moment @ turn.T
    scale = math.sqrt(product[0, 0] * product[1, 1])
    correlation = product[0, 1] / scale
    magnitude = 2 / math.pi * scale * (math.sqrt(1 - correlation**2) + correlation * math.asin(correlation))
    return float(np.trace(moment) + magnitude) / 2


def expected_errors(kind: Kind) -> dict[str, float]:
    """Each transform's expected error relative to that of the identity."""
    errors = {name: Model(transform, kind).expected_error() for name, transform in transforms().items()}
    return {name: error / errors["i"] for name, error in errors.items()}


def change(model: Model, y: Array) -> Array:
    """The logarithm to base 2 of the error of points `(P, 2)` relative to that of the identity."""
    return np.log2(model.errors(y) / Model(np.eye(2), model.kind).errors(y))


def draw() -> Figure:
    """Rows: transforms. Columns: FP and INT, each in original and in transformed coordinates."""
    unit = style.scale()
    figure = Figure(figsize=(unit * style.COLUMN_INCHES[2], unit * 10.08))
    axes = figure.subplots(
        6, 4, gridspec_kw={"left": 0.105, "right": 0.99, "top": 0.97, "bottom": 0.0774, "wspace": 0.05, "hspace": 0.05}
    )
    kinds: tuple[Kind, ...] = ("FP", "INT")
    for half, kind in enumerate(kinds):
        relative = expected_errors(kind)
        for row, (name, transform) in enumerate(transforms().items()):
            for side in (0, 1):
                _panel(axes[row, 2 * half + side], Model(transform, kind), transformed=bool(side))
                _mark(axes[row, 2 * half + side], relative[name], bold=relative[name] == min(relative.values()))
    for axis, title in zip(
        axes[0], ("FP, original", "FP, transformed", "INT, original", "INT, transformed"), strict=True
    ):
        axis.set_title(title, fontsize="large", pad=4 * unit)
    for axis, label in zip(axes[:, 0], LABELS.values(), strict=True):
        axis.set_ylabel(label, labelpad=4 * unit)
    _legend(figure)
    return figure


def _panel(axis: Axes, model: Model, transformed: bool) -> None:
    unit = style.scale()
    to_panel = np.eye(2) if transformed else model.back  # from transformed coordinates
    limit = LIMIT * (model.rms if transformed else Model(np.eye(2), model.kind).rms)
    axis.spines[:].set_visible(True)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    _change_map(axis, model, limit, model.back if transformed else np.eye(2))
    _grid(axis, to_panel, model.rms)
    contour = _ellipse(to_panel @ model.moment @ to_panel.T)
    axis.plot(*contour, color=style.BLACK, linewidth=1.3 * unit, zorder=4)
    for example, colour in zip(np.array(EXAMPLES), COLOURS, strict=True):
        corners = model.zone(example) @ to_panel.T
        axis.add_patch(Polygon(corners, facecolor=to_rgba(colour, 0.55), edgecolor=colour, linewidth=unit, zorder=3))
        point = example @ model.forth.T @ to_panel.T
        axis.plot(*point, "o", color=colour, markeredgecolor="black", markersize=2.6 * unit, zorder=7)
        if not transformed:  # errors are lengths of the original space
            radius = NOISE * math.sqrt(model.errors(example[None])[0] / 3)
            axis.add_patch(Circle(tuple(point), radius, fill=False, edgecolor="black", linewidth=0.9 * unit, zorder=6))


def _change_map(axis: Axes, model: Model, limit: float, to_original: Array) -> None:
    """The change of error by colour, and dashed where there is none; no line where no point's error changes."""
    ticks = (np.arange(PIXELS) + 0.5) / PIXELS * 2 * limit - limit
    y = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2) @ to_original.T
    values = change(model, y).reshape(PIXELS, PIXELS)
    axis.imshow(
        values, extent=(-limit, limit, -limit, limit), origin="lower", cmap=_pale_colours(), zorder=0,
        vmin=-LOG_LIMIT, vmax=LOG_LIMIT, interpolation="nearest",
    )  # fmt: skip
    if np.abs(values).max() > 1e-9:
        dashes = [(0, (4, 2.5))]
        axis.contour(
            ticks,
            ticks,
            values,
            levels=[0],
            colors="black",
            linestyles=dashes,
            linewidths=0.9 * style.scale(),
            zorder=5,
        )


def _grid(axis: Axes, to_panel: Array, rms: float) -> None:
    """The basis of the transformed coordinates: its axes, and dotted lines parallel to them."""
    end = LINES * GRID * rms
    levels = np.arange(-LINES, LINES + 1) * GRID * rms
    along, across = np.broadcast_arrays(levels[:, None], np.array([-end, end]))
    lines = np.concatenate([np.stack([along, across], -1), np.stack([across, along], -1)]) @ to_panel.T
    main = [LINES, 3 * LINES + 1]
    for chosen, style_, width in ((np.delete(lines, main, 0), (0, (1, 2.5)), 0.45), (lines[main], "-", 0.7)):
        axis.add_collection(
            LineCollection(list(chosen), colors="0.3", linestyles=[style_], linewidths=width * style.scale(), zorder=2),
            autolim=False,
        )


def _ellipse(covariance: Array) -> Array:
    """The 1-sigma contour `(2, 200)` of a Gaussian."""
    angles = np.linspace(0, 2 * np.pi, 200)
    return np.linalg.cholesky(covariance) @ np.stack([np.cos(angles), np.sin(angles)])


def _mark(axis: Axes, relative: float, bold: bool) -> None:
    axis.text(
        0.04, 0.95, f"{relative:.3f}", transform=axis.transAxes, va="top", zorder=10,
        weight="bold" if bold else "normal",
        bbox={"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
    )  # fmt: skip


def _pale_colours() -> ListedColormap:
    colours = mpl.colormaps["RdBu_r"](np.linspace(0, 1, 256))
    return ListedColormap((1 - PALENESS) * colours + PALENESS)


def _legend(figure: Figure) -> None:
    unit = style.scale()
    handles = [
        Line2D([], [], color="black", linewidth=1.3 * unit, label="data, 1σ"),
        Line2D([], [], color="0.3", linewidth=0.8 * unit, linestyle=":", label="basis of the transform"),
        Line2D([], [], color="black", linewidth=0.9 * unit, linestyle=(0, (4, 2.5)), label="no change of error"),
        *(
            Patch(facecolor=to_rgba(colour, 0.55), edgecolor=colour, label=f"noise of point {number}")
            for number, colour in enumerate(COLOURS, 1)
        ),
        Line2D(
            [],
            [],
            color="black",
            marker="o",
            markerfacecolor="none",
            markersize=6 * unit,
            linestyle="",
            label="its expected error (radius)",
        ),
    ]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.09, 0.018), ncols=2, fontsize="medium")
    bar = figure.add_axes((0.62, 0.048, 0.35, 0.010))
    colours = ScalarMappable(Normalize(-LOG_LIMIT, LOG_LIMIT), cmap=_pale_colours())
    figure.colorbar(colours, cax=bar, orientation="horizontal", extend="both")
    bar.set_xticks([-1, -0.5, 0, 0.5, 1], ["1/2", "0.71", "1", "1.41", "2"])
    bar.set_xlabel("a point's expected error, relative to I", labelpad=1 * unit)
    note = "numbers: the expected error over the data, relative to I; noise models of equations 18 and 23"
    figure.text(0.5, 0.004, note, ha="center", va="bottom", fontsize="small", color=style.GREY)
