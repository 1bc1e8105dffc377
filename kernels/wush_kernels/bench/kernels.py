"""Every kernel by itself, at the sizes of `SIZES` and of `products.SHAPES`.

Kernels are imported where they are measured, so that one that cannot be imported is a line with its error.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from wush.formats import Format
from wush.transforms import apply_blocks
from wush_kernels.bench import operands, products
from wush_kernels.bench.cases import ROUNDED, Case, Prepared, inputs_for
from wush_kernels.bench.measurement import ADDMM, OURS, Errors, Work
from wush_kernels.bench.operands import FORMATS, OTHER_FORMATS
from wush_kernels.bench.timing import Effort

Kernel = Callable[..., Any]
SIZES = ((1024, 4096), (8192, 8192), (4096, 14336))
TIES = 1e-4  # share of codes that may differ: a transform's sums are in another order, and a tie falls elsewhere
FLOAT64 = 1e-9  # of matrices that float64 steps make
SUMMED = 1e-3  # of a long float32 sum on tensor cores
KINDS = ("block", "shared", "none")
SWEPT_ROWS = (4096, 14336)
FITTED_BLOCKS = (1, 448)  # transforms fitted at once: GPTQ refits one after another, and else all of a layer's


def cases(effort: Effort, quick: bool) -> Iterator[Case]:
    """All of them, or a few of each kind."""
    sizes: Sequence[tuple[int, int]] = SIZES[:2] if quick else SIZES
    kinds = ("block", "none") if quick else KINDS
    formats: tuple[Format, ...] = tuple(FORMATS.values())
    few, others = SIZES[: 1 if quick else 2], tuple(OTHER_FORMATS.values())
    for fmt, kind, size in product(formats, kinds, sizes):
        yield _quantize(*size, fmt, kind, effort)
    for fmt, kind, size in product(others, ("block", "none"), few):
        yield _quantize(*size, fmt, kind, effort)
    for kind, size in product(kinds, sizes):
        yield _fp8_operand(*size, kind, effort)
    for kind, size in product(kinds, sizes):
        yield _half_operand(*size, FORMATS["nvfp4"], torch.float16, kind, effort)
    for fmt, kind, size in product(formats, ("block", "none"), few):
        yield _half_operand(*size, fmt, torch.bfloat16, kind, effort)
    for size in sizes:
        yield _block_transform(*size, effort)
    for fmt, size in (*product(formats, sizes), *product(others, few)):
        yield _dequantize(*size, fmt, effort)
    for fmt, size in product((*formats, OTHER_FORMATS["mxfp8"]), few):
        yield _half_weight(*size, fmt, effort)
    for size in sizes:
        yield _encode(*size, effort)
    yield from products.cases(effort, quick)
    for size in sizes[1:]:
        yield _second_moment(*size, effort)
    for rows in SWEPT_ROWS[: 1 if quick else 2]:
        yield _gptq_sweep(rows, FORMATS["mxfp4"], effort)
    for blocks in FITTED_BLOCKS[: 1 if quick else 2]:
        yield _eigen(blocks, 32, effort)
        yield _coordinates(blocks, 32, effort)


def _quantize(tokens: int, features: int, fmt: Format, kind: str, effort: Effort) -> Case:
    def prepare() -> Prepared:
        from wush_kernels.quantize import quantize

        matrix = operands.transform(fmt, features, kind)

        def check() -> Errors:
            x = operands.activations(tokens, features)
            codes, scales = quantize(x, fmt, matrix)
            transformed = x.float() if matrix is None else apply_blocks(x.float(), matrix.float())
            expected = fmt.quantize(transformed)
            pairs = [(codes, fmt.pack(expected.codes)), (scales, expected.scales)]
            return operands.mismatched(pairs, 0.0 if matrix is None else TIES)

        inputs = _cold_inputs(tokens, features, effort)
        return Prepared({OURS: [partial(quantize, x, fmt, matrix) for x in inputs]}, check)

    work = _quantizing(tokens, features, fmt, kind, fmt.bits_per_weight / 8)
    return Case("quantize", f"{fmt.name} {kind}", tokens, 0, features, work, prepare)


def _fp8_operand(tokens: int, features: int, kind: str, effort: Effort) -> Case:
    def load() -> tuple[Kernel, Callable[[Any], Tensor]]:
        from wush_kernels.dequantize import natural_order
        from wush_kernels.fp8_operand import fp8_operand

        return fp8_operand, lambda made: natural_order(made[0].float(), 32) * made[1][:, None]

    return _operand("fp8_operand", FORMATS["mxfp4"], tokens, features, kind, 1.0, load, effort)


def _half_operand(tokens: int, features: int, fmt: Format, dtype: torch.dtype, kind: str, effort: Effort) -> Case:
    shift = 2.0**7 if dtype == torch.float16 else 1.0

    def load() -> tuple[Kernel, Callable[[Any], Tensor]]:
        from wush_kernels.dequantize import natural_order
        from wush_kernels.half_operand import half_operand

        return partial(half_operand, dtype=dtype), lambda made: natural_order(made.float(), fmt.group_size) * shift

    made = _operand("half_operand", fmt, tokens, features, kind, 2.0, load, effort)
    return replace(made, variant=f"{made.variant} {'fp16' if dtype == torch.float16 else 'bf16'}")


def _operand(
    name: str,
    fmt: Format,
    tokens: int,
    features: int,
    kind: str,
    bytes_written: float,
    load: Callable[[], tuple[Kernel, Callable[[Any], Tensor]]],
    effort: Effort,
) -> Case:
    """`load` gives the kernel, and what turns its result into values over the global scale, in natural order."""

    def prepare() -> Prepared:
        kernel, values_of = load()
        matrix = operands.transform(fmt, features, kind)

        def check() -> Errors:
            x = operands.activations(tokens, features)
            expected = operands.rounded_input(x, fmt, matrix, 1.0)
            return operands.mismatched([(values_of(kernel(x, fmt, matrix)), expected)], 0.0 if matrix is None else TIES)

        inputs = _cold_inputs(tokens, features, effort)
        return Prepared({OURS: [partial(kernel, x, fmt, matrix) for x in inputs]}, check)

    work = _quantizing(tokens, features, fmt, kind, bytes_written)
    return Case(name, f"{fmt.name} {kind}", tokens, 0, features, work, prepare)


def _block_transform(tokens: int, features: int, effort: Effort) -> Case:
    fmt = FORMATS["mxfp4"]

    def prepare() -> Prepared:
        from wush_kernels.block_transform import block_transform

        matrix = operands.transform(fmt, features)
        assert matrix is not None

        def check() -> Errors:
            x = operands.activations(tokens, features)
            return operands.compare(block_transform(x, matrix), apply_blocks(x.double(), matrix.double()), ROUNDED)

        inputs = _cold_inputs(tokens, features, effort)
        return Prepared({OURS: [partial(block_transform, x, matrix) for x in inputs]}, check)

    work = _quantizing(tokens, features, fmt, "block", 2.0)
    return Case("block_transform", "bf16", tokens, 0, features, work, prepare)


def _dequantize(rows: int, features: int, fmt: Format, effort: Effort) -> Case:
    def prepare() -> Prepared:
        from wush_kernels.dequantize import dequantize

        def check() -> Errors:
            packed, scales = operands.packed(fmt, rows, features)
            expected = operands.values(fmt, packed, scales, fmt.global_scale).bfloat16()
            found = dequantize(packed, scales, fmt, dtype=torch.bfloat16)
            return operands.mismatched([(found.float(), expected.float())])

        copies = _packed_copies(fmt, rows, features, effort)
        return Prepared(
            {OURS: [partial(dequantize, codes, scales, fmt, dtype=torch.bfloat16) for codes, scales in copies]}, check
        )

    work = Work(operands.packed_bytes(fmt, rows, features) + 2 * rows * features)
    return Case("dequantize", f"{fmt.name} to bf16", rows, 0, features, work, prepare)


def _half_weight(rows: int, features: int, fmt: Format, effort: Effort) -> Case:
    def prepare() -> Prepared:
        from wush_kernels.dequantize import half_weight, natural_order

        def check() -> Errors:
            packed, scales = operands.packed(fmt, rows, features)
            found = natural_order(half_weight(packed, scales, fmt).float(), fmt.group_size)
            return operands.mismatched([(found, operands.values(fmt, packed, scales, 1.0))])

        copies = _packed_copies(fmt, rows, features, effort)
        return Prepared({OURS: [partial(half_weight, codes, scales, fmt) for codes, scales in copies]}, check)

    work = Work(operands.packed_bytes(fmt, rows, features) + 2 * rows * features)
    return Case("half_weight", f"{fmt.name} to bf16", rows, 0, features, work, prepare)


def _encode(rows: int, features: int, effort: Effort) -> Case:
    fmt = FORMATS["mxfp4"]

    def prepare() -> Prepared:
        from wush_kernels.dequantize import natural_order
        from wush_kernels.encode import fp8_row_bases, fp8_weight

        def check() -> Errors:
            packed, scales = operands.packed(fmt, rows, features)
            made = fp8_weight(packed, scales)
            found = natural_order(made.bytes.float(), fmt.group_size) * made.row_scales[:, None]
            return operands.mismatched([(found, operands.values(fmt, packed, scales, 1.0))])

        copies = _packed_copies(fmt, rows, features, effort)
        return Prepared({OURS: [partial(fp8_weight, *one, fp8_row_bases(*one)) for one in copies]}, check)

    work = Work(operands.packed_bytes(fmt, rows, features) + rows * features)
    return Case("fp8_weight", "mxfp4 to e4m3", rows, 0, features, work, prepare)


def _second_moment(tokens: int, features: int, effort: Effort) -> Case:
    def prepare() -> Prepared:
        from wush_kernels.second_moment import second_moment

        def check() -> Errors:
            x = operands.activations(tokens, features)
            return operands.compare(second_moment(x), x.double().T @ x.double(), SUMMED)

        inputs = _cold_inputs(tokens, features, effort)
        sums = torch.zeros(features, features, device=operands.DEVICE)
        rounded = torch.zeros(features, features, device=operands.DEVICE, dtype=torch.bfloat16)
        contenders = {
            OURS: [partial(second_moment, x, out=sums) for x in inputs],
            ADDMM: [partial(torch.addmm, rounded, x.T, x) for x in inputs],
        }
        return Prepared(contenders, check)

    work = Work(2 * tokens * features + 4 * features**2, tokens * features * (features + 1))
    return Case("second_moment", "bf16", tokens, 0, features, work, prepare)


def _gptq_sweep(rows: int, fmt: Format, effort: Effort) -> Case:
    """One block of columns. Its bytes are the block, its codes, scales and errors; its float64 operations more."""
    size = fmt.group_size
    moved = rows * (size * (8 + 1 + 8) + fmt.scale_dtype.itemsize)

    def prepare() -> Prepared:
        from wush_kernels.gptq_sweep import gptq_sweep, reference_gptq_sweep

        matrices = _sweep_matrices(fmt)

        def problem(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            block = operands.weight(count, size).double()
            codes = torch.empty(count, size, dtype=torch.uint8, device=operands.DEVICE)
            scales = torch.empty(count, 1, dtype=fmt.scale_dtype, device=operands.DEVICE)
            return block, codes, scales, torch.empty_like(block)

        def check() -> Errors:
            block, codes, scales, errors = problem(min(rows, operands.CHECKED_FEATURES))
            gptq_sweep(block, *matrices, fmt, codes, scales, errors)
            expected = reference_gptq_sweep(block, *matrices, cast(Any, fmt))
            found = operands.mismatched([(codes, expected[0]), (scales, expected[1])], TIES)
            same = (codes == expected[0]).all(1)  # after a code that a tie decides otherwise the rest of a row differs
            if not same.any():
                return found
            return replace(found, relative=operands.compare(errors[same], expected[2][same], TIES).relative)

        def call(block: Tensor, codes: Tensor, scales: Tensor, errors: Tensor) -> None:
            gptq_sweep(block, *matrices, fmt, codes, scales, errors)

        return Prepared({OURS: [partial(call, *problem(rows)) for _ in range(effort.copies(moved))]}, check)

    return Case("gptq_sweep", f"{fmt.name} float64", rows, 0, size, Work(moved), prepare)


def _eigen(blocks: int, size: int, effort: Effort) -> Case:
    """Bytes are the matrices, once read and once written; the time is that of one program's many steps."""
    moved = 16 * blocks * size * size

    def prepare() -> Prepared:
        from wush_kernels.eigen import eigen

        def check() -> Errors:
            matrices = _moments(blocks, size)
            values, vectors = eigen(matrices)
            return operands.compare((vectors * values[:, None]) @ vectors.mT, matrices, FLOAT64)

        matrices = [_moments(blocks, size) for _ in range(effort.copies(moved))]
        return Prepared({OURS: [partial(eigen, one) for one in matrices]}, check)

    return Case("eigen", f"{size} x {size} float64", blocks, 0, size, Work(moved), prepare)


def _coordinates(blocks: int, size: int, effort: Effort) -> Case:
    """Bytes are a block's bfloat16 transform and four float64 matrices."""
    moved = blocks * size * size * (2 + 8 * 4)

    def prepare() -> Prepared:
        from wush_kernels.coordinates import coordinates, reference_coordinates

        def problem() -> tuple[Tensor, Tensor]:
            transform = operands.transform(FORMATS["mxfp4"], blocks * size)
            assert transform is not None
            return transform.unsqueeze(0), torch.linalg.cholesky(_moments(blocks, size))

        def check() -> Errors:
            given = problem()
            found, expected = (torch.stack(made(*given)) for made in (coordinates, reference_coordinates))
            return operands.compare(found, expected, FLOAT64)

        return Prepared({OURS: [partial(coordinates, *problem()) for _ in range(effort.copies(moved))]}, check)

    return Case("coordinates", f"{size} x {size} float64", blocks, 0, size, Work(moved), prepare)


def _moments(blocks: int, size: int) -> Tensor:
    """Second moments `(blocks, G, G)` float64 of channels of unequal size."""
    sample = operands.activations(8 * size * blocks, size).double().view(blocks, -1, size)
    return sample.mT @ sample / sample.shape[1]


def _sweep_matrices(fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """A transform's inverse, a unit lower factor and a full matrix `(G, G)` float64, as GPTQ makes of a moment."""
    size = fmt.group_size
    inverse = operands.transform(fmt, size, "shared")
    assert inverse is not None
    factor = torch.linalg.cholesky(_moments(1, size)[0])
    return inverse.double(), factor / factor.diagonal(), factor.T.contiguous()


def _cold_inputs(tokens: int, features: int, effort: Effort) -> list[Tensor]:
    return inputs_for(effort.copies(2 * tokens * features), tokens, features, effort)


def _packed_copies(fmt: Format, outputs: int, features: int, effort: Effort) -> list[tuple[Tensor, Tensor]]:
    count = effort.copies(operands.packed_bytes(fmt, outputs, features))
    return [operands.packed(fmt, outputs, features) for _ in range(count)]


def _quantizing(tokens: int, features: int, fmt: Format, kind: str, bytes_written: float) -> Work:
    """Of a pass over `(M, I)` bfloat16: the transform is read once, and its product is 2 G operations an element."""
    groups = {"block": features // fmt.group_size, "shared": 1, "none": 0}[kind]
    moved = tokens * features * (2 + bytes_written) + 2 * groups * fmt.group_size**2
    return Work(moved, 0.0 if kind == "none" else 2.0 * tokens * features * fmt.group_size)
