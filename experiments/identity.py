"""What makes two trials the same trial: `trial_id`, a hash of everything in the config that can change the result."""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from wush.version import METHOD_VERSION

# How and where a trial runs; no key here can change its result.
NEUTRAL = ("tracking", "device", "kernels", "keep_operands", "progress", "results", "keep_blocks", "sweep", "scale")
# Of a text: the windows run at a time. Every sum over windows is made window by window, so this changes no result.
NEUTRAL_OF_TEXT = ("batch_size",)
# Of a text: which windows are cut and how they are run, not what the text is.
WINDOWS = ("windows", "window_length", "batch_size", "seed", "bos")
TEXTS = ("calibration", "evaluation")
# What an unquantized baseline does not use.
UNUSED_BY_BASELINE = ("transform", "algorithm", "calibration", "quantize", "measure")
BASELINE = "wush.Unquantized"
# What loading a model and its tokenizer may read of a folder: weights, configs, vocabularies, code, chat templates.
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.gguf", "*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.vocab", "*.bpe"),
    *("*.jinja", "**/*.jinja", "**/*.py"),
)
# Of tasks: what says how each is run, which their specs say in full; and the permission, by which some are left out.
OF_SPECS = ("tasks", "num_fewshot", "chat_template", "limit", "generation", "include", "allow_code_execution")


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
        """The part of a resolved config that a trial's id is the hash of, and the method's version.

        Raises `ValueError` when a text or a local model cannot be read.
        """
        parts = self.relevant(config) | {"method_version": METHOD_VERSION}
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
        refits = config["algorithm"]["_target_"] == "wush.Gptq"
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
            own = {key: value for key, value in node.items() if key not in OF_SPECS}
            tasks = _specs(_built(node))  # which refuses what its keys alone show to be wrong
            included = {"include": _folder_content(node["include"])} if node["include"] else {}
            return {**own, **included, "tasks": tasks, "text": self._text(node["text"])}
        built = _built(node)  # which refuses windows that cannot be, and those alone: others of the text may
        text = json.dumps({key: value for key, value in node.items() if key not in WINDOWS})
        if text not in self._sha256_of_text:
            try:
                self._sha256_of_text[text] = built.sha256
            except ValueError as error:  # told for every config that has it, found out once
                self._sha256_of_text[text] = error
        sha256 = self._sha256_of_text[text]
        if isinstance(sha256, ValueError):
            raise sha256.with_traceback(None)
        own = {key: value for key, value in node.items() if key not in NEUTRAL_OF_TEXT}
        if sha256 is None:  # of a dataset; only a stream is read through a buffer
            return own if own["read"] == "streamed" else own | {"buffer": None}
        chooses = node["windows"] is not None  # of all its windows, in order, no seed chooses any
        unused = ("path",) if chooses else ("path", "seed")
        return {**{key: value for key, value in own.items() if key not in unused}, "sha256": sha256}


def _specs(harness: Any) -> list[dict[str, Any]]:
    """How each task that is not left out is run, by name: the same however, and in whatever order, that is written."""
    found = []
    for spec in sorted(harness.complete(), key=lambda spec: spec.task):
        own = {key: value for key, value in asdict(spec).items() if key != "only_with_code_execution"}
        generation = _whole(dict(harness.generation or {}) | own["generation"])
        found.append(own | {"only": _set(spec.only), "never": _set(spec.never), "generation": generation})
    return found


def _set(values: Iterable[Any]) -> list[Any]:
    """The values of a list of which order and repetition do not matter."""
    return sorted(set(values))


def _whole(value: Any) -> Any:
    """Plain values in which a whole number is one number, written 1 or 1.0."""
    if isinstance(value, dict):
        return {key: _whole(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_whole(own) for own in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
    if key == "quantize":
        return value | {name: _set(value[name]) for name in ("blocks", "exclude") if value.get(name)}
    if key == "transform" and not refits:
        value = {name: own for name, own in value.items() if name != "refit"}
    return _whole(value)


def is_baseline(config: dict[str, Any]) -> bool:
    """Whether a config is the unquantized baseline."""
    return config["format"]["_target_"] == BASELINE


def model_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A model node; of a local folder, with the content of all that loading it may read in place of its path.

    A folder has no revisions.
    """
    if "path" not in node or not Path(node["path"]).expanduser().is_dir():
        return node
    folder = Path(node["path"]).expanduser()
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    paths = {str(path.relative_to(folder)): path for path in sorted(found) if "__pycache__" not in path.parts}
    try:
        files = {name: _sha256(p, p.stat().st_size, p.stat().st_mtime_ns) for name, p in paths.items()}
    except OSError as error:
        raise ValueError(f"model.path={node['path']}: {error}; make its files readable") from error
    return {**{k: v for k, v in node.items() if k not in ("path", "revision")}, "files": files}


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
