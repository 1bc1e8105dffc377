"""A table before it is written: rows of cells, each a published number and this project's own.

What is best within a group of rows is found here, for both sides apart; how it looks is for `plots.tables.render`.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from plots.numbers import Number
from plots.records import Records, Trial
from wush.version import METHOD_VERSION

SOURCE = "arXiv 2512.00956 v3"
NOT_RUN, NOTHING = "not run", "-"
SIDES = ("published", "ours")
INTERVALS = (
    "±: 95% intervals of ours, their longer side: of n seeds by Student's t; of a single trial over evaluated windows "
    "(bootstrap, of under 30 windows Student's t) or over a task's documents; none where nothing was kept to tell it."
)


@dataclass(frozen=True)
class Column:
    """`digits` after the point; the best is bold where `lower_is_better` says which is. `unit` follows the name."""

    name: str
    digits: int
    lower_is_better: bool | None = None
    unit: str = ""

    @property
    def header(self) -> str:
        """The name, and the unit in brackets."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Cell:
    """Published and own number; `best`: the sides on which it is the best of the row's group."""

    published: Number | None = None
    ours: Number | None = None
    best: frozenset[str] = frozenset()

    @property
    def difference(self) -> float | None:
        """Ours less published."""
        return self.ours.mean - self.published.mean if self.ours and self.published else None


@dataclass(frozen=True)
class Row:
    """`keys` say what was quantized how; rows of one `group` compete, and one without a group with none.

    `extra`: text cells after the numbers.
    """

    keys: tuple[str, ...]
    cells: tuple[Cell, ...]
    group: Hashable = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Rows of the same columns. `published`: the paper has these, so that what lacks was not run."""

    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    published: bool = True
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Blocks under a title; `captions` say where numbers come from."""

    title: str
    blocks: tuple[Block, ...]
    captions: tuple[str, ...]


def block(
    keys: Sequence[str],
    columns: Sequence[Column],
    rows: Iterable[Row],
    title: str = "",
    published: bool = True,
    extra: Sequence[str] = (),
) -> Block:
    """A block in which the best cells are marked."""
    marked = _marked(columns, list(rows))
    return Block(tuple(keys), tuple(columns), tuple(marked), title, published, tuple(extra))


def present(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Those that have rows."""
    return tuple(one for one in blocks if one.rows)


def captions(records: Records, used: Iterable[Trial], *more: str) -> tuple[str, ...]:
    """Where both sides come from: the paper; the trials used, their machines, harness and calibration."""
    trials = {trial.trial_id: trial for trial in used}
    first = f"Published: {SOURCE}. {ours(list(trials.values()))}"
    left_out = [f"Left out: {note}." for note in records.notes]
    return (first, *more, *([INTERVALS] if trials else []), *left_out)


def ours(trials: Sequence[Trial]) -> str:
    """A sentence on the trials: how many, where they ran, with which harness, and on what they were calibrated."""
    if not trials:
        return "Ours: no trial yet."
    machines = sorted({trial.device for trial in trials})
    harness = sorted({task.harness for trial in trials for task in trial.tasks.values()})
    texts = sorted({text for trial in trials if (text := _calibration(trial))})
    parts = [f"{len(trials)} trial{'s' if len(trials) > 1 else ''} on {' and '.join(machines)}"]
    parts += particular(trials)
    parts += [f"LM Evaluation Harness {' and '.join(harness)}"] if harness else []
    parts += [f"calibration: {', '.join(texts)}"] if texts else []
    return f"Ours: {'; '.join(parts)}."


def particular(trials: Sequence[Trial]) -> list[str]:
    """What a reader must know of the original models and of the method that made the numbers."""
    notes = sorted({f"{trial.model}: {trial.model_note}" for trial in trials if trial.model_note})
    old = sorted({trial.method_version for trial in trials if trial.old})
    count = sum(trial.old for trial in trials)
    versions = " and ".join(map(str, old))
    return notes + ([f"{count} OLD, of version {versions} of the method (today's: {METHOD_VERSION})"] if old else [])


def _calibration(trial: Trial) -> str:
    text = trial.settings.get("calibration")
    if not text or trial.calibration is None:
        return ""
    return f"{trial.calibration}, {text.get('windows') or 'all'} windows of {text.get('window_length', '?')} tokens"


def _marked(columns: Sequence[Column], rows: list[Row]) -> list[Row]:
    for place, column in enumerate(columns):
        if column.lower_is_better is not None:
            for side in SIDES:
                for number in _best(rows, place, side, column.lower_is_better):
                    rows[number] = _with_best(rows[number], place, side)
    return rows


def _best(rows: list[Row], place: int, side: str, lower: bool) -> list[int]:
    """The rows that are best of their group, all of those that tie; none where a group has one value only."""
    groups: dict[Hashable, dict[int, float]] = defaultdict(dict)
    for number, row in enumerate(rows):
        value: Number | None = getattr(row.cells[place], side)
        if row.group is not None and value is not None:
            groups[row.group][number] = value.mean
    best = []
    for values in groups.values():
        if len(values) > 1:
            target = min(values.values()) if lower else max(values.values())
            best += [number for number, value in values.items() if value == target]
    return best


def _with_best(row: Row, place: int, side: str) -> Row:
    cells = list(row.cells)
    cells[place] = replace(cells[place], best=cells[place].best | {side})
    return replace(row, cells=tuple(cells))
