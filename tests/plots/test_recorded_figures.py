"""Figures of records: the numbers they show, what they mark as missing, and the statistics they quote."""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.records import LayerLoss, Record
from plots import bound, heatmap, pareto, platinum, style
from plots.bound import Points, answer, correlation, ranks
from plots.chosen import chosen
from plots.platinum_tasks import PLATINUM, suites
from plots.records import Records, load
from plots.tables.layer_loss import LINEARS
from tests.plots.conftest import record, store
from wush.intervals import of_runs
from wush_kernels.bench.measurement import Ceilings, Measurement, Timing, Work
from wush_kernels.bench.record import RESULTS, save
from wush_kernels.bench.record import Record as Benchmark
from wush_kernels.bench.record import load as load_benchmark


@pytest.fixture(autouse=True)
def paper() -> Iterator[None]:
    with style.applied("paper"):
        yield


def said(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def layers(folder: Path) -> Records:
    """Of two formats and two transforms all but one, the second with half of its decoder blocks."""
    return load(
        [
            store(
                folder,
                record("mxfp4", "h", mse={0: 0.1, 1: 0.4}, predicted=2.0),
                record("mxfp4", "wush", mse={0: 0.05}, predicted=1.0),
                record("nvfp4", "h", mse={0: 0.02, 1: 0.03}),
                record("int4", "h", blocks=[1], mse={1: 9.0}),
                record("mxfp4", "h", model="tiny_llama", mse={0: 1.0}),
            )
        ]
    )


def test_the_heatmap_shows_every_loss_and_marks_what_is_missing(tmp_path: Path) -> None:
    figure = heatmap.draw(layers(tmp_path))
    meshes = [mesh for axes in figure.axes[:4] for mesh in axes.collections if isinstance(mesh, QuadMesh)]
    shown = [np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan) for mesh in meshes]
    factors = 1 + np.arange(7) / 10
    assert shown[0] == pytest.approx(np.outer([0.01, 0.04], factors))
    assert shown[1][0] == pytest.approx(0.005 * factors)
    assert np.isnan(shown[1][1]).all()
    assert np.isnan(shown[3]).all()
    assert len({id(mesh.norm) for mesh in meshes}) == 1
    words = said(figure)
    assert "PARTIAL, grey is missing: panels not run: 1, layers not measured: 7" in words
    assert words.count("not run") == 2
    assert "smollm2_135m, 3 trials on cpu: made up; not shown: tiny_llama" in words
    assert LINEARS[0].partition("_")[0] in [label.get_text() for label in figure.axes[2].get_xticklabels()]


def with_paper(one: Record, **predicted: Callable[[LayerLoss], float]) -> Record:
    """The record with these predictions of each layer's loss."""
    made = one.model_copy(deep=True)
    for block in made.blocks:
        for layer in block.layers:
            assert layer.loss is not None
            for name, formula in predicted.items():
                setattr(layer.loss, name, formula(layer.loss))
    return made


def points(
    measured: Sequence[float], power: Sequence[float] | float = 1.0, linears: Sequence[int] = (), **predicted: Any
) -> Points:
    """By default each point is another linear's, the bound is small and the even prediction 1."""
    count = len(measured)
    given = {"bound": 1e-3, "even": 1.0, **predicted}
    return Points(
        np.array(measured, dtype=float),
        np.broadcast_to(np.asarray(power, dtype=float), count),
        {name: np.broadcast_to(np.asarray(value, dtype=float), count) for name, value in given.items()},
        np.array(linears or range(count)),
        ("wush",) * count,
    )


def test_the_bound_figure_shows_each_prediction_beside_its_statistics(tmp_path: Path) -> None:
    made = [
        with_paper(record("mxfp4", name, mse={0: 0.1, 1: 0.4 / (1 + place)}), paper_fp=lambda loss: loss.mse * 7,
                   paper_int=lambda loss: loss.even * loss.mse)
        for place, name in enumerate(("h", "wush"))
    ]  # fmt: skip
    figure = bound.draw(load([store(tmp_path, *made)]))
    found = Points.of(load([tmp_path]).trials)
    assert len(found) == 28
    assert found.nearest == ("paper_fp", True)
    assert found.factor("paper_fp") == pytest.approx(1 / 7)
    assert found.spread("paper_fp") == pytest.approx(0, abs=1e-9)
    assert found.spread("even") == pytest.approx(np.std(np.log(found.measured / found.predicted["even"])))
    panels = [[text.get_text() for text in axes.texts] for axes in figure.axes[:4]]
    assert panels[1] == ["rms of logs 0.00 (0.00–0.00)\nρ 1.00, factor 0.14"]
    assert panels[0][0].startswith(f"rms of logs {found.spread('even'):.2f} (")
    assert panels[3] == []
    words = said(figure)
    assert "MXFP4: yes, by paper's FP" in words
    assert "absent" not in words
    # 28 points in each panel, and those of the bound too
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes[:4]] == [28] * 4  # type: ignore[arg-type]


def test_predictions_that_records_lack_are_named_as_absent_and_never_drawn(tmp_path: Path) -> None:
    figure = bound.draw(layers(tmp_path))
    words = said(figure)
    assert "; absent from these records: paper's FP, paper's INT" in words
    assert words.count("absent: these records\nkept no such prediction") == 4
    assert "PARTIAL: not run: 1" in words
    assert [len(axes.collections) for axes in figure.axes[:4]] == [1, 0, 0, 1]


def test_a_prediction_that_some_records_of_a_format_lack_is_absent(tmp_path: Path) -> None:
    both = with_paper(record("mxfp4", "wush", mse={0: 0.05}), paper_fp=lambda loss: loss.mse)
    found = Points.of(load([store(tmp_path, both, record("mxfp4", "h", mse={0: 0.1}))]).trials)
    assert "even" in found
    assert "paper_fp" not in found
    assert found.nearest[0] == "even"


@pytest.mark.parametrize(
    ("measured", "word"),
    [([1, 2, 3, 4, 5], "yes"), ([2, 1, 3, 5, 4], "in part"), ([5, 4, 3, 2, 1], "no"), ([1, 2], "too few layers")],
)
def test_whether_theory_holds_is_by_the_rank_correlation_of_each_format(measured: list[float], word: str) -> None:
    told = answer(
        {
            "mxfp4": points(measured, even=np.arange(1, len(measured) + 1)),
            "nvfp4": points([1, 2, 3, 4, 5], even=[1, 2, 3, 4, 5]),
        }
    )
    assert f"\nMXFP4: {word}, by even noise" in told
    assert "\nNVFP4: yes, by even noise" in told


def test_layers_that_differ_in_power_alone_do_not_make_the_theory_hold() -> None:
    power = np.array([1.0, 10.0, 100.0, 1000.0, 10000.0])
    found = points(power * [5, 4, 3, 2, 1], power, even=power * [1, 2, 3, 4, 5])
    assert correlation(ranks(found.measured), ranks(found.predicted["even"])) == pytest.approx(1)
    assert found.spearman("even") == pytest.approx(-1)
    assert "MXFP4: no" in answer({"mxfp4": found})


def test_the_nearest_prediction_is_clear_only_if_it_is_nearer_on_most_linears() -> None:
    random = np.random.default_rng(0)
    noise, other = random.normal(size=(2, 200))
    near = points(np.exp(0.3 * noise), paper_fp=np.exp(0.6 * other + 0.3 * noise))
    assert near.nearest == ("even", True)
    alike = points(np.exp(0.3 * noise), paper_fp=np.exp(0.3 * noise + 0.31 * other))
    assert not alike.nearest[1]
    assert "not clearly nearest" in answer({"mxfp4": alike})
    # Of one linear under many transforms an interval says nothing of others.
    one = points(np.exp(0.3 * noise), linears=[index // 40 for index in range(200)])
    assert one.interval("even").high - one.interval("even").low > 0
    few, many = (points(np.exp(0.3 * noise[:count])).interval("even") for count in (50, 200))
    assert many.high - many.low < 0.7 * (few.high - few.low)
    assert many.low < 0.3 < many.high


def test_linears_without_points_are_never_drawn_for_an_interval() -> None:
    found = points([1, 2, 4, 8], linears=[3, 3, 9, 9])
    assert 0 < found.interval("even").low <= found.spread("even") <= found.interval("even").high + 0.3


def test_the_power_of_a_layer_is_its_loss_over_the_relative_one(tmp_path: Path) -> None:
    (trial,) = load([store(tmp_path, record(mse={0: 0.1, 1: 0.4}))]).trials
    assert Points.of([trial]).relative == pytest.approx(trial.losses.values[:, 1])


def test_a_prediction_below_the_bound_is_told(tmp_path: Path) -> None:
    found = points([1, 2, 3], even=[1.0, 2.0, 3.0], bound=[1.5, 1.0, 1.0])
    assert found.bounded("even") == 2
    assert "1 predictions below the bound" in answer({"mxfp4": found})


def test_ranks_that_tie_share_their_mean_and_constants_do_not_correlate() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert np.isnan(correlation(np.ones(4), np.arange(4.0)))
    assert points([2, 8]).factor("even") == pytest.approx(4)
    assert points([2, 8]).spread("even") == pytest.approx(np.log(2))


def test_the_pareto_front_has_what_nothing_beats(tmp_path: Path) -> None:
    made = [("h", 0.3, 4.25), ("i", 0.4, 4.25), ("wush", 0.1, 5.0), ("wus", 0.2, 5.1), ("r", 0.25, 4.3)]
    records = load([store(tmp_path, *(record("mxfp4", name, kl=kl, bits=bits) for name, kl, bits in made))])
    points = [(trial, trial.metrics.bits_per_weight) for trial in records.trials]
    assert [trial.transform for trial, _ in pareto.front(points, smaller_is_better=True)] == ["wush", "r", "h"]
    assert [trial.transform for trial, _ in pareto.front(points, smaller_is_better=False)] == ["wush", "wus"]
    figure = pareto.draw(records)
    drawn = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in figure.axes[0].lines[:5]}  # type: ignore[index]
    assert drawn == {(bits, kl) for _, kl, bits in made}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[::2][:5] == ["I", "R", "H", "WUS", "WUSH"]
    assert legend[1::2] == ["MXFP4", "filled: GPTQ", "hollow: RTN", "Pareto front", " "]
    assert len(figure.axes[1].lines) == 5  # all but the identity, and the front


def test_the_pareto_figure_has_bars_where_records_keep_windows(tmp_path: Path) -> None:
    made = [record("mxfp4", "h", kls=[0.1, 0.2, 0.3, 0.6]), record("mxfp4", "wush", kl=0.1)]
    figure = pareto.draw(load([store(tmp_path, *made)]))
    bars = [one for one in figure.axes[0].containers if one.has_yerr]  # type: ignore[attr-defined]
    (ends,) = [np.ravel(one[2][0].get_segments()[0])[1::2] for one in bars]
    assert ends == pytest.approx(list(vars(of_runs([0.1, 0.2, 0.3, 0.6])).values()))
    assert "bars: 95% intervals over evaluated windows" in said(figure)


def test_speeds_are_geometric_means_of_the_record() -> None:
    record_ = load_benchmark(sorted(RESULTS.glob("*.json"))[-1])
    own = [
        one.timings["bf16"].us / one.timings["ours"].us for one in record_.measurements
        if (one.section, one.name, one.variant, one.tokens) == ("layers", "layer", "mxfp4", 1024) and not one.failure
    ]  # fmt: skip
    assert pareto.speeds(record_)["mxfp4"] == pytest.approx(np.prod(own) ** (1 / len(own)))


def test_hadamard_has_the_speed_of_one_matrix_where_it_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timing(us: float) -> Timing:
        return Timing(us, us, us, 1)

    timings = {"bf16": timing(30), "hadamard": timing(10), "ours": timing(12)}
    line = Measurement("layers", "layer", "mxfp4", 1024, 64, 64, Work(1), timings=timings)
    environment = {"date": "2026-01-01", "gpu": "a GPU"}
    save(Benchmark(environment, {"quick": False}, Ceilings(1, 1, 1), [line], finished=True), tmp_path / "a.json", [])
    monkeypatch.setattr(pareto, "RESULTS", tmp_path)
    made = [record("mxfp4", name) for name in ("h", "wush")]
    right = pareto.draw(load([store(tmp_path / "own", *made)])).axes[1]
    assert [float(one.get_xdata()[0]) for one in right.lines[:2]] == pytest.approx([3, 2.5])  # type: ignore[index]


def sampled(folder: Path) -> Records:
    """Platinum of a published model and of another one, and sampled tasks of a third."""
    whole = {names[0]: [0.9, 0.8, 0.7] for names in PLATINUM.values()}
    return load(
        [
            store(
                folder,
                record("mxfp4", "wush", model="qwen3_8b", tasks=whole, evaluation="platinum"),
                record("bf16", model="tiny_llama", tasks={name: [0.9] for name in whole}, evaluation="platinum"),
                record("mxfp4", "h", model="tiny_llama", tasks=whole, evaluation="platinum"),
                record("mxfp4", "h", tasks={"one": [0.2, 0.4], "two": [0.6, 0.8]}, evaluation="sampled"),
            )
        ]
    )


def test_own_runs_stand_beside_published_averages(tmp_path: Path) -> None:
    records = sampled(tmp_path)
    figure = platinum.averages(records)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[-2:] == ["tiny_llama", "smollm2_135m\nother tasks"]
    drawn = {title: len(axes.containers) for title, axes in zip(titles, figure.axes, strict=True)}
    without = {axes.get_title(): len(axes.containers) for axes in platinum.averages(Records()).axes}
    assert drawn["Qwen3-8B"] == without["Qwen3-8B"] + 1
    assert drawn["Qwen3-14B"] == without["Qwen3-14B"]
    (suite,) = [one for one in suites(records) if one.model == "smollm2_135m"]
    number = suite.average(("mxfp4", "rtn", "h"))
    assert number
    assert number.mean == pytest.approx(50)
    (cross,) = figure.axes[-1].containers
    bars = np.ravel(cross[2][0].get_segments()[0])[::2]  # type: ignore[index]
    assert bars == pytest.approx([number.mean - number.ends[0][0], number.mean + number.ends[1][0]])  # type: ignore[index]
    words = said(figure)
    assert "and ours (4 trials on cpu: made up)" in words
    assert "crosses: ours, 95% intervals of 2 to 3 runs; smollm2_135m: one, two" in words
    assert "not run here" not in words


def test_own_means_are_lines_of_the_tables(tmp_path: Path) -> None:
    records = sampled(tmp_path)
    published = len(platinum.by_model()["Qwen3-8B"])
    axes = platinum.figure9(records).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[published:] == ["ours: MXFP4 RTN WUSH"]
    assert [text.get_text() for text in axes.texts][-14:] == ["80.0"] * 14
    further = platinum.figure10(records).axes
    assert [one.get_title(loc="left") for one in further[:-1]] == ["Qwen3-14B", "Qwen3-32B", "tiny_llama"]
    assert [label.get_text() for label in further[2].get_yticklabels()] == ["ours: ORIGINAL", "ours: MXFP4 RTN H"]


def test_a_figure_shows_methods_that_were_run_alike_never_the_newest(tmp_path: Path) -> None:
    old = [record("mxfp4", name, kl=0.1) for name in ("h", "wush")]
    new = [record("mxfp4", "h", calibration=name, kl=0.9) for name in ("c4", "a_set")]
    later = [one.model_copy(update={"finished_at": one.finished_at + timedelta(days=1)}) for one in new]
    again = record("mxfp4", "wush", seed=1, kl=0.5)
    found = chosen(load([store(tmp_path, *later, *old, again)]).trials, "")
    assert [(trial.transform, trial.calibration, trial.metrics.kl) for trial in found.trials] == [
        ("h", "embedded", 0.1), ("wush", "embedded", 0.1),
    ]  # fmt: skip
    said_ = "2 trials on cpu: made up; not shown: 1 trial with calibration=a_set, 1 trial with calibration=c4"
    assert f"{said_}, 1 of other seeds" in found.source


@pytest.mark.parametrize("columns", [1, 2])
def test_a_caption_is_as_wide_as_its_figure(columns: int) -> None:
    figure = style.figure(columns=columns, height=2)
    words = [f"trial{number}" for number in range(60)]
    style.caption(figure, " ".join(words) + "\nbars: 95% intervals")
    (text,) = [one for one in figure.findobj(Text) if isinstance(one, Text) and "trial0" in one.get_text()]
    figure.draw_without_rendering()
    assert text.get_window_extent().width < figure.bbox.width
    assert text.get_text().split() == [*words, "bars:", "95%", "intervals"]
    assert text.get_text().endswith("\nbars: 95% intervals")


def test_a_figure_says_that_what_it_shows_is_of_an_older_method(tmp_path: Path) -> None:
    old = [record("mxfp4", name, version=1, tasks={"one": [0.2, 0.4]}) for name in ("h", "wush")]
    records = load([store(tmp_path, *old)])
    for figure in (pareto.draw(records), platinum.averages(records)):
        assert "2 OLD, of version 1 of the method (today's: " in said(figure)


def test_own_runs_of_tasks_are_of_one_calibration_set_and_the_caption_names_the_others(tmp_path: Path) -> None:
    made = [
        *(record("mxfp4", name, tasks={"one": [0.2, 0.4]}, evaluation="sampled") for name in ("h", "wush")),
        record("mxfp4", "wush", calibration="c4", tasks={"one": [0.9] * 5}, evaluation="sampled"),
    ]
    records = load([store(tmp_path, *made)])
    (suite,) = suites(records)
    number = suite.average(("mxfp4", "rtn", "wush"))
    assert number
    assert number.mean == pytest.approx(30)
    assert number.runs == 2
    assert "not shown: smollm2_135m: 1 trial with calibration=c4" in said(platinum.averages(records))
