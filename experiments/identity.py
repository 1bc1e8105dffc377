"""What makes two trials the same trial: `trial_id`, a hash of everything in the config that can change the result."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

# How and where a trial runs; no key here can change its result.
NEUTRAL = ("tracking", "device", "progress", "results", "sweep")
# What an unquantized baseline does not use.
UNUSED_BY_BASELINE = ("transform", "algorithm", "calibration", "quantize")
BASELINE = "wush.Unquantized"
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


def trial_id(config: dict[str, Any]) -> str:
    """Sixteen hex digits; texts and local models count by their content, not by their path.

    Raises `ValueError` when a text or a local model cannot be read.
    """
    return hash_of(identity(config))


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that a trial's id is the hash of."""
    parts = relevant(config)
    for key in ("calibration", "evaluation"):
        if key in parts:
            parts[key] = text_identity(parts[key])
    return {**parts, "model": model_identity(config["model"])}


def relevant(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that can change the result. The top-level `seed` can only where other keys refer to it."""
    dropped = (*NEUTRAL, "seed", *(UNUSED_BY_BASELINE if is_baseline(config) else ()))
    parts = {key: value for key, value in config.items() if key not in dropped}
    if "transform" in parts and config["algorithm"]["_target_"] == "wush.Rtn":  # refits nothing
        parts["transform"] = {key: value for key, value in parts["transform"].items() if key != "refit"}
    return parts


def is_baseline(config: dict[str, Any]) -> bool:
    """Whether a config is the unquantized baseline."""
    return config["format"]["_target_"] == BASELINE


def text_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A text node with its file's content in place of its path."""
    return {**{k: v for k, v in node.items() if k != "path"}, "sha256": instantiate(node).sha256}


def model_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A model node; of a local folder, with the content of its weights, config and tokenizer in place of its path."""
    if "path" not in node or not Path(node["path"]).expanduser().is_dir():
        return node
    folder = Path(node["path"]).expanduser()
    paths = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    try:
        files = {path.name: _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)}
    except OSError as error:
        raise ValueError(f"model.path={node['path']}: {error}; make its files readable") from error
    return {**{k: v for k, v in node.items() if k != "path"}, "files": files}


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Of a file's content; read once a process while its size and time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
