"""What becomes of trials whose jobs end badly, looked at from this process; the jobs are those of a real SLURM."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from experiments import plans
from experiments.attempts import Attempts
from experiments.launch import cluster, slurm, submitted
from experiments.launch import jobs as slurm_jobs
from experiments.launch.cluster import Mender
from experiments.records import Failure, now
from experiments.standing import Follower, Status
from experiments.store import ResultStore
from experiments.sweep import Sweep
from experiments.views import status as view
from tests.experiments.conftest import Cli
from tests.experiments.test_commands import blocks
from tests.experiments.test_pool import planned, wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import lay_in_wait
from tests.slurm.test_slurm import settings
from tests.slurm.test_sweeps import DEEP, SLURM

pytestmark = pytest.mark.slurm
REFUSAL = "echo 'sbatch: error: Batch job submission failed: Resource temporarily unavailable' >&2; exit 1"


@pytest.fixture(autouse=True)
def no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOCAL_LAG_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "LAG_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "SECONDS_AFTER_REFUSAL", 0.0)


@pytest.fixture
def own(slurm: Cluster, tmp_path: Path) -> Sweep:
    """Two planned trials, of which nothing is submitted."""
    sweep = planned(tmp_path / "results", 1, 2)
    plans.save(sweep, settings().model_dump(mode="json", by_alias=True))
    return sweep


def failure(sweep: Sweep, index: int, reason: str) -> Failure:
    trial_id = sweep.trials[index].trial_id
    sweep.store.trial(trial_id).mkdir(parents=True, exist_ok=True)
    kept = Failure(trial_id=trial_id, reason=reason, kind="error", host="there", environment={}, failed_at=now())
    sweep.store.fail(kept)
    return kept


def reasons(sweep: Sweep) -> list[str | None]:
    found = [sweep.store.failure(trial.trial_id) for trial in sweep.trials]
    return [one.reason if one else None for one in found]


def submit(sweep: Sweep, **given: Any) -> dict[str, str]:
    """Submit every trial; the job of each."""
    cluster.submit(sweep, sweep.trials, settings(**{"partition": "down"} | given))
    return submitted.job_of_trial(sweep.store.sweep(sweep.name))


def ended(sweep: Sweep) -> list[str]:
    """Submit every trial and cancel the jobs behind the sweep's back."""
    jobs = list(submit(sweep).values())
    slurm_jobs.cancel(jobs)
    wait_until(lambda: {one.state for one in slurm_jobs.states(jobs).values()} == {"CANCELLED"})
    return jobs


def states(statuses: list[Status]) -> list[str]:
    return [one.state for one in statuses]


# --- submitting


def test_reasons_of_failures_stay_until_slurm_has_taken_the_trial(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    failure(own, 0, "first")
    failure(own, 1, "second")
    with pytest.raises(slurm.SubmissionError):
        submit(own, partition="nope")
    assert reasons(own) == ["first", "second"]
    monkeypatch.setattr(slurm, "_max_array_size", lambda: 1)
    lay_in_wait(monkeypatch, own.store.root, before=f"[ -e {own.store.root}/one ] && {{ {REFUSAL}; }}", after="")
    sbatch = own.store.root / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text() + f"touch {own.store.root}/one\n")
    with pytest.raises(slurm.SubmissionError, match="1 of 2 jobs were submitted"):
        submit(own)
    assert reasons(own) == [None, "second"]


def test_a_failure_of_the_new_job_is_not_forgotten(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    failure(own, 0, "old")
    real = slurm.submit

    def quick_to_fail(*given: Any) -> list[slurm.Job]:
        jobs = real(*given)
        failure(own, 0, "new")
        return jobs

    monkeypatch.setattr(slurm, "submit", quick_to_fail)
    submit(own)
    assert reasons(own) == ["new", None]


# --- trials that ended


def test_a_job_that_was_cancelled_is_recorded_with_its_reason(own: Sweep) -> None:
    ended(own)
    mender = Mender(own, settings())
    assert states(mender.look()) == ["queued", "queued"]
    statuses = mender.look()
    assert states(statuses) == ["failed", "failed"]
    assert all("CANCELLED" in one.reason for one in statuses)
    assert view.is_over(statuses)


def test_a_look_asks_slurm_once_however_many_jobs_ended(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(own)
    real, asked = slurm_jobs._queued, []

    def counted(arrays: str) -> dict[str, slurm_jobs.JobState]:
        asked.append(arrays)
        return real(arrays)

    monkeypatch.setattr(slurm_jobs, "_queued", counted)
    Mender(own, settings()).look()
    assert None not in reasons(own)
    assert len(asked) == 1


def test_an_ended_trial_is_not_judged_before_its_files_must_have_come(
    own: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(own)
    monkeypatch.setattr(cluster, "LOCAL_LAG_SECONDS", 60.0)
    monkeypatch.setattr(cluster, "LAG_SECONDS", 60.0)
    mender = Mender(own, settings())
    assert [states(mender.look()) for _ in range(2)] == [["queued", "queued"]] * 2
    assert reasons(own) == [None, None]
    failure(own, 0, "seen late")
    assert mender.look()[0].reason == "seen late"


def test_a_reason_that_comes_at_the_last_moment_is_not_overwritten(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(own)
    real = Follower.look

    def late(follower: Follower) -> list[Status]:
        statuses = real(follower)
        failure(own, 0, "its own words")
        return statuses

    monkeypatch.setattr(Follower, "look", late)
    Mender(own, settings()).look()
    first, second = reasons(own)
    assert first == "its own words"
    assert "CANCELLED" in str(second)


@pytest.mark.parametrize(("kind", "seconds"), [("nfs4", 60.0), ("lustre", 60.0), ("ext4", 5.0), ("tmpfs", 5.0)])
def test_files_of_other_machines_are_awaited_longer(
    kind: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    mounts = [("/", "ext4"), (str(tmp_path), kind)]
    found = [SimpleNamespace(mountpoint=where, fstype=what) for where, what in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    assert cluster.lag_seconds(tmp_path / "results" / "sweeps" / "mine") == seconds


# --- trials without a job


def test_a_trial_without_a_job_is_submitted_unless_busy_ones_are_skipped(own: Sweep) -> None:
    skipping = Mender(own, settings(busy="skip"))
    assert [states(skipping.look()) for _ in range(2)] == [["stopped", "stopped"]] * 2
    mender = Mender(own, settings(partition="down"))
    mender.look()
    statuses = mender.look()
    assert states(statuses) == ["queued", "queued"]
    assert all(one.job for one in statuses)


def test_two_processes_that_mend_submit_a_trial_once(own: Sweep) -> None:
    menders = [Mender(own, settings(partition="down")) for _ in range(2)]
    for _ in range(2):
        for mender in menders:
            mender.look()
    assert len(submitted.submissions(own.store.sweep(own.name))) == 1


def test_a_refusal_while_mending_is_tried_again(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_in_wait(monkeypatch, own.store.root, before=f"[ -e {own.store.root}/busy ] && {{ {REFUSAL}; }}")
    (own.store.root / "busy").touch()
    mender = Mender(own, settings(partition="down"))
    assert states(mender.look()) == ["queued", "queued"]
    assert reasons(own) == [None, None]
    (own.store.root / "busy").unlink()
    mender.look()
    assert all(one.job for one in mender.look())


def test_a_refusal_without_end_is_a_failure_in_the_words_of_sbatch(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_in_wait(monkeypatch, own.store.root, before=REFUSAL)
    mender = Mender(own, settings(partition="down"))
    for _ in range(cluster.MAX_REFUSALS):
        assert reasons(own) == [None, None]
        mender.look()
    assert all("Resource temporarily unavailable" in str(reason) for reason in reasons(own))
    assert view.is_over(mender.look())


# --- a SLURM that does not answer


def test_trials_stay_queued_while_slurm_is_silent(
    slurm: Cluster, own: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    submit(own)
    config = Path(slurm.env["SLURM_CONF"]).read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #")
    (own.store.root / "slurm.conf").write_text(config + "\nMessageTimeout=1\n")
    monkeypatch.setenv("SLURM_CONF", str(own.store.root / "slurm.conf"))
    mender = Mender(own, settings())
    for _ in range(2):
        statuses = mender.look()
        assert states(statuses) == ["queued", "queued"]
        assert all(one.reason.startswith("unknown: SLURM does not answer") for one in statuses)
    assert reasons(own) == [None, None]
    assert caplog.text.count("this waits until SLURM answers") == 1


def test_a_job_that_an_answering_slurm_does_not_know_has_ended(own: Sweep) -> None:
    folder = own.store.sweep(own.name)
    jobs = {f"9999{i}": trial.trial_id for i, trial in enumerate(own.trials)}
    submitted.keep(folder, submitted.Submission(submitted_at=now(), name="old.0", jobs=jobs, settings={}))
    mender = Mender(own, settings())
    mender.look()
    assert all("SLURM no longer knows this job" in str(reason) for reason in reasons(own))


# --- who mends


def test_somebody_elses_sweep_is_only_looked_at(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(own)
    before = {path: path.stat().st_mtime_ns for path in own.store.root.rglob("*")}
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    look = cluster.looks_of(own, settings())
    assert [states(look()) for _ in range(2)] == [["stopped", "stopped"]] * 2
    assert {path: path.stat().st_mtime_ns for path in own.store.root.rglob("*")} == before


def test_a_cancelled_sweep_is_left_alone(own: Sweep) -> None:
    ended(own)
    (own.store.sweep(own.name) / "cancelled").touch()
    look = cluster.looks_of(own, settings())
    assert [states(look()) for _ in range(2)] == [["stopped", "stopped"]] * 2
    assert {one.reason for one in look()} == {"cancelled"}
    assert reasons(own) == [None, None]


def test_a_detached_trial_whose_job_died_is_recorded_with_the_node(slurm: Cluster, cli: Cli) -> None:
    cli.small("-m", *DEEP, *SLURM, "hydra.launcher.detach=true")
    wait_until(lambda: blocks(cli) >= 1)
    sweep, _ = plans.load(ResultStore(cli.folder / "results"), "mine")
    jobs = list(submitted.job_of_trial(sweep.store.sweep("mine")).values())
    slurm_jobs.cancel(jobs)
    wait_until(lambda: slurm_jobs.states(jobs)[jobs[0]].state == "CANCELLED")
    mender = Mender(sweep, settings())
    wait_until(lambda: view.is_over(mender.look()))
    (kept,) = [sweep.store.failure(trial.trial_id) for trial in sweep.trials]
    assert kept is not None
    assert "CANCELLED" in kept.reason
    assert kept.host == slurm_jobs.states(jobs)[jobs[0]].node
    assert Attempts(sweep.store, kept.trial_id).all()[-1].end == "failed"
