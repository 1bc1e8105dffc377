"""`python -m plots`: what it writes and says, and its exit status."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

import plots.__main__ as command
from plots import records, reference, style
from tests.plots.conftest import record, store
from wush.models import load_random

ROOT = Path(__file__).parents[2]
FIGURES = ("figure2", "figure3", "figure6", "pareto", "heatmap", "bound")
OURS = (*FIGURES, *command.TABLES)


def one_dot() -> Figure:
    figure = style.figure(columns=1, height=1)
    figure.subplots().plot([0], [0], "o")
    return figure


def no_data() -> Figure:
    raise style.Absent("no trial of it; run it with python run.py")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that cost nothing in place of the paper's, and one without its data."""
    module = ModuleType("small_figures")
    vars(module).update(draw=one_dot, no_data=no_data)
    monkeypatch.setitem(sys.modules, "small_figures", module)
    monkeypatch.setattr(
        command, "FIGURES", {"figure1": "small_figures", "figure2": "small_figures:no_data", "figure3": "small_figures"}
    )
    monkeypatch.setattr(command, "TABLES", {})


def drawn(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def files(*names: str) -> set[str]:
    def kinds(name: str) -> tuple[str, ...]:
        tables = ("md",) if name in ("verdicts", "claims") else ("md", "tex", "csv")
        return tables if name in command.TABLES else ("pdf", "svg", "png")

    return {f"{name}.{kind}" for name in names for kind in kinds(name)}


def recorded(folder: Path) -> str:
    """A store with something for every output."""
    tasks = {"embedded_arithmetic": [0.5, 0.25, 0.3]}
    return str(
        store(
            folder,
            *(
                record("mxfp4", one, kl=kl, mse={0: kl, 1: kl / 2}, predicted=kl)
                for one, kl in (("h", 0.2), ("wush", 0.1))
            ),
            record("nvfp4", "wush", tasks=tasks, evaluation="sampled"),
            record("mxfp4", "wush", blocks=[1], mse={1: 0.1}),
        )
    )


def test_two_processes_write_the_same_bytes_without_dates_and_with_fonts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    arguments = [*OURS, "--style", "screen", "--records", recorded(tmp_path / "store")]
    assert command.main([*arguments, "--output", str(here)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(OURS)
    for name, line in zip(OURS, lines, strict=True):
        assert re.fullmatch(rf"{name}:( \S+{name}\.\w+){{{len(files(name))}}}, \d+\.\d s", line)
    subprocess.run(
        [sys.executable, "-m", "plots", *arguments, "--output", there],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}, check=True, capture_output=True,
    )  # fmt: skip
    assert drawn(here) == drawn(there) == files(*OURS)
    for path in sorted(here.iterdir()):
        content = path.read_bytes()
        assert content == (there / path.name).read_bytes(), path.name
        assert not re.search(rb"CreationDate|dc:date|\d{4}-\d\d-\d\dT", content), path.name
        if path.suffix == ".pdf":
            assert b"/FontFile2" in content
            assert b"/Type3" not in content


@pytest.mark.usefixtures("small")
def test_an_unknown_figure_is_named_with_the_choices_and_the_others_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["figure11", "figure1", "--output", str(tmp_path)]) == 2
    said = "figure11: there is no such figure or table; choose from figure1, figure2, figure3, readme\n"
    assert capsys.readouterr().err == said
    assert drawn(tmp_path) == files("figure1")


@pytest.mark.usefixtures("small")
def test_all_figures_are_drawn_by_default_and_absent_data_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "figure2: not made: no trial of it; run it with python run.py\n"
    assert drawn(tmp_path) == files("figure1", "figure3")


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    assert command.main(["figure1", "figure3", "--output", str(taken)]) == 2
    assert capsys.readouterr().err == f"{taken}: cannot be written: File exists; choose another folder with --output\n"


@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_be_written_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figure1.svg").mkdir()
    assert command.main(["figure1", "figure3", "--output", str(tmp_path)]) == 2
    assert re.fullmatch(r"figure1: not made: .*figure1\.svg'?\n", capsys.readouterr().err)
    assert drawn(tmp_path) >= files("figure3")


def test_a_missing_input_is_said_with_its_path_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "nowhere")
    assert command.main(["figure3", "figure6", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"figure3: not made: {tmp_path}/nowhere/paper_figure3_7_10_platinum.csv: cannot be read")
    assert said.endswith("restore it with git checkout plots/reference\n")
    assert drawn(tmp_path) == files("figure6")


def test_a_missing_library_is_said_with_the_way_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plots.figure6", None)
    assert command.main(["figure6", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("install what figures need with pip install -e '.[plots]'\n")


def test_every_output_has_a_module() -> None:
    for entry in (command.FIGURES | command.TABLES).values():
        name = entry.partition(":")[0]
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name


def test_the_screen_style_is_the_same_figure_larger_whatever_the_users_settings() -> None:
    sizes = {}
    with mpl.rc_context({"font.size": 3, "pdf.fonttype": 3}):
        for name in style.SCALES:
            with style.applied(name):
                assert mpl.rcParams["pdf.fonttype"] == 42
                sizes[name] = (mpl.rcParams["font.size"], *style.figure(columns=2, height=1).get_size_inches())
    assert 7 <= sizes["paper"][0] <= 8
    assert sizes["screen"] == pytest.approx([style.SCALES["screen"] * size for size in sizes["paper"]])


@pytest.mark.parametrize("name", ["pareto", "heatmap", "bound"])
def test_a_figure_of_records_says_without_them_which_command_makes_some(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "COMMITTED", tmp_path)
    assert command.main([name, "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: not made: no record of a ")
    assert "python run.py -m experiment=layers scale=small" in said
    assert not drawn(tmp_path)


def test_a_table_that_cannot_be_compiled_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["table7", "--compile", "--output", str(tmp_path)]) == 2
    assert "table7: not made: none of pdflatex" in capsys.readouterr().err
    assert drawn(tmp_path) == files("table7")


def test_figure5_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small"
    made = load_random("llama", 64, 64, 2, 2, 1, seed=0, dtype="float32", device="cpu")
    made.model.save_pretrained(model)
    made.tokenizer.save_pretrained(model)
    out = tmp_path / "out"
    assert command.main(["figure5", "--model", str(model), "--output", str(out)]) == 0
    assert "decoder block 1" in (out / "figure5.svg").read_text()
    assert command.main(["figure5", "--model", str(tmp_path / "none"), "--output", str(out)]) == 2
    assert f"figure5: not made: model {tmp_path}/none: " in capsys.readouterr().err


def test_a_model_without_figure5_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["figure6", "--model", "some/model", "--output", str(tmp_path / "out")]) == 2
    assert "--model some/model: only figure5 and powers take a model; name one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
