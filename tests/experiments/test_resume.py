"""A killed trial goes on where it was, and comes out the same bit for bit."""

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoints, sweep
from experiments.attempts import Attempts
from experiments.records import Record
from experiments.store import ResultStore
from experiments.tracking import NoTracking
from experiments.trial import TrialRunner
from tests.experiments.conftest import ROOT, composed, environment
from tests.experiments.killing_ground import LAYERS, POINTS
from wush.progress import Silent


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every saved tensor of a result store with one trial."""
    found = {}
    for path in folder.glob("trials/*/blocks/[0-9]*.safetensors"):
        _, own = checkpoints._unpacked(path.read_bytes())
        for name, tensor in own.items():
            found[f"{path.name[:4]} {name}"] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def record(folder: Path) -> Record:
    store = ResultStore(folder)
    (trial_id,) = store.ids()
    found = store.record(trial_id)
    assert found is not None
    return found


def comparable(one: Record) -> dict[str, Any]:
    """What must be the same however often a trial was killed."""
    blocks = [block.model_dump(exclude={"seconds"}) for block in one.blocks]
    return one.model_dump(include={"metrics", "windows", "lost", "skipped", "data", "warnings", "trial_id"}) | {
        "blocks": blocks
    }


def test_a_trial_killed_at_seeded_points_comes_out_the_same_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.experiments.killing_ground", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == POINTS >= 20
    whole, whole_record = tensors(tmp_path / "whole"), comparable(record(tmp_path / "whole"))
    assert len(whole) == LAYERS * 7 * 4  # codes, scales, transform and global scale of seven linears
    for point in points:
        folder = tmp_path / str(point["seed"])
        assert tensors(folder) == whole, point
        resumed = record(folder)
        assert comparable(resumed) == whole_record, point
        if resumed.attempts == len(Attempts(ResultStore(folder), resumed.trial_id).all()):  # not done when killed
            assert resumed.restored_blocks == point["saved"], point
    killed = [point for point in points if "finished before" not in point["kills"]]
    assert len(killed) >= 20, points
    assert len({point["saved"] for point in points}) >= 3, "kills should come at different blocks"


def runner(store: ResultStore) -> TrialRunner:
    return TrialRunner(store, "test", NoTracking(), Silent())


def run_with_blocks(folder: Path, *overrides: str) -> tuple[TrialRunner, Any, Path]:
    """A finished trial whose result is then taken away, so that it runs again with its blocks kept."""
    planned = sweep.plan([composed(f"results={folder}", "keep_blocks=true", *overrides)], [])
    own, trial = runner(planned.store), planned.trials[0]
    assert isinstance(own.run(trial), Record)
    (planned.store.trial(trial.trial_id) / "result.json").unlink()
    return own, trial, planned.store.trial(trial.trial_id) / "blocks"


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int4", "mxfp8"])
def test_restored_blocks_are_those_that_were_saved(fmt: str, tmp_path: Path) -> None:
    own, trial, _ = run_with_blocks(tmp_path, f"format={fmt}", "transform=h")
    before = tensors(tmp_path)
    again = own.run(trial)
    assert isinstance(again, Record)
    assert again.restored_blocks == 2
    assert tensors(tmp_path) == before


def test_a_damaged_block_is_reported_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, trial, blocks = run_with_blocks(tmp_path)
    whole = tensors(tmp_path)
    first = next(blocks.glob("0000.*"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    again = own.run(trial)
    assert isinstance(again, Record)
    assert "decoder block 0: the saved file is damaged" in caplog.text
    assert again.restored_blocks == 1
    assert tensors(tmp_path) == whole


def test_blocks_of_other_code_are_reported_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, trial, blocks = run_with_blocks(tmp_path)
    monkeypatch.setattr("experiments.trial.code_versions", lambda: {"wush source": "another"})
    again = own.run(trial)
    assert isinstance(again, Record)
    assert again.restored_blocks == 0
    assert "made by another wush source" in caplog.text
    assert len(list(blocks.glob("*"))) == 2


def test_blocks_of_other_tokens_are_reported_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a dataset whose newest commit is another one by now."""
    own, trial, _ = run_with_blocks(tmp_path)
    monkeypatch.setattr("experiments.stages.sha256_of_ids", lambda _: "another")
    again = runner(own.store).run(trial)
    assert isinstance(again, Record)
    assert again.restored_blocks == 0
    assert "made by another evaluation tokens, calibration tokens" in caplog.text


def test_the_code_that_blocks_depend_on_includes_the_kernels_which_are_not_imported_for_it() -> None:
    check = "import sys; from experiments.environment import code_versions as c; print(c(), *sys.modules, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    versions, *modules = found.stdout.splitlines()
    assert "wush_kernels source" in versions
    assert hashlib.sha256().hexdigest() not in versions  # of no file at all
    assert not {"wush_kernels", "torch"} & set(modules)


def test_blocks_made_on_another_device_are_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, trial, _ = run_with_blocks(tmp_path)
    monkeypatch.setattr("experiments.environment.device_name", lambda _: "another device")
    again = own.run(trial)
    assert isinstance(again, Record)
    assert again.restored_blocks == 2
    assert any("on another device: cpu" in warning for warning in again.warnings)


def test_an_evaluation_that_was_saved_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = sweep.plan([composed(f"results={tmp_path}")], [])
    own, trial = runner(planned.store), planned.trials[0]

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ResultStore, "finish", full_disk)
        own.run(trial)
    for done in ("wush.evaluate", "wush.measure"):
        monkeypatch.setattr(done, None, raising=False)
    again = own.run(trial)
    assert isinstance(again, Record)
    assert set(again.stages) == {"load", "original", "quantize", "measure", "evaluate"}


def test_warnings_of_restored_blocks_are_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wush import walk

    quantize_block = walk._quantize_block

    def warning(name: str, *arguments: Any) -> Any:
        logging.getLogger("wush.walk").warning("%s: damping raised", name)
        return quantize_block(name, *arguments)

    monkeypatch.setattr(walk, "_quantize_block", warning)
    own, trial, _ = run_with_blocks(tmp_path)
    again = own.run(trial)
    assert isinstance(again, Record)
    assert [w for w in again.warnings if "damping" in w] == [f"model.layers.{i}: damping raised" for i in range(2)]


def test_a_finished_trial_leaves_no_saved_parts_unless_they_are_kept(tmp_path: Path) -> None:
    for keep in ("false", "true"):
        planned = sweep.plan([composed(f"results={tmp_path / keep}", f"keep_blocks={keep}")], [])
        assert isinstance(runner(planned.store).run(planned.trials[0]), Record)
        folder = planned.store.trial(planned.trials[0].trial_id)
        assert (folder / "blocks").exists() == (keep == "true")
        assert not (folder / "evaluations").exists()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_batch_sizes_change_no_bit(algorithm: str, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 3, 4):
        own = (f"calibration.batch_size={size}", f"evaluation.batch_size={size}", f"algorithm={algorithm}")
        sizes = ("calibration.windows=4", "evaluation.windows=4", "keep_blocks=true")
        planned = sweep.plan([composed(f"results={tmp_path / str(size)}", *own, *sizes)], [])
        assert isinstance(runner(planned.store).run(planned.trials[0]), Record)
        one = record(tmp_path / str(size))
        found.append((one.trial_id, one.metrics, tensors(tmp_path / str(size))))
    assert all(other == found[0] for other in found)
