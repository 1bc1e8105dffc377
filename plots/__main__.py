"""`python -m plots [OUTPUT ...]`: the paper's figures, tables and verdicts, from published numbers and records.

Exit status: 0 all made, 1 the data of some is absent, 2 something is wrong; the others are made all the same.
"""

import argparse
import importlib
import inspect
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plots.records import Records

OUTPUT = Path(__file__).parent / "out"
FIGURES = {  # name -> module, and its function where that is not `draw`; one that takes `records` is given them
    "figure1": "plots.figure1",
    "figure2": "plots.figure2",
    "figure3": "plots.platinum:averages",
    "figure4": "plots.figure4",
    "figure5": "plots.figure5",
    "figure6": "plots.figure6",
    "figure7": "plots.platinum:figure7",
    "figure8": "plots.platinum:figure8",
    "figure9": "plots.platinum:figure9",
    "figure10": "plots.platinum:figure10",
    "pareto": "plots.pareto",
    "heatmap": "plots.heatmap",
    "bound": "plots.bound",
    "powers": "plots.powers",
}
TABLES = {
    "table1": "plots.tables.layer_loss:table1",
    "table2": "plots.tables.lm_eval:table2",
    "table3": "plots.tables.lm_eval:table3",
    "table4": "plots.tables.divergence:table4",
    "table5": "plots.tables.calibration:table5",
    "table6": "plots.tables.cost:table6",
    "table7": "plots.tables.storage:table7",
    "verdicts": "plots.verdicts:document",
    "claims": "plots.claims:document",
}
OF_A_MODEL = ("figure5", "powers")  # the outputs that --model is for
README = "readme"  # rewrites the numbers of README.md; not among all that are made by default
ABSENT, WRONG = 1, 2


class Source:
    """The records of the folders, read when something first needs them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    @cached_property
    def records(self) -> "Records":
        """All of them; says which cannot be used. Raises `plots.records.NoRecords`."""
        from plots.records import load

        found = load(self._folders)
        for note in found.notes:
            _say(note)
        return found

    @property
    def flawed(self) -> bool:
        """Whether records were read and some could not be used."""
        return "records" in vars(self) and bool(self.records.notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    asked = _parser().parse_args(arguments)
    outputs = FIGURES | TABLES
    unknown = [name for name in asked.outputs if name not in (*outputs, README)]
    for name in unknown:
        _say(f"{name}: there is no such figure or table; choose from {', '.join((*outputs, README))}")
    if asked.model is not None and not set(OF_A_MODEL) & set(asked.outputs):
        _say(
            f"--model {asked.model}: only {' and '.join(OF_A_MODEL)} take a model; name one: "
            f"python -m plots {OF_A_MODEL[0]} --model ..."
        )
        return WRONG
    if problem := _unwritable(asked.output):
        _say(f"{asked.output}: cannot be written: {problem}; choose another folder with --output")
        return WRONG
    names = dict.fromkeys(name for name in asked.outputs or outputs if name in outputs)
    source = Source(asked.records)
    states = [_make(name, outputs[name], asked, source) for name in names]
    states += [_rewrite()] if README in asked.outputs else []
    return max([WRONG if unknown or source.flawed else 0, *states])


def _make(name: str, entry: str, asked: argparse.Namespace, source: Source) -> int:
    began = time.perf_counter()
    module, _, function = entry.partition(":")
    try:
        from plots import style
        from plots.records import NoRecords
        from plots.reference import Unreadable
        from plots.tables.render import NoLatex

        make = getattr(importlib.import_module(module), function or "draw")
    except ModuleNotFoundError as error:
        _say(f"{name}: not made: {error}; install what figures need with pip install -e '.[plots]'")
        return WRONG
    try:
        with style.applied(asked.style):
            paths = _save(_made(make, source, asked.model), asked, name)
    except style.Absent as error:
        _say(f"{name}: not made: {error}")
        return ABSENT
    except (Unreadable, NoRecords, NoLatex, style.Unusable, OSError) as error:
        _say(f"{name}: not made: {error}")
        return WRONG
    print(f"{name}: {' '.join(map(str, paths))}, {time.perf_counter() - began:.1f} s", flush=True)
    return 0


def _rewrite() -> int:
    """Make the numbers of README.md anew from the committed records, whichever others are named."""
    from plots import readme
    from plots.style import Absent

    try:
        changed = readme.update()
    except Absent as error:
        _say(f"{README}: not made: {error}")
        return ABSENT
    except (readme.WrongBlock, OSError) as error:
        _say(f"{README}: not made: {error}")
        return WRONG
    print(f"{README}: {', '.join(changed) or 'nothing'} changed", flush=True)
    return 0


def _made(make: Callable[..., Any], source: Source, model: str | None) -> Any:
    known = inspect.signature(make).parameters
    given = {"records": source.records} if "records" in known else {}
    return make(**given, **({"model": model} if "model" in known else {}))


def _save(made: Any, asked: argparse.Namespace, name: str) -> list[Path]:
    from plots import style
    from plots.tables import render
    from plots.tables.table import Table

    if isinstance(made, str):
        path = asked.output / f"{name}.md"
        path.write_bytes(made.encode())
        return [path]
    if isinstance(made, Table):
        paths = render.save(made, asked.output, name)
        sources = [path for path in paths if path.suffix == ".tex"] if asked.compile else []
        return [*paths, *map(render.compile_latex, sources)]
    return style.save(made, asked.output, name)


def _unwritable(folder: Path) -> str:
    """Why no file can be made in the folder, which is made where it is missing; empty when one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m plots",
        description="Make the paper's figures (PDF, SVG, PNG) and tables (Markdown, LaTeX, CSV), and the verdicts.",
    )
    names = ", ".join(FIGURES | TABLES)
    parser.add_argument(
        "outputs", nargs="*", metavar="OUTPUT", help=f"{names} (default: all); {README}: the numbers of README.md"
    )
    parser.add_argument(
        "--records", nargs="+", type=Path, default=[], metavar="FOLDER",
        help="results folders, or folders of records, to read instead of the repository's own plots/records",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="PATH_OR_HUB_NAME",
        help=f"of {' and '.join(OF_A_MODEL)}: a model in the Hugging Face format instead of the packaged one",
    )  # fmt: skip
    parser.add_argument("--style", choices=("paper", "screen"), default="paper", help="for print, or larger")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: plots/out")
    parser.add_argument("--compile", action="store_true", help="make a PDF of each table too; needs LaTeX")
    return parser


if __name__ == "__main__":
    sys.exit(main())
