"""What makes a trial the same trial."""

import os
from pathlib import Path
from typing import Any

import pytest

from experiments.identity import Identities, model_identity, trial_id
from tests.experiments.conftest import composed, config
from wush.texts import EmbeddedText
from wush.version import METHOD_VERSION


@pytest.mark.parametrize(
    "override",
    [
        *("tracking=wandb", "device=auto", "progress=lines", "results=elsewhere", "sweep=mine", "keep_blocks=true"),
        *("kernels=torch", "keep_operands=false"),
        *("calibration.batch_size=1", "evaluation.batch_size=8"),
    ],
)
def test_how_and_where_a_trial_runs_is_no_part_of_its_id(override: str) -> None:
    assert trial_id(config(override)) == trial_id(config())


@pytest.mark.parametrize(
    "override",
    ["seed=1", "format=nvfp4", "transform=h", "algorithm=gptq", "evaluation.windows=3", "model.seed=1"],
)
def test_whatever_can_change_the_result_changes_the_id(override: str) -> None:
    assert trial_id(config(override)) != trial_id(config())


def test_the_top_seed_counts_only_where_another_key_takes_it() -> None:
    fixed = "calibration.seed=0"
    assert trial_id(config(fixed, "seed=1")) == trial_id(config(fixed, "seed=2"))
    assert trial_id(config(fixed, "transform=r", "seed=1")) != trial_id(config(fixed, "transform=r", "seed=2"))


def test_the_id_does_not_depend_on_the_order_of_keys() -> None:
    whole = config()
    assert trial_id(dict(reversed(whole.items()))) == trial_id(whole)


def test_baselines_differ_only_in_what_they_use() -> None:
    base = trial_id(config("format=original"))
    others = ("transform=h", "algorithm=gptq", "seed=3", "calibration.windows=9", "quantize.blocks=[0]")
    assert base == trial_id(config("format=original", *others))
    assert base != trial_id(config("format=original", "evaluation.windows=3"))


def test_a_text_counts_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    ids = []
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
        ids.append(trial_id(config("evaluation=text", f"evaluation.path={tmp_path / name}")))
    assert ids[0] == ids[1] != ids[2]


def test_a_local_model_counts_by_its_content_and_not_by_its_path_or_times(tmp_path: Path) -> None:
    ids = []
    for name, weights, time in (("a", b"12", 1), ("b", b"12", 2), ("c", b"34", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        os.utime(folder / "model.safetensors", ns=(time, time))
        (folder / "notes.md").write_text(name)
        (folder / "tokenizer.json").symlink_to("nowhere")
        ids.append(trial_id(config("model=local", f"model.path={folder}")))
    assert ids[0] == ids[1] != ids[2]


def test_a_models_files_are_read_once_while_they_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12")
    node = config("model=local", f"model.path={tmp_path}")["model"]
    before = model_identity(node)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert model_identity(node) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("evaluation.windows=null", "read a whole stream"),
        ("evaluation.read=joined evaluation.cut=each", "for documents"),
    ],
)
def test_windows_that_cannot_be_are_refused_and_others_of_the_text_are_not(wrong: str, message: str) -> None:
    identities = Identities()
    with pytest.raises(ValueError, match=message):
        identities.identity(config("evaluation=c4", *wrong.split()))
    assert identities.identity(config("evaluation=c4"))["evaluation"]["cut"] == "packed"


@pytest.mark.parametrize("key", ["calibration.bos=every", "calibration.part=code"])
def test_what_changes_windows_changes_the_trial(key: str) -> None:
    assert trial_id(config(key)) != trial_id(config())


def test_configs_that_share_a_text_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    text = EmbeddedText.text
    monkeypatch.setattr(EmbeddedText, "text", lambda self: calls.append(self.part) or text(self))
    identities = Identities()
    configs = [config(f"seed={seed}", f"calibration.batch_size={1 + seed}") for seed in range(3)]
    parts = [identities.identity(one) for one in configs]
    assert sorted(calls) == ["calibration", "evaluation"]
    assert len({one["calibration"]["sha256"] for one in parts}) == 1
    assert [one["calibration"]["seed"] for one in parts] == [0, 1, 2]


def suite(*overrides: str) -> dict[str, Any]:
    """A config that evaluates tasks."""
    return composed("evaluation=lm_eval", *overrides, small=("model=tiny_llama",)).config


def test_what_is_written_otherwise_and_means_the_same_is_one_trial() -> None:
    tasks = "evaluation.tasks=[embedded_arithmetic]"
    same = [
        ("quantize.blocks=[1,0]", "quantize.blocks=[0,1,1]"),
        ("quantize.exclude=[a,b]", "quantize.exclude=[b,a,b]"),
        ("transform.refit=true", "transform.refit=false"),
        ("transform.power=1", "transform.power=1.0"),
        ("transform.power=0", "transform.power=0.0"),
    ]
    for one, other in same:
        assert trial_id(config(one)) == trial_id(config(other)), one
    buffers = ("calibration.buffer=1000", "calibration.buffer=500")
    shuffled, streamed = (
        [trial_id(config(f"calibration={name}", one)) for one in buffers] for name in ("c4", "fineweb_edu")
    )
    assert len(set(shuffled)) == 1 < len(set(streamed))
    of_tasks = [
        (tasks,),
        ("evaluation.tasks=[{task: embedded_arithmetic}]",),
        ("evaluation.tasks=[{task: embedded_arithmetic, metric: null, only: [], fewshot_as_multiturn: false}]",),
        ("evaluation.tasks=[{task: embedded_arithmetic, chat_template: false}]",),
        (tasks, "evaluation.allow_code_execution=true"),
        (tasks, "evaluation.generation={}"),
    ]
    assert len({trial_id(suite(*one)) for one in of_tasks}) == 1


def test_what_a_suite_says_counts_as_what_its_tasks_say() -> None:
    def of(task: str, *others: str) -> str:
        return trial_id(suite(f"evaluation.tasks=[{task}]", *others))

    assert of("{task: a, limit: 5}") == of("a", "evaluation.limit=5")
    assert of("{task: a, generation: {temperature: 1.0}}") == of("a", "+evaluation.generation.temperature=1")
    assert of("{task: a, limit: 5}", "evaluation.limit=9") == of("a", "evaluation.limit=5")
    assert of("a", "evaluation.limit=5") != of("a")
    assert of("{task: a, only: [qwen3, llama]}") == of("{task: a, only: [llama, qwen3, llama]}") != of("a")
    assert of("a,b") == of("b,a") != of("a")


def test_permission_to_run_code_counts_only_where_it_adds_a_task() -> None:
    allowed = "evaluation.allow_code_execution=true"
    plain, with_code = "[a]", "[a, {task: b, only_with_code_execution: true}]"
    found = [
        trial_id(suite(f"evaluation.tasks={tasks}", *extra))
        for tasks, extra in ((plain, ()), (plain, (allowed,)), (with_code, ()), (with_code, (allowed,)))
    ]
    assert found[0] == found[1] == found[2] != found[3]


def test_the_seed_of_all_windows_of_a_text_chooses_none() -> None:
    every = "calibration.windows=null"
    assert trial_id(config(every, "seed=1")) == trial_id(config(every, "seed=2")) != trial_id(config("seed=2"))


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "modeling_mine.py", "parts/rope.py"),
        *("qwen.tiktoken", "generation_config.json", "vocab.bpe", "spiece.model", "merges.txt"),
    ],
)
def test_every_file_that_loading_a_model_may_read_is_part_of_its_content(name: str, tmp_path: Path) -> None:
    node = config("model=local", f"model.path={tmp_path}")["model"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    found = []
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        found.append(trial_id(config("model=local", f"model.path={tmp_path}")))
    assert found[0] != found[1]
    assert name in model_identity(node)["files"]


def test_a_local_model_has_no_revision_and_no_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12")
    monkeypatch.chdir(tmp_path)
    ids = {
        trial_id(config("model=local", *one))
        for one in (
            (f"model.path={tmp_path / 'model'}",),
            ("model.path=model",),
            ("model.path=./model/",),
            ("model.path=model", "model.revision=main"),
        )
    }
    assert len(ids) == 1


def test_another_version_of_the_method_makes_other_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    before = trial_id(config())
    monkeypatch.setattr("experiments.identity.METHOD_VERSION", METHOD_VERSION + 1)
    assert trial_id(config()) != before


def test_only_gptq_refits() -> None:
    for algorithm, count in (("rtn", 1), ("mr_gptq", 1), ("gptq", 2)):
        refits = {trial_id(config(f"algorithm={algorithm}", f"transform.refit={r}")) for r in ("true", "false")}
        assert len(refits) == count, algorithm
