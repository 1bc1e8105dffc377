"""What the paper's experiments cost: blocks are measured for real, and hours follow from them."""

import pytest

from experiments.benchmarks import cost, hours
from experiments.benchmarks.cost import Costs, Quantizing

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def costs() -> Costs:
    return cost.measure(SHAPE, blocks=2, windows=(4, 8), window=16, new_tokens=4, device="cpu")


def test_every_algorithm_and_transform_is_measured(costs: Costs) -> None:
    assert {(one.algorithm, one.transform) for one in costs.quantizing} == {
        (algorithm, transform) for algorithm in cost.ALGORITHMS for transform in cost.TRANSFORMS
    }
    assert all(seconds > 0 for one in costs.quantizing for seconds in one.seconds.values())
    assert costs.forward > 0


def test_the_record_is_read_back_as_it_was(costs: Costs) -> None:
    assert Costs.model_validate_json(costs.model_dump_json()) == costs


def test_seconds_grow_along_the_measured_line() -> None:
    one = Quantizing(algorithm="rtn", transform="h", seconds={100: 1.0, 300: 2.0}, peak_gpu_memory_bytes=None)
    assert one.of(500) == pytest.approx(3.0)


def fixed(**changes: float) -> Costs:
    quantizing = [
        Quantizing(algorithm=a, transform=t, seconds={10: 3.6, 20: 3.6}, peak_gpu_memory_bytes=None)
        for a in cost.ALGORITHMS
        for t in cost.TRANSFORMS
    ]
    known = {"forward": 0.0, "decode": 0.0, **changes}
    return Costs(
        device="x", host="x", measured_at="2026-01-01T00:00:00Z", git_commit=None, versions={}, shape=cost.SHAPE,
        blocks=1, quantizing=quantizing, sequences=1, **known,
    )  # fmt: skip


def test_the_readmes_hours_are_those_of_the_committed_costs() -> None:
    (path,) = (hours.README.parent / "benchmarks" / "results").glob("*h100*.json")
    text = hours.README.read_text(encoding="utf-8")
    assert hours.rewritten(text, Costs.model_validate_json(path.read_bytes())) == text, (
        f"run python -m experiments.benchmarks.hours {path}"
    )
    with pytest.raises(ValueError, match=r"^no <!-- hours"):
        hours.rewritten("no marks", fixed())


def test_a_trial_takes_its_blocks_times_what_one_took() -> None:
    (trial,) = (t for t in hours.trials_of("table6", "paper") if t.choices["model"] == "llama3_1_8b_instruct")
    assert hours.hours(trial, fixed()) == pytest.approx(32 * 3.6 / 3600)


def test_one_block_of_a_model_takes_its_share() -> None:
    trial = hours.trials_of("table1", "paper")[0]
    ratio = hours.SHAPES["qwen3_8b"].weights / 36 / (hours.SHAPES["llama3_1_8b_instruct"].weights / 32)
    assert hours.hours(trial, fixed()) == pytest.approx(ratio * 3.6 / 3600)


def test_a_baseline_takes_its_evaluation_alone() -> None:
    baseline = next(t for t in hours.trials_of("table2", "paper") if t.choices["format"] == "original")
    assert hours.hours(baseline, fixed()) == 0
    assert hours.hours(baseline, fixed(decode=1e-6)) > 0


def test_every_experiment_has_a_row() -> None:
    lines = hours.table(fixed(), hours.ITEMS).splitlines()
    assert len(lines) == 2 + len(hours.ITEMS)
