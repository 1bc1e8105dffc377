"""What makes two trials the same trial: `trial_id`, a hash of everything in the config that can change the result."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

# How and where a trial runs; no key here can change its result.
NEUTRAL = ("tracking", "device", "progress", "results", "sweep")
# What an unquantized baseline does not use.
UNUSED_BY_BASELINE = ("transform", "algorithm", "calibration", "quantize", "seed")
BASELINE = "wush.Unquantized"


def trial_id(config: dict[str, Any]) -> str:
    """Sixteen hex digits; texts and local models count by their content, not by their path.

    Raises `ValueError` when a text or a local model cannot be read.
    """
    return hash_of(identity(config))


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that a trial's id is the hash of."""
    dropped = NEUTRAL + (UNUSED_BY_BASELINE if config["format"]["_target_"] == BASELINE else ())
    parts = {key: value for key, value in config.items() if key not in dropped}
    for key in ("calibration", "evaluation"):
        if key in parts:
            parts[key] = text_identity(parts[key])
    return {**parts, "model": model_identity(config["model"])}


def text_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A text node with its file's content in place of its path."""
    return {**{k: v for k, v in node.items() if k != "path"}, "sha256": instantiate(node).sha256}


def model_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A model node; of a local folder, with its files' names, sizes and times in place of its path."""
    path = Path(node.get("path", "")).expanduser()
    if "path" not in node or not path.is_dir():
        return node
    files = [[str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(path.rglob("*"))]
    return {**{k: v for k, v in node.items() if k != "path"}, "files": hash_of(files)}


def hash_of(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
