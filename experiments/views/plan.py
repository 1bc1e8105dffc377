"""What a sweep would run, on the terminal, without running it: what is done already, and what the rest will cost."""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.attempts import Attempts
from experiments.estimates import Cost, Estimate, Estimates, estimates, most, read
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views.display import duration, on_stdout

ROWS_SHOWN = 40
STYLES = {"done": "dim", "running": "cyan", "to run": None}

State = Literal["running", "to run", "done"]
Machines = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Planned:
    """A trial of a plan: how it stands, where it runs if it does, and its estimate; of a done one, what it did cost."""

    trial: Trial
    state: State
    host: str
    cost: Estimate


def show(sweep: Sweep, workers: int | None = None, launcher: str = "local", elsewhere: Machines | None = None) -> None:
    """Print what a sweep would run; starts nothing and changes no file.

    `workers`: trials that the launcher runs at once. `elsewhere`: the kind of the machines that run them when it is
    not this one; the newest records of such a machine are then what estimates come from.
    Raises `ConfigError` for a GPU that is not there, and for records of another version of this program.
    """
    console = on_stdout()
    costs = read(sweep.store)
    device = newest_device(costs, elsewhere) if elsewhere else _this_device(sweep)
    planned = stand(sweep, costs, estimates(sweep.store, costs, device))
    rows = sorted(planned, key=lambda one: ("running", "to run", "done").index(one.state))[:ROWS_SHOWN]
    if len(planned) <= ROWS_SHOWN:
        rows = planned
    bases = list(dict.fromkeys(one.cost.basis for one in rows if one.state == "to run"))
    console.print(to_table(sweep.name, planned, rows, bases))
    if len(rows) < len(planned):
        console.print(f"{len(rows)} of {len(planned):,} trials: the running, then those to run, then the done")
    for line in [*totals(planned, workers, launcher), *_footnotes(bases, device)]:
        console.print(line, highlight=False, markup=False)


def stand(sweep: Sweep, costs: Sequence[Cost], estimates: Estimates) -> list[Planned]:
    """The trials of a sweep as they stand, in its order."""
    measured = {cost.trial_id: cost for cost in costs}
    # Records that could not be read in bulk: the store says why, or that they are to be run again.
    measured_ids = measured.keys() | sweep.store.results(t.trial_id for t in sweep.trials if t.trial_id not in measured)
    planned = []
    for trial in sweep.trials:
        cost = measured.get(trial.trial_id)
        if trial.trial_id in measured_ids:
            planned.append(Planned(trial, "done", "", Estimate(cost.stages if cost else {}, "measured")))
            continue
        attempt = Attempts(sweep.store, trial.trial_id).running()
        state: State = "running" if attempt else "to run"
        planned.append(Planned(trial, state, attempt.owner.host if attempt else "", estimates.of(trial)))
    return planned


def to_table(title: str, planned: Sequence[Planned], rows: Sequence[Planned], bases: Sequence[str]) -> Table:
    """A rich table of the rows; a number after an estimate stands for its basis. Shared labels go to the title."""
    labels = dict.fromkeys(key for one in planned for key in one.trial.labels)
    values = {key: {one.trial.labels.get(key, "-") for one in planned} for key in labels}
    common = {key: next(iter(own)) for key, own in values.items() if len(own) == 1}
    varying = [key for key in labels if key not in common]
    with_gpu = any(one.cost.gpu_memory is not None for one in planned)
    heading = escape(title) + "".join(f"\n[dim]{key}[/] {escape(value)}" for key, value in common.items())
    table = Table(title=heading, box=SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    for column in (*varying, "state"):
        table.add_column(column, overflow="fold")
    for column in ("time", "memory", *(["GPU memory"] if with_gpu else []), ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for one in rows:
        cells = [*(one.trial.labels.get(key, "-") for key in varying), *_cells(one, bases, with_gpu)]
        table.add_row(*map(escape, cells), style=STYLES[one.state])
    return table


def totals(planned: Sequence[Planned], workers: int | None = None, launcher: str = "local") -> list[str]:
    """Lines on the whole: how many are to run, how long that takes, and the most memory that one needs."""
    states = Counter(one.state for one in planned)
    running = f", {states['running']:,} running elsewhere" if states["running"] else ""
    lines = [f"{len(planned):,} trials: {states['done']:,} done already, {states['to run']:,} to run{running}"]
    costs = [one.cost for one in planned if one.state == "to run"]
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    if not costs:
        return lines
    if not seconds:
        return [*lines, "time and memory: ?"]
    unknown = len(costs) - len(seconds)
    least = "at least " if unknown else "about "
    time = f"time: {least}{duration(sum(seconds))} one after the other"
    if workers and workers > 1:
        time += (
            f", {least}{duration(spread(seconds, workers))} with {workers} at once ({launcher}), if none slows another"
        )
    lines.append(time + (f"; {unknown:,} of them unknown" if unknown else ""))
    largest = [
        f"{_size(size)} of {what}"
        for what, size in (
            ("memory", most(cost.memory for cost in costs)),
            ("GPU memory", most(cost.gpu_memory for cost in costs)),
        )
        if size is not None
    ]
    return [*lines, f"largest trial: {least}{' and '.join(largest)}"] if largest else lines


def spread(seconds: Sequence[float], workers: int) -> float:
    """When the last of the trials ends if each goes, in order, to the worker that is free first."""
    ends = [0.0] * min(workers, len(seconds))
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def newest_device(costs: Sequence[Cost], machines: Machines) -> str:
    """The device of the last finished trial on such a machine; empty when there is none."""
    on_gpu = machines == "gpu"
    found = [cost for cost in costs if on_gpu != cost.device.startswith("cpu")]
    return max(found, key=lambda cost: cost.finished_at).device if found else ""


def _this_device(sweep: Sweep) -> str:
    from experiments.environment import device_name, resolve_device

    return device_name(resolve_device(sweep.trials[0].config["device"]))


def _cells(one: Planned, bases: Sequence[str], with_gpu: bool) -> list[str]:
    estimated = one.state != "done"
    seconds, sizes = one.cost.seconds, [one.cost.memory, *([one.cost.gpu_memory] if with_gpu else [])]
    return [
        f"running on {one.host}" if one.state == "running" else one.state,
        "?" if seconds is None else f"{'~' if estimated else ''}{duration(seconds)}",
        *("?" if size is None else f"{'~' if estimated else ''}{_size(size)}" for size in sizes),
        f"[{bases.index(one.cost.basis) + 1}]" if one.cost.basis in bases and estimated else "",
    ]


def _footnotes(bases: Sequence[str], device: str) -> list[str]:
    if not bases:
        return []
    return [f"~ estimated from the store's trials on {device or 'such machines: none yet'}"] + [
        f"[{number}] {basis}" for number, basis in enumerate(bases, start=1)
    ]


def _size(value: int) -> str:
    return f"{value / 2**30:.1f} GiB"
