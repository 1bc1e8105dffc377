"""The typed schema of a trial's config: every key, its type and its valid values. No torch, no Hydra.

Hydra composes plain YAML; `validate` checks the result and raises one `ConfigError` that lists every problem.
To add an option of a group, add a class here that lists its keys, and its name to the group's union.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

Dtype = Literal["float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """The config cannot be run; the message lists every problem with its key and remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class _Built(_Strict):
    """A node built by `hydra.utils.instantiate`."""

    target: str = Field(alias="_target_")


# --- model


class Pretrained(_Built):
    target: Literal["wush.models.load_pretrained"] = Field(alias="_target_")
    path: str = Field(min_length=1)
    revision: str | None
    dtype: Dtype


class PackagedGguf(_Built):
    target: Literal["wush.models.load_packaged_gguf"] = Field(alias="_target_")
    package: str
    file: str
    dtype: Dtype


class RandomModel(_Built):
    target: Literal["wush.models.load_random"] = Field(alias="_target_")
    architecture: Literal["llama", "qwen3"]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    seed: NonNegativeInt
    dtype: Dtype


Model = Annotated[Pretrained | PackagedGguf | RandomModel, Field(discriminator="target")]


# --- format


class Mxfp4(_Built):
    target: Literal["wush.Mxfp4"] = Field(alias="_target_")
    scale_rule: Literal["paper", "ocp"]


class Nvfp4(_Built):
    target: Literal["wush.Nvfp4"] = Field(alias="_target_")
    scale_rule: Literal["fixed", "calibrated"]


class Int4(_Built):
    target: Literal["wush.Int4"] = Field(alias="_target_")
    scale_rule: Literal["rms", "midrise", "absmax"]


class Mxfp8(_Built):
    target: Literal["wush.Mxfp8"] = Field(alias="_target_")
    scale_rule: Literal["ocp"]


class Unquantized(_Built):
    target: Literal["wush.Unquantized"] = Field(alias="_target_")


Format = Annotated[Mxfp4 | Nvfp4 | Int4 | Mxfp8 | Unquantized, Field(discriminator="target")]


# --- transform


class FixedTransform(_Built):
    target: Literal["wush.Identity", "wush.Hadamard"] = Field(alias="_target_")


class RandomRotation(_Built):
    target: Literal["wush.RandomRotation"] = Field(alias="_target_")
    seed: NonNegativeInt
    per_tile: bool


class AdaptiveTransform(_Built):
    target: Literal["wush.Hu", "wush.Wus"] = Field(alias="_target_")
    refit: bool
    share: bool
    signs: NonNegativeInt | None


class Wush(_Built):
    target: Literal["wush.Wush"] = Field(alias="_target_")
    refit: bool
    share: bool
    signs: NonNegativeInt | None
    power: float = Field(ge=0, le=1)


class SmoothQuant(_Built):
    target: Literal["wush.SmoothQuant"] = Field(alias="_target_")
    alpha: float = Field(ge=0, le=1)
    refit: bool
    share: bool


Transform = Annotated[
    FixedTransform | RandomRotation | AdaptiveTransform | Wush | SmoothQuant, Field(discriminator="target")
]


# --- algorithm


class PlainAlgorithm(_Built):
    target: Literal["wush.Rtn", "wush.Gptq"] = Field(alias="_target_")


class MrGptq(_Built):
    target: Literal["wush.MrGptq"] = Field(alias="_target_")
    scale_search: bool
    activation_order: bool


Algorithm = Annotated[PlainAlgorithm | MrGptq, Field(discriminator="target")]


# --- calibration and evaluation


class _Windows(_Built):
    windows: PositiveInt | None
    window_length: int = Field(ge=2)
    batch_size: PositiveInt
    seed: NonNegativeInt | None
    bos: Literal["first", "every"]


class EmbeddedText(_Windows):
    target: Literal["wush.texts.EmbeddedText"] = Field(alias="_target_")
    part: Literal["calibration", "evaluation", "validation", "held_out", "code"]


class TextFile(_Windows):
    target: Literal["wush.texts.TextFile"] = Field(alias="_target_")
    path: str = Field(min_length=1)


class HubText(_Windows):
    target: Literal["wush.hub.hub_text"] = Field(alias="_target_")
    dataset: str = Field(min_length=1)
    name: str | None
    revision: str | None
    split: str = Field(min_length=1)
    files: list[str] | None = Field(min_length=1)
    layout: Literal["text", "messages", "turns", "exchange"]
    columns: list[str] = Field(min_length=1)
    read: Literal["joined", "shuffled", "streamed"]
    buffer: PositiveInt | None
    part: Literal["calibration", "evaluation"] | None
    cut: Literal["packed", "crops", "each"]


Text = Annotated[EmbeddedText | TextFile | HubText, Field(discriminator="target")]


class Task(_Strict):
    task: str = Field(min_length=1)
    num_fewshot: NonNegativeInt | None = None
    chat_template: bool | None = None
    fewshot_as_multiturn: bool = False
    metric: str | None = None
    only: list[str] = []
    never: list[str] = []
    limit: PositiveInt | None = None
    generation: dict[str, Any] = {}
    only_with_code_execution: bool = False


def _task(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


class Harness(_Built):
    target: Literal["wush.tasks.Harness"] = Field(alias="_target_")
    text: Text
    tasks: list[Annotated[Task, BeforeValidator(_task)]] = Field(min_length=1)
    num_fewshot: NonNegativeInt | None
    chat_template: bool
    limit: PositiveInt | None
    batch_size: PositiveInt
    seeds: list[NonNegativeInt] = Field(min_length=1)
    generation: dict[str, Any]
    include: str | None
    allow_code_execution: bool


Evaluation = Annotated[EmbeddedText | TextFile | HubText | Harness, Field(discriminator="target")]


# --- tracking


class NoTracking(_Built):
    target: Literal["experiments.tracking.NoTracking"] = Field(alias="_target_")


class Wandb(_Built):
    target: Literal["experiments.tracking.WandbTracking"] = Field(alias="_target_")
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]


Tracking = Annotated[NoTracking | Wandb, Field(discriminator="target")]


# --- the whole


class Quantize(_Strict):
    exclude: list[str]
    blocks: list[NonNegativeInt] | None


class Measure(_Strict):
    layer_loss: Literal["calibration", "held_out"] | None
    windows: PositiveInt | None


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("should be auto, cpu, cuda or cuda:N")
    return value


def _sweep_name(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[\w+@-][\w.+=,@-]{0,119}", value):
        raise ValueError("should be a folder name of letters, digits and . _ + = , @ -")
    return value


class TrialConfig(_Strict):
    """One trial. The keys from `tracking` on say how and where it runs, and are no part of its identity.

    No validator may compare two keys: a sweep's configs share parts, and each is validated once (`sweep.plan`).
    """

    model: Model
    format: Format
    transform: Transform
    algorithm: Algorithm
    calibration: Text
    evaluation: Evaluation
    quantize: Quantize
    measure: Measure
    seed: NonNegativeInt
    tracking: Tracking
    device: Annotated[str, AfterValidator(_device)]
    kernels: Literal["auto", "torch", "triton", "scaled_mm"]
    keep_operands: bool
    progress: Literal["auto", "bars", "lines", "none"]
    results: str = Field(min_length=1)
    keep_blocks: bool
    sweep: Annotated[str | None, AfterValidator(_sweep_name)]
    scale: Literal["paper", "small"]


def validate(config: dict[str, Any], typed: Mapping[str, str] | None = None) -> TrialConfig:
    """The typed config; raises `ConfigError` that lists every wrong key with its valid values.

    `typed`: for keys given on the command line the text that was typed there, of which a number is only one reading.
    """
    try:
        return TrialConfig.model_validate(config)
    except ValidationError as error:
        problems = [_explain(problem, config, typed or {}) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from error


def _explain(problem: Any, config: dict[str, Any], typed: Mapping[str, str]) -> str:
    # Discriminator values stand in the location of a union's member; they are no keys of the user's.
    path = [str(part) for part in problem["loc"] if "." not in str(part)]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        siblings = Task.model_fields if path[:2] == ["evaluation", "tasks"] else _select(config, path[:-1])
        known = sorted(name for name in siblings if name != path[-1])
        return f"{key}: unknown key; {'.'.join(path[:-1]) or 'the config'} has: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing; set {key}=..."
    if problem["type"] == "union_tag_not_found":
        return f"{key}._target_: missing; choose an option with {key}=..."
    if problem["type"] == "union_tag_invalid":
        return f"{key}._target_: {problem['ctx']['tag']!r} is not one of: {problem['ctx']['expected_tags']}"
    value = _select(config, path)
    if problem["type"] == "string_type" and isinstance(value, (bool, int, float)):
        return _not_a_text(key, value, typed.get(key))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}={value}: {message[0].lower()}{message[1:]}"


def _not_a_text(key: str, value: bool | int | float, typed: str | None) -> str:
    """What to say of a number or truth value in the place of a text, which quotes make of it."""
    kind = "a truth value" if isinstance(value, bool) else f"the number {value}"
    if typed is None:  # it stands in a file, as nobody knows how
        return f"{key}={value}: read as {kind}, but it is a text; put what you mean in quotes, such as '1e5'"
    return f"{key}={typed}: read as {kind}, but it is a text; put it in quotes: {key}='\"{typed}\"'"


def _select(config: Any, path: list[str]) -> Any:
    for part in path:
        config = config[int(part)] if isinstance(config, list) else config[part]
    return config
