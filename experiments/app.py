"""The Hydra app behind `run.py`: a trial or a sweep, and what goes wrong as one readable message.

Exit codes: 0 all trials done, 1 a trial failed, 2 the config or the results folder is wrong, 130 interrupted.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from experiments import sweep
from experiments.launch import driver
from experiments.launch.plugins import as_composed
from experiments.schema import ConfigError
from experiments.views.display import log_to_console

CONF = Path(__file__).parent.parent / "conf"
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _app(config: DictConfig) -> None:
    with _readable_errors():  # here too: Hydra announces errors that leave the task in words of its own
        hydra_node = HydraConfig.get()
        composed = as_composed(config, hydra_node)  # type: ignore[arg-type]
        driver.run(sweep.plan([composed], hydra_node.overrides.task))


def main() -> None:
    """Run the app with `sys.argv`, and exit with the code that says how it went."""
    log_to_console()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its errors on instead of printing them itself
    # Hydra takes -m only before all overrides.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    with _readable_errors():
        _app()


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except driver.SweepFailed:
        sys.exit(1)
    except (HydraException, OmegaConfBaseException, ConfigError) as error:
        for line in explain(error).splitlines():
            print(f"config error: {line}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):  # Hydra's, for group=null and group=1
            raise
        print(f"config error: {_unknown_option()}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}; finished trials stay, and the same command goes on with the rest", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; finished trials stay, and the same command goes on with the rest", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def explain(error: BaseException) -> str:
    """The message of a config error, with the keys or options that would have been valid."""
    text = str(error)
    if isinstance(error, MissingConfigException) and text.startswith("Cannot find primary config"):
        return f"--config-name {error.missing_cfg_file}: no such config; leave the option out, there is one config only"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: unknown option; {group} has: {', '.join(error.options)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: a value is needed; set {error.full_key}=..."
    interpolated = re.search(r"Interpolation key '([^']+)' not found\s+full_key: (\S+)", text)
    if interpolated:
        return f"{interpolated[2]}: there is no {interpolated[1]} to take its value from; set {interpolated[2]}=..."
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", f"{text}\n{error.__cause__}")
    if unknown:
        return _unknown_key(unknown[2])
    return text


def _unknown_option() -> str:
    """The override that gives a group something that is no name of an option."""
    for argument in sys.argv[1:]:
        group, _, values = argument.lstrip("+").partition("=")
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        for value in values.split(","):
            if group in GROUPS and value not in options:
                return f"{group}={value}: unknown option; {group} has: {', '.join(options)}"
    return "a group has no option of that name; see run.py --help"


def _unknown_key(full_key: str) -> str:
    known = _known_keys()
    parent = full_key.rpartition(".")[0]
    siblings = sorted(key for key in known if key.rpartition(".")[0] == parent)
    close = difflib.get_close_matches(full_key, known, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    valid = ", ".join(key.rpartition(".")[2] for key in siblings) or "nothing"
    return f"{full_key}: unknown key{hint}\n{parent or 'the config'} has: {valid}"


def _known_keys() -> list[str]:
    """Every key of the config as composed from the valid part of the command line."""
    from hydra import compose, initialize_config_dir

    groups = [arg for arg in sys.argv[1:] if re.fullmatch(r"[a-z]+=[\w.-]+", arg)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in (groups, []):
            try:
                config = compose("config", overrides=overrides)
            except (HydraException, OmegaConfBaseException):
                continue
            return _paths(OmegaConf.to_container(config, throw_on_missing=False))
    return []


def _paths(node: object, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    names = [f"{prefix}{key}" for key in node if key != "_target_"]
    return names + [path for key, value in node.items() for path in _paths(value, f"{prefix}{key}.")]
