"""README's numbers of time: what kernels take on a GPU, and what `make bench` measured of the project itself."""

import json
from pathlib import Path

from plots import figure2
from plots.reference import Speedup, Unreadable, read
from plots.style import Absent
from wush_kernels.bench.measurement import BF16, Measurement
from wush_kernels.bench.record import RESULTS, Record

PROMISES = Path(__file__).parents[1] / "experiments" / "benchmarks" / "promises.json"
MAKE = "make bench ARGS='--output experiments/benchmarks/promises.json'"
BLOCK, ONCE, REFITTED = "decoder block", "GPTQ + WUSH", "refit"
NOT_MEASURED = "not measured"


def kernels() -> str:
    """Quantizing a decoder block, a whole model, and WUSH against Hadamard, by the newest record of a GPU."""
    record = figure2.newest(RESULTS)
    if record is None:
        raise Absent("no record of a GPU; make one with make kernels-bench")
    once, refitted = (_seconds(record, variant) for variant in (ONCE, REFITTED))
    prefill, decode = (_ratio(record, name) for name in ("prefill", "decode"))
    gap = figure2.behind(figure2.measured(record, read(Speedup)).series)
    behind = NOT_MEASURED if gap is None else f"{gap:.1%} slower"
    versions = f"torch {record.environment['torch'].partition('+')[0]}, Triton {record.environment['triton']}"
    return (
        "| what | measured |\n|---|---:|\n"
        f"| GPTQ + WUSH of the linears of a Llama-3.1-8B decoder block, fitted once | {once} |\n"
        f"| the same, refitted | {refitted} |\n"
        f"| 8B-shaped model in MXFP4 over BF16, compiled, prefill of 4 x 2,048 tokens | {prefill} |\n"
        f"| 8B-shaped model in MXFP4 over BF16, compiled, decode of one sequence | {decode} |\n"
        f"| MXFP4 layers with WUSH against one Hadamard matrix, M = 1,024 | {behind} |\n\n"
        f"{record.environment['gpu']}, {versions}, record of {record.environment['date'][:10]}."
    )


def promises(path: Path | None = None) -> str:
    """What `make bench` measured; raises `Absent` without its record, `Unreadable` for a file that is none."""
    source = path or PROMISES
    if not source.is_file():
        raise Absent(f"{source}: not there; make it with {MAKE}")
    try:
        content = json.loads(source.read_text())
        machine = content["machine"]
        rows = [
            (one["what"], one["measured"], one["unit"], one["target"], one["verdict"]) for one in content["measures"]
        ]
        lines = [f"| {what} | {_measured(value, unit)} | {_target(target, unit)} | {verdict} |"
                 for what, value, unit, target, verdict in rows]  # fmt: skip
        where = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch'].partition('+')[0]}."
    except (ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"{source}: no record of make bench: {error!r}; make it with {MAKE}") from error
    return "\n".join(["| what | measured | target | |", "|---|---:|---:|---|", *lines, "", where])


def _measured(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}"


def _target(target: float | None, unit: str) -> str:
    return "-" if target is None else f"{target:g} {unit}"


def _line(record: Record, section: str, name: str, variant: str) -> Measurement | None:
    found = [one for one in record.of(section) if (one.name, one.variant) == (name, variant) and not one.failure]
    return next(iter(found), None)


def _seconds(record: Record, variant: str) -> str:
    one = _line(record, "quantizer", BLOCK, variant)
    return f"{one.us / 1e6:.2f} s" if one and one.us else NOT_MEASURED


def _ratio(record: Record, name: str) -> str:
    one = _line(record, "model", name, "mxfp4 compiled")
    ratio = one.ratio(BF16) if one else None
    return f"{ratio:.2f}x" if ratio else NOT_MEASURED
