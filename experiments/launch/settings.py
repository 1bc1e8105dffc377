"""The keys of the launchers (`hydra/launcher=...`): their types and valid values. No SLURM, no torch."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from experiments.schema import ConfigError, _Built, _explain, _Strict

Busy = Literal["wait", "skip"]
OWN_OPTIONS = {
    **{"partition": "partition", "account": "account", "qos": "qos", "time": "time", "signal": "signal_before"},
    **{"mem": "memory", "cpus-per-task": "cpus", "gpus-per-node": "gpus", "gpus": "gpus"},
    **{"array": "array_parallelism", "dependency": "array_parallelism"},
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "requeue", "no-requeue", "nodes", "ntasks")),
}


class LocalSettings(_Built):
    """Trials one after the other; `busy` says what becomes of those that another process is running."""

    target: Literal["hydra_plugins.wush.LocalLauncher"] = Field(alias="_target_")
    busy: Busy


class LocalParallelSettings(_Built):
    """Trials on worker processes: one a GPU, or `workers` of `threads` threads each on the CPU."""

    target: Literal["hydra_plugins.wush.LocalParallelLauncher"] = Field(alias="_target_")
    busy: Busy
    workers: PositiveInt | None
    gpus: list[NonNegativeInt] | None
    threads: PositiveInt | None


def _time(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError("should be at least one minute")
    if isinstance(value, str) and _as_minutes(value) is None:
        raise ValueError("should be a number of minutes, 'HH:MM:SS' or 'D-HH:MM:SS'")
    return value


def _as_minutes(text: str) -> int | None:
    """Minutes, rounded up, of `HH:MM:SS` or `D-HH:MM:SS`; None for anything else, and for no time at all."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + (seconds > 0) or None


def _memory(value: object) -> object:
    if value is not None and not re.fullmatch(r"[1-9]\d*[KMGT]", str(value)):
        raise ValueError("should be a number and a unit of K, M, G or T, such as 64G")
    return value


def _extra(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for name, value in options.items():
        option = name.replace("_", "-")
        if option in OWN_OPTIONS:
            key = OWN_OPTIONS[option]
            raise ValueError(f"{name} is {f'set by hydra.launcher.{key}' if key else 'no option of yours to set'}")
        if value is False:
            raise ValueError(f"{name}: leave out an option that is not wanted")
    return options


class SlurmSettings(_Built):
    """Trials as tasks of SLURM job arrays; null leaves a choice to the cluster.

    `gpus`, `cpus`, `memory`: of one job. `time`: its limit, in minutes when an integer. `signal_before`: seconds before
    the limit at which a job is told to save what it has and to queue again, up to `max_timeouts` times. `setup`: shell
    lines run first. `extra`: further options of sbatch.
    """

    target: Literal["hydra_plugins.wush.SlurmLauncher"] = Field(alias="_target_")
    busy: Busy
    partition: str | None
    account: str | None
    qos: str | None
    gpus: NonNegativeInt
    cpus: PositiveInt
    memory: Annotated[str | None, BeforeValidator(_memory)]
    time: Annotated[int | str, AfterValidator(_time)]
    array_parallelism: PositiveInt
    setup: list[str]
    detach: bool
    signal_before: Annotated[int, Field(ge=1, le=65535)]
    max_timeouts: NonNegativeInt
    extra: Annotated[dict[str, str | int | bool], AfterValidator(_extra)]

    @property
    def minutes(self) -> int:
        """The time limit; SLURM knows whole minutes only."""
        minutes = self.time if isinstance(self.time, int) else _as_minutes(self.time)
        assert minutes is not None
        return minutes

    @field_validator("signal_before")
    @classmethod
    def _comes_within_the_limit(cls, value: int, info: ValidationInfo) -> int:
        limit = info.data.get("time")
        if limit is None:  # it is wrong itself
            return value
        seconds = 60 * ((limit if isinstance(limit, int) else _as_minutes(limit)) or 0)
        if value >= seconds:
            raise ValueError(f"should be less than the time limit, which is {seconds} s")
        # submitit takes a signal that comes before this for a preemption, which it does not count; SLURM is early by
        # up to a minute.
        most = max(seconds // 5, 600) - 60
        if value > most:
            raise ValueError(f"should be at most {most} s: a job told earlier queues again without end")
        return value


Settings = Annotated[LocalSettings | LocalParallelSettings | SlurmSettings, Field(discriminator="target")]


class _Hydra(_Strict):
    launcher: Settings


class _Root(_Strict):
    hydra: _Hydra


def validate_launcher(
    node: dict[str, Any], typed: Mapping[str, str] | None = None
) -> LocalSettings | LocalParallelSettings | SlurmSettings:
    """The typed settings of a launcher's node; raises `ConfigError` that lists every wrong key.

    `typed` as of `schema.validate`.
    """
    config = {"hydra": {"launcher": node}}
    try:
        return _Root.model_validate(config).hydra.launcher
    except ValidationError as error:
        problems = [_explain(problem, config, typed or {}) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from error
