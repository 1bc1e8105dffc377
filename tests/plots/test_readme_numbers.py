"""README's blocks of numbers: which are made, from which records, and that nothing else is touched."""

from pathlib import Path

import pytest

import plots.__main__ as command
from plots import readme
from plots.readme import BLOCKS, WrongBlock, rewritten
from plots.records import Records, load
from tests.plots.conftest import record, store

KLS = [0.30, 0.32, 0.34, 0.36]


def text(name: str, content: str = "typed\n") -> str:
    return f"before\n<!-- made by python -m plots readme: {name} -->\n{content}<!-- /{name} -->\nafter 0.5\n"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Of the main job, in a folder of its own, and of other methods and layers."""
    main = tmp_path / "records" / "main"
    main.mkdir(parents=True)
    jobs = [(fmt, name) for fmt in ("mxfp4", "nvfp4") for name in ("h", "wush")]
    for number, (fmt, name) in enumerate(jobs):
        one = record(fmt, name, kls=[kl * (2 if name == "h" else 1) for kl in KLS], minutes=2)
        one.environment["cores"] = 2
        one.environment["device"] = "cpu: AMD EPYC"
        one.versions["torch"] = "2.13.0+cpu"
        (main / f"{number}.json").write_text(one.model_dump_json())
    monkeypatch.setattr(readme, "MAIN", main)
    others = [
        record("mxfp4", "i", kl=0.98765), record("mxfp4", "wush", "gptq", kl=0.23451), record("mxfp4", "sq", kl=0.5),
        *(record("mxfp4", name, mse={0: 0.1, 1: 0.4}, seed=1) for name in ("h", "wush")),
    ]  # fmt: skip
    for one in others:
        one.environment["cores"] = 16
        one.versions["torch"] = "2.13.0"
    return load([store(tmp_path / "others", *others)])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_made_anew_and_the_text_around_it_stays(name: str, records: Records) -> None:
    made = rewritten(text(name), records)
    assert made.startswith(f"before\n<!-- made by python -m plots readme: {name} -->\n\n|")
    assert made.endswith(f"\n\n<!-- /{name} -->\nafter 0.5\n")
    assert "typed" not in made
    assert rewritten(made, records) == made


def test_the_main_jobs_block_is_of_its_own_records_with_machine_versions_and_intervals(records: Records) -> None:
    made = rewritten(text("main"), records)
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert lines[0] == "| format | transform | perplexity | vs original | KL | top-1 | bits | time |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| mxfp4", "h"], ["| mxfp4", "wush"], ["| nvfp4", "h"], ["| nvfp4", "wush"],
    ]  # fmt: skip
    margin = 3.182 * 0.0258199 / 2  # Student's t of three degrees of freedom
    assert f"| 0.3300 ± {margin:.4f} |" in lines[3]
    assert lines[3].endswith("| 80.0 ± 0.0% | 4.25 | 3 min 0 s |")
    assert "The original model's perplexity is 20.000." in made
    assert "4 trials on AMD EPYC, 2 cores (Python 3.11, torch 2.13.0), 100 predictions each." in made
    assert "±: 95% intervals" in made


def test_without_its_own_records_the_main_jobs_block_takes_the_same_methods(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "MAIN", tmp_path / "nowhere")
    made = rewritten(text("main"), records)
    assert made.count("| mxfp4 | ") == 2
    assert "made up, 16 cores" in made


def test_a_number_is_rounded_once_and_what_was_not_run_is_said(records: Records) -> None:
    made = rewritten(text("kl"), records)
    assert "| mxfp4 | rtn | 0.988 | **0.100** | 0.500 | not run | **0.100** |" in made
    assert "| mxfp4 | gptq | not run | not run | not run | not run | 0.235 |" in made


def test_a_block_that_is_unknown_or_open_is_named(records: Records) -> None:
    with pytest.raises(WrongBlock, match=r"block nothing: there is no such; choose from main, kl"):
        rewritten(text("nothing"), records)
    with pytest.raises(WrongBlock, match=r"block kl: is not closed; write <!-- /kl -->"):
        rewritten(text("kl").replace("<!-- /kl -->", ""), records)


def test_the_command_says_which_blocks_changed(
    tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "README.md"
    path.write_text(text("kl") + text("main"))
    monkeypatch.setattr(readme, "load", lambda folders=(): records if not folders else load(folders))
    monkeypatch.setattr(readme.update, "__defaults__", (path,))
    arguments = ["readme", "--output", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    assert capsys.readouterr().out == "readme: kl, main changed\n"
    assert command.main(arguments) == 0
    assert capsys.readouterr().out == "readme: nothing changed\n"
    path.write_text(text("nothing"))
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("readme: not made: block nothing: there is no such")
