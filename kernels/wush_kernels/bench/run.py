"""One run on one GPU: ceilings, then section by section, each line shown and saved as soon as it is measured."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from wush_kernels.bench import promises, report
from wush_kernels.bench.measurement import ADDMM, BF16, FP8, OURS, Ceilings, Errors, Measurement, Timing, Work
from wush_kernels.bench.promises import GPTQ_WUSH, REFIT
from wush_kernels.bench.record import Record, default_path, describe_environment, save
from wush_kernels.bench.shapes import MODELS
from wush_kernels.bench.timing import QUICK, Effort, free, one_line, time_together

SECTIONS = ("kernels", "layers", "model", "quantizer")
QUICK_SECTIONS = SECTIONS[:3]
QUICK_MODELS = ("llama3_1_70b",)
RTN_LOSS = 0.05  # relative squared error of outputs in MXFP4: the format's own is 0.014


@dataclass(frozen=True)
class Options:
    """What to measure, how thoroughly, and where the record goes (None: the checkout's folder of results)."""

    models: Sequence[str] = tuple(MODELS)
    sections: Sequence[str] = SECTIONS
    quick: bool = False
    output: Path | None = None


def run(options: Options) -> int:
    """Measure, show and save; exit code 1 when anything failed, 2 without a GPU."""
    console = report.console()
    reason = why_no_gpu()
    if reason:
        Console(stderr=True, highlight=False).print(f"The benchmark needs a CUDA GPU: {reason}.", markup=False)
        return 2
    environment = describe_environment()
    path = options.output or default_path(environment, options.quick)
    settings = {"models": list(options.models), "sections": list(options.sections), "quick": options.quick}
    record = Record(environment, settings, measure_ceilings(options.quick))
    console.print(report.header(record), markup=False)
    for section in options.sections:
        if not _run_section(section, options, record, path, console):
            break
    else:
        record.finished = True
    record.settle()
    _save(record, path)
    for part in report.summary(record):
        console.print(part)
    console.print(f"seconds: {', '.join(f'{name} {took:.0f}' for name, took in record.sections.items())}")
    console.print(f"record: {path}" if path else "no record was written: give --output PATH", markup=False)
    return 1 if record.failed() else 0


def why_no_gpu() -> str | None:
    """Why nothing can be measured here, None when it can."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds none on this machine"
    from wush_kernels.support import why_not

    return why_not(torch.device("cuda", 0))


def measure_ceilings(quick: bool) -> Ceilings:
    """The rates of a 1 GiB copy, and of 8192^3 products of cuBLAS in BF16 and in FP8 with fast accumulation."""
    import torch

    from wush_kernels.bench.cases import Baselines, inputs_for

    effort, size = dataclasses.replace(QUICK if quick else Effort(), do_bench_ms=0), 8192
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    products = Baselines(size, size, effort).contenders(inputs_for(2, size, size, effort))
    timings, failures = time_together({"copy": [lambda: target.copy_(source)], **products}, effort)
    if failures:
        raise RuntimeError(f"the ceilings cannot be measured: {failures}")
    operations = 2.0 * size**3
    rates = {name: operations / timings[name].us / 1e6 for name in (BF16, FP8)}
    return Ceilings(2 * (1 << 30) / timings["copy"].us / 1e3, rates[BF16], rates[FP8])


def _run_section(section: str, options: Options, record: Record, path: Path | None, console: Console) -> bool:
    """Measure a section and save it; lines that belong together are shown as one table once they are done.

    False when the GPU is lost to this process, and nothing more can be measured.
    """
    started = time.perf_counter()
    console.rule(section, align="left")
    try:
        for title, group in itertools.groupby(MEASURERS[section](options, record.ceilings), key=_title):
            own = []
            for one in group:
                own.append(one)
                record.measurements.append(one)
            for part in report.lines(title, own):
                console.print(part)
            _save(record, path)
        alive = True
    except Exception as error:  # what no line could be made of: an import that fails, a GPU that is lost
        console.print_exception()
        record.measurements.append(Measurement(section, "", "", 0, 0, 0, Work(0), failure=one_line(error)))
        alive = _alive()
    record.sections[section] = round(time.perf_counter() - started, 1)
    _save(record, path)
    return alive


def _alive() -> bool:
    """Whether the GPU still works for this process."""
    try:
        free()
    except RuntimeError:
        return False
    return True


def _title(one: Measurement) -> str:
    """What the lines of one table share."""
    if one.section == "layers":
        return f"{one.out_features} x {one.in_features}: {', '.join(one.used_by)}"
    return one.name


def _save(record: Record, path: Path | None) -> None:
    if path:
        outcomes = promises.outcomes(record)
        save(record, path, [_promise(one) for one in outcomes])


def _promise(one: promises.Outcome) -> dict[str, object]:
    state = {"name": one.promise.name, "target": one.promise.target}
    return state | {key: getattr(one, key) for key in ("verdict", "measured", "where", "roofline")}


def _kernels(options: Options, ceilings: Ceilings) -> Iterator[Measurement]:
    from wush_kernels.bench import kernels
    from wush_kernels.bench.cases import measure

    effort = QUICK if options.quick else Effort()
    for case in kernels.cases(effort, options.quick):
        yield measure("kernels", case, effort, ceilings)


def _layers(options: Options, ceilings: Ceilings) -> Iterator[Measurement]:
    from wush_kernels.bench import layers
    from wush_kernels.bench.cases import measure

    effort = QUICK if options.quick else Effort()
    for case in layers.cases(options.models, effort, options.quick):
        yield measure("layers", case, effort, ceilings)


def _model(options: Options, ceilings: Ceilings) -> Iterator[Measurement]:
    from wush_kernels.bench import model
    from wush_kernels.bench.cases import measure

    effort = Effort(rounds=3 if options.quick else 5, reading_us=0.0, do_bench_ms=0)
    for case in model.cases(options.quick):
        yield measure("model", case, effort, ceilings)


def _quantizer(options: Options, ceilings: Ceilings) -> Iterator[Measurement]:
    from wush_kernels.bench.quantizer import measure_block

    line = Measurement("quantizer", "decoder block", GPTQ_WUSH, 0, 0, 0, Work(0))
    try:
        found = measure_block(MODELS["llama3_1_8b"])
    except Exception as error:  # as every kernel: a line with its error
        free()
        for variant in (GPTQ_WUSH, REFIT):
            yield dataclasses.replace(line, variant=variant, failure=one_line(error))
        return
    yield _stage(line, "seconds", GPTQ_WUSH, found, details=found)
    for key in (key for key in found if key.startswith("seconds_")):
        yield _stage(line, key, key.removeprefix("seconds_"), found)
    moments = {OURS: _seconds(found, "moments_seconds"), ADDMM: _seconds(found, "moments_seconds_addmm")}
    yield dataclasses.replace(line, variant="second moments", tokens=found["tokens"], timings=moments)


def _stage(line: Measurement, key: str, variant: str, found: dict[str, Any], **more: Any) -> Measurement:
    """A stage's time and its relative error, of GPTQ at most that of rounding to nearest."""
    limit = found["loss_rtn"] if key != "seconds_rtn" else RTN_LOSS
    errors = Errors(relative=found[key.replace("seconds", "loss")], limit=limit, what="the outputs")
    own = {"timings": {OURS: _seconds(found, key)}, "errors": errors, "failure": errors.wrong(), **more}
    return dataclasses.replace(line, variant=variant, **own)


def _seconds(found: dict[str, Any], key: str) -> Timing:
    runs = [1e6 * seconds for seconds in found["runs"][key]]
    return Timing(1e6 * found[key], min(runs), max(runs), 1)


MEASURERS: dict[str, Callable[[Options, Ceilings], Iterator[Measurement]]] = {
    "kernels": _kernels,
    "layers": _layers,
    "model": _model,
    "quantizer": _quantizer,
}
