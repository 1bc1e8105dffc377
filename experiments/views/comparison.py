"""The comparison of two sides, as a table on the terminal and as Markdown, CSV or JSON."""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.compare import Comparison, Difference, Setting, Unpaired, compare
from experiments.schema import ConfigError
from experiments.sides import Side, counted
from experiments.store import ResultStore, write_atomically
from experiments.views.display import on_stdout

SETTINGS_SHOWN = 40
TRIALS_SHOWN = 3
REASONS_SHOWN = 6
LEGEND = (
    "B - A ± 95% interval, bootstrapped over the windows (a task's documents) of one pair, Student's t of under 30 "
    "windows and over several pairs; * excludes 0"
)


def show_comparison(store: ResultStore, a: str, b: str, output: Path | None = None) -> int:
    """Print the comparison of two sides, and write it to a .md, .csv or .json file; the exit code."""
    try:
        write = _writer(output) if output else None
        comparison = compare(store, a, b)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    console = on_stdout()
    console.print(to_terminal(comparison))
    for line in [*_left_out(comparison), LEGEND, *remarks(comparison)]:
        console.print(line, highlight=False, markup=False)
    if output and write:
        try:
            write_atomically(output, write(comparison))
        except OSError as error:
            print(f"{output}: cannot be written: {error.strerror}", file=sys.stderr)
            return 2
        console.print(f"written to {output}", highlight=False, markup=False, soft_wrap=True)
    return 0


def to_terminal(comparison: Comparison) -> Table:
    """A rich table, a line a metric of each setting; clear differences are green where B is better, else red."""
    common, varying = _columns(comparison.settings)
    heading = "\n".join([*_heading(comparison), *(f"[dim]{key}[/] {escape(value)}" for key, value in common.items())])
    table = Table(title=heading, box=SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    for column in varying:
        table.add_column(column, overflow="fold")
    for column in ("pairs", "", "A", "B", "B - A"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for setting in comparison.settings[:SETTINGS_SHOWN]:
        labels = [*(escape(setting.labels[key]) for key in varying), str(len(setting.pairs))]
        for place, one in enumerate(setting.differences):
            last = place + 1 == len(setting.differences)
            style = ("green" if one.better else "red" if one.worse else "") if one.clear else ""
            difference = f"[{style}]{_difference(one)}[/]" if style else _difference(one)
            cells = [_metric(one), _number(one, one.a), _number(one, one.b), difference]
            table.add_row(*(labels if place == 0 else [""] * len(labels)), *cells, end_section=last)
    return table


def to_markdown(comparison: Comparison) -> str:
    """A Markdown table with what could not be compared below it."""
    common, varying = _columns(comparison.settings)
    head = [*varying, "pairs", "metric", "A", "B", "B - A"]
    lines = [f"# {comparison.a.text} against {comparison.b.text}", ""]
    lines += [f"- {line}" for line in (*_sides(comparison), *(f"{key} {value}" for key, value in common.items()))]
    lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(varying)}---:|---|---:|---:|---:|"]
    for setting in comparison.settings:
        for one in setting.differences:
            labels = [*(setting.labels[key].replace("|", "\\|") for key in varying), str(len(setting.pairs))]
            cells = [
                *labels,
                _metric(one),
                _number(one, one.a),
                _number(one, one.b),
                _difference(one, star="\\*").rstrip(),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", LEGEND.replace("*", "\\*") + ".", "", *(_item(line) for line in remarks(comparison))]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(comparison: Comparison) -> str:
    """A row a metric of each setting, in the units of the records: a share for top-1, nats for KL."""
    labels = list(dict.fromkeys(key for setting in comparison.settings for key in setting.labels))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*labels, "pairs", "metric", "a", "b", "difference", "low", "high", "clear"])
    for setting in comparison.settings:
        own = [*(setting.labels.get(key, "-") for key in labels), len(setting.pairs)]
        for name, values in _plain(setting).items():
            writer.writerow([*own, name, *values.values()])
    return file.getvalue()


def to_json(comparison: Comparison) -> str:
    """All of it, with the ids of every pair and of every trial without a partner."""
    content = {
        **{name: _side(side) for name, side in (("a", comparison.a), ("b", comparison.b))},
        "differing": comparison.differing,
        "settings": [
            {
                "labels": setting.labels,
                "metrics": _plain(setting),
                "pairs": [
                    {"a": [trial.trial_id for trial in pair.a], "b": [trial.trial_id for trial in pair.b]}
                    for pair in setting.pairs
                ],
            }
            for setting in comparison.settings
        ],
        "unpaired": [
            {"side": one.side, "trial": one.trial.trial_id, "reason": one.reason} for one in comparison.unpaired
        ],
        "notes": comparison.notes,
    }
    return json.dumps(content, indent=2) + "\n"


def remarks(comparison: Comparison) -> list[str]:
    """Lines on what could not be compared, and why."""
    reasons: dict[tuple[str, str], list[Unpaired]] = {}
    for one in comparison.unpaired:
        reasons.setdefault((one.side, one.reason), []).append(one)
    lines = [f"{counted(len(comparison.unpaired), 'trial')} without a partner:"] if reasons else []
    for (side, reason), found in list(reasons.items())[:REASONS_SHOWN]:
        names = [one.trial.name for one in found[:TRIALS_SHOWN]]
        more = f" and {len(found) - TRIALS_SHOWN:,} more" if len(found) > TRIALS_SHOWN else ""
        lines.append(f"  {len(found):,} of {side}: {reason}: {'; '.join(names)}{more}")
    rest = sum(map(len, list(reasons.values())[REASONS_SHOWN:]))
    return [*lines, *([f"  {rest:,} for other reasons (all: --output FILE.json)"] if rest else []), *comparison.notes]


def _writer(output: Path) -> Callable[[Comparison], str]:
    writers = {".md": to_markdown, ".csv": to_csv, ".json": to_json}
    if output.suffix not in writers:
        raise ConfigError(f"--output {output}: should end in {', '.join(writers)}")
    return writers[output.suffix]


def _left_out(comparison: Comparison) -> list[str]:
    hidden = len(comparison.settings) - SETTINGS_SHOWN
    return [f"and {counted(hidden, 'setting')} more (all: --output FILE.md)"] if hidden > 0 else []


def _columns(settings: Sequence[Setting]) -> tuple[dict[str, str], list[str]]:
    """The labels that all settings share, and the names of the others."""
    names = dict.fromkeys(key for setting in settings for key in setting.labels)
    values = {key: {setting.labels[key] for setting in settings} for key in names}
    return {key: next(iter(own)) for key, own in values.items() if len(own) == 1}, [
        key for key, own in values.items() if len(own) > 1
    ]


def _heading(comparison: Comparison) -> list[str]:
    return [f"[bold]{line[0]}[/]{escape(line[1:])}" for line in _sides(comparison)[:2]] + [
        escape(_sides(comparison)[2])
    ]


def _sides(comparison: Comparison) -> list[str]:
    return [
        *(f"{n}  {s.text} ({counted(len(s.trials), 'trial')})" for n, s in (("A", comparison.a), ("B", comparison.b))),
        f"partners differ in {', '.join(comparison.differing)}",
    ]


def _item(line: str) -> str:
    """A line of a Markdown list, as far in as it was."""
    text = line.lstrip()
    return f"{' ' * (len(line) - len(text))}- {text}"


def _metric(one: Difference) -> str:
    return f"{one.metric.name}, {one.metric.unit}" if one.metric.unit else one.metric.name


def _number(one: Difference, value: float) -> str:
    return f"{value:.{one.metric.digits}f}"


def _difference(one: Difference, star: str = "*") -> str:
    digits = one.metric.digits
    mean = f"{0.0 if abs(one.mean) < 0.5 * 10**-digits else one.mean:+.{digits}f}"
    if one.interval is None:
        return mean
    return f"{mean} ± {one.interval.margin(one.mean):.{digits}f}{star if one.clear else ' '}"


def _plain(setting: Setting) -> dict[str, dict[str, Any]]:
    return {one.metric.key: _in_units_of_records(one) for one in setting.differences}


def _in_units_of_records(one: Difference) -> dict[str, Any]:
    ends = (one.interval.low, one.interval.high) if one.interval else (None, None)
    names = ("a", "b", "difference", "low", "high")
    values = zip(names, (one.a, one.b, one.mean, *ends), strict=True)
    return {name: None if value is None else value / one.metric.scale for name, value in values} | {"clear": one.clear}


def _side(side: Side) -> dict[str, Any]:
    return {"text": side.text, "trials": len(side.trials), "unfinished": side.unfinished}
