"""From a launcher's config node to the launch that it stands for."""

from collections.abc import Sequence
from typing import Any

from experiments.launch import driver
from experiments.launch.driver import Launch
from experiments.launch.settings import LocalParallelSettings, LocalSettings, validate_launcher
from experiments.records import Outcome
from experiments.schema import ConfigError
from experiments.sweep import Sweep

PLAN = "hydra_plugins.wush.PlanLauncher"


def carry_out(sweep: Sweep, node: dict[str, Any]) -> Sequence[Outcome]:
    """Run a sweep as `hydra.launcher` says, or show what it would run; errors as `driver.run`."""
    if node["_target_"] == PLAN:
        from experiments.views import plan

        plan.show(sweep)
        return []
    return driver.run(sweep, launch_of(node))


def launcher_problems(node: dict[str, Any]) -> list[str]:
    """All that is wrong with the launcher's keys, a line each."""
    try:
        if node["_target_"] != PLAN:
            validate_launcher(node)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def launch_of(node: dict[str, Any]) -> Launch:
    """The launch of `hydra.launcher`; raises `ConfigError` that lists every wrong key."""
    settings = validate_launcher(node)
    if isinstance(settings, LocalSettings):
        from experiments.launch.local import LocalLaunch

        return LocalLaunch(settings)
    if isinstance(settings, LocalParallelSettings):
        from experiments.launch.local_parallel import LocalParallelLaunch

        return LocalParallelLaunch(settings)
    from experiments.launch.cluster import SlurmLaunch

    return SlurmLaunch(settings)
