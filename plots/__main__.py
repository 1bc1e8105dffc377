"""`python -m plots [FIGURE ...]`: draw the paper's figures as PDF, SVG and PNG.

Exit status: 0 all drawn, 1 the data of some is absent, 2 something is wrong; the other figures are drawn all the same.
"""

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path(__file__).parent / "out"
FIGURES = {  # name -> module, and its function where that is not `draw`
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
}
ABSENT, WRONG = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    asked = _parser().parse_args(arguments)
    unknown = [name for name in asked.figures if name not in FIGURES]
    for name in unknown:
        _say(f"{name}: there is no such figure; choose from {', '.join(FIGURES)}")
    if problem := _unwritable(asked.output):
        _say(f"{asked.output}: cannot be written: {problem}; choose another folder with --output")
        return WRONG
    names = dict.fromkeys(name for name in asked.figures or FIGURES if name in FIGURES)
    return max([WRONG if unknown else 0, *(_draw(name, asked.style, asked.output) for name in names)])


def _draw(name: str, style_name: str, folder: Path) -> int:
    began = time.perf_counter()
    module, _, function = FIGURES[name].partition(":")
    try:
        from plots import style
        from plots.reference import Unreadable

        source = importlib.import_module(module)
    except ModuleNotFoundError as error:
        _say(f"{name}: not drawn: {error}; install what figures need with pip install -e '.[plots]'")
        return WRONG
    try:
        with style.applied(style_name):
            drawn = getattr(source, function or "draw")()
            paths = style.save(drawn, folder, name)
    except style.Absent as error:
        _say(f"{name}: not drawn: {error}")
        return ABSENT
    except (Unreadable, OSError) as error:
        _say(f"{name}: not drawn: {error}")
        return WRONG
    print(f"{name}: {' '.join(map(str, paths))}, {time.perf_counter() - began:.1f} s", flush=True)
    return 0


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
        prog="python -m plots", description="Draw the paper's figures as PDF, SVG and PNG."
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} (default: all)")
    parser.add_argument("--style", choices=("paper", "screen"), default="paper", help="for print, or larger")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: plots/out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
