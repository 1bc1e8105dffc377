"""What a user sees while a trial runs."""

import io
import logging

import pytest
from rich.console import Console

from experiments.views import display


def walk(progress: display.Progress) -> list[int]:
    seen = []
    for i in progress.track(range(3), "decoder blocks", 3):
        progress.detail(f"model.layers.{i}.mlp.up_proj")
        seen.append(i)
    return seen


@pytest.mark.parametrize("kind", ["auto", "bars", "lines", "none"])
def test_tracked_items_come_through_unchanged(kind: str) -> None:
    with display.showing(kind) as progress:  # type: ignore[arg-type]
        assert walk(progress) == [0, 1, 2]


def test_bars_show_nested_loops_and_the_current_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=screen, force_terminal=True, width=120))
    with display.showing("auto") as progress:
        for _ in progress.track([1], "trials", 1):
            walk(progress)
            assert isinstance(progress, display.Bars)
            progress._bars.refresh()
            for _ in progress.track([1], "decoder blocks", 30):
                progress.detail("model.layers.7.mlp.up_proj")
                progress._bars.refresh()
    assert "trials" in screen.getvalue()
    assert "0/30" in screen.getvalue()
    assert "model.layers.7.mlp.up_proj" in screen.getvalue()


def test_lines_say_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(display.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO), display.showing("lines") as progress:
        walk(progress)
    assert "decoder blocks: 1 of 3, about" in caplog.text
    assert "left (model.layers.0.mlp.up_proj)" in caplog.text
    assert "decoder blocks: 3 of 3 in" in caplog.text


def test_progress_is_lines_when_the_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "console", Console(file=io.StringIO()))
    with display.showing("auto") as progress:
        assert isinstance(progress, display.Lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert display.duration(seconds) == text
