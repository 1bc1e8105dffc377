"""Figure 6: `1 + x` against `2^x` on [0, 1], the line that a linear mantissa follows and the exponential it stands for.

A floating-point value `2^e (1 + x)` has the code `e + x`, which is its logarithm but for this gap.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from plots import style

LARGEST_AT = -math.log2(math.log(2))  # where 2^x has slope 1
LARGEST_GAP = 1 + LARGEST_AT - 2**LARGEST_AT


def draw() -> Figure:
    """Both curves with the largest gap marked, and the gap itself below."""
    figure = style.figure(columns=1, height=3.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    x = np.linspace(0, 1, 257)
    above.fill_between(x, 2**x, 1 + x, color=style.PALE, linewidth=0)
    above.plot(x, 1 + x, color=style.BLUE, label="$1 + x$: linear mantissa")
    above.plot(x, 2**x, color=style.VERMILLION, linestyle="--", label="$2^x$: logarithmic codes")
    above.plot([LARGEST_AT] * 2, [2**LARGEST_AT, 1 + LARGEST_AT], color=style.BLACK, marker="_")
    above.annotate(
        f"largest gap\n{LARGEST_GAP:.4f} at $x$ = {LARGEST_AT:.4f}",
        xy=(LARGEST_AT, 1.45),
        xytext=(0.56, 1.17),
        arrowprops={"arrowstyle": "-", "color": style.GREY, "linewidth": 0.6 * style.scale()},
    )
    above.set_ylabel("value in units of $2^e$")
    above.legend(loc="upper left")
    below.plot(x, 1 + x - 2**x, color=style.BLACK)
    below.plot(LARGEST_AT, LARGEST_GAP, "o", color=style.BLACK)
    below.set(xlabel="$x$", ylabel="$1 + x - 2^x$", xlim=(0, 1), ylim=(0, 0.1))
    for axes in (above, below):
        axes.grid(visible=True)
    return figure
