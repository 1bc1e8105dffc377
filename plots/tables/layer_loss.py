"""Table 1: mean squared output error of each linear of one decoder block, quantized alone."""

from collections.abc import Iterable
from typing import Final

from plots.numbers import Number
from plots.records import Records, Trial
from plots.reference import LayerLoss, read
from plots.settings import Setting, by_key, or_none, order, shown
from plots.tables.table import Block, Cell, Column, Row, Table, block, captions, present

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL, BLOCKS = "qwen3_8b", (17, 18)  # the paper's "18th block", counted from 1 or from 0
UNIT = 1e3  # the table's numbers are x 1e-3
COLUMNS = tuple(Column(name, 2, lower_is_better=True) for name in LINEARS)
ON = {"calibration": "calibration tokens", "held_out": "held-out tokens"}
Key = tuple[str, int, str, str, str]  # model, decoder block, format, transform, what it was measured on


def table1(records: Records) -> Table:
    """The published block beside each of ours that may be meant, then other decoder blocks and models."""
    found = by_key(usable(records.trials), key)
    here = [(index, text) for index in BLOCKS for text in ON if any(_is(own, index, text) for own in found)]
    published = [_published_block(found, *one) for one in here or [(BLOCKS[-1], "calibration")]]
    further = [own for own in sorted(found, key=_place) if not _is(own, own[1], own[4])]
    rows = [row for own in further for row in _unpublished(own, found[own])]
    keys = ("model", "decoder block", "format", "transform")
    others = block(keys, COLUMNS, rows, "not in the paper", published=False, extra=("measured on",))
    return Table(
        "Table 1: layer loss, mean squared output error × 1e-3, round to nearest",
        present([*published, others]),
        captions(
            records, usable(records.trials),
            "Ours are trials with one decoder block quantized (quantize.blocks, counted from 0). The paper measures "
            "the loss on the calibration tokens (equation 1).",
        ),
    )  # fmt: skip


def usable(trials: Iterable[Trial]) -> list[Trial]:
    """Trials of one decoder block, rounded to nearest, whose layer losses were measured."""
    return [
        trial
        for trial in trials
        if trial.losses and trial.algorithm == "rtn" and trial.blocks is not None and len(trial.blocks) == 1
    ]


def key(trial: Trial) -> Key:
    """What a row is of."""
    assert trial.blocks is not None
    return trial.model, trial.blocks[0], trial.format, trial.transform or "", trial.losses_on


def numbers(setting: Setting) -> dict[str, Number]:
    """The loss x 1e3 of each linear that all of the trials have."""
    losses = {
        draw: {name: value for (_, name), value in trial.losses.of("mse").items()}
        for draw, trial in setting.draws.items()
    }
    common = [name for name in LINEARS if all(name in one for one in losses.values())]
    found = {name: Number.of({draw: one[name] * UNIT for draw, one in losses.items()}) for name in common}
    return {name: number for name, number in found.items() if number is not None}


def _is(own: Key, index: int, text: str) -> bool:
    """Whether it is what the paper has, read as that block and measured on that text."""
    return (own[0], own[1], own[4]) == (MODEL, index, text) and index in BLOCKS


def _published_block(found: dict[Key, list[Setting]], index: int, text: str) -> Block:
    rows = []
    for one in read(LayerLoss):
        published = {name: Number(getattr(one, name)) for name in LINEARS}
        for setting in or_none(found.get((MODEL, index, one.format, one.transform, text), [])):
            ours = numbers(setting) if setting else {}
            names = (one.format, f"{one.transform} {setting.note if setting else ''}".strip())
            rows.append(Row(names, tuple(Cell(published[name], ours.get(name)) for name in LINEARS), one.format))
    title = f"{shown(MODEL)}, the 18th decoder block; ours: block {index} counted from 0, on {ON[text]}"
    return block(("format", "transform"), COLUMNS, rows, title)


def _unpublished(own: Key, settings: list[Setting]) -> list[Row]:
    model, index, format_, transform, text = own
    return [
        Row(
            (shown(model), str(index), format_, f"{transform} {setting.note}".strip()),
            tuple(Cell(ours=numbers(setting).get(name)) for name in LINEARS),
            group=(model, index, format_, text),
            extra=(ON[text],),
        )
        for setting in settings
    ]


def _place(own: Key) -> tuple[object, ...]:
    return own[0], own[1], own[4], *order(own[2], "rtn", own[3])
