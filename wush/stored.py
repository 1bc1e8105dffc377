"""What a safetensors file holds, read from its header alone."""

import json
from dataclasses import dataclass
from pathlib import Path

HEADER_LIMIT = 100_000_000  # bytes, of the format


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name there, its dtype as the format names it (`BF16`, `F8_E4M3`), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def tensors_of(path: Path) -> list[Stored]:
    """The tensors of a safetensors file; raises `ValueError` that names it when its header is damaged."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size) if size <= HEADER_LIMIT else b"")
        return [
            Stored(name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged") from error
