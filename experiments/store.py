"""The result store: one folder a trial, one a sweep, safe for many machines on one file system.

trials/<trial_id>/  config.yaml  environment.json  trial.log  result.json (last, atomic) or failure.json
sweeps/<name>/      plan.json  table.md  report.html
"""

import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from experiments.records import READABLE_VERSIONS, SCHEMA_VERSION, Failure, Record, Result
from experiments.schema import ConfigError
from wush.version import METHOD_VERSION

log = logging.getLogger(__name__)


class DamagedRecord(ValueError):
    """A trial's result.json cannot be read; the message says why, and what becomes of it."""


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
        """The record of a finished trial, or None; changes no file.

        Raises `DamagedRecord`, and `ConfigError` for a record that another version of this program wrote.
        """
        path = self.trial(trial_id) / "result.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        _check_version(path, content)
        try:
            return Record.model_validate_json(content)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise DamagedRecord(f"trial {trial_id}: its result.json is damaged ({reason})") from error

    def finished(self, trial_id: str) -> Record | None:
        """As `record`, for who runs trials: what cannot be read, or was made by another version of the method, is none.

        It is moved aside, with a warning.
        """
        try:
            record = self.record(trial_id)
        except DamagedRecord as damaged:
            self._set_aside(trial_id, "damaged", str(damaged))
            return None
        if record is not None and record.method_version != METHOD_VERSION:
            made = f"made by version {record.method_version} of the method"
            self._set_aside(
                trial_id, "old", f"trial {trial_id}: its result.json was {made}, and this is {METHOD_VERSION}"
            )
            return None
        return record

    def _set_aside(self, trial_id: str, kind: str, why: str) -> None:
        path = self.trial(trial_id) / "result.json"
        aside = path.with_name(f"result.{kind}-{uuid.uuid4().hex}.json")
        with suppress(FileNotFoundError):  # another process was faster
            path.rename(aside)
        log.warning("%s; moved to %s", why, aside.name)

    def results(self, trial_ids: Iterable[str], mend: bool = False) -> dict[str, Result]:
        """The results of the finished ones of the trials, in the order given.

        A damaged one is left out with a warning and, if they are to be mended, moved aside. Raises `ConfigError` that
        lists the records that another version of this program wrote.
        """
        from experiments.query import results

        paths = {trial_id: self.trial(trial_id) / "result.json" for trial_id in trial_ids}
        there = {trial_id: path for trial_id, path in paths.items() if path.exists()}
        found = {result.trial_id: result for result in results(list(there.values()))} if there else {}
        foreign = []
        for trial_id in there.keys() - found.keys():  # none in bulk: read by itself, to learn why
            try:
                record = self.finished(trial_id) if mend else self.record(trial_id)
            except DamagedRecord as damaged:
                log.warning("%s", damaged)
            except ConfigError as error:
                foreign.append(str(error))
            else:
                found |= {trial_id: Result.of(record)} if record else {}
        if foreign:
            raise ConfigError("\n".join(sorted(foreign)))
        return {trial_id: found[trial_id] for trial_id in there if trial_id in found}

    def failure(self, trial_id: str) -> Failure | None:
        """Why the last attempt of an unfinished trial failed, or None."""
        try:
            return Failure.model_validate_json((self.trial(trial_id) / "failure.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def begin(self, trial_id: str, config_yaml: str) -> Path:
        """Make a trial's folder with its config; an earlier failure is forgotten."""
        folder = self.trial(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", config_yaml)
        (folder / "failure.json").unlink(missing_ok=True)
        return folder

    def keep_environment(self, trial_id: str, environment: dict[str, Any]) -> None:
        """Write where a begun trial runs."""
        write_atomically(self.trial(trial_id) / "environment.json", to_json(environment))

    def finish(self, record: Record) -> None:
        """Write the record: from here on the trial is done."""
        write_atomically(self.trial(record.trial_id) / "result.json", to_json(record))

    def fail(self, failure: Failure) -> None:
        """Keep the reason of a failure."""
        write_atomically(self.trial(failure.trial_id) / "failure.json", to_json(failure))

    def ids(self, prefix: str = "") -> list[str]:
        """Trials, finished or not, whose id begins with `prefix`."""
        return sorted(
            path.name for path in (self.root / "trials").glob("*") if path.is_dir() and path.name.startswith(prefix)
        )

    def table(self, trial_ids: Iterable[str]) -> list[dict[str, Any]]:
        """The finished ones of the trials as flat rows (`metrics.kl`, `choices.model`, ...), in the order given."""
        return [
            {"trial_id": trial_id, "seconds": result.seconds}
            | {f"choices.{key}": value for key, value in result.choices.items()}
            | {f"metrics.{key}": value for key, value in result.metrics}
            for trial_id, result in self.results(trial_ids).items()
        ]


class _Version(BaseModel):
    schema_version: int


def _check_version(path: Path, content: bytes) -> None:
    """Raise `ConfigError` for a record of a schema version that is not read; what cannot be read is not judged here."""
    try:
        version = _Version.model_validate_json(content).schema_version
    except ValidationError:
        return
    if version not in READABLE_VERSIONS:
        raise ConfigError(
            f"{path}: written by schema version {version}, this program reads {SCHEMA_VERSION}; "
            "move the file away to run the trial again, or set results=... to another folder"
        )


def to_json(value: Any) -> str:
    """Indented JSON of a pydantic model or of plain values."""
    if isinstance(value, BaseModel):
        return value.model_dump_json(indent=2) + "\n"
    return json.dumps(value, indent=2) + "\n"


def write_atomically(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file so that it is there whole or not at all: temporary file, fsync (when `durable`), rename.

    Raises `OSError` that names the file.
    """
    try:
        _replace(path, content.encode() if isinstance(content, str) else content, durable)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _replace(path: Path, content: bytes, durable: bool) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
