"""What a trial is going to cost, from what finished trials of the store did cost.

Only measured numbers, scaled where that is said: nothing is assumed of a machine, model or algorithm never measured.
"""

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from experiments.identity import BASELINE, UNUSED_BY_BASELINE, text_of
from experiments.query import FILES_AT_ONCE
from experiments.records import READABLE_VERSIONS, Stage
from experiments.store import DamagedRecord, ResultStore
from experiments.trial import Trial

NEWEST = 10  # an estimate is made of so many trials at most, those that finished last
LARGEST_RATIO = 100.0  # between the sizes of two models, beyond which one says nothing about the other
TEXT_OF_STAGE: Final = {"quantize": "calibration", "original": "evaluation", "evaluate": "evaluation"}

FIELDS: Final = ("model", "algorithm", "format", "transform", "calibration", "evaluation", "quantize", "measure")
_PATHS: Final = (
    *("$.trial_id", "$.choices.model", "$.environment.device", "$.finished_at", "$.stages"),
    *("$.data.calibration.tokens", "$.data.evaluation.tokens"),
    *(f"$.config.{name}" for name in FIELDS),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """The parts of a config that its cost depends on, each as JSON without seeds; empty where a baseline uses none."""

    model: str
    algorithm: str
    format: str
    transform: str
    calibration: str
    evaluation: str
    quantize: str
    measure: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Kind":
        """The kind of a validated config."""
        return cls._of({name: _seedless(config[name]) for name in FIELDS})

    @classmethod
    def of_texts(cls, texts: Sequence[str | None]) -> "Kind":
        """The kind of a config whose parts are given as JSON, in the order of `FIELDS`."""
        parts = dict(zip(FIELDS, texts, strict=True))
        parts["measure"] = parts["measure"] or "{}"  # records of before it was a part of configs
        return cls._of({name: _seedless_text(text) for name, text in parts.items()})

    @classmethod
    def _of(cls, parts: dict[str, str]) -> "Kind":
        unused = UNUSED_BY_BASELINE if f'"{BASELINE}"' in parts["format"] else ()
        return cls(**{name: "" if name in unused else part for name, part in parts.items()})


@dataclass(frozen=True, slots=True)
class Cost:
    """What a finished trial cost: its stages; `tokens` of its texts; `name`: its model's, as the user chose it."""

    trial_id: str
    name: str
    device: str
    finished_at: str
    kind: Kind
    stages: dict[str, Stage]
    tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a trial is going to cost, by stage, and in words what that comes from; no stages: nothing is known."""

    stages: dict[str, Stage]
    basis: str

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values()) if self.stages else None

    @property
    def memory(self) -> int | None:
        """The process's peak, in bytes."""
        return most(stage.peak_memory_bytes for stage in self.stages.values())

    @property
    def gpu_memory(self) -> int | None:
        """The GPU's peak, in bytes; None also without a GPU."""
        return most(stage.peak_gpu_memory_bytes for stage in self.stages.values())


@dataclass(frozen=True, slots=True)
class Size:
    """How big a model is: weights of the linears in its decoder blocks, and all parameters as its name has them."""

    linears: float | None
    named: float | None

    def ratio(self, other: "Size") -> float | None:
        """How many times the other's size this is; None unless the same count is known of both."""
        for own, others in ((self.linears, other.linears), (self.named, other.named)):
            if own and others:
                return own / others
        return None


# What a measured trial shares with the planned one, the nearest first; the first level that has trials counts.
_OWN_MODEL: Final = (
    (FIELDS, "of this setting"),
    (("model", "algorithm", "format", "transform"), "of this model"),
    (("model", "algorithm", "format"), "of this model with other transforms"),
    (("model", "algorithm"), "of this model with other transforms and formats"),
)
_OTHER_MODEL: Final = (
    (("algorithm", "format", "transform"), ""),
    (("algorithm", "format"), " with other transforms"),
    (("algorithm",), " with other transforms and formats"),
)


class Estimates:
    """Estimates for trials on one device, by the trials measured on it.

    Measured trials with the same model, algorithm, format and transform come first, those with all sizes of texts
    equal before others; then those with another transform; then also with another format; then the same again for
    the model nearest in size. Of these the `NEWEST` are taken: the mean of the seconds and the most memory of each
    stage. Seconds of `quantize` are scaled by calibration tokens, of `original` and `evaluate` by evaluation tokens,
    and of all stages by size for another model; memory grows with a model's size but is never scaled down, as part
    of it is the process's own, nor by tokens. Sizes are weights of decoder blocks, else parameters by name.
    """

    def __init__(self, costs: Sequence[Cost], device: str, block_weights: Callable[[str], int | None]) -> None:
        """`block_weights`: the weights in a finished trial's decoder blocks, by its id."""
        self._device, self._block_weights = device, block_weights
        self._measured_on: dict[str, set[str]] = defaultdict(set)
        for cost in costs:
            self._measured_on[cost.kind.algorithm].add(cost.device)
        self._own = sorted((cost for cost in costs if cost.device == device), key=lambda cost: cost.finished_at)[::-1]
        self._found: dict[Kind, Estimate] = {}
        self._groups: dict[tuple[str, ...], dict[tuple[str, ...], list[Cost]]] = {}
        self._sizes: dict[str, Size] = {}

    def of(self, trial: Trial) -> Estimate:
        """The estimate for a trial."""
        kind = Kind.of(trial.config)
        if kind not in self._found:
            self._found[kind] = self._of_own_model(kind) or self._of_other_model(kind) or self._unknown(kind)
        return self._found[kind]

    def _of_own_model(self, kind: Kind) -> Estimate | None:
        for fields, words in _OWN_MODEL:
            factors = self._usable(self._like(kind, fields), kind)
            if factors:
                scaled = any(factor != 1 for _, own in factors for factor in own.values())
                count = f"{_trials(len(factors))} {words}"
                return Estimate(_combined(factors), f"{count}, scaled by tokens" if scaled else count)
        return None

    def _of_other_model(self, kind: Kind) -> Estimate | None:
        for fields, words in _OTHER_MODEL:
            models: dict[str, list[Cost]] = defaultdict(list)
            for cost in self._like(kind, fields):
                models[cost.kind.model].append(cost)
            ratios = {model: self._size(kind.model).ratio(self._size(model)) for model in models}
            near = {model: r for model, r in ratios.items() if r and 1 / LARGEST_RATIO <= r <= LARGEST_RATIO}
            for model, ratio in sorted(near.items(), key=lambda pair: abs(math.log(pair[1]))):
                factors = self._usable(models[model], kind)
                if factors:
                    basis = f"scaled from {models[model][0].name}{words}: {ratio:.3g} times the size"
                    basis += f", {_trials(len(factors))}{'; memory at most' if ratio > 1 else ''}"
                    return Estimate(_combined(factors, ratio), basis)
        return None

    def _unknown(self, kind: Kind) -> Estimate:
        measured = self._like(kind, ("algorithm",))
        if measured:
            models = ", ".join(sorted({cost.name for cost in measured}))
            reason = f"nothing known of this model's size or texts against those measured on {self._device}: {models}"
            return Estimate({}, reason)
        what = json.loads(kind.algorithm)["_target_"].rpartition(".")[2] if kind.algorithm else "unquantized"
        devices = self._measured_on.get(kind.algorithm)
        elsewhere = f", only on {', '.join(sorted(devices))}" if devices else ""
        return Estimate({}, f"no {what} trial was measured on {self._device or 'such a device'}{elsewhere}")

    def _like(self, kind: Kind, fields: Sequence[str]) -> list[Cost]:
        """The costs that share the fields with a kind, the newest first."""
        key = tuple(fields)
        if key not in self._groups:
            groups: dict[tuple[str, ...], list[Cost]] = defaultdict(list)
            for cost in self._own:
                groups[tuple(getattr(cost.kind, field) for field in key)].append(cost)
            self._groups[key] = dict(groups)
        return self._groups[key].get(tuple(getattr(kind, field) for field in key), [])

    def _usable(self, costs: Sequence[Cost], kind: Kind) -> list[tuple[Cost, dict[str, float]]]:
        """The newest costs whose tokens can be compared with the planned ones, with the factor of each text."""
        planned, usable = {text: self._tokens(kind, text) for text in ("calibration", "evaluation")}, []
        for cost in costs:
            pairs = {text: (planned[text], own) for text, own in cost.tokens.items()}
            if all(tokens is not None for tokens, _ in pairs.values()):
                usable.append((cost, {text: (tokens or 0) / own for text, (tokens, own) in pairs.items()}))
            if len(usable) == NEWEST:
                break
        return usable

    def _tokens(self, kind: Kind, text: str) -> int | None:
        """Tokens of a planned text; those of all its windows are known once they have been cut for this model."""
        node = getattr(kind, text)
        own = text_of(json.loads(node)) if node else {"windows": 0, "window_length": 0}
        if own["windows"] is not None:
            return own["windows"] * own["window_length"]
        same = next(iter(self._like(kind, ("model", text))), None)
        return same.tokens.get(text) if same else None

    def _size(self, model: str) -> Size:
        if model not in self._sizes:
            node = json.loads(model)
            measured = [c for c in self._own if c.kind.model == model and _is_whole(c.kind.quantize)]
            counted = self._block_weights(measured[0].trial_id) if measured else None
            self._sizes[model] = Size(linears_of(node) or counted, named_parameters(node))
        return self._sizes[model]


def read(store: ResultStore) -> list[Cost]:
    """What every finished trial of a store cost; a record that cannot be read is left out."""
    files = sorted((store.root / "trials").glob("*/result.json"))
    costs = []
    for row in parts(files, _PATHS):
        with suppress(KeyError, TypeError, ValueError):  # a value is not there, or no such value
            costs.append(_cost(row))
    return costs


def estimates(store: ResultStore, costs: Sequence[Cost], device: str) -> Estimates:
    """Estimates by a store's costs, for trials on the device of this name."""

    def block_weights(trial_id: str) -> int | None:
        with suppress(DamagedRecord):
            record = store.record(trial_id)
            return sum(layer.weights for block in record.blocks for layer in block.layers) if record else None
        return None

    return Estimates(costs, device, block_weights)


def parts(files: Sequence[Path], paths: Sequence[str]) -> Iterator[list[str | None]]:
    """Parts of many records by paths such as `$.config.model`: JSON, None for what is not there; in no order.

    A file that is damaged, of another schema version or gone gives none.
    """
    import duckdb

    query = "SELECT try(json_extract(content, $paths)) FROM read_text($files)"
    given = ["$.schema_version", "$.status", *paths]
    with duckdb.connect() as connection:

        def ask(names: list[str]) -> list[Any]:
            try:
                return connection.execute(query, {"paths": given, "files": names}).fetchall()
            except duckdb.Error:  # one is gone or no text at all
                return [row for name in names for row in ask([name])] if len(names) > 1 else []

        for start in range(0, len(files), FILES_AT_ONCE):
            for (row,) in ask([str(path) for path in files[start : start + FILES_AT_ONCE]]):
                if row and row[0] in map(str, READABLE_VERSIONS) and row[1] == '"done"':
                    yield row[2:]


def linears_of(node: dict[str, Any]) -> int | None:
    """Weights of the linears in a model's decoder blocks, by the sizes in its config node or local config.json."""
    if node["_target_"] == "wush.models.load_random":
        own = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        hidden, inner, layers, heads, kv_heads = (node[key] for key in own)
        return linears(hidden, inner, layers, heads, kv_heads, hidden // heads)
    try:
        config = json.loads((Path(node["path"]).expanduser() / "config.json").read_bytes())
        if config["model_type"] not in ("llama", "mistral", "qwen2", "qwen3"):
            return None
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        hidden, inner, layers, heads = (config[key] for key in sizes)
        kv_heads, width = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        return linears(hidden, inner, layers, heads, kv_heads, width)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def linears(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_width: int) -> int:
    """Weights of the linears of decoder blocks with gated MLPs, by their sizes."""
    return layers * hidden * (2 * heads * head_width + 2 * kv_heads * head_width + 3 * inner)


def named_parameters(node: dict[str, Any]) -> float | None:
    """Parameters by a model's name: 135e6 of `SmolLM2-135M-Instruct`, 8e9 of `Llama-3.1-8B`; None if it has none."""
    name = Path(node.get("path") or node.get("file") or "").name
    match = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", name.lower())
    return float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]] if match else None


def most(values: Iterator[int | None]) -> int | None:
    """The largest of the values that are known."""
    return max((value for value in values if value is not None), default=None)


def _combined(factors: Sequence[tuple[Cost, dict[str, float]]], ratio: float = 1.0) -> dict[str, Stage]:
    """The stages of an estimate; `ratio`: the model's size against the measured one's."""
    stages = {}
    for name in dict.fromkeys(name for cost, _ in factors for name in cost.stages):
        measured = [(cost.stages[name], own) for cost, own in factors if name in cost.stages]
        text = TEXT_OF_STAGE.get(name, "")
        memory = most(stage.peak_memory_bytes for stage, _ in measured)
        gpu_memory = most(stage.peak_gpu_memory_bytes for stage, _ in measured)
        grown = max(1.0, ratio)
        stages[name] = Stage(
            seconds=math.fsum([stage.seconds * own.get(text, 1.0) for stage, own in measured]) * ratio / len(measured),
            peak_memory_bytes=None if memory is None else round(memory * grown),
            peak_gpu_memory_bytes=None if gpu_memory is None else round(gpu_memory * grown),
        )
    return stages


def _is_whole(quantize: str) -> bool:
    """Whether a trial of these options, as JSON, quantized every linear."""
    options = json.loads(quantize) if quantize else {}
    return options.get("exclude") == [] and options.get("blocks") is None


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _cost(row: Sequence[str | None]) -> Cost:
    trial_id, name, device, finished_at, stages, calibrated, evaluated = map(_parsed, row[:7])
    tokens = {"calibration": calibrated, "evaluation": evaluated}
    return Cost(
        trial_id=trial_id,
        name=name,
        device=device,
        finished_at=finished_at,
        kind=Kind.of_texts(row[7:]),
        stages={stage: Stage(**cost) for stage, cost in stages.items()},
        tokens={text: count for text, count in tokens.items() if count},
    )


@functools.lru_cache(maxsize=1000)
def _seedless_text(text: str | None) -> str:
    return _seedless(json.loads(text or ""))


@functools.lru_cache(maxsize=1000)
def _parsed(text: str | None) -> Any:
    """The value of a JSON text, one object for all records that share it."""
    return None if text is None else json.loads(text)


def _seedless(node: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in node.items() if key != "seed"}, sort_keys=True)
