"""Tables 2 and 3: accuracy on LM Evaluation Harness tasks, in percent, and recovery of the original's average."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from experiments.records import Task
from plots.numbers import PERCENT, Number, Sample, difference, mean_of
from plots.records import BASELINE, Records, Trial
from plots.reference import LmEval, read
from plots.settings import MODELS, NAMES, Setting, by_key, method, or_none, order, shown
from plots.tables.table import Block, Cell, Column, Row, Table, block, captions, present
from wush.intervals import Interval, of_documents

FIRST = "Llama-3.1-8B-Instruct"  # Table 2 is of this model, Table 3 of the others
# The published columns, and the tasks that can stand in them: the first that a trial has.
OPEN_LLM = {
    "mmlu": ("mmlu_cot", "mmlu_cot_llama", "mmlu"),
    "gsm8k": ("gsm8k_llama", "gsm8k"),
    "hellaswag": ("hellaswag",),
    "winogrande": ("winogrande",),
}
PLATINUM = "platinum_"  # tasks of Figures 3 and 7-10
NORMAL = 1.96  # standard errors on either side of a mean
CARRIED = "algorithm not stated"
# Rows of Table 2 whose published recoveries are those of arXiv 2509.23202, so that they were probably carried over.
CARRIED_OVER = (("mr_gptq", "h"), ("smoothquant", None), ("quarot", None), ("spinquant", None))
NOT_STATED = (
    f"{CARRIED}: the published recovery is that of arXiv 2509.23202, so the row was probably carried over from there; "
    "what was run for it the paper does not say. GPTQ-H is MR-GPTQ there, and stands beside our algorithm=mr_gptq."
)
Columns = Mapping[str, tuple[str, ...]]  # a column, and the tasks that can stand in it
Method = tuple[str, str | None, str | None]
Runs = Mapping[Hashable, Mapping[str, float]]  # a run, and its columns in percent
KEYS = ("model", "format", "algorithm", "transform")


@dataclass(frozen=True)
class Scores:
    """Percent of each column, its average over columns and its recovery; empty where a trial lacks them."""

    columns: dict[str, Number]
    average: Number | None
    recovery: Number | None = None

    def cells(self, names: Sequence[str]) -> list[Number | None]:
        """The columns in order, the average and the recovery."""
        return [*(self.columns.get(name) for name in names), self.average, self.recovery]


def table2(records: Records) -> Table:
    """Llama-3.1-8B-Instruct."""
    return _table(records, "Table 2: LM Evaluation Harness, W4A4", [FIRST])


def table3(records: Records) -> Table:
    """The paper's other models."""
    models = dict.fromkeys(row.model for row in read(LmEval) if row.model != FIRST)
    return _table(records, "Table 3: LM Evaluation Harness, W4A4, further models", list(models))


def carried_over(row: LmEval) -> bool:
    """Whether the row is one of those that another paper has too."""
    return row.model == FIRST and (row.algorithm, row.transform) in CARRIED_OVER


def tasked(records: Records) -> list[Trial]:
    """Trials of whole models with tasks, but not those that Figures 3 and 7-10 are of."""
    own = [trial for trial in records.whole if own_columns([trial])]
    return [trial for trial in own if trial.model in NAMES or not sampled(trial)]


def sampled(trial: Trial) -> list[str]:
    """Its tasks whose answers are drawn, which stand for the Platinum Benchmarks where a model is too small."""
    drawn = bool(((trial.settings.get("evaluation") or {}).get("generation") or {}).get("do_sample"))
    return [name for name in own_columns([trial]) if drawn or len(trial.tasks[name].runs) > 1]


def scores(setting: Setting, columns: Columns, baseline: Setting | None = None) -> Scores:
    """In percent; means over runs, of one trial or of several, or a single one with its documents."""
    runs = runs_of(setting, columns)
    common = [name for name in columns if runs and all(name in run for run in runs.values())]
    single = {name: _of_documents(setting.first, columns[name]) for name in common} if _one(setting, runs) else {}
    found = {name: number for name in common if (number := single.get(name) or Number.of(_column(runs, name)))}
    average = None
    if common and len(common) == len(columns):
        average = _mean(single) if single else Number.of({key: fmean(run.values()) for key, run in runs.items()})
    original = scores(baseline, columns).average if baseline else None
    return Scores(found, average, _recovery(average, original) if average and original else None)


def runs_of(setting: Setting, columns: Columns) -> Runs:
    """Percent of each column in each run of every trial."""
    return {
        (draw, seed): run
        for draw, trial in setting.draws.items()
        for seed, run in _runs(trial, columns).items()
    }  # fmt: skip


def own_columns(trials: Iterable[Trial]) -> Columns:
    """A column for every task of shares that any of the trials has, without the Platinum Benchmarks."""
    found = dict.fromkeys(name for trial in trials for name, task in trial.tasks.items() if task.higher_is_better)
    return {name: (name,) for name in found if not name.startswith(PLATINUM)}


def baselines(settings: dict[tuple[str, Method], list[Setting]], model: str) -> dict[str, Setting]:
    """The original model's settings by what they were evaluated with."""
    found = settings.get((model, (BASELINE, None, None)), [])
    return {str(one.first.settings.get("evaluation")): one for one in found}


def by_method(trials: Iterable[Trial]) -> dict[tuple[str, Method], list[Setting]]:
    """Settings by model and method."""
    return by_key(trials, lambda trial: (trial.model, method(trial)), by_tasks=True)


def original_of(setting: Setting, originals: dict[str, Setting]) -> Setting | None:
    """The original model, evaluated in the same way."""
    return originals.get(str(setting.first.settings.get("evaluation")))


def _one(setting: Setting, runs: Runs) -> bool:
    """Whether there is one run, or several that came out the same, as seeds change nothing of some methods."""
    values = {tuple(sorted(run.items())) for run in runs.values()}
    return len(values) == 1 and all(len(task.runs) == 1 for task in setting.first.tasks.values())


def _column(runs: Runs, name: str) -> dict[Hashable, float]:
    return {key: run[name] for key, run in runs.items()}


def _of_documents(trial: Trial, known: tuple[str, ...]) -> Number:
    """A task's score in its single run: with the interval over its documents, or by its standard error."""
    task = trial.tasks[_first(trial, known) or ""]
    (run,) = task.runs
    value, error = PERCENT * run.values[task.metric], run.stderrs.get(task.metric)
    interval = of_documents(run.outcomes)
    if interval is None and error is not None:
        interval = Interval(run.values[task.metric] - NORMAL * error, run.values[task.metric] + NORMAL * error)
    outcomes = {task.name: run.outcomes} if run.outcomes else {}
    return Number(value, interval=interval and interval.scaled(PERCENT), sample=Sample(outcomes=outcomes))


def _mean(columns: dict[str, Number]) -> Number:
    """Of columns that are independent of each other."""
    outcomes = {name: own for one in columns.values() for name, own in one.sample.outcomes.items()}
    known = outcomes if len(outcomes) == len(columns) else {}
    numbers = list(columns.values())
    return Number(fmean(one.mean for one in numbers), interval=mean_of(numbers), sample=Sample(outcomes=known))


def _recovery(average: Number, original: Number) -> Number | None:
    """In percent of the original's, whose own noise cancels where both answered the same documents."""
    if not original.mean:
        return None
    found = average.scaled(PERCENT / original.mean)
    if average.sample.outcomes and (gap := difference(original, average)):
        around = gap.scaled(PERCENT / original.mean)
        return Number(found.mean, interval=Interval(PERCENT + around.low, PERCENT + around.high))
    return found


def _runs(trial: Trial, columns: Columns) -> dict[int, dict[str, float]]:
    """Percent of each column in each run that all of the trial's tasks have, by its seed."""
    tasks = {name: trial.tasks[own] for name, known in columns.items() if (own := _first(trial, known))}
    if not tasks:
        return {}
    seeds = set.intersection(*({run.seed for run in task.runs} for task in tasks.values()))
    return {seed: {name: _value(task, seed) for name, task in tasks.items()} for seed in sorted(seeds)}


def _value(task: Task, seed: int) -> float:
    run = next(run for run in task.runs if run.seed == seed)
    return PERCENT * run.values[task.metric]


def _first(trial: Trial, known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in trial.tasks), None)


def _table(records: Records, title: str, models: list[str]) -> Table:
    trials = tasked(records)
    found = by_method(trials)
    options = [MODELS[model] for model in models]
    used = [trial for trial in trials if trial.model in options or trial.model not in NAMES]
    blocks = [_published_block(models, found), _further_methods(options, found)]
    others = suites(trial for trial in trials if trial.model not in NAMES)
    blocks += [_own_block(model, names, own) for (model, names), own in others.items()]
    more = "mmlu is MMLU-CoT for Llama and MMLU for Qwen; recovery is the average over that of the original model."
    return Table(title, present(blocks), captions(records, used, more, *([NOT_STATED] if FIRST in models else [])))


def _columns(names: Iterable[str]) -> list[Column]:
    return [
        *(Column(name, 2, lower_is_better=False) for name in names),
        Column("average", 2, lower_is_better=False),
        Column("recovery", 2, lower_is_better=False),
    ]


def _published_block(models: list[str], found: dict[tuple[str, Method], list[Setting]]) -> Block:
    rows = []
    for one in read(LmEval):
        if one.model in models:
            option, own = MODELS[one.model], one.method
            values = [*(getattr(one, name) for name in OPEN_LLM), one.average, one.recovery]
            published = [Number(value) for value in values]
            new = _rows(option, own, found.get((option, own), []), baselines(found, option), OPEN_LLM, published)
            rows += [replace(row, extra=(CARRIED if carried_over(one) else "",)) for row in new]
    if FIRST in models:
        return block(KEYS, _columns(OPEN_LLM), rows, extra=("published row",))
    return block(KEYS, _columns(OPEN_LLM), [replace(row, extra=()) for row in rows])


def _further_methods(options: list[str], found: dict[tuple[str, Method], list[Setting]]) -> Block:
    known = {(MODELS[one.model], one.method) for one in read(LmEval)}
    further = sorted(
        (one for one in found.keys() - known if one[0] in options), key=lambda one: (one[0], order(*one[1]))
    )
    rows = []
    for option, own in further:
        rows += _rows(option, own, found[option, own], baselines(found, option), OPEN_LLM, None)
    return block(KEYS, _columns(OPEN_LLM), rows, "methods that are not in the paper", published=False)


def suites(trials: Iterable[Trial]) -> dict[tuple[str, tuple[str, ...]], list[Trial]]:
    """The trials of each model and set of tasks, in order."""
    found: dict[tuple[str, tuple[str, ...]], list[Trial]] = {}
    for trial in trials:
        found.setdefault((trial.model, tuple(own_columns([trial]))), []).append(trial)
    return dict(sorted(found.items()))


def _own_block(model: str, names: tuple[str, ...], trials: list[Trial]) -> Block:
    found = by_method(trials)
    columns = {name: (name,) for name in names}
    rows = []
    for own in sorted((own for _, own in found), key=lambda own: order(*own)):
        rows += _rows(model, own, found[model, own], baselines(found, model), columns, None)
    return block(KEYS, _columns(names), rows, f"{model}, not in the paper", published=False)


def _rows(
    option: str,
    own: Method,
    settings: list[Setting],
    originals: dict[str, Setting],
    columns: Columns,
    published: list[Number] | None,
) -> list[Row]:
    """A row for each setting, or one without numbers of ours."""
    known: Sequence[Number | None] = published or [None] * (len(columns) + 2)
    rows = []
    for setting in or_none(settings):
        ours = (
            scores(setting, columns, original_of(setting, originals)).cells(list(columns))
            if setting
            else [None] * len(known)
        )
        cells = tuple(Cell(one, other) for one, other in zip(known, ours, strict=True))
        names = (shown(option), own[0], own[1] or "", f"{own[2] or ''} {setting.note if setting else ''}".strip())
        rows.append(Row(names, cells, group=None if own[0] == BASELINE else (option, own[0])))
    return rows
