"""What a format's window loses of the inputs and weights of quantized layers: it is counted, and said.

A format whose groups have a scale of few bits and one global scale for all (NVFP4) holds magnitudes within a fixed
window: of a group above it the largest values are cut, a group below it becomes zero.
Shape legend: `O` output features, `M` tokens, `I` input features, `N` groups, `G` group size.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wush.calls import input_of
from wush.formats import Format
from wush.linear import QuantLinear
from wush.operands import transformed
from wush.transforms import inverse

log = logging.getLogger(__name__)

NAMED = 3  # layers that a warning names


@dataclass(frozen=True)
class Lost:
    """Groups of a layer's input or weight in its coordinates: all, those with values cut, those that became zero."""

    groups: int
    clipped: int
    flushed: int

    @property
    def share(self) -> float:
        """Of all groups, those that lost something."""
        return (self.clipped + self.flushed) / self.groups

    def __str__(self) -> str:
        return f"of {self.groups:,} groups {self.clipped:,} clipped, {self.flushed:,} flushed to zero"


class Count:
    """Counts of layers by name, on their device until they are asked for."""

    def __init__(self) -> None:
        self.format: Format | None = None  # of the layers counted
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def add(self, name: str, layer: QuantLinear, x: Tensor) -> None:
        """Count the groups of `T x` for an input x `(..., I)` of a layer; nothing for a format without a window."""
        window = layer.format.window(layer.input_scale)
        if window is None or not x.numel():
            return
        # Layers that are fed by one tensor, one after the other, have one count if they have one transform.
        same = layer.format, layer.input_scale, None if layer.transform is None else layer.transform.data_ptr()
        if self._last is None or self._last[0] is not x or self._last[1] != same:
            self._last = x, same, _counts(x, layer.transform, layer.format, window)
        own = self._last[2]
        self._sums[name] = self._sums[name] + own if name in self._sums else own
        self.format = layer.format

    def found(self) -> dict[str, Lost]:
        """Of the layers that lost something; waits for the device."""
        self._last = None
        counts = {name: Lost(*sums.tolist()) for name, sums in self._sums.items()}
        return {name: lost for name, lost in counts.items() if lost.clipped or lost.flushed}


@contextmanager
def counting(module: nn.Module) -> Iterator[Count]:
    """While open, what the `QuantLinear`s of a module lose of their inputs is counted, by their names within it."""
    count, layers = Count(), {n: m for n, m in module.named_modules() if isinstance(m, QuantLinear)}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: count.add(name, layer, input_of(args, kwargs)), with_kwargs=True
        )
        for name, layer in layers.items()
        if layer.format.window(layer.input_scale) is not None
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def lost_of_weight(weight_oi: Tensor, layer: QuantLinear) -> Lost | None:
    """What the window loses of the weight `(O, I)` that a layer was made of, if anything; waits for the device.

    It is the weight `W_b T_b^-1`, without what GPTQ moves onto it from other columns.
    """
    window = layer.format.window(layer.global_scale)
    fitted = layer.global_scale != layer.format.global_scale  # a weight's own `g` reaches its largest value
    if window is None or fitted:
        return None
    # A row of `W_b T_b^-1` is `T_b^-T` times that of `W_b`, as an input is `T_b` times its own.
    back = None if layer.transform is None else inverse(layer.transform, layer.name).mT.float()
    lost = Lost(*_counts(weight_oi.float(), back, layer.format, window).tolist())
    return lost if lost.clipped or lost.flushed else None


def warn(lost: Mapping[str, Lost], fmt: Format, text: str | None = "evaluated") -> None:
    """One warning for all layers that lost groups on a text, or of their weights; it names the worst and a remedy."""
    if not lost:
        return
    worst = sorted(lost, key=lambda name: lost[name].share, reverse=True)[:NAMED]
    told = "; ".join(f"{name}: {lost[name]}" for name in worst)
    side, where = ("weights", "") if text is None else ("inputs", f" on the {text} text")
    log.warning(
        "%s: %s of %d layers leave the format's window%s, %s; %s",
        *(fmt.name, side, len(lost), where, told, fmt.window_remedy),
    )


def _counts(x: Tensor, transform: Tensor | None, fmt: Format, window: tuple[float, float]) -> Tensor:
    """Groups, clipped and flushed, `(3,)` int64 on x's device; one window of tokens at a time, as memory allows."""
    low, high = window
    sums = torch.zeros(3, dtype=torch.int64, device=x.device)
    for x_mi in x.detach().reshape(-1, *x.shape[-2:]):
        amax_mn = fmt.groups(transformed(x_mi, transform)).abs().amax(-1)
        sums[0] += amax_mn.numel()
        sums[1] += (amax_mn > high).sum()
        sums[2] += ((amax_mn > 0) & (amax_mn <= low)).sum()
    return sums
