"""A disk that fills in the middle of a sweep, for real: a small file system in memory."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.conftest import Cli

PARALLEL = ("hydra/launcher=local_parallel", "hydra.launcher.workers=2")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Use up a disk but for so many bytes."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - leave))
    return filler


@pytest.mark.parametrize("launcher", [(), PARALLEL])
@pytest.mark.parametrize("leave", [0, 100_000])
def test_a_full_disk_is_named_loses_nothing_and_retry_finishes_the_sweep(
    leave: int, launcher: tuple[str, ...], small_disk: Path, cli: Cli
) -> None:
    results = f"results={small_disk}/results"
    assert cli.small("-m", "seed=0,1", "sweep=mine", results).returncode == 0
    before = {path: path.read_bytes() for path in small_disk.rglob("result.json")}
    assert len(before) == 2
    filler = fill(small_disk, leave)
    full = cli.small("-m", "seed=0,1,2,3", "model.layers=20", "sweep=mine", results, *launcher)
    assert full.returncode in (1, 2), full.stdout
    assert "No space left on device" in full.stdout + full.stderr
    assert "Traceback" not in full.stderr
    filler.unlink()
    assert {path: path.read_bytes() for path in before} == before
    assert cli.small("-m", "seed=0,1", "sweep=mine", results).returncode == 0
    retried = cli.small("-m", "seed=0,1,2,3", "model.layers=20", "sweep=mine", results, *launcher)
    assert retried.returncode == 0, retried.stderr
    assert "4 of 4 trials done" in retried.stdout
