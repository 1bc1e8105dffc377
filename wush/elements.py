"""Element types: how one number becomes a code of a few bits. Scales are not known here.

An element snaps real numbers to its grid, and maps grid values to codes and back.
`snap` works on float32; NaN stays NaN, and a code of it means nothing: its group's scale says NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Element:
    """A grid of numbers with a code for each.

    `snap`: float32 -> nearest grid value, float32; it may overwrite its argument. `to_codes`: grid values -> uint8
    below `2**bits`. `from_codes`: uint8 -> grid values, float32.
    """

    name: str
    bits: int
    snap: Callable[[Tensor], Tensor] = field(repr=False)
    to_codes: Callable[[Tensor], Tensor] = field(repr=False)
    from_codes: Callable[[Tensor], Tensor] = field(repr=False)


def _snap_e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign; ties to the even code; past 6 saturates.

    Adding and subtracting 1.5 * 2^(e + 22) rounds to a multiple of 2^(e - 1), the spacing of the grid in the
    binade 2^e (with e >= 0, since the spacing below 1 stays 0.5).
    """
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    exponent_bits = (x.view(torch.int32) & 0x7F800000).clamp_(min=127 << 23)
    magic = exponent_bits.add_((22 << 23) + 0x00400000).view(torch.float32)
    return (x + magic).sub_(magic).copysign_(x)


def _e2m1_codes(values: Tensor) -> Tensor:
    magnitude = values.abs()
    code = torch.where(magnitude < 2, magnitude * 2, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return code.to(torch.uint8) | torch.signbit(values).to(torch.uint8) << 3


def _e2m1_values(codes: Tensor) -> Tensor:
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat([grid, -grid])[codes.int()]


def _snap_e4m3(x: Tensor) -> Tensor:
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


E2M1 = Element("e2m1", 4, _snap_e2m1, _e2m1_codes, _e2m1_values)

E4M3 = Element(
    "e4m3",
    8,
    _snap_e4m3,
    lambda values: values.to(torch.float8_e4m3fn).view(torch.uint8),
    lambda codes: codes.view(torch.float8_e4m3fn).float(),
)

# The paper's integers, midrise (equation 60): cells [k, k + 1) with their midpoints k + 1/2, k = -8..7.
INT4_MIDPOINT = Element(
    "int4_midpoint",
    4,
    lambda x: x.floor_().clamp_(-8, 7).add_(0.5),
    lambda values: (values + 7.5).to(torch.uint8),
    lambda codes: codes.float() - 7.5,
)

# Plain symmetric integers k = -7..7.
INT4_SYMMETRIC = Element(
    "int4_symmetric",
    4,
    lambda x: x.round_().clamp_(-7, 7),
    lambda values: (values + 8).to(torch.uint8),
    lambda codes: codes.float() - 8,
)
