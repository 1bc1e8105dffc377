"""A table as Markdown, as LaTeX with booktabs and as CSV: the same cells in each, and the same bytes each time."""

import csv
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from plots.numbers import Number
from plots.tables.table import NOT_RUN, NOTHING, SIDES, Block, Cell, Column, Row, Table

HEADERS = (*SIDES, "difference")
CSV_HEADERS = (*HEADERS, "low of ours", "high of ours", "runs of ours")
SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
}
DOCUMENT = (
    "\\documentclass{{article}}\n\\usepackage{{booktabs,graphicx}}\n\\usepackage[landscape,margin=1cm]{{geometry}}\n"
    "\\begin{{document}}\n{}\\end{{document}}\n"
)
UNDATED = {**os.environ, "SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}  # the same bytes each time
ENGINES = ("pdflatex", "lualatex", "tectonic")


class NoLatex(RuntimeError):
    """LaTeX is missing or refuses a table; the message says what to do."""


def save(table: Table, folder: Path, name: str) -> list[Path]:
    """Write `name`.md, .tex and .csv; raises `OSError` where that cannot be done."""
    paths = []
    for kind, write in (("md", markdown), ("tex", lambda one: latex(one, name)), ("csv", as_csv)):
        paths.append(folder / f"{name}.{kind}")
        paths[-1].write_bytes(write(table).encode())
    return paths


def markdown(table: Table) -> str:
    """A heading, a pipe table for each block, and the captions."""
    parts = [f"# {table.title}\n"]
    for block in table.blocks:
        headers = [f"{column.header}<br>{side}" for column in block.columns for side in HEADERS]
        lines = [[*block.keys, *headers, *block.extra]]
        lines.append(["---"] * len(block.keys) + ["---:"] * len(headers) + ["---"] * len(block.extra))
        lines += [[*row.keys, *_texts(block, row, bold="**{}**".format), *row.extra] for row in block.rows]
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines]
        parts.append((f"## {block.title}\n\n" if block.title else "") + "".join(rows))
    parts += [f"{caption}\n" for caption in table.captions]
    return "\n".join(parts)


def latex(table: Table, label: str = "table") -> str:
    """One floating table, numbered by the document; needs the packages booktabs and graphicx."""
    title = re.sub(r"^Table \d+: ", "", table.title)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(' '.join([f'{title}.', *table.captions]))}}}"]
    lines += [rf"\label{{tab:{label}}}"]
    for block in table.blocks:
        lines += [*([rf"\par\vspace{{1ex}} {escaped(block.title)}\par"] if block.title else []), *_tabular(block)]
    return "\n".join([*lines, r"\end{table}", ""])


def as_csv(table: Table) -> str:
    """Comma-separated: a line a row, blocks under each other with their own headers, no captions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for number, block in enumerate(table.blocks):
        if number:
            writer.writerow([])
        headers = [f"{column.header} {name}" for column in block.columns for name in CSV_HEADERS]
        writer.writerow(["block", *block.keys, *headers, *block.extra])
        for row in block.rows:
            cells = [
                text
                for column, cell in zip(block.columns, row.cells, strict=True)
                for text in _plain(block, column, cell)
            ]
            writer.writerow([block.title or table.title, *row.keys, *cells, *row.extra])
    return file.getvalue()


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(SPECIAL.get(character, character) for character in text)


def compile_latex(path: Path) -> Path:
    """Make a PDF of a written .tex, next to it; raises `NoLatex`."""
    engine = next((found for name in ENGINES if (found := shutil.which(name))), None)
    if engine is None:
        raise NoLatex(f"none of {', '.join(ENGINES)} is installed; install one, or leave out --compile")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / path.name
        source.write_text(DOCUMENT.format(path.read_text()))
        quiet = [] if Path(engine).name == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
        done = subprocess.run([engine, *quiet, source.name], cwd=folder, env=UNDATED, capture_output=True, text=True)
        if done.returncode:
            told = [line for line in done.stdout.splitlines() if line.startswith("!")] or done.stderr.splitlines()[-1:]
            raise NoLatex(f"{path}: {Path(engine).name} cannot compile it: {' '.join(told)}")
        made = path.with_suffix(".pdf")
        made.write_bytes(source.with_suffix(".pdf").read_bytes())
        return made


def _tabular(block: Block) -> list[str]:
    names, numbers = len(block.keys), len(HEADERS) * len(block.columns)
    top = " & ".join([""] * names + [rf"\multicolumn{{3}}{{c}}{{{escaped(one.header)}}}" for one in block.columns])
    rules = [
        rf"\cmidrule(lr){{{names + 3 * place + 1}-{names + 3 * place + 3}}}" for place in range(len(block.columns))
    ]
    headers = [*map(escaped, block.keys), *HEADERS * len(block.columns), *map(escaped, block.extra)]
    body = []
    for before, row in zip([None, *block.rows], block.rows, strict=False):
        if before is not None and before.group != row.group:
            body.append(r"\midrule")
        texts = _texts(block, row, escaped, r"\textbf{{{}}}".format)
        body.append(" & ".join([*map(escaped, row.keys), *texts, *map(escaped, row.extra)]) + r" \\")
    columns = "l" * names + "r" * numbers + "l" * len(block.extra)
    above = [top + " & " * len(block.extra) + r" \\", "".join(rules)] if block.columns else []
    return [
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *above, " & ".join(headers) + r" \\", r"\midrule", *body,
        r"\bottomrule", r"\end{tabular}}",
    ]  # fmt: skip


def _texts(block: Block, row: Row, plain: Callable[[str], str] = str, bold: Callable[[str], str] = str) -> list[str]:
    """Published, ours and difference of each cell; `plain` makes a text fit for the format, `bold` marks the best."""
    texts = []
    for column, cell in zip(block.columns, row.cells, strict=True):
        for side, text in zip(HEADERS, _told(block, column, cell), strict=True):
            texts.append(bold(plain(text)) if side in cell.best else plain(text))
    return texts


def _told(block: Block, column: Column, cell: Cell) -> tuple[str, str, str]:
    difference = cell.difference
    return (
        NOTHING if cell.published is None else number(cell.published, column.digits),
        (NOT_RUN if block.published and cell.published else NOTHING)
        if cell.ours is None
        else number(cell.ours, column.digits),
        "" if difference is None else f"{difference:+.{column.digits}f}",
    )


def _plain(block: Block, column: Column, cell: Cell) -> tuple[str, ...]:
    """As `_told`, but a cell holds one number: the mean, the ends of its interval and the number of runs apart."""
    ours = cell.ours
    published, own = (None if one is None else Number(one.mean) for one in (cell.published, ours))
    means = Cell(published, own)
    interval = ours and ours.interval
    ends = (interval.low, interval.high) if interval else ()
    told = [f"{end:.{column.digits}f}" for end in ends] or ["", ""]
    return (*_told(block, column, means), *told, "" if ours is None else str(ours.runs))


def number(one: Number, digits: int) -> str:
    """The mean with the half-width of its interval or its published deviation, and of several runs their number."""
    spread = one.interval.margin(one.mean) if one.interval else one.std
    runs = f" (n={one.runs})" if one.runs > 1 else ""
    return f"{one.mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}") + runs
