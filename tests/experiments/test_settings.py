"""The launchers' keys: every option is valid, every key is read, every mistake names its key and remedy."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.launch.plugins import as_node
from experiments.launch.settings import SlurmSettings, validate_launcher
from experiments.schema import ConfigError
from experiments.sweep import typed
from tests.experiments.conftest import ROOT, environment

OPTIONS = ("local", "local_parallel", "slurm")
KEYS = [
    (option, key)
    for option in OPTIONS
    for key in yaml.safe_load((ROOT / f"conf/hydra/launcher/{option}.yaml").read_text())
    if key != "_target_"
]


def launcher(option: str, *overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={option}", *overrides], return_hydra_config=True)
    node = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def slurm(*overrides: str) -> SlurmSettings:
    found = validate_launcher(launcher("slurm", *(f"hydra.launcher.{override}" for override in overrides)))
    assert isinstance(found, SlurmSettings)
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_valid(option: str) -> None:
    validate_launcher(launcher(option))


@pytest.mark.parametrize(("option", "key"), KEYS)
def test_every_key_is_read(option: str, key: str) -> None:
    readers = [path for path in (ROOT / "experiments/launch").glob("*.py") if path.name != "settings.py"]
    read = (f"settings.{key}", f"_own.{key}", "settings.minutes" if key == "time" else f"settings.{key}")
    assert any(name in path.read_text() for path in readers for name in read)


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("1:30:00", 90), ("'02:00:01'", 121), ("2-00:30:00", 2910), ("0-01:00:00", 60)]
)
def test_a_time_limit_is_minutes_or_slurms_own_form(text: str, minutes: int) -> None:
    assert slurm(f"time={text}").minutes == minutes


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("busy=no", "hydra.launcher.busy=no: input should be 'wait' or 'skip'"),
        ("time=0", "hydra.launcher.time=0: should be at least one minute"),
        ("time=1:30", "hydra.launcher.time=1:30: should be a number of minutes, 'HH:MM:SS' or 'D-HH:MM:SS'"),
        ("time='00:00:00'", "hydra.launcher.time=00:00:00: should be a number of minutes"),
        ("time=2", "hydra.launcher.signal_before=120: should be less than the time limit, which is 120 s"),
        ("signal_before=3000", "hydra.launcher.signal_before=3000: should be at most 2820 s: a job told earlier"),
        ("memory=64", "hydra.launcher.memory=64: should be a number and a unit of K, M, G or T, such as 64G"),
        ("gpus=-1", "hydra.launcher.gpus=-1: input should be greater than or equal to 0"),
        ("setup=x", "hydra.launcher.setup=x: input should be a valid list"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_right(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        slurm(override)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("mem=4G", "mem is set by hydra.launcher.memory"),
        ("cpus_per_task=4", "cpus_per_task is set by hydra.launcher.cpus"),
        ("output=x", "output is no option of yours to set"),
        ("exclusive=false", "exclusive: leave out an option that is not wanted"),
    ],
)
def test_extra_options_are_those_without_a_key(option: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validate_launcher(launcher("slurm", f"+hydra.launcher.extra.{option}"))
    assert validate_launcher(launcher("slurm", "+hydra.launcher.extra.constraint=h100"))


def test_an_unknown_key_and_a_missing_one_are_named() -> None:
    node = launcher("local_parallel", "+hydra.launcher.worker=3")
    del node["threads"]
    with pytest.raises(ConfigError) as error:
        validate_launcher(node)
    assert "hydra.launcher.threads: missing; set hydra.launcher.threads=..." in str(error.value)
    assert "hydra.launcher.worker: unknown key; hydra.launcher has: " in str(error.value)


def test_settings_are_light() -> None:
    code = "import sys, experiments.launch.settings; print({'torch', 'submitit', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "4:00:00",
            "1-04:00:00",
            "90",
            "0090",
            "1_000",
            "on",
            "off",
            "yes",
            "No",
            "true",
            "FALSE",
            "null",
            "0x1F",
            "0b1",
        ),
        *(
            "1e5",
            "1E+5",
            "1234e56",
            "1.10",
            "1.",
            ".5",
            "-3",
            "+0.5",
            "2026-01-01",
            "1.2.3",
            "a",
            "inf",
            "12:30",
            "3e",
        ),
    ],
)
def test_a_plain_value_means_in_a_file_what_it_means_on_the_command_line(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={text}"])
    in_file, on_command_line = OmegaConf.create(f"key: {text}\n").key, override.value()
    assert (in_file, type(in_file)) == (on_command_line, type(on_command_line))


def test_quotes_make_a_text_of_anything_in_a_file() -> None:
    assert OmegaConf.create("{a: '1e5', b: \"true\", c: '4:00:00'}") == {"a": "1e5", "b": "true", "c": "4:00:00"}


@pytest.mark.parametrize(("text", "minutes"), [("4:00:00", 240), ("1-00:00:00", 1440), ("'0:30:00'", 30), ("90", 90)])
def test_a_time_in_a_file_is_the_time_on_the_command_line(text: str, minutes: int, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "hydra" / "launcher" / "mine.yaml").write_text(f"defaults: [slurm]\ntime: {text}\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides=["hydra/launcher=mine"], return_hydra_config=True)
    settings = validate_launcher(as_node(config.hydra.launcher))
    assert isinstance(settings, SlurmSettings)
    assert settings.minutes == minutes


@pytest.mark.parametrize(("key", "text"), [("account", "123e4"), ("partition", "1.10"), ("qos", "true")])
def test_a_text_that_reads_as_a_number_is_told_as_it_was_typed(key: str, text: str) -> None:
    node = launcher("slurm", f"hydra.launcher.{key}={text}")
    with pytest.raises(ConfigError) as error:
        validate_launcher(node, typed([f"hydra.launcher.{key}={text}"]))
    assert str(error.value).startswith(f"hydra.launcher.{key}={text}: read as ")
    assert str(error.value).endswith(f"put it in quotes: hydra.launcher.{key}='\"{text}\"'")
