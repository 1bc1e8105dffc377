"""Submitting to a real SLURM, what jobs do when it ends them, and what it says about them."""

import json
import os
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.submission import seconds_to_submit
from experiments.launch import jobs as slurm_jobs
from experiments.launch import slurm as launcher
from experiments.launch import submitted
from experiments.launch.jobs import SILENT, states, why_waiting
from experiments.launch.settings import SlurmSettings, validate_launcher
from experiments.records import now
from experiments.schema import ConfigError
from tests.slurm.cluster import MAX_ARRAY_SIZE, Cluster, until
from tests.slurm.conftest import lay_in_wait, memory_is_limited_by_the_kernel

pytestmark = pytest.mark.slurm
STANDIN = Path(__file__).parent / "standin"


def settings(**given: Any) -> SlurmSettings:
    defaults = {
        **{"_target_": "hydra_plugins.wush.SlurmLauncher", "busy": "wait", "detach": False, "array_parallelism": 8},
        **{"partition": None, "account": None, "qos": None, "gpus": 0, "cpus": 1, "memory": "200M", "extra": {}},
        **{"time": 60, "signal_before": 59, "max_timeouts": 2, "setup": [f"export PYTHONPATH={STANDIN}"]},
    }
    found = validate_launcher(defaults | given)
    assert isinstance(found, SlurmSettings)
    return found


class Sweep:
    """A sweep's folder, and what the stand-in's trials leave beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "sweeps" / "test"
        self.folder.mkdir(parents=True)

    def submit(self, trial_ids: Sequence[str], **given: Any) -> list[str]:
        return [job.job_id for job in launcher.submit("test", self.folder, trial_ids, settings(**given))]

    def events(self, trial_id: str) -> list[str]:
        path = self.root / "trials" / trial_id / "events"
        return path.read_text().splitlines() if path.exists() else []

    def steps(self, trial_id: str) -> int:
        path = self.root / "trials" / trial_id / "done"
        return path.stat().st_size if path.exists() else 0


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "results")


def state(job_id: str) -> str:
    return states([job_id])[job_id].state


def ends(job_ids: Sequence[str], word: str, seconds: float = 40) -> None:
    until(f"{job_ids} {word}", lambda: {one.state for one in states(job_ids).values()} == {word}, seconds)


def gone(line: str) -> bool:
    """Whether the worker process of a stand-in's first event has ended."""
    return not Path("/proc", line.split()[-1]).exists()


# --- submitting


def test_every_trial_of_an_array_runs_and_is_recorded(slurm: Cluster, sweep: Sweep) -> None:
    trials = [f"quick.{i}" for i in range(3)]
    ids = sweep.submit(trials, cpus=3)
    ends(ids, "COMPLETED")
    assert {sweep.events(trial)[-1] for trial in trials} == {"ended 0"}
    assert {sweep.events(trial)[0].split()[2] for trial in trials} == {"3"}
    assert submitted.job_of_trial(sweep.folder) == dict(zip(trials, ids, strict=True))
    assert all("completed successfully" in submitted.log_file(sweep.folder, job_id).read_text() for job_id in ids)


def test_a_sweep_larger_than_an_array_is_split(slurm: Cluster, sweep: Sweep) -> None:
    ids = sweep.submit([f"quick.{i}" for i in range(2 * MAX_ARRAY_SIZE + 1)], partition="down", array_parallelism=2)
    arrays = list(dict.fromkeys(job_id.partition("_")[0] for job_id in ids))
    assert [sum(one.startswith(f"{array}_") for one in ids) for array in arrays[:2]] == [MAX_ARRAY_SIZE] * 2
    assert len(submitted.submissions(sweep.folder)) == 3
    found = slurm.call("squeue", "--noheader", "--Format=ArrayJobID:|,Dependency:|,ArrayTaskID:|").splitlines()
    shown = dict(line.split("|", 1) for line in found)
    assert "%1" in shown[arrays[0]]
    assert f"afterany:{arrays[0]}" in shown[arrays[2]]


def test_a_thousand_trials_are_submitted_and_seen_in_seconds(slurm: Cluster, sweep: Sweep) -> None:
    start = time.monotonic()
    ids = sweep.submit([f"quick.{i}" for i in range(1000)], partition="down", array_parallelism=100)
    assert time.monotonic() - start < 10
    start = time.monotonic()
    assert {one.state for one in states(ids).values()} == {"PENDING"}
    assert time.monotonic() - start < 2


def test_the_benchmark_submits_jobs_that_never_run(slurm: Cluster) -> None:
    seconds = seconds_to_submit(60)
    assert seconds is not None
    assert 0 < seconds < 10
    until("none is left", lambda: slurm.call("squeue", "--noheader") == "")


def test_the_benchmark_without_slurm_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert seconds_to_submit(60) is None


@pytest.mark.parametrize(
    ("given", "key", "words"),
    [
        ({"partition": "nope"}, "partition=nope", "Invalid partition"),
        ({"memory": "900G"}, "memory=900G", "Memory specification"),
        ({"gpus": 9}, "gpus=9", "not available"),
        ({"extra": {"constraint": "h100"}}, "extra={'constraint': 'h100'}", "Invalid feature"),
        ({"extra": {"foo": 1}}, "extra={'foo': 1}", "unrecognized option"),
    ],
)
def test_a_refusal_names_the_key_in_the_words_of_sbatch(
    slurm: Cluster, sweep: Sweep, given: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(launcher.SubmissionError, match=words) as error:
        sweep.submit(["quick.0", "quick.1"], **given)
    assert str(error.value).startswith(f"hydra.launcher.{key}: ")
    assert submitted.submissions(sweep.folder) == []
    assert [path.name for path in (sweep.folder / "jobs").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("given", "key"),
    [({"account": "nope"}, "account=nope"), ({"qos": "nope"}, "qos=nope"), ({"qos": "tiny"}, "qos=tiny")],
)
def test_accounts_and_limits_refuse_by_name(
    slurm_accounting: Cluster, sweep: Sweep, given: dict[str, Any], key: str
) -> None:
    with pytest.raises(launcher.SubmissionError, match=f"hydra.launcher.{key}: sbatch refused"):
        sweep.submit(["quick.0", "quick.1", "quick.2"], **({"account": "science"} | given))


def test_what_was_submitted_before_a_refusal_stays_recorded(slurm_accounting: Cluster, sweep: Sweep) -> None:
    first = sweep.submit(["steps-99.a", "steps-99.b"], account="science", qos="tiny")
    with pytest.raises(launcher.SubmissionError):
        sweep.submit(["steps-99.c"], account="science", qos="tiny")
    assert [list(one.jobs) for one in submitted.submissions(sweep.folder)] == [first]


def test_variables_of_a_job_around_do_not_reach_the_jobs(
    slurm: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "nope")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    ends(sweep.submit(["quick.0"], partition="main"), "COMPLETED")
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "7"


# --- what becomes of jobs that were submitted, but not recorded


def test_an_interrupt_before_the_jobs_are_recorded_loses_none(
    slurm: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_in_wait(monkeypatch, sweep.root, after="kill -INT $PPID; sleep 1")
    trials = [f"quick.{i}" for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        sweep.submit(trials)
    monkeypatch.undo()
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    assert [one.jobs for one in submitted.submissions(sweep.folder)] == [{}]
    found = submitted.job_of_trial(sweep.folder)
    assert list(found) == trials
    ids = sweep.submit(trials)
    assert ids == list(found.values())
    assert [one.jobs for one in submitted.submissions(sweep.folder)] == [{found[trial]: trial for trial in trials}]
    ends(ids, "COMPLETED")
    assert {len(sweep.events(trial)) for trial in trials} == {2}


def test_jobs_that_slurm_took_while_sbatch_failed_are_recorded(
    slurm: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_in_wait(monkeypatch, sweep.root, after="echo 'sbatch: error: Socket timed out on send/recv' >&2; exit 1")
    with pytest.raises(launcher.SubmissionError, match="Socket timed out") as error:
        sweep.submit(["quick.0", "quick.1"])
    assert [job.trial_id for job in error.value.submitted] == ["quick.0", "quick.1"]
    ids = list(submitted.submissions(sweep.folder)[0].jobs)
    ends(ids, "COMPLETED")


def test_an_intent_without_jobs_is_forgotten(slurm: Cluster, sweep: Sweep) -> None:
    own = submitted.Submission(submitted_at=now(), name="test.0", intended=["quick.0"], settings={})
    submitted.keep(sweep.folder, own)
    assert submitted.job_of_trial(sweep.folder) == {}
    assert launcher.adopt(sweep.folder) == []
    assert not (sweep.folder / "jobs.json").exists()


# --- jobs that are ended


def test_a_cancelled_job_ends_with_its_worker(slurm: Cluster, sweep: Sweep) -> None:
    ids = sweep.submit(["steps-999.a", "steps-999.b"])
    until("both run", lambda: all(sweep.steps(f"steps-999.{name}") for name in "ab"))
    slurm_jobs.cancel(ids[:1])
    ends(ids[:1], "CANCELLED", 5)
    assert sweep.events("steps-999.a")[-1] == "interrupted"
    assert gone(sweep.events("steps-999.a")[0])
    assert state(ids[1]) == "RUNNING"
    slurm_jobs.cancel(ids)
    ends(ids, "CANCELLED", 5)


def test_jobs_cancelled_before_they_begin_are_known(slurm: Cluster, sweep: Sweep) -> None:
    ids = sweep.submit(["quick.0", "quick.1"], partition="down")
    slurm_jobs.cancel(ids)
    ends(ids, "CANCELLED", 5)


def test_only_the_process_that_took_too_much_memory_is_killed(slurm: Cluster, sweep: Sweep) -> None:
    if not memory_is_limited_by_the_kernel():
        pytest.skip("no writable memory cgroup on this machine")
    ids = sweep.submit(["hog"], memory="300M")
    until("the parent saw it", lambda: "ended -9" in sweep.events("hog"))
    until("its log says so", lambda: submitted.ended_as(sweep.folder, ids[0]) == "OUT_OF_MEMORY")


def test_a_whole_job_killed_for_its_memory_is_seen(slurm_accounting: Cluster, sweep: Sweep) -> None:
    ids = sweep.submit(["hog"], memory="300M", account="science")
    ends(ids, "FAILED")
    assert len(sweep.events("hog")) == 1
    assert submitted.ended_as(sweep.folder, ids[0]) == "OUT_OF_MEMORY"


# --- what SLURM says


def test_a_job_that_never_starts_says_why(slurm: Cluster, sweep: Sweep) -> None:
    down = sweep.submit(["quick.0", "quick.1"], partition="down")
    long = sweep.submit(["quick.2"], partition="short")
    expected = ["PartitionDown", "PartitionDown", "PartitionTimeLimit"]
    until("the reasons are known", lambda: [one.reason for one in states(down + long).values()] == expected)
    assert {one.state for one in states(down + long).values()} == {"PENDING"}
    assert "hydra.launcher.partition" in str(why_waiting("PartitionDown"))
    assert "hydra.launcher.time" in str(why_waiting("PartitionTimeLimit"))


def test_a_limit_that_makes_a_job_wait_says_so(slurm_accounting: Cluster, sweep: Sweep) -> None:
    ids = sweep.submit(["steps-999.a", "steps-999.b"], account="science", qos="one_cpu")
    until("one runs", lambda: state(ids[0]) == "RUNNING")
    until("one waits", lambda: "QOS" in str(states(ids)[ids[1]].reason))
    assert "hydra.launcher.qos" in str(why_waiting(states(ids)[ids[1]].reason))


def test_accounting_remembers_what_the_controller_forgot(slurm_accounting: Cluster, sweep: Sweep) -> None:
    ids = sweep.submit(["quick.0", "steps-999", "steps-999.c"], account="science", array_parallelism=2)
    until("it runs", lambda: sweep.steps("steps-999") > 0)
    slurm_jobs.requeue(ids[1:2])
    until("queued again", lambda: state(ids[1]) == "PENDING")
    slurm_jobs.cancel(ids)
    until("forgotten", lambda: slurm_accounting.call("squeue", "--noheader", "--states=all") == "")
    found = states(ids)
    assert [found[job_id].state for job_id in ids] == ["COMPLETED", "CANCELLED", "CANCELLED"]
    assert [found[job_id].restarts for job_id in ids] == [0, 1, 0]
    assert found[ids[0]].node
    assert found[ids[0]].started_at


def test_without_accounting_a_forgotten_job_is_unknown(slurm: Cluster) -> None:
    found = states(["99999_3", "99998"])
    assert {one.state for one in found.values()} == {"UNKNOWN"}
    assert found["99999_3"].reason == "SLURM no longer knows this job"


# --- no SLURM


def test_an_answering_slurm_is_available(slurm: Cluster) -> None:
    launcher.check_available()


def test_a_controller_that_does_not_answer(slurm: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = sweep.submit(["quick.0"], partition="down")
    config = Path(slurm.env["SLURM_CONF"]).read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #")
    (sweep.root / "slurm.conf").write_text(config + "\nMessageTimeout=1\n")
    monkeypatch.setenv("SLURM_CONF", str(sweep.root / "slurm.conf"))
    with pytest.raises(ConfigError, match="DOWN"):
        launcher.check_available()
    silent = states(ids)[ids[0]]
    assert silent.state == SILENT
    assert "does not answer" in str(silent.reason)
    with pytest.raises(slurm_jobs.SlurmAway):
        slurm_jobs.cancel(ids)


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on PATH"):
        launcher.check_available()
    assert state("1_0") == SILENT


def test_jobs_import_this_checkout_by_name(tmp_path: Path) -> None:
    content = pickle.dumps(launcher.TrialJob(str(tmp_path), "sweep", "trial", "60 min"))
    assert b"experiments.launch.slurm" in content
    assert len(content) < 300


def test_jobs_json_holds_the_settings(slurm: Cluster, sweep: Sweep) -> None:
    sweep.submit(["quick.0"], partition="down")
    content = json.loads((sweep.folder / "jobs.json").read_text())
    assert content["submissions"][0]["settings"]["partition"] == "down"


# --- words that the cluster on loopback does not say


@pytest.mark.parametrize(
    ("word", "expected"),
    [("SIGNALING", "RUNNING"), ("SPECIAL_EXIT", "PENDING"), ("CANCELLED by 0", "CANCELLED"), ("TIMEOUT", "TIMEOUT")],
)
def test_words_for_a_passing_state_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, expected: str
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '7_3|{word}|None|n[1-2]|2|2026-01-02T03:04:05|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found = states(["7_3"])["7_3"]
    assert (found.state, found.reason, found.node, found.restarts) == (expected, None, "n[1-2]", 2)


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("QOSMaxGRESPerUser", "hydra.launcher.qos"),
        ("AssocGrpCPUMinutesLimit", "hydra.launcher.account"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-4]", "hydra.launcher.partition"),
        ("Nodes required for job are DOWN, DRAINED or reserved", "hydra.launcher.partition"),
        ("BadConstraints", "hydra.launcher.extra"),
    ],
)
def test_a_reason_to_wait_comes_with_the_key_to_change(reason: str, key: str) -> None:
    assert key in str(why_waiting(reason))


def test_an_unknown_reason_is_left_as_it_is() -> None:
    assert why_waiting("SomethingNew") is None
    assert why_waiting(None) is None
