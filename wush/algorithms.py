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
    """Quantizes a weight `(O, I)` whose inputs have the second moment `moment`; errors name `what`.

    `needs_whole_moment`: whether it reads more of the moment than its diagonal blocks.
    """

    name: ClassVar[str]
    needs_whole_moment: ClassVar[bool]

    def quantize_weight(
        self, weight_oi: Tensor, moment: SecondMoment, transform: Transform, fmt: Format, what: str = "layer"
    ) -> QuantizedWeight:
        """The transform is rounded to the weight's dtype, and its inverse taken of the rounded one."""


@dataclass(frozen=True)
class Rtn:
    """Round to nearest: `W_b T_b^-1`, all blocks at once."""

    name: ClassVar[str] = "rtn"
    needs_whole_moment: ClassVar[bool] = False

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
    needs_whole_moment: ClassVar[bool] = True

    def quantize_weight(
        self, weight_oi: Tensor, moment: SecondMoment, transform: Transform, fmt: Format, what: str = "layer"
    ) -> QuantizedWeight:
        size = fmt.group_size
        moments_ngg, factor = moment.diagonal_blocks(size), moment.inverse_factor
        fitted = transform.fit(weight_oi, moments_ngg, what).to(weight_oi.dtype)
        per_block = fitted.expand_as(moments_ngg).clone()
        global_scale = fmt.weight_global_scale(_transformed(weight_oi, fitted, transform))
        working = weight_oi.double().clone()
        parts: list[Quantized] = []
        for n in range(len(moments_ngg)):
            columns, rest = slice(n * size, (n + 1) * size), slice((n + 1) * size, None)
            block_og, block_factor = working[:, columns], factor[columns, columns]
            if transform.refit and n:
                per_block[n] = transform.fit(block_og, moments_ngg[n : n + 1], f"{what} block {n}")[0]
            matrix = per_block[n].double()
            quantized, values_og = _sweep_columns(block_og, block_factor, matrix, fmt, global_scale, what)
            parts.append(quantized)
            gain = torch.linalg.solve_triangular(block_factor, factor[rest, columns], upper=False, left=False)
            working[:, rest] += (values_og @ matrix - block_og) @ gain.mT
        codes, scales = (torch.cat(own, 1) for own in zip(*((p.codes, p.scales) for p in parts), strict=True))
        stored = _stored(per_block if transform.refit else fitted, transform)
        return QuantizedWeight(Quantized(codes, scales, global_scale), stored)


def _sweep_columns(
    block_og: Tensor, factor_gg: Tensor, transform_gg: Tensor, fmt: Format, global_scale: float, what: str
) -> tuple[Quantized, Tensor]:
    """Quantize one block column by column in transformed coordinates; its codes, scales and values `(O, G)`.

    `factor_gg` is `C_bb`. The lower factor `l` of `T^-T C_bb C_bb^T T^-1`, the inverse of the transformed effective
    Hessian, is the transposed R of a QR factorization, whose signs go with the division by the diagonal.
    """
    inverse = torch.linalg.inv(transform_gg)
    lower = torch.linalg.qr(factor_gg.mT @ inverse).R.mT
    lower = lower / lower.diagonal()
    x_go = (block_og @ inverse).mT.contiguous()
    scales = fmt.find_scales(x_go.mT, what, global_scale)
    elements_go = torch.empty_like(x_go, dtype=torch.float32)
    for c, column in enumerate(x_go):
        elements_go[c] = fmt.snap(column.float()[:, None, None], scales, global_scale)[:, 0, 0]
        value = fmt.expand(elements_go[c][:, None, None], scales, global_scale)[:, 0, 0]
        x_go[c:].addr_(lower[c:, c], value.double() - column)
    return Quantized(fmt.element.to_codes(elements_go.mT.contiguous()), scales, global_scale), x_go.mT


def _transformed(weight_oi: Tensor, matrix: Tensor, transform: Transform) -> Tensor:
    return weight_oi if isinstance(transform, Identity) else transform_weight(weight_oi, matrix).float()


def _stored(matrix: Tensor, transform: Transform) -> Tensor | None:
    return None if isinstance(transform, Identity) else matrix
