"""Texts for calibration and evaluation, and their windows of tokens.

A text on this machine is known by its content: its SHA-256 goes into a trial's identity and record. Torch is
imported only to cut windows, so that texts can be read and checked before any heavy work.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

# Fills a window that is shorter than others up to their length; no token of any vocabulary.
PAD = -1

# What each embedded text is, byte for byte; another text is another name, for results hang on these.
SHA256 = {
    "calibration": "e216bcddd78d5b2676bf8f6380e08a6b725bb0658d6313da680d1357235192a3",
    "evaluation": "7c7267e33952d166ea14bbf9c808241a7a092a89b60068a7012f00c8ee88eb09",
    "validation": "a8d914e9d3ee33af7379200d49fa51ef9c51e415eb09a47e492e293e90db7568",
    "held_out": "30d2384260afa861611c100620e27d187f5a80696db0bf0f4f4121fcda0e50c5",
    "code": "1b6f294202a16c32684e53de59976dd7c63d2d85e08af633c486f2e6c9fb12f4",
}


@dataclass(frozen=True)
class Batch:
    """Windows of equal length that are run together: `rows` `(B,)` tells which they are, `ids` `(B, m)` their tokens.

    No token is padding.
    """

    rows: Tensor
    ids: Tensor


def batches(windows: Tensor, size: int) -> list[Batch]:
    """Windows `(W, M)`, shorter ones filled with `PAD` at their end, as batches of up to `size` without any padding.

    Windows of equal length are together and in order, the longest first: what does not fit in memory fails at once.
    Raises `ValueError` for a window that is padding alone, or has padding before a token.
    """
    import torch

    real = windows != PAD
    lengths = real.sum(1)
    if not lengths.all() or not torch.equal(real, torch.arange(windows.shape[1]) < lengths[:, None]):
        raise ValueError("windows are filled with PAD at their end alone, and each has a token")
    found = []
    for length in lengths.unique().flip(0).tolist():
        for rows in (lengths == length).nonzero().flatten().split(size):
            found.append(Batch(rows, windows[rows, :length]))
    return found


@dataclass(frozen=True, kw_only=True)
class TextWindows(ABC):
    """A text and how windows of tokens are cut from it, `batch_size` of which are run at a time.

    `windows` None takes all that the text holds; `seed` None spaces them evenly, else they are a random choice.
    `bos`: `first` leaves the token of beginning to the tokenizer, which puts it, if at all, before a text or a
    document; `every` has each window begin with it, for models that go wrong without. True is `every`.
    """

    windows: int | None
    window_length: int
    batch_size: int
    seed: int | None = None
    bos: Literal["first", "every"] | bool = "first"

    def __post_init__(self) -> None:
        if self.bos not in ("first", "every", True, False):
            raise ValueError(f"bos={self.bos!r} is neither first nor every")
        if self.bos in ("every", True) and self.window_length < 2:
            raise ValueError(f"bos=every: a window of {self.window_length} has no room for a token of the text")

    @abstractmethod
    def text(self) -> str | None:
        """The text itself; None of one that is downloaded when its windows are cut."""

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the text's UTF-8 bytes; None of one that is downloaded when its windows are cut."""
        text = self.text()
        return None if text is None else hashlib.sha256(text.encode()).hexdigest()

    def source(self) -> str | None:
        """Where a downloaded text comes from, such as `owner/dataset@commit`; None of one on this machine."""
        return None

    def cut(self, tokenizer: Any, what: str) -> Tensor:
        """The windows, `(W, M)` int64; raises `ValueError` naming `what` for too short a text.

        Windows shorter than `M` are filled with `PAD` at their end; `batches` takes it off again.
        """
        bos = self.beginning(tokenizer, what)
        ids = tokenizer(self.text(), return_tensors="pt", verbose=False).input_ids[0]
        return windows(ids, self.windows, self.window_length, what, self.seed, bos)

    def beginning(self, tokenizer: Any, what: str) -> int | None:
        """The token that each window begins with, None where that is the tokenizer's affair.

        Raises `ValueError` for a tokenizer without one.
        """
        if self.bos in ("first", False):
            return None
        if tokenizer.bos_token_id is None:
            raise ValueError(f"{what}.bos=every: the model's tokenizer has no token of beginning; use {what}.bos=first")
        return int(tokenizer.bos_token_id)


@dataclass(frozen=True, kw_only=True)
class EmbeddedText(TextWindows):
    """A text that comes with the package, the same everywhere (`wush/embedded/README.md`); no two share a passage.

    - calibration, evaluation: two halves of Python's topic documentation.
    - validation: pages of reference on graphs, to choose settings by; held_out: on machine learning, to report.
    - code: modules of Python's standard library.
    """

    part: Literal["calibration", "evaluation", "validation", "held_out", "code"]

    def text(self) -> str:
        """The content; raises `ValueError` for a file that is missing or is not what was published."""
        return _embedded(self.part)


@functools.cache
def _embedded(part: str) -> str:
    file = resources.files("wush.embedded") / f"{part}.txt"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"the embedded text {file} cannot be read: {error}; install the package anew") from error
    if hashlib.sha256(content).hexdigest() != SHA256[part]:
        raise ValueError(f"the embedded text {file} was changed or damaged: another SHA-256; install the package anew")
    return content.decode()


@dataclass(frozen=True, kw_only=True)
class TextFile(TextWindows):
    """A UTF-8 text file."""

    path: str

    def text(self) -> str:
        """The file's content; raises `ValueError` when it is missing, is no text or is empty."""
        try:
            content = Path(self.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text file {self.path!r}: {error}; give the path of a UTF-8 text file") from error
        if not content.strip():
            raise ValueError(f"text file {self.path!r} is empty; give the path of a UTF-8 text file")
        return content


def windows(
    ids: Tensor, count: int | None, length: int, what: str, seed: int | None = None, bos: int | None = None
) -> Tensor:
    """`count` of the non-overlapping windows of `length` tokens in `ids`, `(count, length)` in text order.

    None takes them all; with a seed the choice is random, else evenly spaced. With `bos` each window begins with that
    token (`every_window`). Raises `ValueError`, with the remedy, when the text has too few.
    """
    import torch

    every = every_window(ids, length, bos)
    available = len(every)
    count = available if count is None else count
    if available < max(count, 1):
        raise ValueError(
            f"the {what} text has {len(ids):,} tokens, {available} windows of {length}, but {max(count, 1)} are asked "
            f"for; use a longer text, {what}.window_length={max(len(ids) // max(count, 1), 1)} or fewer {what}.windows"
        )
    if seed is None:
        return every[torch.arange(count) * available // count]
    return every[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].sort().values]


def every_window(ids: Tensor, length: int, bos: int | None) -> Tensor:
    """All non-overlapping windows of `length` tokens in `ids`, `(W, length)`: no token between two is left out.

    With `bos` each window begins with that token: the text's own where it has one there, else one put before.
    """
    import torch

    if bos is None:
        return ids[: len(ids) // length * length].view(len(ids) // length, length)
    found: list[list[int]] = []
    position = 0
    while True:
        window = beginning_with(bos, ids[position : position + length].tolist(), length)
        if len(window) < length:
            return torch.tensor(found, dtype=torch.long).view(len(found), length)
        found.append(window)
        position += length if ids[position] == bos else length - 1


def beginning_with(bos: int | None, ids: list[int], length: int) -> list[int]:
    """Up to `length` tokens from the start of `ids`; with `bos`, the first of them is that token."""
    if bos is None or ids[:1] == [bos]:
        return ids[:length]
    return [bos, *ids[: length - 1]]


def filled(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Windows of up to `length` tokens as one tensor `(W, length)` int64, filled with `PAD` at their end."""
    import torch

    return torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows], dtype=torch.long)


def sha256_of_ids(ids: Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
