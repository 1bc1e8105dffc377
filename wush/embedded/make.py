"""Makes the embedded texts anew from their sources: `python -m wush.embedded.make FOLDER`.

The files here are what counts: no number depends on what is installed. This shows where each comes from, and gives
the same bytes wherever `SOURCES` are installed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import itertools
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

SOURCES = {"python": "3.11.7", "networkx": "3.6.1", "scikit-learn": "1.9.1"}
MODULES = ("argparse", "ast", "dataclasses", "inspect", "subprocess", "tarfile", "typing")
REFERENCES = {"validation": "networkx", "held_out": "sklearn"}
PAGE = 1_500  # characters of a docstring that is long enough to be a page of reference
REFERENCE = 200_000  # characters of a reference text


def made() -> dict[str, str]:
    """Each text by its name, from what is installed."""
    references = {name: reference(package) for name, package in REFERENCES.items()}
    return {**topics(), "code": code(), **references}


def topics() -> dict[str, str]:
    """Python's topic documentation in two halves, its topics by name, alternating.

    Topics quote each other, so a paragraph is kept only where it comes first.
    """
    from pydoc_data.topics import topics as pages

    kept: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    seen: set[str] = set()
    for name, half in zip(sorted(pages), itertools.cycle(kept)):
        kept[half] += new_paragraphs(pages[name], seen)
    return {half: "\n\n".join(paragraphs) for half, paragraphs in kept.items()}


def code() -> str:
    """Some large modules of Python's standard library, one after the other."""
    specs = [importlib.util.find_spec(name) for name in MODULES]
    return "\n\n".join(Path(str(spec.origin)).read_text(encoding="utf-8") for spec in specs if spec)


def reference(package: str) -> str:
    """Pages of a package's reference, its long docstrings without their examples: a sample, in the package's order.

    The hash of a page decides whether it is in the sample, so that all parts of the package are in it.
    """
    pages = [page for page in docstrings(package) if len(page) >= PAGE]
    by_hash = sorted(pages, key=lambda page: hashlib.sha256(page.encode()).digest())
    sizes = itertools.accumulate(len(page) for page in by_hash)
    chosen = {page for page, size in zip(by_hash, sizes, strict=True) if size <= REFERENCE}
    seen: set[str] = set()
    return "\n\n".join(itertools.chain(*(new_paragraphs(page, seen) for page in pages if page in chosen)))


def docstrings(package: str) -> Iterator[str]:
    """The docstrings of a package's modules, classes and functions, without their examples."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    root = Path(str(spec.origin)).parent
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not {"tests", "externals"} & set(path.parts):  # the latter are others' work, under other licences
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield "\n\n".join(prose(ast.get_docstring(node) or ""))


def prose(docstring: str) -> Iterable[str]:
    """Its paragraphs without interpreter sessions and the headings that are left of them."""
    paragraphs = [paragraph for paragraph in docstring.split("\n\n") if ">>>" not in paragraph]
    return (paragraph for paragraph in paragraphs if paragraph.split()[:1] != ["Examples"])


def new_paragraphs(page: str, seen: set[str]) -> list[str]:
    """The paragraphs of a page that were not seen before, whatever their line breaks; adds them to `seen`."""
    found = []
    for paragraph in page.split("\n\n"):
        words = " ".join(paragraph.split())
        if words not in seen:
            seen.add(words)
            found.append(paragraph)
    return found


def installed() -> dict[str, str | None]:
    """The versions of the sources on this machine; None of one that is not there."""
    versions = {found.name: found.version for found in distributions()}
    return {name: versions.get(name) for name in SOURCES} | {"python": platform.python_version()}


def main() -> None:
    """Write the texts to a folder, and tell their SHA-256."""
    parser = argparse.ArgumentParser(prog="python -m wush.embedded.make", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if installed() != SOURCES:
        raise SystemExit(f"the texts are made from {SOURCES}, and {installed()} are installed; install those versions")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made().items():
        content = text.encode()
        (folder / f"{name}.txt").write_bytes(content)
        print(f"{name}: {len(content):,} bytes, {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
