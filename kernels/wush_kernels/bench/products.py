"""The matmul kernels by themselves, with operands made beforehand, against float64 and cuBLAS.

Kernels are imported where they are measured, so that one that cannot be imported is a line with its error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wush.formats import Format
from wush_kernels.bench import operands
from wush_kernels.bench.cases import ROUNDED, Baselines, Case, Prepared, each, inputs_for, scaled_mm
from wush_kernels.bench.measurement import OURS, Errors, Rate, Work
from wush_kernels.bench.operands import FORMATS, FourBit
from wush_kernels.bench.shapes import DECODE_TOKENS
from wush_kernels.bench.timing import Effort

SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192), (8192, 28672))
PREFILL_TOKENS = (64, 128, 256, 1024, 4096)


@dataclass(frozen=True)
class Kernel:
    """What a matmul makes of an input and of packed codes with scales, and the product of these in bfloat16."""

    operand: Callable[[Tensor], Any]
    weight: Callable[[Tensor, Tensor], Any]
    product: Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Matmul:
    """A line of the table: the kernel is imported by `load`. Bytes are those of an element of each operand."""

    name: str
    variant: str
    format: FourBit
    load: Callable[[FourBit], Kernel]
    input_bytes: int
    weight_bytes: float
    rate: Rate


def cases(effort: Effort, quick: bool) -> Iterator[Case]:
    """Decode at few tokens, prefill at many, of each shape."""
    for shape in SHAPES[1:2] if quick else SHAPES:
        baselines = Baselines(*shape, effort)
        for matmul in DECODE:
            for tokens in DECODE_TOKENS[::2] if quick else DECODE_TOKENS:
                yield _case(matmul, tokens, shape, baselines, effort)
        for matmul in PREFILL:
            for tokens in PREFILL_TOKENS[-2:-1] if quick else PREFILL_TOKENS:
                yield _case(matmul, tokens, shape, baselines, effort)


def _case(matmul: Matmul, tokens: int, shape: tuple[int, int], baselines: Baselines, effort: Effort) -> Case:
    fmt, (outputs, features) = matmul.format, shape
    weight_bytes = round(matmul.weight_bytes * outputs * features)

    def prepare() -> Prepared:
        kernel = matmul.load(fmt)

        def check() -> Errors:
            x, (packed, scales) = operands.activations(tokens, features), operands.packed(fmt, *shape)
            found = kernel.product(kernel.operand(x), kernel.weight(packed, scales))
            return product_errors(found, x, packed, scales, fmt)

        weights = [kernel.weight(*operands.packed(fmt, *shape)) for _ in range(effort.copies(weight_bytes))]
        inputs = inputs_for(len(weights), tokens, features, effort)
        calls = each(kernel.product, [kernel.operand(x) for x in inputs], weights)
        return Prepared({OURS: calls, **baselines.contenders(inputs)}, check)

    moved = weight_bytes + matmul.input_bytes * tokens * features + 2 * tokens * outputs
    work = Work(moved, 2.0 * tokens * outputs * features, matmul.rate)
    return Case(matmul.name, matmul.variant, tokens, outputs, features, work, prepare)


def product_errors(
    found: Tensor, x: Tensor, packed: Tensor, scales: Tensor, fmt: Format, matrix: Tensor | None = None,
    limit: float = ROUNDED,
) -> Errors:  # fmt: skip
    """Of a product `(M, O)` against float64 of the same codes, at some of the output features."""
    some = operands.some_features(len(packed))
    own = scales.view(torch.uint8)[some].view(scales.dtype)
    weight = operands.values(fmt, packed[some], own, fmt.global_scale)
    reference = operands.rounded_input(x, fmt, matrix).double() @ weight.double().T
    return operands.compare(found[:, some], reference, limit)


def _matmul_fp8(fmt: FourBit) -> Kernel:
    from wush_kernels.encode import DECODE_WINDOW, exponents
    from wush_kernels.fp8_operand import fp8_operand
    from wush_kernels.matmul_fp8 import matmul_fp8

    def weight(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = exponents(packed, scales, *DECODE_WINDOW)
        return packed, made.relative, made.row_scales

    def product(a: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return matmul_fp8(a[0], a[1], w[0], w[1], w[2], fmt.global_scale**2, None, torch.bfloat16)

    return Kernel(lambda x: fp8_operand(x, fmt), weight, product)


def _matmul_half(fmt: FourBit) -> Kernel:
    from wush_kernels.encode import words
    from wush_kernels.half_operand import half_operand
    from wush_kernels.matmul_half import matmul_half

    def weight(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return packed, words(scales.view(torch.uint8))

    def product(a: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
        return matmul_half(a, w[0], w[1], fmt.global_scale**2, None, torch.bfloat16)

    return Kernel(lambda x: half_operand(x, fmt, None, torch.float16), weight, product)


def _scaled_mm(fast: bool) -> Callable[[FourBit], Kernel]:
    def load(fmt: FourBit) -> Kernel:
        from wush_kernels.encode import fp8_weight
        from wush_kernels.fp8_operand import fp8_operand

        def weight(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
            made = fp8_weight(packed, scales)
            return made.bytes, made.row_scales[None, :] * fmt.global_scale**2

        def product(a: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor]) -> Tensor:
            return scaled_mm(a[0], w[0], a[1][:, None], w[1], fast)

        return Kernel(lambda x: fp8_operand(x, fmt), weight, product)

    return load


MXFP4, NVFP4 = FORMATS["mxfp4"], FORMATS["nvfp4"]
DECODE = (
    Matmul("matmul_fp8", "mxfp4", MXFP4, _matmul_fp8, 1, MXFP4.bits_per_weight / 8, "fp8"),
    Matmul("matmul_half", "nvfp4", NVFP4, _matmul_half, 2, NVFP4.bits_per_weight / 8, "bf16"),
)
PREFILL = tuple(
    Matmul("scaled_mm", f"mxfp4 {'fast' if fast else 'accurate'}", MXFP4, _scaled_mm(fast), 1, 1, "fp8")
    for fast in (False, True)
)
