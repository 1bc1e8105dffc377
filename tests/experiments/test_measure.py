"""What a trial measures beside its metrics: errors of blocks and layers on both texts, sums by window, what is lost."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import wush
from experiments import sweep
from experiments.identity import trial_id
from experiments.records import Record
from experiments.stages import _some
from experiments.store import ResultStore
from experiments.tracking import NoTracking
from experiments.trial import TrialRunner
from tests.experiments.conftest import composed, config
from wush.models import load_random
from wush.progress import Silent
from wush.texts import EmbeddedText


def run(folder: Path, *overrides: str) -> Record:
    planned = sweep.plan([composed(f"results={folder}", *overrides)], [])
    found = TrialRunner(planned.store, "test", NoTracking(), Silent()).run(planned.trials[0])
    assert isinstance(found, Record), found
    assert planned.store.record(planned.trials[0].trial_id) == found
    return found


def by_hand(fmt: wush.Format) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The original and the quantized model of a small trial, and its texts."""
    original, model = (load_random("llama", 64, 128, 2, 4, 2, 0, "float32", "cpu") for _ in range(2))
    sizes = {"windows": 2, "window_length": 32, "batch_size": 4}
    texts = {
        "evaluation": EmbeddedText(part="evaluation", **sizes).cut(model.tokenizer, "evaluation"),
        "calibration": EmbeddedText(part="calibration", seed=0, **sizes).cut(model.tokenizer, "calibration"),
    }
    options = {"format": fmt, "transform": wush.Wush(), "algorithm": wush.Rtn()}
    wush.quantize(model.model, [texts["calibration"]], **options)  # type: ignore[arg-type]
    return original.model, model.model, texts


@pytest.mark.parametrize(("wanted", "text"), [("calibration", "calibration"), ("held_out", "evaluation")])
def test_layer_losses_are_of_the_text_that_was_asked_for_and_block_errors_held_out(
    wanted: str, text: str, tmp_path: Path
) -> None:
    found = run(tmp_path, f"measure.layer_loss={wanted}")
    original, quantized, texts = by_hand(wush.MXFP4)
    held_out = wush.measure(original, quantized, texts["evaluation"])
    losses = wush.measure(original, quantized, texts[text], layer_losses=True)
    assert [block.held_out.mse for block in found.blocks if block.held_out] == [one.error.mse for one in held_out]
    for block, measured in zip(found.blocks, losses, strict=True):
        assert {layer.name: layer.loss.mse for layer in block.layers if layer.loss} == {
            name: loss.mse for name, loss in measured.losses.items()
        }
        assert all(layer.loss is not None and layer.loss.paper_int for layer in block.layers)


def test_a_record_keeps_sums_by_window_and_what_was_lost(tmp_path: Path) -> None:
    found = run(tmp_path, "format=nvfp4", "transform=wush")
    assert found.windows is not None
    assert found.windows.predictions == [31, 31]
    assert found.metrics.kl == pytest.approx(math.fsum(found.windows.kl) / 62, rel=1e-12)
    assert found.metrics.top1 == sum(found.windows.agree) / 62
    original, quantized, texts = by_hand(wush.NVFP4)
    evaluated = wush.evaluate(quantized, texts["evaluation"], wush.original_states(original, texts["evaluation"]))
    assert {name: lost.flushed for name, lost in found.lost.get("evaluation", {}).items()} == {
        name: lost.flushed for name, lost in evaluated.lost.items()
    }
    assert set(found.lost) <= {"calibration", "evaluation"}
    assert all(block.held_out and not any(layer.loss for layer in block.layers) for block in found.blocks)
    assert found.method_version == wush.METHOD_VERSION


def test_lost_groups_are_in_the_record_and_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wush.Nvfp4, "window", lambda _, g: (1e-3, 0.5))
    found = run(tmp_path, "format=nvfp4", "transform=i")
    for text, told in (("calibration", "calibration"), ("evaluation", "evaluated")):
        assert all(lost.clipped + lost.flushed <= lost.groups for lost in found.lost[text].values())
        assert sum(lost.clipped for lost in found.lost[text].values())
        assert len([warning for warning in found.warnings if f"window on the {told} text" in warning]) == 1


def test_a_resumed_trial_does_not_measure_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = sweep.plan([composed(f"results={tmp_path}", "measure.layer_loss=held_out", "format=nvfp4")], [])
    runner, trial = TrialRunner(planned.store, "test", NoTracking(), Silent()), planned.trials[0]
    with monkeypatch.context() as patched:
        patched.setattr(ResultStore, "finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        runner.run(trial)
    monkeypatch.setattr("wush.measure", None, raising=False)
    monkeypatch.setattr("wush.evaluate", None, raising=False)
    again = runner.run(trial)
    assert isinstance(again, Record)
    monkeypatch.undo()
    whole = run(tmp_path / "whole", "measure.layer_loss=held_out", "format=nvfp4")
    for field in ("metrics", "windows", "lost", "warnings"):
        assert getattr(again, field) == getattr(whole, field)
    assert [block.held_out for block in again.blocks] == [block.held_out for block in whole.blocks]
    assert [block.layers for block in again.blocks] == [block.layers for block in whole.blocks]


def test_a_baseline_measures_nothing(tmp_path: Path) -> None:
    found = run(tmp_path, "format=original", "measure.layer_loss=held_out")
    assert "measure" not in found.stages
    assert found.windows is not None
    assert found.windows.kl == [0, 0]
    assert found.lost == {}


def test_what_is_measured_is_part_of_a_trial() -> None:
    base = trial_id(config())
    others = ("measure.layer_loss=held_out", "measure.layer_loss=calibration", "measure.windows=null")
    assert len({base, *(trial_id(config(other)) for other in others)}) == 4
    assert len({trial_id(config("format=original", other)) for other in others}) == 1


@pytest.mark.parametrize(
    ("count", "rows"), [(4, [0, 3, 6, 9]), (1, [0]), (5, [0, 2, 4, 7, 9]), (12, list(range(12))), (None, range(12))]
)
def test_some_windows_are_evenly_spaced(count: int | None, rows: list[int]) -> None:
    windows = torch.arange(24).view(12, 2)
    assert torch.equal(_some(windows, count), windows[list(rows)])
    assert torch.equal(_some(windows, 40), windows)
