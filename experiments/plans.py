"""The plan of a sweep on disk, `sweeps/<name>/plan.json`: its trials, and how it was started and launched."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from experiments.attempts import Owner, is_alive
from experiments.records import now
from experiments.schema import ConfigError
from experiments.store import ResultStore, write_atomically
from experiments.sweep import Sweep
from experiments.trial import Trial
from wush.version import METHOD_VERSION

_TRIAL = ("trial_id", "choices", "labels", "config", "identity")


def save(sweep: Sweep, launcher: dict[str, Any]) -> None:
    """Write a sweep's plan, a trial a line; `launcher` is the launcher's config node."""
    folder = sweep.store.sweep(sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "sweep": sweep.name,
        "command": shlex.join(["python", *sys.argv]),
        "planned_at": now().isoformat(),
        "launcher": launcher,
        "progress": sweep.progress,
    }
    trials = ",\n".join(json.dumps({key: getattr(trial, key) for key in _TRIAL}) for trial in sweep.trials)
    head = json.dumps(about, indent=2).removesuffix("\n}")
    write_atomically(folder / "plan.json", f'{head},\n  "trials": [\n{trials}\n]}}\n')


def load(store: ResultStore, name: str) -> tuple[Sweep, dict[str, Any]]:
    """A sweep as it was planned last, and its launcher's node; raises `ConfigError` for one that is not there."""
    path = store.sweep(name) / "plan.json"
    try:
        content = json.loads(path.read_bytes())
        trials = tuple(Trial(**{key: trial[key] for key in _TRIAL}) for trial in content["trials"])
        launcher = dict(content["launcher"])
        if not trials:
            raise ValueError("it has no trials")
        return Sweep(name, trials, store, content["progress"]), launcher
    except FileNotFoundError:
        known = ", ".join(names(store)) or "none"
        raise ConfigError(f"no sweep {name!r} in {store.root}; there are: {known}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); start the sweep again to plan it anew") from error


def check_version(sweep: Sweep) -> None:
    """Raise `ConfigError` for a sweep planned with another version of the method: its trials are others now."""
    planned = {trial.method_version for trial in sweep.trials} - {METHOD_VERSION}
    if planned:
        command = json.loads((sweep.store.sweep(sweep.name) / "plan.json").read_bytes())["command"]
        raise ConfigError(
            f"sweep {sweep.name}: planned with version {min(planned)} of the method, and this is {METHOD_VERSION}: "
            f"numbers of both are not compared; start it anew, which keeps what is done: {command}"
        )


def driver_file(store: ResultStore, name: str, owner: Owner) -> Path:
    """The file that says that a process runs a sweep, while it does."""
    return store.sweep(name) / "drivers" / f"{owner.host}-{owner.pid}.json"


def is_driven(store: ResultStore, name: str) -> bool:
    """Whether a live process runs a sweep."""
    return any(_is_live(path) for path in (store.sweep(name) / "drivers").glob("*.json"))


def _is_live(path: Path) -> bool:
    try:
        return is_alive(Owner.model_validate_json(path.read_bytes()), path, time.time())
    except (OSError, ValueError):
        return False


def names(store: ResultStore) -> list[str]:
    """The sweeps of a store, the one planned last first."""
    paths = sorted((store.root / "sweeps").glob("*/plan.json"), key=lambda path: -path.stat().st_mtime)
    return [path.parent.name for path in paths]
