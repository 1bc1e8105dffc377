"""From a launcher's config node to the launch that it stands for."""

from typing import Any

from experiments.launch.driver import Launch
from experiments.launch.settings import LocalParallelSettings, LocalSettings, validate_launcher


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
