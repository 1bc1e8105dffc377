"""The published tables and figures as `plots.orderings` compares them: the paper's numbers, and our records'."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from plots import platinum_tasks
from plots.numbers import Number
from plots.orderings import Item, Scores
from plots.records import BASELINE, Records, Trial
from plots.reference import Calibration, Cost, Kl, LayerLoss, LmEval, Platinum, read
from plots.settings import NAMES, Method, Selection, Setting, alike, pick, select, select_by, shown
from plots.tables import calibration, cost, divergence, layer_loss, lm_eval

Entry = tuple[str, str, str, Number | None]  # model, part, method


def items(records: Records) -> list[Item]:
    """All that have rows to order, in the paper's order."""
    return [
        _layer_loss(records),
        *(item for name in ("table2", "table3") for item in _lm_eval(records, name)),
        _kl(records),
        *_calibration(records),
        _cost(records),
        _platinum(records),
    ]


def _scores(entries: Iterable[Entry]) -> Scores:
    found: Scores = defaultdict(lambda: defaultdict(dict))
    for model, part, name, number in entries:
        if number is not None:
            found[model][part][name] = number
    return {model: dict(parts) for model, parts in found.items()}


def _left_out(found: Mapping[str, Selection]) -> tuple[str, ...]:
    return tuple(f"{label}: {text}" for label, one in found.items() for text in one.left_out)


def _named(algorithm: str | None, transform: str | None) -> str:
    return " ".join(filter(None, (algorithm, transform)))


def _layer_loss(records: Records) -> Item:
    published = [
        ("Qwen3-8B, the 18th block", f"{row.format} {name}", row.transform, Number(getattr(row, name)))
        for row in read(LayerLoss)
        for name in layer_loss.LINEARS
    ]
    found = select_by(layer_loss.usable(records.trials), _of_block)
    ours = [
        (label, f"{format_} {name}", transform or "", number)
        for label, selection in found.items()
        for (format_, _, transform), setting in selection.settings.items()
        for name, number in layer_loss.numbers(setting).items()
    ]
    what = "layer loss × 1e3 of each linear"
    return Item("table1", what, True, _scores(published), _scores(ours), left_out=_left_out(found), exact=True)


def _of_block(trial: Trial) -> str:
    model, index, _, _, text = layer_loss.key(trial)
    return f"{shown(model)}, block {index}, {layer_loss.ON[text]}"


def _lm_eval(records: Records, name: str) -> list[Item]:
    """By averages and by the paper's tasks. Its models are in their own table alone, others in both."""
    rows = [row for row in read(LmEval) if (row.model == lm_eval.FIRST) == (name == "table2") and row.format != "bf16"]
    models = {row.model for row in rows}
    usable = [one for one in lm_eval.tasked(records) if one.model not in NAMES or shown(one.model) in models]
    averages: list[Entry] = []
    by_task: list[Entry] = []
    found: dict[str, Selection] = {}
    for (model, suite), trials in lm_eval.suites(usable).items():
        columns: lm_eval.Columns = lm_eval.OPEN_LLM if model in NAMES else {task: (task,) for task in suite}
        label = shown(model) if model in NAMES else f"{model} on {', '.join(suite)}"
        found[label] = select((one for one in trials if not one.baseline), by_tasks=True)
        for one, setting in found[label].settings.items():
            averages.append((label, one[0], _named(*one[1:]), lm_eval.scores(setting, columns).average))
            by_task += _tasks(label, one, setting)
    of_average = [(row.model, row.format, _named(*row.method[1:]), Number(row.average)) for row in rows]
    of_tasks = [
        (row.model, f"{row.format} {task}", _named(*row.method[1:]), Number(getattr(row, task)))
        for row in rows
        for task in lm_eval.OPEN_LLM
    ]
    left_out = _left_out(found)
    return [
        Item(name, "average accuracy, percent", False, _scores(of_average), _scores(averages), left_out=left_out),
        Item(f"{name} by task", "accuracy, percent", False, _scores(of_tasks), _scores(by_task), left_out=left_out),
    ]


def _tasks(label: str, one: Method, setting: Setting) -> list[Entry]:
    """Of the paper's tasks those that the setting has; a small model's stand-ins are no such."""
    numbers = lm_eval.scores(setting, lm_eval.OPEN_LLM).columns
    return [(label, f"{one[0]} {task}", _named(*one[1:]), number) for task, number in numbers.items()]


def _kl(records: Records) -> Item:
    published = [(row.model, row.format, _named(*row.method[1:]), Number(row.kl)) for row in read(Kl)]
    found = select_by(divergence.usable(records), lambda trial: shown(trial.model))
    ours = [
        (model, format_, _named(algorithm, transform), divergence.number(setting))
        for model, selection in found.items()
        for (format_, algorithm, transform), setting in selection.settings.items()
    ]
    return Item("table4", "KL, nats", True, _scores(published), _scores(ours), digits=4, left_out=_left_out(found))


def _calibration(records: Records) -> list[Item]:
    """By the averages of both evaluations: of the Harness, and of Platinum."""
    published = [(row, f"{row.format} {_named(*row.method[1:])}") for row in read(Calibration)]
    harness = [(row.model, part, row.calibration, Number(row.lm_eval_average)) for row, part in published]
    platinum = [(row.model, part, row.calibration, Number(row.platinum_average)) for row, part in published]
    ours, left_out = _by_set(lm_eval.tasked(records), calibration.average)
    drawn, others = _by_set(
        calibration.with_platinum(records),
        lambda setting: lm_eval.scores(setting, platinum_tasks.PLATINUM).average,
    )
    what = "average accuracy by calibration set, percent"
    return [
        Item("table5", what, False, _scores(harness), _scores(ours), left_out=left_out),
        Item("table5 platinum", f"Platinum: {what}", False, _scores(platinum), _scores(drawn), left_out=others),
    ]


def _by_set(trials: list[Trial], average: Callable[[Setting], Number | None]) -> tuple[list[Entry], tuple[str, ...]]:
    """A number for each model, method and calibration set, which are the methods here; and what is left out."""
    ours: list[Entry] = []
    left_out: tuple[str, ...] = ()
    for model in sorted({trial.model for trial in trials}):
        kept, others = alike((one for one in trials if one.model == model), True, ("method", "evaluation", "quantize"))
        for ((_, (format_, *rest)), name), settings in calibration.by_set(kept).items():
            setting, further = pick(settings)
            part = f"{format_} {_named(*rest)}"
            ours.append((shown(model), part, name, average(setting)))
            others += tuple(f"{part}: {text}" for text in further)
        left_out += tuple(f"{shown(model)}: {text}" for text in others)
    return ours, left_out


def _cost(records: Records) -> Item:
    """Methods are the models here, as far as they ran on one kind of GPU."""
    rows = read(Cost)
    published = [(row.gpu, _named(row.algorithm, row.transform), row.model, Number(row.minutes)) for row in rows]
    found = select_by(cost.usable(records), lambda trial: (trial.model, trial.device))
    ours = [
        (gpu, _named(setting.first.algorithm, setting.first.transform), shown(model), cost.minutes(setting))
        for (model, device), selection in found.items()
        for setting in selection.settings.values()
        for gpu in dict.fromkeys(row.gpu for row in rows)
        if gpu in device and setting.first.format == cost.FORMATS[0]
    ]
    left_out = _left_out({f"{shown(model)} on {device}": one for (model, device), one in found.items()})
    what = "minutes, by model"
    return Item("table6", what, True, _scores(published), _scores(ours), digits=1, left_out=left_out)


def _platinum(records: Records) -> Item:
    published = [
        (
            row.model,
            row.format,
            _named(*row.method[1:]),
            Number(row.average, row.std_between_runs, row.runs),
        )
        for row in read(Platinum)
        if row.format != "bf16"
    ]
    suites = platinum_tasks.suites(records)
    ours = [
        (shown(suite.model), one[0], _named(*one[1:]), suite.average(one))
        for suite in suites
        for one in suite.settings
        if one[0] != BASELINE
    ]
    left_out = tuple(f"{shown(suite.model)}: {text}" for suite in suites for text in suite.left_out)
    what = "average over benchmarks (also figures 7-10), percent"
    return Item("figure3", what, False, _scores(published), _scores(ours), left_out=left_out)
