"""Hydra plugins: a sweeper that makes every combination, and a launcher that runs them as one sweep.

Importing this module registers them. Hydra accepts plugins only from the package `hydra_plugins`, so this module
is known there as `hydra_plugins.wush`.
"""

import importlib
import itertools
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from experiments import sweep
from experiments.launch import driver
from experiments.schema import ConfigError
from experiments.sweep import Composed


class GridSweeper(Sweeper):
    """Every combination of the comma-separated values, handed to the launcher at once; writes no files."""

    __module__ = "hydra_plugins.wush"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self._context = hydra_context
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        values = {override.get_key_element(): _values(override) for override in parser.parse_overrides(arguments)}
        combinations = [list(own) for own in itertools.product(*values.values())]
        return [self._launcher.launch(combinations, initial_job_idx=0)]


def _values(override: Override) -> list[str]:
    """The single-valued overrides, as text, that an override stands for."""
    text = str(override.input_line)
    if not override.is_sweep_override():
        return [text]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise ConfigError(f"{text}: not a list of values; write {key}=a,b or {key}=range(1,5)")
    return [f"{key}={value}" for value in map(str, override.sweep_string_iterator())]


class LocalLauncher(Launcher):
    """Trials one after the other in this process."""

    __module__ = "hydra_plugins.wush"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        loader = self._context.config_loader
        configs = [loader.load_sweep_config(self._config, list(own)) for own in job_overrides]
        composed = [as_composed(config, config.hydra) for config in configs]
        outcomes = driver.run(sweep.plan(composed, self._config.hydra.overrides.task))
        return [JobReturn(overrides=[outcome.name], status=JobStatus.COMPLETED) for outcome in outcomes]


def as_composed(config: DictConfig, hydra_node: DictConfig) -> Composed:
    """A config as plain values, without its `hydra` node, and the choices that node knows."""
    choices = {str(key): str(value) for key, value in hydra_node.runtime.choices.items()}
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return Composed(OmegaConf.to_container(own, resolve=True, throw_on_missing=True), choices)  # type: ignore[arg-type]


def _register() -> None:
    """Make this module known as `hydra_plugins.wush`, and its plugins known to Hydra."""
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no other plugin is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    namespace.wush = sys.modules["hydra_plugins.wush"] = sys.modules[__name__]  # type: ignore[attr-defined]
    Plugins.instance().register(GridSweeper)
    Plugins.instance().register(LocalLauncher)


_register()
