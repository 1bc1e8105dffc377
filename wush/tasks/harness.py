"""A suite of tasks of the LM Evaluation Harness: checked before a model is loaded, run on one in memory.

Nothing is cached: each run asks the model anew. A text comes with the suite, for perplexity.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wush.progress import Progress, Silent
from wush.tasks import definitions, loading, running
from wush.tasks.definitions import Definition
from wush.tasks.outcome import outcome
from wush.tasks.platinum.questions import unexpected_count
from wush.tasks.specs import TaskResult, TaskSpec, parse
from wush.texts import TextWindows

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Harness:
    """What tasks are run and how; what a task sets itself (`TaskSpec`) goes before what is set here.

    `num_fewshot` None: each task's own. `limit`: documents of each task, of a group's tasks each; None: all.
    `batch_size`: requests at a time; answers that are drawn depend on it, as a batch shares its generator. `seeds`: one
    run of each task for each, of the generators that draw answers; the few-shot examples are the same in all, so
    several need a `generation` that samples, `{do_sample: true, ...}`.
    `include`: a folder of further definitions. Raises `ValueError`, with the remedy, for values that cannot be.
    """

    text: TextWindows
    tasks: Sequence[str | Mapping[str, Any]]
    num_fewshot: int | None = None
    chat_template: bool = False
    limit: int | None = None
    batch_size: int = 8
    seeds: Sequence[int] = (0,)
    generation: Mapping[str, Any] | None = None
    include: str | None = None
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        for spec in parse(self.tasks):
            self._inherit(spec)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use 1 or more requests at a time")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)}: give at least one, each once, from 0 on")
        if self.include is not None and not Path(self.include).expanduser().is_dir():
            raise ValueError(f"include={self.include}: no such folder; give a folder of task definitions (YAML)")

    def specs(self, model_type: str) -> tuple[TaskSpec, ...]:
        """The tasks for a model of this type, complete; raises `ValueError` when that is none."""
        specs = tuple(spec for spec in self.complete() if spec.applies_to(model_type))
        if not specs:
            raise ValueError(f"no task is for models of type {model_type}; change only and never of evaluation.tasks")
        return specs

    def check(self, model_type: str | None = None) -> None:
        """Look every task up, those for one type of model or all; needs no model, no data and no network.

        Raises one `ValueError` that lists every problem: unknown tasks, with those spelled alike, and settings that a
        task cannot be run with. Warns of what is left out. The harness's definitions are read once a process (seconds).
        """
        left_out = [spec.task for spec in parse(self.tasks) if self._left_out(spec)]
        if left_out:
            log.warning(
                "left out, as they run code that the model writes: %s; %s", ", ".join(left_out), definitions.CODE_REMEDY
            )
        specs = self.complete() if model_type is None else self.specs(model_type)
        manager = definitions.manager_of([spec.task for spec in specs], self.include)
        problems: list[str] = []
        for spec in specs:
            try:
                definition = definitions.definition(manager, spec.task, self.include)
            except ValueError as error:
                problems.append(str(error))
            else:
                problems += definition.problems(spec, self._generation(spec), self.seeds, self.allow_code_execution)
        if problems:
            raise ValueError("\n".join(problems))

    def prepare(self, specs: Sequence[TaskSpec], tokenizer: Any) -> None:
        """Load each task's data once, so that what is missing is found before a model is quantized, and then cached.

        Raises `ValueError`, with the remedy, for a chat template that the tokenizer lacks, and for data that cannot be
        loaded.
        """
        import torch

        cpu = torch.device("cpu")
        for spec in specs:
            _require_template(self._inherit(spec), tokenizer)
        for spec in specs:
            manager, definition = self._look_up(self._inherit(spec))
            with running.kept_generators(cpu), running.quiet(definition.runs_code):
                self._load(manager, definition, cpu)

    def run(self, spec: TaskSpec, model: Any, tokenizer: Any, progress: Progress | None = None) -> TaskResult:
        """Run a task, once for each seed, on a Hugging Face causal LM where it is.

        Raises `ValueError`, with the remedy, for what `check` and `prepare` would find, and a metric that the task does
        not give.
        """
        spec, generation, progress = self._inherit(spec), self._generation(spec), progress or Silent()
        _require_template(spec, tokenizer)
        manager, definition = self._look_up(spec)
        timed: list[tuple[dict[str, Any], float]] = []
        with running.kept_generators(model.device), running.quiet(definition.runs_code):
            loaded = self._load(manager, definition, model.device)
            lm = running.wrapped(model, tokenizer, self.batch_size)
            running.prepare(loaded["tasks"], spec, generation, lm.max_length)
            for seed in progress.track(self.seeds, f"task {spec.task}", len(self.seeds)):
                progress.detail(f"seed {seed}")
                started = time.perf_counter()
                with running.logging_at(logging.WARNING):
                    results = running.evaluate(lm, loaded, spec, seed, progress)
                timed.append((results, time.perf_counter() - started))
        result = outcome(spec, loaded["tasks"], self.seeds, timed)
        unexpected = None if spec.limit else unexpected_count(spec.task, result.samples)
        if unexpected:
            log.warning("%s", unexpected)
        return result

    def _look_up(self, spec: TaskSpec) -> tuple[TaskManager, Definition]:
        manager = definitions.manager_of([spec.task], self.include)
        definition = definitions.definition(manager, spec.task, self.include)
        for problem in definition.problems(spec, self._generation(spec), self.seeds, self.allow_code_execution):
            raise ValueError(problem)
        return manager, definition

    def _load(self, manager: TaskManager, definition: Definition, device: torch.device) -> dict[str, Any]:
        running.seed_generators(self.seeds[0], device)  # some tasks shuffle their documents
        log.info("task %s: loading its data%s", definition.name, "".join(f" {name}" for name in definition.datasets))
        with running.logging_at(logging.ERROR):
            return loading.load(manager, definition)

    def complete(self) -> tuple[TaskSpec, ...]:
        """The tasks for all types of models, each with what is set here, without those that are left out."""
        return tuple(self._inherit(spec) for spec in parse(self.tasks) if not self._left_out(spec))

    def _generation(self, spec: TaskSpec) -> dict[str, Any]:
        return {**(self.generation or {}), **spec.generation}

    def _left_out(self, spec: TaskSpec) -> bool:
        return spec.only_with_code_execution and not self.allow_code_execution

    def _inherit(self, spec: TaskSpec) -> TaskSpec:
        return replace(
            spec,
            num_fewshot=self.num_fewshot if spec.num_fewshot is None else spec.num_fewshot,
            chat_template=self.chat_template if spec.chat_template is None else spec.chat_template,
            limit=self.limit if spec.limit is None else spec.limit,
        )


def _require_template(spec: TaskSpec, tokenizer: Any) -> None:
    if spec.chat_template and not tokenizer.chat_template:
        raise ValueError(f"task {spec.task}: the model's tokenizer has no chat template; set chat_template=false")
