"""Algorithms that turn a weight into codes, given its transform and format (method: algorithms).

Shape legend: `O` output features, `I` input features, `N` blocks, `G` block size.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from wush.formats import Format, Quantized
from wush.moments import SecondMoment
from wush.transforms import Identity, Transform, transform_weight


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight `(O, I)` and the transform, `(N, G, G)` or `(G, G)`, of its inputs; None is identity."""

    quantized: Quantized
    transform: Tensor | None


class Algorithm(Protocol):
    """Quantizes a weight `(O, I)` whose inputs have the second moment `moment`; errors name `what`."""

    name: ClassVar[str]

    def quantize_weight(
        self, weight_oi: Tensor, moment: SecondMoment, transform: Transform, fmt: Format, what: str = "layer"
    ) -> QuantizedWeight:
        """The transform is rounded to the weight's dtype, and its inverse taken of the rounded one."""


@dataclass(frozen=True)
class Rtn:
    """Round to nearest: `W_b T_b^-1`, all blocks at once."""

    name: ClassVar[str] = "rtn"

    def quantize_weight(
        self, weight_oi: Tensor, moment: SecondMoment, transform: Transform, fmt: Format, what: str = "layer"
    ) -> QuantizedWeight:
        matrix = transform.fit(weight_oi, moment.diagonal_blocks(fmt.group_size), what).to(weight_oi.dtype)
        transformed = _transformed(weight_oi, matrix, transform)
        quantized = fmt.quantize(transformed, what, fmt.weight_global_scale(transformed))
        return QuantizedWeight(quantized, _stored(matrix, transform))


@dataclass(frozen=True)
class Gptq:
    """GPTQ with block transforms: each column's error is moved onto the columns not yet quantized."""

    name: ClassVar[str] = "gptq"

    def quantize_weight(
        self, weight_oi: Tensor, moment: SecondMoment, transform: Transform, fmt: Format, what: str = "layer"
    ) -> QuantizedWeight:
        size = fmt.group_size
        moments_ngg = moment.diagonal_blocks(size)
        factor = moment.inverse_factor
        fitted = transform.fit(weight_oi, moments_ngg, what).to(weight_oi.dtype)
        per_block = fitted.expand_as(moments_ngg).clone()
        global_scale = fmt.weight_global_scale(_transformed(weight_oi, fitted, transform))
        working = weight_oi.double().clone()
        codes, scales = [], []
        for n in range(moments_ngg.shape[0]):
            columns, rest = slice(n * size, (n + 1) * size), slice((n + 1) * size, None)
            block = working[:, columns]
            if transform.refit and n:
                per_block[n] = transform.fit(block, moments_ngg[n : n + 1], f"{what} block {n}")[0]
            block_factor, matrix = factor[columns, columns], per_block[n].double()
            quantized, values = _sweep_columns(block, block_factor, matrix, fmt, global_scale, what)
            codes.append(quantized.codes)
            scales.append(quantized.scales)
            error = values @ matrix - block
            gain = torch.linalg.solve_triangular(block_factor, factor[rest, columns], upper=False, left=False)
            working[:, rest] += error @ gain.mT
        quantized = Quantized(torch.cat(codes, 1), torch.cat(scales, 1), global_scale)
        return QuantizedWeight(quantized, _stored(per_block if transform.refit else fitted, transform))


def _sweep_columns(
    block_og: Tensor, factor_gg: Tensor, transform_gg: Tensor, fmt: Format, global_scale: float, what: str
) -> tuple[Quantized, Tensor]:
    """Quantize one block column by column in transformed coordinates; its codes, scales and values `(O, G)`.

    `factor_gg` is `C_bb`; the inverse of the block's transformed effective Hessian is `T^-T C C^T T^-1`.
    """
    inverse = torch.linalg.inv(transform_gg)
    root = inverse.mT @ factor_gg
    unit = torch.linalg.cholesky(root @ root.mT)
    unit = unit / unit.diagonal()
    x_og = block_og @ inverse
    scales = fmt.find_scales(x_og, what, global_scale)
    elements = torch.empty_like(x_og, dtype=torch.float32)
    for c in range(x_og.shape[1]):
        column = x_og[:, c : c + 1].float()
        elements[:, c : c + 1] = fmt.snap(column.unsqueeze(1), scales, global_scale).squeeze(1)
        value = fmt.expand(elements[:, None, c : c + 1], scales, global_scale).squeeze(1).double()
        x_og[:, c:] += (value - x_og[:, c : c + 1]) * unit[c:, c]
    return Quantized(fmt.element.to_codes(elements), scales, global_scale), x_og


def _transformed(weight_oi: Tensor, matrix: Tensor, transform: Transform) -> Tensor:
    return weight_oi if isinstance(transform, Identity) else transform_weight(weight_oi, matrix).float()


def _stored(matrix: Tensor, transform: Transform) -> Tensor | None:
    return None if isinstance(transform, Identity) else matrix
