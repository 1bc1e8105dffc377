"""The Hydra app behind `run.py`: a trial or a sweep, and what goes wrong as one readable message.

Exit codes: 0 all trials done, 1 a trial failed, 2 the config or the results folder is wrong, 130 interrupted.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import sweep
from experiments.attempts import Cancelled
from experiments.launch import driver, grid
from experiments.launch.choose import carry_out, launcher_problems, planning
from experiments.launch.explain import explain
from experiments.launch.plugins import as_composed, as_node
from experiments.schema import ConfigError
from experiments.views.display import log_to_console

CONF = Path(__file__).parent.parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _app(config: DictConfig) -> None:
    with _readable_errors():  # here too: Hydra announces errors that leave the task in words of its own
        hydra_node = HydraConfig.get()
        composed = as_composed(config, hydra_node)  # type: ignore[arg-type]
        if "experiment" in composed.choices:
            raise ConfigError(f"experiment={composed.choices['experiment']} is a sweep: run it with -m")
        node = as_node(hydra_node.launcher)
        wrong = launcher_problems(node, sweep.typed(hydra_node.overrides.hydra))
        carry_out(sweep.plan([composed], hydra_node.overrides.task, wrong), node)


def main() -> None:
    """Run the app with `sys.argv`, and exit with the code that says how it went."""
    log_to_console()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its errors on instead of printing them itself
    # Hydra takes -m only before all overrides.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    with _readable_errors():
        _app()


def plan(overrides: Sequence[str]) -> None:
    """Show what a sweep of the overrides would run; exits as `main`."""
    sys.argv[1:] = ["-m", *(override for override in overrides if override not in ("-m", "--multirun"))]
    with planning():
        main()


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except driver.SweepFailed:
        sys.exit(1)
    except ConfigError as error:
        _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(_all_problems() or explain(error))
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):  # Hydra's, for group=null and group=1
            raise
        _refuse(_all_problems() or str(error))
    except OSError as error:
        print(f"error: {error}; finished trials stay, and the same command goes on with the rest", file=sys.stderr)
        sys.exit(1)
    except Cancelled:
        print("cancelled; finished trials and decoder blocks stay, the same command or retry goes on", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted; finished trials and decoder blocks stay, and the same command goes on", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def _refuse(problems: str) -> NoReturn:
    for line in problems.splitlines():
        print(f"config error: {line}", file=sys.stderr)
    sys.exit(2)


def _all_problems() -> str:
    """All that is wrong with the overrides of the command line, of which Hydra tells the first; a line each."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    overrides = [argument for argument in given if "=" in argument or argument.startswith("~")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        known = [f"experiment={name}" for name in loader.get_group_options("experiment")]
        of_grids = [one for one in overrides if one in known or one.startswith("scale=")]
        master = compose("config", overrides=of_grids, return_hydra_config=True)
        return grid.problems(loader, master, overrides)
