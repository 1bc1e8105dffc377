"""What a file of weights holds, read without its values: safetensors, GGUF, and what `torch.save` writes."""

import json
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

HEADER_LIMIT = 100_000_000  # bytes, of the safetensors format

# Types of a GGUF file's metadata of one size, as `struct` names them; the other two are strings and arrays.
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name there, its dtype as the format names it (`BF16`, `F8_E4M3`, `Q4_1`), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


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


def tensors_of_pickle(path: Path) -> list[Stored]:
    """The tensors of a file that `torch.save` wrote, dtypes as in a safetensors file; their values are not read.

    Raises whatever torch says of a file that is damaged or holds more than tensors.
    """
    import torch

    content = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    return [
        Stored(name, _short(str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    ]


def _short(dtype: str) -> str:
    """A dtype of torch as safetensors name it: I8 of torch.int8, BF16 of torch.bfloat16."""
    return dtype.removeprefix("torch.").upper().replace("FLOAT", "F").replace("INT", "I")


def tensors_of_gguf(path: Path) -> list[Stored]:
    """The tensors of a GGUF file; raises `ValueError` that names it when its header is damaged.

    The package gguf reads headers too, but takes seconds for a vocabulary.
    """
    from gguf import GGMLQuantizationType

    try:
        with path.open("rb") as file:
            magic, _, tensors, entries = _read(file, "4sIQQ")
            if magic != b"GGUF":
                raise ValueError("no GGUF file")
            for _ in range(entries):
                _string(file)
                _skip(file, *_read(file, "I"))
            return [_tensor(file, GGMLQuantizationType) for _ in range(tensors)]
    except (ValueError, KeyError, struct.error) as error:
        raise ValueError(f"{path} is no GGUF file, or damaged") from error


def _tensor(file: BinaryIO, types: type) -> Stored:
    name = _string(file).decode()
    (dimensions,) = _read(file, "I")
    shape = _read(file, f"{dimensions}Q")
    kind, _ = _read(file, "IQ")
    return Stored(name, types(kind).name, tuple(reversed(shape)))


def _skip(file: BinaryIO, kind: int) -> None:
    """Pass over a value of the metadata."""
    if kind == GGUF_STRING:
        _string(file)
    elif kind != GGUF_ARRAY:
        file.seek(struct.calcsize(GGUF_SCALARS[kind]), 1)
    else:
        of, count = _read(file, "IQ")
        if of in GGUF_SCALARS:
            file.seek(count * struct.calcsize(GGUF_SCALARS[of]), 1)
        else:
            for _ in range(count):
                _skip(file, of)


def _string(file: BinaryIO) -> bytes:
    (size,) = _read(file, "Q")
    if size > HEADER_LIMIT:
        raise ValueError("a string longer than any header")
    return file.read(size)


def _read(file: BinaryIO, fields: str) -> tuple[Any, ...]:
    """Values of a little-endian file, as `struct` names them, without padding."""
    layout = struct.Struct(f"<{fields}")
    return layout.unpack(file.read(layout.size))
