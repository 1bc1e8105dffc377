"""Recorded runs of the Platinum Benchmarks, of Figures 3 and 7-10, and of what small models are given instead."""

from dataclasses import dataclass

from plots.numbers import Number
from plots.records import Records, Trial
from plots.reference import BENCHMARKS
from plots.settings import NAMES, Method, Setting, select
from plots.tables import lm_eval

_TASKS = (
    *("singleop", "singleq", "multiarith", "svamp", "gsm8k", "mmlu_math", "bbh_logical_deduction_three_objects"),
    *("bbh_object_counting", "bbh_navigate", "hotpotqa", "squad", "drop", "winograd_wsc"),
)
# Columns as the paper names them, and the task of each, as `plots.tables.lm_eval.scores` takes them.
PLATINUM = {name: (f"platinum_{task}",) for name, task in zip(BENCHMARKS, _TASKS, strict=True)}


@dataclass(frozen=True)
class Suite:
    """A model's methods on one set of tasks; `settings` and `left_out` as `plots.settings.select` has them."""

    model: str
    columns: lm_eval.Columns
    settings: dict[Method, Setting]
    left_out: tuple[str, ...] = ()

    @property
    def platinum(self) -> bool:
        """Whether the tasks are the Platinum Benchmarks."""
        return self.columns == PLATINUM

    def runs(self, one: Method) -> lm_eval.Runs:
        """Percent of each column in each run."""
        return lm_eval.runs_of(self.settings[one], self.columns)

    def average(self, one: Method) -> Number | None:
        """Of all columns, over runs; None where a trial lacks some."""
        return lm_eval.scores(self.settings[one], self.columns).average

    @property
    def trials(self) -> list[Trial]:
        """All of them."""
        return [trial for setting in self.settings.values() for trial in setting.trials]


def suites(records: Records) -> list[Suite]:
    """The Platinum Benchmarks of each model that has all of them, and the sampled tasks of models not in the paper."""
    complete = [trial for trial in records.whole if all(names[0] in trial.tasks for names in PLATINUM.values())]
    found = [_suite(model, PLATINUM, own) for model, own in _by_model(complete).items()]
    others = [trial for trial in records.whole if trial.model not in NAMES and lm_eval.sampled(trial)]
    known = {suite.model for suite in found}
    for model, own in _by_model(others).items():
        if model not in known:
            common = sorted(set.intersection(*(set(lm_eval.sampled(trial)) for trial in own)))
            found += [_suite(model, {name: (name,) for name in common}, own)] if common else []
    return found


def _by_model(trials: list[Trial]) -> dict[str, list[Trial]]:
    return {model: [one for one in trials if one.model == model] for model in sorted({one.model for one in trials})}


def _suite(model: str, columns: lm_eval.Columns, trials: list[Trial]) -> Suite:
    found = select(trials, by_tasks=True)
    return Suite(model, columns, found.settings, found.left_out)
