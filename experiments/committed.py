"""Every committed record in one go: `python -m experiments.committed [NAME ...] [KEY=VALUE ...]`, or `make records`.

Runs the main job, what README says beside it and each experiment at its small scale, where finished trials are not run
again, and copies their records to plots/asides/NAME or plots/records/NAME. `--check` copies nothing, and says which
committed records are missing, of no trial that is run today, or other than fresh ones. Exit codes: 0 all made or alike,
1 some are not, 2 the command is wrong.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from experiments import commands
from experiments.commands import CONF
from experiments.records import Record
from experiments.store import ResultStore
from wush.intervals import Interval, Metric, of_documents, of_metric, value

PLOTS = CONF.parent / "plots"
RUN = CONF.parent / "run.py"
# Tables 3, 6 and 7 have no records of their own: their small scales are trials of Tables 2 and 4.
EXPERIMENTS = ("table1", "table2", "table4", "table5", "figure3", "layers")
SIGNS = "transform.signs=0,1,2,3,4"
SWEEPS: Final[dict[str, tuple[str, ...]]] = {
    "main": ("format=mxfp4,nvfp4", "transform=h,wush"),
    "share": ("format=mxfp4,nvfp4", "transform=wush", "transform.share=false,true", SIGNS),
    "refit": ("format=mxfp4", "transform=wush", "algorithm=gptq", "transform.refit=true,false", SIGNS),
    **{name: (f"experiment={name}", "scale=small") for name in EXPERIMENTS},
}
METRICS: tuple[Metric, ...] = ("kl", "perplexity", "top1")
ROUNDING = 1e-9  # of sums over windows
# Of losses, which have no interval: a CPU and a GPU differ by up to 0.07% in the first block that is quantized. Those
# behind it get what it makes of their inputs, and differ by tens of percent.
LOSS_TOLERANCE = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    asked = _parser().parse_args(arguments)
    names = [word for word in asked.words if "=" not in word]
    unknown = [name for name in names if name not in SWEEPS]
    if unknown:
        print(f"no records of {', '.join(unknown)}; choose from {', '.join(SWEEPS)}", file=sys.stderr)
        return 2
    overrides = [word for word in asked.words if "=" in word]
    done = [_one(name, overrides, asked.results, asked.check) for name in names or SWEEPS]
    return max(done)


def _one(name: str, overrides: Sequence[str], results: Path, check: bool) -> int:
    sweep = f"records-{name}"
    places = (f"sweep={sweep}", f"results={results}")
    code = subprocess.run([sys.executable, RUN, "-m", *SWEEPS[name], *places, *overrides], check=False).returncode
    if code:
        print(f"{name}: not all of its trials are done; go on with the same command", file=sys.stderr)
        return code
    store = ResultStore(results)
    fresh, folder = _fresh(store, sweep), folder_of(name)
    if check:
        found = list(differences(_committed(folder), fresh))
        print("\n".join(f"{name}: {one}" for one in found) or f"{name}: {len(fresh)} records alike")
        return 1 if found else 0
    commands.export(store, sweep, folder)
    for path in folder.glob("*.json"):
        if path.stem not in fresh:
            path.unlink()
            print(f"{name}: {path.name} removed, of no trial that is run today")
    return 0


def folder_of(name: str) -> Path:
    """Where the records of a sweep are kept."""
    return PLOTS / ("records" if name in EXPERIMENTS else "asides") / name


def differences(committed: Mapping[str, Record], fresh: Mapping[str, Record]) -> Iterator[str]:
    """A line for each record that is missing, stale, or has a number that is not in the committed one's interval."""
    for trial_id in sorted(fresh.keys() - committed.keys()):
        yield f"{trial_id}: missing"
    for trial_id in sorted(committed.keys() - fresh.keys()):
        yield f"{trial_id}: stale, of no trial that is run today"
    for trial_id in sorted(committed.keys() & fresh.keys()):
        for what, interval, number in _measured(committed[trial_id], fresh[trial_id]):
            if not interval.low - ROUNDING <= number <= interval.high + ROUNDING:
                yield f"{trial_id}: {what} is {number:.6g} now, outside {interval.low:.6g} to {interval.high:.6g}"


def _measured(committed: Record, fresh: Record) -> Iterator[tuple[str, Interval, float]]:
    """What both records have: the committed one's interval, and the fresh number."""
    if committed.windows and fresh.windows:
        for metric in METRICS:
            if interval := of_metric(committed.windows, metric):
                yield metric, interval, value(fresh.windows, metric)
    for name, task in committed.tasks.items():
        # Of several runs an outcome is another each time, so it is the first that counts.
        if name in fresh.tasks and (interval := of_documents(task.runs[0].outcomes)):
            yield f"{name}, {task.metric}", interval, fresh.tasks[name].runs[0].values[task.metric]
    ours, theirs = _first_losses(committed), _first_losses(fresh)
    for name in ours.keys() & theirs.keys():
        margin = LOSS_TOLERANCE * ours[name]
        yield name, Interval(ours[name] - margin, ours[name] + margin), theirs[name]


def _first_losses(record: Record) -> dict[str, float]:
    """The relative losses of the linears of the first quantized block, by name."""
    if not record.blocks:
        return {}
    block = min(record.blocks, key=lambda block: block.index)
    return {f"loss of {block.name}.{one.name}": one.loss.relative for one in block.layers if one.loss}


def _fresh(store: ResultStore, sweep: str) -> dict[str, Record]:
    trials = commands.find(store, sweep)[0].trials
    return {trial.trial_id: record for trial in trials if (record := store.finished(trial.trial_id))}


def _committed(folder: Path) -> dict[str, Record]:
    """By the file's name; a file that holds no record counts as missing, and is said to be."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = Record.model_validate_json(path.read_bytes())
        except ValidationError as error:
            print(f"{path}: holds no record: {error.errors()[0]['msg']}", file=sys.stderr)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.committed", description=__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="NAME|KEY=VALUE",
        help=f"which: {', '.join(SWEEPS)} (default: all); keys of run.py, such as device=cpu",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="compare instead of copying")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help="default: results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
