"""Fixtures that give tests a SLURM of their own: each test process starts its own, when the first test needs it.

A test takes `slurm` (or `slurm_accounting`) and finds SLURM_CONF set, so that whatever it calls is led to the cluster.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.conftest import cli as cli
from tests.experiments.test_commands import drivers as drivers
from tests.slurm.cluster import Cluster, missing


def _running(accounting: bool, cgroups: bool, min_job_age: int) -> Iterator[Cluster]:
    if lacking := missing(accounting):
        pytest.skip(f"SLURM is not installed here: {', '.join(lacking)} not found")
    cluster = Cluster(accounting, cgroups, min_job_age)
    try:
        cluster.start()
    except Exception:  # its logs are of use
        cluster.stop()
        raise
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.folder)


def _used(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))]:
        monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.cancel_all()


def memory_is_limited_by_the_kernel() -> bool:
    """Whether SLURM can use cgroups here, as real clusters do: then only a process that takes too much is killed."""
    return os.geteuid() == 0 and os.access("/sys/fs/cgroup/memory", os.W_OK)


def lay_in_wait(monkeypatch: pytest.MonkeyPatch, folder: Path, before: str = "", after: str = "") -> None:
    """Have shell lines run before and after sbatch, whoever calls it."""
    own = folder / "bin" / "sbatch"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\n{before}\n{shutil.which("sbatch")} "$@"\n{after}\n')
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{own.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    yield from _running(accounting=False, cgroups=memory_is_limited_by_the_kernel(), min_job_age=300)


@pytest.fixture(scope="session")
def _accounting_cluster() -> Iterator[Cluster]:
    yield from _running(accounting=True, cgroups=False, min_job_age=2)


@pytest.fixture
def slurm(_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Without accounting; ended jobs stay known for five minutes."""
    yield from _used(_cluster, monkeypatch)


@pytest.fixture
def slurm_accounting(_accounting_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """With accounting and its limits (account `science`); the controller forgets ended jobs after two seconds."""
    yield from _used(_accounting_cluster, monkeypatch)
