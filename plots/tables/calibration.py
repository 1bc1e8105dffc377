"""Table 5: what the calibration set changes: averages over tasks, and KL."""

from collections import defaultdict
from itertools import zip_longest

from plots.numbers import Number
from plots.platinum_tasks import PLATINUM
from plots.records import Records, Trial
from plots.reference import Calibration, read
from plots.settings import MODELS, Setting, by_key, method, or_none, order, shown
from plots.tables import lm_eval
from plots.tables.table import Cell, Column, Row, Table, block, captions, present

KEYS = ("model", "format", "algorithm", "transform", "calibration")
COLUMNS = (
    Column("LM Evaluation Harness average", 2, lower_is_better=False),
    Column("Platinum average", 2, lower_is_better=False),
)
OWN_COLUMNS = (Column("average of its tasks", 2, lower_is_better=False), Column("KL", 4, lower_is_better=True))
Method = tuple[str, tuple[str, str | None, str | None]]  # model, and format, algorithm, transform
Key = tuple[Method, str]


def table5(records: Records) -> Table:
    """The published sets, then methods that were run here with at least two."""
    found, platinum = by_set(lm_eval.tasked(records)), by_set(with_platinum(records))
    published: list[Row] = []
    used: list[Setting] = []
    for one in read(Calibration):
        own: Method = (MODELS[one.model], one.method)
        settings = found.pop((own, one.calibration), []), platinum.get((own, one.calibration), [])
        known = Number(one.lm_eval_average), Number(one.platinum_average)
        pairs = zip_longest(or_none(settings[0]), or_none(settings[1]))
        published += [_published_row(own, one.calibration, both, known) for both in pairs]
        used += [setting for side in settings for setting in side]
    several = with_several(found)
    rows = [_own_row(*one, setting) for one in several for setting in found[one]]
    used += [setting for one in several for setting in found[one]]
    blocks = [block(KEYS, COLUMNS, published), block(KEYS, OWN_COLUMNS, rows, "not in the paper", published=False)]
    trials = [trial for setting in used for trial in setting.trials]
    return Table("Table 5: calibration sets", present(blocks), captions(records, trials))


def by_set(trials: list[Trial]) -> dict[Key, list[Setting]]:
    """Settings of quantized whole models by method and calibration set."""
    return by_key((trial for trial in trials if trial.calibration), _key, by_tasks=True)


def with_platinum(records: Records) -> list[Trial]:
    """Trials of whole models with all Platinum Benchmarks."""
    return [trial for trial in records.whole if all(names[0] in trial.tasks for names in PLATINUM.values())]


def with_several(found: dict[Key, list[Setting]]) -> list[Key]:
    """The methods of which there is more than one calibration set, in order."""
    sets: dict[Method, set[str]] = defaultdict(set)
    for own, name in found:
        sets[own].add(name)
    return sorted(
        (one for one in found if len(sets[one[0]]) > 1), key=lambda one: (one[0][0], order(*one[0][1]), one[1])
    )


def average(setting: Setting) -> Number | None:
    """Of all tasks that its trials have, in percent."""
    columns = lm_eval.own_columns(setting.trials)
    return lm_eval.scores(setting, columns).average if columns else None


def _key(trial: Trial) -> Key:
    return (trial.model, method(trial)), trial.calibration or ""


def _names(own: Method, calibration: str, setting: Setting | None) -> tuple[str, ...]:
    model, (format_, algorithm, transform) = own
    note = setting.note if setting else ""
    return shown(model), format_, algorithm or "", transform or "", f"{calibration} {note}".strip()


def _published_row(
    own: Method, calibration: str, both: tuple[Setting | None, Setting | None], known: tuple[Number, Number]
) -> Row:
    columns: tuple[lm_eval.Columns, lm_eval.Columns] = (lm_eval.OPEN_LLM, PLATINUM)
    ours = [lm_eval.scores(one, names).average if one else None for one, names in zip(both, columns, strict=True)]
    cells = tuple(Cell(one, other) for one, other in zip(known, ours, strict=True))
    return Row(_names(own, calibration, both[0] or both[1]), cells, group=own)


def _own_row(own: Method, calibration: str, setting: Setting) -> Row:
    kl = setting.metric("kl")
    return Row(_names(own, calibration, setting), (Cell(ours=average(setting)), Cell(ours=kl)), group=own)
