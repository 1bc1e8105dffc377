"""`python -m wush_kernels.bench`: measure everything; `plot` and `table` show what a record holds.

Exit codes: 0 all measured and right, 1 something failed, 2 wrong arguments or no GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wush_kernels.bench import report
from wush_kernels.bench.record import CHECKOUT, Record, load
from wush_kernels.bench.run import QUICK_MODELS, QUICK_SECTIONS, SECTIONS, Options, run
from wush_kernels.bench.shapes import MODELS

PLOT = CHECKOUT / "kernels" / "benchmarks" / "ratio.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and do what they ask; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "run":
            models = _names(options.shapes, tuple(MODELS), "--shapes")
            sections = _names(options.only, SECTIONS, "--only")
            models = models or (QUICK_MODELS if options.quick else tuple(MODELS))
            sections = sections or (QUICK_SECTIONS if options.quick else SECTIONS)
            return run(Options(models, sections, options.quick, options.output))
        if options.record is None:
            raise ValueError(f"{options.command} needs a record: python -m wush_kernels.bench {options.command} FILE")
        return _show(options.command, load(options.record), options.output)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _show(command: str, record: Record, output: Path | None) -> int:
    if command == "table":
        table = report.markdown(record)
        if output:
            output.write_text(report.with_results(output.read_text(), table))
        else:
            print(table, end="")
        return 0
    from wush_kernels.bench.plot import MissingLibraryError, plot

    path = output or (PLOT if (CHECKOUT / "pyproject.toml").is_file() else Path("ratio.png"))
    try:
        plot(record, path)
    except MissingLibraryError as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


def _names(given: str | None, known: Sequence[str], option: str) -> tuple[str, ...]:
    names = tuple(given.split(",")) if given else ()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wush_kernels.bench", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "plot", "table"), default="run")
    parser.add_argument("record", nargs="?", type=Path, help="of plot and table: a file that a run wrote")
    parser.add_argument("--shapes", help=f"models whose layers are measured: {','.join(MODELS)}")
    parser.add_argument("--only", help=f"sections: {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="a few of each kind and no quantizer, in about a minute")
    parser.add_argument(
        "--output",
        type=Path,
        help="the record's file; the plot's, .png or .svg; a Markdown file with marks for the table",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
