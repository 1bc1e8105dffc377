"""Following and steering sweeps from another process: status, wait, logs, cancel, retry."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.attempts import Attempts
from experiments.records import Record
from experiments.store import ResultStore
from tests.experiments.conftest import ROOT, SMALL, Cli, environment
from tests.experiments.test_pool import wait_until
from wush.version import METHOD_VERSION

DEEP = "model.layers=500"  # takes long enough to be looked at
LONG = "model.layers=250"  # long enough for another process to begin, and short enough to see its end


@pytest.fixture
def drivers() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that run sweeps; none outlives its test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(cli: Cli, *arguments: str) -> "subprocess.Popen[str]":
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = [default for default in SMALL if default.partition("=")[0] not in given]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *arguments, *defaults],
        cwd=cli.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # some shells ignore it
    )


def blocks(cli: Cli) -> int:
    return len(list(cli.folder.rglob("blocks/*.safetensors")))


def status(cli: Cli, *arguments: str) -> dict[str, Any]:
    return json.loads(cli.experiments("status", "--json", *arguments).stdout or '{"trials": []}')  # none planned yet


def states(cli: Cli, *arguments: str) -> list[str]:
    return [trial["state"] for trial in status(cli, *arguments)["trials"]]


def test_a_running_sweep_is_seen_from_another_process(cli: Cli, drivers: list["subprocess.Popen[str]"]) -> None:
    drivers.append(start(cli, "sweep=mine", DEEP, "seed=0,1"))
    wait_until(lambda: blocks(cli) >= 3)
    wait_until(lambda: status(cli, "mine")["trials"][0]["left"] is not None)
    first, second = status(cli, "mine")["trials"]
    assert (first["state"], second["state"]) == ("running", "queued")
    assert re.fullmatch(r"decoder blocks \d+ of 500", first["progress"])
    assert first["job"].startswith("pid ")
    assert 0 < first["seconds"] < 120
    assert first["left"] > 0
    assert "relative error" in first["note"]
    shown = cli.experiments("status", "mi")
    assert shown.returncode == 3
    assert "0 of 2 trials done, 1 running, 1 queued" in shown.stdout
    followed = cli.experiments("logs", "mine")
    assert first["trial_id"] in followed.stdout


def test_a_killed_driver_leaves_stopped_trials_and_retry_finishes_them(
    cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, "sweep=mine", "model.layers=40", "seed=0,1"))
    wait_until(lambda: blocks(cli) >= 3)
    drivers[0].kill()
    drivers[0].wait()
    saved = blocks(cli)
    assert states(cli) == ["stopped", "stopped"]
    shown = cli.experiments("status")
    assert shown.returncode == 1
    assert "is gone" in shown.stdout
    retried = cli.experiments("retry", "mine")
    assert retried.returncode == 0, retried.stderr
    assert states(cli) == ["done", "done"]
    interrupted = status(cli)["trials"][0]
    assert interrupted["interruptions"] == 1
    record = ResultStore(cli.folder / "results").record(interrupted["trial_id"])
    assert record is not None
    assert record.restored_blocks == saved
    assert cli.experiments("status").returncode == 0


def test_cancel_stops_a_sweep_and_retry_goes_on(cli: Cli, drivers: list["subprocess.Popen[str]"]) -> None:
    drivers.append(start(cli, "sweep=mine", DEEP, "seed=0,1"))
    wait_until(lambda: blocks(cli) >= 3)
    cancelled = cli.experiments("cancel")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "jobs 0, processes of this machine 1, trials not begun 1" in cancelled.stdout
    output, _ = drivers[0].communicate(timeout=30)
    assert drivers[0].returncode == 130, output
    assert states(cli) == ["stopped", "stopped"]
    assert status(cli)["trials"][0]["reason"] == "cancelled"
    drivers.append(start(cli, "sweep=mine", DEEP, "seed=0,1"))
    wait_until(lambda: "running" in states(cli))


def test_two_processes_with_the_same_sweep_run_each_trial_once(
    cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    sweep = ("model.layers=12", "seed=0,1,2,3")
    drivers += [start(cli, "sweep=one", *sweep), start(cli, "sweep=two", *sweep)]
    outputs = [driver.communicate(timeout=120)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert all("4 of 4 trials done" in output for output in outputs)
    store = ResultStore(cli.folder / "results")
    ran = [attempt for trial in store.ids() for attempt in Attempts(store, trial).all() if attempt.total]
    assert len(ran) == 4
    assert len({attempt.owner.pid for attempt in ran}) <= 2


def test_a_trial_that_runs_elsewhere_can_be_skipped(cli: Cli, drivers: list["subprocess.Popen[str]"]) -> None:
    drivers.append(start(cli, "sweep=theirs", DEEP))
    wait_until(lambda: blocks(cli) >= 1)
    skipped = cli.small(DEEP, "sweep=mine", "hydra.launcher.busy=skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "running already in sweep theirs" in skipped.stderr
    assert "1 running" in skipped.stdout


def test_a_trial_is_taken_over_from_a_process_that_dies(cli: Cli, drivers: list["subprocess.Popen[str]"]) -> None:
    drivers.append(start(cli, "sweep=theirs", LONG))
    wait_until(lambda: blocks(cli) >= 1)
    drivers.append(start(cli, "sweep=mine", LONG))
    wait_until(lambda: states(cli, "mine") == ["running"])
    drivers[0].kill()
    output, _ = drivers[1].communicate(timeout=120)
    assert drivers[1].returncode == 0, output
    (trial,) = status(cli, "mine")["trials"]
    assert (trial["state"], trial["interruptions"]) == ("done", 1)


def test_a_failed_trial_says_why_and_its_log_is_shown(cli: Cli) -> None:
    cli.small("-m", "sweep=mine", "model.hidden_size=64,40", "model.heads=4")
    shown = cli.experiments("status")
    assert shown.returncode == 1
    assert "1 of 2 trials done, 1 failed" in shown.stdout
    assert "not a multiple of the group size" in " ".join(shown.stdout.split())
    trial = next(one for one in status(cli)["trials"] if one["state"] == "failed")
    whole = cli.experiments("logs", "mine", trial["trial_id"][:6])
    assert "Traceback" in whole.stdout
    again = cli.experiments("retry", "mine")
    assert again.returncode == 1
    assert "1 of 2 trials already done" in again.stderr


def test_wait_ends_with_the_sweep_and_its_table(cli: Cli, drivers: list["subprocess.Popen[str]"]) -> None:
    drivers.append(start(cli, "sweep=mine", LONG))
    wait_until(lambda: blocks(cli) >= 1)
    waited = cli.experiments("wait")
    assert waited.returncode == 0, waited.stderr
    assert "0 of 1 trials done, 1 running" in waited.stdout
    assert "1 of 1 trials done" in waited.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "other"], "no sweep 'other' in"),
        (["logs", "mine", "zzz"], "zzz: 0 trials of sweep mine begin so"),
        (["retry", "mine", "workers=0", "--launcher", "local_parallel"], "hydra.launcher.workers=0: input should be"),
        (["retry", "mine", "tim=3"], "hydra.launcher.tim: unknown key"),
        (["retry", "mine", "--launcher", "lokal"], "there are: local, local_parallel, slurm"),
    ],
)
def test_what_is_not_there_is_an_error_with_what_is(arguments: list[str], message: str, cli: Cli) -> None:
    cli.small("-m", "sweep=mine", "format=original")
    failed = cli.experiments(*arguments)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_key_without_a_sweep_is_for_the_sweep_planned_last(cli: Cli) -> None:
    cli.small("-m", "sweep=mine", "format=original")
    retried = cli.experiments("retry", "busy=skip")
    assert retried.returncode == 0, retried.stderr
    assert "1 of 1 trials already done" in retried.stderr


@pytest.mark.parametrize(
    "content", ["null", "[]", "{", '{"trials": [1]}', '{"trials": [], "launcher": {}, "progress": ""}']
)
def test_a_damaged_plan_is_an_error_with_a_remedy(content: str, cli: Cli) -> None:
    cli.small("-m", "sweep=mine", "format=original")
    (cli.folder / "results" / "sweeps" / "mine" / "plan.json").write_text(content)
    for command in (["status"], ["retry", "mine"], ["cancel", "mine"]):
        failed = cli.experiments(*command)
        assert failed.returncode == 2
        assert "start the sweep again to plan it anew" in failed.stderr
    assert cli.small("-m", "sweep=mine", "format=original").returncode == 0


def test_a_sweep_planned_with_another_version_of_the_method_is_shown_and_not_gone_on_with(cli: Cli) -> None:
    cli.small("-m", "sweep=mine", "format=original")
    path = cli.folder / "results" / "sweeps" / "mine" / "plan.json"
    content = path.read_text()
    assert content.count(f'"method_version": {METHOD_VERSION}') == 1
    path.write_text(content.replace(f'"method_version": {METHOD_VERSION}', '"method_version": 1'))
    assert cli.experiments("status", "mine").returncode == 0
    refused = cli.experiments("retry", "mine")
    assert refused.returncode == 2
    assert f"planned with version 1 of the method, and this is {METHOD_VERSION}" in refused.stderr
    assert "run.py -m sweep=mine format=original" in refused.stderr


def test_a_sweep_of_the_same_name_does_not_replace_one_that_runs(
    cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, "sweep=mine", DEEP))
    wait_until(lambda: blocks(cli) >= 1)
    refused = cli.small("-m", "sweep=mine", "format=original")
    assert refused.returncode == 2
    assert "choose another sweep=NAME" in refused.stderr
    assert len(status(cli, "mine")["trials"]) == 1
    more = cli.small("-m", "sweep=other", "format=original")
    assert more.returncode == 0


def test_a_driver_that_waits_for_anothers_trial_can_be_cancelled(
    cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, "sweep=theirs", DEEP))
    wait_until(lambda: blocks(cli) >= 1)
    drivers.append(start(cli, "sweep=mine", DEEP))
    wait_until(lambda: states(cli, "mine") == ["running"])
    assert cli.experiments("cancel", "mine").returncode == 0
    drivers[1].communicate(timeout=20)
    assert drivers[1].returncode == 130
    assert states(cli, "theirs") == ["running"]


def test_a_second_drivers_end_does_not_hide_the_first(cli: Cli, drivers: list["subprocess.Popen[str]"]) -> None:
    drivers.append(start(cli, "sweep=mine", DEEP, "seed=0,1"))
    wait_until(lambda: blocks(cli) >= 1)
    assert cli.small("-m", "sweep=mine", DEEP, "seed=0,1", "hydra.launcher.busy=skip").returncode in (0, 1)
    assert "stopped" not in states(cli, "mine")


def test_a_plan_runs_nothing_and_says_what_would_run(cli: Cli) -> None:
    cli.small("-m", "format=mxfp4")
    before = {path: path.stat().st_mtime_ns for path in cli.folder.rglob("*")}
    for launcher in ("local", "local_parallel", "slurm"):
        planned = cli.experiments("plan", *SMALL, "format=mxfp4,int4", f"hydra/launcher={launcher}")
        assert planned.returncode == 0, planned.stderr
        assert "2 trials: 1 done already, 1 to run" in planned.stdout
    wrong = cli.experiments("plan", *SMALL, "format=mxfp4,mxfp5", "hydra/launcher=slurm", "hydra.launcher.time=0")
    assert wrong.returncode == 2
    assert "format=mxfp5: unknown option" in wrong.stderr
    assert "hydra.launcher.time=0: should be" in wrong.stderr
    assert {path: path.stat().st_mtime_ns for path in cli.folder.rglob("*")} == before


def test_two_sides_are_compared_and_written_where_asked(cli: Cli) -> None:
    cli.small("-m", "format=mxfp4", "transform=h,wush", "seed=0,1")
    files = ("--output", "both.csv", "--wandb-json", "report.json")
    compared = cli.experiments("compare", "transform=h", "transform=wush", *files)
    assert compared.returncode == 0, compared.stderr
    assert "B - A" in compared.stdout
    assert (cli.folder / "both.csv").read_text().count(",kl,") == 1
    assert "transform=wush" in (cli.folder / "report.json").read_text()
    assert cli.experiments("compare", "transform=h", "transform=x").returncode == 2
    assert cli.experiments("compare", "transform=h", "transform=wush", "--wandb", "project").returncode == 2


def test_status_without_any_sweep_says_how_to_start_one(cli: Cli) -> None:
    failed = cli.experiments("status")
    assert failed.returncode == 2
    assert "start one with run.py" in failed.stderr


def test_a_sweep_is_found_from_elsewhere_and_without_permission_to_write(cli: Cli, tmp_path: Path) -> None:
    cli.small("-m", "sweep=mine", "format=original")
    before = {path: path.stat().st_mtime_ns for path in cli.folder.rglob("*")}
    elsewhere = Cli(tmp_path.parent)
    found = elsewhere.experiments("status", "--results", str(cli.folder / "results"))
    assert "1 of 1 trials done" in found.stdout
    assert {path: path.stat().st_mtime_ns for path in cli.folder.rglob("*")} == before


def test_export_copies_the_records_of_a_sweep_and_tells_what_is_missing(cli: Cli) -> None:
    assert cli.small("-m", "transform=h,wush", "sweep=s").returncode == 0
    done = cli.experiments("export", "s", "published")
    assert (done.returncode, done.stdout) == (0, "2 records of s copied to published\n")
    copies = {path.stem: Record.model_validate_json(path.read_bytes()) for path in (cli.folder / "published").iterdir()}
    assert copies == {trial_id: ResultStore(cli.folder / "results").record(trial_id) for trial_id in copies}
    (first, _) = copies
    (cli.folder / "results" / "trials" / first / "result.json").unlink()
    again = cli.experiments("export", "s", "published")
    assert again.returncode == 1
    assert again.stdout == "1 records of s copied to published, 1 trials are not done\n"
