"""Hydra plugins: a sweeper that makes every combination, and launchers that run them as one sweep.

Importing this module registers them. Hydra accepts plugins only from the package `hydra_plugins`, so this module
is known there as `hydra_plugins.wush`.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from experiments.launch import grid, plain_values  # noqa: F401  the latter says how config files are read
from experiments.launch.choose import carry_out, launcher_problems
from experiments.sweep import Composed, typed


class GridSweeper(Sweeper):
    """Every combination of the comma-separated values, handed to the launcher at once; writes no files.

    Of an experiment, the combinations of each of its grids.
    """

    __module__ = "hydra_plugins.wush"

    def __init__(self, **_: Any) -> None:
        """The grids are read from the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self._context = hydra_context
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        lists = grid.combinations(arguments, self._context.config_loader, grid.grids_of(self.config))
        return [self._launcher.launch(lists, initial_job_idx=0)]


class _SweepLauncher(Launcher):
    """Plans the trials, with all that is wrong with them and with the launcher's keys in one error; then runs them."""

    def __init__(self, **_: Any) -> None:
        """The keys are read, and checked, from the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        overrides = self._config.hydra.overrides.task
        node = as_node(self._config.hydra.launcher)
        wrong = launcher_problems(node, typed(self._config.hydra.overrides.hydra))
        sweep = grid.planned(self._context.config_loader, self._config, job_overrides, overrides, wrong)
        outcomes = carry_out(sweep, node)
        return [JobReturn(overrides=[outcome.name], status=JobStatus.COMPLETED) for outcome in outcomes]


class LocalLauncher(_SweepLauncher):
    """Trials one after the other in this process."""

    __module__ = "hydra_plugins.wush"


class LocalParallelLauncher(_SweepLauncher):
    """Trials on worker processes of this machine."""

    __module__ = "hydra_plugins.wush"


class SlurmLauncher(_SweepLauncher):
    """Trials as SLURM jobs."""

    __module__ = "hydra_plugins.wush"


def as_node(launcher: DictConfig) -> dict[str, Any]:
    """A launcher's config as plain values."""
    return OmegaConf.to_container(launcher, resolve=True)  # type: ignore[return-value]


def as_composed(config: DictConfig, hydra_node: DictConfig) -> Composed:
    """A config as plain values, without its `hydra` node, and the choices that node knows."""
    return Composed(grid.plain(config, resolve=True), grid.choices(hydra_node), typed(hydra_node.overrides.task))


def _register() -> None:
    """Make this module known as `hydra_plugins.wush`, and its plugins known to Hydra."""
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no other plugin is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    namespace.wush = sys.modules["hydra_plugins.wush"] = sys.modules[__name__]  # type: ignore[attr-defined]
    for plugin in (GridSweeper, LocalLauncher, LocalParallelLauncher, SlurmLauncher):
        Plugins.instance().register(plugin)


_register()
