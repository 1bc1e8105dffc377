"""One reading of plain values: what stands in a config file means what the same text means after `key=`.

YAML 1.1, by which OmegaConf reads files, takes `4:00:00` for 14400, `0644` for 420, and `no` for false; Hydra's
command line takes none of them for a number or a truth value. Here files are read by the command line's grammar.
Importing this module makes it so for every config that this process composes.
"""

import re
from collections.abc import Callable
from typing import Any

import omegaconf._utils
import omegaconf.basecontainer
import yaml

_INT = r"(?:0|[1-9](?:_?[0-9])*)"
_POINT = rf"(?:{_INT}\.|{_INT}?\.[0-9](?:_?[0-9])*)"
_EXPONENT = rf"(?:{_INT}|{_POINT})[eE][-+]?[0-9](?:_?[0-9])*"
# Of each tag the texts that are its values. YAML's own `.inf` and `.nan` stay besides the command line's.
_MEANINGS = {
    "tag:yaml.org,2002:bool": re.compile(r"true|false", re.IGNORECASE),
    "tag:yaml.org,2002:int": re.compile(rf"[-+]?{_INT}"),
    "tag:yaml.org,2002:float": re.compile(rf"[-+]?(?:{_EXPONENT}|{_POINT}|\.?inf|\.?nan)", re.IGNORECASE),
}
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Whole:
    """A pattern that matches whole texts only, as PyYAML asks of one."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.match = pattern.fullmatch


def _float(_: Any, node: yaml.ScalarNode) -> float:
    text = node.value.lower().replace("_", "")
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _as_typed(get_loader: Callable[[], Any]) -> Callable[[], Any]:
    """OmegaConf's loader of YAML, with the meanings above in place of its own."""

    def loader() -> Any:
        found = get_loader()
        kept = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_MEANINGS, _TIMESTAMP)]
            for first, resolvers in found.yaml_implicit_resolvers.items()
        }
        for first in "+-.0123456789tTfFnNiI":
            kept.setdefault(first, []).extend((tag, _Whole(pattern)) for tag, pattern in _MEANINGS.items())
        found.yaml_implicit_resolvers = kept
        found.add_constructor("tag:yaml.org,2002:float", _float)
        return found

    return loader


_loader = _as_typed(omegaconf._utils.get_yaml_loader)
for module in (omegaconf._utils, omegaconf.basecontainer):  # each has the name for itself
    module.get_yaml_loader = _loader  # type: ignore[attr-defined, unused-ignore]


def read(text: str) -> Any:
    """The plain value, or the list or mapping of them, of some YAML; raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_loader())  # a SafeLoader
