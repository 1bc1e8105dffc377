"""What a sweep would cost: measured numbers come back, nearer ones first, and the unknown stays unknown."""

import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import estimates, sweep
from experiments.attempts import Attempts
from experiments.environment import device_name
from experiments.estimates import Estimate, linears_of, named_parameters
from experiments.records import Block, Layer, Record, Stage
from experiments.store import ResultStore
from experiments.sweep import Sweep
from experiments.tracking import NoTracking
from experiments.trial import Trial, TrialRunner
from experiments.views import plan
from tests.experiments.conftest import composed
from wush.progress import Silent

HERE = device_name("cpu")


def planned(root: Path, *lists: Sequence[str]) -> Sweep:
    return sweep.plan([composed(f"results={root}", *overrides) for overrides in lists], ["s"])


def trial(root: Path, *overrides: str) -> Trial:
    return planned(root, overrides).trials[0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A real trial of a tiny model: MXFP4, WUSH and RTN."""
    own = planned(tmp_path_factory.mktemp("measured"), ["calibration.windows=4"])
    record = TrialRunner(own.store, own.name, NoTracking(), Silent()).run(own.trials[0])
    assert isinstance(record, Record)
    return record


class Measured:
    """A store of records made from a real one."""

    def __init__(self, root: Path, record: Record) -> None:
        self.store, self._record = ResultStore(root), record

    def add(
        self,
        own: Trial,
        seconds: float,
        memory: int = 1000,
        device: str = HERE,
        calibration_tokens: int = 64,
        blocks: list[Block] | None = None,
    ) -> None:
        """A finished trial whose every stage took so long."""
        stages = {
            name: Stage(seconds=seconds, peak_memory_bytes=memory, peak_gpu_memory_bytes=None)
            for name in self._record.stages
        }
        evaluation = own.config["evaluation"]
        tokens = {
            "calibration": calibration_tokens,
            "evaluation": evaluation["windows"] * evaluation["window_length"],
        }
        data = {text: self._record.data[text].model_copy(update={"tokens": count}) for text, count in tokens.items()}
        update = {"trial_id": own.trial_id, "choices": own.choices, "config": own.config, "stages": stages}
        update |= {"data": data, "environment": self._record.environment | {"device": device}}
        update |= {} if blocks is None else {"blocks": blocks}
        self.store.begin(own.trial_id, "")
        self.store.finish(self._record.model_copy(update=update))

    def estimate(self, own: Trial, device: str = HERE) -> Estimate:
        return estimates.estimates(self.store, estimates.read(self.store), device).of(own)


@pytest.fixture
def store(tmp_path: Path, measured: Record) -> Measured:
    return Measured(tmp_path, measured)


def test_a_setting_measured_once_is_estimated_as_it_was_measured(measured: Record, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.begin(measured.trial_id, "")
    store.finish(measured)
    other_seed = trial(tmp_path, "calibration.windows=4", "seed=1")
    assert other_seed.trial_id != measured.trial_id
    found = estimates.estimates(store, estimates.read(store), HERE).of(other_seed)
    assert found.stages == measured.stages
    assert found.seconds == sum(stage.seconds for stage in measured.stages.values())
    assert found.memory == max(stage.peak_memory_bytes or 0 for stage in measured.stages.values())
    assert found.gpu_memory is None
    assert found.basis == "1 trial of this setting"


def test_seconds_are_the_mean_and_memory_the_most_of_the_trials(store: Measured, tmp_path: Path) -> None:
    store.add(trial(tmp_path, "seed=1"), 2.0, memory=5000)
    store.add(trial(tmp_path, "seed=2"), 4.0, memory=3000)
    found = store.estimate(trial(tmp_path))
    assert found.seconds == pytest.approx(3.0 * len(found.stages))
    assert found.memory == 5000
    assert found.basis == "2 trials of this setting"


def test_the_nearest_trials_come_first(store: Measured, tmp_path: Path) -> None:
    """Farther ones first, so that each that is added is nearer than those before."""
    own = trial(tmp_path)
    nearer = [
        (("model=tiny_qwen3", "model.hidden_size=128"), "scaled from tiny_qwen3: 0.375 times the size, 1 trial"),
        (("format=int4", "transform=h"), "1 trial of this model with other transforms and formats"),
        (("transform=h",), "1 trial of this model with other transforms"),
        (("evaluation.windows=4",), "1 trial of this model, scaled by tokens"),
        (("seed=1",), "1 trial of this setting"),
    ]
    assert store.estimate(own).stages == {}
    for overrides, basis in nearer:
        store.add(trial(tmp_path, *overrides), 1.0)
        assert store.estimate(own).basis == basis


def test_another_algorithm_or_device_says_nothing(store: Measured, tmp_path: Path) -> None:
    store.add(trial(tmp_path), 1.0)
    gptq = store.estimate(trial(tmp_path, "algorithm=gptq"))
    assert (gptq.seconds, gptq.memory) == (None, None)
    assert gptq.basis == f"no Gptq trial was measured on {HERE}"
    elsewhere = store.estimate(trial(tmp_path, "seed=1"), device="NVIDIA H100")
    assert (elsewhere.seconds, elsewhere.memory) == (None, None)
    assert elsewhere.basis == f"no Rtn trial was measured on NVIDIA H100, only on {HERE}"
    assert store.estimate(trial(tmp_path, "format=original")).basis.startswith("no unquantized trial was measured")


def test_stages_are_scaled_by_the_tokens_of_their_text(store: Measured, tmp_path: Path) -> None:
    store.add(trial(tmp_path), 1.0)
    found = store.estimate(trial(tmp_path, "calibration.windows=6", "evaluation.window_length=16"))
    seconds = {name: stage.seconds for name, stage in found.stages.items()}
    assert seconds == {"load": 1.0, "original": 0.5, "quantize": 3.0, "measure": 1.0, "evaluate": 0.5}
    assert found.memory == 1000


def test_all_windows_of_a_text_are_as_many_as_once_measured(store: Measured, tmp_path: Path) -> None:
    own = trial(tmp_path, "calibration.windows=null", "seed=1")
    store.add(trial(tmp_path), 1.0)
    assert store.estimate(own).seconds is None
    store.add(trial(tmp_path, "calibration.windows=null", "algorithm=gptq"), 1.0, calibration_tokens=640)
    assert store.estimate(own).stages["quantize"].seconds == pytest.approx(640 / 64)


def test_another_model_is_scaled_by_size_and_memory_never_down(store: Measured, tmp_path: Path) -> None:
    store.add(trial(tmp_path), 1.0)
    larger = store.estimate(trial(tmp_path, "model.layers=6"))
    assert {stage.seconds for stage in larger.stages.values()} == {3.0}
    assert larger.memory == 3000
    assert larger.basis == "scaled from tiny_llama: 3 times the size, 1 trial; memory at most"
    smaller = store.estimate(trial(tmp_path, "model.layers=1"))
    assert {stage.seconds for stage in smaller.stages.values()} == {0.5}
    assert smaller.memory == 1000


def test_a_model_of_another_order_of_size_says_nothing(store: Measured, tmp_path: Path) -> None:
    store.add(trial(tmp_path), 1.0)
    found = store.estimate(trial(tmp_path, "model.layers=202"))
    assert found.seconds is None
    assert found.basis.startswith("nothing known of this model's size")


def test_weights_are_counted_as_a_record_has_them(measured: Record) -> None:
    counted = sum(layer.weights for block in measured.blocks for layer in block.layers)
    assert linears_of(measured.config["model"]) == counted


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("gpt2", None),
    ],
)
def test_a_name_tells_the_parameters(path: str, parameters: float | None) -> None:
    assert named_parameters({"_target_": "wush.models.load_pretrained", "path": path}) == parameters


def test_models_from_the_hub_are_scaled_by_their_names(store: Measured, tmp_path: Path) -> None:
    store.add(trial(tmp_path, "model=llama3_2_1b_instruct"), 1.0, blocks=[])
    found = store.estimate(trial(tmp_path, "model=llama3_1_8b_instruct"))
    assert found.basis == "scaled from llama3_2_1b_instruct: 8 times the size, 1 trial; memory at most"
    assert {stage.seconds for stage in found.stages.values()} == {8.0}


def test_a_local_model_is_sized_by_its_config_and_a_measured_one_by_its_record(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 2, **sizes}))
    node = {"_target_": "wush.models.load_pretrained", "path": str(tmp_path)}
    assert linears_of(node) == 2 * 64 * (2 * 64 + 2 * 32 + 3 * 128)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes}))
    assert linears_of(node) is None


def test_a_model_of_unknown_size_is_counted_in_a_record(store: Measured, tmp_path: Path) -> None:
    weights = linears_of(trial(tmp_path).config["model"])
    assert weights
    layer = Layer(name="q_proj", shared_input=[], bits_per_weight=4.25, weights=2 * weights)
    block = Block(index=0, name="0", seconds=1.0, layers=[layer])
    own = trial(tmp_path, "model=smollm2_135m")
    store.add(own, 1.0, blocks=[block])
    assert store.estimate(trial(tmp_path)).basis == "scaled from smollm2_135m: 0.5 times the size, 1 trial"


def shown(own: Sweep, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    plan.show(own, **options)
    return capsys.readouterr().out


def test_a_plan_tells_done_running_and_to_run_with_totals(
    store: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = planned(tmp_path, *([f"seed={seed}"] for seed in range(4)), ["algorithm=gptq"])
    store.add(own.trials[0], 12.0, memory=3 * 2**30)
    Attempts(own.store, own.trials[1].trial_id).claim("other")
    text = shown(own, capsys, workers=2, launcher="local_parallel")
    assert re.search(r"rtn +0 +0? *done +1 min 00 s +3\.0 GiB *$", text, re.MULTILINE)
    assert len(re.findall(r"running on \S+ +~1 min 00 s +~3\.0 GiB", text)) == 1
    assert len(re.findall(r"to run +~1 min 00 s +~3\.0 GiB +\[1\]", text)) == 2
    assert len(re.findall(r"to run +\? +\? +\[2\]", text)) == 1
    assert "5 trials: 1 done already, 3 to run, 1 running elsewhere\n" in text
    assert "time: at least 2 min 00 s one after the other" in text
    assert "at least 1 min 00 s with 2 at once (local_parallel), if none slows another; 1 of them unknown" in text
    assert "largest trial: at least 3.0 GiB of memory\n" in text
    assert "[1] 1 trial of this setting\n" in text
    assert "[2] no Gptq trial was measured on" in text


def test_a_plan_for_other_machines_takes_their_newest_device(
    store: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.add(trial(tmp_path, "seed=1"), 1.0)
    store.add(trial(tmp_path, "seed=2"), 12.0, device="NVIDIA H100")
    text = shown(planned(tmp_path, []), capsys, elsewhere="gpu", launcher="slurm")
    assert "time: about 1 min 00 s one after the other" in text
    assert "estimated from the store's trials on NVIDIA H100" in text


def test_a_plan_changes_no_file(measured: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = planned(tmp_path, [])
    own.store.begin(own.trials[0].trial_id, "")
    path = own.store.trial(own.trials[0].trial_id) / "result.json"
    path.write_text("{")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "1 to run" in shown(own, capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_trials_go_to_the_worker_that_is_free_first() -> None:
    assert plan.spread([5.0, 1.0, 1.0, 1.0], 2) == 5.0
    assert plan.spread([1.0, 1.0, 1.0], 8) == 1.0


def test_a_big_sweep_is_planned_at_once_and_shown_in_part(
    measured: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trial(tmp_path, "calibration.windows=4")
    trials = tuple(Trial(f"{i:016x}", one.config, one.choices, one.labels, one.identity) for i in range(10_000))
    text = measured.model_dump_json(indent=2)
    for own in trials[:9_990]:
        folder = tmp_path / "trials" / own.trial_id
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(text.replace(measured.trial_id, own.trial_id))
    started = time.process_time()
    shown_text = shown(Sweep("big", trials, ResultStore(tmp_path), "none"), capsys)
    assert time.process_time() - started < 4.0  # of two threads
    assert "40 of 10,000 trials" in shown_text
    assert "10,000 trials: 9,990 done already, 10 to run" in shown_text
    assert len(re.findall("to run  ", shown_text)) == 10


def test_a_plan_fits_a_terminal(measured: Record, tmp_path: Path) -> None:
    own = planned(tmp_path, ["transform=h"], ["transform=wush", "format=nvfp4"])
    costs = estimates.read(own.store)
    rows = plan.stand(own, costs, estimates.estimates(own.store, costs, HERE))
    console = Console(width=100, file=io.StringIO())
    console.print(plan.to_table("s", rows, rows, [rows[0].cost.basis]))
    assert isinstance(console.file, io.StringIO)
    assert max(map(len, console.file.getvalue().splitlines())) <= 100
