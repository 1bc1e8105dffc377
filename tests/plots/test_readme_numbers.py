"""README's blocks of numbers: which are made, from which records, and that nothing else is touched."""

import json
from pathlib import Path

import pytest

import plots.__main__ as command
from plots import asides, readme, speeds
from plots.readme import BLOCKS, WrongBlock, rewritten
from plots.records import Records, load
from plots.reference import Unreadable
from plots.style import Absent
from tests.plots.conftest import record, store
from wush_kernels.bench.measurement import Ceilings, Measurement, Timing, Work
from wush_kernels.bench.record import Record as Benchmark
from wush_kernels.bench.record import save

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
    machine = {"processor": "AMD EPYC", "cores": 2, "torch": "2.13.0+cpu"}
    measures = [
        {"what": "the main job", "measured": 234.567, "unit": "s", "target": 300, "verdict": "met"},
        {"what": "a forward", "measured": 8.3, "unit": "%", "target": None, "verdict": "stated"},
    ]
    monkeypatch.setattr(speeds, "PROMISES", tmp_path / "promises.json")
    speeds.PROMISES.write_text(json.dumps({"machine": machine, "measures": measures}))
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
    assert lines[0] == "| format | transform | perplexity | vs original | KL | top-1, % | bits | time |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| mxfp4", "h"], ["| mxfp4", "wush"], ["| nvfp4", "h"], ["| nvfp4", "wush"],
    ]  # fmt: skip
    margin = 3.182 * 0.0258199 / 2  # Student's t of three degrees of freedom
    assert f"| 0.3300 ± {margin:.4f} |" in lines[3]
    assert lines[3].endswith("| 80.0 ± 0.0 | 4.25 | 3 min 0 s |")
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


def test_each_folder_of_the_main_job_is_a_column_also_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asides, "FOLDER", tmp_path)
    for name, kl in (("main", 0.25), ("main_again", 0.5)):
        (tmp_path / name).mkdir()
        one = record(kl=kl)
        one.environment["cores"] = 2
        (tmp_path / name / "one.json").write_text(one.model_dump_json())
    head, _, row = asides.machines().splitlines()
    assert head == "| format | transform | made up, 2 cores | made up, 2 cores |"
    assert row == "| mxfp4 | wush | 0.2500 | 0.5000 |"


def test_what_make_bench_measured_is_a_table_with_its_machine(records: Records, tmp_path: Path) -> None:
    made = rewritten(text("speed"), records)
    assert "| the main job | 234.57 s | 300 s | met |\n| a forward | 8.30 % | - | stated |" in made
    assert "AMD EPYC, 2 cores, torch 2.13.0." in made
    speeds.PROMISES.write_text("{}")
    with pytest.raises(Unreadable, match=r"promises\.json: no record of make bench.*make it with make bench"):
        speeds.promises()
    speeds.PROMISES.unlink()
    with pytest.raises(Absent, match="not there; make it with make bench"):
        speeds.promises()


def test_what_kernels_take_is_of_the_newest_record_and_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timings(**us: float) -> dict[str, Timing]:
        return {name: Timing(value, value, value, 1) for name, value in us.items()}

    lines = [
        Measurement("quantizer", "decoder block", "GPTQ + WUSH", 0, 0, 0, Work(0), timings=timings(ours=323_359.1)),
        Measurement("model", "prefill", "mxfp4 compiled", 8192, 0, 0, Work(0), timings=timings(ours=2, bf16=3)),
        Measurement("model", "decode", "mxfp4 compiled", 1, 0, 0, Work(0), timings=timings(ours=2), failure="wrong"),
    ]
    environment = {
        "date": "2026-01-02",
        "gpu": "a GPU",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "compute_capability": "9.0",
    }
    save(Benchmark(environment, {"quick": False}, Ceilings(1, 1, 1), lines, finished=True), tmp_path / "a.json", [])
    monkeypatch.setattr(speeds, "RESULTS", tmp_path)
    made = speeds.kernels()
    for told in (
        "fitted once | 0.32 s |",
        "refitted | not measured |",
        "tokens | 1.50x |",
        "sequence | not measured |",
    ):
        assert told in made
    assert "M = 1,024 | not measured |" in made
    assert made.endswith("a GPU, torch 2.11.0, Triton 3.6.0, record of 2026-01-02.")


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
