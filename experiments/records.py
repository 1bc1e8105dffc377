"""The record of a finished trial, as `result.json` holds it, and what is kept of a failed one."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 3


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Stage(_Model):
    """One stage of a trial: seconds, and peak memory in bytes of the process and of the GPU (None without one)."""

    seconds: float
    peak_memory_bytes: int | None
    peak_gpu_memory_bytes: int | None


class Layer(_Model):
    """One quantized linear of a decoder block."""

    name: str
    shared_input: list[str]
    bits_per_weight: float
    weights: int


class Block(_Model):
    """One decoder block: mean squared output error against the original block, and relative to its output power."""

    index: int
    name: str
    mse: float
    relative_mse: float
    seconds: float
    layers: list[Layer]


class Metrics(_Model):
    """Quality against the original model; `kl` in nats; `top1` a share; `bits_per_weight` 16 or 32 when unquantized.

    `predictions`: the tokens predicted, over which all but `bits_per_weight` are means.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    perplexity: float
    perplexity_original: float
    kl: float
    top1: float
    bits_per_weight: float
    predictions: int


class Data(_Model):
    """The texts used: SHA-256 of their bytes and of the token ids of the windows cut from them, and tokens."""

    text_sha256: str
    ids_sha256: str
    tokens: int


class Record(_Model):
    """A finished trial.

    `choices`: the option of each config group that matters, as the user named it. `model_revision`: the commit of a
    model from the hub. `environment`: the machine: host, platform, processor, cores, threads, device. `attempts`: it
    took so many, and `restored_blocks` decoder blocks come from an earlier one. `kernels`: what quantized layers ran on
    and why, and the names of those that did, numbers merged to ranges.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
    trial_id: str
    status: Literal["done"] = "done"
    choices: dict[str, str]
    config: dict[str, Any]
    metrics: Metrics
    blocks: list[Block]
    skipped: dict[str, str]
    stages: dict[str, Stage]
    data: dict[str, Data]
    seed: int
    warnings: list[str]
    versions: dict[str, str]
    git_commit: str | None
    model_revision: str | None
    environment: dict[str, Any]
    started_at: datetime
    finished_at: datetime
    attempts: int = 1
    restored_blocks: int = 0
    kernels: dict[str, list[str]] = Field(default_factory=dict)


class Failure(_Model):
    """Why a trial's last attempt failed, in one line; the traceback is in its log.

    `environment`: the machine, as far as it was known. `advice`: what the user can do about it, if that is known.
    """

    trial_id: str
    reason: str
    kind: str
    host: str
    environment: dict[str, Any]
    failed_at: datetime
    advice: str | None = None

    @property
    def told(self) -> str:
        """The reason, and after it the advice."""
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


def now() -> datetime:
    """The time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True, slots=True)
class Result:
    """The part of a record that tables, plots and comparisons need; light, as a sweep may have 10,000.

    `seconds`: of all stages. `errors`: the relative error of each decoder block by its index, none when unquantized.
    `evaluated`: the SHA-256 of the evaluated token ids.
    """

    trial_id: str
    choices: dict[str, str]
    metrics: Metrics
    seconds: float
    errors: dict[int, float]
    evaluated: str
    host: str
    finished_at: datetime
    attempts: int = 1
    restored_blocks: int = 0

    @classmethod
    def of(cls, record: Record) -> "Result":
        """The light part of a whole record."""
        text = record.data.get("evaluation")
        return cls(
            trial_id=record.trial_id,
            choices=record.choices,
            metrics=record.metrics,
            seconds=sum(stage.seconds for stage in record.stages.values()),
            errors={block.index: block.relative_mse for block in record.blocks},
            evaluated=text.ids_sha256 if text else "",
            host=str(record.environment.get("host", "")),
            finished_at=record.finished_at,
            attempts=record.attempts,
            restored_blocks=record.restored_blocks,
        )


State = Literal["done", "failed", "running", "queued"]


@dataclass(frozen=True)
class Outcome:
    """A trial of a sweep as it stands: its result when done, its failure when failed, or running, or still to run.

    `name`: one line that tells it from the sweep's other trials. `labels`: group choices, and any other key whose
    value differs within the sweep. `earlier`: it was already done when the sweep began. `config` is there however it
    ended. `detail`: how far it is, such as `block 3 of 30, 2 min left`.
    """

    trial_id: str
    name: str
    labels: dict[str, str]
    result: Result | None = None
    failure: Failure | None = None
    earlier: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    running: bool = False
    detail: str = ""

    @property
    def state(self) -> State:
        """How the trial stands; an earlier failure does not count while it runs again."""
        if self.result:
            return "done"
        if self.running:
            return "running"
        return "failed" if self.failure else "queued"
