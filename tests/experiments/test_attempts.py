"""Attempts as locks: one owner at a time, none lost with its owner, and an owner thought dead stops by itself."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import attempts as module
from experiments.attempts import Attempt, AttemptLost, Attempts, Cancelled, Lease, Owner
from experiments.store import ResultStore
from tests.experiments.conftest import ROOT, environment

CLAIM = """
import sys, time
from experiments.attempts import Attempts, Lease
from experiments.store import ResultStore
lease = Attempts(ResultStore(sys.argv[1]), "abc").claim("theirs")
print("lease" if isinstance(lease, Lease) else f"busy {lease.owner.pid}", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def others(tmp_path: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that have claimed, or tried to, and hold on to it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def other(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CLAIM, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)


def answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def of(folder: Path) -> Attempts:
    return Attempts(ResultStore(folder), "abc")


def claimed(folder: Path) -> Lease:
    lease = of(folder).claim("mine")
    assert isinstance(lease, Lease)
    return lease


def elsewhere(folder: Path, silent_for: float) -> None:
    """Have the last attempt belong to another machine that was heard of so long ago."""
    path = max((folder / "trials" / "abc" / "attempts").glob("*.json"))
    content = json.loads(path.read_text())
    content["owner"] |= {"host": "elsewhere", "boot": "another"}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - silent_for,) * 2)


def test_of_many_processes_that_claim_at_once_one_gets_the_trial(
    tmp_path: Path, others: list["subprocess.Popen[str]"]
) -> None:
    others += [other(tmp_path) for _ in range(6)]
    answers = [answer(process) for process in others]
    assert answers.count("lease") == 1
    winner = others[answers.index("lease")]
    assert answers.count(f"busy {winner.pid}") == 5


def test_a_killed_owners_trial_is_free_at_once_and_its_attempt_is_lost(
    tmp_path: Path, others: list["subprocess.Popen[str]"]
) -> None:
    others.append(other(tmp_path))
    assert answer(others[0]) == "lease"
    assert isinstance(of(tmp_path).claim("mine"), Attempt)
    others[0].kill()
    others[0].wait()
    assert of(tmp_path).running() is None
    assert claimed(tmp_path).number == 2
    first, second = of(tmp_path).all()
    assert (first.end, second.end) == ("lost", None)


def test_a_stopped_process_of_this_machine_keeps_its_trial(
    tmp_path: Path, others: list["subprocess.Popen[str]"]
) -> None:
    others.append(other(tmp_path))
    assert answer(others[0]) == "lease"
    others[0].send_signal(signal.SIGSTOP)
    path = next(tmp_path.rglob("0001.json"))
    os.utime(path, (0, 0))
    assert isinstance(of(tmp_path).claim("mine"), Attempt)


@pytest.mark.parametrize(("silent_for", "free"), [(10.0, False), (module.SILENCE_SECONDS + 10, True)])
def test_an_owner_elsewhere_is_gone_when_it_is_silent(silent_for: float, free: bool, tmp_path: Path) -> None:
    claimed(tmp_path)
    elsewhere(tmp_path, silent_for)
    assert isinstance(of(tmp_path).claim("mine"), Lease) == free


def test_an_owner_that_was_taken_over_is_told_and_stops(tmp_path: Path) -> None:
    lease, told = claimed(tmp_path), threading.Event()
    with lease.kept(told.set, every=0.05):
        lease.check()
        elsewhere(tmp_path, module.SILENCE_SECONDS + 10)
        claimed(tmp_path)
        assert told.wait(5)
    with pytest.raises(AttemptLost):
        lease.check()


def test_a_cancelled_sweep_ends_its_attempts_and_no_others(tmp_path: Path) -> None:
    lease, told = claimed(tmp_path), threading.Event()
    marker = tmp_path / "sweeps" / "another" / "cancelled"
    marker.parent.mkdir(parents=True)
    marker.touch()
    lease.check()
    with lease.kept(told.set, every=0.05):
        marker.parent.rename(tmp_path / "sweeps" / "mine")
        assert told.wait(5)
    with pytest.raises(Cancelled):
        lease.check()


def test_a_job_that_slurm_starts_again_elsewhere_takes_its_own_trial_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    claimed(tmp_path)
    elsewhere(tmp_path, 0)
    assert isinstance(of(tmp_path).claim("mine"), Attempt), "two processes of one job"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert isinstance(of(tmp_path).claim("mine"), Attempt), "another task's trial"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert claimed(tmp_path).number == 2


def test_two_live_processes_of_one_job_do_not_take_trials_from_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list["subprocess.Popen[str]"]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    others.append(other(tmp_path))
    assert answer(others[0]) == "lease"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert isinstance(of(tmp_path).claim("mine"), Attempt)


def test_an_ended_attempt_frees_the_trial_and_keeps_its_first_end(tmp_path: Path) -> None:
    lease = claimed(tmp_path)
    lease.end("interrupted")
    of(tmp_path).close(1, "lost")
    assert claimed(tmp_path).number == 2
    assert [attempt.end for attempt in of(tmp_path).all()] == ["interrupted", None]


def test_a_lease_is_renewed_while_it_is_kept(tmp_path: Path) -> None:
    lease = claimed(tmp_path)
    path = next(tmp_path.rglob("0001.json"))
    os.utime(path, (0, 0))
    with lease.kept(lambda: None, every=0.05):
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert time.time() - path.stat().st_mtime < 10


def test_progress_is_in_the_attempts_file(tmp_path: Path) -> None:
    lease = claimed(tmp_path)
    lease.progress("decoder blocks", 3, 30, 81.0, "error 0.01")
    running = of(tmp_path).running()
    assert running is not None
    assert (running.stage, running.done, running.total, running.left) == ("decoder blocks", 3, 30, 81.0)


def test_a_process_that_ended_is_not_mistaken_for_one_that_has_its_number(tmp_path: Path) -> None:
    owner = Owner.this_process()
    assert owner.runs()
    assert not owner.model_copy(update={"born": owner.born - 1}).runs()
    assert not owner.model_copy(update={"boot": "another"}).is_here()


def test_an_attempt_that_cannot_be_read_is_judged_by_its_files_age(tmp_path: Path) -> None:
    claimed(tmp_path)
    path = next(tmp_path.rglob("0001.json"))
    path.write_text("{")
    assert isinstance(of(tmp_path).claim("mine"), Attempt)
    os.utime(path, (time.time() - module.SILENCE_SECONDS - 10,) * 2)
    assert claimed(tmp_path).number == 2


def test_a_file_that_is_stale_for_a_moment_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed(tmp_path)
    answers = iter([OSError(116, "Stale file handle"), OSError(2, "No such file or directory")])
    read_bytes = Path.read_bytes

    def stale(path: Path) -> bytes:
        error = next(answers, None)
        if error:
            raise error
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    running = of(tmp_path).running()
    assert running is not None
    assert running.owner == Owner.this_process()


def test_a_claim_that_was_granted_and_reported_taken_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(source: str, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    assert claimed(tmp_path).number == 1


def test_attempts_since_the_last_failure_count_alone(tmp_path: Path) -> None:
    for end in ("out of memory", "failed", "lost"):
        claimed(tmp_path).end(end)  # type: ignore[arg-type]
    assert [attempt.number for attempt in of(tmp_path).since_failure()] == [3]
    of(tmp_path).give_up("too often")
    assert of(tmp_path).since_failure() == []
