"""What makes two trials the same trial: `trial_id`, a hash of everything in the config that can change the result."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

# How and where a trial runs; no key here can change its result.
NEUTRAL = ("tracking", "device", "kernels", "keep_operands", "progress", "results", "keep_blocks", "sweep", "scale")
# Of a text: the windows run at a time. Every sum over windows is made window by window, so this changes no result.
NEUTRAL_OF_TEXT = ("batch_size",)
# Of a text: which windows are cut and how they are run, not what the text is.
WINDOWS = ("windows", "window_length", "batch_size", "seed", "bos")
TEXTS = ("calibration", "evaluation")
# What an unquantized baseline does not use.
UNUSED_BY_BASELINE = ("transform", "algorithm", "calibration", "quantize")
BASELINE = "wush.Unquantized"
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


def trial_id(config: dict[str, Any]) -> str:
    """Sixteen hex digits; texts and local models count by their content, not by their path.

    Raises `ValueError` when a text or a local model cannot be read.
    """
    return hash_of(Identities().identity(config))


class Identities:
    """The identities of a sweep's configs: each text is read once, and a part that configs share is worked out once.

    A shared part is known as the same object, so the configs must outlive this.
    """

    def __init__(self) -> None:
        self._relevant: dict[tuple[str, int, bool], Any] = {}
        self._identified: dict[tuple[str, int], Any] = {}
        self._sha256_of_text: dict[str, str | ValueError | None] = {}

    def identity(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of a resolved config that a trial's id is the hash of.

        Raises `ValueError` when a text or a local model cannot be read.
        """
        parts = self.relevant(config)
        for key in ("model", *TEXTS):
            if key in parts:
                known = (key, id(config[key]))
                if known not in self._identified:
                    identify = model_identity if key == "model" else self._text
                    self._identified[known] = identify(config[key])
                parts[key] = self._identified[known]
        return parts

    def relevant(self, config: dict[str, Any]) -> dict[str, Any]:
        """The keys that can change the result. The top-level `seed` can only where other keys refer to it."""
        dropped = (*NEUTRAL, "seed", *(UNUSED_BY_BASELINE if is_baseline(config) else ()))
        refits = config["algorithm"]["_target_"] != "wush.Rtn"
        parts = {}
        for key, value in config.items():
            if key not in dropped:
                known = (key, id(value), refits)
                if known not in self._relevant:
                    self._relevant[known] = _relevant(key, value, refits)
                parts[key] = self._relevant[known]
        return parts

    def _text(self, node: dict[str, Any]) -> dict[str, Any]:
        """A text node with its file's content in place of its path; of tasks, with that of their folder as well.

        A dataset of the hub is known by its name and revision: nothing is downloaded for an identity.
        """
        if "text" in node:
            own = {key: value for key, value in node.items() if key != "include"}
            _built(node)  # which refuses what its keys alone show to be wrong
            included = {"include": _folder_content(node["include"])} if node["include"] else {}
            return {**own, **included, "text": self._text(node["text"])}
        text = json.dumps({key: value for key, value in node.items() if key not in WINDOWS})
        if text not in self._sha256_of_text:
            try:
                self._sha256_of_text[text] = _built(node).sha256
            except ValueError as error:  # told for every config that has it, found out once
                self._sha256_of_text[text] = error
        sha256 = self._sha256_of_text[text]
        if isinstance(sha256, ValueError):
            raise sha256.with_traceback(None)
        own = {key: value for key, value in node.items() if key not in NEUTRAL_OF_TEXT}
        return own if sha256 is None else {**{k: v for k, v in own.items() if k != "path"}, "sha256": sha256}


def _built(node: dict[str, Any]) -> Any:
    """What a node stands for; raises the `ValueError` that says what is wrong with it, not Hydra's."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from None


def text_of(node: dict[str, Any]) -> dict[str, Any]:
    """The text of a calibration or evaluation node or identity: the node itself, or that which stands beside tasks."""
    return node.get("text", node)


def _relevant(key: str, value: Any, refits: bool) -> Any:
    """A top-level value without what cannot change the result."""
    if key in TEXTS and "text" in value:  # answers that are sampled depend on how many are at a time
        return {**value, "text": _relevant(key, value["text"], refits)}
    if key in TEXTS:
        return {name: own for name, own in value.items() if name not in NEUTRAL_OF_TEXT}
    without = ("refit",) if key == "transform" and not refits else ()
    return {name: own for name, own in value.items() if name not in without} if without else value


def is_baseline(config: dict[str, Any]) -> bool:
    """Whether a config is the unquantized baseline."""
    return config["format"]["_target_"] == BASELINE


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


def _folder_content(folder: str) -> dict[str, str]:
    """The SHA-256 of each task definition in a folder, and of what they may refer to."""
    root = Path(folder).expanduser()
    try:
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
        found = {str(p.relative_to(root)): _sha256(p, p.stat().st_size, p.stat().st_mtime_ns) for p in paths}
    except OSError as error:
        raise ValueError(f"evaluation.include={folder}: {error}; make its files readable") from error
    if not found:
        raise ValueError(f"evaluation.include={folder}: there are no files; give a folder of task definitions")
    return found


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Of a file's content; read once a process while its size and time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
