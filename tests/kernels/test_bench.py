"""The benchmark without a GPU: its arithmetic, promises, record, tables and command, on made-up measurements."""

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from wush import backends
from wush_kernels.bench import __main__ as command
from wush_kernels.bench import operands, promises, record, report, run, shapes
from wush_kernels.bench.measurement import Ceilings, Errors, Measurement, Timing, Work, measurement_from
from wush_kernels.bench.timing import Effort

CEILINGS = Ceilings(copy_gbs=2800.0, bf16_tflops=700.0, fp8_tflops=1400.0)
ENVIRONMENT = {
    **{"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"},
    **{"date": "2026-11-22T10:00:00+00:00", "git_commit": "0123456789abcdef", "git_changes": False},
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
    assert not Errors().wrong()


# Promises

PREFILL = "MXFP4 prefill, 8192 x 8192, M >= 256, layer"


def test_the_worst_measurement_decides_a_promise() -> None:
    met = outcome(made_record(layer(256, 1.9), layer(1024, 1.8)), PREFILL)
    assert (met.verdict, met.said) == ("met", "1.8x")
    missed = outcome(made_record(layer(256, 1.9), layer(4096, 1.6)), PREFILL)
    assert (missed.verdict, missed.said) == ("MISSED", "1.6x")
    assert "4096 x 8192 x 8192" in missed.where


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
    name = "8B-shaped model, decode, batch 1"
    assert outcome(made_record(whole), name).said == "2.4x"
    part = dataclasses.replace(whole, details={"decoder_blocks": 2})
    assert outcome(made_record(part), name).verdict == "not measured"


def test_layers_slower_than_bf16_are_listed_slowest_first() -> None:
    found = made_record(layer(64, 0.94), layer(128, 0.5), layer(256, 0.96), layer(64, 0.2, variant="nvfp4"))
    assert [one.tokens for one in promises.slow_layers(found)] == [128, 64]
    shown = text_of(report.promised(found))
    assert "slower than BF16 by more than 5%: 2" in shown


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


# Tables and plot


def test_tables_fit_100_columns() -> None:
    found = full_record()
    broken = dataclasses.replace(layer(4096, 1.0, (57344, 8192)), timings={}, failure="RuntimeError: it broke")
    wide = layer(4096, 123.45, (57344, 8192))
    shown = text_of([*report.lines("layers", [*found.measurements, broken, wide]), *report.summary(found)])
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


def test_the_readme_says_what_is_chosen() -> None:
    text = (record.CHECKOUT / "kernels" / "README.md").read_text()
    shape, limit = backends.Shape(4096, 4096), backends.DECODE_ROWS
    for capability in ((8, 9), (9, 0)):
        for name, fmt in operands.FORMATS.items():
            for rows, band in ((limit[name], f"up to {limit[name]}"), (limit[name] + 1, "more")):
                choice = backends.choose(fmt, backends.Machine(capability), rows, shape)
                assert f"| 8.9, 9.0 | {name} | {band} | `{choice.matmul}` |" in text


def test_the_plot_is_drawn_for_every_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from wush_kernels.bench.plot import plot

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
