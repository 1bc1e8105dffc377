"""The record of a finished trial, as `result.json` holds it, and what is kept of a failed one."""

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.older_records import from_version_4
from wush.version import METHOD_VERSION

if TYPE_CHECKING:
    from wush.intervals import Sums

SCHEMA_VERSION: Final = 5
READABLE_VERSIONS: Final = (4, SCHEMA_VERSION)  # what `Record` reads; those of before are converted
# Keys of a config by which runs of one setting differ: `seeds` of sampled answers, `signs` of eigenvectors, drawn.
SEEDS = ("seed", "seeds", "signs")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Stage(_Model):
    """One stage of a trial: seconds, and peak memory in bytes of the process and of the GPU (None without one)."""

    seconds: float
    peak_memory_bytes: int | None
    peak_gpu_memory_bytes: int | None


class LayerLoss(_Model):
    """How far a quantized linear's outputs are from the original's for the same inputs, and what theory says of it.

    `mse`: mean squared error of an output; `relative`: of all outputs together, to their power. Predictions of the
    theory, each up to a factor of the format, by the moments of the measured tokens: `even`, for noise of a fixed share
    of a side's power, spread evenly; `paper_fp` and `paper_int`, the paper's two noise models; `bound`: the least of
    `even` that any transform can reach. None in records that did not keep it.
    """

    mse: float
    relative: float
    even: float
    paper_fp: float | None = None
    paper_int: float | None = None
    bound: float


class Layer(_Model):
    """One quantized linear of a decoder block; its `loss` where it was measured."""

    name: str
    shared_input: list[str]
    bits_per_weight: float
    weights: int
    loss: LayerLoss | None = None


class BlockError(_Model):
    """Mean squared output error of a decoder block against the original block, and relative to its output power."""

    mse: float
    relative: float


class Block(_Model):
    """One decoder block; its output error on the tokens it was calibrated with, and on those of the evaluation text.

    `seconds`: of quantizing it. Either error is None where it was not measured.
    """

    index: int
    name: str
    seconds: float
    calibration: BlockError | None = None
    held_out: BlockError | None = None
    layers: list[Layer]


class Lost(_Model):
    """Groups of a linear's input that its format's fixed window cannot hold: `clipped` above it, `flushed` to zero.

    `groups`: all that were looked at.
    """

    groups: int
    clipped: int
    flushed: int


class Windows(_Model):
    """Sums over the predictions of each evaluated window, in the order of the text; lists of equal length.

    `nll`, `nll_original`: negative log-likelihoods of the text, and `kl`, in nats; `agree`: predictions whose likeliest
    token is the original's.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    nll: list[float]
    nll_original: list[float]
    kl: list[float]
    agree: list[int]
    predictions: list[int]

    @model_validator(mode="after")
    def _equal(self) -> "Windows":
        if len({len(values) for _, values in self}) != 1:
            raise ValueError("the lists should be of equal length, a value for each window")
        return self


class Metrics(_Model):
    """Quality against the original model; `kl` in nats; `top1` a share.

    `predictions`: the tokens predicted, over which these are means. `bits_per_weight`: average over all weights of
    decoder blocks' linears, those left in full precision as 16; 16 or 32 when unquantized. `quantized_share`: the share
    of these weights that is quantized.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    perplexity: float
    perplexity_original: float
    kl: float
    top1: float
    bits_per_weight: float
    quantized_share: float = 1.0
    predictions: int


class TaskRun(_Model):
    """One run of a task: each metric, named with its filter (`acc,none`), and its standard error where there is one.

    `outcomes`: of each document, in the harness's order, the value of the task's metric that counts; empty if unknown.
    """

    seed: int
    values: dict[str, float]
    stderrs: dict[str, float | None]
    seconds: float
    outcomes: list[float] = Field(default_factory=list)


class Task(_Model):
    """A task of the LM Evaluation Harness, of which version `harness` ran it; `metric` is the one that counts.

    `samples`: the documents scored in each run. Accuracies are shares.
    """

    name: str
    version: str
    harness: str
    num_fewshot: int
    chat_template: bool
    samples: int
    metric: str
    higher_is_better: bool
    runs: list[TaskRun] = Field(min_length=1)

    @property
    def score(self) -> float:
        """The metric that counts, mean over runs."""
        return fmean(run.values[self.metric] for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Its sample standard deviation between runs; None for a single one."""
        return stdev([run.values[self.metric] for run in self.runs]) if len(self.runs) > 1 else None

    @property
    def stderr(self) -> float | None:
        """Its standard error over the documents of a single run; None for several."""
        return self.runs[0].stderrs.get(self.metric) if len(self.runs) == 1 else None

    @property
    def outcomes(self) -> list[float]:
        """The metric that counts of each document, mean over runs; none where the score is not the mean of these."""
        from wush.intervals import mean_outcomes

        return mean_outcomes([run.outcomes for run in self.runs], self.score)

    @property
    def told(self) -> str:
        """The score in one line."""
        spread = f" ± {self.spread:.4f} over {len(self.runs)} runs" if self.spread is not None else ""
        error = f" (standard error {self.stderr:.4f})" if self.stderr is not None else ""
        return f"{self.metric} {self.score:.4f}{spread}{error} of {self.samples:,} documents"


class Data(_Model):
    """A text used: SHA-256 of its bytes and of the token ids of the windows cut from it, and tokens.

    `source`: the dataset and its commit for a text from the hub, whose bytes are not hashed.
    """

    text_sha256: str | None
    ids_sha256: str
    tokens: int
    source: str | None = None


class Record(_Model):
    """A finished trial.

    `choices`: the option of each config group that matters, as the user named it. `model_revision`: the commit of a
    model from the hub. `environment`: the machine: host, platform, processor, cores, threads, device. `attempts`: it
    took so many, and `restored_blocks` decoder blocks come from an earlier one. `kernels`: what quantized layers ran on
    and why, and the names of those that did, numbers merged to ranges. `method_version`: of the program that made the
    numbers. `model_note`: what is particular about the original's weights. `windows`: the metrics' sums by window; None
    in records that did not keep them. `lost`: by text, the linears whose format lost groups of their input; under
    `weights`, of their weight.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    trial_id: str
    status: Literal["done"] = "done"
    choices: dict[str, str]
    config: dict[str, Any]
    metrics: Metrics
    windows: Windows | None = None
    blocks: list[Block]
    lost: dict[str, dict[str, Lost]] = Field(default_factory=dict)
    skipped: dict[str, str]
    tasks: dict[str, Task] = Field(default_factory=dict)
    stages: dict[str, Stage]
    data: dict[str, Data]
    seed: int
    warnings: list[str]
    versions: dict[str, str]
    git_commit: str | None
    model_revision: str | None
    model_note: str | None = None
    method_version: int = 1
    environment: dict[str, Any]
    started_at: datetime
    finished_at: datetime
    attempts: int = 1
    restored_blocks: int = 0
    kernels: dict[str, list[str]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("schema_version") == 4:
            return from_version_4(values) | {"schema_version": SCHEMA_VERSION}
        return values


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

    `seconds`: of all stages. `errors`: the relative error of each decoder block on held-out tokens, by its index, where
    it was measured; `calibration_errors`: on the calibration tokens; none when unquantized.
    `evaluated`: the SHA-256 of the evaluated token ids. `tasks`: the score of each that is a share, `outcomes`: of its
    documents, where they are known. `windows`: sums of the evaluated windows, None in records that did not keep them.
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
    tasks: dict[str, float] = field(default_factory=dict)
    calibration_errors: dict[int, float] = field(default_factory=dict)
    outcomes: dict[str, list[float]] = field(default_factory=dict)
    windows: "Sums | None" = None
    method_version: int = METHOD_VERSION
    model_note: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether any decoder block was."""
        return bool(self.errors or self.calibration_errors)

    @property
    def old(self) -> bool:
        """Whether an earlier version of the method made it, whose numbers are not today's."""
        return self.method_version < METHOD_VERSION

    @classmethod
    def of(cls, record: Record) -> "Result":
        """The light part of a whole record."""
        from wush.intervals import Sums

        text = record.data.get("evaluation")
        shares = {name: task for name, task in record.tasks.items() if task.higher_is_better}
        return cls(
            trial_id=record.trial_id,
            choices=record.choices,
            metrics=record.metrics,
            seconds=sum(stage.seconds for stage in record.stages.values()),
            errors={block.index: block.held_out.relative for block in record.blocks if block.held_out},
            calibration_errors={b.index: b.calibration.relative for b in record.blocks if b.calibration},
            evaluated=text.ids_sha256 if text else "",
            host=str(record.environment.get("host", "")),
            finished_at=record.finished_at,
            attempts=record.attempts,
            restored_blocks=record.restored_blocks,
            tasks={name: task.score for name, task in shares.items()},
            outcomes={name: found for name, task in shares.items() if (found := task.outcomes)},
            windows=Sums(record.windows) if record.windows else None,
            method_version=record.method_version,
            model_note=record.model_note,
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
    def kl(self) -> float:
        """Its KL when done, by which trials are ranked; else not a number."""
        return self.result.metrics.kl if self.result else math.nan

    @property
    def old(self) -> bool:
        """Whether it is done, but by an earlier version of the method: it is shown, and does not count as done."""
        return self.result is not None and self.result.old

    @property
    def state(self) -> State:
        """How the trial stands; an earlier failure does not count while it runs again."""
        if self.result:
            return "done"
        if self.running:
            return "running"
        return "failed" if self.failure else "queued"
