"""Every kernel compiles for Hopper and both Blackwells: to the instructions expected, and without spills."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wush_kernels
from wush_kernels.offline import CAPABILITIES, SHARED_LIMITS

SOURCES = sorted(Path(next(iter(wush_kernels.__path__))).glob("*.py"))
MODULES = [path.stem for path in SOURCES if "\ndef offline_cases(" in path.read_text()]


@functools.cache
def compiled(module: str) -> tuple[list[dict[str, object]], str]:
    """What the compiler reported of every case for every capability, and its complaints, where it failed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "wush_kernels.offline", f"wush_kernels.{module}", *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = f"exit {done.returncode} after {len(lines)} cases: {done.stderr[-2000:]}"
    return lines, failed if done.returncode else ""


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("module", MODULES)
def test_it_compiles_to_what_it_is_written_for(module: str, capability: int) -> None:
    cases, failure = compiled(module)
    assert not failure
    mine = [case for case in cases if case["capability"] == capability]
    assert mine
    assert not [case for case in mine if case["missing"] or case["unwanted"]]
    assert not [case for case in mine if case["stack_bytes"]]
    assert not [case for case in mine if case["shared_bytes"] > SHARED_LIMITS[capability]]  # type: ignore[operator]


def test_every_module_that_launches_a_kernel_has_cases() -> None:
    launching = {path.stem for path in SOURCES if re.search(r"_kernel\w*\[", path.read_text())}
    assert "dequantize" in launching
    assert launching <= set(MODULES)
