"""Worker processes: warm, apart from each other, replaced when they die, and never outliving their parent."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments import sweep
from experiments.attempts import Attempts, Lease
from experiments.launch import driver, pool
from experiments.launch.choose import launch_of
from experiments.launch.local_parallel import environments
from experiments.launch.settings import LocalParallelSettings, validate_launcher
from experiments.records import Failure, Outcome, Record
from experiments.schema import ConfigError
from experiments.sweep import Sweep
from tests.experiments.conftest import SMALL, composed, environment

PARALLEL = {
    "_target_": "hydra_plugins.wush.LocalParallelLauncher",
    "busy": "wait",
    "workers": 2,
    "gpus": None,
    "threads": 1,
}
# What a worker does before the quantization of a trial of this seed; `once` makes a file.
AMBUSH = """
import os, sys
if "experiments.launch.worker" in " ".join(sys.orig_argv):
    import signal
    import wush.walk
    from pathlib import Path
    quantize, marker = wush.walk.quantize, Path({marker!r})
    def ambush(model, batches, **options):
        if model.config.num_hidden_layers == 3 and len(list(marker.glob("*"))) < {times}:
            (marker / str(os.getpid())).touch()
            {act}
        return quantize(model, batches, **options)
    wush.walk.quantize = ambush
"""


def planned(folder: Path, *layers: int) -> Sweep:
    """Trials of models with so many decoder blocks."""
    return sweep.plan([composed(f"results={folder}", f"model.layers={n}") for n in layers], [])


def outcomes(own: Sweep, **settings: Any) -> list[Outcome]:
    launch = launch_of(validate_launcher(PARALLEL | settings))
    try:
        return driver.run(own, launch)
    except driver.SweepFailed:
        return driver.Board(own).look()


@pytest.fixture
def ambush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """Has workers do something to themselves, so often, when they quantize a model of three decoder blocks."""

    def lay(act: str, times: int) -> Path:
        marker = tmp_path / "ambushed"
        marker.mkdir()
        (tmp_path / "site").mkdir()
        code = AMBUSH.format(marker=str(marker), times=times, act=act)
        (tmp_path / "site" / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        return marker

    return lay


def attempts(own: Sweep, index: int) -> Attempts:
    return Attempts(own.store, own.trials[index].trial_id)


def test_workers_are_warm_and_share_the_trials(tmp_path: Path) -> None:
    own = planned(tmp_path, 1, 2, 3, 4)
    found = outcomes(own)
    assert [outcome.state for outcome in found] == ["done"] * 4
    pids = {attempts(own, index).all()[-1].owner.pid for index in range(4)}
    assert len(pids) <= 2
    assert os.getpid() not in pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("act", ["os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(3)"])
def test_a_crashed_worker_fails_its_trial_alone_and_is_replaced(
    act: str, tmp_path: Path, ambush: Callable[[str, int], Path]
) -> None:
    ambush(act, 9)
    own = planned(tmp_path / "results", 3, 1, 2)
    found = outcomes(own, workers=1)
    assert [outcome.state for outcome in found] == ["failed", "done", "done"]
    failure = found[0].failure
    assert isinstance(failure, Failure)
    assert ("SIGSEGV" if "SEGV" in act else "exit code 3") in failure.reason
    assert (failure.kind, attempts(own, 0).all()[-1].end) == ("crash", "failed")


@pytest.fixture
def scarce_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts a kill for memory whenever it is asked; tests/slurm has it kill for real."""
    kills = itertools.count()
    monkeypatch.setattr(pool, "out_of_memory_kills", lambda: next(kills))


@pytest.mark.usefixtures("scarce_memory")
def test_a_worker_killed_when_memory_ran_out_is_tried_again_once(
    tmp_path: Path, ambush: Callable[[str, int], Path]
) -> None:
    marker = ambush("os.kill(os.getpid(), signal.SIGKILL)", 1)
    own = planned(tmp_path / "results", 3, 1)
    assert [outcome.state for outcome in outcomes(own)] == ["done", "done"]
    assert len(list(marker.iterdir())) == 1
    record = own.store.record(own.trials[0].trial_id)
    assert isinstance(record, Record)
    assert any("one window at a time" in warning for warning in record.warnings)
    assert [one.end for one in attempts(own, 0).all()] == ["out of memory", "done"]


@pytest.mark.usefixtures("scarce_memory")
def test_a_worker_killed_twice_for_memory_fails_its_trial_with_advice(
    tmp_path: Path, ambush: Callable[[str, int], Path]
) -> None:
    ambush("os.kill(os.getpid(), signal.SIGKILL)", 9)
    own = planned(tmp_path / "results", 3, 1)
    failed, done = outcomes(own)
    assert (failed.state, done.state) == ("failed", "done")
    assert failed.failure is not None
    assert "SIGKILL" in failed.failure.reason
    assert "more memory" in (failed.failure.advice or "")


def test_a_worker_killed_by_somebody_goes_on_as_it_was(tmp_path: Path, ambush: Callable[[str, int], Path]) -> None:
    ambush("os.kill(os.getpid(), signal.SIGKILL)", 2)
    own = planned(tmp_path / "results", 3)
    assert [outcome.state for outcome in outcomes(own, workers=1)] == ["done"]
    record = own.store.record(own.trials[0].trial_id)
    assert record is not None
    assert (record.warnings, record.attempts) == ([], 3)


def test_a_worker_that_somebody_ends_is_replaced_and_its_trial_goes_on(
    tmp_path: Path, ambush: Callable[[str, int], Path]
) -> None:
    ambush("os.kill(os.getpid(), signal.SIGTERM); __import__('time').sleep(60)", 1)
    own = planned(tmp_path / "results", 3, 1)
    assert [outcome.state for outcome in outcomes(own, workers=1)] == ["done", "done"]
    assert [one.end for one in attempts(own, 0).all()] == ["interrupted", "done"]


def test_workers_that_are_killed_before_they_begin_are_not_replaced_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'experiments.launch.worker' in ' '.join(sys.orig_argv): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (failed,) = outcomes(planned(tmp_path / "results", 1), workers=1)
    assert failed.failure is not None
    assert "ended 4 times" in failed.failure.reason


def test_a_dead_worker_ends_no_attempt_but_its_own(tmp_path: Path) -> None:
    own = planned(tmp_path, 1)
    trial, log = own.trials[0], tmp_path / "log"
    lease = Attempts(own.store, trial.trial_id).claim("another")
    assert isinstance(lease, Lease)
    assert pool._after_death(own.store, "mine", trial, 1, -signal.SIGKILL, True, log) == "again"
    assert pool._after_death(own.store, "mine", trial, 1, -signal.SIGSEGV, True, log) == "busy"
    assert Attempts(own.store, trial.trial_id).running() is not None
    assert own.store.failure(trial.trial_id) is None


def test_a_dead_parent_leaves_no_worker_and_the_sweep_goes_on(tmp_path: Path) -> None:
    program = "import sys; from experiments.app import main; main()"
    arguments = [*SMALL, "-m", "seed=range(0,60)", "hydra/launcher=local_parallel", "hydra.launcher.workers=2"]
    parent = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(list(tmp_path.rglob("result.json"))) >= 2)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    before = len(list(tmp_path.rglob("result.json")))
    again = subprocess.run(
        [sys.executable, "-c", program, *arguments, "seed=range(0,8)"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert f"{min(before, 8)} of 8 trials already done" in again.stderr or before > 8


def test_an_interrupted_parent_ends_its_workers_attempts(tmp_path: Path) -> None:
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # some shells ignore it
        "from experiments.app import main; main()"
    )
    arguments = [*SMALL, "model.layers=80", "hydra/launcher=local_parallel", "hydra.launcher.workers=1", "-m", "seed=0"]
    parent = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(list(tmp_path.rglob("blocks/*.safetensors"))) >= 2)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert "interrupted" in errors
    (path,) = tmp_path.rglob("attempts/*.json")
    assert json.loads(path.read_text())["end"] == "interrupted"


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- which GPU, how many threads


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def visible(device: str, **settings: Any) -> list[dict[str, str]]:
    return environments(LocalParallelSettings(**PARALLEL | {"workers": None} | settings), device)


def gpus(device: str, **settings: Any) -> list[str]:
    return [own["CUDA_VISIBLE_DEVICES"] for own in visible(device, **settings)]


@pytest.mark.usefixtures("three_gpus")
def test_each_worker_sees_one_gpu() -> None:
    assert gpus("auto") == ["0", "1", "2"]
    assert gpus("cuda", gpus=[2, 0]) == ["2", "0"]
    assert gpus("auto", workers=2) == ["0", "1"]


@pytest.mark.usefixtures("three_gpus")
def test_gpus_that_are_hidden_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-8f2c")
    assert gpus("auto") == ["1", "GPU-8f2c"]


@pytest.mark.usefixtures("three_gpus")
def test_workers_on_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert {own["OMP_NUM_THREADS"] for own in visible("auto", threads=None)} == {"5"}


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", [3], r"hydra.launcher.gpus=\[3\]: this machine has 0, 1, 2"),
        ("cuda:1", None, r"device=cuda:1: .* set device=cuda and hydra.launcher.gpus=\[1\]"),
        ("cpu", [0], r"device=cpu uses none"),
    ],
)
def test_gpus_that_cannot_be_used_are_config_errors(device: str, gpus: list[int] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visible(device, gpus=gpus)


def test_cpu_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert visible("cpu", threads=None) == [{"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}] * 8
    assert visible("cpu", workers=4, threads=None) == [{"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}] * 4


def test_a_job_says_what_to_do_about_a_trial_that_left_the_plan(tmp_path: Path) -> None:
    own = planned(tmp_path, 1)
    outcomes(own, workers=1)
    with pytest.raises(RuntimeError, match="not in the plan of sweep default any more"):
        pool.run_in_job(str(tmp_path), "default", "0" * 16)
