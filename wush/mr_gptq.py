"""MR-GPTQ (Egiazarian et al. 2025, arXiv 2509.23202): GPTQ as its authors tailor it to MXFP4 and NVFP4.

Scales are searched for on the transformed weight before any column is rounded, and stay; then columns are rounded by
falling second moment, whatever group they are of. Its rotations are transforms here (`transform=h` is the published
one). A column leaves its tile's order, so no tile is complete while others wait: transforms are fitted once, on the
original weights, and a transform's `refit` does not matter.
Shape legend: `O` output features, `I` input features, `N` groups, `G` group size, `P` transforms as in algorithms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from wush.algorithms import Algorithm, QuantizedWeight, fit_transforms, of_each, round_columns, stored
from wush.device import found
from wush.errors import NumericError
from wush.formats import Format, Mxfp4, Nvfp4, Quantized
from wush.moments import SecondMoment
from wush.transforms import Transform, transform_weight

# Fractions of a group's magnitude that are tried as what its scale covers, and the power of an error in their measure:
# as in the authors' release.
FACTORS = tuple(1 - 0.8 * i / 100 for i in range(100))
POWER = 2.4
# Columns whose errors reach all later ones in one product.
WIDTH = 256


@dataclass(frozen=True)
class MrGptq(Algorithm):
    """GPTQ in MXFP4 or NVFP4 with searched scales and static activation order.

    `scale_search`: choose each group's scale by its error, else by its magnitude. `activation_order`: round the
    columns of large second moments first, else in their own order. An NVFP4 weight's global scale is that of its
    magnitude, also under `scale_rule="fixed"`, which is then the activations' alone.
    """

    scale_search: bool = True
    activation_order: bool = True
    name: ClassVar[str] = "mr_gptq"
    needs_whole_moment: ClassVar[bool] = True

    def check(self, fmt: Format) -> None:
        if not isinstance(fmt, (Mxfp4, Nvfp4)):
            raise ValueError(f"mr_gptq is defined for mxfp4 and nvfp4, not for {fmt.name}; use algorithm=gptq")

    def quantize_group(
        self, weights: Sequence[Tensor], moment: SecondMoment, transform: Transform, fmt: Format, names: Sequence[str]
    ) -> list[QuantizedWeight]:
        self.check(fmt)
        fmt = replace(fmt, scale_rule="calibrated") if isinstance(fmt, Nvfp4) else fmt
        fitted = fit_transforms(weights, moment.inputs(fmt.group_size), transform, names)
        owners = names if len(fitted) == len(names) else [", ".join(names)]
        sweeps = [
            _Sweep.of(matrix, moment, self.activation_order, what) for matrix, what in zip(fitted, owners, strict=True)
        ]
        results = []
        for i, (weight, matrix) in enumerate(zip(weights, of_each(fitted, weights), strict=True)):
            transformed = transform_weight(weight, matrix, names[i])
            g = fmt.weight_global_scale(transformed.float())
            scales = self._scales(transformed, fmt, g, names[i])
            codes = sweeps[min(i, len(sweeps) - 1)].codes(transformed, scales, fmt, g)
            results.append(QuantizedWeight(Quantized(codes, scales, g), stored(matrix, transform)))
        return results

    def _scales(self, weight_oi: Tensor, fmt: Format, global_scale: float, what: str) -> Tensor:
        """Scales `(O, N)` of the transformed weight."""
        x_ng = fmt.groups(weight_oi, what)
        amax_n = x_ng.abs().amax(-1)
        if found(~amax_n.isfinite()):
            raise NumericError(f"{what}: NaN or infinity in the values to quantize to {fmt.name}")
        if self.scale_search:
            amax_n = amax_n * best_factors(x_ng, amax_n, fmt)
        return fmt.group_scales(x_ng, amax_n, global_scale)


def best_factors(x_ng: Tensor, amax_n: Tensor, fmt: Format) -> Tensor:
    """For each group `(..., N)` the factor of `FACTORS` with the least `sum |x - q(x)|^2.4`; the first of equals.

    Measured, as in the release, at scales that are real numbers: what is chosen is rounded to the scale's type later.
    """
    largest = fmt.element.from_codes(torch.arange(2**fmt.element.bits, dtype=torch.uint8)).max().item()
    full_n = (amax_n / largest).unsqueeze(-1)
    least_n = torch.full_like(amax_n, torch.inf)
    best_n = torch.ones_like(amax_n)
    for factor in FACTORS:
        scales = full_n * factor
        # A group of zeros has scale 0, whose quotient is NaN: no error is less than infinity, and its factor stays 1.
        errors_n = (fmt.element.snap(x_ng / scales) * scales).sub_(x_ng).abs_().pow_(POWER).sum(-1)
        better = errors_n < least_n
        least_n = torch.where(better, errors_n, least_n)
        best_n = torch.where(better, factor, best_n)
    return best_n


@dataclass(frozen=True)
class _Sweep:
    """In what order columns are rounded, and how an error moves: `order` `(I,)`, `lower_ii` with unit diagonal."""

    order: Tensor
    lower_ii: Tensor

    @classmethod
    def of(cls, transform: Tensor, moment: SecondMoment, by_activation: bool, what: str) -> "_Sweep":
        """For a transform `(N, G, G)` or `(G, G)`; errors name `what`.

        With `C C^T = damp(H)^-1` the inverse of the transformed Hessian is `M M^T`, `M = T^-T C`. The lower factor of
        it with rows in another order is the transposed R of a QR factorization of `M^T`: no second Cholesky that could
        fail, and no second damping.
        """
        right = transform_weight(moment.inverse_factor.mT, transform, what)
        order = torch.arange(right.shape[1], device=right.device)
        if by_activation:
            transform = transform.double()
            energies = (transform @ moment.diagonal_blocks(transform.shape[-1]) @ transform.mT).diagonal(
                dim1=-2, dim2=-1
            )
            order = energies.flatten().argsort(descending=True, stable=True)
        lower = torch.linalg.qr(right[:, order], mode="r").R.mT
        return cls(order, lower / lower.diagonal())

    def codes(self, weight_oi: Tensor, scales: Tensor, fmt: Format, global_scale: float) -> Tensor:
        """Codes `(O, I)` of a transformed weight, float64, at scales `(O, N)` that stay."""
        of_groups = scales.split(1, dim=1)
        own = [of_groups[column // fmt.group_size] for column in self.order.tolist()]
        x_io = weight_oi.mT[self.order]
        elements_io = torch.empty_like(x_io, dtype=torch.float32)
        for start in range(0, len(x_io), WIDTH):
            columns, after = slice(start, start + WIDTH), slice(start + WIDTH, None)
            entered = x_io[columns].clone()
            lower = self.lower_ii[columns, columns]
            elements_io[self.order[columns]] = round_columns(x_io[columns], lower, own[columns], fmt, global_scale)
            moved = torch.linalg.solve_triangular(lower, x_io[columns] - entered, upper=False, unitriangular=True)
            x_io[after].addmm_(self.lower_ii[after, columns], moved)
        return fmt.element.to_codes(elements_io.mT.contiguous())
