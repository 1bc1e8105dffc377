"""Algorithms that turn weights into codes, given their transform and format (method: algorithms).

Linears that are fed by one tensor are quantized together: what depends on their inputs alone is worked out once.
Shape legend: `O` output features, `R` rows of all linears of a group, `I` input features, `N` blocks, `G` block size,
`P` transforms for each block: one for each linear, or one if it is shared.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wush.device import found, has_kernels
from wush.errors import NumericError
from wush.formats import Format, Quantized
from wush.moments import Inputs, SecondMoment, diagonal_blocks
from wush.transforms import Identity, Transform, inverse, transform_weight

# Blocks whose errors reach the columns after all of them in one product.
SPAN = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight `(O, I)` and the transform, `(N, G, G)` or `(G, G)`, of its inputs; None is identity.

    `input_scale`: the global scale of its inputs where it is calibrated; None is the format's own.
    """

    quantized: Quantized
    transform: Tensor | None
    input_scale: float | None = None


class Algorithm(ABC):
    """Quantizes weights; to add one, name it and write `quantize_group`.

    `needs_whole_moment`: whether it reads more of the moment than its diagonal blocks.
    """

    name: ClassVar[str]
    needs_whole_moment: ClassVar[bool]

    def check(self, fmt: Format) -> None:  # noqa: B027 - most are defined for every format
        """Raise `ValueError` for a format that the algorithm is not defined for."""

    @abstractmethod
    def quantize_group(
        self, weights: Sequence[Tensor], moment: SecondMoment, transform: Transform, fmt: Format, names: Sequence[str]
    ) -> list[QuantizedWeight]:
        """Quantize weights `(O, I)`, each with its own O, whose inputs have one second moment; errors use `names`.

        The transform is rounded to the weights' dtype, and its inverse taken of the rounded one.
        """

    def quantize_weight(
        self, weight_oi: Tensor, moment: SecondMoment, transform: Transform, fmt: Format, what: str = "layer"
    ) -> QuantizedWeight:
        """`quantize_group` of one weight."""
        return self.quantize_group([weight_oi], moment, transform, fmt, [what])[0]


@dataclass(frozen=True)
class Rtn(Algorithm):
    """Round to nearest: `W_b T_b^-1`, all blocks at once."""

    name: ClassVar[str] = "rtn"
    needs_whole_moment: ClassVar[bool] = False

    def quantize_group(
        self, weights: Sequence[Tensor], moment: SecondMoment, transform: Transform, fmt: Format, names: Sequence[str]
    ) -> list[QuantizedWeight]:
        fitted = fit_transforms(weights, moment.inputs(fmt.group_size), transform, names)
        results = []
        for weight, matrix, what in zip(weights, of_each(fitted, weights), names, strict=True):
            transformed = _transformed(weight, matrix, transform, what)
            g = fmt.weight_global_scale(transformed)
            quantized = fmt.quantize(transformed, what, g, checked=not weight.is_cuda)
            _refuse_nan(quantized.scales, fmt, what)
            results.append(QuantizedWeight(quantized, stored(matrix, transform)))
        return results


@dataclass(frozen=True)
class Gptq(Algorithm):
    """GPTQ with block transforms: each column's error is moved onto the columns not yet quantized."""

    name: ClassVar[str] = "gptq"
    needs_whole_moment: ClassVar[bool] = True

    def quantize_group(
        self, weights: Sequence[Tensor], moment: SecondMoment, transform: Transform, fmt: Format, names: Sequence[str]
    ) -> list[QuantizedWeight]:
        inputs = moment.inputs(fmt.group_size)
        fitted = fit_transforms(weights, inputs, transform, names)
        transformed = (_transformed(*own, transform) for own in zip(weights, of_each(fitted, weights), strict=True))
        rows = _Rows(weights, [fmt.weight_global_scale(weight) for weight in transformed], fmt, names)
        _sweep_blocks(rows, moment.inverse_factor, inputs, fitted, transform)
        return [
            QuantizedWeight(rows.quantized(i), stored(matrix, transform))
            for i, matrix in enumerate(of_each(fitted, weights))
        ]


class _Rows:
    """The rows of a group's linears on their way through GPTQ.

    `working` `(R, I)` float64: the weights as updated so far, in the original coordinates; `codes` `(R, I)`; `scales`
    `(R, N)`. `of[i]` are the rows of linear i.
    """

    def __init__(
        self, weights: Sequence[Tensor], global_scales: Sequence[float], fmt: Format, names: Sequence[str]
    ) -> None:
        self.format, self.names, self.global_scales = fmt, names, global_scales
        self.working = torch.cat([weight.double() for weight in weights])
        self.codes = torch.empty(self.working.shape, dtype=torch.uint8, device=self.working.device)
        groups = self.working.shape[1] // fmt.group_size
        self.scales = self.codes.new_empty(len(self.codes), groups, dtype=fmt.scale_dtype)
        ends = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
        self.of = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def quantized(self, linear: int) -> Quantized:
        """Codes and scales of one linear."""
        rows = self.of[linear]
        _refuse_nan(self.scales[rows], self.format, self.names[linear])
        return Quantized(self.codes[rows].clone(), self.scales[rows].clone(), self.global_scales[linear])


def _sweep_blocks(rows: _Rows, factor_ii: Tensor, inputs: Inputs, fitted: Tensor, transform: Transform) -> None:
    """Quantize block by block; those of `fitted` become the transforms of the updated blocks if they are refitted.

    A block's error reaches the rest of its span at once, and the columns after the span with the span's other errors:
    large products instead of one pass over the weight for each block.
    """
    working, size, blocks = rows.working, rows.format.group_size, len(inputs.moments_ngg)
    own_ngg = diagonal_blocks(factor_ii, size)
    known = fitted.unsqueeze(1) if fitted.ndim == 3 else fitted[:, :1] if transform.refit else fitted
    coordinates = _Coordinates.of(known, own_ngg[:1] if transform.refit else own_ngg, rows.names)
    for first in range(0, blocks, SPAN):
        last = min(first + SPAN, blocks)
        span, after = slice(first * size, last * size), slice(last * size, None)
        errors = torch.empty_like(working[:, span])
        for n in range(first, last):
            if transform.refit and n:
                fitted[:, n] = _refit(rows, n, inputs.block(n), transform)
                own = _Coordinates.of(fitted[:, n : n + 1], own_ngg[n : n + 1], rows.names).block(0)
            else:
                own = coordinates.block(n)
            columns, rest = slice(n * size, (n + 1) * size), slice((n + 1) * size, last * size)
            own_errors = errors[:, columns.start - span.start : columns.stop - span.start]
            _quantize_block(rows, n, own, own_errors)
            working[:, rest].addmm_(own_errors, factor_ii[rest, columns].mT)
        working[:, after].addmm_(errors, factor_ii[after, span].mT)


def _refit(rows: _Rows, n: int, inputs: Inputs, transform: Transform) -> Tensor:
    """Transforms `(P, G, G)` of block n, with such inputs, on the weights as updated so far."""
    size = rows.format.group_size
    block_rg = rows.working[:, n * size : (n + 1) * size]
    if transform.share:
        return transform.fit(block_rg, inputs, ", ".join(rows.names))
    return transform.fit_each([block_rg[own] for own in rows.of], inputs, rows.names).squeeze(1)


@dataclass(frozen=True)
class _Coordinates:
    """What a block's sweep needs of its transform and of `C_bb`, each `(P, N, G, G)` float64.

    `inverse`: `T^-1`. `lower`: the lower factor `l` of `T^-T C_bb C_bb^T T^-1`, the inverse of the transformed
    effective Hessian, columns divided by their diagonal. `spread`: `T C_bb^-T`, with which the block's error in
    transformed coordinates becomes what the rows of `C` spread over later columns.
    """

    inverse: Tensor
    lower: Tensor
    spread: Tensor

    @classmethod
    def of(cls, transform: Tensor, factor_ngg: Tensor, names: Sequence[str]) -> "_Coordinates":
        """For transforms `(P, N or 1, G, G)` and `C_bb`."""
        transform = transform.expand(len(transform), *factor_ngg.shape)
        if has_kernels(transform.device) and transform.shape[-1] in (16, 32):
            from wush_kernels.coordinates import coordinates

            own = cls(*coordinates(transform, factor_ngg))
            if not found(~own.inverse.isfinite()):
                return own
        inverted = inverse(transform, names if len(transform) == len(names) else ", ".join(names))
        # The transposed R of a QR factorization; its signs go with the division by the diagonal.
        lower = torch.linalg.qr(factor_ngg.mT @ inverted, mode="r").R.mT
        lower = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        right = transform.double().mT
        return cls(inverted, lower, torch.linalg.solve_triangular(factor_ngg, right, upper=False).mT)

    def block(self, n: int) -> "_Coordinates":
        """Those of one block, `(P, G, G)`."""
        return _Coordinates(self.inverse[:, n], self.lower[:, n], self.spread[:, n])


def _quantize_block(rows: _Rows, n: int, own: _Coordinates, errors_rg: Tensor) -> None:
    """Quantize block n of every linear, and write its errors times `spread`."""
    fmt, size = rows.format, rows.format.group_size
    sweep = _sweep_by_kernel if _kernel_sweeps(rows.working.device, fmt) else _sweep_columns
    for i, part in enumerate(rows.of):
        p = min(i, len(own.inverse) - 1)
        block_og = rows.working[part, n * size : (n + 1) * size]
        matrices = own.inverse[p], own.lower[p], own.spread[p]
        codes, scales = rows.codes[part, n * size : (n + 1) * size], rows.scales[part, n : n + 1]
        sweep(block_og, *matrices, fmt, rows.global_scales[i], rows.names[i], codes, scales, errors_rg[part])


def _kernel_sweeps(device: torch.device, fmt: Format) -> bool:
    if not has_kernels(device):
        return False
    from wush_kernels.gptq_sweep import supports

    return supports(fmt)


def _sweep_by_kernel(
    block_og: Tensor, inverse_gg: Tensor, lower_gg: Tensor, spread_gg: Tensor, fmt: Format, global_scale: float,
    what: str, codes_og: Tensor, scales_o1: Tensor, errors_og: Tensor,
) -> None:  # fmt: skip
    """`_sweep_columns` in one launch; non-finite values are found in the scales afterwards."""
    from wush_kernels.gptq_sweep import gptq_sweep

    gptq_sweep(block_og, inverse_gg, lower_gg, spread_gg, fmt, codes_og, scales_o1, errors_og, global_scale)


def _sweep_columns(
    block_og: Tensor, inverse_gg: Tensor, lower_gg: Tensor, spread_gg: Tensor, fmt: Format, global_scale: float,
    what: str, codes_og: Tensor, scales_o1: Tensor, errors_og: Tensor,
) -> None:  # fmt: skip
    """Quantize one block column by column in transformed coordinates: its codes, scales and spread errors."""
    entered_go = (block_og @ inverse_gg).mT.contiguous()
    scales = fmt.find_scales(entered_go.mT, what, global_scale, checked=not block_og.is_cuda)
    x_go = entered_go.clone()
    elements_go = round_columns(x_go, lower_gg, [scales] * len(x_go), fmt, global_scale)
    codes_og.copy_(fmt.element.to_codes(elements_go.mT.contiguous()))
    scales_o1.copy_(scales)
    errors_og.copy_((x_go - entered_go).mT @ spread_gg)


def round_columns(x_go: Tensor, lower_gg: Tensor, scales: Sequence[Tensor], fmt: Format, global_scale: float) -> Tensor:
    """Elements `(G, O)` float32 of columns x rounded one after the other, at scales `(O, 1)` of each.

    `lower_gg`: unit lower triangular; column c of it is how the error of column c moves those after it. `x_go`
    becomes the columns' values.
    """
    elements_go = torch.empty_like(x_go, dtype=torch.float32)
    for c, column in enumerate(x_go):
        elements_go[c] = fmt.snap(column.float()[:, None, None], scales[c], global_scale)[:, 0, 0]
        value = fmt.expand(elements_go[c][:, None, None], scales[c], global_scale)[:, 0, 0]
        x_go[c:].addr_(lower_gg[c:, c], value.double() - column)
    return elements_go


def fit_transforms(weights: Sequence[Tensor], inputs: Inputs, transform: Transform, names: Sequence[str]) -> Tensor:
    """`T` in the weights' dtype, `(P, N, G, G)`, or `(P, G, G)` where all blocks have the same."""
    if transform.share:
        joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        fitted = transform.fit(joined, inputs, ", ".join(names)).unsqueeze(0)
    else:
        fitted = transform.fit_each(weights, inputs, names)
    return fitted.to(weights[0].dtype)


def of_each(fitted: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The transform of each linear: its own, or the one tensor that is shared."""
    own = [matrix.clone() for matrix in fitted]
    return own if len(own) == len(weights) else own * len(weights)


def _transformed(weight_oi: Tensor, matrix: Tensor, transform: Transform, what: str = "layer") -> Tensor:
    return weight_oi if isinstance(transform, Identity) else transform_weight(weight_oi, matrix, what).float()


def stored(matrix: Tensor, transform: Transform) -> Tensor | None:
    """The transform as a layer keeps it: None for the identity, which costs nothing."""
    return None if isinstance(transform, Identity) else matrix


def _refuse_nan(scales: Tensor, fmt: Format, what: str) -> None:
    """Raise for scales that mark non-finite values; on a CPU they were refused when the scales were found."""
    if scales.is_cuda and found(scales.float().isnan()):
        raise NumericError(f"{what}: NaN or infinity in the values to quantize to {fmt.name}")
