"""Sweeps: planning trials, running those not done yet, and summing up what came out."""

import logging
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.display import showing
from experiments.identity import NEUTRAL, UNUSED_BY_BASELINE, hash_of, identity, is_baseline, relevant
from experiments.records import Failure, Outcome, Record
from experiments.schema import ConfigError, validate
from experiments.store import ResultStore, to_json, write_atomically
from experiments.summary import summarize, write
from experiments.trial import Trial, TrialRunner

log = logging.getLogger(__name__)

LABELLING_GROUPS = ("model", "format", "transform", "algorithm")


@dataclass(frozen=True)
class Composed:
    """A config as Hydra composed it, resolved, with the option chosen of each group."""

    config: dict[str, Any]
    choices: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """The different trials of a sweep, in order, and the store they share."""

    name: str
    trials: tuple[Trial, ...]
    store: ResultStore
    progress: Any


class SweepFailed(Exception):
    """Some trials failed; the summary has been shown."""


def plan(composed: Sequence[Composed], overrides: Sequence[str]) -> Sweep:
    """Validate every config of a sweep and leave out repeated trials; all errors come in one `ConfigError`."""
    valid, parts = _validated(composed)
    _check_one_way_to_run(valid)
    ids = [hash_of(one) for one in parts]
    first = {id_: ids.index(id_) for id_ in ids}
    if len(first) < len(ids):
        log.info("%d configs are the same trial as another one", len(ids) - len(first))
    labels = label([valid[i] for i in first.values()])
    trials = tuple(
        Trial(id_, valid[i].config, _used_choices(valid[i]), own, parts[i])
        for (id_, i), own in zip(first.items(), labels, strict=True)
    )
    config = valid[0].config
    name = config["sweep"] or sweep_name(overrides)
    return Sweep(name, trials, ResultStore(config["results"]), config["progress"])


def _validated(composed: Sequence[Composed]) -> tuple[list[Composed], list[dict[str, Any]]]:
    """The configs as the schema has them, and their identities."""
    valid, parts = [], []
    problems: dict[str, None] = {}
    for one in composed:
        try:
            config = validate(one.config).model_dump(mode="json", by_alias=True)
            parts.append(identity(config))
            valid.append(Composed(config, one.choices))
        except ValueError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise ConfigError("\n".join(problems))
    return valid, parts


def _check_one_way_to_run(composed: Sequence[Composed]) -> None:
    """Raise `ConfigError` when trials of a sweep differ in how or where they are to run."""
    problems = []
    for key in NEUTRAL:
        values = list(dict.fromkeys(str(one.choices.get(key, one.config[key])) for one in composed))
        if any(one.config[key] != composed[0].config[key] for one in composed):
            problems.append(
                f"{key}={','.join(values)}: one sweep has one {key}; give one value, or start several sweeps"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _used_choices(one: Composed) -> dict[str, str]:
    unused = UNUSED_BY_BASELINE if is_baseline(one.config) else ()
    return {group: option for group, option in one.choices.items() if group not in unused}


def run(sweep: Sweep) -> list[Outcome]:
    """Run the trials that are not done, then show and write the summary; raises `SweepFailed` if any failed.

    The table and the report are written after every trial, so that an interrupt leaves those of what is finished.
    """
    from hydra.utils import instantiate

    sweep.store.check_writable()
    outcomes = {trial.trial_id: _outcome(trial, sweep.store.finished(trial.trial_id), True) for trial in sweep.trials}
    pending = _by_original([trial for trial in sweep.trials if outcomes[trial.trial_id].record is None])
    if pending:
        _check_device(pending[0].config["device"])
    _write_plan(sweep)
    tracking = instantiate(sweep.trials[0].config["tracking"])
    for outcome in outcomes.values():
        if outcome.record:
            tracking.skip(outcome.trial_id)
    log.info("%d of %d trials already done", len(sweep.trials) - len(pending), len(sweep.trials))
    if pending:
        with showing(sweep.progress) as progress:
            runner = TrialRunner(sweep.store, sweep.name, tracking, progress)
            for trial in progress.track(pending, "trials", len(pending)):
                outcomes[trial.trial_id] = _outcome(trial, _run_unless_done(trial, runner), False)
                write(sweep.name, list(outcomes.values()), sweep.store)
    summarize(sweep.name, list(outcomes.values()), sweep.store)
    if any(outcome.failure for outcome in outcomes.values()):
        raise SweepFailed
    return list(outcomes.values())


def _by_original(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of one original model and evaluation after one another, otherwise in the order given."""
    seen: dict[str, int] = {}

    def order(trial: Trial) -> list[int]:
        return [seen.setdefault(hash_of(trial.identity[part]), len(seen)) for part in ("model", "evaluation")]

    return sorted(trials, key=order)


def _check_device(device: str) -> None:
    """Raise `ConfigError` for a GPU that is not there; torch is imported only to look for one."""
    if device.startswith("cuda"):
        from experiments.environment import resolve_device

        resolve_device(device)


def _run_unless_done(trial: Trial, runner: TrialRunner) -> Record | Failure:
    """The trial's result; that of another process, if one has finished the trial since the sweep began."""
    record = runner.store.finished(trial.trial_id)
    if record is not None:
        log.info("trial %s: another process has finished it meanwhile", trial.trial_id)
        runner.tracking.skip(trial.trial_id)
        return record
    log.info("trial %s: %s", trial.trial_id, trial.name)
    result = runner.run(trial)
    if isinstance(result, Record):
        log.info("trial %s: perplexity %.3f, KL %.4f", trial.trial_id, result.metrics.perplexity, result.metrics.kl)
    return result


def sweep_name(overrides: Sequence[str]) -> str:
    """A folder name made of the overrides that can change a result, such as `format-mxfp4+nvfp4_transform-h`."""
    telling = [o for o in overrides if re.split(r"[=./@]", o.lstrip("+~"))[0] not in (*NEUTRAL, "hydra")]
    name = re.sub(r"[^\w.+-]", "-", "_".join(telling).replace("=", "-").replace(",", "+")) or "default"
    return name if len(name) <= 80 else f"{name[:63].rstrip('_-+')}-{hash_of(list(overrides))}"


def label(composed: Sequence[Composed]) -> list[dict[str, str]]:
    """For each config what tells it from the others.

    Its choice of each group that matters to it, and every other key whose value differs among the configs with
    the same choice of the key's group.
    """
    flat = [_flatten(relevant(one.config)) for one in composed]
    values: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for one, own in zip(composed, flat, strict=True):
        for key, value in own.items():
            values[key, one.choices.get(key.partition(".")[0])].add(str(value))
    labels = []
    for one, own in zip(composed, flat, strict=True):
        used = _used_choices(one)
        choices = {group: used.get(group, "-") for group in LABELLING_GROUPS}
        differing = {
            key: str(value)
            for key, value in own.items()
            if len(values[key, one.choices.get(key.partition(".")[0])]) > 1
        }
        labels.append(choices | differing)
    return labels


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _outcome(trial: Trial, found: Record | Failure | None, earlier: bool) -> Outcome:
    return Outcome(
        trial_id=trial.trial_id,
        name=trial.name,
        labels=trial.labels,
        record=found if isinstance(found, Record) else None,
        failure=found if isinstance(found, Failure) else None,
        earlier=earlier and found is not None,
        config=trial.config,
        environment=found.environment if found else {},
    )


def _write_plan(sweep: Sweep) -> None:
    folder = sweep.store.sweep(sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    trials = [
        {"trial_id": trial.trial_id, "name": trial.name, "labels": trial.labels, "config": trial.config}
        for trial in sweep.trials
    ]
    command = shlex.join(["python", *sys.argv])
    write_atomically(folder / "plan.json", to_json({"sweep": sweep.name, "command": command, "trials": trials}))
