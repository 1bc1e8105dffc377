"""The numbers that the paper claims in words, each with its place, what its tables say, ours beside it, and a verdict.

`python -m plots claims` writes plots/out/claims.md. What is ordered rather than counted is in `plots.verdicts`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from plots import figure2, platinum_tasks
from plots.numbers import Number, difference
from plots.records import BASELINE, Records, Trial
from plots.reference import LmEval, Platinum, Speedup, Unreadable, read
from plots.settings import MODELS, NAMES, Method, Selection, Setting, select, select_by, shown
from plots.tables import lm_eval
from plots.tables.render import number as told_number
from plots.tables.table import SOURCE, ours
from wush.intervals import Interval
from wush_kernels.bench.record import RESULTS

COSTS = Path(__file__).parents[1] / "experiments" / "benchmarks" / "results"  # seconds of a decoder block on a GPU
WINDOWS = 1024  # of calibration, as the paper has
HOLDS, AGAINST, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
RULES = """\
Ours is of the paper's model where that was run, else of the small models that were ("at small scale", on other tasks
and texts). A claim holds or does not where the 95% interval of ours is on one side of what is asked, and is undecided
else: a gain is to be above 0, whatever its size, the gap at most as large as published, the recovery above 98%. Of
layer losses every linear counts. Speeds of another GPU than the paper's are shown, and only their difference is
judged.
"""
Averages = Mapping[str, Mapping[Method, Number]]  # model, then method: average over tasks in percent
Asked = Callable[[Mapping[Method, Number]], Number | None]
H_RTN, WUSH_RTN, NVFP4_RTN = (("mxfp4", "rtn", "h"), ("mxfp4", "rtn", "wush"), ("nvfp4", "rtn", "wush"))
H_GPTQ, MR_GPTQ, WUSH_GPTQ = (("mxfp4", "gptq", "h"), ("mxfp4", "mr_gptq", "h"), ("mxfp4", "gptq", "wush"))


@dataclass(frozen=True)
class Claim:
    """A line of the table."""

    text: str
    place: str
    published: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class Accuracy:
    """A claim on averages over tasks: `asked` makes its number of a model's methods, which is to be above `limit`.

    `below`: it is to be at most that. `platinum`: of the Platinum Benchmarks, else of the Harness.
    """

    text: str
    place: str
    stated: str
    model: str
    asked: Asked
    limit: float = 0.0
    below: bool = False
    platinum: bool = False


def _gain(better: Method, worse: Method) -> Asked:
    """Points that one method is above another, in pairs."""

    def asked(own: Mapping[Method, Number]) -> Number | None:
        if better not in own or worse not in own:
            return None
        return Number(own[better].mean - own[worse].mean, interval=difference(own[worse], own[better]))

    return asked


def _recovery(own: Mapping[Method, Number]) -> Number | None:
    """Percent of the original's average."""
    original = own.get((BASELINE, None, None))
    if original is None or WUSH_RTN not in own or not original.mean:
        return None
    factor, gap = 100 / original.mean, difference(original, own[WUSH_RTN])
    interval = Interval(100 + factor * gap.low, 100 + factor * gap.high) if gap else None
    return Number(factor * own[WUSH_RTN].mean, interval=interval)


POINTS = "WUSH over Hadamard in MXFP4"
ACCURACIES: Final = (
    Accuracy(f"{POINTS}, RTN", "abstract, section 1; Table 2", "+2.8", "Llama-3.1-8B-Instruct", _gain(WUSH_RTN, H_RTN)),
    Accuracy(f"{POINTS}, GPTQ (MR-GPTQ)", "abstract, section 1; Table 2", "+0.7", "Llama-3.1-8B-Instruct",
             _gain(WUSH_GPTQ, MR_GPTQ)),
    Accuracy(f"{POINTS}, RTN, Platinum", "section 6.2; Figure 3", "up to +1.3", "Qwen3-8B", _gain(WUSH_RTN, H_RTN),
             platinum=True),
    Accuracy(f"{POINTS}, GPTQ, Platinum", "section 6.2; Figure 3", "up to +0.7", "Qwen3-8B",
             _gain(WUSH_GPTQ, H_GPTQ), platinum=True),
    Accuracy("NVFP4 over MXFP4, both WUSH with RTN", "section 6.2; Table 3", "0.36", "Qwen3-14B",
             _gain(NVFP4_RTN, WUSH_RTN), limit=0.36, below=True),
    Accuracy("recovery in MXFP4, WUSH with RTN, percent", "section 6.2; Table 3", "above 98", "Qwen3-14B", _recovery,
             limit=98.0),
)  # fmt: skip


def document(records: Records) -> str:
    """All claims in Markdown."""
    return "\n".join(["# Claims", "", f"Published: {SOURCE}. {ours(records.trials)}", "", RULES, table(records), ""])


def table(records: Records) -> str:
    """A line a claim."""
    lines = [_row(("claim", "where", "published", "ours", "verdict")), _row(["---"] * 5)]
    lines += [_row((one.text, one.place, one.published, one.ours, one.verdict)) for one in claims(records)]
    return "\n".join(lines)


def claims(records: Records) -> list[Claim]:
    """In the paper's order, accuracies first."""
    return [*accuracies(records), *_speeds(), _overhead(), _blocks(records), _datasets(records)]


def accuracies(records: Records) -> list[Claim]:
    """What is claimed of averages over tasks."""
    own = {True: _drawn(records), False: _harness(records)}
    return [_accuracy(one, own[one.platinum]) for one in ACCURACIES]


def _accuracy(one: Accuracy, measured: Averages) -> Claim:
    published = one.asked(_published(one))
    assert published is not None
    known = {model: number for model, methods in measured.items() if (number := one.asked(methods))}
    small = {model: number for model, number in known.items() if model not in MODELS}
    if one.model in known:
        found, scale = {one.model: known[one.model]}, ""
    else:
        found, scale = small, " at small scale"
    words = dict.fromkeys(_verdict(number, one) + scale for number in found.values())
    numbers = "; ".join(f"{told_number(number, 2)} ({model})" for model, number in found.items())
    text = (
        f"{one.text}, {one.model}"
        if not one.platinum
        else f"{one.text.removesuffix(', Platinum')}, {one.model}, Platinum"
    )
    return Claim(text, one.place, f"{one.stated} (by the table {published.mean:.2f})", numbers or NOT_RUN,
                 "; ".join(words) or NOT_RUN)  # fmt: skip


def _verdict(number: Number, one: Accuracy) -> str:
    interval = number.interval
    if interval is None:
        return UNDECIDED
    if interval.low > one.limit or interval.high < one.limit:
        return HOLDS if (interval.low > one.limit) != one.below else AGAINST
    return UNDECIDED


def _published(one: Accuracy) -> dict[Method, Number]:
    rows: list[LmEval] | list[Platinum] = read(Platinum) if one.platinum else read(LmEval)
    return {row.method: Number(row.average) for row in rows if row.model == one.model}


def _harness(records: Records) -> Averages:
    """Of each model and its tasks; of several sets of tasks the first that has most methods."""
    found: dict[str, dict[Method, Number]] = {}
    for (model, suite), trials in lm_eval.suites(lm_eval.tasked(records)).items():
        columns: lm_eval.Columns = lm_eval.OPEN_LLM if model in NAMES else {task: (task,) for task in suite}
        own = _averages(select(trials, by_tasks=True).settings, columns)
        if len(own) > len(found.get(shown(model), {})):
            found[shown(model)] = own
    return found


def _drawn(records: Records) -> Averages:
    return {shown(suite.model): _averages(suite.settings, suite.columns) for suite in platinum_tasks.suites(records)}


def _averages(settings: Mapping[Method, Setting], columns: lm_eval.Columns) -> dict[Method, Number]:
    found = {one: lm_eval.scores(setting, columns).average for one, setting in settings.items()}
    return {one: number for one, number in found.items() if number}


def _speeds() -> list[Claim]:
    """Layers over BF16, and WUSH against Hadamard; another GPU's ratios are shown, not judged."""
    layers, record = read(Speedup), figure2.newest(RESULTS)
    series = figure2.measured(record, layers).series if record else []
    fastest = max((one for one in series[2][2] if one), default=None) if series else None
    gap = figure2.behind(series) if series else None
    on = f" ({record.environment['gpu']})" if record else ""
    known = figure2.behind(figure2.published(layers)) or 0.0
    word = NOT_RUN if gap is None else f"{HOLDS if gap <= known else AGAINST}, on another GPU"
    most = max(layer.wush_quantize_matmul for layer in layers)
    return [
        Claim("fastest layer with WUSH over BF16, M = 1,024", "abstract, section 5; Figure 2",
              f"up to 5.8 (by the figure {most:.2f}, RTX 5090)", f"{fastest:.2f}{on}" if fastest else NOT_RUN,
              "not comparable, another GPU" if fastest else NOT_RUN),
        Claim("layers with WUSH slower than with Hadamard, on average", "section 5; Figure 2",
              f"1.3% (by the figure {known:.2%})", NOT_RUN if gap is None else f"{gap:.2%}{on}", word),
    ]  # fmt: skip


def _overhead() -> Claim:
    """What fitting transforms adds to GPTQ, by measured decoder blocks; it does not depend on the number of tokens."""
    found = [told for path in sorted(COSTS.glob("*.json")) if (told := overhead(path))]
    return Claim("what WUSH adds to the time of GPTQ", "section 3", "negligible (no number)",
                 "; ".join(found) or NOT_RUN, "measured; the paper has no number" if found else NOT_RUN)  # fmt: skip


def overhead(path: Path) -> str:
    """Seconds that WUSH adds to GPTQ with Hadamard, over those of the latter extended to `WINDOWS` windows.

    Raises `Unreadable` for a file that is no record of `python -m experiments.benchmarks.cost`.
    """
    try:
        content = json.loads(path.read_text())
        seconds = {
            one["transform"]: {int(tokens): float(value) for tokens, value in one["seconds"].items()}
            for one in content["quantizing"]
            if one["algorithm"] == "gptq"
        }
        h, wush, device = seconds["h"], seconds["wush"], content["device"]
        (few, first), (many, last) = sorted(h.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"{path}: no record of what a decoder block costs: {error!r}; restore or remove it") from error
    whole = last + (last - first) / (many - few) * (WINDOWS * 2048 - many)
    added = sorted((wush[tokens] - h[tokens]) / whole for tokens in h)
    return f"{added[0]:.1%} to {added[-1]:.1%} at {WINDOWS:,} windows ({device}, blocks of Llama-3.1-8B's shape)"


def _blocks(records: Records) -> Claim:
    """Layer losses of whole models, each decoder block's."""
    trials = [one for one in _with_losses(records) if one.whole]
    found = {shown(model): own for model, own in select_by(trials, lambda trial: trial.model).items()}
    return _consistent("blocks", {model: _singles(own) for model, own in found.items()})


def _datasets(records: Records) -> Claim:
    """Layer losses by calibration set, of models and blocks of which there are several."""
    found = select_by(_with_losses(records), lambda trial: (trial.model, trial.blocks, trial.calibration))
    sets: dict[object, list[str]] = defaultdict(list)
    for model, blocks, name in found:
        sets[model, blocks].append(name or "")
    several = {one: own for one, own in found.items() if len(sets[one[:2]]) > 1}
    return _consistent("datasets", {f"{shown(one[0])}, {one[2]}": _singles(own) for one, own in several.items()})


def _with_losses(records: Records) -> list[Trial]:
    return [one for one in records.trials if one.losses and not one.baseline and one.algorithm == "rtn"]


def _singles(selection: Selection) -> dict[Method, Trial]:
    return {one: setting.first for one, setting in selection.settings.items()}


def _consistent(across: str, found: Mapping[str, Mapping[Method, Trial]]) -> Claim:
    """In how many linears WUSH has the lowest loss, in NVFP4 WUS aside, which it is to equal."""
    told, best, whole = [], 0, 0
    for label, methods in found.items():
        for fmt in ("mxfp4", "nvfp4", "int4"):
            own = {one[2] or "": trial for one, trial in methods.items() if one[0] == fmt}
            if "wush" in own and len(own) > 1:
                text, count, of = _lowest(fmt, own)
                told.append(f"{text} ({label})")
                best, whole = best + count, whole + of
    word = HOLDS if best == whole else f"{HOLDS} in part" if 2 * best > whole else AGAINST
    text = f"Table 1 is consistent across {across}: WUSH has the lowest loss (in NVFP4 with WUS)"
    scale = "" if any(label.startswith(tuple(MODELS)) for label in found) else " at small scale"
    return Claim(text, "section 6.1", "yes, not shown", "; ".join(told) or NOT_RUN,
                 f"{word}{scale}" if whole else NOT_RUN)  # fmt: skip


def _lowest(fmt: str, own: Mapping[str, Trial]) -> tuple[str, int, int]:
    """A sentence, the linears in which WUSH's loss is the lowest, and of how many."""
    rivals = [name for name in own if name != "wush" and not (fmt == "nvfp4" and name == "wus")]
    losses = {name: trial.losses.of("mse") for name, trial in own.items()}
    layers = [one for one in losses["wush"] if all(one in losses[name] for name in own)]
    best = sum(all(losses["wush"][one] < losses[name][one] for name in rivals) for one in layers)
    ratio = [losses["wush"][one] / losses["wus"][one] for one in layers] if fmt == "nvfp4" and "wus" in losses else []
    over = f", {median(ratio):.2f} of WUS in the median" if ratio else ""
    blocks = len({block for block, _ in layers})
    return f"{fmt.upper()} {best} of {len(layers)} linears in {blocks} blocks{over}", best, len(layers)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
