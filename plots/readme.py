"""`python -m plots readme`: every number block of README.md anew from the committed records.

A block stands between `<!-- made by python -m plots readme: NAME -->` and `<!-- /NAME -->`; `BLOCKS` has the names. A
number is formatted once, from the record, so none is rounded twice.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from plots import asides, bound, claims, speeds, verdicts
from plots.chosen import chosen, ordered
from plots.heatmap import ABSENT, with_losses
from plots.numbers import Number, difference
from plots.records import Records, Trial, load
from plots.settings import ALGORITHMS, FORMATS, Method, Selection, Setting, select, select_by
from plots.style import Absent
from plots.tables.divergence import usable
from plots.tables.render import number as told_number
from plots.tables.table import INTERVALS, NOT_RUN, particular

README = Path(__file__).parents[1] / "README.md"
MAIN = asides.FOLDER / "main"  # the four trials of `make sweep`
MODEL = "smollm2_135m"
MAIN_JOB = [(fmt, "rtn", transform) for fmt in ("mxfp4", "nvfp4") for transform in ("h", "wush")]
KL_TRANSFORMS = ("i", "h", "sq", "wus", "wush")
BLOCK = re.compile(r"(<!-- made by python -m plots readme: (\w+) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
BEGUN = re.compile(r"<!-- made by python -m plots readme: (\w+) -->")
ITEMS = {
    "table1": "Table 1, layer loss",
    "table2": "Table 2, accuracy",
    "table2 by task": "Table 2, task by task",
    "table3": "Table 3, accuracy",
    "table3 by task": "Table 3, task by task",
    "table4": "Table 4, KL",
    "table5": "Table 5, calibration sets",
    "table5 platinum": "Table 5, Platinum",
    "table6": "Table 6, cost",
    "table7": "Table 7, storage",
    "figure2": "Figure 2, speed",
    "figure3": "Figures 3, 7–10, Platinum",
}


class WrongBlock(ValueError):
    """A block that is not known, or not closed; the message names it and what to do."""


def update(path: Path = README) -> list[str]:
    """Rewrite the file's blocks and return the names of those that changed; raises `WrongBlock`, `OSError`."""
    before = path.read_text(encoding="utf-8")
    after = rewritten(before, load())
    if after != before:
        path.write_text(after, encoding="utf-8")
    old, new = _contents(before), _contents(after)
    return [name for name in new if new[name] != old[name]]


def rewritten(text: str, records: Records) -> str:
    """The text with every block made anew; raises `WrongBlock` for one that is not known or not closed."""
    begun, whole = BEGUN.findall(text), _contents(text)
    for name in begun:
        if name not in BLOCKS:
            raise WrongBlock(f"block {name}: there is no such; choose from {', '.join(BLOCKS)}")
        if name not in whole:
            raise WrongBlock(f"block {name}: is not closed; write <!-- /{name} --> behind it")
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]](records)}\n\n{found[4]}", text)


def _contents(text: str) -> dict[str, str]:
    return {found[2]: found[3] for found in BLOCK.finditer(text)}


def main_table(records: Records) -> str:
    """The main job's table, by its own records or else by those of the same methods; then what it was measured on."""
    own = load([MAIN]) if any(MAIN.glob("*.json")) else records
    found = _of_model(own)
    rows = [(one, found.settings[one]) for one in MAIN_JOB if one in found.settings]
    if not rows:
        raise Absent("no record of the main job; make one with make records")
    head = ("format", "transform", "perplexity", "vs original", "KL", "top-1", "bits", "time")
    lines = [_row(head), "|---|---|---:|---:|---:|---:|---:|---:|"]
    lines += [_row((one[0], str(one[2]), *_main_cells(setting))) for one, setting in rows]
    trials = [trial for _, setting in rows for trial in setting.trials]
    first = trials[0]
    original = f"The original model's perplexity is {first.metrics.perplexity_original:.3f}."
    return "\n".join([*lines, "", f"{original} {_measured(trials)}"])


def kl_table(records: Records) -> str:
    """KL of every format and algorithm by transform; in bold a line's lowest, and what is not clearly above it."""
    found = _of_model(records).settings
    kinds = {(one[0], _algorithm(one)) for one in found}
    lines = [_row(("format", "algorithm", *KL_TRANSFORMS)), "|---|---|" + "---:|" * len(KL_TRANSFORMS)]
    for fmt in ordered({one for one, _ in kinds}, FORMATS):
        for algorithm in ordered({own for one, own in kinds if one == fmt}, ALGORITHMS):
            lines.append(_row((fmt, algorithm, *_kl_cells(found, fmt, algorithm))))
    trials = [trial for setting in found.values() for trial in setting.trials]
    return "\n".join([*lines, "", _measured(trials)])


def verdict_table(records: Records) -> str:
    """An item a line."""
    lines = [_row(("item", "verdict", "numbers")), "|---|---|---|"]
    found = {one[0]: one for one in verdicts.summary(verdicts.judged(records))}
    return "\n".join([*lines, *(_row((title, *found[name][1:])) for name, title in ITEMS.items() if name in found)])


def theory_table(records: Records) -> str:
    """By how much losses differ from each prediction, a line a format."""
    found = chosen(with_losses(records), ABSENT)
    lines = [_row(("format", *bound.PREDICTIONS.values(), "nearest")), "|---|" + "---|" * (len(bound.PREDICTIONS) + 1)]
    for fmt in found.formats:
        points = bound.Points.of(trial for trial in found.trials if trial.format == fmt)
        nearest, clear = points.nearest
        word = bound.PREDICTIONS[nearest] + ("" if clear else ", not clearly")
        lines.append(_row((fmt, *(_prediction(points, name) for name in bound.PREDICTIONS), word)))
    what = (
        "Root mean square of log(measured / predicted) with its 95% interval over linears, and the rank correlation of "
        f"both over the power of the layer's output; {len(found.transforms)} transforms. "
    )
    return "\n".join([*lines, "", what + _measured(found.trials, intervals=False)])


def _prediction(points: bound.Points, name: str) -> str:
    if name not in points:
        return "not in these records"
    interval = points.interval(name)
    return f"{points.spread(name):.2f} ({interval.low:.2f}–{interval.high:.2f}), ρ {points.spearman(name):.2f}"


def _of_model(records: Records) -> Selection:
    return select_by(usable(records), lambda trial: trial.model).get(MODEL, select([]))


def _algorithm(one: Method) -> str:
    """SmoothQuant, an algorithm in the paper's tables, is a transform with RTN."""
    return "rtn" if one[1] == "smoothquant" else str(one[1])


def _main_cells(setting: Setting) -> list[str]:
    seconds = sum(stage.seconds for stage in setting.first.stages.values())
    gap, top1 = setting.metric("gap"), setting.metric("top1").scaled(100)
    return [
        f"{setting.metric('perplexity').mean:.2f}",  # its noise is that of the text, which the difference is without
        f"{'+' if gap.mean > 0 else ''}{told_number(gap, 2)}",
        told_number(setting.metric("kl"), 4),
        f"{told_number(top1, 1)}%",
        f"{setting.first.metrics.bits_per_weight:.2f}",
        _duration(seconds),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _kl_cells(found: dict[Method, Setting], fmt: str, algorithm: str) -> list[str]:
    own: dict[str, Number] = {
        transform: setting.metric("kl")
        for one, setting in found.items()
        if (one[0], _algorithm(one)) == (fmt, algorithm) and (transform := str(setting.first.transform))
    }
    least = min(own.values(), key=lambda number: number.mean)

    def cell(transform: str) -> str:
        if transform not in own:
            return NOT_RUN
        text = told_number(own[transform], 3)
        return f"**{text}**" if len(own) > 1 and not _above(own[transform], least) else text

    return [cell(transform) for transform in KL_TRANSFORMS]


def _above(number: Number, least: Number) -> bool:
    """Whether a number is clearly above the least one."""
    gap = difference(least, number)
    return number.mean > least.mean and (gap is None or gap.low > 0)


def _measured(trials: Sequence[Trial], intervals: bool = True) -> str:
    """On which machine, with which versions, over how many predictions, and what ± is."""
    machines = sorted({_machine(trial) for trial in trials})
    predictions = sorted({trial.metrics.predictions for trial in trials})
    counts = " and ".join(f"{count:,}" for count in predictions)
    lines = [f"{len(trials)} trials on {' and '.join(machines)}, {counts} predictions each."]
    lines += [f"Original model {text}." for text in particular(trials)]
    return " ".join([*lines, *([INTERVALS] if intervals and any(trial.windows for trial in trials) else [])])


def _machine(trial: Trial) -> str:
    """The device, cores of a CPU, and the versions that numbers depend on."""
    own, versions = trial.environment, trial.versions
    cores = f", {own['cores']} cores" if trial.device.startswith("cpu") else ""
    name = f"{trial.device.removeprefix('cpu: ')}{cores}"
    python = ".".join(versions["python"].split(".")[:2])
    return f"{name} (Python {python}, torch {versions['torch'].partition('+')[0]})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


BLOCKS: Final[dict[str, Callable[[Records], str]]] = {
    "main": main_table,
    "kl": kl_table,
    "verdicts": verdict_table,
    "theory": theory_table,
    "claims": claims.table,
    "choices": lambda _: asides.choices(),
    "machines": lambda _: asides.machines(),
    "kernels": lambda _: speeds.kernels(),
    "speed": lambda _: speeds.promises(),
}
