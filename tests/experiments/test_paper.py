"""The paper's experiments: each is a sweep that one line starts, at the paper's scale and at a small one."""

import functools
from collections import defaultdict
from pathlib import Path

import pytest

from experiments.benchmarks import hours
from experiments.benchmarks.hours import ITEMS, SHAPES
from experiments.identity import text_of
from tests.experiments.conftest import ROOT, Cli

trials_of = functools.cache(hours.trials_of)
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


@pytest.mark.parametrize(("scale", "blocks"), [("paper", (17, 18)), ("small", (14, 15))])
def test_table_1_has_ten_rotations_and_one_of_every_other_transform_of_each_block(
    scale: str, blocks: tuple[int, int]
) -> None:
    trials = trials_of("table1", scale)
    cells = [
        (trial.choices["format"], *trial.config["quantize"]["blocks"], trial.choices["transform"]) for trial in trials
    ]
    per_cell = ["h", "i", *["r"] * 10, "wus", "wush"]
    expected = [(fmt, block, t) for fmt in ("mxfp4", "nvfp4", "int4") for block in blocks for t in per_cell]
    assert sorted(cells) == sorted(expected)


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_table_1_is_the_loss_on_the_calibration_tokens_with_a_rotation_of_every_tile(scale: str) -> None:
    trials = trials_of("table1", scale)
    assert {trial.config["measure"]["layer_loss"] for trial in trials} == {"calibration"}
    assert {trial.config["calibration"]["seed"] for trial in trials} == {0}
    assert all(trial.config["transform"]["per_tile"] for trial in trials if trial.choices["transform"] == "r")


def test_a_baseline_is_one_trial_of_an_experiment_unless_its_answers_are_sampled() -> None:
    def baselines(name: str) -> int:
        return [trial.choices["format"] for trial in trials_of(name, "paper")].count("original")

    assert (baselines("table2"), baselines("table3"), baselines("figure3")) == (1, 4, 5 * 5)


METHODS = {
    "table2": {
        *[("i", "rtn"), ("h", "rtn"), ("sq", "rtn"), ("wush", "rtn"), ("h", "mr_gptq")],
        *[("i", "gptq"), ("h", "gptq"), ("wush", "gptq")],
    },
    "table4": {("h", "gptq"), ("wush", "gptq"), ("wush", "rtn")},
    "table5": {("wush", "rtn"), ("wush", "gptq")},
}


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("name", METHODS)
def test_every_row_of_a_table_is_run_in_its_formats(name: str, scale: str) -> None:
    formats = {"mxfp4"} if name == "table5" else {"mxfp4", "nvfp4"}
    found = {
        tuple(trial.choices[group] for group in ("format", "transform", "algorithm"))
        for trial in trials_of(name, scale)
        if "transform" in trial.choices
    }
    assert found == {(fmt, *method) for fmt in formats for method in METHODS[name]}


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5", "figure3"])
def test_results_of_several_seeds_vary_all_that_is_random_and_keep_what_is_evaluated(name: str, scale: str) -> None:
    trials = [trial for trial in trials_of(name, scale) if "transform" in trial.choices]
    seeds = defaultdict(set)
    for trial in trials:
        own = trial.config
        assert own["calibration"]["seed"] == own["seed"]
        if "platinum" in trial.choices["evaluation"]:
            assert own["evaluation"]["seeds"] == [own["seed"]]
        groups = ("model", "format", "transform", "algorithm", "calibration", "evaluation")
        seeds[tuple(trial.choices[group] for group in groups)].add(own["seed"])
    sampled = {key: found for key, found in seeds.items() if "platinum" in key[-1]}
    assert all(found == set(range(5 if scale == "paper" else 3)) for found in sampled.values())
    # Rounded to nearest without a fitted transform, nothing reads the calibration text.
    fixed = {key: found for key, found in seeds.items() if key[2] in ("i", "h") and key[3] == "rtn"}
    assert all(found == {0} for key, found in fixed.items() if key not in sampled)
    assert all(found == {0, 1, 2} for key, found in seeds.items() if key not in {**sampled, **fixed})
    evaluated = {repr(text_of(trial.identity["evaluation"])) for trial in trials}
    assert len(evaluated) == 1


def test_the_papers_kl_is_of_c4_and_its_mmlu_for_qwen3_of_no_example_and_no_template() -> None:
    assert {trial.choices["evaluation"] for trial in trials_of("table4", "paper")} == {"c4"}
    (trial, *_) = trials_of("table3", "paper")
    (mmlu,) = [task for task in trial.config["evaluation"]["tasks"] if task["task"] == "mmlu"]
    assert (mmlu["num_fewshot"], mmlu["chat_template"], mmlu["only"]) == (0, False, ["qwen3"])


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5", "figure3"])
def test_accuracy_at_the_papers_scale_is_of_emulated_products(name: str) -> None:
    assert {trial.config["kernels"] for trial in trials_of(name, "paper")} == {"torch"}


def test_table_3_at_small_scale_is_a_part_of_table_2() -> None:
    ids = [{trial.trial_id for trial in trials_of(name, "small")} for name in ("table3", "table2")]
    assert ids[0] < ids[1]


def test_the_command_line_goes_before_an_experiments_values(cli: Cli) -> None:
    done = cli.experiments("plan", "experiment=table4", "scale=small", "transform=wush")
    assert "12 trials" in done.stdout, done.stdout + done.stderr


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
