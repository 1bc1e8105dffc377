"""Sweeps of real trials on a real SLURM: whatever is killed in between, they end, and as if nothing had happened."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import plans
from experiments.attempts import Attempts
from experiments.launch import jobs as slurm_jobs
from experiments.launch.cluster import LOCAL_LAG_SECONDS
from experiments.records import Record
from experiments.store import ResultStore
from experiments.views import status as view
from tests.experiments.conftest import Cli
from tests.experiments.test_commands import blocks, start, status
from tests.experiments.test_pool import AMBUSH, wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import lay_in_wait, memory_is_limited_by_the_kernel

pytestmark = pytest.mark.slurm
SLURM = (
    "hydra/launcher=slurm",
    "hydra.launcher.gpus=0",
    "hydra.launcher.cpus=1",
    "hydra.launcher.memory=1500M",
    "hydra.launcher.time=60",
    "sweep=mine",
)
DEEP = ("model.layers=40", "algorithm=gptq")  # quantizes for seconds


# What makes a model of 100 decoder blocks take long in a worker, however quick the machine is.
DRAG = """
import sys
if "experiments.launch.worker" in " ".join(sys.orig_argv):
    import time
    from experiments.checkpoints import Checkpoint
    save = Checkpoint.save
    def slow(self, *block):
        time.sleep(0.5)
        return save(self, *block)
    Checkpoint.save = slow
"""


def record(cli: Cli, index: int = 0) -> Record:
    trial = status(cli)["trials"][index]
    found = ResultStore(cli.folder / "results").record(trial["trial_id"])
    assert found is not None, trial
    return found


def submissions(cli: Cli) -> list[dict[str, Any]]:
    return json.loads((cli.folder / "results" / "sweeps" / "mine" / "jobs.json").read_text())["submissions"]


def job(cli: Cli, index: int = 0) -> str:
    (only,) = submissions(cli)
    return list(only["jobs"])[index]


def ends(cli: Cli, trial_id: str) -> list[str | None]:
    return [one.end for one in Attempts(ResultStore(cli.folder / "results"), trial_id).all()]


def test_a_sweep_runs_as_one_array_and_a_second_time_submits_nothing(slurm: Cluster, cli: Cli) -> None:
    sweep = ("-m", "format=mxfp4,nvfp4", "transform=h,wush", *SLURM)
    done = cli.small(*sweep)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 trials done" in done.stdout
    (submitted,) = submissions(cli)
    assert len({one.partition("_")[0] for one in submitted["jobs"]}) == 1
    store = ResultStore(cli.folder / "results")
    ran = {Attempts(store, trial).all()[-1].owner.job: trial for trial in store.ids()}
    assert ran == submitted["jobs"]
    again = cli.small(*sweep)
    assert again.returncode == 0
    assert "4 of 4 trials already done" in again.stderr
    assert len(submissions(cli)) == 1


def test_a_detached_sweep_is_followed_and_collected_later(slurm: Cluster, cli: Cli) -> None:
    left = cli.small("-m", "seed=0,1", *DEEP, *SLURM, "hydra.launcher.detach=true")
    assert left.returncode == 0, left.stderr
    assert "python -m experiments status mine" in left.stdout
    assert not list(cli.folder.rglob("result.json"))
    wait_until(lambda: any("decoder blocks" in trial["progress"] for trial in status(cli)["trials"]))
    running = next(trial for trial in status(cli)["trials"] if trial["progress"])
    assert running["job"] in submissions(cli)[0]["jobs"]
    waited = cli.experiments("wait", "mine")
    assert waited.returncode == 0, waited.stdout
    assert "2 of 2 trials done" in waited.stdout
    assert next(cli.folder.rglob("table.md")).read_text().count("%") == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What comes out of a deep trial that nothing interrupts."""
    cli = Cli(tmp_path_factory.mktemp("whole"))
    assert cli.small(*DEEP).returncode == 0
    store = ResultStore(cli.folder / "results")
    found = store.record(store.ids()[0])
    assert found is not None
    return found


def preempt(slurm: Cluster) -> None:
    slurm.call("sbatch", "--partition=high", "--cpus-per-task=16", "--output=/dev/null", "--wrap=sleep 1")


@pytest.mark.parametrize("how", ["requeue", "preemption"])
def test_an_interrupted_trial_goes_on_where_it_was_and_comes_out_the_same(
    slurm: Cluster, cli: Cli, whole: Record, how: str
) -> None:
    cli.small("-m", *DEEP, *SLURM, "hydra.launcher.detach=true", "hydra.launcher.partition=low")
    wait_until(lambda: blocks(cli) >= 5)
    if how == "requeue":
        slurm_jobs.requeue([job(cli)])
    else:
        preempt(slurm)
    wait_until(lambda: status(cli)["trials"][0]["interruptions"] == 1)
    assert cli.experiments("wait").returncode == 0
    resumed = record(cli)
    assert slurm_jobs.states([job(cli)])[job(cli)].restarts == 1
    assert resumed.restored_blocks >= 5
    assert resumed.metrics == whole.metrics
    assert ends(cli, resumed.trial_id) in (["interrupted", "done"], ["lost", "done"])
    assert job(cli) == Attempts(ResultStore(cli.folder / "results"), resumed.trial_id).all()[-1].owner.job


def test_a_trial_over_its_time_limit_goes_on_in_the_same_job_but_not_too_often(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    # SLURM looks every 30 seconds at who is to be told of its limit, up to 30 seconds early: not before 20 here.
    (cli.folder / "site").mkdir()
    (cli.folder / "site" / "sitecustomize.py").write_text(DRAG)
    monkeypatch.setenv("PYTHONPATH", str(cli.folder / "site"))
    limited = [option for option in SLURM if not option.startswith(("hydra.launcher.time", "sweep="))]
    limited += ["model.layers=100", "hydra.launcher.time=1", "hydra.launcher.signal_before=10"]
    drivers.append(start(cli, *limited, "seed=0", "sweep=mine", "hydra.launcher.max_timeouts=9"))
    drivers.append(start(cli, *limited, "seed=1", "sweep=once", "hydra.launcher.max_timeouts=0"))
    output, _ = drivers[1].communicate(timeout=120)
    assert drivers[1].returncode == 1, output
    (failed,) = status(cli, "once")["trials"]
    assert failed["state"] == "failed"
    assert "more than hydra.launcher.max_timeouts times" in failed["reason"]
    assert "raise hydra.launcher.time" in failed["advice"]
    output, _ = drivers[0].communicate(timeout=240)
    assert drivers[0].returncode == 0, output
    assert len(submissions(cli)) == 1
    done = ResultStore(cli.folder / "results").record(status(cli, "mine")["trials"][0]["trial_id"])
    assert done is not None
    assert done.restored_blocks > 0
    assert set(ends(cli, done.trial_id)[:-1]) == {"interrupted"}


def test_a_job_cancelled_behind_the_drivers_back_is_told_and_retry_goes_on(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, "seed=0,1", *DEEP, *SLURM))
    wait_until(lambda: blocks(cli) >= 5)
    running = next(trial for trial in status(cli)["trials"] if trial["state"] == "running")
    slurm_jobs.cancel([running["job"]])
    output, _ = drivers[0].communicate(timeout=120)
    assert drivers[0].returncode == 1, output
    assert "1 of 2 trials done, 1 failed" in output
    assert "CANCELLED" in output
    retried = cli.experiments("retry", "mine")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert len(submissions(cli)) == 2
    store = ResultStore(cli.folder / "results")
    again = store.record(running["trial_id"])
    assert again is not None
    assert again.restored_blocks > 0


def test_cancel_ends_the_jobs_of_a_sweep(slurm: Cluster, cli: Cli) -> None:
    cli.small("-m", "seed=0,1,2", *DEEP, *SLURM, "hydra.launcher.detach=true", "hydra.launcher.array_parallelism=1")
    wait_until(lambda: blocks(cli) >= 1)
    cancelled = cli.experiments("cancel")
    assert "jobs 3," in cancelled.stdout
    wait_until(lambda: {trial["state"] for trial in status(cli)["trials"]} == {"stopped"})
    assert cli.experiments("status").returncode == 1


def test_a_driver_that_is_killed_and_started_again_submits_nothing_twice(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    sweep = ("seed=0,1", *DEEP, *SLURM, "hydra.launcher.array_parallelism=1")
    drivers.append(start(cli, *sweep))
    wait_until(lambda: blocks(cli) >= 1)
    drivers[0].send_signal(signal.SIGKILL)
    drivers[0].wait()
    again = cli.small("-m", *sweep)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 trials done" in again.stdout
    assert len(submissions(cli)) == 1
    assert {record(cli, index).attempts for index in range(2)} == {1}


def test_a_driver_killed_between_sbatch_and_its_answer_leaves_no_job_unknown(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as own:
        lay_in_wait(own, cli.folder, after="kill -9 $PPID; sleep 1")
        drivers.append(start(cli, "seed=0,1", *SLURM))
        drivers[0].wait(timeout=60)
    assert drivers[0].returncode == -signal.SIGKILL
    assert [list(one["jobs"]) for one in submissions(cli)] == [[]]
    assert len({trial["job"] for trial in status(cli)["trials"]}) == 2
    again = cli.small("-m", "seed=0,1", *SLURM)
    assert again.returncode == 0, again.stderr
    assert len(submissions(cli)) == 1
    store = ResultStore(cli.folder / "results")
    ran = {Attempts(store, trial).all()[-1].owner.job: trial for trial in store.ids()}
    assert ran == submissions(cli)[0]["jobs"]


def test_cancel_finds_jobs_that_a_killed_driver_did_not_record(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as own:
        lay_in_wait(own, cli.folder, after="kill -9 $PPID; sleep 1")
        drivers.append(start(cli, "seed=0,1", *SLURM, "hydra.launcher.partition=down"))
        drivers[0].wait(timeout=60)
    assert "jobs 2," in cli.experiments("cancel").stdout
    wait_until(lambda: slurm.call("squeue", "--noheader") == "")


def test_a_sweep_outlives_an_outage_of_the_controller(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, "seed=0,1", *DEEP, *SLURM, "hydra.launcher.array_parallelism=1"))
    wait_until(lambda: blocks(cli) >= 1)
    slurm.stop_controller()
    try:
        second = status(cli)["trials"][1]
        assert second["state"] == "queued"
        assert "SLURM does not answer" in second["reason"]
        time.sleep(LOCAL_LAG_SECONDS + view.SECONDS_BETWEEN_LOOKS)
        assert drivers[0].poll() is None
    finally:
        slurm.start_controller()
    output, _ = drivers[0].communicate(timeout=180)
    assert drivers[0].returncode == 0, output
    assert "2 of 2 trials done" in output
    assert len(submissions(cli)) == 1


def test_a_trial_of_another_process_that_dies_is_submitted(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, *DEEP, "sweep=theirs"))
    wait_until(lambda: blocks(cli) >= 1)
    drivers[0].send_signal(signal.SIGSTOP)  # so that it does not end before the other has begun
    drivers.append(start(cli, *DEEP, *SLURM))
    wait_until(lambda: plans.is_driven(ResultStore(cli.folder / "results"), "mine"))
    wait_until(lambda: (cli.folder / "results" / "sweeps" / "mine" / "jobs" / ".mending").exists())
    assert not (cli.folder / "results" / "sweeps" / "mine" / "jobs.json").exists()
    drivers[0].kill()
    output, _ = drivers[1].communicate(timeout=120)
    assert drivers[1].returncode == 0, output
    assert "running already in sweep theirs" in output
    assert len(submissions(cli)) == 1
    assert record(cli).attempts == 2


def test_a_trial_of_another_process_can_be_skipped(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, *DEEP, "sweep=theirs"))
    wait_until(lambda: blocks(cli) >= 1)
    drivers[0].send_signal(signal.SIGSTOP)
    done = cli.small("-m", "model.layers=40,2", "algorithm=gptq", *SLURM, "hydra.launcher.busy=skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 trials are skipped" in done.stderr
    (submitted,) = submissions(cli)
    assert len(submitted["jobs"]) == 1


def test_cancel_ends_the_driver_and_fails_nothing_and_retry_goes_on_at_once(
    slurm: Cluster, cli: Cli, drivers: list["subprocess.Popen[str]"]
) -> None:
    drivers.append(start(cli, "seed=0,1", *DEEP, *SLURM, "hydra.launcher.array_parallelism=1"))
    wait_until(lambda: blocks(cli) >= 5)
    assert "jobs 2," in cli.experiments("cancel").stdout
    output, _ = drivers[0].communicate(timeout=60)
    assert drivers[0].returncode == 130, output
    trials = status(cli)["trials"]
    assert [(trial["state"], trial["reason"]) for trial in trials] == [("stopped", "cancelled")] * 2
    assert not list(cli.folder.rglob("failure.json"))
    store = ResultStore(cli.folder / "results")
    assert [end for trial in trials for end in ends(cli, trial["trial_id"])] == ["cancelled"]
    retried = cli.experiments("retry", "mine")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert sum(bool(store.record(trial["trial_id"]).restored_blocks) for trial in trials) == 1


@pytest.mark.skipif(not memory_is_limited_by_the_kernel(), reason="SLURM cannot use cgroups here")
def test_a_worker_killed_for_its_memory_is_tried_again_in_the_same_job(
    slurm: Cluster, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_ambush(cli.folder, "block = bytearray(3 << 30)", 1, monkeypatch)
    done = cli.small("-m", "model.layers=3", *SLURM)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("one window at a time" in warning for warning in record(cli).warnings)
    assert ends(cli, record(cli).trial_id) == ["out of memory", "done"]
    assert len(submissions(cli)) == 1


def test_a_trial_that_takes_all_memory_of_its_job_fails_with_advice(
    slurm: Cluster, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_ambush(cli.folder, "block = bytearray(3 << 30)", 9, monkeypatch)
    failed = cli.small("-m", "model.layers=3,2", *SLURM)
    assert failed.returncode == 1
    assert "1 of 2 trials done, 1 failed" in failed.stdout
    one = next(trial for trial in status(cli)["trials"] if trial["state"] == "failed")
    assert "more memory" in one["advice"], one


def lay_ambush(folder: Path, act: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers do something to themselves, so often, when they quantize a model of three decoder blocks."""
    marker = folder / "ambushed"
    marker.mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(AMBUSH.format(marker=str(marker), times=times, act=act))
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))


def test_a_refused_partition_submits_nothing(slurm: Cluster, cli: Cli) -> None:
    refused = cli.small("-m", "seed=0,1", *SLURM, "hydra.launcher.partition=gone")
    assert refused.returncode == 2
    assert "hydra.launcher.partition=gone" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (cli.folder / "results" / "sweeps" / "mine" / "jobs.json").exists()


def test_a_job_that_never_starts_says_why(slurm: Cluster, cli: Cli) -> None:
    cli.small("-m", *SLURM, "hydra.launcher.detach=true", "hydra.launcher.partition=down")
    wait_until(lambda: status(cli)["trials"][0]["reason"] != "None" and status(cli)["trials"][0]["advice"] != "")
    (one,) = status(cli)["trials"]
    assert one["state"] == "queued"
    assert "PartitionDown" in one["reason"]
    assert "hydra.launcher.partition" in one["advice"]


def test_with_accounting_a_forgotten_job_is_still_explained(slurm_accounting: Cluster, cli: Cli) -> None:
    cli.small("-m", *DEEP, *SLURM, "hydra.launcher.detach=true", "hydra.launcher.account=science")
    wait_until(lambda: blocks(cli) >= 1)
    slurm_jobs.cancel([job(cli)])
    wait_until(lambda: status(cli)["trials"][0]["state"] == "stopped")
    wait_until(lambda: "CANCELLED" in status(cli)["trials"][0]["reason"])


def test_a_detached_sweeps_report_is_written_by_its_jobs(slurm: Cluster, cli: Cli) -> None:
    cli.small("-m", "seed=0,1", *SLURM, "hydra.launcher.detach=true", "hydra.launcher.setup=[touch set_up]")
    folder = cli.folder / "results" / "sweeps" / "mine"
    wait_until(lambda: "2 done, 0 failed" in (folder / "report.html").read_text())
    assert (folder / "table.md").read_text().count("%") == 2
    assert (cli.folder / "set_up").exists()
