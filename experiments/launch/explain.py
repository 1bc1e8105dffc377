"""Errors of Hydra and OmegaConf in the user's terms: what was wrong, and which keys or options there are."""

import difflib
import re
from collections.abc import Collection, Iterable

from hydra.errors import MissingConfigException
from omegaconf.errors import MissingMandatoryValue


def explain(error: BaseException, known: Collection[str] = ()) -> str:
    """The message of a config error, with the keys (of those `known`) or options that would have been valid."""
    text = str(error)
    if isinstance(error, MissingConfigException) and text.startswith("Cannot find primary config"):
        return f"--config-name {error.missing_cfg_file}: no such config; leave the option out, there is one config only"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return unknown_option(group, option, error.options)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: a value is needed; set {error.full_key}=..."
    interpolated = re.search(r"Interpolation key '([^']+)' not found\s+full_key: (\S+)", text)
    if interpolated:
        return f"{interpolated[2]}: there is no {interpolated[1]} to take its value from; set {interpolated[2]}=..."
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", f"{text}\n{error.__cause__}")
    if unknown and known:
        return unknown_key(unknown[2], known)
    return text


def unknown_option(group: str, option: object, options: Iterable[str]) -> str:
    """What to say of a group's option that is none of its options."""
    return f"{group}={'null' if option is None else option}: unknown option; {group} has: {', '.join(sorted(options))}"


def unknown_key(full_key: str, known: Collection[str]) -> str:
    """What to say of a key that is none of those known."""
    if full_key.startswith("hydra.launcher."):
        return f"{full_key}: the chosen hydra/launcher has no such key; see conf/hydra/launcher/ for those of each"
    parent = full_key.rpartition(".")[0]
    siblings = sorted(key for key in known if key.rpartition(".")[0] == parent)
    if parent in known:  # the names alone: with its group before it, any key of the group would look alike
        names = [key.rpartition(".")[2] for key in siblings]
        close = [f"{parent}.{name}" for name in difflib.get_close_matches(full_key.rpartition(".")[2], names, 1)]
    else:
        close = difflib.get_close_matches(full_key, known, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    valid = ", ".join(key.rpartition(".")[2] for key in siblings) or "nothing"
    return f"{full_key}: unknown key{hint} ({parent or 'the config'} has: {valid})"


def paths(node: object, prefix: str = "") -> list[str]:
    """Every key of a config of plain values, with dots, but for the names of what it builds."""
    if not isinstance(node, dict):
        return []
    names = [f"{prefix}{key}" for key in node if key != "_target_"]
    return names + [path for key, value in node.items() for path in paths(value, f"{prefix}{key}.")]
