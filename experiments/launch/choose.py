"""From a launcher's config node to the launch that it stands for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from experiments.launch import driver
from experiments.launch.driver import Launch
from experiments.launch.settings import LocalParallelSettings, LocalSettings, SlurmSettings, validate_launcher
from experiments.records import Outcome
from experiments.schema import ConfigError
from experiments.sweep import Sweep

_planning: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def planning() -> Iterator[None]:
    """While open, sweeps are shown, not run. Hydra stands between the command line and `carry_out`."""
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def carry_out(sweep: Sweep, node: dict[str, Any]) -> Sequence[Outcome]:
    """Run a sweep as `hydra.launcher` says, or show what it would run; errors as `driver.run`."""
    settings = validate_launcher(node)
    if _planning.get():
        _show(sweep, settings)
        return []
    return driver.run(sweep, launch_of(settings))


def launcher_problems(node: dict[str, Any], typed: Mapping[str, str]) -> list[str]:
    """All that is wrong with the launcher's keys, a line each; `typed` as of `schema.validate`."""
    try:
        validate_launcher(node, typed)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def launch_of(settings: LocalSettings | LocalParallelSettings | SlurmSettings) -> Launch:
    """The launch of the settings."""
    if isinstance(settings, LocalSettings):
        from experiments.launch.local import LocalLaunch

        return LocalLaunch(settings)
    if isinstance(settings, LocalParallelSettings):
        from experiments.launch.local_parallel import LocalParallelLaunch

        return LocalParallelLaunch(settings)
    from experiments.launch.cluster import SlurmLaunch

    return SlurmLaunch(settings)


def _show(sweep: Sweep, settings: LocalSettings | LocalParallelSettings | SlurmSettings) -> None:
    from experiments.views import plan

    if isinstance(settings, LocalSettings):
        plan.show(sweep)
    elif isinstance(settings, LocalParallelSettings):
        from experiments.launch.local_parallel import environments

        workers = len(environments(settings, sweep.trials[0].config["device"]))
        plan.show(sweep, workers=workers, launcher="local_parallel")
    else:
        on_gpu = settings.gpus and sweep.trials[0].config["device"] != "cpu"
        kind: Literal["cpu", "gpu"] = "gpu" if on_gpu else "cpu"
        plan.show(sweep, workers=settings.array_parallelism, launcher="slurm", elsewhere=kind)
