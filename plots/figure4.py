"""Figure 4: a rotation equalizes the marginals of a Gaussian; its eigenvalues, and so its outliers, stay.

The paper's example, as it is, after the Hadamard rotation, by 45 degrees, and after WUSH (`wush.transforms`), fitted
with weights of second moment I. Densities are exact. Rotated, the marginals and their mean look like one Gaussian,
while the joint distribution reaches as far along its main axis as before; WUSH takes the root of the eigenvalues.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from plots import style
from wush.moments import Inputs
from wush.transforms import Hadamard, Identity, Transform, Wush

Array = NDArray[np.float64]

COVARIANCE = ((0.1, 0.02), (0.02, 0.5))
COLUMNS: tuple[tuple[str, Transform], ...] = (
    ("original", Identity()),
    ("rotated: H", Hadamard()),
    ("WUSH", Wush()),
)
LIMIT = 4.0  # in standard deviations over both coordinates
PIXELS = 201


@dataclass(frozen=True)
class Gaussian:
    """Two-dimensional, of mean 0."""

    covariance: Array

    @property
    def eigenvalues(self) -> Array:
        """Rising, `(2,)`."""
        return np.asarray(np.linalg.eigvalsh(self.covariance))

    @property
    def rms(self) -> float:
        """Over both coordinates."""
        return math.sqrt(np.trace(self.covariance) / 2)

    @property
    def kurtosis(self) -> float:
        """Of all values, that is of the mean of both marginals; 3 where they are equal."""
        variances = np.diag(self.covariance)
        return float(3 * (variances**2).mean() / variances.mean() ** 2)

    def joint(self, points: Array) -> Array:
        """The density of points `(..., 2)`."""
        power = (points @ np.linalg.inv(self.covariance) * points).sum(-1)
        return np.asarray(np.exp(-power / 2) / (2 * math.pi * math.sqrt(np.linalg.det(self.covariance))))

    def marginal(self, coordinate: int, values: Array) -> Array:
        """The density of one coordinate."""
        variance = self.covariance[coordinate, coordinate]
        return np.asarray(np.exp(-(values**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance))


def transformed(transform: Transform) -> Gaussian:
    """The example in the coordinates of a transform fitted to it."""
    covariance = torch.tensor(COVARIANCE, dtype=torch.float64)
    white = math.sqrt(2) * torch.eye(2, dtype=torch.float64)  # M_W is W^T W / 2
    matrix = transform.fit(white, Inputs(covariance.unsqueeze(0))).reshape(2, 2)
    return Gaussian((matrix @ covariance @ matrix.mT).numpy())


def draw() -> Figure:
    """Columns: original, rotated, WUSH. Rows: the joint density, the marginal ones and their mean."""
    figure = style.figure(columns=2, height=4.4)
    axes = figure.subplots(2, len(COLUMNS), height_ratios=(2.2, 1))
    for column, (title, transform) in enumerate(COLUMNS):
        found = transformed(transform)
        _joint(axes[0, column], found)
        axes[0, column].set_title(title, fontsize="large")
        _marginals(axes[1, column], found, named=column == 0)
    axes[1, 0].set_ylabel("marginal density")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="medium")
    return figure


def _joint(axis: Axes, found: Gaussian) -> None:
    limit = LIMIT * found.rms
    ticks = np.linspace(-limit, limit, PIXELS)
    density = found.joint(np.stack(np.meshgrid(ticks, ticks), axis=-1))
    axis.imshow(density, extent=(-limit, limit, -limit, limit), origin="lower", cmap="Blues", interpolation="bilinear")
    axis.contour(ticks, ticks, density, levels=density.max() * np.exp(-np.array([4.5, 2.0, 0.5])), colors=style.BLUE,
                 linewidths=0.6 * style.scale())  # fmt: skip
    for value, axis_ in zip(*np.linalg.eigh(found.covariance), strict=True):
        ends = 2 * math.sqrt(value) * np.outer([-1, 1], axis_)
        axis.plot(*ends.T, color=style.VERMILLION, linewidth=1.3 * style.scale())
    axis.spines[:].set_visible(True)
    axis.set(xticks=[], yticks=[], aspect="equal")
    low, high = found.eigenvalues
    axis.set_xlabel(f"eigenvalues {high:.3f} and {low:.3f}, ratio {high / low:.2f}")


def _marginals(axis: Axes, found: Gaussian, named: bool) -> None:
    values = np.linspace(-LIMIT, LIMIT, PIXELS) * found.rms
    both = [found.marginal(coordinate, values) for coordinate in (0, 1)]
    for density, colour, name in zip(both, (style.SKY, style.GREEN), ("x", "y"), strict=True):
        axis.plot(values, density, color=colour, label=f"$p({name})$")
    axis.plot(values, (both[0] + both[1]) / 2, color=style.BLACK, linestyle="--", label="their mean")
    if named:
        axis.plot([], [], color=style.VERMILLION, label="main axes, 2σ")
    axis.set(xlim=(values[0], values[-1]), ylim=(0, None), yticks=[])
    first, second = np.diag(found.covariance)
    axis.set_xlabel(f"variances {first:.2f} and {second:.2f}\nkurtosis of all values {found.kurtosis:.2f}")
