"""The ablation of WUSH's power: the loss with `T_p = Hd S^(p-1) U^T L^T` against p, over the loss with p = 1/2.

p moves noise between the sides: 1/2 balances them and is WUSH, 1 is HU, 0 is HU with weights and activations exchanged.
Theory, in which even noise and the paper's FP agree on all powers, predicts `sum_b tr S^2p tr S^(2-2p)`: symmetric
about 1/2 and least there, but for damping. Measured by rounding to the formats, on the linears of one decoder block,
as figure 5, and held-out tokens. Shape legend: `L` linears, `P` powers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from plots import style
from plots.figure5 import Layer, load, named, observe_block
from wush.evaluation import layer_loss
from wush.formats import INT4, MXFP4, NVFP4, Format
from wush.intervals import Interval, of_runs
from wush.losses import theory
from wush.moments import SecondMoment
from wush.transforms import Wush, transform_weight

if TYPE_CHECKING:
    from wush.models import LoadedModel

Array = NDArray[np.float64]

POWERS = tuple(index / 8 for index in range(9))
FORMATS: tuple[Format, ...] = (MXFP4, NVFP4, INT4)


@dataclass(frozen=True)
class Curves:
    """Of one format: measured losses and predictions `(L, P)`, each linear's over its own at p = 1/2."""

    measured: Array
    predicted: Array

    @property
    def mean(self) -> Array:
        """The geometric mean over linears of what was measured, `(P,)`."""
        return np.asarray(np.exp(np.log(self.measured).mean(0)))

    @property
    def intervals(self) -> Array:
        """95% intervals of that mean, `(2, P)`, low and high; of one linear the mean itself, twice."""
        logs = np.log(self.measured)
        found = [of_runs(column.tolist()) or Interval(column[0], column[0]) for column in logs.T]
        return np.asarray(np.exp([(one.low, one.high) for one in found]).T)


def draw(model: "LoadedModel | str | None" = None, block: int | None = None) -> Figure:
    """A panel a format. `model`, `block` and errors as of `figure5.draw`; all the linears of the block."""
    with load(model) as loaded:
        fitted_to = observe_block(loaded, block)
        held_out = observe_block(loaded, block, part="evaluation")
    figure = style.figure(columns=2, height=2.75)
    axes = figure.subplots(1, len(FORMATS), sharey=True)
    for axis, fmt in zip(axes, FORMATS, strict=True):
        _panel(axis, curves(fitted_to, held_out, fmt))
        axis.set_title(fmt.name.upper())
    axes[0].set_ylabel("loss over WUSH's")
    axes[0].legend(loc="upper center")
    where = next(iter(fitted_to.values())).name.partition(",")[0]
    style.caption(
        figure,
        "$T_p = H S^{p-1} U^\\top L^\\top$: p = 1/2 is WUSH, 1 is HU; in numbers: the mean at 0, 1/4, 1/2, 3/4, 1\n"
        f"measured here: {named(model)}, the {len(fitted_to)} linears of {where}; "
        "round to nearest, held-out tokens; 95% over linears",
    )
    return figure


def curves(fitted_to: Mapping[str, Layer], held_out: Mapping[str, Layer], fmt: Format) -> Curves:
    """Of linears by name: transforms are fitted to the tokens of one mapping, losses are of those of the other."""
    measured, predicted = [], []
    for name, layer in fitted_to.items():
        moment = SecondMoment(layer.inputs_mi.shape[1], name=layer.name, block_size=fmt.group_size)
        moment.add(layer.inputs_mi)
        inputs = moment.inputs(fmt.group_size)
        transforms = [Wush(power=power).fit(layer.weight_oi, inputs, layer.name) for power in POWERS]
        measured.append([loss(held_out[name], one, fmt) for one in transforms])
        predicted.append([theory(layer.weight_oi, one, inputs.moments_ngg)[0].item() for one in transforms])
    return Curves(*(_over_wush(np.array(values)) for values in (measured, predicted)))


def loss(layer: Layer, transform: Tensor, fmt: Format) -> float:
    """The relative loss of a layer on its own tokens, rounded to nearest on both sides."""
    weight = fmt.round_trip(transform_weight(layer.weight_oi, transform, layer.name))
    return layer_loss(layer.inputs_mi, layer.weight_oi, weight, transform, fmt)


def _over_wush(values: Array) -> Array:
    return values / values[:, [POWERS.index(0.5)]]


def _panel(axis: Axes, found: Curves) -> None:
    for number, one in enumerate(found.measured):
        axis.plot(POWERS, one, color=style.GREY, linewidth=0.5 * style.scale(), label="linears" if not number else None)
    axis.fill_between(POWERS, *found.intervals, color=style.VERMILLION, alpha=0.25, linewidth=0)
    axis.plot(POWERS, found.mean, color=style.VERMILLION, marker="o", label="their mean")
    predicted = np.exp(np.log(found.predicted).mean(0))
    axis.plot(POWERS, predicted, color=style.BLACK, linestyle="--", label="theory, mean")
    quarters = [found.mean[POWERS.index(power)] for power in (0, 0.25, 0.5, 0.75, 1)]
    axis.set(yscale="log", xticks=(0, 0.25, 0.5, 0.75, 1), xlabel=f"p\n{' / '.join(f'{one:.2f}' for one in quarters)}")
    axis.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
    axis.minorticks_off()
    axis.grid(visible=True)
