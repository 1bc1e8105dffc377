"""What a kernel, a layer or a model took against its baselines: the unit of a benchmark's record, and its arithmetic.

Legend: `M` tokens, `O` output features (0 where a kernel has none), `I` input features. Times are microseconds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

OURS, HADAMARD, BF16, FP8, ADDMM = "ours", "hadamard", "bf16", "fp8", "addmm"
Rate = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was measured to do at most: a large copy, read and written bytes counted, and large products.

    `read_gbs`: the fastest that any product of the record read its weight, or 0 where none is known; a memory reads
    faster than it copies.
    """

    copy_gbs: float
    bf16_tflops: float
    fp8_tflops: float
    read_gbs: float = 0.0

    def of(self, one: "Measurement") -> "Ceilings":
        """Those of a measurement: the bytes of a product or of a model are nearly all read."""
        reads = bool(one.out_features) or one.section == "model"
        return replace(self, copy_gbs=max(self.copy_gbs, self.read_gbs)) if reads else self

    def floor_us(self, work: "Work") -> float:
        """The time below which no kernel does this work: its bytes' or its operations', whichever is larger."""
        return max(self.bytes_us(work), self.flops_us(work))

    def bytes_us(self, work: "Work") -> float:
        """The time of the work's bytes at the rate of the copy."""
        return work.bytes / self.copy_gbs / 1e3

    def flops_us(self, work: "Work") -> float:
        """The time of the work's operations on the tensor cores that it may use."""
        return work.flops / (self.fp8_tflops if work.rate == "fp8" else self.bf16_tflops) / 1e6


@dataclass(frozen=True)
class Work:
    """The fewest bytes through device memory, floating-point operations, and the tensor cores that may do these."""

    bytes: float
    flops: float = 0.0
    rate: Rate = "bf16"


@dataclass(frozen=True)
class Timing:
    """One call: the median over replays of a CUDA graph of calls on cold copies, the extremes, `do_bench`'s median."""

    us: float
    fastest: float
    slowest: float
    calls: int
    do_bench: float | None = None


@dataclass(frozen=True)
class Errors:
    """Against the reference: the share of codes and scales that differ, `|out - ref| / |ref|` of the norms, and the
    largest `|out - ref|` over the largest `|ref|`; None where it does not apply. `limit` bounds the first two.
    `what` was compared, where a line compares several things.
    """

    mismatched: float | None = None
    relative: float | None = None
    largest: float | None = None
    limit: float = 0.0
    what: str = ""

    @property
    def checked(self) -> bool:
        """Whether anything was compared."""
        return self.mismatched is not None or self.relative is not None

    def wrong(self) -> str:
        """What is over its limit, or not a number; empty when all is right."""
        for name, value in (("mismatched codes", self.mismatched), ("relative error", self.relative)):
            if value is not None and not value <= self.limit:
                of = f" of {self.what}" if self.what else ""
                return f"wrong: {name}{of} {value:.2g}, at most {self.limit:.2g} expected"
        return ""


def worst(found: Iterable[Errors]) -> Errors:
    """Of several relative errors, the one that is largest against its limit; one that is not a number is the worst."""
    return max(found, key=lambda one: math.inf if one.relative is None or one.relative != one.relative
               else one.relative / one.limit)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One line of a record; `timings` are those that could be taken, `failure` says what went wrong, if anything.

    `path`: what ran, as the dispatch says. `floor_us`: see `Ceilings.floor_us`. `used_by`: the models' linears.
    """

    section: str
    name: str
    variant: str
    tokens: int
    out_features: int
    in_features: int
    work: Work
    floor_us: float = 0.0
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: Errors = Errors()
    failure: str = ""
    path: str = ""
    used_by: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def us(self) -> float | None:
        """Microseconds a call of ours."""
        return self.timings[OURS].us if OURS in self.timings else None

    @property
    def shape(self) -> str:
        """`M x I`, or `M x O x I` of a product."""
        sizes = (self.tokens, self.out_features, self.in_features)
        return " x ".join(f"{size}" for size in sizes if size)

    @property
    def label(self) -> str:
        """The line in a sentence."""
        return f"{self.name} {self.variant} {self.shape}".strip()

    def ratio(self, baseline: str) -> float | None:
        """How many times faster than a baseline."""
        return self.timings[baseline].us / self.us if self.us and baseline in self.timings else None

    @property
    def gbs(self) -> float | None:
        """Gigabytes a second, of the fewest bytes."""
        return self.work.bytes / self.us / 1e3 if self.us else None

    @property
    def tflops(self) -> float | None:
        """Teraflops, 10^12 operations a second; None for a kernel that has none to speak of."""
        return self.work.flops / self.us / 1e6 if self.us and self.work.flops else None

    @property
    def roofline(self) -> float | None:
        """The share of the roofline: the floor over the time."""
        return self.floor_us / self.us if self.us else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second."""
        return self.tokens * 1e6 / self.us if self.us else None


def measurement_from(state: dict[str, Any]) -> Measurement:
    """The measurement whose `dataclasses.asdict`, perhaps read from JSON, this is."""
    timings = {name: Timing(**timing) for name, timing in state["timings"].items()}
    own = {"work": Work(**state["work"]), "errors": Errors(**state["errors"]), "timings": timings}
    return Measurement(**(state | own | {"used_by": tuple(state["used_by"])}))
