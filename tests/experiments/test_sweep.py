"""Sweeps end to end on tiny models: done trials are skipped, failures stay alone, records say everything."""

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import wush
import wush.models
from experiments import sweep
from experiments.attempts import Attempt, Attempts, Lease
from experiments.launch import driver
from experiments.launch.choose import carry_out
from experiments.logs import one_line
from experiments.records import SCHEMA_VERSION, Failure, Outcome, Record
from experiments.schema import ConfigError, TrialConfig
from experiments.store import ResultStore
from experiments.sweep import Composed
from experiments.trial import Trial, TrialRunner
from experiments.views.summary import summarize
from tests.experiments.conftest import Cli, composed, config
from wush.texts import TextWindows

FOUR = ("-m", "format=mxfp4,nvfp4", "transform=h,wush")


def run(planned: sweep.Sweep) -> Sequence[Outcome]:
    """The sweep run in this process."""
    return carry_out(planned, {"_target_": "hydra_plugins.wush.LocalLauncher", "busy": "wait"})


def records(cli: Cli) -> list[Record]:
    store = ResultStore(cli.folder / "results")
    return [record for trial_id in store.ids() if (record := store.record(trial_id))]


def test_four_trials_finish_and_a_second_time_nothing_is_run(cli: Cli) -> None:
    first = cli.small(*FOUR)
    assert first.returncode == 0, first.stderr
    assert "4 of 4 trials done" in first.stdout
    before = {path: path.stat().st_mtime_ns for path in cli.folder.rglob("result.json")}
    assert len(before) == 4
    second = cli.small(*FOUR)
    assert second.returncode == 0
    assert "4 of 4 trials already done" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in cli.folder.rglob("result.json")} == before
    # The table is the same again, the time that the trials took included.
    table = re.compile(r"^ (mxfp4|nvfp4).*$", re.MULTILINE)
    assert [m[0] for m in table.finditer(first.stdout)] == [m[0] for m in table.finditer(second.stdout)]


def test_a_sweep_leaves_its_plan_table_and_report_where_it_says(cli: Cli) -> None:
    done = cli.small(*FOUR)
    paths = dict(re.findall(r"^  (table|report) +(\S+)$", done.stdout, re.MULTILINE))
    assert set(paths) == {"table", "report"}
    assert (cli.folder / paths["table"]).read_text().count("\n| ") == 5
    report = (cli.folder / paths["report"]).read_text()
    plan = json.loads((cli.folder / paths["report"]).with_name("plan.json").read_text())
    assert len(plan["trials"]) == 4
    assert all(trial["trial_id"] in report for trial in plan["trials"])


def test_the_command_shown_for_a_trial_shows_it(cli: Cli) -> None:
    done = cli.small("format=int4")
    command = re.search(r"a trial +python -m experiments (\S.*)$", done.stdout, re.MULTILINE)
    assert command
    shown = cli.experiments(*command[1].split())
    assert shown.returncode == 0
    assert "wush.Int4" in shown.stdout
    assert re.search(r"predictions +62\s", shown.stdout)
    assert f"{records(cli)[0].metrics.perplexity:.4f}" in shown.stdout


def test_showing_a_trial_that_is_not_there_names_those_that_are(cli: Cli) -> None:
    cli.small()
    shown = cli.experiments("show", "zzz")
    assert shown.returncode == 2
    assert records(cli)[0].trial_id in shown.stderr


def test_a_record_holds_all_that_the_result_depends_on(cli: Cli) -> None:
    text = cli.folder / "text.txt"
    text.write_text("Some plain text to look at. " * 50)
    cli.small("evaluation=text", f"evaluation.path={text}", "algorithm=gptq", "seed=7")
    (record,) = records(cli)
    assert record.choices["algorithm"] == "gptq"
    assert record.config == config("evaluation=text", f"evaluation.path={text}", "algorithm=gptq", "seed=7")
    assert record.seed == 7
    assert record.data["evaluation"].text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert record.data["calibration"].tokens == 2 * 32
    assert [block.index for block in record.blocks] == [0, 1]
    assert all(block.calibration.mse > 0 and len(block.layers) == 7 for block in record.blocks)
    assert set(record.stages) == {"load", "original", "quantize", "measure", "evaluate"}
    assert all(stage.peak_memory_bytes > 10**7 for stage in record.stages.values())  # type: ignore[operator]
    assert torch.__version__.startswith(record.versions["torch"])
    assert set(record.environment) == {"host", "platform", "processor", "cores", "threads", "device"}
    assert record.metrics.predictions == 2 * 31
    (ran_on,) = record.kernels
    assert ran_on == "mxfp4: quantize torch, matmul torch (no CUDA GPU)"
    assert "model.layers.0-1.mlp.down_proj" in record.kernels[ran_on]
    assert record.model_revision is None
    folder = ResultStore(cli.folder / "results").trial(record.trial_id)
    assert {path.name for path in folder.iterdir()} == {
        *("attempts", "config.yaml", "environment.json", "result.json", "trial.log")
    }


def test_a_trial_gives_the_numbers_of_the_library_called_by_hand(cli: Cli) -> None:
    cli.small("format=nvfp4", "transform=wush", "algorithm=gptq")
    (record,) = records(cli)
    from wush.models import load_random
    from wush.texts import EmbeddedText

    loaded = load_random("llama", 64, 128, 2, 4, 2, 0, "float32", "cpu")
    sizes = {"windows": 2, "window_length": 32, "batch_size": 4}
    held_out = EmbeddedText(part="evaluation", **sizes).cut(loaded.tokenizer, "evaluation")
    calibration = EmbeddedText(part="calibration", seed=0, **sizes).cut(loaded.tokenizer, "calibration")
    states = wush.original_states(loaded.model, held_out)
    report = wush.QuantizationReport()
    options = {"format": wush.NVFP4, "transform": wush.Wush(), "algorithm": wush.Gptq(), "report": report}
    wush.quantize(loaded.model, calibration.split(4), **options)
    found = wush.evaluate(loaded.model, held_out, states)
    assert record.metrics.kl == found.kl
    assert record.metrics.perplexity == found.perplexity
    assert record.metrics.bits_per_weight == report.bits_per_weight
    assert [block.calibration.mse for block in record.blocks] == [block.mse for block in report.blocks]


def test_the_baseline_is_one_trial_and_changes_nothing(cli: Cli) -> None:
    done = cli.small("-m", "format=original", "transform=h,wush", "algorithm=rtn,gptq")
    assert "1 of 1 trials done" in done.stdout
    (record,) = records(cli)
    assert record.metrics.kl == 0
    assert record.metrics.perplexity == record.metrics.perplexity_original
    assert record.metrics.bits_per_weight == 32
    assert not {"transform", "algorithm", "calibration"} & set(record.choices)


def test_one_failing_trial_does_not_stop_the_others(cli: Cli) -> None:
    done = cli.small("-m", "model.hidden_size=64,40", "model.heads=4")
    assert done.returncode == 1
    reason = "model.layers.0.self_attn.q_proj: in_features 40 is not a multiple of the group size 32 of mxfp4"
    assert f"failed: {reason}" in " ".join(done.stdout.split())
    assert "1 of 2 trials done, 1 failed" in done.stdout
    assert len(records(cli)) == 1
    (failed,) = cli.folder.rglob("failure.json")
    assert reason in json.loads(failed.read_text())["reason"]
    assert "Traceback" in failed.with_name("trial.log").read_text()
    assert not failed.with_name("result.json").exists()
    assert reason in next(cli.folder.rglob("table.md")).read_text()


def test_a_failed_trial_runs_again_when_its_cause_is_gone(cli: Cli) -> None:
    text = cli.folder / "text.txt"
    text.write_text("short")
    too_short = cli.small("calibration=text", f"calibration.path={text}")
    assert too_short.returncode == 1
    assert "calibration text has 5 tokens, 0 windows of 32" in too_short.stderr
    text.write_text("long enough now " * 30)
    assert cli.small("calibration=text", f"calibration.path={text}").returncode == 0


def test_a_damaged_result_is_reported_moved_aside_and_run_again(cli: Cli) -> None:
    cli.small()
    (path,) = cli.folder.rglob("result.json")
    whole = Record.model_validate_json(path.read_bytes())
    path.write_text(path.read_text()[:500])
    again = cli.small()
    assert again.returncode == 0
    assert "damaged" in again.stderr
    assert Record.model_validate_json(path.read_bytes()).metrics == whole.metrics
    assert len(list(path.parent.glob("result.damaged-*"))) == 1


def test_a_full_disk_fails_the_trial_and_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = sweep.plan([composed(f"results={tmp_path}")], [])

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResultStore, "finish", full_disk)
    with pytest.raises(driver.SweepFailed):
        run(planned)
    assert not list(tmp_path.rglob("result.json"))
    assert "No space left on device" in next(tmp_path.rglob("failure.json")).read_text()


def test_all_config_errors_of_a_sweep_come_together_and_nothing_runs(tmp_path: Path) -> None:
    configs = [composed(f"results={tmp_path}", f"seed={seed}", f"device={d}") for seed in (-1, 0) for d in ("x", "cpu")]
    with pytest.raises(ConfigError) as raised:
        sweep.plan(configs, [])
    assert len(str(raised.value).splitlines()) == len({"seed", "calibration.seed", "device"})
    assert not list(tmp_path.iterdir())


def test_the_same_trial_twice_in_a_sweep_is_run_once() -> None:
    assert (
        len(
            sweep.plan([composed("seed=1"), composed("seed=2"), composed("seed=1", "transform.refit=false")], []).trials
        )
        == 2
    )


def test_batch_sizes_make_no_trial_of_their_own_and_no_label(caplog: pytest.LogCaptureFixture) -> None:
    configs = [composed(f"calibration.batch_size={n}", f"evaluation.batch_size={2 * n}") for n in (1, 2, 4)]
    with caplog.at_level(logging.INFO):
        (trial,) = sweep.plan(configs, []).trials
    assert "2 configs are the same trial as another one" in caplog.text
    assert trial.config["calibration"]["batch_size"] == 1
    assert set(trial.labels) == {"model", "format", "transform", "algorithm"}


def test_problems_met_while_composing_come_with_all_others_each_once() -> None:
    configs = [composed(f"device={d}", f"seed={s}") for d, s in (("x", 0), ("x", 1), ("cpu", 2), ("auto", 3))]
    with pytest.raises(ConfigError) as raised:
        sweep.plan(configs, [], ["formt: unknown key", "formt: unknown key"])
    lines = str(raised.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["formt", "device=x", "device=cpu,auto"]
    with pytest.raises(ConfigError, match="formt: unknown key"):
        sweep.plan([], [], ["formt: unknown key"])


def test_a_text_that_is_not_there_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[Path] = Counter()
    monkeypatch.setattr(Path, "read_text", lambda path, **_: calls.update([path]) or path.read_bytes().decode())
    configs = [composed("evaluation=text", f"evaluation.path={tmp_path / 'no'}", f"seed={s}") for s in range(3)]
    with pytest.raises(ConfigError, match="No such file") as raised:
        sweep.plan(configs, [])
    assert len(str(raised.value).splitlines()) == 1
    assert calls == {tmp_path / "no": 1}


def test_labels_are_the_choices_and_what_differs() -> None:
    found = sweep.label([composed("transform=r", f"seed={seed}") for seed in (0, 1)])
    assert [one["transform"] for one in found] == ["r", "r"]
    assert [one["transform.seed"] for one in found] == ["0", "1"]
    plain = sweep.label([composed("format=mxfp4"), composed("format=nvfp4")])
    assert all(set(one) == {"model", "format", "transform", "algorithm"} for one in plain)


def test_labels_leave_out_what_a_trial_does_not_use() -> None:
    configs = [
        composed(f"format={f}", f"seed={s}", "calibration.seed=0", "transform=r")
        for f in ("original", "int4")
        for s in (0, 1)
    ]
    plain, _, first, second = sweep.label(configs)
    assert set(plain) == {"model", "format", "transform", "algorithm"}
    assert (first["transform.seed"], second["transform.seed"]) == ("0", "1")
    assert "seed" not in first


def test_a_planned_trial_has_its_validated_config_in_the_schemas_order() -> None:
    one = composed()
    (trial,) = sweep.plan([Composed(dict(reversed(one.config.items())), one.choices)], []).trials
    assert trial.config == one.config
    assert list(trial.config) == list(TrialConfig.model_fields)


def test_configs_that_are_one_trial_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sweep.plan([composed("format=original", f"transform={t}") for t in ("h", "i", "wush")], [])
    assert "2 configs are the same trial as another one" in caplog.text


@pytest.mark.parametrize(
    "override", ["results=elsewhere", "sweep=mine", "progress=lines", "device=auto", "tracking=wandb"]
)
def test_a_sweep_runs_in_one_way(override: str) -> None:
    with pytest.raises(ConfigError, match=f"one sweep has one {override.partition('=')[0]}"):
        sweep.plan([composed(), composed("seed=1", override)], [])


def test_a_text_edited_after_planning_fails_its_trial(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some plain text. " * 50)
    planned = sweep.plan([composed(f"results={tmp_path}", "evaluation=text", f"evaluation.path={text}")], [])
    text.write_text("Another plain text. " * 50)
    with pytest.raises(driver.SweepFailed):
        run(planned)
    assert not list(tmp_path.rglob("result.json"))
    reason = json.loads(next(tmp_path.rglob("failure.json")).read_text())["reason"]
    assert reason == "evaluation: the text changed since the sweep was planned; start it again"


def test_a_gpu_that_is_not_there_is_a_config_error_before_any_trial(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device=cuda:99: this machine has .* set device=cpu"):
        run(sweep.plan([composed(f"results={tmp_path}", "device=cuda:99")], []))
    assert not list((tmp_path / "trials").iterdir())


def test_a_failure_before_any_work_is_stored_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("driver too old")

    monkeypatch.setattr("experiments.environment.describe", broken)
    with pytest.raises(driver.SweepFailed):
        run(sweep.plan([composed(f"results={tmp_path}")], []))
    assert json.loads(next(tmp_path.rglob("failure.json")).read_text())["reason"] == "driver too old"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("one", "one"),
        ("", "ValueError"),
        ("a model\n\n  has no head\n", "a model; has no head"),
        ("\n".join(["x" * 100] * 5), f"{'x' * 100}; {'x' * 100} (+3 more lines)"),
        ("x" * 300 + "\nnext", "x" * 239 + "… (+1 more line)"),
    ],
)
def test_a_reason_is_one_line_of_the_whole_message(message: str, reason: str) -> None:
    assert one_line(ValueError(message)) == reason


def test_each_original_is_loaded_cut_and_evaluated_once_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr("wush.models.load_random", counted("load", wush.models.load_random))
    monkeypatch.setattr(TextWindows, "cut", counted("cut", TextWindows.cut))
    monkeypatch.setattr("wush.original_states", counted("states", wush.original_states), raising=False)
    grid = [(fmt, seed) for fmt in ("mxfp4", "int4") for seed in (0, 1)]
    configs = [
        composed(f"results={tmp_path}", "device=cpu", f"format={fmt}", f"model.seed={seed}") for fmt, seed in grid
    ]
    outcomes = run(sweep.plan(configs, []))
    assert [(o.labels["format"], o.labels["model.seed"]) for o in outcomes] == [(f, str(s)) for f, s in grid]
    assert calls == {"load": 2, "cut": 4, "states": 2}


def test_a_trial_that_another_process_finished_meanwhile_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = sweep.plan([composed(f"results={tmp_path}")], [])
    (done,) = run(planned)
    path = planned.store.trial(done.trial_id) / "result.json"
    path.rename(path.with_name("kept.json"))
    claim = Attempts.claim

    def finished_first(self: Attempts, name: str) -> Lease | Attempt:
        path.with_name("kept.json").rename(path)
        return claim(self, name)

    monkeypatch.setattr(Attempts, "claim", finished_first)
    monkeypatch.setattr(TrialRunner, "_attempt", None)
    (again,) = run(planned)
    assert again.result == done.result
    assert not again.earlier


def test_a_metric_that_is_not_finite_fails_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = wush.WindowSums(nll=[1.0], nll_original=[1.0], kl=[1.0], agree=[31], predictions=[62])
    values = {"perplexity_original": 2.0, "kl": 1.0, "top1": 0.5, "predictions": 62}
    found = wush.Evaluation(perplexity=math.inf, **values, windows=sums, lost={})
    monkeypatch.setattr("wush.evaluate", lambda *_, **__: found, raising=False)
    with pytest.raises(driver.SweepFailed):
        run(sweep.plan([composed(f"results={tmp_path}")], []))
    assert "perplexity is inf" in json.loads(next(tmp_path.rglob("failure.json")).read_text())["reason"]


def test_a_failed_trial_has_its_config_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Outcome] = []
    monkeypatch.setattr(driver, "summarize", lambda _, outcomes, __: seen.extend(outcomes))
    planned = sweep.plan([composed(f"results={tmp_path}", "model.hidden_size=40")], [])
    with pytest.raises(driver.SweepFailed):
        run(planned)
    assert seen[0].config == planned.trials[0].config
    assert seen[0].failure
    assert {"host", "platform", "processor", "cores", "threads", "device"} <= set(seen[0].failure.environment)


def test_the_table_and_report_are_written_after_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = sweep.plan([composed(f"results={tmp_path}", f"format={fmt}") for fmt in ("mxfp4", "int4")], [])
    run_one = TrialRunner.run

    def second_is_interrupted(self: TrialRunner, trial: Trial) -> Record | Failure | Attempt:
        if trial == planned.trials[1]:
            raise KeyboardInterrupt
        return run_one(self, trial)

    monkeypatch.setattr(TrialRunner, "run", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(planned)
    first, second = next(tmp_path.rglob("table.md")).read_text().splitlines()[-2:]
    assert "%" in first
    assert "queued" in second
    assert "1 done, 0 failed, 1 queued" in next(tmp_path.rglob("report.html")).read_text()


def test_a_table_that_cannot_be_written_is_shown_first_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = run(sweep.plan([composed(f"results={tmp_path}")], []))
    capsys.readouterr()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*table.md'"):
        summarize("default", outcomes, ResultStore(tmp_path))
    assert outcomes[0].trial_id[:8] in capsys.readouterr().out


def test_show_leaves_a_damaged_or_foreign_record_where_it_is(cli: Cli) -> None:
    cli.small()
    (path,) = cli.folder.rglob("result.json")
    foreign = path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    for content, message in (("{", "result.json is damaged"), (foreign, "written by schema version 99")):
        path.write_text(content)
        shown = cli.experiments("show", path.parent.name)
        assert (shown.returncode, path.read_text()) == (2, content)
        assert message in shown.stderr
    again = cli.small()
    assert (again.returncode, path.read_text()) == (2, foreign)
    assert f"{path}: written by schema version 99" in again.stderr


def test_sweep_names_come_from_the_overrides_that_matter() -> None:
    assert sweep.sweep_name(["format=mxfp4,nvfp4", "transform=h", "progress=bars"]) == "format-mxfp4+nvfp4_transform-h"
    assert sweep.sweep_name(["tracking=wandb", "hydra/launcher=local"]) == "default"
    assert sweep.sweep_name(["calibration.batch_size=1,2", "calibration.seed=1"]) == "calibration.seed-1"
    long = [sweep.sweep_name([f"seed={','.join(map(str, range(n)))}"]) for n in (200, 201)]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 80


def test_mr_gptq_in_a_format_that_it_is_not_for_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"^algorithm=mr_gptq: is for mxfp4 and nvfp4, not for format=int4; use"):
        sweep.plan([composed("algorithm=mr_gptq", f"format={name}") for name in ("mxfp4", "int4")], [])
    made = sweep.plan([composed("algorithm=mr_gptq", f"format={n}") for n in ("mxfp4", "nvfp4", "original")], [])
    assert len(made.trials) == 3
