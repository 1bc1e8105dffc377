"""What an unfinished trial has so far, on disk: quantized decoder blocks and evaluations, each whole or absent.

blocks/0003.<sha256>.safetensors    a block's tensors; its report is in the file's metadata
evaluations/<name>.<sha256>.json    what was measured; original.<sha256>.safetensors: states of the original model

A file's name holds the hash of its content, so that it appears by one rename and proves itself when read.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.store import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    import wush
    from experiments.records import Data

log = logging.getLogger(__name__)

MAX_STATES_BYTES = 2**30


class Checkpoint:
    """The saved parts of one trial: `wush.SavedBlocks`, and evaluations.

    `made_by`: versions of the code that the parts depend on; parts of other code, or of what `depends_on` was told of,
    are reported and not used.
    `device`: what this attempt runs on; parts made otherwise are used, with a warning. `warnings`: this attempt's; each
    block keeps those in force. `check` is called before each write, and raises when the trial is not ours.
    """

    def __init__(
        self,
        folder: Path,
        made_by: dict[str, str],
        device: str,
        warnings: list[str],
        check: Callable[[], None],
    ) -> None:
        self._blocks, self._evaluations = folder / "blocks", folder / "evaluations"
        self._made_by, self._device, self._warnings, self._check = made_by, device, warnings, check
        self._told: set[str] = set()
        self.restored: list[int] = []

    def depends_on(self, **others: str) -> None:
        """Name what else the parts are made of, such as the hash of a text's token ids."""
        self._made_by = self._made_by | others

    def load(self, index: int) -> "tuple[wush.BlockReport, dict[str, Tensor]] | None":
        """A saved block; a damaged one is reported and removed, and None as one of other code."""
        found = self._read(self._blocks, f"{index:04d}.*.safetensors", f"decoder block {index}")
        if found is None:
            return None
        about, tensors = _unpacked(found)
        if not self._is_ours(about, "decoder blocks"):
            return None
        self._warnings.extend(warning for warning in about["warnings"] if warning not in self._warnings)
        self.restored.append(index)
        return _report(about["report"]), tensors

    def save(self, report: "wush.BlockReport", tensors: "dict[str, Tensor]") -> None:
        """Write a block; a disk that is full is a warning, as the trial can go on without."""
        about = self._origin() | {"report": asdict(report), "warnings": self._warnings}
        self._write(self._blocks, f"{report.index:04d}", "safetensors", _packed(tensors, about))

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """The values of an evaluation done before; None as `load`."""
        found = self._read(self._evaluations, f"{name}.*.json", f"evaluation {name}")
        if found is None:
            return None
        content = json.loads(found)
        return content["values"] if self._is_ours(content, "evaluations") else None

    def save_evaluation(self, name: str, values: dict[str, Any]) -> None:
        """Write an evaluation's values as soon as it is done."""
        content = json.dumps(self._origin() | {"values": values}).encode()
        self._write(self._evaluations, name, "json", content)

    def states(self) -> "Tensor | None":
        """The original model's last hidden states on the evaluated text, saved before; None as `load`."""
        found = self._read(self._evaluations, "original.*.safetensors", "the original's states")
        if found is None:
            return None
        about, tensors = _unpacked(found)
        return tensors["states"] if self._is_ours(about, "states of the original") else None

    def save_states(self, states: "Tensor") -> None:
        """Write the original's states, unless they are so large that making them again is as fast as reading them."""
        if states.nbytes <= MAX_STATES_BYTES:
            self._write(self._evaluations, "original", "safetensors", _packed({"states": states}, self._origin()))

    def remove(self, keep_blocks: bool = False) -> None:
        """Forget the parts of a trial that is done."""
        for folder in (self._evaluations,) if keep_blocks else (self._blocks, self._evaluations):
            for path in folder.glob("*"):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # not there, or another attempt's temporary file is
                folder.rmdir()

    def _read(self, folder: Path, pattern: str, what: str) -> bytes | None:
        for path in sorted(folder.glob(pattern)):
            try:
                content = path.read_bytes()
            except OSError as error:
                log.warning("%s: the saved file cannot be read (%s); it is made again", what, error)
                continue
            if hashlib.sha256(content).hexdigest() == path.name.split(".")[1]:
                return content
            log.warning("%s: the saved file is damaged (%s); it is made again", what, path.name)
            path.unlink(missing_ok=True)
        return None

    def _write(self, folder: Path, stem: str, suffix: str, content: bytes) -> None:
        self._check()
        path = folder / f"{stem}.{hashlib.sha256(content).hexdigest()}.{suffix}"
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(path, content)
            for older in set(folder.glob(f"{stem}.*.{suffix}")) - {path}:
                older.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"{error.strerror}: {folder} cannot be written, a resumed trial will do this part again")

    def _origin(self) -> dict[str, Any]:
        return {"made_by": self._made_by, "device": self._device}

    def _is_ours(self, about: dict[str, Any], what: str) -> bool:
        made_by = about["made_by"]
        differing = [key for key in self._made_by | made_by if made_by.get(key) != self._made_by.get(key)]
        if differing:
            self._tell(f"saved {what} were made by another {', '.join(differing)}; they are made again")
        elif about["device"] != self._device:
            self._tell(f"saved {what} were made on another device: {about['device']}")
        return not differing

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


def tokens_of(data: "dict[str, Data]") -> dict[str, str]:
    """What `depends_on` is told of the texts that a trial's parts are made of."""
    return {f"{name} tokens": text.ids_sha256 for name, text in data.items()}


def _packed(tensors: "dict[str, Tensor]", about: dict[str, Any]) -> bytes:
    """Safetensors bytes; float8 goes as uint8, as not every reader knows each kind of it."""
    import torch
    from safetensors.torch import save

    own = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    float8 = {key: str(t.dtype).removeprefix("torch.") for key, t in own.items() if "float8" in str(t.dtype)}
    own = {key: tensor.view(torch.uint8) if key in float8 else tensor for key, tensor in own.items()}
    return save(own, {"wush": json.dumps(about | {"float8": float8})})


def _unpacked(content: bytes) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """The two arguments of `_packed`; tensors are copies, as views into a file are not aligned as torch's own."""
    import torch
    from safetensors.torch import load

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = json.loads(header["__metadata__"]["wush"])
    float8 = about.pop("float8")
    tensors = {key: tensor.clone() for key, tensor in load(content).items()}
    return about, {key: t.view(getattr(torch, float8[key])) if key in float8 else t for key, t in tensors.items()}


def _report(values: dict[str, Any]) -> "wush.BlockReport":
    import wush

    def layer(own: dict[str, Any]) -> wush.LayerReport:
        lost = {key: own[key] and wush.Lost(**own[key]) for key in ("lost", "weight_lost")}
        return wush.LayerReport(**own | {"shared_input": tuple(own["shared_input"]), **lost})

    return wush.BlockReport(**values | {"layers": tuple(map(layer, values["layers"]))})
