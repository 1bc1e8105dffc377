"""A benchmark's record: where and with what it ran, every measurement, as one JSON file written as the run goes on."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wush_kernels.bench.measurement import BF16, OURS, Ceilings, Measurement, measurement_from

SCHEMA = 1
CHECKOUT = Path(__file__).parents[3]
RESULTS = CHECKOUT / "kernels" / "benchmarks" / "results"
MEASURED = ("wush", "wush_kernels")


@dataclass
class Record:
    """`sections`: seconds of each that was finished. `finished`: whether the run came to its end."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: Ceilings
    measurements: list[Measurement] = field(default_factory=list)
    sections: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    def of(self, section: str) -> list[Measurement]:
        """The measurements of a section."""
        return [one for one in self.measurements if one.section == section]

    def settle(self) -> None:
        """Take what all measurements together say of the ceilings into every floor."""
        bf16 = [(2.0 * one.out_features * one.in_features, one.timings.get(BF16)) for one in self.measurements]
        right = [one for one in self.measurements if one.out_features and not one.failure]
        own = [(one.work.bytes, one.timings.get(OURS)) for one in right]
        rates = [size / timing.us / 1e3 for size, timing in bf16 + own if timing is not None]
        self.ceilings = dataclasses.replace(self.ceilings, read_gbs=max(rates, default=0.0))
        self.measurements = [
            dataclasses.replace(one, floor_us=self.ceilings.of(one).floor_us(one.work)) for one in self.measurements
        ]

    def failed(self) -> list[Measurement]:
        """The lines on which something went wrong."""
        return [one for one in self.measurements if one.failure]


def save(record: Record, path: Path, promises: list[dict[str, Any]]) -> None:
    """Write the record, and what became of the promises, atomically."""
    content = {"schema": SCHEMA, **dataclasses.asdict(record), "promises": promises}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(_finite(content), file, indent=1, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def load(path: Path) -> Record:
    """The record in a file; raises `ValueError` that says why for a file that holds none."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']}, not {SCHEMA}; measure again")
        record = Record(
            content["environment"],
            content["settings"],
            Ceilings(**content["ceilings"]),
            [measurement_from(one) for one in content["measurements"]],
            content["sections"],
            content["finished"],
        )
        record.settle()
        return record
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no record of a benchmark can be read there: {error}") from error


def default_path(environment: dict[str, Any], quick: bool) -> Path | None:
    """A name not taken in the checkout's folder of results; None where the package is installed without its source."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        return None
    gpu = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-")
    stem = f"{gpu}-{environment['date'][:10]}{'-quick' if quick else ''}"
    number = 1
    while (path := RESULTS / f"{stem}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return path


def describe_environment() -> dict[str, Any]:
    """The GPU, its driver, and the versions of what runs on it.

    `source_sha256` is of what is measured, wherever it lies. `git_commit` and `git_changes` are those of the checkout,
    None where there is none or git cannot be asked; a copied tree's commit can be older than its sources.
    """
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "processors": gpu.multi_processor_count,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "source_sha256": source_sha256(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def source_sha256() -> str:
    """SHA-256 over all modules of the measured packages as they are installed: each path, in order, and its content."""
    sources = hashlib.sha256()
    for package in MEASURED:
        found = importlib.util.find_spec(package)
        folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
        modules = {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
        if not modules:
            raise ModuleNotFoundError(f"no source of {package} is found; install it with pip install -e .")
        for name, path in sorted(modules.items()):
            sources.update(f"{package}/{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return sources.hexdigest()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None for a package installed elsewhere, of which another repository may know."""
    return _said("git", "-C", str(CHECKOUT), *arguments) if (CHECKOUT / "pyproject.toml").is_file() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a program prints; None when there is no such program, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
