"""The configs of a sweep, composed as Hydra composes each of them, but at a fraction of the cost.

Hydra composes once for every choice of groups (and whatever else changes the shape of a config). A plain value of a
key that is there is set in that config, and only what is new is resolved: parts that configs share are one object.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import sweep
from experiments.launch.explain import explain, paths, unknown_key, unknown_option
from experiments.schema import ConfigError
from experiments.sweep import Composed

_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # Hydra raises the last for group=null
_NAMES = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_INTERPOLATION = re.compile(r"\$\{([A-Za-z_]\w*)(\.[A-Za-z_]\w*)*\}")
_BROKEN = object()  # in place of a part that cannot be resolved


def combinations(
    arguments: Sequence[str], loader: ConfigLoader, grids: Sequence[Sequence[str]] = ()
) -> list[tuple[str, ...]]:
    """Every combination of the values that the overrides list; one that cannot be listed stays as it is.

    With the overrides of an experiment's grids: the combinations of each, in which `arguments` take the place of
    those of the same key.
    """
    parser = OverridesParser.create(config_loader=loader)

    def values(overrides: Sequence[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for text in overrides:
            try:
                (override,) = parser.parse_overrides([text])
            except HydraException:
                found[text] = [text]
            else:
                found[override.get_key_element()] = _values(override, text)
        return found

    given = values(arguments)

    def taking(grid: Sequence[str]) -> dict[str, list[str]]:
        # A key of an option that another one takes the place of goes with it: that has no such key.
        return {key: own for key, own in values(grid).items() if "." not in key or _top(key) not in given} | given

    return [own for grid in grids or [()] for own in itertools.product(*taking(grid).values())]


def grids_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each grid of the experiment that a config has, at its scale; none without an experiment.

    Raises `ConfigError` for an experiment without that scale, or a scale without an experiment.
    """
    experiment = config.hydra.runtime.choices.get("experiment")
    if experiment is None:
        if config.scale != "paper":
            raise ConfigError(f"scale={config.scale}: it is an experiment's; choose one with experiment=...")
        return []
    grids = OmegaConf.to_container(config.hydra.sweeper).get(config.scale)  # type: ignore[union-attr]
    if not grids:
        raise ConfigError(f"experiment={experiment} has no scale={config.scale}; there are scale=paper and scale=small")
    return [[f"{key}={_text(value)}" for key, value in grid.items()] for grid in grids]


def _text(value: Any) -> str:
    """A value of a grid as an override has it; text is one already, such as `h,wush`."""
    return value if isinstance(value, str) else json.dumps(value)


def _values(override: Override, text: str) -> list[str]:
    """The single-valued overrides, as text, that an override stands for."""
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return [text]
    key, values = override.get_key_element(), list(map(str, override.sweep_string_iterator()))
    listed = override.value()
    typed = _pieces(text.partition("=")[2]) if isinstance(listed, ChoiceSweep) and listed.simple_form else []
    # As typed where that is known: of 1e5 and 1.10, numbers to Hydra, it gives back 100000.0 and 1.1.
    return [f"{key}={value}" for value in (typed if len(typed) == len(values) else values)]


def _pieces(text: str) -> list[str]:
    """What commas outside of quotes and brackets separate."""
    pieces, depth, quote = [""], 0, ""
    for before, letter in zip(" " + text, text, strict=False):
        if letter in "\"'" and before != "\\" and quote in ("", letter):
            quote = "" if quote else letter
        elif not quote:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not quote and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def compose(
    loader: ConfigLoader, master: DictConfig, job_overrides: Sequence[Sequence[str]]
) -> tuple[list[Composed], list[str]]:
    """The config of each list of overrides, and all that is wrong with them, a line each.

    Where something is wrong, the configs are those without it, so that what else is wrong with them can be found.
    """
    composer = _Composer(loader, master)
    found = [composer.compose(overrides) for overrides in job_overrides]
    lines = [line for problem in composer.problems for line in problem.splitlines()]
    return [one for one in found if one], list(dict.fromkeys(lines))


def planned(
    loader: ConfigLoader,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    overrides: Sequence[str],
    known_problems: Sequence[str] = (),
) -> sweep.Sweep:
    """The sweep of the trials that the lists of overrides make; raises one `ConfigError` with all that is wrong.

    `overrides`: those the user gave, which make the sweep's name.
    """
    composed, problems = compose(loader, master, job_overrides)
    return sweep.plan(composed, overrides, [*known_problems, *problems])


def problems(loader: ConfigLoader, master: DictConfig, arguments: Sequence[str]) -> str:
    """All that is wrong with a command line's overrides, a line each."""
    try:
        planned(loader, master, combinations(arguments, loader, grids_of(master)), arguments)
    except ConfigError as error:
        return str(error)
    return ""


def plain(config: DictConfig, *, resolve: bool) -> dict[str, Any]:
    """A config's values without its `hydra` node; resolved, none may be missing."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return OmegaConf.to_container(own, resolve=resolve, throw_on_missing=resolve)  # type: ignore[return-value]


def choices(hydra_node: DictConfig) -> dict[str, str]:
    """The option chosen of each group."""
    return {str(key): str(value) for key, value in hydra_node.runtime.choices.items() if value is not None}


@dataclass(frozen=True, eq=False)
class _Given:
    """An override; `settable` when it gives a plain value to a key, which Hydra is not needed for."""

    text: str
    key: str
    override: Override
    is_group: bool
    settable: bool

    def overlaps(self, other: "_Given") -> bool:
        """Whether one's key is the other's or a part of it."""
        return f"{self.key}.".startswith(f"{other.key}.") or f"{other.key}.".startswith(f"{self.key}.")


class _Base:
    """A config as Hydra composed it, in which the values of some keys are set again and again."""

    def __init__(self, config: DictConfig, keys: Sequence[str], parts: dict[Any, Any]) -> None:
        """`keys`: those to be set; `parts`: what has been resolved so far, by what it is made of."""
        self._config, self._parts = config, parts
        self.raw = plain(config, resolve=False)
        self.choices = choices(config.hydra)
        self.unknown = {key for key in keys if self._place(key) == "nowhere"}
        self.stubborn = {key for key in keys if self._place(key) == "elsewhere"}
        self.keys = set(keys) - self.unknown
        closures = {top: self._closure(top) for top in self.raw}
        if None in closures.values():
            self.stubborn |= set(keys)
        self._made_of = {top: self._origin(top, closure, keys) for top, closure in closures.items()}

    def _origin(self, top: str, closure: set[str] | None, keys: Sequence[str]) -> tuple[tuple[str, object], set[str]]:
        """What a part is made of before any key is set, and the parts of which keys that are set can change it."""
        if closure is None:
            return (top, id(self)), set()
        return (top, repr([self.raw.get(name) for name in sorted(closure)])), closure & set(map(_top, keys))

    def config(self, given: Sequence[_Given], problems: dict[str, None]) -> dict[str, Any] | None:
        """The config with the values given, which are of the keys it is for; None when it cannot be resolved."""
        found = {}
        made_of: tuple[object, ...]
        for top, (composed, touched) in self._made_of.items():
            made_of = composed
            if touched:
                made_of = (*composed, *[one.text for one in given if _top(one.key) in touched])
            if made_of not in self._parts:
                self._parts[made_of] = self._resolved(top, given, problems)
            found[top] = self._parts[made_of]
        return None if any(part is _BROKEN for part in found.values()) else found

    def _resolved(self, top: str, given: Sequence[_Given], problems: dict[str, None]) -> Any:
        try:
            for one in given:
                OmegaConf.update(self._config, one.key, one.override.value())
            part = self._config[top]
            is_config = OmegaConf.is_config(part)
            return OmegaConf.to_container(part, resolve=True, throw_on_missing=True) if is_config else part
        except OmegaConfBaseException as error:
            problems[explain(error, self.known)] = None
            return _BROKEN

    @cached_property
    def known(self) -> list[str]:
        """Every key of the config."""
        return paths(self.raw)

    def _place(self, key: str) -> str:
        """Whether a key is a `leaf` of the config, `nowhere`, or where only Hydra can set it."""
        node: Any = self.raw
        for name in key.split("."):
            if not isinstance(node, dict):
                return "elsewhere"
            if name not in node:
                return "nowhere"
            node = node[name]
        return "elsewhere" if isinstance(node, (dict, list)) else "leaf"

    def _closure(self, top: str) -> set[str] | None:
        """The parts that a part takes values from, itself among them; None where that is not plain to see."""
        found, left = set(), {top}
        while left:
            name = left.pop()
            found.add(name)
            for text in _texts(self.raw.get(name)):
                if "$" in _INTERPOLATION.sub("", text) or "\\" in text:
                    return None
                left |= {match[1] for match in _INTERPOLATION.finditer(text)} - found
        return None if "hydra" in found else found


def _top(key: str) -> str:
    return key.partition(".")[0]


def _texts(node: Any) -> Iterator[str]:
    """The strings of plain values that hold an interpolation."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _texts(item)
    elif isinstance(node, str) and "${" in node:
        yield node


class _Composer:
    """Composes configs that differ in some overrides, and collects what is wrong with these."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.problems: dict[str, None] = {}
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create(config_loader=loader)
        self._groups = set(loader.list_groups(""))
        self._given: dict[str, _Given | None] = {}
        self._bases: dict[tuple[tuple[str, ...], tuple[str, ...]], _Base | None] = {}
        self._parts: dict[Any, Any] = {}

    def compose(self, overrides: Sequence[str]) -> Composed | None:
        """The config that Hydra composes of the overrides; None, with a problem, when it has none."""
        given = [one for one in map(self._parsed, overrides) if one]
        base, setting = self._base(given)
        if base is None:
            return None
        self.problems |= dict.fromkeys(unknown_key(key, base.known) for key in base.unknown)
        if base.choices.get("experiment") != self._master.hydra.runtime.choices.get("experiment"):
            self.problems["experiment: one sweep has one experiment; start one for each"] = None
            return None
        config = base.config([one for one in setting if one.key in base.keys], self.problems)
        return None if config is None else Composed(config, base.choices, sweep.typed(overrides))

    def _base(self, given: Sequence[_Given]) -> tuple[_Base | None, list[_Given]]:
        """The config as composed of what only Hydra can, and the overrides to be set in it."""
        stubborn: set[str] = set()
        while True:
            composing, setting = _split(given, stubborn)
            known = tuple([one.text for one in composing]), tuple([one.key for one in setting])
            if known not in self._bases:
                self._bases[known] = self._composed(composing, known[1])
            base = self._bases[known]
            if base is None or not base.stubborn:
                return base, setting
            stubborn |= base.stubborn

    def _parsed(self, text: str) -> _Given | None:
        """An override, parsed once; None, with a problem, for what is none or has no single value."""
        if text not in self._given:
            self._given[text] = self._parse(text)
        return self._given[text]

    def _parse(self, text: str) -> _Given | None:
        try:
            (override,) = self._parser.parse_overrides([text])
        except HydraException as error:
            said = explain(error)
            self.problems[said if text in said else f"Error parsing override '{text}'\n{said}"] = None
            return None
        key = override.key_or_group
        if override.is_sweep_override():
            name = override.get_key_element()
            self.problems[f"{text}: not a list of values; write {name}=a,b or {name}=range(1,5)"] = None
            return None
        is_group = key in self._groups or "/" in key
        value = override.value()
        is_plain = value is None or isinstance(value, (str, int, float))
        if isinstance(value, str):
            is_plain = "${" not in value and "\\" not in value and value != "???"
        changes = override.type == OverrideType.CHANGE and override.package is None
        settable = changes and is_plain and not is_group and bool(_NAMES.fullmatch(key))
        return _Given(text, key, override, is_group, settable and not key.startswith("hydra."))

    def _composed(self, composing: Sequence[_Given], keys: Sequence[str]) -> _Base | None:
        """What Hydra composes; where it cannot, the problem is kept and the overrides that make it are left out."""
        left_out: set[str] = set()
        while True:
            tried = [one for one in composing if one.text not in left_out]
            try:
                config = self._loader.load_sweep_config(self._master, [one.text for one in tried])
            except _ERRORS as error:
                wrong = {one: problem for one in tried if (problem := self._problem(one))}
                self.problems |= dict.fromkeys(wrong.values() or [explain(error, self._known)])
                if not wrong:
                    return None
                left_out |= {one.text for one in wrong}
            else:
                # The keys of an option that is not there are no mistake of their own.
                without = {one.key for one in composing if one.text in left_out}
                return _Base(config, [key for key in keys if _top(key) not in without], self._parts)

    def _problem(self, given: _Given) -> str | None:
        """What is wrong with an override by itself."""
        value = given.override.value()
        if given.override.is_delete():
            return None
        if given.is_group:
            options = self._loader.get_group_options(given.key)
            is_name = isinstance(value, str) and "/" not in value
            is_wrong = value not in options if is_name else value is None or isinstance(value, (int, float))
            return unknown_option(given.key, value, options) if options and is_wrong else None
        if given.override.type == OverrideType.CHANGE and not {given.key, "hydra"} & {*self._known, _top(given.key)}:
            return unknown_key(given.key, self._known)
        return None

    @cached_property
    def _known(self) -> list[str]:
        """Every key of the config that the defaults make."""
        return paths(plain(self._loader.load_sweep_config(self._master, []), resolve=False))


def _split(given: Sequence[_Given], stubborn: set[str]) -> tuple[list[_Given], list[_Given]]:
    """The overrides that Hydra has to compose, and those that can be set after these, whatever they are."""
    shaping = [one for one in given if not one.is_group and (not one.settable or one.key in stubborn)]

    def is_set(one: _Given) -> bool:
        return one.settable and one.key not in stubborn and not any(one.overlaps(other) for other in shaping)

    return [one for one in given if not is_set(one)], [one for one in given if is_set(one)]
