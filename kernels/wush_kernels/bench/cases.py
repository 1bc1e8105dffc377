"""One line of the benchmark to be: what is compared, checked and timed; and how a case becomes a measurement."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wush_kernels.bench import operands
from wush_kernels.bench.measurement import BF16, FP8, OURS, Ceilings, Errors, Measurement, Work
from wush_kernels.bench.timing import Call, Contenders, Effort, free, one_line, time_together

ROUNDED = (
    6e-3  # bound on the relative error of a result in bfloat16: its own rounding is 1.7e-3, cut off instead 3.4e-3
)


@dataclass(frozen=True)
class Prepared:
    """Operands are made: what is timed, and the check of fresh results against the reference."""

    contenders: Contenders
    check: Callable[[], Errors]
    path: str = ""


@dataclass(frozen=True)
class Case:
    """A line's name and sizes, the work it is, and the function that makes its operands."""

    name: str
    variant: str
    tokens: int
    out_features: int
    in_features: int
    work: Work
    prepare: Callable[[], Prepared]
    used_by: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def measure(section: str, case: Case, effort: Effort, ceilings: Ceilings) -> Measurement:
    """Check and time a case; what fails is told in the measurement. Raises only when the GPU is lost."""
    own = {one.name: getattr(case, one.name) for one in dataclasses.fields(case) if one.name != "prepare"}
    line = Measurement(section, floor_us=ceilings.floor_us(case.work), **own)
    try:
        with torch.no_grad():
            prepared = case.prepare()
            errors = prepared.check()
        timings, failures = time_together(prepared.contenders, effort)
    except Exception as error:  # a failing kernel is a line with its error, and the others are still measured
        free()
        return dataclasses.replace(line, failure=one_line(error))
    unchecked = "" if errors.checked else "its result was compared with nothing"
    failure = failures.pop(OURS, "") or errors.wrong() or unchecked
    details = case.details | ({"failed_baselines": failures} if failures else {})
    return dataclasses.replace(
        line, timings=timings, errors=errors, path=prepared.path, failure=failure, details=details
    )


class Baselines:
    """cuBLAS in BF16 and in FP8 at the shape `(O, I)`, over copies of random weights that are made once."""

    def __init__(self, out_features: int, in_features: int, effort: Effort) -> None:
        self.out_features, self.in_features, self.effort = out_features, in_features, effort

    @cached_property
    def _bf16(self) -> list[Tensor]:
        count = self.effort.copies(2 * self.out_features * self.in_features)
        return [operands.weight(self.out_features, self.in_features) for _ in range(count)]

    @cached_property
    def _fp8(self) -> list[Tensor]:
        count = self.effort.copies(self.out_features * self.in_features)
        return [operands.fp8_weight(self.out_features, self.in_features) for _ in range(count)]

    def contenders(self, inputs: list[Tensor]) -> dict[str, list[Call]]:
        """`F.linear` in BF16, and `torch._scaled_mm` of operands that are FP8 already, fast accumulation on."""
        fp8_inputs = [x.to(torch.float8_e4m3fn) for x in inputs]
        tokens = len(inputs[0])
        scales = {
            "scale_a": torch.ones(tokens, 1, device=operands.DEVICE),
            "scale_b": torch.ones(1, self.out_features, device=operands.DEVICE),
        }
        return {
            BF16: [partial(F.linear, x, w) for x, w in zip(cycle(inputs), self._bf16, strict=False)],
            FP8: [
                partial(scaled_mm, x, w, **scales, fast=True)
                for x, w in zip(cycle(fp8_inputs), self._fp8, strict=False)
            ],
        }


def scaled_mm(a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Tensor:
    """cuBLAS's product `(M, O)` in bfloat16 of FP8 operands `(M, I)` and `(O, I)`, a scale for each row of both."""
    return torch._scaled_mm(a, weight.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


def inputs_for(copies: int, tokens: int, in_features: int, effort: Effort) -> list[Tensor]:
    """Different inputs `(M, I)`: one for each copy of the weights, or so many that they do not fit the cache."""
    count = min(copies, effort.copies(2 * tokens * in_features))
    return [operands.activations(tokens, in_features) for _ in range(count)]


def each(function: Callable[..., object], *lists: Sequence[Any]) -> list[Call]:
    """Calls of a function on the lists' elements, as many as the longest has; shorter ones are begun again."""
    longest = max(len(one) for one in lists)
    rows = zip(*(islice(cycle(one), longest) for one in lists), strict=True)
    return [partial(function, *row) for row in rows]
