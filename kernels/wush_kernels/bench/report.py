"""A record for the eye: tables of at most 100 columns on a terminal, and the same numbers as Markdown.

A measurement that failed is shown as such in every table, never as a number.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wush_kernels.bench import promises
from wush_kernels.bench.layers import NOT_KEPT
from wush_kernels.bench.measurement import ADDMM, BF16, FP8, HADAMARD, OURS, Measurement
from wush_kernels.bench.record import Record
from wush_kernels.bench.shapes import JOINED, MODELS

WIDTH = 100
MARKS = ("<!-- results -->", "<!-- /results -->")
COMPARED_TOKENS = 1024  # as in the paper's Figure 2
SHOWN = 20  # lines of a list; how many more there are is said
VARIANTS = ("mxfp4", "nvfp4", NOT_KEPT)
_STYLES = {"MISSED": "red", "FAILED": "bold red", "in part": "yellow", "not measured": "dim"}


def console() -> Console:
    """Standard output, no wider than the tables are made for."""
    made = Console(highlight=False)
    return made if made.is_terminal and made.width <= WIDTH else Console(highlight=False, width=WIDTH)


def lines(title: str, measurements: Sequence[Measurement]) -> list[Table | Text]:
    """One line a measurement, and below them what went wrong."""
    table = _table(title, ["", "MxOxI", "us", "+-%", "bench", "GB/s", "TFLOP/s", "x BF16", "x FP8", "roof", "error"])
    for one in measurements:
        timing = one.timings.get(OURS)
        ratio = one.ratio(ADDMM) if ADDMM in one.timings else one.ratio(BF16)
        table.add_row(
            one.variant,
            one.shape.replace(" ", ""),
            _number(one.us, _us),
            _number(50 * (timing.slowest - timing.fastest) / timing.us if timing else None, "{:.0f}".format),
            _number(timing.do_bench if timing else None, _us),
            _number(one.gbs, "{:.0f}".format),
            _number(one.tflops, "{:.0f}".format),
            _number(ratio, "{:.2f}".format),
            _number(one.ratio(FP8), "{:.2f}".format),
            _number(one.roofline, "{:.0%}".format),
            _error(one),
            style="red" if one.failure else None,
        )
    return [table, *(Text(f"  {one.label}: {one.failure}", style="red") for one in measurements if one.failure)]


def ratios(record: Record, variant: str) -> Table | None:
    """Ratios of whole layers to BF16: a row for each shape, a column for each M."""
    rows = ratio_rows(record, variant)
    if not rows:
        return None
    tokens = sorted({one.tokens for row in rows.values() for one in row})
    table = _table(f"{variant} layers: ratio to BF16 by M", ["OxI", *(str(number) for number in tokens)])
    for (outputs, features), row in rows.items():
        by_tokens = {one.tokens: one for one in row}
        cells = [_ratio_cell(by_tokens.get(number)) for number in tokens]
        table.add_row(f"{outputs}x{features}", *cells)
    return table


def ratio_rows(record: Record, variant: str) -> dict[tuple[int, int], list[Measurement]]:
    """The layers of a format by `(O, I)`."""
    rows: dict[tuple[int, int], list[Measurement]] = {}
    for one in record.of("layers"):
        if one.variant == variant:
            rows.setdefault((one.out_features, one.in_features), []).append(one)
    return rows


def behind_hadamard(record: Record, variant: str) -> list[float]:
    """How far each layer is behind the same with one Hadamard matrix, as a share of its speed, at `COMPARED_TOKENS`."""
    own = [one for one in record.of("layers") if one.variant == variant and one.tokens == COMPARED_TOKENS]
    found = [one.ratio(HADAMARD) for one in own if not one.failure]
    return [1 - ratio for ratio in found if ratio is not None]


def against_hadamard(record: Record) -> str:
    """What a transform for each block costs against one Hadamard matrix, a sentence a format; empty if not measured."""
    found = {variant: gaps for variant in VARIANTS[:2] if (gaps := behind_hadamard(record, variant))}
    return " ".join(
        f"{variant.upper()} layers with a transform for each block are {fmean(gaps):.1%} slower on average than with "
        f"one Hadamard matrix for all, {min(gaps):.1%} to {max(gaps):.1%} "
        f"(M = {COMPARED_TOKENS:,}, {len(gaps)} layers)."
        for variant, gaps in found.items()
    )


def promised(record: Record) -> list[Table | Text]:
    """Every promise with its verdict; below, the roofline of those missed, and the layers slower than BF16."""
    found = promises.outcomes(record)
    table = _table("what is promised, the worst case of each", ["promise", "target", "measured", ""])
    for one in found:
        table.add_row(one.promise.name, one.promise.target, one.said, one.verdict, style=_STYLES.get(one.verdict))
    below: list[Text] = []
    for one in found:
        if one.where and one.verdict != "met":
            below.append(Text(f"  {one.promise.name}\n    {_reason(one)}"))
    slow = promises.slow_layers(record)
    if record.of("layers"):
        below.append(Text(f"MXFP4 layers slower than BF16 by more than 5%: {len(slow) or 'none'}"))
    ratios = [layer.failure or _number(layer.ratio(BF16), "{:.2f}x".format) for layer in slow]
    below += _listed(f"  {one.shape}: {ratio} ({one.path})" for one, ratio in zip(slow, ratios, strict=True))
    return [table, *below]


def model_table(record: Record) -> Table | None:
    """Tokens a second of the whole model, both formats."""
    if not record.of("model"):
        return None
    table = _table("8B-shaped model", ["", "how", "blocks", "BF16 tokens/s", "MXFP4 tokens/s", "ratio"])
    for one in record.of("model"):
        table.add_row(*_model_cells(one), style="red" if one.failure else None)
    return table


def header(record: Record) -> str:
    """The machine and its ceilings, in three lines."""
    own, ceilings = record.environment, record.ceilings
    reads = f", products read at up to {ceilings.read_gbs:.0f} GB/s" if ceilings.read_gbs else ""
    commit = f"{(own['git_commit'] or 'unknown')[:12]}{', with changes' if own['git_changes'] else ''}"
    return (
        f"{own['gpu']}, driver {own['driver']}, CUDA {own['cuda']}, torch {own['torch']}, Triton {own['triton']}\n"
        f"copy {ceilings.copy_gbs:.0f} GB/s{reads}, BF16 {ceilings.bf16_tflops:.0f} TFLOP/s, FP8 "
        f"{ceilings.fp8_tflops:.0f} TFLOP/s, measured here; cold cache; medians of CUDA graph replays\n"
        f"{own['date']}, commit {commit}, sources {(own.get('source_sha256') or 'unknown')[:16]}"
    )


def caveats(record: Record) -> list[str]:
    """What of a full run a record lacks."""
    found = []
    if not record.finished:
        found.append("the run did not come to its end")
    if record.settings.get("quick"):
        found.append("a quick run, of a few of each kind")
    if failed := record.failed():
        found.append(f"{len(failed)} of {len(record.measurements)} measurements failed")
    return found


def summary(record: Record) -> list[Table | Text]:
    """What the run comes to: ratios by M, the model, the promises, failures."""
    tables = [*(ratios(record, variant) for variant in VARIANTS), model_table(record)]
    shown: list[Table | Text] = [table for table in tables if table]
    shown += [Text(text) for text in [against_hadamard(record)] if text]
    shown += promised(record)
    failed = record.failed()
    if failed:
        shown.append(Text(f"{len(failed)} of {len(record.measurements)} measurements failed:", style="red"))
        shown += _listed((f"  {one.section}: {one.label}: {one.failure}" for one in failed), "red")
    return shown


def markdown(record: Record) -> str:
    """Promises, ratios of the joined layers and the model as Markdown, for a README."""
    parts = ["\n".join(f"{line}  " for line in header(record).splitlines())]
    parts += [f"{'; '.join(found).capitalize()}." for found in [caveats(record)] if found]
    found = promises.outcomes(record)
    rows = [[one.promise.name, one.promise.target, one.said, one.verdict] for one in found]
    parts.append(_markdown_table(["promise, its worst case", "target", "measured", ""], rows))
    missed = [f"- {one.promise.name}: {_reason(one)}" for one in found if one.where and one.verdict != "met"]
    if missed:
        parts.append("Not met:\n\n" + "\n".join(missed))
    for variant in VARIANTS:
        parts += _markdown_ratios(record, variant)
    parts += [text for text in [against_hadamard(record)] if text]
    if record.of("model"):
        cells = [_model_cells(one) for one in record.of("model")]
        parts.append(_markdown_table(["", "how", "blocks", "BF16 tokens/s", "MXFP4 tokens/s", "ratio"], cells))
    return "\n\n".join(parts) + "\n"


def with_results(text: str, table: str) -> str:
    """A Markdown text with the table between its marks; raises `ValueError` for a text without them."""
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"no place for the table: the lines {MARKS[0]} and {MARKS[1]} are missing")
    return f"{before}{start}\n{table}{end}{after}"


def joined_layers(record: Record, variant: str, model: str) -> dict[str, list[Measurement]]:
    """A model's layers of a format by linear, those that share an input joined; by M."""
    found: dict[str, list[Measurement]] = {}
    for linear in JOINED:
        user = f"{model} {linear}"
        own = [one for one in record.of("layers") if one.variant == variant and user in one.used_by]
        if own:
            found[linear] = sorted(own, key=lambda one: one.tokens)
    return found


def _markdown_ratios(record: Record, variant: str) -> list[str]:
    rows, tokens = [], sorted({one.tokens for one in record.of("layers") if one.variant == variant})
    for model in MODELS:
        for linear, own in joined_layers(record, variant, model).items():
            by_tokens = {one.tokens: one for one in own}
            shape = f"{own[0].out_features} x {own[0].in_features}"
            cells = [_ratio(by_tokens.get(number)) for number in tokens]
            rows.append([model, linear, shape, *cells])
    if not rows:
        return []
    head = ["model", "linear", "O x I", *(f"M = {number}" for number in tokens)]
    fmt, comma, rest = variant.partition(",")
    return [f"{fmt.upper()} layers{comma}{rest}, ratio to BF16:\n\n{_markdown_table(head, rows)}"]


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _model_cells(one: Measurement) -> list[str]:
    bf16 = one.tokens * 1e6 / one.timings[BF16].us if BF16 in one.timings else None
    how, blocks = one.variant.removeprefix("mxfp4 "), str(one.details.get("decoder_blocks", ""))
    rates = [_number(rate, "{:,.0f}".format) for rate in (bf16, one.tokens_per_second)]
    if one.failure:
        return [one.name, how, blocks, "-", "-", "FAILED"]
    return [one.name, how, blocks, *rates, _number(one.ratio(BF16), "{:.2f}x".format)]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for column in columns:
        words = column in ("", "promise", "target", "how", "MxOxI", "OxI")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def _ratio_cell(one: Measurement | None) -> Text:
    ratio = one.ratio(BF16) if one else None
    slow = ratio is None or ratio < promises.SLOWEST_LAYER or (one is not None and bool(one.failure))
    return Text(_ratio(one), style="red" if slow else "")


def _ratio(one: Measurement | None) -> str:
    if one is None:
        return "-"
    return "FAILED" if one.failure else _number(one.ratio(BF16), "{:.2f}".format)


def _reason(one: promises.Outcome) -> str:
    return f"{one.where}: {one.roofline}" if one.roofline else one.where


def _listed(texts: Iterable[str], style: str = "") -> list[Text]:
    """The first of some lines, and how many there are beside."""
    shown = list(texts)
    rest = [f"  and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return [Text(text, style=style) for text in [*shown[:SHOWN], *rest]]


def _number(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _us(value: float) -> str:
    if value >= 1e5:
        return f"{value / 1e6:.2f} s"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _error(one: Measurement) -> str:
    """The share of codes that differ, as `0 codes` or `1e-06 codes`, or the relative error of a product."""
    errors = one.errors
    if errors.mismatched is not None:
        return f"={errors.mismatched:.0e}" if errors.mismatched else "equal"
    return _number(errors.relative, "{:.1e}".format)
