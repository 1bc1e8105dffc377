"""Axes of the sweep report's plots: from values to SVG units, and round ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_FROM_RATIO = 20.0  # largest over smallest value from which a dot plot's axis is logarithmic
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` onto SVG units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The position of a value, rounded to 0.1 units."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def labelled(self) -> list[Tick]:
        """The ticks, written alike: as powers of ten all or none, on a linear axis with the same decimals."""
        if self.log:
            write = number if all(_is_plain(value) for value in self.ticks) else _in_powers
            return [Tick(self.at(value), write(value)) for value in self.ticks]
        decimals = max(0, -math.floor(math.log10(self.ticks[1] - self.ticks[0]) + 1e-9))
        return [Tick(self.at(x), f"{x:.{decimals}f}" if abs(x) < 1e5 else number(x)) for x in self.ticks]


def metric_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """An axis that ends on round numbers, logarithmic when the values differ by more than `LOG_FROM_RATIO`."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low > LOG_FROM_RATIO:
        return log_scale(low, high, start, end)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _round_step((high - low) / 4)
    ticks = tuple(k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1))
    return Scale(ticks[0], ticks[-1], start, end, False, ticks)


def log_scale(low: float, high: float, start: float, end: float) -> Scale:
    """A log axis from one of 1, 2, 5 times a power of ten to another; its ticks are powers of ten if three fit."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    rounds = [float(f"{mantissa}e{exponent}") for exponent in range(first, last + 1) for mantissa in (1, 2, 5)]
    bottom = max(i for i, value in enumerate(rounds) if value <= low)
    top = min(i for i, value in enumerate(rounds) if value >= high and i > bottom)
    inside = rounds[bottom : top + 1]
    powers = [value for value in inside if value in rounds[::3]]
    ticks = powers[:: math.ceil(len(powers) / 8)] if len(powers) >= 3 else inside
    return Scale(inside[0], inside[-1], start, end, True, tuple(ticks))


def index_scale(low: int, high: int, start: float, end: float) -> Scale:
    """An axis of whole numbers that ends with the data."""
    step = max(1, round(_round_step((high - low) / 8))) if high > low else 1
    ticks = tuple(float(k) for k in range(math.ceil(low / step) * step, high + 1, step))
    if high == low:
        return Scale(low - 1, high + 1, start, end, False, (low - 1, low, high + 1))
    return Scale(low, high, start, end, False, ticks)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `rough`."""
    exponent = math.floor(math.log10(rough))
    steps = (float(f"{mantissa}e{exponent}") for mantissa in (1, 2, 5, 10))
    return next((step for step in steps if step >= rough), float(f"1e{exponent + 1}"))


def number(value: float) -> str:
    """Three significant digits: `0.012`, `25`, `1.2×10⁻⁵`."""
    return f"{float(f'{value:.3g}'):.10g}" if _is_plain(value) else _in_powers(value)


def _is_plain(value: float) -> bool:
    return value == 0 or 1e-3 <= abs(value) < 1e5


def _in_powers(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    factor = f"{float(mantissa):g}"
    return power if factor == "1" else f"{factor}×{power}"
