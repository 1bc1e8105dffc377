"""Every published or measured number in a figure is the one in its file."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from plots import figure2, figure6, platinum, style
from plots.records import Records
from plots.reference import BENCHMARKS, FILES, FOLDER, Platinum, Speedup, Unreadable, read
from wush_kernels.bench.measurement import Ceilings, Measurement, Timing, Work
from wush_kernels.bench.record import RESULTS, Record, save

MODELS = ("Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")


SIZES = [(layer.m, layer.n, layer.k) for layer in read(Speedup)]


@pytest.fixture(autouse=True)
def paper() -> Iterator[None]:
    with style.applied("paper"):
        yield


def cells(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]


def bars(axes: Axes) -> dict[str, list[float]]:
    return {str(bar.get_label()): [one.get_width() for one in bar] for bar in axes.containers}


def test_every_file_of_published_numbers_is_read_completely() -> None:
    assert {path.name for path in FOLDER.glob("*.csv")} == set(FILES.values())
    for kind, name in FILES.items():
        rows, wanted = read(kind), cells(name)
        assert len(rows) == len(wanted) > 0
        for row, line in zip(rows, wanted, strict=True):
            found: dict[str, Any] = row.model_dump()
            found |= found.pop("benchmarks", {})
            assert set(found) == set(line)
            for column, cell in line.items():
                value = found[column]
                assert (value is None) if cell == "" else (value == type(value)(cell)), (name, column)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("6.21", "fast", 1), "line 2: matmul_only: .*'fast'"),
        (lambda text: text.replace("5.461", "nan", 1), "line 3: matmul_only"),
        (lambda text: text.replace("6.21", "", 1), "line 2: matmul_only"),
        (lambda text: text.replace("matmul_only", "matmul", 1), "line 2: matmul_only: Field required"),
        (lambda text: text.replace("6.21", "6.21,1", 1), "line 2: more cells than columns"),
        (lambda text: text.splitlines()[0], "holds no rows"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, damage: Any, said: str) -> None:
    name = FILES[Speedup]
    (tmp_path / name).write_text(damage((FOLDER / name).read_text()))
    with pytest.raises(Unreadable, match=f"{name}: {said}.*; restore it with"):
        read(Speedup, tmp_path)


def test_a_benchmark_that_is_missing_is_named(tmp_path: Path) -> None:
    name = FILES[Platinum]
    (tmp_path / name).write_text((FOLDER / name).read_text().replace("SQuAD", "Squad", 1))
    with pytest.raises(Unreadable, match=r"line 2: .*nothing in SQuAD"):
        read(Platinum, tmp_path)


def test_figure2_shows_each_published_cell() -> None:
    left = bars(figure2.draw().axes[0])
    lines = cells(FILES[Speedup])
    for column, widths in zip(list(lines[0])[4:], left.values(), strict=True):
        assert widths == [float(line[column]) for line in lines]


def test_figure2_shows_the_newest_record_and_marks_what_it_lacks() -> None:
    contents = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    complete = [one for one in contents if one["finished"] and not one["settings"]["quick"]]
    record = max(complete, key=lambda one: one["environment"]["date"])
    layer = ("layers", "layer")
    kinds = [(("kernels", "scaled_mm", "mxfp4 accurate"), "ours")]
    kinds += [((*layer, "mxfp4"), "hadamard"), ((*layer, "mxfp4"), "ours"), ((*layer, "nvfp4"), "ours")]
    figure = figure2.draw()
    wanted = [[ratios(record, contender).get((*kind, *size), 0) for size in SIZES] for kind, contender in kinds]
    assert list(bars(figure.axes[1]).values()) == wanted
    missing = sum(ratio == 0 for own in wanted for ratio in own)
    assert texts(figure).count("not measured") == missing
    said = " ".join(texts(figure))
    assert f"measured here: {record['environment']['gpu']}" in said
    assert "Different GPUs" in said


def ratios(record: dict[str, Any], contender: str) -> dict[tuple[Any, ...], float]:
    """Times as fast as BF16 of each line that has the contender."""
    return {
        (one["section"], one["name"], one["variant"], one["tokens"], one["out_features"], one["in_features"]):
        one["timings"]["bf16"]["us"] / one["timings"][contender]["us"]
        for one in record["measurements"] if {"bf16", contender} <= one["timings"].keys() and not one["failure"]
    }  # fmt: skip


def test_figure2_says_how_far_wush_is_behind_hadamard_where_both_were_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "on average: published 1.3%, ours " in " ".join(texts(figure2.draw()))
    lines = []
    for place, (m, n, k) in enumerate(SIZES[:3]):
        timings = {"bf16": timing(30), "hadamard": timing(10), "ours": timing((10.0, 12.5, 20.0)[place])}
        if place == 2:
            del timings["hadamard"]
        lines.append(Measurement("layers", "layer", "mxfp4", m, n, k, Work(1), timings=timings))
    environment = {"date": "2026-01-01", "gpu": "a GPU", "compute_capability": "9.0"}
    save(Record(environment, {"quick": False}, Ceilings(1, 1, 1), lines, finished=True), tmp_path / "a.json", [])
    monkeypatch.setattr(figure2, "RESULTS", tmp_path)
    figure = figure2.draw()
    assert "on average: published 1.3%, ours 10.0%." in " ".join(texts(figure))
    own = bars(figure.axes[1])
    assert own["MXFP4 layer: Hadamard + quantize + matmul"][:4] == [3, 3, 0, 0]
    assert own["MXFP4 layer: WUSH + quantize + matmul"][:4] == pytest.approx([3, 2.4, 1.5, 0])


def timing(us: float) -> Timing:
    return Timing(us, us, us, 1)


def test_figure2_without_a_record_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure2, "RESULTS", tmp_path)
    figure = figure2.draw()
    assert any("not measured" in text and "make kernels-bench" in text for text in texts(figure))
    assert bars(figure.axes[0])
    assert not bars(figure.axes[1])


def test_the_newest_record_is_the_latest_that_is_complete(tmp_path: Path) -> None:
    for name, date, quick, finished in (
        ("b", "2026-01-01", False, True),
        ("a", "2026-01-02", False, True),
        ("c", "2026-01-03", True, True),
        ("d", "2026-01-04", False, False),
    ):
        record = Record({"date": date}, {"quick": quick}, Ceilings(1, 1, 1), finished=finished)
        save(record, tmp_path / f"{name}.json", [])
    newest = figure2.newest(tmp_path)
    assert newest is not None
    assert newest.environment["date"] == "2026-01-02"
    (tmp_path / "e.json").write_text('{"schema": 0}')
    with pytest.raises(Unreadable, match=r"e\.json.*its schema is 0.*restore or remove the file"):
        figure2.newest(tmp_path)


def test_figure3_shows_each_published_average_with_its_deviation() -> None:
    figure = platinum.averages(Records())
    lines = cells(FILES[Platinum])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axes, model in zip(figure.axes, MODELS, strict=True):
        found = {}
        for bar in axes.containers:
            (dot, _, (spread,)) = bar
            ((begin, end),) = np.array(spread.get_segments())[:, :, 0]
            found[names[int(dot.get_ydata()[0])]] = (dot.get_xdata()[0], pytest.approx((end - begin) / 2))
        own = [line for line in lines if line["model"] == model and line["format"] != "bf16"]
        assert found == {
            " ".join((line["format"], line["algorithm"], line["transform"])).upper(): (
                float(line["average"]),
                float(line["std_between_runs"]),
            )
            for line in own
        }
        assert sum(text.get_text() == "–" for text in axes.texts) == len(names) - len(own)


def test_figures_7_to_10_show_each_published_mean_of_every_model() -> None:
    shown = {}
    for draw in (platinum.figure7, platinum.figure8, platinum.figure9, platinum.figure10):
        for axes in draw(Records()).axes[:-1]:  # the last is the colour bar
            names = [label.get_text() for label in axes.get_yticklabels()]
            numbers = [text.get_text() for text in axes.texts]
            width = len(numbers) // len(names)
            for number, name in enumerate(names):
                shown[axes.get_title(loc="left"), name] = numbers[number * width : (number + 1) * width]
    lines = cells(FILES[Platinum])
    assert tuple(dict.fromkeys(model for model, _ in shown)) == MODELS
    assert shown == {
        (
            line["model"],
            " ".join(filter(None, (line["format"], line["algorithm"], line["transform"])))
            .upper()
            .replace("BF16", "ORIGINAL"),
        ): [f"{float(line[column]):.1f}" for column in ("average", *BENCHMARKS)]
        for line in lines
    }


@pytest.mark.parametrize(
    ("draw", "given"),
    [
        (figure2.draw, ()),
        *((draw, (Records(),)) for draw in (platinum.averages, platinum.figure7, platinum.figure10)),
    ],
)
def test_published_numbers_are_said_to_be_published(draw: Any, given: tuple[Any, ...]) -> None:
    said = " ".join(texts(draw(*given)))
    assert "published" in said
    assert "arXiv 2512.00956 v3" in said
    assert "not run here" in said


def test_figure6_marks_the_largest_gap() -> None:
    x = np.linspace(0, 1, 100_001)
    gap = 1 + x - 2**x
    assert pytest.approx(gap.max(), abs=1e-9) == figure6.LARGEST_GAP
    assert pytest.approx(x[gap.argmax()], abs=1e-4) == figure6.LARGEST_AT
    assert any("0.0861" in text and "0.5288" in text for text in texts(figure6.draw()))
