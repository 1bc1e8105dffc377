"""What is asked of a task and what comes out of it: plain values, checked where they can be without the harness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task, or a group of tasks with a score of its own, and how it is run; what is None is as `Harness` says.

    `metric`: the one that counts, named with its filter such as `acc,none`; None: the first. `only` and `never`: the
    model types (`llama`, `qwen3`) that it is for; empty: all and none. `generation` goes before the `Harness`'s, key by
    key. `only_with_code_execution`: left out of the suite, with a warning, where running generated code is not allowed.
    """

    task: str
    num_fewshot: int | None = None
    chat_template: bool | None = None
    fewshot_as_multiturn: bool = False
    metric: str | None = None
    only: Sequence[str] = ()
    never: Sequence[str] = ()
    limit: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    only_with_code_execution: bool = False

    def __post_init__(self) -> None:
        where = f"task {self.task}"
        if not isinstance(self.task, str) or not self.task:
            raise ValueError(f"{where}: a task has a name; write it as a text")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"{where}: num_fewshot is {self.num_fewshot}; use 0 or more, or null for the task's own")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"{where}: limit is {self.limit}; use 1 or more, or null for all documents")
        if self.only and self.never:
            raise ValueError(f"{where}: has both only and never; only={list(self.only)} already leaves out all others")

    def applies_to(self, model_type: str) -> bool:
        """Whether it is for models of this type."""
        return model_type in self.only if self.only else model_type not in self.never


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One run of a task: each metric, named with its filter (`acc,none`), its standard error or None, and seconds.

    `outcomes`: the metric that counts of each document, in the harness's order, those of a group task by task; empty
    where it is no number of a document.
    """

    seed: int
    values: dict[str, float]
    stderrs: dict[str, float | None]
    seconds: float
    outcomes: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task, run once for each seed. `samples`: the documents scored in each run. Accuracies are shares in 0..1."""

    name: str
    version: str
    harness: str
    num_fewshot: int
    chat_template: bool
    samples: int
    metric: str
    higher_is_better: bool
    runs: list[TaskRun]


def parse(tasks: Sequence[str | Mapping[str, Any]]) -> tuple[TaskSpec, ...]:
    """The tasks as specs; raises `ValueError` for none at all, an unknown key or model type, and a task named twice."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks={tasks!r}: give a list of at least one task; to run none, evaluate on a text alone")
    specs = tuple(_spec(task) for task in tasks)
    names = [spec.task for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {', '.join(twice)} named more than once; keep one of each")
    _check_model_types(specs)
    return specs


def close_to(name: str, known: Sequence[str]) -> str:
    """`, did you mean a or b?` where something known is spelled alike, else nothing."""
    found = get_close_matches(name, known, n=3)
    return f", did you mean {' or '.join(found)}?" if found else ""


def _spec(task: str | Mapping[str, Any]) -> TaskSpec:
    if isinstance(task, str):
        return TaskSpec(task=task)
    known = [entry.name for entry in fields(TaskSpec)]
    if "task" not in task:
        raise ValueError(f"tasks: {dict(task)} names no task; add task: NAME")
    for key in task:
        if key not in known:
            raise ValueError(
                f"task {task['task']}: unknown key {key!r}{close_to(key, known)}; a task has: {', '.join(known)}"
            )
    return TaskSpec(**task)


def _check_model_types(specs: Sequence[TaskSpec]) -> None:
    used = {(spec.task, name) for spec in specs for name in (*spec.only, *spec.never)}
    if not used:
        return
    from transformers import CONFIG_MAPPING

    for task, name in sorted(used):
        if name not in CONFIG_MAPPING:
            raise ValueError(
                f"task {task}: {name!r} is no model type{close_to(name, list(CONFIG_MAPPING))}; "
                "give the model_type of a model's config.json, such as llama or qwen3"
            )
