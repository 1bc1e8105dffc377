"""What the kernels are to reach on an H100, as data; and what a record says of each.

A ratio is to cuBLAS BF16 in the same run, at the same M, N, K, out of a cold cache. Every measurement that a promise
is about counts, and the worst one is its result; one that failed fails the promise, and without all that a promise
needs it is kept in part at most. Layers that keep no copies and models that are not compiled are measured, and
nothing is promised of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from wush.backends import Shape, choose
from wush.machine import Machine
from wush_kernels.bench import kernels, products
from wush_kernels.bench.measurement import ADDMM, BF16, Ceilings, Measurement
from wush_kernels.bench.operands import FORMATS
from wush_kernels.bench.record import Record
from wush_kernels.bench.shapes import MODELS, TOKENS, layer_shapes

Value = Callable[[Measurement, Ceilings], float | None]
Point = tuple[str, str, int, int, int]  # name, variant, M, O, I
Verdict = Literal["met", "MISSED", "FAILED", "in part", "not measured"]
SLOWEST_LAYER = 0.95  # of BF16's speed
DECODER_BLOCKS = 32
GPTQ_WUSH, REFIT = "GPTQ + WUSH", "refit"
LAYERS = [(one.out_features, one.in_features) for one in layer_shapes(MODELS)]


@dataclass(frozen=True)
class Promise:
    """A bound on the worst of the measurements that it needs; `at_least` or else at most, in `unit`."""

    name: str
    bound: float
    unit: Literal["x", "%", "us", "s"]
    about: Callable[[Measurement], bool]
    needs: frozenset[Point]
    value: Value
    at_least: bool = True

    @property
    def target(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}{_unit(self.unit)}"


@dataclass(frozen=True)
class Outcome:
    """`where`: the worst measurement. `roofline`: of a promise that is missed, what the machine would allow there; of
    one that failed, why; of one kept in part, how much was measured.
    """

    promise: Promise
    verdict: Verdict
    measured: float | None = None
    where: str = ""
    roofline: str = ""

    @property
    def said(self) -> str:
        """The number with its unit."""
        return "-" if self.measured is None else f"{self.measured:.3g}{_unit(self.promise.unit)}"


def outcomes(record: Record) -> list[Outcome]:
    """What became of every promise."""
    return [_outcome(promise, record) for promise in PROMISES]


def slow_layers(record: Record) -> list[Measurement]:
    """MXFP4 layers that failed, then those slower than BF16 by more than is promised, the slowest first."""
    about = [one for one in record.of("layers") if _slow_layer(one)]
    return sorted(about, key=lambda one: 0.0 if one.failure else one.ratio(BF16) or 0.0)


def _slow_layer(one: Measurement) -> bool:
    ratio = one.ratio(BF16)
    return one.variant == "mxfp4" and (bool(one.failure) or ratio is None or ratio < SLOWEST_LAYER)


def _outcome(promise: Promise, record: Record) -> Outcome:
    about = [one for one in record.measurements if promise.about(one)]
    if not about:
        return Outcome(promise, "not measured")
    found = [(promise.value(one, record.ceilings), one) for one in about]
    values = [(value, one) for value, one in found if value is not None and math.isfinite(value)]
    failed = [one for value, one in found if one.failure or value is None or not math.isfinite(value)]
    if failed:
        return Outcome(promise, "FAILED", None, failed[0].label, failed[0].failure or "it or a baseline was not timed")
    worst, where = (min if promise.at_least else max)(values, key=lambda pair: pair[0])
    if worst < promise.bound if promise.at_least else worst > promise.bound:
        return Outcome(promise, "MISSED", worst, where.label, roofline_note(where, record.ceilings))
    missing = promise.needs - {_point(one) for one in about}
    if missing:
        much = f"{len(promise.needs) - len(missing)} of {len(promise.needs)} measured"
        return Outcome(promise, "in part", worst, where.label, much)
    return Outcome(promise, "met", worst, where.label)


def _point(one: Measurement) -> Point:
    return one.name, one.variant, one.tokens, one.out_features, one.in_features


def roofline_note(one: Measurement, ceilings: Ceilings) -> str:
    """The time, the floor and what sets it, and the ratio to BF16 that the floor would be."""
    if not one.us or not one.floor_us:
        return ""
    by_bytes = ceilings.of(one).bytes_us(one.work) >= ceilings.flops_us(one.work)
    bound = f"{one.work.bytes / 1e6:.1f} MB" if by_bytes else f"{one.work.flops / 1e9:.1f} GFLOP in {one.work.rate}"
    note = f"{one.us:.1f} us; floor {one.floor_us:.1f} us ({bound}), {one.floor_us / one.us:.0%} reached"
    if BF16 in one.timings:
        note += f"; BF16 {one.timings[BF16].us:.1f} us, so at most {one.timings[BF16].us / one.floor_us:.2f}x"
    return note


def _unit(unit: str) -> str:
    return unit if unit in "x%" else f" {unit}"


def _ratio(one: Measurement, ceilings: Ceilings) -> float | None:
    return one.ratio(BF16)


def _ratio_to_addmm(one: Measurement, ceilings: Ceilings) -> float | None:
    return one.ratio(ADDMM)


def _copy_share(one: Measurement, ceilings: Ceilings) -> float | None:
    return None if one.gbs is None else 100 * one.gbs / ceilings.copy_gbs


def _us(one: Measurement, ceilings: Ceilings) -> float | None:
    return one.us


def _seconds(one: Measurement, ceilings: Ceilings) -> float | None:
    return None if one.us is None else one.us / 1e6


# What each promise is about, and what of it is needed


def _quantizing(kernel: str, fmt: str, small: bool) -> tuple[Callable[[Measurement], bool], frozenset[Point]]:
    def suits(tokens: int, features: int) -> bool:
        return (tokens, features) == (1024, 4096) if small else features >= 8192

    def about(one: Measurement) -> bool:
        own = one.section == "kernels" and one.name == kernel and one.variant.startswith(fmt)
        return own and suits(one.tokens, one.in_features)

    sizes = [size for size in kernels.SIZES if suits(*size)]
    return about, frozenset((kernel, f"{fmt} {kind}", m, 0, i) for m, i in sizes for kind in kernels.KINDS)


def _product(
    section: str, variant: str, shapes: Sequence[tuple[int, int]], fewest: int, most: int
) -> tuple[Callable[[Measurement], bool], frozenset[Point]]:
    """Layers of shapes `(O, I)`, or the matmuls that `wush.backends` chooses for them on an H100."""
    needs = frozenset(
        (*_line(section, variant, m, shape), m, *shape) for shape in shapes for m in TOKENS if fewest <= m <= most
    )
    return lambda one: one.section == section and _point(one) in needs, needs


def _line(section: str, variant: str, tokens: int, shape: tuple[int, int]) -> tuple[str, str]:
    """The name and the variant of its measurement."""
    if section == "layers":
        return "layer", variant
    matmul = choose(FORMATS[variant], Machine((9, 0)), tokens, Shape(*shape)).matmul
    return matmul, f"{variant} accurate" if matmul == "scaled_mm" else variant


def _large(section: str) -> tuple[Callable[[Measurement], bool], frozenset[Point]]:
    """MXFP4 products with at most 16 tokens whose weight takes 400 MB or more in BF16."""
    shapes = products.SHAPES if section == "kernels" else LAYERS
    return _product(section, "mxfp4", [(o, i) for o, i in shapes if 2 * o * i >= 400e6], 1, 16)


def _model(name: str, tokens: int) -> tuple[Callable[[Measurement], bool], frozenset[Point]]:
    def about(one: Measurement) -> bool:
        whole = one.details.get("decoder_blocks") == DECODER_BLOCKS
        return (one.section, one.name, one.variant) == ("model", name, "mxfp4 compiled") and whole

    return about, frozenset({(name, "mxfp4 compiled", tokens, 0, 0)})


def _stage(variant: str) -> tuple[Callable[[Measurement], bool], frozenset[Point]]:
    return lambda one: (one.section, one.variant) == ("quantizer", variant), frozenset(
        {("decoder block", variant, 0, 0, 0)}
    )


def _named(section: str, name: str) -> Callable[[Measurement], bool]:
    return lambda one: one.section == section and one.name == name


SQUARE_4096, SQUARE_8192 = (4096, 4096), (8192, 8192)
_KINDS = (("quantize", "mxfp4"), ("quantize", "nvfp4"), ("fp8_operand", "mxfp4"))
_SECTIONS = (("matmul", "kernels"), ("layer", "layers"))
MXFP4_DECODE = [
    promise
    for what, section in _SECTIONS
    for promise in (
        Promise(f"MXFP4 decode, 8192 x 8192, M <= 16, {what}", 2.8, "x",
                *_product(section, "mxfp4", (SQUARE_8192,), 1, 16), _ratio),
        Promise(f"MXFP4 decode, past 400 MB in BF16, M <= 16, {what}", 3.3, "x", *_large(section), _ratio),
        Promise(f"MXFP4 decode, 8192 x 8192, M = 64, {what}", 2.5, "x",
                *_product(section, "mxfp4", (SQUARE_8192,), 64, 64), _ratio),
        Promise(f"MXFP4 decode, 8192 x 8192, M = 128, {what}", 1.7, "x",
                *_product(section, "mxfp4", (SQUARE_8192,), 128, 128), _ratio),
    )
]  # fmt: skip
PROMISES = (
    *(Promise(f"{kernel} {fmt}, K >= 8192: of copy bandwidth", 80, "%", *_quantizing(kernel, fmt, False), _copy_share)
      for kernel, fmt in _KINDS),
    *(Promise(f"{kernel} {fmt}, 1024 x 4096", 5, "us", *_quantizing(kernel, fmt, True), _us, at_least=False)
      for kernel, fmt in _KINDS),
    Promise("MXFP4 prefill, 4096 x 4096, M >= 256, layer", 1.5, "x",
            *_product("layers", "mxfp4", (SQUARE_4096,), 256, 4096), _ratio),
    Promise("MXFP4 prefill, 8192 x 8192, M >= 256, layer", 1.7, "x",
            *_product("layers", "mxfp4", (SQUARE_8192,), 256, 4096), _ratio),
    *MXFP4_DECODE,
    Promise("MXFP4 layer, any shape, any M", SLOWEST_LAYER, "x",
            lambda one: one.section == "layers" and one.variant == "mxfp4",
            _product("layers", "mxfp4", LAYERS, 1, max(TOKENS))[1], _ratio),
    *(Promise(f"NVFP4 decode, 8192 x 8192, M <= 16, {what}", 2.5, "x",
              *_product(section, "nvfp4", (SQUARE_8192,), 1, 16), _ratio) for what, section in _SECTIONS),
    Promise("NVFP4 prefill, 8192 x 8192, M >= 256, layer", 0.95, "x",
            *_product("layers", "nvfp4", (SQUARE_8192,), 256, 4096), _ratio),
    Promise("second moment, to torch.addmm", 1.5, "x", _named("kernels", "second_moment"),
            frozenset(("second_moment", "bf16", m, 0, i) for m, i in kernels.SIZES[1:]), _ratio_to_addmm),
    Promise("GPTQ + WUSH of one Llama-3.1-8B decoder block, fitted once", 1, "s",
            *_stage(GPTQ_WUSH), _seconds, at_least=False),
    Promise("GPTQ + WUSH of one Llama-3.1-8B decoder block, refitted", 1, "s",
            *_stage(REFIT), _seconds, at_least=False),
    Promise("8B-shaped model, compiled, decode, batch 1", 2.2, "x", *_model("decode", 1), _ratio),
    Promise("8B-shaped model, compiled, prefill of 4 x 2,048 tokens", 1.4, "x", *_model("prefill", 8192), _ratio),
)  # fmt: skip
