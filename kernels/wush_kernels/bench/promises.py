"""What the kernels are to reach on an H100, as data; and what a record says of each.

A ratio is to cuBLAS BF16 in the same run, at the same M, N, K, out of a cold cache. Every measurement that a promise
is about counts, and the worst one is its result; one that failed fails the promise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wush.backends import DECODE_ROWS
from wush_kernels.bench.measurement import ADDMM, BF16, Ceilings, Measurement
from wush_kernels.bench.record import Record

Value = Callable[[Measurement, Ceilings], float | None]
Verdict = Literal["met", "MISSED", "FAILED", "not measured"]
SLOWEST_LAYER = 0.95  # of BF16's speed
DECODER_BLOCKS = 32
GPTQ_WUSH = "GPTQ + WUSH"


@dataclass(frozen=True)
class Promise:
    """A bound on the worst of some measurements; `at_least` or else at most, in `unit`."""

    name: str
    bound: float
    unit: Literal["x", "%", "us", "s"]
    about: Callable[[Measurement], bool]
    value: Value
    at_least: bool = True

    @property
    def target(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}{_unit(self.unit)}"


@dataclass(frozen=True)
class Outcome:
    """`where`: the worst measurement. `roofline`: of a promise that is missed, what the machine would allow there."""

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
    """MXFP4 layers that are slower than BF16 by more than is promised, or failed; the slowest first."""
    about = [one for one in record.of("layers") if _slow_layer(one)]
    return sorted(about, key=lambda one: one.ratio(BF16) or 0.0)


def _slow_layer(one: Measurement) -> bool:
    ratio = one.ratio(BF16)
    return one.variant == "mxfp4" and (bool(one.failure) or ratio is None or ratio < SLOWEST_LAYER)


def _outcome(promise: Promise, record: Record) -> Outcome:
    about = [one for one in record.measurements if promise.about(one)]
    if not about:
        return Outcome(promise, "not measured")
    found = [(promise.value(one, record.ceilings), one) for one in about]
    failed = [one for value, one in found if one.failure or value is None]
    if failed:
        return Outcome(promise, "FAILED", None, failed[0].label, failed[0].failure or "a baseline could not be timed")
    values = [(value, one) for value, one in found if value is not None]
    worst, where = (min if promise.at_least else max)(values, key=lambda pair: pair[0])
    if worst >= promise.bound if promise.at_least else worst <= promise.bound:
        return Outcome(promise, "met", worst, where.label)
    return Outcome(promise, "MISSED", worst, where.label, roofline_note(where, record.ceilings))


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


def _quantizing(kernel: str, fmt: str, small: bool) -> Callable[[Measurement], bool]:
    def about(one: Measurement) -> bool:
        size = (one.tokens, one.in_features) == (1024, 4096) if small else one.in_features >= 8192
        return one.section == "kernels" and one.name == kernel and one.variant.startswith(fmt) and size

    return about


def _product(
    section: str, variant: str, shapes: tuple[tuple[int, int], ...], fewest: int, most: int
) -> Callable[[Measurement], bool]:
    def about(one: Measurement) -> bool:
        sizes = (one.out_features, one.in_features) in shapes and fewest <= one.tokens <= most
        names = [(name, variant) for name in ("matmul_fp8", "matmul_half", "layer")]
        if fewest > DECODE_ROWS["mxfp4"]:  # the matmul that layers run there
            names = [("scaled_mm", f"{variant} accurate"), ("layer", variant)]
        return one.section == section and (one.name, one.variant) in names and sizes

    return about


def _large(section: str) -> Callable[[Measurement], bool]:
    """MXFP4 products with at most 16 tokens whose weight takes 400 MB or more in BF16."""

    def about(one: Measurement) -> bool:
        large = 2 * one.out_features * one.in_features >= 400e6
        return one.section == section and one.variant == "mxfp4" and large and one.tokens <= 16

    return about


def _model(name: str) -> Callable[[Measurement], bool]:
    def about(one: Measurement) -> bool:
        whole = one.details.get("decoder_blocks") == DECODER_BLOCKS
        return one.section == "model" and one.name == name and "compiled" in one.variant and whole

    return about


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
                _product(section, "mxfp4", (SQUARE_8192,), 1, 16), _ratio),
        Promise(f"MXFP4 decode, past 400 MB in BF16, M <= 16, {what}", 3.3, "x", _large(section), _ratio),
        Promise(f"MXFP4 decode, 8192 x 8192, M = 64, {what}", 2.5, "x",
                _product(section, "mxfp4", (SQUARE_8192,), 64, 64), _ratio),
        Promise(f"MXFP4 decode, 8192 x 8192, M = 128, {what}", 1.7, "x",
                _product(section, "mxfp4", (SQUARE_8192,), 128, 128), _ratio),
    )
]  # fmt: skip
PROMISES = (
    *(Promise(f"{kernel} {fmt}, K >= 8192: of copy bandwidth", 80, "%", _quantizing(kernel, fmt, False), _copy_share)
      for kernel, fmt in _KINDS),
    *(Promise(f"{kernel} {fmt}, 1024 x 4096", 5, "us", _quantizing(kernel, fmt, True), _us, at_least=False)
      for kernel, fmt in _KINDS),
    Promise("MXFP4 prefill, 4096 x 4096, M >= 256, layer", 1.5, "x",
            _product("layers", "mxfp4", (SQUARE_4096,), 256, 4096), _ratio),
    Promise("MXFP4 prefill, 8192 x 8192, M >= 256, layer", 1.7, "x",
            _product("layers", "mxfp4", (SQUARE_8192,), 256, 4096), _ratio),
    *MXFP4_DECODE,
    Promise("MXFP4 layer, any shape, any M", SLOWEST_LAYER, "x",
            lambda one: one.section == "layers" and one.variant == "mxfp4", _ratio),
    *(Promise(f"NVFP4 decode, 8192 x 8192, M <= 16, {what}", 2.5, "x",
              _product(section, "nvfp4", (SQUARE_8192,), 1, 16), _ratio) for what, section in _SECTIONS),
    Promise("NVFP4 prefill, 8192 x 8192, M >= 256, layer", 0.95, "x",
            _product("layers", "nvfp4", (SQUARE_8192,), 256, 4096), _ratio),
    Promise("second moment, to torch.addmm", 1.5, "x", _named("kernels", "second_moment"), _ratio_to_addmm),
    Promise("GPTQ + WUSH of one Llama-3.1-8B decoder block, fitted once", 1, "s",
            lambda one: (one.section, one.variant) == ("quantizer", GPTQ_WUSH), _seconds, at_least=False),
    Promise("GPTQ + WUSH of one Llama-3.1-8B decoder block, refitted", 1, "s",
            lambda one: (one.section, one.variant) == ("quantizer", "refit"), _seconds, at_least=False),
    Promise("8B-shaped model, decode, batch 1", 2.2, "x", _model("decode"), _ratio),
    Promise("8B-shaped model, prefill of 4 x 2,048 tokens", 1.4, "x", _model("prefill"), _ratio),
)  # fmt: skip
