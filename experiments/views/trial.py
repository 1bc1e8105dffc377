"""One trial on the terminal: its metrics, costs, worst decoder blocks and config."""

import sys

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from experiments.records import Record
from experiments.schema import ConfigError
from experiments.store import DamagedRecord, ResultStore
from experiments.views.display import duration
from experiments.views.summary import shown
from experiments.views.values import PLUS_MINUS, facts


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
    console.print(Syntax(_yaml(record), "yaml", background_color="default", word_wrap=True))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        *facts(record).items(),
        *((f"{name} took", _cost(record, name)) for name in record.stages),
        ("worst blocks", _worst(record)),
        ("ran on", f"{record.environment.get('host')}, {record.environment.get('device')}"),
        ("at", f"{record.started_at:%Y-%m-%d %H:%M} UTC, commit {record.git_commit or 'unknown'}"),
        *(("warning", warning) for warning in record.warnings),
        *(("skipped", f"{layer}: {reason}") for layer, reason in record.skipped.items()),
    ):
        table.add_row(name, escape(value))
    console.print(table)
    console.print(PLUS_MINUS, style="dim", highlight=False)


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
    errors = {block.name: block.held_out or block.calibration for block in record.blocks}
    found = sorted(((error.relative, name) for name, error in errors.items() if error), reverse=True)[:3]
    return ", ".join(f"{name} ({error:.2e})" for error, name in found) or "none: not quantized"
