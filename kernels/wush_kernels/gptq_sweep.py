"""GPTQ inside one block of G columns: transformed, and quantized column by column with error feedback, in one launch.

Of a block of weights `(O, G)` float64 and `(G, G)` float64 matrices `inverse`, `lower` and `spread`:

    X = block @ inverse;  scales of each row's group X, fixed;  then for c = 0 .. G-1
    Q_c = the value nearest to X_c;  X[:, c:] += (Q_c - X_c) lower[c:, c]^T;  errors = (Q - X as it entered) @ spread

A program keeps a tile of rows in registers. Rows are independent. Arithmetic is float64 but for the element's rounding,
which is float32 as everywhere: sums are in another order than the reference's, so a code can differ, and with it those
after it in its row, where a value is within a float64 rounding of a float32 rounding boundary next to a tie.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels import numerics as nm
from wush_kernels.groups import group_scales, nvfp4_factors, quotient
from wush_kernels.launch import scale_factor
from wush_kernels.offline import Case
from wush_kernels.spec import ELEMENTS, FormatSpec
from wush_kernels.support import INTERPRETED, check_tensor, on_device, require_support

_ROWS = 16
_BITS = {1: torch.uint8, 2: torch.int16}  # of scales, by their bytes


@triton.jit
def _column(x, columns, c):
    """Column c `(O,)` of a tile; -0 is what leaves every number as it is, +0 and -0 too."""
    return tl.sum(tl.where((columns == c)[None, :], x, tl.full(x.shape, -0.0, x.dtype)), 1)


@triton.jit
def _product(x, matrix, stride_row, stride_column, columns, G: tl.constexpr):
    """`x @ matrix` for a tile `(O, G)` and a matrix in memory `(G, G)`."""
    sums = tl.zeros(x.shape, tl.float64)
    for c in range(G):
        row = tl.load(matrix + c * stride_row + columns * stride_column)
        sums += _column(x, columns, c)[:, None] * row[None, :]
    return sums


@triton.jit
def _kernel(
    block, inverse, lower, spread, codes, scales, errors, O, stride_block, stride_codes, stride_scales, stride_errors,
    inverse_row, inverse_column, lower_row, lower_column, spread_row, spread_column, g, inverse_g, scale_factor,
    FORMAT: tl.constexpr, RULE: tl.constexpr, ELEMENT: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, G)
    inside = (rows < O)[:, None]
    far = rows.to(tl.int64)[:, None]
    weights = tl.load(block + far * stride_block + columns[None, :], mask=inside, other=0.0)
    entered = _product(weights, inverse, inverse_row, inverse_column, columns, G)

    scale, scale_bits = group_scales(entered.to(tl.float32)[None, :, :], scale_factor, FORMAT, RULE, G, INTERPRET)
    scale, scale_bits = tl.reshape(scale, (ROWS,)), tl.reshape(scale_bits, (ROWS,))
    numerator = 1.0
    if FORMAT == "nvfp4":
        inverse_g, numerator = nvfp4_factors(inverse_g)
    inverse_s = quotient(numerator, scale)
    inverse_g = tl.where(scale == 0.0, 0.0, inverse_g)
    step = scale * g

    x = entered
    elements = tl.zeros((ROWS, G), tl.float32)
    for c in range(G):
        x_c = _column(x, columns, c)
        element = nm.snap((x_c.to(tl.float32) * inverse_g) * inverse_s, ELEMENT)
        elements = tl.where((columns == c)[None, :], element[:, None], elements)
        error = (element * step).to(tl.float64) - x_c
        x += error[:, None] * tl.load(lower + columns * lower_row + c * lower_column)[None, :]

    tl.store(codes + far * stride_codes + columns[None, :], nm.to_code(elements, ELEMENT).to(tl.uint8), inside)
    tl.store(scales + rows.to(tl.int64) * stride_scales, scale_bits.to(scales.dtype.element_ty), rows < O)
    spread_errors = _product(x - entered, spread, spread_row, spread_column, columns, G)
    tl.store(errors + far * stride_errors + columns[None, :], spread_errors, inside)


def supports(fmt: FormatSpec) -> bool:
    """Whether the kernel knows a format."""
    return (fmt.name, getattr(fmt, "scale_rule", "")) in ELEMENTS


@on_device
def gptq_sweep(
    block: Tensor,
    inverse: Tensor,
    lower: Tensor,
    spread: Tensor,
    fmt: FormatSpec,
    codes: Tensor,
    scales: Tensor,
    errors: Tensor,
    global_scale: float | None = None,
) -> None:
    """Quantize a block `(O, G)` float64 into `codes` `(O, G)` uint8, `scales` `(O, 1)` and `errors` `(O, G)` float64.

    All of these may be slices of wider tensors. The matrices are `(G, G)` float64, transposed or not; `lower` is lower
    triangular with ones on its diagonal. A row with NaN or infinity gets a NaN scale. Raises `ValueError` or
    `TypeError` for tensors that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(block, "gptq_sweep")
    if not supports(fmt):
        raise ValueError(f"gptq_sweep: no kernel knows the format {fmt.name}")
    g = fmt.global_scale if global_scale is None else global_scale
    size, doubles = fmt.group_size, (torch.float64,)
    for name, tensor, dtypes, shape in (
        ("block", block, doubles, (None, size)),
        ("codes", codes, (torch.uint8,), (len(block), size)),
        ("scales", scales, (fmt.scale_dtype,), (len(block), 1)),
        ("errors", errors, doubles, (len(block), size)),
    ):
        check_tensor(tensor, f"gptq_sweep: {name}", dtypes, shape, block.device, contiguous=False)
    for name, matrix in (("inverse", inverse), ("lower", lower), ("spread", spread)):
        as_rows = matrix if matrix.stride(-1) == 1 else matrix.mT
        check_tensor(as_rows, f"gptq_sweep: {name}", doubles, (size, size), block.device, contiguous=False)
    if len(block):
        _kernel[(triton.cdiv(len(block), _ROWS),)](
            block, inverse, lower, spread, codes, scales.view(_BITS[fmt.scale_dtype.itemsize]), errors,
            len(block), block.stride(0), codes.stride(0), scales.stride(0), errors.stride(0),
            *inverse.stride(), *lower.stride(), *spread.stride(), g, 1 / g, scale_factor(fmt.name, fmt.scale_rule, g),
            FORMAT=fmt.name, RULE=fmt.scale_rule, ELEMENT=ELEMENTS[fmt.name, fmt.scale_rule], G=size, ROWS=_ROWS,
            INTERPRET=INTERPRETED, enable_fp_fusion=False,
        )  # fmt: skip


class Rounding(FormatSpec, Protocol):
    """A format that rounds in PyTorch, as those of `wush.formats` do."""

    element: Any

    def find_scales(self, x: Tensor, *, global_scale: float | None) -> Tensor:
        """Scales `(O, 1)` of groups `(O, G)`."""

    def snap(self, x_ng: Tensor, scales: Tensor, global_scale: float) -> Tensor:
        """Elements, float32, nearest to `(O, 1, 1)` values at scales `(O, 1)`."""

    def expand(self, elements_ng: Tensor, scales: Tensor, global_scale: float) -> Tensor:
        """The elements' values."""


def reference_gptq_sweep(
    block: Tensor, inverse: Tensor, lower: Tensor, spread: Tensor, fmt: Rounding, global_scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `(O, G)`, scales `(O, 1)` and errors `(O, G)` by the definition; finite blocks only."""
    g = fmt.global_scale if global_scale is None else global_scale
    entered = block @ inverse
    scales = fmt.find_scales(entered, global_scale=g)
    x, codes = entered.clone(), torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    for c in range(x.shape[1]):
        element = fmt.snap(x[:, c].float()[:, None, None], scales, g)
        codes[:, c] = fmt.element.to_codes(element).flatten()
        error = fmt.expand(element, scales, g).flatten().double() - x[:, c]
        x[:, c:] += error[:, None] * lower[c:, c]
    return codes, scales, (x - entered) @ spread


def offline_cases() -> Iterator[Case]:
    """Each format once."""
    types = dict.fromkeys(("block", "inverse", "lower", "spread", "errors"), "*fp64") | {"codes": "*u8"}
    types |= dict.fromkeys(("O", "stride_block", "stride_codes", "stride_scales", "stride_errors"), "i32")
    types |= dict.fromkeys(("g", "inverse_g", "scale_factor"), "fp32")
    strides = ("inverse_row", "inverse_column", "lower_row", "lower_column", "spread_row", "spread_column")
    types |= dict.fromkeys(strides, "i32")
    sizes = {"nvfp4": 16}
    for name, rule in (("mxfp4", "paper"), ("nvfp4", "fixed"), ("int4", "rms"), ("mxfp8", "ocp")):
        yield Case(
            name, _kernel, types | {"scales": "*i16" if name == "int4" else "*u8"},
            {"FORMAT": name, "RULE": rule, "ELEMENT": ELEMENTS[name, rule], "G": sizes.get(name, 32), "ROWS": _ROWS,
             "INTERPRET": False},
            dict.fromkeys((90, 100, 120), ("mul.rn.f64", "add.rn.f64")), odd=("O", "scales", "stride_scales", *strides),
        )  # fmt: skip
