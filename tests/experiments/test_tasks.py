"""Trials with tasks of the LM Evaluation Harness: each is kept as soon as it is done, shown, compared and tracked."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import sweep
from experiments.compare import compare
from experiments.identity import trial_id
from experiments.records import Failure, Outcome, Record, Result, Task
from experiments.schema import ConfigError
from experiments.store import ResultStore
from experiments.tracking import NoTracking
from experiments.trial import TrialRunner
from experiments.views.report import render_report
from experiments.views.summary import tabulate, to_markdown
from tests.experiments.conftest import SMALL, composed
from wush.intervals import of_documents
from wush.progress import Silent

ONE = [override for override in SMALL if not override.startswith("evaluation.")]
TEXT = ("evaluation.text.windows=2", "evaluation.text.window_length=32")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""


class Told(NoTracking):
    """A tracker that keeps the tasks it is told of."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def task(self, task: Task) -> None:
        self.tasks.append(task.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Definitions of the tasks `easy` and `late`, each with data of its own."""
    own = tmp_path / "definitions"
    own.mkdir()
    for name in ("easy", "late"):
        (own / f"{name}.yaml").write_text(TASK.format(name=name, data=own / f"{name}.json"))
        (own / f"{name}.json").write_text(questions(4))
    return own


def questions(count: int) -> str:
    """The data of a task."""
    rows = [{"question": f"{n} is", "choices": ["odd", "even"], "answer": n % 2} for n in range(count)]
    return "\n".join(map(json.dumps, rows))


def planned(root: Path, folder: Path, *overrides: str) -> sweep.Sweep:
    given = (f"results={root}", "evaluation=lm_eval", "evaluation.tasks=[easy,late]", f"evaluation.include={folder}")
    return sweep.plan([composed(*given, *TEXT, *overrides, small=ONE)], ["s"])


def run(own: sweep.Sweep, tracking: NoTracking | None = None) -> Record | Failure | Any:
    return TrialRunner(own.store, own.name, tracking or NoTracking(), Silent()).run(own.trials[0])


def test_a_task_that_is_done_is_kept_and_not_run_again_after_a_failure(tmp_path: Path, folder: Path) -> None:
    own = planned(tmp_path / "results", folder, "evaluation.tasks=[easy,{task: late, num_fewshot: 6}]")
    failed = run(own)
    assert isinstance(failed, Failure)
    assert "late: has 4 few-shot examples, and num_fewshot is 6" in failed.reason
    (kept,) = own.store.trial(own.trials[0].trial_id).glob("evaluations/task-easy.*.json")
    (run_of_easy,) = json.loads(kept.read_text())["values"]["task"]["runs"]
    (folder / "late.json").write_text(questions(9))
    tracking = Told()
    record = run(own, tracking)
    assert isinstance(record, Record)
    assert list(record.tasks) == tracking.tasks == ["easy", "late"]
    assert record.tasks["easy"].runs[0].seconds == run_of_easy["seconds"], "not run again"
    assert record.tasks["easy"].runs[0].outcomes == run_of_easy["outcomes"], "kept with each document's outcome"
    assert [len(task.runs[0].outcomes) for task in record.tasks.values()] == [4, 9]
    assert record.attempts == 2
    assert not list(own.store.trial(record.trial_id).glob("evaluations/*")), "in the record now"


def test_the_record_says_all_that_a_score_depends_on(tmp_path: Path, folder: Path) -> None:
    record = run(planned(tmp_path / "results", folder, "evaluation.limit=3"))
    assert isinstance(record, Record)
    task = record.tasks["easy"]
    assert (task.version, task.num_fewshot, task.samples, task.metric) == ("3", 0, 3, "acc,none")
    assert task.harness == record.versions["lm_eval"]
    assert task.stderr == task.runs[0].stderrs["acc,none"]
    assert 0 <= task.score <= 1
    assert {"task easy", "task late"} <= set(record.stages)
    assert record.metrics.predictions == 2 * 31, "perplexity and KL are measured all the same"


def test_a_task_that_is_not_there_is_told_before_the_model_loads(tmp_path: Path, folder: Path) -> None:
    failed = run(planned(tmp_path / "results", folder, "evaluation.tasks=[easi]"))
    assert isinstance(failed, Failure)
    assert "easi" in failed.reason
    assert "easy" in failed.reason
    (tmp_path / "broken").mkdir()  # a model that cannot load: it is not tried
    model = ("model=local", f"model.path={tmp_path / 'broken'}")
    assert "easi" in run(planned(tmp_path / "results", folder, "evaluation.tasks=[easi]", *model)).reason


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.seeds=[0,1,1]", "seeds=[0, 1, 1]: give at least one, each once"),
        (
            "evaluation.tasks=[{task: easy, num_shots: 2}]",
            "evaluation.tasks.0.num_shots: unknown key; evaluation.tasks.0 has: chat_template,",
        ),
        ("evaluation.tasks=[]", "evaluation.tasks=[]"),
        ("evaluation.include=/nowhere", "/nowhere"),
    ],
)
def test_what_the_config_shows_to_be_wrong_is_refused_when_it_is_planned(
    tmp_path: Path, folder: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(tmp_path / "results", folder, override)
    assert message in str(raised.value)


def test_what_can_change_a_score_is_part_of_a_trials_identity(tmp_path: Path, folder: Path) -> None:
    def identity(*overrides: str) -> str:
        return trial_id(planned(tmp_path / "results", folder, *overrides).trials[0].config)

    before = identity()
    assert identity("evaluation.text.batch_size=1") == before
    assert identity("evaluation.batch_size=3") != before, "answers that are sampled depend on it"
    assert identity("evaluation.limit=2") != before
    (folder / "easy.yaml").write_text((folder / "easy.yaml").read_text().replace("version: 3", "version: 4"))
    assert identity() != before


def with_tasks(record: Record, outcomes: list[float] | None = None, **scores: float) -> Record:
    """The record with other scores of its tasks, and the outcomes of their documents."""
    (example, *_) = record.tasks.values()
    run = example.runs[0]
    made = {
        name: example.model_copy(
            update={
                "name": name,
                "runs": [run.model_copy(update={"values": {example.metric: score}, "outcomes": outcomes or []})],
            }
        )
        for name, score in scores.items()
    }
    return record.model_copy(update={"tasks": made})


def outcome(record: Record) -> Outcome:
    return Outcome(record.trial_id, "x", record.choices, Result.of(record), config=record.config)


def test_tables_and_reports_show_tasks_and_their_mean(tmp_path: Path, folder: Path) -> None:
    record = run(planned(tmp_path / "results", folder))
    assert isinstance(record, Record)
    one = outcome(with_tasks(record, easy=0.25, late=0.5))
    other = replace(one, trial_id="b" * 16, result=replace(one.result, tasks={"easy": 0.75}))  # type: ignore[type-var]
    text = to_markdown("s", tabulate([one, other]))
    assert "| easy | late | tasks |" in text
    assert "| 25.00% | 50.00% | 37.50% |" in text
    assert "| 75.00% | - | 75.00% |" in text
    html = render_report("s", [one, other], lambda _: None)
    assert "easy (%)" in html
    assert ">37.50<" in html
    many = outcome(with_tasks(record, **{f"t{i}": 0.5 for i in range(7)}))
    assert "| bits | tasks | time |" in to_markdown("s", tabulate([many]))


def test_scores_have_intervals_over_their_documents(tmp_path: Path, folder: Path) -> None:
    record = run(planned(tmp_path / "results", folder))
    assert isinstance(record, Record)
    one = outcome(with_tasks(record, [1.0, 0.0, 0.0, 0.0] * 25, easy=0.25))
    interval = of_documents([1.0, 0.0, 0.0, 0.0] * 25)
    assert interval
    told = f"25.00 ± {100 * interval.margin(0.25):.2f}"
    assert f"| {told}% |" in to_markdown("s", tabulate([one]))
    html = render_report("s", [one], lambda _: with_tasks(record, [1.0, 0.0, 0.0, 0.0] * 25, easy=0.25))
    assert told in html
    assert f"95% interval {interval.low:.4f} to {interval.high:.4f}" in html
    unequal = outcome(with_tasks(record, [1.0, 1.0, 0.0, 0.0], easy=0.25))
    assert "| 25.00% |" in to_markdown("s", tabulate([unequal])), "the score is no mean of these documents"


def test_tasks_are_compared_where_both_sides_have_the_same(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "results"
    for transform, score in (("h", 0.25), ("wush", 0.75)):
        own = planned(root, folder, f"transform={transform}")
        record = run(own)
        assert isinstance(record, Record)
        own.store.finish(with_tasks(record, easy=score) if transform == "h" else with_tasks(record, easy=score, late=1))
    (setting,) = compare(ResultStore(root), "transform=h", "transform=wush").settings
    tasks = {one.metric.name: one for one in setting.differences if one.metric.key.startswith("task ")}
    assert list(tasks) == ["easy, 0-shot of 4"]
    assert tasks["easy, 0-shot of 4"].mean == pytest.approx(50)
    assert tasks["easy, 0-shot of 4"].better


def test_scores_are_read_in_bulk_as_from_whole_records(tmp_path: Path, folder: Path) -> None:
    own = planned(tmp_path / "results", folder)
    record = run(own)
    assert isinstance(record, Record)
    assert own.store.results([record.trial_id])[record.trial_id].tasks == Result.of(record).tasks != {}
