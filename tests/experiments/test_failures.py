"""Failures by kind: what is tried again, with what, and what the user is told."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wush
from experiments import sweep
from experiments.attempts import Attempt, Attempts, Owner
from experiments.checkpoints import Checkpoint
from experiments.failures import ADVICE, classify, may_go_on
from experiments.records import Failure, Record, now
from experiments.tracking import NoTracking
from experiments.trial import GpuLost, TrialRunner
from tests.experiments.conftest import composed
from wush.progress import Silent


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (wush.NumericError("not finite"), "numeric"),
        (wush.UnsupportedModelError("no blocks"), "config"),
        (ValueError("model 'x': no config.json there"), "config"),
        (OSError(28, "No space left on device"), "disk"),
        (OSError(122, "Disk quota exceeded"), "disk"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "gpu"),
        (RuntimeError("shapes cannot be multiplied"), "error"),
        (FileNotFoundError(2, "No such file"), "error"),
    ],
)
def test_an_exception_is_of_one_kind(error: Exception, kind: str) -> None:
    assert classify(error) == kind


def attempt(end: Any) -> Attempt:
    return Attempt(number=1, owner=Owner.this_process(), sweep="s", started_at=now(), end=end)


@pytest.mark.parametrize(
    ("ends", "again"),
    [
        ([], True),
        (["out of memory"], True),
        (["out of memory", "out of memory"], False),
        (["out of memory", "interrupted", "out of memory"], False),
        (["lost"] * 9, True),
        (["interrupted"], True),
        (["crashed"], False),
        (["cancelled"], False),
    ],
)
def test_lost_trials_go_on_and_memory_fails_twice(ends: list[str], again: bool) -> None:
    assert may_go_on([attempt(end) for end in ends]) == again


def run(folder: Path, *overrides: str) -> tuple[Record | Failure | Attempt, Attempts]:
    sizes = ("calibration.windows=4", "calibration.batch_size=4", "evaluation.windows=4", "evaluation.batch_size=2")
    planned = sweep.plan([composed(f"results={folder}", *sizes, *overrides)], [])
    trial = planned.trials[0]
    found = TrialRunner(planned.store, "s", NoTracking(), Silent()).run(trial)
    return found, Attempts(planned.store, trial.trial_id)


def out_of_memory(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Have `wush.quantize` run out of memory so often; the batch sizes that it was called with."""
    quantize, sizes = wush.quantize, []

    def call(model: Any, batches: Any, **options: Any) -> Any:
        sizes.append(len(batches[0]))
        if len(sizes) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return quantize(model, batches, **options)

    monkeypatch.setattr("wush.quantize", call, raising=False)
    return sizes


def test_out_of_memory_is_tried_again_one_window_at_a_time_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path / "whole")
    sizes = out_of_memory(monkeypatch, 1)
    found, attempts = run(tmp_path / "short")
    assert sizes == [4, 1]
    assert isinstance(whole, Record)
    assert isinstance(found, Record)
    assert (found.trial_id, found.metrics) == (whole.trial_id, whole.metrics)
    assert any("one window at a time" in warning for warning in found.warnings)
    assert (whole.warnings, found.attempts) == ([], 2)
    assert [one.end for one in attempts.all()] == ["out of memory", "done"]


def test_out_of_memory_twice_is_a_failure_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = out_of_memory(monkeypatch, 2)
    found, attempts = run(tmp_path)
    assert sizes == [4, 1]
    assert isinstance(found, Failure)
    assert (found.kind, found.advice) == ("out of memory", ADVICE["out of memory"])
    assert attempts.since_failure() == []
    out_of_memory(monkeypatch, 0)
    assert isinstance(run(tmp_path)[0], Record), "after a failure it may start anew"


def test_a_numeric_failure_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = wush.evaluate
    monkeypatch.setattr(
        "wush.evaluate", lambda *own, **options: replace(evaluate(*own, **options), perplexity=math.inf), raising=False
    )
    failure, attempts = run(tmp_path)
    assert isinstance(failure, Failure)
    assert (failure.kind, len(attempts.all())) == ("numeric", 1)


def test_an_interrupt_is_an_ended_attempt_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    planned = sweep.plan([composed(f"results={tmp_path}")], [])
    with monkeypatch.context() as patched:
        patched.setattr("wush.evaluate", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            TrialRunner(planned.store, "s", NoTracking(), Silent()).run(planned.trials[0])
    attempts = Attempts(planned.store, planned.trials[0].trial_id)
    assert [one.end for one in attempts.all()] == ["interrupted"]
    assert planned.store.failure(planned.trials[0].trial_id) is None
    resumed = TrialRunner(planned.store, "s", NoTracking(), Silent()).run(planned.trials[0])
    assert isinstance(resumed, Record)
    assert resumed.restored_blocks == 2


def test_a_gpu_that_fails_is_left_to_another_process_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr("wush.quantize", broken, raising=False)
    planned = sweep.plan([composed(f"results={tmp_path}")], [])
    worker = TrialRunner(planned.store, "s", NoTracking(), Silent(), replaceable=True)
    with pytest.raises(GpuLost):
        worker.run(planned.trials[0])
    failure = worker.run(planned.trials[0])
    assert isinstance(failure, Failure)
    assert failure.kind == "gpu"


def test_what_was_made_one_window_at_a_time_says_so_however_often_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    save = Checkpoint.save

    def full(self: Checkpoint, *arguments: Any) -> None:
        save(self, *arguments)
        saves.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", full)
        assert isinstance(run(tmp_path)[0], Failure)
    assert len(saves) == 2, "the second block was made one window at a time"
    found, _ = run(tmp_path)
    assert isinstance(found, Record)
    assert found.restored_blocks == 2
    assert any("one window at a time" in warning for warning in found.warnings)


def test_the_original_is_evaluated_once_however_often_a_trial_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("wush.quantize", None, raising=False)
        assert isinstance(run(tmp_path)[0], Failure)
    monkeypatch.setattr("wush.original_states", None, raising=False)
    assert isinstance(run(tmp_path)[0], Record)
