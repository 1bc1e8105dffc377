"""What can be done with a sweep that was started: look at it, wait for it, read its logs, cancel it, retry it.

Each command reads the store and the cluster; none needs the process that started the sweep. Exit codes: 0 all trials
done, 1 some failed or stopped, 2 the command is wrong, 3 not over yet.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import plans
from experiments.attempts import Attempts
from experiments.launch import driver, plain_values
from experiments.launch import jobs as slurm_jobs
from experiments.launch.choose import launch_of
from experiments.launch.settings import SlurmSettings, validate_launcher
from experiments.launch.submitted import log_file
from experiments.schema import ConfigError
from experiments.standing import ALIVE, Follower, Standing, Status, job_states
from experiments.store import ResultStore, write_atomically
from experiments.sweep import Sweep
from experiments.views import status as view
from experiments.views.display import on_stdout
from experiments.views.summary import command, shown, summarize

CONF = Path(__file__).parent.parent / "conf"
LINES_OF_A_LOG = 30


def find(store: ResultStore, name: str | None) -> tuple[Sweep, dict[str, Any]]:
    """The sweep of a name, or of the first letters of one; the one planned last for None."""
    known = plans.names(store)
    if name is None and not known:
        raise ConfigError(f"no sweep in {shown(store.root)}; start one with run.py, or give --results")
    begun = [one for one in known if name and one.startswith(name)]
    return plans.load(store, known[0] if name is None else begun[0] if len(begun) == 1 else name)


def status(store: ResultStore, name: str | None, *, as_json: bool, live: bool, every: bool) -> int:
    """Show how a sweep stands, once or until it is over."""
    sweep, _ = find(store, name)
    follower, rows = Follower(sweep), None if every else view.ROWS_SHOWN
    if live:
        return _code(view.watch(sweep.name, follower.look, rows))
    statuses = follower.look()
    if as_json:
        print(view.to_json(sweep.name, statuses))
    else:
        on_stdout().print(view.to_table(sweep.name, statuses, rows))
    return _code(statuses)


def export(store: ResultStore, name: str, folder: Path) -> int:
    """Copy a sweep's finished records to `<folder>/<trial_id>.json`, without indentation; tell how many are missing."""
    sweep, _ = find(store, name)
    records = [record for trial in sweep.trials if (record := store.record(trial.trial_id))]
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        record.config["results"] = "results"  # where this machine keeps it says nothing elsewhere
        write_atomically(folder / f"{record.trial_id}.json", record.model_dump_json() + "\n")
    missing = len(sweep.trials) - len(records)
    print(
        f"{len(records)} records of {sweep.name} copied to {shown(folder)}"
        + (f", {missing} trials are not done" if missing else "")
    )
    return 1 if missing else 0


def wait(store: ResultStore, name: str | None) -> int:
    """Show a sweep until it is over, then its summary."""
    sweep, node = find(store, name)
    statuses = view.watch(sweep.name, _look(sweep, node), view.ROWS_SHOWN)
    try:
        summarize(sweep.name, Standing(sweep).look(), store)
    except OSError as error:  # somebody else's sweep, or nowhere to write
        print(f"not written: {error}", file=sys.stderr)
    for one in statuses:
        if one.state == "stopped":
            print(f"{one.trial_id} {one.name}: {one.reason}; go on with: {command(store, 'retry', sweep.name)}")
    return _code(statuses)


def _look(sweep: Sweep, node: dict[str, Any]) -> Callable[[], list[Status]]:
    """How to look at a sweep until it is over: jobs that the cluster lost are seen to, in the user's own sweeps."""
    settings = validate_launcher(node)
    if not isinstance(settings, SlurmSettings):
        return Follower(sweep).look
    from experiments.launch.cluster import looks_of

    return looks_of(sweep, settings)


def logs(store: ResultStore, name: str | None, trial: str | None, follow: bool) -> int:
    """Print the log of a trial, or the last lines of every trial that runs, failed or stopped."""
    if trial is None and name and name not in plans.names(store) and store.ids(name):  # of the sweep planned last
        name, trial = None, name
    sweep, _ = find(store, name)
    if trial is None and follow:
        raise ConfigError("logs --follow: name the sweep and the trial to follow; `status` lists them")
    if trial is None:
        shown_ones = [one for one in Follower(sweep).look() if one.state in ("running", "failed", "stopped")]
        if not shown_ones:
            print(f"nothing of sweep {sweep.name} runs, failed or stopped; give a trial to see its log")
        for one in shown_ones:
            folder = store.trial(one.trial_id)
            _print_end(one, [folder / "trial.log", folder / "worker.log", log_file(store.sweep(sweep.name), one.job)])
        return 0
    ids = [own.trial_id for own in sweep.trials if own.trial_id.startswith(trial)]
    if len(ids) != 1:
        raise ConfigError(f"{trial}: {len(ids)} trials of sweep {sweep.name} begin so; `status --all` lists them")
    path = store.trial(ids[0]) / "trial.log"
    if not path.exists():
        raise ConfigError(f"trial {ids[0]} has no log yet; `status {sweep.name}` says how it stands")
    _print_file(path, store, ids[0], follow)
    return 0


def cancel(store: ResultStore, name: str | None) -> int:
    """End what runs of a sweep, and what is queued; finished trials and decoder blocks stay."""
    sweep, _ = find(store, name)
    left = {one.trial_id: one.state for one in Follower(sweep).look() if one.state in ("running", "queued")}
    if not left:
        print(f"nothing of sweep {sweep.name} runs or waits")
        return 0
    write_atomically(store.sweep(sweep.name) / "cancelled", "")
    local = {trial_id for trial_id in left if _interrupt(Attempts(store, trial_id), sweep.name)}
    states = job_states(store, sweep.name, [trial_id for trial_id in left if trial_id not in local])
    jobs = {trial_id: job.job_id for trial_id, job in states.items() if job.state in (*ALIVE, slurm_jobs.SILENT)}
    if jobs:
        slurm_jobs.cancel(list(jobs.values()))
    others = Counter(state for trial_id, state in left.items() if trial_id not in local and trial_id not in jobs)
    print(f"cancelled: jobs {len(jobs)}, processes of this machine {len(local)}, trials not begun {others['queued']}")
    if others["running"]:
        print(f"trials that run elsewhere and stop within seconds: {others['running']}")
    print(f"go on later with: {command(store, 'retry', sweep.name)}")
    return 0


def retry(store: ResultStore, name: str | None, launcher: str | None, overrides: Sequence[str]) -> int:
    """Run the trials of a sweep that are not done, in the way it was launched or in another one."""
    if name and "=" in name and name not in plans.names(store):  # a key of the launcher, for the sweep planned last
        overrides, name = [name, *overrides], None
    sweep, node = find(store, name)
    plans.check_version(sweep)
    if launcher is not None:
        node = _launcher_node(launcher)
    typed: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: write key=value, a key of hydra.launcher such as time=480")
        name_of_key = key.removeprefix("hydra.launcher.")
        node = dict(node) | {name_of_key: plain_values.read(value)}
        typed[f"hydra.launcher.{name_of_key}"] = value
    try:
        driver.run(sweep, launch_of(validate_launcher(node, typed)))
    except driver.SweepFailed:
        return 1
    return 0


def compare(
    store: ResultStore, a: str, b: str, output: Path | None, project: str | None, definition: Path | None
) -> int:
    """Compare two sides; `project`, `ENTITY/PROJECT`, gets the comparison as a W&B report, `definition` its JSON."""
    from experiments.views.comparison import show_comparison

    code = show_comparison(store, a, b, output)
    if code == 0 and (project or definition):
        _compare_on_wandb(store, a, b, project, definition)
    return code


def _compare_on_wandb(store: ResultStore, a: str, b: str, project: str | None, definition: Path | None) -> None:
    from experiments.compare import compare
    from experiments.sides import to_run_filter
    from experiments.views import workspace
    from experiments.views.comparison import to_markdown

    entity, slash, name = (project or "ENTITY/wush").partition("/")
    if not slash:
        raise ConfigError(f"--wandb {project}: write ENTITY/PROJECT, as in the address of the project's page")
    found = compare(store, a, b)
    sides = to_run_filter(found.a), to_run_filter(found.b)
    report = workspace.report(name, entity, *sides, differences=to_markdown(found))
    if definition:
        write_atomically(definition, workspace.to_json(report))
        print(f"report definition: {shown(definition)}")
    if project:
        try:
            print(f"report: {workspace.save(report)}")
        except workspace.ReportNotSaved as error:
            raise ConfigError(str(error)) from error


def _launcher_node(name: str) -> dict[str, Any]:
    options = {path.stem: path for path in (CONF / "hydra" / "launcher").glob("*.yaml")}
    if name not in options:
        raise ConfigError(f"--launcher {name}: there are: {', '.join(sorted(options))}")
    return plain_values.read(options[name].read_text())


def _code(statuses: Sequence[Status]) -> int:
    if not view.is_over(statuses):
        return 3
    return 0 if all(one.state == "done" for one in statuses) else 1


def _print_end(one: Status, paths: Sequence[Path]) -> None:
    print(f"==> {one.trial_id} {one.name}: {one.state} {one.progress} {one.reason}".rstrip(), "<==")
    for path in paths:
        if path.exists():
            print("\n".join(path.read_text(errors="replace").splitlines()[-LINES_OF_A_LOG:]))
    print()


def _print_file(path: Path, store: ResultStore, trial_id: str, follow: bool) -> None:
    with path.open(errors="replace") as file:
        sys.stdout.write(file.read())
        while follow and Attempts(store, trial_id).running():
            time.sleep(1)
            sys.stdout.write(file.read())
            sys.stdout.flush()
        sys.stdout.write(file.read())


def _interrupt(attempts: Attempts, sweep: str) -> bool:
    """Interrupt an attempt of this sweep on this machine, outside of any job; whether there was one."""
    running = attempts.running()
    if running is None or running.sweep != sweep or running.owner.job or not running.owner.is_here():
        return False
    try:
        os.kill(running.owner.pid, signal.SIGINT)
    except (ProcessLookupError, PermissionError):
        return False
    return True
