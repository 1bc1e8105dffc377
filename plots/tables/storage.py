"""Table 7: what the transforms add to a quantized model's storage, in percent.

The published numbers are the transforms, BF16 and one for each linear, over the whole quantized model: codes and
scales of the linears, and the embedding and LM head in BF16. Only this reading gives all of them, by the models'
shapes; `READINGS` has others for comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plots.numbers import Number
from plots.records import Records, Trial
from plots.reference import Storage, read
from plots.settings import MODELS, NAMES, by_key, order, shown
from plots.tables.table import Block, Cell, Column, Row, Table, block, captions, present
from wush.formats import INT4, MXFP4, MXFP8, NVFP4

BF16_BITS = 16
FORMATS = {"mxfp4": MXFP4, "nvfp4": NVFP4, "int4": INT4, "mxfp8": MXFP8}
PUBLISHED = ("mxfp4", "nvfp4")


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, from its public configuration; `tied`: the embedding is the LM head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features of each linear of a decoder block."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q": (queries, self.hidden), "k": (keys, self.hidden), "v": (keys, self.hidden),
            "o": (self.hidden, queries), "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate),
        }  # fmt: skip

    @property
    def weights(self) -> int:
        """Of all linears."""
        return self.layers * sum(out * own for out, own in self.linears.values())

    def transforms(self, group: int, of: tuple[str, ...] | None = None) -> int:
        """Values of the transforms `(N, G, G)` of the linears named, or of all."""
        return self.layers * sum(own * group for name, (_, own) in self.linears.items() if of is None or name in of)

    @property
    def embeddings(self) -> int:
        """Values of the embedding and, where it is another tensor, of the LM head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


SHAPES = {
    "Llama-3.2-3B-Instruct": Shape(3072, 8192, 28, 24, 8, 128, 128_256, tied=True),
    "Llama-3.1-8B-Instruct": Shape(4096, 14_336, 32, 32, 8, 128, 128_256, tied=False),
    "Qwen3-8B": Shape(4096, 12_288, 36, 32, 8, 128, 151_936, tied=False),
    "Qwen3-14B": Shape(5120, 17_408, 40, 40, 8, 128, 151_936, tied=False),
    "Qwen3-32B": Shape(5120, 25_600, 64, 64, 8, 128, 151_936, tied=False),
}
ONE_AN_INPUT = ("q", "o", "gate", "down")  # q/k/v and gate/up share an input, and could share a transform


def of_model(shape: Shape, format_: str) -> float:
    """The paper's reading: percent of the whole quantized model, embeddings in BF16 included."""
    linears = shape.weights * FORMATS[format_].bits_per_weight
    return 100 * BF16_BITS * _stored(shape, format_) / (linears + BF16_BITS * shape.embeddings)


def of_linears(shape: Shape, format_: str) -> float:
    """Percent of the linears' codes and scales alone."""
    return 100 * BF16_BITS * _stored(shape, format_) / (shape.weights * FORMATS[format_].bits_per_weight)


def of_linears_shared(shape: Shape, format_: str) -> float:
    """As `of_linears`, with one transform for linears that share an input."""
    values = shape.transforms(FORMATS[format_].group_size, ONE_AN_INPUT)
    return 100 * BF16_BITS * values / (shape.weights * FORMATS[format_].bits_per_weight)


READINGS: dict[str, Callable[[Shape, str], float]] = {
    "of the whole model (the paper's reading)": of_model,
    "of the linears alone": of_linears,
    "of the linears alone, transforms shared": of_linears_shared,
}
COLUMNS = tuple(Column(name, 1, unit="percent") for name in PUBLISHED)


def table7(records: Records) -> Table:
    """Measured beside published, then every reading from the shapes, then what other models store."""
    trials = usable(records)
    own = _own_block([trial for trial in trials if trial.model not in NAMES])
    blocks = present([_published_block(trials), *(_computed_block(name) for name in READINGS), own])
    more = (
        "The readings are arithmetic from the models' shapes, with BF16 transforms (N, G, G); agreement of the first: "
        f"{agreement(of_model)}, of the others: {', '.join(agreement(one) for one in list(READINGS.values())[1:])}."
    )
    return Table("Table 7: storage of the transforms", blocks, captions(records, trials, more))


def usable(records: Records) -> list[Trial]:
    """Whole models with transforms that are stored and with all linears quantized: bits count those that are not."""
    known = [one for one in records.whole if one.format in FORMATS and one.metrics.quantized_share == 1]
    return [trial for trial in known if trial.metrics.bits_per_weight > FORMATS[trial.format].bits_per_weight]


def agreement(reading: Callable[[Shape, str], float]) -> str:
    """How many published numbers a reading gives to their last digit."""
    found = [
        round(reading(SHAPES[one.model], name), 1) == getattr(one, f"{name}_percent")
        for one in read(Storage)
        for name in PUBLISHED
    ]
    return f"{sum(found)} of {len(found)}"


def stored_percent(trial: Trial) -> float:
    """What the trial's transforms add to its linears' codes and scales, by its bits a weight."""
    bits = FORMATS[trial.format].bits_per_weight
    return 100 * (trial.metrics.bits_per_weight - bits) / bits


def _stored(shape: Shape, format_: str) -> int:
    return shape.transforms(FORMATS[format_].group_size)


def _of_whole(trial: Trial) -> float:
    """The trial's transforms in the paper's reading."""
    shape, bits = SHAPES[shown(trial.model)], FORMATS[trial.format].bits_per_weight
    extra = (trial.metrics.bits_per_weight - bits) * shape.weights
    return 100 * extra / (bits * shape.weights + BF16_BITS * shape.embeddings)


def _published_block(trials: list[Trial]) -> Block:
    known = [trial for trial in trials if trial.model in NAMES and trial.transform == "wush"]
    found = by_key(known, lambda trial: (trial.model, trial.format))
    rows = []
    for one in read(Storage):
        settings = [found.get((MODELS[one.model], name), []) for name in PUBLISHED]
        plain = [next(iter(own), None) for own in settings]
        cells = tuple(
            Cell(Number(getattr(one, f"{name}_percent")), setting.number(_of_whole) if setting else None)
            for name, setting in zip(PUBLISHED, plain, strict=True)
        )
        rows.append(Row((one.model,), cells))
    return block(("model",), COLUMNS, rows, "percent of the whole model, by records")


def _computed_block(name: str) -> Block:
    rows = []
    for one in read(Storage):
        values = [(getattr(one, f"{own}_percent"), READINGS[name](SHAPES[one.model], own)) for own in PUBLISHED]
        agrees = all(round(value, 1) == published for published, value in values)
        cells = tuple(Cell(Number(published), Number(value)) for published, value in values)
        rows.append(Row((one.model,), cells, extra=("yes" if agrees else "no",)))
    columns = tuple(Column(column.name, 2, unit=column.unit) for column in COLUMNS)
    return block(("model",), columns, rows, f"percent {name}, computed from the shapes", extra=("agrees",))


def _own_block(trials: list[Trial]) -> Block:
    found = by_key(trials, lambda trial: (trial.model, trial.format, trial.algorithm or "", trial.transform or ""))
    rows = []
    for own in sorted(found, key=lambda one: (one[0], order(one[1], one[2], one[3]))):
        for setting in found[own]:
            cells = (
                Cell(ours=setting.number(stored_percent)),
                Cell(ours=setting.number(lambda one: one.metrics.bits_per_weight)),
            )
            rows.append(Row((*own[:3], f"{own[3]} {setting.note}".strip()), cells))
    columns = (Column("of the linears alone", 2, unit="percent"), Column("bits a weight", 3))
    keys = ("model", "format", "algorithm", "transform")
    return block(keys, columns, rows, "not in the paper, by records", published=False)
