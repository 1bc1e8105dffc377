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
from experiments.identity import BASELINE, NEUTRAL, hash_of, trial_id
from experiments.records import Failure, Outcome, Record
from experiments.schema import ConfigError, validate
from experiments.store import ResultStore, to_json, write_atomically
from experiments.summary import summarize
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
    different: dict[str, Composed] = {}
    problems: dict[str, None] = {}
    for one in composed:
        try:
            validate(one.config)
            different.setdefault(trial_id(one.config), one)
        except ValueError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise ConfigError("\n".join(problems))
    labels = label(list(different.values()))
    trials = tuple(
        Trial(id_, one.config, one.choices, own) for (id_, one), own in zip(different.items(), labels, strict=True)
    )
    config = composed[0].config
    name = config["sweep"] or sweep_name(overrides)
    return Sweep(name, trials, ResultStore(config["results"]), config["progress"])


def run(sweep: Sweep) -> list[Outcome]:
    """Run the trials that are not done, then write and show the summary; raises `SweepFailed` if any failed."""
    sweep.store.check_writable()
    _write_plan(sweep)
    found: dict[str, Record | Failure] = {}
    for trial in sweep.trials:
        record = sweep.store.record(trial.trial_id)
        if record is not None:
            found[trial.trial_id] = record
    earlier = set(found)
    log.info("%d of %d trials already done", len(earlier), len(sweep.trials))
    pending = [trial for trial in sweep.trials if trial.trial_id not in earlier]
    if pending:
        with showing(sweep.progress) as progress:
            runner = TrialRunner(sweep.store, sweep.name, progress)
            for trial in progress.track(pending, "trials", len(pending)):
                log.info("trial %s: %s", trial.trial_id, trial.name)
                result = found[trial.trial_id] = runner.run(trial)
                if isinstance(result, Record):
                    metrics = result.metrics
                    log.info("trial %s: perplexity %.3f, KL %.4f", trial.trial_id, metrics.perplexity, metrics.kl)
    outcomes = [_outcome(trial, found[trial.trial_id], trial.trial_id in earlier) for trial in sweep.trials]
    summarize(sweep.name, outcomes, sweep.store)
    if any(outcome.failure for outcome in outcomes):
        raise SweepFailed
    return outcomes


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
    flat = [_flatten({k: v for k, v in one.config.items() if k not in NEUTRAL}) for one in composed]
    values: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for one, own in zip(composed, flat, strict=True):
        for key, value in own.items():
            values[key, one.choices.get(key.partition(".")[0])].add(str(value))
    labels = []
    for one, own in zip(composed, flat, strict=True):
        baseline = one.config["format"]["_target_"] == BASELINE
        unused = ("transform", "algorithm") if baseline else ()
        choices = {group: "-" if group in unused else one.choices[group] for group in LABELLING_GROUPS}
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


def _outcome(trial: Trial, found: Record | Failure, earlier: bool) -> Outcome:
    return Outcome(
        trial_id=trial.trial_id,
        name=trial.name,
        labels=trial.labels,
        record=found if isinstance(found, Record) else None,
        failure=found if isinstance(found, Failure) else None,
        earlier=earlier,
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
