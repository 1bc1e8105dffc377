"""How long the paper's experiments are going to take on GPUs: `python -m experiments.benchmarks.hours COSTS`.

From `cost`'s record: seconds of a decoder block, scaled by the weights of a model's linears. What is not measured is
listed here: the shapes of the paper's models, and about how many tokens its evaluations read and write.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.app import CONF
from experiments.benchmarks.cost import Costs
from experiments.estimates import linears
from experiments.identity import is_baseline, text_of
from experiments.launch import grid
from experiments.store import write_atomically
from experiments.trial import Trial

README = CONF.parent / "experiments" / "README.md"
BEGIN, END = "<!-- hours: made by python -m experiments.benchmarks.hours -->", "<!-- /hours -->"


@dataclass(frozen=True)
class Shape:
    """What a model's linears are counted by."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head_width: int = 128

    @property
    def weights(self) -> int:
        """Of the linears in all decoder blocks."""
        return linears(self.hidden, self.inner, self.blocks, self.heads, self.kv_heads, self.head_width)


SHAPES = {
    "llama3_2_3b_instruct": Shape(3072, 8192, 28, 24, 8),
    "llama3_1_8b_instruct": Shape(4096, 14336, 32, 32, 8),
    "qwen3_8b": Shape(4096, 12288, 36, 32, 8),
    "qwen3_14b": Shape(5120, 17408, 40, 40, 8),
    "qwen3_32b": Shape(5120, 25600, 64, 64, 8),
}


@dataclass(frozen=True)
class Tokens:
    """About how many tokens an evaluation reads and writes in one run."""

    read: float
    written: float


# Documents times the usual length of a request, rounded: WinoGrande 1,267 x 2 x 180, HellaSwag 10,042 x 4 x 1,200,
# GSM8K 1,319 x 1,200 and 150 written, MMLU-CoT 14,042 x 250 and 250 written, MMLU 14,042 x 700.
OPENLLM = {"llama": Tokens(54e6, 3.7e6), "qwen3": Tokens(60e6, 0.4e6)}
PLATINUM = Tokens(2500 * 300, 2500 * 300)  # 13 sets with about 2,500 questions together
WIKITEXT2 = 300_000  # tokens of the test split
ITEMS = {
    "table1": "Table 1",
    "table2": "Table 2",
    "table3": "Table 3",
    "table4": "Table 4",
    "table5": "Table 5",
    "table6": "Table 6",
    "table7": "Table 7",
    "figure3": "Figures 3 and 7–10",
    "layers": "beyond the paper: `pareto`, `heatmap`, `bound`",
}


def hours(trial: Trial, costs: Costs) -> float:
    """Hours of one GPU like the measured one: quantizing, the original's states, the text and the tasks."""
    own = SHAPES[trial.choices["model"]]
    # Blocks like those measured, by their weights.
    size = own.weights / (linears(*_measured_shape(costs)) or 1)
    seconds = 0.0
    if not is_baseline(trial.config):
        chosen = trial.config["quantize"]["blocks"]
        share = len(chosen) / own.blocks if chosen else 1.0
        seconds += size * share * _quantizing(trial, costs)
        if chosen:  # the blocks before are run to get there
            text = trial.config["calibration"]
            seconds += size * costs.forward * text["windows"] * text["window_length"]
    seconds += 2 * size * costs.forward * _text_tokens(trial.config["evaluation"])
    tasks = _task_tokens(trial)
    seconds += size * (costs.forward * tasks.read + costs.decode * tasks.written / costs.sequences)
    return seconds / 3600


def _measured_shape(costs: Costs) -> tuple[int, int, int, int, int, int]:
    shape = costs.shape
    return (
        *(shape["hidden_size"], shape["intermediate_size"], 1),
        *(shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]),
    )


def _quantizing(trial: Trial, costs: Costs) -> float:
    """Seconds a block; a transform that was not measured takes as long as WUSH if it is fitted, else as Hadamard.

    MR-GPTQ takes as long as GPTQ, which calibration makes up most of.
    """
    transform = "h" if trial.choices["transform"] in ("i", "r", "h") else "wush"
    algorithm = trial.choices["algorithm"].removeprefix("mr_")
    (measured,) = [one for one in costs.quantizing if (one.algorithm, one.transform) == (algorithm, transform)]
    text = trial.config["calibration"]
    return measured.of(text["windows"] * text["window_length"])


def _text_tokens(evaluation: dict[str, Any]) -> float:
    text = text_of(evaluation)
    return WIKITEXT2 if text["windows"] is None else text["windows"] * text["window_length"]


def _task_tokens(trial: Trial) -> Tokens:
    evaluation = trial.config["evaluation"]
    if trial.choices["evaluation"] == "openllm":
        return OPENLLM["llama" if trial.choices["model"].startswith("llama") else "qwen3"]
    if trial.choices["evaluation"] == "platinum":
        runs = len(evaluation["seeds"])
        return Tokens(runs * PLATINUM.read, runs * PLATINUM.written)
    return Tokens(0, 0)


def trials_of(experiment: str, scale: str) -> tuple[Trial, ...]:
    """The different trials of an experiment."""
    overrides = [f"experiment={experiment}", f"scale={scale}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = compose("config", overrides=overrides, return_hydra_config=True)
        lists = grid.combinations(overrides, loader, grid.grids_of(master))
        return grid.planned(loader, master, lists, overrides).trials


def table(costs: Costs, experiments: Iterable[str]) -> str:
    """A row for each experiment, in Markdown."""
    lines = ["| item | models | trials | GPU hours | small scale | command |", "|---|---|---:|---:|---:|---|"]
    for name in experiments:
        trials = trials_of(name, "paper")
        models = ", ".join(dict.fromkeys(f"`{trial.choices['model']}`" for trial in trials))
        total = sum(hours(trial, costs) for trial in trials)
        small = len(trials_of(name, "small"))
        command = f"`python run.py -m experiment={name} hydra/launcher=slurm`"
        shown = "under 0.1" if total < 0.1 else f"{total:,.1f}" if total < 10 else f"{total:,.0f}"
        lines.append(f"| {ITEMS[name]} | {models} | {len(trials)} | {shown} | {small} trials | {command} |")
    return "\n".join(lines)


def rewritten(text: str, costs: Costs) -> str:
    """The text with the table between its marks made anew; raises `ValueError` for one without marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table(costs, ITEMS)}\n\n{END}{after}"


def main() -> int:
    """Write the table into experiments/README.md, between its marks."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.hours", description=__doc__)
    parser.add_argument("costs", type=Path, metavar="COSTS", help="a record of experiments.benchmarks.cost")
    arguments = parser.parse_args()
    costs = Costs.model_validate(json.loads(arguments.costs.read_bytes()))
    try:
        write_atomically(README, rewritten(README.read_text(encoding="utf-8"), costs))
    except ValueError as error:
        parser.error(f"{README}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
