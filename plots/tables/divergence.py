"""Table 4: KL divergence from the original model, in nats."""

from plots.numbers import Number
from plots.records import Records, Trial
from plots.reference import Kl, read
from plots.settings import MODELS, Setting, by_key, method, or_none, order, shown
from plots.tables.table import Cell, Column, Row, Table, block, captions, present

COLUMNS = (Column("KL", 4, lower_is_better=True),)
KEYS = ("model", "format", "algorithm", "transform")
Key = tuple[str, tuple[str, str | None, str | None]]


def table4(records: Records) -> Table:
    """The published methods, then all others that were run."""
    trials = usable(records)
    found = by_key(trials, key)
    published = []
    for one in read(Kl):
        own = (MODELS[one.model], one.method)
        published += _rows(own, found.pop(own, []), Number(one.kl))
    others = sorted(found, key=lambda own: (own[0], order(*own[1])))
    rows = [row for own in others for row in _rows(own, found[own], None)]
    blocks = present([block(KEYS, COLUMNS, published), block(KEYS, COLUMNS, rows, "not in the paper", published=False)])
    more = "The texts differ: compare the order of methods, not the numbers."
    return Table("Table 4: KL divergence from the original model", blocks, captions(records, trials, more))


def usable(records: Records) -> list[Trial]:
    """Quantized whole models."""
    return [trial for trial in records.whole if not trial.baseline]


def key(trial: Trial) -> Key:
    """What a row is of."""
    return trial.model, method(trial)


def number(setting: Setting) -> Number:
    """KL in nats."""
    return setting.metric("kl")


def _rows(own: Key, settings: list[Setting], published: Number | None) -> list[Row]:
    model, (format_, algorithm, transform) = own
    return [
        Row(
            (shown(model), format_, algorithm or "", f"{transform or ''} {setting.note if setting else ''}".strip()),
            (Cell(published, number(setting) if setting else None),),
            group=(model, format_),
        )
        for setting in or_none(settings)
    ]
