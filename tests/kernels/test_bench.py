"""The benchmark without a GPU: its arithmetic, promises, record, tables and command, on made-up measurements."""

import dataclasses
import io
import itertools
import json
import math
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from wush import backends
from wush.machine import Machine
from wush_kernels.bench import __main__ as command
from wush_kernels.bench import operands, promises, record, report, run, shapes
from wush_kernels.bench.layers import NOT_KEPT
from wush_kernels.bench.measurement import Ceilings, Errors, Measurement, Timing, Work, measurement_from, worst
from wush_kernels.bench.timing import Effort

CEILINGS = Ceilings(copy_gbs=2800.0, bf16_tflops=700.0, fp8_tflops=1400.0)
ENVIRONMENT = {
    **{"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"},
    **{"date": "2026-11-22T10:00:00+00:00", "git_commit": "0123456789abcdef", "git_changes": False},
    "source_sha256": "ab" * 32,
}


def timing(us: float) -> Timing:
    return Timing(us, 0.98 * us, 1.04 * us, 7, 1.1 * us)


def layer(tokens: int, ratio: float, shape: tuple[int, int] = (8192, 8192), variant: str = "mxfp4") -> Measurement:
    """A layer so many times as fast as BF16."""
    outputs, features = shape
    work = Work(outputs * features * 0.53, 2.0 * tokens * outputs * features, "fp8")
    users = tuple(
        one.used_by for one in shapes.layer_shapes(shapes.MODELS) if (one.out_features, one.in_features) == shape
    )
    return Measurement(
        *("layers", "layer", variant, tokens, outputs, features, work, CEILINGS.floor_us(work)),
        timings={"ours": timing(20.0), "bf16": timing(20.0 * ratio), "fp8": timing(12.0 * ratio)},
        errors=Errors(relative=1.7e-3, largest=3e-3, limit=1e-2),
        path="triton + matmul_fp8",
        used_by=users[0] if users else (),
    )


def made_record(*measurements: Measurement) -> record.Record:
    return record.Record(ENVIRONMENT, {"quick": False}, CEILINGS, list(measurements))


def full_record() -> record.Record:
    """Every layer of every model at every M, and one of everything else."""
    found = [
        layer(tokens, 3.0 / math.log2(tokens + 2) + 1, (one.out_features, one.in_features), variant)
        for one in shapes.layer_shapes(shapes.MODELS)
        for variant in ("mxfp4", "nvfp4")
        for tokens in shapes.TOKENS
    ]
    quantize = Measurement(
        *("kernels", "quantize", "mxfp4 block", 8192, 0, 8192, Work(170e6), 60.0),
        timings={"ours": timing(80.0)},
        errors=Errors(mismatched=0.0),
    )
    decode = Measurement(
        *("model", "decode", "mxfp4 compiled", 1, 0, 0, Work(4.7e9), 1700.0),
        timings={"ours": timing(2500.0), "bf16": timing(6000.0)},
        details={"decoder_blocks": 32},
    )
    whole = made_record(quantize, *found, decode)
    whole.settle()
    return whole


def outcome(found: record.Record, name: str) -> promises.Outcome:
    return next(one for one in promises.outcomes(found) if one.promise.name == name)


def text_of(parts: list[object], width: int = report.WIDTH) -> str:
    """What is printed on a terminal of that width; a cell that does not fit would end in an ellipsis."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    for part in parts:
        console.print(part)
    return stream.getvalue()


# Shapes


def test_a_model_has_joined_and_separate_linears() -> None:
    linears = shapes.MODELS["llama3_1_8b"].linears()
    assert linears["q+k+v"] == (6144, 4096)
    assert linears["gate+up"] == (28672, 4096)
    assert linears["down"] == (4096, 14336)
    assert linears["k, v"] == (1024, 4096)


def test_equal_shapes_are_measured_once_and_name_their_users() -> None:
    found = shapes.layer_shapes(["qwen3_8b", "llama3_1_8b"])
    square = [one for one in found if (one.out_features, one.in_features) == (4096, 4096)]
    assert len(square) == 1
    assert square[0].used_by == ("qwen3_8b o", "qwen3_8b q", "llama3_1_8b o", "llama3_1_8b q")


def test_enough_copies_leave_the_cache_cold() -> None:
    assert Effort().copies(36 << 20) * (36 << 20) >= 200e6
    assert Effort().copies(1 << 40) == 2


# Arithmetic


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert CEILINGS.floor_us(Work(28e6)) == pytest.approx(10.0)
    assert CEILINGS.floor_us(Work(28e6, 7e10, "bf16")) == pytest.approx(100.0)
    assert CEILINGS.floor_us(Work(28e6, 7e10, "fp8")) == pytest.approx(50.0)


def test_rates_and_ratios_of_a_measurement() -> None:
    one = layer(16, 2.5)
    assert one.ratio("bf16") == pytest.approx(2.5)
    assert one.ratio("addmm") is None
    assert one.gbs == pytest.approx(one.work.bytes / 20e-6 / 1e9)
    assert one.tflops == pytest.approx(one.work.flops / 20e-6 / 1e12)
    assert one.roofline == pytest.approx(one.floor_us / 20)
    assert one.shape == "16 x 8192 x 8192"


def test_a_measurement_survives_json() -> None:
    one = dataclasses.replace(layer(16, 2.5), failure="it broke", details={"blocks": 3})
    assert measurement_from(json.loads(json.dumps(dataclasses.asdict(one)))) == one


def test_errors_over_their_limit_and_nan_are_wrong() -> None:
    assert not Errors(relative=1e-3, limit=4e-3).wrong()
    assert "relative error" in Errors(relative=5e-3, limit=4e-3).wrong()
    assert Errors(relative=math.nan, limit=4e-3).wrong()
    assert "mismatched" in Errors(mismatched=1e-9).wrong()
    assert "relative error of the logits" in Errors(relative=5e-3, limit=4e-3, what="the logits").wrong()
    assert not Errors().wrong()
    assert not Errors(limit=1.0).checked


def test_the_worst_of_errors_is_the_largest_against_its_limit() -> None:
    small, large = Errors(relative=8e-3, limit=1e-2), Errors(relative=1e-2, limit=2e-2)
    assert worst([large, small, large]) is small
    nan = Errors(relative=math.nan, limit=1e-2)
    assert worst([small, nan, large]) is nan


# Promises

PREFILL = "MXFP4 prefill, 8192 x 8192, M >= 256, layer"


def test_the_worst_measurement_decides_a_promise() -> None:
    met = outcome(made_record(layer(256, 1.9), layer(1024, 1.8), layer(4096, 1.85)), PREFILL)
    assert (met.verdict, met.said) == ("met", "1.8x")
    missed = outcome(made_record(layer(256, 1.9), layer(4096, 1.6)), PREFILL)
    assert (missed.verdict, missed.said) == ("MISSED", "1.6x")
    assert "4096 x 8192 x 8192" in missed.where


def test_without_all_that_it_needs_a_promise_is_not_met() -> None:
    part = outcome(made_record(layer(256, 1.9), layer(1024, 1.8)), PREFILL)
    assert (part.verdict, part.said, part.roofline) == ("in part", "1.8x", "2 of 3 measured")
    assert outcome(made_record(layer(256, 1.6)), PREFILL).verdict == "MISSED"


def needed(point: promises.Point) -> Measurement:
    """What a promise needs, so fast that any is met."""
    name, variant, tokens, outputs, features = point
    sections = {"layer": "layers", "decoder block": "quantizer", "decode": "model", "prefill": "model"}
    times = {"ours": timing(1.0), "bf16": timing(100.0), "addmm": timing(100.0)}
    return Measurement(
        *(sections.get(name, "kernels"), name, variant, tokens, outputs, features, Work(1e12)),
        timings=times,
        details={"decoder_blocks": 32},
    )


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda promise: promise.name)
def test_no_promise_is_met_without_each_of_its_measurements(promise: promises.Promise) -> None:
    everything = [needed(point) for point in sorted(promise.needs)]
    assert outcome(made_record(*everything), promise.name).verdict == "met"
    for left_out in range(min(4, len(everything))):
        rest = everything[:left_out] + everything[left_out + 1 :]
        assert outcome(made_record(*rest), promise.name).verdict in ("in part", "not measured")
    failed = [*everything[1:], dataclasses.replace(everything[0], failure="wrong: relative error")]
    assert outcome(made_record(*failed), promise.name).verdict == "FAILED"
    slow_times = {"ours": timing(1e12), "bf16": timing(5e11), "addmm": timing(5e11)}
    slow = dataclasses.replace(everything[-1], timings=slow_times)
    assert outcome(made_record(*everything[:-1], slow), promise.name).verdict == "MISSED"


def test_a_ratio_that_is_no_number_fails_its_promise() -> None:
    bad = dataclasses.replace(layer(1024, 1.9), timings={"ours": timing(20.0), "bf16": timing(math.nan)})
    assert outcome(made_record(layer(256, 1.9), bad, layer(4096, 1.9)), PREFILL).verdict == "FAILED"


def test_layers_that_keep_no_copies_are_shown_and_not_promised() -> None:
    found = made_record(layer(4096, 0.5, (28672, 4096), NOT_KEPT))
    assert {one.verdict for one in promises.outcomes(found)} == {"not measured"}
    assert not promises.slow_layers(found)
    shown = report.markdown(found)
    assert "MXFP4 layers, no copies, ratio to BF16" in shown
    assert "| llama3_1_8b | gate+up | 28672 x 4096 | 0.50 |" in shown


def test_what_a_transform_for_each_block_costs_is_told_where_both_were_timed() -> None:
    assert "one Hadamard matrix" not in report.markdown(full_record())
    lines = [layer(1024, 1.9, (8192, size)) for size in (4096, 8192, 28672)]
    for one, us in zip(lines[:2], (19.0, 20.0), strict=True):
        one.timings["hadamard"] = timing(us)
    lines += [dataclasses.replace(lines[0], tokens=4096), dataclasses.replace(lines[0], failure="wrong")]
    shown = report.markdown(made_record(*lines))
    assert (
        "MXFP4 layers with a transform for each block are 2.5% slower on average than with one Hadamard matrix for "
        "all, 0.0% to 5.0% (M = 1,024, 2 layers)." in shown
    )
    assert "NVFP4 layers with a transform for each block are" not in shown


def test_a_missed_promise_says_what_the_roofline_allows() -> None:
    missed = outcome(made_record(layer(4096, 1.6)), PREFILL)
    assert "GFLOP in fp8" in missed.roofline
    assert "so at most" in missed.roofline


def test_a_failure_fails_its_promise_and_other_shapes_do_not_count() -> None:
    broken = dataclasses.replace(layer(1024, 1.9), timings={}, failure="RuntimeError: no")
    assert outcome(made_record(layer(256, 1.9), broken), PREFILL).verdict == "FAILED"
    assert outcome(made_record(layer(256, 1.0, (4096, 4096)), layer(64, 1.0)), PREFILL).verdict == "not measured"


def test_a_time_is_to_be_at_most_its_bound() -> None:
    block = Measurement(
        *("quantizer", "decoder block", promises.GPTQ_WUSH, 0, 0, 0, Work(0)), timings={"ours": timing(0.7e6)}
    )
    name = "GPTQ + WUSH of one Llama-3.1-8B decoder block, fitted once"
    assert outcome(made_record(block), name).verdict == "met"
    slow = dataclasses.replace(block, timings={"ours": timing(1.3e6)})
    assert (outcome(made_record(slow), name).verdict, outcome(made_record(slow), name).said) == ("MISSED", "1.3 s")


def test_a_model_of_few_blocks_keeps_no_promise() -> None:
    whole = full_record().of("model")[0]
    name = "8B-shaped model, compiled, decode, batch 1"
    assert outcome(made_record(whole), name).said == "2.4x"
    for other in ({"details": {"decoder_blocks": 2}}, {"variant": "mxfp4 as is"}):
        assert outcome(made_record(dataclasses.replace(whole, **other)), name).verdict == "not measured"


def test_layers_slower_than_bf16_are_listed_slowest_first() -> None:
    found = made_record(layer(64, 0.94), layer(128, 0.5), layer(256, 0.96), layer(64, 0.2, variant="nvfp4"))
    assert [one.tokens for one in promises.slow_layers(found)] == [128, 64]
    shown = text_of(report.promised(found))
    assert "slower than BF16 by more than 5%: 2" in shown
    wrong = dataclasses.replace(layer(256, 3.0), failure="wrong: relative error")
    assert [one.tokens for one in promises.slow_layers(made_record(layer(64, 0.5), wrong))] == [256, 64]


def test_lists_say_how_much_they_leave_out() -> None:
    found = made_record(*(dataclasses.replace(layer(tokens, 0.5), failure="no") for tokens in range(1, 24)))
    assert text_of(report.promised(found)).count("and 3 more") == 1
    assert text_of(report.summary(found)).count("and 3 more") == 2


def test_every_promise_has_a_name_of_its_own_and_a_measurement_it_can_be_about() -> None:
    names = [one.name for one in promises.PROMISES]
    assert len(set(names)) == len(names) == len(promises.outcomes(full_record()))


# Record


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = full_record()
    record.save(found, tmp_path / "made" / "one.json", [])
    assert record.load(tmp_path / "made" / "one.json") == found
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["one.json"]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    bad = dataclasses.replace(layer(1, 2.0), errors=Errors(relative=math.nan, limit=1.0))
    record.save(made_record(bad), tmp_path / "one.json", [])
    assert "NaN" not in (tmp_path / "one.json").read_text()
    assert record.load(tmp_path / "one.json").measurements[0].errors.relative is None


def test_what_is_no_record_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"old\.json.*schema is 0"):
        record.load(tmp_path / "old.json")
    with pytest.raises(ValueError, match="no record"):
        record.load(tmp_path / "none.json")


def test_the_default_name_is_of_the_gpu_and_day_and_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    first = record.default_path(ENVIRONMENT, quick=False)
    assert first == tmp_path / "nvidia-h100-80gb-hbm3-2026-11-22.json"
    first.touch()
    assert record.default_path(ENVIRONMENT, quick=False) == tmp_path / "nvidia-h100-80gb-hbm3-2026-11-22-2.json"


def package(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = folder / "measured_sources" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_sources_hash_is_of_paths_and_contents_and_not_of_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MEASURED", ("measured_sources",))
    variants = {"one": {"a": "x", "b": "y"}, "same": {"b": "y", "a": "x"}, "content": {"a": "x", "b": "z"}}
    variants |= {"path": {"a": "x", "c": "y"}, "border": {"a": "xy", "b": ""}, "folder": {"a": "x", "b__b": "y"}}
    found = {}
    for name, modules in variants.items():
        with monkeypatch.context() as one:
            one.syspath_prepend(package(tmp_path / name, **modules))
            found[name] = record.source_sha256()
    assert found.pop("same") == found["one"]
    assert len(set(found.values())) == 5
    with pytest.raises(ModuleNotFoundError, match="measured_sources"):
        record.source_sha256()


def test_the_sources_that_are_measured_are_the_method_and_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = record.source_sha256()
    for package in ("wush", "wush_kernels"):
        monkeypatch.setattr(record, "MEASURED", (package,))
        assert len(record.source_sha256()) == 64
        assert record.source_sha256() != whole
    assert f"sources {'ab' * 8}\n" in f"{report.header(made_record())}\n"
    old = dataclasses.replace(made_record(), environment=ENVIRONMENT | {"source_sha256": None, "git_commit": None})
    assert "commit unknown, sources unknown" in report.header(old)


def test_without_git_commit_and_changes_are_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = types.SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=1, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    answers = {"rev-parse": "0123", "status": " M a.py", "--query-gpu=driver_version": "1"}
    monkeypatch.setattr(record, "_said", lambda *command: next(answers[word] for word in command if word in answers))
    found = record.describe_environment()
    assert (found["git_commit"], found["git_changes"]) == ("0123", True)
    assert found["source_sha256"] == record.source_sha256()
    answers["status"] = ""
    assert record.describe_environment()["git_changes"] is False
    monkeypatch.setattr(record, "CHECKOUT", tmp_path)
    found = record.describe_environment()
    assert (found["git_commit"], found["git_changes"]) == (None, None)


def test_a_wrong_result_sets_no_ceiling() -> None:
    fast = dataclasses.replace(layer(16, 2.5), timings={"ours": timing(0.01)})
    found, failed = made_record(fast), made_record(dataclasses.replace(fast, failure="wrong: relative error"))
    found.settle()
    failed.settle()
    assert found.ceilings.read_gbs > 1e5
    assert failed.ceilings.read_gbs == 0


# Tables and plot


def test_tables_fit_100_columns() -> None:
    found = full_record()
    broken = dataclasses.replace(layer(4096, 1.0, (57344, 8192)), timings={}, failure="RuntimeError: it broke")
    wide = layer(4096, 123.45, (57344, 8192))
    not_kept = dataclasses.replace(layer(4096, 1.23, (28672, 4096), NOT_KEPT), timings={"ours": timing(1234.5)})
    found.measurements.append(not_kept)
    shown = text_of([*report.lines("layers", [*full_record().measurements, broken, wide]), *report.summary(found)])
    shown += text_of(report.lines("layers", [not_kept]))
    assert "…" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines() if "floor" not in line) <= report.WIDTH
    assert "RuntimeError: it broke" in shown


def test_a_line_shows_rates_ratios_and_the_share_of_the_roofline() -> None:
    shown = text_of(report.lines("layer", [layer(16, 2.5)]))
    for part in ("16x8192x8192", "20.0", "22.0", "2.50", "1.50", f"{layer(16, 2.5).roofline:.0%}", "1.7e-03"):
        assert part in shown


def test_markdown_holds_promises_ratios_and_the_model() -> None:
    shown = report.markdown(full_record())
    assert "| llama3_1_70b | gate+up | 57344 x 8192 | " in shown
    assert "| decode | compiled | 32 | 167 | 400 | 2.40x |" in shown
    assert "NVIDIA H100 80GB HBM3" in shown


def test_a_failed_measurement_is_no_number_in_any_table() -> None:
    wrong = dataclasses.replace(layer(16, 2.5), failure="wrong: relative error")
    model = dataclasses.replace(full_record().of("model")[0], failure="wrong: relative error")
    found = made_record(wrong, layer(64, 1.25), model)
    assert "| llama3_1_70b | o | 8192 x 8192 | FAILED | 1.25 |" in report.markdown(found)
    assert "| decode | compiled | 32 | - | - | FAILED |" in report.markdown(found)
    shown = text_of([report.ratios(found, "mxfp4"), report.model_table(found)])
    assert shown.count("FAILED") == 2
    assert "2.50" not in shown


def test_markdown_says_what_a_record_lacks() -> None:
    whole = dataclasses.replace(full_record(), finished=True)
    assert report.caveats(whole) == []
    broken = dataclasses.replace(layer(16, 2.5), failure="no")
    part = dataclasses.replace(made_record(broken), settings={"quick": True})
    text = "The run did not come to its end; a quick run, of a few of each kind; 1 of 1 measurements failed."
    assert text in report.markdown(part)


def test_markdown_gives_a_reason_for_every_promise_that_is_not_met() -> None:
    slow = needed(("decoder block", promises.REFIT, 0, 0, 0))
    found = made_record(dataclasses.replace(slow, timings={"ours": timing(1.4e6)}), layer(256, 1.9))
    shown = report.markdown(found)
    assert "refitted: decoder block refit" in shown
    assert f"- {PREFILL}: layer mxfp4 256 x 8192 x 8192: 1 of 3 measured" in shown


def test_a_readme_takes_the_table_between_its_marks(tmp_path: Path) -> None:
    readme, path = tmp_path / "README.md", tmp_path / "one.json"
    record.save(full_record(), path, [])
    for _ in range(2):
        readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
        assert command.main(["table", str(path), "--output", str(readme)]) == 0
    table = report.markdown(full_record())
    assert readme.read_text() == f"before\n<!-- results -->\n{table}<!-- /results -->\nafter\n"
    readme.write_text("no marks")
    assert command.main(["table", str(path), "--output", str(readme)]) == 2


def test_the_readmes_table_is_that_of_the_committed_record() -> None:
    (path,) = record.RESULTS.glob("*.json")
    _, begun, rest = (record.CHECKOUT / "kernels" / "README.md").read_text().partition("<!-- results -->\n")
    table, closed, _ = rest.partition("<!-- /results -->")
    assert begun
    assert closed
    assert table == report.markdown(record.load(path)), (
        f"run python -m wush_kernels.bench table {path} --output kernels/README.md"
    )


def test_the_readme_says_what_is_chosen() -> None:
    lines = (record.CHECKOUT / "kernels" / "README.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    for capability, (name, fmt) in itertools.product(((8, 9), (9, 0)), operands.FORMATS.items()):
        said = {row[-1] for row in table if f"{capability[0]}.{capability[1]}" in row[0].split(", ") and name in row[1]}
        for rows, outputs in itertools.product((1, 33, 65, 300, 4096), (1024, 8192, 57344)):
            choice = backends.choose(fmt, Machine(capability), rows, backends.Shape(outputs, 4096))
            assert any(f"`{choice.matmul}`" in cell for cell in said), (capability, name, rows, outputs)


def test_the_plot_is_drawn_for_every_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from wush_kernels.bench.plot import plot

    wrong = [dataclasses.replace(layer(one, 9.0, (8192, 28672)), failure="wrong") for one in (1, 4)]
    plot(made_record(*wrong, layer(1, 2.0)), tmp_path / "ratio.png")
    plot(full_record(), tmp_path / "ratio.png")
    assert (tmp_path / "ratio.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no layers"):
        plot(made_record(), tmp_path / "none.png")


# The command


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--quick"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--shapes", "gpt5"], ["--only", "kernel"], ["plot"], ["table", "nowhere.json"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert capsys.readouterr().err


def test_table_prints_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.save(full_record(), tmp_path / "one.json", [])
    assert command.main(["table", str(tmp_path / "one.json")]) == 0
    assert capsys.readouterr().out == report.markdown(full_record())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with known ceilings, whose layers are all fast and whose kernels cannot be imported."""

    def broken(options: run.Options, ceilings: Ceilings) -> Iterator[Measurement]:
        yield layer(1, 3.0)
        raise ImportError("no kernel")

    monkeypatch.setattr(run, "why_no_gpu", lambda: None)
    monkeypatch.setattr(run, "describe_environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(run, "measure_ceilings", lambda quick: CEILINGS)
    monkeypatch.setattr(
        run, "MEASURERS", {"kernels": broken, "layers": lambda options, ceilings: iter([layer(16, 2.9)])}
    )


@pytest.mark.usefixtures("pretended")
def test_a_section_that_breaks_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.json"
    assert run.run(run.Options(sections=("kernels", "layers"), output=path)) == 1
    found = record.load(path)
    assert [one.failure for one in found.of("kernels")] == ["ImportError: no kernel"]
    assert [one.tokens for one in found.of("layers")] == [1, 16]
    assert found.finished
    assert set(found.sections) == {"kernels", "layers"}
    assert "no kernel" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["promises"]) == len(promises.PROMISES)


@pytest.mark.usefixtures("pretended")
def test_a_run_without_failures_ends_with_zero(tmp_path: Path) -> None:
    assert run.run(run.Options(sections=("layers",), output=tmp_path / "one.json")) == 0
