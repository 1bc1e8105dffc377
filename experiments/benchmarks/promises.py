"""What the project promises, measured on this machine: start-up times, the main job, GPTQ against RTN, the share of
activation fake-quantization in a layer's forward, and what the framework itself costs. Trials run in processes of
their own, as a user would start them.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import overhead, submission
from experiments.records import Record
from experiments.store import ResultStore, to_json, write_atomically

ONE_WORKER = ("hydra/launcher=local_parallel", "hydra.launcher.workers=1")
ROOT = Path(__file__).parent.parent.parent
MAIN_JOB = ("-m", "format=mxfp4,nvfp4", "transform=h,wush")
QUICK = (
    *("model=tiny_llama", "calibration.windows=2", "calibration.window_length=32"),
    *("evaluation.windows=2", "evaluation.window_length=32"),
)
OUT_FEATURES, IN_FEATURES, TOKENS, REPETITIONS = 1536, 576, 2048, 7


class BenchmarkError(RuntimeError):
    """A process that is measured did not end as it should; the message holds the end of its output."""


@dataclass(frozen=True)
class Measure:
    """A number, its unit, and the most it may be; a target of None is only stated."""

    what: str
    measured: float
    unit: str
    target: float | None

    @property
    def verdict(self) -> str:
        """`met`, `MISSED` or `stated`."""
        if self.target is None:
            return "stated"
        return "met" if self.measured <= self.target else "MISSED"


@dataclass(frozen=True)
class Process:
    """What an ended process took: wall time in seconds, and its peak resident memory in bytes."""

    seconds: float
    peak_bytes: int


def main(quick: bool, results: Path | None, output: Path | None) -> int:
    """Measure, print the table and write the JSON; exit code 1 for a process that failed, 2 for a folder in use."""
    if results and ResultStore(results).ids():
        print(f"--results {results}: trials are there already; give an empty folder", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as temporary:
            measures = measure(results or Path(temporary), QUICK if quick else ())
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    machine = _machine()
    _print(measures, machine)
    if output:
        found = [asdict(one) | {"verdict": one.verdict} for one in measures]
        write_atomically(output, to_json({"machine": machine, "quick": quick, "measures": found}))
    return 0


def measure(results: Path, overrides: tuple[str, ...]) -> list[Measure]:
    """Every number, in order; torch is imported last, as a process is charged its parent's memory."""
    own = (*overrides, f"results={results.absolute()}", "progress=none")
    start = _run("--help")
    wrong = _run("format=mxfp5", code=2)
    rtn = _run(*MAIN_JOB, *own, "keep_blocks=true")
    _run("format=mxfp4", "transform=wush", "algorithm=gptq", *own)
    store = ResultStore(results)
    saving = overhead.saving_share(store, _record(store, "rtn"))
    alone = overhead.seconds_a_trial(_seconds_of_run, ())
    parallel = overhead.seconds_a_trial(_seconds_of_run, ONE_WORKER)
    submitting = submission.seconds_to_submit()
    measures = [
        Measure("run.py --help", start.seconds, "s", 2),
        Measure("a config error", wrong.seconds, "s", 2),
        Measure("the main job: four RTN trials", rtn.seconds, "s", 300),
        Measure("the main job's peak memory", rtn.peak_bytes / 1e9, "GB", 6),
        Measure("a GPTQ trial against its RTN trial", _gptq_to_rtn(store), "x", 3),
        Measure("an empty trial, local", alone, "s", 0.3),
        Measure("an empty trial, local_parallel", parallel, "s", 0.3),
        Measure("saving decoder blocks in a trial", 100 * saving, "%", 2),
        Measure("fake-quantized activations in a forward", 100 * _activation_share(), "%", None),
    ]
    return measures + ([Measure("submitting 1,000 SLURM jobs", submitting, "s", 10)] if submitting is not None else [])


def _run(*arguments: str, code: int = 0) -> Process:
    """Run `run.py` to its end, which is to be the exit code `code`."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        started = time.perf_counter()
        command = [sys.executable, str(ROOT / "run.py"), *arguments]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != code:
            said.seek(0)
            end = "".join(said.readlines()[-10:])
            raise BenchmarkError(f"run.py {' '.join(arguments)}: exit code {process.returncode}, not {code}\n{end}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Process(seconds, usage.ru_maxrss * unit)


def _seconds_of_run(*arguments: str) -> float:
    return _run(*arguments).seconds


def _gptq_to_rtn(store: ResultStore) -> float:
    """Seconds of quantization and evaluation, GPTQ's over RTN's, of MXFP4 with WUSH."""
    return _seconds(_record(store, "gptq")) / _seconds(_record(store, "rtn"))


def _record(store: ResultStore, algorithm: str) -> Record:
    """The record of MXFP4 with WUSH by an algorithm."""
    wanted = {"format": "mxfp4", "transform": "wush", "algorithm": algorithm}
    found = (record for trial_id in store.ids() if (record := store.record(trial_id)))
    return next(record for record in found if wanted.items() <= record.choices.items())


def _seconds(record: Record) -> float:
    return record.stages["quantize"].seconds + record.stages["evaluate"].seconds


def _activation_share() -> float:
    """The part of a `QuantLinear`'s forward that rounds its transformed input, MXFP4 with WUSH."""
    import torch

    import wush
    from wush.transforms import apply_blocks

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN_FEATURES, generator=generator)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator)
    moment = wush.SecondMoment(IN_FEATURES)
    moment.add(x)
    layer = wush.QuantLinear(wush.Rtn().quantize_weight(weight, moment, wush.Wush(), wush.MXFP4), wush.MXFP4)
    transform = layer.transform
    assert transform is not None
    with torch.no_grad():
        forward = _median_seconds(lambda: layer(x))
        quantized = _median_seconds(lambda: layer.format.round_trip(apply_blocks(x, transform)))
        transformed = _median_seconds(lambda: apply_blocks(x, transform))
    return (quantized - transformed) / forward


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    found = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return median(found)


def _machine() -> dict[str, Any]:
    from experiments.environment import describe

    found = describe("cpu")
    return {key: found[key] for key in ("processor", "cores", "threads", "git_commit")} | {
        "torch": found["versions"]["torch"]
    }


def _print(measures: list[Measure], machine: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "measured", "target", ""):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for one in measures:
        target = "-" if one.target is None else f"{one.target:g} {one.unit}"
        style = "red" if one.verdict == "MISSED" else None
        table.add_row(one.what, f"{one.measured:.2f} {one.unit}", target, one.verdict, style=style)
    console = Console()
    console.print(table)
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}", highlight=False, markup=False
    )
