"""Sweeps: from composed configs to the different trials they are, with names and labels."""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.identity import NEUTRAL, UNUSED_BY_BASELINE, hash_of, identity, is_baseline, relevant
from experiments.schema import ConfigError, validate
from experiments.store import ResultStore
from experiments.trial import Trial

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
