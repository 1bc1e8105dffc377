"""Sweeps: from composed configs to the different trials they are, with names and labels."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.identity import (
    BASELINE,
    NEUTRAL,
    NEUTRAL_OF_TEXT,
    TEXTS,
    UNUSED_BY_BASELINE,
    Identities,
    hash_of,
    is_baseline,
)
from experiments.schema import ConfigError, TrialConfig, validate
from experiments.store import ResultStore
from experiments.trial import Trial

log = logging.getLogger(__name__)

LABELLING_GROUPS = ("model", "format", "transform", "algorithm")


@dataclass(frozen=True)
class Composed:
    """A config as Hydra composed it, resolved, with the option chosen of each group.

    `typed`: the texts of values as `schema.validate` takes them.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    typed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """The different trials of a sweep, in order, and the store they share."""

    name: str
    trials: tuple[Trial, ...]
    store: ResultStore
    progress: Any


def typed(overrides: Iterable[str]) -> dict[str, str]:
    """The texts that overrides give their keys."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: text.strip() for key, equals, text in pairs if equals}


def plan(composed: Sequence[Composed], overrides: Sequence[str], problems: Iterable[str] = ()) -> Sweep:
    """Validate every config of a sweep and leave out repeated trials.

    All errors come in one `ConfigError`, the `problems` that composing met first.
    """
    identities = Identities()
    valid, parts = _validated(composed, identities, problems)
    first: dict[str, int] = {}
    for i, one in enumerate(parts):
        first.setdefault(hash_of(one), i)
    if len(first) < len(parts):
        log.info("%d configs are the same trial as another one", len(parts) - len(first))
    kept = [valid[i] for i in first.values()]
    trials = tuple(
        Trial(id_, one.config, used, own, parts[i])
        for (id_, i), one, used, own in zip(
            first.items(), kept, _used_choices(kept), label(kept, identities), strict=True
        )
    )
    config = valid[0].config
    name = config["sweep"] or sweep_name(overrides)
    return Sweep(name, trials, ResultStore(config["results"]), config["progress"])


def _validated(
    composed: Sequence[Composed], identities: Identities, problems: Iterable[str]
) -> tuple[list[Composed], list[dict[str, Any]]]:
    """The configs as the schema has them, and their identities."""
    valid, parts = [], []
    found = dict.fromkeys(problems)
    validator = _Validator()
    for one in composed:
        try:
            config = validator.validated(one)
            parts.append(identities.identity(config))
            valid.append(Composed(config, one.choices))
            found |= dict.fromkeys(_conflicts(config, one.choices))
        except ValueError as error:
            found |= dict.fromkeys(str(error).splitlines())
    found |= dict.fromkeys(_ways_to_run(valid))
    if found:
        raise ConfigError("\n".join(found))
    return valid, parts


def _conflicts(config: dict[str, Any], choices: dict[str, str]) -> Iterator[str]:
    """What is wrong with keys that are each valid by themselves, and would fail only when a layer is quantized."""
    fmt = config["format"]["_target_"]
    if config["algorithm"]["_target_"] == "wush.MrGptq" and fmt not in (BASELINE, "wush.Mxfp4", "wush.Nvfp4"):
        yield (
            f"algorithm={choices.get('algorithm', 'mr_gptq')}: is for mxfp4 and nvfp4, not for "
            f"format={choices.get('format', fmt)}; use algorithm=gptq, or start two sweeps"
        )


class _Validator:
    """Validates configs that share parts: each part once, told by being the same object."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, type, Any], Any] = {}

    def validated(self, composed: Composed) -> dict[str, Any]:
        """The plain values of the typed config, in the schema's order; raises `ConfigError`."""
        config = composed.config
        known = {name: self._key(name, config.get(name)) for name in TrialConfig.model_fields}
        if config.keys() != known.keys() or not all(key in self._parts for key in known.values()):
            plain = validate(config, composed.typed).model_dump(mode="json", by_alias=True)
            for name, key in known.items():
                self._parts.setdefault(key, plain[name])
        return {name: self._parts[key] for name, key in known.items()}

    @staticmethod
    def _key(name: str, value: Any) -> tuple[str, type, Any]:
        return name, type(value), id(value) if isinstance(value, (dict, list)) else value


def _ways_to_run(composed: Sequence[Composed]) -> list[str]:
    """What to say where trials of a sweep differ in how or where they are to run."""
    problems = []
    for key in NEUTRAL:
        if any(one.config[key] != composed[0].config[key] for one in composed):
            values = dict.fromkeys(str(one.choices.get(key, one.config[key])) for one in composed)
            problems.append(
                f"{key}={','.join(values)}: one sweep has one {key}; give one value, or start several sweeps"
            )
    return problems


def _used_choices(composed: Sequence[Composed]) -> list[dict[str, str]]:
    """For each config its choices of the groups that matter to it: one object for those that share them."""
    shared: dict[tuple[int, bool], dict[str, str]] = {}
    for one in composed:
        baseline = is_baseline(one.config)
        if (id(one.choices), baseline) not in shared:
            unused = UNUSED_BY_BASELINE if baseline else ()
            used = {group: option for group, option in one.choices.items() if group not in unused}
            shared[id(one.choices), baseline] = used
    return [shared[id(one.choices), is_baseline(one.config)] for one in composed]


def sweep_name(overrides: Sequence[str]) -> str:
    """A folder name made of the overrides that can change a result, such as `format-mxfp4+nvfp4_transform-h`.

    Those that list several values come first, as a long name is cut.
    """
    telling = [override for override in overrides if not _is_neutral(override)]
    telling.sort(key=lambda override: "," not in override)
    name = re.sub(r"[^\w.+-]", "-", "_".join(telling).replace("=", "-").replace(",", "+")) or "default"
    return name if len(name) <= 80 else f"{name[:63].rstrip('_-+')}-{hash_of(list(overrides))}"


def _is_neutral(override: str) -> bool:
    group, *keys = re.split(r"[./@]", override.lstrip("+~").partition("=")[0])
    return group in {*NEUTRAL, "hydra"} - {"scale"} or (group in TEXTS and bool(keys) and keys[-1] in NEUTRAL_OF_TEXT)


def label(composed: Sequence[Composed], identities: Identities | None = None) -> list[dict[str, str]]:
    """For each config what tells it from the others.

    Its choice of each group that matters to it, and every other key whose value differs among the configs with
    the same choice of the key's group.
    """
    identities = identities or Identities()
    parts = [identities.relevant(one.config) for one in composed]
    differing = _differing(composed, parts)
    labels = []
    for one, used, own in zip(composed, _used_choices(composed), parts, strict=True):
        labels.append({group: used.get(group, "-") for group in LABELLING_GROUPS})
        for name, part in own.items():
            labels[-1] |= differing[name, one.choices.get(name), id(part)]
    return labels


def _differing(
    composed: Sequence[Composed], parts: Sequence[dict[str, Any]]
) -> dict[tuple[str, str | None, int], dict[str, str]]:
    """For each part (its name, the choice that made it, its object) those of its keys that differ between parts."""
    flat: dict[tuple[str, str | None, int], dict[str, str]] = {}
    for one, own in zip(composed, parts, strict=True):
        for name, part in own.items():
            key = name, one.choices.get(name), id(part)
            if key not in flat:
                flat[key] = {path: str(value) for path, value in _flatten(part, name).items()}
    values: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for (_, choice, _), pairs in flat.items():
        for path, value in pairs.items():
            values[path, choice].add(value)
    return {
        (name, choice, part): {path: value for path, value in pairs.items() if len(values[path, choice]) > 1}
        for (name, choice, part), pairs in flat.items()
    }


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
