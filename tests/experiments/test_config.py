"""The config groups and their schema: every option is valid, every key is read, every mistake is explained."""

import importlib
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from experiments.schema import ConfigError, validate
from tests.experiments.conftest import ROOT, composed, config

GROUPS = ("model", "format", "transform", "algorithm", "calibration", "evaluation", "tracking")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
NEEDED = {
    ("model", "local"): "model.path=x",
    ("calibration", "text"): "calibration.path=x",
    ("evaluation", "text"): "evaluation.path=x",
    ("evaluation", "lm_eval"): "evaluation.tasks=[winogrande]",
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_is_valid(group: str, option: str) -> None:
    validate(composed(f"{group}={option}", *filter(None, [NEEDED.get((group, option))]), small=()).config)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_key_of_an_option_is_an_argument_of_what_it_builds(group: str, option: str) -> None:
    node = yaml.safe_load((ROOT / "conf" / group / f"{option}.yaml").read_text())
    module, _, name = node.pop("_target_").rpartition(".")
    built = getattr(importlib.import_module(module), name)
    arguments = set(inspect.signature(built).parameters)
    if "keys" in arguments:  # handed on to the class that it gives
        arguments |= set(inspect.signature(get_type_hints(built)["return"]).parameters)
    assert set(node) - {"defaults"} <= arguments


@pytest.mark.parametrize(
    "key", sorted(set(yaml.safe_load((ROOT / "conf/config.yaml").read_text())) - {"defaults", "hydra"})
)
def test_every_key_of_the_main_config_is_read(key: str) -> None:
    sources = [path for path in (ROOT / "experiments").rglob("*.py") if path.name not in ("schema.py", "identity.py")]
    interpolated = [path for path in (ROOT / "conf").rglob("*.yaml") if f"${{{key}}}" in path.read_text()]
    read = re.compile(rf'\["{key}"\]|\bconfig\.{key}\b')
    assert interpolated or any(read.search(path.read_text()) for path in sources)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("format.scale_rule=foo", "format.scale_rule=foo: input should be 'paper' or 'ocp'"),
        ("transform.refit=no", "transform.refit=no: input should be a valid boolean"),
        ("seed=true", "seed=True: input should be a valid integer"),
        ("evaluation.windows=2.0", "evaluation.windows=2.0: input should be a valid integer"),
        ("~format._target_", "format._target_: missing; choose an option with format=..."),
        ("seed=-1", "seed=-1: input should be greater than or equal to 0"),
        ("device=gpu", "device=gpu: should be auto, cpu, cuda or cuda:N"),
        ("sweep=../x", "sweep=../x: should be a folder name"),
        ("+format.foo=1", "format.foo: unknown key; format has: _target_, scale_rule"),
        ("quantize.exclude=all", "quantize.exclude=all: input should be a valid list"),
        ("transform._target_=os.getcwd", "transform._target_: 'os.getcwd' is not one of: 'wush.Identity'"),
        ("calibration.window_length=1", "calibration.window_length=1: input should be greater than or equal to 2"),
    ],
)
def test_a_wrong_value_is_explained_with_its_key_and_choices(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(config(override))
    assert message in str(raised.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        validate(config("device=gpu", "evaluation.windows=0", "format.scale_rule=foo"))
    assert len(str(raised.value).splitlines()) == 3


def test_config_files_say_what_they_are() -> None:
    files = list(Path(ROOT / "conf").rglob("*.yaml"))
    silent = [path.name for path in files if not path.read_text().startswith("#")]
    assert not silent
