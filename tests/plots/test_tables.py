"""Tables: which number stands in which cell, what is bold, and that Markdown, LaTeX and CSV hold the same."""

import csv
import io
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.benchmarks import hours
from plots.numbers import Number
from plots.platinum_tasks import PLATINUM
from plots.records import Records, load
from plots.settings import MODELS
from plots.tables import render
from plots.tables.calibration import table5
from plots.tables.cost import table6
from plots.tables.divergence import table4
from plots.tables.layer_loss import table1
from plots.tables.lm_eval import table2, table3
from plots.tables.storage import READINGS, SHAPES, agreement, of_model, table7
from plots.tables.table import Block, Cell, Column, Row, Table, block
from tests.plots.conftest import answered, record, store
from wush.intervals import Interval

ALL = (table1, table2, table3, table4, table5, table6, table7)
COLUMNS = [Column("KL", 2, lower_is_better=True), Column("acc_x", 1, lower_is_better=False, unit="%")]


def small() -> Table:
    """Two methods and one that was not run, and a row of ours alone."""
    published = [
        Row(
            ("a_1",),
            (
                Cell(Number(0.2), Number(0.3)),
                Cell(Number(50.0, 0.5), Number(40.0, runs=3, interval=Interval(39.0, 40.9))),
            ),
            group="g",
        ),
        Row(("b",), (Cell(Number(0.1), Number(0.4)), Cell(Number(60.0), Number(45.0))), group="g"),
        Row(("c",), (Cell(Number(0.5)), Cell(Number(10.0))), group="g"),
    ]
    own = [Row(("d",), (Cell(ours=Number(0.9)), Cell()), group="h")]
    blocks = (block(("x",), COLUMNS, published), block(("x",), COLUMNS, own, "not in the paper", published=False))
    return Table("Small & big", blocks, ("From here, 100%.",))


def find(table: Table, *keys: str) -> tuple[Cell, ...]:
    (row,) = [row for one in table.blocks for row in one.rows if row.keys == keys]
    return row.cells


def own_block(table: Table, title: str = "") -> Block:
    (found,) = [one for one in table.blocks if "not in the paper" in one.title and title in one.title]
    return found


def read(folder: Path, *records: object) -> Records:
    return load([store(folder, *records)])  # type: ignore[arg-type]


@pytest.fixture
def everything(tmp_path: Path) -> Records:
    """Something of ours in every table."""
    tasks = {"embedded_continuation": [0.5], "embedded_arithmetic": [0.25]}
    return read(
        tmp_path,
        record("bf16", tasks=tasks, evaluation="small"),
        *(record("mxfp4", one, tasks=tasks, evaluation="small", bits=4.5) for one in ("h", "wush")),
        record("mxfp4", "wush", calibration="c4", tasks=tasks, evaluation="small", bits=4.5),
        *(record("int4", "r", blocks=[15], mse={15: 0.002}, seed=seed) for seed in range(3)),
        record("mxfp4", "wush", model="qwen3_8b", kl=0.08, bits=4.35, gpu_bytes=17_000_000_000, device="NVIDIA H100"),
    )


def test_a_small_table_in_markdown() -> None:
    assert render.markdown(small()) == (
        "# Small & big\n\n"
        "| x | KL<br>published | KL<br>ours | KL<br>difference "
        "| acc_x (%)<br>published | acc_x (%)<br>ours | acc_x (%)<br>difference |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| a_1 | 0.20 | **0.30** | +0.10 | 50.0 ± 0.5 | 40.0 ± 1.0 (n=3) | -10.0 |\n"
        "| b | **0.10** | 0.40 | +0.30 | **60.0** | **45.0** | -15.0 |\n"
        "| c | 0.50 | not run |  | 10.0 | not run |  |\n\n"
        "## not in the paper\n\n"
        "| x | KL<br>published | KL<br>ours | KL<br>difference "
        "| acc_x (%)<br>published | acc_x (%)<br>ours | acc_x (%)<br>difference |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| d | - | 0.90 |  | - | - |  |\n\n"
        "From here, 100%.\n"
    )


def test_a_small_table_in_latex() -> None:
    lines = render.latex(small(), "small").splitlines()
    assert r"\caption{Small \& big. From here, 100\%.}" in lines
    assert r"\label{tab:small}" in lines
    assert r"a\_1 & 0.20 & \textbf{0.30} & +0.10 & 50.0 $\pm$ 0.5 & 40.0 $\pm$ 1.0 (n=3) & -10.0 \\" in lines
    assert r" & \multicolumn{3}{c}{KL} & \multicolumn{3}{c}{acc\_x (\%)} \\" in lines


def test_a_cell_of_csv_is_one_number() -> None:
    lines = list(csv.reader(io.StringIO(render.as_csv(small()))))
    headers = ["published", "ours", "difference", "low of ours", "high of ours", "runs of ours"]
    assert lines[0][2:8] == [f"KL {header}" for header in headers]
    assert lines[1][:2] == ["Small & big", "a_1"]
    assert lines[1][8:] == ["50.0", "40.0", "-10.0", "39.0", "40.9", "3"]
    assert lines[3][3] == "not run"
    assert lines[4] == []
    assert lines[6][:4] == ["not in the paper", "d", "-", "0.90"]


def test_what_is_special_to_latex_is_escaped() -> None:
    assert render.escaped(r"a_b & 5% #1 $x {y} \z ~^<>") == (
        r"a\_b \& 5\% \#1 \$x \{y\} \textbackslash{}z \textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
    )


def test_all_that_tie_are_best_and_a_row_alone_is_not() -> None:
    rows = [Row((str(n),), (Cell(ours=Number(value)),), group=group) for n, (value, group) in enumerate(
        [(1.0, "a"), (1.0, "a"), (2.0, "a"), (1.0, "b"), (0.0, None)]
    )]  # fmt: skip
    marked = block(("x",), COLUMNS[:1], rows).rows
    assert ["ours" in row.cells[0].best for row in marked] == [True, True, False, False, False]


@pytest.mark.parametrize("make", ALL)
def test_latex_is_balanced_and_every_row_has_all_columns(make: Callable[[Records], Table], everything: Records) -> None:
    text = render.latex(make(everything))
    assert re.findall(r"\\begin{(\w+)}", text) == ["table", *["tabular"] * text.count(r"\begin{tabular}")]
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") > 0
    assert len(re.findall(r"(?<!\\){", text)) == len(re.findall(r"(?<!\\)}", text))
    assert not re.search(r"(?<!\\)[%#$_]", text.replace(r"{!}{%", "").replace(r"$\pm$", "").replace(r"$\times$", ""))
    for columns, body in re.findall(r"\\begin{tabular}{([lr]+)}\n(.*?)\\end{tabular}", text, re.DOTALL):
        assert body.startswith("\\toprule")
        assert body.rstrip().endswith("\\bottomrule")
        for line in body.splitlines():
            if line.endswith(r"\\"):
                width = sum(int(found) - 1 for found in re.findall(r"\\multicolumn{(\d)}", line))
                assert len(re.split(r"(?<!\\)&", line)) + width == len(columns), line


@pytest.mark.parametrize("make", ALL)
def test_without_records_every_cell_of_ours_is_not_run(make: Callable[[Records], Table]) -> None:
    table = make(Records())
    by_record = [one for one in table.blocks if "computed" not in one.title]
    assert len(by_record) == 1
    assert all(cell.ours is None and cell.published for row in by_record[0].rows for cell in row.cells)
    assert "not run" in render.markdown(table)
    assert "Ours: no trial yet." in table.captions[0]


@pytest.mark.parametrize("make", ALL)
def test_a_caption_says_where_numbers_are_from(make: Callable[[Records], Table], everything: Records) -> None:
    first = make(everything).captions[0]
    assert first.startswith("Published: arXiv 2512.00956 v3. Ours: ")
    assert re.search(r"Ours: \d+ trials? on (cpu: made up|NVIDIA H100)", first)
    if make in (table2, table3, table5):
        assert "LM Evaluation Harness 0.4.13" in first
        assert "calibration: " in first
        assert "embedded, 12 windows of 512 tokens" in first


def test_table1_takes_one_block_quantized_alone_and_the_mean_over_seeds(everything: Records, tmp_path: Path) -> None:
    seeds = [record("mxfp4", "r", model="qwen3_8b", blocks=[18], mse={18: mse}, seed=n) for n, mse in
             enumerate((0.007, 0.008, 0.009))]  # fmt: skip
    others = [record("mxfp4", "r", model="qwen3_8b", mse={18: 1.0}), record("nvfp4", "h", blocks=[3], mse={3: 0.1})]
    table = table1(read(tmp_path / "own", *seeds, *others))
    cell = find(table, "mxfp4", "r")[0]
    assert cell.published == Number(7.61)
    assert cell.ours is not None
    margin = 4.303 / 3**0.5  # Student's t of two degrees of freedom
    assert (cell.ours.mean, cell.ours.ends, cell.ours.runs) == (
        pytest.approx(8.0),
        [[pytest.approx(margin, rel=1e-3)]] * 2,
        3,
    )
    assert find(table, "mxfp4", "i")[0].ours is None
    assert [row.keys for row in own_block(table).rows] == [("smollm2_135m", "3", "nvfp4", "h")]
    assert "| mxfp4 | r | 7.61 | 8.00 ± 2.48 (n=3) | +0.39 |" in render.markdown(table)


def test_table1_has_both_readings_of_the_18th_block_and_says_what_was_measured_on_what(tmp_path: Path) -> None:
    made = [
        record("mxfp4", "wush", model="qwen3_8b", blocks=[index], mse={index: mse}, measured_on=on)
        for index, mse, on in ((17, 0.003, "calibration"), (18, 0.004, "calibration"), (18, 0.005, "held_out"))
    ]
    small = record("mxfp4", "wush", blocks=[15], mse={15: 0.1}, measured_on="calibration")
    table = table1(read(tmp_path, *made, small))
    assert [one.title.partition("ours: ")[2] for one in table.blocks] == [
        "block 17 counted from 0, on calibration tokens", "block 18 counted from 0, on calibration tokens",
        "block 18 counted from 0, on held-out tokens", "",
    ]  # fmt: skip
    for one, value in zip(table.blocks, (3, 4, 5), strict=False):
        (cell,) = [row.cells[0] for row in one.rows if row.keys == ("mxfp4", "wush")]
        assert cell.ours
        assert cell.ours.mean == pytest.approx(value)
        assert len(one.rows) == 15
    assert own_block(table).rows[0].extra == ("calibration tokens",)
    assert {one.title.partition("ours: ")[2] for one in table1(Records()).blocks} == {
        "block 18 counted from 0, on calibration tokens"
    }


def test_table2_maps_tasks_and_recovery_is_of_the_same_evaluation(tmp_path: Path) -> None:
    model = "llama3_1_8b_instruct"
    full = {"mmlu_cot": [0.6], "gsm8k_llama": [0.7], "hellaswag": [0.8], "winogrande": [0.5]}
    less = {"mmlu_cot": [0.5], "hellaswag": [0.6]}
    table = table2(
        read(
            tmp_path,
            record("bf16", model=model, tasks={name: [0.8] for name in full}, evaluation="openllm"),
            record("bf16", model=model, tasks={name: [0.1] for name in full}, evaluation="openllm_5_shot"),
            record("mxfp4", "wush", "gptq", model=model, tasks=full, evaluation="openllm"),
            record("mxfp4", "sq", model=model, tasks=less, evaluation="openllm"),
            record("mxfp4", "wus", model=model, tasks=full, evaluation="openllm"),
        )
    )
    own = [cell.ours for cell in find(table, "Llama-3.1-8B-Instruct", "mxfp4", "gptq", "wush")]
    assert [one and one.mean for one in own] == pytest.approx([60, 70, 80, 50, 65, 81.25])
    smooth = [cell.ours and cell.ours.mean for cell in find(table, "Llama-3.1-8B-Instruct", "mxfp4", "smoothquant", "")]
    assert smooth == [pytest.approx(50), None, pytest.approx(60), None, None, None]
    (row,) = own_block(table).rows
    assert row.keys[3] == "wus"
    assert row.cells[0].published is None
    original = find(table, "Llama-3.1-8B-Instruct", "original", "", "evaluation=openllm")[4].ours
    assert original
    assert original.mean == pytest.approx(80)


def test_rows_that_were_probably_carried_over_are_marked_and_mr_gptq_stands_in_its_own(tmp_path: Path) -> None:
    model = "llama3_1_8b_instruct"
    four = {"mmlu_cot": [0.6], "gsm8k_llama": [0.7], "hellaswag": [0.8], "winogrande": [0.5]}
    made = [record("mxfp4", "h", name, model=model, tasks=four, evaluation="openllm") for name in ("gptq", "mr_gptq")]
    table = table2(read(tmp_path, *made))
    marked = {row.keys[1:4] for row in table.blocks[0].rows if row.extra == ("algorithm not stated",)}
    assert marked == {
        (fmt, algorithm, "h" if algorithm == "mr_gptq" else "")
        for fmt in ("mxfp4", "nvfp4")
        for algorithm in ("mr_gptq", "smoothquant", "quarot", "spinquant")
    }
    cell = find(table, "Llama-3.1-8B-Instruct", "mxfp4", "mr_gptq", "h")[4]
    assert cell.published == Number(73.65)
    assert cell.ours
    assert [row.keys[2] for row in own_block(table, "methods").rows] == ["gptq"]
    assert "algorithm not stated: the published recovery is that of arXiv 2509.23202" in " ".join(table.captions)
    assert "not stated" not in render.markdown(table3(Records()))


def test_a_single_run_of_tasks_has_the_intervals_of_its_documents(tmp_path: Path) -> None:
    one, two = [1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 20
    made = [record(name, "wush", evaluation="small") for name in ("original", "mxfp4")]
    for trial, shift in zip(made, (0, 2), strict=True):
        trial.tasks.update({"one": answered("one", one[shift:] + [0.0] * shift), "two": answered("two", two)})
    rows = {row.keys[1]: row.cells for row in own_block(table2(read(tmp_path, *made))).rows}
    task, _, average, recovery = (cell.ours for cell in rows["mxfp4"])
    assert task
    assert average
    assert recovery
    assert (task.mean, average.mean) == pytest.approx((70, 60))
    assert task.interval
    assert 54 < task.interval.low < 57
    assert 81 < task.interval.high < 84
    assert average.interval
    assert average.interval.high - average.interval.low < task.interval.high - task.interval.low
    # Of the original's 30 right answers 28 are left: the documents' own difficulty cancels.
    assert recovery.mean == pytest.approx(100 * 60 / 62.5)
    assert recovery.interval
    assert 89 < recovery.interval.low < 92
    assert 99 < recovery.interval.high <= 100.5
    assert average.interval.high - average.interval.low > 15


def test_small_models_have_their_own_tasks_and_sampled_ones_are_left_to_figure3(tmp_path: Path) -> None:
    records = read(
        tmp_path,
        record("bf16", tasks={"one": [0.5], "two": [0.3]}, evaluation="small"),
        record("mxfp4", "h", tasks={"one": [0.4], "two": [0.2]}, evaluation="small"),
        record("mxfp4", "h", tasks={"one": [0.4, 0.5]}, evaluation="sampled"),
    )
    for make in (table2, table3):
        found = own_block(make(records))
        assert [column.name for column in found.columns] == ["one", "two", "average", "recovery"]
        assert [cell.ours and cell.ours.mean for cell in found.rows[1].cells] == pytest.approx([40, 20, 30, 75])


def test_table4_takes_whole_models_alone(tmp_path: Path) -> None:
    made = [
        record(model="qwen3_8b", kl=0.07),
        record(kl=0.5, blocks=[3]),
        record("bf16", kl=0.0),
        record("int4", kl=0.3),
    ]
    table = table4(read(tmp_path, *made))
    cell = find(table, "Qwen3-8B", "mxfp4", "rtn", "wush")[0]
    assert cell.difference == pytest.approx(0.07 - 0.093739)
    assert [row.keys for row in own_block(table).rows] == [("smollm2_135m", "int4", "rtn", "wush")]


def test_table5_joins_both_evaluations_and_needs_two_sets_of_ours(tmp_path: Path) -> None:
    four = {"mmlu": [0.7], "gsm8k_llama": [0.7], "hellaswag": [0.7], "winogrande": [0.7]}
    platinum = {names[0]: [0.9, 0.8] for names in PLATINUM.values()}
    table = table5(
        read(
            tmp_path,
            record(model="qwen3_8b", calibration="c4", tasks=four, evaluation="openllm"),
            record(model="qwen3_8b", calibration="c4", tasks=platinum, evaluation="platinum"),
            *(record(calibration=name, tasks={"one": [0.5]}, evaluation="small") for name in ("embedded", "other")),
            record("nvfp4", tasks={"one": [0.5]}, evaluation="small"),
        )
    )
    own = [cell.ours and cell.ours.mean for cell in find(table, "Qwen3-8B", "mxfp4", "rtn", "wush", "c4")]
    assert own == pytest.approx([70, 85])
    assert [row.keys[1::3] for row in own_block(table).rows] == [("mxfp4", "embedded"), ("mxfp4", "other")]


def test_table6_sums_loading_and_quantizing(everything: Records) -> None:
    cells = find(table6(everything), "Qwen3-8B", "rtn", "wush")
    assert [cell.ours and cell.ours.mean for cell in cells] == pytest.approx([1.0, 17.0])
    (row,) = [row for row in table6(everything).blocks[0].rows if row.keys[0] == "Qwen3-8B"]
    assert row.extra == ("mxfp4", "H100", "NVIDIA H100")
    for row in own_block(table6(everything)).rows:
        assert [cell.ours and cell.ours.mean for cell in row.cells] == [1.0, None, 2.0]


def test_table7_one_reading_alone_gives_every_published_number() -> None:
    assert {name: agreement(reading) for name, reading in READINGS.items()} == {
        "of the whole model (the paper's reading)": "10 of 10",
        "of the linears alone": "0 of 10",
        "of the linears alone, transforms shared": "6 of 10",
    }
    shape = SHAPES["Qwen3-8B"]
    assert shape.weights + shape.embeddings == pytest.approx(8.19e9, rel=1e-3)  # its parameters, but for norms


def test_table7_takes_bits_of_records_in_the_papers_reading(tmp_path: Path) -> None:
    shape = SHAPES["Qwen3-8B"]
    bits = 4.25 + 16 * shape.transforms(32) / shape.weights
    made = [record(model="qwen3_8b", bits=bits), record("nvfp4", bits=4.95), record(transform="h")]
    table = table7(read(tmp_path, *made))
    cells = table.blocks[0].rows[2].cells
    assert cells[0].ours is not None
    assert cells[0].ours.mean == pytest.approx(of_model(shape, "mxfp4"))
    assert cells[1].ours is None
    (row,) = own_block(table).rows
    assert [cell.ours and cell.ours.mean for cell in row.cells] == pytest.approx([10.0, 4.95])


@pytest.mark.parametrize("make", ALL)
def test_latex_breaks_no_line_where_there_is_none(make: Callable[[Records], Table], everything: Records) -> None:
    table = make(everything)
    titled = Table(table.title, tuple(replace(one, title=one.title or "first") for one in table.blocks), table.captions)
    text = render.latex(titled)
    outside = re.sub(r"\\begin{tabular}.*?\\end{tabular}", "", text, flags=re.DOTALL)
    assert r"\\" not in outside
    titles = re.findall(r"(?:\\label{.*}|})\n\\par\\vspace{1ex} .+\\par\n\\resizebox", text)
    assert len(titles) == len(titled.blocks)


def test_table6_says_what_loading_is_on_a_cpu(tmp_path: Path) -> None:
    on_cpu, on_gpu = record(), record(device="NVIDIA H100")
    assert "after its first trial the stage load is a copy" in " ".join(table6(read(tmp_path / "a", on_cpu)).captions)
    assert "is a copy" not in " ".join(table6(read(tmp_path / "b", on_gpu)).captions)


def test_the_shapes_of_models_are_those_of_the_estimates_of_hours() -> None:
    both = {name for name in SHAPES if MODELS[name] in hours.SHAPES}
    assert len(both) == 5
    for name in both:
        ours, theirs = SHAPES[name], hours.SHAPES[MODELS[name]]
        assert (ours.hidden, ours.intermediate, ours.layers, ours.heads, ours.kv_heads, ours.head_size) == (
            theirs.hidden, theirs.inner, theirs.blocks, theirs.heads, theirs.kv_heads, theirs.head_width,
        )  # fmt: skip
        assert ours.weights == theirs.weights


@pytest.mark.skipif(not any(map(shutil.which, render.ENGINES)), reason="no LaTeX on this machine")
@pytest.mark.parametrize("make", ALL)
def test_latex_compiles(make: Callable[[Records], Table], everything: Records, tmp_path: Path) -> None:
    paths = render.save(make(everything), tmp_path, "made")
    assert render.compile_latex(paths[1]).read_bytes().startswith(b"%PDF")


def test_a_missing_latex_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(render.NoLatex, match=r"none of pdflatex.* is installed; install one, or leave out --compile"):
        render.compile_latex(render.save(small(), tmp_path, "made")[1])
