"""`python -m experiments show TRIAL`: look at a trial again, by its id or the first digits of it.

`python -m experiments bench`: measure what the project promises, on this machine.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from experiments.benchmarks import promises
from experiments.records import Record
from experiments.schema import ConfigError
from experiments.store import DamagedRecord, ResultStore
from experiments.views.display import duration
from experiments.views.summary import shown


def main() -> int:
    """Run the command line; the exit code is 2 for a trial that is not there."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Look at recorded trials, or measure.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="a trial's metrics, costs, worst decoder blocks and config")
    show.add_argument("trial", help="a trial's id, or the first digits of it")
    show.add_argument("--results", default="results", help="the folder of the result store (default: results)")
    bench = commands.add_parser("bench", help="times, memory and ratios of this checkout on this machine")
    bench.add_argument("--quick", action="store_true", help="a tiny random model in place of the embedded one")
    bench.add_argument("--results", type=Path, help="keep the trials in this empty folder (default: a temporary one)")
    bench.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.command == "bench":
        return promises.main(arguments.quick, arguments.results, arguments.output)
    return show_trial(ResultStore(arguments.results), arguments.trial)


def show_trial(store: ResultStore, prefix: str) -> int:
    """Print one trial; the exit code."""
    ids = store.ids(prefix)
    if len(ids) != 1:
        known = ", ".join(ids or store.ids()) or "none"
        what = "several trials begin" if ids else "no trial begins"
        print(f"{what} with {prefix!r} in {shown(store.root)}; there are: {known}", file=sys.stderr)
        return 2
    try:
        record = store.record(ids[0])
    except (DamagedRecord, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    failure, console = store.failure(ids[0]), Console()
    folder = shown(store.trial(ids[0]))
    if record is not None:
        _print_record(console, record)
    elif failure is not None:
        reason = escape(failure.reason)
        console.print(f"[bold red]failed[/] on {failure.host} at {failure.failed_at:%Y-%m-%d %H:%M} UTC: {reason}")
    else:
        console.print("not finished")
    console.print(f"files: {folder}", highlight=False)
    return 0


def _print_record(console: Console, record: Record) -> None:
    metrics = record.metrics
    console.print(Syntax(_yaml(record), "yaml", background_color="default", word_wrap=True))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("perplexity", f"{metrics.perplexity:.4f} (original {metrics.perplexity_original:.4f})"),
        ("KL", f"{metrics.kl:.5f} nats"),
        ("top-1", f"{100 * metrics.top1:.2f}%"),
        ("predictions", f"{metrics.predictions:,}"),
        ("bits a weight", f"{metrics.bits_per_weight:.3f}"),
        *((f"{name} took", _cost(record, name)) for name in record.stages),
        ("worst blocks", _worst(record)),
        ("ran on", f"{record.environment.get('host')}, {record.environment.get('device')}"),
        ("at", f"{record.started_at:%Y-%m-%d %H:%M} UTC, commit {record.git_commit or 'unknown'}"),
        *(("warning", warning) for warning in record.warnings),
        *(("skipped", f"{layer}: {reason}") for layer, reason in record.skipped.items()),
    ):
        table.add_row(name, escape(value))
    console.print(table)


def _yaml(record: Record) -> str:
    import yaml

    return yaml.safe_dump(record.config, sort_keys=False)


def _cost(record: Record, name: str) -> str:
    stage = record.stages[name]
    sizes = [(stage.peak_memory_bytes, "memory"), (stage.peak_gpu_memory_bytes, "GPU memory")]
    return ", ".join(
        [duration(stage.seconds), *(f"{size / 2**30:.1f} GiB of {what}" for size, what in sizes if size is not None)]
    )


def _worst(record: Record) -> str:
    worst = sorted(record.blocks, key=lambda block: -block.relative_mse)[:3]
    return ", ".join(f"{block.name} ({block.relative_mse:.2e})" for block in worst) or "none: not quantized"


if __name__ == "__main__":
    sys.exit(main())
