"""How each published table and figure stands: whether our records have the same orderings, with the numbers.

`python -m plots verdicts` writes plots/out/verdicts.md. The rules are those of `plots.orderings`.
"""

from collections import defaultdict

from plots.items import items
from plots.numbers import Number
from plots.orderings import (
    HOLDS,
    NOT_YET,
    OPEN,
    REVERSED,
    UNDECIDED,
    Check,
    Verdict,
    best_of_parts,
    judge,
)
from plots.records import Records
from plots.reference import Speedup, read
from plots.settings import MODELS
from plots.tables.render import number
from plots.tables.storage import agreement, of_model
from plots.tables.table import ours

RULES = """\
An ordering of two methods is the paper's where the published gap is larger than the root sum of squares of the stated
standard deviations (any gap, where none is stated) and all published models with such a gap agree. Ours holds or is
reversed where the 95% interval of the difference excludes 0, and is undecided else. The interval is that of pairs
where both methods have them: of the same seeds (Student's t), of the same evaluated windows (bootstrap, or Student's t
of under 30), of the same documents of a task (Agresti and Min's of right and wrong answers, else bootstrap; averages
of tasks by their intervals); else that of two independent numbers. Where
nothing was kept that tells an interval, an ordering is undecided; but layer losses of single trials are what they are
for their tokens, and any gap counts. Reproduced with the same ordering: some hold, none is reversed. In part: more
hold than are reversed. Contradicted: at least as many are reversed. Not yet: none is decided. Of 20 orderings in
which nothing differs one is clear by chance. Methods are compared with the latest version of the method and with the
calibration, evaluation and quantize settings that most of a model's methods share. The best of a part is compared
with that of the same model in the paper, or else with the one that all of the paper's models agree on. Our models and
texts are not the paper's, unless they are named as such: this compares orders, never numbers.
"""
STATES = (HOLDS, REVERSED, UNDECIDED, OPEN)
WITHOUT = "figures 1, 4, 5, 6"


def document(records: Records) -> str:
    """All verdicts in Markdown: a summary, then every ordering of each item."""
    verdicts = judged(records)
    lines = ["# Verdicts", "", ours(records.trials), *(f"Left out: {note}." for note in records.notes), "", RULES]
    lines += [_row(("item", "verdict", "numbers")), _row(["---"] * 3)]
    lines += [_row(line) for line in summary(verdicts)]
    lines += [_row((WITHOUT, "-", "drawn from theory and our own models: no published numbers to compare with")), ""]
    for one in verdicts:
        lines += _section(one)
    return "\n".join(lines)


def judged(records: Records) -> list[Verdict]:
    """Every item's."""
    return [judge(item) for item in items(records)]


def summary(verdicts: list[Verdict]) -> list[tuple[str, str, str]]:
    """Item, verdict and numbers of each, and of what is not ordered."""
    return [*((one.item.name, told(one), numbers(one)) for one in verdicts), _storage(), _speed()]


def told(verdict: Verdict) -> str:
    """The verdict, and that it is at small scale where no model of the paper was compared."""
    models = {check.model for check in verdict.checks if check.model}
    small = models and not any(model.startswith(tuple(MODELS)) for model in models)
    return verdict.word.replace("reproduced", "reproduced at small scale") if small else verdict.word


def numbers(verdict: Verdict) -> str:
    """How many orderings hold, are reversed, undecided and open, and on which models."""
    holds, decided = verdict.count(HOLDS), verdict.count(HOLDS) + verdict.count(REVERSED)
    models = dict.fromkeys(check.model for check in verdict.checks if check.model)
    parts = [f"{holds} of {decided} decided orderings hold" if decided else "no ordering decided"]
    same, other, undecided = best_of_parts(verdict.item)
    within = f" ({undecided} more undecided)" if undecided else ""
    parts += [f"the best is the same in {same} of {same + other} parts{within}"] if same + other else []
    parts += [_undecided(verdict)] if verdict.count(UNDECIDED) else []
    parts += [f"{verdict.count(OPEN)} not run"] if verdict.count(OPEN) else []
    return ", ".join(parts) + (f"; ours: {'; '.join(models)}" if models else "")


def _undecided(verdict: Verdict) -> str:
    blind = sum(check.state == UNDECIDED and check.interval is None for check in verdict.checks)
    without = f" ({blind} of them without an interval)" if blind else ""
    return f"{verdict.count(UNDECIDED)} undecided{without}"


def _storage() -> tuple[str, str, str]:
    agrees = agreement(of_model)
    same = len(set(agrees.split(" of "))) == 1
    word = "reproduced by arithmetic" if same else NOT_YET
    return "table7", word, f"{agrees} published numbers follow from the models' shapes"


def _speed() -> tuple[str, str, str]:
    from plots.figure2 import measured, newest
    from wush_kernels.bench.record import RESULTS

    layers, record = read(Speedup), newest(RESULTS)
    if record is None:
        return "figure2", NOT_YET, "no record of a GPU"
    whole = [(label.partition(" ")[0], ratios) for label, _, ratios in measured(record, layers).series[2:]]
    faster = [f"{label} {_counted([one > 1 for one in ratios if one])}" for label, ratios in whole]
    published = _counted([layer.wush_quantize_matmul > 1 for layer in layers])
    both = f"published (RTX 5090) {published}, ours ({record.environment['gpu']}) {', '.join(faster)}"
    return "figure2", NOT_YET, f"not comparable, another GPU; layers faster than BF16: {both}"


def _counted(true: list[bool]) -> str:
    return f"{sum(true)} of {len(true)}"


def _section(verdict: Verdict) -> list[str]:
    """A row for each pair of methods of a format, all its linears or tasks together."""
    grouped: dict[tuple[str, str, str], list[Check]] = defaultdict(list)
    for check in verdict.checks:
        part = check.part.partition(" ")[0] if _by_part(verdict) else check.part
        grouped[part, check.better, check.worse].append(check)
    lines = [f"## {verdict.item.name}: {told(verdict)}", "", f"{verdict.item.what}; {numbers(verdict)}.", ""]
    if verdict.item.left_out:
        lines += [f"Not compared, run with other settings: {'; '.join(verdict.item.left_out)}.", ""]
    lines += [_row(("part", "better", "worse", *STATES, "published, for example", "ours")), _row(["---"] * 9)]
    for (part, better, worse), checks in grouped.items():
        counts = [str(sum(check.state == state for check in checks)) for state in STATES]
        lines.append(_row((part, better, worse, *counts, *_example(verdict, checks))))
    return [*lines, ""]


def _example(verdict: Verdict, checks: list[Check]) -> tuple[str, str]:
    """The numbers of one check: a reversed one, if there is one."""
    check = min(checks, key=lambda check: (REVERSED, HOLDS, UNDECIDED, OPEN).index(check.state))
    digits = verdict.item.digits

    def pair(both: tuple[Number, Number]) -> str:
        return " against ".join(number(one, digits) for one in both)

    where = f"{check.part.partition(' ')[2]}: " if _by_part(verdict) else ""
    gap = f", difference {check.interval.low:.{digits}f} to {check.interval.high:.{digits}f}" if check.interval else ""
    return where + pair(check.published), f"{pair(check.ours)}{gap} ({check.model})" if check.ours else OPEN


def _by_part(verdict: Verdict) -> bool:
    """Whether the parts of a format (its linears, its tasks) are told together."""
    return verdict.item.name == "table1" or verdict.item.name.endswith("by task")


def _row(cells: "tuple[str, ...] | list[str]") -> str:
    return f"| {' | '.join(cells)} |"
