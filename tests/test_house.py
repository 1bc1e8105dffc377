"""The rules of the house: what may stand at the top, and who may import whom."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "run.py": {"experiments"},
    "experiments": {"experiments", "wush"},
    "wush": {"wush", "wush_kernels"},
    "plots": {"plots", "wush", "wush_kernels", "experiments"},  # of the last two only RECORDS
    "kernels": {"wush_kernels"},
    "kernels/wush_kernels/bench": {"wush_kernels", "wush"},  # measures whole layers and models
}
RECORDS = {"experiments.records", "wush_kernels.bench.record", "wush_kernels.bench.measurement"}
OURS = {"run", "experiments", "wush", "wush_kernels", "plots"}
TOP_LEVEL = {
    *("run.py", "conf", "wush", "kernels", "experiments", "plots", "notebooks", "tests"),
    *("README.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.lock"),
}


def sources(name: str) -> list[Path]:
    path = ROOT / name
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def modules(path: Path) -> set[str]:
    """The modules that a module imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("name", [name for name in ALLOWED if (ROOT / name).exists()])
def test_imports_point_one_way(name: str) -> None:
    apart = [ROOT / other for other in ALLOWED if other.startswith(f"{name}/")]
    for path in sources(name):
        if not any(path.is_relative_to(folder) for folder in apart):
            assert packages(modules(path)) & OURS <= ALLOWED[name], path


def test_plots_read_records_and_nothing_else_of_what_makes_them() -> None:
    for path in sources("plots"):
        assert {name for name in modules(path) if packages({name}) & {"experiments", "wush_kernels"}} <= RECORDS, path


def test_nothing_else_stands_at_the_top() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_modules_are_short_and_say_what_they_are_for() -> None:
    for name in ("wush", "experiments", "kernels", "plots"):
        for path in sources(name):
            text = path.read_text()
            assert ast.get_docstring(ast.parse(text)), path
            assert len(text.splitlines()) <= 400, path
