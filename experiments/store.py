"""The result store: one folder a trial, one a sweep, safe for many machines on one file system.

trials/<trial_id>/  config.yaml  environment.json  trial.log  result.json (last, atomic) or failure.json
sweeps/<name>/      plan.json  table.md  report.html
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from experiments.records import Failure, Record, now
from experiments.schema import ConfigError

log = logging.getLogger(__name__)


class ResultStore:
    """Reads and writes what trials and sweeps leave behind under one folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def check_writable(self) -> None:
        """Raise `ConfigError` unless files can be written here."""
        try:
            (self.root / "trials").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise ConfigError(
                f"results={self.root}: cannot be written ({error.strerror}); set results=... to a folder that can"
            ) from error

    def trial(self, trial_id: str) -> Path:
        """The folder of a trial."""
        return self.root / "trials" / trial_id

    def sweep(self, name: str) -> Path:
        """The folder of a sweep."""
        return self.root / "sweeps" / name

    def record(self, trial_id: str) -> Record | None:
        """The record of a finished trial, or None; a damaged one is moved aside, with a warning."""
        path = self.trial(trial_id) / "result.json"
        try:
            return Record.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            aside = path.with_name(f"result.damaged-{now():%Y%m%dT%H%M%S}.json")
            path.rename(aside)
            reason = error.errors()[0]["msg"]
            log.warning("trial %s: its result.json is damaged (%s); moved to %s", trial_id, reason, aside.name)
            return None

    def failure(self, trial_id: str) -> Failure | None:
        """Why the last attempt of an unfinished trial failed, or None."""
        try:
            return Failure.model_validate_json((self.trial(trial_id) / "failure.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def begin(self, trial_id: str, config_yaml: str, environment: dict[str, Any]) -> Path:
        """Make a trial's folder with its config and environment; an earlier failure is forgotten."""
        folder = self.trial(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", config_yaml)
        write_atomically(folder / "environment.json", to_json(environment))
        (folder / "failure.json").unlink(missing_ok=True)
        return folder

    def finish(self, record: Record) -> None:
        """Write the record: from here on the trial is done."""
        write_atomically(self.trial(record.trial_id) / "result.json", to_json(record))

    def fail(self, failure: Failure) -> None:
        """Keep the reason of a failure."""
        write_atomically(self.trial(failure.trial_id) / "failure.json", to_json(failure))

    def ids(self, prefix: str = "") -> list[str]:
        """Trials, finished or not, whose id begins with `prefix`."""
        return sorted(path.name for path in (self.root / "trials").glob(f"{prefix}*") if path.is_dir())

    def table(self, trial_ids: Iterable[str]) -> list[dict[str, Any]]:
        """The finished ones of the trials as flat rows (`metrics.kl`, `choices.model`, ...), in the order given."""
        import duckdb

        order = {trial_id: i for i, trial_id in enumerate(trial_ids)}
        files = [str(f) for f in (self.trial(trial_id) / "result.json" for trial_id in order) if f.exists()]
        if not files:
            return []
        columns = {
            "trial_id": "VARCHAR",
            "choices": "MAP(VARCHAR, VARCHAR)",
            "metrics": "MAP(VARCHAR, DOUBLE)",
            "stages": "MAP(VARCHAR, STRUCT(seconds DOUBLE))",
            "host": "VARCHAR",
            "device": "VARCHAR",
        }
        query = """
            SELECT trial_id, choices, metrics, host, device,
                   list_sum(list_transform(map_values(stages), lambda stage: stage.seconds)) AS seconds
            FROM read_json($files, columns = $columns, maximum_object_size = 100000000)
        """
        with duckdb.connect() as connection:
            found = connection.execute(query, {"files": files, "columns": columns}).fetchall()
        rows = []
        for trial_id, choices, metrics, host, device, seconds in sorted(found, key=lambda row: order[row[0]]):
            flat = {"trial_id": trial_id, "host": host, "device": device, "seconds": seconds}
            flat |= {f"choices.{key}": value for key, value in choices.items()}
            rows.append(flat | {f"metrics.{key}": value for key, value in metrics.items()})
        return rows


def to_json(value: Any) -> str:
    """Indented JSON of a pydantic model or of plain values."""
    if isinstance(value, BaseModel):
        return value.model_dump_json(indent=2) + "\n"
    return json.dumps(value, indent=2) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all: temporary file, fsync, rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
