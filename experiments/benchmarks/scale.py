"""What a sweep costs apart from its trials, against the number of these: composing, planning, reading, table, report.

All but a thousandth of the trials are done, with records of the shape and size that SmolLM2-135M leaves (30 decoder
blocks). Each size is measured in a process of its own, from the overrides a user types to the files on disk.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments import plans
from experiments.records import Block, BlockError, Data, Layer, Metrics, Record, Stage, Windows, now
from experiments.standing import Standing
from experiments.store import to_json, write_atomically
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views.summary import show_table, write_report, write_table
from wush.version import METHOD_VERSION

ROOT = Path(__file__).parent.parent.parent
SIZES = (100, 1_000, 10_000)
MOST_SECONDS, MOST_BYTES, MOST_HTML_BYTES = 10.0, 1e9, 10e6
STEPS = ("compose", "plan", "read", "table", "report")
# The linears of a decoder block of SmolLM2-135M: those that share an input, and the weights of each.
LAYERS = (
    {"self_attn.q_proj": 331776, "self_attn.k_proj": 110592, "self_attn.v_proj": 110592},
    {"self_attn.o_proj": 331776},
    {"mlp.gate_proj": 884736, "mlp.up_proj": 884736},
    {"mlp.down_proj": 884736},
)


@dataclass(frozen=True)
class Cost:
    """Of a sweep of so many trials: seconds of each step and of the whole process, and bytes."""

    trials: int
    seconds: dict[str, float]
    html_bytes: int
    total_seconds: float = 0.0
    peak_bytes: int = 0

    def missed(self) -> list[str]:
        """The columns that are over their target."""
        over = {
            "total": self.total_seconds > MOST_SECONDS,
            "peak memory": self.peak_bytes > MOST_BYTES,
            "HTML": self.html_bytes > MOST_HTML_BYTES,
        }
        return [column for column, is_over in over.items() if is_over]


def main(sizes: Sequence[int] = SIZES, output: Path | None = None) -> int:
    """Measure each size, print the table and write the JSON; the exit code."""
    costs = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            _process("write", size, folder)
            costs.append(_process("measure", size, folder))
    _print([cost for cost in costs if cost])
    if output:
        found = [asdict(cost) | {"missed": cost.missed()} for cost in costs if cost]
        write_atomically(output, to_json({"cores": os.cpu_count(), "costs": found}))
    return 0


def arguments(trials: int) -> list[str]:
    """Overrides that make so many different trials, a multiple of 20."""
    algorithms = ("rtn", "gptq") if trials % 40 == 0 else ("rtn",)
    return [
        "format=mxfp4,nvfp4,int4,mxfp8",
        "transform=h,i,wus,wush,r",
        f"algorithm={','.join(algorithms)}",
        f"seed=range(0,{trials // (20 * len(algorithms))})",
    ]


def write_records(trials: int, results: Path) -> None:
    """Write the records of all but a thousandth of the trials, and of one at least, as the trials would."""
    sweep = _planned(trials, results, {})
    tails = [_tail(1 + k / 10) for k in range(16)]
    for i, trial in enumerate(sweep.trials[: trials - max(1, trials // 1000)]):
        folder = sweep.store.trial(trial.trial_id)
        folder.mkdir(parents=True)
        head = json.dumps(_head(trial, i / trials), indent=2)
        (folder / "result.json").write_text(f"{head[:-2]},\n{tails[i % 16][2:]}\n")


def measure(trials: int, results: Path) -> Cost:
    """The cost of a sweep whose records are there, in this process."""
    seconds: dict[str, float] = {}
    sweep = _planned(trials, results, seconds)
    folder = sweep.store.sweep(sweep.name)
    with _timed(seconds, "read"):
        outcomes = Standing(sweep, mend=True).look()
    with _timed(seconds, "table"):
        show_table(Console(file=io.StringIO(), width=160), sweep.name, outcomes, folder)
        write_table(sweep.name, outcomes, sweep.store)
    with _timed(seconds, "report"):
        write_report(sweep.name, outcomes, sweep.store)
    return Cost(len(outcomes), seconds, (folder / "report.html").stat().st_size)


def _planned(trials: int, results: Path, seconds: dict[str, float]) -> Sweep:
    """The sweep as `run.py -m` plans it, its plan written."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import experiments.launch.plugins  # noqa: F401
    from experiments import sweep
    from experiments.launch import grid

    overrides = arguments(trials)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), _timed(seconds, "compose"):
        loader = GlobalHydra.instance().config_loader()
        master = compose("config", return_hydra_config=True)
        lists = grid.combinations([*overrides, f"results={results}"], loader)
        composed, problems = grid.compose(loader, master, lists)
    with _timed(seconds, "plan"):
        planned = sweep.plan(composed, overrides, problems)
        plans.save(planned, {})
    return planned


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started


def _process(what: str, trials: int, folder: str) -> Cost | None:
    """Do one of this module's two jobs in a process of its own; the cost it measured, with that of the process."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "experiments.benchmarks.scale", what, str(trials), folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    total = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    if what == "write":
        return None
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(**{**json.loads(said), "total_seconds": total, "peak_bytes": peak})


def _head(trial: Trial, place: float) -> dict[str, Any]:
    """The part of a record that is a trial's own; the metrics depend on its place among the trials."""
    record = _record(1.0)
    perplexity = 15 + 40 * (place * 7 % 1)
    metrics = record.metrics.model_copy(update={"perplexity": perplexity, "kl": (perplexity - 14) / 50})
    whole = {"trial_id": trial.trial_id, "choices": trial.choices, "config": trial.config}
    return {"schema_version": record.schema_version, "status": "done", **whole, "metrics": metrics.model_dump()}


def _tail(level: float) -> str:
    """The rest of a record, as JSON."""
    own = {"schema_version", "status", "trial_id", "choices", "config", "metrics"}
    return json.dumps(_record(level).model_dump(mode="json", exclude=own), indent=2)


def _record(level: float) -> Record:
    """A record like those of SmolLM2-135M, with block errors in proportion to `level`."""
    stages = dict.fromkeys(("load", "original", "quantize", "evaluate"), 90.0)
    return Record(
        trial_id="",
        choices={},
        config={},
        metrics=Metrics(
            perplexity=17.66, perplexity_original=14.05, kl=0.227, top1=0.76, bits_per_weight=5.22, predictions=8176
        ),
        windows=_windows(level),
        blocks=[_block(i, level) for i in range(30)],
        skipped={"lm_head": "excluded: the output head stays as it is"},
        stages={
            name: Stage(seconds=s, peak_memory_bytes=2**31, peak_gpu_memory_bytes=None) for name, s in stages.items()
        },
        data={
            name: Data(text_sha256="a" * 64, ids_sha256="b" * 64, tokens=8192) for name in ("calibration", "evaluation")
        },
        seed=0,
        warnings=[],
        versions={"python": "3.11.7", "torch": "2.11.0", "transformers": "5.17.0", "wush": "0.1.0"},
        git_commit="0" * 40,
        model_revision=None,
        method_version=METHOD_VERSION,
        environment={"host": "node-1", "platform": "Linux", "processor": "CPU", "cores": 2, "device": "cpu"},
        started_at=now(),
        finished_at=now(),
    )


def _windows(level: float) -> Windows:
    """Sums of 12 windows that scatter as those of a text do."""
    swing = [0.8 + 0.4 * (k * 5 % 12) / 11 for k in range(12)]
    return Windows(
        nll=[511 * 2.8713645577 * one for one in swing],
        nll_original=[511 * 2.6425871234 * one for one in swing],
        kl=[511 * 0.2271234567 * one * level for one in swing],
        agree=[round(511 * 0.76 / one) for one in swing],
        predictions=[511] * 12,
    )


def _block(index: int, level: float) -> Block:
    layers = [
        Layer(name=name, shared_input=list(group), bits_per_weight=5.388888888888889, weights=weights)
        for group in LAYERS
        for name, weights in group.items()
    ]
    error = level * 0.012975545558101511 / (1 + index)
    errors = {"calibration": BlockError(mse=error * 3.7, relative=error)}
    errors["held_out"] = BlockError(mse=error * 4.1, relative=error * 1.1)
    return Block(index=index, name=f"model.layers.{index}", **errors, seconds=1.3, layers=layers)


def _print(costs: Sequence[Cost]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = ("trials", *STEPS, "total", "peak memory", "HTML", "")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for cost in costs:
        missed = cost.missed()
        table.add_row(
            f"{cost.trials:,}",
            *(f"{cost.seconds[step]:.2f} s" for step in STEPS),
            f"{cost.total_seconds:.2f} s",
            f"{cost.peak_bytes / 1e6:.0f} MB",
            f"{cost.html_bytes / 1e6:.1f} MB",
            f"MISSED: {', '.join(missed)}" if missed else "met",
            style="red" if missed else None,
        )
    targets = f"{MOST_SECONDS:.0f} s", f"{MOST_BYTES / 1e6:.0f} MB", f"{MOST_HTML_BYTES / 1e6:.0f} MB"
    table.add_row("target", *("" for _ in STEPS), *targets, "")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    console.print(f"{os.cpu_count()} cores; total: the whole process, its start included; records in the page cache")


if __name__ == "__main__":
    job, count, place = sys.argv[1:]
    if job == "write":
        write_records(int(count), Path(place))
    else:
        print(json.dumps(asdict(measure(int(count), Path(place)))))
