"""The paper's experiments: each is a sweep that one line starts, at the paper's scale and at a small one."""

from pathlib import Path

import pytest

from experiments.benchmarks.hours import ITEMS, SHAPES, trials_of
from tests.experiments.conftest import ROOT, Cli

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def test_every_experiment_is_an_item_of_the_paper_or_beyond() -> None:
    assert sorted(ITEMS) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_scale_is_of_the_papers_models_and_calibration(name: str) -> None:
    trials = trials_of(name, "paper")
    assert {trial.choices["model"] for trial in trials} <= set(SHAPES)
    quantized = [trial for trial in trials if "calibration" in trial.choices]
    assert {trial.config["calibration"]["window_length"] for trial in quantized} == {2048}
    if name not in ("table1", "table5", "table7"):
        assert {trial.config["calibration"]["windows"] for trial in quantized} == {1024}
        assert {trial.choices["calibration"] for trial in quantized} == {"fineweb_edu"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_small_scale_needs_no_network(name: str) -> None:
    trials = trials_of(name, "small")
    assert {trial.choices["model"] for trial in trials} == {"smollm2_135m"}
    assert "wush.hub" not in str([trial.config for trial in trials])


def test_table_1_has_ten_rotations_and_one_of_every_other_transform() -> None:
    trials = trials_of("table1", "paper")
    formats = {trial.choices["format"] for trial in trials}
    assert formats == {"mxfp4", "nvfp4", "int4"}
    per_format = [trial.choices["transform"] for trial in trials if trial.choices["format"] == "mxfp4"]
    assert sorted(per_format) == ["h", "i", *["r"] * 10, "wus", "wush"]
    assert {tuple(trial.config["quantize"]["blocks"]) for trial in trials} == {(18,)}


def test_a_baseline_is_one_trial_of_an_experiment() -> None:
    trials = trials_of("table2", "paper")
    assert [trial.choices["format"] for trial in trials].count("original") == 1
    assert len(trials) == 1 + 2 * 4 + 2 * 3


def test_the_command_line_goes_before_an_experiments_values(cli: Cli) -> None:
    done = cli.experiments("plan", "experiment=table4", "scale=small", "transform=wush")
    assert "4 trials" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=table1"], "experiment=table1 is a sweep: run it with -m"),
        (["-m", "scale=small"], "scale=small: it is an experiment's; choose one with experiment=..."),
        (["-m", "experiment=table1", "scale=tiny"], "experiment=table1 has no scale=tiny"),
        (["-m", "experiment=table7,table4"], "experiment: one sweep has one experiment; start one for each"),
        (["-m", "experiment=table8"], "experiment=table8: unknown option; experiment has: figure3,"),
        (["-m", "experiment=table1", "format=mxfp5"], "format=mxfp5: unknown option"),
    ],
)
def test_a_mistake_is_told_in_one_line(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli.run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"config error: {message}")


def test_sweeps_of_both_scales_have_names_of_their_own(cli: Cli, tmp_path: Path) -> None:
    small = ("model=tiny_llama", "calibration.windows=2", "calibration.window_length=32", "quantize.blocks=[0]")
    tiny = ("evaluation.windows=2", "evaluation.window_length=32", "format=mxfp4", "transform=h", "progress=none")
    done = cli.run("-m", "experiment=table1", "scale=small", *small, *tiny)
    assert done.returncode == 0, done.stderr
    (name,) = (path.name for path in (tmp_path / "results" / "sweeps").iterdir())
    assert name.startswith("experiment-table1_scale-small")
